"""Two public tasks of simulation-based inference: two moons, and SLCP.

Simulators, priors and observations are those of Lueckmann et al. (2021, arXiv:2101.04653),
sections T.8 and T.3 of its appendix: the observations are numbers 1 to 5 of ten that its authors
published with their code. Reference draws are our own. Both posteriors can be drawn from exactly,
one draw independent of the next, so nothing is stored.
"""

from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from amortlib.observation import NoGaps
from amortlib.problems import InverseProblem
from amortlib.types import Array, Key

__all__ = ["SLCP", "TASKS", "TWO_MOONS", "Task"]


@dataclass(frozen=True)
class Task:
    """An inverse problem with observations and exact draws from their posteriors.

    Attributes:
        name: what it is called.
        problem: the simulator.
        low: the prior is uniform from here, shape `(d,)`,
        high: to here.
        observations: shape `(5, *obs)`.
        log_likelihood: log p(y | theta) of one theta and one y.
        draw: (y, n, generator) -> `n` independent draws from p(theta | y), `(n, d)`, float64.
    """

    name: str
    problem: InverseProblem
    low: np.ndarray
    high: np.ndarray
    observations: np.ndarray
    log_likelihood: Callable[[Array, Array], Array]
    draw: Callable[[np.ndarray, int, np.random.Generator], np.ndarray]

    def reference(self, observation: int, n: int, *, seed: int) -> np.ndarray:
        """`n` draws from the posterior of observation 0 to 4, the same for the same seed."""
        rng = np.random.default_rng([seed, observation])
        return self.draw(self.observations[observation], n, rng)


class UniformBox(eqx.Module):
    """key -> a draw from the uniform density on a box.

    Attributes:
        low: shape `(d,)`.
        high: shape `(d,)`.
    """

    low: np.ndarray
    high: np.ndarray

    def __call__(self, key: Key) -> Float[Array, " d"]:
        """One draw."""
        low, high = jnp.asarray(self.low, float), jnp.asarray(self.high, float)
        return jax.random.uniform(key, low.shape, minval=low, maxval=high)


# --- two moons -------------------------------------------------------------------------------

_RADIUS, _RADIUS_SD, _OFFSET = 0.1, 0.01, 0.25
_ROOT_HALF = float(np.sqrt(0.5))


def _moons_forward(theta: Float[Array, "2"]) -> Float[Array, "2"]:
    """Both theta and its mirror image in the line theta_1 = -theta_2 land on one point."""
    a, b = theta
    return jnp.stack([-jnp.abs(a + b), b - a]) * _ROOT_HALF


def _moons_noise(key: Key, clean: Float[Array, "2"]) -> Float[Array, "2"]:
    """A point of a blurred half circle, added."""
    k_angle, k_radius = jax.random.split(key)
    angle = jax.random.uniform(k_angle, minval=-0.5 * jnp.pi, maxval=0.5 * jnp.pi)
    radius = _RADIUS + _RADIUS_SD * jax.random.normal(k_radius)
    moon = jnp.stack([radius * jnp.cos(angle) + _OFFSET, radius * jnp.sin(angle)])
    return clean + moon


def _moons_log_likelihood(theta: Float[Array, "2"], y: Float[Array, "2"]) -> Array:
    """Density of the point of the half circle, in polar coordinates: N(r; 0.1, 0.01^2) / (pi r)."""
    u, v = y - _moons_forward(theta) - jnp.array([_OFFSET, 0.0])
    r = jnp.hypot(u, v)
    z = (r - _RADIUS) / _RADIUS_SD
    log_p = -0.5 * z**2 - jnp.log(jnp.sqrt(2 * jnp.pi) * _RADIUS_SD) - jnp.log(jnp.pi * r)
    return jnp.where(u > 0, log_p, -jnp.inf)


