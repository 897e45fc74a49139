"""The score head: on mixtures of Gaussians the score is known at every noise level."""

import math
from functools import cache

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.stats
from jax.scipy.linalg import solve_triangular

from amortlib.export import load, save
from amortlib.gaussian import Gaussian
from amortlib.heads.regression import InformationHead
from amortlib.heads.score import (
    EDM,
    VP,
    AbstractDenoiser,
    FlowODE,
    ReverseSDE,
    ScoreDistribution,
    ScoreHead,
)
from amortlib.objectives import dsm
from amortlib.observation import GaussianNoise, NoGaps
from amortlib.posterior import AmortizedPosterior, regression_posterior, score_posterior
from amortlib.problems import InverseProblem, ornstein_uhlenbeck
from amortlib.training import fit
from amortlib.types import Event, InvalidEventError, to_double

KEY = jax.random.key(0)
WEIGHT = np.array([0.3, 0.7])
MEAN = np.array([[-1.0, 0.5], [1.0, -0.3]])
COV = np.array([[[0.1, 0.05], [0.05, 0.2]], [[0.2, -0.03], [-0.03, 0.05]]])
DRAWS = 4000


class Exact(AbstractDenoiser):
    """The noise in draws of a mixture of Gaussians: -sigma times the score, in closed form."""

    weight: jax.Array
    mean: jax.Array
    cov: jax.Array

    def predict_noise(self, u, sigma, component):
        def log_part(weight, mean, cov, u):
            low = jnp.linalg.cholesky(cov + sigma**2 * jnp.eye(u.size))
            z = solve_triangular(low, u - mean, lower=True)
            return jnp.log(weight) - 0.5 * z @ z - jnp.sum(jnp.log(jnp.diagonal(low)))

        def log_prob(u):
            parts = jax.vmap(log_part, (0, 0, 0, None))(self.weight, self.mean, self.cov, u)
            return jax.nn.logsumexp(parts)

        return -sigma * jax.grad(log_prob)(u)


