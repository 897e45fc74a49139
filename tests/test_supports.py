"""Bounded supports: round trips, slopes, densities that integrate to one, and clear refusals."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from amortlib.gaussian import Gaussian
from amortlib.heads import FlowHead, MixtureHead
from amortlib.heads.score import ScoreHead
from amortlib.objectives import nll
from amortlib.observation import FixedMask, GaussianNoise, NoGaps
from amortlib.posterior import flow_posterior
from amortlib.problems import InvalidProblemError, InverseProblem
from amortlib.supports import Box, BoxDistribution, on_support, unbounded
from amortlib.training import fit
from amortlib.types import Event

INF = float("inf")
BOX = Box([0.0, 2.0, 0.0, -INF, -INF, -1.0], [1.0, 5.0, INF, 3.0, INF, 0.0])
KEY = jax.random.key(0)


def test_there_and_back_again() -> None:
    u = 2.0 * jax.random.normal(KEY, (200, BOX.dim))
    x = jax.vmap(BOX.to_support)(u)
    assert bool(jnp.all(jax.vmap(BOX.holds)(x)))
    np.testing.assert_allclose(jax.vmap(BOX.to_line)(x), u, atol=2e-4)
    assert BOX.dim == 6


def test_the_slope_is_that_of_a_derivative(x64: None) -> None:
    u = 3.0 * jax.random.normal(KEY, (50, BOX.dim))
    matrix = jax.vmap(jax.jacfwd(BOX.bijection.transform))(u)
    np.testing.assert_allclose(
        jax.vmap(BOX.log_slope)(u), jnp.linalg.slogdet(matrix)[1], rtol=1e-10, atol=1e-10
    )


def test_far_out_nothing_leaves_the_support_or_overflows() -> None:
    """In single precision a sigmoid is one from 17 on: draws stay inside and densities finite."""
    for far in (-300.0, -60.0, 60.0, 80.0, 89.0, 300.0):
        x = BOX.to_support(jnp.full(BOX.dim, far))
        assert np.isfinite(x).all()
        low, high = np.array(BOX.low), np.array(BOX.high)
        assert (np.asarray(x, float) > low).all()
        assert (np.asarray(x, float) < high).all()
        back = BOX.to_line(x)
        assert np.isfinite(back).all()
        assert np.isfinite(BOX.log_slope(back))
    ends = jnp.array([0.0, 5.0, 0.0, 3.0, 0.0, 0.0])
    assert np.isfinite(BOX.to_line(ends)).all()
    assert bool(jnp.all(BOX.holds(ends)))
    outside = jnp.array([-0.1, 5.1, -1.0, 3.1, jnp.nan, 0.1])
    assert not bool(jnp.any(BOX.holds(outside)))
    assert not bool(jnp.any(BOX.holds(jnp.full(BOX.dim, jnp.inf))))
    assert not bool(jnp.any(BOX.holds(jnp.full(BOX.dim, -jnp.inf))))


def test_densities_and_their_slopes_are_finite_at_the_ends() -> None:
    q = BoxDistribution(Gaussian(jnp.zeros(BOX.dim), jnp.eye(BOX.dim)), BOX)
    for ends in ([0.0, 2.0, 0.0, 3.0, 0.0, -1.0], [1.0, 5.0, 1e30, -1e30, 0.0, 0.0]):
        value, slope = jax.value_and_grad(q.log_prob)(jnp.array(ends))
        assert np.isfinite(value)
        assert np.isfinite(slope).all()


def test_small_rates_are_not_rounded_away() -> None:
    box = Box(0.0, INF)
    rate = jnp.array([1e-20])
    np.testing.assert_allclose(box.to_support(box.to_line(rate)), rate, rtol=1e-4)


def test_densities_integrate_to_one() -> None:
    """A logit-normal, a log-normal and what is left of a line, on grids: to a part in 10,000."""
    for box, grid in (
        (Box(2.0, 5.0), np.linspace(2.0, 5.0, 40_001)),
        (Box(0.0, INF), np.linspace(0.0, 60.0, 200_001)),
        (Box(-INF, 3.0), np.linspace(-57.0, 3.0, 200_001)),
    ):
        q = BoxDistribution(Gaussian(jnp.array([0.2]), jnp.array([[0.8]])), box)
        density = np.exp(jax.vmap(q.log_prob)(jnp.asarray(grid)[:, None]))
        assert np.trapezoid(density, grid) == pytest.approx(1.0, abs=2e-4)
        assert q.log_prob(jnp.array([box.low[0] - 1.0 if box.low[0] > -INF else 4.0])) == -jnp.inf


def test_log_normal_moments_mode_and_density() -> None:
    """Scipy's: the moments to the error of 512 points, the mode at the median, as documented."""
    q = BoxDistribution(Gaussian(jnp.array([0.5]), jnp.array([[0.4]])), Box(0.0, INF))
    right = stats.lognorm(0.4, scale=np.exp(0.5))
    np.testing.assert_allclose(q.mean(), right.mean(), rtol=2e-3)
    np.testing.assert_allclose(q.sd(), right.std(), rtol=2e-2)
    np.testing.assert_allclose(q.covariance()[0, 0], q.sd()[0] ** 2, rtol=1e-5)
    np.testing.assert_allclose(q.mode(), right.median(), rtol=1e-5)
    x = jnp.array([0.3, 1.0, 4.0])
    np.testing.assert_allclose(jax.vmap(q.log_prob)(x[:, None]), right.logpdf(x), rtol=1e-4)
    draws = np.asarray(q.sample(20_000, key=KEY))[:, 0]
    assert stats.kstest(draws, right.cdf).pvalue > 1e-3  # false alarms: one in a thousand keys


