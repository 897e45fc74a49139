"""A mixture of Gaussians as an answer: the simplest head that can say "either here or there"."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array as AnyArray
from jaxtyping import ArrayLike, Float, Int

from amortlib.gaussian import AbstractDistribution, GaussMarkov, mixture_covariance
from amortlib.heads.base import AbstractHead
from amortlib.heads.regression import _small
from amortlib.types import Array, Fixed, Key

__all__ = ["GaussianMixture", "MixtureHead"]

_MODE_STEPS = 200
"""Steps of the fixed-point iteration for the mode, at most."""


class GaussianMixture(AbstractDistribution):
    """sum_k w_k N(m_k, P_k^-1), by the Cholesky factors of the precisions.

    Attributes:
        log_weight: log w_k, normalised, shape `(k,)`.
        part: the components, a [`GaussMarkov`][amortlib.gaussian.GaussMarkov] of a single site
            whose arrays have a leading axis of k.
    """

    exact_log_prob: ClassVar[bool] = True

    log_weight: Float[Array, " k"]
    part: GaussMarkov

    def of_each(self, ask: Callable[[GaussMarkov], AnyArray]) -> AnyArray:
        """`ask` of every component, stacked."""
        return jax.vmap(ask)(self.part)

    def log_joint(self, x: Float[Array, " d"]) -> Float[Array, " k"]:
        """log w_k + log N(x; m_k, P_k^-1)."""
        return self.log_weight + self.of_each(lambda part: part.log_prob(x))

    def log_prob(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log-density at `x`."""
        return jax.nn.logsumexp(self.log_joint(x))

    def sample(self, n: int, *, key: Key) -> Float[Array, "n d"]:
        """`n` independent draws."""
        if n < 1:
            raise ValueError(f"expected at least one sample, got n={n}")
        k_which, k_normal = jax.random.split(key)
        which = jax.random.categorical(k_which, self.log_weight, shape=(n,))
        z = jax.random.normal(k_normal, (n, self.part.loc.shape[-1]), self.part.loc.dtype)
        return jax.vmap(lambda k, z: self.at(k).colour(z))(which, z)

    def at(self, k: Int[AnyArray, ""]) -> GaussMarkov:
        """Component `k`, which may be traced."""
        return jax.tree.map(lambda leaf: leaf[k], self.part)

    def mode(self) -> Float[Array, " d"]:
        """The point of highest density that is reached by ascent from the components' means.

        The fixed-point iteration of Carreira-Perpinan (2000), *Mode-finding for mixtures of
        Gaussian distributions*, IEEE TPAMI 22, section 4: x = P(x)^-1 sum_k r_k(x) P_k m_k with
        P(x) = sum_k r_k(x) P_k and r_k the responsibilities at x. It never goes downhill.
        """
        precision = self.of_each(lambda part: part.diag[0] @ part.diag[0].T)
        pull = self.of_each(lambda part: part.diag[0] @ (part.diag[0].T @ part.loc))

        def step(x):
            r = jax.nn.softmax(self.log_joint(x))
            return jnp.linalg.solve(jnp.tensordot(r, precision, 1), r @ pull)

        def climb(x):
            return jax.lax.fori_loop(0, _MODE_STEPS, lambda _, x: step(x), x)

        ends = jax.lax.stop_gradient(jax.vmap(climb)(self.part.loc))
        best = ends[jnp.argmax(jax.vmap(self.log_prob)(ends))]
        # One Newton step from the stationary point moves nothing, and its derivative is that of
        # the implicit function theorem.
        slope, curvature = jax.grad(self.log_prob), jax.hessian(self.log_prob)
        return best - jnp.linalg.solve(jax.lax.stop_gradient(curvature(best)), slope(best))

    def mean(self) -> Float[Array, " d"]:
        """The mean."""
        return jnp.exp(self.log_weight) @ self.part.loc

    def covariance(self) -> Float[Array, "d d"]:
        """Covariance: that of the components, and that of their means."""
        within = self.of_each(lambda part: part.covariance())
        return mixture_covariance(jnp.exp(self.log_weight), self.part.loc, within)

    def sd(self) -> Float[Array, " d"]:
        """Standard deviation of each component of the state."""
        return jnp.sqrt(jnp.diagonal(self.covariance()))


class MixtureHead(AbstractHead):
    """Weights, means and precision factors of `components` Gaussians from the context.

    The mixture density network of Bishop (1994), *Mixture density networks*, Aston University
    NCRG/94/004, with full covariances as in
    [`CholeskyHead`][amortlib.heads.regression.CholeskyHead]. Trained by maximum likelihood, its
    exact log-density is a sum over components.

    Attributes:
        centre: typical value of the state.
        scale: its typical spread.
        components: how many Gaussians.
    """

    centre: Fixed
    scale: Fixed
    linear: eqx.nn.Linear
    components: int = eqx.field(static=True)
    dim: int = eqx.field(static=True)

    def __init__(
        self,
        features: int,
        dim: int,
        *,
        key: Key,
        components: int = 2,
        centre: ArrayLike = 0.0,
        scale: ArrayLike = 1.0,
    ):
        """Set the sizes.

        Args:
            features: length of the context.
            dim: dimension d of the state.
            key: initialises the weights, and the places where the components start: alike they
                would stay alike.
            components: number of Gaussians.
            centre: typical value of the state, a number or shape `(d,)`.
            scale: its typical spread, likewise.

        Raises:
            ValueError: on less than one component.
        """
        if components < 1:
            raise ValueError(f"expected at least one component, got {components}")
        self.centre = Fixed(jnp.broadcast_to(jnp.asarray(centre, float), (dim,)))
        self.scale = Fixed(jnp.broadcast_to(jnp.asarray(scale, float), (dim,)))
        self.components, self.dim = components, dim
        k_linear, k_place = jax.random.split(key)
        each = 1 + dim * (dim + 3) // 2
        linear = _small(eqx.nn.Linear(features, components * each, key=k_linear), 0.1)
        place = 0.5 * jax.random.normal(k_place, (components, dim))
        place = place - place.mean(axis=0)
        bias = jnp.zeros((components, each)).at[:, 1 : 1 + dim].set(place)
        self.linear = eqx.tree_at(lambda lin: lin.bias, linear, bias.reshape(-1))

    def __call__(self, context: Float[Array, " features"]) -> GaussianMixture:
        """The mixture for one context."""
        centre, scale, d = self.centre.value, self.scale.value, self.dim
        said = self.linear(context).reshape(self.components, -1)
        rows, cols = jnp.tril_indices(d, -1)

        def one(row):
            loc, log_diag, below = jnp.split(row, [d, 2 * d])
            lower = jnp.diag(jnp.exp(log_diag)).at[rows, cols].set(below)
            none = jnp.zeros((0, d, d), lower.dtype)
            return GaussMarkov(centre + scale * loc, (lower / scale[:, None])[None], none)

        return GaussianMixture(jax.nn.log_softmax(said[:, 0]), jax.vmap(one)(said[:, 1:]))
