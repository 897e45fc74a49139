"""Encoders c = c_psi(y, m): from a gappy event to the context that a head reads.

Every encoder reads values through `Event.values`, where masked entries are zero, so that it is
blind to whatever a record holds at a masked entry: -999, NaN, or an interpolated value.
"""

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, Bool, Float

from amortlib.types import Array, Event, Fixed, Key

__all__ = [
    "AbstractEncoder",
    "ConvEncoder",
    "FlatEncoder",
    "ScaledEncoder",
    "SetEncoder",
    "SiteContext",
    "SiteEncoder",
]


class AbstractEncoder(eqx.Module):
    """Maps one event to a context.

    Attributes:
        obs_shape: the shape of the events it takes, or `None` where any will do.
        uses_sd: whether it reads the event's error bars.
    """

    obs_shape: eqx.AbstractVar[tuple[int, ...] | None]
    uses_sd: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def __call__(self, event: Event) -> eqx.Module | Array:
        """Context of one event."""


def _log_sd(event: Event) -> Float[Array, "*obs"]:
    """Log error bar, zero at masked entries."""
    if event.error_sd is None:
        raise ValueError(
            "expected an event with its observation-error sd: this encoder was made with "
            "uses_sd=True; give the event an sd, or make the encoder with uses_sd=False"
        )
    return jnp.log(event.error_sd)


class FlatEncoder(AbstractEncoder):
    """A multilayer perceptron on (values, mask), and the log error bars where asked: the baseline.

    Nothing in it knows that observations are ordered in time or that a gap carries no
    information; it has to learn both, for every pattern of gaps.
    """

    obs_shape: tuple[int, ...] | None = eqx.field(static=True)
    uses_sd: bool = eqx.field(static=True)
    mlp: eqx.nn.MLP

    def __init__(
        self,
        obs_shape: tuple[int, ...],
        *,
        key: Key,
        features: int = 128,
        width: int = 256,
        depth: int = 2,
        uses_sd: bool = False,
    ):
        """Set the sizes.

        Args:
            obs_shape: shape of `y`.
            key: initialises the weights.
            features: length of the context.
            width: of the hidden layers.
            depth: number of hidden layers.
            uses_sd: whether to read the error bars.
        """
        self.obs_shape = tuple(obs_shape)
        self.uses_sd = uses_sd
        size = math.prod(obs_shape) * (3 if uses_sd else 2)
        self.mlp = eqx.nn.MLP(
            size, features, width, depth, jax.nn.gelu, final_activation=jax.nn.gelu, key=key
        )

    def __call__(self, event: Event) -> Float[Array, " features"]:
        """Context of one event."""
        parts = [event.values, event.mask.astype(event.y.dtype)]
        if self.uses_sd:
            parts.append(_log_sd(event))
        return self.mlp(jnp.concatenate([part.reshape(-1) for part in parts]))


class SiteContext(eqx.Module):
    """What each observation says, kept apart: one row of features an observed entry.

    Attributes:
        features: `(t, f)`; rows at masked entries are zero.
        mask: `(t,)`.
    """

    features: Float[Array, "t f"]
    mask: Bool[Array, " t"]


