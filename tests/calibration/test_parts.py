"""Each gate's own arithmetic, against what is known of it."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from amortlib.calibration import (
    ALPHA,
    Products,
    bin_counts,
    coverage_curve,
    curve_band,
    density_rank,
    fingerprint,
    holm,
    importance_figures,
    jacobian_error,
    mode_distance,
    mode_products,
    norm_bounds,
    oracle_products,
    pareto_khat,
    prior_pit,
    probe_adjoint,
    problem_fingerprint,
    rank,
    tarp_rank,
    uniform_p,
    uniformity_p,
)
from amortlib.energy import Energy
from amortlib.gaussian import Gaussian
from amortlib.laplace import gain, mode_jacobian
from amortlib.observation import GaussianNoise, gap
from amortlib.posterior import regression_posterior
from amortlib.problems import ornstein_uhlenbeck
from amortlib.types import Event, to_double

KEY = jax.random.key(7)


# --- ranks and their histogram -------------------------------------------------------------------


def test_ranks_of_one_more_draw_are_uniform_ties_and_all() -> None:
    """A statistic of three values, one of one value, one that is continuous. The chi-square of
    20,000 ranks is above its 99.99% quantile once in 10,000 seeds, for each."""
    draws = jax.random.normal(KEY, (20_000, 10))
    for statistic in (lambda x: x, jnp.sign, lambda x: 0.0 * x, lambda x: jnp.round(x)):
        values = statistic(draws)
        keys = jax.random.split(jax.random.key(1), 20_000)
        ranks = jax.vmap(lambda v, k: rank(v[0], v[1:], key=k))(values, keys)
        assert ranks.min() == 0
        assert ranks.max() == 9
        p = scipy.stats.chisquare(np.bincount(np.asarray(ranks), minlength=10)).pvalue
        assert p > 1e-4


def test_the_p_value_is_that_of_scipy_and_bins_have_to_divide() -> None:
    ranks = jax.random.randint(KEY, (3, 500), 0, 100)
    counts = bin_counts(ranks, 99, 20)
    assert counts.shape == (3, 20)
    want = [scipy.stats.chisquare(row).pvalue for row in np.asarray(counts)]
    np.testing.assert_allclose(uniformity_p(counts), want, rtol=1e-4)
    u = jax.random.uniform(KEY, (500,))
    want = scipy.stats.chisquare(np.histogram(u, 10, (0, 1))[0]).pvalue
    np.testing.assert_allclose(uniform_p(u, 10), want, rtol=1e-4)
    assert uniform_p(jnp.ones(10), 5) < 1e-6  # one itself falls into the last bin
    with pytest.raises(ValueError, match="bins that divide the 100 possible ranks"):
        bin_counts(ranks, 99, 30)


def test_the_gate_cries_wolf_no_more_often_than_it_says() -> None:
    """2,000 repetitions of 5 uniform statistics over 1,000 events: the share with a smallest
    adjusted p of at most 1% is within four standard errors of 1% or below (1 in 30,000), and not
    zero, which would be a test that never speaks."""

    @jax.jit
    def smallest(key):
        ranks = jax.random.randint(key, (5, 1000), 0, 100)
        return jnp.min(uniformity_p(bin_counts(ranks, 99, 10)))

    p = np.asarray(jax.lax.map(smallest, jax.random.split(KEY, 2000)))
    share = np.mean(5 * p <= ALPHA)
    assert 0 < share < ALPHA + 4 * np.sqrt(ALPHA * (1 - ALPHA) / 2000)


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm(np.array([0.01, 0.4, 0.02])), [0.03, 0.4, 0.04])
    np.testing.assert_allclose(holm(np.array([0.9, 0.8])), [1.0, 1.0])
    # Never decreasing along the order of the p-values.
    np.testing.assert_allclose(holm(np.array([0.3, 0.2, 0.25])), [0.6, 0.6, 0.6])


# --- agreement and adjoint -----------------------------------------------------------------------


def test_mode_distance_by_hand() -> None:
    covariance = jnp.diag(jnp.array([4.0, 0.25]))
    found = mode_distance(jnp.array([1.0, 1.0]), jnp.array([0.0, 1.2]), covariance)
    np.testing.assert_allclose(found, 0.5, rtol=1e-6)


def test_the_jacobian_error_is_a_ratio_of_singular_values_over_observed_entries() -> None:
    rng = np.random.default_rng(0)
    got, want = jnp.asarray(rng.normal(size=(2, 3, 4, 2)))
    mask = jnp.asarray(rng.random((4, 2)) < 0.6)
    seen = np.asarray(mask).reshape(-1)

    def largest(a):
        return np.linalg.svd(np.asarray(a).reshape(3, 8)[:, seen], compute_uv=False)[0]

    found = jacobian_error(got, want, mask)
    np.testing.assert_allclose(found, largest(got - want) / largest(want), rtol=1e-5)
    np.testing.assert_allclose(jacobian_error(1.1 * want, want, mask), 0.1, rtol=1e-4)
    nothing = jnp.zeros((4, 2), bool)
    assert jacobian_error(got, want, nothing) == 0.0
    assert jacobian_error(got, 0.0 * want, mask) == jnp.inf
    assert jnp.isnan(jacobian_error(got * jnp.nan, want, mask))
    assert jnp.isnan(jacobian_error(got, 0.0 * want * jnp.nan, mask))


def _products(a):
    return Products(lambda v: a @ v, lambda u: a.T @ u)


def test_probing_brackets_the_norm_as_often_as_it_says(x64: None) -> None:
    """2,000 matrices and directions. `lower` is never above the norm; `upper` is below it in at
    most the stated share: with one step and one direction, where a 20% chance is asked for, the
    share has a standard error of 0.9%, and five of them are let pass."""
    keys = jax.random.split(KEY, 2000)

    def one(key, **settings):
        k_matrix, k_probe = jax.random.split(key)
        # One direction stands out and is hard to hit: what the bound is made for.
        a = 0.01 * jax.random.normal(k_matrix, (6, 30))
        a = a.at[0, 0].add(1.0)
        found = norm_bounds(_products(a), jnp.zeros(30), key=k_probe, **settings)
        return found.lower, jnp.linalg.norm(a, 2), found.upper

    lower, norm, upper = jax.vmap(lambda k: one(k, iterations=1, probes=1, failure=0.2))(keys)
    assert (lower <= norm * (1 + 1e-12)).all()
    missed = float(jnp.mean(upper < norm))
    assert 0.02 < missed < 0.2 + 5 * np.sqrt(0.2 * 0.8 / 2000)
    lower, norm, upper = jax.vmap(lambda k: one(k, iterations=20, probes=4, failure=1e-3))(keys)
    assert (lower <= norm * (1 + 1e-12)).all()
    assert (upper >= norm).mean() > 0.995
    # The stated width: (0.8 sqrt(30) / 0.001^(1/4))^(1/40).
    assert float(jnp.max(upper / lower)) < 1.001 * (0.8 * 30**0.5 / 0.001**0.25) ** (1 / 40)
    with pytest.raises(ValueError, match="iterations >= 1"):
        norm_bounds(_products(jnp.eye(2)), jnp.zeros(2), key=KEY, iterations=0)


def test_products_and_the_probed_error_are_those_of_the_matrices(x64: None) -> None:
    """A forward model that bends, with a gap: the curvature of the model counts."""
    d, t = 5, 8
    mix = jax.random.normal(jax.random.key(2), (t, d))
    prior = Gaussian.from_covariance(jnp.zeros(d), jnp.eye(d) + 0.5)
    energy = Energy(prior, lambda x: jnp.tanh(mix @ x) + 0.1 * (mix @ x) ** 2)
    truth = prior.sample(1, key=jax.random.key(3))[0]
    y = energy.forward(truth) + 0.2 * jax.random.normal(jax.random.key(4), (t,))
    mask = gap(t, 2, 3)
    event = Event(y, mask, jnp.full(t, 0.2))
    want = eqx.filter_jit(mode_jacobian)(energy, truth, event)
    gauss_newton = eqx.filter_jit(gain)(energy, truth, event)
    assert jacobian_error(gauss_newton, want, mask) > 0.05  # the problem is no linear one
    wrong = 1.02 * want

    def head(event):  # off by 2%, and by a bit more
        y = event.values
        return wrong @ y + 0.001 * jnp.tanh(y[0])

    oracle = oracle_products(energy, truth, event)
    v, u = jax.random.normal(KEY, (t,)), jax.random.normal(KEY, (d,))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)
    close(jax.jit(oracle.forward)(v), want @ v)
    close(jax.jit(oracle.transpose)(u), want.T @ u)
    jacobian = jax.jacfwd(lambda y: head(Event(y, mask, event.sd)))(event.y)
    seen = mode_products(head, event)
    close(seen.forward(v), jacobian @ v)
    close(seen.transpose(u), jacobian.T @ u)

    probe = jax.jit(lambda key: probe_adjoint(head, energy, truth, event, key=key))
    found = probe(KEY)
    exact = float(jacobian_error(jacobian, want, mask))
    assert found.lower <= exact <= found.upper
    assert found.upper < 0.05  # tight enough to give a verdict
    assert found.lower > 0.5 * exact


def test_products_are_of_a_head_that_reads_the_times_too(x64: None) -> None:
    when, mask = jnp.array([0.5, 1.0, 2.0]), jnp.array([True, False, True])
    event = Event(jnp.zeros(3), mask, None, when)
    seen = mode_products(lambda e: jnp.sum(e.values * e.when)[None], event)
    np.testing.assert_allclose(seen.transpose(jnp.ones(1)), [0.5, 0.0, 2.0])
    np.testing.assert_allclose(seen.forward(jnp.ones(3)), [2.5])


# --- importance weights --------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_khat_finds_a_known_tail(k: float, x64: None) -> None:
    """Weights u^-k have a generalised Pareto tail of shape k exactly. Over 400 samples of 2,000
    the mean of k-hat is the shape, drawn to 0.5 by ten parts in 145, to four standard errors and
    the 0.02 that the estimator of Zhang and Stephens is biased by at most with 135 in the tail."""
    log_w = -k * jnp.log(jax.random.uniform(KEY, (400, 2000)))
    found = np.asarray(jax.jit(jax.vmap(pareto_khat))(log_w))
    tail = 135
    want = (tail * k + 10 * 0.5) / (tail + 10)
    error = found.std() / np.sqrt(400)
    assert abs(found.mean() - want) < 4 * error + 0.02
    # Against the maximum of the likelihood on the same tail, before it is drawn to 0.5.
    one = np.sort(np.exp(np.asarray(log_w[0])))
    shape, _, _ = scipy.stats.genpareto.fit(one[-tail:] - one[-tail - 1], floc=0)
    undone = (found[0] * (tail + 10) - 5) / tail
    assert abs(undone - shape) < 0.05


@pytest.mark.parametrize("scale", [3e-4, 1e-3, 1e-2, 1.0])
def test_khat_of_weights_that_are_nearly_equal_is_a_number(scale: float) -> None:
    """In single precision, of a head that is all but exact; on a lattice the fit divides by zero
    unless it is told not to."""
    z = jax.random.normal(jax.random.key(7), (2000, 100))
    khat = jax.jit(jax.vmap(pareto_khat))
    assert jnp.isfinite(khat(scale * jnp.round(2 * z) / 2)).all()
    found = khat(scale * z)
    assert jnp.isfinite(found).all()
    # The logarithms are normal: no power tail at all, and less of one the smaller the scale.
    assert jnp.median(found) < 0.5


def test_khat_where_there_is_no_tail_or_no_sample() -> None:
    assert pareto_khat(jnp.full(100, 3.0)) == 0.0
    assert jnp.isfinite(pareto_khat(jnp.arange(100.0)))  # one weight is everything
    assert pareto_khat(jnp.arange(100.0)) > 0.7
    shifted = jax.random.normal(KEY, (300,))
    np.testing.assert_allclose(pareto_khat(shifted), pareto_khat(shifted + 80.0), atol=1e-3)
    with pytest.raises(ValueError, match="at least 25 weights"):
        pareto_khat(jnp.zeros(24))


def test_kl_and_effective_size_of_two_gaussians(x64: None) -> None:
    """p of half the standard deviation of q: bounded weights, and both are known. One sample of
    200,000 against four standard errors (1 in 16,000 each), from 50 parts of it."""
    s = 0.5
    x = jax.random.normal(KEY, (50, 4000))
    log_w = -0.5 * (x / s) ** 2 + 0.5 * x**2
    found = jax.jit(jax.vmap(importance_figures))(log_w)
    kl = -np.log(s) + 0.5 * (s**2 - 1)
    ess = s * np.sqrt(2 - s**2)
    for values, want in ((found.kl, kl), (found.ess, ess)):
        error = float(jnp.std(values)) / np.sqrt(50)
        assert abs(float(jnp.mean(values)) - want) < 4 * error + 2e-3
    same = importance_figures(jnp.full(100, -7.0))
    np.testing.assert_allclose([same.kl, same.ess, same.khat], [0.0, 1.0, 0.0], atol=1e-12)
    dead = importance_figures(jnp.where(jnp.arange(100) < 50, -jnp.inf, 0.0))
    np.testing.assert_allclose([dead.kl, dead.ess], [np.log(2), 0.5], rtol=1e-9)


# --- coverage and its kin ------------------------------------------------------------------------


@eqx.filter_jit
def coverage_ranks(scale: float, sees_data: bool, prior_only: bool):
    """TARP and density ranks of 4,000 events of two numbers, y = x + noise, noise sd 1."""

    def one(key):
        k_x, k_y, k_draw, k_point, k_tie = jax.random.split(key, 5)
        x = jax.random.normal(k_x, (2,))
        y = x + jax.random.normal(k_y, (2,))
        mean, sd = (jnp.zeros(2), 1.0) if prior_only else (y / 2, scale * 0.5**0.5)
        draws = mean + sd * jax.random.normal(k_draw, (99, 2))
        point = (y / 2 if sees_data else 0.0) + 2.0 * jax.random.normal(k_point, (2,))

        def log_q(x):
            return -0.5 * jnp.sum(((x - mean) / sd) ** 2)

        return (
            tarp_rank(x, draws, point, key=k_tie),
            density_rank(log_q(x), jax.vmap(log_q)(draws), key=k_tie),
        )

    return jax.vmap(one)(jax.random.split(KEY, 4000))


def p_of(ranks) -> float:
    return float(uniformity_p(bin_counts(ranks, 99, 10)))


def test_tarp_and_coverage_pass_the_exact_and_catch_the_overconfident() -> None:
    """The exact one is called faulty once in 1,000 seeds."""
    exact, narrow = coverage_ranks(1.0, True, False), coverage_ranks(0.8, True, False)
    assert min(map(p_of, exact)) > 1e-3
    assert max(map(p_of, narrow)) < 1e-6
    levels = np.array([0.1, 0.29, 0.5, 0.9])
    band = curve_band(4000, 1e-3)
    assert np.abs(coverage_curve(np.asarray(exact[1]), 99, levels) - levels).max() < band
    under = coverage_curve(np.asarray(narrow[1]), 99, levels)
    # Two dimensions: the region that q calls 50% has 1 - 0.5^(0.8^2) of the probability.
    np.testing.assert_allclose(under[2], 1 - 0.5 ** (0.8**2), atol=band + 0.01)
    np.testing.assert_allclose(coverage_curve(np.arange(100), 99, levels), levels)


def test_only_points_that_know_the_data_tell_the_prior_from_the_posterior() -> None:
    blind, density = coverage_ranks(1.0, False, True)
    assert p_of(blind) > 1e-3
    assert p_of(density) > 1e-3
    assert p_of(coverage_ranks(1.0, True, True)[0]) < 1e-6


def test_draws_of_the_prior_look_like_it_and_others_do_not() -> None:
    """Three components and the radius; the smallest of four p-values, once in 2,500 seeds."""
    prior = Gaussian.from_covariance(
        jnp.array([1.0, -2.0, 0.0]), jnp.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.5]])
    )
    x = prior.sample(2000, key=KEY)

    @jax.jit
    def p(x):
        return uniform_p(jax.vmap(lambda x: prior_pit(prior, x, prior.sd()))(x).T, 10)

    assert p(x).min() > 1e-4
    shuffled = x.at[:, 0].set(x[::-1, 0])  # the margins stay, the correlation is gone
    assert p(shuffled)[:3].min() > 1e-4
    assert p(shuffled)[3] < 1e-3
    assert p(x + 0.3).min() < 1e-6


# --- digests -------------------------------------------------------------------------------------


def test_a_fingerprint_knows_weights_settings_and_functions() -> None:
    problem = ornstein_uhlenbeck(8)

    def made(seed, **sizes):
        return regression_posterior(
            "cholesky", key=jax.random.key(seed), prior=problem.prior, width=8, **sizes
        )

    head = made(0)
    assert fingerprint(head) == fingerprint(made(0))
    moved = eqx.tree_at(lambda h: h.head.linear.bias, head, head.head.linear.bias + 1e-6)
    changed = {fingerprint(other) for other in (made(1), made(0, depth=3), moved)}
    assert len(changed) == 3
    assert fingerprint(head) not in changed
    with jax.enable_x64(True):
        assert fingerprint(to_double(head)) == fingerprint(head)

    energy = Energy(problem.prior, problem.forward)
    own = problem_fingerprint(energy, problem.obs_noise)
    assert own == problem_fingerprint(energy, ornstein_uhlenbeck(8).obs_noise)

    def scaled(by):
        return lambda x: by * x

    others = [
        (Energy(problem.prior, lambda x: x**2), problem.obs_noise),
        (Energy(problem.prior, scaled(1.0)), problem.obs_noise),
        (Energy(problem.prior, scaled(2.0)), problem.obs_noise),
        (energy, GaussianNoise(0.4)),
        (Energy(ornstein_uhlenbeck(8, timescale=7.0).prior, problem.forward), problem.obs_noise),
        (Energy(problem.prior, problem.forward, 0.3), problem.obs_noise),
    ]
    assert len({own, *(problem_fingerprint(*other) for other in others)}) == 7
    assert fingerprint(jax.nn.gelu) != fingerprint(jax.nn.relu)
