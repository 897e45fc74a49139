"""The amortized posterior: an encoder and a head, asked about one event or about many."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float

from amortlib.encoders import AbstractEncoder, FlatEncoder, ScaledEncoder, SiteEncoder
from amortlib.gaussian import AbstractDistribution, Gaussian, GaussMarkov, quasi_normal
from amortlib.heads.base import AbstractHead
from amortlib.heads.flow import FlowHead
from amortlib.heads.mixture import MixtureHead
from amortlib.heads.regression import CholeskyHead, DiagonalHead, InformationHead
from amortlib.heads.score import AbstractNoise, AbstractSampler, FlowODE, ScoreHead
from amortlib.types import Array, Event, InvalidEventError, Key, PyTree, refuse_unusable

__all__ = [
    "AmortizedPosterior",
    "flow_posterior",
    "in_buckets",
    "regression_posterior",
    "score_posterior",
]


class AmortizedPosterior(eqx.Module):
    """q(x | y, m): call it with an event, and it returns the distribution over the state.

    Every method takes one event; `jax.vmap` (or `eqx.filter_vmap`) makes it many. Methods are
    jittable, and compile once for a shape, whatever the mask.

    Attributes:
        encoder: event -> context.
        head: context -> distribution.
    """

    encoder: AbstractEncoder
    head: AbstractHead

    def context(self, event: Event) -> Any:
        """What the encoder makes of one event, for the head to read.

        Raises:
            InvalidEventError: where the event's shape is not the one this posterior was made for,
                where its mask is of another shape or not boolean, and, outside compiled programs,
                where a value is not finite at an observed entry.
        """
        expected = self.encoder.obs_shape
        if expected is not None and event.y.shape != expected:
            raise InvalidEventError(
                f"expected an event of shape {expected}, got {event.y.shape}; "
                "map a batch of events with jax.vmap"
            )
        refuse_unusable(event)
        if self.encoder.uses_sd and event.sd is None:
            raise InvalidEventError(
                "expected an event with its observation-error sd, got sd=None: "
                "this posterior was trained on error bars that differ between events"
            )
        return self.encoder(event)

    def __call__(self, event: Event) -> AbstractDistribution:
        """The posterior of one event; it refuses what [`context`][] refuses."""
        return self.head(self.context(event))

    def sample(self, event: Event, n: int, *, key: Key) -> Float[Array, "n d"]:
        """`n` independent draws from q(. | event)."""
        if n < 1:
            raise ValueError(f"expected at least one sample, got n={n}")
        return self(event).sample(n, key=key)

    def log_prob(self, x: Float[Array, " d"], event: Event) -> Float[Array, ""]:
        """log q(x | event)."""
        return self(event).log_prob(x)

    def mode(self, event: Event) -> Float[Array, " d"]:
        """The most likely state."""
        return self(event).mode()

    def mean(self, event: Event) -> Float[Array, " d"]:
        """Mean of q."""
        return self(event).mean()

    def covariance(self, event: Event) -> Float[Array, "d d"]:
        """Covariance of q, dense."""
        return self(event).covariance()

    def sd(self, event: Event) -> Float[Array, " d"]:
        """Standard deviation of each component."""
        return self(event).sd()

    def mode_jacobian(self, event: Event) -> Float[Array, "d *obs"]:
        """d mode / dy: how the answer moves with each observation; zero at masked entries."""
        return jax.jacfwd(lambda y: self.mode(dataclasses.replace(event, y=y)))(event.y)


def in_buckets(fn: Callable[..., PyTree], *batches: PyTree) -> PyTree:
    """Map `fn` over the leading axis of `batches`, padded to a power of two: few compilations.

        means = in_buckets(posterior.mean, events)
        draw = lambda event, key: posterior.sample(event, 100, key=key)
        draws = in_buckets(draw, events, jax.random.split(key, n))

    A compiled program is for one shape, so that batches of every size, as they come in a stream,
    would each compile. Here 513 to 1,024 events share one program. The last event is repeated to
    fill the bucket, and what is made of the copies is thrown away; up to half of the work is
    wasted. Give the same `fn` again, and not a new lambda:
    a method of a model is the same function whatever its weights.

    Args:
        fn: of one event, and of whatever else has one row an event.
        batches: pytrees of arrays with one leading axis, the same for all.

    Returns:
        What `fn` returns, stacked, as numpy arrays.

    Raises:
        ValueError: on leading axes that differ, or with nothing on them.
    """
    leaves = jax.tree.leaves(batches)
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    if len(sizes) != 1 or sizes & {None, 0}:
        raise ValueError(
            "expected batches with one leading axis, the number of events, of at least one; got "
            f"shapes {[leaf.shape for leaf in leaves]}"
        )
    n = leaves[0].shape[0]
    size = 1 << (n - 1).bit_length()
    padded = jax.tree.map(lambda leaf: _pad(leaf, size), batches)
    # Cut in numpy: a slice by jax would be one more program for every n.
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:n], _mapped(fn, padded))


def _pad(leaf: Array | np.ndarray, size: int) -> Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        words = _pad(jax.random.key_data(leaf), size)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
    values = np.asarray(leaf)
    fill = np.broadcast_to(values[-1:], (size - len(values), *values.shape[1:]))
    return jnp.asarray(np.concatenate([values, fill]))


@eqx.filter_jit
def _mapped(fn: Callable[..., PyTree], batches: tuple[PyTree, ...]) -> PyTree:
    return jax.vmap(fn)(*batches)


def regression_posterior(
    kind: str = "information",
    *,
    key: Key,
    prior: GaussMarkov,
    obs_shape: tuple[int, ...] | None = None,
    uses_sd: bool = False,
    **sizes: Any,
) -> AmortizedPosterior:
    """A Gaussian posterior with the encoder that suits it.

    Args:
        kind: `"information"`, the default, for a state on a grid; `"cholesky"`, the plain
            baseline with a full covariance; `"diagonal"`, the lesson.
        key: initialises the weights.
        prior: background density of the state.
        obs_shape: shape of `y`; by default one observation a site, and the information form
            made here has no other.
        uses_sd: whether error bars differ between events and are read.
        sizes: passed on to the encoder (`features`, `width`, `depth`, `radius`).

    Raises:
        ValueError: on another kind, or an `obs_shape` that the information form cannot take.
    """
    k_encoder, k_head = jax.random.split(key)
    shape = (prior.shape[0],) if obs_shape is None else tuple(obs_shape)
    if kind == "information":
        if shape != (prior.shape[0],):
            raise ValueError(
                f"expected one observation a site, obs_shape={(prior.shape[0],)}, got {shape}; "
                "for others make an InformationHead with the site of each observation"
            )
        encoder = SiteEncoder(key=k_encoder, uses_sd=uses_sd, **sizes)
        return AmortizedPosterior(encoder, InformationHead(encoder.size, prior, key=k_head))
    heads = {"cholesky": CholeskyHead, "diagonal": DiagonalHead}
    if kind not in heads:
        raise ValueError(f"expected kind 'information', 'cholesky' or 'diagonal', got {kind!r}")
    flat = FlatEncoder(shape, key=k_encoder, uses_sd=uses_sd, **sizes)
    head = heads[kind](
        int(flat.mlp.out_size), prior.loc.size, key=k_head, centre=prior.loc, scale=prior.sd()
    )
    return AmortizedPosterior(flat, head)


def flow_posterior(
    base: str = "gaussian",
    *,
    key: Key,
    prior: Gaussian | GaussMarkov,
    obs_shape: tuple[int, ...],
    uses_sd: bool = False,
    components: int = 1,
    encoder: AbstractEncoder | None = None,
    features: int = 128,
    encoder_width: int = 256,
    encoder_depth: int = 2,
    **sizes: Any,
) -> AmortizedPosterior:
    """A conditional flow over a Gaussian, with the plain encoder or another that is given.

    Args:
        base: `"gaussian"`: the flow starts from the answer of a full-covariance regression head on
            the same context, trained with it; `"prior"`: from the prior.
        key: initialises the weights.
        prior: background density of the state; its mean and spread are the regression head's
            units, or it is the base itself.
        obs_shape: shape of `y`.
        uses_sd: whether error bars differ between events and are read.
        components: with more than one the answer is a mixture of flows, each around a Gaussian
            of its own.
        encoder: whose context is one array of `features` numbers; by default a `FlatEncoder`.
        features: length of the context.
        encoder_width: of the hidden layers of the `FlatEncoder`.
        encoder_depth: number of them.
        sizes: passed on to the [`FlowHead`][amortlib.heads.FlowHead] (`kind`, `transformer`,
            `layers`, `condition`, `width`, `depth`, `knots`, `points`, `climbs`).

    Raises:
        ValueError: on another base, or a mixture over the prior, whose pieces would be one.
    """
    k_encoder, k_flow, k_base = jax.random.split(key, 3)
    dim = prior.loc.size
    if encoder is None:
        encoder = FlatEncoder(
            tuple(obs_shape),
            key=k_encoder,
            features=features,
            width=encoder_width,
            depth=encoder_depth,
            uses_sd=uses_sd,
        )
    if base == "prior":
        if components != 1:
            raise ValueError(f"expected one component over the prior, got {components}")
        return AmortizedPosterior(encoder, FlowHead(features, prior, dim=dim, key=k_flow, **sizes))
    if base != "gaussian":
        raise ValueError(f"expected base 'gaussian' or 'prior', got {base!r}")
    if components < 1:
        raise ValueError(f"expected at least one component, got {components}")
    # Components that start alike would stay alike: they start a spread of the prior apart.
    apart = quasi_normal(2 * components, dim)[:components] * (components > 1)
    heads = []
    for k_head, start in zip(jax.random.split(k_base, components), apart, strict=True):
        head = CholeskyHead(features, dim, key=k_head, centre=prior.loc, scale=prior.sd())
        bias = head.linear.bias
        assert bias is not None
        moved = bias.at[:dim].set(jnp.asarray(start, bias.dtype))
        heads.append(eqx.tree_at(lambda h: h.linear.bias, head, moved))
    return AmortizedPosterior(encoder, FlowHead(features, heads, dim=dim, key=k_flow, **sizes))


def score_posterior(
    *,
    key: Key,
    prior: Gaussian | GaussMarkov,
    obs_shape: tuple[int, ...],
    components: int = 1,
    obs_centre: ArrayLike = 0.0,
    obs_scale: ArrayLike = 1.0,
    uses_sd: bool = False,
    features: int = 128,
    encoder_width: int = 256,
    encoder_depth: int = 2,
    width: int = 128,
    depth: int = 3,
    draws: int = 4,
    noise: AbstractNoise | None = None,
    sampler: AbstractSampler | None = None,
    density: FlowODE | None = None,
) -> AmortizedPosterior:
    """A posterior given by its score, to be trained with [`dsm`][amortlib.objectives.dsm].

    Args:
        key: initialises the weights.
        prior: background density of the state.
        obs_shape: shape of `y`.
        components: Gaussians of the base whose coordinates the score works in: 0 for none, the
            prior's coordinates; 1 for a Gaussian predicted from the event; more for a mixture,
            where the posterior may fall into pieces.
        obs_centre: typical value of the observations, a number or of their shape.
        obs_scale: their typical spread, likewise.
        uses_sd: whether error bars differ between events and are read.
        features: length of the context.
        encoder_width: of the encoder's layers.
        encoder_depth: their number.
        width: of the score network's layers.
        depth: their number.
        draws: noise levels a state in one evaluation of the loss.
        noise: levels, weights and preconditioning; by default those of EDM.
        sampler: by default fixed steps of the flow ODE.
        density: of the log-density, the mode and the moments.

    Raises:
        ValueError: on a negative number of components, or sizes that are too small.
    """
    if components < 0:
        raise ValueError(f"expected components >= 0, got {components}")
    k_encoder, k_base, k_head = jax.random.split(key, 3)
    flat = FlatEncoder(
        tuple(obs_shape),
        key=k_encoder,
        features=features,
        width=encoder_width,
        depth=encoder_depth,
        uses_sd=uses_sd,
    )
    units = {"centre": prior.loc, "scale": prior.sd()}
    dim = prior.loc.size
    base = None
    if components == 1:
        base = CholeskyHead(features, dim, key=k_base, **units)
    elif components > 1:
        base = MixtureHead(features, dim, key=k_base, components=components, **units)
    head = ScoreHead(
        features,
        prior,
        key=k_head,
        base=base,
        noise=noise,
        sampler=sampler,
        density=density,
        width=width,
        depth=depth,
        draws=draws,
    )
    return AmortizedPosterior(ScaledEncoder(flat, obs_centre, obs_scale), head)
