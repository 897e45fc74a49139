"""The Lorenz problems: their climatologies, their symmetry, and the prior that they draw from."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortlib.dynamics import Lorenz63, Lorenz96, climatology
from amortlib.energy import Energy
from amortlib.problems import (
    SignLost,
    lorenz63,
    lorenz63_climatology,
    lorenz63_model_error,
    lorenz63_sign_lost,
    lorenz96,
    lorenz96_climatology,
)
from amortlib.types import Event

pytestmark = pytest.mark.slow

MIRROR = np.array([-1.0, -1.0, 1.0])

# --- climatologies ----------------------------------------------------------------------------


def fresh(dynamics, start, *, runs, **kwargs):
    """States of independent runs, `(runs, n, d)`, started from the Gaussian and spun up."""
    x0 = start.sample(runs, key=jax.random.key(7))
    run = jax.jit(jax.vmap(lambda x: climatology(dynamics, x, spin_up=20.0, **kwargs)[1]))
    return np.asarray(run(x0), float)


def compare(per_run, stored, digit):
    """Means over independent runs against what is stored, which is rounded to one standard error.

    Two errors: that of this test, from the scatter of the 16 runs, and that of the constants, one
    unit of the last digit. Beyond 5 of the first plus 2 of the second; Student's t with 15
    degrees of freedom lies beyond 5 with probability 1.6e-4, which bounds each comparison.
    """
    se = per_run.std(axis=0, ddof=1) / np.sqrt(len(per_run))
    off = np.abs(per_run.mean(axis=0) - stored)
    assert np.all(off <= 5 * se + 2 * digit), (off, se)
    return se


def test_the_climatology_of_lorenz63_is_that_of_a_fresh_run():
    """9 comparisons, false alarm below 1.5e-3 in all; the runs are fixed."""
    stored = lorenz63_climatology()
    states = fresh(Lorenz63(), stored, runs=16, every=0.5, n=400, dt=0.01)
    se = compare(states.mean(axis=1), np.asarray(stored.loc), 0.01)
    assert se.max() < 0.3  # sharp beside a standard deviation of 8
    anomalies = states - np.asarray(stored.loc)
    products = anomalies[..., :, None] * anomalies[..., None, :]
    se = compare(products.mean(axis=1), np.asarray(stored.covariance()), 0.1)
    assert se.max() < 2.0  # beside 60 to 80


def test_the_climatology_of_lorenz96_is_that_of_a_fresh_run():
    """The mean and every lag, means over sites; 22 comparisons, false alarm below 4e-3 in all."""
    stored = lorenz96_climatology()
    states = fresh(Lorenz96(), stored, runs=16, every=0.5, n=400, dt=0.05)
    se = compare(states.mean(axis=(1, 2)), 2.34, 0.01)
    assert se < 0.02
    anomalies = states - np.asarray(stored.loc)
    lags = np.stack(
        [(anomalies * np.roll(anomalies, lag, -1)).mean(axis=(1, 2)) for lag in range(21)], axis=1
    )
    cov = np.asarray(stored.covariance())
    se = compare(lags[:, :12], cov[0, :12], 0.01)
    assert se.max() < 0.1
    # What is taken as zero is small beside the variance of 13.25.
    np.testing.assert_array_equal(cov[0, 12:21], 0.0)
    assert np.abs(lags[:, 12:].mean(axis=0)).max() < 0.2


def test_energy_balances_of_the_stored_constants():
    """d/dt of the mean of z, and of the mean of x^2 / 2 twice over, vanish on an attractor.

    Tolerances are those of rounding to the last digit given.
    """
    clim = lorenz63_climatology()
    cov, z = np.asarray(clim.covariance(), float), float(clim.loc[2])
    assert abs(cov[0, 0] - cov[0, 1]) <= 0.1
    assert abs(cov[0, 1] - 8.0 / 3.0 * z) <= 0.05 + 8.0 / 3.0 * 0.005
    np.testing.assert_array_equal(clim.loc[:2], 0.0)
    np.testing.assert_allclose(cov[:2, 2], 0.0, atol=1e-6)

    clim = lorenz96_climatology()
    mean, variance = float(clim.loc[0]), float(clim.covariance()[0, 0])
    assert abs(variance + mean**2 - 8.0 * mean) <= 0.005 + 0.005 * abs(2 * mean - 8.0)


@pytest.mark.parametrize("n", [24, 25, 40])
def test_the_lorenz96_climatology_is_the_same_at_every_site(n):
    clim = lorenz96_climatology(n)
    cov = np.asarray(clim.covariance())
    assert np.all(np.isfinite(cov))
    for shift in (1, n // 2):
        np.testing.assert_allclose(np.roll(cov, (shift, shift), (0, 1)), cov, atol=1e-4)
    assert cov[0, 0] == pytest.approx(13.25, rel=1e-5)
    assert cov[0, 2] == pytest.approx(-4.79, rel=1e-5)
    assert cov[0, n - 2] == pytest.approx(-4.79, rel=1e-5)


def test_too_few_sites_are_refused():
    with pytest.raises(ValueError, match="expected at least 24 sites, got 23"):
        lorenz96_climatology(23)
    with pytest.raises(ValueError, match="expected at least 24 sites, got 12"):
        lorenz96(12)


# --- the vector field -------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 7])
def test_lorenz96_is_the_equation_site_by_site(x64, n):
    x = np.random.default_rng(n).normal(size=n)
    want = np.empty(n)
    for i in range(n):
        want[i] = (x[(i + 1) % n] - x[(i - 2) % n]) * x[(i - 1) % n] - x[i] + 5.0
    got = Lorenz96(forcing=5.0).vector_field(0.0, jnp.asarray(x), None)
    np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-14)
    rest = Lorenz96().vector_field(0.0, jnp.full(n, 8.0), None)
    np.testing.assert_array_equal(rest, 0.0)


# --- the problems -----------------------------------------------------------------------------

PROBLEMS = pytest.mark.parametrize(
    ("make", "state", "seen"),
    [
        (lorenz63, 3, (5, 2)),
        (lorenz63_model_error, 30, (5, 2)),
        (lorenz63_sign_lost, 3, (5, 2)),
        (lorenz96, 40, (5, 40)),
    ],
    ids=["lorenz63", "model error", "sign lost", "lorenz96"],
)


@PROBLEMS
def test_a_problem_has_its_shapes_and_passes_its_check(make, state, seen):
    problem = make()
    assert problem.shapes() == ((state,), seen)
    problem.check(jax.random.key(0), n=16)


@PROBLEMS
def test_what_is_simulated_has_the_density_of_the_cost(make, state, seen):
    """At the truth, twice each part of J is a sum of squares of standard normal numbers.

    With d of them in a draw, the mean over N draws of half their sum is d / 2, with a standard
    error of sqrt(d / 2 / N); for the part of the observations d is the number observed. Tolerance
    5 standard errors, beyond which a chi-square of 12,000 or more degrees of freedom lies with
    probability 1e-6, eight comparisons, and 1e-3 for single precision.
    """
    n = 4000

    @eqx.filter_jit
    def parts(problem, key):
        x, event = problem.batch(key, n)
        terms = jax.vmap(Energy(problem.prior, problem.forward).terms)(x, event)
        return terms.background, terms.observation, event.mask.sum((1, 2))

    background, observation, observed = (
        np.asarray(part, float) for part in parts(make(), jax.random.key(1))
    )
    assert 0 < observed.mean() < np.prod(seen)
    for part, d in ((background, state), (observation, observed.mean())):
        assert abs(part.mean() - d / 2) <= 5 * np.sqrt(d / 2 / n) + 1e-3 * d / 2


def test_the_arguments_reach_the_problem():
    window = lorenz63(states=7, dt=0.1, substeps=3, noise=0.25).forward
    assert (window.states, window.substeps, float(window.dt)) == (7, 3, pytest.approx(0.1))
    problem = lorenz96(24, states=3, noise=2.0, every=3)
    assert problem.shapes() == ((24,), (3, 8))
    np.testing.assert_array_equal(problem.obs_noise.sd, 2.0)
    q = lorenz63_model_error(states=3, model_error_sd=np.array([0.1, 0.2, 0.3])).prior
    sd = np.sqrt(np.diagonal(q.covariance()))[3:]
    np.testing.assert_allclose(sd, [0.1, 0.2, 0.3] * 2, rtol=1e-5)


# --- the sign that is lost --------------------------------------------------------------------


def test_sign_lost_sees_squares_after_the_first_time():
    states = np.random.default_rng(0).normal(size=(7, 3)) * 8.0
    got = np.asarray(SignLost(stride=3, unit=4.0)(jnp.asarray(states, jnp.float32)))
    want = [[states[0, 0], states[0, 2]]]
    want += [[states[t, 0] ** 2 / 4.0, states[t, 2]] for t in (3, 6)]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_mirrored_states_look_the_same_after_the_first_time():
    """(x, y, z) -> (-x, -y, z) leaves the model alone, and changes one observation."""
    problem = lorenz63_sign_lost()
    x = np.asarray(problem.prior.sample(8, key=jax.random.key(2)))
    seen = eqx.filter_jit(eqx.filter_vmap(problem.forward))
    here, there = np.asarray(seen(jnp.asarray(x))), np.asarray(seen(jnp.asarray(x * MIRROR)))
    assert np.all(here[:, 0, 0] != 0.0)
    np.testing.assert_array_equal(there[:, 0, 0], -here[:, 0, 0])
    np.testing.assert_allclose(there[:, 0, 1], here[:, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(there[:, 1:], here[:, 1:], rtol=1e-4, atol=1e-4)


def test_the_cost_is_symmetric_only_where_the_first_time_is_missed():
    problem = lorenz63_sign_lost()
    x, event = problem.simulate(jax.random.key(3))
    other = jnp.asarray(np.asarray(x) * MIRROR)

    @eqx.filter_jit
    def gap(energy, first):
        mask = jnp.ones_like(event.mask).at[0].set(first)
        one = Event(event.y, mask, event.sd)
        return energy(x, one), energy(other, one)

    energy = Energy(problem.prior, problem.forward)
    here, there = gap(energy, jnp.asarray(False))
    assert float(there) == pytest.approx(float(here), rel=1e-4)
    here, there = gap(energy, jnp.asarray(True))
    # The two first observations differ by 2 |x|, in units of a noise of 0.5.
    y, a = float(event.y[0, 0]), float(x[0])
    want = 0.5 * ((y + a) ** 2 - (y - a) ** 2) / 0.25
    assert abs(want) > 1.0
    assert float(there - here) == pytest.approx(want, rel=1e-3)