def frames(each: list[Gaussian]) -> Gaussian:
    """Coordinates of several components, stacked."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def exact(mean=MEAN, cov=COV, **change) -> ScoreDistribution:
    """A distribution that is given the exact score, in coordinates of its own."""
    settings = {
        "denoiser": Exact(*(jnp.asarray(a, jnp.float32) for a in (WEIGHT, mean, cov))),
        "noise": EDM(),
        "log_weight": jnp.zeros(1),
        "frame": frames([Gaussian(jnp.zeros(2), jnp.eye(2))]),
        "sampler": FlowODE(),
        "density": FlowODE(12, solver=dfx.Tsit5()),
        "points": 256,
    }
    return ScoreDistribution(**(settings | change))


def log_density(points: np.ndarray) -> np.ndarray:
    """Of the mixture, by scipy in double precision."""
    parts = [
        np.log(w) + scipy.stats.multivariate_normal(m, c).logpdf(points)
        for w, m, c in zip(WEIGHT, MEAN, COV, strict=True)
    ]
    return np.logaddexp.reduce(parts)


def moments() -> tuple[np.ndarray, np.ndarray]:
    mean = WEIGHT @ MEAN
    off = MEAN - mean
    return mean, np.einsum("k,kij->ij", WEIGHT, COV + off[:, :, None] * off[:, None, :])


POINTS = np.array([[-1.0, 0.5], [1.0, -0.3], [0.0, 0.0], [0.5, -0.1], [1.8, -0.6]])
LOG_PROB = eqx.filter_jit(lambda density, points: jax.vmap(density.log_prob)(points))


# --- noise levels ----------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [EDM(), EDM(0.002, 80.0, 0.5), VP()])
def test_the_grid_falls_from_the_largest_level_to_the_smallest(noise) -> None:
    levels = np.asarray(jax.vmap(noise.sigma)(jnp.linspace(0.0, 1.0, 17)))
    np.testing.assert_allclose(levels[[0, -1]], [noise.sigma_max, noise.sigma_min], rtol=2e-3)
    assert (np.diff(levels) < 0).all()


def test_the_grid_and_the_preconditioning_are_those_of_karras_et_al() -> None:
    """Table 1 of arXiv:2206.00364, with c_skip and c_out written as they stand there."""
    noise = EDM(0.002, 80.0, 0.5)
    i = np.arange(10)
    want = (80 ** (1 / 7) + i / 9 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(jax.vmap(noise.sigma)(jnp.asarray(i / 9)), want, rtol=1e-4)
    u, f = 0.7, -1.3
    for sigma in (0.01, 0.3, 5.0):
        total = sigma**2 + 0.25
        skip, out = 0.25 / total, sigma * 0.5 / math.sqrt(total)
        a, b, s = noise.preconditioning(jnp.asarray(sigma))
        np.testing.assert_allclose(
            a * u + b * f, (u - (skip * u + out * f)) / sigma, rtol=1e-3, atol=1e-5
        )
        np.testing.assert_allclose(s, 1 / math.sqrt(total), rtol=1e-5)
        # lambda(sigma) sigma^2, since D - u = sigma (eps - n)
        weight = total / (sigma * 0.5) ** 2 * sigma**2
        np.testing.assert_allclose(noise.weight(jnp.asarray(sigma)), weight, rtol=1e-5)


def test_levels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max, got 2"):
        EDM(2.0, 1.0)
    with pytest.raises(ValueError, match="beta_min > 0"):
        VP(beta_min=0.0)
    with pytest.raises(ValueError, match="steps >= 1"):
        FlowODE(0)
    with pytest.raises(ValueError, match="positive tolerance"):
        ReverseSDE(8, -1.0)


# --- samplers, with the exact score ----------------------------------------------------------

SAMPLERS = {
    "ODE, fixed": FlowODE(),
    "ODE, adaptive": FlowODE(256, 1e-3, dfx.Tsit5()),
    "SDE, fixed": ReverseSDE(),
    "SDE, adaptive": ReverseSDE(1024, 1e-2),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if "adaptive" in n else []) for n in SAMPLERS],
)
def test_with_the_exact_score_draws_have_the_right_weights_and_moments(name: str) -> None:
    """4,000 draws: the weight of a mode, means and second moments within five standard errors,
    a false alarm in 3e-6 for the six figures together."""
    x = np.asarray(
        eqx.filter_jit(lambda d: d.sample(DRAWS, key=KEY))(exact(sampler=SAMPLERS[name]))
    )
    mean, cov = moments()
    # The line halfway between the modes; the exact share beyond it by one large draw in numpy.
    rng = np.random.default_rng(0)
    which = rng.choice(2, 400_000, p=WEIGHT)
    low = np.linalg.cholesky(COV)
    own = MEAN[which] + np.einsum("nij,nj->ni", low[which], rng.normal(size=(which.size, 2)))
    share = (own[:, 0] > 0).mean()
    error = math.sqrt(share * (1 - share) * (1 / DRAWS + 1 / which.size))
    assert abs((x[:, 0] > 0).mean() - share) < 5 * error
    assert (np.abs(x.mean(0) - mean) < 5 * np.sqrt(np.diagonal(cov) / DRAWS)).all()
    off = x - mean
    second = off[:, :, None] * off[:, None, :]
    assert (np.abs(second.mean(0) - cov) < 5 * second.std(0) / math.sqrt(DRAWS)).all()


@pytest.mark.slow
def test_adaptive_steps_follow_the_tolerance() -> None:
    """A tenth of the tolerance costs more steps and brings the end nearer to that of many steps."""

    @eqx.filter_jit
    def ends(density, sampler):
        z = jax.random.normal(KEY, (64, 2))
        return jax.vmap(lambda z: density.carry(sampler, z, jnp.asarray(0), key=KEY))(z)

    density = exact()
    want = ends(density, FlowODE(128, solver=dfx.Tsit5())).u
    off, steps = [], []
    for tolerance in (1e-2, 1e-3, 1e-4):
        trip = ends(density, FlowODE(512, tolerance, dfx.Tsit5()))
        off.append(float(jnp.sqrt(jnp.mean((trip.u - want) ** 2))))
        steps.append(float(trip.steps.mean()))
    assert off[0] > off[1] > off[2]
    assert steps[0] < steps[1] < steps[2]
    assert off[2] < 1e-3


def test_a_fixed_sampler_takes_the_steps_it_was_given() -> None:
    for sampler in (FlowODE(7), ReverseSDE(9)):
        trip = eqx.filter_jit(lambda d, s: d.carry(s, jnp.ones(2), jnp.asarray(0), key=KEY))(
            exact(), sampler
        )
        assert int(trip.steps) == sampler.steps


def test_no_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample, got n=0"):
        exact().sample(0, key=KEY)


# --- the log-density -------------------------------------------------------------------------


def test_the_log_density_is_that_of_the_mixture() -> None:
    """To the stated error: at most |variance - 1| / (2 sigma_max^2) a dimension from the far end,
    0.002 in all here, and the solver's, below 0.003."""
    assert not ScoreDistribution.exact_log_prob
    said = LOG_PROB(exact(), jnp.asarray(POINTS, jnp.float32))
    np.testing.assert_allclose(said, log_density(POINTS), atol=5e-3)


