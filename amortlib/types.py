"""Array aliases, the record of an event (values, mask, error bars, times), what training leaves."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Bool, Float, PRNGKeyArray, PyTree

Key: TypeAlias = PRNGKeyArray
Array: TypeAlias = jax.Array

__all__ = [
    "Array",
    "Event",
    "Fixed",
    "InvalidEventError",
    "Key",
    "PyTree",
    "as_event",
    "refuse_unusable",
    "stack_events",
    "to_double",
]


class InvalidEventError(ValueError):
    """An event that cannot be used: its message says what was expected and what came."""


class Event(eqx.Module):
    """One event: what was seen, where, and how well.

    Built inside programs; data from outside comes in through [`as_event`][], which checks it.
    A batch of events is an `Event` whose arrays have leading axes, as `jax.vmap` makes it.

    Attributes:
        y: observed values, any shape; entries where `mask` is false mean nothing.
        mask: same shape, boolean, `True` = observed.
        sd: same shape, observation-error standard deviation (the square root of the diagonal of
            `R`) in the units of `y`, or `None` where it is the same for every event and known to
            whoever uses the event.
        time: same shape, when each entry was seen, for observations at times of the event's own;
            `None` where the times are the same for every event and known to whoever uses it.
    """

    y: Float[Array, "*obs"]
    mask: Bool[Array, "*obs"]
    sd: Float[Array, "*obs"] | None = None
    time: Float[Array, "*obs"] | None = None

    @property
    def values(self) -> Float[Array, "*obs"]:
        """`y` with zeros at masked entries: the only form in which anything may read `y`.

        A `where`, not a product: NaN times zero is NaN, and its derivative is too.
        """
        return jnp.where(self.mask, self.y, 0.0)

    @property
    def error_sd(self) -> Float[Array, "*obs"] | None:
        """`sd` with ones at masked entries, so that it can be divided by; `None` stays `None`."""
        return None if self.sd is None else jnp.where(self.mask, self.sd, 1.0)

    @property
    def when(self) -> Float[Array, "*obs"] | None:
        """`time` with zeros at masked entries; `None` stays `None`."""
        return None if self.time is None else jnp.where(self.mask, self.time, 0.0)


class Fixed(eqx.Module):
    """Something a model carries and training must not move: a prior, a scale, a grid.

    Attributes:
        tree: what is carried. Read it through `value`.
    """

    tree: Any

    @property
    def value(self) -> Any:
        """The tree, through which no gradient flows."""
        return jax.tree.map(
            lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_array(leaf) else leaf, self.tree
        )


def to_double(tree: PyTree) -> PyTree:
    """The tree with its float arrays in double precision.

    For use where double precision is switched on, which this package never does at import:

        with jax.enable_x64(True):
            energy = to_double(energy)

    Raises:
        RuntimeError: where it is not switched on, and jax would hand back single precision.
    """
    if jnp.zeros(0, float).dtype != jnp.float64:
        raise RuntimeError("expected double precision to be on: use jax.enable_x64(True)")

    def convert(leaf: Any) -> Any:
        return jnp.asarray(leaf, jnp.float64) if eqx.is_inexact_array(leaf) else leaf

    return jax.tree.map(convert, tree)


def _numbers(name: str, given: Any) -> np.ndarray:
    """Real floating-point numbers in the precision that jax will hold them in."""
    try:
        raw = np.asarray(given)
        if np.issubdtype(raw.dtype, np.number) or raw.dtype == np.bool_:
            dtype = jax.dtypes.canonicalize_dtype(np.promote_types(raw.dtype, np.float32))
            with np.errstate(over="ignore"):
                raw = raw.astype(dtype)
    except (TypeError, ValueError) as err:
        raise InvalidEventError(
            f"expected numbers in {name}, got {type(given).__name__}: {err}"
        ) from err
    if not np.issubdtype(raw.dtype, np.floating):
        raise InvalidEventError(f"expected real numbers in {name}, got dtype {raw.dtype}")
    return raw


def _first(where: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(where)[0])


def _refuse_infinite(name: str, values: np.ndarray, seen: np.ndarray) -> None:
    bad = seen & ~np.isfinite(values)
    if bad.any():
        at = _first(bad)
        raise InvalidEventError(
            f"expected finite {name} at observed entries, got {values[at]} at index {at} "
            f"({int(bad.sum())} such entries); mask them if they were not observed"
        )


def refuse_unusable(event: Event) -> None:
    """Refuse an event that was built by hand and that no posterior can read.

    What is inside a compiled program, or is a shape alone, has no values to look at.

    Raises:
        InvalidEventError: on a mask of another shape than `y` or that is not boolean; on a value
            that is not finite at an observed entry.
    """
    if event.mask.dtype != np.bool_:
        raise InvalidEventError(
            f"expected a boolean mask (True = observed), got dtype {event.mask.dtype}"
        )
    if event.mask.shape != event.y.shape:
        raise InvalidEventError(
            f"expected a mask of the shape of y, {event.y.shape}, got {event.mask.shape}"
        )
    if not any(isinstance(a, Tracer | jax.ShapeDtypeStruct) for a in (event.y, event.mask)):
        _refuse_infinite("values", np.asarray(event.y), np.asarray(event.mask))


def as_event(
    y: Any,
    mask: Any | None = None,
    sd: Any | None = None,
    *,
    time: Any | None = None,
    shape: tuple[int, ...] | None = None,
) -> Event:
    """Check data from outside and make an `Event` of it.

    Args:
        y: observed values. NaN at masked entries is data as people have it, and is accepted.
        mask: boolean, the shape of `y`, `True` = observed. `None` takes the entries of `y`
            that are not NaN as observed. Entries masked in a numpy masked array are not
            observed, whatever `mask` says.
        sd: observation-error standard deviation, a number or the shape of `y`.
        time: when each entry was seen, the shape of `y`, where events have times of their own.
        shape: the shape that a model expects, where there is one to check against.

    Raises:
        InvalidEventError: on an empty event, a wrong shape, a mask of another shape or that is
            not boolean, a value or time that is not finite at an observed entry, an `sd` that is
            not positive at an observed entry.
    """
    values = _numbers("y", y)
    if values.size == 0:
        raise InvalidEventError(
            f"expected at least one entry in y, got an empty event of shape {values.shape}; "
            "an event in which nothing was seen has entries, all of them masked"
        )
    if shape is not None and values.shape != tuple(shape):
        raise InvalidEventError(f"expected y of shape {tuple(shape)}, got {values.shape}")

    hidden = np.ma.getmaskarray(y) if isinstance(y, np.ma.MaskedArray) else False
    seen = ~(np.isnan(values) | hidden) if mask is None else np.asarray(mask)
    if seen.dtype != np.bool_:
        raise InvalidEventError(
            f"expected a boolean mask (True = observed), got dtype {seen.dtype}; "
            "write mask.astype(bool) if ones mean observed"
        )
    if seen.shape != values.shape:
        raise InvalidEventError(
            f"expected a mask of the shape of y, {values.shape}, got {seen.shape}"
        )
    seen = np.asarray(seen & ~np.asarray(hidden))
    _refuse_infinite("values", values, seen)
    if sd is None:
        spread = None
    else:
        given = _numbers("sd", sd).astype(values.dtype)
        if given.shape not in ((), values.shape):
            raise InvalidEventError(
                f"expected sd to be a number or of the shape of y, {values.shape}, "
                f"got {given.shape}"
            )
        full = np.broadcast_to(given, values.shape)
        wrong = seen & ~(np.isfinite(full) & (full > 0))
        if wrong.any():
            at = _first(wrong)
            raise InvalidEventError(
                f"expected a positive, finite sd at observed entries, got {full[at]} at index {at}"
            )
        spread = jnp.asarray(np.where(seen, full, 1.0))
    if time is None:
        when = None
    else:
        given = _numbers("time", time).astype(values.dtype)
        if given.shape != values.shape:
            raise InvalidEventError(
                f"expected time of the shape of y, {values.shape}, got {given.shape}"
            )
        _refuse_infinite("times", given, seen)
        when = jnp.asarray(np.where(seen, given, 0.0))
    return Event(jnp.asarray(np.where(seen, values, 0.0)), jnp.asarray(seen), spread, when)


def stack_events(events: Sequence[Event], *, length: int | None = None) -> Event:
    """A batch of events with numbers of observations of their own.

    Shorter ones are padded with masked entries at the end of their first axis.

        batch = stack_events([as_event(y, time=t) for y, t in records])
        means = in_buckets(posterior.mean, batch)

    Args:
        events: with the same axes after the first; `sd` and `time` in all of them or in none.
        length: of the first axis, at least that of the longest; by default the next power of two,
            so that records of many lengths share few compiled programs.

    Raises:
        InvalidEventError: on no event, events that do not fit together, or too short a length.
    """
    if not events:
        raise InvalidEventError("expected at least one event, got none")
    if any(event.y.ndim == 0 for event in events):
        raise InvalidEventError("expected events with an axis of observations, got a number")
    kinds = {(e.y.shape[1:], e.sd is None, e.time is None) for e in events}
    if len(kinds) != 1:
        raise InvalidEventError(
            "expected events with the same axes after the first, and sd and time in all or in "
            f"none, got {sorted(kinds)} as (axes, no sd, no time)"
        )
    longest = max(event.y.shape[0] for event in events)
    size = 1 << (longest - 1).bit_length() if length is None else length
    if size < longest:
        raise InvalidEventError(f"expected a length of at least {longest}, got {size}")

    def stacked(leaves: list[Any], fill: Any) -> Array:
        arrays = [np.asarray(leaf) for leaf in leaves]
        out = np.full((len(arrays), size, *arrays[0].shape[1:]), fill, arrays[0].dtype)
        for row, array in zip(out, arrays, strict=True):
            row[: array.shape[0]] = array
        return jnp.asarray(out)

    return Event(
        stacked([e.y for e in events], 0.0),
        stacked([e.mask for e in events], False),
        None if events[0].sd is None else stacked([e.sd for e in events], 1.0),
        None if events[0].time is None else stacked([e.time for e in events], 0.0),
    )
