"""Adjoint calibration: does the head's mode move with the observations as the oracle's does?

Two forms of one statistic. `jacobian_error` takes both Jacobians as matrices and is exact.
`probe_adjoint` never forms them: it multiplies by them and by their transposes, and returns an
interval that holds the statistic with a stated probability.
"""

import dataclasses
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Bool, Float

from amortlib.energy import Energy
from amortlib.types import Array, Event, Key

__all__ = [
    "ADJOINT",
    "NormBounds",
    "Products",
    "jacobian_error",
    "mode_products",
    "norm_bounds",
    "oracle_products",
    "probe_adjoint",
]

ADJOINT = 0.05
"""The gate's threshold on the relative error of the Jacobian."""


def jacobian_error(
    jacobian: Float[Array, "d *obs"],
    oracle_jacobian: Float[Array, "d *obs"],
    mask: Bool[Array, "*obs"],
) -> Float[Array, ""]:
    """norm2(d mode_q/dy - d x*/dy) / norm2(d x*/dy), operator norms over observed entries.

    With nothing observed the oracle does not move: the error is 0 where the head does not either,
    and infinite where it does.

    Args:
        jacobian: d mode_q/dy.
        oracle_jacobian: d x*/dy by the implicit function theorem with the full Hessian, as
            `OracleAnalysis.jacobian` and [`mode_jacobian`][amortlib.laplace.mode_jacobian].
        mask: `True` = observed.
    """
    d = jacobian.shape[0]
    seen = jnp.where(mask, 1.0, 0.0).reshape(1, -1)
    want = jnp.where(seen > 0, oracle_jacobian.reshape(d, -1), 0.0)
    got = jnp.where(seen > 0, jacobian.reshape(d, -1), 0.0)
    size, error = jnp.linalg.norm(want, 2), jnp.linalg.norm(got - want, 2)
    without = jnp.where(error > 0, jnp.inf, 0.0)
    # A NaN in either must come out as one: a comparison would swallow it.
    ratio = error / jnp.where(size > 0, size, 1.0)
    return jnp.where(jnp.isnan(error + size), jnp.nan, jnp.where(size > 0, ratio, without))


class Products(eqx.Module):
    """A linear map by its products, never as a matrix.

    Attributes:
        forward: v -> A v.
        transpose: u -> A^T u.
    """

    forward: Callable[[Array], Array]
    transpose: Callable[[Array], Array]

    def __sub__(self, other: "Products") -> "Products":
        """The difference of two maps."""
        return Products(
            lambda v: self.forward(v) - other.forward(v),
            lambda u: self.transpose(u) - other.transpose(u),
        )


def mode_products(mode: Callable[[Event], Array], event: Event) -> Products:
    """d mode_q/dy at an event, on observed entries: one JVP or one VJP a product.

    Args:
        mode: event -> mode, such as `AmortizedPosterior.mode`.
        event: where to differentiate.
    """

    def at(y):
        return mode(dataclasses.replace(event, y=y))

    _, pull = jax.vjp(at, event.y)
    return Products(
        lambda v: jax.jvp(at, (event.y,), (jnp.where(event.mask, v, 0.0),))[1],
        lambda u: jnp.where(event.mask, pull(u)[0], 0.0),
    )


def oracle_products(
    energy: Energy, mode: Float[Array, " d"], event: Event, *, tolerance: float = 1e-8
) -> Products:
    """d x*/dy at a minimum of J: tangent-linear and adjoint products, and conjugate gradients.

    The full Hessian is applied by forward-over-reverse differentiation, in the control variable,
    where its spectrum starts at one. It has to be positive definite: `mode` is a minimum.

    Args:
        energy: J.
        mode: x*.
        event: the event.
        tolerance: of the linear solves, relative.
    """
    v0 = energy.prior.whiten(mode)

    def cost(v):
        return energy.at_control(v, event)

    def clean(v):
        return energy.forward(energy.prior.colour(v))

    operator = lx.FunctionLinearOperator(
        lambda u: jax.jvp(jax.grad(cost), (v0,), (u,))[1],
        jax.ShapeDtypeStruct(v0.shape, v0.dtype),
        lx.positive_semidefinite_tag,
    )

    def solve(rhs):
        solver = lx.CG(rtol=tolerance, atol=1e-30)
        return lx.linear_solve(operator, rhs, solver, throw=False).value

    precision = jnp.where(event.mask, energy.sd(event) ** -2, 0.0)
    _, adjoint = jax.vjp(clean, v0)
    _, colour_transpose = jax.vjp(energy.prior.colour, v0)
    return Products(
        lambda y: jax.jvp(energy.prior.colour, (v0,), (solve(adjoint(precision * y)[0]),))[1],
        lambda u: precision * jax.jvp(clean, (v0,), (solve(colour_transpose(u)[0]),))[1],
    )


