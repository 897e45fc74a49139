"""All the way from network to solver: what k steps on J buy, on the Lorenz-63 window.

    python -m benchmarks.refinement [--json FILE] [--quick] [--keep FOLDER]

A mixture density network proposes starts, and k steps on J follow: either one search from the
most likely start (`amortlib.refine`), or a narrowing field of searches (`amortlib.search`).
Judged by the first two gates against the oracle in double precision, on two disjoint sets of
fresh windows at each gap fraction: choices were made on *tune*, *report* is what counts. Beside
the gates: the divergence of the Laplace approximation at the end from the posterior, the time
against the oracle's on the same events, and what a network alone (k = 0) reaches with more
training and more width.

With k > 0 this is 4DVar with learned starts. Only k = 0 is a single forward pass.

Writes `book/weights/lorenz63_mixture.safetensors`; a quick run trains for a moment and writes
nothing. `--keep` stores the oracle's answers, and takes them from there the next time.
"""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from amortlib.calibration import importance_figures, jacobian_error, mode_distance
from amortlib.calibration.importance import KHAT
from amortlib.encoders import FlatEncoder, ScaledEncoder
from amortlib.energy import Energy
from amortlib.export import build_and_load, save
from amortlib.heads import MixtureHead
from amortlib.modes import stationary_point
from amortlib.objectives import nll
from amortlib.observation import ContiguousGaps, NoGaps
from amortlib.posterior import AmortizedPosterior
from amortlib.problems import InverseProblem, lorenz63
from amortlib.refine import refine
from amortlib.search import Field, search, search_posterior
from amortlib.solvers import Oracle, OracleAnalysis
from amortlib.training import fit
from amortlib.types import Array, Event, to_double
from benchmarks.flow_lorenz63 import energy_of, optimizer
from benchmarks.report import Bar, finish, median_seconds, parser, table

FILE = Path(__file__).parent.parent / "book" / "weights" / "lorenz63_mixture.safetensors"
SEEDS = {
    "weights": 0,
    "training": 1,
    "tune": 101,
    "report": 202,
    "draws": 7,
    "timing": 5,
    "held out": 303,
    "tested": 404,
}
FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.8)
EVENTS = 1024
SIZES = {"components": 8, "features": 96, "width": 192, "depth": 2}
STEPS, RATE, BATCH = 30000, 2e-3, 256
PLAIN = (0, 1, 2, 3, 4)
"""Numbers of steps from the most likely start."""
FIELDS = {
    "search, k = 2": Field((8, 4)),
    "search, k = 3": Field((8, 4, 2)),
    "search, k = 4": Field((8, 4, 2, 2)),
    "search, k = 6": Field((8, 4, 2, 2, 2, 2)),
}
BEST = "search, k = 4"
"""With the fewest steps of those that pass both gates as often as is asked on the tuning set."""
DRAWS = 1000
NAMED = 20
"""Of the events that fail, so many are named."""
WAY = {96: (1000, 4000, 16000), 192: (1000, 4000, 16000, STEPS)}
"""Steps of training at each width, for the network alone."""


def problem(fraction: float | None = None) -> InverseProblem:
    """The window with a gap of a fixed share of the times, or as it is trained on."""
    if fraction is None:
        return lorenz63()
    return lorenz63(gaps=NoGaps() if fraction == 0 else ContiguousGaps(fraction))


def build(sizes: dict[str, int], **_: Any) -> AmortizedPosterior:
    """The untrained mixture density network."""
    made = problem()
    prior = made.prior
    assert prior is not None
    k_encoder, k_head = jax.random.split(jax.random.key(SEEDS["weights"]))
    net = {name: sizes[name] for name in ("features", "width", "depth")}
    # Values of x and y are of the size of ten.
    encoder = ScaledEncoder(FlatEncoder(made.shapes()[1], key=k_encoder, **net), 0.0, 10.0)
    head = MixtureHead(
        sizes["features"],
        3,
        key=k_head,
        components=sizes["components"],
        centre=prior.loc,
        scale=prior.sd(),
    )
    return AmortizedPosterior(encoder, head)


def load() -> AmortizedPosterior:
    """The shipped network.

    Raises:
        amortlib.CheckpointError: where the file is missing or damaged.
    """
    return build_and_load(FILE, build)


