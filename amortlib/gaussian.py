"""Gaussian densities, dense and Markov, and exact conditioning of linear-Gaussian problems.

Two forms of one density. `Gaussian` holds a dense Cholesky factor of the covariance.
`GaussMarkov` holds a block-tridiagonal *precision*: a state on a grid in which a site touches
only its neighbours, where everything costs O(n) in the number n of sites.

Exact answers, each by a road of its own, so that they can check each other and everything else:
`condition` (the Gaussian-process formula, dense) and `kalman_smoother` (filter and
Rauch-Tung-Striebel sweep).
"""

import abc
import math
from functools import lru_cache
from statistics import NormalDist
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve, solve_triangular
from jaxtyping import Bool, Float

from amortlib.types import Array, Event, Key

__all__ = [
    "AbstractDistribution",
    "GaussMarkov",
    "Gaussian",
    "KalmanResult",
    "condition",
    "kalman_smoother",
    "kl",
    "mixture_covariance",
    "quasi_normal",
]

_LOG_2PI = math.log(2.0 * math.pi)


class AbstractDistribution(eqx.Module):
    """A distribution over one state `x` of shape `(d,)`; what a head returns for an event."""

    @property
    @abc.abstractmethod
    def exact_log_prob(self) -> bool:
        """Whether `log_prob` is a formula, exact to rounding; the end of an ODE has an error."""

    @abc.abstractmethod
    def log_prob(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log-density at `x`."""

    @abc.abstractmethod
    def sample(self, n: int, *, key: Key) -> Float[Array, "n d"]:
        """`n` independent draws.

        Raises:
            ValueError: on less than one.
        """

    @abc.abstractmethod
    def mode(self) -> Float[Array, " d"]:
        """The point of highest density."""

    @abc.abstractmethod
    def mean(self) -> Float[Array, " d"]:
        """The mean."""

    @abc.abstractmethod
    def covariance(self) -> Float[Array, "d d"]:
        """The covariance matrix, dense."""

    @abc.abstractmethod
    def sd(self) -> Float[Array, " d"]:
        """Standard deviation of each component."""


def mixture_covariance(
    weight: Float[Array, " k"], means: Float[Array, "k d"], covariances: Float[Array, "k d d"]
) -> Float[Array, "d d"]:
    """Covariance of a mixture: that of each part, and that of their means; weights add up to 1."""
    off = means - weight @ means
    return jnp.tensordot(weight, covariances, 1) + (off * weight[:, None]).T @ off


def _from_mean(x: Array, loc: Array) -> Array:
    # A state of one component would be spread over all of them, and trained on without a word.
    if jnp.shape(x) != loc.shape:
        raise ValueError(f"expected a state of shape {loc.shape}, got {jnp.shape(x)}")
    return x - loc


class Gaussian(AbstractDistribution):
    """N(loc, chol chol^T), dense.

    Attributes:
        loc: mean, shape `(d,)`.
        chol: lower-triangular Cholesky factor of the covariance, shape `(d, d)`.
    """

    exact_log_prob: ClassVar[bool] = True

    loc: Float[Array, " d"]
    chol: Float[Array, "d d"]

    @classmethod
    def from_covariance(cls, loc: Float[Array, " d"], cov: Float[Array, "d d"]) -> "Gaussian":
        """From mean and covariance."""
        return cls(loc, jnp.linalg.cholesky(cov))

    @classmethod
    def from_precision(cls, loc: Float[Array, " d"], prec: Float[Array, "d d"]) -> "Gaussian":
        """From mean and precision (inverse covariance)."""
        # With P = L L^T, reversing rows and columns turns the lower factor into an upper one,
        # whose inverse is the lower factor of the covariance: no explicit inverse of P.
        factor = jnp.linalg.cholesky(prec[::-1, ::-1])[::-1, ::-1]
        eye = jnp.eye(loc.shape[0], dtype=prec.dtype)
        return cls(loc, solve_triangular(factor, eye, lower=False).T)

    def whiten(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """v with x = loc + B^{1/2} v: standard normal where x is drawn from this density."""
        return solve_triangular(self.chol, _from_mean(x, self.loc), lower=True)

    def colour(self, v: Float[Array, " d"]) -> Float[Array, " d"]:
        """loc + B^{1/2} v, the inverse of `whiten`: the control-variable transform."""
        return self.loc + self.chol @ v

    def log_prob(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log-density at `x`."""
        z = self.whiten(x)
        half_log_det = jnp.sum(jnp.log(jnp.diagonal(self.chol)))
        return -0.5 * jnp.sum(z**2) - half_log_det - 0.5 * z.size * _LOG_2PI

    def mahalanobis(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Squared distance from the mean in the metric of the precision, |x - loc|^2_{B^-1}."""
        return jnp.sum(self.whiten(x) ** 2)

    def entropy(self) -> Float[Array, ""]:
        """-E log q = d/2 log(2 pi e) + half the log-determinant of the covariance, in nats."""
        half_log_det = jnp.sum(jnp.log(jnp.diagonal(self.chol)))
        return half_log_det + 0.5 * self.loc.size * (1.0 + _LOG_2PI)

    def sample(self, n: int, *, key: Key) -> Float[Array, "n d"]:
        """`n` independent draws."""
        if n < 1:
            raise ValueError(f"expected at least one sample, got n={n}")
        z = jax.random.normal(key, (n, self.loc.size), self.loc.dtype)
        return self.loc + z @ self.chol.T

    def mode(self) -> Float[Array, " d"]:
        """The mean, which is the mode."""
        return self.loc

    def mean(self) -> Float[Array, " d"]:
        """The mean."""
        return self.loc

    def covariance(self) -> Float[Array, "d d"]:
        """The covariance."""
        return self.chol @ self.chol.T

    def precision(self) -> Float[Array, "d d"]:
        """The inverse covariance."""
        return cho_solve((self.chol, True), jnp.eye(self.loc.size, dtype=self.chol.dtype))

    def sd(self) -> Float[Array, " d"]:
        """Standard deviation of each component."""
        return jnp.linalg.norm(self.chol, axis=1)


# --- blocks of size 1 are the common case, and LAPACK calls on 1 x 1 matrices are slow there ---


def _chol(a: Float[Array, "b b"]) -> Float[Array, "b b"]:
    return jnp.sqrt(a) if a.shape[-1] == 1 else jnp.linalg.cholesky(a)


def _solve(
    low: Float[Array, "b b"], rhs: Float[Array, "b *k"], *, transpose: bool = False
) -> Float[Array, "b *k"]:
    if low.shape[-1] == 1:
        return rhs / low[0, 0]
    return solve_triangular(low, rhs, lower=True, trans=1 if transpose else 0)


class GaussMarkov(AbstractDistribution):
    """A Gaussian whose precision is block tridiagonal: n sites of b components each.

    The precision is held by its block Cholesky factor L, block bidiagonal:
    `diag[i]` = L_ii (lower triangular), `off[i]` = L_{i+1,i}. Everything here costs O(n b^3);
    only `covariance` makes a dense matrix. Rue and Held (2005), *Gaussian Markov Random Fields*,
    chapter 2.

    Attributes:
        loc: mean, flat, shape `(n * b,)`, site after site.
        diag: shape `(n, b, b)`.
        off: shape `(n - 1, b, b)`.
    """

    exact_log_prob: ClassVar[bool] = True

    loc: Float[Array, " d"]
    diag: Float[Array, "n b b"]
    off: Float[Array, "m b b"]

    @classmethod
    def from_precision(
        cls, loc: Float[Array, " d"], diag: Float[Array, "n b b"], lower: Float[Array, "m b b"]
    ) -> "GaussMarkov":
        """From the mean and the precision's blocks, P_ii = `diag[i]`, P_{i+1,i} = `lower[i]`."""
        factor, off = _factorise(diag, lower)
        return cls(loc, factor, off)

    @classmethod
    def from_information(
        cls,
        eta: Float[Array, " d"],
        diag: Float[Array, "n b b"],
        lower: Float[Array, "m b b"],
    ) -> "GaussMarkov":
        """From natural parameters: information vector P mean = `eta` and the blocks of P."""
        factor, off = _factorise(diag, lower)
        blocks = eta.reshape(factor.shape[0], -1)
        loc = _backward(factor, off, _forward(factor, off, blocks))
        return cls(loc.reshape(-1), factor, off)

    @classmethod
    def from_gaussian(cls, dense: Gaussian, block: int) -> "GaussMarkov":
        """The Markov form of a dense Gaussian whose precision is block tridiagonal.

        Entries of the precision outside the band are dropped: exact where they are zero.
        """
        d = dense.loc.size
        if d % block:
            raise ValueError(f"expected a block that divides the dimension {d}, got {block}")
        prec = dense.precision().reshape(d // block, block, d // block, block)
        i = jnp.arange(d // block)
        return cls.from_precision(dense.loc, prec[i, :, i, :], prec[i[1:], :, i[:-1], :])

    @property
    def shape(self) -> tuple[int, int]:
        """Number of sites and components per site."""
        return self.diag.shape[-3], self.diag.shape[-1]

    def precision_blocks(self) -> tuple[Float[Array, "n b b"], Float[Array, "m b b"]]:
        """Blocks of the precision: on the diagonal, and below it."""
        diag = self.diag @ jnp.swapaxes(self.diag, -1, -2)
        diag = diag.at[1:].add(self.off @ jnp.swapaxes(self.off, -1, -2))
        return diag, self.off @ jnp.swapaxes(self.diag[:-1], -1, -2)

    def information(self) -> Float[Array, " d"]:
        """Information vector, precision times mean."""
        return self._times_precision(self.loc)

    def _times_factor_t(self, x: Float[Array, " d"]) -> Float[Array, "n b"]:
        blocks = x.reshape(self.shape)
        out = jnp.einsum("nji,nj->ni", self.diag, blocks)
        return out.at[:-1].add(jnp.einsum("nji,nj->ni", self.off, blocks[1:]))

    def _times_precision(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        z = self._times_factor_t(x)
        out = jnp.einsum("nij,nj->ni", self.diag, z)
        out = out.at[1:].add(jnp.einsum("nij,nj->ni", self.off, z[:-1]))
        return out.reshape(-1)

    def whiten(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """v = L^T (x - loc), standard normal where x is drawn from this density."""
        return self._times_factor_t(_from_mean(x, self.loc)).reshape(-1)

    def colour(self, v: Float[Array, " d"]) -> Float[Array, " d"]:
        """loc + L^-T v, the inverse of `whiten`: the control-variable transform."""
        return self.loc + _backward(self.diag, self.off, v.reshape(self.shape)).reshape(-1)

    def mahalanobis(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Squared distance from the mean in the metric of the precision."""
        return jnp.sum(self.whiten(x) ** 2)

    def half_log_det_precision(self) -> Float[Array, ""]:
        """Half the log-determinant of the precision."""
        return jnp.sum(jnp.log(jnp.diagonal(self.diag, axis1=-2, axis2=-1)))

    def log_prob(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log-density at `x`."""
        return -0.5 * self.mahalanobis(x) + self.half_log_det_precision() - 0.5 * x.size * _LOG_2PI

    def entropy(self) -> Float[Array, ""]:
        """-E log q = d/2 log(2 pi e) minus half the log-determinant of the precision, in nats."""
        return 0.5 * self.loc.size * (1.0 + _LOG_2PI) - self.half_log_det_precision()

    def sample(self, n: int, *, key: Key) -> Float[Array, "n d"]:
        """`n` independent draws."""
        if n < 1:
            raise ValueError(f"expected at least one sample, got n={n}")
        z = jax.random.normal(key, (n, *self.shape), self.loc.dtype)
        back = jax.vmap(lambda e: _backward(self.diag, self.off, e))
        return self.loc + back(z).reshape(n, -1)

    def mode(self) -> Float[Array, " d"]:
        """The mean, which is the mode."""
        return self.loc

    def mean(self) -> Float[Array, " d"]:
        """The mean."""
        return self.loc

    def covariance_blocks(self) -> tuple[Float[Array, "n b b"], Float[Array, "m b b"]]:
        """Blocks of the covariance: S_ii, and S_{i+1,i}, without ever forming the rest.

        Backward recursion of Takahashi et al. (1973), in block form.
        """
        eye = jnp.eye(self.shape[1], dtype=self.diag.dtype)
        inv = jax.vmap(lambda low: _solve(low, eye))(self.diag)
        own = jnp.swapaxes(inv, -1, -2) @ inv
        gain = self.off @ inv[:-1]

        def step(nxt, args):
            here, g = args
            now = here + g.T @ nxt @ g
            return now, (now, -nxt @ g)

        last = own[-1]
        _, (rest, lag) = jax.lax.scan(step, last, (own[:-1], gain), reverse=True)
        return jnp.concatenate([rest, last[None]]), lag

    def sd(self) -> Float[Array, " d"]:
        """Standard deviation of each component."""
        blocks, _ = self.covariance_blocks()
        return jnp.sqrt(jnp.diagonal(blocks, axis1=-2, axis2=-1)).reshape(-1)

    def covariance(self) -> Float[Array, "d d"]:
        """The covariance, dense: O(d^2) memory."""
        eye = jnp.eye(self.loc.size, dtype=self.loc.dtype)

        def column(e):
            z = _forward(self.diag, self.off, e.reshape(self.shape))
            return _backward(self.diag, self.off, z).reshape(-1)

        return jax.vmap(column)(eye)

    def to_gaussian(self) -> Gaussian:
        """The same density in dense form."""
        return Gaussian.from_covariance(self.loc, self.covariance())


def _factorise(
    diag: Float[Array, "n b b"], lower: Float[Array, "m b b"]
) -> tuple[Float[Array, "n b b"], Float[Array, "m b b"]]:
    """Block Cholesky factor of a block-tridiagonal matrix."""
    first = _chol(diag[0])

    def step(prev, args):
        d, a = args
        off = _solve(prev, a.T).T
        now = _chol(d - off @ off.T)
        return now, (now, off)

    _, (rest, off) = jax.lax.scan(step, first, (diag[1:], lower))
    return jnp.concatenate([first[None], rest]), off


def _forward(
    diag: Float[Array, "n b b"], off: Float[Array, "m b b"], rhs: Float[Array, "n b"]
) -> Float[Array, "n b"]:
    """Solve L z = rhs."""
    first = _solve(diag[0], rhs[0])

    def step(prev, args):
        d, o, r = args
        now = _solve(d, r - o @ prev)
        return now, now

    _, rest = jax.lax.scan(step, first, (diag[1:], off, rhs[1:]))
    return jnp.concatenate([first[None], rest])


def _backward(
    diag: Float[Array, "n b b"], off: Float[Array, "m b b"], rhs: Float[Array, "n b"]
) -> Float[Array, "n b"]:
    """Solve L^T x = rhs."""
    last = _solve(diag[-1], rhs[-1], transpose=True)

    def step(nxt, args):
        d, o, r = args
        now = _solve(d, r - o.T @ nxt, transpose=True)
        return now, now

    _, rest = jax.lax.scan(step, last, (diag[:-1], off, rhs[:-1]), reverse=True)
    return jnp.concatenate([rest, last[None]])


def kl(p: Gaussian | GaussMarkov, q: Gaussian | GaussMarkov) -> Float[Array, ""]:
    """KL(p || q) in nats, in closed form.

    Two Markov densities with the same blocks cost O(n); any other pair is done densely.
    """
    if isinstance(p, GaussMarkov) and isinstance(q, GaussMarkov) and p.shape == q.shape:
        s_diag, s_lag = p.covariance_blocks()
        q_diag, q_lag = q.precision_blocks()
        trace = jnp.sum(s_diag * q_diag) + 2.0 * jnp.sum(s_lag * q_lag)
        log_dets = p.half_log_det_precision() - q.half_log_det_precision()
        return 0.5 * (trace + q.mahalanobis(p.loc) - p.loc.size) + log_dets
    if p.loc.shape != q.loc.shape:
        raise ValueError(f"expected densities of one dimension, got {p.loc.shape}, {q.loc.shape}")
    p = p.to_gaussian() if isinstance(p, GaussMarkov) else p
    q = q.to_gaussian() if isinstance(q, GaussMarkov) else q
    ratio = solve_triangular(q.chol, p.chol, lower=True)
    log_dets = jnp.sum(jnp.log(jnp.diagonal(q.chol)) - jnp.log(jnp.diagonal(p.chol)))
    return 0.5 * (jnp.sum(ratio**2) + q.mahalanobis(p.loc) - p.loc.size) + log_dets


def condition(
    prior: Gaussian | GaussMarkov,
    operator: Float[Array, "t d"],
    event: Event,
) -> Gaussian:
    """Exact posterior of x ~ N(x_b, B), y = H x + noise, by the Gaussian-process formula.

    mean = x_b + B H^T (H B H^T + R)^-1 (y - H x_b), covariance = B - B H^T (...)^-1 H B, over
    observed entries alone: Rasmussen and Williams (2006), *Gaussian Processes for Machine
    Learning*, equations 2.23 and 2.24. A masked entry is given zero rows of H, which is the same
    as leaving it out and keeps shapes fixed. Dense, O(d^3): a reference, not a method.

    Args:
        prior: background density.
        operator: H, shape `(t, d)`.
        event: one event with `y` of shape `(t,)` and its `sd`.

    Raises:
        ValueError: where the event has no `sd`.
    """
    if event.error_sd is None:
        raise ValueError("expected an event with its observation-error sd, got sd=None")
    cov, sd = prior.covariance(), event.error_sd
    h = jnp.where(event.mask[:, None], operator, 0.0)
    innovation = jnp.where(event.mask, event.values - operator @ prior.loc, 0.0)
    hb = h @ cov
    factor = jnp.linalg.cholesky(hb @ h.T + jnp.diag(sd**2))
    loc = prior.loc + hb.T @ cho_solve((factor, True), innovation)
    half = solve_triangular(factor, hb, lower=True)
    return Gaussian.from_covariance(loc, cov - half.T @ half)


class KalmanResult(eqx.Module):
    """What `kalman_smoother` returns; n times, state of k components.

    Attributes:
        mean: smoothed means, `(n, k)`.
        cov: smoothed covariances, `(n, k, k)`.
        filtered_mean: means given the observations up to each time, `(n, k)`.
        filtered_cov: likewise, `(n, k, k)`.
        log_likelihood: log p(y) of the observed entries.
    """

    mean: Float[Array, "n k"]
    cov: Float[Array, "n k k"]
    filtered_mean: Float[Array, "n k"]
    filtered_cov: Float[Array, "n k k"]
    log_likelihood: Float[Array, ""]


def kalman_smoother(
    initial: Gaussian,
    transition: Float[Array, "k k"],
    model_cov: Float[Array, "k k"],
    operator: Float[Array, "p k"],
    y: Float[Array, "n p"],
    mask: Bool[Array, "n p"],
    sd: Float[Array, "n p"],
) -> KalmanResult:
    """Filter and Rauch-Tung-Striebel smoother of x_{t+1} = A x_t + N(0, Q), y_t = H x_t + N(0, R).

    Sarkka (2013), *Bayesian Filtering and Smoothing*, theorems 4.2 and 8.2. Entries whose mask is
    false are left out: their row of H is zero and they add nothing to the likelihood.

    Args:
        initial: density of the state at the first time, before its observation.
        transition: A.
        model_cov: Q.
        operator: H.
        y: observations, time by time; masked entries may hold anything finite or NaN.
        mask: `True` = observed.
        sd: observation-error standard deviations.
    """
    eye = jnp.eye(transition.shape[0], dtype=transition.dtype)

    def update(mean, cov, obs):
        value, seen, spread = obs
        h = jnp.where(seen[:, None], operator, 0.0)
        innovation = jnp.where(seen, value, 0.0) - h @ mean
        variance = jnp.where(seen, spread, 1.0) ** 2
        factor = jnp.linalg.cholesky(h @ cov @ h.T + jnp.diag(variance))
        gain = cho_solve((factor, True), h @ cov).T
        z = solve_triangular(factor, innovation, lower=True)
        terms = -0.5 * jnp.sum(z**2) - jnp.sum(jnp.log(jnp.diagonal(factor)))
        terms = terms - 0.5 * _LOG_2PI * jnp.sum(seen)
        # Joseph's form keeps the covariance symmetric and positive in single precision.
        keep = eye - gain @ h
        new = keep @ cov @ keep.T + (gain * variance) @ gain.T
        return mean + gain @ innovation, new, terms

    def forward(carry, obs):
        mean, cov = carry
        mean, cov, terms = update(mean, cov, obs)
        return (transition @ mean, transition @ cov @ transition.T + model_cov), (mean, cov, terms)

    start = (initial.loc, initial.covariance())
    _, (means, covs, terms) = jax.lax.scan(forward, start, (y, mask, sd))

    def backward(carry, filtered):
        mean_next, cov_next = carry
        mean, cov = filtered
        ahead = transition @ cov @ transition.T + model_cov
        gain = jnp.linalg.solve(ahead, transition @ cov).T
        new_mean = mean + gain @ (mean_next - transition @ mean)
        new_cov = cov + gain @ (cov_next - ahead) @ gain.T
        return (new_mean, new_cov), (new_mean, new_cov)

    last = (means[-1], covs[-1])
    _, (smooth_mean, smooth_cov) = jax.lax.scan(
        backward, last, (means[:-1], covs[:-1]), reverse=True
    )
    return KalmanResult(
        jnp.concatenate([smooth_mean, last[0][None]]),
        jnp.concatenate([smooth_cov, last[1][None]]),
        means,
        covs,
        jnp.sum(terms),
    )


@lru_cache(maxsize=32)
def quasi_normal(n: int, d: int) -> Float[np.ndarray, "n d"]:
    """`n` points that stand for N(0, I) in `d` dimensions, the same at every call.

    The additive recurrence of Roberts (2018), *The unreasonable effectiveness of quasirandom
    sequences*, through the inverse of the normal distribution function; then with every point its
    negative, and the sum of squares brought to that of the density. An average over them is exact
    for linear functions, and for quadratic ones where n >= 2 d (for fewer points: for the squares
    of single components); for other smooth functions its error falls nearly as 1 / n.

    Args:
        n: number of points, even.
        d: dimension.

    Raises:
        ValueError: on an odd number, or less than two.
    """
    if n < 2 or n % 2:
        raise ValueError(f"expected an even number of points, at least 2, got {n}")
    ratio = 2.0
    for _ in range(64):  # the root of ratio^(d + 1) = ratio + 1
        ratio = (1.0 + ratio) ** (1.0 / (d + 1))
    step = ratio ** -np.arange(1.0, d + 1.0)
    uniform = (0.5 + np.arange(1, n // 2 + 1)[:, None] * step) % 1.0
    inverse = NormalDist().inv_cdf
    half = np.array([inverse(u) for u in uniform.reshape(-1)]).reshape(uniform.shape)
    moment = half.T @ half / (n // 2)
    if n >= 2 * d:
        half = np.linalg.solve(np.linalg.cholesky(moment), half.T).T
    else:
        half = half / np.sqrt(np.diagonal(moment))
    points = np.concatenate([half, -half])
    points.flags.writeable = False
    return points
