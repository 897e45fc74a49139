"""Run all gates of one head on one batch of events."""

import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from amortlib.calibration.adjoint import jacobian_error
from amortlib.calibration.agreement import mode_distance
from amortlib.calibration.coverage import density_rank, prior_pit, tarp_rank
from amortlib.calibration.fingerprint import fingerprint, problem_fingerprint
from amortlib.calibration.importance import importance_figures
from amortlib.calibration.report import GateError, GateReport, check_sizes
from amortlib.calibration.sbc import BINS, DRAWS, holm, rank, uniform_p
from amortlib.calibration.several import SEVERAL, judge_several
from amortlib.energy import Energy
from amortlib.gaussian import AbstractDistribution, Gaussian, GaussMarkov
from amortlib.problems import InverseProblem
from amortlib.solvers import OracleAnalysis
from amortlib.types import Array, Event, Fixed, Key, to_double

__all__ = ["IMPORTANCE_DRAWS", "run_gates"]

IMPORTANCE_DRAWS = 1000
"""Draws of q behind KL, ESS and k-hat: 95 of them are the tail that k-hat is fitted to."""

_OTHER_PRIOR = 1e-6
"""The truths are called draws of another prior below this p: the rate of false alarms."""


def run_gates(
    posterior: Callable[[Event], AbstractDistribution],
    problem: InverseProblem,
    events: Event,
    truths: Float[Any, "e d"],
    analysis: OracleAnalysis,
    *,
    key: Key,
    energy: Energy | None = None,
    draws: int = DRAWS,
    bins: int = BINS,
    importance_draws: int = IMPORTANCE_DRAWS,
    batch: int = 50,
    excluded: int = 0,
    double: bool = True,
    several: int = SEVERAL,
) -> GateReport:
    """Judge a head by posterior agreement, adjoint calibration and simulation-based calibration.

    Where an event has several minima, the first two have no right answer, and some such events
    are held against a long-run reference.

    The events are fresh: drawn from the simulator, never trained on, never used to choose
    anything. One program is compiled and runs over batches of events.

    Args:
        posterior: event -> distribution: an `AmortizedPosterior`, or anything that answers so.
        problem: what the head was trained on and the events were drawn from.
        events: arrays with a leading axis, as `InverseProblem.batch` makes them.
        truths: the states that they were seen of.
        analysis: of the same events, by `Oracle(energy)`.
        key: draws from q, and breaks ties.
        energy: the J that the oracle minimised; by default made of `problem`.
        draws: L, draws of q that the truth is ranked among.
        bins: of the rank histograms; divides L + 1.
        importance_draws: draws of q for KL, ESS and k-hat, at least `draws`.
        batch: events at once; bounds the memory.
        excluded: how many events were left out for want of an oracle's answer, for the report.
            Leaving out by what was seen, and not by the truth, does no harm to SBC.
        double: run head and J in double precision, so that the head is judged and not rounding.
        several: how many of the events with several minima are held against a long-run reference,
            the first of them; 0 for none. What it costs is in
            [`judge_several`][amortlib.calibration.several.judge_several].

    Raises:
        GateError: on no events, on counts that differ, on a head, a simulator and an oracle that
            do not share the prior, on an oracle that did not converge or analysed other events,
            on a NaN from the head, on too few events for the bins.
    """
    if problem.prior is None:
        raise GateError(
            "expected a problem with its prior: without it J, and so the oracle, has another"
        )
    if energy is None:
        if not isinstance(problem.prior, Gaussian | GaussMarkov):
            raise GateError(
                f"expected a Gaussian prior to make J of, got {type(problem.prior).__name__}; "
                "give the energy that the oracle minimised"
            )
        energy = Energy(problem.prior, problem.forward)
    if importance_draws < max(draws, 25):
        raise GateError(
            f"expected importance_draws >= {max(draws, 25)}, got {importance_draws}: the draws "
            "for the ranks are the first of them"
        )
    truths = np.asarray(truths)
    _check_counts(events, truths, analysis)
    check_sizes(truths.shape[0], draws, bins)
    _check_priors(posterior, problem, energy)
    _check_oracle(analysis)
    with jax.enable_x64(True):
        _check_truths(energy, truths, bins)

    n, d = truths.shape
    with jax.enable_x64(double):
        model = posterior
        if double:
            model, energy_, events_ = to_double((posterior, energy, events))
        else:
            energy_, events_ = energy, events
        # By its number: what is drawn for an event does not depend on how many there are.
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))
        size = min(batch, n)
        parts = []
        for start in range(0, n, size):
            rows = np.minimum(np.arange(start, start + size), n - 1)
            oracle = (analysis.mode[rows], analysis.covariance[rows], analysis.jacobian[rows])
            out = _judge(
                model,
                energy_,
                jax.tree.map(lambda a, rows=rows: a[rows], events_),
                jnp.asarray(truths[rows], float),
                jax.tree.map(lambda a: jnp.asarray(a, float), oracle),
                keys[rows],
                draws,
                importance_draws,
            )
            kept = min(size, n - start)
            parts.append(jax.tree.map(lambda a, k=kept: np.asarray(a)[:k], out))
        found = jax.tree.map(lambda *a: np.concatenate(a), *parts)

    _check_same_energy(found.pop("oracle_energy"), analysis, 1e-6 if double else 1e-3)
    for name, words in {
        "draws_finite": "finite draws of q",
        "J_is_number": "J at the draws of q to be a number",
        "log_q_is_number": "log q at its draws and at the truth to be a number",
    }.items():
        fine = found.pop(name)
        if not fine.all():
            raise GateError(
                f"expected {words}, got NaN or an infinite state at {int((~fine).sum())} of {n} "
                f"events, the first of them event {int(np.argmin(fine))}"
            )
    with jax.enable_x64(double):
        # After the checks: a head that returns NaN has been refused by now.
        several_found = judge_several(
            model, energy_, events_, analysis, key=jax.random.fold_in(key, n), most=several
        )
    pit = found.pop("pit")
    cells = np.clip((pit * bins).astype(int), 0, bins - 1)
    return GateReport(
        agreement=found["agreement"].astype(float),
        adjoint=found["adjoint"].astype(float),
        single=np.asarray(analysis.single),
        sure=np.asarray(analysis.sure),
        names=(*(f"x{i}" for i in range(d)), "J"),
        ranks=found["ranks"].astype(int),
        draws=draws,
        bins=bins,
        tarp=found["tarp"].astype(int),
        coverage=found["coverage"].astype(int) if "coverage" in found else None,
        average=np.stack([np.bincount(column, minlength=bins) for column in cells.T]),
        kl=found["kl"].astype(float) if "kl" in found else None,
        ess=found["ess"].astype(float) if "ess" in found else None,
        khat=found["khat"].astype(float) if "khat" in found else None,
        importance_draws=importance_draws,
        excluded=excluded,
        head=fingerprint(posterior),
        problem=problem_fingerprint(energy, problem.obs_noise),
        versions={name: importlib.metadata.version(name) for name in ("amortlib", "jax")},
        several=several_found,
    )


