"""Several ridges as one density, and beside them what is said without J."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Float

from amortlib.gaussian import AbstractDistribution, mixture_covariance
from amortlib.nested.ridge import HIGHEST, NestedLaplace
from amortlib.types import Array, Key

__all__ = ["NestedMixture", "together", "told_apart"]

_ROUNDS = 2
"""How often what several ridges say of the same place is brought to what J says of it."""


def together(ridges: NestedLaplace, v: Float[Array, " d"]) -> Float[Array, ""]:
    """What several ridges make of log exp(-J) at a control variable: -J where they are right."""
    each = jax.vmap(lambda q: q.log_mass + q.log_prob_control(v))(ridges)
    return jax.nn.logsumexp(jnp.where(jnp.isfinite(each), each, -HIGHEST))


def told_apart(ridges: NestedLaplace) -> NestedLaplace:
    """Ridges, stacked, that together say of a place what J says of it, and each its share.

    Two that were followed from one minimum, or from two ends of the same ridge, would count it
    twice. Along each the density is brought to exp(-J) in the sum of all, the fixed point of which
    is that of the EM algorithm for densities that may have any shape along the ridges.
    """

    def spine(q: NestedLaplace) -> Array:
        flat = jnp.zeros(q.centre.size - 1, q.centre.dtype)
        return jax.vmap(lambda a: q.point(a, flat))(q.grid)

    spines = jax.vmap(spine)(ridges)

    both = jax.vmap(jax.vmap(together, in_axes=(None, 0)), in_axes=(None, 0))
    for _ in range(_ROUNDS):
        off = -ridges.height - both(ridges, spines)
        # At the top of a Gaussian its wider share is missing; more than this is no overlap.
        off = jnp.where(jnp.isfinite(off), jnp.clip(off, -3.0, 1.0), 0.0)
        ridges = eqx.tree_at(lambda q: q.log_density, ridges, ridges.log_density + off)
        ridges = jax.vmap(lambda q: q.normalised())(ridges)
    return ridges


class NestedMixture(AbstractDistribution):
    """Ridges, and beside them what a network makes of the event without J.

    Attributes:
        ridges: [`NestedLaplace`][], arrays with a leading axis of k.
        log_weight: log of the weight of each, normalised, shape `(k,)`.
        beside: covers what no ridge does.
        share: weight of that.
        best: the lowest minimum of J that was found, a state, with its derivative.
    """

    ridges: NestedLaplace
    log_weight: Float[Array, " k"]
    beside: AbstractDistribution
    share: Float[Array, ""]
    best: Float[Array, " d"]

    @property
    def exact_log_prob(self) -> bool:
        """Whether that of what stands beside the ridges is."""
        return self.beside.exact_log_prob

    def log_near(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log-density of the ridges alone at `x`."""
        each = self.log_weight + jax.vmap(lambda q: q.log_prob(x))(self.ridges)
        return jax.nn.logsumexp(jnp.where(jnp.isfinite(each), each, -HIGHEST))

    def log_prob(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log-density at `x`."""
        near, far = self.log_near(x), self.beside.log_prob(x)
        return jnp.logaddexp(jnp.log1p(-self.share) + near, jnp.log(self.share) + far)

    def sample(self, n: int, *, key: Key) -> Float[Array, "n d"]:
        """`n` independent draws."""
        if n < 1:
            raise ValueError(f"expected at least one sample, got n={n}")
        k_which, k_along, k_across, k_beside, k_share = jax.random.split(key, 5)
        dtype, d = self.best.dtype, self.best.size
        which = jax.random.categorical(k_which, self.log_weight, shape=(n,))
        u = jax.random.uniform(k_along, (2, n), dtype)
        w = jax.random.normal(k_across, (n, d - 1), dtype)

        def one(k: Array, u: Array, w: Array, chosen: Array) -> Array:
            return jax.tree.map(lambda leaf: leaf[k], self.ridges).draw(u, w, chosen)

        near = jax.vmap(one)(which, u[0], w, u[1])
        far = self.beside.sample(n, key=k_beside)
        apart = jax.random.uniform(k_share, (n, 1), dtype) < self.share
        return jnp.where(apart, far, near)

    def mode(self) -> Float[Array, " d"]:
        """The lowest minimum of J that was found; of this density nearly the top.

        A minimum of J is the top of exp(-J), and it moves with the data as that does. The top of an
        approximation need not.
        """
        return self.best

    def mean(self) -> Float[Array, " d"]:
        """The mean."""
        near = jnp.exp(self.log_weight) @ jax.vmap(lambda q: q.mean())(self.ridges)
        return (1.0 - self.share) * near + self.share * self.beside.mean()

    def covariance(self) -> Float[Array, "d d"]:
        """The covariance: of each part, and of their means."""
        places = jax.vmap(lambda q: q.mean())(self.ridges)
        within = jax.vmap(lambda q: q.covariance())(self.ridges)
        places = jnp.concatenate([places, self.beside.mean()[None]])
        within = jnp.concatenate([within, self.beside.covariance()[None]])
        weight = jnp.append((1.0 - self.share) * jnp.exp(self.log_weight), self.share)
        return mixture_covariance(weight, places, within)

    def sd(self) -> Float[Array, " d"]:
        """Standard deviation of each component."""
        return jnp.sqrt(jnp.diagonal(self.covariance()))
