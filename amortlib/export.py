"""Save and load: arrays and a header, never code.

A file is in the safetensors format: named arrays behind a JSON header. The header's metadata
holds the version of this format, the settings that the model was built from, and a SHA-256 digest
of the whole file, so that a damaged file is found out and never half-used. Files are written
beside their place and moved into it: a reader sees the old file or the new one.
"""

import hashlib
import inspect
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as _read_tensors
from safetensors.numpy import save as _write_tensors

from amortlib.types import PyTree

__all__ = [
    "FORMAT_VERSION",
    "CheckpointError",
    "build_and_load",
    "load",
    "read_arrays",
    "read_settings",
    "save",
]

FORMAT_VERSION = 1
_MAGIC = "amortlib"
_TYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64"),
)
_Tree = TypeVar("_Tree")


class CheckpointError(ValueError):
    """A file that cannot be loaded: the message says what was expected and what came."""


def _named(tree: PyTree) -> tuple[list[str], list[Any], Any]:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path) or "value" for path, _ in leaves]
    return names, [leaf for _, leaf in leaves], treedef


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_numpy(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


# Stands where the digest goes while the digest is computed: it covers every byte of the file but
# its own. Quotes inside a header's strings are escaped, so this is found in one place only.
_SEAL = b'"sha256":"%s"'
_UNSEALED = _SEAL % (b"0" * 64)


def _sealed(data: bytes) -> bytes:
    return data.replace(_UNSEALED, _SEAL % hashlib.sha256(data).hexdigest().encode(), 1)


def _is_whole(data: bytes, digest: Any) -> bool:
    if not isinstance(digest, str) or not digest.isascii():
        return False
    seal = _SEAL % digest.encode()
    return seal in data and _sealed(data.replace(seal, _UNSEALED, 1)) == data


def save(path: str | os.PathLike, tree: PyTree, *, settings: dict[str, Any] | None = None) -> None:
    """Write the arrays of `tree` to one file.

    Args:
        path: where to; an existing file is replaced in one move.
        tree: any pytree; leaves that are not arrays (activation functions) are left to whoever
            builds the template to load into.
        settings: what the model was built from, as JSON can hold it; see [`build_and_load`][].

    Raises:
        CheckpointError: where `settings` is not JSON, or an array is of a type that the format
            cannot give back (bfloat16, complex128).
        OSError: where the file cannot be written; nothing is left behind.
    """
    names, leaves, _ = _named(eqx.filter(tree, eqx.is_array))
    arrays = {
        # A copy in C order: the writer takes the buffer as it lies.
        name: np.array(_to_numpy(leaf), order="C")
        for name, leaf in zip(names, leaves, strict=True)
    }
    for name, array in arrays.items():
        if array.dtype.name not in _TYPES:
            raise CheckpointError(f"expected {name} to be one of {_TYPES}, got {array.dtype}")
    try:
        text = json.dumps({} if settings is None else settings, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as err:
        raise CheckpointError(f"expected settings that JSON can hold: {err}") from err
    header = {
        "format": _MAGIC,
        "version": str(FORMAT_VERSION),
        "settings": text,
        "sha256": "0" * 64,
    }
    data = _sealed(_write_tensors(arrays, metadata=header))
    target = Path(path)
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    try:
        # Not `tempfile`, whose files nobody but their owner may read: these follow the umask.
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and settings of a file, once every byte of it has been checked."""
    try:
        data = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as err:
        raise CheckpointError(f"expected a checkpoint at {path}, found no file") from err
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise CheckpointError(
            f"{path}: the file is cut short or is no checkpoint: {len(data)} bytes, "
            f"of which the header alone should take {length + 8}"
        )
    try:
        header = json.loads(data[8 : 8 + length])
        metadata = header.get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError) as err:
        raise CheckpointError(f"{path}: the header is not readable; is it a checkpoint?") from err
    if not isinstance(metadata, dict) or metadata.get("format") != _MAGIC:
        raise CheckpointError(f"{path}: expected a file written by amortlib.save")
    if metadata.get("version") != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{path}: expected format version {FORMAT_VERSION}, got {metadata.get('version')}; "
            "load it with the release that wrote it and save it again"
        )
    if not _is_whole(data, metadata.get("sha256")):
        raise CheckpointError(
            f"{path}: the file is damaged or cut short: it does not match its digest"
        )
    try:
        return _read_tensors(data), json.loads(metadata["settings"])
    except (SafetensorError, ValueError, KeyError) as err:
        raise CheckpointError(f"{path}: the file was not written whole: {err}") from err


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """The settings a file was saved with.

    Raises:
        CheckpointError: where the file is missing, damaged, or of another version.
    """
    return _read(path)[1]


def read_arrays(
    path: str | os.PathLike,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays in a file by their names, as paths into the tree, and its settings.

    For a file whose tree need not be built again; the arrays cannot be written to.

    Raises:
        CheckpointError: where the file is missing, damaged, or of another version.
    """
    return _read(path)


def load(path: str | os.PathLike, like: _Tree) -> _Tree:
    """Read a file into a tree of the same structure.

    Args:
        path: the file.
        like: a template: its arrays are replaced, everything else is kept.

    Raises:
        CheckpointError: where the file is missing, damaged, of another version, or holds other
            arrays than the template (each difference is named).
    """
    arrays, _ = _read(path)
    dynamic, static = eqx.partition(like, eqx.is_array)
    names, leaves, treedef = _named(dynamic)
    missing, extra = set(names) - set(arrays), set(arrays) - set(names)
    if missing or extra:
        raise CheckpointError(
            f"{path}: expected the arrays of the template; missing {sorted(missing)[:4]}, "
            f"not expected {sorted(extra)[:4]}"
        )
    loaded = []
    for name, leaf in zip(names, leaves, strict=True):
        array, want = arrays[name], _to_numpy(leaf)
        if array.shape != want.shape or array.dtype != want.dtype:
            raise CheckpointError(
                f"{path}: expected {name} to be {want.dtype}{want.shape}, "
                f"got {array.dtype}{array.shape}"
            )
        if _is_key(leaf):
            impl = jax.random.key_impl(leaf)
            loaded.append(jax.random.wrap_key_data(jnp.asarray(array), impl=impl))
        elif isinstance(leaf, np.ndarray):
            loaded.append(array.copy())  # the bytes of the file cannot be written to
        else:
            loaded.append(jnp.asarray(array))
    return eqx.combine(jax.tree_util.tree_unflatten(treedef, loaded), static)


def build_and_load(path: str | os.PathLike, build: Callable[..., _Tree]) -> _Tree:
    """Build a template from the settings in the file, and load into it.

    Args:
        path: the file.
        build: called as `build(**settings)`; it is yours, the file only says with what.

    Raises:
        CheckpointError: as [`load`][], and where `build` does not take these settings.
    """
    settings = read_settings(path)
    try:
        inspect.signature(build).bind(**settings)
    except TypeError as err:
        name = getattr(build, "__qualname__", repr(build))
        raise CheckpointError(
            f"{path}: expected {name} to take the settings {settings}: {err}"
        ) from err
    return load(path, build(**settings))
