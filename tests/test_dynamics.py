"""Dynamics against matrix exponentials, scipy's integrator and known statistics."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg

from amortlib.dynamics import Lorenz63, OrnsteinUhlenbeck, climatology, trajectory
from amortlib.gaussian import GaussMarkov

# --- Ornstein-Uhlenbeck -----------------------------------------------------------------------


def test_transition_is_the_matrix_exponential(x64):
    """Van Loan's block exponential gives the propagator and the noise covariance at once."""
    sd, timescale = 1.7, 3.0
    steps = np.array([1e-6, 0.1, 1.0, 10.0])
    a, q = OrnsteinUhlenbeck(sd, timescale).transition(jnp.asarray(steps))
    for step, got_a, got_q in zip(steps, np.asarray(a), np.asarray(q), strict=True):
        drift, diffusion = -1.0 / timescale, 2.0 * sd**2 / timescale
        block = scipy.linalg.expm(step * np.array([[-drift, diffusion], [0.0, drift]]))
        assert got_a == pytest.approx(block[1, 1], rel=1e-12)
        assert got_q == pytest.approx(block[1, 1] * block[0, 1], rel=1e-9)


@pytest.mark.parametrize("times", [[0.0], [0.0, 0.4, 2.0, 2.1, 9.0]])
def test_prior_has_the_stationary_covariance(x64, times):
    sd, timescale = 1.7, 3.0
    times = np.asarray(times)
    loc = np.linspace(-1, 1, len(times))
    prior = OrnsteinUhlenbeck(sd, timescale).prior(jnp.asarray(times), jnp.asarray(loc))
    want = sd**2 * np.exp(-np.abs(times[:, None] - times) / timescale)
    np.testing.assert_allclose(jax.jit(GaussMarkov.covariance)(prior), want, rtol=1e-11)
    np.testing.assert_array_equal(prior.loc, loc)


def test_single_precision_holds_on_a_fine_grid():
    """1 - a^2 would lose all its digits at a step of 1e-4 timescales; expm1 does not."""
    times = np.arange(50) * 1e-4
    prior = OrnsteinUhlenbeck(1.0, 1.0).prior(jnp.asarray(times, jnp.float32))
    want = np.exp(-np.abs(times[:, None] - times))
    np.testing.assert_allclose(jax.jit(GaussMarkov.covariance)(prior), want, rtol=2e-2)
    _, q = OrnsteinUhlenbeck(1.0, 1.0).transition(jnp.asarray(1e-4))
    assert float(q) == pytest.approx(-np.expm1(-2e-4), rel=1e-5)


def test_euler_maruyama_keeps_the_stationary_law():
    """20 000 independent components of one path, against the exact law and that of the scheme.

    A step h = dt / timescale maps the variance v to (1 - h)^2 v + 2 h sd^2 and the lag
    correlation to (1 - h)^k: the scheme's law is known, and lies within O(h) of the exact one
    (variance 1 / (1 - h/2), correlation at lag s within s h / 2 of exp(-s), to first order).
    Standard errors: variance v sqrt(2 / N), correlation (1 - r^2) / sqrt(N); tolerance 5 of them:
    six comparisons, false alarm 4e-6.
    """
    sd, timescale, dt, n = 1.5, 2.0, 0.04, 20_000
    h = dt / timescale
    k_start, k_path = jax.random.split(jax.random.key(0))
    x0 = sd * jax.random.normal(k_start, (n,))
    times = jnp.array([0.0, 2.0, 4.0, 6.0])
    path = jax.jit(
        lambda x0: trajectory(OrnsteinUhlenbeck(sd, timescale), x0, times, dt=dt, key=k_path)
    )(x0)
    path = np.asarray(path)
    np.testing.assert_array_equal(path[0], x0)
    scheme = sd**2
    for _ in range(150):
        scheme = (1 - h) ** 2 * scheme + 2 * h * sd**2
    se = sd**2 * np.sqrt(2 / n)
    assert abs(path[-1].var() - scheme) <= 5 * se
    assert abs(path[-1].var() - sd**2) <= 5 * se + sd**2 * h
    for i in (1, 2):
        r = np.corrcoef(path[i], path[i + 1])[0, 1]
        exact = np.exp(-2.0 / timescale)
        se = (1 - exact**2) / np.sqrt(n)
        assert abs(r - (1 - h) ** 50) <= 5 * se
        assert abs(r - exact) <= 5 * se + h


