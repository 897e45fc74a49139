"""Heads and arrays as the bytes that the live widgets read (`js/weights.mjs`)."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from amortlib.encoders import FlatEncoder, SiteEncoder
from amortlib.export import save
from amortlib.heads.regression import CholeskyHead, DiagonalHead, InformationHead
from amortlib.posterior import AmortizedPosterior

_HEADS = {InformationHead: "information", CholeskyHead: "cholesky", DiagonalHead: "diagonal"}
_ACTIVATIONS = {
    jax.nn.gelu: "gelu",
    jax.nn.relu: "relu",
    jax.nn.silu: "silu",
    jax.nn.softplus: "softplus",
    jnp.tanh: "tanh",
}


def pack(tree: Any, settings: dict[str, Any] | None = None) -> bytes:
    """The arrays of a tree as the content of a file of `amortlib.export.save`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packed"
        save(path, tree, settings=settings)
        return path.read_bytes()


def _named(function: Any) -> str:
    if isinstance(function, functools.partial):
        function = function.func
    for known, name in _ACTIVATIONS.items():
        if function is known:
            return name
    raise ValueError(
        f"expected an activation that the pages know, {sorted(_ACTIVATIONS.values())}, "
        f"got {function}"
    )


def pack_posterior(posterior: AmortizedPosterior) -> bytes:
    """A regression head with its encoder, and what its arrays alone do not say.

    Raises:
        ValueError: on a head, an encoder or an activation that the JavaScript does not know.
    """
    head, encoder = posterior.head, posterior.encoder
    if type(head) not in _HEADS:
        known = sorted(kind.__name__ for kind in _HEADS)
        raise ValueError(f"expected a head that the pages know, {known}, got {type(head).__name__}")
    if not isinstance(encoder, SiteEncoder | FlatEncoder):
        raise ValueError(f"expected a SiteEncoder or FlatEncoder, got {type(encoder).__name__}")
    weight = encoder.mlp.layers[0].weight
    settings = {
        "head": _HEADS[type(head)],
        "activation": _named(encoder.mlp.activation),
        "radius": encoder.radius if isinstance(encoder, SiteEncoder) else 0,
        "uses_sd": encoder.uses_sd,
        "eps": float(jnp.finfo(weight.dtype).eps),
    }
    return pack(eqx.filter(posterior, eqx.is_array), settings)
