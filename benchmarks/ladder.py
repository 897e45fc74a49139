"""How the solvers stand on the same gappy Lorenz-63 windows: what is found, and at what cost.

    python -m benchmarks.ladder [--json FILE] [--quick]

Three questions. Does the oracle find the lowest minimum known, and does it say so where it is not
sure? How much of the time of a generic 4DVar, BFGS on the adjoint's gradient, does incremental
4DVar take to reach its energy? And what does each method, from a minimisation for every event to
one forward pass, cost and reach on the same events? All run in double precision, in one process;
times are medians of repeated, compiled runs, compared as ratios.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import equinox as eqx
import jax
import numpy as np
import optimistix as optx

from amortlib.energy import Energy
from amortlib.observation import ContiguousGaps
from amortlib.problems import lorenz63
from amortlib.solvers import (
    AbstractSolver,
    Analysis,
    IncrementalFourDVar,
    Oracle,
    StrongFourDVar,
)
from amortlib.types import Event, to_double
from benchmarks import fourdvarnet, spectrum
from benchmarks.report import Bar, arguments, finish, table

FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.8)
SEEDS = {"events": 11, "oracle": 5, "best known": 6, "timing": 7}
BEST_KNOWN_STARTS = 64
SHARE_FOUND, TIME_RATIO, SHARE_HIGHER = 0.995, 1.0 / 3.0, 0.05
SAME_ENERGY = 1e-8
"""Relative: two energies nearer than this are one."""


def oracle_rows(events: int, fractions: Sequence[float] = FRACTIONS) -> list[dict[str, float]]:
    """The oracle with its defaults against as many starts as it may ever make, with another key."""
    rows = []
    for fraction in fractions:
        problem = lorenz63(gaps=ContiguousGaps(fraction))
        energy = Energy(problem.prior, problem.forward)
        _, batch = problem.batch(jax.random.key(SEEDS["events"]), events)
        start = time.perf_counter()
        found = Oracle(energy)(batch, key=jax.random.key(SEEDS["oracle"]))
        seconds = time.perf_counter() - start
        many = Oracle(energy, starts=BEST_KNOWN_STARTS, rounds=1)
        best = many(batch, key=jax.random.key(SEEDS["best known"]))
        lowest = np.minimum(found.energy, best.energy)
        hit = found.energy <= lowest + SAME_ENERGY * (1.0 + lowest)
        rows.append(
            {
                "missing": fraction,
                "events": events,
                "found": float(hit.mean()),
                "converged": float(found.converged.mean()),
                "sure": float(found.sure.mean()),
                "sure_and_missed": int((found.sure & ~hit).sum()),
                "single_minimum": float(found.single.mean()),
                "starts_mean": float(found.starts.mean()),
                "seconds": seconds,
            }
        )
        took = time.perf_counter() - start
        print(f"oracle, {100 * fraction:.0f}% missing: {took:.0f} s", file=sys.stderr, flush=True)
    return rows


def _median_time(run: Callable[[Event], Analysis], events: Event, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(eqx.filter(run(events), eqx.is_array))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


@eqx.filter_jit
def _solve(solver: AbstractSolver, events: Event) -> Analysis:
    # The solver is an argument: one program for all gap fractions.
    return eqx.filter_vmap(lambda event: solver(event, throw=False))(events)


def incremental_rows(
    events: int, repeats: int, fractions: Sequence[float] = FRACTIONS
) -> list[dict[str, float]]:
    """Incremental 4DVar against BFGS, on the same events from the same background."""
    rows = []
    for fraction in fractions:
        problem = lorenz63(gaps=ContiguousGaps(fraction))
        _, batch = problem.batch(jax.random.key(SEEDS["timing"]), events)
        with jax.enable_x64(True):
            energy, batch = to_double((Energy(problem.prior, problem.forward), batch))
            solvers: dict[str, AbstractSolver] = {
                "bfgs": StrongFourDVar(energy, minimiser=optx.BFGS(1e-8, 1e-8)),
                "incremental": IncrementalFourDVar(energy, 5e-5, damping=1.0, quasi_static=2),
            }
            answers, seconds = {}, {}
            for name, solver in solvers.items():
                answers[name] = _solve(solver, batch)
                seconds[name] = _median_time(partial(_solve, solver), batch, repeats)
            reference, answer = (np.asarray(answers[k].energy) for k in ("bfgs", "incremental"))
            near = np.abs(answer - reference) <= SAME_ENERGY * (1.0 + reference)
            rows.append(
                {
                    "missing": fraction,
                    "events": events,
                    "time_ratio": seconds["incremental"] / seconds["bfgs"],
                    "same_energy": float(near.mean()),
                    "lower": float(((answer < reference) & ~near).mean()),
                    "higher": float(((answer > reference) & ~near).mean()),
                    "bfgs_steps": float(np.mean(answers["bfgs"].outer_steps)),
                    "outer_steps": float(np.mean(answers["incremental"].outer_steps)),
                    "inner_steps": float(np.mean(answers["incremental"].inner_steps)),
                }
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write."""
    args = arguments(__doc__.splitlines()[0], argv)
    fractions = (0.0, 0.6) if args.quick else FRACTIONS
    oracle = oracle_rows(20 if args.quick else 1000, fractions)
    print(
        table(
            ["missing", "found", "converged", "sure", "sure, missed", "single minimum", "starts"],
            [
                [
                    f"{100 * row['missing']:.0f}%",
                    f"{100 * row['found']:.1f}%",
                    f"{100 * row['converged']:.1f}%",
                    f"{100 * row['sure']:.1f}%",
                    row["sure_and_missed"],
                    f"{100 * row['single_minimum']:.1f}%",
                    f"{row['starts_mean']:.1f}",
                ]
                for row in oracle
            ],
        ),
        end="\n\n",
    )
    pair = incremental_rows(16 if args.quick else 256, 1 if args.quick else 5, fractions)
    print(
        table(
            ["missing", "time / BFGS", "same J", "lower", "higher", "BFGS", "outer", "inner"],
            [
                [
                    f"{100 * row['missing']:.0f}%",
                    f"{row['time_ratio']:.2f}",
                    *(f"{100 * row[k]:.1f}%" for k in ("same_energy", "lower", "higher")),
                    *(f"{row[k]:.1f}" for k in ("bfgs_steps", "outer_steps", "inner_steps")),
                ]
                for row in pair
            ],
        )
    )
    head, seconds = spectrum.train_head(20 if args.quick else 4000)
    climb = spectrum.spectrum_rows(
        fourdvarnet.load(),
        head,
        events=16 if args.quick else 1000,
        repeats=1 if args.quick else 5,
        network_seconds=fourdvarnet.training_seconds(),
        head_seconds=seconds,
    )
    unit = climb[-1]
    print(
        f"\ntimes over those of the head: an event alone, in a batch of {unit['events']} at once, "
        f"and in chunks of {spectrum.CHUNK}"
    )
    print(
        table(
            [
                "method",
                "outer",
                "inner",
                "alone",
                "at once",
                "chunks",
                "idle",
                "RMSE",
                "median",
                "spread",
                "trained",
                "work for an event",
            ],
            [
                [
                    row["method"],
                    *(f"{row[k]:.1f}" if k in row else "-" for k in ("outer", "inner")),
                    *(f"{row[k] / unit[k]:.1f}" for k in ("one", "many", "chunks")),
                    f"{100 * row['idle']:.0f}%" if "idle" in row else "-",
                    *(f"{row[k]:.2f}" for k in ("rmse", "median_error", "spread")),
                    f"{row['trained']:.0f} s" if row["trained"] else "-",
                    row["work"],
                ]
                for row in climb
            ],
        )
    )
    bars = []
    for row in oracle:
        at = f"oracle, {100 * row['missing']:.0f}% missing: share found"
        bars.append(Bar.check(at, row["found"], ">=", SHARE_FOUND))
    for row in pair:
        at = f"incremental, {100 * row['missing']:.0f}% missing: time over BFGS"
        bars.append(Bar.check(at, row["time_ratio"], "<=", TIME_RATIO))
        at = f"incremental, {100 * row['missing']:.0f}% missing: share above BFGS' energy"
        bars.append(Bar.check(at, row["higher"], "<=", SHARE_HIGHER))
    results = {
        "oracle": oracle,
        "incremental": pair,
        "spectrum": climb,
        "head_training_seconds": seconds,
    }
    return finish(args, name="ladder", results=results, bars=bars, seeds=SEEDS | spectrum.SEEDS)


if __name__ == "__main__":
    sys.exit(main())
