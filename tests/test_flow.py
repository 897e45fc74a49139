"""The flow head: its density integrates to one and is that of its draws; its mode is a mode."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from amortlib.encoders import FlatEncoder, SiteEncoder
from amortlib.export import load, save
from amortlib.gaussian import Gaussian, GaussMarkov, quasi_normal
from amortlib.heads import CholeskyHead, FlowDistribution, FlowHead
from amortlib.modes import density_mode
from amortlib.objectives import nll
from amortlib.posterior import AmortizedPosterior, flow_posterior
from amortlib.problems import InverseProblem
from amortlib.training import fit, trainable
from amortlib.types import Event, to_double

KEY = jax.random.key(0)
SMALL = {"layers": 2, "width": 12, "condition": 5, "knots": 5, "points": 64, "climbs": 2}
OBS = {"features": 7, "encoder_width": 9, "encoder_depth": 1, "obs_shape": (3,)}


def gaussian_prior(d: int) -> Gaussian:
    low = np.eye(d) + 0.4 * np.tril(np.ones((d, d)), -1)
    return Gaussian(jnp.arange(1.0, d + 1.0), jnp.asarray(low, jnp.float32))


def rough(model: eqx.Module, size: float = 0.15) -> eqx.Module:
    """Far from the identity it starts at: every trainable number moved."""
    rng = np.random.default_rng(1)
    params, rest = eqx.partition(model, trainable(model))
    moved = jax.tree.map(lambda a: a + jnp.asarray(rng.normal(0, size, a.shape), a.dtype), params)
    return eqx.combine(moved, rest)


CASES = {
    "autoregressive": (2, {"kind": "autoregressive"}),
    "coupling": (2, {"kind": "coupling"}),
    "one number": (1, {"kind": "autoregressive"}),
    "affine": (2, {"transformer": "affine"}),
    "over the prior": (2, {"base": "prior"}),
    "mixture": (2, {"components": 2, "transformer": "affine"}),
}


@cache
def made(name: str) -> AmortizedPosterior:
    d, settings = CASES[name]
    model = flow_posterior(key=KEY, prior=gaussian_prior(d), **OBS, **SMALL, **settings)
    return rough(model)


def event_of(seed: int = 0) -> Event:
    rng = np.random.default_rng(seed)
    y = jnp.asarray(rng.normal(size=3), jnp.float32)
    return Event(y, jnp.asarray([True, False, True]))


GRID = 401


@eqx.filter_jit
def study(model: AmortizedPosterior, event: Event) -> dict[str, jax.Array]:
    """All that the tests look at, in one program."""
    q = model(event)
    draws = q.sample(20_000, key=jax.random.key(3))
    mean, sd = draws.mean(0), draws.std(0)
    axis = jnp.linspace(-9.0, 9.0, GRID)
    axes = mean[:, None] + sd[:, None] * axis
    grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1).reshape(-1, q.dim)
    one = draws[:50]
    return {
        "log_prob": jax.vmap(q.log_prob)(grid),
        "grid": grid,
        "cell": jnp.prod(sd * (axis[1] - axis[0])),
        "draws": draws,
        "mean": q.mean(),
        "covariance": q.covariance(),
        "sd": q.sd(),
        "round_trip": jax.vmap(lambda x: q.from_noise(q.noise(x)[0]))(one) - one,
        "scale": sd,
    }


@cache
def said(name: str) -> dict[str, np.ndarray]:
    return jax.tree.map(lambda a: np.asarray(a, float), study(made(name), event_of()))


every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_the_density_integrates_to_one_and_is_that_of_the_draws(name):
    """The rectangle rule on a grid; then the moments of the density on that grid against those
    of 20,000 draws, within 5.5 standard errors (fewer than one false alarm in 10^6 keys).
    """
    got, n = said(name), 20_000
    p = np.exp(got["log_prob"]) * got["cell"]
    assert p.sum() == pytest.approx(1.0, abs=2e-3)
    p = p / p.sum()
    mean = p @ got["grid"]
    off = got["grid"] - mean
    var, fourth = p @ off**2, p @ off**4
    assert (np.abs(got["draws"].mean(0) - mean) <= 5.5 * np.sqrt(var / n)).all()
    error = 5.5 * np.sqrt((fourth - var**2) / n)
    assert (np.abs(got["draws"].var(0) - var) <= error).all()
    # The quasi-random moments are those of the density: 64 points, 5% of a standard deviation.
    np.testing.assert_allclose(got["mean"], mean, atol=0.05 * np.sqrt(var).max())
    cov = (off * p[:, None]).T @ off
    np.testing.assert_allclose(got["covariance"], cov, atol=0.1 * var.max())
    np.testing.assert_allclose(got["sd"] ** 2, np.diag(got["covariance"]), rtol=1e-4)


@pytest.mark.parametrize("name", ["autoregressive", "coupling", "mixture"])
def test_draws_pass_kolmogorov_and_smirnov(name):
    """Along the first component, against the density summed over the second: a false alarm for
    one key in 10^4 (the key is fixed).
    """
    got = said(name)
    p = np.exp(got["log_prob"]).reshape(GRID, GRID).sum(1)
    axis = got["grid"].reshape(GRID, GRID, 2)[:, 0, 0]
    # Middles of cells: the distribution function stands at their edges.
    edges = axis + 0.5 * (axis[1] - axis[0])
    cdf = np.cumsum(p) / p.sum()
    result = scipy.stats.kstest(got["draws"][:, 0], lambda x: np.interp(x, edges, cdf, left=0.0))
    assert result.pvalue > 1e-4


@pytest.mark.parametrize("name", [name for name in CASES if name != "mixture"])
def test_the_inverse_undoes_the_map(name):
    """Of a single flow: a draw of a mixture does not say which component it came from."""
    got = said(name)
    assert (np.abs(got["round_trip"]) <= 1e-3 * got["scale"]).all()


def test_moments_are_exact_where_the_flow_is_affine_in_its_noise():
    """At the start the flow is near the identity; with its nets at zero it is its base exactly."""
    model = flow_posterior(key=KEY, prior=gaussian_prior(2), base="prior", **OBS, **SMALL)
    zeroed = eqx.tree_at(
        lambda m: m.head.flow,
        model,
        replace_fn=lambda f: jax.tree.map(lambda a: a * 0 if eqx.is_inexact_array(a) else a, f),
    )
    q = zeroed(event_of())
    prior = gaussian_prior(2)
    np.testing.assert_allclose(q.mean(), prior.mean(), atol=1e-5)
    np.testing.assert_allclose(q.covariance(), prior.covariance(), atol=1e-5)
    np.testing.assert_allclose(q.log_prob(jnp.zeros(2)), prior.log_prob(jnp.zeros(2)), rtol=1e-5)


def test_a_fresh_head_is_near_its_base():
    """Of a head at its start: within a tenth of a standard deviation of the prior at 64 points."""
    model = flow_posterior(key=KEY, prior=gaussian_prior(2), base="prior", **OBS, **SMALL)
    q = model(event_of())
    z = jnp.asarray(quasi_normal(64, 2), jnp.float32)
    far = jax.vmap(q.from_noise)(z) - jax.vmap(gaussian_prior(2).colour)(z)
    assert 0 < float(jnp.abs(far).max()) < 0.3


# --- the mode ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["affine", "mixture"])
def test_the_mode_is_a_mode_and_moves_as_it_should(x64, name):
    """Slope zero, higher than 20,000 draws; its Jacobian is that of central differences."""
    model, event = to_double(made(name)), to_double(event_of())

    @jax.jit
    def run(y):
        at = Event(y, event.mask)
        x = model.mode(at)
        return x, model.log_prob(x, at), jax.grad(model.log_prob)(x, at)

    _, height, slope = run(event.y)
    assert np.abs(slope).max() <= 1e-6
    draws = said(name)["draws"]
    heights = jax.jit(jax.vmap(lambda x: model.log_prob(x, event)))(jnp.asarray(draws))
    assert height >= heights.max()
    jacobian = jax.jit(lambda y: model.mode_jacobian(Event(y, event.mask)))(event.y)
    steps = 1e-4 * jnp.eye(3)
    want = jnp.stack([(run(event.y + s)[0] - run(event.y - s)[0]) / 2e-4 for s in steps], 1)
    np.testing.assert_allclose(jacobian, want, atol=1e-5 * np.abs(want).max())
    np.testing.assert_array_equal(np.abs(jacobian).max(0) != 0, event.mask)


def test_a_spline_flow_has_its_mode_above_its_draws():
    model, event = made("autoregressive"), event_of()
    height = jax.jit(lambda e: model.log_prob(model.mode(e), e))(event)
    draws = jnp.asarray(said("autoregressive")["draws"], jnp.float32)
    heights = jax.jit(jax.vmap(lambda x: model.log_prob(x, event)))(draws)
    assert height >= heights.max() - 1e-4


@pytest.mark.parametrize(("climbs", "peak", "moves"), [(1, -2.0, 0.0), (3, 2.1, 1.0)])
def test_ascent_finds_the_highest_peak_that_its_climbs_lead_to(climbs, peak, moves):
    """Peaks at -2 and at 2 + theta, the second higher; it moves one to one with theta.

    The best start lies under the lower peak: one climb ends there.
    """

    def log_prob(x, theta):
        low = -0.5 * jnp.sum((x + 2.0) ** 2) - 1.0
        high = -0.5 * jnp.sum((x - 2.0 - theta) ** 2) / 0.25
        return jnp.logaddexp(low, high)

    starts = jnp.array([[-2.0, -2.0], [1.0, 1.5], [jnp.nan, 0.0], [30.0, 9.0]])
    find = lambda theta: density_mode(lambda x: log_prob(x, theta), starts, climbs=climbs)  # noqa: E731
    value, slope = jax.jit(lambda t: (find(t), jax.jacfwd(find)(t)))(jnp.asarray(0.1))
    np.testing.assert_allclose(value, peak, atol=1e-4)
    np.testing.assert_allclose(slope, moves, atol=1e-3)
    back = jax.jit(jax.grad(lambda t: find(t)[0]))(jnp.asarray(0.1))
    np.testing.assert_allclose(back, moves, atol=1e-3)


@pytest.mark.parametrize(
    ("starts", "climbs", "words"),
    [(jnp.zeros((0, 2)), 1, "n >= 1"), (jnp.zeros((2, 1)), 3, "climbs from 1 to 2, got 3")],
)
def test_ascent_without_starts_is_refused(starts, climbs, words):
    with pytest.raises(ValueError, match=words):
        density_mode(lambda x: -jnp.sum(x**2), starts, climbs=climbs)


@pytest.mark.parametrize(("n", "d"), [(256, 1), (256, 3), (512, 64), (8, 20)])
def test_quasi_random_points_have_the_moments_of_the_normal(n, d):
    z = quasi_normal(n, d)
    assert z.shape == (n, d)
    np.testing.assert_allclose(z.mean(0), 0.0, atol=1e-12)
    np.testing.assert_allclose((z**2).mean(0), 1.0, rtol=1e-9)
    if n >= 2 * d:
        np.testing.assert_allclose(z.T @ z / n, np.eye(d), atol=1e-9)
    if n >= 256 and d <= 3:  # E max(z, 0) = 1 / sqrt(2 pi)
        np.testing.assert_allclose(np.maximum(z, 0).mean(0), 0.39894, atol=0.02)


@pytest.mark.parametrize("n", [0, 3])
def test_an_odd_number_of_points_is_refused(n):
    with pytest.raises(ValueError, match=f"even number of points, at least 2, got {n}"):
        quasi_normal(n, 2)


# --- use --------------------------------------------------------------------------------------


def test_one_program_serves_every_mask_and_event_and_masked_values_are_not_read():
    model, traces = made("coupling"), []

    @jax.jit
    def run(event):
        traces.append(None)
        return model.log_prob(jnp.zeros(2), event), model.mean(event)

    base = run(event_of())
    y = event_of().y
    hidden = run(Event(y.at[1].set(jnp.nan), event_of().mask))
    np.testing.assert_array_equal(base[0], hidden[0])
    np.testing.assert_array_equal(base[1], hidden[1])
    other = run(Event(y, jnp.asarray([True, True, True])))
    assert base[0] != other[0]
    assert base[0] != run(event_of(5))[0]
    assert len(traces) == 1


def test_a_batch_of_events_is_the_events_one_by_one():
    model = made("coupling")
    events = jax.tree.map(lambda *a: jnp.stack(a), *[event_of(k) for k in range(3)])
    f = lambda e: (model.log_prob(jnp.ones(2), e), model.sd(e))  # noqa: E731
    together = jax.jit(jax.vmap(f))(events)
    one = jax.jit(f)
    for k in range(3):
        for a, b in zip(together, one(event_of(k)), strict=True):
            np.testing.assert_allclose(a[k], b, rtol=1e-4)


def test_it_is_saved_and_loaded(tmp_path):
    model = made("mixture")
    save(tmp_path / "flow.safetensors", model)
    d, settings = CASES["mixture"]
    template = flow_posterior(key=KEY, prior=gaussian_prior(d), **OBS, **SMALL, **settings)
    loaded = load(tmp_path / "flow.safetensors", template)
    f = eqx.filter_jit(lambda m, e: m.log_prob(jnp.ones(2), e))
    assert f(loaded, event_of()) == f(model, event_of())
    assert f(template, event_of()) != f(model, event_of())


class _Affine(eqx.Module):
    matrix: jax.Array

    def __call__(self, x):
        return self.matrix @ x


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["autoregressive", "coupling"])
def test_it_learns_a_gaussian_posterior_and_leaves_its_prior_alone(kind):
    """A linear problem: the mean KL to the exact posterior falls below 0.03 nats, from more than
    one at the start.
    """
    from amortlib.gaussian import condition
    from amortlib.observation import ContiguousGaps, GaussianNoise
    from amortlib.problems.base import DrawOne

    prior = gaussian_prior(2)
    matrix = jnp.array([[1.0, 0.0], [0.5, -1.0], [1.0, 1.0]])
    problem = InverseProblem(
        DrawOne(prior), _Affine(matrix), GaussianNoise(0.7), ContiguousGaps(0.0, 1.0), prior
    )
    model = flow_posterior(
        "prior", key=KEY, prior=prior, kind=kind, obs_shape=(3,), features=32, encoder_width=64
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(3e-3, 1500))
    )
    result = fit(
        model,
        nll,
        lambda key: problem.batch(key, 256),
        key=KEY,
        steps=1500,
        optimizer=optimizer,
        every=500,
        progress=False,
    )
    np.testing.assert_array_equal(result.model.head.prior.tree.loc, prior.loc)
    x, events = problem.batch(jax.random.key(9), 512)

    @eqx.filter_jit
    def divergence(model):
        def one(x, event, key):
            exact = condition(prior, matrix, Event(event.y, event.mask, jnp.full(3, 0.7)))
            draws = exact.sample(64, key=key)
            gap = lambda x: exact.log_prob(x) - model.log_prob(x, event)  # noqa: E731
            return jax.vmap(gap)(draws).mean()

        return jax.vmap(one)(x, events, jax.random.split(KEY, 512)).mean()

    assert divergence(model) > 0.5
    assert divergence(result.model) < 0.03


# --- what does not fit ------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    prior = gaussian_prior(2)
    with pytest.raises(ValueError, match="'autoregressive' or 'coupling', got 'planar'"):
        FlowHead(3, prior, dim=2, key=KEY, kind="planar")
    with pytest.raises(ValueError, match="'spline' or 'affine', got 'cubic'"):
        FlowHead(3, prior, dim=2, key=KEY, transformer="cubic")
    with pytest.raises(ValueError, match=r"base of shape \(3,\), got \(2,\)"):
        FlowHead(3, prior, dim=3, key=KEY)
    with pytest.raises(ValueError, match="at least one base head"):
        FlowHead(3, [], dim=2, key=KEY)
    with pytest.raises(ValueError, match="layers >= 1"):
        FlowHead(3, prior, dim=2, key=KEY, layers=0)
    with pytest.raises(ValueError, match="one component over the prior, got 2"):
        flow_posterior("prior", key=KEY, prior=prior, components=2, **OBS)
    with pytest.raises(ValueError, match="'gaussian' or 'prior', got 'uniform'"):
        flow_posterior("uniform", key=KEY, prior=prior, **OBS)


def test_a_context_that_is_not_flat_is_refused():
    head = FlowHead(3, gaussian_prior(2), dim=2, key=KEY, **SMALL)
    with pytest.raises(ValueError, match=r"flat context of shape \(3,\), got \(4,\)"):
        head(jnp.zeros(4))
    encoder = SiteEncoder(key=KEY, features=2, width=4, depth=1)
    with pytest.raises(ValueError, match=r"flat context of shape \(3,\), got SiteContext"):
        head(encoder(event_of()))


def test_it_takes_any_flat_encoder_and_any_gaussian_base():
    encoder = FlatEncoder((3,), key=KEY, features=4, width=8, depth=1)
    base = GaussMarkov.from_gaussian(gaussian_prior(2), 1)
    q = AmortizedPosterior(encoder, FlowHead(4, base, dim=2, key=KEY, **SMALL))(event_of())
    assert isinstance(q, FlowDistribution)
    assert FlowDistribution.exact_log_prob
    head = CholeskyHead(4, 2, key=KEY)
    over = FlowHead(4, head, dim=2, key=KEY, **SMALL)(encoder(event_of()))
    assert np.isfinite(over.log_prob(jnp.zeros(2)))
