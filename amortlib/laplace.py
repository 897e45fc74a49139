"""What the curvature of J at a mode says: covariances, the Jacobian of the mode, conditioning.

Two Hessians. The *full* one is the second derivative of J. The *Gauss-Newton* one leaves out the
curvature of the forward model, is never indefinite, and is what incremental 4DVar works with. At
the mode of a nonlinear problem they differ, and so does all that is made of them.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from amortlib.energy import Energy
from amortlib.gaussian import Gaussian
from amortlib.types import Array, Event

__all__ = [
    "condition_number",
    "gain",
    "gauss_newton_hessian",
    "hessian",
    "laplace",
    "mode_jacobian",
    "preconditioned_hessian",
    "residual_jacobian",
]

Mode = Literal["fwd", "bwd"]


def residual_jacobian(
    energy: Energy, v: Float[Array, " d"], event: Event, *, mode: Mode = "fwd"
) -> Float[Array, "r d"]:
    """Derivative of [`Energy.residual`][amortlib.energy.Energy.residual] at `v`.

    Args:
        energy: J.
        v: control variable, x = x_b + B^{1/2} v.
        event: the event.
        mode: `"fwd"` by tangent-linear products, one a component of v; `"bwd"` by adjoint ones,
            one an observation, for a forward model that only has an adjoint.
    """
    jac: Callable = {"fwd": jax.jacfwd, "bwd": jax.jacrev}[mode]
    return jac(lambda u: energy.residual(u, event))(v)


def preconditioned_hessian(
    energy: Energy, x: Float[Array, " d"], event: Event, *, mode: Mode = "fwd"
) -> Float[Array, "d d"]:
    """I + B^{T/2} H^T R^-1 H B^{1/2}: the Gauss-Newton Hessian in the control variable.

    Its eigenvalues are one where nothing was seen, and larger where something was: one plus a
    ratio of signal to noise.
    """
    jacobian = residual_jacobian(energy, energy.prior.whiten(x), event, mode=mode)
    return jacobian.T @ jacobian


def gauss_newton_hessian(
    energy: Energy, x: Float[Array, " d"], event: Event, *, mode: Mode = "fwd"
) -> Float[Array, "d d"]:
    """B^-1 + H^T R^-1 H, with H the derivative of the forward model at `x`."""
    root = _whitening(energy, x)
    return root.T @ preconditioned_hessian(energy, x, event, mode=mode) @ root


def hessian(energy: Energy, x: Float[Array, " d"], event: Event) -> Float[Array, "d d"]:
    """The second derivative of J. May be indefinite away from a minimum."""
    return jax.hessian(energy)(x, event)


def condition_number(matrix: Float[Array, "d d"]) -> Float[Array, ""]:
    """Largest over smallest eigenvalue of a symmetric positive matrix.

    The number of steps of conjugate gradients grows as its square root.
    """
    values = jnp.linalg.eigvalsh(matrix)
    return values[-1] / values[0]


def laplace(
    energy: Energy,
    mode: Float[Array, " d"],
    event: Event,
    *,
    full: bool = True,
    derivative: Mode = "fwd",
) -> Gaussian:
    """The Gaussian with the mode for mean and the inverse Hessian for covariance.

    Tierney and Kadane (1986), *Accurate approximations for posterior moments and marginal
    densities*, J. Am. Stat. Assoc. 81. NaN where the full Hessian is not positive definite: that
    point is not a minimum.

    Args:
        energy: J.
        mode: a minimiser of J.
        event: the event.
        full: the full Hessian, or else the Gauss-Newton one.
        derivative: for the Gauss-Newton one, see [`residual_jacobian`][].
    """
    if full:
        return Gaussian.from_precision(mode, hessian(energy, mode, event))
    # In the control variable, where the spectrum starts at one: B itself may be badly conditioned.
    inner = preconditioned_hessian(energy, mode, event, mode=derivative)
    factor = Gaussian.from_precision(jnp.zeros_like(mode), inner).chol
    columns = jax.vmap(energy.prior.colour, in_axes=1, out_axes=1)(factor)
    root = columns - energy.prior.loc[:, None]
    return Gaussian.from_covariance(mode, root @ root.T)


def mode_jacobian(energy: Energy, mode: Float[Array, " d"], event: Event) -> Float[Array, "d *obs"]:
    """d x*/dy by the implicit function theorem with the full Hessian; zero at masked entries.

    At the mode dJ/dx = 0 whatever y is, so (d2J/dx2) dx* + (d2J/dxdy) dy = 0, and J being
    quadratic in y, d2J/dxdy = -H^T R^-1 with no approximation.
    """
    return _solve(hessian(energy, mode, event), energy, mode, event)


def gain(energy: Energy, mode: Float[Array, " d"], event: Event) -> Float[Array, "d *obs"]:
    """K = (B^-1 + H^T R^-1 H)^-1 H^T R^-1, the gain of optimal interpolation, linearised at `mode`.

    The Gauss-Newton approximation of [`mode_jacobian`][]: equal to it where the forward model is
    affine, and not elsewhere.
    """
    return _solve(gauss_newton_hessian(energy, mode, event), energy, mode, event)


def _solve(
    curvature: Float[Array, "d d"], energy: Energy, mode: Float[Array, " d"], event: Event
) -> Float[Array, "d *obs"]:
    tangent = jax.jacfwd(lambda x: energy.innovation(x, event))(mode)
    weighted = -tangent / energy.sd(event)[..., None] ** 2
    flat = jnp.linalg.solve(curvature, weighted.reshape(-1, mode.size).T)
    return flat.reshape(mode.size, *event.y.shape)


def _whitening(energy: Energy, x: Float[Array, " d"]) -> Float[Array, "d d"]:
    """B^{-1/2} as a matrix."""
    return jax.jacfwd(energy.prior.whiten)(x)
