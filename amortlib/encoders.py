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

__all__ = ["AbstractEncoder", "FlatEncoder", "ScaledEncoder", "SiteContext", "SiteEncoder"]


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
        return self.inner(Event((event.values - centre) / scale, event.mask, sd))