@pytest.mark.slow
def test_moments_of_mixtures_and_flows_are_those_of_their_draws() -> None:
    """To five standard errors of 40,000 draws, and the points' own error."""
    box, context = Box([0.0, 0.0], [1.0, INF]), jax.random.normal(KEY, (8,))
    k_mix, k_flow, k_draw = jax.random.split(KEY, 3)
    heads = [
        MixtureHead(8, 2, key=k_mix, components=3),
        FlowHead(8, Gaussian(jnp.zeros(2), 0.5 * jnp.eye(2)), dim=2, key=k_flow),
    ]
    for head in heads:
        q = BoxDistribution(head(context), box)
        draws = np.asarray(q.sample(40_000, key=k_draw))
        error = 5 * draws.std(0) / np.sqrt(40_000) + 0.01 * draws.std(0)
        assert (np.abs(np.asarray(q.mean()) - draws.mean(0)) < error).all()
        np.testing.assert_allclose(q.sd(), draws.std(0), rtol=0.15)


def rates(key):
    """A share and a rate, on their support."""
    a, b = jax.random.split(key)
    return jnp.stack([jax.random.uniform(a), jnp.exp(0.5 * jax.random.normal(b))])


def seen(x):
    return jnp.stack([x[0] * x[1], x[1], x[0]])


PROBLEM = InverseProblem(rates, seen, GaussianNoise(0.2), NoGaps())
SUPPORT = Box([0.0, 0.0], [1.0, INF])


