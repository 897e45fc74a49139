"""Curvature at a mode: both Hessians, the Gaussians made of them, and the Jacobian of the mode."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortlib.energy import Energy
from amortlib.gaussian import Gaussian, condition
from amortlib.laplace import (
    condition_number,
    gain,
    gauss_newton_hessian,
    hessian,
    laplace,
    mode_jacobian,
    preconditioned_hessian,
    residual_jacobian,
)
from amortlib.problems import lorenz63
from amortlib.types import Event

D = 3
SD = np.array([[0.2, 0.3], [0.25, 0.2], [0.4, 0.3]])
MASK = np.array([[True, True], [False, True], [True, False]])


def background(scale: tuple[float, float, float] = (1.0, 0.7, 0.5)) -> Gaussian:
    low = np.array([[1.0, 0.0, 0.0], [0.4, 1.0, 0.0], [-0.3, 0.2, 1.0]])
    return Gaussian(jnp.array([0.5, -0.3, 0.8]), jnp.asarray(np.diag(scale) @ low))


def curved(x: jax.Array) -> jax.Array:
    """Two axes, and curvature everywhere."""
    first = jnp.stack([jnp.sin(2 * x[0]) + x[1], x[0] * x[2], x[2] + x[1] ** 2])
    return jnp.stack([first, x**2 + x[::-1]], axis=1)


def affine(x: jax.Array) -> jax.Array:
    matrix = np.random.default_rng(2).normal(size=(6, D))
    return (jnp.asarray(matrix) @ x + 0.3).reshape(3, 2)


def event(mask: np.ndarray = MASK, under: float = np.nan) -> Event:
    y = np.random.default_rng(1).normal(size=(3, 2))
    return Event(*(jnp.asarray(a) for a in (np.where(mask, y, under), mask, SD)))


# Compiled as wholes: eagerly, every primitive would be compiled by itself.
HESSIAN = eqx.filter_jit(hessian)
GAUSS_NEWTON = eqx.filter_jit(gauss_newton_hessian)
LAPLACE = eqx.filter_jit(laplace)
JACOBIAN = eqx.filter_jit(mode_jacobian)
GAIN = eqx.filter_jit(gain)
RESIDUAL_JACOBIAN = eqx.filter_jit(residual_jacobian)
PRECONDITIONED = eqx.filter_jit(preconditioned_hessian)
SLOPE = eqx.filter_jit(lambda energy, x, event: jnp.linalg.norm(jax.grad(energy)(x, event)))

POINT = np.array([0.4, -0.9, 1.3])
NOTHING = np.zeros((3, 2), bool)


@eqx.filter_jit
def newton(energy: Energy, start: jax.Array, event: Event) -> jax.Array:
    """The minimum next to `start`, by Newton's method on J itself."""

    def step(_, x):
        slope, curvature = jax.grad(energy)(x, event), jax.hessian(energy)(x, event)
        return x - jnp.linalg.solve(curvature, slope)

    return jax.lax.fori_loop(0, 8, step, start)


def descend(energy: Energy, event: Event) -> jax.Array:
    """A minimum of a cheap J: damped steps first, then Newton's."""

    def step(_, x):
        curvature = gauss_newton_hessian(energy, x, event) + 5 * jnp.eye(D)
        return x - jnp.linalg.solve(curvature, jax.grad(energy)(x, event))

    near = jax.jit(lambda x: jax.lax.fori_loop(0, 300, step, x))(energy.prior.loc)
    return newton(energy, near, event)


# --- Hessians ---------------------------------------------------------------------------------


def test_the_hessian_is_that_of_finite_differences(x64):
    """Second differences of J's values: no derivative of anything is used."""
    energy, h = Energy(background(), curved), 1e-4
    eye = h * np.eye(D)
    corners = [POINT + a * eye[i] + b * eye[j] for i in range(D) for j in range(D)
               for a, b in ((1, 1), (1, -1), (-1, 1), (-1, -1))]  # fmt: skip
    values = jax.jit(jax.vmap(lambda x: energy(x, event())))(jnp.asarray(np.array(corners)))
    want = np.asarray(values).reshape(D, D, 4) @ np.array([1, -1, -1, 1]) / (4 * h**2)
    got = HESSIAN(energy, jnp.asarray(POINT), event())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(got).max() > 10