def test_the_key_draws_the_path():
    ou, times = OrnsteinUhlenbeck(), jnp.array([0.0, 1.0])

    @jax.jit
    def end(key):
        return trajectory(ou, jnp.zeros(3), times, dt=0.1, key=key)[-1]

    one, again, other = (np.asarray(end(jax.random.key(i))) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.all(one != other)
    assert len(set(one.tolist())) == 3  # every component has its own noise


def test_a_key_goes_with_noise_and_only_with_noise():
    times = jnp.array([0.0, 1.0])
    with pytest.raises(ValueError, match="expected a key: OrnsteinUhlenbeck is stochastic"):
        trajectory(OrnsteinUhlenbeck(), jnp.zeros(1), times, dt=0.1)
    with pytest.raises(ValueError, match="got a key, but Lorenz63 is deterministic"):
        trajectory(Lorenz63(), jnp.ones(3), times, dt=0.1, key=jax.random.key(0))


# --- Lorenz-63 --------------------------------------------------------------------------------

START = np.array([1.5, -1.5, 25.0])


def reference(times: np.ndarray) -> np.ndarray:
    """By scipy's eighth-order method, the equations written out again."""

    def field(t, s):
        x, y, z = s
        return [10.0 * (y - x), x * (28.0 - z) - y, x * y - 8.0 / 3.0 * z]

    found = scipy.integrate.solve_ivp(
        field, (times[0], times[-1]), START, "DOP853", t_eval=times, rtol=1e-13, atol=1e-13
    )
    return found.y.T


@jax.jit
def _run(dt, x0, times):
    return trajectory(Lorenz63(), x0, times, dt=dt)


def run(dt: float, times: np.ndarray) -> np.ndarray:
    return np.asarray(_run(dt, jnp.asarray(START), jnp.asarray(times)))


def test_lorenz_follows_scipy(x64):
    times = np.linspace(0.0, 1.0, 11)
    np.testing.assert_allclose(run(0.002, times), reference(times), atol=1e-7)


def test_lorenz_between_steps_is_interpolated(x64):
    """Output times need not be multiples of dt."""
    times = np.array([0.0, 0.123, 0.4567, 0.7])
    np.testing.assert_allclose(run(0.002, times), reference(times), atol=1e-6)


def test_halving_the_step_divides_the_error_by_two_to_the_order(x64):
    """Tsit5 is of order 5: 32 asymptotically, and within 4.5 to 5.5 in the exponent here."""
    times = np.array([0.0, 2.0])
    want = reference(times)[-1]
    errors = [np.linalg.norm(run(dt, times)[-1] - want) for dt in (0.005, 0.0025, 0.00125)]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.all((orders > 4.5) & (orders < 5.5)), orders


def test_parameters_are_used():
    """The fixed points (+-sqrt(beta (rho - 1)), same, rho - 1) stay where they are."""
    model = Lorenz63(sigma=7.0, rho=20.0, beta=2.0)
    root = np.sqrt(2.0 * 19.0)
    for point in ([root, root, 19.0], [-root, -root, 19.0], [0.0, 0.0, 0.0]):
        slope = model.vector_field(0.0, jnp.asarray(point, jnp.float32), None)
        np.testing.assert_allclose(slope, 0.0, atol=1e-4)


@pytest.mark.parametrize(
    "adjoint", [None, dfx.DirectAdjoint(), dfx.ForwardMode()], ids=["default", "direct", "forward"]
)
def test_derivative_is_that_of_finite_differences(x64, adjoint):
    times = jnp.asarray(np.linspace(0.0, 0.4, 5))

    def end(x0):
        return trajectory(Lorenz63(), x0, times, dt=0.02, adjoint=adjoint, max_steps=64)[-1]

    forward = isinstance(adjoint, dfx.ForwardMode)
    got = jax.jit((jax.jacfwd if forward else jax.jacrev)(end))(jnp.asarray(START))
    h, end = 1e-5, jax.jit(end)
    columns = [(end(START + h * e) - end(START - h * e)) / (2 * h) for e in np.eye(3)]
    np.testing.assert_allclose(got, np.stack(columns, axis=1), rtol=1e-6, atol=1e-7)


def test_climatology_of_lorenz():
    """Known means: z 23.55 (and x y = beta z on average, from dz/dt = 0), x and y zero.

    Errors by batch means: 20 batches of 50 time units, long beside the memory of the flow (a few
    units), so nearly independent. Tolerance 5 standard errors; Student's t with 19 degrees of
    freedom lies beyond with probability 8e-5, three means: 2.4e-4, and the run is fixed.
    """
    density, states = jax.jit(
        lambda x0: climatology(Lorenz63(), x0, every=0.5, n=2000, dt=0.01, spin_up=10.0)
    )(jnp.ones(3))
    states = np.asarray(states, float)
    np.testing.assert_allclose(density.loc, states.mean(0), atol=1e-3)
    np.testing.assert_allclose(density.covariance(), np.cov(states.T), rtol=1e-3, atol=1e-2)

    def within(values, want):
        means = values.reshape(20, -1).mean(1)
        se = means.std(ddof=1) / np.sqrt(20)
        assert abs(means.mean() - want) <= 5 * se, (means.mean(), se)
        return se

    assert within(states[:, 2], 23.55) < 0.2  # sharp enough to tell 23.55 from rho - 1 = 27
    within(states[:, 0], 0.0)
    within(states[:, 1], 0.0)
    within(states[:, 0] * states[:, 1] - 8.0 / 3.0 * states[:, 2], 0.0)
