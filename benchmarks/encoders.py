"""Which encoder: a plain net, convolutions, attention over a set, or the problem's own structure.

    python -m benchmarks.encoders [--json FILE] [--quick] [--budget SECONDS]
    python -m benchmarks.encoders --case NAME >> CASES; ... --cases CASES --json FILE

An Ornstein-Uhlenbeck path of 32 times with up to three gaps. A full-covariance (Cholesky) head
reads the context of each encoder in turn; beside them stands the information form, whose encoder
goes with a head of its own. Each is trained for the same processor seconds on one core, with a
rate that falls to zero as they are spent. What is measured: trained numbers, steps, time of a
step, KL(exact || head) in nats on held-out gaps at five fractions, and the time of a forward pass
for one event and for 1,000.

The set encoder is then trained once more, for four times as long, where the others cannot follow:
the path is seen at up to 16 times of the event's own, anywhere between the first time and the last
and in any order. It is asked about as many, and about more than it was ever shown.

The second form runs one case at a time, each a line of `CASES`, and makes the table of them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from amortlib.encoders import AbstractEncoder, ConvEncoder, FlatEncoder, SetEncoder
from amortlib.gaussian import Gaussian, GaussMarkov, condition, kl
from amortlib.heads.regression import CholeskyHead
from amortlib.objectives import nll
from amortlib.observation import ContiguousGaps
from amortlib.posterior import AmortizedPosterior, regression_posterior
from amortlib.problems import ornstein_uhlenbeck
from amortlib.training import trainable
from amortlib.types import Array, Event, Key, PyTree, to_double
from benchmarks.report import Bar, finish, median_seconds, parser, table
from benchmarks.throughput import one_core

SITES, NOISE, TIMESCALE = 32, 0.3, 8.0
FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.8)
EVENTS, BATCH, BUDGET, FEATURES = 256, 64, 30.0, 128
LONGER = 4.0
"""Times the budget for the set at irregular times: on the grid it is seen to need more."""
MOST, NUMBERS = 16, (2, 4, 8, 16, 24, 32, 64)
"""Observations at irregular times: at most in training, and what is asked about."""
SEEDS = {"weights": 0, "training": 1, "events": 2, "order": 3}
INFORMATION, SET, IRREGULAR = "information form", "set, by attention", "irregular times"
CASES = ("multilayer perceptron", "convolution", SET, INFORMATION, IRREGULAR)

PROBLEM = ornstein_uhlenbeck(SITES, noise=NOISE, timescale=TIMESCALE)
GRID = np.arange(float(SITES))

Batches = Callable[[Key, int], tuple[Array, Event]]


def encoders(key: Key) -> dict[str, AbstractEncoder]:
    """Each with a context of 128 numbers, at its own default size."""
    return {
        "multilayer perceptron": FlatEncoder((SITES,), key=key, features=FEATURES),
        "convolution": ConvEncoder((SITES,), key=key, features=FEATURES),
        SET: SetEncoder(key=key, features=FEATURES, time_scale=float(SITES - 1)),
    }


def build(name: str) -> AmortizedPosterior:
    """An untrained posterior."""
    k_encoder, k_head = jax.random.split(jax.random.key(SEEDS["weights"]))
    prior = PROBLEM.prior
    assert isinstance(prior, GaussMarkov)
    if name == INFORMATION:
        return regression_posterior("information", key=k_encoder, prior=prior)
    head = CholeskyHead(FEATURES, SITES, key=k_head, centre=prior.loc, scale=prior.sd())
    return AmortizedPosterior(encoders(k_encoder)[name], head)


@eqx.filter_jit
def on_the_grid(key: Key, n: int, gaps: ContiguousGaps | None = None) -> tuple[Array, Event]:
    """Paths, seen at their own times but for gaps; the times are told to whoever reads them."""
    problem = PROBLEM if gaps is None else PROBLEM.with_gaps(gaps)
    x, events = problem.batch(key, n)
    return x, dataclasses.replace(events, time=jnp.broadcast_to(GRID, events.y.shape))


@eqx.filter_jit
def anywhere(
    key: Key, n: int, most: int = MOST, exactly: Array | None = None
) -> tuple[Array, Event]:
    """Paths, seen at up to `most` times, or at `exactly` so many, uniform and in no order."""

    def one(key: Key) -> tuple[Array, Event]:
        k_number, k_time, k_path, k_noise = jax.random.split(key, 4)
        number = jax.random.randint(k_number, (), 0, most + 1) if exactly is None else exactly
        when = jax.random.uniform(k_time, (most,), maxval=GRID[-1])
        times = jnp.concatenate([jnp.asarray(GRID, when.dtype), when])
        order = jnp.argsort(times)
        step = jnp.diff(times[order], prepend=-jnp.inf)
        white = jax.random.normal(k_path, times.shape)

        def walk(z: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
            step, white = at
            keep = -step / TIMESCALE
            z = jnp.exp(keep) * z + jnp.sqrt(-jnp.expm1(2.0 * keep)) * white
            return z, z

        _, path = jax.lax.scan(walk, jnp.zeros(()), (step, white))
        path = jnp.zeros_like(path).at[order].set(path)
        y = path[SITES:] + NOISE * jax.random.normal(k_noise, (most,))
        return path[:SITES], Event(y, jnp.arange(most) < number, None, when)

    return jax.vmap(one)(jax.random.split(key, n))


def exact_anywhere(event: Event) -> Gaussian:
    """The posterior on the grid, by the formula of Gaussian processes."""

    def kernel(a: Array, b: Array) -> Array:
        return jnp.exp(-jnp.abs(a[:, None] - b[None, :]) / TIMESCALE)

    grid, when = jnp.asarray(GRID, event.y.dtype), event.when
    assert when is not None
    both = event.mask[:, None] & event.mask[None, :]
    # A masked entry is a number of its own that no state goes with.
    seen = jnp.where(both, kernel(when, when), 0.0) + jnp.diag(jnp.where(event.mask, NOISE**2, 1.0))
    across = jnp.where(event.mask, kernel(grid, when), 0.0)
    gain = jnp.linalg.solve(seen, across.T).T
    return Gaussian.from_covariance(gain @ event.values, kernel(grid, grid) - gain @ across.T)


def train(
    model: AmortizedPosterior, batches: Batches, *, rate: float, budget: float
) -> tuple[AmortizedPosterior, int, float]:
    """Train until the processor seconds are spent; returns steps, and seconds a step, warm."""
    params, static = eqx.partition(model, trainable(model))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

    @eqx.filter_jit(donate="all-except-first")
    def step(inputs: tuple[Key, Array], params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        key, rate = inputs
        k_batch, k_loss = jax.random.split(key)
        batch = batches(k_batch, BATCH)
        grads = jax.grad(lambda p: nll(eqx.combine(p, static), batch, k_loss))(params)
        updates, state = optimizer.update(grads, state, params)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        return optax.apply_updates(params, updates), state

    key = jax.random.key(SEEDS["training"])
    params = jax.tree.map(jnp.array, params)
    state = optimizer.init(params)
    still = (jax.random.fold_in(key, 0), jnp.zeros(()))
    params, state = jax.block_until_ready(step(still, params, state))
    start, times = time.process_time(), []
    while (spent := time.process_time() - start) < budget:
        now = jnp.asarray(rate * 0.5 * (1.0 + np.cos(np.pi * spent / budget)), jnp.float32)
        inputs = (jax.random.fold_in(key, 1 + len(times)), now)
        before = time.process_time()
        params, state = jax.block_until_ready(step(inputs, params, state))
        times.append(time.process_time() - before)
    return eqx.combine(params, static), len(times), float(np.median(times))


@eqx.filter_jit
def forward(model: AmortizedPosterior, events: Event) -> tuple[Array, Array]:
    """Mean and precision factor of each event's answer."""

    def one(event: Event) -> tuple[Array, Array]:
        q = model(event)
        assert isinstance(q, GaussMarkov)
        return q.loc, q.diag

    return jax.vmap(one)(events)


