"""Train the flow for the Lorenz-63 window that pages load, and measure it against the posterior.

    python -m benchmarks.flow_lorenz63 [--json FILE] [--quick] [--measure]

Writes `book/weights/lorenz63_flow.safetensors`; a quick run trains for a moment and writes
nothing, and `--measure` takes the weights that are there and writes their figures alone. Three
parts: a full-covariance regression head trained by maximum likelihood on gappy windows; a pool of
events, each refined from its guess; the mixture of flows in the whitened coordinates of the refined
points, trained on the pool. Time is that of the process on the processor, so that it means the same
on a machine that does other things.

Every event is judged by the posterior itself, by importance sampling around the oracle's minima.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from amortlib.calibration import pareto_khat
from amortlib.calibration.importance import KHAT
from amortlib.encoders import FlatEncoder
from amortlib.energy import Energy
from amortlib.export import build_and_load, read_settings, save
from amortlib.heads import CholeskyHead
from amortlib.objectives import nll
from amortlib.observation import ContiguousGaps, NoGaps
from amortlib.posterior import AmortizedPosterior
from amortlib.problems import InverseProblem, lorenz63
from amortlib.refine import refined_posterior
from amortlib.solvers import Oracle, OracleAnalysis, WeightedSample, population_sample
from amortlib.training import Objective, fit
from amortlib.types import Array, Event, Key
from benchmarks.report import Bar, finish, parser, table

FILE = Path(__file__).parent.parent / "book" / "weights" / "lorenz63_flow.safetensors"
SEEDS = {"weights": 0, "guess": 1, "pool": 2, "flow": 3, "held out": 41}
FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.8)
GUESS = {"features": 96, "width": 192}
REFINED = {"steps": 4, "starts": 3}
SIZES = {"layers": 4, "condition": 32, "width": 48, "encoder_width": 96}
GUESS_STEPS, GUESS_RATE, GUESS_BATCH = 9000, 2e-3, 256
POOL = 96 * 1024
FLOW_STEPS, FLOW_RATE, FLOW_BATCH = 4500, 2e-3, 192
LARGEST_FILE = 700_000
CHECK: dict[str, Any] = {"fraction": 0.4, "events": 16, "seed": 77}
"""Few enough events to be measured again by a test of the file."""


def energy_of(problem: InverseProblem) -> Energy:
    """J of the window."""
    assert problem.prior is not None
    return Energy(problem.prior, problem.forward)


def build(sizes: dict[str, dict[str, Any]], record: dict[str, Any]) -> AmortizedPosterior:
    """The untrained model that the file is loaded into."""
    problem = lorenz63()
    prior = problem.prior
    assert prior is not None
    k_encoder, k_head, k_flow = jax.random.split(jax.random.key(SEEDS["weights"]), 3)
    features = sizes["guess"]["features"]
    guess = AmortizedPosterior(
        FlatEncoder(problem.shapes()[1], key=k_encoder, **sizes["guess"]),
        CholeskyHead(features, 3, key=k_head, centre=prior.loc, scale=prior.sd()),
    )
    return refined_posterior(
        guess, energy_of(problem), kind="flow", key=k_flow, **sizes["refined"], **sizes["flow"]
    )


def load() -> AmortizedPosterior:
    """The shipped model.

    Raises:
        amortlib.CheckpointError: where the file is missing or damaged.
    """
    return build_and_load(FILE, build)


def optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam, clipped, its rate falling to nothing."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, min(200, steps // 2), steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def pool_of(model: AmortizedPosterior, problem: InverseProblem, n: int, key: Key) -> Any:
    """`n` states and the contexts of their events."""

    @eqx.filter_jit
    def some(key: Key) -> Any:
        x, events = problem.batch(key, min(n, 1024))
        return x, jax.vmap(model.encoder)(events)

    parts = [some(jax.random.fold_in(key, i)) for i in range(max(1, n // 1024))]
    return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)


def from_pool(pool: Any, n: int) -> Callable[[Key], Any]:
    """Minibatches of `n` of what has one row an event, such as `pool_of` returns."""
    size = jax.tree.leaves(pool)[0].shape[0]

    def batches(key: Key) -> Any:
        rows = jax.random.randint(key, (n,), 0, size)
        return jax.tree.map(lambda a: a[rows], pool)

    return batches


def on_contexts(head: Any, batch: Any, key: Key) -> Array:
    """Mean -log q(x | context), in nats; draws nothing."""
    x, contexts = batch
    return -jnp.mean(jax.vmap(lambda x, c: head(c).log_prob(x))(x, contexts))


def fitted(
    model: Any,
    objective: Objective,
    batches: Callable[[Key], Any],
    *,
    seed: int,
    steps: int,
    rate: float,
) -> tuple[Any, float]:
    """One part trained by `optimizer`, and the seconds of processor time that it took."""
    start = time.process_time()
    found = fit(
        model,
        objective,
        batches,
        key=jax.random.key(seed),
        steps=steps,
        optimizer=optimizer(rate, steps),
        every=max(1, steps // 10),
        progress=False,
    )
    return found.model, time.process_time() - start


def train(*, quick: bool = False) -> tuple[AmortizedPosterior, dict[str, float]]:
    """The trained model, and the seconds of processor time of each part."""
    problem = lorenz63()
    model = build({"guess": GUESS, "refined": REFINED, "flow": SIZES}, {})
    guess_steps, flow_steps = (20, 20) if quick else (GUESS_STEPS, FLOW_STEPS)
    seconds = {}
    guess, seconds["guess"] = fitted(
        model.encoder.guess.tree,  # ty: ignore[unresolved-attribute]
        nll,
        lambda key: problem.batch(key, GUESS_BATCH),
        seed=SEEDS["guess"],
        steps=guess_steps,
        rate=GUESS_RATE,
    )
    model = eqx.tree_at(lambda m: m.encoder.guess.tree, model, guess)
    start = time.process_time()
    pool = pool_of(model, problem, 512 if quick else POOL, jax.random.key(SEEDS["pool"]))
    seconds["pool"] = time.process_time() - start
    flow, seconds["flow"] = fitted(
        model.head,
        on_contexts,
        from_pool(pool, FLOW_BATCH),
        seed=SEEDS["flow"],
        steps=flow_steps,
        rate=FLOW_RATE,
    )
    return eqx.tree_at(lambda m: m.head, model, flow), seconds


def references(
    fraction: float, events: int, seed: int, *, draws: int = 4096
) -> tuple[Event, Any, np.ndarray]:
    """Events, a weighted sample of the posterior of each, and whether it has one minimum."""
    gaps = NoGaps() if fraction == 0.0 else ContiguousGaps(fraction)
    problem = lorenz63(gaps=gaps)
    _, batch = problem.batch(jax.random.key(seed), events)
    key = jax.random.key(seed)
    analysis = Oracle(energy_of(problem))(batch, key=jax.random.fold_in(key, 1))
    sample = weighed(batch, analysis, key=jax.random.fold_in(key, 2), draws=draws)
    return batch, sample, analysis.single


def weighed(
    batch: Event, analysis: OracleAnalysis, *, key: Key, draws: int, **longer: int
) -> WeightedSample:
    """A weighted sample of the posterior of each event, from draws around the oracle's minima."""
    energy = energy_of(lorenz63())
    events = batch.y.shape[0]
    # Up to six different minima, the best repeated to fill the rest: repeats do no harm.
    modes = np.repeat(analysis.mode[:, None], 6, axis=1)
    for i in range(events):
        ends = analysis.ends[i][analysis.distinct[i]]
        order = np.argsort(analysis.end_energy[i][analysis.distinct[i]])[:6]
        modes[i, : order.size] = ends[order]

    @eqx.filter_jit
    def weigh(batch: Event, modes: Array, keys: Array) -> Any:
        return jax.lax.map(
            lambda part: population_sample(energy, part[0], part[1], draws, key=part[2], **longer),
            (batch, modes, keys),
        )

    return weigh(batch, jnp.asarray(modes, jnp.float32), jax.random.split(key, events))


