"""What every solver is and returns: an event in, an analysis out."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import ArrayLike, Float, Int

from amortlib.energy import Energy
from amortlib.laplace import Mode, laplace, residual_jacobian
from amortlib.types import Array, Event

__all__ = ["AbstractSolver", "Analysis", "analyse", "minimise"]


class Analysis(eqx.Module):
    """What a solver returns for one event.

    Attributes:
        mode: the minimiser of J that was found, shape `(d,)`.
        energy: J there, in nats.
        covariance: inverse of the Gauss-Newton Hessian of J there, shape `(d, d)`: the posterior
            covariance where the forward model is affine, an approximation elsewhere.
        outer_steps: steps of the minimiser.
        inner_steps: steps of the linear solver within them, 0 where it is a direct one.
        gradient_norm: norm of the gradient of J in the control variable v (x = x_b + B^{1/2} v),
            which has no units: 0 at a minimum, and of the order of sqrt(2 J) at random.
        result: how it ended; `message` says it in words.
    """

    mode: Float[Array, " d"]
    energy: Float[Array, ""]
    covariance: Float[Array, "d d"]
    outer_steps: Int[Array, ""]
    inner_steps: Int[Array, ""]
    gradient_norm: Float[Array, ""]
    result: Any

    @property
    def message(self) -> str:
        """How it ended, in words. Of a single analysis, outside compiled programs."""
        words = optx.RESULTS[self.result]
        return words if words else "converged"

    @property
    def converged(self) -> Array:
        """Whether it ended well."""
        return self.result == optx.RESULTS.successful


class AbstractSolver(eqx.Module):
    """A method of variational assimilation: finds the mode of p(x | y, m) for one event.

    Maths for one event; `eqx.filter_vmap` makes it many. Any mask will do; with nothing observed
    the analysis is the background and its covariance.

    Attributes:
        energy: J.
    """

    energy: eqx.AbstractVar[Energy]

    @abc.abstractmethod
    def __call__(self, event: Event, *, throw: bool = True) -> Analysis:
        """Analyse one event (y, mask).

        Args:
            event: the event.
            throw: raise where the method did not converge, with the reason. With `False` the
                reason is in `result` and nothing is raised, for events in a batch of which some
                may fail.
        """


def minimise(
    energy: Energy,
    event: Event,
    minimiser: Any,
    start: Float[Array, " d"],
    *,
    max_steps: int,
    derivative: Mode | None = None,
) -> tuple[Float[Array, " d"], Int[Array, ""], Any]:
    """Minimise J = 1/2 |r(v)|^2 in the control variable with an optimistix solver.

    Args:
        energy: J.
        event: the event.
        minimiser: an optimistix minimiser or least-squares solver.
        start: control variable to start from.
        max_steps: bound on the steps.
        derivative: `"fwd"` or `"bwd"`: make everything by tangent-linear products, or by
            adjoint ones, for a forward model that has nothing else. By default Jacobians are made
            by the former and gradients by the latter.

    Returns:
        v at the end, the number of steps, the result code.
    """
    options = {"jac": derivative or "fwd", "autodiff_mode": derivative or "bwd"}
    solution = optx.least_squares(
        lambda v, event: energy.residual(v, event),
        minimiser,
        start,
        args=event,
        options=options,
        max_steps=max_steps,
        throw=False,
    )
    return solution.value, solution.stats["num_steps"], solution.result


def analyse(
    energy: Energy,
    v: Float[Array, " d"],
    event: Event,
    *,
    outer_steps: ArrayLike,
    inner_steps: ArrayLike = 0,
    result: Any,
    throw: bool,
    derivative: Mode | None = None,
) -> Analysis:
    """Make the analysis at a control variable; arguments as the fields of [`Analysis`][]."""
    mode, by = energy.prior.colour(v), derivative or "fwd"
    value = energy(mode, event)
    finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(v))
    result = optx.RESULTS.where(finite, result, optx.RESULTS.nonfinite)
    jacobian, residual = residual_jacobian(energy, v, event, mode=by), energy.residual(v, event)
    gradient = jacobian.T @ residual
    # A minimiser that asks for steps smaller than rounding allows runs out of steps at the
    # minimum. There the gradient is zero to the rounding of the sum that makes it, or the
    # Gauss-Newton step that is left would lower J by less than the last digit of J: no minimiser
    # that compares values of J can take it.
    eps = jnp.finfo(v.dtype).eps
    rounding = 8 * eps * jnp.linalg.norm(jacobian) * jnp.linalg.norm(residual)
    step = jnp.linalg.solve(jacobian.T @ jacobian, gradient)
    there = (jnp.linalg.norm(gradient) <= rounding) | (0.5 * gradient @ step <= eps * value)
    out_of_steps = result == optx.RESULTS.nonlinear_max_steps_reached
    result = optx.RESULTS.where(there & out_of_steps, optx.RESULTS.successful, result)
    analysis = Analysis(
        mode=mode,
        energy=value,
        covariance=laplace(energy, mode, event, full=False, derivative=by).covariance(),
        outer_steps=jnp.asarray(outer_steps),
        inner_steps=jnp.asarray(inner_steps),
        gradient_norm=jnp.linalg.norm(gradient),
        result=result,
    )
    if throw:
        analysis = result.error_if(analysis, result != optx.RESULTS.successful)
    return analysis
