"""What is seen: observation operators H, observation noise, and gap patterns.

A gap pattern is a function of a key and a shape that draws a mask, `True` = observed; the first
axis is time. All are jittable: shapes never depend on what was drawn.
"""

import abc
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Bool, Float

from amortlib.types import Array, Key

__all__ = [
    "AbstractGaps",
    "AllMissing",
    "ContiguousGaps",
    "Dropouts",
    "FixedMask",
    "GaussianNoise",
    "LinearOperator",
    "MixedGaps",
    "NoGaps",
    "PeriodicRevisit",
    "Select",
    "VaryingGaussianNoise",
    "gap",
]


# --- operators -------------------------------------------------------------------------------


class LinearOperator(eqx.Module):
    """H(x) = `matrix` x."""

    matrix: Float[Array, "t d"]

    def __call__(self, x: Float[Array, " d"]) -> Float[Array, " t"]:
        """Apply to one state."""
        return self.matrix @ x


class Select(eqx.Module):
    """Sees some components of the last axis, at every `stride`-th time of the first.

    Of a trajectory of shape `(n, d)` it gives `(ceil((n - start) / stride), len(components))`.

    Attributes:
        components: indices into the last axis.
        stride: steps between observations.
        start: first observed step.

    Raises:
        ValueError: where a component is not there: jax would read its nearest neighbour instead.
    """

    components: tuple[int, ...] = eqx.field(static=True)
    stride: int = eqx.field(static=True, default=1)
    start: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        if not self.components:
            raise ValueError("expected at least one component to observe, got none")
        if self.stride < 1 or self.start < 0:
            raise ValueError(
                f"expected stride >= 1 and start >= 0, got {self.stride}, {self.start}"
            )

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "m p"]:
        """Apply to one trajectory."""
        d = x.shape[-1]
        if not all(-d <= component < d for component in self.components):
            raise ValueError(f"expected components of a state of {d}, got {self.components}")
        return x[self.start :: self.stride, jnp.asarray(self.components)]


# --- noise -----------------------------------------------------------------------------------


class GaussianNoise(eqx.Module):
    """Independent Gaussian errors: R = diag(sd^2). Maps a key and H(x) to the observation y.

    Attributes:
        sd: standard deviation in the units of y, a number or the shape of y.
    """

    sd: Float[Array, "*obs"]

    def __init__(self, sd: ArrayLike):
        self.sd = jnp.asarray(sd, float)

    def __call__(self, key: Key, clean: Float[Array, "*obs"]) -> Float[Array, "*obs"]:
        """y = H(x) + sd * N(0, 1)."""
        return clean + self.sd * jax.random.normal(key, clean.shape, clean.dtype)


class VaryingGaussianNoise(eqx.Module):
    """A noise level of its own for every event, log-uniform between `low` and `high`.

    For a head that is told the error bars of its event and must answer for all of them.

    Attributes:
        low: smallest standard deviation.
        high: largest.
    """

    low: float
    high: float

    def __check_init__(self):
        if not 0 < self.low < self.high:
            raise ValueError(f"expected 0 < low < high, got low={self.low}, high={self.high}")

    def draw(self, key: Key) -> GaussianNoise:
        """The noise of one event."""
        low, high = jnp.log(self.low), jnp.log(self.high)
        return GaussianNoise(jnp.exp(jax.random.uniform(key, (), minval=low, maxval=high)))


# --- gaps ------------------------------------------------------------------------------------


class AbstractGaps(eqx.Module):
    """Draws masks."""

    @abc.abstractmethod
    def times(self, key: Key, n: int) -> Bool[Array, " n"]:
        """One mask over `n` times."""

    def __call__(self, key: Key, shape: tuple[int, ...]) -> Bool[Array, "*obs"]:
        """One mask of `shape`: a time is seen or missed with all its components."""
        mask = self.times(key, shape[0])
        return jnp.broadcast_to(mask.reshape(-1, *(1 for _ in shape[1:])), shape)


class NoGaps(AbstractGaps):
    """Everything is observed."""

    def times(self, key: Key, n: int) -> Bool[Array, " n"]:
        """All true."""
        return jnp.ones(n, bool)


class AllMissing(AbstractGaps):
    """Nothing is observed: the posterior is the prior."""

    def times(self, key: Key, n: int) -> Bool[Array, " n"]:
        """All false."""
        return jnp.zeros(n, bool)


