"""Gaussian regression heads: diagonal, full covariance, and information form.

All three are trained by maximum likelihood on simulated pairs. By Gibbs' inequality the best
Gaussian under that objective has the mean and covariance of the true posterior.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, Float, Int

from amortlib.encoders import SiteContext
from amortlib.gaussian import GaussMarkov
from amortlib.heads.base import AbstractHead
from amortlib.types import Array, Fixed, Key

__all__ = ["CholeskyHead", "DiagonalHead", "InformationHead"]


_LOG_GAIN_BOUND = 10.0
"""Bound on the log of a message's gain, in units of the state: e^10 is 22,000 to one."""

_FACTOR_BOUND = 2.0**15
"""Bound on the entries of C, where a block is one number."""

_VALUE_BOUND = 2.0**40
"""Bound on v. Both are powers of two: below a thousandth of its bound a number is not changed."""


def _bounded(x: Array, bound: float | Array) -> Array:
    """`x` where it is small beside `bound`, and smoothly no larger than `bound` elsewhere."""
    return bound * jnp.tanh(x / bound)


def _small(linear: eqx.nn.Linear, factor: float) -> eqx.nn.Linear:
    """Shrink the weights and zero the bias: start near the centre, not at a random answer."""
    linear = eqx.tree_at(lambda lin: lin.weight, linear, linear.weight * factor)
    return eqx.tree_at(lambda lin: lin.bias, linear, jnp.zeros_like(linear.bias))


def _sites(site: ArrayLike | None, n: int) -> Array:
    """Where each observation's message goes; jax would drop one that goes nowhere."""
    where = jnp.arange(n) if site is None else jnp.asarray(site)
    if where.ndim != 1 or not bool(jnp.all((where >= 0) & (where < n))):
        raise ValueError(f"expected sites from 0 to {n - 1}, shape (t,), got {where}")
    return where


class _Standardised(AbstractHead):
    """Works in units of the prior: x = centre + scale * (what the net predicts)."""

    centre: Fixed
    scale: Fixed

    def _units(self) -> tuple[Array, Array]:
        return self.centre.value, self.scale.value


class DiagonalHead(_Standardised):
    """Mean and log standard deviation of every component; no correlations.

    The textbook first head, kept as a lesson: its mean can be right, but where the posterior is
    correlated its density is not, and no amount of training mends that.
    """

    linear: eqx.nn.Linear

    def __init__(
        self,
        features: int,
        dim: int,
        *,
        key: Key,
        centre: ArrayLike = 0.0,
        scale: ArrayLike = 1.0,
    ):
        """Set the sizes.

        Args:
            features: length of the context.
            dim: dimension d of the state.
            key: initialises the weights.
            centre: typical value of the state, a number or shape `(d,)`.
            scale: its typical spread, likewise.
        """
        self.centre = Fixed(jnp.broadcast_to(jnp.asarray(centre, float), (dim,)))
        self.scale = Fixed(jnp.broadcast_to(jnp.asarray(scale, float), (dim,)))
        self.linear = _small(eqx.nn.Linear(features, 2 * dim, key=key), 0.1)

    def __call__(self, context: Float[Array, " features"]) -> GaussMarkov:
        """The Gaussian for one context: sites of one component, none of which touch."""
        centre, scale = self._units()
        loc, log_sd = jnp.split(self.linear(context), 2)
        factor = jnp.exp(-log_sd) / scale
        apart = jnp.zeros((factor.size - 1, 1, 1), factor.dtype)
        return GaussMarkov(centre + scale * loc, factor[:, None, None], apart)