@eqx.filter_jit
def _divergence(
    model: AmortizedPosterior, exact: Callable[[Event], Gaussian], events: Event
) -> tuple[Array, Array]:
    prior = to_double(PROBLEM.prior)

    def one(event: Event) -> tuple[Array, Array]:
        right = exact(event)
        return kl(right, model(event)), kl(right, prior)

    return jax.lax.map(one, events, batch_size=32)


def divergence(
    model: AmortizedPosterior, exact: Callable[[Event], Gaussian], events: Event
) -> dict[str, float]:
    """Of the head and of the prior from the exact posterior, in double precision."""
    with jax.enable_x64(True):
        model, events = to_double((model, events))
        off, of_prior = map(np.asarray, _divergence(model, exact, events))
    return {
        "median": float(np.median(off)),
        "mean": float(off.mean()),
        "prior": float(np.median(of_prior)),
    }


def exact_on_the_grid(event: Event) -> Gaussian:
    """The posterior of a path seen at its own times with noise of one size."""
    sd = jnp.full_like(event.y, NOISE)
    return condition(to_double(PROBLEM.prior), jnp.eye(SITES), Event(event.y, event.mask, sd))


def case(name: str, *, budget: float, events: int, repeats: int) -> dict[str, Any]:
    """Train one encoder on the grid, and measure everything."""
    rate = 1e-2 if name == INFORMATION else 1e-3
    model, steps, seconds = train(build(name), on_the_grid, rate=rate, budget=budget)
    key = jax.random.key(SEEDS["events"])
    found = {}
    for fraction in FRACTIONS:
        _, held_out = on_the_grid(key, events, ContiguousGaps(fraction, max_gaps=3))
        found[f"{fraction:g}"] = divergence(model, exact_on_the_grid, held_out)
    _, many = on_the_grid(key, 1000)
    first = jax.tree.map(lambda leaf: leaf[:1], many)
    learned = eqx.filter(model, trainable(model))
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(learned)),
        "steps": steps,
        "step_s": seconds,
        "one_s": median_seconds(partial(forward, model, first), 4 * repeats, time.process_time),
        "thousand_s": median_seconds(partial(forward, model, many), repeats, time.process_time),
        "kl": found,
    }


