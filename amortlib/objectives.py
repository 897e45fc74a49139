"""What training minimises: each objective maps a model, a batch and a key to a number."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from amortlib.posterior import AmortizedPosterior
from amortlib.types import Array, Event, Key

__all__ = ["nll"]


def nll(
    model: AmortizedPosterior, batch: tuple[Float[Array, "n d"], Event], key: Key
) -> Float[Array, ""]:
    """Mean negative log-likelihood -log q(x | y, m) over a batch of simulated pairs, in nats.

    Over fresh pairs from p(x, y) its expectation is E_y KL(p(x | y) || q(x | y)) plus a constant:
    the forward KL divergence, averaged over events (Papamakarios and Murray 2016,
    arXiv:1605.06376, proposition 1). No posterior is needed to minimise it.
    """
    x, event = batch
    return -jnp.mean(jax.vmap(model.log_prob)(x, event))
