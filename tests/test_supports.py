"""Bounded supports: round trips, slopes, densities that integrate to one, and clear refusals.

What is asked of a box or a density is compiled as a whole: operation by operation the small
programs behind a bijection take most of the time.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from amortlib.gaussian import Gaussian
from amortlib.heads import MixtureHead
from amortlib.heads.score import (
    EDM,
    AbstractDenoiser,
    AbstractSampler,
    FlowODE,
    ReverseSDE,
    ScoreDistribution,
)
from amortlib.objectives import nll
from amortlib.observation import FixedMask, GaussianNoise, NoGaps
from amortlib.posterior import AmortizedPosterior, flow_posterior
from amortlib.problems import InvalidProblemError, InverseProblem
from amortlib.supports import Box, BoxDistribution, on_support, unbounded
from amortlib.training import fit
from amortlib.types import Event

INF = float("inf")
BOX = Box([0.0, 2.0, 0.0, -INF, -INF, -1.0], [1.0, 5.0, INF, 3.0, INF, 0.0])
KEY = jax.random.key(0)

SUPPORT = Box([0.0, 0.0], [1.0, INF])
Q = BoxDistribution(Gaussian(jnp.zeros(2), jnp.eye(2)), SUPPORT)

to_support = jax.jit(jax.vmap(BOX.to_support))
to_line = jax.jit(jax.vmap(BOX.to_line))
holds = jax.jit(jax.vmap(BOX.holds))
log_slope = jax.jit(jax.vmap(BOX.log_slope))
log_prob = eqx.filter_jit(lambda q, x: jax.vmap(q.log_prob)(x))


def test_there_and_back_again() -> None:
    u = 2.0 * jax.random.normal(KEY, (200, BOX.dim))
    x = to_support(u)
    assert np.asarray(holds(x)).all()
    np.testing.assert_allclose(to_line(x), u, atol=2e-4)
    assert BOX.dim == 6


def test_the_slope_is_that_of_a_derivative(x64: None) -> None:
    u = 3.0 * jax.random.normal(KEY, (50, BOX.dim))
    matrix = jax.jit(jax.vmap(jax.jacfwd(BOX.bijection.transform)))(u)
    right = np.linalg.slogdet(np.asarray(matrix))[1]
    np.testing.assert_allclose(log_slope(u), right, rtol=1e-10, atol=1e-10)


def test_far_out_nothing_leaves_the_support_or_overflows() -> None:
    """In single precision a sigmoid is one from 17 on: draws stay inside and densities finite."""
    far = np.array([-300.0, -60.0, 60.0, 80.0, 89.0, 300.0], np.float32)
    x = to_support(np.repeat(far[:, None], BOX.dim, axis=1))
    assert np.isfinite(x).all()
    assert (np.asarray(x, float) > np.array(BOX.low)).all()
    assert (np.asarray(x, float) < np.array(BOX.high)).all()
    back = to_line(x)
    assert np.isfinite(back).all()
    assert np.isfinite(log_slope(back)).all()
    ends = np.array([[0.0, 5.0, 0.0, 3.0, 0.0, 0.0]], np.float32)
    assert np.isfinite(to_line(ends)).all()
    assert np.asarray(holds(ends)).all()
    outside = [[-0.1, 5.1, -1.0, 3.1, np.nan, 0.1], [np.inf] * BOX.dim, [-np.inf] * BOX.dim]
    assert not np.asarray(holds(np.array(outside, np.float32))).any()


def test_densities_and_their_slopes_are_finite_at_the_ends() -> None:
    q = BoxDistribution(Gaussian(jnp.zeros(BOX.dim), jnp.eye(BOX.dim)), BOX)
    ends = jnp.array([[0.0, 2.0, 0.0, 3.0, 0.0, -1.0], [1.0, 5.0, 1e30, -1e30, 0.0, 0.0]])
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(q.log_prob)))(ends)
    assert np.isfinite(value).all()
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
        beyond = box.low[0] - 1.0 if box.low[0] > -INF else 4.0
        said = np.asarray(log_prob(q, np.append(grid, beyond).astype(np.float32)[:, None]))
        assert np.trapezoid(np.exp(said[:-1]), grid) == pytest.approx(1.0, abs=2e-4)
        assert said[-1] == -np.inf


def test_log_normal_moments_mode_and_density() -> None:
    """Scipy's: the moments to the error of 512 points, the mode at the median, as documented."""
    q = BoxDistribution(Gaussian(jnp.array([0.5]), jnp.array([[0.4]])), Box(0.0, INF))
    right = stats.lognorm(0.4, scale=np.exp(0.5))
    x = np.array([0.3, 1.0, 4.0], np.float32)

    @jax.jit
    def ask():
        known = jax.vmap(q.log_prob)(x[:, None]), q.mode()
        return q.mean(), q.sd(), q.covariance(), q.sample(20_000, key=KEY), known

    mean, sd, covariance, draws, (heights, mode) = ask()
    np.testing.assert_allclose(mean, right.mean(), rtol=2e-3)
    np.testing.assert_allclose(sd, right.std(), rtol=2e-2)
    np.testing.assert_allclose(covariance[0, 0], sd[0] ** 2, rtol=1e-5)
    np.testing.assert_allclose(mode, right.median(), rtol=1e-5)
    np.testing.assert_allclose(heights, right.logpdf(x), rtol=1e-4)
    # False alarms: one in a thousand keys.
    assert stats.kstest(np.asarray(draws)[:, 0], right.cdf).pvalue > 1e-3


