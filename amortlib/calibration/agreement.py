"""Posterior agreement: is the head's mode where the oracle's is, in units of the posterior?"""

import jax.numpy as jnp
from jaxtyping import Float

from amortlib.types import Array

__all__ = ["AGREEMENT", "mode_distance"]

AGREEMENT = 1.0
"""The gate's threshold: one posterior standard deviation, in every component."""


def mode_distance(
    mode: Float[Array, " d"], oracle_mode: Float[Array, " d"], covariance: Float[Array, "d d"]
) -> Float[Array, ""]:
    """max_i |mode_q - x*|_i / sqrt(P*_ii), without units.

    The mode, and not the mean: where J is not quadratic the exact posterior's own mean is not at
    its mode. A head passes on an event where this is at most `AGREEMENT`. One standard deviation
    is wide: half of one is a bias that this gate lets through and simulation-based calibration
    does not.

    Args:
        mode: of the head.
        oracle_mode: x*, the minimiser of J.
        covariance: P*, the inverse of the full Hessian of J there.
    """
    return jnp.max(jnp.abs(mode - oracle_mode) / jnp.sqrt(jnp.diagonal(covariance)))
