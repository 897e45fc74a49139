"""The solvers where J is not quadratic: on windows of Lorenz-63, and on cheap stand-ins for it."""

from functools import cache
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from _kit.windows import FixedSteps

from amortlib.energy import Energy
from amortlib.gaussian import Gaussian
from amortlib.observation import NoGaps
from amortlib.problems import InverseProblem, lorenz63, lorenz63_climatology, lorenz63_model_error
from amortlib.solvers import (
    Analysis,
    IncrementalFourDVar,
    OptimalInterpolation,
    StrongFourDVar,
    ThreeDVar,
    WeakFourDVar,
)
from amortlib.types import Event, to_double

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def energy(**changes: Any) -> Energy:
    """J of a window, in double precision where that is on."""
    problem = lorenz63(**changes)
    return Energy(problem.prior, problem.forward)


def plain(**changes: Any) -> InverseProblem:
    """The window in plain steps: what is asked of the solvers compiles in a third of the time."""
    return FixedSteps.in_place(lorenz63(substeps=2, **changes))


def events(n: int, *, seed: int = 0) -> Event:
    """Of the plain window, drawn in double precision."""
    with jax.enable_x64(True):
        return plain().batch(jax.random.key(seed), n)[1]


def pick(batch: Event, i: int) -> Event:
    return jax.tree.map(lambda a: a[i], batch)


# --- many events, several solvers -------------------------------------------------------------


@cache
def many() -> tuple[dict[str, Analysis], np.ndarray, Event]:
    """32 events by four solvers, each at convergence; and |grad J(v)| by reverse differentiation
    of J itself at the end of the first of them.
    """
    with jax.enable_x64(True):
        problem, batch = plain(), events(32)
        j = Energy(problem.prior, problem.forward)
        exact = {"tolerance": 1e-9, "inner_tolerance": 1e-8}
        bfgs, lm = optx.BFGS(**TIGHT), optx.LevenbergMarquardt(**TIGHT)
        own = {
            "matrix": IncrementalFourDVar(j, matrix=True, **exact),
            "models": IncrementalFourDVar(j, matrix=False, **exact),
            "bfgs": StrongFourDVar(j, minimiser=bfgs, max_steps=1024),
            "lm": StrongFourDVar(j, minimiser=lm, max_steps=1024),
        }

        @eqx.filter_jit
        def run(own, batch):
            return {
                k: eqx.filter_vmap(lambda e, s=s: s(e, throw=False))(batch) for k, s in own.items()
            }

        analyses = run(own, batch)
        slopes = jax.jit(jax.vmap(lambda x, e: slope(j, x, e)))(analyses["matrix"].mode, batch)
        return analyses, np.asarray(slopes), batch


def slope(j: Energy, x: jax.Array, event: Event) -> jax.Array:
    """|grad J(v)|, of J and the control-variable transform, with no residual in it."""
    return jnp.linalg.norm(jax.grad(lambda v: j(j.prior.colour(v), event))(j.prior.whiten(x)))


@pytest.mark.slow
def test_incremental_is_a_generic_minimiser_at_convergence():
    """On most events they find the same minimum, and there J is the same number."""
    own, _, _ = many()
    for name in ("bfgs", "lm"):
        one, other = own["matrix"], own[name]
        assert np.asarray(one.converged).mean() > 0.9
        both = np.asarray(one.converged & other.converged)
        near = np.abs(np.asarray(one.mode - other.mode)).max(axis=1) < 1e-3
        same = both & near
        assert same.sum() > 16, name
        np.testing.assert_allclose(one.energy[same], other.energy[same], rtol=1e-8)
        np.testing.assert_allclose(one.mode[same], other.mode[same], atol=1e-5)
        np.testing.assert_allclose(one.covariance[same], other.covariance[same], rtol=1e-4)


@pytest.mark.slow
def test_a_matrix_or_models_is_the_same_method():
    """Step for step, but for rounding, which chaos may blow up in an event or two."""
    own, _, _ = many()
    one, other = own["matrix"], own["models"]
    same = np.asarray(one.outer_steps == other.outer_steps)
    assert same.mean() > 0.75
    np.testing.assert_allclose(one.mode[same], other.mode[same], atol=1e-6)
    np.testing.assert_allclose(one.energy[same], other.energy[same], rtol=1e-9)


@pytest.mark.slow
def test_at_convergence_the_gradient_is_zero():
    own, slopes, _ = many()
    for name, a in own.items():
        good = np.asarray(a.converged)
        # In a long valley a small step is not a small gradient: those that stop by their steps
        # are held less tightly.
        bound = 1e-5 if name in ("matrix", "models") else 1e-3
        assert np.asarray(a.gradient_norm)[good].max() < bound, name
    good = np.asarray(own["matrix"].converged)
    assert slopes[good].max() < 1e-5


