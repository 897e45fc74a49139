"""A problem whose posterior is known, heads with planted faults, and the oracle in closed form."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortlib.energy import Energy
from amortlib.gaussian import Gaussian, condition
from amortlib.problems import InverseProblem
from amortlib.solvers import OracleAnalysis
from amortlib.types import Array, Event, to_double
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


def closed_form(problem: InverseProblem, events: Event) -> OracleAnalysis:
    """What an oracle would say of events of a linear problem with an identity for H."""
    with jax.enable_x64(True):
        prior, events = to_double((problem.prior, events))
        energy = Energy(prior, problem.forward)
        n, d = events.y.shape

        @jax.jit
        @jax.vmap
        def one(event):
            exact = condition(prior, jnp.eye(d), event)
            gain = exact.covariance() * jnp.where(event.mask, event.sd**-2, 0.0)
            return exact.loc, exact.covariance(), gain, energy(exact.loc, event)

        mode, covariance, gain, value = jax.tree.map(np.asarray, one(events))
    return OracleAnalysis(
        mode=mode,
        energy=value,
        covariance=covariance,
        gauss_newton_covariance=covariance,
        jacobian=gain,
        gain=gain,
        gradient_norm=np.zeros(n),
        converged=np.ones(n, bool),
        hits=np.full(n, 3),
        minima=np.ones(n, int),
        rise=np.full(n, np.inf),
        unseen=np.zeros(n),
        sure=np.ones(n, bool),
        starts=np.full(n, 3),
        ends=mode[:, None],
        end_energy=value[:, None],
        distinct=np.ones((n, 1), bool),
    )


@pytest.fixture(scope="session")
def sample() -> tuple[InverseProblem, Event, np.ndarray, OracleAnalysis]:
    """1,000 events of the path, their truths, and the oracle's answers."""
    problem = path_problem()
    truths, events = problem.batch(jax.random.key(0), 1000)
    return problem, events, np.asarray(truths), closed_form(problem, events)
