"""The catalogue: one answer for each of many thousand events, resumable, on every device there is.

The work is cut into chunks of events. A chunk is spread over the devices, its answers are written
to a file, and the file is moved into its place: a run that is cut off loses the chunk it was at,
and goes on from there when it is started again. What an event is answered depends on the event,
its number and the key, and on nothing else but rounding: not on the chunk it is in, nor on how many
devices or processes share the work. What rounding may change, [`reprocess`][] says.
"""

import enum
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int
from tqdm import tqdm

from amortlib.calibration.fingerprint import fingerprint
from amortlib.export import CheckpointError, read_arrays, save
from amortlib.types import Array, Event, InvalidEventError, Key, PyTree

__all__ = ["Answer", "Catalogue", "Fallback", "Status", "reprocess", "unusable"]

Answer = Callable[[Event, Key], dict[str, Array]]
"""Of one event: named arrays, among them `status`, a whole number of [`Status`][]."""

Fallback = Callable[[Event, dict[str, np.ndarray], Key], dict[str, np.ndarray]]
"""Of the events that were not trusted, their answers and a key for each, as batches of numpy
arrays and keys: better answers."""


class Status(enum.IntEnum):
    """What became of an event."""

    TRUSTED = 0
    REFINED = 1
    DISTRUSTED = 2
    SOLVED = 3
    REFUSED = 4
    FAILED = 5

    @property
    def words(self) -> str:
        """For a person."""
        return _WORDS[self]


_WORDS = {
    Status.TRUSTED: "the head's answer",
    Status.REFINED: "refined from the head's answer",
    Status.DISTRUSTED: "the head's answer, not to be trusted, and nothing better was made",
    Status.SOLVED: "the solver's answer",
    Status.REFUSED: "no answer: the event itself cannot be used",
    Status.FAILED: "no answer: what came out was not finite",
}


class Catalogue(eqx.Module):
    """The answers to a batch of events, in the order of the events.

    Attributes:
        answers: named arrays with one row an event; zeros where the status is REFUSED or FAILED.
        status: a [`Status`][] an event.
    """

    answers: dict[str, np.ndarray]
    status: Int[np.ndarray, " n"]

    @property
    def answered(self) -> np.ndarray:
        """Which events have an answer."""
        return ~np.isin(self.status, (Status.REFUSED, Status.FAILED))

    def summary(self) -> str:
        """How many events of each status, in words, a line each."""
        counts = [(int((self.status == code).sum()), code.words) for code in Status]
        return "\n".join(f"{count:>8,}  {words}" for count, words in counts if count)


def unusable(events: Event) -> np.ndarray:
    """Which events of a batch hold a value, error bar or time that cannot be used.

    Args:
        events: arrays with a leading axis.

    Returns:
        One boolean an event: true where, at an observed entry, a value or time is not finite, or
        an error bar is not positive.
    """
    mask = np.asarray(events.mask)
    bad = mask & ~np.isfinite(np.asarray(events.y))
    if events.sd is not None:
        sd = np.asarray(events.sd)
        bad |= mask & ~(np.isfinite(sd) & (sd > 0))
    if events.time is not None:
        bad |= mask & ~np.isfinite(np.asarray(events.time))
    return bad.reshape(len(bad), -1).any(axis=1)


