"""J and the Gibbs posterior against densities that know nothing of J: scipy's, and quadrature."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from amortlib.energy import Energy, GibbsPosterior
from amortlib.gaussian import Gaussian, GaussMarkov, condition
from amortlib.types import Event

D, T = 4, 5


@cache
def numbers() -> dict[str, np.ndarray]:
    """A prior with correlations, an operator, an event with a gap and error bars that differ."""
    rng = np.random.default_rng(0)
    low = np.diag(rng.uniform(0.8, 1.5, D)) + np.diag(rng.normal(size=D - 1) * 0.5, -1)
    return {
        "mean": rng.normal(size=D),
        "prec": low @ low.T,
        "h": rng.normal(size=(T, D)),
        "y": rng.normal(size=T),
        "mask": np.array([True, True, False, True, False]),
        "sd": rng.uniform(0.3, 0.8, T),
        "x": rng.normal(size=(3, D)),
    }


def markov() -> GaussMarkov:
    given, i = numbers(), np.arange(D)
    prec = given["prec"]
    return GaussMarkov.from_precision(
        jnp.asarray(given["mean"]),
        jnp.asarray(prec[i, i])[:, None, None],
        jnp.asarray(prec[i[1:], i[:-1]])[:, None, None],
    )


def dense() -> Gaussian:
    given = numbers()
    return Gaussian.from_precision(jnp.asarray(given["mean"]), jnp.asarray(given["prec"]))


PRIORS = {"dense": dense, "markov": markov}
every_prior = pytest.mark.parametrize("prior", PRIORS)


def affine(x: jax.Array) -> jax.Array:
    return jnp.asarray(numbers()["h"]) @ x


def curved(x: jax.Array) -> jax.Array:
    """Two axes, and a product: nothing about J may need a linear operator."""
    return jnp.stack([jnp.sin(x), x**2 / 2 + x[::-1]])


def event(*, sd: bool = True) -> Event:
    given = numbers()
    return Event(
        jnp.asarray(given["y"]),
        jnp.asarray(given["mask"]),
        jnp.asarray(given["sd"]) if sd else None,
    )


def log_likelihood(x: np.ndarray, clean: np.ndarray) -> float:
    given, seen = numbers(), numbers()["mask"]
    return scipy.stats.norm(clean[seen], given["sd"][seen]).logpdf(given["y"][seen]).sum()


# --- J ----------------------------------------------------------------------------------------


@every_prior
def test_j_at_a_control_variable_is_j_at_its_state(prior, x64):
    energy = Energy(PRIORS[prior](), affine)
    for v in numbers()["x"]:
        state = energy.prior.colour(jnp.asarray(v))
        there = energy.at_control(jnp.asarray(v), event())
        assert there == pytest.approx(float(energy(state, event())), rel=1e-12)


@every_prior
def test_the_terms_are_the_sums_of_the_definition(x64, prior):
    """Entry by entry in numpy: sums over what was seen, never means."""
    given, energy = numbers(), Energy(PRIORS[prior](), affine)

    def parts(x):
        terms = energy.terms(x, event())
        return terms.background, terms.observation, terms.total, energy(x, event())

    got = jax.jit(jax.vmap(parts))(jnp.asarray(given["x"]))
    for k, x in enumerate(given["x"]):
        step = x - given["mean"]
        background = sum(
            0.5 * step[i] * given["prec"][i, j] * step[j] for i in range(D) for j in range(D)
        )
        observation = sum(
            0.5 * ((given["y"][t] - given["h"][t] @ x) / given["sd"][t]) ** 2 for t in (0, 1, 3)
        )
        total = background + observation
        want = (background, observation, total, total)
        np.testing.assert_allclose([part[k] for part in got], want, rtol=1e-10)


def test_everything_seen_twice_counts_twice(x64):
    """With a mean in place of the sum, twice the observations would count as once."""
    given, prior = numbers(), dense()
    twice = Event(*(jnp.concatenate([a, a]) for a in (event().y, event().mask, event().sd)))
    x = jnp.asarray(given["x"][0])
    once = Energy(prior, affine).terms(x, event())
    double = Energy(prior, lambda x: jnp.tile(affine(x), 2)).terms(x, twice)
    np.testing.assert_allclose(double.observation, 2 * once.observation, rtol=1e-12)
    np.testing.assert_allclose(double.background, once.background, rtol=1e-12)


@every_prior
def test_the_log_joint_is_that_of_scipy(x64, prior):
    """log p(x) + sum over what was seen of log p(y | x), normalisers included."""
    given, energy = numbers(), Energy(PRIORS[prior](), affine)
    density = scipy.stats.multivariate_normal(given["mean"], np.linalg.inv(given["prec"]))
    want = [density.logpdf(x) + log_likelihood(x, given["h"] @ x) for x in given["x"]]
    got = jax.jit(jax.vmap(lambda x: energy.log_joint(x, event())))(jnp.asarray(given["x"]))
    np.testing.assert_allclose(got, want, rtol=1e-10)


def test_an_error_bar_of_the_energy_s_own_stands_in_for_the_event_s(x64):
    """A number or one an entry; where the event has its own, that one counts."""
    x, sd = jnp.asarray(numbers()["x"][0]), jnp.asarray(numbers()["sd"])
    own = Energy(dense(), affine)(x, event())
    assert Energy(dense(), affine, obs_sd=sd)(x, event(sd=False)) == own
    assert Energy(dense(), affine, obs_sd=99.0)(x, event()) == own
    one = Energy(dense(), affine, obs_sd=0.5)(x, event(sd=False))
    same = Event(event().y, event().mask, jnp.full(T, 0.5))
    np.testing.assert_allclose(one, Energy(dense(), affine)(x, same), rtol=1e-12)


def gappy_curve(under: float) -> Event:
    """Observations on two axes; masked entries, and their error bars, hold `under`."""
    rng = np.random.default_rng(5)
    mask = rng.random((2, D)) < 0.6
    y, sd = rng.normal(size=(2, D)), rng.uniform(0.3, 0.9, (2, D))
    return Event(
        jnp.asarray(np.where(mask, y, under)),
        jnp.asarray(mask),
        jnp.asarray(np.where(mask, sd, under)),
    )


def test_what_lies_under_the_mask_changes_neither_value_nor_gradient(x64):
    """Bit for bit, the Hessian too, and the gradient in y is zero there and only there."""
    energy, x = Energy(markov(), curved), jnp.asarray(numbers()["x"][0])

    @jax.jit
    def run(x, y, e):
        cost = lambda x, y: energy(x, Event(y, e.mask, e.sd))  # noqa: E731
        return jax.value_and_grad(cost, (0, 1))(x, y), jax.hessian(cost)(x, y)

    first = gappy_curve(1.0)
    want = jax.tree.leaves(run(x, first.y, first))
    assert all(np.isfinite(part).all() for part in want)
    np.testing.assert_array_equal(want[2] != 0, first.mask)
    for under in (np.nan, np.inf, -999.0, 0.0):
        other = gappy_curve(under)
        for got, part in zip(jax.tree.leaves(run(x, other.y, other)), want, strict=True):
            assert np.asarray(got).tobytes() == np.asarray(part).tobytes()
    # XLA makes a selection of a product with booleans, and NaN times zero is zero, unless it
    # knows the mask when it compiles: then, a product would be NaN.
    other = gappy_curve(np.nan)
    known = jax.value_and_grad(lambda x, y: energy(x, Event(y, other.mask, other.sd)), (0, 1))
    value, slopes = jax.jit(known)(x, other.y)
    for got, part in zip((value, *slopes), want, strict=False):
        np.testing.assert_allclose(got, part, rtol=1e-10, atol=1e-12)


@every_prior
def test_the_gradient_is_that_of_finite_differences(x64, prior):
    """Central differences of step 1e-5 in double precision: about 1e-9 of truncation and 1e-10
    of rounding, held to 1e-7.
    """
    energy, seen = Energy(PRIORS[prior](), curved), gappy_curve(np.nan)
    run = jax.jit(jax.value_and_grad(lambda x: energy(x, seen)))
    for x in numbers()["x"]:
        steps = 1e-5 * np.eye(D)
        want = [(run(jnp.asarray(x + s))[0] - run(jnp.asarray(x - s))[0]) / 2e-5 for s in steps]
        np.testing.assert_allclose(run(jnp.asarray(x))[1], want, rtol=1e-7, atol=1e-7)


def test_with_nothing_seen_j_is_the_background_s(x64):
    energy, x = Energy(dense(), affine), jnp.asarray(numbers()["x"][0])
    nothing = Event(jnp.full(T, jnp.nan), jnp.zeros(T, bool), jnp.full(T, jnp.nan))
    terms = energy.terms(x, nothing)
    assert terms.observation == 0
    assert energy(x, nothing) == terms.background > 0


# --- the Gibbs posterior ----------------------------------------------------------------------


def cube(x: jax.Array) -> jax.Array:
    return jnp.stack([x[0] ** 3 / 4, x[0]])


def normalised(
    gibbs: GibbsPosterior, seen: Event, axes: tuple[np.ndarray, ...], points: np.ndarray
) -> jax.Array:
    """exp(-J) / Z at some points, Z by the grid."""

    @jax.jit
    def run(axes, points):
        log_z = gibbs.log_normaliser_grid(axes, seen)
        return jnp.exp(jax.vmap(lambda x: gibbs.log_density(x, seen))(points) - log_z)

    return run(tuple(jnp.asarray(axis) for axis in axes), jnp.asarray(points))


def test_in_one_dimension_it_is_bayes_rule_by_quadrature(x64):
    """A curved operator; prior, likelihood and evidence are scipy's, integrated adaptively. Both
    quadratures are good to 1e-10 or better on so smooth a density.
    """
    mean, sd, y, errors = 0.3, 1.2, np.array([0.8, -0.1]), np.array([0.4, 0.7])
    energy = Energy(Gaussian(jnp.array([mean]), jnp.array([[sd]])), cube)
    seen = Event(jnp.asarray(y), jnp.ones(2, bool), jnp.asarray(errors))
    gibbs = GibbsPosterior(energy)

    def joint(x):
        likelihood = scipy.stats.norm(np.array([x**3 / 4, x]), errors).pdf(y).prod()
        return scipy.stats.norm(mean, sd).pdf(x) * likelihood

    evidence, _ = scipy.integrate.quad(joint, -12, 12, points=[0.0], epsabs=1e-14, limit=400)
    points = np.array([-1.0, 0.2, 1.4])
    got = normalised(gibbs, seen, (np.linspace(-12, 12, 4001),), points[:, None])
    np.testing.assert_allclose(got, [joint(x) / evidence for x in points], rtol=1e-8)


def test_in_two_dimensions_it_is_bayes_rule_by_quadrature(x64):
    """As above, with a banana: the sum of squares is seen, and one of two entries is masked."""
    cov = np.array([[1.0, 0.4], [0.4, 0.7]])
    prior = Gaussian.from_covariance(jnp.zeros(2), jnp.asarray(cov))
    energy = Energy(prior, lambda x: jnp.stack([jnp.sum(x**2), x[0]]))
    seen = Event(jnp.array([1.5, jnp.nan]), jnp.array([True, False]), jnp.array([0.5, 0.1]))
    gibbs = GibbsPosterior(energy)
    axis = np.linspace(-6, 6, 301)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)
    joint = scipy.stats.multivariate_normal(np.zeros(2), cov).pdf(points)
    joint = joint * scipy.stats.norm((points**2).sum(-1), 0.5).pdf(1.5)
    evidence = scipy.integrate.simpson(scipy.integrate.simpson(joint, x=axis), x=axis)
    at = ([150, 120, 180], [170, 140, 180])
    got = normalised(gibbs, seen, (axis, axis), points[at])
    np.testing.assert_allclose(got, joint[at] / evidence, rtol=1e-6)


CONDITION = jax.jit(condition)


@every_prior
def test_with_an_affine_operator_it_is_the_exact_posterior(x64, prior):
    """-J - log Z is the log-density of the Gaussian-process formula, at any x; and log Z is the
    evidence but for two constants: p(y) = Z / (normaliser of the prior x that of the noise).
    """
    given, seen = numbers(), numbers()["mask"]

    @jax.jit
    def run(prior, event, points):
        gibbs = GibbsPosterior(Energy(prior, affine))
        own, log_z = gibbs.gaussian(event), gibbs.log_normaliser(event)
        minus_j = jax.vmap(lambda x: gibbs.log_density(x, event))(points)
        return own.mean(), own.covariance(), log_z, minus_j

    mean, cov, log_z, minus_j = run(PRIORS[prior](), event(), jnp.asarray(given["x"]))
    exact = CONDITION(dense(), jnp.asarray(given["h"]), event())
    exact_cov = np.asarray(exact.chol) @ np.asarray(exact.chol).T
    np.testing.assert_allclose(mean, exact.loc, atol=1e-10)
    np.testing.assert_allclose(cov, exact_cov, atol=1e-10)
    want = scipy.stats.multivariate_normal(exact.loc, exact_cov).logpdf(given["x"])
    np.testing.assert_allclose(minus_j - log_z, want, rtol=1e-9)

    prior_cov, h, sd = np.linalg.inv(given["prec"]), given["h"][seen], given["sd"][seen]
    spread = h @ prior_cov @ h.T + np.diag(sd**2)
    evidence = scipy.stats.multivariate_normal(h @ given["mean"], spread).logpdf(given["y"][seen])
    constants = 0.5 * np.linalg.slogdet(2 * np.pi * prior_cov)[1]
    constants += np.log(np.sqrt(2 * np.pi) * sd).sum()
    np.testing.assert_allclose(log_z, evidence + constants, rtol=1e-9)


def test_a_temperature_widens_and_does_not_move(x64):
    """T times the covariance, and a normaliser that is that of the grid."""
    operator = jnp.asarray([[1.0, -0.5], [0.3, 0.8], [1.0, 1.0]])
    low = np.array([[1.0, 0.0], [0.3, 0.6]])
    prior = Gaussian(jnp.asarray([0.5, -0.2]), jnp.asarray(low))
    mask, sd = np.array([True, True, False]), np.array([0.5, 0.9, 0.1])
    seen = Event(jnp.asarray([0.7, -0.4, 9.0]), jnp.asarray(mask), jnp.asarray(sd))
    energy = Energy(prior, lambda x: operator @ x)
    axes = (jnp.linspace(-12, 12, 400), jnp.linspace(-12, 12, 420))
    x = jnp.asarray([0.1, 0.2])

    @jax.jit
    def run(temperature):
        gibbs = GibbsPosterior(energy, temperature)
        own = gibbs.gaussian(seen)
        log_zs = gibbs.log_normaliser(seen), gibbs.log_normaliser_grid(axes, seen)
        return own.mean(), own.covariance(), gibbs.log_density(x, seen), energy(x, seen), log_zs

    h = np.asarray(operator)[mask]
    info = np.linalg.inv(low @ low.T) + h.T @ np.diag(sd[mask] ** -2.0) @ h
    for temperature in (0.25, 1.0, 3.0):
        mean, cov, log_density, j, (log_z, on_grid) = run(jnp.asarray(temperature))
        if temperature == 0.25:
            first = mean
        np.testing.assert_allclose(mean, first, atol=1e-12)
        np.testing.assert_allclose(cov, temperature * np.linalg.inv(info), atol=1e-10)
        np.testing.assert_allclose(log_density, -j / temperature, rtol=1e-12)
        np.testing.assert_allclose(log_z, on_grid, rtol=1e-8)


# --- what does not fit ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [float, jnp.asarray])
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature, kind):
    """However it is given: as a number, or as an array that a sweep over T would hold."""
    energy = Energy(Gaussian(jnp.zeros(1), jnp.eye(1)), lambda x: x)
    temperature = kind(temperature)
    with pytest.raises(ValueError, match=f"positive temperature, got {temperature}"):
        GibbsPosterior(energy, temperature)


def test_without_error_bars_j_is_refused():
    energy = Energy(Gaussian(jnp.zeros(2), jnp.eye(2)), lambda x: x)
    with pytest.raises(ValueError, match="an event with its sd, or an Energy with obs_sd"):
        energy(jnp.zeros(2), Event(jnp.zeros(2), jnp.ones(2, bool)))


@pytest.mark.parametrize("shape", [(), (1,), (1, 2)])
def test_an_operator_of_another_shape_is_refused(shape):
    """Without the check it would be stretched to the shape of y, and J would be a number."""
    energy = Energy(Gaussian(jnp.zeros(2), jnp.eye(2)), lambda x: jnp.zeros(shape), obs_sd=1.0)
    with pytest.raises(ValueError, match=r"the shape of y, \(2,\), got"):
        energy(jnp.zeros(2), Event(jnp.zeros(2), jnp.ones(2, bool)))


def test_a_grid_of_three_axes_is_refused():
    energy = Energy(Gaussian(jnp.zeros(3), jnp.eye(3)), lambda x: x, obs_sd=1.0)
    axes = (jnp.linspace(-1, 1, 3),) * 3
    with pytest.raises(ValueError, match="one or two axes, got 3"):
        GibbsPosterior(energy).log_normaliser_grid(axes, Event(jnp.zeros(3), jnp.ones(3, bool)))
