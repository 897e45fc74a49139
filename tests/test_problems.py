"""Simulated pairs have the joint density they claim, and a faulty function is called by name."""

import ast
import inspect
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from amortlib.encoders import FlatEncoder
from amortlib.heads.regression import CholeskyHead
from amortlib.objectives import nll
from amortlib.observation import ContiguousGaps, Dropouts, FixedMask, GaussianNoise
from amortlib.posterior import AmortizedPosterior
from amortlib.problems import (
    InvalidProblemError,
    InverseProblem,
    ornstein_uhlenbeck,
    simulate_pair,
)
from amortlib.training import fit

KEY = jax.random.key(0)
N = 20_000


# --- simulate_pair ----------------------------------------------------------------------------


def test_simulate_pair_has_its_published_signature():
    parameters = inspect.signature(simulate_pair).parameters
    assert list(parameters) == ["key", "prior_sample", "forward", "obs_noise"]
    for parameter in parameters.values():
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        assert parameter.default is parameter.empty


def test_a_pair_is_made_by_the_three_functions_in_turn():
    """The noise is given the clean value, and the same key gives the same pair."""

    def noise(key: jax.Array, clean: jax.Array) -> jax.Array:
        return clean * (1 + jax.random.uniform(key, clean.shape))

    x, y = simulate_pair(KEY, lambda key: jax.random.normal(key, (3,)), jnp.exp, noise)
    ratio = np.asarray(y / jnp.exp(x))
    assert ((ratio >= 1) & (ratio < 2)).all()
    again, _ = simulate_pair(KEY, lambda key: jax.random.normal(key, (3,)), jnp.exp, noise)
    np.testing.assert_array_equal(again, x)


def test_state_and_noise_have_keys_of_their_own():
    """Were one key used for both, the noise would be the state."""
    draw = lambda key: jax.random.normal(key, (2,))  # noqa: E731
    x, y = simulate_pair(KEY, draw, jnp.zeros_like, lambda key, clean: clean + draw(key))
    assert (x != y).all()