def test_the_unbounded_problem_is_the_same_problem() -> None:
    free, units = unbounded(PROBLEM, SUPPORT, key=KEY)
    x, event = PROBLEM.batch(KEY, 64)
    u, again = free.batch(KEY, 64)
    np.testing.assert_allclose(jax.vmap(SUPPORT.to_support)(u), x, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(again.y, event.y, atol=1e-4)
    # A uniform share is a standard logistic number: variance pi^2 / 3. Five standard errors.
    error = 5 * np.sqrt(np.pi**2 / 3 / 4096)
    assert abs(float(units.mean()[0])) < error
    assert abs(float(units.mean()[1])) < 5 * 0.5 / np.sqrt(4096)


@pytest.mark.slow
def test_a_trained_flow_on_a_support_is_the_posterior() -> None:
    """Against a grid of prior times likelihood: means within a tenth of an exact sd, widths within
    15%, and every draw in the support, with everything seen and with a gap."""
    free, units = unbounded(PROBLEM, SUPPORT, key=KEY)
    model = flow_posterior(
        key=KEY, prior=units, obs_shape=(3,), features=32, encoder_width=64, layers=2, width=32
    )
    gappy = free.with_gaps(lambda key, shape: jax.random.bernoulli(key, 0.7, shape))
    model = fit(
        model,
        nll,
        lambda key: gappy.batch(key, 256),
        key=KEY,
        steps=2500,
        optimizer=optax.adam(optax.cosine_decay_schedule(3e-3, 2500)),
        progress=False,
    ).model
    posterior = on_support(model, SUPPORT)
    share, rate = np.meshgrid(
        np.linspace(0.0005, 0.9995, 400), np.linspace(0.01, 8.0, 800), indexing="ij"
    )
    y = np.array([0.5, 1.1, 0.45])
    for mask in ([True, True, True], [True, False, True], [True, True, False]):
        clean = np.stack([share * rate, rate, share])
        misfit = (((clean - y[:, None, None]) / 0.2) ** 2)[np.array(mask)].sum(0)
        log_p = -0.5 * misfit + stats.lognorm(0.5).logpdf(rate)
        p = np.exp(log_p - log_p.max())
        p /= p.sum()
        mean = np.array([(p * share).sum(), (p * rate).sum()])
        sd = np.sqrt([(p * (share - mean[0]) ** 2).sum(), (p * (rate - mean[1]) ** 2).sum()])
        event = Event(jnp.asarray(y, jnp.float32), jnp.array(mask), None)
        draws = np.asarray(posterior.sample(event, 20_000, key=KEY))
        assert ((draws > 0) & (draws[:, :1] < 1)).all()
        assert (np.abs(draws.mean(0) - mean) < 0.1 * sd + 5 * sd / np.sqrt(20_000)).all()
        np.testing.assert_allclose(draws.std(0), sd, rtol=0.15)


def test_draws_outside_the_support_are_named() -> None:
    with pytest.raises(InvalidProblemError, match=r"parameter 1 between 0 and 0\.5, got .* key \["):
        unbounded(PROBLEM, Box([0.0, 0.0], [1.0, 0.5]), key=KEY)
    with pytest.raises(InvalidProblemError, match=r"shape \(3,\), .* got \(2,\)"):
        unbounded(PROBLEM, Box([0.0] * 3, [1.0] * 3), key=KEY)
    for bad, message in (
        (lambda key: jnp.arange(2), r"prior_sample\(key\).* got dtype int32"),
        (lambda key: rates(key) / 0.0, "prior_sample returned values that are not finite"),
        (lambda key: (rates(key), rates(key)), "expected prior_sample.* one array"),
    ):
        problem = InverseProblem(bad, seen, GaussianNoise(0.2), NoGaps())
        with pytest.raises(InvalidProblemError, match=message):
            unbounded(problem, SUPPORT, key=KEY)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)])
def test_an_empty_interval_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="expected low < high"):
        Box(low, high)


def test_densities_with_an_error_of_their_own_are_refused() -> None:
    prior = Gaussian(jnp.zeros(2), jnp.eye(2))
    head = ScoreHead(8, prior, key=KEY)
    with pytest.raises(TypeError, match="expected a density with an exact log_prob"):
        BoxDistribution(head(jnp.zeros(8)), SUPPORT)
    q = BoxDistribution(prior, SUPPORT)
    with pytest.raises(ValueError, match="at least one sample"):
        q.sample(0, key=KEY)


def test_it_compiles_once_for_every_mask() -> None:
    _, units = unbounded(PROBLEM, SUPPORT, key=KEY)
    model = flow_posterior(key=KEY, prior=units, obs_shape=(3,), features=8, encoder_width=8)
    posterior, traced = on_support(model, SUPPORT), []

    @eqx.filter_jit
    def ask(event):
        traced.append(event)
        return posterior.sample(event, 4, key=KEY), posterior.mean(event)

    for mask in ([True, True, False], [False, True, True], [False, False, False]):
        fixed = FixedMask(jnp.array(mask))(KEY, (3,))
        draws, mean = ask(Event(jnp.ones(3), fixed, None))
        assert np.isfinite(draws).all()
        assert np.isfinite(mean).all()
    assert len(traced) == 1


def test_a_width_of_nothing_in_single_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="a width that single precision can hold"):
        Box(0.0, 1e-46)
