"""The mode of a density that is only known through its logarithm."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Float

from amortlib.types import Array

__all__ = ["density_mode", "stationary_point"]


@jax.custom_jvp
def _stationary(x: Array, curvature: Array, slope: Array) -> Array:
    """`x`, where slope(x) = 0; its derivative is that of the root."""
    return x


@_stationary.defjvp
def _stationary_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, curvature, _ = primals
    return x, -jnp.linalg.solve(curvature, tangents[2])


def stationary_point(
    fall: Callable[[Array], Array], x: Float[Array, " d"], *, polish: bool = False
) -> Float[Array, " d"]:
    """`x`, with the derivative of the stationary point of `fall` that it is.

    By the implicit function theorem: with s the slope of `fall`, s(x; y) = 0 for all y gives
    dx = -(ds/dx)^-1 (ds/dy) dy, forward and reverse. Whatever `x` was computed from has no say
    in it. Nothing is computed beyond `x` where nobody differentiates.

    Args:
        fall: a function of one point, twice differentiable, that may depend on traced values.
        x: where its slope is zero.
        polish: whether the derivative is that at the end of one Newton step from `x`, where that
            makes the slope smaller. Derivatives hang on where exactly the point is more than
            values do, and the curvature has to be known for them anyway.
    """
    x = jax.lax.stop_gradient(x)
    slope = jax.grad(fall)
    curve = jax.jacfwd(slope)
    at = x
    if polish:
        here = slope(x)
        there = x - jnp.linalg.solve(curve(x), here)
        better = jnp.sum(slope(there) ** 2) < jnp.sum(here**2)  # false where it is no number
        at = jax.lax.stop_gradient(jnp.where(better, there, x))
    return _stationary(x, jax.lax.stop_gradient(curve(at)), slope(at))


def density_mode(
    log_prob: Callable[[Array], Array],
    starts: Float[Array, "n d"],
    *,
    climbs: int = 1,
    minimiser: Any | None = None,
    max_steps: int = 128,
    polish: int = 4,
) -> Float[Array, " d"]:
    """The highest point of a log-density that ascent from the best of some starts arrives at.

    Quasi-Newton ascent (BFGS), then Newton steps, of which those count that make the slope
    smaller and do not lower the density: rounding in the density itself stops the first when the
    slope is still a thousandth. With several modes it is the highest of those that the best
    `climbs` starts lead to; draws of the density are good starts.

    Differentiable, forward and reverse, in whatever `log_prob` depends on, by the implicit
    function theorem: where the slope s(x; y) is zero, dx = -(ds/dx)^-1 (ds/dy) dy. The starts
    have no say in it. Where the density has no second derivative at its mode, or is flat there,
    the mode has no derivative, and what is returned for it means nothing (flat: not finite).

    Args:
        log_prob: log-density of one point, up to a constant, twice differentiable.
        starts: points to start from, in units in which the density is about as wide in one
            direction as in another.
        climbs: how many of the starts, the best first, to ascend from.
        minimiser: an optimistix minimiser; by default BFGS.
        max_steps: bound on its steps.
        polish: Newton steps afterwards. They need the Hessian, d times the cost of a slope.

    Raises:
        ValueError: on no start, or fewer than one climb.
    """
    if starts.ndim != 2 or starts.shape[0] < 1:
        raise ValueError(f"expected starts of shape (n, d), n >= 1, got {starts.shape}")
    if not 1 <= climbs <= starts.shape[0]:
        raise ValueError(f"expected climbs from 1 to {starts.shape[0]}, got {climbs}")
    if minimiser is None:
        tiny = float(jnp.finfo(starts.dtype).eps) ** 0.5
        minimiser = optx.BFGS(rtol=tiny, atol=tiny)

    def fall(x: Array, _: None = None) -> Array:
        return -log_prob(x)

    starts = jax.lax.stop_gradient(starts)
    heights = jax.lax.stop_gradient(jax.vmap(log_prob)(starts))
    # A start at which the density is not defined is the last choice, and not the first.
    heights, best = jax.lax.top_k(jnp.where(jnp.isfinite(heights), heights, -jnp.inf), climbs)

    def climb(start: Array) -> Array:
        return optx.minimise(fall, minimiser, start, max_steps=max_steps, throw=False).value

    def slope_and_rest(x: Array) -> tuple[Array, tuple[Array, Array]]:
        value, slope = jax.value_and_grad(fall)(x)
        return slope, (value, slope)

    def newton(_: Any, carry: tuple) -> tuple:
        now, trial = carry
        curvature, (value, slope) = jax.jacfwd(slope_and_rest, has_aux=True)(trial)
        norm = jnp.linalg.norm(slope)
        rounding = 8 * jnp.finfo(trial.dtype).eps * (1.0 + jnp.abs(now[1]))
        better = (norm < now[2]) & (value <= now[1] + rounding)
        there = (trial, value, norm, curvature)
        now = jax.tree.map(lambda a, b: jnp.where(better, a, b), there, now)
        # A step that was refused is asked for again, at no harm, and refused again.
        return now, trial - jnp.linalg.solve(curvature, slope)

    def ascend(start: Array, height: Array) -> tuple[Array, Array, Array]:
        infinite, eye = jnp.full((), jnp.inf, start.dtype), jnp.eye(start.size, dtype=start.dtype)
        # The end of the search is itself the first trial: it must not be worse than its start.
        carry = ((start, -height, infinite, eye), climb(start))
        (x, value, _, curvature), _ = jax.lax.fori_loop(0, polish + 1, newton, carry)
        return x, value, curvature

    ends, values, curvatures = jax.vmap(ascend)(starts[best], heights)
    highest = jnp.argmin(values)
    x = jax.lax.stop_gradient(ends[highest])
    return _stationary(x, jax.lax.stop_gradient(curvatures[highest]), jax.grad(fall)(x))
