"""What the gates catch, and how often they cry wolf: their operating characteristics.

    python -m benchmarks.gates [--json FILE] [--quick]

Heads that are exact, and heads with one planted fault each, are judged in many repetitions on
fresh events of two problems whose posterior is known in closed form: a path of an
Ornstein-Uhlenbeck process with gaps, and a state of two numbers of which one is seen without its
sign, so that its posterior has two pieces. The statistics are those of `amortlib.calibration`.

The first table is the share of repetitions in which each gate, and each diagnostic beside them,
calls the head faulty. The second is the same for simulation-based calibration alone over numbers
of events, draws and bins; the package's defaults are taken from it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from amortlib.calibration import (
    ADJOINT,
    AGREEMENT,
    ALPHA,
    BINS,
    DRAWS,
    EVENTS,
    bin_counts,
    density_rank,
    jacobian_error,
    mode_distance,
    prior_pit,
    rank,
    tarp_rank,
    uniform_p,
    uniformity_p,
)
from amortlib.energy import Energy
from amortlib.gaussian import Gaussian, condition
from amortlib.laplace import mode_jacobian
from amortlib.observation import ContiguousGaps, GaussianNoise, NoGaps
from amortlib.problems import DrawOne, InverseProblem, ornstein_uhlenbeck
from amortlib.types import Array, Event
from benchmarks.report import Bar, arguments, finish, table

SEEDS = {
    "path": 31,
    "two pieces": 32,
    "path, false alarms": 33,
    "two pieces, false alarms": 34,
}
REPETITIONS = 500
ALARMS = 4000
"""Repetitions for exact heads, whose rate of false alarms is small and has to be known well."""
EVENTS_GRID = (250, 500, 1000, 2000)
DRAWS_GRID = (19, 99)
BINS_GRID = (10, 20)
POWER = 0.99
TIMES = 4
RARE = 0.01
"""Share of events on which a rare fault strikes."""

PATH = (
    "exact",
    "variance x 0.8",
    "variance x 1.25",
    "mean + 0.5 sd",
    "no correlations",
    "prior",
    "Jacobian x 1.1",
    "Jacobian, one row's sign",
    "Jacobian x 1.1, 1 in 100",
)
"""Heads on the path. The last three answer with the exact density; their derivatives are wrong."""

PIECES = ("exact, two pieces", "one piece missing")
GATES = ("agreement", "adjoint", "sbc")
COLUMNS = (*GATES, "components", "J", "tarp", "coverage", "average", "report")


# --- the path: everything Gaussian ---------------------------------------------------------------


def path_problem() -> InverseProblem:
    """Four times of an Ornstein-Uhlenbeck process, up to three of them missed by a gap."""
    return ornstein_uhlenbeck(TIMES, timescale=4.0, noise=0.5, gaps=ContiguousGaps(0.0, 0.75))


def faulty(name: str, exact: Gaussian, prior: Gaussian) -> Gaussian:
    """The density of a head with the named fault."""
    if name == "variance x 0.8":
        return Gaussian(exact.loc, math.sqrt(0.8) * exact.chol)
    if name == "variance x 1.25":
        return Gaussian(exact.loc, math.sqrt(1.25) * exact.chol)
    if name == "mean + 0.5 sd":
        # Of one component alone: a fault in all of them is easier to see.
        return Gaussian(exact.loc.at[0].add(0.5 * exact.sd()[0]), exact.chol)
    if name == "no correlations":
        return Gaussian(exact.loc, jnp.diag(exact.sd()))
    return prior if name == "prior" else exact


def faulty_jacobian(name: str, exact: Array, struck: Array) -> Array:
    """The derivative of that head's mode."""
    if name == "prior":
        return jnp.zeros_like(exact)
    if name == "Jacobian x 1.1":
        return 1.1 * exact
    if name == "Jacobian, one row's sign":
        return exact.at[0].multiply(-1.0)
    return jnp.where(struck, 1.1, 1.0) * exact if name == "Jacobian x 1.1, 1 in 100" else exact