def irregular(*, budget: float, events: int) -> dict[str, Any]:
    """The set encoder, trained and asked at times of each event's own."""
    model, steps, _ = train(build(SET), anywhere, rate=1e-3, budget=budget)
    key, rows = jax.random.key(SEEDS["events"]), []
    for number in NUMBERS:
        # All of one length, padded: one program.
        _, held_out = anywhere(key, events, max(NUMBERS), jnp.asarray(number))
        rows.append({"observations": number} | divergence(model, exact_anywhere, held_out))
    order = jax.random.permutation(jax.random.key(SEEDS["order"]), max(NUMBERS))
    again = jax.tree.map(lambda leaf: leaf[:, order], held_out)
    (mean, _), (moved, _) = forward(model, held_out), forward(model, again)
    sd = np.asarray(jax.jit(jax.vmap(lambda e: exact_anywhere(e).sd()))(held_out))
    return {
        "most": MOST,
        "budget_s": budget,
        "steps": steps,
        "numbers": rows,
        "shuffled": float(np.max(np.abs(np.asarray(moved) - np.asarray(mean)) / sd)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, print, write."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--budget", type=float, default=BUDGET, help="processor seconds of training")
    flags.add_argument("--case", choices=CASES, help="run this one and print it as a line")
    flags.add_argument("--cases", type=Path, metavar="FILE", help="lines of all cases, run before")
    args = flags.parse_args(argv)
    one_core()
    budget, events, repeats = (0.2, 8, 1) if args.quick else (args.budget, EVENTS, 10)

    def run(name: str) -> dict[str, Any]:
        if name == IRREGULAR:
            return irregular(budget=LONGER * budget, events=events)
        return case(name, budget=budget, events=events, repeats=repeats)

    if args.case is not None:
        print(json.dumps({args.case: run(args.case)}))
        return 0
    found: dict[str, Any] = {}
    if args.cases is not None:
        for line in args.cases.read_text(encoding="utf-8").splitlines():
            found |= json.loads(line)
    else:
        for name in (INFORMATION, IRREGULAR) if args.quick else CASES:
            found[name] = run(name)
            print(name, found[name], file=sys.stderr, flush=True)
    free = found.pop(IRREGULAR)
    print(
        table(
            ["encoder", "parameters", "steps", "step ms", "one ms", "1,000 ms"]
            + [f"KL at {fraction:g}" for fraction in FRACTIONS],
            [
                [name, row["parameters"], row["steps"]]
                + [f"{1e3 * row[which]:.2f}" for which in ("step_s", "one_s", "thousand_s")]
                + [f"{at['median']:.3g}" for at in row["kl"].values()]
                for name, row in found.items()
            ],
        )
    )
    print()
    print(
        table(
            ["observations", "KL", "prior's"],
            [
                [row["observations"], f"{row['median']:.3g}", f"{row['prior']:.3g}"]
                for row in free["numbers"]
            ],
        )
    )
    shown = [row for row in free["numbers"] if row["observations"] <= MOST]
    bars = [
        Bar.check(
            "information form: largest median KL at any fraction",
            max(at["median"] for at in found[INFORMATION]["kl"].values()),
            "<=",
            0.05,
        ),
        Bar.check(
            "set, irregular times: largest KL over that of the prior, as many as were shown",
            max(row["median"] / row["prior"] for row in shown),
            "<=",
            0.5,
        ),
        Bar.check("set: what another order moves, exact sd", free["shuffled"], "<=", 1e-3),
    ]
    results = {"budget_s": budget, "batch": BATCH, "encoders": found, "irregular": free}
    return finish(args, name="encoders", results=results, bars=bars, seeds=SEEDS)


if __name__ == "__main__":
    sys.exit(main())