@eqx.filter_jit
def _judge(
    posterior: Callable[[Event], AbstractDistribution],
    energy: Energy,
    events: Event,
    truths: Float[Array, "e d"],
    oracle: tuple[Array, Array, Array],
    keys: Array,
    draws: int,
    importance_draws: int,
) -> dict[str, Array]:
    """Everything that is asked of the head, event by event."""
    prior_sd = energy.prior.sd()

    def one(event, truth, oracle, key):
        oracle_mode, covariance, oracle_jacobian = oracle
        k_draw, k_tie, k_point, k_tarp, k_density = jax.random.split(key, 5)
        q = posterior(event)

        def mode(y):
            return posterior(dataclasses.replace(event, y=y)).mode()

        own = getattr(posterior, "mode_jacobian", None)
        jacobian = jax.jacfwd(mode)(event.y) if own is None else own(event)
        x = q.sample(importance_draws, key=k_draw)
        J, J_truth = jax.vmap(lambda x: energy(x, event))(x), energy(truth, event)
        values = jnp.concatenate([x[:draws], J[:draws, None]], axis=1)
        at_truth = jnp.append(truth, J_truth)
        ties = jax.random.split(k_tie, at_truth.size)
        # Around the oracle's mode and wider than the posterior: it depends on the data.
        spread = 2.0 * jnp.sqrt(jnp.diagonal(covariance))
        point = oracle_mode + spread * jax.random.normal(k_point, truth.shape, truth.dtype)
        whiten = energy.prior.whiten
        out = {
            "agreement": mode_distance(q.mode(), oracle_mode, covariance),
            "adjoint": jacobian_error(jacobian, oracle_jacobian, event.mask),
            "ranks": jax.vmap(lambda v, d, k: rank(v, d, key=k))(at_truth, values.T, ties),
            "tarp": tarp_rank(
                whiten(truth), jax.vmap(whiten)(x[:draws]), whiten(point), key=k_tarp
            ),
            "pit": prior_pit(energy.prior, x[0], prior_sd),
            "oracle_energy": energy(oracle_mode, event),
            "draws_finite": jnp.all(jnp.isfinite(x)),
            "J_is_number": ~jnp.any(jnp.isnan(J)) & ~jnp.isnan(J_truth),
            "log_q_is_number": jnp.array(True),
        }
        # A density that an ODE integrates, with an error of its own, is no base for weights.
        if getattr(q, "exact_log_prob", True):
            log_q, log_q_truth = jax.vmap(q.log_prob)(x), q.log_prob(truth)
            figures = importance_figures(-J - log_q)
            out |= {"kl": figures.kl, "ess": figures.ess, "khat": figures.khat}
            out["coverage"] = density_rank(log_q_truth, log_q[:draws], key=k_density)
            out["log_q_is_number"] = ~jnp.any(jnp.isnan(log_q)) & ~jnp.isnan(log_q_truth)
        return out

    return jax.vmap(one)(events, truths, oracle, keys)


