"""One run of the catalogue through a promoted bundle and its guard, in a process of its own.

python promoted_run.py BUNDLE DIRECTORY OUT DEVICES [PORT PROCESS PROCESSES]

With "alone" for the directory there is no catalogue: each event is answered by itself, by the
bundle's head, guard and solver, with the key that the catalogue promises it.

Where there is no bundle yet, it is made first: not by the test itself, whose functions are wrapped
to check types, which makes them other functions for the digest of the problem.
"""

import os
import sys

if __name__ == "__main__":
    bundle, directory, out, devices, *rest = sys.argv[1:]
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    # A batched factorisation waits, in the pool of threads, for its own parts. All devices of a
    # process share that pool, as large as there are cores, and with few of those all would wait.
    os.environ["NPROC"] = "16"

from pathlib import Path
from typing import Any

import _kit  # noqa: F401
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _kit.exact import exact_analysis
from _kit.heads import build_ou, load_ou_head, ou_problem

from amortlib.bundle import load_bundle, promote
from amortlib.calibration import run_gates
from amortlib.catalogue import Catalogue, Status, reprocess
from amortlib.deploy import GuardedHead, WarmStart
from amortlib.energy import Energy
from amortlib.guard import Guard, Trust, calibrate
from amortlib.laplace import laplace
from amortlib.solvers import IncrementalFourDVar
from amortlib.types import Array, Event, Key

EVENTS = 301
SEED = 17


def make_bundle(path: Path) -> None:
    """Judge the shipped head of a path, set its guard, promote both."""
    head, problem = load_ou_head()
    truths, events = problem.batch(jax.random.key(11), 60)
    report = run_gates(
        head,
        problem,
        events,
        np.asarray(truths),
        exact_analysis(problem, events),
        key=jax.random.key(12),
        importance_draws=99,
        batch=20,
        bins=10,
    )
    _, usual = problem.batch(jax.random.key(13), 500)
    energy = Energy(problem.prior, problem.forward)
    guard = calibrate(head, energy, usual, key=jax.random.key(14), rate=0.01)
    promote(path, head, problem, report, events=60, guard=guard)


def make_events() -> Event:
    """With gaps, outliers in one of ten, and two events that cannot be used."""
    _, events = ou_problem().batch(jax.random.key(15), EVENTS)
    y, mask, rng = np.array(events.y), np.array(events.mask), np.random.default_rng(16)
    struck = np.flatnonzero(rng.random(EVENTS) < 0.1)
    y[struck, rng.integers(0, y.shape[1], struck.size)] += 8.0
    y[[7, 200], 0], mask[[7, 200], 0] = np.nan, True
    return Event(jnp.asarray(y), jnp.asarray(mask), events.sd)


def solver() -> IncrementalFourDVar:
    problem = ou_problem()
    return IncrementalFourDVar(Energy(problem.prior, problem.forward))


def drawn(mode: Array, sd: Array, key: Key) -> Array:
    """By which an event's key can be told from any other: no mode and no width depends on it."""
    return mode + sd * jax.random.normal(key, mode.shape)


class Drawing(eqx.Module):
    """A guarded head's answer, and a draw."""

    inner: GuardedHead

    def __call__(self, event: Event, key: Key) -> dict[str, Array]:
        out = self.inner(event, key)
        return out | {"draw": drawn(out["mode"], out["sd"], key)}


def reprocessed(guard: Guard, directory: str | Path) -> Catalogue:
    """All of them through the bundle's head and guard, and the solver where they say so."""
    warm = WarmStart(solver())

    def fallback(events: Event, answers: dict[str, np.ndarray], keys: Key) -> dict[str, Any]:
        out = warm(events, answers, keys)
        mode, sd = jnp.asarray(out["mode"]), jnp.asarray(out["sd"])
        return out | {"draw": np.asarray(jax.vmap(drawn)(mode, sd, keys))}

    return reprocess(
        Drawing(GuardedHead(guard)),
        make_events(),
        directory,
        key=jax.random.key(SEED),
        fallback=fallback,
        block=8,
        chunk=64,
        progress=False,
    )


def one_by_one(guard: Guard) -> Catalogue:
    """The same, spelled out for one event at a time: event i has the key folded with i."""
    events, solve = make_events(), eqx.filter_jit(solver())

    @eqx.filter_jit
    def by_head(guard: Guard, event: Event, key: Key) -> Any:
        q, said = guard.posterior.tree(event), guard(event, key=key)
        around = laplace(guard.energy.tree, said.refined, event, full=False)
        return said.trust, (q.mode(), q.sd()), (said.refined, around.sd())

    rows, codes = [], []
    for i in range(EVENTS):
        event = jax.tree.map(lambda a, i=i: a[i], events)
        key = jax.random.fold_in(jax.random.key(SEED), i)
        trust, own, refined = by_head(guard, event, key)
        (mode, sd), status = own, Status.TRUSTED
        if np.isnan(event.y[event.mask]).any():
            mode, sd, status = jnp.zeros_like(mode), jnp.zeros_like(sd), Status.REFUSED
        elif trust == Trust.REFINE:
            (mode, sd), status = refined, Status.REFINED
        elif trust == Trust.SOLVE:
            found = solve(event, start=mode)
            mode, sd = found.mode, jnp.sqrt(jnp.diagonal(found.covariance))
            status = Status.SOLVED
        rows.append({"mode": mode, "sd": sd, "draw": drawn(mode, sd, key)})
        codes.append(status)
    return Catalogue(jax.tree.map(lambda *a: np.stack(a), *rows), np.array(codes, np.int8))


if __name__ == "__main__":
    if rest:
        port, process, processes = rest
        jax.distributed.initialize(
            f"127.0.0.1:{port}", num_processes=int(processes), process_id=int(process)
        )
    if not Path(bundle).exists():
        make_bundle(Path(bundle))
    guard = load_bundle(bundle, build_ou, ou_problem()).guard
    assert guard is not None
    found = one_by_one(guard) if directory == "alone" else reprocessed(guard, directory)
    np.savez(out, status=found.status, devices=jax.device_count(), **found.answers)
