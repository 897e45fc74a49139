"""Heads and arrays as the bytes that the live widgets read (`js/weights.mjs`)."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import flowjax.bijections as bij
import jax
import jax.numpy as jnp
from paramax import unwrap

from _kit.windows import FixedSteps
from amortlib.dynamics import Lorenz63
from amortlib.encoders import FlatEncoder, ScaledEncoder, SiteEncoder
from amortlib.export import save
from amortlib.heads import FlowHead, MixtureHead, ScoreHead
from amortlib.heads.flow import SPLINE_INTERVAL
from amortlib.heads.regression import CholeskyHead, DiagonalHead, InformationHead
from amortlib.heads.score import EDM
from amortlib.observation import Select
from amortlib.posterior import AmortizedPosterior
from amortlib.problems import InverseProblem, SignLost

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
    if isinstance(encoder, ScaledEncoder):
        parts, activation = _encoder(posterior)
        settings = {"head": _HEADS[type(head)], "scaled": True, "activation": activation}
        return pack(eqx.filter(parts | {"head": head}, eqx.is_array), settings)
    if not isinstance(encoder, SiteEncoder | FlatEncoder):
        raise ValueError(f"expected a SiteEncoder or FlatEncoder, got {type(encoder).__name__}")
    weight = encoder.mlp.layers[0].weight
    settings = {
        "head": _HEADS[type(head)],
        "scaled": False,
        "activation": _named(encoder.mlp.activation),
        "radius": encoder.radius if isinstance(encoder, SiteEncoder) else 0,
        "uses_sd": encoder.uses_sd,
        "eps": float(jnp.finfo(weight.dtype).eps),
    }
    return pack(eqx.filter(posterior, eqx.is_array), settings)


def window_settings(problem: InverseProblem) -> dict[str, Any]:
    """What `js/lorenz.mjs` has to know of a window of Lorenz-63 in plain Runge-Kutta steps.

    Raises:
        ValueError: on another forward model or operator.
    """
    window = problem.forward
    if not isinstance(window, FixedSteps) or not isinstance(window.dynamics, Lorenz63):
        raise ValueError(f"expected FixedSteps of Lorenz63, got {type(window).__name__}")
    sees = window.operator
    if isinstance(sees, Select):
        seen = {"components": list(sees.components), "stride": sees.stride}
    elif isinstance(sees, SignLost):
        seen = {"unit": sees.unit, "stride": sees.stride}
    else:
        raise ValueError(f"expected Select or SignLost, got {type(sees).__name__}")
    model = window.dynamics
    return {
        "parameters": [float(model.sigma), float(model.rho), float(model.beta)],
        "dt": float(window.dt),
        "states": window.states,
        "substeps": window.substeps,
        "sees": seen,
    }


def _encoder(posterior: AmortizedPosterior) -> tuple[dict[str, Any], str]:
    """A plain encoder and the units it reads in, and the name of its activation."""
    scaled = posterior.encoder
    if not isinstance(scaled, ScaledEncoder) or not isinstance(scaled.inner, FlatEncoder):
        raise ValueError(f"expected a scaled FlatEncoder, got {type(scaled).__name__}")
    if scaled.uses_sd or scaled.inner.obs_shape is None:
        raise ValueError("expected an encoder of a fixed shape that reads no error bars")
    shape = scaled.inner.obs_shape
    units = {
        "centre": jnp.broadcast_to(scaled.centre.value, shape).reshape(-1),
        "scale": jnp.broadcast_to(scaled.scale.value, shape).reshape(-1),
    }
    return {"net": scaled.inner.mlp, **units}, _named(scaled.inner.mlp.activation)


def pack_flow(posterior: AmortizedPosterior) -> bytes:
    """A flow head with its encoder, for `js/flow.mjs`.

    Raises:
        ValueError: on a head, a base or an encoder that the JavaScript does not know.
    """
    head = posterior.head
    if not isinstance(head, FlowHead):
        raise ValueError(f"expected a FlowHead, got {type(head).__name__}")
    if not all(isinstance(base, CholeskyHead) for base in head.bases):
        raise ValueError("expected bases that are Cholesky heads, or a fixed one")
    parts, activation = _encoder(posterior)
    stacked = unwrap(head.flow).bijection
    layer, turned = stacked.bijections if isinstance(stacked, bij.Chain) else (stacked, None)
    coupling = isinstance(layer, bij.Coupling)
    net = layer.conditioner if coupling else layer.masked_autoregressive_mlp
    count, dim = net.layers[0].weight.shape[0], layer.shape[0]
    order = jnp.zeros((count, 1), int) if turned is None else turned.permutation[0]
    outputs = net.layers[-1].bias.shape[-1] // (dim - dim // 2 if coupling else dim)
    spline = outputs > 2  # an affine map has a shift and a scale
    tree = parts | {
        "flow": net,
        "order": order,
        "project": head.project,
        "offsets": head.offsets,
        "logits": head.logits,
        "bases": list(head.bases),
        "prior": head.prior.tree,
    }
    settings = {
        "head": "flow",
        "activation": activation,
        "layers": {
            "kind": "coupling" if coupling else "autoregressive",
            "transformer": "spline" if spline else "affine",
            "knots": (outputs - 6) // 3 if spline else 0,
            "interval": SPLINE_INTERVAL,
            "activation": _named(net.activation),
        },
    }
    return pack(eqx.filter(tree, eqx.is_array), settings)


def pack_score(posterior: AmortizedPosterior) -> bytes:
    """A score head over a mixture of Gaussians with EDM's noise levels, for `js/score.mjs`.

    Raises:
        ValueError: on a head, a base, noise levels or an encoder that the JavaScript does not know.
    """
    head = posterior.head
    if not isinstance(head, ScoreHead) or not isinstance(head.base, MixtureHead):
        raise ValueError(f"expected a ScoreHead over a mixture, got {type(head).__name__}")
    if not isinstance(head.noise, EDM) or head.noise.sigma_data != 1.0:
        raise ValueError(f"expected the levels of EDM with sigma_data 1, got {head.noise}")
    parts, activation = _encoder(posterior)
    settings = {
        "head": "score",
        "activation": activation,
        "components": head.base.components,
        "depth": head.net.depth,
        "width": head.net.width,
        "noise": {name: getattr(head.noise, name) for name in ("sigma_min", "sigma_max", "rho")},
    }
    tree = parts | {"score": head.net, "base": head.base}
    return pack(eqx.filter(tree, eqx.is_array), settings)