def test_the_residual_s_jacobian_is_that_of_finite_differences_in_both_modes(x64):
    energy, h = Energy(background(), curved), 1e-6
    v = energy.prior.whiten(jnp.asarray(POINT))
    run = jax.jit(jax.vmap(lambda v: energy.residual(v, event())))
    want = (run(v + h * jnp.eye(D)) - run(v - h * jnp.eye(D))).T / (2 * h)
    forward = RESIDUAL_JACOBIAN(energy, v, event())
    adjoint = RESIDUAL_JACOBIAN(energy, v, event(), mode="bwd")
    assert forward.shape == (D + 6, D)
    np.testing.assert_allclose(forward, want, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(adjoint, forward, rtol=1e-13, atol=1e-13)


def test_the_preconditioned_spectrum_starts_at_one(x64):
    """Exactly one where nothing was seen, on every axis; larger along what was seen."""
    energy, x = Energy(background(), curved), jnp.asarray(POINT)
    spectrum = jax.jit(lambda e: jnp.linalg.eigvalsh(preconditioned_hessian(energy, x, e)))
    np.testing.assert_array_equal(spectrum(event(NOTHING)), 1.0)
    for seed in range(8):
        mask = np.random.default_rng(seed).random((3, 2)) < 0.5
        values = spectrum(event(mask))
        assert values[0] >= 1 - 1e-12
        # As many directions can be seen as there are observations.
        assert (values > 1 + 1e-9).sum() <= mask.sum()
        if mask.any():
            assert values[-1] > 1.1
    one = np.zeros((3, 2), bool)
    one[0, 0] = True
    np.testing.assert_allclose(spectrum(event(one))[:2], 1, atol=1e-12)


def test_the_transform_is_worth_it_where_b_is_badly_scaled(x64):
    """Standard deviations over four orders of magnitude, and seen each in its own unit: what is
    left is the ratio of signal to noise.
    """
    scale = (100.0, 1.0, 0.01)
    energy = Energy(background(scale), lambda x: affine(x / jnp.array(scale)))
    x = energy.prior.loc
    for seen in (event(), event(NOTHING)):
        plain = GAUSS_NEWTON(energy, x, seen)
        values = np.linalg.eigvalsh(plain)
        np.testing.assert_allclose(condition_number(plain), values[-1] / values[0], rtol=1e-6)
        better = condition_number(PRECONDITIONED(energy, x, seen))
        assert better < 1e-4 * condition_number(plain)
        assert better < 1e3
    assert better == 1


@pytest.mark.parametrize("mode", ["fwd", "bwd"])
def test_the_two_hessians_agree_where_the_model_is_affine(x64, mode):
    """And are B^-1 + H^T R^-1 H, in numpy; where it is not they differ, by the curvature of the
    forward model times the innovations.
    """
    linear, x = Energy(background(), affine), jnp.asarray(POINT)
    rows = np.random.default_rng(2).normal(size=(6, D))[MASK.reshape(-1)]
    prec = np.linalg.inv(np.asarray(background().covariance()))
    want = prec + rows.T @ np.diag(SD[MASK] ** -2.0) @ rows
    got = GAUSS_NEWTON(linear, x, event(), mode=mode)
    np.testing.assert_allclose(got, want, rtol=1e-10)
    np.testing.assert_allclose(HESSIAN(linear, x, event()), want, rtol=1e-10)
    energy = Energy(background(), curved)
    curvature = jax.hessian(curved)(x)
    innovation = np.asarray(energy.innovation(x, event()))
    second = np.einsum("tp,tpij->ij", innovation / SD**2, curvature)
    both = GAUSS_NEWTON(energy, x, event(), mode=mode), HESSIAN(energy, x, event())
    np.testing.assert_allclose(both[0] - both[1], second, rtol=1e-9, atol=1e-9)
    assert np.abs(second).max() > 1


# --- Gaussians --------------------------------------------------------------------------------


@pytest.mark.parametrize("derivative", ["fwd", "bwd"])
def test_laplace_is_the_inverse_of_its_hessian(x64, derivative):
    energy = Energy(background(), curved)
    mode = descend(energy, event())
    assert SLOPE(energy, mode, event()) < 1e-9
    full = LAPLACE(energy, mode, event())
    part = LAPLACE(energy, mode, event(), full=False, derivative=derivative)
    np.testing.assert_array_equal(full.loc, mode)
    np.testing.assert_array_equal(part.loc, mode)
    want = np.linalg.inv(HESSIAN(energy, mode, event()))
    np.testing.assert_allclose(full.covariance(), want, rtol=1e-9, atol=1e-12)
    want = np.linalg.inv(GAUSS_NEWTON(energy, mode, event()))
    np.testing.assert_allclose(part.covariance(), want, rtol=1e-9, atol=1e-12)
    assert np.abs(full.covariance() / part.covariance() - 1).max() > 0.01


@pytest.mark.parametrize("full", [True, False])
def test_where_the_model_is_affine_it_is_the_posterior(x64, full):
    energy = Energy(background(), affine)
    rows = jnp.asarray(np.random.default_rng(2).normal(size=(6, D)))
    flat = Event(*(a.reshape(-1) for a in (event().y - 0.3, event().mask, event().sd)))
    exact = condition(background(), rows, flat)
    mode = newton(energy, energy.prior.loc, event())
    got = LAPLACE(energy, mode, event(), full=full)
    np.testing.assert_allclose(got.loc, exact.loc, atol=1e-10)
    np.testing.assert_allclose(got.covariance(), exact.covariance(), atol=1e-10)


def test_of_a_point_that_is_no_minimum_it_is_nan(x64):
    """At the top of a double well: the Gauss-Newton Gaussian is fine there, the full one cannot
    be; at the bottom both are.
    """
    prior = Gaussian(jnp.zeros(2), jnp.eye(2))
    energy = Energy(prior, lambda x: x[:1] ** 2, obs_sd=0.3)
    seen = Event(jnp.array([1.0]), jnp.ones(1, bool))
    top = jnp.zeros(2)
    assert SLOPE(energy, top, seen) == 0
    assert np.isnan(LAPLACE(energy, top, seen).covariance()).any()
    np.testing.assert_allclose(LAPLACE(energy, top, seen, full=False).covariance(), np.eye(2))
    bottom = newton(energy, jnp.array([0.9, 0.0]), seen)
    assert np.isfinite(LAPLACE(energy, bottom, seen).covariance()).all()


def test_with_nothing_seen_all_is_the_background(x64):
    energy, none = Energy(background(), curved), event(NOTHING)
    for full in (True, False):
        got = LAPLACE(energy, energy.prior.loc, none, full=full)
        np.testing.assert_allclose(got.covariance(), background().covariance(), rtol=1e-12)
    np.testing.assert_array_equal(JACOBIAN(energy, energy.prior.loc, none), 0)
    np.testing.assert_array_equal(GAIN(energy, energy.prior.loc, none), 0)


# --- the Jacobian of the mode -----------------------------------------------------------------


def resolved(energy: Energy, mode: jax.Array, event: Event, h: float) -> np.ndarray:
    """d mode / dy by moving every observation, either way, and minimising again."""
    size = event.y.size
    steps = h * jnp.eye(size).reshape(size, *event.y.shape)

    def move(step):
        return newton(energy, mode, Event(event.y + step, event.mask, event.sd))

    run = jax.jit(jax.vmap(move))
    columns = np.asarray(run(steps) - run(-steps)) / (2 * h)
    return np.moveaxis(columns.reshape(*event.y.shape, -1), -1, 0)


def test_the_mode_moves_as_its_jacobian_says(x64):
    """And not as the gain says, where the model is curved and the innovations are large."""
    energy, seen = Energy(background(), curved), event(under=0.0)
    mode = descend(energy, seen)
    want = resolved(energy, mode, seen, 1e-5)
    got = JACOBIAN(energy, mode, seen)
    assert got.shape == (D, 3, 2)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(got)[:, ~MASK], 0)
    np.testing.assert_array_equal(np.asarray(GAIN(energy, mode, seen))[:, ~MASK], 0)
    assert (np.abs(np.asarray(got)[:, MASK]).max(axis=0) > 1e-3).all()
    # What lies under the mask, NaN even, changes nothing.
    np.testing.assert_array_equal(JACOBIAN(energy, mode, event()), got)