# --- the Ornstein-Uhlenbeck problem -----------------------------------------------------------


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, y, mask and sd of many events with three values each."""
    problem = ornstein_uhlenbeck(
        3, dt=0.5, timescale=2.0, sd=1.5, noise=0.4, loc=2.0, gaps=Dropouts(0.3)
    )
    x, event = problem.batch(jax.random.key(1), N)
    return tuple(np.asarray(a, float) for a in (x, event.y, event.mask, event.sd))


def test_pairs_have_the_joint_moments(pairs):
    """Mean and covariance of (x, y), six numbers: cov(x) is sd^2 exp(-lag / timescale), y adds
    the noise's variance. Within 5 standard errors an entry (C_ij's is sqrt((C_ii C_jj + C_ij^2)
    / N)): 27 entries, a false alarm in 2e-5, and the key is fixed.
    """
    x, y, _, _ = pairs
    lag = 0.5 * np.abs(np.arange(3)[:, None] - np.arange(3))
    cov = np.tile(1.5**2 * np.exp(-lag / 2.0), (2, 2))
    cov[3:, 3:] += 0.4**2 * np.eye(3)
    drawn, var = np.concatenate([x, y], axis=1), np.diag(cov)
    assert (np.abs(drawn.mean(0) - 2.0) <= 5 * np.sqrt(var / N)).all()
    error = 5 * np.sqrt((np.outer(var, var) + cov**2) / N)
    assert (np.abs(np.cov(drawn.T) - cov) <= error).all()


def test_errors_and_masks_know_nothing_of_the_state(pairs):
    """Errors are normal (Kolmogorov-Smirnov, p above 1e-6) and uncorrelated, as they are and in
    size, with the state; so is the mask, with the state and the errors. Correlations within
    5 / sqrt(N): 36 entries, a false alarm in 2e-5.
    """
    x, y, mask, _ = pairs
    errors = (y - x) / 0.4
    assert scipy.stats.kstest(errors.reshape(-1), "norm").pvalue > 1e-6
    for a, b in ((x, errors), (x**2, errors**2), (mask, x), (mask, errors)):
        between = np.corrcoef(a.T, b.T)[:3, 3:]
        assert (np.abs(between) <= 5 / np.sqrt(N)).all()


def test_an_event_carries_the_level_of_its_noise(pairs):
    np.testing.assert_array_equal(pairs[3], np.float32(0.4))


def test_a_level_that_varies_is_written_into_each_event():
    """Scaled by the sd in the event, errors are standard normal (p above 1e-6), and the level is
    one number an event, log-uniform (likewise) and independent of the state.
    """
    problem = ornstein_uhlenbeck(3, noise=(0.1, 2.0), gaps=Dropouts(0.3))
    x, event = problem.batch(jax.random.key(2), 5000)
    x, y, sd = (np.asarray(a, float) for a in (x, event.y, event.sd))
    assert (sd == sd[:, :1]).all()
    assert scipy.stats.kstest(((y - x) / sd).reshape(-1), "norm").pvalue > 1e-6
    assert scipy.stats.kstest(sd[:, 0], scipy.stats.loguniform(0.1, 2.0).cdf).pvalue > 1e-6
    assert abs(np.corrcoef(np.abs(x[:, 0]), sd[:, 0])[0, 1]) <= 5 / np.sqrt(5000)


def test_its_prior_is_the_density_that_is_sampled(pairs):
    problem = ornstein_uhlenbeck(3, dt=0.5, timescale=2.0, sd=1.5, loc=2.0)
    lag = 0.5 * np.abs(np.arange(3)[:, None] - np.arange(3))
    cov = jax.jit(lambda prior: prior.covariance())(problem.prior)
    np.testing.assert_allclose(cov, 1.5**2 * np.exp(-lag / 2.0), rtol=1e-5)
    np.testing.assert_array_equal(problem.prior.loc, 2.0)
    assert isinstance(problem.gaps, ContiguousGaps)
    assert problem.shapes() == ((3,), (3,))


# --- batches ----------------------------------------------------------------------------------


def test_a_batch_is_its_pairs_one_by_one():
    """Key by key; another program may round otherwise: 1e-5."""
    problem = ornstein_uhlenbeck(3, noise=(0.1, 2.0), gaps=Dropouts(0.3))
    x, events = problem.batch(KEY, 16)
    one = jax.jit(lambda key: problem.simulate(key))
    for k, key in enumerate(jax.random.split(KEY, 16)):
        want, event = one(key)
        np.testing.assert_allclose(x[k], want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(events.y[k], event.y, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(events.sd[k], event.sd, rtol=1e-5)
        np.testing.assert_array_equal(events.mask[k], event.mask)


def test_a_fresh_key_gives_a_fresh_minibatch_and_the_same_key_the_same():
    problem = ornstein_uhlenbeck(3, noise=(0.1, 2.0), gaps=Dropouts(0.3))
    x, event = problem.batch(KEY, 16)
    again, _ = problem.batch(KEY, 16)
    other, other_event = problem.batch(jax.random.key(1), 16)
    np.testing.assert_array_equal(x, again)
    values = np.concatenate([np.asarray(a).reshape(-1) for a in (x, other)])
    assert len(np.unique(values)) == values.size
    assert (event.y != other_event.y).all()


def test_the_same_problem_under_other_gaps():
    """Pairs are the same, key by key, and only the masks are others."""
    problem = InverseProblem(**OWN)
    x, event = problem.batch(KEY, 4)
    other, hidden = problem.with_gaps(FixedMask(jnp.zeros((3, 2), bool))).batch(KEY, 4)
    np.testing.assert_allclose(other, x, rtol=1e-6)
    np.testing.assert_allclose(hidden.y, event.y, rtol=1e-5)
    assert not hidden.mask.any()


# --- a user's own -----------------------------------------------------------------------------


def own_prior(key: jax.Array) -> jax.Array:
    """Two numbers on a ring: a prior that is no Gaussian, and no density is given."""
    angle = jax.random.uniform(key, maxval=2 * jnp.pi)
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def own_forward(x: jax.Array) -> jax.Array:
    """Curved, and seen on two axes."""
    return jnp.stack([x, x**2, jnp.exp(x)])


def own_noise(key: jax.Array, clean: jax.Array) -> jax.Array:
    """Grows with what is seen; its level is nobody's business."""
    return clean + (0.1 + 0.1 * jnp.abs(clean)) * jax.random.laplace(key, clean.shape)


OWN = {
    "prior_sample": own_prior,
    "forward": own_forward,
    "obs_noise": own_noise,
    "gaps": Dropouts(0.0, 1.0),
}


