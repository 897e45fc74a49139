"""How near to the posterior: ridges of exp(-J) beside Laplace's Gaussian, on the same windows.

    python -m benchmarks.nested [--json FILE] [--quick] [--train] [--keep FOLDER]

The search of `benchmarks.refinement` ends in the same minima for all; what differs is what is said
around them: Laplace's approximation; the ridges of `amortlib.nested`, with nothing to train; and
the ridges with a small flow beside them, trained with its weight where they are wrong (around the
ends of six steps on J, and judged around those of four and of six).

Judged on the windows that `refinement` reports, at each gap fraction, all of them, whether J has
one minimum or several, by the posterior itself: a long run of importance sampling around the
oracle's minima, in rounds that resample. The answers' own draws would not do: they do not see what
they miss. The time is that of the mode, which the first two gates judge, and of the whole answer,
ready to be drawn from, each against the oracle's for the same windows in the same run. Last, what
three minutes of training are worth on one core: a network that learned for a moment as a start,
and a flow beside its ridges.

Writes `book/weights/lorenz63_beside.safetensors`, the flow and its weight; a quick run trains for
a moment and writes nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from amortlib.encoders import ScaledEncoder
from amortlib.export import build_and_load, read_settings, save
from amortlib.nested import NestedEncoder, SharedHead, nested_posterior
from amortlib.posterior import AmortizedPosterior, flow_posterior
from amortlib.search import search_posterior
from amortlib.types import Array, Event, Key
from benchmarks import refinement
from benchmarks.flow_lorenz63 import (
    energy_of,
    fitted,
    from_pool,
    judge,
    measure,
    summary,
    weighed,
)
from benchmarks.report import Bar, finish, parser, table

FILE = Path(__file__).parent.parent / "book" / "weights" / "lorenz63_beside.safetensors"
SEEDS = {
    "weights": 3,
    "pool": 900,
    "training": 4,
    "report": refinement.SEEDS["report"],
    "reference": 75,
    "timing": refinement.SEEDS["timing"],
    "short network": refinement.SEEDS["training"],
    "short pool": 950,
}
FIELDS = {k: refinement.FIELDS[f"search, {k}"] for k in ("k = 4", "k = 6")}
BEST = "k = 4"
SHARED = f"nested with a flow, {BEST}"
BRIEF = ("nested, short training", "nested with a flow, short training")
LEARNED = FIELDS["k = 6"]
"""Around the ends of which search the flow learns."""
SIZES = {"features": 80, "encoder_width": 112, "layers": 5, "width": 64, "knots": 8, "odds": 64}


class Recipe(NamedTuple):
    """How much of everything a training takes.

    Attributes:
        network: steps of the network that says where to start; none takes the shipped one.
        pool: chunks of windows to learn from, by the share that is missing, `None` for any.
        chunk: windows in a chunk.
        flow: steps of the flow beside the ridges.
        seed: of the pool.
    """

    network: int | None
    pool: dict[float | None, int]
    chunk: int
    flow: int
    seed: int


FULL = Recipe(None, {None: 64, 0.6: 96, 0.8: 48}, 2048, 20000, SEEDS["pool"])
SHORT = Recipe(3000, {None: 14, 0.6: 21, 0.8: 10}, 2048, 8000, SEEDS["short pool"])
QUICK = Recipe(20, {None: 1, 0.8: 1}, 64, 20, SEEDS["short pool"])
RATE, BATCH = 1.5e-3, 256
SHORTEST = 180.0
"""Seconds of one core that the short training may take."""
LARGEST_FILE = 400_000
EVENTS = {0.0: refinement.EVENTS, 0.2: 512, 0.4: 512, 0.6: 512, 0.8: 512}
"""Windows that are judged, by the share that is missing: the first of those of `refinement`."""
REFERENCE = {"draws": 4096, "rounds": 4, "centres": 64}
"""Of the long run: draws in a round, rounds after the first, and draws that each is made around."""
CHECK: dict[str, Any] = {"fraction": 0.6, "events": 16, "seed": 78}
"""Few enough events to be measured again by a test of the file."""


def build(sizes: dict[str, int], **_: Any) -> dict[str, Any]:
    """The untrained flow beside the ridges: its encoder, and the head that weighs both."""
    made = refinement.problem()
    prior = made.prior
    assert prior is not None
    k_flow, k_odds = jax.random.split(jax.random.key(SEEDS["weights"]))
    sizes = dict(sizes)
    features, odds = sizes["features"], sizes.pop("odds")
    flow = flow_posterior(key=k_flow, prior=prior, obs_shape=made.shapes()[1], **sizes)
    doubts = NestedEncoder(refinement.load(), energy_of(made), field=LEARNED).doubts
    head = SharedHead(flow.head, doubts, features, key=k_odds, width=odds)
    # Values of x and y are of the size of ten.
    return {"encoder": ScaledEncoder(flow.encoder, 0.0, 10.0), "head": head}


def posterior_of(
    beside: dict[str, Any], *, guess: AmortizedPosterior | None = None, field: str = BEST
) -> AmortizedPosterior:
    """The whole of it: the search from a network's guess, the ridges, what stands beside them."""
    energy, guess = energy_of(refinement.problem()), guess or refinement.load()
    encoder = NestedEncoder(guess, energy, field=FIELDS[field], beside=beside["encoder"])
    return AmortizedPosterior(encoder, beside["head"])


