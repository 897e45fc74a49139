"""Training on pairs that exist already: ten thousand simulations of a model too dear to run again.

A simulator on the device gives [`fit`][amortlib.training.fit] fresh pairs at every step. Where
the pairs are a fixed array, minibatches have to be drawn from it, and some pairs held back to
see when the model begins to learn them by heart. Masks cost nothing to simulate: they can be
drawn fresh at every step all the same.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from amortlib.types import Array, Event, Key, as_event

__all__ = ["AbstractBatches", "InvalidPairsError", "Pairs", "from_pairs"]

_ROUNDS = 8


class InvalidPairsError(ValueError):
    """Pairs that cannot be trained on: the message names the row."""


class AbstractBatches(eqx.Module):
    """A stream of minibatches that has to know which step it is at.

    [`fit`][amortlib.training.fit] takes either a function from a key to a batch, or one of these.
    Batch i is a function of the run's key and i alone, so that a resumed run sees the same ones.
    """

    @abc.abstractmethod
    def at(self, step: Int[Array, ""] | int, *, key: Key) -> Any:
        """The minibatch of a step.

        Args:
            step: counted from 0; may be traced.
            key: the key of the whole run, the same at every step.
        """


class Pairs(AbstractBatches):
    """Minibatches of a fixed array of pairs; made by [`from_pairs`][].

    Attributes:
        x: states, `(n, d)`.
        events: what was seen of each, with a leading axis of n.
        gaps: hides more of each event at every step it is used, or `None`.
        batch: pairs in a minibatch.
        replace: draw every pair anew from all of them, instead of going through all in a shuffled
            order before any comes again.
    """

    x: Float[Array, "n ..."]
    events: Event
    gaps: Callable[[Key, tuple[int, ...]], Array] | None
    batch: int = eqx.field(static=True)
    replace: bool = eqx.field(static=True)

    def __len__(self) -> int:
        """How many pairs there are to train on."""
        return self.x.shape[0]

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every pair is used at most once; fewer than `batch` are left out."""
        return len(self) // self.batch

    def at(self, step: Int[Array, ""] | int, *, key: Key) -> tuple[Array, Event]:
        """The minibatch of a step: of a shuffled epoch, or with replacement."""
        # An array, so that another step is not another program.
        return self._at(jnp.asarray(step), key)

    @eqx.filter_jit
    def _at(self, step: Int[Array, ""], key: Key) -> tuple[Array, Event]:
        k_order, k_mask = jax.random.split(key)
        if self.replace:
            k_step = jax.random.fold_in(k_order, step)
            rows = jax.random.randint(k_step, (self.batch,), 0, len(self))
        else:
            epoch, place = jnp.divmod(step, self.steps_per_epoch)
            position = place * self.batch + jnp.arange(self.batch)
            rows = _shuffled(position, len(self), key=jax.random.fold_in(k_order, epoch))
        return self._rows(rows, jax.random.fold_in(k_mask, step))

    def _rows(self, rows: Int[Array, " b"], key: Key) -> tuple[Array, Event]:
        x, events = jax.tree.map(lambda leaf: leaf[rows], (self.x, self.events))
        if self.gaps is not None:
            events = _hide(events, self.gaps, key)
        return x, events


def _hide(events: Event, gaps: Callable[[Key, tuple[int, ...]], Array], key: Key) -> Event:
    """More gaps over a batch of events; what was not seen stays unseen."""
    n, *shape = events.mask.shape
    drawn = jax.vmap(lambda k: gaps(k, tuple(shape)))(jax.random.split(key, n))
    if drawn.shape != events.mask.shape or drawn.dtype != jnp.bool_:
        raise InvalidPairsError(
            f"expected gaps(key, shape) to return booleans of shape {tuple(shape)}, "
            f"got {drawn.dtype} of shape {drawn.shape[1:]}"
        )
    return eqx.tree_at(lambda e: e.mask, events, events.mask & drawn)


