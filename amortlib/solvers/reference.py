"""A long-run reference for exp(-J): importance sampling from a wide mixture around the minima."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Float

from amortlib.energy import Energy
from amortlib.gaussian import AbstractDistribution
from amortlib.laplace import gauss_newton_hessian
from amortlib.types import Array, Event, Key

__all__ = ["WeightedSample", "importance_sample", "population_sample"]


class WeightedSample(eqx.Module):
    """Draws of a proposal with their importance weights: the posterior, to Monte Carlo error.

    Attributes:
        x: draws, shape `(n, d)`.
        log_weight: -J minus the log-density of the proposal, shape `(n,)`.
    """

    x: Float[Array, "n d"]
    log_weight: Float[Array, " n"]

    @property
    def weight(self) -> Float[Array, " n"]:
        """Weights that add up to one."""
        return jax.nn.softmax(self.log_weight)

    @property
    def effective_size(self) -> Float[Array, ""]:
        """How many draws of the posterior itself these are worth: 1 / sum of squared weights.

        Kong, Liu and Wong (1994), *Sequential imputations and Bayesian missing data problems*,
        J. Am. Stat. Assoc. 89, section 4.1. Blind to a mode that no draw has come near.
        """
        return 1.0 / jnp.sum(self.weight**2)

    @property
    def log_normaliser(self) -> Float[Array, ""]:
        """log Z = log of the integral of exp(-J)."""
        return jax.nn.logsumexp(self.log_weight) - math.log(self.log_weight.size)

    def mean(self) -> Float[Array, " d"]:
        """Posterior mean."""
        return self.weight @ self.x

    def covariance(self) -> Float[Array, "d d"]:
        """Posterior covariance."""
        off = self.x - self.mean()
        return (off * self.weight[:, None]).T @ off

    def resample(self, n: int, *, key: Key) -> Float[Array, "n d"]:
        """`n` draws with equal weights, with repetitions."""
        return self.x[jax.random.choice(key, self.weight.size, (n,), p=self.weight)]

    def kl(self, q: AbstractDistribution, energy: Energy, event: Event) -> Float[Array, ""]:
        """KL(p || q) in nats, to Monte Carlo error: how far q is from the posterior p."""
        log_p = jax.vmap(lambda x: -energy(x, event))(self.x) - self.log_normaliser
        return self.weight @ (log_p - jax.vmap(q.log_prob)(self.x))


@eqx.filter_jit
def importance_sample(
    energy: Energy,
    event: Event,
    modes: Float[Array, "k d"],
    n: int,
    *,
    key: Key,
    dof: float = 5.0,
    widen: float = 1.5,
    prior_share: float = 0.1,
) -> WeightedSample:
    """Draw from a mixture that is wider than the posterior, and weigh by exp(-J) / proposal.

    One multivariate t around each mode, with the inverse Gauss-Newton Hessian there as its
    shape, and the prior, which covers what no mode does: the weights are bounded, because J is
    never less than its background part. Owen and Zhou (2000), *Safe and effective importance
    sampling*, J. Am. Stat. Assoc. 95.

    Args:
        energy: J.
        event: the event.
        modes: minima of J, such as `OracleAnalysis.ends` where `distinct`; repeats do no harm.
        n: number of draws.
        key: randomness.
        dof: degrees of freedom of the t; fewer have heavier tails.
        widen: factor on its standard deviations.
        prior_share: share of the draws that come from the prior.

    Raises:
        ValueError: on a share that is not between 0 and 1.
    """
    if not 0.0 < prior_share < 1.0:
        raise ValueError(f"expected 0 < prior_share < 1, got {prior_share}")
    prior, (k, d) = energy.prior, modes.shape
    k_which, k_normal, k_scale, k_prior = jax.random.split(key, 4)
    # L with precision L L^T; a draw is mode + widen * L^-T z / sqrt(chi2 / dof).
    factor = jax.vmap(lambda x: jnp.linalg.cholesky(gauss_newton_hessian(energy, x, event)))(modes)

    which = jax.random.randint(k_which, (n,), 0, k)
    z = jax.random.normal(k_normal, (n, d), modes.dtype)
    chi2 = 2.0 * jax.random.gamma(k_scale, dof / 2.0, (n,), modes.dtype)
    back = jax.vmap(lambda low, e: jax.scipy.linalg.solve_triangular(low, e, lower=True, trans=1))
    near = modes[which] + widen * back(factor[which], z) * jnp.sqrt(dof / chi2)[:, None]
    far = prior.sample(n, key=k_prior)
    from_prior = jnp.arange(n) < jnp.round(prior_share * n)
    x = jnp.where(from_prior[:, None], far, near)

    def log_t(x, mode, low):
        u = low.T @ (x - mode) / widen
        norm = jax.scipy.special.gammaln((dof + d) / 2.0) - jax.scipy.special.gammaln(dof / 2.0)
        norm = norm - 0.5 * d * jnp.log(dof * jnp.pi) - d * jnp.log(widen)
        log_det = jnp.sum(jnp.log(jnp.diagonal(low)))
        return norm + log_det - 0.5 * (dof + d) * jnp.log1p(jnp.sum(u**2) / dof)

    def log_proposal(x):
        around = jax.nn.logsumexp(jax.vmap(lambda m, low: log_t(x, m, low))(modes, factor))
        around = around - jnp.log(k) + jnp.log1p(-prior_share)
        return jnp.logaddexp(around, prior.log_prob(x) + jnp.log(prior_share))

    log_weight = jax.vmap(lambda x: -energy(x, event) - log_proposal(x))(x)
    return WeightedSample(x, log_weight)


@eqx.filter_jit
def population_sample(
    energy: Energy,
    event: Event,
    modes: Float[Array, "k d"],
    n: int,
    *,
    key: Key,
    rounds: int = 2,
    centres: int = 32,
) -> WeightedSample:
    """[`importance_sample`][] again and again, each time around draws of the time before as well.

    Where J is far from a parabola the shape of its minima says little of where its mass is, and a
    few draws carry most of the weight. Resampled, and with the curvature of J at each of them, they
    lead the next draws along a ridge. The minima stay among the centres, and the prior among the
    proposals, so that weights stay bounded whatever the first draws missed. Cappe, Guillin, Marin
    and Robert (2004), *Population Monte Carlo*, J. Comput. Graph. Stat. 13.

    Args:
        energy: J.
        event: the event.
        modes: minima of J; repeats do no harm.
        n: number of draws in each round; those of the last are returned.
        key: randomness.
        rounds: how often after the first time; with 0 it is `importance_sample`.
        centres: draws of the last round that the next one is made around, beside the minima.

    Raises:
        ValueError: on a negative number of rounds, or no centres.
    """
    if rounds < 0 or centres < 1:
        raise ValueError(f"expected rounds >= 0 and centres >= 1, got {rounds} and {centres}")
    key, k_draw = jax.random.split(key)
    sample = importance_sample(energy, event, modes, n, key=k_draw)

    def again(carry: tuple[WeightedSample, Key], _: None) -> tuple[tuple, None]:
        sample, key = carry
        key, k_centre, k_draw = jax.random.split(key, 3)
        around = jnp.concatenate([modes, sample.resample(centres, key=k_centre)])
        return (importance_sample(energy, event, around, n, key=k_draw), key), None

    (sample, _), _ = jax.lax.scan(again, (sample, key), None, length=rounds)
    return sample
