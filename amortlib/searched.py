"""A flow around the last few ends of a search: what is learned starts where J says to look.

Refined from one guess, a flow stands or falls with the minimum that the guess leads to. A field of
starts finds the lowest minimum far more often, and keeps others beside it as components.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Float

from amortlib.energy import Energy
from amortlib.posterior import AmortizedPosterior
from amortlib.refine import RefinedEncoder, RefinedFlowHead, whitened_covariance
from amortlib.search import Field, component_starts, search_ends
from amortlib.types import Array, Event, Key

__all__ = ["SearchedEncoder", "searched_flow_posterior"]


class SearchedEncoder(RefinedEncoder):
    """A mixture's guesses, the search on J from them, and J around each of its last ends.

    What it hands on is a [`RefinedContext`][amortlib.refine.RefinedContext]: the ends in place of
    the refined points, and the mean and covariance of the whole mixture in place of the guess.

    Attributes:
        field: how many starts take each step; those of the last one are the ends.
    """

    field: Field = eqx.field(static=True)

    def __init__(self, guess: AmortizedPosterior, energy: Energy, *, field: Field):
        """Set the parts.

        Args:
            guess: a posterior whose answer is a
                [`GaussianMixture`][amortlib.heads.GaussianMixture]; held fixed.
            energy: J.
            field: of at least one step.

        Raises:
            ValueError: on a field without a step.
        """
        if not field.steps:
            raise ValueError("expected a field of at least one step, got none")
        super().__init__(guess, energy, steps=field.steps)
        self.field = field

    def ends(
        self, event: Event
    ) -> tuple[Float[Array, "s d"], Float[Array, " d"], Float[Array, "d d"]]:
        """Where the search ends; the mixture's mean, and the Cholesky factor of its spread.

        Raises:
            TypeError: where the guess is no mixture.
        """
        energy, mixture = self.energy.value, self.guess.value(event)
        ends = search_ends(energy, component_starts(energy, mixture), event, field=self.field)
        spread = whitened_covariance(energy, mixture.covariance())
        return ends, energy.prior.whiten(mixture.mean()), jnp.linalg.cholesky(spread)


def searched_flow_posterior(
    guess: AmortizedPosterior, energy: Energy, *, field: Field, key: Key, **sizes: Any
) -> AmortizedPosterior:
    """A mixture's guesses, the search on J from them, and a flow around its last ends.

    Args:
        guess: a posterior whose answer is a mixture; held fixed.
        energy: J.
        field: how many starts take each step.
        key: initialises the weights of the flow.
        sizes: passed on to [`RefinedFlowHead`][amortlib.refine.RefinedFlowHead].
    """
    encoder = SearchedEncoder(guess, energy, field=field)
    head = RefinedFlowHead(encoder.size, energy.prior.loc.size, key=key, **sizes)
    return AmortizedPosterior(encoder, head)