class SiteEncoder(AbstractEncoder):
    """Encodes each observation by itself, or with its near neighbours; the same net everywhere.

    The raw value and log error bar stand beside the learned features, so that a head can be
    linear in the observation where that is right. Because the net is shared over time, an encoder
    trained on short records reads long ones.

    Attributes:
        radius: how many neighbours on either side an observation's features may look at. With 0
            the features of an observation depend on that observation alone, which is enough
            where each one informs the state on its own (independent errors, linear H).
    """

    obs_shape: tuple[int, ...] | None = eqx.field(static=True)
    uses_sd: bool = eqx.field(static=True)
    radius: int = eqx.field(static=True)
    mlp: eqx.nn.MLP

    def __init__(
        self,
        *,
        key: Key,
        radius: int = 0,
        features: int = 16,
        width: int = 32,
        depth: int = 2,
        uses_sd: bool = False,
    ):
        """Set the sizes.

        Args:
            key: initialises the weights.
            radius: neighbours read on either side.
            features: learned features an observation.
            width: of the hidden layers.
            depth: number of hidden layers.
            uses_sd: whether to read the error bars.
        """
        self.obs_shape = None
        self.uses_sd = uses_sd
        self.radius = radius
        channels = 3 if uses_sd else 2
        self.mlp = eqx.nn.MLP(
            channels * (2 * radius + 1), features, width, depth, jax.nn.gelu, key=key
        )

    @property
    def size(self) -> int:
        """Number of features in a row of the context."""
        return int(self.mlp.out_size) + (2 if self.uses_sd else 1)

    def __call__(self, event: Event) -> SiteContext:
        """Context of one event with `y` of shape `(t,)`."""
        if event.y.ndim != 1:
            raise ValueError(f"expected y of shape (t,), got {event.y.shape}")
        channels = [event.values, event.mask.astype(event.y.dtype)]
        raw = [event.values]
        if self.uses_sd:
            channels.append(_log_sd(event))
            raw.append(channels[-1])
        stacked = jnp.pad(jnp.stack(channels, axis=1), ((self.radius, self.radius), (0, 0)))
        t = event.y.shape[0]
        windows = jnp.concatenate([stacked[i : i + t] for i in range(2 * self.radius + 1)], axis=1)
        learned = jax.vmap(self.mlp)(windows)
        features = jnp.concatenate([jnp.stack(raw, axis=1), learned], axis=1)
        return SiteContext(jnp.where(event.mask[:, None], features, 0.0), event.mask)


class ConvEncoder(AbstractEncoder):
    """Convolutions along time, residual, each looking twice as far as the one before it.

    The first axis of `y` is time, and regular; the others are instruments, read together. The
    nets are shared over time, so that a pattern learned at one place is known at all others,
    and the last layer is told where it was. Zeros stand for what is beyond the ends, where the
    mask channel says that nothing was seen, as in a gap.

    Dilated convolutions after van den Oord et al. (2016), *WaveNet*, arXiv:1609.03499, section
    2.1, here to both sides.

    Attributes:
        reach: times on either side that the last convolution has seen.
    """

    obs_shape: tuple[int, ...] | None = eqx.field(static=True)
    uses_sd: bool = eqx.field(static=True)
    reach: int = eqx.field(static=True)
    first: eqx.nn.Conv1d
    layers: tuple[eqx.nn.Conv1d, ...]
    last: eqx.nn.Linear

    def __init__(
        self,
        obs_shape: tuple[int, ...],
        *,
        key: Key,
        features: int = 128,
        width: int = 32,
        depth: int = 3,
        radius: int = 1,
        uses_sd: bool = False,
    ):
        """Set the sizes.

        Args:
            obs_shape: shape of `y`, time first.
            key: initialises the weights.
            features: length of the context.
            width: channels of the convolutions.
            depth: number of convolutions after the first.
            radius: times that a convolution reads on either side, at a spacing that doubles from
                one to the next.
            uses_sd: whether to read the error bars.

        Raises:
            ValueError: on a shape without times, or sizes that are too small.
        """
        if len(obs_shape) < 1 or min(obs_shape) < 1:
            raise ValueError(f"expected an obs_shape with times as its first axis, got {obs_shape}")
        if min(features, width, radius) < 1 or depth < 0:
            raise ValueError(
                "expected features, width, radius >= 1 and depth >= 0, got "
                f"{features}, {width}, {radius}, {depth}"
            )
        self.obs_shape, self.uses_sd = tuple(obs_shape), uses_sd
        channels = math.prod(obs_shape[1:]) * (3 if uses_sd else 2)
        k_first, k_last, *keys = jax.random.split(key, 2 + depth)

        def conv(channels: int, spacing: int, key: Key) -> eqx.nn.Conv1d:
            return eqx.nn.Conv1d(
                channels,
                width,
                2 * radius + 1,
                padding=radius * spacing,
                dilation=spacing,
                key=key,
            )

        self.first = conv(channels, 1, k_first)
        self.layers = tuple(conv(width, 2 ** (i + 1), k) for i, k in enumerate(keys))
        self.last = eqx.nn.Linear(width * obs_shape[0], features, key=k_last)
        self.reach = radius * (2 ** (depth + 1) - 1)

    def rows(self, event: Event) -> Float[Array, "width t"]:
        """What the convolutions say of each time, before the last layer."""
        t = event.y.shape[0]
        parts = [event.values, event.mask.astype(event.y.dtype)]
        if self.uses_sd:
            parts.append(_log_sd(event))
        h = self.first(jnp.concatenate([part.reshape(t, -1).T for part in parts]))
        for layer in self.layers:
            h = h + layer(jax.nn.gelu(h))
        return jax.nn.gelu(h)

    def __call__(self, event: Event) -> Float[Array, " features"]:
        """Context of one event."""
        return jax.nn.gelu(self.last(self.rows(event).reshape(-1)))