def judge(
    answer: Callable[[Event], Any], batch: Event, sample: Any, *, draws: int = 512, seed: int = 7
) -> dict[str, np.ndarray]:
    """KL(p || q) of each event, ESS / N of q's draws weighed by p, and both errors' sources."""
    energy = energy_of(lorenz63())
    keys = jax.random.split(jax.random.key(seed), batch.y.shape[0])

    @eqx.filter_jit
    def run(batch: Event, sample: Any, keys: Array) -> dict[str, Array]:
        def one(part: Any) -> dict[str, Array]:
            event, sample, key = part
            q = answer(event)
            x = q.sample(draws, key=key)
            log_weight = jax.vmap(lambda x: -energy(x, event) - q.log_prob(x))(x)
            log_weight = jnp.where(jnp.isfinite(log_weight), log_weight, -jnp.inf)
            weight = jax.nn.softmax(log_weight)
            return {
                "kl": sample.kl(q, energy, event),
                "ess": 1.0 / (draws * jnp.sum(weight**2)),
                "reference_ess": sample.effective_size,
                "k_hat": pareto_khat(log_weight),
            }

        return jax.lax.map(one, (batch, sample, keys))

    return jax.tree.map(np.asarray, run(batch, sample, keys))


def summary(found: dict[str, np.ndarray], single: np.ndarray) -> dict[str, float]:
    """The figures that are recorded; errors are one standard error over events."""
    kl = found["kl"]
    return {
        "events": kl.size,
        "single_minimum": float(single.mean()),
        "kl_mean": float(kl.mean()),
        "kl_mean_error": float(kl.std() / np.sqrt(kl.size)),
        "kl_median": float(np.median(kl)),
        "kl_largest": float(kl.max()),
        "ess_mean": float(found["ess"].mean()),
        "ess_mean_error": float(found["ess"].std() / np.sqrt(kl.size)),
        "ess_first_percentile": float(np.quantile(found["ess"], 0.01)),
        "k_hat_above": float((found["k_hat"] > KHAT).mean()),
        "reference_ess": float(np.median(found["reference_ess"])),
    }