def test_coordinates_and_weights_enter_the_log_density() -> None:
    """Two pieces, each the mixture in coordinates of its own, against the sum by hand.

    Points within a log-density of -5: ten nats below, paths start so far out that 12 steps of the
    solver are a quarter of a nat off.
    """
    points = POINTS[1:4]
    low = np.array([[[2.0, 0.0], [0.5, 0.7]], [[0.3, 0.0], [-0.2, 1.5]]])
    loc, weight = np.array([[1.0, -2.0], [0.5, 0.0]]), np.array([0.25, 0.75])
    density = exact(
        frame=frames(
            [
                Gaussian(jnp.asarray(m, jnp.float32), jnp.asarray(lk, jnp.float32))
                for m, lk in zip(loc, low, strict=True)
            ]
        ),
        log_weight=jnp.log(jnp.asarray(weight, jnp.float32)),
    )
    parts = [
        np.log(w) + log_density(np.linalg.solve(lk, (points - m).T).T) - np.log(np.linalg.det(lk))
        for w, m, lk in zip(weight, loc, low, strict=True)
    ]
    said = LOG_PROB(density, jnp.asarray(points, jnp.float32))
    np.testing.assert_allclose(said, np.logaddexp.reduce(parts), atol=2e-2)


def test_single_precision_holds_near_the_smallest_level() -> None:
    """A density five hundred times narrower than the coordinates, levels down to 1e-3.

    The blur adds 1 / 4 of the variance: the answer is that of the blurred density.
    """
    narrow = 0.002
    density = exact(
        mean=np.zeros((2, 2)),
        cov=np.broadcast_to(narrow**2 * np.eye(2), (2, 2, 2)),
        noise=EDM(sigma_min=0.001),
        density=FlowODE(24, solver=dfx.Tsit5()),
    )
    blurred = scipy.stats.norm(0.0, math.hypot(narrow, 0.001))
    points = np.array([[0.0, 0.0], [0.003, -0.001]])
    said = LOG_PROB(density, jnp.asarray(points, jnp.float32))
    np.testing.assert_allclose(said, blurred.logpdf(points).sum(1), atol=0.05)