def _shuffled(position: Int[Array, " b"], n: int, *, key: Key) -> Int[Array, " b"]:
    """Where a random permutation of 0, ..., n - 1 sends some positions, at a cost of O(b).

    `jax.random.permutation` sorts all n numbers to tell us b of them: on one core 3.5 ms for
    n = 10,000 and 126 ms for 100,000, more than the training step. A Feistel network permutes the
    pairs (left, right) of a grid with at least n cells whatever its round function is, and walking
    on until a cell below n is reached permutes 0, ..., n - 1 alone: Black and Rogaway (2002),
    *Ciphers with arbitrary finite domains*, sections 4 and 5. It does not reach all n!
    permutations, and for shuffling minibatches need not.
    """
    rows = int(np.ceil(np.sqrt(n)))
    cols = -(-n // rows)
    words = jax.random.bits(key, (_ROUNDS,), jnp.uint32)

    def scramble(x: Array, word: Array) -> Array:
        """The finaliser of MurmurHash3, a mixing of 32 bits."""
        x = (x ^ word) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    def once(cell: Array) -> Array:
        left, right = cell // cols, cell % cols
        for i in range(0, _ROUNDS, 2):
            left = (left + scramble(right, words[i]) % rows) % rows
            right = (right + scramble(left, words[i + 1]) % cols) % cols
        return left * cols + right

    start = once(position.astype(jnp.uint32))
    cells = jax.lax.while_loop(
        lambda cells: jnp.any(cells >= n),
        lambda cells: jnp.where(cells >= n, once(cells), cells),
        start,
    )
    return cells.astype(position.dtype)


def from_pairs(
    x: Any,
    events: Any,
    batch: int,
    *,
    key: Key,
    validation: float = 0.1,
    gaps: Callable[[Key, tuple[int, ...]], Array] | None = None,
    validation_gaps: Callable[[Key, tuple[int, ...]], Array] | None = None,
    replace: bool = False,
) -> tuple[Pairs, tuple[Array, Event] | None]:
    """Minibatches of a fixed array of simulated pairs, and some pairs held out.

        batches, held_out = from_pairs(x, y, 256, key=key, gaps=ContiguousGaps(0.0, 0.5))
        fit(model, nll, batches, validation=held_out, patience=20, ...)

    Every epoch goes through all pairs in another random order; fewer than `batch` of them are
    left out, others each time. With few pairs a model learns them by heart: give the validation
    to `fit`, with `patience`, and the model of the least validation loss is returned.

    Args:
        x: states, `(n, d)`.
        events: an [`Event`][amortlib.types.Event] with a leading axis of n, or an array of
            observed values with such an axis, where NaN stands for what was not observed.
        batch: pairs in a minibatch.
        key: chooses the pairs that are held out, and their masks.
        validation: share of the pairs to hold out, from 0 (none) to less than 1.
        gaps: a gap pattern; a fresh mask is drawn at every use of a pair, and hides entries that
            were observed. What was not observed stays so.
        validation_gaps: the pattern for the held-out pairs, drawn once: another than `gaps`, to
            see what becomes of gaps that training has never met. By default `gaps`.
        replace: draw every pair of a minibatch from all of them, with replacement.

    Returns:
        The minibatches, and the held-out pairs with their masks as a batch, or `None`.

    Raises:
        InvalidPairsError: on arrays that do not fit together, values that are not finite (at
            observed entries; what stands at others does not matter), or too few pairs. The row
            is named.
    """
    states = np.asarray(x)
    if states.ndim < 2 or not np.issubdtype(states.dtype, np.floating):
        raise InvalidPairsError(
            f"expected x of shape (n, d) and of floats, got {states.dtype}{states.shape}"
        )
    n = states.shape[0]
    seen = events if isinstance(events, Event) else _as_events(events)
    for name, leaf in (("y", seen.y), ("mask", seen.mask), ("sd", seen.sd), ("time", seen.time)):
        if leaf is not None and leaf.shape[:1] != (n,):
            raise InvalidPairsError(
                f"expected an event for each of the {n} rows of x, got {name} of shape {leaf.shape}"
            )
    if seen.y.ndim < 2:
        raise InvalidPairsError(f"expected y of shape (n, ...), got {seen.y.shape}")
    _check_rows("x", np.isfinite(states), states)
    try:
        seen = as_event(seen.y, seen.mask, seen.sd, time=seen.time)
    except ValueError as err:
        raise InvalidPairsError(
            f"expected events as they can be trained on; the first index is the row: {err}"
        ) from err
    if not 0.0 <= validation < 1.0:
        raise InvalidPairsError(f"expected a share 0 <= validation < 1, got {validation}")
    held = max(1, round(validation * n)) if validation else 0
    if not 1 <= batch <= n - held:
        raise InvalidPairsError(
            f"expected 1 <= batch <= {n - held}, the number of pairs that are left of {n} when "
            f"{held} are held out, got {batch}"
        )

    k_split, k_mask = jax.random.split(key)
    order = jax.random.permutation(k_split, n)
    arrays = (jnp.asarray(states), seen)
    train = jax.tree.map(lambda leaf: leaf[order[held:]], arrays)
    pairs = Pairs(*train, gaps=gaps, batch=batch, replace=replace)
    if not held:
        return pairs, None
    x_held, events_held = jax.tree.map(lambda leaf: leaf[order[:held]], arrays)
    pattern = gaps if validation_gaps is None else validation_gaps
    if pattern is not None:
        events_held = _hide(events_held, pattern, k_mask)
    return pairs, (x_held, events_held)


def _as_events(y: Any) -> Event:
    try:
        return as_event(y)
    except ValueError as err:
        raise InvalidPairsError(f"the first index is the row: {err}") from err


def _check_rows(name: str, good: np.ndarray, values: np.ndarray) -> None:
    rows = good.reshape(good.shape[0], -1).all(axis=1)
    if not rows.all():
        row = int(np.argmin(rows))
        raise InvalidPairsError(
            f"expected finite values in {name}, got {values[row]} in row {row} "
            f"({int((~rows).sum())} such rows)"
        )