@pytest.mark.slow
def test_every_outer_step_has_inner_ones():
    own, _, batch = many()
    seen = np.asarray(batch.mask).any(axis=(1, 2))
    for name in ("matrix", "models"):
        assert (own[name].inner_steps[seen] >= own[name].outer_steps[seen]).all()
        # Three controls need three steps at most, in exact arithmetic; five more are allowed.
        assert (own[name].inner_steps <= 8 * own[name].outer_steps).all()
    for name in ("bfgs", "lm"):
        assert (own[name].inner_steps == 0).all()


@pytest.mark.slow
def test_the_covariance_is_that_of_the_residuals():
    """Inverse of B^-1 + H^T R^-1 H, with H by finite differences of the forward model."""
    own, _, batch = many()
    with jax.enable_x64(True):
        x, seen = own["matrix"].mode[0], pick(batch, 0)
        h = 1e-5
        points = jnp.concatenate([x + h * jnp.eye(3), x - h * jnp.eye(3)])
        clean = np.asarray(jax.jit(jax.vmap(plain().forward))(points))
        tangent = np.moveaxis(clean[:3] - clean[3:], 0, -1)[np.asarray(seen.mask)] / (2 * h)
        precision = np.linalg.inv(np.asarray(lorenz63_climatology().covariance()))
        want = np.linalg.inv(precision + tangent.T @ tangent / 0.5**2)
    np.testing.assert_allclose(own["matrix"].covariance[0], want, rtol=1e-4)


# --- the model's derivatives ------------------------------------------------------------------

WAYS = {
    "fwd": (dfx.ForwardMode(), "fwd"),
    "bwd": (dfx.RecursiveCheckpointAdjoint(), "bwd"),
    "both": (dfx.DirectAdjoint(), None),
}


