"""From a full minimisation for each event to one forward pass: all methods, the same events.

Used by `benchmarks.ladder`, which prints the table.
"""

from __future__ import annotations

import time
from collections.abc import Callable

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


def methods(
    energy: Energy, network: FourDVarNetwork, head: AmortizedPosterior
) -> dict[str, Callable[[Event], Answer]]:
    """One event in, (x_0, covariance, outer steps, inner steps) out, by the name of the method."""
    window, prior = energy.forward, energy.prior
    assert isinstance(window, Window)
    d = prior.loc.size
    none = jnp.asarray(0)

    def of(solver: Callable, event: Event) -> Answer:
        found = solver(event, throw=False)
        return found.mode[:d], found.covariance[:d, :d], found.outer_steps, found.inner_steps

    first = ThreeDVar(prior, lambda x: x[:2])
    weak = WeakFourDVar(prior, window, MODEL_ERROR_SD)
    tight = optx.BFGS(1e-8, 1e-8)
    return {
        "OI": lambda e: of(OptimalInterpolation(energy), e),
        "3DVar": lambda e: of(first, Event(e.y[0], e.mask[0], e.sd[0])),
        "weak 4DVar": lambda e: of(weak, e),
        "strong 4DVar": lambda e: of(StrongFourDVar(energy, minimiser=tight), e),
        "incremental 4DVar": lambda e: of(
            IncrementalFourDVar(energy, 5e-5, damping=1.0, quasi_static=2), e
        ),
        "4DVarNet": lambda e: of(FourDVarNet(energy, network), e),
        "amortized head": lambda e: (head.mode(e), head.covariance(e), none, none),
    }


def _median(run: Callable, argument: Event, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(argument))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def spectrum_rows(
    network: FourDVarNetwork, head: AmortizedPosterior, *, events: int, repeats: int
) -> list[dict[str, float | str]]:
    """Every method on the same held-out windows; `one` and `many` are seconds for an event.

    The oracle chooses its own batches, so it has no time for a single event.

    Args:
        network: a trained 4DVarNet.
        head: a trained head.
        events: in the large batch.
        repeats: of each timing, of which the median counts.
    """
    problem = lorenz63()
    truth, batch = problem.batch(jax.random.key(SEEDS["spectrum"]), events)
    oracle, key = Oracle(Energy(problem.prior, problem.forward)), jax.random.key(SEEDS["oracle"])
    oracle(batch, key=key)
    start = time.perf_counter()
    found = oracle(batch, key=key)
    rows = [
        _accuracy("multi-start 4DVar", truth, found.mode, found.gauss_newton_covariance)
        | {"many": (time.perf_counter() - start) / events, "starts": float(found.starts.mean())}
    ]
    with jax.enable_x64(True):
        energy, batch, network, head = to_double(
            (Energy(problem.prior, problem.forward), batch, network, head)
        )
        single = jax.tree.map(lambda a: a[0], batch)
        for name, method in methods(energy, network, head).items():
            one, many = eqx.filter_jit(method), eqx.filter_jit(eqx.filter_vmap(method))
            mode, covariance, outer, inner = jax.block_until_ready(many(batch))
            jax.block_until_ready(one(single))
            rows.append(
                _accuracy(name, truth, mode, covariance)
                | {
                    "one": _median(one, single, 10 * repeats),
                    "many": _median(many, batch, repeats) / events,
                    "outer": float(np.mean(outer)),
                    "inner": float(np.mean(inner)),
                }
            )
    return rows


def _accuracy(name: str, truth: ArrayLike, mode: ArrayLike, covariance: ArrayLike) -> dict:
    error = np.asarray(mode) - np.asarray(truth)
    variance = np.trace(np.asarray(covariance), axis1=1, axis2=2) / error.shape[1]
    return {
        "method": name,
        "rmse": float(np.sqrt(np.mean(error**2))),
        "median_error": float(np.median(np.sqrt(np.mean(error**2, axis=1)))),
        "spread": float(np.sqrt(np.mean(variance))),
    }
