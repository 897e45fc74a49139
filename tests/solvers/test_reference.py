"""Importance sampling against quadrature and against exact answers."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortlib.energy import Energy, GibbsPosterior
from amortlib.gaussian import Gaussian
from amortlib.laplace import laplace
from amortlib.problems import ornstein_uhlenbeck
from amortlib.solvers import importance_sample, population_sample
from amortlib.types import Event

pytestmark = pytest.mark.slow

DRAWS = 40_000


@pytest.fixture(scope="module")
def two_pieces():
    """Two numbers of which the square of the first and the sum were seen: two pieces."""
    prior = Gaussian.from_covariance(jnp.array([0.3, 0.0]), jnp.array([[1.0, 0.2], [0.2, 0.5]]))

    class Squares(eqx.Module):
        def __call__(self, x):
            return jnp.stack([x[0] ** 2, x[0] + x[1]])

    energy = Energy(prior, Squares())
    event = Event(jnp.array([1.2, 0.1]), jnp.array([True, True]), jnp.array([0.3, 1.0]))
    axis = jnp.linspace(-5.0, 5.0, 801)
    grid = jnp.stack(jnp.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    density = jax.nn.softmax(jax.vmap(lambda x: -energy(x, event))(grid))
    return energy, event, axis, np.asarray(grid, float), np.asarray(density, float)


def _sample(energy, event, modes, seed=0):
    return importance_sample(energy, event, jnp.array(modes), DRAWS, key=jax.random.key(seed))


def test_quadrature_agrees_in_two_dimensions(two_pieces) -> None:
    energy, event, axis, grid, density = two_pieces
    draws = _sample(energy, event, [[1.0, -0.3], [-1.0, 0.3]])
    mean = density @ grid
    cov = (grid - mean).T @ (density[:, None] * (grid - mean))
    # Standard errors from the effective size; 5 of them on 7 figures: false alarm 4e-6.
    root = 5.0 / math.sqrt(float(draws.effective_size))
    np.testing.assert_allclose(draws.mean(), mean, atol=root * np.sqrt(np.diag(cov).max()))
    np.testing.assert_allclose(draws.covariance(), cov, atol=2 * root * np.diag(cov).max())
    log_z = GibbsPosterior(energy).log_normaliser_grid((axis, axis), event)
    weights = np.exp(np.asarray(draws.log_weight) - np.asarray(draws.log_weight).max())
    error = weights.std() / weights.mean() / math.sqrt(DRAWS)
    assert abs(float(draws.log_normaliser - log_z)) < 5 * error
    assert draws.effective_size > 0.3 * DRAWS


def test_the_weight_of_each_piece_is_right(two_pieces) -> None:
    energy, event, _, grid, density = two_pieces
    exact = density[grid[:, 0] < 0].sum()
    draws = _sample(energy, event, [[1.0, -0.3], [-1.0, 0.3]], seed=1)
    got = float(draws.weight @ (draws.x[:, 0] < 0))
    assert abs(got - exact) < 5 * math.sqrt(exact * (1 - exact) / float(draws.effective_size))
    again = draws.resample(DRAWS, key=jax.random.key(2))
    # Resampling adds its own error to that of the weights.
    spread = math.sqrt(exact * (1 - exact) * (1 / float(draws.effective_size) + 1 / DRAWS))
    assert abs(float((again[:, 0] < 0).mean()) - exact) < 5 * spread


def test_the_prior_covers_a_mode_that_was_forgotten(two_pieces) -> None:
    energy, event, _, grid, density = two_pieces
    exact = density[grid[:, 0] < 0].sum()
    draws = _sample(energy, event, [[1.0, -0.3]], seed=3)
    got = float(draws.weight @ (draws.x[:, 0] < 0))
    assert abs(got - exact) < 5 * math.sqrt(exact * (1 - exact) / float(draws.effective_size))
    both = _sample(energy, event, [[1.0, -0.3], [-1.0, 0.3]], seed=3)
    assert draws.effective_size < both.effective_size


def test_kl_from_laplace_is_that_of_quadrature(two_pieces) -> None:
    energy, event, _, grid, density = two_pieces
    start = jnp.array([1.0, -0.3])
    for _ in range(20):
        start = start - jnp.linalg.solve(
            jax.hessian(energy)(start, event), jax.grad(energy)(start, event)
        )
    wide = Gaussian(jnp.array([0.2, 0.0]), 1.2 * jnp.eye(2))
    log_p = np.log(np.maximum(density, 1e-300)) - 2 * math.log(10.0 / 800)
    exact = density @ (log_p - np.asarray(jax.vmap(wide.log_prob)(jnp.array(grid, jnp.float32))))
    draws = _sample(energy, event, [[1.0, -0.3], [-1.0, 0.3]], seed=4)
    got = float(draws.kl(wide, energy, event))
    log_ratio = log_p - np.asarray(jax.vmap(wide.log_prob)(jnp.array(grid, jnp.float32)))
    spread = math.sqrt(density @ (log_ratio - exact) ** 2 / float(draws.effective_size))
    assert abs(got - exact) < 5 * spread + 1e-3
    # One Gaussian at one of two modes is far from the posterior, and this says so.
    assert float(draws.kl(laplace(energy, start, event), energy, event)) > 2.0


def test_a_gaussian_posterior_is_recognised() -> None:
    problem = ornstein_uhlenbeck(6)
    _, event = problem.simulate(jax.random.key(0))
    energy = Energy(problem.prior, problem.forward)
    exact = GibbsPosterior(energy)
    q = exact.gaussian(event)
    draws = importance_sample(energy, event, q.loc[None], DRAWS, key=jax.random.key(1))
    weights = np.exp(np.asarray(draws.log_weight) - np.asarray(draws.log_weight).max())
    error = weights.std() / weights.mean() / math.sqrt(DRAWS)
    assert abs(float(draws.log_normaliser - exact.log_normaliser(event))) < 5 * error
    assert abs(float(draws.kl(q, energy, event))) < 5 * error


def test_a_share_out_of_range_is_refused(two_pieces) -> None:
    energy, event, *_ = two_pieces
    with pytest.raises(ValueError, match="prior_share"):
        importance_sample(
            energy, event, jnp.zeros((1, 2)), 10, key=jax.random.key(0), prior_share=0.0
        )


class Radius(eqx.Module):
    """What is seen is how far from the origin the state is."""

    def __call__(self, x):
        return jnp.sqrt(1e-6 + jnp.sum(x**2))[None]


def test_draws_around_draws_find_their_way_along_a_ridge() -> None:
    """The posterior is a ring, and one point of it is known: two more rounds are worth five times
    the draws, and log Z is that of quadrature within five standard errors (false alarm 6e-7)."""
    prior = Gaussian.from_covariance(jnp.array([0.2, -0.1]), jnp.array([[16.0, 0.5], [0.5, 12.0]]))
    energy = Energy(prior, Radius())
    event = Event(jnp.array([6.0]), jnp.array([True]), jnp.array([0.2]))
    axis = jnp.linspace(-8.0, 8.0, 1601)
    log_z = GibbsPosterior(energy).log_normaliser_grid((axis, axis), event)
    modes, n, key = jnp.array([[6.0, 0.0]]), 4096, jax.random.key(3)
    ring = population_sample(energy, event, modes, n, key=key)
    once = population_sample(energy, event, modes, n, key=key, rounds=0)
    assert ring.effective_size > 5 * once.effective_size
    assert ring.effective_size > 0.1 * n
    weights = np.exp(np.asarray(ring.log_weight) - np.asarray(ring.log_weight).max())
    error = weights.std() / weights.mean() / math.sqrt(n)
    assert abs(float(ring.log_normaliser - log_z)) < 5 * error
    plain = importance_sample(energy, event, modes, n, key=jax.random.split(key)[1])
    np.testing.assert_array_equal(once.x, plain.x)


@pytest.mark.parametrize("settings", [{"rounds": -1}, {"centres": 0}])
def test_rounds_and_centres_that_mean_nothing_are_refused(two_pieces, settings) -> None:
    energy, event, *_ = two_pieces
    with pytest.raises(ValueError, match="expected rounds >= 0 and centres >= 1"):
        population_sample(energy, event, jnp.ones((1, 2)), 10, key=jax.random.key(0), **settings)