def _ranks(
    log_q: tuple[Array, Array],
    energy: Energy,
    event: Event,
    truth: Array,
    x: Array,
    point: Array,
    key: Array,
) -> dict[str, Array]:
    """All that is ranked for one head on one event, for each number of draws.

    Args:
        log_q: log-density of the head at the truth, and at its draws, up to a constant.
        energy: J.
        event: the event.
        truth: the state that was seen.
        x: draws of the head.
        point: where TARP measures from.
        key: breaks ties.
    """
    whiten = energy.prior.whiten
    J, J_truth = jax.vmap(lambda x: energy(x, event))(x), energy(truth, event)
    values, at_truth = jnp.column_stack([x, J]), jnp.append(truth, J_truth)
    keys = jax.random.split(key, at_truth.size)
    out = {
        f"ranks {n}": jax.vmap(lambda v, d, k: rank(v, d, key=k))(at_truth, values[:n].T, keys)
        for n in DRAWS_GRID
    }
    out["tarp"] = tarp_rank(whiten(truth), jax.vmap(whiten)(x), whiten(point), key=keys[0])
    out["coverage"] = density_rank(*log_q, key=keys[1])
    out["pit"] = prior_pit(energy.prior, x[0], energy.prior.sd())
    return out


def path_event(
    problem: InverseProblem, names: Sequence[str], draws: int, key: Array
) -> dict[str, dict[str, Array]]:
    """One event of the path, answered by every head with the same random numbers."""
    k_event, k_draw, k_point, k_tie, k_struck = jax.random.split(key, 5)
    truth, event = problem.simulate(k_event)
    prior, energy = problem.prior.to_gaussian(), Energy(problem.prior, problem.forward)
    exact = condition(prior, jnp.eye(TIMES), event)
    # P* H^T R^-1 is the Jacobian of the mode where H is linear.
    gain = exact.covariance() * jnp.where(event.mask, event.sd**-2, 0.0)
    point = exact.loc + 2.0 * exact.sd() * jax.random.normal(k_point, (TIMES,))
    z = jax.random.normal(k_draw, (draws, TIMES))
    struck = jax.random.uniform(k_struck) < RARE
    out, ranked = {}, {}
    for name in names:
        # Heads whose density is exact share their ranks.
        density = "exact" if name.startswith("Jacobian") else name
        if density not in ranked:
            q = faulty(density, exact, prior)
            log_q = q.log_prob(truth), -0.5 * jnp.sum(z**2, axis=1) + q.log_prob(q.loc)
            x = q.loc + z @ q.chol.T
            ranked[density] = {
                "agreement": mode_distance(q.mode(), exact.loc, exact.covariance()) > AGREEMENT
            } | _ranks(log_q, energy, event, truth, x, point, k_tie)
        jacobian = faulty_jacobian(name, gain, struck)
        error = jacobian_error(jacobian, gain, event.mask)
        out[name] = ranked[density] | {"adjoint": error >= ADJOINT}
    return out


# --- two pieces: a posterior with two modes ------------------------------------------------------


def pieces_problem() -> InverseProblem:
    """x_1 is seen without its sign, x_2 as it is; the prior leans to one side."""
    prior = Gaussian(jnp.array([0.3, 0.0]), jnp.eye(2))

    def forward(x):
        return jnp.array([jnp.abs(x[0]), x[1]])

    return InverseProblem(DrawOne(prior), forward, GaussianNoise(0.4), NoGaps(), prior)


class TwoPieces(eqx.Module):
    """The exact posterior of `pieces_problem`: x_1 is one of two normals, each cut off at zero.

    On either side of zero |x_1| is linear, and completing the square gives a normal with the mean
    below, of which the part on that side counts. x_2 is normal and independent.

    Attributes:
        centre: of the normals for x_1 < 0 and x_1 > 0, `(2,)`.
        sd: of both.
        log_share: log of the probability of each piece, `(2,)`.
        second: of x_2: mean and standard deviation.
    """

    centre: Array
    sd: Array
    log_share: Array
    second: tuple[Array, Array]

    @classmethod
    def of(cls, prior: Gaussian, event: Event) -> TwoPieces:
        """From the event; the prior has unit variances."""
        precision = 1.0 + event.sd**-2
        sides = jnp.array([-1.0, 1.0])
        centre = (prior.loc[0] + sides * event.y[0] * event.sd[0] ** -2) / precision[0]
        sd = precision[0] ** -0.5
        # The height of each normal at its centre, times the part of it on the right side.
        height = 0.5 * centre**2 / sd**2
        log_share = jax.nn.log_softmax(height + jax.scipy.stats.norm.logcdf(sides * centre / sd))
        mean = (prior.loc[1] + event.y[1] * event.sd[1] ** -2) / precision[1]
        return cls(centre, sd, log_share, (mean, precision[1] ** -0.5))

    def without_the_lighter(self) -> TwoPieces:
        """The fault: all the probability in the heavier piece."""
        heavier = jnp.arange(2) == jnp.argmax(self.log_share)
        return eqx.tree_at(lambda q: q.log_share, self, jnp.where(heavier, 0.0, -jnp.inf))

    def log_prob(self, x: Array) -> Array:
        """Log-density."""
        side = (x[0] > 0).astype(int)
        sign = jnp.array([-1.0, 1.0])[side]
        centre = self.centre[side]
        inside = jax.scipy.stats.norm.logcdf(sign * centre / self.sd)
        first = jax.scipy.stats.norm.logpdf(x[0], centre, self.sd) - inside
        second = jax.scipy.stats.norm.logpdf(x[1], *self.second)
        return self.log_share[side] + first + second

    def sample(self, n: int, *, key: Array) -> Array:
        """Draws: a piece, a cut normal in it, a normal."""
        k_side, k_first, k_second = jax.random.split(key, 3)
        side = jax.random.categorical(k_side, self.log_share, shape=(n,))
        sign = jnp.array([-1.0, 1.0])[side]
        low = -sign * self.centre[side] / self.sd
        first = jax.random.truncated_normal(k_first, low, jnp.inf, (n,))
        mean, sd = self.second
        second = mean + sd * jax.random.normal(k_second, (n,))
        return jnp.column_stack([self.centre[side] + sign * self.sd * first, second])