def load() -> AmortizedPosterior:
    """The posterior with the shipped flow.

    Raises:
        amortlib.CheckpointError: where a file is missing or damaged.
    """
    return posterior_of(build_and_load(FILE, build))


def pool_of(posterior: AmortizedPosterior, recipe: Recipe, keep: Path | None = None) -> list[Array]:
    """Windows to learn from: states, observations, masks, what the ridges say, and the doubts.

    From the folder, where it has them.
    """
    file = None if keep is None else keep / "nested_pool.npz"
    if file is not None and file.exists():
        with np.load(file) as kept:
            return [jnp.asarray(kept[name]) for name in kept.files]

    @eqx.filter_jit
    def some(x: Array, events: Event) -> tuple[Array, Array]:
        def one(x: Array, event: Event) -> tuple[Array, Array]:
            context = posterior.encoder(event)
            return posterior.head(context).log_near(x), context.doubt  # ty: ignore

        return jax.lax.map(lambda part: one(*part), (x, events), batch_size=256)

    parts = []
    for i, (fraction, chunks) in enumerate(recipe.pool.items()):
        draw = eqx.filter_jit(refinement.problem(fraction).batch)
        for c in range(chunks):
            key = jax.random.fold_in(jax.random.key(recipe.seed + i), c)
            x, events = draw(key, recipe.chunk)
            parts.append((x, events.y, events.mask, *some(x, events)))
    parts = jax.tree.map(np.asarray, parts)
    pool = [np.concatenate(a) for a in zip(*parts, strict=True)]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, *pool)
    return [jnp.asarray(a) for a in pool]


def as_good_as(beside: dict[str, Any], batch: Any, key: Key) -> Array:
    """Mean -log q of the ridges and the flow together, in nats; draws nothing."""

    def one(x: Array, y: Array, mask: Array, near: Array, doubt: Array) -> Array:
        head, context = beside["head"], beside["encoder"](Event(y, mask, jnp.ones_like(y)))
        odds = head.log_odds(doubt, context)
        far = jax.nn.log_sigmoid(odds) + head.head(context).log_prob(x)
        return -jnp.logaddexp(jax.nn.log_sigmoid(-odds) + near, far)

    return jnp.mean(jax.vmap(one)(*batch))


def train(
    recipe: Recipe, keep: Path | None = None
) -> tuple[AmortizedPosterior, dict[str, Any], dict[str, float]]:
    """The network, the flow with its weight, and the processor seconds of each part."""
    seconds = {}
    if recipe.network is None:
        network = refinement.load()
    else:
        network, seconds["network"] = refinement.train(refinement.SIZES, recipe.network)
    beside = build(SIZES)
    ridges = nested_posterior(network, energy_of(refinement.problem()), field=LEARNED)
    start = time.process_time()
    pool = pool_of(ridges, recipe, keep)
    seconds["pool"] = time.process_time() - start
    doubt = pool[-1]
    of = lambda b: (b["head"].centre.tree, b["head"].scale.tree)  # noqa: E731
    beside = eqx.tree_at(of, beside, (doubt.mean(0), doubt.std(0) + 1e-3))
    beside, seconds["flow"] = fitted(
        beside,
        as_good_as,
        from_pool(pool, BATCH),
        seed=SEEDS["training"],
        steps=recipe.flow,
        rate=RATE,
    )
    return network, beside, seconds


def whole(posterior: AmortizedPosterior, event: Event) -> Any:
    """Everything that an answer is made of."""
    return eqx.filter(posterior(event), eqx.is_array)


