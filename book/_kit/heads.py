"""Heads that pages load instead of training: how each is built, made, and read back.

Weights are made by `python -m benchmarks.NAME` (`make_weights`, `fourdvarnet`, `flow_lorenz63`,
`bimodal`), which records what they reach. `retrain=True` runs that recipe on the spot instead of
reading its file, and writes nothing; the recipes are in the repository, beside the book.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from amortlib.encoders import FlatEncoder, ScaledEncoder
from amortlib.energy import Energy
from amortlib.export import build_and_load, read_settings
from amortlib.heads import CholeskyHead
from amortlib.posterior import (
    AmortizedPosterior,
    flow_posterior,
    regression_posterior,
    score_posterior,
)
from amortlib.problems import InverseProblem, lorenz63, lorenz63_sign_lost, ornstein_uhlenbeck
from amortlib.refine import refined_posterior
from amortlib.solvers import FourDVarNet, FourDVarNetwork, fourdvar_network

WEIGHTS = Path(__file__).parent.parent / "weights"
OU_FILE = WEIGHTS / "ou_information.safetensors"
FOURDVARNET_FILE = WEIGHTS / "lorenz63_fourdvarnet.safetensors"
FLOW_FILE = WEIGHTS / "lorenz63_flow.safetensors"
BIMODAL_HEADS: tuple[str, ...] = ("regression", "flow", "score")
BIMODAL_FILES = {name: WEIGHTS / f"bimodal_{name}.safetensors" for name in BIMODAL_HEADS}
OU_NOISE = (0.1, 1.0)
"""Standard deviations of the observation error that the head was trained for."""


def ou_problem(n: int = 32, timescale: float = 8.0) -> InverseProblem:
    """An Ornstein-Uhlenbeck path, with error bars that differ from event to event."""
    return ornstein_uhlenbeck(n, timescale=timescale, noise=OU_NOISE)


def build_ou(n: int = 32, timescale: float = 8.0, **_: Any) -> AmortizedPosterior:
    """The untrained head that the file's settings describe."""
    prior = ou_problem(n, timescale).prior
    return regression_posterior("information", key=jax.random.key(0), prior=prior, uses_sd=True)


def load_ou_head(
    *, retrain: bool = False, quick: bool = False
) -> tuple[AmortizedPosterior, InverseProblem]:
    """The trained head and its problem.

    Args:
        retrain: train it here, a minute or two, by `benchmarks.make_weights`.
        quick: for a moment only, which shows that it works.

    Raises:
        amortlib.CheckpointError: where the file is missing or damaged, with what to do.
    """
    if retrain:
        from benchmarks import make_weights

        return make_weights.trained(quick=quick)[0], ou_problem()
    return build_and_load(OU_FILE, build_ou), ou_problem()


def build_fourdvarnet(sizes: dict[str, int], **_: Any) -> FourDVarNetwork:
    """The untrained network that the file's settings describe."""
    return fourdvar_network(lorenz63(), key=jax.random.key(0), **sizes)


def load_fourdvarnet(
    *, retrain: bool = False, quick: bool = False
) -> tuple[FourDVarNet, dict[str, Any]]:
    """The trained solver for the standard Lorenz-63 window, and the record of its training.

    Args:
        retrain: train it here, some ten minutes, by `benchmarks.fourdvarnet`; the record has its
            seconds, and all else of the file.
        quick: for a moment only, which shows that it works.

    Raises:
        amortlib.CheckpointError: where the file is missing or damaged, with what to do.
    """
    record = read_settings(FOURDVARNET_FILE)["record"]
    if retrain:
        from benchmarks import fourdvarnet

        sizes = {"steps": 2, "batch": 8} if quick else {"steps": fourdvarnet.STEPS}
        network, seconds = fourdvarnet.train(**sizes)
        record = record | {"seconds": seconds}
    else:
        network = build_and_load(FOURDVARNET_FILE, build_fourdvarnet)
    problem = lorenz63()
    return FourDVarNet(Energy(problem.prior, problem.forward), network), record


def build_lorenz63_flow(sizes: dict[str, dict[str, int]], **_: Any) -> AmortizedPosterior:
    """The untrained flow around refined points that the file's settings describe."""
    problem = lorenz63()
    prior = problem.prior
    k_encoder, k_head, k_flow = jax.random.split(jax.random.key(0), 3)
    guess = AmortizedPosterior(
        FlatEncoder(problem.shapes()[1], key=k_encoder, **sizes["guess"]),
        CholeskyHead(sizes["guess"]["features"], 3, key=k_head, centre=prior.loc, scale=prior.sd()),
    )
    energy = Energy(prior, problem.forward)
    return refined_posterior(
        guess, energy, kind="flow", key=k_flow, **sizes["refined"], **sizes["flow"]
    )


def load_lorenz63_flow(
    *, retrain: bool = False, quick: bool = False
) -> tuple[AmortizedPosterior, InverseProblem, dict[str, Any]]:
    """The trained flow for the standard Lorenz-63 window, its problem, and its record.

    The regression head that it starts from is `model.encoder.guess.tree`.

    Args:
        retrain: train it here, some minutes, by `benchmarks.flow_lorenz63`; the record has its
            seconds, and all else of the file.
        quick: for a moment only, which shows that it works.

    Raises:
        amortlib.CheckpointError: where the file is missing or damaged, with what to do.
    """
    record = read_settings(FLOW_FILE)["record"]
    if retrain:
        from benchmarks import flow_lorenz63

        model, seconds = flow_lorenz63.train(quick=quick)
        return model, lorenz63(), record | {"seconds": seconds}
    return build_and_load(FLOW_FILE, build_lorenz63_flow), lorenz63(), record


def build_bimodal_regression(sizes: dict[str, Any], **_: Any) -> AmortizedPosterior:
    """The untrained Gaussian posterior that the file's settings describe."""
    prior, key = lorenz63_sign_lost().prior, jax.random.key(0)
    encoder = ScaledEncoder(FlatEncoder((5, 2), key=key, **sizes), 0.0, 1.0)
    head = CholeskyHead(sizes["features"], 3, key=key, centre=prior.loc, scale=prior.sd())
    return AmortizedPosterior(encoder, head)


def build_bimodal_score(sizes: dict[str, Any], **_: Any) -> AmortizedPosterior:
    """The untrained score posterior that the file's settings describe."""
    prior = lorenz63_sign_lost().prior
    return score_posterior(key=jax.random.key(0), prior=prior, obs_shape=(5, 2), **sizes)


def build_bimodal_flow(sizes: dict[str, Any], **_: Any) -> AmortizedPosterior:
    """The untrained flow posterior that the file's settings describe."""
    key, shape = jax.random.key(0), (5, 2)
    flat = FlatEncoder(
        shape,
        key=key,
        features=sizes["features"],
        width=sizes["encoder_width"],
        depth=sizes["encoder_depth"],
    )
    encoder = ScaledEncoder(flat, 0.0, 1.0)
    prior = lorenz63_sign_lost().prior
    return flow_posterior(key=key, prior=prior, obs_shape=shape, encoder=encoder, **sizes)


def load_bimodal(name: str) -> tuple[AmortizedPosterior, dict[str, Any]]:
    """A trained head of `BIMODAL_HEADS` for the window whose sign is lost, and its record.

    Raises:
        amortlib.CheckpointError: where the file is missing or damaged, with what to do.
    """
    build = {
        "regression": build_bimodal_regression,
        "flow": build_bimodal_flow,
        "score": build_bimodal_score,
    }[name]
    file = BIMODAL_FILES[name]
    return build_and_load(file, build), read_settings(file)["record"]
