"""From a full minimisation for each event to one forward pass: all methods, the same events.

Used by `benchmarks.ladder`, which prints the table.

A batch is timed in two ways. *At once*: one mapped program over all events. Its loops run until
the slowest event is done, so every event pays for the worst one, and what a large control saves
for its derivatives no longer fits into the caches. *In chunks* of `CHUNK` events, one chunk after
the other in one compiled program: an event waits for the slowest of its chunk only. A method
without iterations gains little by chunks; the weak constraint gains most.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
from numpy.typing import ArrayLike

from amortlib.energy import Energy
from amortlib.objectives import nll
from amortlib.posterior import AmortizedPosterior, regression_posterior
from amortlib.problems import Window, lorenz63
from amortlib.solvers import (
    FourDVarNet,
    FourDVarNetwork,
    IncrementalFourDVar,
    OptimalInterpolation,
    Oracle,
    StrongFourDVar,
    ThreeDVar,
    WeakFourDVar,
)
from amortlib.training import fit
from amortlib.types import Array, Event, to_double

Answer = tuple[Array, Array, Array, Array]
"""x_0, its covariance, outer steps, inner steps."""

CHUNK = 50
"""Events that a chunk of the batch holds."""
ENOUGH_SECONDS = 15.0
"""A timing is repeated no more once it has taken so long."""
MODEL_ERROR_SD = 0.1
SEEDS = {"spectrum": 21, "oracle": 22, "head": 23, "head training": 24}


def train_head(steps: int) -> tuple[AmortizedPosterior, float]:
    """A Gaussian head with a full covariance on a plain encoder, and the seconds it took."""
    problem = lorenz63()
    prior = problem.prior
    assert prior is not None
    head = regression_posterior(
        "cholesky",
        key=jax.random.key(SEEDS["head"]),
        prior=prior,
        obs_shape=problem.shapes()[1],
        width=128,
        depth=3,
        features=128,
    )
    schedule = optax.cosine_decay_schedule(3e-3, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-3)
    )
    start = time.perf_counter()
    result = fit(
        head,
        nll,
        lambda key: problem.batch(key, 256),
        key=jax.random.key(SEEDS["head training"]),
        steps=steps,
        optimizer=optimizer,
        progress=False,
    )
    return result.model, time.perf_counter() - start


class Method(NamedTuple):
    """How one method answers one event, and what an event costs it.

    Attributes:
        run: one event in, (x_0, covariance, outer steps, inner steps) out.
        work: what is done for an event, in words; a model run is one forecast over the window.
        trained: seconds that were spent once, before the first event.
    """

    run: Callable[[Event], Answer]
    work: str
    trained: float = 0.0


def methods(
    energy: Energy,
    network: FourDVarNetwork,
    head: AmortizedPosterior,
    *,
    network_seconds: float,
    head_seconds: float,
) -> dict[str, Method]:
    """The methods by their names, from no iteration over many to none."""
    window, prior = energy.forward, energy.prior
    assert isinstance(window, Window)
    d = prior.loc.size
    none = jnp.asarray(0)

    def of(solver: Callable, event: Event) -> Answer:
        found = solver(event, throw=False)
        return found.mode[:d], found.covariance[:d, :d], found.outer_steps, found.inner_steps

    first = ThreeDVar(prior, lambda x: x[:2])
    # On the whole control, x_0 and the model errors, a quasi-Newton method needs the same number
    # of steps and a longer adjoint for each: incremental 4DVar takes any J.
    whole = WeakFourDVar(prior, window, MODEL_ERROR_SD).energy
    weak = IncrementalFourDVar(whole, 5e-5, damping=1.0, quasi_static=2, matrix=True)
    strong = StrongFourDVar(energy, minimiser=optx.BFGS(1e-8, 1e-8))
    incremental = IncrementalFourDVar(energy, 5e-5, damping=1.0, quasi_static=2)
    net = FourDVarNet(energy, network)
    return {
        "OI": Method(lambda e: of(OptimalInterpolation(energy), e), "1 linear model, 1 solve"),
        "3DVar": Method(
            lambda e: of(first, Event(e.y[0], e.mask[0], e.sd[0])), "no model, a step an outer"
        ),
        "weak 4DVar": Method(lambda e: of(weak, e), "a linear model of 30 controls an outer"),
        "strong 4DVar": Method(lambda e: of(strong, e), "a model and its adjoint an outer"),
        "incremental 4DVar": Method(
            lambda e: of(incremental, e), "a linear model of 3 controls an outer"
        ),
        "4DVarNet": Method(
            lambda e: of(net, e), "a gradient of U and a cell an outer", network_seconds
        ),
        "amortized head": Method(
            lambda e: (head.mode(e), head.covariance(e), none, none),
            "1 pass of a network",
            head_seconds,
        ),
    }


def _median(run: Callable, argument: Event, repeats: int) -> tuple[float, int]:
    """Median seconds, and of how many runs."""
    times: list[float] = []
    while len(times) < repeats and sum(times) < ENOUGH_SECONDS:
        start = time.perf_counter()
        jax.block_until_ready(run(argument))
        times.append(time.perf_counter() - start)
    return float(np.median(times)), len(times)


def spectrum_rows(
    network: FourDVarNetwork,
    head: AmortizedPosterior,
    *,
    events: int,
    repeats: int,
    network_seconds: float,
    head_seconds: float,
) -> list[dict[str, float | str]]:
    """Every method on the same held-out windows.

    Of the times `one`, `many` and `chunks` are seconds for an event: alone, in a batch at once,
    and in the same batch chunk by chunk. The oracle makes batches of its own, and has one figure
    for both. `idle` is the share of the steps of a batch at once that are run for events which
    had ended before, from the numbers of outer steps.

    Args:
        network: a trained 4DVarNet.
        head: a trained head.
        events: in the large batch.
        repeats: of each timing at most, of which the median counts.
        network_seconds: that training the network took.
        head_seconds: that training the head took.
    """
    problem = lorenz63()
    truth, batch = problem.batch(jax.random.key(SEEDS["spectrum"]), events)
    single = jax.tree.map(lambda a: a[0], batch)
    oracle, key = Oracle(Energy(problem.prior, problem.forward)), jax.random.key(SEEDS["oracle"])
    alone = jax.tree.map(lambda a: a[:1], batch)
    found = oracle(batch, key=key)
    oracle(alone, key=key)
    one, _ = _median(lambda e: oracle(e, key=key).mode, alone, repeats)
    many, count = _median(lambda e: oracle(e, key=key).mode, batch, repeats)
    rows = [
        _accuracy("multi-start 4DVar", truth, found.mode, found.gauss_newton_covariance)
        | {
            "work": f"incremental from {found.starts.mean():.0f} starts",
            "one": one,
            "many": many / events,
            "chunks": many / events,
            "repeats": count,
            "starts": float(found.starts.mean()),
            "trained": 0.0,
        }
    ]
    with jax.enable_x64(True):
        energy, batch, single, network, head = to_double(
            (Energy(problem.prior, problem.forward), batch, single, network, head)
        )
        ladder = methods(
            energy, network, head, network_seconds=network_seconds, head_seconds=head_seconds
        )
        for name, method in ladder.items():
            one = eqx.filter_jit(method.run)
            many = eqx.filter_jit(eqx.filter_vmap(method.run))
            chunks = eqx.filter_jit(lambda e, run=method.run: jax.lax.map(run, e, batch_size=CHUNK))
            if events <= CHUNK:  # a batch of one chunk: the same program
                chunks = many
            mode, covariance, outer, inner = jax.block_until_ready(many(batch))
            jax.block_until_ready((one(single), chunks(batch)))
            alone, _ = _median(one, single, 10 * repeats)
            at_once, count = _median(many, batch, repeats)
            in_chunks, _ = _median(chunks, batch, repeats)
            steps = np.asarray(outer)
            rows.append(
                _accuracy(name, truth, mode, covariance)
                | {
                    "work": method.work,
                    "one": alone,
                    "many": at_once / events,
                    "chunks": in_chunks / events,
                    "repeats": count,
                    "outer": float(steps.mean()),
                    "inner": float(np.mean(inner)),
                    "idle": float(1 - steps.mean() / max(1, steps.max())) if steps.max() else 0.0,
                    "trained": method.trained,
                }
            )
    return rows


def _accuracy(name: str, truth: ArrayLike, mode: ArrayLike, covariance: ArrayLike) -> dict:
    error = np.asarray(mode) - np.asarray(truth)
    variance = np.trace(np.asarray(covariance), axis1=1, axis2=2) / error.shape[1]
    return {
        "method": name,
        "events": len(error),
        "rmse": float(np.sqrt(np.mean(error**2))),
        "median_error": float(np.median(np.sqrt(np.mean(error**2, axis=1)))),
        "spread": float(np.sqrt(np.mean(variance))),
    }