def train(sizes: dict[str, int], steps: int) -> tuple[AmortizedPosterior, float]:
    """By maximum likelihood on fresh windows; with the seconds of processor time."""
    made = problem()
    start = time.process_time()
    result = fit(
        build(sizes),
        nll,
        lambda key: made.batch(key, BATCH),
        key=jax.random.key(SEEDS["training"]),
        steps=steps,
        optimizer=optimizer(RATE, steps),
        every=max(1, steps // 10),
        progress=False,
    )
    return result.model, time.process_time() - start


def solved(
    split: str, fraction: float, n: int, keep: Path | None = None
) -> tuple[Event, OracleAnalysis]:
    """Fresh events and the oracle's answers, from the folder where it has them."""
    made = problem(fraction)
    seed = SEEDS[split] + round(10 * fraction)
    _, events = made.batch(jax.random.key(seed), n)
    file = None if keep is None else keep / f"{split}_{fraction:g}_{n}.pkl"
    if file is not None and file.exists():
        kept, analysis = pickle.loads(file.read_bytes())
        if np.array_equal(kept, events.values):
            return events, analysis
    analysis = Oracle(energy_of(made))(events, key=jax.random.key(SEEDS[split] + 50))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps((np.asarray(events.values), analysis)))
    return events, analysis


def likelihood(model: AmortizedPosterior, fraction: float, n: int = 4096) -> dict[str, float]:
    """Mean negative log-density of the truth over fresh windows, in nats, and its error."""
    x, events = problem(fraction).batch(jax.random.key(SEEDS["held out"]), n)
    each = np.asarray(eqx.filter_jit(jax.vmap(lambda x, e: -model.log_prob(x, e)))(x, events))
    return {"nll": float(each.mean()), "nll_error": float(each.std() / np.sqrt(n))}


Answer = Callable[[AmortizedPosterior, Energy, Event], Array]
"""A mode, from the network, J and an event."""


def best_start(model: AmortizedPosterior, energy: Energy, event: Event) -> Array:
    """The mean of the most likely component, as a control variable."""
    mixture = model(event)
    return energy.prior.whiten(mixture.at(jnp.argmax(mixture.log_weight)).loc)


def plain(steps: int, derivative: str) -> Answer:
    """k steps from the most likely start."""

    def mode(model: AmortizedPosterior, energy: Energy, event: Event) -> Array:
        v = best_start(model, energy, event)
        end = refine(energy, v, event, steps=steps, derivative=derivative)  # ty: ignore
        return energy.prior.colour(end)

    return mode


def searched(field: Field, derivative: str) -> Answer:
    """A field of searches from all starts."""

    def mode(model: AmortizedPosterior, energy: Energy, event: Event) -> Array:
        starts = jax.vmap(energy.prior.whiten)(model(event).part.loc)
        end = search(energy, starts, event, field=field, derivative=derivative)  # ty: ignore
        return energy.prior.colour(end)

    return mode


def at_the_end(field: Field) -> Answer:
    """The same, with the derivative there and not one Newton step further on."""
    end = searched(field, "implicit")

    def mode(model: AmortizedPosterior, energy: Energy, event: Event) -> Array:
        v = energy.prior.whiten(end(model, energy, event))
        return energy.prior.colour(stationary_point(lambda v: energy.at_control(v, event), v))

    return mode


def network(model: AmortizedPosterior, energy: Energy, event: Event) -> Array:
    """The mode of the mixture itself, and nothing of J."""
    return model(event).mode()


Judge = Callable[[AmortizedPosterior, Event, OracleAnalysis], dict[str, Any]]


