"""Twin experiments on Lorenz-96 against the figures published with DAPPER.

DAPPER (Raanes et al., doi:10.5281/zenodo.2029296), mods/Lorenz96/sakov2008.py: 40 variables,
a state every 0.05, all of it seen each time with R = I, no noise in the model. Its comments give
the expected time average of the rmse of the analysis.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortlib.dynamics import Lorenz96
from amortlib.energy import Energy
from amortlib.gaussian import Gaussian
from amortlib.observation import Select
from amortlib.problems import Window, lorenz96_climatology
from amortlib.solvers import OptimalInterpolation, ThreeDVar
from amortlib.types import Event

pytestmark = pytest.mark.slow

RUNS, BURN_IN, CYCLES = 8, 400, 1000


def identity(x):
    return x


def rms(error):
    return jnp.sqrt(jnp.mean(error**2))


@pytest.fixture(scope="module")
def scores():
    """The rmse over the sites of each analysis, `(RUNS, CYCLES)` for each method, on one truth.

    As in DAPPER, what it averages in time starts after a burn-in of 20 time units; its optimal
    interpolation analyses every time afresh from the climatology and forgets; its 3DVar forecasts
    the last analysis, and has `xB` = 0.02 times the climatological covariance for its background.
    Two things differ: the climatology is that of the attractor, where DAPPER estimates it from
    the truth of the run at hand (one of 1,000 cycles is short for that: in a numpy copy it made
    0.45 of 3DVar's 0.41, and 10,000 cycles 0.413), and the model is integrated by Tsit5 and not
    by the classical Runge-Kutta method, at the same step.
    """
    clim = lorenz96_climatology()
    window = Window(Lorenz96(), Select(tuple(range(40))), dt=0.05, states=2, substeps=1)
    oi = OptimalInterpolation(Energy(clim, identity, 1.0))
    root = jnp.sqrt(0.02) * clim.chol
    seen = jnp.ones(40, bool)

    def cycle(carry, key):
        truth, analysis = (window.model(x) for x in carry)
        event = Event(truth + jax.random.normal(key, (40,)), seen)
        background = Gaussian(analysis, root)
        var = ThreeDVar(background, identity, 1.0)(event)
        direct = OptimalInterpolation(Energy(background, identity, 1.0))(event)
        errors = {
            "climatology": rms(clim.loc - truth),
            "oi": rms(oi(event).mode - truth),
            "3dvar": rms(var.mode - truth),
            "gap": jnp.max(jnp.abs(var.mode - direct.mode)),
        }
        return (truth, var.mode), errors

    def run(key):
        k_start, k_cycles = jax.random.split(key)
        # The first state of the truth is drawn about the place where 3DVar starts, as in DAPPER.
        place = jnp.eye(40)[0]
        truth = place + jnp.sqrt(1e-3) * jax.random.normal(k_start, (40,))
        _, errors = jax.lax.scan(
            cycle, (truth, place), jax.random.split(k_cycles, BURN_IN + CYCLES)
        )
        return jax.tree.map(lambda e: e[BURN_IN:], errors)

    errors = eqx.filter_jit(jax.vmap(run))(jax.random.split(jax.random.key(0), RUNS))
    return {name: np.asarray(e, float) for name, e in errors.items()}


def reproduces(errors, published, rounding):
    """Within the rounding of the figure and 3 standard errors of ours.

    Blocks are the runs, which are independent. Student's t with 7 degrees of freedom lies beyond
    3 with probability 0.02, less for what rounding adds; the runs are fixed. The figures have a
    sampling error of their own, unpublished, for which nothing is allowed.
    """
    runs = errors.mean(axis=1)
    se = runs.std(ddof=1) / np.sqrt(RUNS)
    assert se < rounding
    assert abs(runs.mean() - published) <= rounding + 3 * se, (runs.mean(), se)


def test_the_climatological_mean(scores):
    reproduces(scores["climatology"], 3.6, 0.05)


def test_optimal_interpolation(scores):
    reproduces(scores["oi"], 0.95, 0.005)


def test_cycled_3dvar(scores):
    reproduces(scores["3dvar"], 0.41, 0.005)


def test_cycled_3dvar_is_optimal_interpolation(scores):
    """From one background: H is affine, so the minimum is known in closed form."""
    assert scores["gap"].max() < 1e-3
