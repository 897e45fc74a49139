"""The search: never above a start, at the minimum, with the minimum's slope, compiled once."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortlib.energy import Energy
from amortlib.heads import CholeskyHead
from amortlib.laplace import laplace, mode_jacobian
from amortlib.modes import stationary_point
from amortlib.posterior import AmortizedPosterior
from amortlib.search import (
    Field,
    _hessians,
    _learned,
    _look,
    search,
    search_ends,
    search_posterior,
)
from amortlib.solvers import Oracle
from amortlib.training import trainable
from amortlib.types import Event, to_double
from tests.two_minima import ENERGY, KEY, PRIOR, guess, squares

pytestmark = pytest.mark.slow

FIELD = Field((4, 4, 2, 2, 1))


def events_of(n: int, seed: int = 0) -> Event:
    rng = np.random.default_rng(seed)
    x = np.asarray(jax.vmap(PRIOR.colour)(jnp.asarray(rng.normal(size=(n, 2)), jnp.float32)))
    y = np.asarray(jax.vmap(squares)(jnp.asarray(x))) + 0.3 * rng.normal(size=(n, 3))
    return Event(
        jnp.asarray(y, jnp.float32), jnp.asarray(rng.random((n, 3)) < 0.7), jnp.full((n, 3), 0.3)
    )


def cost_of(energy: Energy, v, event: Event):
    return 0.5 * jnp.sum(energy.residual(v, event) ** 2)


@pytest.mark.parametrize("newton", [False, True])
def test_no_start_is_lower_than_the_end(newton, x64):
    """Of 64 events and 6 starts, most of them far away, after each number of steps; and more steps
    with no narrowing never end higher.
    """
    energy, events = to_double(ENERGY), to_double(events_of(64))
    starts = 4.0 * jax.random.normal(KEY, (64, 6, 2), jnp.float64)
    before = jax.vmap(lambda v, e: jax.vmap(lambda v: cost_of(energy, v, e))(v))(starts, events)
    last = before.min(axis=1)
    for k in (0, 1, 3, 8):
        narrow, wide = Field.narrowing(6, k, newton=newton), Field((6,) * k, newton)

        def end(v, event, field):
            return cost_of(energy, search(energy, v, event, field=field), event)

        lowest = {
            field: jax.jit(jax.vmap(lambda v, e, f=field: end(v, e, f)))(starts, events)
            for field in (narrow, wide)
        }
        for found in lowest.values():
            assert (found <= before.min(axis=1) + 1e-12).all()
        if not newton:
            assert (lowest[wide] <= last + 1e-12).all()
            last = lowest[wide]
        if k == 0:
            np.testing.assert_allclose(lowest[narrow], before.min(axis=1), rtol=1e-12)
    assert lowest[wide].mean() < 0.2 * before.min(axis=1).mean()


def test_it_ends_where_the_oracle_does_with_the_oracles_slope(x64):
    """And Newton's steps have brought it there: the same number without them have not.

    Events of which the oracle is sure, and that it found no second minimum near of.
    """
    batch = events_of(64, 1)
    found = Oracle(ENERGY)(batch, key=KEY)
    good = np.flatnonzero(found.sure & found.single & (np.asarray(batch.mask).sum(1) > 0))
    assert good.size > 20
    energy, events = to_double(ENERGY), to_double(jax.tree.map(lambda a: a[good], batch))
    starts = 1.5 * jax.random.normal(KEY, (12, 2), jnp.float64)

    def run(newton):
        field = Field((12, 12, 12, 8, 6, 4, 2, 2), newton)

        def both(event):
            def mode(y):
                x = search(energy, starts, Event(y, event.mask, event.sd), field=field)
                return energy.prior.colour(x)

            return mode(event.y), jax.jacfwd(mode)(event.y), jax.jacrev(mode)(event.y)

        return jax.jit(jax.vmap(both))(events)

    mode, slope, back = run(True)
    same = np.abs(np.asarray(mode) - found.mode[good]).max(axis=1) < 1e-6
    assert same.mean() >= 0.95  # twelve starts for all events alike may miss the lowest minimum
    np.testing.assert_allclose(slope[same], found.jacobian[good][same], atol=1e-4)
    np.testing.assert_allclose(back, slope, atol=1e-9)
    plain, *_ = run(False)
    off = [np.abs(np.asarray(m) - found.mode[good])[same].max(axis=1) for m in (mode, plain)]
    assert np.quantile(off[0], 0.9) < 0.01 * np.quantile(off[1], 0.9)


def test_the_slope_is_that_one_newton_step_further_on(x64):
    """Of a search that is cut short, the lowest end and all of them; where it ends is as it was.

    Beside the slope at the end itself, both against that of the minimum next to it.
    """
    energy, events = to_double((ENERGY, events_of(64, 2)))
    starts = 1.5 * jax.random.normal(KEY, (4, 2), jnp.float64)
    field, longer = Field((4, 4, 2, 2)), Field((1,) * 12)

    @jax.jit
    @jax.vmap
    def run(event):
        def seen(y):
            return Event(y, event.mask, event.sd)

        def ends(y):
            found = search_ends(energy, starts, seen(y), field=field)
            return jnp.vstack([search(energy, starts, seen(y), field=field), found])

        def of(y, ends):
            fall = lambda v: energy.at_control(v, seen(y))  # noqa: E731
            return jax.vmap(lambda v: stationary_point(fall, v))(ends)

        at = ends(event.y)
        there = jax.vmap(lambda v: search(energy, v[None], event, field=longer))(at)
        slope = jax.jacfwd(ends)(event.y)
        return at, there, slope, *(jax.jacfwd(of)(event.y, v) for v in (at, there))

    at, there, slope, plain, want = map(np.asarray, run(events))
    far = np.abs(at - there).max(axis=2)
    near = (far < 0.05) & (far > 1e-4)  # the same minimum, not yet reached
    assert near[:, 0].sum() > 5
    assert near.sum() > 30
    for of in (near & (np.arange(3) == 0), near & (np.arange(3) > 0)):
        off = [np.abs(s - want).max(axis=(2, 3))[of] for s in (slope, plain)]
        assert np.median(off[0]) < 0.1 * np.median(off[1])
        assert (off[0] < off[1] + 1e-9).mean() > 0.9


def test_the_bend_is_learned_from_the_way(x64):
    """Every step is kept to, and a few around the minimum, where r hardly changes, teach the whole
    of the Hessian that Gauss and Newton leave out. A step of no length teaches nothing.
    """
    energy, event = to_double(ENERGY), to_double(jax.tree.map(lambda a: a[0], events_of(1)))
    event = Event(event.y, jnp.ones(3, bool), event.sd)
    v = search(energy, jnp.array([[0.3, 0.2]], jnp.float64), event, field=Field((1,) * 12))
    full, gauss = _hessians(energy, v, event)
    missing = np.asarray(full - gauss)
    assert np.abs(missing).max() > 1.0
    at = _look(energy, v, event)
    for step in 1e-4 * jnp.array([[1.0, 0.5], [-0.5, 1.0], [-1.0, -0.5], [0.5, -1.0], [0.0, 0.0]]):
        there = _look(energy, at.v + step, event)
        bend = _learned(at, there)
        wanted = (there.jacobian - at.jacobian).T @ there.residual
        np.testing.assert_allclose(bend @ step, wanted, atol=1e-9)
        np.testing.assert_allclose(bend, bend.T, rtol=1e-12)
        at = eqx.tree_at(lambda at: at.bend, there, bend)
    np.testing.assert_allclose(at.bend, missing, atol=0.02 * np.abs(missing).max())


def test_unrolled_knows_of_the_starts_and_implicit_does_not(x64):
    energy, event = to_double(ENERGY), to_double(jax.tree.map(lambda a: a[0], events_of(1)))
    starts = jnp.array([[0.3, 0.2], [1.0, -0.5]], jnp.float64)

    def slope(derivative):
        run = lambda v: search(energy, v, event, field=Field((2, 1), False), derivative=derivative)  # noqa: E731
        return jax.jit(jax.jacfwd(run))(starts)

    assert np.abs(slope("unrolled")).max() > 1e-4
    np.testing.assert_array_equal(slope("implicit"), 0.0)


@pytest.fixture(scope="module")
def model() -> AmortizedPosterior:
    return search_posterior(guess(), ENERGY, field=Field((4, 4, 4, 4, 4, 2, 2, 2)))


def test_the_posterior_is_laplace_at_the_end(model):
    event = jax.tree.map(lambda a: a[0], events_of(1))
    q = eqx.filter_jit(model)(event)
    want = laplace(ENERGY, q.mode(), event)
    np.testing.assert_allclose(q.covariance(), want.covariance(), rtol=1e-3, atol=1e-5)
    slope = eqx.filter_jit(model.mode_jacobian)(event)
    np.testing.assert_allclose(slope, mode_jacobian(ENERGY, q.mode(), event), atol=1e-4)
    np.testing.assert_array_equal(slope[:, ~np.asarray(event.mask)], 0.0)


def test_masks_do_not_compile_anew_and_nothing_seen_is_the_prior(model):
    traces = []

    @jax.jit
    def run(event):
        traces.append(None)
        q = model(event)
        return q.mode(), q.covariance()

    events = events_of(4)
    for i in range(4):
        run(jax.tree.map(lambda a, i=i: a[i], events))
    event = jax.tree.map(lambda a: a[0], events)
    nothing = Event(jnp.full_like(event.y, jnp.nan), jnp.zeros(3, bool), event.sd)
    mode, covariance = run(nothing)
    assert len(traces) == 1
    np.testing.assert_allclose(mode, PRIOR.loc, atol=1e-4)
    np.testing.assert_allclose(covariance, PRIOR.covariance(), atol=1e-4)


def test_a_start_at_which_j_overflows_does_no_harm():
    event = jax.tree.map(lambda a: a[0], events_of(1))
    event = Event(event.y, jnp.ones(3, bool), event.sd)
    run = jax.jit(lambda v: search(ENERGY, v, event, field=Field((3, 3, 2, 1))))
    good = jnp.array([[0.3, 0.2], [1.0, -0.5], [0.1, 0.1]])
    np.testing.assert_array_equal(
        run(jnp.concatenate([good, jnp.array([[1e30, 1e30], [jnp.nan, 0.0]])])), run(good)
    )


def test_guess_and_energy_are_held_fixed(model):
    assert not any(jax.tree.leaves(trainable(model)))


def test_the_field_narrows_by_halves():
    assert Field.narrowing(8, 5).widths == (8, 4, 2, 2, 2)
    assert Field.narrowing(1, 3).widths == (1, 1, 1)
    assert Field.narrowing(8, 0).steps == 0


@pytest.fixture(scope="module")
def two_sided() -> Event:
    """Only x_0^2 is seen, and well: two minima, on either side of zero."""
    return Event(jnp.array([4.0, 0.0, 0.0]), jnp.array([True, False, False]), jnp.full(3, 0.3))


def test_the_ends_are_minima_and_the_lowest_is_that_of_the_search(two_sided, x64):
    energy, event = to_double((ENERGY, two_sided))
    field = Field((4, 4, 4, 4, 4, 3, 3))
    starts = jnp.array([[2.0, 0.5], [-3.0, 0.2], [0.7, -0.4], [-0.9, 1.0]])

    @jax.jit
    def run(y):
        seen = Event(y, event.mask, event.sd)
        ends = search_ends(energy, starts, seen, field=field)
        cost = jax.vmap(lambda v: cost_of(energy, v, seen))(ends)
        slope = jax.vmap(jax.grad(lambda v: cost_of(energy, v, seen)))(ends)
        return ends, cost, slope, search(energy, starts, seen, field=field)

    ends, cost, slope, best = run(event.y)
    assert ends.shape == (3, 2)
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)
    np.testing.assert_allclose(ends[np.argmin(cost)], best, rtol=1e-12)
    x = np.asarray(jax.vmap(energy.prior.colour)(ends))[:, 0]
    assert x.min() < -1.5
    assert x.max() > 1.5
    moved = jax.jacfwd(lambda y: run(y)[0])(event.y)[:, :, 0]
    step = 1e-5
    ahead, behind = (run(event.y.at[0].add(h))[0] for h in (step, -step))
    np.testing.assert_allclose(moved, (ahead - behind) / (2 * step), atol=1e-5)


def test_what_does_not_fit_is_refused():
    event = jax.tree.map(lambda a: a[0], events_of(1))
    with pytest.raises(ValueError, match="never grow, got"):
        Field((1, 2))
    with pytest.raises(TypeError, match="newton"):
        Field((1, 1), 3)  # ty: ignore
    with pytest.raises(ValueError, match=r"s >= 4, got \(2, 2\)"):
        search(ENERGY, jnp.zeros((2, 2)), event, field=FIELD)
    single = AmortizedPosterior(guess().encoder, CholeskyHead(6, 2, key=KEY))
    with pytest.raises(TypeError, match="a mixture, got Gauss"):
        search_posterior(single, ENERGY, field=FIELD)(event)
