"""Strong-constraint 4DVar: the model is perfect, the control is the initial state."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Float

from amortlib.energy import Energy
from amortlib.laplace import Mode
from amortlib.solvers.base import AbstractSolver, Analysis, analyse, minimise
from amortlib.types import Array, Event

__all__ = ["StrongFourDVar"]


class StrongFourDVar(AbstractSolver):
    """Minimises J(x_0) over a window, by a general minimiser on the adjoint model's gradient.

    J(x_0) = 1/2 |x_0 - x_b|^2_{B^-1} + 1/2 sum_t |y_t - H_t(M_t(x_0))|^2_{R_t^-1}: Le Dimet and
    Talagrand (1986), *Variational algorithms for analysis and assimilation of meteorological
    observations*, Tellus 38A. The forward model of the energy integrates the dynamics
    (`amortlib.problems.Window`), and how it is differentiated is chosen there.

    Attributes:
        energy: J.
        minimiser: an optimistix minimiser or least-squares solver, by default BFGS in the control
            variable.
        max_steps: bound on its steps.
        derivative: `"fwd"` or `"bwd"` where the forward model has only tangent-linear or only
            adjoint products. The latter needs a least-squares solver: optimistix' minimisers
            linearise before they transpose.
    """

    energy: Energy
    minimiser: Any
    max_steps: int = eqx.field(static=True)
    derivative: Mode | None = eqx.field(static=True)

    def __init__(
        self,
        energy: Energy,
        *,
        minimiser: Any = None,
        max_steps: int = 256,
        derivative: Mode | None = None,
    ):
        """Set the problem; arguments as the attributes."""
        self.energy = energy
        self.minimiser = optx.BFGS(1e-6, 1e-6) if minimiser is None else minimiser
        self.max_steps = max_steps
        self.derivative = derivative

    def __call__(
        self, event: Event, *, throw: bool = True, start: Float[Array, " d"] | None = None
    ) -> Analysis:
        """Analyse one event, from the background or from another `start`, shape `(d,)`."""
        prior = self.energy.prior
        first = jnp.zeros_like(prior.loc) if start is None else prior.whiten(start)
        v, steps, result = minimise(
            self.energy,
            event,
            self.minimiser,
            first,
            max_steps=self.max_steps,
            derivative=self.derivative,
        )
        return analyse(
            self.energy,
            v,
            event,
            outer_steps=steps,
            result=result,
            throw=throw,
            derivative=self.derivative,
        )