def reprocess(
    answer: Answer,
    events: Event,
    directory: str | os.PathLike,
    *,
    key: Key,
    fallback: Fallback | None = None,
    block: int = 32,
    chunk: int = 1024,
    devices: list[jax.Device] | None = None,
    progress: bool = True,
) -> Catalogue:
    """Answer every event, and keep the answers in a directory.

    Started again with the same arguments it goes on where it was cut off. With
    `jax.distributed` every process calls it with the same arguments and a directory that all can
    see; each works on the rows of its own devices.

    Args:
        answer: of one event and a key; jitted and mapped here. An `equinox` module, or a function.
        events: arrays with a leading axis. Those that are [`unusable`][] are refused, each by
            itself, and the others go on.
        directory: where to; made where it does not exist.
        key: event i is answered with this key folded with i.
        fallback: is given the events of a chunk whose status is DISTRUSTED, as one batch, with
            their answers and the key of each, and returns answers of the same names and shapes;
            their status becomes the `status` it returns, SOLVED where it returns none. It is
            called on the process that holds the events. Without it they stay as they are.
        block: events mapped at once on a device. All devices work through blocks of this size,
            so that what a head answers in closed form is the same to the last bit whatever their
            number (as tested on CPUs). What steps on J have made, refined or solved, is the same
            but for rounding: the compiler may lay a loop out anew for another number of blocks,
            and the fallback is given as many events at once as a process holds. Where a solver
            stops by rounding in J, or an event stands at a threshold of its status by no more
            than that, rounding decides.
        chunk: events in a file; rounded up to whole blocks on every device.
        devices: by default all there are, of all processes.
        progress: show a bar, on standard error.

    Raises:
        ValueError: on sizes below one, or an answer without a status.
        InvalidEventError: on an empty batch, a `y` that is not of floats, or a mask that is not
            boolean or of another shape.
        CheckpointError: where the directory holds another run: other events, weights or key.
    """
    n = _check(events, block, chunk)
    mesh = Mesh(np.array(jax.devices() if devices is None else devices), ("events",))
    size = block * mesh.size * -(-chunk // (block * mesh.size))
    program = _program(answer, mesh, block)
    data = jax.tree.map(np.asarray, events)
    bad = unusable(data)
    # A refused event is answered like the others, as one in which nothing was seen: its answer
    # is thrown away, and no program has to know.
    seen = data.mask & ~bad.reshape(n, *[1] * (data.mask.ndim - 1))
    data = eqx.tree_at(lambda e: (e.y, e.mask), data, (np.where(seen, data.y, 0), seen))

    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    run = {
        "events": _digest(events),
        "number": n,
        "answer": fingerprint(answer),
        "key": np.asarray(jax.random.key_data(key)).ravel().tolist(),
        "random": str(jax.random.key_impl(key)),
        "fallback": fallback is not None,
    }
    left = np.ones(n, bool)
    for rows, _ in _parts(path, run):
        left[rows] = False
    starts = [start for start in range(0, n, size) if left[start : start + size].any()]
    _meet("listed")  # before anybody writes: all must agree on what is left
    todo = tqdm(starts, disable=not progress, unit="chunk", leave=False, desc="catalogue")
    for start in todo:
        rows = np.minimum(np.arange(start, start + size), n - 1)
        mine, found = _local(program(data, rows, key))
        keep = mine + start < n  # what the last chunk was filled up with
        mine, found = mine[keep] + start, {k: v[keep] for k, v in found.items()}
        found = _settle(found, mine, bad, data, key, fallback)
        part = path / f"{start:010d}.{jax.process_index():04d}.safetensors"
        save(part, {"row": mine, **found}, settings=run)
    _meet("written")
    return _gather(path, run, n)


def _check(events: Event, block: int, chunk: int) -> int:
    if block < 1 or chunk < 1:
        raise ValueError(f"expected block >= 1 and chunk >= 1, got {block}, {chunk}")
    y, mask = np.asarray(events.y), np.asarray(events.mask)
    if y.ndim == 0 or y.size == 0:
        raise InvalidEventError(f"expected a batch of at least one event, got y of {y.shape}")
    if not np.issubdtype(y.dtype, np.floating):
        raise InvalidEventError(f"expected y of floats, got dtype {y.dtype}")
    if mask.dtype != np.bool_ or mask.shape != y.shape:
        raise InvalidEventError(
            f"expected a boolean mask of shape {y.shape}, got {mask.dtype} of {mask.shape}"
        )
    return len(y)


def _program(answer: Answer, mesh: Mesh, block: int) -> Callable[..., dict[str, Array]]:
    """Answers to the rows of a chunk, one row of blocks a device."""
    model, static = eqx.partition(answer, eqx.is_array)
    spread, everywhere = PartitionSpec("events"), PartitionSpec()

    def on_one_device(model: PyTree, key: Key, rows: Array, events: Event) -> dict[str, Array]:
        one = eqx.combine(model, static)

        def of_block(part: tuple[Array, Event]) -> dict[str, Array]:
            def of_event(row: Array, event: Event) -> dict[str, Array]:
                return one(event, jax.random.fold_in(key, row))

            return jax.vmap(of_event)(*part)

        cut = jax.tree.map(lambda a: a.reshape(-1, block, *a.shape[1:]), (rows, events))
        out = jax.lax.map(of_block, cut)
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)

    mapped = jax.jit(
        jax.shard_map(
            on_one_device,
            mesh=mesh,
            in_specs=(everywhere, everywhere, spread, spread),
            out_specs=spread,
            check_vma=False,  # nothing is exchanged between devices, so there is nothing to check
        )
    )

    def run(data: Event, rows: np.ndarray, key: Key) -> dict[str, Array]:
        shard, copy = NamedSharding(mesh, spread), NamedSharding(mesh, everywhere)

        def place(array: np.ndarray, sharding: NamedSharding) -> Array:
            array = np.asarray(array)
            array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
            return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])

        words = place(np.asarray(jax.random.key_data(key)), copy)
        keys = jax.random.wrap_key_data(words, impl=jax.random.key_impl(key))
        some = jax.tree.map(lambda a: place(a[rows], shard), data)
        weights = jax.tree.map(lambda a: place(np.asarray(a), copy), model)
        out = mapped(weights, keys, place(rows.astype(np.int32), shard), some)
        if not isinstance(out, dict) or "status" not in out:
            raise ValueError(
                "expected the answer to be a dictionary with a `status`, got "
                f"{sorted(out) if isinstance(out, dict) else type(out).__name__}"
            )
        return out

    return run