def _check_counts(events: Event, truths: np.ndarray, analysis: OracleAnalysis) -> None:
    if truths.ndim != 2:
        raise GateError(f"expected truths of shape (events, d), got {truths.shape}")
    n = truths.shape[0]
    if n == 0:
        raise GateError("expected at least one event, got none: an empty sample passes nothing")
    if events.y.shape[0] != n or analysis.energy.shape[0] != n:
        raise GateError(
            f"expected as many events and oracle's analyses as truths, {n}, "
            f"got {events.y.shape[0]} and {analysis.energy.shape[0]}"
        )
    if not np.isfinite(truths).all():
        raise GateError("expected finite truths, got others")


def _check_priors(posterior: Any, problem: InverseProblem, energy: Energy) -> None:
    """Head, simulator and oracle share the prior, or the gates mean nothing."""
    want = fingerprint(energy.prior)
    if fingerprint(problem.prior) != want:
        raise GateError(
            "expected the simulator and the oracle to share one prior, got two: a head trained "
            "on the one is rightly not at the mode of the other"
        )
    held = getattr(getattr(posterior, "head", None), "prior", None)
    held = held.tree if isinstance(held, Fixed) else held
    if isinstance(held, AbstractDistribution) and fingerprint(held) != want:
        raise GateError(
            "expected the head to hold the oracle's prior, got another: train the head on the "
            "problem that the oracle solves"
        )


def _check_oracle(analysis: OracleAnalysis) -> None:
    lost = np.flatnonzero(~np.asarray(analysis.converged))
    if lost.size:
        raise GateError(
            f"expected an oracle that converged on every event, got {lost.size} on which it did "
            f"not, the first of them event {lost[0]}: give it more rounds, or leave those out, "
            "with keep = analysis.converged and jax.tree.map(lambda a: a[keep], ...), and say so "
            "in `excluded`"
        )
    for name in ("mode", "covariance", "jacobian"):
        bad = ~np.isfinite(getattr(analysis, name)).reshape(analysis.energy.size, -1).all(axis=1)
        if bad.any():
            raise GateError(
                f"expected finite numbers in the oracle's {name}, got others at event "
                f"{int(np.argmax(bad))}"
            )


def _check_truths(energy: Energy, truths: np.ndarray, bins: int) -> None:
    prior = to_double(energy.prior)
    sd = prior.sd()
    pit = jax.vmap(lambda x: prior_pit(prior, x, sd))(jnp.asarray(truths, float))
    p = holm(np.asarray(uniform_p(pit.T, bins)))
    if truths.shape[0] >= 5 * bins and p.min() < _OTHER_PRIOR:
        raise GateError(
            f"expected truths drawn from the prior in J, got others (p = {p.min():.1g}): the "
            "simulator draws its states from something else"
        )


def _check_same_energy(found: np.ndarray, analysis: OracleAnalysis, tolerance: float) -> None:
    off = np.abs(found - analysis.energy) > tolerance * (1.0 + np.abs(analysis.energy))
    if off.any() or np.isnan(found).any():
        at = int(np.argmax(off | np.isnan(found)))
        raise GateError(
            f"expected the oracle's modes to have the energy it states, got {found[at]:.6g} for "
            f"{analysis.energy[at]:.6g} at event {at}: it analysed other events, or another "
            "prior, forward model or noise"
        )
