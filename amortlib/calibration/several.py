"""Events with several minima, judged against a long-run reference.

Where the posterior has several pieces, neither its mode nor the derivative of it has one right
answer, and the first two gates are silent. What can be asked there is whether q is the posterior:
whether a classifier tells its draws from those of a reference (C2ST), whether each piece has its
weight, and how many nats q is away.

The weight of a piece is the probability of all states that are nearer to its minimum than to
another, in the prior's metric. Whatever cuts the states into pieces, q and the posterior have to
give each the same probability; this cut needs no more than the minima.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from amortlib.calibration.two_sample import c2st
from amortlib.energy import Energy
from amortlib.gaussian import AbstractDistribution
from amortlib.solvers import OracleAnalysis, population_sample
from amortlib.types import Array, Event, Key

__all__ = ["C2ST", "SEVERAL", "WEIGHTS", "SeveralMinima", "judge_several", "weight_limit"]

SEVERAL = 16
"""Events with several minima that are judged, the default: the first of them."""

C2ST = 0.55
"""The mean accuracy of the classifier over these events has to be at most this."""

WEIGHTS = 2.0
"""The mean error of the weights of the pieces has to be within so many times its Monte Carlo
floor: what an exact q would have for its finite number of draws."""

DRAWS = 1000
"""Draws of q, and of the reference, for each event."""

PROPOSALS = 20_000
"""Weighted draws that the reference is made of."""

MINIMA = 8
"""Minima of an event that are looked at, the lowest."""

NEAR = 12.0
"""Minima further than this above the lowest have no weight to speak of, in nats."""

_FEW = (3.23, 2.49, 2.18, 2.01)
"""With so few events as there are entries here the mean of as many half-normal errors exceeds
twice what is expected in more than 1% of cases; these are its 99% quantiles (two million draws)."""


def weight_limit(events: int) -> float:
    """How many times its floor the mean error of the weights may be, over so many events.

    `WEIGHTS`, but for fewer than five events, where luck alone goes beyond that too often.
    """
    return _FEW[events - 1] if 1 <= events <= len(_FEW) else WEIGHTS


@dataclasses.dataclass(frozen=True)
class SeveralMinima:
    """What was found on events with several minima, one entry for each that was looked at.

    Attributes:
        event: its number in the batch, `(m,)`.
        minima: how many minima lie near the lowest, at most `MINIMA`, `(m,)`.
        reference: how many draws of the posterior the reference is worth, `(m,)`.
        c2st: accuracy of the classifier between draws of q and of the reference, `(m,)`.
        weight_error: half the sum over pieces of |weight under q - weight in the reference|, which
            is the error of one weight where there are two pieces, `(m,)`.
        weight_floor: what it would be in the mean for an exact q, by the draws alone, `(m,)`.
        kl: KL(p || q) in nats over draws of the reference, infinite where q says that a state is
            impossible; `(m,)`, or `None` where q has no exact density.
        draws: of q and of the reference for each event.
    """

    event: np.ndarray
    minima: np.ndarray
    reference: np.ndarray
    c2st: np.ndarray
    weight_error: np.ndarray
    weight_floor: np.ndarray
    kl: np.ndarray | None
    draws: int

    @property
    def judged(self) -> np.ndarray:
        """Whether the reference is worth as many draws as it was asked for, `(m,)`."""
        return self.reference >= self.draws


@eqx.filter_jit
def _pieces(
    posterior: Callable[[Event], AbstractDistribution],
    energy: Energy,
    event: Event,
    modes: Array,
    key: Key,
    draws: int,
    proposals: int,
) -> dict[str, Array]:
    k_reference, k_resample, k_draw, k_classify = jax.random.split(key, 4)
    q, whiten = posterior(event), energy.prior.whiten
    sample = population_sample(energy, event, modes, proposals, key=k_reference, rounds=1)
    own, reference = q.sample(draws, key=k_draw), sample.resample(draws, key=k_resample)
    near = jax.vmap(whiten)(modes)

    def piece(x: Array) -> Array:
        # Of minima that are given twice the first counts, and the other has no piece.
        nearest = jnp.argmin(jnp.sum((near - whiten(x)) ** 2, axis=1))
        return (jnp.arange(near.shape[0]) == nearest).astype(x.dtype)

    of_reference = jax.vmap(piece)(sample.x)
    want = sample.weight @ of_reference
    got = jnp.mean(jax.vmap(piece)(own), axis=0)
    # Of a self-normalised mean, and of a share of so many draws.
    variance = sample.weight**2 @ (of_reference - want) ** 2
    # A weight of one may be rounded up, and its complement is then below zero.
    variance = variance + want * jnp.maximum(1.0 - want, 0.0) / draws
    out = {
        "reference": sample.effective_size,
        "c2st": c2st(reference, own, key=k_classify),
        "weight_error": 0.5 * jnp.sum(jnp.abs(got - want)),
        "weight_floor": 0.5 * math.sqrt(2.0 / math.pi) * jnp.sum(jnp.sqrt(variance)),
    }
    if getattr(q, "exact_log_prob", True):
        log_p = -jax.vmap(lambda x: energy(x, event))(reference) - sample.log_normaliser
        out["kl"] = jnp.mean(log_p - jax.vmap(q.log_prob)(reference))
    return out


def judge_several(
    posterior: Callable[[Event], AbstractDistribution],
    energy: Energy,
    events: Event,
    analysis: OracleAnalysis,
    *,
    key: Key,
    most: int = SEVERAL,
    draws: int = DRAWS,
    proposals: int = PROPOSALS,
) -> SeveralMinima | None:
    """Hold a head against a long-run reference on events with several minima.

    The reference is [`population_sample`][amortlib.solvers.population_sample] around the minima
    that the oracle found: it is exact as far as the oracle missed none that the prior's share of
    the proposals does not reach. An event costs 2 `proposals` evaluations of J and a small
    classifier, about as much as its oracle: some seconds for 16 windows of Lorenz-63, after as
    many to compile.

    Args:
        posterior: event -> distribution.
        energy: J.
        events: with a leading axis.
        analysis: of the same events.
        key: the reference, the draws, the classifier.
        most: the first so many of the events with several minima are taken.
        draws: of q and of the reference.
        proposals: what the reference is made of.

    Returns:
        What was found, or `None` where no event has several minima or `most` is 0.
    """
    which = np.flatnonzero(~np.asarray(analysis.single))[:most]
    if which.size == 0:
        return None
    found, counts = [], []
    for i in which:
        modes, count = _minima(analysis, int(i))
        counts.append(count)
        out = _pieces(
            posterior,
            energy,
            jax.tree.map(lambda a, i=i: a[i], events),
            jnp.asarray(modes, float),
            jax.random.fold_in(key, i),
            draws,
            proposals,
        )
        found.append(jax.tree.map(float, out))
    values: dict[str, Any] = {name: np.array([f[name] for f in found]) for name in found[0]}
    values.setdefault("kl", None)
    return SeveralMinima(event=which, minima=np.array(counts), draws=draws, **values)


def _minima(analysis: OracleAnalysis, i: int) -> tuple[np.ndarray, int]:
    """The lowest minima of an event, `(MINIMA, d)`, the lowest again where there are fewer."""
    heights = np.where(analysis.distinct[i], analysis.end_energy[i], np.inf)
    order = np.argsort(heights)[:MINIMA]
    order = order[heights[order] < analysis.energy[i] + NEAR]
    # The mode is the lowest of them, polished.
    modes = np.concatenate([analysis.mode[i][None], analysis.ends[i][order[1:]]])
    return modes[np.arange(MINIMA) * (np.arange(MINIMA) < len(modes))], len(modes)
