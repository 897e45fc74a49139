"""Two equal answers: heads on a Lorenz-63 window whose sign is lost when a gap covers its start.

    python -m benchmarks.bimodal [--json FILE] [--quick] [--only HEAD ...] [--measure]

Trains a Gaussian, a flow and a score head on random gaps, and compares their draws with a long-run
reference on held-out events in which the first time is missing: a classifier two-sample score and
the error of the weight of a mode, beside those of Laplace at the lowest minimum and of a second
reference sample. Neither the prior nor what is seen knows (x, y, z) from (-x, -y, z), so each piece
has a weight of exactly one half, and the reference draws are mirrored at random. The heads have to
learn that; beside them stand the same two averaged over both sides (`amortlib.symmetry`), which
have it built in and are trained no further.

Writes `book/weights/bimodal_HEAD.safetensors` for each head; a quick run trains for a moment and
writes nothing. `--only` leaves the other heads alone, and `--measure` takes the weights that are
there, with the times of their training, and measures them alone.
"""

from __future__ import annotations

import dataclasses
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

from amortlib.encoders import FlatEncoder, ScaledEncoder
from amortlib.energy import Energy
from amortlib.export import build_and_load, read_settings, save
from amortlib.objectives import dsm, nll
from amortlib.observation import ContiguousGaps, FixedMask, MixedGaps, gap
from amortlib.posterior import (
    AmortizedPosterior,
    flow_posterior,
    regression_posterior,
    score_posterior,
)
from amortlib.problems import InverseProblem, lorenz63_sign_lost
from amortlib.solvers import Oracle, importance_sample
from amortlib.symmetry import Symmetry, symmetric_posterior
from amortlib.training import fit, trainable
from amortlib.types import Array, Event, Key, to_double
from benchmarks.report import Bar, finish, median_seconds, parser, table
from benchmarks.two_sample import c2st

FOLDER = Path(__file__).parent.parent / "book" / "weights"
FILES = {name: FOLDER / f"bimodal_{name}.safetensors" for name in ("regression", "flow", "score")}
SEEDS = {"bank": 0, "weights": 1, "training": 2, "held out": 501, "oracle": 3, "reference": 4}
TIMES, SHAPE, NOISE = 5, (5, 2), 0.5
BANK, BATCH = 1 << 20, 512
STEPS = {"regression": 20000, "flow": 60000, "score": 60000}
RATE = {"regression": 2e-3, "flow": 3e-3, "score": 3e-3}
EMA = 0.9995
ENCODER = {"features": 96, "encoder_width": 128, "encoder_depth": 2}
SIZES: dict[str, dict[str, Any]] = {
    "regression": {"features": 96, "width": 128, "depth": 2},
    "flow": {"components": 2, "layers": 3, "condition": 32, "width": 48, **ENCODER},
    "score": {"components": 2, "width": 96, "depth": 2, "draws": 4, **ENCODER},
}
TWO_PIECES = ("flow", "score")
"""One Gaussian, whoever trains it, has no two pieces."""
EVENTS, DRAWS, PROPOSALS = 16, 2000, 20000
C2ST, LARGEST_FILE = 0.55, 350_000
MIRROR = np.array([-1.0, -1.0, 1.0])
"""What Lorenz-63 does not see: (x, y, z) -> (-x, -y, z)."""


def gaps() -> MixedGaps:
    """One contiguous gap of up to four of the five times; in half of the events from the start."""
    start = [jnp.broadcast_to(gap(TIMES, 0, k)[:, None], SHAPE) for k in range(5)]
    return MixedGaps(
        [ContiguousGaps(0.0, 0.8), *(FixedMask(mask) for mask in start)], [5, 1, 1, 1, 1, 1]
    )


def problem(first: int | None = None) -> InverseProblem:
    """The problem with the gaps of training, or with the first `first` times missing."""
    if first is None:
        return lorenz63_sign_lost(gaps=gaps(), noise=NOISE)
    mask = jnp.broadcast_to(gap(TIMES, 0, first)[:, None], SHAPE)
    return lorenz63_sign_lost(gaps=FixedMask(mask), noise=NOISE)


def mirrored(event: Event) -> Event:
    """What would have been seen of (-x, -y, z): only the first x is seen with its sign."""
    return dataclasses.replace(event, y=event.y.at[0, 0].multiply(-1.0))


def symmetric(model: AmortizedPosterior) -> AmortizedPosterior:
    """The average of a posterior over both sides."""
    sides = [Symmetry(np.diag(MIRROR), mirrored)]
    return symmetric_posterior(model, sides, problem=problem(), key=jax.random.key(0))


