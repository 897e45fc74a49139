"""A path of an Ornstein-Uhlenbeck process on a grid: the problem whose posterior is known."""

import jax.numpy as jnp
from jaxtyping import ArrayLike

from amortlib.dynamics import OrnsteinUhlenbeck
from amortlib.gaussian import GaussMarkov
from amortlib.observation import (
    AbstractGaps,
    ContiguousGaps,
    GaussianNoise,
    VaryingGaussianNoise,
)
from amortlib.problems.base import DrawOne, InverseProblem
from amortlib.types import Array

__all__ = ["ornstein_uhlenbeck"]


def _identity(x: Array) -> Array:
    return x


def ornstein_uhlenbeck(
    n: int = 32,
    *,
    dt: float = 1.0,
    timescale: float = 8.0,
    sd: float = 1.0,
    noise: float | tuple[float, float] = 0.3,
    gaps: AbstractGaps | None = None,
    loc: ArrayLike = 0.0,
) -> InverseProblem:
    """A path of an Ornstein-Uhlenbeck process on a grid, every value seen with noise, but for gaps.

    Its posterior is known exactly (`amortlib.gaussian.condition`), which makes it the problem on
    which a head is held to the truth.

    Args:
        n: number of times, which is the dimension of the state.
        dt: time step.
        timescale: e-folding time of the process.
        sd: its stationary standard deviation.
        noise: standard deviation of the observation error, or a pair (low, high) to draw it
            log-uniformly for every event.
        gaps: by default up to three contiguous gaps that miss any share from none to all.
        loc: background mean x_b, a number or shape `(n,)`.
    """
    prior: GaussMarkov = OrnsteinUhlenbeck(sd, timescale).prior(dt * jnp.arange(n), loc)
    errors = VaryingGaussianNoise(*noise) if isinstance(noise, tuple) else GaussianNoise(noise)
    return InverseProblem(
        prior_sample=DrawOne(prior),
        forward=_identity,
        obs_noise=errors,
        gaps=ContiguousGaps(0.0, 1.0, max_gaps=3) if gaps is None else gaps,
        prior=prior,
    )
