"""3DVar: minimise J where everything was seen at the time of the state."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx

from amortlib.energy import Energy
from amortlib.gaussian import Gaussian, GaussMarkov
from amortlib.solvers.base import AbstractSolver, Analysis, analyse, minimise
from amortlib.types import Array, Event

__all__ = ["ThreeDVar"]


class ThreeDVar(AbstractSolver):
    """Minimises J(x) = 1/2 |x - x_b|^2_{B^-1} + 1/2 |y - H(x)|^2_{R^-1}, with H nonlinear.

    Courtier et al. (1998), *The ECMWF implementation of three-dimensional variational
    assimilation (3D-Var)*, Q. J. R. Meteorol. Soc. 124, equation 1. No model: observations of
    other times are taken as if they were made at the time of the state. Where H is affine this is
    optimal interpolation, found by iteration.

    Attributes:
        energy: J.
        minimiser: an optimistix least-squares solver or minimiser, by default
            Levenberg-Marquardt in the control variable.
        max_steps: bound on its steps.
    """

    energy: Energy
    minimiser: Any
    max_steps: int = eqx.field(static=True)

    def __init__(
        self,
        prior: Gaussian | GaussMarkov,
        operator: Callable[[Array], Array],
        obs_sd: float | Array | None = None,
        *,
        minimiser: Any = None,
        max_steps: int = 64,
    ):
        """Set the problem.

        Args:
            prior: background density N(x_b, B).
            operator: H, from a state to its observations.
            obs_sd: square root of the diagonal of R, for events without an `sd`.
            minimiser: see the attributes.
            max_steps: likewise.
        """
        self.energy = Energy(prior, operator, obs_sd)
        self.minimiser = optx.LevenbergMarquardt(1e-6, 1e-6) if minimiser is None else minimiser
        self.max_steps = max_steps

    def __call__(self, event: Event, *, throw: bool = True) -> Analysis:
        """Analyse one event from the background."""
        start = jnp.zeros_like(self.energy.prior.loc)
        v, steps, result = minimise(
            self.energy, event, self.minimiser, start, max_steps=self.max_steps
        )
        return analyse(self.energy, v, event, outer_steps=steps, result=result, throw=throw)
