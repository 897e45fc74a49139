"""What a more flexible head costs and buys: Gaussian, affine flow, spline flow on one window.

    python -m benchmarks.expressiveness [--json FILE] [--quick]

Three heads behind the same encoder, trained by maximum likelihood on the same stream of gappy
Lorenz-63 windows, for the same number of steps, each a single forward pass: nothing is refined.
Each is judged on held-out windows by the negative log-likelihood of the true state, and by the
divergence from the posterior itself, by importance sampling around the oracle's minima. Seconds
of training are those of the process on the processor, compilation included.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np

from amortlib.encoders import FlatEncoder
from amortlib.objectives import nll
from amortlib.posterior import AmortizedPosterior, flow_posterior, regression_posterior
from amortlib.problems import lorenz63
from amortlib.training import fit, trainable
from amortlib.types import Event
from benchmarks.flow_lorenz63 import judge, optimizer, references
from benchmarks.report import Bar, arguments, finish, median_seconds, table

SEEDS = {"weights": 0, "training": 1, "held out": 71, "references": 72}
ENCODER = {"features": 96, "width": 192, "depth": 2}
FLOW = {"layers": 4, "condition": 32, "width": 48}
STEPS, RATE, BATCH = 5000, 2e-3, 256
HELD_OUT, EVENTS, FRACTION, DRAWS = 4096, 128, 0.4, 1000
HEADS = ("Gaussian", "affine flow", "spline flow")


def build(name: str) -> AmortizedPosterior:
    """An untrained posterior; the encoder is the same for all."""
    problem, key = lorenz63(), jax.random.key(SEEDS["weights"])
    prior, shape = problem.prior, problem.shapes()[1]
    assert prior is not None
    if name == "Gaussian":
        return regression_posterior("cholesky", key=key, prior=prior, obs_shape=shape, **ENCODER)
    return flow_posterior(
        key=key,
        prior=prior,
        obs_shape=shape,
        encoder=FlatEncoder(shape, key=key, **ENCODER),
        features=ENCODER["features"],
        transformer=name.removesuffix(" flow"),
        **FLOW,
    )


def train(name: str, steps: int) -> tuple[AmortizedPosterior, float]:
    """The trained posterior, and the seconds of processor time that it took."""
    problem, start = lorenz63(), time.process_time()
    result = fit(
        build(name),
        nll,
        lambda key: problem.batch(key, BATCH),
        key=jax.random.key(SEEDS["training"]),
        steps=steps,
        optimizer=optimizer(RATE, steps),
        every=max(1, steps // 10),
        progress=False,
    )
    return result.model, time.process_time() - start


def sample_seconds(model: AmortizedPosterior, event: Event, repeats: int = 21) -> float:
    """Median seconds for `DRAWS` draws of one event, compiled before."""
    draw = eqx.filter_jit(lambda m, e, key: m.sample(e, DRAWS, key=key))
    return median_seconds(lambda: draw(model, event, jax.random.key(1)), repeats)


def measure(model: AmortizedPosterior, held_out: Any, refs: Any) -> dict[str, float]:
    """The figures of one head; errors are one standard error over events."""
    batch, sample, _ = refs
    found = judge(model, batch, sample)
    log_prob = eqx.filter_jit(lambda m, x, e: jax.vmap(m.log_prob)(x, e))
    loss = -np.asarray(log_prob(model, *held_out))
    return {
        "numbers": sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, trainable(model)))),
        "sample_seconds": sample_seconds(model, jax.tree.map(lambda leaf: leaf[0], batch)),
        "nll": float(loss.mean()),
        "nll_error": float(loss.std() / np.sqrt(loss.size)),
        "kl": float(found["kl"].mean()),
        "kl_error": float(found["kl"].std() / np.sqrt(found["kl"].size)),
        "kl_median": float(np.median(found["kl"])),
        "ess": float(found["ess"].mean()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, compare."""
    args = arguments(__doc__.splitlines()[0], argv)
    steps, n, events = (20, 64, 4) if args.quick else (STEPS, HELD_OUT, EVENTS)
    held_out = lorenz63().batch(jax.random.key(SEEDS["held out"]), n)
    refs = references(FRACTION, events, SEEDS["references"])
    rows = {}
    for name in HEADS:
        model, seconds = train(name, steps)
        rows[name] = {"seconds": seconds, "steps": steps, **measure(model, held_out, refs)}
        print(name, rows[name], flush=True)
    lines = [
        [
            name,
            f"{row['seconds']:.0f}",
            row["numbers"],
            f"{1e3 * row['sample_seconds']:.2f}",
            f"{row['nll']:.3f} +- {row['nll_error']:.3f}",
            f"{row['kl']:.3f} +- {row['kl_error']:.3f}",
            f"{row['ess']:.2f}",
        ]
        for name, row in rows.items()
    ]
    print(table(["head", "train s", "numbers", "ms for draws", "NLL", "KL", "ESS/N"], lines))
    gaussian, affine, spline = (rows[name] for name in HEADS)
    bars = [
        Bar.check("spline below Gaussian: NLL", spline["nll"] - gaussian["nll"], "<=", 0.0),
        Bar.check("spline below Gaussian: KL", spline["kl"] - gaussian["kl"], "<=", 0.0),
        Bar.check("spline below affine: NLL", spline["nll"] - affine["nll"], "<=", 0.0),
    ]
    results = {"heads": rows, "events": events, "fraction": FRACTION, "draws": DRAWS}
    return finish(args, name="expressiveness", results=results, bars=bars, seeds=SEEDS)


if __name__ == "__main__":
    sys.exit(main())