class Bank(eqx.Module):
    """A million simulated windows; every step takes some, with noise and gaps drawn anew."""

    x: Array
    clean: Array
    gaps: MixedGaps

    @classmethod
    def simulate(cls, size: int) -> Bank:
        """`size` windows, without noise and gaps."""
        made = problem()
        x = made.prior.sample(size, key=jax.random.key(SEEDS["bank"]))
        forward = jax.jit(jax.vmap(made.forward))
        part = min(size, 1 << 16)
        clean = jnp.concatenate([forward(x[i : i + part]) for i in range(0, size, part)])
        return cls(x, clean, made.gaps)

    def __call__(self, key: Key) -> tuple[Array, Event]:
        """A minibatch."""
        k_which, k_noise, k_mask = jax.random.split(key, 3)
        i = jax.random.randint(k_which, (BATCH,), 0, self.x.shape[0])
        y = self.clean[i] + NOISE * jax.random.normal(k_noise, (BATCH, *SHAPE))
        mask = jax.vmap(lambda k: self.gaps(k, SHAPE))(jax.random.split(k_mask, BATCH))
        return self.x[i], Event(y, mask)


def build(name: str, units: tuple[Any, Any] = (0.0, 1.0)) -> AmortizedPosterior:
    """An untrained posterior; `units` are the mean and the spread of the observations."""
    prior, key = problem().prior, jax.random.key(SEEDS["weights"])
    if name == "score":
        return score_posterior(
            key=key,
            prior=prior,
            obs_shape=SHAPE,
            obs_centre=units[0],
            obs_scale=units[1],
            **SIZES[name],
        )
    flat = FlatEncoder(SHAPE, key=key, features=96, width=128, depth=2)
    encoder = ScaledEncoder(flat, *units)
    if name == "flow":
        return flow_posterior(key=key, prior=prior, obs_shape=SHAPE, encoder=encoder, **SIZES[name])
    plain = regression_posterior("cholesky", key=key, prior=prior, obs_shape=SHAPE, **SIZES[name])
    return AmortizedPosterior(encoder, plain.head)


def train(name: str, steps: int, bank: Bank) -> tuple[AmortizedPosterior, float]:
    """The trained posterior, and the seconds that it took."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE[name], min(300, steps // 2), steps)
    start = time.perf_counter()
    result = fit(
        build(name, (bank.clean.mean(0), bank.clean.std(0))),
        dsm if name == "score" else nll,
        bank,
        key=jax.random.key(SEEDS["training"]),
        steps=steps,
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)),
        ema=EMA,
        every=max(1, steps // 10),
        progress=False,
    )
    return result.model, time.perf_counter() - start


def numbers(model: AmortizedPosterior) -> int:
    """How many numbers were trained."""
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, trainable(model))))


def references(
    events: int, *, first: int = 1, seed: int = SEEDS["held out"], proposals: int = PROPOSALS
) -> list[dict[str, Any]]:
    """Held-out events; for each, Laplace at the lowest minimum, and weighted reference draws.

    The proposal stands on the minima that the oracle found and on their mirror images, so that
    neither piece can be missed.
    """
    made = problem(first)
    energy = Energy(made.prior, made.forward)
    truth, batch = made.batch(jax.random.key(seed), events)
    found = Oracle(energy, rounds=2)(batch, key=jax.random.key(SEEDS["oracle"]))
    out = []
    with jax.enable_x64(True):
        energy64, batch64 = to_double((energy, batch))
        for i in range(events):
            near = found.distinct[i] & (found.end_energy[i] < found.energy[i] + 12.0)
            ends = np.concatenate([found.mode[i][None], found.ends[i][near]])[:4]
            modes = np.concatenate([ends, ends * MIRROR])[np.arange(8) % (2 * len(ends))]
            sample = importance_sample(
                energy64,
                jax.tree.map(lambda a, i=i: a[i], batch64),
                jnp.asarray(modes),
                proposals,
                key=jax.random.key(SEEDS["reference"] + i),
            )
            out.append(
                {
                    "event": jax.tree.map(lambda a, i=i: a[i], batch),
                    "truth": np.asarray(truth[i]),
                    "mode": found.mode[i],
                    "covariance": found.gauss_newton_covariance[i],
                    "x": np.asarray(sample.x),
                    "weight": np.asarray(sample.weight),
                    "size": float(sample.effective_size),
                }
            )
    return out


def right_share(x: np.ndarray) -> float:
    """The share of the draws in the piece with a positive first component; it should be 1/2."""
    return float(np.mean(x[:, 0] > 0))


def reference_draws(ref: dict, rng: np.random.Generator) -> np.ndarray:
    """Draws of the reference, each mirrored or not: both pieces weigh the same, exactly."""
    x = ref["x"][rng.choice(ref["weight"].size, DRAWS, p=ref["weight"])]
    return np.where(rng.random((DRAWS, 1)) < 0.5, x, x * MIRROR)


_SAMPLE = eqx.filter_jit(lambda model, event, key: model.sample(event, DRAWS, key=key))


def drawn(model: AmortizedPosterior) -> Callable[[dict, int], np.ndarray]:
    """Reference and number of an event -> draws of a model."""
    return lambda ref, i: np.asarray(_SAMPLE(model, ref["event"], jax.random.key(i)))


def laplace(ref: dict, i: int) -> np.ndarray:
    """Draws of N(mode, Gauss-Newton covariance)."""
    rng = np.random.default_rng(i)
    return rng.multivariate_normal(ref["mode"], ref["covariance"], DRAWS)


def again(ref: dict, i: int) -> np.ndarray:
    """A second sample of the reference: what no method can do better than."""
    return reference_draws(ref, np.random.default_rng((i, 1)))


def measure(draw: Callable[[dict, int], np.ndarray], refs: list[dict]) -> dict[str, float]:
    """Two-sample score and error of a mode's weight, means over events with standard errors."""
    scores, errors = [], []
    for i, ref in enumerate(refs):
        own = reference_draws(ref, np.random.default_rng((i, 0)))
        x = draw(ref, i)
        scores.append(c2st(own, x, seed=1))
        errors.append(abs(right_share(x) - 0.5))
    n = len(refs)
    return {
        "c2st": float(np.mean(scores)),
        "c2st_error": float(np.std(scores) / np.sqrt(n)),
        "c2st_worst": float(np.max(scores)),
        "mode_weight": float(np.mean(errors)),
        "mode_weight_error": float(np.std(errors) / np.sqrt(n)),
    }


