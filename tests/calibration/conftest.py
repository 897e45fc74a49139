"""A problem whose posterior is known, heads with planted faults, and the oracle in closed form."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _kit.exact import exact_analysis

from amortlib.gaussian import Gaussian, condition
from amortlib.problems import InverseProblem
from amortlib.solvers import OracleAnalysis
from amortlib.types import Array, Event
from benchmarks.gates import TIMES, path_problem


class Head(eqx.Module):
    """The exact posterior of the path, or one with a fault. Faults are arrays: one program."""

    problem: InverseProblem
    scale: Array
    shift: Array
    correlated: Array
    is_prior: Array
    jacobian: Array
    breaks: Array

    def __call__(self, event: Event) -> Gaussian:
        prior = self.problem.prior.to_gaussian()
        exact = condition(prior, jnp.eye(TIMES), event)
        # The value as it is, the derivative times a factor for each row.
        still = jax.lax.stop_gradient(exact.loc)
        loc = still + self.jacobian * (exact.loc - still) + self.shift * exact.sd()
        chol = jnp.where(self.correlated, exact.chol, jnp.diag(exact.sd())) * self.scale
        loc = jnp.where(self.is_prior, prior.loc, loc)
        chol = jnp.where(self.is_prior, prior.chol, chol)
        return Gaussian(jnp.where(self.breaks, jnp.nan, loc), chol)


def make_head(**fault: Any) -> Head:
    settings = {
        "scale": 1.0,
        "shift": np.zeros(TIMES),
        "correlated": True,
        "is_prior": False,
        "jacobian": np.ones(TIMES),
        "breaks": False,
    } | fault
    return Head(path_problem(), **{name: jnp.asarray(value) for name, value in settings.items()})


@pytest.fixture(scope="session")
def sample() -> tuple[InverseProblem, Event, np.ndarray, OracleAnalysis]:
    """1,000 events of the path, their truths, and the oracle's answers."""
    problem = path_problem()
    truths, events = problem.batch(jax.random.key(0), 1000)
    return problem, events, np.asarray(truths), exact_analysis(problem, events)