def measure(
    answer: Callable[[Event], Any], fraction: float, *, events: int, seed: int = SEEDS["held out"]
) -> dict[str, float]:
    """The figures at one gap fraction."""
    batch, sample, single = references(fraction, events, seed)
    return summary(judge(answer, batch, sample), single)


def at_all(
    model: AmortizedPosterior, fractions: Sequence[float], *, quick: bool
) -> dict[str, dict[str, float]]:
    """The figures at each gap fraction, printed as they come and as a table."""
    metrics = {}
    for fraction in fractions:
        n = 16 if quick else (384 if fraction == 0.0 else 128)
        metrics[f"{fraction:g}"] = measure(model, fraction, events=n)
        print(fraction, metrics[f"{fraction:g}"], flush=True)
    names = ("kl_mean", "kl_median", "kl_largest", "ess_mean", "ess_first_percentile")
    rows = [
        [f"{100 * float(f):.0f}%", *(f"{m[k]:.3f}" for k in names), f"{m['k_hat_above']:.3f}"]
        for f, m in metrics.items()
    ]
    head = ["missing", "mean KL", "median", "largest", "ESS/N", "first percentile", "k-hat > .7"]
    print(table(head, rows))
    return metrics


def bars_of(metrics: dict[str, dict[str, float]], seconds: float) -> list[Bar]:
    """What a flow for this window is held to."""
    clean = metrics["0"]
    return [
        Bar.check("no gaps: mean KL", clean["kl_mean"], "<=", 0.03),
        Bar.check("no gaps: mean ESS/N", clean["ess_mean"], ">=", 0.95),
        Bar.check("no gaps: first percentile of ESS/N", clean["ess_first_percentile"], ">=", 0.45),
        Bar.check("seconds of training on one core", seconds, "<=", 180.0),
        *(
            Bar.check(f"{100 * float(f):.0f}% missing: mean KL", m["kl_mean"], "<=", 0.1)
            for f, m in metrics.items()
            if f != "0"
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, save."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--measure", action="store_true", help="measure the weights there are")
    args = options.parse_args(argv)
    sizes = {"guess": GUESS, "refined": REFINED, "flow": SIZES}
    record: dict[str, Any] = {
        "guess": {"steps": GUESS_STEPS, "rate": GUESS_RATE, "batch": GUESS_BATCH},
        "pool": POOL,
        "flow": {"steps": FLOW_STEPS, "rate": FLOW_RATE, "batch": FLOW_BATCH},
        "seeds": SEEDS,
    }
    if args.measure:
        model, settings = load(), read_settings(FILE)
        sizes, record = settings["sizes"], settings["record"]
    else:
        model, seconds = train(quick=args.quick)
        record["seconds"] = {name: round(s) for name, s in seconds.items()}
    total = sum(record["seconds"].values())
    words = ", ".join(f"{name} {s} s" for name, s in record["seconds"].items())
    print(f"trained in {total} s of processor time: {words}", flush=True)
    if not args.quick:
        save(FILE, model, settings={"sizes": sizes, "record": record})
    metrics = at_all(model, FRACTIONS, quick=args.quick)
    bars = bars_of(metrics, total)
    if not args.quick:
        record = record | {"metrics": metrics, "check": measure(model, **CHECK)}
        save(FILE, model, settings={"sizes": sizes, "record": record})
        print(f"wrote {FILE.relative_to(FILE.parent.parent.parent)}, {FILE.stat().st_size} bytes")
        bars.append(Bar.check("bytes of the file", FILE.stat().st_size, "<=", LARGEST_FILE))
    return finish(args, name="flow_lorenz63", results=metrics, bars=bars, seeds=SEEDS)


if __name__ == "__main__":
    sys.exit(main())