class SetEncoder(AbstractEncoder):
    """Attention over (time, value) tokens: any number of observations, at any times, in any order.

    Each observed entry is a token, made from its value, its time and its instrument by a net that
    all share. A few learned vectors, the *latents*, attend to the tokens and are the context in the
    end: Jaegle et al. (2021), *Perceiver*, arXiv:2103.03206; with one layer it is the pooling by
    attention of Lee et al. (2019), *Set Transformer*, arXiv:1810.00825, equation 11. The cost is
    linear in the number of observations, and their order does not matter, but for rounding.

    One more token is always there and says nothing. An event in which nothing was seen attends to
    it alone, and a weak observation can be outweighed by it. Masked entries are no tokens, so that
    an event may be padded with them to the length of others
    ([`stack_events`][amortlib.types.stack_events]).

    Times are read from `Event.time`, in units of `time_scale`: as they are, and as sines and
    cosines whose periods halve from eight times the scale on.

    Attributes:
        channels: number of instruments: `y` has the shape `(n,)` for one, `(n, channels)` for more.
        time_scale: the length of a typical record.
    """

    obs_shape: tuple[int, ...] | None = eqx.field(static=True)
    uses_sd: bool = eqx.field(static=True)
    channels: int = eqx.field(static=True)
    frequencies: int = eqx.field(static=True)
    time_scale: Fixed
    token: eqx.nn.MLP
    nothing: Float[Array, " width"]
    latents: Float[Array, "latents width"]
    attention: tuple[eqx.nn.MultiheadAttention, ...]
    rethink: tuple[eqx.nn.MLP, ...]
    last: eqx.nn.Linear

    def __init__(
        self,
        *,
        key: Key,
        channels: int = 1,
        time_scale: float = 1.0,
        features: int = 128,
        width: int = 64,
        depth: int = 2,
        latents: int = 4,
        heads: int = 4,
        frequencies: int = 6,
        uses_sd: bool = False,
    ):
        """Set the sizes.

        Args:
            key: initialises the weights.
            channels: number of instruments.
            time_scale: the length of a typical record, in the units of `Event.time`.
            features: length of the context.
            width: of tokens and latents; a multiple of `heads`.
            depth: how often the latents attend to the tokens.
            latents: their number.
            heads: of each attention.
            frequencies: of the sines and cosines of time.
            uses_sd: whether to read the error bars.

        Raises:
            ValueError: on sizes that are too small or do not fit, or a scale that is not positive.
        """
        if min(channels, features, width, depth, latents, heads) < 1 or frequencies < 0:
            raise ValueError(
                "expected channels, features, width, depth, latents, heads >= 1 and frequencies "
                f">= 0, got {channels}, {features}, {width}, {depth}, {latents}, {heads}, "
                f"{frequencies}"
            )
        if width % heads:
            raise ValueError(f"expected a width that {heads} heads divide, got {width}")
        if not (math.isfinite(time_scale) and time_scale > 0):
            raise ValueError(f"expected a positive time_scale, got {time_scale}")
        self.obs_shape, self.uses_sd = None, uses_sd
        self.channels, self.frequencies = channels, frequencies
        self.time_scale = Fixed(jnp.asarray(time_scale, float))
        k_token, k_nothing, k_latents, k_last, *keys = jax.random.split(key, 4 + 2 * depth)
        size = (3 if uses_sd else 2) + 2 * frequencies + (channels if channels > 1 else 0)
        self.token = eqx.nn.MLP(size, width, width, 1, jax.nn.gelu, key=k_token)
        self.nothing = jax.random.normal(k_nothing, (width,))
        self.latents = jax.random.normal(k_latents, (latents, width))
        self.attention = tuple(eqx.nn.MultiheadAttention(heads, width, key=k) for k in keys[:depth])
        self.rethink = tuple(
            eqx.nn.MLP(width, width, width, 1, jax.nn.gelu, key=k) for k in keys[depth:]
        )
        self.last = eqx.nn.Linear(latents * width, features, key=k_last)

    def __call__(self, event: Event) -> Float[Array, " features"]:
        """Context of one event with `y` of shape `(n,)`, or `(n, channels)` for several.

        Raises:
            ValueError: on an event of another shape, or without times.
        """
        inner = () if self.channels == 1 else (self.channels,)
        if event.y.ndim != 1 + len(inner) or event.y.shape[1:] != inner:
            wanted = "(n,)" if self.channels == 1 else f"(n, {self.channels})"
            raise ValueError(f"expected y of shape {wanted}, got {event.y.shape}")
        if event.when is None:
            raise ValueError(
                "expected an event with the time of each entry: this encoder reads Event.time; "
                "give as_event its time, or use an encoder for regular times"
            )
        time = event.when.reshape(-1) / self.time_scale.value
        wave = (
            time[:, None] * (jnp.pi / 4.0) * 2.0 ** jnp.arange(self.frequencies, dtype=time.dtype)
        )
        parts = [event.values.reshape(-1, 1), time[:, None], jnp.sin(wave), jnp.cos(wave)]
        if self.uses_sd:
            parts.append(_log_sd(event).reshape(-1, 1))
        if self.channels > 1:
            which = jnp.eye(self.channels, dtype=time.dtype)
            parts.append(jnp.tile(which, (event.y.shape[0], 1)))
        tokens = jax.vmap(self.token)(jnp.concatenate(parts, axis=1))
        tokens = _unit(jnp.concatenate([self.nothing[None], tokens]))
        seen = jnp.concatenate([jnp.ones(1, bool), event.mask.reshape(-1)])
        # A masked token gets no weight: that it is finite is enough for it to have no say.
        mask = jnp.broadcast_to(seen, (self.latents.shape[0], seen.size))
        h = self.latents
        for attend, think in zip(self.attention, self.rethink, strict=True):
            h = h + attend(_unit(h), tokens, tokens, mask=mask)
            h = h + jax.vmap(think)(_unit(h))
        return jax.nn.gelu(self.last(_unit(h).reshape(-1)))