def figures(posterior: AmortizedPosterior, made: tuple[Event, Any, np.ndarray]) -> dict[str, Any]:
    """Of one posterior on the windows of one gap fraction, those with several minima apart."""
    events, sample, single = made
    found = judge(posterior, events, sample, draws=refinement.DRAWS)
    kl = found["kl"]
    row: dict[str, Any] = summary(found, single)
    row["kl_single"] = float(kl[single].mean())
    row["kl_several"] = float(kl[~single].mean()) if (~single).any() else None
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, time, compare."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--keep", type=Path, metavar="FOLDER", help="store what takes long")
    options.add_argument("--train", action="store_true", help="train, where weights are there")
    args = options.parse_args(argv)
    quick = args.quick
    network, energy = refinement.load(), energy_of(refinement.problem())
    short = train(QUICK if quick else SHORT)
    brief = sum(short[2].values())
    print(f"trained in {brief:.0f} s of processor time: {short[2]}", flush=True)
    if quick:
        posteriors = {SHARED: posterior_of(short[1], guess=short[0])}
    else:
        if args.train or not FILE.exists():
            _, beside, spent = train(FULL, args.keep)
            print(f"trained in {sum(spent.values()):.0f} s of processor time: {spent}", flush=True)
            save(FILE, beside, settings={"sizes": SIZES, "record": {"seconds": spent}})
        else:
            beside, spent = build_and_load(FILE, build), read_settings(FILE)["record"]["seconds"]
        posteriors = {
            f"Laplace, {BEST}": search_posterior(network, energy, field=FIELDS[BEST]),
            f"nested, {BEST}": nested_posterior(network, energy, field=FIELDS[BEST]),
            **{f"nested with a flow, {k}": posterior_of(beside, field=k) for k in FIELDS},
            BRIEF[0]: nested_posterior(short[0], energy, field=FIELDS[BEST]),
            BRIEF[1]: posterior_of(short[1], guess=short[0]),
        }

    longer = {**REFERENCE, "draws": 512, "rounds": 1} if quick else REFERENCE
    held: dict[str, dict[str, Any]] = {}
    counts = {0.0: 16} if quick else EVENTS
    for fraction, n in counts.items():
        events, analysis = refinement.solved(
            "report", fraction, 16 if quick else refinement.EVENTS, args.keep
        )
        events, analysis = jax.tree.map(lambda a, n=n: a[:n], (events, analysis))
        key = jax.random.fold_in(jax.random.key(SEEDS["reference"]), round(10 * fraction))
        made = events, weighed(events, analysis, key=key, **longer), analysis.single
        for name, posterior in posteriors.items():
            held.setdefault(name, {})[f"{fraction:g}"] = figures(posterior, made)
            jax.clear_caches()  # dozens of large programs are more than a process can map
            print(fraction, name, held[name][f"{fraction:g}"], flush=True)

    asked: dict[str, Callable[[Event], Any]] = {}
    for name, posterior in posteriors.items():
        if name not in BRIEF:  # they take the time of those that learned for longer
            asked[f"{name}: mode"] = posterior.mode
            asked[f"{name}: whole"] = eqx.Partial(whole, posterior)
    speed = refinement.ratios(asked, many=1 if quick else 1000, alone=1 if quick else 10)

    names = ("kl_mean", "kl_median", "kl_single", "ess_mean", "ess_first_percentile")
    rows = [
        [name, f"{100 * float(f):.0f}%", *(f"{m[k]:.3f}" for k in names), f"{m['k_hat_above']:.3f}"]
        for name, by_fraction in held.items()
        for f, m in by_fraction.items()
    ]
    head = ["posterior", "missing", "mean KL", "median", "one minimum"]
    print(table([*head, "ESS/N", "first percentile", "k-hat > .7"], rows))
    rows = [[name, f"{r['one']:.1f}", f"{r['many']:.1f}"] for name, r in speed.items()]
    print(table(["times faster than the oracle", "one event", "many"], rows))
    bars = []
    for name in posteriors:
        if "flow" not in name:
            continue
        clean = held[name]["0"]
        bars += [
            Bar.check(f"{name}, no gaps: mean KL", clean["kl_mean"], "<=", 0.03),
            Bar.check(f"{name}, no gaps: mean ESS/N", clean["ess_mean"], ">=", 0.96),
            Bar.check(f"{name}, no gaps: k-hat above .7", clean["k_hat_above"], "<=", 0.03),
        ]
        bars += [
            Bar.check(f"{name}, {100 * float(f):.0f}% missing: mean KL", m["kl_mean"], "<=", 0.1)
            for f, m in held[name].items()
            if f != "0"
        ]
        for part in ("mode", "whole"):
            times = speed.get(f"{name}: {part}", {})
            bars += [
                Bar.check(f"{name}: {part}, {many}, times faster", times[many], ">=", least)
                for many, least in (("one", 25.0), ("many", 70.0))
                if times
            ]
    for name in BRIEF:
        if name in held:
            first = held[name]["0"]["ess_first_percentile"]
            bars.append(Bar.check(f"{name}: ESS/N, first percentile", first, ">=", 0.45))
    bars.append(Bar.check("short training, seconds of one core", brief, "<=", SHORTEST))
    results: dict[str, Any] = {
        "posteriors": held,
        "speed": speed,
        "events": counts,
        "best": SHARED,
        "short": {"names": BRIEF, "seconds": short[2]},
    }
    if not quick:
        record = {
            "seconds": spent,
            "metrics": held[SHARED],
            "check": measure(posteriors[SHARED], **CHECK),
        }
        save(FILE, beside, settings={"sizes": SIZES, "record": record})
        bars.append(Bar.check("bytes of the file", FILE.stat().st_size, "<=", LARGEST_FILE))
        results["seconds"] = spent
    return finish(args, name="nested", results=results, bars=bars, seeds=SEEDS)


if __name__ == "__main__":
    sys.exit(main())
