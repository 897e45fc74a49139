"""Cost and accuracy of every head as the state grows: an Ornstein-Uhlenbeck path with gaps.

    python -m benchmarks.scale [--json FILE] [--quick] [--case HEAD SITES] [--budget SECONDS]

Each case, a head at a number D of sites, runs in a process of its own, so that the peak of its
memory is its own. There the head is trained for a budget of core seconds. What is measured is the
time of a training step on 16 events, that of 100 draws for one event, and KL(exact || head) in
nats on fresh events with gaps throughout. The exact posterior is Markov, and so its draws and its
log-density cost O(D) at every D; for heads without a closed form the divergence is an average of
log p - log q over exact draws, whose standard error stands beside it. The score head's log q is
that of its flow ODE, with one Hutchinson probe a draw: unbiased, and part of that error.

Flow and score work in the prior's whitened coordinates. There the posterior is as far from N(0, I)
as it is in any: what they have to learn is every correlation that the observations make.

A case that would not fit the memory allowed is not left out in silence: the table says so.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from amortlib.gaussian import GaussMarkov, kl
from amortlib.heads import InformationHead
from amortlib.heads.score import ScoreDistribution
from amortlib.objectives import dsm, nll
from amortlib.observation import ContiguousGaps
from amortlib.posterior import (
    AmortizedPosterior,
    flow_posterior,
    regression_posterior,
    score_posterior,
)
from amortlib.problems import InverseProblem, ornstein_uhlenbeck
from amortlib.training import trainable
from amortlib.types import Array, Event, Key, PyTree, to_double
from benchmarks.report import Bar, finish, parser, table

SITES = (32, 128, 512, 2048, 8192)
HEADS = (
    "information",
    "information, trained at 32",
    "cholesky",
    "diagonal",
    "flow",
    "score",
)
NOISE, EVENTS, DRAWS, BATCH, BUDGET = 0.3, 8, 32, 16, 10.0
SEEDS = {"weights": 0, "training": 1, "events": 2, "draws": 3}
LIMIT = 4.0
"""Gigabytes. A case whose weights, their gradient and Adam's two averages need more is not run."""


