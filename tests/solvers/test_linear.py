"""Where the model is linear every solver has one answer, and it is known by two other roads: the
Gaussian-process formula, and the Kalman smoother.
"""

from functools import cache
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from amortlib.energy import Energy
from amortlib.gaussian import Gaussian, condition, kalman_smoother
from amortlib.observation import LinearOperator
from amortlib.problems import Window, ornstein_uhlenbeck
from amortlib.solvers import (
    IncrementalFourDVar,
    OptimalInterpolation,
    StrongFourDVar,
    ThreeDVar,
    WeakFourDVar,
)
from amortlib.types import Event

N = 16  # times of the path
STATES, K, P = 8, 3, 2  # states of the window, their components, how many of them are seen

# Far below what is asked of the answers, and above rounding.
TIGHT = {"rtol": 1e-11, "atol": 1e-11}


# A damped rotation that also feeds a third component: linear, and not symmetric.
GENERATOR = np.array([[-0.2, 1.3, 0.0], [-1.1, -0.3, 0.4], [0.5, 0.0, -0.6]])
STEP = scipy.linalg.expm(0.4 * GENERATOR)


class Rotation(eqx.Module):
    """The dynamics of that generator."""

    def vector_field(self, t, x, args):
        return jnp.asarray(GENERATOR) @ x


def seen_by() -> jax.Array:
    """H: a sum of two components, and the third."""
    return jnp.array([[1.0, 0.5, 0.0], [0.0, 0.0, 1.0]])


def observe(states: jax.Array) -> jax.Array:
    return states @ seen_by().T


def powers(x0: jax.Array) -> jax.Array:
    """The window of that dynamics, by powers of its matrix: compiled sooner than an integrator."""
    step, states = jnp.array(STEP.tolist()), [x0]
    for _ in range(STATES - 1):
        states.append(step @ states[-1])
    return observe(jnp.stack(states))


def window() -> Window:
    """That of Euler's steps, which are linear too, and compile soonest."""
    return Window(Rotation(), observe, dt=0.4, states=STATES, substeps=2, solver=dfx.Euler())


def background() -> Gaussian:
    """Variances over two orders of magnitude, and correlations."""
    low = jnp.array([[2.0, 0.0, 0.0], [0.6, 0.5, 0.0], [-0.1, 0.1, 0.2]])
    return Gaussian(jnp.array([1.0, -2.0, 0.5]), low)


def path() -> Energy:
    """A path of an Ornstein-Uhlenbeck process, with a background that is not zero."""
    problem = ornstein_uhlenbeck(N, loc=np.sin(np.arange(N)))
    return Energy(problem.prior, problem.forward)


def initial_state() -> Energy:
    return Energy(background(), powers)


ENERGIES = {"path": path, "initial state": initial_state}
SHAPES = {"path": (N,), "initial state": (STATES, P)}
every_problem = pytest.mark.parametrize("problem", ENERGIES)


def event(shape: tuple[int, ...], mask: Any, under: float = np.nan) -> Event:
    """Numbers of the size of the state, error bars that differ; `under` the mask."""
    rng = np.random.default_rng(3)
    y, sd = 1.5 * rng.normal(size=shape), rng.uniform(0.2, 0.6, shape)
    mask = np.asarray(mask).reshape(shape)
    return Event(*(jnp.asarray(a) for a in (np.where(mask, y, under), mask, sd)))


