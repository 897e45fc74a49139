"""A problem of two numbers seen through squares, and a network that guesses at it untrained."""

import jax
import jax.numpy as jnp

from amortlib.encoders import FlatEncoder
from amortlib.energy import Energy
from amortlib.gaussian import Gaussian
from amortlib.heads import MixtureHead
from amortlib.posterior import AmortizedPosterior

KEY = jax.random.key(0)
PRIOR = Gaussian(jnp.array([0.5, -1.0]), jnp.array([[1.0, 0.0], [0.3, 0.8]]))


def squares(x):
    """Seen through a square: up to two minima, on either side of zero."""
    return jnp.stack([x[0] ** 2, x[0] * x[1], x[1] + 0.3 * x[0] ** 2])


ENERGY = Energy(PRIOR, squares)


def guess(components: int = 4) -> AmortizedPosterior:
    """Starts all over the place."""
    encoder = FlatEncoder((3,), key=KEY, features=6, width=8, depth=1)
    head = MixtureHead(
        6, 2, key=KEY, components=components, centre=PRIOR.loc, scale=3.0 * PRIOR.sd()
    )
    return AmortizedPosterior(encoder, head)