class ContiguousGaps(AbstractGaps):
    """Some contiguous gaps at random places, that miss a given share of the times between them.

    Attributes:
        low: smallest missing fraction; drawn uniformly between `low` and `high`, event by event.
        high: largest. With `low == high` every mask misses exactly `round(low * n)` times.
        max_gaps: the number of gaps is drawn uniformly from 1 to this; gaps may touch.
    """

    low: Float[Array, ""]
    high: Float[Array, ""]
    max_gaps: int = eqx.field(static=True)

    def __init__(self, low: float, high: float | None = None, *, max_gaps: int = 1):
        high = low if high is None else high
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"expected fractions 0 <= low <= high <= 1, got {low}, {high}")
        # Arrays, so that another fraction is not another program to compile.
        self.low, self.high = jnp.asarray(low, float), jnp.asarray(high, float)
        self.max_gaps = max_gaps
        if max_gaps < 1:
            raise ValueError(f"expected max_gaps >= 1, got {max_gaps}")

    def times(self, key: Key, n: int) -> Bool[Array, " n"]:
        """One mask over `n` times."""
        k_share, k_number, k_cuts, k_place = jax.random.split(key, 4)
        share = jax.random.uniform(k_share, (), minval=self.low, maxval=self.high)
        missing = jnp.round(share * n).astype(int)
        number = jax.random.randint(k_number, (), 1, self.max_gaps + 1)
        slots = jnp.arange(self.max_gaps)
        # Lengths: cut the missing total at `number - 1` random points; unused gaps get length 0.
        cuts = jax.random.randint(k_cuts, (self.max_gaps,), 0, missing + 1)
        cuts = jnp.sort(jnp.where(slots < number - 1, cuts, missing))
        length = jnp.diff(cuts, prepend=0)
        # Places: insert each gap before one of the observed times, or after the last.
        place = jnp.sort(jax.random.randint(k_place, (self.max_gaps,), 0, n - missing + 1))
        start = place + jnp.cumsum(length) - length
        # One more gap is open from where one starts, one less from where it ends: O(n + gaps).
        change = jnp.zeros(n + 1, int).at[start].add(1).at[start + length].add(-1)
        return jnp.cumsum(change)[:n] == 0


class Dropouts(AbstractGaps):
    """Every entry is missed on its own, with a probability of its event.

    Attributes:
        low: smallest probability of a miss; drawn uniformly between `low` and `high`.
        high: largest.
    """

    low: Float[Array, ""]
    high: Float[Array, ""]

    def __init__(self, low: float, high: float | None = None):
        high = low if high is None else high
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"expected probabilities 0 <= low <= high <= 1, got {low}, {high}")
        self.low, self.high = jnp.asarray(low, float), jnp.asarray(high, float)

    def times(self, key: Key, n: int) -> Bool[Array, " n"]:
        """One mask over `n` times."""
        return self(key, (n,))

    def __call__(self, key: Key, shape: tuple[int, ...]) -> Bool[Array, "*obs"]:
        """One mask of `shape`, every entry on its own."""
        k_rate, k_miss = jax.random.split(key)
        rate = jax.random.uniform(k_rate, (), minval=self.low, maxval=self.high)
        return jax.random.uniform(k_miss, shape) >= rate


class PeriodicRevisit(AbstractGaps):
    """A satellite's view: seen for `seen` times out of every `period`, from a random phase.

    Attributes:
        period: times from one visit to the next.
        seen: how many times a visit lasts.
    """

    period: int = eqx.field(static=True)
    seen: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        if not 1 <= self.seen <= self.period:
            raise ValueError(f"expected 1 <= seen <= period, got {self.seen}, {self.period}")

    def times(self, key: Key, n: int) -> Bool[Array, " n"]:
        """One mask over `n` times."""
        phase = jax.random.randint(key, (), 0, self.period)
        return (jnp.arange(n) + phase) % self.period < self.seen


class FixedMask(AbstractGaps):
    """One known mask, the same for every event: a record that exists."""

    mask: Bool[Array, "*obs"]

    def times(self, key: Key, n: int) -> Bool[Array, " n"]:
        """The mask, for observations with one axis."""
        return self(key, (n,))

    def __call__(self, key: Key, shape: tuple[int, ...]) -> Bool[Array, "*obs"]:
        """The mask."""
        if self.mask.shape != tuple(shape):
            raise ValueError(f"expected a mask of shape {tuple(shape)}, got {self.mask.shape}")
        return self.mask


class MixedGaps(AbstractGaps):
    """Draws one of several patterns for every event.

    Attributes:
        patterns: what to draw from.
        weights: their probabilities, normalised here.
    """

    patterns: tuple[AbstractGaps, ...]
    weights: Float[Array, " k"]

    def __init__(
        self, patterns: Sequence[AbstractGaps], weights: Sequence[float] | ArrayLike | None = None
    ):
        self.patterns = tuple(patterns)
        if not self.patterns:
            raise ValueError("expected at least one gap pattern, got none")
        size = len(self.patterns)
        given = np.ones(size) if weights is None else np.asarray(weights, float)
        if given.shape != (size,):
            raise ValueError(f"expected {size} weights, got shape {given.shape}")
        if not (np.isfinite(given).all() and (given >= 0).all() and given.sum() > 0):
            raise ValueError(f"expected weights >= 0, at least one of them positive, got {given}")
        self.weights = jnp.asarray(given / given.sum(), float)

    def times(self, key: Key, n: int) -> Bool[Array, " n"]:
        """One mask over `n` times."""
        return self(key, (n,))

    def __call__(self, key: Key, shape: tuple[int, ...]) -> Bool[Array, "*obs"]:
        """One mask of `shape`."""
        k_which, k_mask = jax.random.split(key)
        which = jax.random.categorical(k_which, jnp.log(self.weights))
        draws = jnp.stack([pattern(k_mask, shape) for pattern in self.patterns])
        return draws[which]


def gap(n: int, start: ArrayLike, length: ArrayLike) -> Bool[Array, " n"]:
    """The mask over `n` times with one gap of `length` from `start`; what a slider moves.

    A gap that reaches past the end is cut there. `start` and `length` may be traced.
    """
    at = jnp.arange(n)
    return (at < jnp.asarray(start)) | (at >= jnp.asarray(start) + jnp.asarray(length))