def _local(out: dict[str, Array]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rows of a chunk that this process holds, and what stands in them."""
    rows, found = np.zeros(0, int), {}
    for name, array in out.items():
        parts = {s.index[0].start or 0: np.asarray(s.data) for s in array.addressable_shards}
        found[name] = np.concatenate([parts[start] for start in sorted(parts)])
        rows = np.concatenate([start + np.arange(len(parts[start])) for start in sorted(parts)])
    return rows, found


def _settle(
    found: dict[str, np.ndarray],
    rows: np.ndarray,
    bad: np.ndarray,
    data: Event,
    key: Key,
    fallback: Fallback | None,
) -> dict[str, np.ndarray]:
    """Give each row its last status: refuse, ask the solver, and mark what is not finite."""
    found = {name: np.array(array) for name, array in found.items()}
    status = found["status"] = found["status"].astype(np.int8)
    status[bad[rows]] = Status.REFUSED
    unsure = (status == Status.DISTRUSTED) | (~finite_rows(found) & ~bad[rows])
    ask = np.flatnonzero(unsure)
    if fallback is not None and ask.size:
        some = jax.tree.map(lambda a: a[rows[ask]], data)
        given = {name: array[ask] for name, array in found.items()}
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(rows[ask]))
        better = fallback(some, given, keys)
        for name in found:
            if name == "status":
                continue
            if name not in better or np.shape(better[name]) != given[name].shape:
                raise ValueError(
                    f"expected the fallback to return {name} of shape {given[name].shape}, got "
                    f"{np.shape(better[name]) if name in better else 'nothing of this name'}"
                )
            found[name][ask] = np.asarray(better[name])
        status[ask] = np.asarray(better.get("status", Status.SOLVED))
    lost = ~finite_rows(found) & (status != Status.REFUSED)
    status[lost] = Status.FAILED
    empty = np.isin(status, (Status.REFUSED, Status.FAILED))
    for name in found:
        if name != "status":
            found[name][empty] = 0
    return found


def finite_rows(found: dict[str, np.ndarray]) -> np.ndarray:
    """Which rows of a batch of answers hold nothing but finite numbers."""
    good = np.ones(len(found["status"]), bool)
    for array in found.values():
        if np.issubdtype(array.dtype, np.floating):
            good &= np.isfinite(array).reshape(len(array), -1).all(axis=1)
    return good


def _digest(events: Event) -> str:
    """SHA-256 over what can be read of the events: not what stands at masked entries."""
    digest = hashlib.sha256()
    mask = np.asarray(events.mask)
    for name in ("y", "mask", "sd", "time"):
        value = getattr(events, name)
        array = np.where(mask, np.asarray(value), 0) if value is not None else np.zeros(0)
        digest.update(f"{name} {array.dtype.name} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _parts(path: Path, run: dict[str, Any]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Rows and answers of every file; one of another run is an error, a damaged one is no file."""
    for part in sorted(path.glob("[0-9]*.safetensors")):
        try:
            arrays, found = read_arrays(part)
        except CheckpointError as err:
            warnings.warn(f"{err}; its events are answered again", stacklevel=3)
            continue
        differ = [name for name in run if found.get(name) != run[name]]
        if differ:
            raise CheckpointError(
                f"{part}: expected a part of this run, got one with another {', '.join(differ)}; "
                "give another directory, or empty this one"
            )
        plain = {name.removeprefix("['").removesuffix("']"): a for name, a in arrays.items()}
        yield plain.pop("row"), plain


def _gather(path: Path, run: dict[str, Any], n: int) -> Catalogue:
    answers: dict[str, np.ndarray] = {}
    filled = np.zeros(n, bool)
    for rows, arrays in _parts(path, run):
        filled[rows] = True
        for name, array in arrays.items():
            answers.setdefault(name, np.zeros((n, *array.shape[1:]), array.dtype))[rows] = array
    if not filled.all():
        raise CheckpointError(
            f"{path}: expected the answers to {n} events, found {int(filled.sum())}; run it again"
        )
    status = answers.pop("status")
    return Catalogue(answers, status)


def _meet(place: str) -> None:
    """Wait for the other processes, where there are any."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"amortlib catalogue {place}")
