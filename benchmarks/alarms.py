"""How often the gates fail an exact posterior: a longer run of the first row of `benchmarks.gates`.

    python -m benchmarks.alarms [--json FILE] [--quick]

That row has 4,000 samples, of which 53 were called faulty, where 1% was asked for: too many to be
called luck at ease, and too few to be called anything else. These are fresh samples of the same
problem, with the same sizes, and no other heads. The record holds both, together with the bound on
the rate that has 95% confidence (Clopper and Pearson 1934, Biometrika 26).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from scipy.stats import binomtest

from amortlib.calibration import ALPHA, BINS, DRAWS, EVENTS, bin_counts, uniformity_p
from amortlib.calibration.rates import FALSE_ALARM
from benchmarks.gates import PATH, _adjusted, path_event, path_problem
from benchmarks.report import Bar, arguments, finish, table

SEEDS = {"samples": 36}
SAMPLES, CHUNK = 12_000, 500
KEYS = 40_000
"""Keys that are split off the seed, of which the first are used."""
BEFORE = Path(__file__).parent.parent / "book" / "data" / "gates.json"


def alarms(samples: int) -> int:
    """In how many samples of `EVENTS` events a gate calls the exact posterior faulty."""
    problem = path_problem()

    @jax.jit
    def run(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        def sample(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = jax.vmap(lambda k: path_event(problem, PATH[:1], DRAWS, k))(
                jax.random.split(key, EVENTS)
            )[PATH[0]]
            p = uniformity_p(bin_counts(found[f"ranks {DRAWS}"].T, DRAWS, BINS))
            return p, found["agreement"].any() | found["adjoint"].any()

        return jax.lax.map(sample, keys)

    keys, count = jax.random.split(jax.random.key(SEEDS["samples"]), KEYS)[:samples], 0
    for start in range(0, samples, CHUNK):
        p, failed = (np.asarray(a) for a in run(keys[start : start + CHUNK]))
        count += int(((_adjusted(p) <= ALPHA) | failed).sum())
        print(min(start + CHUNK, samples), count, flush=True)
    return count


def upper(count: int, samples: int) -> float:
    """The bound on a rate with 95% confidence."""
    return float(binomtest(count, samples, alternative="less").proportion_ci(0.95).high)


def main(argv: Sequence[str] | None = None) -> int:
    """Count, and hold the bound against the stated rate."""
    args = arguments(__doc__.splitlines()[0], argv)
    samples = 20 if args.quick else SAMPLES
    start = time.perf_counter()
    fresh = alarms(samples)
    seconds = time.perf_counter() - start
    before = json.loads(BEFORE.read_text(encoding="utf-8"))["results"]
    first = round(before["characteristics"]["exact"]["report"] * before["alarms"])
    count, every = fresh + first, samples + before["alarms"]
    results = {
        "fresh": {"samples": samples, "alarms": fresh, "upper": upper(fresh, samples)},
        "before": {
            "samples": before["alarms"],
            "alarms": first,
            "p": float(binomtest(first, before["alarms"], ALPHA).pvalue),
        },
        "both": {"samples": every, "alarms": count, "upper": upper(count, every)},
        "stated": FALSE_ALARM,
        "seconds": seconds,
    }
    rows = [
        [
            name,
            results[name]["samples"],
            results[name]["alarms"],
            f"{100 * results[name]['upper']:.2f}",
        ]
        for name in ("fresh", "both")
    ]
    print(table(["exact posterior", "samples", "called faulty", "at most, %"], rows))
    bars = [
        Bar.check(f"{name}: upper bound of the rate", results[name]["upper"], "<=", FALSE_ALARM)
        for name in ("fresh", "both")
    ]
    return finish(args, name="alarms", results=results, bars=bars, seeds=SEEDS)


if __name__ == "__main__":
    sys.exit(main())