def _unit(rows: Float[Array, "n f"]) -> Float[Array, "n f"]:
    """Rows of mean zero and variance one: a layer norm without parameters."""
    off = rows - rows.mean(axis=1, keepdims=True)
    return off * jax.lax.rsqrt(jnp.mean(off**2, axis=1, keepdims=True) + 1e-6)


class ScaledEncoder(AbstractEncoder):
    """Shows another encoder the event in other units: (y - centre) / scale, error bars likewise.

    Networks learn fastest from numbers of a size of about one. The units are held fixed.

    Attributes:
        inner: the encoder.
        centre: typical value of the observations, their shape.
        scale: their typical spread, likewise.
    """

    obs_shape: tuple[int, ...] | None = eqx.field(static=True)
    uses_sd: bool = eqx.field(static=True)
    inner: AbstractEncoder
    centre: Fixed
    scale: Fixed

    def __init__(self, inner: AbstractEncoder, centre: ArrayLike, scale: ArrayLike):
        """Set the units.

        Raises:
            ValueError: on shapes that do not fit the encoder, or a scale that is not positive.
        """
        shape = jnp.shape(centre) if inner.obs_shape is None else inner.obs_shape
        if jnp.shape(centre) not in ((), shape) or jnp.shape(scale) not in ((), shape):
            raise ValueError(
                f"expected a centre and a scale of shape {shape}, or numbers, got "
                f"{jnp.shape(centre)} and {jnp.shape(scale)}"
            )
        if not bool(jnp.all(jnp.asarray(scale) > 0)):
            raise ValueError(f"expected a positive scale, got {scale}")
        self.obs_shape, self.uses_sd, self.inner = inner.obs_shape, inner.uses_sd, inner
        self.centre = Fixed(jnp.broadcast_to(jnp.asarray(centre, float), shape))
        self.scale = Fixed(jnp.broadcast_to(jnp.asarray(scale, float), shape))

    def __call__(self, event: Event) -> eqx.Module | Array:
        """Context of one event."""
        centre, scale = self.centre.value, self.scale.value
        sd = None if event.error_sd is None else event.error_sd / scale
        return self.inner(Event((event.values - centre) / scale, event.mask, sd, event.time))
