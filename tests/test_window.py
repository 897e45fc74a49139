"""Windows against scipy's integrator, and their derivatives against finite differences."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg

from amortlib.dynamics import Lorenz63, Lorenz96, OrnsteinUhlenbeck
from amortlib.energy import Energy
from amortlib.gaussian import Gaussian, GaussMarkov
from amortlib.observation import Select
from amortlib.problems import WeakWindow, Window
from amortlib.types import Event

START = np.array([1.5, -1.5, 25.0])


def everything(states):
    return states


def window63(substeps=5, adjoint=None) -> Window:
    """Six states over half a time unit: about one turn around a wing."""
    return Window(Lorenz63(), everything, dt=0.1, states=6, substeps=substeps, adjoint=adjoint)


def ragged(states):
    """Not linear, of a shape of its own, and without anything at the last time."""
    return jnp.stack([states[:-1, 0] ** 2 / 10.0, jnp.sin(states[:-1, 1])], 1)


# --- states -----------------------------------------------------------------------------------


def reference() -> np.ndarray:
    """By scipy's eighth-order method, the equations written out again."""

    def field(t, s):
        x, y, z = s
        return [10.0 * (y - x), x * (28.0 - z) - y, x * y - 8.0 / 3.0 * z]

    found = scipy.integrate.solve_ivp(
        field, (0.0, 0.5), START, "DOP853", t_eval=np.linspace(0, 0.5, 6), rtol=1e-10, atol=1e-10
    )
    return found.y.T


def test_a_trajectory_follows_scipy_within_the_discretisation_error(x64):
    """The error of a step is told by halving it (Richardson), without the reference.

    Tsit5 is of order 5, so the finer run errs by at most 1/31 of the difference of the two. It
    does so by 1e-6, far above the 2e-9 or so of the reference.
    """
    coarse, fine = (
        np.asarray(eqx.filter_jit(window63(substeps).trajectory)(jnp.asarray(START)))
        for substeps in (2, 4)
    )
    assert fine.shape == (6, 3)
    np.testing.assert_array_equal(fine[0], START)
    difference = np.linalg.norm(coarse - fine, axis=1)[1:]
    error = np.linalg.norm(fine - reference(), axis=1)[1:]
    assert np.all(error <= difference / 31), (error, difference)
    assert difference.max() < 1e-3


def test_a_trajectory_is_the_model_again_and_again(x64):
    window = window63()
    step = eqx.filter_jit(window.model)
    states = [jnp.asarray(START)]
    for _ in range(5):
        states.append(step(states[-1]))
    got = eqx.filter_jit(window.trajectory)(jnp.asarray(START))
    np.testing.assert_allclose(got, np.stack(states), rtol=1e-12)


def test_what_is_seen_is_the_operator_of_the_states(x64):
    window = Window(Lorenz63(), Select((2, 0), stride=2), dt=0.1, states=6)
    got, states = eqx.filter_jit(lambda w, x: (w(x), w.trajectory(x)))(window, jnp.asarray(START))
    np.testing.assert_array_equal(got, np.asarray(states)[::2][:, [2, 0]])


