"""How fast the shipped heads answer, beside the oracle and beside the machine's own arithmetic.

    python -m benchmarks.throughput [--json FILE] [--quick]

For each head, on one core and in one run: 100 draws of each of 1,000 events in one call, and one
draw of one event in a call of its own; the oracle's time an event, on events of the same problem,
alone and many at once; and the share that the head's arithmetic has of what a product of matrices
reaches on the same core. Operations are those that XLA counts in the compiled program. It counts
the body of a loop once, so that shares of heads with loops are lower bounds, and are said to be.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax

from amortlib.energy import Energy
from amortlib.posterior import AmortizedPosterior
from amortlib.problems import InverseProblem, lorenz63, lorenz63_sign_lost
from amortlib.solvers import Oracle
from amortlib.types import Array, Event, Key
from benchmarks.refinement import load as load_mixture
from benchmarks.report import Bar, arguments, finish, median_seconds, table

SEEDS = {"events": 61, "draws": 62, "oracle": 63}
EVENTS, DRAWS = 1000, 100
ORACLE_EVENTS = 100
"""The oracle's time an event hardly changes from here on, and 1,000 would take minutes."""
MATRIX = 1024
LOOPS = ("score", "flow after steps on J")
"""Heads whose programs have loops that count once."""

Posterior = AmortizedPosterior


def one_core() -> None:
    """Keep this process on one core, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def matrix_rate(repeats: int) -> float:
    """Operations a second of a product of two square matrices in single precision."""
    a = jax.random.normal(jax.random.key(0), (MATRIX, MATRIX))
    product = jax.jit(lambda a: a @ a)
    return 2.0 * MATRIX**3 / median_seconds(lambda: product(a), repeats)


def heads() -> dict[str, tuple[Posterior, InverseProblem]]:
    """What ships with the book, and the problem of each."""
    sys.path.insert(0, "book")
    from _kit.heads import load_bimodal, load_lorenz63_flow, load_ou_head

    flow, problem, _ = load_lorenz63_flow()
    split = lorenz63_sign_lost(noise=0.5)
    return {
        "regression, information form": load_ou_head(),
        "mixture of Gaussians": (load_mixture(), lorenz63()),
        "flow after steps on J": (flow, problem),
        "flow": (load_bimodal("flow")[0], split),
        "score": (load_bimodal("score")[0], split),
    }


@eqx.filter_jit
def draw(posterior: Posterior, events: Event, keys: Key, n: int) -> Array:
    """`n` draws of each event."""
    return jax.vmap(lambda event, key: posterior.sample(event, n, key=key))(events, keys)


def measure(
    posterior: Posterior, problem: InverseProblem, *, events: int, repeats: int
) -> dict[str, float]:
    """Seconds, and operations of the call for many events."""
    _, many = problem.batch(jax.random.key(SEEDS["events"]), events)
    keys = jax.random.split(jax.random.key(SEEDS["draws"]), events)
    first = jax.tree.map(lambda a: a[:1], (many, keys))
    cost = draw.lower(posterior, many, keys, DRAWS).compile().compiled.cost_analysis()
    return {
        "together": median_seconds(lambda: draw(posterior, many, keys, DRAWS), repeats),
        "alone": median_seconds(lambda: draw(posterior, *first, 1), 4 * repeats),
        "operations": float(cost["flops"]),
    }


def oracle_seconds(problem: InverseProblem, events: int, repeats: int) -> dict[str, float]:
    """Seconds an event of the oracle, alone and many at once."""
    assert problem.prior is not None
    oracle = Oracle(Energy(problem.prior, problem.forward))
    _, many = problem.batch(jax.random.key(SEEDS["events"]), events)
    first = jax.tree.map(lambda a: a[:1], many)
    key = jax.random.key(SEEDS["oracle"])
    return {
        "together": median_seconds(lambda: oracle(many, key=key).mode, 1) / events,
        "alone": median_seconds(lambda: oracle(first, key=key).mode, repeats),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    args = arguments(__doc__.splitlines()[0], argv)
    events, repeats = (20, 1) if args.quick else (EVENTS, 5)
    one_core()
    rate = matrix_rate(4 * repeats)
    print(f"a product of matrices: {rate / 1e9:.1f} G operations a second", flush=True)
    found: dict[str, Any] = {}
    solved: dict[str, dict[str, float]] = {}
    chosen = heads()
    if args.quick:
        chosen = {name: chosen[name] for name in ("regression, information form",)}
    for name, (posterior, problem) in chosen.items():
        kind = str(jax.tree.structure(problem.forward)) + str(problem.shapes())
        if kind not in solved:
            solved[kind] = oracle_seconds(problem, 4 if args.quick else ORACLE_EVENTS, repeats)
        row = measure(posterior, problem, events=events, repeats=repeats)
        found[name] = row | {
            "draws_a_second": events * DRAWS / row["together"],
            "share_of_peak": row["operations"] / row["together"] / rate,
            "oracle_together": solved[kind]["together"],
            "oracle_alone": solved[kind]["alone"],
            "faster_together": solved[kind]["together"] * events / row["together"],
            "faster_alone": solved[kind]["alone"] / row["alone"],
            "loops": name in LOOPS,
        }
        print(name, found[name], flush=True)
    rows = [
        [
            name,
            f"{1e3 * row['alone']:.2f}",
            f"{1e3 * row['oracle_alone']:.1f}",
            f"{row['draws_a_second']:.0f}",
            f"{row['faster_alone']:.0f}",
            f"{row['faster_together']:.0f}",
            f"{'>= ' if row['loops'] else ''}{100 * row['share_of_peak']:.1f}%",
        ]
        for name, row in found.items()
    ]
    head = ["head", "one event, ms", "oracle, ms", "draws a second", "times, one", "times, many"]
    print(table([*head, "of matrix rate"], rows))
    # With its hundred draws an event against the oracle's one mode.
    bars = [
        Bar.check(
            f"{name}: many events, times the oracle's speed", row["faster_together"], ">=", 1.0
        )
        for name, row in found.items()
    ]
    results = {"matrix_rate": rate, "events": events, "draws": DRAWS, "heads": found}
    return finish(args, name="throughput", results=results, bars=bars, seeds=SEEDS)


if __name__ == "__main__":
    sys.exit(main())