def pieces_event(
    problem: InverseProblem, names: Sequence[str], draws: int, key: Array
) -> dict[str, dict[str, Array]]:
    """One event with two pieces. The mode of both heads is exact wherever there is one answer."""
    k_event, k_draw, k_point, k_tie = jax.random.split(key, 4)
    truth, event = problem.simulate(k_event)
    prior = problem.prior
    energy = Energy(prior, problem.forward)
    exact = TwoPieces.of(prior, event)
    mean, sd = exact.second
    side = jnp.argmax(exact.log_share)
    mode = jnp.stack([exact.centre[side], mean])
    point = mode + 2.0 * jnp.stack([exact.sd, sd]) * jax.random.normal(k_point, (2,))
    gain = mode_jacobian(energy, mode, event)
    fine = jacobian_error(gain, gain, event.mask) >= ADJOINT
    out = {}
    for name in names:
        q = exact if name == PIECES[0] else exact.without_the_lighter()
        x = q.sample(draws, key=k_draw)
        out[name] = {"agreement": jnp.array(False), "adjoint": fine} | _ranks(
            (q.log_prob(truth), jax.vmap(q.log_prob)(x)), energy, event, truth, x, point, k_tie
        )
    return out


# --- repetitions ---------------------------------------------------------------------------------


def _reduce(found: dict[str, Array], sizes: Sequence[int], bins_grid: Sequence[int]) -> dict:
    """p-values, and whether any event failed, of one head in one repetition, for each size."""
    out: dict[str, Array] = {}
    for n in sizes:
        out[f"agreement {n}"] = jnp.any(found["agreement"][:n])
        out[f"adjoint {n}"] = jnp.any(found["adjoint"][:n])
        for draws in DRAWS_GRID:
            for bins in bins_grid:
                counts = bin_counts(found[f"ranks {draws}"][:n].T, draws, bins)
                out[f"p {n} {draws} {bins}"] = uniformity_p(counts)
        for name in ("tarp", "coverage"):
            out[f"{name} {n}"] = uniformity_p(bin_counts(found[name][:n], DRAWS_GRID[-1], BINS))
        out[f"average {n}"] = uniform_p(found["pit"][:n].T, BINS)
    return out


