"""Make the weights that pages load instead of training, and record what they reach.

    python -m benchmarks.make_weights [--json FILE] [--quick] [--all] [--list]

Writes `book/weights/ou_information.safetensors`; a quick run trains for a moment and writes
nothing. The figures that the trained head reaches are stored in the file's settings, and a test
computes them again. `--all` makes every file in `book/weights`, by `benchmarks.all_weights`, and
`--list` says which command makes which.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from amortlib.export import save
from amortlib.observation import ContiguousGaps
from amortlib.posterior import AmortizedPosterior
from amortlib.problems import ornstein_uhlenbeck
from benchmarks.regression_ou import FRACTIONS, SEEDS, measure, summary, train
from benchmarks.report import Bar, finish, parser, table

FILE = Path(__file__).parent.parent / "book" / "weights" / "ou_information.safetensors"
SIZE, TIMESCALE, NOISE = 32, 8.0, (0.1, 1.0)
STEPS, RATE = 8000, 1e-2
WORST_KL, WORST_JACOBIAN = 0.1, 0.05


def trained(*, quick: bool = False) -> tuple[AmortizedPosterior, float]:
    """The head, and the seconds that it took."""
    problem = ornstein_uhlenbeck(SIZE, timescale=TIMESCALE, noise=NOISE)
    steps = 50 if quick else STEPS
    return train("information", problem, steps=steps, rate=RATE, uses_sd=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, save."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--all", action="store_true", help="make every file in book/weights")
    flags.add_argument("--list", action="store_true", help="say which command makes which file")
    args = flags.parse_args(argv)
    if args.list or args.all:
        from benchmarks import all_weights  # it imports this module

        print(all_weights.listing(), flush=True)
        return 0 if args.list else all_weights.make_all(quick=args.quick)
    problem = ornstein_uhlenbeck(SIZE, timescale=TIMESCALE, noise=NOISE)
    steps = 50 if args.quick else STEPS
    model, seconds = trained(quick=args.quick)
    metrics = {
        f"{fraction:g}": summary(measure(model, problem, ContiguousGaps(fraction, max_gaps=3)))
        for fraction in FRACTIONS
    }
    rows = [
        [f"{100 * float(f):.0f}%", f"{m['kl_worst']:.4f}", f"{m['jacobian_worst']:.4f}"]
        for f, m in metrics.items()
    ]
    print(f"trained in {seconds:.0f} s, {steps} steps")
    print(table(["missing", "KL worst", "Jac. worst"], rows))
    worst_kl = max(m["kl_worst"] for m in metrics.values())
    worst_jacobian = max(m["jacobian_worst"] for m in metrics.values())
    bars = [
        Bar.check("worst KL at any gap fraction", worst_kl, "<=", WORST_KL),
        Bar.check("worst Jacobian error", worst_jacobian, "<=", WORST_JACOBIAN),
    ]
    if not args.quick and all(bar.holds for bar in bars):
        FILE.parent.mkdir(exist_ok=True)
        save(
            FILE,
            model,
            settings={
                "n": SIZE,
                "timescale": TIMESCALE,
                "noise": list(NOISE),
                "steps": steps,
                "rate": RATE,
                "seeds": SEEDS,
                "metrics": metrics,
            },
        )
        print(f"wrote {FILE.relative_to(FILE.parent.parent.parent)}")
    return finish(args, name="make_weights", results=metrics, bars=bars, seeds=SEEDS)


if __name__ == "__main__":
    sys.exit(main())