def sample_seconds(model: AmortizedPosterior, event: Event, repeats: int = 5) -> float:
    """Median seconds for `DRAWS` draws of one event, compiled before."""
    return median_seconds(lambda: _SAMPLE(model, event, jax.random.key(1)), repeats)


def held_out_nll(model: AmortizedPosterior, n: int = 256) -> float:
    """Mean of -log q at the truth over fresh events with the gaps of training, in nats."""
    pairs = problem().batch(jax.random.key(SEEDS["held out"] + 1), n)
    log_prob = eqx.filter_jit(lambda m, p: jax.vmap(m.log_prob)(*p))
    return float(-jnp.mean(log_prob(model, pairs)))


def figures(model: AmortizedPosterior, refs: list[dict], quick: bool) -> dict[str, float]:
    """What is measured of a head."""
    return {
        "numbers": numbers(model),
        "sample_seconds": sample_seconds(model, refs[0]["event"]),
        "nll": held_out_nll(model, 32 if quick else 256),
        **measure(drawn(model), refs),
    }


def write(name: str, model: AmortizedPosterior, record: dict[str, float]) -> int:
    """Save the weights with the record of how they were made; returns the bytes."""
    FOLDER.mkdir(exist_ok=True)
    settings = {"sizes": SIZES[name], "record": {**record, "rate": RATE[name], "seeds": SEEDS}}
    save(FILES[name], model, settings=settings)
    return FILES[name].stat().st_size


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, save."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument(
        "--only", nargs="+", choices=list(FILES), default=list(FILES), help="these heads"
    )
    flags.add_argument("--measure", action="store_true", help="measure the weights there are")
    args = flags.parse_args(argv)
    refs = references(2 if args.quick else EVENTS)
    bank = None if args.measure else Bank.simulate(1 << 12 if args.quick else BANK)
    rows: dict[str, dict[str, float]] = {"reference again": measure(again, refs)}
    rows["Laplace"] = measure(laplace, refs)
    models = {}
    for name in args.only:
        if bank is None:
            models[name] = build_and_load(FILES[name], lambda name=name, **_: build(name))
            record = read_settings(FILES[name])["record"]
            rows[name] = {key: record[key] for key in ("seconds", "steps")}
        else:
            steps = 20 if args.quick else STEPS[name]
            models[name], seconds = train(name, steps, bank)
            rows[name] = {"seconds": seconds, "steps": steps}
        rows[name] |= figures(models[name], refs, args.quick)
    for name in TWO_PIECES:
        if name in models:
            both = figures(symmetric(models[name]), refs, args.quick)
            rows[f"{name}, symmetric"] = {"seconds": rows[name]["seconds"], **both}
    print("the first time missing; fresh events")
    head = ["method", "C2ST", "worst", "mode weight", "NLL", "train s", "numbers", "draws s"]
    lines = [
        [
            name,
            f"{row['c2st']:.3f} +- {row['c2st_error']:.3f}",
            f"{row['c2st_worst']:.3f}",
            f"{row['mode_weight']:.3f}",
            *(
                f"{row[k]:{form}}" if k in row else "-"
                for k, form in (
                    ("nll", ".2f"),
                    ("seconds", ".0f"),
                    ("numbers", "d"),
                    ("sample_seconds", ".3f"),
                )
            ),
        ]
        for name, row in rows.items()
    ]
    print(table(head, lines))
    floor = rows["reference again"]["mode_weight"]
    bars = [
        bar
        for name in rows
        if name.split(",")[0] in TWO_PIECES
        for bar in (
            Bar.check(f"{name}: C2ST, mean", rows[name]["c2st"], "<=", C2ST),
            Bar.check(f"{name}: mode weight", rows[name]["mode_weight"], "<=", 2 * floor),
        )
    ]
    if not args.quick:
        for name in args.only:
            size = write(name, models[name], rows[name])
            bars.append(Bar.check(f"{name}: bytes of the file", size, "<=", LARGEST_FILE))
    return finish(args, name="bimodal", results=rows, bars=bars, seeds=SEEDS)


if __name__ == "__main__":
    sys.exit(main())