def test_hutchinson_s_estimate_is_unbiased_and_steadier_with_more_probes() -> None:
    """400 estimates: their mean within five standard errors of the exact trace's value (a false
    alarm in 6e-7), and 16 probes spread a quarter as much as one, within a third."""
    density, x = exact(), jnp.asarray(POINTS[3], jnp.float32)

    @eqx.filter_jit
    def estimates(density, probes, n):
        keys = jax.random.split(jax.random.key(5), n)
        return jax.vmap(lambda k: density.log_prob_estimate(x, key=k, probes=probes))(keys)

    one = np.asarray(estimates(density, 1, 400))
    exact_value = float(LOG_PROB(density, x[None])[0])
    spread = one.std()
    assert spread > 0.01, "else the test could not fail"
    assert abs(one.mean() - exact_value) < 5 * spread / math.sqrt(400) + 1e-3
    ratio = np.asarray(estimates(density, 16, 400)).std() / spread
    assert abs(ratio - 0.25) < 0.08
    with pytest.raises(ValueError, match="at least one probe, got 0"):
        density.log_prob_estimate(x, key=KEY, probes=0)


@pytest.mark.parametrize("solver", [dfx.Heun(), dfx.Tsit5()], ids=["Heun", "Tsit5"])
def test_the_plain_loop_takes_the_steps_of_diffrax(x64, solver) -> None:
    """To the end alone it is taken; where diffrax is asked to save, it is not."""
    density, z = to_double(exact()), jnp.asarray([0.7, -1.2])
    how = FlowODE(7, solver=solver)

    @eqx.filter_jit
    def both(density):
        plain, saved = (
            density.carry(how, z, jnp.asarray(0), key=KEY, saveat=saveat)
            for saveat in (None, dfx.SaveAt(t1=True))
        )
        return plain.u, plain.steps, saved.u[-1], saved.steps

    end, steps, want, made = both(density)
    np.testing.assert_allclose(end, want, rtol=1e-12)
    assert steps == made == 7


# --- moments and mode ------------------------------------------------------------------------


def test_moments_come_from_fixed_points_without_a_key() -> None:
    """256 points: means within 0.02 and covariances within 0.02, the same at every call."""
    ask = eqx.filter_jit(lambda d: (d.mean(), d.covariance(), d.sd()))
    mean, cov, sd = ask(exact())
    want_mean, want_cov = moments()
    np.testing.assert_allclose(mean, want_mean, atol=0.02)
    np.testing.assert_allclose(cov, want_cov, atol=0.02)
    np.testing.assert_allclose(sd, np.sqrt(np.diagonal(cov)), rtol=1e-5)


@pytest.mark.slow
def test_the_mode_is_the_highest_point_and_moves_with_the_density() -> None:
    """Against scipy's minimiser; and where the mixture is moved, the mode moves with it."""
    found = scipy.optimize.minimize(lambda u: -log_density(u), MEAN[1], tol=1e-10)

    @eqx.filter_jit
    def study(density):
        def moved(by):
            there = eqx.tree_at(lambda d: d.denoiser.mean, density, density.denoiser.mean + by)
            mode = there.mode()
            return mode, mode

        # The mode beside its derivative: one program, and not two that are alike.
        return jax.jacfwd(moved, has_aux=True)(jnp.zeros(2))

    jacobian, mode = study(exact(density=FlowODE(24)))
    np.testing.assert_allclose(mode, found.x, atol=0.01)
    np.testing.assert_allclose(jacobian, np.eye(2), atol=0.05)


# --- the head --------------------------------------------------------------------------------

SIZES = {"features": 6, "encoder_width": 8, "encoder_depth": 1, "width": 12, "depth": 2}


@cache
def small(components: int) -> AmortizedPosterior:
    """With weights moved off their start, so that context and noise level matter."""
    model = score_posterior(
        key=KEY,
        prior=ornstein_uhlenbeck(3).prior,
        obs_shape=(3,),
        components=components,
        sampler=FlowODE(4),
        density=FlowODE(4),
        **SIZES,
    )
    last = model.head.net.last
    return eqx.tree_at(lambda m: m.head.net.last.weight, model, 8.0 * last.weight)


def event_of(mask, filler: float = 0.0) -> Event:
    mask = jnp.asarray(mask)
    return Event(jnp.where(mask, jnp.array([0.3, -1.0, 0.7]), filler), mask)