@pytest.fixture(scope="module")
def small() -> AmortizedPosterior:
    """A flow over two numbers: affine coupling layers compile fastest, and bend space all the
    same."""
    return flow_posterior(
        key=KEY,
        prior=Gaussian(jnp.zeros(2), 0.5 * jnp.eye(2)),
        obs_shape=(3,),
        features=8,
        encoder_width=8,
        kind="coupling",
        transformer="affine",
        layers=2,
    )


@pytest.mark.slow
def test_moments_of_mixtures_and_flows_are_those_of_their_draws(small) -> None:
    """To five standard errors of 40,000 draws, and the points' own error."""
    context, (k_mix, k_draw) = jax.random.normal(KEY, (8,)), jax.random.split(KEY)
    heads = [MixtureHead(8, 2, key=k_mix, components=3), small.head]

    @eqx.filter_jit
    def ask(head):
        q = BoxDistribution(head(context), SUPPORT)
        return q.sample(40_000, key=k_draw), q.mean(), q.sd()

    for head in heads:
        draws, mean, sd = map(np.asarray, ask(head))
        error = 5 * draws.std(0) / np.sqrt(40_000) + 0.01 * draws.std(0)
        assert (np.abs(mean - draws.mean(0)) < error).all()
        np.testing.assert_allclose(sd, draws.std(0), rtol=0.15)


# --- score heads -----------------------------------------------------------------------------


class OfGaussian(AbstractDenoiser):
    """The noise in draws of a Gaussian, in closed form, by the axes of its covariance."""

    mean: jax.Array
    axes: jax.Array
    variance: jax.Array

    def predict_noise(self, u, sigma, component):
        along = self.axes.T @ (u - self.mean)
        return sigma * self.axes @ (along / (self.variance + sigma**2))


PLACE, SPREAD = np.array([0.6, -0.3], np.float32), np.array([[0.9, 0.25], [0.25, 0.16]], np.float32)


def scored(sampler: AbstractSampler) -> ScoreDistribution:
    """A Gaussian, given by its score."""
    variance, axes = np.linalg.eigh(SPREAD)
    return ScoreDistribution(
        OfGaussian(*map(jnp.asarray, (PLACE, axes, variance))),
        EDM(),
        jnp.zeros(1),
        jax.tree.map(lambda leaf: leaf[None], Gaussian(jnp.zeros(2), jnp.eye(2))),
        sampler,
        FlowODE(128),
        256,
    )


@pytest.mark.parametrize("sampler", [FlowODE(), ReverseSDE()])
def test_draws_by_a_score_stay_in_the_support_and_have_its_distribution(sampler) -> None:
    """A logit-normal share and a log-normal rate, their marginals and their sum on the line by
    Kolmogorov-Smirnov's test of 4,000 draws: false alarms in one of a thousand keys each."""
    q = BoxDistribution(scored(sampler), SUPPORT)
    x = np.asarray(eqx.filter_jit(lambda q: q.sample(4000, key=KEY))(q), float)
    assert ((x > 0) & (x[:, :1] < 1)).all()
    u = np.stack([np.log(x[:, 0] / (1 - x[:, 0])), np.log(x[:, 1])], axis=1)
    for along in np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]):
        right = stats.norm(PLACE @ along, np.sqrt(along @ SPREAD @ along))
        assert stats.kstest(u @ along, right.cdf).pvalue > 1e-3


