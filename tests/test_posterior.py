"""The amortized posterior: its methods are its distribution's, and slopes are those of y."""

import itertools
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from amortlib.encoders import FlatEncoder, SiteEncoder
from amortlib.heads.regression import CholeskyHead, DiagonalHead, InformationHead
from amortlib.posterior import AmortizedPosterior, regression_posterior
from amortlib.problems import ornstein_uhlenbeck
from amortlib.types import Event, InvalidEventError

KEY = jax.random.key(0)
T = 4
SIZES = {"width": 6, "depth": 1, "features": 4}
KINDS = {
    "information": (SiteEncoder, InformationHead),
    "cholesky": (FlatEncoder, CholeskyHead),
    "diagonal": (FlatEncoder, DiagonalHead),
}
# The heads' own tests hold the other two to the same: here they are for the whole suite.
every_kind = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind == "information" else [pytest.mark.slow])
        for kind in KINDS
    ],
)


@cache
def made(kind: str, *, uses_sd: bool = True) -> AmortizedPosterior:
    prior = ornstein_uhlenbeck(T, loc=1.5).prior
    return regression_posterior(kind, key=KEY, prior=prior, uses_sd=uses_sd, **SIZES)


def event_of(seed: int, shape: tuple[int, ...] = (T,)) -> Event:
    rng = np.random.default_rng(seed)
    y, sd = rng.normal(size=shape), rng.uniform(0.3, 0.8, shape)
    mask = np.broadcast_to(np.arange(shape[-1]) % 3 != 1, shape)
    return Event(jnp.asarray(y, jnp.float32), jnp.asarray(mask), jnp.asarray(sd, jnp.float32))


@eqx.filter_jit
def study(model: AmortizedPosterior, x: jax.Array, event: Event) -> dict[str, jax.Array]:
    return {
        "log_prob": model.log_prob(x, event),
        "mode": model.mode(event),
        "mean": model.mean(event),
        "sd": model.sd(event),
        "covariance": model.covariance(event),
        "draws": model.sample(event, 20_000, key=jax.random.key(3)),
        "jacobian": model.mode_jacobian(event),
    }


@cache
def said(kind: str) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, study(made(kind), jnp.ones(T), event_of(0)))


@every_kind
def test_the_methods_speak_of_one_distribution(kind):
    """log_prob is scipy's normal with the stated mean and covariance; draws have both within 5.5
    standard errors an entry (a false alarm for fewer than one of 10^6 keys; the key is fixed).
    """
    got, n = said(kind), 20_000
    mean, cov = got["mean"].astype(float), got["covariance"].astype(float)
    np.testing.assert_array_equal(got["mode"], got["mean"])
    np.testing.assert_allclose(got["sd"], np.sqrt(np.diag(cov)), rtol=1e-4)
    want = scipy.stats.multivariate_normal(mean, cov).logpdf(np.ones(T))
    np.testing.assert_allclose(got["log_prob"], want, rtol=1e-4)
    assert got["draws"].shape == (n, T)
    var, draws = np.diag(cov), got["draws"].astype(float)
    assert (np.abs(draws.mean(0) - mean) <= 5.5 * np.sqrt(var / n)).all()
    error = 5.5 * np.sqrt((np.outer(var, var) + cov**2) / n)
    assert (np.abs(np.cov(draws.T) - cov) <= error).all()


def test_draws_follow_their_key():
    draw = eqx.filter_jit(lambda model, key: model.sample(event_of(0), 3, key=key))
    one, same, other = (draw(made("cholesky"), jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).all()


@every_kind
def test_the_slope_of_the_mode_is_that_of_finite_differences(x64, kind):
    """Central differences of step 1e-5 in double precision, held to 1e-7 of the largest slope;
    a masked entry's column is exactly zero.
    """
    double = lambda a: a.astype(jnp.float64) if eqx.is_inexact_array(a) else a  # noqa: E731
    model = jax.tree.map(double, made(kind))
    event = jax.tree.map(double, event_of(0))
    run = jax.jit(lambda y: model.mode(Event(y, event.mask, event.sd)))
    jacobian = jax.jit(lambda y: model.mode_jacobian(Event(y, event.mask, event.sd)))(event.y)
    steps = 1e-5 * jnp.eye(T)
    want = jnp.stack([(run(event.y + s) - run(event.y - s)) / 2e-5 for s in steps], axis=1)
    assert jacobian.dtype == jnp.float64
    np.testing.assert_allclose(jacobian, want, atol=1e-7 * np.abs(want).max())
    np.testing.assert_array_equal(np.abs(jacobian).max(0) != 0, event.mask)


def test_the_slope_has_the_axes_of_y():
    prior = ornstein_uhlenbeck(3).prior
    model = regression_posterior("diagonal", key=KEY, prior=prior, obs_shape=(2, T), **SIZES)
    event = event_of(1, (2, T))
    slope = eqx.filter_jit(model.mode_jacobian)(event)
    assert slope.shape == (3, 2, T)
    np.testing.assert_array_equal(np.abs(slope).max(0) != 0, event.mask)


@every_kind
def test_a_batch_of_events_is_the_events_one_by_one(kind):
    """Sums may round otherwise in another program: 1e-4."""
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *[event_of(k) for k in range(3)])
    xs = jax.random.normal(jax.random.key(8), (3, T))
    together = eqx.filter_jit(
        jax.vmap(lambda x, e: (made(kind).log_prob(x, e), made(kind).mode(e), made(kind).sd(e)))
    )(xs, stacked)
    for k in range(3):
        one = study(made(kind), xs[k], event_of(k))
        for got, name in zip(together, ("log_prob", "mode", "sd"), strict=True):
            np.testing.assert_allclose(got[k], one[name], rtol=1e-4, atol=1e-5)


