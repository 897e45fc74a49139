"""The search through all three gates, and the guard on the events that it fails.

    python -m benchmarks.search_gates [--json FILE] [--quick] [--keep FOLDER] [--only NAME ...]

The posteriors of `benchmarks.refinement`: a network's starts, k steps on J, Laplace's approximation
at the end; and that of `benchmarks.nested`, ridges with a flow beside them. Each is judged by
`amortlib.calibration.run_gates` in double precision, on windows that nothing was chosen by: the
first two gates on those with a single minimum, simulation-based calibration with J among its
statistics on all of them. Then a guard that looks at the Jacobian of the mode too is set on other
windows, as they are simulated, with a stated share of false alarms, and asked about every window:
those that fail a gate should raise an alarm, the others should not.

A calibrated energy is not a calibrated shape: KL, ESS / N and k-hat stand beside the gates, and on
the first windows with several minima a classifier against a long-run reference.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from amortlib.calibration import GateReport, run_gates
from amortlib.calibration.importance import KHAT
from amortlib.calibration.report import check_sizes
from amortlib.guard import Guard, Trust, calibrate
from amortlib.search import search_posterior
from amortlib.types import Event, Key
from benchmarks import nested, refinement
from benchmarks.flow_lorenz63 import energy_of
from benchmarks.report import Bar, finish, parser, table

SEEDS = {"report": refinement.SEEDS["report"], "draws": 71, "usual": 72, "guard": 73, "asked": 74}
FIELDS = ("search, k = 4", "search, k = 6")
NESTED = nested.SHARED
"""The same minima as those of the first field, and more than a Gaussian around them."""
USUAL = 2000
"""Windows that the guard is set with, with gaps as the network was trained on."""
RATE = 0.01
CAUGHT_BAR, ALARM_BAR = 100.0, 2.0


def ask(guard: Guard, events: Event, key: Key) -> np.ndarray:
    """What the guard says of each event, a [`Trust`][amortlib.guard.Trust]."""

    @eqx.filter_jit
    def run(guard: Guard, events: Event, keys: Key) -> Any:
        return jax.lax.map(
            lambda part: guard(part[0], key=part[1]).trust, (events, keys), batch_size=64
        )

    return np.asarray(run(guard, events, jax.random.split(key, events.y.shape[0])))


def row_of(report: GateReport, trust: np.ndarray) -> dict[str, Any]:
    """The figures that are recorded for one posterior at one gap fraction."""
    failing = sorted({i for gate in report.gates[:2] for i in gate.failing})
    alarm = trust != int(Trust.TRUST)
    right = report.single.copy()
    right[failing] = False
    sbc, pieces = report.sbc_adjusted, report.several
    return {
        "single": int(report.single.sum()),
        "failing": failing,
        "caught": [i for i in failing if alarm[i]],
        "alarms": 100 * float(alarm[right].mean()),
        "several": 100 * float(alarm[~report.single].mean()) if (~report.single).any() else None,
        "solve": 100 * float((trust == int(Trust.SOLVE)).mean()),
        "sbc": {name: float(p) for name, p in sbc.items()},
        "sbc_passed": bool(report.gates[2].passed),
        "kl": float(report.kl.mean()),
        "ess": float(report.ess.mean()),
        "khat_above": 100 * float((report.khat > KHAT).mean()),
        "pieces": pieces
        and {
            "events": int(pieces.judged.sum()),
            "c2st": float(pieces.c2st[pieces.judged].mean()),
            "floors": float(
                pieces.weight_error[pieces.judged].mean()
                / pieces.weight_floor[pieces.judged].mean()
            ),
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Judge, guard, compare."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--keep", type=Path, metavar="FOLDER", help="store the oracle's answers")
    options.add_argument("--only", nargs="+", choices=[*FIELDS, NESTED], help="these posteriors")
    args = options.parse_args(argv)
    names = args.only or (FIELDS[:1] if args.quick else [*FIELDS, NESTED])
    network, energy = refinement.load(), energy_of(refinement.problem())
    n, draws, bins = (100, 19, 5) if args.quick else (refinement.EVENTS, 99, 20)
    check_sizes(n, draws, bins)
    fractions = (0.0,) if args.quick else refinement.FRACTIONS
    _, usual = refinement.problem().batch(jax.random.key(SEEDS["usual"]), USUAL)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if name == NESTED:
            posterior = nested.load()
        else:
            posterior = search_posterior(network, energy, field=refinement.FIELDS[name])
        key = jax.random.key(SEEDS["guard"])
        guard = calibrate(posterior, energy, usual, key=key, rate=RATE, slopes=True)
        for fraction in fractions:
            made = refinement.problem(fraction)
            key = jax.random.key(SEEDS["report"] + round(10 * fraction))
            truths, _ = made.batch(key, n)  # of the events that come next
            events, analysis = refinement.solved("report", fraction, n, args.keep)
            report = run_gates(
                posterior,
                made,
                events,
                np.asarray(truths, float),
                analysis,
                key=jax.random.key(SEEDS["draws"]),
                draws=draws,
                bins=bins,
                batch=64,
            )
            row = row_of(report, ask(guard, events, jax.random.key(SEEDS["asked"])))
            found.setdefault(name, {})[f"{fraction:g}"] = row
            print(name, fraction, row, flush=True)

    head = ["posterior", "missing", "fail", "caught", "alarms, %", "J: p", "least p", "KL", "ESS/N"]
    rows = [
        [
            *(name, f"{100 * float(f):.0f}%", len(r["failing"]), len(r["caught"])),
            *(f"{p:.3f}" for p in (r["alarms"], r["sbc"]["J"], min(r["sbc"].values()))),
            *(f"{r['kl']:.3f}", f"{r['ess']:.3f}"),
        ]
        for name, by_fraction in found.items()
        for f, r in by_fraction.items()
    ]
    print(table(head, rows))
    bars = []
    for name, by_fraction in found.items():
        every = list(by_fraction.values())
        failed = sum(len(r["failing"]) for r in every)
        caught = 100.0 * sum(len(r["caught"]) for r in every) / failed if failed else 100.0
        alarms = float(np.mean([r["alarms"] for r in every]))
        bars.append(Bar.check(f"{name}: failing events caught, %", caught, ">=", CAUGHT_BAR))
        bars.append(Bar.check(f"{name}: false alarms, %", alarms, "<=", ALARM_BAR))
        p = min(by_fraction["0"]["sbc"].values())
        bars.append(Bar.check(f"{name}, no gaps: least p of SBC", p, ">=", 0.01))
    wrong = guard.thresholds.wrong
    results = {"posteriors": found, "events": n, "usual": USUAL, "rate": RATE, "wrong": wrong}
    return finish(args, name="search_gates", results=results, bars=bars, seeds=SEEDS)


if __name__ == "__main__":
    sys.exit(main())