@pytest.mark.parametrize("components", [0, 2])
def test_it_compiles_once_whatever_the_mask_and_never_reads_what_is_masked(components) -> None:
    traced = []

    @eqx.filter_jit
    def ask(model, event):
        traced.append(1)
        return model.sample(event, 5, key=KEY), model.log_prob(jnp.ones(3), event)

    model = small(components)
    seen = [True, False, True]
    before = ask(model, event_of(seen))
    for filler in (-999.0, jnp.nan):
        for a, b in zip(before, ask(model, event_of(seen, filler)), strict=True):
            np.testing.assert_array_equal(a, b)
    other = ask(model, event_of([False, True, True]))
    assert not np.allclose(other[0], before[0])
    assert np.isfinite(other[0]).all()
    assert len(traced) == 1


@pytest.mark.parametrize("components", [0, 1, 2])
def test_saved_and_loaded_it_gives_the_same_answers(components, tmp_path) -> None:
    model = small(components)
    save(tmp_path / "score.safetensors", model)
    template = jax.tree.map(lambda a: jnp.zeros_like(a) if eqx.is_array(a) else a, model)
    loaded = load(tmp_path / "score.safetensors", template)
    draw = eqx.filter_jit(lambda m, e: m.sample(e, 3, key=KEY))
    event = event_of([True, True, False])
    np.testing.assert_array_equal(draw(loaded, event), draw(model, event))


def test_sizes_and_bases_that_do_not_fit_are_refused() -> None:
    prior = ornstein_uhlenbeck(3).prior
    with pytest.raises(ValueError, match="width, depth and draws >= 1"):
        ScoreHead(4, prior, key=KEY, width=0)
    with pytest.raises(ValueError, match="components >= 0, got -1"):
        score_posterior(key=KEY, prior=prior, obs_shape=(3,), components=-1)
    with pytest.raises(ValueError, match="at least one sample"):
        small(0).sample(event_of([True] * 3), 0, key=KEY)


# --- denoising score matching ----------------------------------------------------------------


def test_the_least_loss_is_where_theory_puts_it() -> None:
    """States from N(0, I) in the prior's coordinates: with F = 0 the prediction is the best one,
    and its weighted error is 1 a dimension at every level; a bias b of F adds |b|^2.

    20,000 pairs, five standard errors: a false alarm in 6e-7 each.
    """
    prior = Gaussian(jnp.array([1.0, -2.0, 0.5]), jnp.diag(jnp.array([2.0, 0.5, 1.0])))
    model = score_posterior(key=KEY, prior=prior, obs_shape=(3,), components=0, draws=1, **SIZES)
    x = prior.sample(20_000, key=jax.random.key(1))
    events = Event(jnp.zeros((20_000, 3)), jnp.zeros((20_000, 3), bool))
    last = model.head.net.last

    @eqx.filter_jit
    def losses(bias):
        now = eqx.tree_at(
            lambda m: (m.head.net.last.weight, m.head.net.last.bias),
            model,
            (0.0 * last.weight, bias),
        )
        keys = jax.random.split(jax.random.key(2), 20_000)

        def one(x, event, key):
            return now.head.denoising_loss(now.encoder(event), x, key=key)

        return jax.vmap(one)(x, events, keys), dsm(now, (x, events), jax.random.key(2))

    for bias in (jnp.zeros(3), jnp.array([0.5, -0.3, 0.2])):
        each, whole = losses(bias)
        want = 3.0 + float(jnp.sum(bias**2))
        error = float(each.std()) / math.sqrt(20_000)
        assert error < 0.03
        assert abs(float(whole) - want) < 5 * error
        np.testing.assert_allclose(whole, each.mean(), rtol=1e-5)