def test_the_gain_is_the_jacobian_where_the_model_is_affine(x64):
    """And both are (B^-1 + H^T R^-1 H)^-1 H^T R^-1."""
    energy = Energy(background(), affine)
    mode = newton(energy, energy.prior.loc, event())
    rows = np.random.default_rng(2).normal(size=(6, D)) * MASK.reshape(-1, 1)
    weighted = rows.T / SD.reshape(-1) ** 2
    prec = np.linalg.inv(np.asarray(background().covariance()))
    want = np.linalg.solve(prec + weighted @ rows, weighted).reshape(D, 3, 2)
    for function in (GAIN, JACOBIAN):
        np.testing.assert_allclose(function(energy, mode, event()), want, rtol=1e-9, atol=1e-12)


# --- Lorenz-63 --------------------------------------------------------------------------------


@cache
def chaotic() -> dict[str, np.ndarray]:
    """Of eight windows, at the minimum next to the truth: derivatives, and the re-solved mode."""
    with jax.enable_x64(True):
        problem = lorenz63(substeps=3)
        energy = Energy(problem.prior, problem.forward)
        truth, batch = problem.batch(jax.random.key(3), 8)

        @jax.jit
        def run(truth, batch):
            def one(x, e):
                mode = newton(energy, x, e)
                return {
                    "mode": mode,
                    "gradient": jax.grad(energy)(mode, e),
                    "full": hessian(energy, mode, e),
                    "part": gauss_newton_hessian(energy, mode, e),
                    "jacobian": mode_jacobian(energy, mode, e),
                    "gain": gain(energy, mode, e),
                }

            return jax.lax.map(lambda a: one(*a), (truth, batch))

        @jax.jit
        def moved(mode, batch, steps):
            def one(args):
                mode, e = args
                return jax.vmap(lambda s: newton(energy, mode, Event(e.y + s, e.mask, e.sd)))(steps)

            return jax.lax.map(one, (mode, batch))

        found = jax.tree.map(np.asarray, run(truth, batch))
        shape = batch.y.shape[1:]
        size, h = int(np.prod(shape)), 1e-4
        unit = h * np.eye(size).reshape(size, *shape)
        ends = np.asarray(moved(found["mode"], batch, np.concatenate([unit, -unit])))
        columns = (ends[:, :size] - ends[:, size:]) / (2 * h)
        found["resolved"] = np.moveaxis(columns, 1, 2).reshape(8, D, *shape)
        return found | {"mask": np.asarray(batch.mask)}


