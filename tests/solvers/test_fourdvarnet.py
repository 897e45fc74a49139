"""4DVarNet: what it must do trained or not, and that training makes it better."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from amortlib.energy import Energy
from amortlib.export import load, save
from amortlib.problems import lorenz63, lorenz63_model_error, ornstein_uhlenbeck
from amortlib.solvers import (
    FourDVarNet,
    FourDVarNetwork,
    fourdvar_network,
    reconstruction,
    trajectories,
)
from amortlib.training import fit, trainable
from amortlib.types import Event, InvalidEventError

PROBLEM = lorenz63()
WINDOW: Any = PROBLEM.forward
PRIOR: Any = PROBLEM.prior
KEY = jax.random.key(0)


def network(steps: int = 4, **changes: Any) -> FourDVarNetwork:
    sizes = {"width": 8, "memory": 12, "centre": PRIOR.loc, "scale": PRIOR.sd(), "states": 10}
    return FourDVarNetwork(WINDOW.operator, key=KEY, steps=steps, **(sizes | changes))


def test_a_network_for_a_problem_is_in_the_units_of_its_background():
    made = fourdvar_network(PROBLEM, key=KEY, steps=4, width=8, memory=12)
    assert eqx.tree_equal(made, network())


@pytest.fixture(scope="module")
def net() -> FourDVarNetwork:
    return network()


@pytest.fixture(scope="module")
def event() -> Event:
    _, batch = PROBLEM.batch(jax.random.key(1), 1)
    one = jax.tree.map(lambda a: a[0], batch)
    return Event(one.y, jnp.ones((5, 2), bool).at[1:3].set(False), one.sd)


SOLVE = eqx.filter_jit(lambda solver, event: solver(event))


def test_the_cost_is_a_sum_over_what_is_observed(net, event):
    """Against numpy, from the definition; single precision, 1e-5."""
    u = jax.random.normal(jax.random.key(2), (30,))
    states = np.asarray(PRIOR.loc) + np.asarray(PRIOR.sd()) * np.asarray(u).reshape(10, 3)
    far = np.asarray(u - net.prior(u))
    mask, y = np.asarray(event.mask), np.asarray(event.y)
    innovation = (y - states[::2, :2])[mask] / 0.5
    want = 0.5 * 0.01 * np.sum(innovation**2) + 0.5 * np.sum(far**2)
    np.testing.assert_allclose(net.cost(u, event), want, rtol=1e-5)
    np.testing.assert_allclose(net.to_control(net.to_states(u)), u, atol=1e-5)


def test_the_learned_prior_is_bilinear(net):
    """Linear plus products: third differences along a line vanish, second ones do not."""
    line = jax.vmap(lambda t: net.prior(t * jnp.ones(30)))(jnp.arange(4.0))
    assert np.abs(np.diff(line, 3, axis=0)).max() < 1e-4
    assert np.abs(np.diff(line, 2, axis=0)).max() > 1e-3


def test_it_is_blind_to_what_is_masked(net, event):
    solver = FourDVarNet(Energy(PRIOR, WINDOW), net)
    want = SOLVE(solver, event)
    for filler in (-999.0, jnp.nan):
        dirty = Event(jnp.where(event.mask, event.y, filler), event.mask, event.sd)
        got = SOLVE(solver, dirty)
        np.testing.assert_array_equal(got.mode, want.mode)
        np.testing.assert_array_equal(got.covariance, want.covariance)


def test_with_nothing_seen_it_is_the_background_and_its_covariance(net, event):
    solver = FourDVarNet(Energy(PRIOR, WINDOW), net)
    nothing = Event(event.y, jnp.zeros((5, 2), bool), event.sd)
    analysis = SOLVE(solver, nothing)
    np.testing.assert_array_equal(analysis.mode, PRIOR.loc)
    np.testing.assert_allclose(analysis.covariance, PRIOR.covariance(), rtol=1e-4, atol=1e-3)
    assert analysis.energy == 0
    path = eqx.filter_jit(solver.trajectory)(nothing)
    np.testing.assert_allclose(path, WINDOW.trajectory(PRIOR.loc), rtol=1e-5)


def test_the_analysis_is_that_of_its_first_state(net, event):
    j = Energy(PRIOR, WINDOW)
    solver = FourDVarNet(j, net)
    analysis = SOLVE(solver, event)
    path = eqx.filter_jit(solver.trajectory)(event)
    np.testing.assert_allclose(analysis.mode, path[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(analysis.energy, j(path[0], event), rtol=1e-4)
    assert int(analysis.outer_steps) == 4
    assert int(analysis.inner_steps) == 0
    assert analysis.gradient_norm > 1, "an untrained network is at no minimum"
    assert analysis.message == "converged"


def test_numbers_that_are_not_finite_are_an_error_or_a_code(net, event):
    broken = eqx.tree_at(lambda n: n.out.bias, net, jnp.full(30, jnp.nan))
    solver = FourDVarNet(Energy(PRIOR, WINDOW), broken)
    assert not solver(event, throw=False).converged
    with pytest.raises(Exception, match="finite"):
        SOLVE(solver, event)


def test_only_weights_are_trained(net):
    marks = trainable(net)
    assert not any(jax.tree.leaves((marks.operator, marks.centre, marks.scale)))
    assert all(jax.tree.leaves((marks.prior, marks.cell, marks.out, marks.log_weights)))


def test_the_loss_is_a_mean_of_sums(net):
    truth, events = trajectories(PROBLEM, 6)(jax.random.key(3))
    np.testing.assert_allclose(truth[:, 0], PROBLEM.batch(jax.random.key(3), 6)[0], rtol=1e-6)
    paths = jax.vmap(lambda e: net.to_states(net(e)))(events)
    error = (np.asarray(truth) - np.asarray(paths)) / np.asarray(PRIOR.sd())
    want = np.mean(np.sum(error**2, axis=2))
    np.testing.assert_allclose(reconstruction(net, (truth, events), KEY), want, rtol=1e-4)
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), (truth, events))
    np.testing.assert_allclose(reconstruction(net, twice, KEY), want, rtol=1e-4)


@pytest.mark.slow
def test_training_makes_it_better_than_it_was_and_than_the_mean():
    """300 steps, 512 fresh windows. The mean of the climatology has an error of about 3."""
    held_out = trajectories(PROBLEM, 512)(jax.random.key(9))
    start = network(steps=6, width=32, memory=48)
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, 300))
    result = fit(
        start,
        reconstruction,
        trajectories(PROBLEM, 64),
        key=jax.random.key(4),
        steps=300,
        optimizer=optimizer,
        progress=False,
    )
    loss = eqx.filter_jit(reconstruction)
    before, after = (float(loss(model, held_out, KEY)) for model in (start, result.model))
    spread = float(np.mean(np.sum(((held_out[0] - PRIOR.loc) / PRIOR.sd()) ** 2, axis=2)))
    assert after < 0.5 * before
    assert after < 0.5 * spread


def test_its_weights_come_back_from_a_file(net, event, tmp_path):
    save(tmp_path / "net.safetensors", net)
    other = network(centre=PRIOR.loc + 1.0)
    other = eqx.tree_at(lambda n: n.log_weights, other, jnp.zeros(2))
    again = load(tmp_path / "net.safetensors", other)
    np.testing.assert_array_equal(again(event), net(event))


def test_what_it_cannot_take_is_said(net, event):
    with pytest.raises(InvalidEventError, match="sd=None"):
        net(Event(event.y, event.mask))
    with pytest.raises(InvalidEventError, match=r"shape \(5, 2\), got \(4, 2\)"):
        net(jax.tree.map(lambda a: a[:4], event))
    with pytest.raises(ValueError, match="steps >= 1, got 0"):
        network(steps=0)
    weak = lorenz63_model_error()
    with pytest.raises(ValueError, match=r"expected a Window .* got WeakWindow"):
        FourDVarNet(Energy(weak.prior, weak.forward), net)
    with pytest.raises(ValueError, match="expected a problem with its prior"):
        fourdvar_network(eqx.tree_at(lambda p: p.prior, PROBLEM, None), key=KEY)
    with pytest.raises(ValueError, match="expected a Window"):
        trajectories(ornstein_uhlenbeck(4, noise=0.3), 2)


def test_error_bars_may_come_from_the_energy(net, event):
    """An event without error bars, and a J that knows them."""
    known = SOLVE(FourDVarNet(Energy(PRIOR, WINDOW, obs_sd=0.5), net), Event(event.y, event.mask))
    want = SOLVE(FourDVarNet(Energy(PRIOR, WINDOW), net), event)
    np.testing.assert_allclose(known.mode, want.mode, rtol=1e-6)