class CholeskyHead(_Standardised):
    """Mean and every entry of a triangular factor of the precision: d (d + 3) / 2 numbers.

    The honest baseline for a full covariance. Needs no knowledge of the state's structure, and
    pays for it: the number of outputs grows as d^2, and each must be learned for every gap.

    The factor is that of the precision, P = L L^T, and not of the covariance: the log-likelihood
    is then a square and a sum of logarithms, without a linear solve in training. With a factor of
    the covariance, which has to be inverted there, training blows up on its way (Dorta et al.
    2018, *Structured uncertainty prediction networks*, section 4.1). The answer is a
    [`GaussMarkov`][amortlib.gaussian.GaussMarkov] of a single site, which holds such a factor.
    """

    linear: eqx.nn.Linear
    dim: int = eqx.field(static=True)

    def __init__(
        self,
        features: int,
        dim: int,
        *,
        key: Key,
        centre: ArrayLike = 0.0,
        scale: ArrayLike = 1.0,
    ):
        """Set the sizes; arguments as those of [`DiagonalHead`][]."""
        self.centre = Fixed(jnp.broadcast_to(jnp.asarray(centre, float), (dim,)))
        self.scale = Fixed(jnp.broadcast_to(jnp.asarray(scale, float), (dim,)))
        self.dim = dim
        self.linear = _small(eqx.nn.Linear(features, dim * (dim + 3) // 2, key=key), 0.1)

    def __call__(self, context: Float[Array, " features"]) -> GaussMarkov:
        """The Gaussian for one context."""
        centre, scale = self._units()
        loc, log_diag, below = jnp.split(self.linear(context), [self.dim, 2 * self.dim])
        rows, cols = jnp.tril_indices(self.dim, -1)
        lower = jnp.diag(jnp.exp(log_diag)).at[rows, cols].set(below)
        no_neighbours = jnp.zeros((0, self.dim, self.dim), lower.dtype)
        return GaussMarkov(centre + scale * loc, (lower / scale[:, None])[None], no_neighbours)


class InformationHead(AbstractHead):
    """Each observation adds its message to the natural parameters of the prior; a gap adds nothing.

    In information form Bayes' rule is addition. With precision P and information vector
    eta = P mean,

        P = P_b + sum_t m_t C_t C_t^T,      eta = P_b x_b + sum_t m_t C_t v_t,

    where the message of observation t is r pseudo-observations `v_t` of the directions `C_t` of
    the block of the state at that observation's site, both predicted by the net from the
    observation. P_b is block tridiagonal and a message touches one block, so P stays block
    tridiagonal and everything costs O(n). For a linear problem with independent errors this
    family holds the exact posterior; messages of this form are the conjugate potentials of
    Johnson et al. (2016), *Composing graphical models with neural networks*, section 4.

    With nothing observed the answer is the prior, by construction and not by training.

    Attributes:
        prior: background density, held fixed.
        site: `(t,)`, the block of the state that each observation informs.
        rank: r, pseudo-observations an observation.
    """

    prior: Fixed
    site: Fixed
    rank: int = eqx.field(static=True)
    gain: eqx.nn.Linear
    direction: eqx.nn.Linear
    value: eqx.nn.Linear

    def __init__(
        self,
        features: int,
        prior: GaussMarkov,
        *,
        key: Key,
        site: Int[Any, " t"] | None = None,
        rank: int = 1,
    ):
        """Set the sizes.

        Args:
            features: features a row of the context: `SiteEncoder.size`.
            prior: background density of the state on its grid.
            key: initialises the weights.
            site: for each observation the index of the block it informs; by default observation
                t informs block t.
            rank: pseudo-observations an observation, at most the size of a block.
        """
        n, block = prior.shape
        if not 1 <= rank <= block:
            raise ValueError(f"expected a rank from 1 to the block size {block}, got {rank}")
        self.prior = Fixed(prior)
        self.site = Fixed(_sites(site, n))
        self.rank = rank
        k_gain, k_direction, k_value = jax.random.split(key, 3)
        self.gain = _small(eqx.nn.Linear(features, rank, key=k_gain), 0.1)
        self.value = _small(eqx.nn.Linear(features, rank, key=k_value), 0.1)
        start = _small(eqx.nn.Linear(features, block * rank, key=k_direction), 0.1)
        # Start with messages about the first `rank` components of the block, so that the
        # likelihood has a slope to descend from the first step on.
        bias = jnp.eye(block, rank).reshape(-1)
        self.direction = eqx.tree_at(lambda lin: lin.bias, start, bias)

    def messages(self, context: SiteContext) -> tuple[Float[Array, "t b r"], Float[Array, "t r"]]:
        """C_t and v_t of each observation, zero at masked ones."""
        block = self.prior.tree.shape[1]
        # Bounded smoothly, so that a value far outside training cannot claim infinite precision,
        # or overflow on its way to a claim.
        log_gain = _bounded(jax.vmap(self.gain)(context.features), _LOG_GAIN_BOUND)
        gain = jnp.exp(log_gain)
        shape = (-1, block, self.rank)
        factor = jax.vmap(self.direction)(context.features).reshape(shape) * gain[:, None, :]
        factor = _bounded(factor, self._factor_bound())
        value = _bounded(jax.vmap(self.value)(context.features) * gain, _VALUE_BOUND)
        seen = context.mask[:, None]
        return jnp.where(seen[:, None], factor, 0.0), jnp.where(seen, value, 0.0)

    def _factor_bound(self) -> Array:
        block = self.prior.tree.shape[1]
        if block == 1:
            return jnp.asarray(_FACTOR_BOUND)
        # Within a block, what one pseudo-observation says of two components cancels in the
        # Cholesky factorisation, down to a pivot no smaller than the prior's. Were the rounding
        # of C C^T larger than that pivot, the factor would be NaN.
        pivot = jnp.diagonal(self.prior.value.diag, axis1=-2, axis2=-1)[self.site.value]
        return pivot[:, :, None] / jnp.sqrt(16 * block * self.rank * jnp.finfo(pivot.dtype).eps)

    def __call__(self, context: SiteContext) -> GaussMarkov:
        """The Gaussian for one context."""
        prior, site = self.prior.value, self.site.value
        if context.mask.shape != site.shape:
            raise ValueError(
                f"expected {site.shape[0]} observations, got {context.mask.shape[0]}; "
                "with_prior gives the head a grid of another length"
            )
        factor, value = self.messages(context)
        diag, lower = prior.precision_blocks()
        diag = diag.at[site].add(factor @ jnp.swapaxes(factor, -1, -2))
        # The innovation form: work on x - x_b, so that a large mean costs no accuracy.
        push = jnp.einsum("tbr,tr->tb", factor, value)
        eta = jnp.zeros(prior.shape, push.dtype).at[site].add(push)
        shifted = GaussMarkov.from_information(eta.reshape(-1), diag, lower)
        return GaussMarkov(prior.loc + shifted.loc, shifted.diag, shifted.off)

    def with_prior(
        self, prior: GaussMarkov, site: Int[Any, " t"] | None = None
    ) -> "InformationHead":
        """The same messages over another grid: a longer record, another spacing.

        Right where the prior is of the same kind and the messages do not depend on it: the
        network was trained on short records, and this reads a long one in a single pass.

        Raises:
            ValueError: on blocks of another size, or a site that is not on the grid.
        """
        if prior.shape[1] != self.prior.tree.shape[1]:
            raise ValueError(
                f"expected blocks of size {self.prior.tree.shape[1]}, got {prior.shape[1]}"
            )
        where = Fixed(_sites(site, prior.shape[0]))
        return eqx.tree_at(lambda head: (head.prior, head.site), self, (Fixed(prior), where))