@pytest.mark.slow
def test_each_way_to_differentiate_the_model_has_one_answer(x64):
    """Tangent-linear products alone, adjoint ones alone, and both."""
    seen, short = pick(events(4), 1), {"states": 5, "substeps": 2}
    seen = jax.tree.map(lambda a: a[:3], seen)
    seen = Event(seen.y, jnp.ones_like(seen.mask), seen.sd)
    found = {}
    for name, (adjoint, derivative) in WAYS.items():
        lm = optx.LevenbergMarquardt(**TIGHT)
        solver = StrongFourDVar(
            energy(adjoint=adjoint, **short), minimiser=lm, derivative=derivative
        )
        found[name] = eqx.filter_jit(solver)(seen)
    solver = StrongFourDVar(
        energy(adjoint=dfx.ForwardMode(), **short), minimiser=optx.BFGS(**TIGHT), derivative="fwd"
    )
    found["BFGS"] = eqx.filter_jit(solver)(seen)
    for name, a in found.items():
        np.testing.assert_allclose(a.mode, found["both"].mode, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(a.covariance, found["both"].covariance, rtol=1e-6, atol=1e-9)
        assert a.gradient_norm < 1e-5, name


# --- a model that errs ------------------------------------------------------------------------


@pytest.mark.slow
def test_letting_times_in_one_by_one_finds_lower_minima(x64):
    """256 windows without gaps, in which J has many minima: searches with the same tolerance.

    All at once ends above the quasi-static search on 2% of them or more, and below on none.
    """
    problem = plain(gaps=NoGaps())
    j = to_double(Energy(problem.prior, problem.forward))
    batch = problem.batch(jax.random.key(7), 256)[1]

    def search(**settings: Any) -> np.ndarray:
        solver = IncrementalFourDVar(j, 5e-5, max_outer=96, **settings)
        run = eqx.filter_vmap(lambda event: solver(event, throw=False).energy)
        return np.asarray(eqx.filter_jit(run)(batch))

    at_once, one_by_one = search(), search(quasi_static=2, damping=1.0)
    same = 1e-7 * (1.0 + one_by_one)
    assert (at_once > one_by_one + same).mean() >= 0.01
    assert not (at_once < one_by_one - same).any()


@pytest.mark.slow
def test_the_weak_constraint_becomes_the_strong_one(x64):
    """The difference of the initial states falls as Q does, not as its square root."""
    seen = jax.tree.map(lambda a: a[:4], pick(events(4), 2))
    seen = Event(seen.y, jnp.ones_like(seen.mask), seen.sd)
    short = {"states": 7, "substeps": 2}
    window, lm = lorenz63(**short).forward, optx.LevenbergMarquardt(**TIGHT)
    strong = eqx.filter_jit(StrongFourDVar(energy(**short), minimiser=lm))(seen)

    @jax.jit
    @jax.vmap
    def weak(sd):
        solver = WeakFourDVar(lorenz63_climatology(), window, sd, minimiser=lm)
        # From the strong-constraint analysis: another minimum is not the question here.
        v0 = solver.energy.prior.loc.at[:3].set(strong.mode)
        a = solver.strong(seen, throw=False, start=v0)
        return a.converged, a.mode[:3], a.energy

    sds = jnp.array([0.1, 0.1 / np.sqrt(10), 0.01])
    converged, x0, j = weak(sds)
    assert converged.all()
    gap = np.linalg.norm(np.asarray(x0) - np.asarray(strong.mode), axis=1)
    np.testing.assert_allclose(gap[:-1] / gap[1:], 10, rtol=0.2)
    assert gap[-1] < 1e-3 < gap[0]
    # More freedom, a lower cost.
    assert (np.diff(j) > 0).all()
    assert j[-1] < strong.energy


@pytest.mark.slow
def test_where_the_model_errs_the_weak_constraint_is_better():
    """64 windows whose truth has model errors: the error of the trajectory, event by event. Of
    its logarithm: a few events in which one of them is in a wrong minimum would rule the mean.
    """
    problem = lorenz63_model_error(substeps=2, gaps=NoGaps(), model_error_sd=1.0)
    window = FixedSteps.like(problem.forward.window)
    problem = eqx.tree_at(lambda p: p.forward.window, problem, window)
    truth, batch = problem.batch(jax.random.key(1), 64)
    j = Energy(lorenz63_climatology(), window)
    strong = IncrementalFourDVar(j)
    weak = IncrementalFourDVar(Energy(problem.prior, problem.forward))

    @eqx.filter_jit
    @eqx.filter_vmap
    def run(x, e):
        states = problem.forward.trajectory(x)
        by_strong = j.forward.trajectory(strong(e, throw=False).mode)
        by_weak = problem.forward.trajectory(weak(e, throw=False).mode)
        return [jnp.sqrt(jnp.mean((s - states) ** 2)) for s in (by_strong, by_weak)]

    by_strong, by_weak = (np.asarray(a, float) for a in run(truth, batch))
    difference = np.log(by_strong) - np.log(by_weak)
    error = difference.std(ddof=1) / np.sqrt(64)
    assert difference.mean() > 3 * error, (difference.mean(), error)
    assert by_weak.mean() < by_strong.mean()


# --- how it ended -----------------------------------------------------------------------------


def curved(x: jax.Array) -> jax.Array:
    """Cheap, and far from linear."""
    return jnp.stack([x[0] ** 2 + x[1], jnp.sin(2 * x[1]) + x[0], x[0] * x[1]])


def cheap(forward: Any = curved) -> Energy:
    low = jnp.array([[1.0, 0.0], [0.4, 0.6]])
    return Energy(Gaussian(jnp.array([0.5, -0.5]), low), forward, obs_sd=0.1)


SEEN = np.array([2.0, 0.3, -0.9])


def cheap_event(y: Any = SEEN, mask: Any = (True, True, True)) -> Event:
    return Event(jnp.asarray(y, float), jnp.asarray(mask))


def iterative(j: Energy, steps: int | None = None) -> dict[str, Any]:
    bound = {} if steps is None else {"max_steps": steps}
    outer = {} if steps is None else {"max_outer": steps}
    return {
        "3DVar": ThreeDVar(j.prior, j.forward, j.obs_sd, **bound),
        "BFGS": StrongFourDVar(j, **bound),
        "Levenberg-Marquardt": StrongFourDVar(
            j, minimiser=optx.LevenbergMarquardt(1e-6, 1e-6), **bound
        ),
        "incremental": IncrementalFourDVar(j, **outer),
        "incremental, models": IncrementalFourDVar(j, matrix=False, **outer),
    }


METHODS = list(iterative(cheap()))
every_method = pytest.mark.parametrize("method", METHODS)


@every_method
def test_a_good_end_says_so(method):
    analysis = eqx.filter_jit(iterative(cheap())[method])(cheap_event())
    assert analysis.converged
    assert analysis.message == "converged"
    assert analysis.gradient_norm < 0.05
    assert analysis.outer_steps >= 2
    if method.startswith("incremental"):
        assert analysis.inner_steps >= analysis.outer_steps
    else:
        assert analysis.inner_steps == 0


@every_method
def test_too_few_steps_are_an_error_or_a_code(method):
    """The words are optimistix'; what was found so far is returned with the code."""
    solver = iterative(cheap(), 2)[method]
    words = "maximum number of steps was reached in the nonlinear solver"
    with pytest.raises(eqx.EquinoxRuntimeError, match=words):
        eqx.filter_jit(solver)(cheap_event())
    analysis = eqx.filter_jit(solver)(cheap_event(), throw=False)
    assert not analysis.converged
    assert words in analysis.message
    assert analysis.outer_steps == 2
    assert np.isfinite(analysis.mode).all()


@every_method
def test_away_from_a_minimum_the_gradient_is_that_of_j(x64, method):
    """By reverse differentiation of J and the transform; so too for a single linear step."""
    j = to_double(cheap())
    solvers = {**iterative(j, 2), "oi": OptimalInterpolation(j)}
    for solver in (solvers[method], solvers["oi"]):
        analysis = eqx.filter_jit(solver)(cheap_event(), throw=False)
        want = slope(j, analysis.mode, cheap_event())
        assert want > 0.1
        np.testing.assert_allclose(analysis.gradient_norm, want, rtol=1e-9)
        np.testing.assert_allclose(analysis.energy, j(analysis.mode, cheap_event()), rtol=1e-12)


@pytest.mark.parametrize("steps", [3, 50])
@pytest.mark.parametrize("mask", [(True, True, True), (False, True, False), (False,) * 3])
def test_letting_times_in_one_by_one_ends_where_all_at_once_does(x64, mask, steps):
    """One minimum: the path does not matter, whatever is missing; nothing seen is no step away.

    With 50 steps a time it comes to rest at each before the next is let in, and must go on.
    """
    j, event = cheap(), cheap_event(mask=mask)
    with jax.enable_x64(True):
        once = IncrementalFourDVar(j, 1e-9)(event)
        each = IncrementalFourDVar(j, 1e-9, quasi_static=steps)(event)
        np.testing.assert_allclose(each.mode, once.mode, rtol=1e-8, atol=1e-10)
        assert bool(each.converged)
        if not any(mask):
            np.testing.assert_array_equal(each.mode, j.prior.loc)


@pytest.mark.parametrize("method", [*METHODS, "gain", "information"])
def test_a_forward_model_of_nan_is_nonfinite(method):
    j = cheap(lambda x: curved(x) * jnp.nan)
    direct = {form: OptimalInterpolation(j, form) for form in ("gain", "information")}
    solver = {**iterative(j, 8), **direct}[method]
    with pytest.raises(eqx.EquinoxRuntimeError, match=r"(?i)non-?finite"):
        eqx.filter_jit(solver)(cheap_event())
    analysis = eqx.filter_jit(solver)(cheap_event(), throw=False)
    assert not analysis.converged
    assert analysis.result == optx.RESULTS.nonfinite
    assert analysis.message == optx.RESULTS[optx.RESULTS.nonfinite]


@pytest.mark.parametrize("method", [*METHODS, "gain", "information"])
def test_an_event_that_fails_disturbs_no_other(x64, method):
    """In a batch of three, the second has NaN where it was seen; NaN under a mask is no failure.
    All fields have a leading axis.
    """
    j = cheap()
    direct = {form: OptimalInterpolation(j, form) for form in ("gain", "information")}
    solver = {**iterative(j), **direct}[method]
    given = [
        cheap_event(),
        cheap_event(np.array([2.0, np.nan, -0.9])),
        cheap_event(np.array([1.0, 0.2, np.nan]), (True, True, False)),
    ]
    batch = jax.tree.map(lambda *a: jnp.stack(a), *given)
    call = eqx.filter_jit(lambda e: solver(e, throw=False))
    together = eqx.filter_jit(eqx.filter_vmap(lambda e: solver(e, throw=False)))(batch)
    assert all(leaf.shape[:1] == (3,) for leaf in jax.tree.leaves(together))
    assert together.converged.tolist() == [True, False, True]
    assert pick(together, 1).result == optx.RESULTS.nonfinite
    for i in (0, 2):
        alone, own = call(given[i]), pick(together, i)
        assert own.message == "converged"
        np.testing.assert_allclose(own.mode, alone.mode, rtol=1e-4)
        np.testing.assert_allclose(own.energy, alone.energy, rtol=1e-4)
        np.testing.assert_allclose(own.covariance, alone.covariance, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "3DVar"])
def test_from_the_minimum_it_stays(x64, method):
    """A `start` is a state, not a control variable."""
    j = to_double(cheap())
    solver = iterative(j)[method]
    first = eqx.filter_jit(solver)(cheap_event())
    again = eqx.filter_jit(solver)(cheap_event(), start=first.mode)
    np.testing.assert_allclose(again.mode, first.mode, atol=1e-4)
    assert again.outer_steps < first.outer_steps


def test_a_step_to_where_j_is_not_finite_is_not_taken(x64):
    """The logarithm's Gauss-Newton step from 1 would lead below zero, where J is NaN."""
    j = Energy(Gaussian(jnp.ones(1), jnp.eye(1)), jnp.log, obs_sd=0.01)
    event = Event(jnp.array([-3.0]), jnp.ones(1, bool))
    solver = IncrementalFourDVar(j, damping=0.0)
    analysis = eqx.filter_jit(solver)(event)
    assert analysis.converged
    np.testing.assert_allclose(analysis.mode, np.exp(-3.0), rtol=1e-2)