def test_a_head_without_a_denoising_loss_is_sent_to_nll() -> None:
    problem = ornstein_uhlenbeck(3)
    model = regression_posterior(key=KEY, prior=problem.prior)
    assert isinstance(model.head, InformationHead)
    with pytest.raises(ValueError, match="InformationHead; train it with nll"):
        dsm(model, problem.batch(KEY, 2), KEY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: jax.tree.map(lambda leaf: leaf[:, :2], e), r"event of shape \(3,\), got \(2,\)"),
        (lambda e: eqx.tree_at(lambda e: e.mask, e, 1.0 * e.mask), "expected a boolean mask"),
    ],
    ids=["shape", "mask"],
)
def test_the_denoising_loss_reads_no_event_that_the_posterior_refuses(change, message) -> None:
    problem = ornstein_uhlenbeck(3)
    model = score_posterior(key=KEY, prior=problem.prior, obs_shape=(3,), components=0)
    x, events = problem.batch(KEY, 2)
    with pytest.raises(InvalidEventError, match=message):
        eqx.filter_eval_shape(dsm, model, (x, change(events)), KEY)


class TwoPlaces(eqx.Module):
    """A mixture of two Gaussians as a prior, of which one number is seen with noise."""

    def __call__(self, key):
        k_which, k_normal = jax.random.split(key)
        side = jnp.where(jax.random.bernoulli(k_which, 0.6), 1.0, -1.0)
        return side * jnp.array([1.5, 0.5]) + 0.4 * jax.random.normal(k_normal, (2,))


@pytest.mark.slow
@pytest.mark.parametrize("components", [0, 2])
def test_the_learned_score_comes_near_that_of_the_posterior(components) -> None:
    """A prior of two Gaussians, its second coordinate seen or not: the posterior is again a
    mixture, its score known. Weights of the pieces within 0.06, and KL(exact || learned), by
    2,000 exact draws, within 0.05 nats; an untrained head is off by more than 0.3."""
    problem = InverseProblem(TwoPlaces(), lambda x: x[1:], GaussianNoise(0.5), NoGaps())
    prior = Gaussian(jnp.zeros(2), jnp.diag(jnp.array([1.55, 0.64])))
    model = score_posterior(
        key=jax.random.key(1),
        prior=prior,
        obs_shape=(1,),
        components=components,
        features=16,
        encoder_width=32,
        width=48,
        depth=2,
    )
    result = fit(
        model,
        dsm,
        lambda key: problem.batch(key, 256),
        key=jax.random.key(3),
        steps=2500,
        optimizer=optax.adam(optax.cosine_decay_schedule(5e-3, 2500)),
        progress=False,
    )
    rng = np.random.default_rng(1)

    @eqx.filter_jit
    def study(model, event, points):
        density = model(event)
        return jax.vmap(density.log_prob)(points), density.sample(2000, key=KEY)

    for y in (0.0, 0.8):
        # Conjugate: each piece is updated by y, and weighed by how well it foretold it.
        place = np.array([[1.5, 0.5], [-1.5, -0.5]])
        gain = 0.16 / (0.16 + 0.25)
        mean = place + np.array([[0.0, 1.0]]) * (gain * (y - place[:, 1:]))
        sd = np.array([0.4, math.sqrt(0.16 * (1 - gain))])
        foretold = scipy.stats.norm(place[:, 1], math.sqrt(0.41)).pdf(y)
        weight = np.array([0.6, 0.4]) * foretold
        weight /= weight.sum()
        which = rng.choice(2, 2000, p=weight)
        points = mean[which] + sd * rng.normal(size=(2000, 2))
        parts = [
            np.log(w) + scipy.stats.norm(m, sd).logpdf(points).sum(1)
            for w, m in zip(weight, mean, strict=True)
        ]
        log_p = np.logaddexp.reduce(parts)
        event = Event(jnp.array([y]), jnp.array([True]))
        log_q, draws = study(result.model, event, jnp.asarray(points, jnp.float32))
        assert abs((np.asarray(draws)[:, 0] > 0).mean() - weight[0]) < 0.06
        assert np.mean(log_p - np.asarray(log_q)) < 0.05
        log_q, _ = study(model, event, jnp.asarray(points, jnp.float32))
        assert np.mean(log_p - np.asarray(log_q)) > 0.3