def problem_of(sites: int) -> InverseProblem:
    """Half of the path on average is missed, in up to sites / 16 contiguous gaps."""
    gaps = ContiguousGaps(0.0, 1.0, max_gaps=max(3, sites // 16))
    return ornstein_uhlenbeck(sites, noise=NOISE, gaps=gaps)


def exact(problem: InverseProblem, event: Event) -> GaussMarkov:
    """The posterior of a path seen at its own sites, in O(D): each observation adds 1 / sd^2."""
    prior = problem.prior
    assert isinstance(prior, GaussMarkov)
    diag, lower = prior.precision_blocks()
    weight = jnp.where(event.mask, NOISE**-2, 0.0)
    diag = diag + weight[:, None, None]
    push = weight * (event.values - prior.loc)
    shifted = GaussMarkov.from_information(push, diag, lower)
    return GaussMarkov(prior.loc + shifted.loc, shifted.diag, shifted.off)


def build(head: str, problem: InverseProblem) -> AmortizedPosterior:
    """An untrained posterior."""
    prior, key = problem.prior, jax.random.key(SEEDS["weights"])
    assert isinstance(prior, GaussMarkov)
    sites = prior.loc.size
    if head == "information":
        return regression_posterior("information", key=key, prior=prior)
    if head == "flow":
        return flow_posterior(
            "prior", key=key, prior=prior, obs_shape=(sites,), kind="coupling", knots=4, points=2
        )
    if head == "score":
        # draws=1: the other heads see each pair once a step too.
        return score_posterior(key=key, prior=prior, obs_shape=(sites,), components=0, draws=1)
    return regression_posterior(head, key=key, prior=prior)


def train(
    head: str, problem: InverseProblem, *, budget: float
) -> tuple[AmortizedPosterior, int, float]:
    """Train until the budget of core seconds is spent; returns steps, and seconds a step, warm."""
    model = build(head, problem)
    params, static = eqx.partition(model, trainable(model))
    rate = 1e-2 if head == "information" else 1e-3
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    objective = dsm if head == "score" else nll

    @eqx.filter_jit(donate="all-except-first")
    def step(key: Key, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        k_batch, k_loss = jax.random.split(key)
        batch = problem.batch(k_batch, BATCH)
        grads = jax.grad(lambda p: objective(eqx.combine(p, static), batch, k_loss))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    key = jax.random.key(SEEDS["training"])
    params = jax.tree.map(jnp.array, params)
    state = optimizer.init(params)
    params, state = jax.block_until_ready(step(jax.random.fold_in(key, 0), params, state))
    start, times = time.process_time(), []
    while time.process_time() - start < budget:
        before = time.process_time()
        k_step = jax.random.fold_in(key, 1 + len(times))
        params, state = jax.block_until_ready(step(k_step, params, state))
        times.append(time.process_time() - before)
    return eqx.combine(params, static), len(times), float(np.median(times))


def divergence(
    model: AmortizedPosterior, problem: InverseProblem, events: Event
) -> tuple[np.ndarray, np.ndarray]:
    """KL(exact || head) of each event, and its standard error, 0 where it is in closed form."""

    @eqx.filter_jit
    def closed(model: AmortizedPosterior, event: Event) -> Array:
        q = model(event)
        assert isinstance(q, GaussMarkov)
        return kl(exact(problem, event), q)

    @eqx.filter_jit
    def sampled(model: AmortizedPosterior, event: Event, key: Key) -> tuple[Array, Array]:
        p, q = exact(problem, event), model(event)
        k_draws, k_probe = jax.random.split(key)
        x = p.sample(DRAWS, key=k_draws)

        def log_q(x: Array, key: Key) -> Array:
            if isinstance(q, ScoreDistribution):
                return q.log_prob_estimate(x, key=key)
            return q.log_prob(x)

        keys = jax.random.split(k_probe, DRAWS)
        off = jax.lax.map(lambda at: p.log_prob(at[0]) - log_q(*at), (x, keys))
        return off.mean(), off.std() / jnp.sqrt(DRAWS)

    values, errors = [], []
    for i in range(EVENTS):
        event = jax.tree.map(lambda leaf, i=i: leaf[i], events)
        if isinstance(eqx.filter_eval_shape(model, event), GaussMarkov):
            value, error = closed(model, event), 0.0
        else:
            k_draws = jax.random.fold_in(jax.random.key(SEEDS["draws"]), i)
            value, error = sampled(model, event, k_draws)
        values.append(float(value))
        errors.append(float(error))
    return np.array(values), np.array(errors)


def case(head: str, sites: int, *, budget: float) -> dict[str, Any]:
    """Everything of one head at one size, in this process."""
    problem = problem_of(sites)
    row: dict[str, Any] = {"head": head, "sites": sites}
    if head == "cholesky":
        # Weights into D (D + 3) / 2 numbers from 128 features, five copies in single precision.
        need = 5 * 4 * 129 * sites * (sites + 3) / 2 / 1e9
        if need > LIMIT:
            return row | {"ran": False, "why": f"its last layer takes {need:.0f} GB to train"}
    _, events = problem.batch(jax.random.key(SEEDS["events"]), EVENTS)
    jax.block_until_ready(events)
    if head == "information, trained at 32":
        model, steps, seconds = train("information", problem_of(32), budget=budget)
        assert isinstance(model.head, InformationHead)
        assert isinstance(problem.prior, GaussMarkov)
        model = eqx.tree_at(lambda m: m.head, model, model.head.with_prior(problem.prior))
    else:
        model, steps, seconds = train(head, problem, budget=budget)
    draw = eqx.filter_jit(lambda model, event, key: model.sample(event, 100, key=key))
    event, times = jax.tree.map(lambda leaf: leaf[0], events), []
    for i in range(6):
        before = time.process_time()
        jax.block_until_ready(draw(model, event, jax.random.key(i)))
        times.append(time.process_time() - before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    with jax.enable_x64(True):
        model, problem, events = to_double((model, problem, events))
        values, errors = divergence(model, problem, events)
        of_prior = jax.jit(jax.vmap(lambda e: kl(exact(problem, e), problem.prior)))
        from_prior = float(of_prior(events).mean())
    count = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, trainable(model))))
    return row | {
        "ran": True,
        "steps": steps,
        "step_s": seconds,
        "draw_s": float(np.median(times[1:])),
        "peak_gb": peak,
        "parameters": int(count),
        "kl": float(values.mean()),
        "kl_error": float(np.sqrt((errors**2).sum()) / EVENTS),
        "kl_worst": float(values.max()),
        "kl_of_prior": from_prior,
    }


def bars(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """That the information form is linear in D, in time and memory, and stays accurate."""
    at = {(row["head"], row["sites"]): row for row in rows if row["ran"]}
    sizes = sorted(sites for head, sites in at if head == "information")
    if len(sizes) < 2 or ("information, trained at 32", sizes[-1]) not in at:
        raise RuntimeError(f"expected the information form to run at two sizes, got {sizes}")
    low, high = at["information", sizes[-2]], at["information", sizes[-1]]
    ratio = sizes[-1] / sizes[-2]
    moved = at["information, trained at 32", sizes[-1]]
    label = f"information form, D = {sizes[-1]}:"
    return [
        Bar.check(
            f"{label} step time over that at D = {sizes[-2]}",
            high["step_s"] / low["step_s"],
            "<=",
            1.5 * ratio,
        ),
        Bar.check(f"{label} peak memory, GB", high["peak_gb"], "<=", 1.0),
        Bar.check(
            f"{label} trained at 32, KL over that of the prior",
            moved["kl"] / moved["kl_of_prior"],
            "<=",
            0.01,
        ),
    ]


def run(sites: Sequence[int], heads: Sequence[str], *, budget: float) -> list[dict[str, Any]]:
    """Every case in a process of its own; one that dies is a row that says so."""
    rows = []
    for size in sites:
        for head in heads:
            command = [sys.executable, "-m", "benchmarks.scale", "--case", head, str(size)]
            command += ["--budget", str(budget)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                rows.append(json.loads(done.stdout.splitlines()[-1]))
            else:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                why = f"ended with status {done.returncode}: {last}"
                rows.append({"head": head, "sites": size, "ran": False, "why": why})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--case", nargs=2, metavar=("HEAD", "SITES"), help="one case, in here")
    flags.add_argument("--budget", type=float, default=BUDGET, help="core seconds of training")
    args = flags.parse_args(argv)
    if args.case is not None:
        print(json.dumps(case(args.case[0], int(args.case[1]), budget=args.budget)))
        return 0
    rows = run((16, 32) if args.quick else SITES, HEADS, budget=0.2 if args.quick else args.budget)
    print(
        table(
            ["head", "D", "parameters", "steps", "step ms", "100 draws ms", "GB", "KL", "prior's"],
            [
                [
                    row["head"],
                    row["sites"],
                    row["parameters"],
                    row["steps"],
                    f"{1e3 * row['step_s']:.1f}",
                    f"{1e3 * row['draw_s']:.1f}",
                    f"{row['peak_gb']:.2f}",
                    f"{row['kl']:.3f}",
                    f"{row['kl_of_prior']:.0f}",
                ]
                if row["ran"]
                else [row["head"], row["sites"], row["why"], *[""] * 6]
                for row in rows
            ],
        )
    )
    return finish(args, name="scale", results=rows, bars=bars(rows), seeds=SEEDS)


if __name__ == "__main__":
    sys.exit(main())