def test_three_functions_of_one_s_own_plug_in():
    problem = InverseProblem(**OWN)
    assert problem.shapes() == ((2,), (3, 2))
    problem.check(KEY)
    x, event = problem.batch(KEY, 5)
    assert event.sd is None
    assert event.y.shape == event.mask.shape == (5, 3, 2)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1.0, rtol=1e-5)


@pytest.mark.slow
def test_a_posterior_trains_on_three_functions_of_one_s_own():
    problem = InverseProblem(**OWN)
    k_encoder, k_head = jax.random.split(KEY)
    model = AmortizedPosterior(
        FlatEncoder((3, 2), key=k_encoder, features=8, width=8, depth=1),
        CholeskyHead(8, 2, key=k_head),
    )
    result = fit(
        model,
        nll,
        lambda key: problem.batch(key, 64),
        key=KEY,
        steps=100,
        every=100,
        optimizer=optax.adam(1e-2),
        progress=False,
    )
    # It falls by about one nat; the mean of 20 such losses is good to 0.03.
    assert result.loss[-20:].mean() < result.loss[:20].mean() - 0.5


def test_shapes_are_found_without_running_anything():
    def loud(x):
        jax.debug.callback(lambda: ran.append(None))
        return x

    ran: list = []
    problem = InverseProblem(own_prior, loud, own_noise, Dropouts(0.5))
    assert problem.shapes() == ((2,), (2,))
    jax.effects_barrier()
    assert ran == []


# --- check ------------------------------------------------------------------------------------


def raises(*_: object) -> jax.Array:
    raise KeyError("mine")


def pair_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, x


def reshaped(key: jax.Array, clean: jax.Array) -> jax.Array:
    del key
    return clean.reshape(-1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prior_sample": raises}, r"prior_sample raised KeyError.*'mine'"),
        ({"prior_sample": lambda key: jnp.zeros((2, 2))}, r"prior_sample\(key\).*\(d,\)"),
        ({"prior_sample": lambda key: jnp.zeros(())}, r"prior_sample\(key\).*\(d,\)"),
        ({"prior_sample": lambda key: pair_of(jnp.zeros(2))}, r"prior_sample\(key\).*one array"),
        ({"prior_sample": lambda: jnp.zeros(2)}, r"prior_sample raised TypeError"),
        ({"forward": raises}, r"forward raised KeyError.*'mine'"),
        ({"forward": lambda x: x @ jnp.zeros((3, 3))}, r"forward raised TypeError"),
        ({"forward": jnp.sum}, r"forward\(x\).*at least one entry"),
        ({"forward": lambda x: x[:0]}, r"forward\(x\).*at least one entry"),
        ({"forward": pair_of}, r"forward\(x\).*one array"),
        ({"prior_sample": lambda key: jnp.arange(2)}, r"prior_sample\(key\).*got dtype int32"),
        ({"forward": lambda x: own_forward(x).astype(int)}, r"forward\(x\).*got dtype int32"),
        ({"forward": lambda x: own_forward(x) * 1j}, r"forward\(x\).*got dtype complex64"),
        ({"obs_noise": jax.random.poisson}, r"obs_noise\(key, clean\).*got dtype int32"),
        ({"obs_noise": raises}, r"obs_noise raised KeyError.*'mine'"),
        ({"obs_noise": reshaped}, r"obs_noise\(key, clean\) to keep the shape \(3, 2\)"),
        ({"obs_noise": lambda clean, key: clean}, r"obs_noise\(key, clean\) to keep the shape"),
        ({"obs_noise": GaussianNoise(jnp.ones(5))}, r"obs_noise raised"),
        ({"obs_noise": GaussianNoise(jnp.ones((4, 3, 2)))}, r"obs_noise"),
        ({"gaps": raises}, r"gaps raised KeyError.*'mine'"),
        ({"gaps": lambda key, shape: jnp.ones(shape)}, r"gaps\(key, shape\).*booleans.*\(3, 2\)"),
        ({"gaps": lambda key, shape: jnp.ones(shape[0], bool)}, r"gaps\(key, shape\).*\(3, 2\)"),
        ({"gaps": FixedMask(jnp.ones(3, bool))}, r"gaps raised ValueError"),
    ],
)
def test_check_names_the_function_that_does_not_fit(changed, message):
    with pytest.raises(InvalidProblemError, match=f"(?s){message}") as caught:
        InverseProblem(**(OWN | changed)).check(KEY)
    others = [name for name in OWN if name not in changed and name in str(caught.value)]
    assert others == []