class NormBounds(eqx.Module):
    """An interval for a number that was probed and not computed.

    Attributes:
        lower: never above the number.
        upper: not below it, with the probability that was asked for.
    """

    lower: Float[Array, ""]
    upper: Float[Array, ""]


def norm_bounds(
    products: Products,
    like: Float[Array, "*obs"],
    *,
    key: Key,
    iterations: int = 20,
    probes: int = 4,
    failure: float = 1e-3,
) -> NormBounds:
    """Bounds on the operator norm of A, by power iteration on A^T A from random directions.

    After m steps from a unit vector v, |(A^T A)^m v|^(1/m) is at most norm2(A)^2, whatever v is.
    With v uniform on the sphere of R^n it is less than norm2(A)^2 / theta with a probability of
    at most 0.8 sqrt(n) theta^-m, the chance that v has next to nothing of the leading direction:
    Dixon (1983), *Estimating extremal eigenvalues and condition numbers of matrices*, SIAM J.
    Numer. Anal. 20. Of several directions the best counts, and the probability is that of all of
    them failing. Hence

        lower <= norm2(A) <= upper,  upper / lower = (0.8 sqrt(n) / failure^(1/probes))^(1/(2 m)).

    Args:
        products: A and its transpose.
        like: an array of the shape and type of what A takes.
        key: draws the directions.
        iterations: m; each costs one product with A and one with its transpose.
        probes: directions.
        failure: probability at which `upper` may be too small.

    Raises:
        ValueError: on less than one iteration or probe, or a probability not between 0 and 1.
    """
    if iterations < 1 or probes < 1 or not 0.0 < failure < 1.0:
        raise ValueError(
            "expected iterations >= 1, probes >= 1 and 0 < failure < 1, "
            f"got {iterations}, {probes}, {failure}"
        )
    starts = jax.random.normal(key, (probes, *like.shape), like.dtype)

    def one(v):
        def step(v, _):
            nxt = products.transpose(products.forward(v))
            size = jnp.linalg.norm(nxt.reshape(-1))
            return nxt / jnp.where(size > 0, size, 1.0), size

        v = v / jnp.linalg.norm(v.reshape(-1))
        _, sizes = jax.lax.scan(step, v, length=iterations)
        # The product of the sizes is |(A^T A)^m v|; the last of them bounds norm2(A)^2 from
        # below too, and more tightly, but the theorem speaks of their mean.
        return jnp.exp(0.5 * jnp.mean(jnp.log(sizes))), jnp.sqrt(sizes[-1])

    mean, last = jax.lax.map(one, starts)
    slack = (0.8 * math.sqrt(like.size) / failure ** (1.0 / probes)) ** (0.5 / iterations)
    return NormBounds(jnp.max(last), jnp.max(mean) * max(slack, 1.0))


def probe_adjoint(
    mode: Callable[[Event], Array],
    energy: Energy,
    oracle_mode: Float[Array, " d"],
    event: Event,
    *,
    key: Key,
    iterations: int = 20,
    probes: int = 4,
    failure: float = 1e-3,
    tolerance: float = 1e-8,
) -> NormBounds:
    """An interval for what [`jacobian_error`][] computes, for states too large for a Jacobian.

    The numerator and the denominator are bounded by [`norm_bounds`][]. The event passes where
    `upper` < `ADJOINT` and fails where `lower` >= `ADJOINT`; in between it takes more iterations
    to tell. Memory grows with the state and the observations, not with their product.

    Args:
        mode: event -> mode of the head.
        energy: J.
        oracle_mode: x*, a minimum of J.
        event: the event, with something observed.
        key: draws the directions.
        iterations: see [`norm_bounds`][].
        probes: likewise.
        failure: probability that the interval misses the statistic, both bounds together.
        tolerance: of the oracle's linear solves.
    """
    oracle = oracle_products(energy, oracle_mode, event, tolerance=tolerance)
    difference = mode_products(mode, event) - oracle
    k_error, k_size = jax.random.split(key)

    def bounds(products, key):
        return norm_bounds(
            products,
            event.y,
            key=key,
            iterations=iterations,
            probes=probes,
            failure=failure / 2.0,
        )

    error, size = bounds(difference, k_error), bounds(oracle, k_size)
    return NormBounds(error.lower / size.upper, error.upper / size.lower)
