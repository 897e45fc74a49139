"""The oracle: finds the lowest minimum, and says when it is not sure."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _kit.windows import FixedSteps

from amortlib.energy import Energy
from amortlib.gaussian import Gaussian, condition
from amortlib.laplace import gain, gauss_newton_hessian, hessian, mode_jacobian
from amortlib.observation import AllMissing, ContiguousGaps, GaussianNoise, gap
from amortlib.problems import InverseProblem, lorenz63, lorenz63_sign_lost, ornstein_uhlenbeck
from amortlib.solvers import Oracle
from amortlib.solvers.oracle import _census
from amortlib.types import Event, InvalidEventError, to_double


def window(**changes) -> InverseProblem:
    """Lorenz-63 in plain steps: a search is the same, and compiles in a third of the time."""
    return FixedSteps.in_place(lorenz63(substeps=2, **changes))


def bent() -> InverseProblem:
    """A forward model of two lines, nonlinear: what has to do with no dynamics compiles faster."""
    prior = Gaussian(jnp.array([0.5, -0.5]), jnp.array([[1.0, 0.0], [0.4, 0.6]]))

    def forward(x: jax.Array) -> jax.Array:
        return jnp.stack([x[0] ** 2 + x[1], jnp.sin(2 * x[1]) + x[0], x[0] * x[1]])

    draw = lambda key: prior.sample(1, key=key)[0]  # noqa: E731
    return InverseProblem(draw, forward, GaussianNoise(0.3), ContiguousGaps(0.4), prior)


def _oracle(problem, **settings):
    return Oracle(Energy(problem.prior, problem.forward), **settings)


@pytest.fixture(scope="module")
def chaotic():
    """40 Lorenz-63 events under gaps of 60%, and what the oracle says of them."""
    problem = window(gaps=ContiguousGaps(0.6))
    _, events = problem.batch(jax.random.key(0), 40)
    return problem, events, _oracle(problem)(events, key=jax.random.key(1))


def test_a_linear_problem_is_solved_exactly() -> None:
    problem = ornstein_uhlenbeck(12)
    _, events = problem.batch(jax.random.key(0), 5)
    found = _oracle(problem, starts=4, batch=2)(events, key=jax.random.key(1))
    with jax.enable_x64(True):
        prior, exact_events = to_double((problem.prior, events))
        identity = jnp.eye(12)
        for i in range(5):
            event = jax.tree.map(lambda a, i=i: a[i], exact_events)
            exact = condition(prior, identity, event)
            jacobian = jax.jacfwd(
                lambda y, e=event: condition(prior, identity, Event(y, e.mask, e.sd)).loc
            )(event.y)
            np.testing.assert_allclose(found.mode[i], exact.loc, atol=1e-8)
            np.testing.assert_allclose(found.covariance[i], exact.covariance(), atol=1e-8)
            np.testing.assert_allclose(found.jacobian[i], jacobian, atol=1e-8)
            np.testing.assert_allclose(found.gain[i], jacobian, atol=1e-8)
    assert found.converged.all()
    assert found.sure.all()
    assert found.single.all()
    assert (found.minima == 1).all()
    # One search in four could lead elsewhere for all that four searches say: it makes more.
    assert (found.starts == 12).all()
    assert (found.hits == 12).all()


@pytest.mark.slow
def test_double_precision_stays_inside(chaotic) -> None:
    _, _, found = chaotic
    assert found.mode.dtype == np.float64
    assert jnp.zeros(1).dtype == jnp.float32


@pytest.mark.slow
def test_the_mode_is_stationary_and_a_minimum(chaotic) -> None:
    problem, events, found = chaotic
    assert found.converged.all()
    with jax.enable_x64(True):
        energy, events = to_double((Energy(problem.prior, problem.forward), events))
        j = jax.vmap(energy)(jnp.asarray(found.mode), events)
        np.testing.assert_allclose(found.energy, j, rtol=1e-12)
        # A step of a hundredth of a standard deviation in any direction goes up.
        for key in jax.random.split(jax.random.key(2), 8):
            z = jax.random.normal(key, found.mode.shape)
            root = jnp.linalg.cholesky(jnp.asarray(found.covariance))
            step = 0.01 * jnp.einsum("eij,ej->ei", root, z)
            assert (jax.vmap(energy)(found.mode + step, events) > j).all()


@pytest.mark.slow
def test_other_starts_find_nothing_lower(chaotic) -> None:
    """Of four more searches, each from starts of its own; they are one program with the first."""
    problem, events, found = chaotic
    for key in jax.random.split(jax.random.key(3), 4):
        other = _oracle(problem)(events, key=key)
        lower = other.energy < found.energy * (1 - 1e-8) - 1e-8
        assert not lower.any()


def test_the_result_does_not_depend_on_the_batch() -> None:
    problem = bent()
    _, events = problem.batch(jax.random.key(0), 7)
    whole = _oracle(problem, starts=8)(events, key=jax.random.key(9))
    parts = _oracle(problem, starts=8, batch=3)(events, key=jax.random.key(9))
    np.testing.assert_allclose(parts.energy, whole.energy, rtol=1e-9)
    np.testing.assert_allclose(parts.mode, whole.mode, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_the_gain_is_not_the_jacobian_where_the_model_bends(chaotic) -> None:
    _, _, found = chaotic
    size = np.linalg.norm(found.jacobian.reshape(40, 3, -1), 2, axis=(1, 2))
    off = np.linalg.norm((found.gain - found.jacobian).reshape(40, 3, -1), 2, axis=(1, 2)) / size
    assert (off > 0.05).mean() > 0.1
    assert np.isfinite(off).all()


@pytest.mark.slow
def test_two_mirrored_minima_are_both_found() -> None:
    problem = FixedSteps.in_place(lorenz63_sign_lost(substeps=2))
    _, event = problem.simulate(jax.random.key(4))
    hidden = Event(event.y, jnp.broadcast_to(gap(5, 0, 1)[:, None], (5, 2)), event.sd)
    events = jax.tree.map(lambda a: a[None], hidden)
    found = _oracle(problem)(events, key=jax.random.key(5))
    assert not found.single[0]
    assert found.rise[0] < 1e-6
    mirror = np.array([-1.0, -1.0, 1.0])
    lowest = np.argsort(np.where(found.distinct[0], found.end_energy[0], np.inf))[:2]
    a, b = found.ends[0, lowest]
    np.testing.assert_allclose(a, mirror * b, atol=1e-2)


def test_everything_missing_gives_the_background() -> None:
    problem = bent().with_gaps(AllMissing())
    _, events = problem.batch(jax.random.key(6), 2)
    found = _oracle(problem, starts=4)(events, key=jax.random.key(7))
    np.testing.assert_allclose(found.mode, np.tile(problem.prior.loc, (2, 1)), atol=1e-6)
    np.testing.assert_allclose(found.covariance[0], problem.prior.covariance(), rtol=1e-5)
    assert (found.energy < 1e-12).all()
    assert (found.jacobian == 0).all()
    assert found.sure.all()


def test_it_says_that_it_is_unsure() -> None:
    problem = bent()
    _, events = problem.batch(jax.random.key(0), 8)
    hurried = _oracle(problem, starts=4, rounds=1, max_outer=1)(events, key=jax.random.key(1))
    assert not hurried.sure.any()
    # Three starts cannot tell: even if all agree, one in six may lead elsewhere.
    few = _oracle(problem, starts=3, rounds=1)(events, key=jax.random.key(1))
    assert few.converged.all()
    assert not few.sure.any()
    assert "0 sure" in few.summary()


@pytest.mark.slow
def test_more_rounds_are_run_only_where_they_are_needed(chaotic) -> None:
    _, _, found = chaotic
    assert set(np.unique(found.starts)) <= {16, 32, 48, 64}
    assert (found.starts > 16).any()
    assert (found.starts == 16).any()
    assert np.isinf(found.end_energy[found.starts == 16][:, 16:]).all()


def test_the_census_counts_minima() -> None:
    ends = np.array([[[0.0], [1e-4], [3.0], [3.0], [5.0], [9.0]]])
    values = np.array([[1.0, 1.0, 2.5, 2.5, 7.0, np.inf]])
    out = _census(ends, values, 0.5)
    assert out["minima"][0] == 3
    assert out["hits"][0] == 2
    assert out["rise"][0] == 1.5
    assert out["unseen"][0] == pytest.approx(3 * 4 / (5 * 4))
    assert not out["sure"][0]
    assert out["distinct"][0].tolist() == [True, False, True, False, True, False]


def test_the_expected_share_of_unseen_minima_is_about_right() -> None:
    # Five basins with shares drawn uniformly from the simplex, the prior of the formula: over
    # many sets of 12 searches the mean of the estimate is the mean of the true unseen share.
    rng = np.random.default_rng(0)
    estimates, truths = [], []
    for _ in range(4000):
        shares = rng.dirichlet(np.ones(5))
        seen = rng.choice(5, size=12, p=shares)
        found = len(set(seen.tolist()))
        estimates.append(found * (found + 1) / (12 * 11))
        truths.append(1 - shares[sorted(set(seen.tolist()))].sum())
    # The formula does not know that there are five; it is cautious, not far off.
    assert np.mean(truths) < np.mean(estimates) < 4 * np.mean(truths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: jax.tree.map(lambda a: a[0], e), "expected a batch of events"),
        (lambda e: jax.tree.map(lambda a: a[:0], e), "at least one event"),
        (lambda e: jax.tree.map(lambda a: a[:, :3], e), r"\(n, 5, 2\)"),
        (lambda e: eqx.tree_at(lambda e: e.y, e, e.y.at[1].set(jnp.nan)), r"index \(1, "),
    ],
)
def test_bad_events_are_refused(change, message) -> None:
    problem = window()
    _, events = problem.batch(jax.random.key(0), 3)
    with pytest.raises(InvalidEventError, match=message):
        _oracle(problem)(change(events), key=jax.random.key(0))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="starts >= 3"):
        _oracle(window(), starts=2)


def test_what_is_said_of_a_mode_is_what_its_curvature_says(x64) -> None:
    """In a model that bends, where the two Hessians differ: against the formulas for the state."""
    problem = bent()
    _, events = problem.batch(jax.random.key(0), 5)
    found = _oracle(problem, starts=8)(events, key=jax.random.key(9))
    energy = to_double(Energy(problem.prior, problem.forward))
    for i in range(5):
        event, mode = (
            to_double(jax.tree.map(lambda a, i=i: a[i], events)),
            jnp.asarray(found.mode[i]),
        )
        want = {
            "energy": energy(mode, event),
            "covariance": jnp.linalg.inv(hessian(energy, mode, event)),
            "gauss_newton_covariance": jnp.linalg.inv(gauss_newton_hessian(energy, mode, event)),
            "jacobian": mode_jacobian(energy, mode, event),
            "gain": gain(energy, mode, event),
        }
        for name, value in want.items():
            np.testing.assert_allclose(getattr(found, name)[i], value, rtol=1e-8, atol=1e-9)
    assert np.abs(found.gain - found.jacobian).max() > 1e-3


def test_a_model_that_gives_no_number_is_not_said_to_have_converged() -> None:
    prior = Gaussian(jnp.zeros(2), jnp.eye(2))
    energy = Energy(prior, lambda x: x * jnp.nan, obs_sd=1.0)
    events = Event(jnp.ones((3, 2)), jnp.ones((3, 2), bool))
    found = Oracle(energy, starts=3, rounds=1)(events, key=jax.random.key(0))
    assert not found.converged.any()
    assert not found.sure.any()