def test_without_errors_the_weak_window_is_the_window(x64):
    window = Window(Lorenz63(), ragged, dt=0.1, states=6)
    weak = WeakWindow(window)
    control = jnp.concatenate([jnp.asarray(START), jnp.zeros(15)])

    @eqx.filter_jit
    def both(window, weak):
        strong = window.trajectory(control[:3]), window(control[:3])
        return strong, (weak.trajectory(control), weak(control))

    (states, seen), (weak_states, weak_seen) = both(window, weak)
    np.testing.assert_allclose(weak_states, states, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(weak_seen, seen, rtol=1e-12, atol=1e-12)


def test_a_weak_window_adds_each_error_after_its_forecast(x64):
    window = window63()
    eta = np.random.default_rng(0).normal(size=(5, 3))
    control = jnp.asarray(np.concatenate([START, eta.ravel()]))

    @eqx.filter_jit
    def run(weak):
        states = weak.trajectory(control)
        return states, jax.vmap(weak.window.model)(states[:-1])

    states, forecasts = map(np.asarray, run(WeakWindow(window)))
    np.testing.assert_array_equal(states[0], START)
    np.testing.assert_allclose(states[1:] - forecasts, eta, rtol=0, atol=1e-12)


# --- derivatives ------------------------------------------------------------------------------


def lorenz63_case():
    rng = np.random.default_rng(1)
    return window63(), START, rng.normal(size=3)


def lorenz96_case():
    rng = np.random.default_rng(2)
    window = Window(Lorenz96(), everything, dt=0.1, states=4, substeps=2)
    return window, 2.3 + 3.6 * rng.normal(size=8), rng.normal(size=8)


def weak_case():
    rng = np.random.default_rng(3)
    control = np.concatenate([START, 0.5 * rng.normal(size=15)])
    return WeakWindow(window63()), control, rng.normal(size=18)


CASES = pytest.mark.parametrize(
    "case", [lorenz63_case, lorenz96_case, weak_case], ids=["lorenz63", "lorenz96", "weak"]
)


@CASES
def test_the_tangent_linear_model_is_the_limit_of_differences(x64, case):
    """One-sided differences err by h |M'' d d| / 2 + eps |M| / h: a V on logarithmic axes.

    With eps = 1e-16 and |M| = 20 the two meet near h = 1e-8.
    """
    model, x, d = case()
    d = d / np.linalg.norm(d)
    x, d = jnp.asarray(x), jnp.asarray(d)
    sizes = 10.0 ** -np.arange(1.0, 10.0)
    forward = eqx.filter_jit(model)
    _, tangent = eqx.filter_jit(lambda m: jax.jvp(m, (x,), (d,)))(model)
    at_x, tangent = np.asarray(forward(x)), np.asarray(tangent)
    errors = np.array(
        [np.linalg.norm((np.asarray(forward(x + h * d)) - at_x) / h - tangent) for h in sizes]
    )
    falling = (sizes <= 1e-2) & (sizes >= 1e-6)
    scaled = errors[falling] / sizes[falling]
    np.testing.assert_allclose(scaled, scaled[2], rtol=0.2)
    best = errors.argmin()
    assert sizes[best] < 1e-6
    assert errors[best] < 1e-6 * np.linalg.norm(tangent)
    assert errors[-1] > 3 * errors[best]


@CASES
def test_the_adjoint_is_the_transpose_of_the_tangent_linear_model(x64, case):
    model, x, d = case()
    x, d = jnp.asarray(x), jnp.asarray(d)
    w = np.random.default_rng(4).normal(size=jax.eval_shape(model, x).shape)

    @eqx.filter_jit
    def products(model, w):
        _, tangent = jax.jvp(model, (x,), (d,))
        _, pull = jax.vjp(model, x)
        return tangent, pull(w)[0]

    tangent, adjoint = map(np.asarray, products(model, jnp.asarray(w)))
    left, right = np.vdot(tangent, w), np.vdot(d, adjoint)
    assert abs(left) > 0.1  # two zeros would agree too
    assert left == pytest.approx(right, rel=1e-12)


@CASES
def test_the_gradient_of_the_cost(x64, case):
    """Against the product with a tangent, to rounding, and central differences, to O(h^2)."""
    model, x, d = case()
    d = d / np.linalg.norm(d)
    x, d = jnp.asarray(x), jnp.asarray(d)
    rng = np.random.default_rng(5)
    root = np.tril(rng.normal(size=(x.size, x.size)), -1) * 0.3 + 2.0 * np.eye(x.size)
    prior = Gaussian(x + rng.normal(size=x.size), jnp.asarray(root))
    y = np.asarray(eqx.filter_jit(model)(x))
    mask = rng.uniform(size=y.shape) < 0.6
    seen = np.where(mask, y + rng.normal(size=y.shape), np.nan)
    event = Event(jnp.asarray(seen), jnp.asarray(mask), jnp.asarray(rng.uniform(0.5, 2, y.shape)))

    @eqx.filter_jit
    def along(energy):
        gradient = jax.grad(energy)(x, event)
        _, slope = jax.jvp(lambda x: energy(x, event), (x,), (d,))
        return gradient, slope

    energy = Energy(prior, model)
    gradient, slope = along(energy)
    got = float(gradient @ d)
    assert got == pytest.approx(float(slope), rel=1e-12)
    cost, h = eqx.filter_jit(energy), 1e-5
    central = float(cost(x + h * d, event) - cost(x - h * d, event)) / (2 * h)
    assert got == pytest.approx(central, rel=1e-7)
    assert abs(got) > 0.1  # two zeros would agree too


@pytest.mark.slow
def test_the_ways_to_differentiate_agree(x64):
    """Each where it is made for; elsewhere it refuses, and does not return something wrong."""
    x, d = jnp.asarray(START), jnp.asarray([0.3, -1.0, 0.6])
    w = jnp.asarray(np.random.default_rng(6).normal(size=(6, 3)))

    def tangent(window):
        return jax.jvp(window, (x,), (d,))[1]

    def adjoint(window):
        return jax.vjp(window, x)[1](w)[0]

    checkpoints = window63(adjoint=dfx.RecursiveCheckpointAdjoint())
    forward = window63(adjoint=dfx.ForwardMode())
    direct, plain = window63(adjoint=dfx.DirectAdjoint()), window63()
    tangent, adjoint = eqx.filter_jit(tangent), eqx.filter_jit(adjoint)
    np.testing.assert_allclose(adjoint(plain), adjoint(direct), rtol=1e-12)
    np.testing.assert_allclose(tangent(plain), tangent(direct), rtol=1e-12)
    np.testing.assert_allclose(adjoint(checkpoints), adjoint(direct), rtol=1e-12)
    np.testing.assert_allclose(tangent(forward), tangent(direct), rtol=1e-12)
    with pytest.raises(TypeError, match="jvp"):
        tangent(checkpoints)
    with pytest.raises(ValueError, match="Reverse-mode"):
        adjoint(forward)


class Forced(eqx.Module):
    """dx/dt = -x cos t, which no step may take at the wrong time."""

    def vector_field(self, t, x, args):
        return -x * jnp.cos(t) + t


@pytest.mark.parametrize(
    "solver",
    [dfx.Tsit5(), dfx.Dopri5(), dfx.Bosh3(), dfx.Heun(), dfx.Ralston(), dfx.Euler()],
    ids=lambda solver: type(solver).__name__,
)
def test_the_plain_loop_takes_the_steps_of_diffrax(x64, solver):
    """Euler is no Runge-Kutta method with a tableau to diffrax, and is left to it."""
    sizes = {"dt": 0.3, "states": 4, "substeps": 2, "solver": solver}
    plain = Window(Forced(), lambda states: states, **sizes)
    other = Window(Forced(), lambda states: states, adjoint=dfx.DirectAdjoint(), **sizes)
    x = jnp.asarray([1.0, -2.0])
    np.testing.assert_allclose(
        eqx.filter_jit(plain)(x), eqx.filter_jit(other)(x), rtol=1e-13, atol=1e-14
    )


# --- the prior of the weak window -------------------------------------------------------------


@pytest.mark.parametrize("sd", [0.5, np.array([0.1, 0.5, 2.0])], ids=["number", "vector"])
def test_the_weak_prior_has_independent_blocks(x64, sd):
    root = np.array([[2.0, 0.0, 0.0], [0.5, 1.0, 0.0], [-0.3, 0.8, 3.0]])
    background = Gaussian(jnp.asarray(START), jnp.asarray(root))
    prior = WeakWindow(window63()).prior(background, sd)
    q = np.diag(np.broadcast_to(sd, 3) ** 2)
    want = scipy.linalg.block_diag(root @ root.T, *[q] * 5)
    assert isinstance(prior, GaussMarkov)
    assert prior.diag.shape == (6, 3, 3)
    np.testing.assert_allclose(jax.jit(GaussMarkov.covariance)(prior), want, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(prior.loc, np.concatenate([START, np.zeros(15)]))


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("states", "substeps"), [(1, 5), (0, 5), (2, 0)])
def test_a_window_without_a_step_is_refused(states, substeps):
    message = f"expected states >= 2 and substeps >= 1, got {states}, {substeps}$"
    with pytest.raises(ValueError, match=message):
        Window(Lorenz63(), everything, dt=0.1, states=states, substeps=substeps)


def test_stochastic_dynamics_are_refused():
    with pytest.raises(ValueError, match=r"deterministic.*OrnsteinUhlenbeck.*WeakWindow"):
        Window(OrnsteinUhlenbeck(), everything, dt=0.1, states=3)


@pytest.mark.parametrize("sd", [0.0, -1.0, np.nan, np.array([1.0, 0.0, 1.0])])
def test_a_model_error_that_is_not_positive_is_refused(sd):
    background = Gaussian(jnp.zeros(3), jnp.eye(3))
    with pytest.raises(ValueError, match=r"expected model_error_sd > 0, got .*use the Window"):
        WeakWindow(window63()).prior(background, sd)