def judge_of(answer: Answer) -> Judge:
    """The shares of single-minimum events that pass each of the two gates, and who fails.

    One program, for the network and the events it is given.
    """

    @eqx.filter_jit
    def run(model: AmortizedPosterior, energy: Energy, parts: Any) -> tuple[Array, Array]:
        def one(part: Any) -> tuple[Array, Array]:
            event, mode, covariance, jacobian = part

            def of(y: Array) -> tuple[Array, Array]:
                x = answer(model, energy, eqx.tree_at(lambda e: e.y, event, y))
                return x, x

            slope, x = jax.jacfwd(of, has_aux=True)(event.y)
            return mode_distance(x, mode, covariance), jacobian_error(slope, jacobian, event.mask)

        return jax.lax.map(one, parts, batch_size=64)

    def judge(model: AmortizedPosterior, events: Event, analysis: OracleAnalysis) -> dict[str, Any]:
        with jax.enable_x64(True):
            given = to_double((model, energy_of(problem()), events))
            oracle = (analysis.mode, analysis.covariance, analysis.jacobian)
            found = run(given[0], given[1], (given[2], *map(jnp.asarray, oracle)))
            near, slope = map(np.asarray, found)
        single = np.asarray(analysis.single)
        agreed, adjoint = near <= 1.0, slope < 0.05  # NaN passes neither
        both = agreed & adjoint
        failing = np.flatnonzero(single & ~both)
        return {
            "single": int(single.sum()),
            "agreement": 100 * float(agreed[single].mean()),
            "adjoint": 100 * float(adjoint[single].mean()),
            "both": 100 * float(both[single].mean()),
            "error": float(np.median(slope[single])),
            "failed": failing.size,
            "failing": failing[:NAMED].tolist(),
        }

    return judge


def densities(model: AmortizedPosterior, field: Field, events: Event) -> dict[str, float]:
    """KL, ESS / N and k-hat of the Laplace approximation at the end of a search, on all events."""
    energy = energy_of(problem())
    posterior = search_posterior(model, energy, field=field)
    keys = jax.random.split(jax.random.key(SEEDS["draws"]), events.y.shape[0])

    @eqx.filter_jit
    def run(events: Event, keys: Array) -> Any:
        def one(part: Any) -> Any:
            event, key = part
            q = posterior(event)
            x = q.sample(DRAWS, key=key)
            log_weight = jax.vmap(lambda x: -energy(x, event) - q.log_prob(x))(x)
            return importance_figures(jnp.where(jnp.isfinite(log_weight), log_weight, -jnp.inf))

        return jax.lax.map(one, (events, keys), batch_size=32)

    found = jax.tree.map(np.asarray, run(events, keys))
    n = found.kl.size
    return {
        "kl": float(found.kl.mean()),
        "kl_error": float(found.kl.std() / np.sqrt(n)),
        "kl_median": float(np.median(found.kl)),
        "ess": float(found.ess.mean()),
        "khat_above": 100 * float((found.khat > KHAT).mean()),
    }