def good(found: dict[str, np.ndarray]) -> np.ndarray:
    """Events whose mode was found: stationary, and a minimum."""
    still = np.linalg.norm(found["gradient"], axis=1) < 1e-6
    return np.flatnonzero(still & (np.linalg.eigvalsh(found["full"])[:, 0] > 0))


def off(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.mark.slow
def test_in_chaos_the_mode_moves_as_its_jacobian_says():
    """To 1e-4, on every event; the gain is off by more than ten times that on most."""
    found = chaotic()
    events = good(found)
    assert events.size >= 5
    by_jacobian = [off(found["jacobian"][i], found["resolved"][i]) for i in events]
    by_gain = [off(found["gain"][i], found["resolved"][i]) for i in events]
    assert max(by_jacobian) < 1e-4
    assert np.median(by_gain) > 1e-3
    assert max(by_gain) > 0.02
    assert (np.moveaxis(found["jacobian"], 1, -1)[~found["mask"]] == 0).all()


@pytest.mark.slow
def test_in_chaos_the_two_hessians_differ():
    found = chaotic()
    events = good(found)
    differences = [off(found["part"][i], found["full"][i]) for i in events]
    assert max(differences) > 0.01
    assert (np.linalg.eigvalsh(found["part"])[:, 0] > 0).all()
