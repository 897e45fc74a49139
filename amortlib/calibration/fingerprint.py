"""A digest of weights, or of a problem, so that a report cannot be shown for another one."""

import dataclasses
import functools
import hashlib
import types
from typing import Any

import jax
import numpy as np

from amortlib.energy import Energy

__all__ = ["fingerprint", "problem_fingerprint"]


def fingerprint(tree: Any) -> str:
    """SHA-256 over the classes, settings, functions and arrays of a model, in hexadecimal.

    Arrays of floats count in single precision: a model and the same in double are one. A
    function written in Python counts by its name, its code and what it closes over, and so
    differs from one version of Python to another; then the digest says "another", which is the
    safe side to err on.
    """
    digest = hashlib.sha256()
    _walk(tree, digest.update, ())
    return digest.hexdigest()


def problem_fingerprint(energy: Energy, noise: Any = None) -> str:
    """Digest of prior, forward model and noise: what has to be the same for head and oracle.

    Args:
        energy: J, which holds the prior, the forward model and, where it is fixed, R.
        noise: the simulator's noise.
    """
    return fingerprint((energy.prior, energy.forward, energy.obs_sd, noise))


def _walk(node: Any, put: Any, above: tuple[int, ...]) -> None:
    def say(text: str) -> None:
        put(f"{len(text)}:{text};".encode())

    if id(node) in above:  # a function that closes over itself
        say("above")
        return
    above = (*above, id(node))
    if isinstance(node, jax.Array | np.ndarray | np.generic):
        if isinstance(node, jax.Array) and jax.dtypes.issubdtype(node.dtype, jax.dtypes.prng_key):
            node = jax.random.key_data(node)
        array = np.asarray(node)
        if np.issubdtype(array.dtype, np.floating):
            array = array.astype(np.float32)
        elif np.issubdtype(array.dtype, np.integer):
            array = array.astype(np.int64)
        say(f"array {array.dtype.name} {array.shape}")
        put(np.ascontiguousarray(array).tobytes())
    elif node is None or isinstance(node, bool | int | str | bytes | complex):
        say(f"{type(node).__name__} {node!r}")
    elif isinstance(node, float):
        say(f"float {float(np.float32(node))!r}")
    elif isinstance(node, list | tuple):
        say(f"{type(node).__name__} {len(node)}")
        for item in node:
            _walk(item, put, above)
    elif isinstance(node, dict):
        say(f"dict {len(node)}")
        for name in sorted(node, key=str):
            say(str(name))
            _walk(node[name], put, above)
    elif isinstance(node, types.CodeType):
        say(f"code {node.co_names} {node.co_code.hex()}")
        _walk(node.co_consts, put, above)
    elif isinstance(node, functools.partial):
        say("partial")
        _walk((node.func, node.args, node.keywords), put, above)
    elif isinstance(node, types.MethodType):
        say(f"method {node.__name__}")
        _walk(node.__self__, put, above)
    elif isinstance(node, type):
        say(f"class {node.__module__}.{node.__qualname__}")
    elif isinstance(node, types.FunctionType):
        say(f"function {node.__module__}.{node.__qualname__}")
        cells = [cell.cell_contents for cell in node.__closure__ or ()]
        _walk([node.__code__, node.__defaults__, node.__kwdefaults__, cells], put, above)
    elif dataclasses.is_dataclass(node):
        say(f"object {type(node).__module__}.{type(node).__qualname__}")
        for field in dataclasses.fields(node):
            say(field.name)
            _walk(getattr(node, field.name, None), put, above)
    elif hasattr(node, "__wrapped__"):  # jitted, or with a derivative of its own
        say(f"wrapped {type(node).__name__}")
        _walk(node.__wrapped__, put, above)
    else:
        name = getattr(node, "__qualname__", type(node).__qualname__)
        say(f"other {type(node).__module__} {name}")
