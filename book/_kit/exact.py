"""The oracle's answers where they are known in closed form: a path of which every value is seen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from amortlib.energy import Energy
from amortlib.gaussian import condition
from amortlib.problems import InverseProblem
from amortlib.solvers import OracleAnalysis
from amortlib.types import Event, to_double


def exact_analysis(problem: InverseProblem, events: Event) -> OracleAnalysis:
    """What an oracle finds where J is a parabola: one minimum, and its covariance and Jacobian.

    Args:
        problem: a problem with a Gaussian prior whose observation t sees component t.
        events: with a leading axis.
    """
    with jax.enable_x64(True):
        prior, events = to_double((problem.prior, events))
        energy = Energy(prior, problem.forward)
        n, d = events.y.shape

        @jax.jit
        def run(events):
            def one(event):
                exact = condition(prior, jnp.eye(d), event)
                gain = exact.covariance() * jnp.where(event.mask, event.error_sd**-2, 0.0)
                return exact.loc, exact.covariance(), gain, energy(exact.loc, event)

            return jax.lax.map(one, events)

        mode, covariance, gain, value = jax.tree.map(np.asarray, run(events))
    one = np.ones(n, int)
    return OracleAnalysis(
        mode=mode,
        energy=value,
        covariance=covariance,
        gauss_newton_covariance=covariance,
        jacobian=gain,
        gain=gain,
        gradient_norm=np.zeros(n),
        converged=one > 0,
        hits=one,
        minima=one,
        rise=np.full(n, np.inf),
        unseen=np.zeros(n),
        sure=one > 0,
        starts=one,
        ends=mode[:, None],
        end_energy=value[:, None],
        distinct=one[:, None] > 0,
    )