@every_kind
def test_one_program_serves_every_mask(kind):
    """A mask is data: another one compiles nothing anew."""
    traces = []

    @jax.jit
    def run(event):
        traces.append(None)
        return made(kind).mean(event)

    answers = []
    for mask in ([True] * T, [False] * T, [True, False, True, False]):
        event = event_of(2)
        answers.append(run(Event(event.y, jnp.asarray(mask), event.sd)))
    assert len(traces) == 1
    assert all((a != b).any() for a, b in itertools.pairwise(answers))


# --- what does not fit ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cholesky", "diagonal"])
@pytest.mark.parametrize("shape", [(3,), (5,), (2, T), ()])
def test_an_event_of_another_shape_is_refused(kind, shape):
    event = Event(jnp.zeros(shape), jnp.ones(shape, bool), jnp.ones(shape))
    with pytest.raises(InvalidEventError, match=r"shape \(4,\), got \(.*jax.vmap"):
        made(kind)(event)


def test_a_batch_given_to_the_information_form_is_refused():
    with pytest.raises(ValueError, match=r"got \(2, 4\)"):
        made("information")(event_of(0, (2, T)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_another_shape_is_refused(kind):
    """It would be stretched over y by some encoders; `tree_at` makes what `Event` refuses to."""
    event = eqx.tree_at(lambda e: e.mask, event_of(0), jnp.ones((1,), bool))
    with pytest.raises(InvalidEventError, match=r"a mask of the shape of y, \(4,\), got \(1,\)"):
        made(kind)(event)


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_is_no_number_is_refused_where_it_was_observed(kind):
    """Under the mask it is data as people have it."""
    event, seen = event_of(0), jnp.arange(T) != 1
    y = event.y.at[1].set(jnp.nan)
    made(kind)(Event(y, seen, event.sd))
    with pytest.raises(InvalidEventError, match=r"finite values at observed.*nan at index \(1,\)"):
        made(kind)(Event(y, jnp.ones(T, bool), event.sd))
    numbers = eqx.tree_at(lambda e: e.mask, event, seen.astype(int))
    with pytest.raises(InvalidEventError, match=r"boolean mask .*, got dtype int32"):
        made(kind)(numbers)


@every_kind
def test_error_bars_that_are_read_must_be_there(kind):
    event = event_of(0)
    bare = Event(event.y, event.mask)
    with pytest.raises(InvalidEventError, match="with its observation-error sd, got sd=None"):
        made(kind).mean(bare)
    without = eqx.filter_jit(lambda model, event: model.mean(event))
    model = made(kind, uses_sd=False)
    np.testing.assert_array_equal(without(model, bare), without(model, event))


@pytest.mark.parametrize("n", [0, -1])
def test_no_draws_are_refused(n):
    with pytest.raises(ValueError, match=f"at least one sample, got n={n}"):
        made("diagonal").sample(event_of(0), n, key=KEY)


# --- the maker --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_made_of_its_parts(kind):
    encoder, head = KINDS[kind]
    assert isinstance(made(kind).encoder, encoder)
    assert isinstance(made(kind).head, head)
    assert made(kind).encoder.uses_sd
    assert not made(kind, uses_sd=False).encoder.uses_sd


def test_the_information_form_is_the_default():
    prior = ornstein_uhlenbeck(T).prior
    made_so = regression_posterior(key=KEY, prior=prior, **SIZES)
    assert eqx.tree_equal(
        made_so, regression_posterior("information", key=KEY, prior=prior, **SIZES)
    )


def test_the_information_form_takes_one_observation_a_site_and_says_so():
    """It was made all the same, for events of the prior's length."""
    prior = ornstein_uhlenbeck(T).prior
    with pytest.raises(ValueError, match=r"obs_shape=\(4,\), got \(2, 4\); .* InformationHead"):
        regression_posterior(key=KEY, prior=prior, obs_shape=(2, T), **SIZES)
    named = regression_posterior(key=KEY, prior=prior, obs_shape=(T,), **SIZES)
    assert eqx.tree_equal(named, regression_posterior(key=KEY, prior=prior, **SIZES))


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="'information', 'cholesky' or 'diagonal', got 'full'"):
        regression_posterior("full", key=KEY, prior=ornstein_uhlenbeck(T).prior)