def ratios(
    asked: Mapping[str, Callable[[Event], Any]], *, many: int, alone: int
) -> dict[str, dict[str, float]]:
    """The oracle's time for an event over that of each answer: one event a call, and many."""
    energy = energy_of(problem())
    oracle = Oracle(energy)
    _, events = problem().batch(jax.random.key(SEEDS["timing"]), many)
    few = [jax.tree.map(lambda a, i=i: a[i : i + 1], events) for i in range(alone)]

    def ask(events: Event) -> Array:
        return oracle(events, key=jax.random.key(SEEDS["timing"])).mode

    together = median_seconds(lambda: ask(events), 3) / many
    one = float(np.median([median_seconds(lambda e=e: ask(e), 3) for e in few]))
    found = {}
    for name, answer in asked.items():
        single, batch = eqx.filter_jit(answer), eqx.filter_jit(eqx.filter_vmap(answer))
        first = [jax.tree.map(lambda a: a[0], events) for events in few]
        each = [median_seconds(partial(single, event), 9) for event in first]
        found[name] = {
            "one": one / float(np.median(each)),
            "many": together / (median_seconds(partial(batch, events), 5) / many),
        }
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Train, judge, compare."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--keep", type=Path, metavar="FOLDER", help="store the oracle's answers")
    options.add_argument("--train", action="store_true", help="train, where weights are there")
    args = options.parse_args(argv)
    quick = args.quick
    seconds = None
    if quick or args.train or not FILE.exists():
        model, seconds = train(SIZES, 20 if quick else STEPS)
        print(f"trained in {seconds:.0f} s of processor time", flush=True)
        if not quick:
            metrics = {f"{fraction:g}": likelihood(model, fraction) for fraction in FRACTIONS}
            record = {"seconds": seconds, "steps": STEPS, "seeds": SEEDS, "metrics": metrics}
            save(FILE, model, settings={"sizes": SIZES, "record": record})
    else:
        model = load()
    n, splits = (16, ("report",)) if quick else (EVENTS, ("tune", "report"))
    fractions = (0.0,) if quick else FRACTIONS
    answers: dict[str, Answer] = {"network alone, k = 0": network}
    answers |= {f"one start, k = {k}": plain(k, "implicit") for k in PLAIN[1:]}
    answers |= {f"one start, k = {k}, unrolled": plain(k, "unrolled") for k in PLAIN[1:]}
    answers |= {name: searched(field, "implicit") for name, field in FIELDS.items()}
    answers[f"{BEST}, slope at its end"] = at_the_end(FIELDS[BEST])
    answers[f"{BEST}, unrolled"] = searched(FIELDS[BEST], "unrolled")
    if quick:
        answers = {name: answers[name] for name in ("network alone, k = 0", BEST)}

    judges = {name: judge_of(answer) for name, answer in answers.items()}
    held: dict[str, Any] = {}
    reported: dict[float, tuple[Event, OracleAnalysis]] = {}
    for split in splits:
        for fraction in fractions:
            events, analysis = solved(split, fraction, n, args.keep)
            if split == "report":
                reported[fraction] = events, analysis
            print(split, fraction, analysis.summary(), flush=True)
            for name, judge in judges.items():
                row = judge(model, events, analysis)
                held.setdefault(name, {}).setdefault(split, {})[f"{fraction:g}"] = row
                print(f"  {name:28s} {row['agreement']:6.2f} {row['adjoint']:6.2f}", flush=True)
    spread = {
        f"{fraction:g}": densities(model, FIELDS[BEST], events)
        for fraction, (events, _) in reported.items()
    }
    timed = {BEST: FIELDS[BEST]} if quick else FIELDS
    energy = energy_of(problem())
    modes = {n: search_posterior(model, energy, field=field).mode for n, field in timed.items()}
    speed = ratios(modes, many=1 if quick else 1000, alone=1 if quick else 10)

    way = []
    alone = judge_of(network)
    clean, oracle = reported[0.0]
    for width, counts in ({} if quick else WAY).items():
        for steps in counts:
            grown, spent = train(SIZES | {"width": width}, steps)
            row = alone(grown, clean, oracle)
            way.append({"width": width, "steps": steps, "seconds": spent, **row})
            print(way[-1], flush=True)

    rows = [
        [name, *(f"{held[name]['report'][f'{f:g}']['both']:.2f}" for f in fractions)]
        for name in answers
    ]
    print(table(["both gates, %", *(f"{100 * f:.0f}% missing" for f in fractions)], rows))
    rows = [[name, f"{r['one']:.1f}", f"{r['many']:.1f}"] for name, r in speed.items()]
    print(table(["times faster than the oracle", "one event", "many"], rows))
    asked = (BEST,) if quick else (BEST, "search, k = 6")
    bars = [
        Bar.check(
            f"{name}, {100 * float(f):.0f}% missing: both gates, %",
            row["both"],
            ">=",
            100.0 if f == "0" else 99.5,
        )
        for name in asked
        for f, row in held[name]["report"].items()
    ]
    bars += [
        Bar.check(f"{f} missing: mean KL", row["kl"], "<=", 0.03 if f == "0" else 0.1)
        for f, row in spread.items()
    ]
    bars.append(Bar.check("no gaps: mean ESS/N", spread["0"]["ess"], ">=", 0.96))
    bars.append(Bar.check("no gaps: k-hat above 0.7, %", spread["0"]["khat_above"], "<=", 3.0))
    for name in asked:
        bars.append(Bar.check(f"{name}: one event, times faster", speed[name]["one"], ">=", 25.0))
        bars.append(Bar.check(f"{name}: many, times faster", speed[name]["many"], ">=", 70.0))
    results = {
        "gates": held,
        "densities": spread,
        "speed": speed,
        "network": way,
        "events": n,
        "best": BEST,
        "seconds": seconds,
    }
    return finish(args, name="refinement", results=results, bars=bars, seeds=SEEDS)


if __name__ == "__main__":
    sys.exit(main())
