"""The weight of what stands beside the ridges: fixed, or learned."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, Float

from amortlib.energy import Energy
from amortlib.heads.base import AbstractHead
from amortlib.nested.encoder import NestedContext, NestedEncoder
from amortlib.nested.mixture import NestedMixture
from amortlib.posterior import AmortizedPosterior
from amortlib.search import Field
from amortlib.types import Array, Fixed, Key

__all__ = ["NestedHead", "SharedHead", "nested_posterior"]

SHARE = 0.02
"""Weight of the guess beside what J says: it covers what no ridge does."""

_ODDS = (-6.0, 6.0)
"""Bounds on the log-odds of a learned weight."""


class NestedHead(AbstractHead):
    """The ridges, and the guess beside them with a fixed weight; nothing to learn.

    Attributes:
        share: weight of the guess.
    """

    share: float = eqx.field(static=True)

    def __init__(self, share: float = SHARE):
        """Set the weight.

        Raises:
            ValueError: where it is not between 0 and 1.
        """
        if not 0.0 < share < 1.0:
            raise ValueError(f"expected a share between 0 and 1, got {share}")
        self.share = share

    def __call__(self, context: NestedContext) -> NestedMixture:
        """The mixture for one context."""
        share = jnp.asarray(self.share, context.best.dtype)
        return context.mixture(context.beside, share)


class SharedHead(AbstractHead):
    """The ridges, and beside them what another head says, with a weight that is learned.

    Structure knows the posterior where J has a ridge, a network where it is folded or in pieces; by
    how far J is from what the ridges say it is told which of the two an event is.

    Attributes:
        head: says what is said without J, from the context of its encoder, one array.
        net: the logarithm of the odds of it against the ridges.
        centre: usual value of each number of `NestedContext.doubt`.
        scale: and its standard deviation.
    """

    head: AbstractHead
    net: eqx.nn.MLP
    centre: Fixed
    scale: Fixed

    def __init__(
        self,
        head: AbstractHead,
        doubts: int,
        features: int,
        *,
        key: Key,
        centre: ArrayLike = 0.0,
        scale: ArrayLike = 1.0,
        width: int = 96,
        depth: int = 2,
    ):
        """Set the sizes.

        Args:
            head: from a context of `features` numbers.
            doubts: `NestedEncoder.doubts`.
            features: length of the context of the head.
            key: initialises the weights of the net.
            centre: of the doubts, a number or one for each.
            scale: likewise.
            width: of the net.
            depth: of it.
        """
        self.head = head
        self.net = eqx.nn.MLP(doubts + features, 1, width, depth, jax.nn.gelu, key=key)
        self.centre = Fixed(jnp.broadcast_to(jnp.asarray(centre, float), (doubts,)))
        self.scale = Fixed(jnp.broadcast_to(jnp.asarray(scale, float), (doubts,)))

    def log_odds(self, doubt: Float[Array, " f"], beside: Float[Array, " c"]) -> Float[Array, ""]:
        """Of the head against the ridges; never so far that either is forgotten."""
        usual = jnp.clip((doubt - self.centre.value) / self.scale.value, -5.0, 5.0)
        return jnp.clip(self.net(jnp.concatenate([usual, beside]))[0], *_ODDS)

    def __call__(self, context: NestedContext) -> NestedMixture:
        """The mixture for one context."""
        share = jax.nn.sigmoid(self.log_odds(context.doubt, context.beside))
        return context.mixture(self.head(context.beside), share)


def nested_posterior(
    guess: AmortizedPosterior, energy: Energy, *, field: Field, share: float = SHARE
) -> AmortizedPosterior:
    """A mixture's guesses, the search on J from them, and the ridges of exp(-J) around its ends.

    Args:
        guess: a posterior whose answer is a mixture; held fixed.
        energy: J.
        field: how many starts take each step; a ridge is followed from each end of the last.
        share: weight of the guess beside the ridges.

    Raises:
        ValueError: on a field without a step, or a share that is not between 0 and 1.
    """
    return AmortizedPosterior(NestedEncoder(guess, energy, field=field), NestedHead(share))