def test_the_density_of_a_score_on_a_support_is_that_of_the_logit_normal() -> None:
    """To the error of the flow ODE without a support, 5e-3; its estimates, with one probe each,
    are spread around it, their mean within five standard errors; moments to that of 256 points."""
    q = BoxDistribution(scored(FlowODE()), SUPPORT)
    assert not q.exact_log_prob
    assert Q.exact_log_prob
    inside = np.array([[0.6, 0.7], [0.3, 0.4], [0.9, 1.2]], np.float32)
    others = np.array([[1.0, 0.0], [1.1, 0.5], [0.5, -0.1]], np.float32)

    @eqx.filter_jit
    def ask(q, x):
        estimate = jax.vmap(lambda x, k: q.log_prob_estimate(x, key=k), (0, None))
        estimates = jax.vmap(estimate, (None, 0), 1)(x, jax.random.split(KEY, 100))
        return jax.vmap(q.log_prob)(x), estimates, q.mean(), q.covariance()

    said, estimates, mean, covariance = map(np.asarray, ask(q, np.concatenate([inside, others])))
    share, rate = inside.T.astype(float)
    u = np.stack([np.log(share / (1 - share)), np.log(rate)], axis=1)
    right = stats.multivariate_normal(PLACE, SPREAD).logpdf(u) - np.log(share * (1 - share) * rate)
    np.testing.assert_allclose(said[:3], right, atol=5e-3)
    assert np.isfinite(said[3]), "at a corner of the support"
    assert (said[4:] == -np.inf).all()
    assert (estimates[4:] == -np.inf).all()
    off, spread = estimates[:3].mean(1) - said[:3], estimates[:3].std(1)
    assert (spread > 1e-2).all(), "else it was no estimate"
    assert (np.abs(off) < 5 * spread / 10 + 1e-3).all()
    points = np.random.default_rng(0).multivariate_normal(PLACE, SPREAD, 400_000)
    points = np.stack([1 / (1 + np.exp(-points[:, 0])), np.exp(points[:, 1])], axis=1)
    np.testing.assert_allclose(mean, points.mean(0), rtol=0.01)
    np.testing.assert_allclose(covariance, np.cov(points.T), rtol=0.1)


def test_only_a_score_s_log_density_is_estimated() -> None:
    with pytest.raises(TypeError, match="got Gaussian: ask for log_prob, which is exact"):
        Q.log_prob_estimate(jnp.ones(2), key=KEY)


# --- problems --------------------------------------------------------------------------------


def rates(key):
    """A share and a rate, on their support."""
    a, b = jax.random.split(key)
    return jnp.stack([jax.random.uniform(a), jnp.exp(0.5 * jax.random.normal(b))])


def seen(x):
    return jnp.stack([x[0] * x[1], x[1], x[0]])


PROBLEM = InverseProblem(rates, seen, GaussianNoise(0.2), NoGaps())


@pytest.fixture(scope="module")
def free_and_units() -> tuple[InverseProblem, Gaussian]:
    return unbounded(PROBLEM, SUPPORT, key=KEY)


def test_the_unbounded_problem_is_the_same_problem(free_and_units) -> None:
    free, units = free_and_units
    x, event = PROBLEM.batch(KEY, 64)
    u, again = free.batch(KEY, 64)
    back = jax.jit(jax.vmap(SUPPORT.to_support))(u)
    np.testing.assert_allclose(back, x, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(again.y, event.y, atol=1e-4)
    # A uniform share is a standard logistic number: variance pi^2 / 3. Five standard errors.
    error = 5 * np.sqrt(np.pi**2 / 3 / 4096)
    assert abs(float(units.mean()[0])) < error
    assert abs(float(units.mean()[1])) < 5 * 0.5 / np.sqrt(4096)


@pytest.mark.slow
def test_a_trained_flow_on_a_support_is_the_posterior(free_and_units) -> None:
    """Against a grid of prior times likelihood: means within a tenth of an exact sd, widths within
    15%, and every draw in the support, with everything seen and with a gap."""
    free, units = free_and_units
    model = flow_posterior(
        key=KEY,
        prior=units,
        obs_shape=(3,),
        features=32,
        encoder_width=64,
        width=32,
        kind="coupling",
        transformer="affine",
    )
    gappy = free.with_gaps(lambda key, shape: jax.random.bernoulli(key, 0.7, shape))
    model = fit(
        model,
        nll,
        lambda key: gappy.batch(key, 256),
        key=KEY,
        steps=1500,
        optimizer=optax.adam(optax.cosine_decay_schedule(3e-3, 1500)),
        progress=False,
    ).model
    posterior = on_support(model, SUPPORT)
    draw = eqx.filter_jit(lambda event: posterior.sample(event, 20_000, key=KEY))
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
        draws = np.asarray(draw(event))
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


def test_no_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        Q.sample(0, key=KEY)


def test_it_compiles_once_for_every_mask(small) -> None:
    posterior, traced = on_support(small, SUPPORT), []

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


def test_a_state_of_one_component_is_not_spread_over_a_box_of_two() -> None:
    with pytest.raises(ValueError, match=r"a state of shape \(2,\), got \(1,\)"):
        Q.log_prob(jnp.ones(1))