def repeat(
    kind: str,
    repetitions: int,
    sizes: Sequence[int] = EVENTS_GRID,
    bins_grid: Sequence[int] = BINS_GRID,
    names: Sequence[str] | None = None,
    seed: int | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """Run heads of a problem; returns arrays with a leading axis of repetitions.

    Args:
        kind: `"path"` or `"two pieces"`.
        repetitions: each has events of its own.
        sizes: numbers of events; the smaller samples are the first of the largest.
        bins_grid: numbers of bins.
        names: of the heads; by default all.
        seed: by default that of the problem.
    """
    problem, one, every = {
        "path": (path_problem(), path_event, PATH),
        "two pieces": (pieces_problem(), pieces_event, PIECES),
    }[kind]
    names = every if names is None else names

    @jax.jit
    def run(keys):
        def repetition(key):
            found = jax.vmap(lambda k: one(problem, names, DRAWS_GRID[-1], k))(
                jax.random.split(key, max(sizes))
            )
            return {name: _reduce(found[name], sizes, bins_grid) for name in names}

        return jax.lax.map(repetition, keys)

    keys = jax.random.split(jax.random.key(SEEDS[kind] if seed is None else seed), repetitions)
    found = jax.tree.map(np.asarray, run(keys))
    return {name: found[name] for name in names}


def _adjusted(p: np.ndarray) -> np.ndarray:
    """Smallest p over statistics, adjusted for their number as Holm's smallest is."""
    return np.minimum(p.shape[-1] * p.min(axis=-1), 1.0)


def shares(
    found: dict[str, np.ndarray], n: int = EVENTS, draws: int = DRAWS, bins: int = BINS
) -> dict[str, float]:
    """Share of repetitions in which each gate or diagnostic calls the head faulty."""
    p = found[f"p {n} {draws} {bins}"]
    calls = {
        "agreement": found[f"agreement {n}"],
        "adjoint": found[f"adjoint {n}"],
        "sbc": _adjusted(p) <= ALPHA,
        # Alone, each adjusted for as many as there are of it.
        "components": _adjusted(p[:, :-1]) <= ALPHA,
        "J": p[:, -1] <= ALPHA,
        "tarp": found[f"tarp {n}"] <= ALPHA,
        "coverage": found[f"coverage {n}"] <= ALPHA,
        "average": _adjusted(found[f"average {n}"]) <= ALPHA,
    }
    calls["report"] = calls["agreement"] | calls["adjoint"] | calls["sbc"]
    return {name: float(np.mean(value)) for name, value in calls.items()}


def run(*, quick: bool = False) -> tuple[dict[str, Any], list[Bar]]:
    """Both problems, both tables, and the bars."""
    repetitions, alarms = (20, 20) if quick else (REPETITIONS, ALARMS)
    grid = (EVENTS,) if quick else EVENTS_GRID
    start = time.perf_counter()
    found = repeat("path", repetitions, grid) | repeat("two pieces", repetitions, grid)
    exact: dict[str, dict[str, np.ndarray]] = {}
    for kind, names in (("path", PATH), ("two pieces", PIECES)):
        seed = SEEDS[f"{kind}, false alarms"]
        exact |= repeat(kind, alarms, (EVENTS,), (BINS,), names[:1], seed)
    seconds = time.perf_counter() - start
    # The rate of false alarms is that of the longer run.
    characteristics = {name: shares(of) for name, of in (found | exact).items()}
    sizes = [
        {
            "head": name,
            "draws": draws,
            "bins": bins,
            "share": {str(n): shares(found[name], n, draws, bins)["sbc"] for n in grid},
        }
        for draws in DRAWS_GRID
        for bins in BINS_GRID
        for name in found
        if "Jacobian" not in name
    ]
    bars = []
    # Three standard errors of a share of `ALPHA` beside it.
    slack = 3.0 * math.sqrt(ALPHA * (1 - ALPHA) / alarms)
    for name, row in characteristics.items():
        if name.startswith("exact"):
            bars.append(Bar.check(f"{name}: called faulty", row["report"], "<=", ALPHA + slack))
        else:
            bars.append(Bar.check(f"{name}: caught", row["report"], ">=", POWER))
    results = {
        "repetitions": repetitions,
        "alarms": alarms,
        "events": EVENTS,
        "draws": DRAWS,
        "bins": BINS,
        "alpha": ALPHA,
        "seconds": seconds,
        "columns": list(COLUMNS),
        "characteristics": characteristics,
        "sizes": sizes,
    }
    return results, bars


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write."""
    args = arguments(__doc__.splitlines()[0], argv)
    results, bars = run(quick=args.quick)
    print(
        f"Share of {results['repetitions']} repetitions in which each calls the head faulty, "
        f"({results['alarms']} for exact heads), {EVENTS} events, {DRAWS} draws, {BINS} bins; "
        f"{results['seconds']:.0f} s\n"
    )
    rows = [
        [name, *(f"{row[column]:.3f}" for column in COLUMNS)]
        for name, row in results["characteristics"].items()
    ]
    print(table(["head", *COLUMNS], rows))
    print("\nThe same for simulation-based calibration, over the number of events\n")
    rows = [
        [row["head"], row["draws"], row["bins"], *(f"{v:.3f}" for v in row["share"].values())]
        for row in results["sizes"]
    ]
    print(table(["head", "draws", "bins", *results["sizes"][0]["share"]], rows))
    return finish(args, name="gates", results=results, bars=bars, seeds=SEEDS)


if __name__ == "__main__":
    sys.exit(main())