def masks(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    block = np.ones(shape, bool)
    block[3:6] = False
    return {
        "no gap": np.ones(shape, bool),
        "a gap": block,
        "random": rng.random(shape) < 0.5,
        "one entry": np.arange(np.prod(shape)).reshape(shape) == 2,
        "nothing": np.zeros(shape, bool),
    }


MASKS = list(masks((N,)))


def solvers(energy: Energy) -> dict[str, Any]:
    """Every solver, to the precision that double precision gives."""
    prior, forward, exact = energy.prior, energy.forward, {"tolerance": 1e-11}
    lm, bfgs = optx.LevenbergMarquardt(**TIGHT), optx.BFGS(**TIGHT)
    return {
        "gain": OptimalInterpolation(energy),
        "information": OptimalInterpolation(energy, "information"),
        "3DVar": ThreeDVar(prior, forward, minimiser=lm, max_steps=256),
        "strong, BFGS": StrongFourDVar(energy, minimiser=bfgs, max_steps=1024),
        "strong, Levenberg-Marquardt": StrongFourDVar(energy, minimiser=lm),
        "incremental": IncrementalFourDVar(energy, inner_tolerance=1e-12, **exact),
        "incremental, models": IncrementalFourDVar(
            energy, inner_tolerance=1e-12, matrix=False, **exact
        ),
        "undamped": IncrementalFourDVar(energy, inner_tolerance=1e-12, damping=0.0, **exact),
    }


def road_of_gaussian_processes(energy: Energy, seen: Event) -> tuple[jax.Array, jax.Array]:
    """The formula, with the rows of H found by running the model on unit vectors."""
    zero, eye = jnp.zeros_like(energy.prior.loc), jnp.eye(energy.prior.loc.size)
    rows = (jax.vmap(energy.forward)(eye) - energy.forward(zero)).reshape(eye.shape[0], -1).T
    flat = Event(*(a.reshape(-1) for a in (seen.y, seen.mask, seen.sd)))
    exact = condition(energy.prior, rows, flat)
    return exact.mean(), exact.covariance()


def road_of_kalman(problem: str, seen: Event) -> tuple[jax.Array, jax.Array]:
    """Means and variances of the path; mean and covariance of the initial state."""
    if problem == "path":
        # About the background: x - x_b is stationary, with a mean of zero.
        loc = path().prior.loc
        a = jnp.exp(-1 / 8)[None, None]
        start = Gaussian(jnp.zeros(1), jnp.eye(1))
        y = (seen.y - loc)[:, None]
        smooth = kalman_smoother(
            start, a, 1 - a**2, jnp.eye(1), y, seen.mask[:, None], seen.sd[:, None]
        )
        return loc + smooth.mean[:, 0], smooth.cov[:, 0, 0]
    m, none = jnp.asarray(STEP), jnp.zeros((K, K))
    smooth = kalman_smoother(background(), m, none, seen_by(), seen.y, seen.mask, seen.sd)
    return smooth.mean[0], smooth.cov[0]


@cache
def program(problem: str):
    """One compiled program for all solvers and both roads; the mask is an argument."""

    @jax.jit
    def run(seen: Event):
        energy = ENERGIES[problem]()
        own = {name: s(seen, throw=False) for name, s in solvers(energy).items()}
        kept = {
            name: (a.mode, a.covariance, a.converged, a.outer_steps, a.inner_steps)
            for name, a in own.items()
        }
        prior = (energy.prior.loc, energy.prior.covariance())
        roads = road_of_gaussian_processes(energy, seen), road_of_kalman(problem, seen)
        return kept, roads, prior

    return run


@every_problem
@pytest.mark.parametrize("gaps", MASKS)
def test_every_solver_finds_the_one_answer(x64, problem, gaps):
    """Mode and covariance, by two roads; the two forms of the gain agree closer still."""
    seen = event(SHAPES[problem], masks(SHAPES[problem])[gaps])
    own, ((mean, cov), (smooth_mean, smooth_cov)), prior = program(problem)(seen)
    own_parts = np.diagonal(cov) if problem == "path" else cov
    np.testing.assert_allclose(smooth_mean, mean, atol=1e-10)
    np.testing.assert_allclose(smooth_cov, own_parts, atol=1e-10)
    for name, (mode, covariance, converged, *_) in own.items():
        assert converged, name
        np.testing.assert_allclose(mode, mean, atol=1e-8, err_msg=name)
        np.testing.assert_allclose(covariance, cov, atol=1e-8, err_msg=name)
    for one, other in zip(own["gain"][:2], own["information"][:2], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-10)
    if gaps == "nothing":
        for name, (mode, covariance, *_) in own.items():
            np.testing.assert_allclose(mode, prior[0], rtol=0, atol=1e-12, err_msg=name)
            np.testing.assert_allclose(covariance, prior[1], rtol=0, atol=1e-12, err_msg=name)
    else:
        assert np.abs(mean - prior[0]).max() > 0.01


@every_problem
@given(data=st.data())
def test_whatever_the_mask(problem, data):
    """Any mask: all solvers agree, and to see more never makes a variance larger."""
    shape = SHAPES[problem]
    size = int(np.prod(shape))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    with jax.enable_x64(True):
        own, ((mean, cov), _), (_, prior_cov) = program(problem)(event(shape, mask))
        for name, (mode, covariance, converged, *_) in own.items():
            assert converged, name
            np.testing.assert_allclose(mode, mean, atol=1e-8, err_msg=name)
            np.testing.assert_allclose(covariance, cov, atol=1e-8, err_msg=name)
        assert np.linalg.eigvalsh(prior_cov - cov).min() > -1e-10


@every_problem
@pytest.mark.parametrize("gaps", MASKS)
def test_undamped_it_takes_one_step_and_the_check(x64, problem, gaps):
    """A quadratic cost is its own quadratic model. With nothing seen the check comes first."""
    own, _, _ = program(problem)(event(SHAPES[problem], masks(SHAPES[problem])[gaps]))
    _, _, converged, outer, inner = own["undamped"]
    assert converged
    assert outer == (1 if gaps == "nothing" else 2)
    assert inner >= (0 if gaps == "nothing" else 1)


@every_problem
@pytest.mark.parametrize("gaps", MASKS)
def test_in_single_precision_as_people_call_them(problem, gaps):
    """Default tolerances, every solver, NaN under the mask. A hundredth of a background standard
    deviation is more than the tolerances of 1e-6 on the last step leave.
    """
    own, (mean, _), prior = defaults(problem)(event(SHAPES[problem], masks(SHAPES[problem])[gaps]))
    sd = np.sqrt(np.diagonal(prior[1]))
    for name, (mode, covariance, converged) in own.items():
        assert mode.dtype == np.float32
        # Levenberg-Marquardt can stall at rounding, at the minimum, and says that it has not
        # converged: see the test below.
        assert converged or name == "3DVar", name
        assert np.isfinite(covariance).all(), name
        np.testing.assert_allclose((mode - mean) / sd, 0, atol=1e-2, err_msg=name)
        if gaps == "nothing":
            np.testing.assert_allclose((mode - prior[0]) / sd, 0, atol=1e-5, err_msg=name)
            np.testing.assert_allclose(
                covariance / np.outer(sd, sd), prior[1] / np.outer(sd, sd), atol=1e-5, err_msg=name
            )


def test_3dvar_says_in_single_precision_that_it_converged():
    seen = event(SHAPES["initial state"], masks(SHAPES["initial state"])["one entry"])
    own, _, _ = defaults("initial state")(seen)
    assert own["3DVar"][2]


@cache
def defaults(problem: str):
    @jax.jit
    def run(seen: Event):
        energy = ENERGIES[problem]()
        own = {
            "gain": OptimalInterpolation(energy),
            "information": OptimalInterpolation(energy, "information"),
            "3DVar": ThreeDVar(energy.prior, energy.forward),
            "strong": StrongFourDVar(energy),
            "incremental": IncrementalFourDVar(energy),
        }
        kept = {}
        for name, solver in own.items():
            a = solver(seen, throw=False)
            kept[name] = a.mode, a.covariance, a.converged
        prior = energy.prior.loc, energy.prior.covariance()
        return kept, road_of_gaussian_processes(energy, seen), prior

    return run


def test_3dvar_takes_an_operator_and_error_bars_of_its_own(x64):
    """Without a window: H is a matrix, R is a number that the solver holds."""
    h = jnp.asarray(np.random.default_rng(0).normal(size=(4, K)))
    y, mask = jnp.array([0.3, jnp.nan, -1.0, 0.8]), jnp.array([True, False, True, True])
    solver = ThreeDVar(
        background(), LinearOperator(h), 0.4, minimiser=optx.LevenbergMarquardt(**TIGHT)
    )
    analysis = eqx.filter_jit(solver)(Event(y, mask))
    exact = condition(background(), h, Event(y, mask, jnp.full(4, 0.4)))
    np.testing.assert_allclose(analysis.mode, exact.mean(), atol=1e-8)
    np.testing.assert_allclose(analysis.covariance, exact.covariance(), atol=1e-8)


# --- a model that errs ------------------------------------------------------------------------

MODEL_ERROR = np.array([0.3, 0.1, 0.2])


@cache
def weak_program():
    @jax.jit
    def run(seen: Event):
        # Tighter, and it can stall at rounding without saying that it has converged.
        lm = optx.LevenbergMarquardt(1e-9, 1e-9)
        solver = WeakFourDVar(background(), window(), MODEL_ERROR, minimiser=lm)
        inner = IncrementalFourDVar(solver.energy, tolerance=1e-11, inner_tolerance=1e-12)
        own = {}
        for name, method in (("weak", solver), ("incremental", inner)):
            analysis = method(seen, throw=False)
            states = solver.trajectory(analysis.mode)
            tangent = jax.jacfwd(solver.trajectory)(analysis.mode)
            spread = jnp.einsum("nia,ab,njb->nij", tangent, analysis.covariance, tangent)
            own[name] = analysis.converged, analysis.mode, states, spread
        m = jax.vmap(window().model, out_axes=1)(jnp.eye(K))
        q = jnp.diag(jnp.asarray(MODEL_ERROR) ** 2)
        smooth = kalman_smoother(background(), m, q, seen_by(), seen.y, seen.mask, seen.sd)
        return own, smooth.mean, smooth.cov

    return run


@pytest.mark.slow
@pytest.mark.parametrize("gaps", [*MASKS, "the end"])
def test_the_weak_constraint_is_the_kalman_smoother(x64, gaps):
    """States at every time, and their covariances: the sum over the model errors is the same
    posterior as the recursion in time. Where nothing is seen at the end of the window the
    gradient by the last errors is exactly zero.
    """
    shape = SHAPES["initial state"]
    end = np.broadcast_to(np.arange(STATES)[:, None] < 4, shape)
    own, mean, cov = weak_program()(event(shape, {**masks(shape), "the end": end}[gaps]))
    for name, (converged, mode, states, spread) in own.items():
        assert converged, name
        np.testing.assert_allclose(states, mean, atol=1e-8, err_msg=name)
        np.testing.assert_allclose(spread, cov, atol=1e-8, err_msg=name)
        if gaps == "nothing":
            np.testing.assert_allclose(mode[:K], background().loc, atol=1e-12)
            np.testing.assert_allclose(mode[K:], 0, atol=1e-12)
