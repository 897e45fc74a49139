"""Gaussian densities against scipy, dense algebra and each other; conditioning against Kalman."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from amortlib.gaussian import Gaussian, GaussMarkov, condition, kalman_smoother, kl
from amortlib.types import Event, as_event

RNG = np.random.default_rng(0)
CASES = [(1, 1), (6, 1), (4, 2), (3, 3)]  # sites, components a site


def banded(sites: int, block: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A mean and a well-conditioned block-tridiagonal precision, dense, from a random factor."""
    rng = np.random.default_rng(seed)
    d = sites * block
    low = np.zeros((d, d))
    for i in range(sites):
        own = slice(i * block, (i + 1) * block)
        low[own, own] = np.tril(0.4 * rng.normal(size=(block, block)), -1)
        low[own, own] += np.diag(rng.uniform(0.7, 1.5, block))
        if i:
            low[own, (i - 1) * block : i * block] = 0.5 * rng.normal(size=(block, block))
    return rng.normal(size=d), low @ low.T


def blocks(matrix: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Diagonal blocks, and those below them."""
    n = matrix.shape[0] // block
    cut = matrix.reshape(n, block, n, block)
    i = np.arange(n)
    return cut[i, :, i, :], cut[i[1:], :, i[:-1], :]


def markov(sites: int, block: int, seed: int = 0) -> tuple[GaussMarkov, np.ndarray, np.ndarray]:
    """The density under test, its mean and its dense precision."""
    mean, prec = banded(sites, block, seed)
    diag, lower = blocks(prec, block)
    density = FROM_PRECISION(jnp.asarray(mean), jnp.asarray(diag), jnp.asarray(lower))
    return density, mean, prec


FROM_PRECISION = jax.jit(GaussMarkov.from_precision)
KL = jax.jit(kl)
CONDITION = jax.jit(condition)
KALMAN = jax.jit(kalman_smoother)


def dense(d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, d))
    return rng.normal(size=d), root @ root.T + 0.5 * np.eye(d)


# --- dense ------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("form", ["covariance", "precision"])
def test_dense_density_is_that_of_scipy(x64, d, form):
    mean, cov = dense(d)
    if form == "covariance":
        density = Gaussian.from_covariance(jnp.asarray(mean), jnp.asarray(cov))
    else:
        prec = np.linalg.inv(cov)
        density = Gaussian.from_precision(jnp.asarray(mean), jnp.asarray(0.5 * (prec + prec.T)))
    reference = scipy.stats.multivariate_normal(mean, cov)
    points = RNG.normal(size=(4, d))
    np.testing.assert_allclose(
        jax.vmap(density.log_prob)(jnp.asarray(points)), reference.logpdf(points), rtol=1e-10
    )
    step = points[0] - mean
    np.testing.assert_allclose(
        density.mahalanobis(jnp.asarray(points[0])), step @ np.linalg.solve(cov, step), rtol=1e-10
    )
    np.testing.assert_allclose(density.covariance(), cov, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(density.precision(), np.linalg.inv(cov), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(density.sd(), np.sqrt(np.diag(cov)), rtol=1e-10)
    np.testing.assert_allclose(density.entropy(), reference.entropy(), rtol=1e-10)
    np.testing.assert_array_equal(density.mode(), mean)
    np.testing.assert_array_equal(density.mean(), mean)
    assert np.all(np.triu(np.asarray(density.chol), 1) == 0)
    assert np.all(np.diag(np.asarray(density.chol)) > 0)


def check_moments(draws: np.ndarray, mean: np.ndarray, cov: np.ndarray, z: float) -> None:
    """Sample mean and covariance within z standard errors, entry by entry.

    The standard error of mean_i is sqrt(C_ii / N), and of the sample covariance of i and j
    sqrt((C_ii C_jj + C_ij^2) / N) (Isserlis). With z = 5 each entry false-alarms with
    probability 6e-7; below, some 200 entries in all are looked at: 1e-4 for the lot, and the keys
    are fixed.
    """
    n = len(draws)
    var = np.diag(cov)
    assert np.all(np.abs(draws.mean(0) - mean) <= z * np.sqrt(var / n))
    error = np.sqrt((np.outer(var, var) + cov**2) / n)
    assert np.all(np.abs(np.cov(draws.T).reshape(cov.shape) - cov) <= z * error)


def test_dense_draws_have_the_moments():
    mean, cov = dense(3)
    density = Gaussian.from_covariance(jnp.asarray(mean, jnp.float32), jnp.asarray(cov, "f4"))
    check_moments(np.asarray(density.sample(20_000, key=jax.random.key(0))), mean, cov, 5.0)


# --- Markov -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("sites", "block"), CASES)
def test_markov_is_the_dense_density(x64, sites, block):
    density, mean, prec = markov(sites, block)
    cov = np.linalg.inv(prec)
    reference = scipy.stats.multivariate_normal(mean, cov)
    points = mean + RNG.normal(size=(3, mean.size))
    assert density.shape == (sites, block)

    @jax.jit
    def everything(density, points):
        return {
            "log_prob": jax.vmap(density.log_prob)(points),
            "covariance": density.covariance(),
            "dense": density.to_gaussian().covariance(),
            "sd": density.sd(),
            "information": density.information(),
            "log_det": density.half_log_det_precision(),
            "entropy": density.entropy(),
            "precision_blocks": density.precision_blocks(),
            "covariance_blocks": density.covariance_blocks(),
        }

    want = {
        "log_prob": reference.logpdf(points),
        "covariance": cov,
        "dense": cov,
        "sd": np.sqrt(np.diag(cov)),
        "information": prec @ mean,
        "log_det": 0.5 * np.linalg.slogdet(prec)[1],
        "entropy": reference.entropy(),
        "precision_blocks": blocks(prec, block),
        "covariance_blocks": blocks(cov, block),
    }
    got = everything(density, jnp.asarray(points))
    for name, expected in want.items():
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10, err_msg=name)


@pytest.mark.parametrize(("sites", "block"), CASES)
def test_every_way_to_make_a_markov_density_gives_the_same(x64, sites, block):
    density, mean, prec = markov(sites, block)
    diag, lower = (jnp.asarray(part) for part in blocks(prec, block))
    natural = jax.jit(GaussMarkov.from_information)(jnp.asarray(prec @ mean), diag, lower)
    full = Gaussian.from_covariance(jnp.asarray(mean), jnp.asarray(np.linalg.inv(prec)))
    back = jax.jit(lambda dense: GaussMarkov.from_gaussian(dense, block))(full)
    for other in (natural, back):
        np.testing.assert_allclose(other.loc, mean, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(other.diag, density.diag, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(other.off, density.off, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("sites", "block"), [(5, 1), (3, 2)])
def test_markov_draws_have_the_moments(sites, block):
    with jax.enable_x64(True):
        density, mean, prec = markov(sites, block, seed=3)
    single = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float32), density)
    draws = np.asarray(single.sample(20_000, key=jax.random.key(1)))
    check_moments(draws, mean, np.linalg.inv(prec), 5.0)


def test_a_block_that_does_not_divide_is_refused():
    density = Gaussian(jnp.zeros(5), jnp.eye(5))
    with pytest.raises(ValueError, match="divides the dimension 5, got 2"):
        GaussMarkov.from_gaussian(density, 2)


@pytest.mark.parametrize(("sites", "block"), [(4, 1), (3, 2)])
def test_slopes_of_the_markov_density_are_those_of_finite_differences(x64, sites, block):
    """Through the factorisation: d log p(x) / d(precision blocks, information vector)."""
    _, mean, prec = markov(sites, block)
    diag, lower = (jnp.asarray(part) for part in blocks(prec, block))
    x = jnp.asarray(RNG.normal(size=mean.size))

    @jax.jit
    def log_prob(parts):
        eta, diag, lower = parts
        diag = 0.5 * (diag + jnp.swapaxes(diag, -1, -2))
        return GaussMarkov.from_information(eta, diag, lower).log_prob(x)

    parts = (jnp.asarray(prec @ mean), diag, lower)
    slope = jax.jit(jax.grad(log_prob))(parts)
    direction = jax.tree.map(lambda a: jnp.asarray(RNG.normal(size=a.shape)), parts)
    h = 1e-5
    up = log_prob(jax.tree.map(lambda a, b: a + h * b, parts, direction))
    down = log_prob(jax.tree.map(lambda a, b: a - h * b, parts, direction))
    along = sum(
        float(jnp.sum(a * b))
        for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(direction), strict=True)
    )
    assert along == pytest.approx(float(up - down) / (2 * h), rel=1e-6)


# --- KL ---------------------------------------------------------------------------------------


def dense_kl(m0, c0, m1, c1) -> float:
    """The textbook formula, by explicit inverses."""
    inv = np.linalg.inv(c1)
    step = m1 - m0
    dets = np.linalg.slogdet(c1)[1] - np.linalg.slogdet(c0)[1]
    return 0.5 * (np.trace(inv @ c0) + step @ inv @ step - m0.size + dets)


@pytest.mark.parametrize(("sites", "block"), CASES)
def test_kl_is_the_dense_formula_in_every_form(x64, sites, block):
    p, m0, p0 = markov(sites, block, seed=1)
    q, m1, p1 = markov(sites, block, seed=2)
    want = dense_kl(m0, np.linalg.inv(p0), m1, np.linalg.inv(p1))

    @jax.jit
    def every_form(p, q):
        p_dense, q_dense = p.to_gaussian(), q.to_gaussian()
        forms = [(p, q), (p_dense, q), (p, q_dense), (p_dense, q_dense)]
        return jnp.stack([kl(a, b) for a, b in forms]), kl(p, p)

    got, none = every_form(p, q)
    np.testing.assert_allclose(got, want, rtol=1e-9)
    assert abs(float(none)) < 1e-12


def test_kl_is_the_integral_it_stands_for(x64):
    """By quadrature on a grid; the densities are negligible at its edge."""
    m0, c0 = dense(2, seed=4)
    m1, c1 = dense(2, seed=5)
    p = Gaussian.from_covariance(jnp.asarray(m0), jnp.asarray(c0))
    q = Gaussian.from_covariance(jnp.asarray(m1), jnp.asarray(c1))
    axes = [m0[i] + np.sqrt(c0[i, i]) * np.linspace(-9, 9, 401) for i in range(2)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    cell = (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
    log_p = scipy.stats.multivariate_normal(m0, c0).logpdf(grid)
    log_q = scipy.stats.multivariate_normal(m1, c1).logpdf(grid)
    integral = np.sum(np.exp(log_p) * (log_p - log_q)) * cell
    assert float(KL(p, q)) == pytest.approx(integral, rel=1e-8)


def test_kl_between_different_blocks_goes_the_dense_way(x64):
    p, _, _ = markov(4, 1, seed=1)
    apart = jax.jit(lambda p: kl(p, GaussMarkov.from_gaussian(p.to_gaussian(), 2)))
    assert abs(float(apart(p))) < 1e-10


def test_kl_between_dimensions_is_refused():
    one, two = (Gaussian(jnp.zeros(d), jnp.eye(d)) for d in (1, 2))
    with pytest.raises(ValueError, match=r"of one dimension, got \(1,\), \(2,\)"):
        kl(one, two)


# --- conditioning -----------------------------------------------------------------------------

N, STEP, TIMESCALE, SD, NOISE = 24, 0.7, 5.0, 1.3, 0.4
TIMES = STEP * np.arange(N)
COV = SD**2 * np.exp(-np.abs(TIMES[:, None] - TIMES) / TIMESCALE)
MEAN = 0.5


def gappy(fraction: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(int(100 * fraction))
    mask = np.ones(N, bool)
    missing = round(fraction * N)
    mask[3 : 3 + missing // 2] = False
    mask[rng.choice(np.arange(3 + missing // 2, N), missing - missing // 2, False)] = False
    y = MEAN + np.linalg.cholesky(COV) @ rng.normal(size=N) + NOISE * rng.normal(size=N)
    return np.where(mask, y, np.nan), mask


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.75])
def test_condition_kalman_and_the_plain_formula_agree(x64, fraction):
    y, mask = gappy(fraction)
    sd = np.linspace(NOISE, 2 * NOISE, N)
    event = as_event(y, mask, sd)
    prior = Gaussian.from_covariance(jnp.full(N, MEAN), jnp.asarray(COV))
    exact = CONDITION(prior, jnp.eye(N), event)

    # By numpy, with the missing entries left out instead of masked.
    seen = np.flatnonzero(mask)
    gram = COV[np.ix_(seen, seen)] + np.diag(sd[seen] ** 2)
    gain = np.linalg.solve(gram, COV[seen]).T
    np.testing.assert_allclose(exact.loc, MEAN + gain @ (y[seen] - MEAN), atol=1e-9)
    np.testing.assert_allclose(exact.covariance(), COV - gain @ COV[seen], atol=1e-9)

    a = np.exp(-STEP / TIMESCALE)
    smooth = KALMAN(
        Gaussian(jnp.zeros(1), jnp.full((1, 1), SD)),
        jnp.full((1, 1), a),
        jnp.full((1, 1), SD**2 * (1 - a**2)),
        jnp.eye(1),
        jnp.asarray(y - MEAN)[:, None],
        jnp.asarray(mask)[:, None],
        jnp.asarray(sd)[:, None],
    )
    np.testing.assert_allclose(smooth.mean[:, 0] + MEAN, exact.loc, atol=1e-8)
    np.testing.assert_allclose(smooth.cov[:, 0, 0], exact.sd() ** 2, atol=1e-8)
    evidence = scipy.stats.multivariate_normal(np.full(len(seen), MEAN), gram).logpdf(y[seen])
    assert float(smooth.log_likelihood) == pytest.approx(evidence, abs=1e-8)
    # The filter has seen all at the last time, and only the first at the first.
    np.testing.assert_allclose(smooth.filtered_mean[-1], smooth.mean[-1], atol=1e-12)
    first = SD**2 * sd[0] ** 2 / (SD**2 + sd[0] ** 2)
    assert float(smooth.filtered_cov[0, 0, 0]) == pytest.approx(first, rel=1e-10)


def test_kalman_with_a_state_of_two_and_partial_observations(x64):
    """Position and velocity, two sensors that drop out on their own, against dense algebra."""
    rng = np.random.default_rng(7)
    n, a = 9, np.array([[1.0, 0.3], [-0.2, 0.9]])
    q = np.array([[0.2, 0.05], [0.05, 0.3]])
    h = np.array([[1.0, 0.0], [0.5, 1.0]])
    start_mean, start_cov = np.array([0.3, -0.4]), np.array([[1.0, 0.2], [0.2, 0.5]])
    mask = rng.random((n, 2)) < 0.6
    sd = rng.uniform(0.2, 0.6, (n, 2))
    y = rng.normal(size=(n, 2))
    smooth = KALMAN(
        Gaussian.from_covariance(jnp.asarray(start_mean), jnp.asarray(start_cov)),
        *(jnp.asarray(part) for part in (a, q, h, np.where(mask, y, np.nan), mask, sd)),
    )
    # x = F (x_1, w_2, ..., w_n): the whole path as one Gaussian vector.
    whole = np.zeros((2 * n, 2 * n))
    for i in range(n):
        for j in range(i + 1):
            whole[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = np.linalg.matrix_power(a, i - j)
    cov = whole @ scipy.linalg.block_diag(start_cov, *[q] * (n - 1)) @ whole.T
    mean = whole[:, :2] @ start_mean
    big_h = np.kron(np.eye(n), h)[mask.reshape(-1)]
    gram = big_h @ cov @ big_h.T + np.diag(sd[mask] ** 2)
    gain = np.linalg.solve(gram, big_h @ cov).T
    np.testing.assert_allclose(
        smooth.mean.reshape(-1), mean + gain @ (y[mask] - big_h @ mean), atol=1e-9
    )
    got = scipy.linalg.block_diag(*np.asarray(smooth.cov))
    want = (cov - gain @ big_h @ cov) * (np.kron(np.eye(n), np.ones((2, 2))) > 0)
    np.testing.assert_allclose(got, want, atol=1e-9)
    evidence = scipy.stats.multivariate_normal(big_h @ mean, gram).logpdf(y[mask])
    assert float(smooth.log_likelihood) == pytest.approx(evidence, abs=1e-8)


def test_with_everything_missing_the_posterior_is_the_prior(x64):
    prior = Gaussian.from_covariance(jnp.full(N, MEAN), jnp.asarray(COV))
    exact = CONDITION(prior, jnp.eye(N), as_event(np.full(N, np.nan), sd=NOISE))
    np.testing.assert_array_equal(exact.loc, prior.loc)
    np.testing.assert_allclose(exact.covariance(), COV, atol=1e-12)


def test_condition_through_a_general_operator(x64):
    """Two instruments that see sums; a Markov prior gives the same as its dense form."""
    prior, mean, prec = markov(4, 2)
    cov = np.linalg.inv(prec)
    h = RNG.normal(size=(5, 8))
    mask = np.array([True, False, True, True, False])
    y, sd = RNG.normal(size=5), RNG.uniform(0.2, 0.5, 5)
    event = as_event(np.where(mask, y, np.nan), mask, sd)
    got = CONDITION(prior, jnp.asarray(h), event)
    hs = h[mask]
    info = prec + hs.T @ np.diag(sd[mask] ** -2.0) @ hs
    want = np.linalg.solve(info, prec @ mean + hs.T @ (y[mask] / sd[mask] ** 2))
    np.testing.assert_allclose(got.loc, want, atol=1e-9)
    np.testing.assert_allclose(got.covariance(), np.linalg.inv(info), atol=1e-9)
    other = CONDITION(prior.to_gaussian(), jnp.asarray(h), event)
    np.testing.assert_allclose(other.loc, got.loc, atol=1e-10)
    assert np.all(np.linalg.eigvalsh(cov - np.asarray(got.covariance())) > -1e-10)


def test_condition_needs_error_bars():
    prior = Gaussian(jnp.zeros(2), jnp.eye(2))
    with pytest.raises(ValueError, match="observation-error sd, got sd=None"):
        condition(prior, jnp.eye(2), as_event([1.0, 2.0]))


def test_slopes_are_finite_where_masked_entries_hold_nan(x64):
    """NaN at masked entries, in y and in sd: the slope there is zero, elsewhere the gain."""
    y, mask = gappy(0.5)
    sd = jnp.asarray(np.where(mask, NOISE, np.nan))
    prior = Gaussian.from_covariance(jnp.full(N, MEAN), jnp.asarray(COV))

    def mean_of(y):
        return condition(prior, jnp.eye(N), Event(y, jnp.asarray(mask), sd)).loc

    gain = np.asarray(jax.jit(jax.jacrev(mean_of))(jnp.asarray(y)))
    assert np.all(gain[:, ~mask] == 0)
    seen = np.flatnonzero(mask)
    gram = COV[np.ix_(seen, seen)] + NOISE**2 * np.eye(len(seen))
    np.testing.assert_allclose(gain[:, mask], np.linalg.solve(gram, COV[seen]).T, atol=1e-10)

    def evidence(y):
        a = np.exp(-STEP / TIMESCALE)
        return kalman_smoother(
            Gaussian(jnp.zeros(1), jnp.full((1, 1), SD)),
            jnp.full((1, 1), a),
            jnp.full((1, 1), SD**2 * (1 - a**2)),
            jnp.eye(1),
            y[:, None],
            jnp.asarray(mask)[:, None],
            sd[:, None],
        ).log_likelihood

    slope = np.asarray(jax.jit(jax.grad(evidence))(jnp.asarray(y)))
    assert np.all(slope[~mask] == 0)
    np.testing.assert_allclose(slope[mask], -np.linalg.solve(gram, y[mask]), atol=1e-9)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("kind", [Gaussian, GaussMarkov])
def test_a_state_of_another_size_is_refused_and_not_spread_over_the_components(kind, size):
    density = Gaussian(jnp.zeros(3), jnp.eye(3))
    if kind is GaussMarkov:
        density = markov(3, 1)[0]
    with pytest.raises(ValueError, match=rf"a state of shape \(3,\), got \({size},\)"):
        density.log_prob(jnp.zeros(size))