def _moons_draw(y: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the noise, solve for theta with a random sign, keep what is in the box.

    The map from theta to what is seen keeps areas, so that a uniform prior makes the posterior
    that of the noise itself, carried back through both branches.
    """
    found = np.empty((0, 2))
    while len(found) < n:
        angle = rng.uniform(-0.5 * np.pi, 0.5 * np.pi, n)
        radius = rng.normal(_RADIUS, _RADIUS_SD, n)
        size = radius * np.cos(angle) + _OFFSET - y[0]
        rest = y[1] - radius * np.sin(angle)
        total = rng.choice([-1.0, 1.0], n) * size
        theta = np.stack([total - rest, total + rest], 1) * _ROOT_HALF
        good = (size >= 0) & (np.abs(theta) <= 1).all(1)
        found = np.concatenate([found, theta[good]])
    return found[:n]


TWO_MOONS = Task(
    name="two_moons",
    problem=InverseProblem(
        UniformBox(-np.ones(2), np.ones(2)), _moons_forward, _moons_noise, NoGaps()
    ),
    low=-np.ones(2),
    high=np.ones(2),
    observations=np.array(
        [
            [-0.6396706, 0.16234657],
            [-0.5676688, -0.33194834],
            [0.0030109584, -0.6457662],
            [-0.25049388, 0.633055],
            [-0.66463584, -0.42604533],
        ]
    ),
    log_likelihood=_moons_log_likelihood,
    draw=_moons_draw,
)

# --- SLCP: simple likelihood, complex posterior ------------------------------------------------

_POINTS = 4
_JITTER = 1e-6
"""Added to both variances, as the public simulator does."""


def _slcp_forward(theta: Float[Array, "5"]) -> Float[Array, "8"]:
    """The parameters of the density of y, laid out in its shape: mean, sds, correlation, zeros."""
    a, b, c, d, e = theta
    return jnp.stack([a, b, c**2, d**2, jnp.tanh(e), 0.0 * a, 0.0 * a, 0.0 * a])


def _slcp_factor(s1: Array, s2: Array, rho: Array) -> tuple[Array, Array, Array]:
    """Cholesky factor of the covariance: entries 11, 21, 22."""
    first = jnp.sqrt(s1**2 + _JITTER)
    below = rho * s1 * s2 / first
    return first, below, jnp.sqrt(jnp.maximum(s2**2 + _JITTER - below**2, 0.5 * _JITTER))


def _slcp_noise(key: Key, clean: Float[Array, "8"]) -> Float[Array, "8"]:
    """Four independent points of the normal density in the plane with those parameters."""
    first, below, second = _slcp_factor(*clean[2:5])
    z = jax.random.normal(key, (_POINTS, 2))
    points = clean[:2] + jnp.stack([first * z[:, 0], below * z[:, 0] + second * z[:, 1]], 1)
    return points.reshape(-1)


def _slcp_log_likelihood(theta: Float[Array, "5"], y: Float[Array, "8"]) -> Array:
    s1, s2, rho = theta[2] ** 2, theta[3] ** 2, jnp.tanh(theta[4])
    first, below, second = _slcp_factor(s1, s2, rho)
    off = y.reshape(_POINTS, 2) - theta[:2]
    z1 = off[:, 0] / first
    z2 = (off[:, 1] - below * z1) / second
    log_det = jnp.log(first) + jnp.log(second)
    return -0.5 * jnp.sum(z1**2 + z2**2) - _POINTS * (log_det + jnp.log(2 * jnp.pi))


def _slcp_log_evidence(scales: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log of the likelihood integrated over the two means, up to a constant; and S, packed.

    For given covariance S the likelihood of the means is that of N(mean(y), S / 4): what is left
    is det(S)^(-3/2) exp(-tr(S^-1 W) / 2), with W the scatter of the points about their mean.
    """
    c, d, e = scales.T
    points = y.reshape(_POINTS, 2)
    off = points - points.mean(0)
    w = off.T @ off
    v1, v2 = c**4 + _JITTER, d**4 + _JITTER
    cross = np.tanh(e) * c**2 * d**2
    det = v1 * v2 - cross**2
    trace = (v2 * w[0, 0] + v1 * w[1, 1] - 2 * cross * w[0, 1]) / det
    return -1.5 * np.log(det) - 0.5 * trace, np.stack([v1, cross, v2], 1)


def _slcp_draw(y: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Rejection: the scales and the correlation from a box, then the means given those.

    The box is cut down to where the integrated likelihood is within e^-30 of its largest value;
    what is left out has less than one part in 10^9 of the mass. Signs of the third and fourth
    component are drawn last: the likelihood does not see them.
    """
    low, high = np.array([0.0, 0.0, -3.0]), np.array([3.0, 3.0, 3.0])
    best = -np.inf
    for _ in range(6):
        trial = rng.uniform(low, high, (100_000, 3))
        log_p, _ = _slcp_log_evidence(trial, y)
        best = max(best, log_p.max())
        near = trial[log_p > best - 30.0]
        pad = 0.05 * (near.max(0) - near.min(0)) + 1e-12
        low, high = np.maximum(low, near.min(0) - pad), np.minimum(high, near.max(0) + pad)
    # The largest of 100,000 trials in the last box is a little below the largest of all.
    bound = best + 0.5
    mean = y.reshape(_POINTS, 2).mean(0)
    found = np.empty((0, 5))
    while len(found) < n:
        trial = rng.uniform(low, high, (100_000, 3))
        log_p, cov = _slcp_log_evidence(trial, y)
        if log_p.max() > bound:
            raise RuntimeError(f"expected log-evidence below {bound}, got {log_p.max()}")
        keep = np.log(rng.uniform(size=len(trial))) < log_p - bound
        trial, cov = trial[keep], cov[keep]
        z = rng.normal(size=(len(trial), 2))
        first = np.sqrt(cov[:, 0] / _POINTS)
        below = cov[:, 1] / _POINTS / first
        second = np.sqrt(cov[:, 2] / _POINTS - below**2)
        means = mean + np.stack([first * z[:, 0], below * z[:, 0] + second * z[:, 1]], 1)
        inside = (np.abs(means) <= 3).all(1)
        signs = np.ones((len(trial), 3))
        signs[:, :2] = rng.choice([-1.0, 1.0], (len(trial), 2))
        theta = np.concatenate([means, signs * trial], 1)[inside]
        found = np.concatenate([found, theta])
    return found[:n]


SLCP = Task(
    name="slcp",
    problem=InverseProblem(
        UniformBox(-3 * np.ones(5), 3 * np.ones(5)), _slcp_forward, _slcp_noise, NoGaps()
    ),
    low=-3 * np.ones(5),
    high=3 * np.ones(5),
    observations=np.array(
        [
            [
                2.3718784,
                0.49947417,
                9.931435,
                1.7136912,
                -10.436423,
                -1.9067793,
                -1.2343777,
                -0.09735,
            ],
            [
                -0.66452104,
                -2.9279308,
                -16.49147,
                4.06107,
                4.232153,
                -4.652277,
                -4.9924355,
                -1.5655216,
            ],
            [3.5023372, 5.254722, 8.685451, 9.995327, 0.40782332, -5.7111573, 10.605566, 12.695774],
            [
                -1.6371447,
                -0.037302777,
                -1.5622597,
                0.031204943,
                -3.683134,
                0.09953671,
                -1.7389069,
                0.0309663,
            ],
            [-8.801672, 8.726709, -10.484016, 6.857725, -6.769688, 7.574161, 3.804308, 2.7593615],
        ]
    ),
    log_likelihood=_slcp_log_likelihood,
    draw=_slcp_draw,
)

TASKS = {task.name: task for task in (TWO_MOONS, SLCP)}
