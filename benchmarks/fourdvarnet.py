"""Train the 4DVarNet that pages load, and record what it reaches.

    python -m benchmarks.fourdvarnet [--json FILE] [--quick]

Writes `book/weights/lorenz63_fourdvarnet.safetensors`; a quick run trains for a moment and writes
nothing. The learned solver stands against plain gradient steps: on the cost that it was trained
with, and on J, each with the fixed step size that is best on other events. It is trained on
contiguous gaps alone. It is judged on fresh events with such gaps, and on entries missing at
random, a pattern that it has never seen.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from amortlib.energy import Energy
from amortlib.export import build_and_load, read_settings, save
from amortlib.observation import AbstractGaps, ContiguousGaps, Dropouts
from amortlib.problems import Window, lorenz63
from amortlib.solvers import (
    FourDVarNet,
    FourDVarNetwork,
    fourdvar_network,
    reconstruction,
    trajectories,
)
from amortlib.training import fit
from amortlib.types import Array, Event
from benchmarks.report import Bar, arguments, finish, table

FILE = Path(__file__).parent.parent / "book" / "weights" / "lorenz63_fourdvarnet.safetensors"
SEEDS = {"weights": 0, "training": 1, "validation": 2, "held out": 31, "step size": 32}
STEPS, BATCH, RATE = 12000, 256, 3e-3
SIZES = {"steps": 10, "width": 64, "memory": 96}
PLAIN_STEPS = 15
STEP_SIZES = np.logspace(-5, 0.5, 23)
PATTERNS: dict[str, AbstractGaps] = {
    "contiguous gaps": ContiguousGaps(0.0, 0.8),
    "entries at random": Dropouts(0.0, 0.8),
}
LARGEST_FILE = 500_000


def load() -> FourDVarNetwork:
    """The shipped network.

    Raises:
        amortlib.CheckpointError: where the file is missing or damaged.
    """
    key = jax.random.key(SEEDS["weights"])
    return build_and_load(
        FILE, lambda sizes, record: fourdvar_network(lorenz63(), key=key, **sizes)
    )


def training_seconds() -> float:
    """How long the shipped network was trained, as its file records it."""
    return float(read_settings(FILE)["record"]["seconds"])


def train(*, steps: int, batch: int = BATCH) -> tuple[FourDVarNetwork, float]:
    """Train on fresh windows; the network that was best on a validation batch, and the seconds."""
    problem = lorenz63()
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, min(100, steps // 2), steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-4)
    )
    start = time.perf_counter()
    result = fit(
        fourdvar_network(problem, key=jax.random.key(SEEDS["weights"]), **SIZES),
        reconstruction,
        trajectories(problem, batch),
        key=jax.random.key(SEEDS["training"]),
        steps=steps,
        optimizer=optimizer,
        validation=trajectories(problem, 2048)(jax.random.key(SEEDS["validation"])),
        every=max(1, steps // 20),
        progress=False,
    )
    return result.model, time.perf_counter() - start


def held_out(gaps: AbstractGaps, events: int, seed: int) -> tuple[Array, Event]:
    """True trajectories and events."""
    return trajectories(lorenz63(gaps=gaps), events)(jax.random.key(seed))


def rmse(found: Array, truth: Array) -> float:
    """Over all states of all windows and their components, in the units of the states."""
    return float(jnp.sqrt(jnp.mean((found - truth) ** 2)))


def plain_steps(
    gradient: Callable[[Array, Event], Array],
    to_states: Callable[[Array], Array],
    size: int,
    pairs: tuple[Array, Event],
    other: tuple[Array, Event],
) -> tuple[float, float]:
    """RMSE after `PLAIN_STEPS` steps from zero, and the step size that is best on `other`."""

    @eqx.filter_jit
    def run(events: Event, rate: Array) -> Array:
        def one(event):
            start = jnp.zeros(size)
            end = jax.lax.fori_loop(
                0, PLAIN_STEPS, lambda _, u: u - rate * gradient(u, event), start
            )
            return to_states(end)

        return jax.vmap(one)(events)

    scores = [rmse(run(other[1], jnp.asarray(rate)), other[0]) for rate in STEP_SIZES]
    best = float(STEP_SIZES[int(np.nanargmin(scores))])
    return rmse(run(pairs[1], jnp.asarray(best)), pairs[0]), best


def measure(
    network: FourDVarNetwork, gaps: AbstractGaps, *, events: int, seed: int = SEEDS["held out"]
) -> dict[str, float]:
    """RMSE of the network and of plain gradient steps on U and on J, on the same events.

    The first with its sampling error: one standard error, by the delta method from the spread of
    the squared error over windows.
    """
    problem = lorenz63(gaps=gaps)
    window, prior = problem.forward, problem.prior
    assert isinstance(window, Window)
    assert prior is not None
    energy = Energy(prior, window)
    pairs, other = (held_out(gaps, n, s) for n, s in ((events, seed), (512, SEEDS["step size"])))
    solver = FourDVarNet(energy, network)
    found = eqx.filter_jit(lambda e: jax.vmap(solver.trajectory)(e))(pairs[1])
    on_u, rate_u = plain_steps(
        jax.grad(network.cost),
        network.to_states,
        network.to_control(pairs[0][0]).size,
        pairs,
        other,
    )
    on_j, rate_j = plain_steps(
        jax.grad(lambda v, event: energy(prior.colour(v), event)),
        lambda v: window.trajectory(prior.colour(v)),
        prior.loc.size,
        pairs,
        other,
    )
    squared = np.asarray(jnp.mean((found - pairs[0]) ** 2, axis=(1, 2)))
    of_mean = float(squared.std() / np.sqrt(events))
    return {
        "fourdvarnet": rmse(found, pairs[0]),
        "fourdvarnet_error": of_mean / (2 * rmse(found, pairs[0])),
        "plain_on_its_cost": on_u,
        "plain_on_j": on_j,
        "step_size_on_its_cost": rate_u,
        "step_size_on_j": rate_j,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, save."""
    args = arguments(__doc__.splitlines()[0], argv)
    steps = 20 if args.quick else STEPS
    network, seconds = train(steps=steps, batch=16 if args.quick else BATCH)
    metrics = {
        name: measure(network, gaps, events=64 if args.quick else 4096)
        for name, gaps in PATTERNS.items()
    }
    print(f"trained in {seconds:.0f} s, {steps} steps")
    rows = [
        [name, *(f"{m[k]:.3f}" for k in ("fourdvarnet", "plain_on_its_cost", "plain_on_j"))]
        for name, m in metrics.items()
    ]
    head = [
        "missing",
        f"RMSE, 4DVarNet, {SIZES['steps']} steps",
        f"{PLAIN_STEPS} plain on U",
        f"{PLAIN_STEPS} plain on J",
    ]
    print(table(head, rows))
    bars = [
        Bar.check(f"{name}: RMSE over that of {label}", m["fourdvarnet"] / m[key], "<=", 1.0)
        for name, m in metrics.items()
        for key, label in (("plain_on_its_cost", "plain on U"), ("plain_on_j", "plain on J"))
    ]
    if not args.quick and all(bar.holds for bar in bars):
        record = {
            "steps": steps,
            "batch": BATCH,
            "rate": RATE,
            "seconds": round(seconds),
            "seeds": SEEDS,
            "metrics": metrics,
        }
        save(FILE, network, settings={"sizes": SIZES, "record": record})
        print(f"wrote {FILE.relative_to(FILE.parent.parent.parent)}, {FILE.stat().st_size} bytes")
        bars.append(Bar.check("bytes of the file", FILE.stat().st_size, "<=", LARGEST_FILE))
    return finish(args, name="fourdvarnet", results=metrics, bars=bars, seeds=SEEDS)


if __name__ == "__main__":
    sys.exit(main())
