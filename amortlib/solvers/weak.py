"""Weak-constraint 4DVar: the model may err, and its errors are controls too."""

from typing import Any

from jaxtyping import ArrayLike, Float

from amortlib.energy import Energy
from amortlib.gaussian import Gaussian
from amortlib.problems import WeakWindow, Window
from amortlib.solvers.base import AbstractSolver, Analysis
from amortlib.solvers.strong import StrongFourDVar
from amortlib.types import Array, Event

__all__ = ["WeakFourDVar"]


class WeakFourDVar(AbstractSolver):
    """Minimises J(x_0, eta_1, ..., eta_T), with 1/2 sum_t |eta_t|^2_{Q_t^-1} for the model errors.

    Tremolet (2006), *Accounting for an imperfect model in 4D-Var*, Q. J. R. Meteorol. Soc. 132.
    In the control variable it is the strong-constraint cost of a longer control, and is minimised
    as that is. As Q goes to 0 the errors do, and x_0 becomes the strong-constraint analysis.

    The analysis is of the whole control, flat: `trajectory(analysis.mode)` gives the states.

    Attributes:
        energy: J of the whole control.
        window: the model with its errors, from a control to the states and the observations.
        strong: the solver, on the cost of the whole control.
    """

    energy: Energy
    window: WeakWindow
    strong: StrongFourDVar

    def __init__(
        self,
        background: Gaussian,
        window: Window,
        model_error_sd: ArrayLike,
        obs_sd: float | Array | None = None,
        *,
        minimiser: Any = None,
        max_steps: int = 512,
    ):
        """Set the problem.

        Args:
            background: density N(x_b, B) of x_0.
            window: the model and the operator.
            model_error_sd: square root of the diagonal of Q, a number or shape `(k,)`.
            obs_sd: square root of the diagonal of R, for events without an `sd`.
            minimiser: see [`StrongFourDVar`][].
            max_steps: likewise.
        """
        self.window = WeakWindow(window)
        prior = self.window.prior(background, model_error_sd)
        self.energy = Energy(prior, self.window, obs_sd)
        self.strong = StrongFourDVar(self.energy, minimiser=minimiser, max_steps=max_steps)

    def trajectory(self, control: Float[Array, " d"]) -> Float[Array, "n k"]:
        """The states of the window that a control stands for."""
        return self.window.trajectory(control)

    def __call__(self, event: Event, *, throw: bool = True) -> Analysis:
        """Analyse one event from the background and a perfect model."""
        return self.strong(event, throw=throw)