def rarely_bad(key: jax.Array) -> jax.Array:
    x = own_prior(key)
    return jnp.where(x[0] > 0.95, jnp.nan, x)


BAD = {
    "prior_sample": rarely_bad,
    "forward": lambda x: own_forward(x) / (x[0] < 0.95),
    "obs_noise": lambda key, clean: jnp.where(
        jax.random.uniform(key) < 0.05, jnp.inf, own_noise(key, clean)
    ),
}


@pytest.mark.parametrize(
    ("name", "make_key"),
    [
        ("forward", jax.random.PRNGKey),
        ("obs_noise", jax.random.key),
        pytest.param("prior_sample", jax.random.key, marks=pytest.mark.slow),
    ],
)
def test_check_gives_a_key_that_makes_the_bad_values_again(name, make_key):
    """Bad in about one draw in ten or twenty: 64 draws miss it with probability below 0.04, and
    the key is fixed.
    """
    problem = InverseProblem(**(OWN | {name: BAD[name]}))
    with pytest.raises(InvalidProblemError, match=f"^{name} returned values") as caught:
        problem.check(make_key(3))
    words = re.search(r"the key (\[.*\])", str(caught.value))
    of = re.search(r"in (\d+) of 64", str(caught.value))
    assert 0 < int(of[1]) < 64
    key = jax.random.wrap_key_data(jnp.asarray(ast.literal_eval(words[1]), jnp.uint32))
    x, event = jax.jit(lambda key: problem.simulate(key))(key)
    assert not np.isfinite(np.asarray(event.y)).all()
    assert np.isfinite(np.asarray(x)).all() == (name != "prior_sample")


def test_check_has_nothing_to_say_about_a_good_problem():
    assert ornstein_uhlenbeck(3, noise=(0.1, 2.0)).check(KEY) is None


@pytest.mark.parametrize("level", [0.0, -0.3])
def test_check_refuses_an_error_bar_that_is_not_positive(level):
    """Its values are finite, but its logarithm, which a head reads, and J are not."""
    problem = InverseProblem(**(OWN | {"obs_noise": GaussianNoise(level)}))
    with pytest.raises(InvalidProblemError, match=f"obs_noise to have a positive sd, got {level}"):
        problem.check(KEY)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noise": (2.0, 1.0)}, "0 < low < high, got low=2.0, high=1.0"),
        ({"noise": (0.0, 1.0)}, "0 < low < high, got low=0.0, high=1.0"),
        ({"loc": np.zeros(4)}, r"\(4,\).*\(3,\)"),
    ],
)
def test_an_ornstein_uhlenbeck_problem_refuses_what_does_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        ornstein_uhlenbeck(3, **given)


def test_a_background_of_one_s_own_moves_the_state_and_what_is_seen():
    """The draws are those about zero, moved: single precision, 1e-5."""
    loc = np.array([1.0, -2.0, 3.0])
    x, event = ornstein_uhlenbeck(3, loc=loc).batch(KEY, 4)
    centred, other = ornstein_uhlenbeck(3).batch(KEY, 4)
    np.testing.assert_allclose(x - centred, np.tile(loc, (4, 1)), atol=1e-5)
    np.testing.assert_allclose(event.y - other.y, np.tile(loc, (4, 1)), atol=1e-5)


def test_values_under_the_mask_are_looked_at_too():
    """A forward model that fails where nothing was seen is a fault all the same."""
    problem = InverseProblem(
        own_prior, lambda x: own_forward(x) * jnp.inf, own_noise, FixedMask(jnp.zeros((3, 2), bool))
    )
    with pytest.raises(InvalidProblemError, match=r"^forward returned values .* in 64 of 64"):
        problem.check(KEY)


def test_a_problem_goes_through_a_compiled_function_as_an_argument():
    run = eqx.filter_jit(lambda problem, key: problem.simulate(key)[0])
    one = run(ornstein_uhlenbeck(3, loc=0.0), KEY)
    other = run(ornstein_uhlenbeck(3, loc=100.0), KEY)
    np.testing.assert_allclose(other - one, 100.0, rtol=1e-5)
