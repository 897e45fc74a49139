"""Simulation-based calibration: where does the truth rank among draws of the posterior?

If x was drawn from the prior, y from x, and L draws from the exact posterior of y, then the truth
is one more draw, and its rank among them is uniform on 0, ..., L, for any number that can be made
of a state and the data: Talts, Betancourt, Simpson, Vehtari and Gelman (2018), *Validating
Bayesian inference algorithms with simulation-based calibration*, arXiv:1804.06788, theorem 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from amortlib.types import Array, Key

__all__ = ["ALPHA", "BINS", "DRAWS", "bin_counts", "holm", "rank", "uniform_p", "uniformity_p"]

ALPHA = 0.01
"""The gate's threshold on p, and so its rate of false alarms, over all statistics together."""

DRAWS = 99
"""Draws from the posterior of each event, the default: 100 ranks, which 10 bins divide.

Chosen, as `BINS` and `EVENTS` were, from the table that `python -m benchmarks.gates` makes."""

BINS = 10
"""Bins of the rank histogram, the default. Fewer see smooth faults from fewer events."""


def rank(value: Float[Array, ""], draws: Float[Array, " l"], *, key: Key) -> Int[Array, ""]:
    """How many of the draws lie below `value`, from 0 to L; ties are broken at random.

    At random, so that the rank is uniform for a statistic that takes few values, or one value.
    A NaN compares with nothing: look for it before.

    Args:
        value: the statistic at the truth.
        draws: the statistic at each draw.
        key: breaks ties.
    """
    below, equal = jnp.sum(draws < value), jnp.sum(draws == value)
    return below + jax.random.randint(key, (), 0, equal + 1)


def bin_counts(ranks: Int[Array, "*b n"], draws: int, bins: int) -> Int[Array, "*b bins"]:
    """The histogram of ranks among `draws` draws, over the last axis.

    Raises:
        ValueError: where `bins` does not divide L + 1, the number of ranks there are.
    """
    if bins < 2 or (draws + 1) % bins:
        raise ValueError(
            f"expected at least 2 bins that divide the {draws + 1} possible ranks of {draws} "
            f"draws, got {bins}"
        )
    which = ranks * bins // (draws + 1)
    return jnp.sum(which[..., None] == jnp.arange(bins), axis=-2)


def uniformity_p(counts: Int[Array, "*b bins"]) -> Float[Array, "*b"]:
    """p of Pearson's chi-square against a uniform histogram.

    The law of chi-square is that of many events. At 5 expected in a bin it is close; with 1,000
    events in 10 bins p <= 0.002 comes with a probability of 0.00205 (a million draws).
    """
    expected = jnp.sum(counts, axis=-1, keepdims=True) / counts.shape[-1]
    chi2 = jnp.sum((counts - expected) ** 2 / expected, axis=-1)
    return jax.scipy.special.gammaincc(0.5 * (counts.shape[-1] - 1), 0.5 * chi2)


def uniform_p(u: Float[Array, "*b n"], bins: int) -> Float[Array, "*b"]:
    """p of the same test for numbers between 0 and 1."""
    which = jnp.clip((u * bins).astype(int), 0, bins - 1)
    return uniformity_p(bin_counts(which, bins - 1, bins))


def holm(p: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """p-values adjusted for their number: Holm (1979), Scand. J. Statist. 6.

    Calling every statistic faulty whose adjusted p is at most alpha calls any wrongly with a
    probability of at most alpha, however they depend on each other. The smallest is k min(p), so
    that the verdict on all together is Bonferroni's.
    """
    order = np.argsort(p)
    scaled = (p.size - np.arange(p.size)) * p[order]
    out = np.empty(p.size)
    out[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return out
