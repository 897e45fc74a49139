"""From an event to the ridges around the ends of a search, and how far they are from J."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Float

from amortlib.encoders import AbstractEncoder
from amortlib.energy import Energy
from amortlib.gaussian import AbstractDistribution
from amortlib.nested.mixture import NestedMixture, together, told_apart
from amortlib.nested.ridge import HIGHEST, NestedLaplace, nested_laplace
from amortlib.posterior import AmortizedPosterior
from amortlib.search import Field, component_starts, search_ends
from amortlib.types import Array, Event, Fixed

__all__ = ["NestedContext", "NestedEncoder"]

_LOOK_ALONG, _LOOK_ACROSS = (0.08, 0.3, 0.5, 0.7, 0.92), 1.5
"""Where J is looked at beside a ridge: shares of the density along, standard deviations across."""

_LOOK_ON = (0.02, 0.25, 0.5, 0.75, 0.98)
"""Where J is looked at on it."""


def _doubt(
    energy: Energy, ridges: NestedLaplace, weight: Float[Array, " k"], event: Event
) -> Float[Array, " f"]:
    """How far what the ridges say is from J, seen at places around the heaviest of them.

    Differences of the log-density, in nats, by their inverse hyperbolic sine; then the weights of
    the ridges, their widths in control variables and the height of each, as logarithms and roots.
    """
    best = jax.tree.map(lambda leaf: leaf[jnp.argmax(weight)], ridges)
    e = best.centre.size - 1
    flat, eye = jnp.zeros((1, e), best.centre.dtype), jnp.eye(e, dtype=best.centre.dtype)
    beside = _LOOK_ACROSS * jnp.concatenate([eye, -eye])

    def off(u: Array, w: Array) -> Array:
        v = best.point(best.along(u), w)
        height = energy.at_control(v, event)
        height = jnp.where(jnp.isfinite(height), jnp.minimum(height, HIGHEST), HIGHEST)
        return jnp.arcsinh(-height - together(ridges, v))

    def at(shares: tuple[float, ...], across: Array) -> Array:
        u = jnp.asarray(shares, across.dtype)
        return jax.vmap(lambda u: jax.vmap(lambda w: off(u, w))(across))(u).reshape(-1)

    spreads = jax.vmap(lambda q: jnp.log(jnp.diagonal(q._moments()[1])))(ridges)
    middle = ridges.height[:, ridges.height.shape[1] // 2]
    parts = at(_LOOK_ALONG, beside), at(_LOOK_ON, flat), weight.clip(-20.0)
    found = jnp.concatenate([*parts, spreads.reshape(-1), jnp.sqrt(jnp.maximum(middle, 0.0))])
    return jnp.where(jnp.isfinite(found), found, 0.0)


class NestedContext(eqx.Module):
    """What the search and the ridges hand to a head.

    Attributes:
        ridges: [`NestedLaplace`][], arrays with a leading axis of k.
        log_weight: log of the weight of each, normalised, shape `(k,)`.
        best: the lowest end of the search, a state.
        doubt: how far what the ridges say is from J at places around them, `(f,)`.
        beside: what is said without J: the answer of the network that the search started from, or
            the context that another encoder made of the event.
    """

    ridges: NestedLaplace
    log_weight: Float[Array, " k"]
    best: Float[Array, " d"]
    doubt: Float[Array, " f"]
    beside: Any

    def mixture(self, beside: AbstractDistribution, share: Float[Array, ""]) -> NestedMixture:
        """The ridges, and a density beside them with a weight."""
        return NestedMixture(self.ridges, self.log_weight, beside, share, self.best)


class NestedEncoder(AbstractEncoder):
    """A mixture's guesses, the search on J from them, and the ridge of exp(-J) through each end.

    Attributes:
        guess: a posterior whose answer is a [`GaussianMixture`][amortlib.heads.GaussianMixture],
            held fixed.
        energy: J, held fixed.
        beside: an encoder for what is said without J; where there is none it is the guess.
        field: how many starts take each step; those of the last one are the ends.
    """

    guess: Fixed
    energy: Fixed
    beside: AbstractEncoder | None
    obs_shape: tuple[int, ...] | None = eqx.field(static=True)
    uses_sd: bool = eqx.field(static=True)
    field: Field = eqx.field(static=True)

    def __init__(
        self,
        guess: AmortizedPosterior,
        energy: Energy,
        *,
        field: Field,
        beside: AbstractEncoder | None = None,
    ):
        """Set the parts; arguments as the attributes.

        Raises:
            ValueError: on a field without a step.
        """
        if not field.steps:
            raise ValueError("expected a field of at least one step, got none")
        self.guess, self.energy, self.beside = Fixed(guess), Fixed(energy), beside
        self.obs_shape, self.uses_sd = guess.encoder.obs_shape, guess.encoder.uses_sd
        self.field = field

    def __call__(self, event: Event) -> NestedContext:
        """Context of one event.

        Raises:
            TypeError: where the guess is no mixture.
            ValueError: on a state of a single number.
        """
        energy, guess = self.energy.value, self.guess.value(event)
        ends = search_ends(energy, component_starts(energy, guess), event, field=self.field)
        ridges = told_apart(jax.vmap(lambda v: nested_laplace(energy, v, event))(ends))
        # Of an end where J overflows nothing is known.
        mass = jnp.where(jnp.isfinite(ridges.log_mass), ridges.log_mass, -HIGHEST)
        weight = jax.nn.log_softmax(mass)
        height = jax.vmap(lambda v: energy.at_control(v, event))(ends)
        lowest = jnp.argmin(jnp.where(jnp.isfinite(height), height, jnp.inf))
        doubt = _doubt(energy, ridges, weight, event)
        beside = guess if self.beside is None else self.beside(event)
        return NestedContext(ridges, weight, energy.prior.colour(ends[lowest]), doubt, beside)

    @property
    def doubts(self) -> int:
        """How many numbers `NestedContext.doubt` has."""
        d, k = self.energy.tree.prior.loc.size, self.field.widths[-1]
        return len(_LOOK_ALONG) * 2 * (d - 1) + len(_LOOK_ON) + k * (d + 2)
