"""Averages over a group: they move with it, are densities, and refuse what is no symmetry."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortlib.encoders import FlatEncoder
from amortlib.gaussian import Gaussian
from amortlib.heads import CholeskyHead
from amortlib.observation import ContiguousGaps, FixedMask, GaussianNoise
from amortlib.posterior import AmortizedPosterior, flow_posterior, score_posterior
from amortlib.problems import InverseProblem, lorenz63, lorenz63_sign_lost
from amortlib.symmetry import Symmetry, symmetric_posterior
from amortlib.types import Event
from benchmarks import bimodal
from benchmarks.bimodal import mirrored

KEY = jax.random.key(0)
MIRROR = np.diag(bimodal.MIRROR)
SHAPE = (5, 2)
FIRST_MISSING = jnp.ones(SHAPE, bool).at[0].set(False)


SYMMETRY = Symmetry(MIRROR, mirrored)


def untrained(kind: str) -> AmortizedPosterior:
    made = {"flow": flow_posterior, "score": score_posterior}[kind]
    sizes = {"features": 8, "encoder_width": 8, "width": 8, "components": 2}
    model = made(key=KEY, prior=lorenz63().prior, obs_shape=SHAPE, **sizes)
    # As it is made it says nothing of the event; any other weights will do.
    leaves, rest = eqx.partition(model, eqx.is_inexact_array)
    keys = iter(jax.random.split(KEY, len(jax.tree.leaves(leaves))))
    return eqx.combine(
        jax.tree.map(lambda a: a + 0.05 * jax.random.normal(next(keys), a.shape), leaves), rest
    )


@pytest.fixture(scope="module")
def flow() -> AmortizedPosterior:
    return symmetric_posterior(untrained("flow"), [SYMMETRY], problem=lorenz63_sign_lost(), key=KEY)


def event_of(mask=None) -> Event:
    made = lorenz63_sign_lost() if mask is None else lorenz63_sign_lost(gaps=FixedMask(mask))
    return made.simulate(jax.random.key(3))[1]


def check_draws(q, x):
    """Their mean is that of q and, for a narrower density r, E r / q = 1; five standard errors."""
    np.testing.assert_array_less(np.abs(x.mean(0) - q.mean()), 5 * x.std(0) / np.sqrt(len(x)))
    narrow = Gaussian.from_covariance(q.mean(), 0.5 * q.covariance())
    ratio = jax.vmap(narrow.log_prob)(x) - jax.vmap(q.log_prob)(x)
    weight = np.exp(np.asarray(ratio, float))
    assert abs(weight.mean() - 1.0) < 5 * weight.std() / np.sqrt(len(weight))


def test_the_density_of_an_image_is_that_of_the_state(flow):
    """And the average of both; the network alone says different things of them."""
    event = event_of(jnp.ones(SHAPE, bool))
    x = jnp.array([3.0, -2.0, 20.0])
    here, there = flow.log_prob(x, event), flow.log_prob(MIRROR @ x, mirrored(event))
    np.testing.assert_allclose(here, there, rtol=1e-5)
    plain = untrained("flow")
    both = [plain.log_prob(x, event), plain.log_prob(jnp.asarray(MIRROR @ x), mirrored(event))]
    assert abs(both[0] - both[1]) > 0.1
    np.testing.assert_allclose(here, np.logaddexp(*both) - np.log(2.0), rtol=1e-5)


@pytest.mark.slow
def test_draws_mean_and_covariance_are_those_of_the_density(flow):
    """The mean over 20,000 draws, and their covariance, within five standard errors: three numbers
    and six, so that one run in 10^5 would fail. And for a narrower density r, E r / q = 1.
    """
    q = flow(event_of(jnp.ones(SHAPE, bool)))
    draws = q.sample(20_000, key=KEY)
    check_draws(q, draws)
    x = np.asarray(draws, float)
    off = x - x.mean(0)
    each = off[:, :, None] * off[:, None, :]
    error = each.std(0) / np.sqrt(len(x))
    # The flow's own moments are by quasi-random points, and rough by some hundredths.
    np.testing.assert_array_less(
        np.abs(each.mean(0) - q.covariance()), 5 * error + 0.02 * np.abs(each.mean(0)).max()
    )
    np.testing.assert_allclose(q.sd() ** 2, np.diag(q.covariance()), rtol=1e-5)


@pytest.mark.slow
def test_where_the_sign_is_lost_both_pieces_weigh_the_same(flow):
    """Of 4,000 draws; five standard errors. Without the symmetry it is far from half."""
    event = event_of(FIRST_MISSING)
    share = [
        float((m.sample(event, 4000, key=KEY)[:, 0] > 0).mean()) for m in (flow, untrained("flow"))
    ]
    assert abs(share[0] - 0.5) < 5 * 0.5 / np.sqrt(4000)
    assert abs(share[1] - 0.5) > 5 * 0.5 / np.sqrt(4000)
    np.testing.assert_allclose(flow.mean(event)[:2], 0.0, atol=1e-4)


@pytest.mark.slow
def test_the_mode_is_a_top_and_moves_with_the_map(flow):
    event = event_of(jnp.ones(SHAPE, bool))
    ask = eqx.filter_jit(lambda event: flow.mode(event))
    mode = ask(event)
    np.testing.assert_allclose(ask(mirrored(event)), MIRROR @ mode, atol=2e-3)
    near = mode + 0.1 * jax.random.normal(KEY, (64, 3))
    log_prob = jax.jit(jax.vmap(lambda x: flow.log_prob(x, event)))
    assert log_prob(near).max() < log_prob(mode[None])[0]


@pytest.mark.slow
def test_a_score_head_can_be_averaged_too():
    model = symmetric_posterior(
        untrained("score"), [SYMMETRY], problem=lorenz63_sign_lost(), key=KEY
    )
    event = event_of(FIRST_MISSING)
    q = model(event)
    assert not q.exact_log_prob
    x = q.sample(4000, key=KEY)
    assert abs(float((x[:, 0] > 0).mean()) - 0.5) < 5 * 0.5 / np.sqrt(4000)
    log_prob = jax.jit(lambda x: model.log_prob(x, event))
    np.testing.assert_allclose(log_prob(x[0]), log_prob(MIRROR @ x[0]), rtol=1e-3)


def test_masks_do_not_compile_anew(flow):
    traced = []

    @jax.jit
    def ask(event):
        traced.append(1)
        return flow.log_prob(jnp.zeros(3), event)

    for mask in (jnp.ones(SHAPE, bool), FIRST_MISSING):
        assert jnp.isfinite(ask(event_of(mask)))
    assert len(traced) == 1


def test_what_is_no_symmetry_is_refused():
    plain, made = untrained("flow"), lorenz63_sign_lost()

    def of(*symmetries, problem=made):
        return symmetric_posterior(plain, symmetries, problem=problem, key=KEY)

    with pytest.raises(ValueError, match=r"shape \(d, d\), got \(3,\)"):
        Symmetry(np.ones(3), mirrored)
    with pytest.raises(ValueError, match=r"\|det A\| = 1, got 8"):
        Symmetry(2.0 * np.eye(3), mirrored)
    with pytest.raises(ValueError, match="at least one symmetry"):
        of()
    with pytest.raises(ValueError, match=r"symmetry 0: expected a matrix of shape \(3, 3\)"):
        of(Symmetry(np.eye(2), mirrored))
    quarter = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    with pytest.raises(ValueError, match="a group: symmetry 0 and then 0 is none of those"):
        of(Symmetry(quarter, mirrored))
    with pytest.raises(ValueError, match=r"symmetry 0: expected J = .* got"):
        of(Symmetry(MIRROR, lambda event: event))  # the sign of the first x is seen
    with pytest.raises(ValueError, match=r"symmetry 0: expected an event of shape \(5, 2\)"):
        of(Symmetry(MIRROR, lambda event: jax.tree.map(lambda a: a[1:], event)))
    with pytest.raises(ValueError, match="a Gaussian prior, that has a J, got None"):
        of(SYMMETRY, problem=dataclasses.replace(made, prior=None))


@pytest.mark.slow
def test_a_ring_may_be_read_from_any_place():
    """Three sites, two turns: maps that are not their own inverses, and move the mask as well.

    Draws are of the density: for a narrower one r, E r / q = 1, within five standard errors.
    """
    prior = Gaussian.from_covariance(jnp.zeros(3), 0.6 * jnp.eye(3) + 0.4)
    draw = lambda key: prior.sample(1, key=key)[0]  # noqa: E731
    made = InverseProblem(draw, lambda x: x**2, GaussianNoise(0.3), ContiguousGaps(0.4), prior)
    encoder = FlatEncoder((3,), key=KEY, features=6, width=8, depth=1)
    uneven = {"centre": jnp.array([0.5, 0.0, -1.0]), "scale": jnp.array([0.5, 1.5, 3.0])}
    plain = AmortizedPosterior(encoder, CholeskyHead(6, 3, key=KEY, **uneven))
    turns = [
        Symmetry(np.roll(np.eye(3), k, 0), lambda e, k=k: jax.tree.map(lambda a: jnp.roll(a, k), e))
        for k in (1, 2)
    ]
    model = symmetric_posterior(plain, turns, problem=made, key=KEY)
    x, event = made.simulate(KEY)
    for turn in turns:
        here, there = model(event), model(turn.event(event))
        np.testing.assert_allclose(here.log_prob(x), there.log_prob(turn(x)), rtol=1e-5)
        np.testing.assert_allclose(turn(here.mean()), there.mean(), atol=1e-5)
        a = np.asarray(turn.matrix.tree)
        np.testing.assert_allclose(a @ here.covariance() @ a.T, there.covariance(), atol=1e-5)
    q = model(event)
    x = q.sample(20_000, key=KEY)
    check_draws(q, x)
