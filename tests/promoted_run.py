"""One run of the catalogue through a promoted bundle and its guard, in a process of its own.

python promoted_run.py BUNDLE DIRECTORY OUT DEVICES [PORT PROCESS PROCESSES]

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

import _kit  # noqa: F401
import jax
import jax.numpy as jnp
import numpy as np
from _kit.exact import exact_analysis
from _kit.heads import build_ou, load_ou_head, ou_problem

from amortlib.bundle import load_bundle, promote
from amortlib.calibration import run_gates
from amortlib.catalogue import Catalogue, reprocess
from amortlib.deploy import GuardedHead, WarmStart
from amortlib.energy import Energy
from amortlib.guard import calibrate
from amortlib.solvers import IncrementalFourDVar
from amortlib.types import Event

EVENTS = 301


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


def reprocessed(bundle: str | Path, directory: str | Path) -> Catalogue:
    """All of them through the bundle's head and guard, and the solver where they say so."""
    problem = ou_problem()
    guard = load_bundle(bundle, build_ou, problem).guard
    assert guard is not None
    return reprocess(
        GuardedHead(guard),
        make_events(),
        directory,
        key=jax.random.key(17),
        fallback=WarmStart(IncrementalFourDVar(Energy(problem.prior, problem.forward))),
        block=8,
        chunk=64,
        progress=False,
    )


if __name__ == "__main__":
    if rest:
        port, process, processes = rest
        jax.distributed.initialize(
            f"127.0.0.1:{port}", num_processes=int(processes), process_id=int(process)
        )
    if not Path(bundle).exists():
        make_bundle(Path(bundle))
    found = reprocessed(bundle, directory)
    np.savez(out, status=found.status, devices=jax.device_count(), **found.answers)
