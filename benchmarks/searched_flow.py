"""Train the flow around the ends of a search on the Lorenz-63 window, and measure it.

    python -m benchmarks.searched_flow [--json FILE] [--quick]

Writes `book/weights/lorenz63_searched_flow.safetensors`, the flow alone; a quick run trains for a
moment and writes nothing. The search starts from the shipped mixture density network, whose
training counts: `benchmarks.refinement` recorded its seconds. Then a pool of events is searched
once, and the flow in the whitened coordinates of the ends is trained on the pool. Seconds are
those of the process on the processor.

Measured as `benchmarks.flow_lorenz63` measures the flow around a single guess, on its events.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax

from amortlib.export import build_and_load, read_settings, save
from amortlib.posterior import AmortizedPosterior
from amortlib.problems import lorenz63
from amortlib.search import Field
from amortlib.searched import searched_flow_posterior
from benchmarks import flow_lorenz63, refinement
from benchmarks.flow_lorenz63 import FRACTIONS, energy_of, pool_of
from benchmarks.report import arguments, finish

FILE = Path(__file__).parent.parent / "book" / "weights" / "lorenz63_searched_flow.safetensors"
SEEDS = {"weights": 0, "pool": 12, "flow": 13, "held out": flow_lorenz63.SEEDS["held out"]}
FIELD = Field((8, 4, 3, 3))
SIZES = {"layers": 4, "condition": 32, "width": 48, "encoder_width": 96}
POOL, STEPS, RATE, BATCH = 48 * 1024, 3600, 2e-3, 192


def build(sizes: dict[str, Any], record: dict[str, Any]) -> AmortizedPosterior:
    """The untrained flow around the ends of the shipped network's search."""
    key = jax.random.key(SEEDS["weights"])
    energy = energy_of(lorenz63())
    return searched_flow_posterior(refinement.load(), energy, field=FIELD, key=key, **sizes)


def load() -> AmortizedPosterior:
    """The shipped model.

    Raises:
        amortlib.CheckpointError: where a file is missing or damaged.
    """
    settings = read_settings(FILE)
    head = build_and_load(FILE, lambda sizes, record: build(sizes, record).head)
    return eqx.tree_at(lambda m: m.head, build(**settings), head)


def train(*, quick: bool = False) -> tuple[AmortizedPosterior, dict[str, float]]:
    """The trained model, and the processor seconds of each part."""
    model = build(SIZES, {})
    seconds = {"mixture": read_settings(refinement.FILE)["record"]["seconds"]}
    start = time.process_time()
    n = 512 if quick else POOL
    pool = pool_of(model, lorenz63(), n, jax.random.key(SEEDS["pool"]))
    seconds["pool"] = time.process_time() - start
    flow, seconds["flow"] = flow_lorenz63.fitted(
        model.head,
        flow_lorenz63.on_contexts,
        flow_lorenz63.from_pool(pool, BATCH),
        seed=SEEDS["flow"],
        steps=20 if quick else STEPS,
        rate=RATE,
    )
    return eqx.tree_at(lambda m: m.head, model, flow), seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, save."""
    args = arguments(__doc__.splitlines()[0], argv)
    model, seconds = train(quick=args.quick)
    total = sum(seconds.values())
    words = ", ".join(f"{name} {s:.0f} s" for name, s in seconds.items())
    print(f"trained in {total:.0f} s of processor time: {words}", flush=True)
    if not args.quick:  # measuring takes as long again
        save(FILE, model.head, settings={"sizes": SIZES, "record": {}})
    fractions = (0.0,) if args.quick else FRACTIONS
    metrics = flow_lorenz63.at_all(model, fractions, quick=args.quick)
    bars = flow_lorenz63.bars_of(metrics, total)
    if not args.quick:
        record = {"pool": POOL, "steps": STEPS, "seconds": seconds, "seeds": SEEDS}
        record |= {"metrics": metrics}
        save(FILE, model.head, settings={"sizes": SIZES, "record": record})
        print(f"wrote {FILE.relative_to(FILE.parent.parent.parent)}, {FILE.stat().st_size} bytes")
    return finish(args, name="searched_flow", results=metrics, bars=bars, seeds=SEEDS)


if __name__ == "__main__":
    sys.exit(main())
