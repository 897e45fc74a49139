"""A chapter on a machine with one core: nothing waits for ever."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

GATES = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import _kit
import jax, numpy as np
from _kit.exact import exact_analysis
from amortlib import run_gates
from amortlib.posterior import regression_posterior
from amortlib.problems import ornstein_uhlenbeck

problem = ornstein_uhlenbeck(8, noise=0.3)
model = regression_posterior("information", key=jax.random.key(0), prior=problem.prior)
truths, events = problem.batch(jax.random.key(1), 60)
report = run_gates(
    model, problem, events, truths, exact_analysis(problem, events),
    key=jax.random.key(2), draws=49, bins=10, importance_draws=60, batch=50,
)
print(report.events)
"""


@pytest.mark.slow
def test_the_gates_run_on_one_core() -> None:
    """Without the kit's pool of two threads this hangs; it takes a quarter of a minute else."""
    run = subprocess.run(
        [sys.executable, "-c", GATES],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "NPROC"}
        | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'book'}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "60"
