"""Methods of other libraries, at their defaults, on pairs from a file.

    python benchmarks/peer_methods.py PAIRS.npz PEERS.npz [--methods ...] [--task two_moons]

Needs numpy, and sbi or BayesFlow, and nothing of amortlib, so that it runs in an environment of its
own. The pairs are written by `python -m benchmarks.peers --save-pairs PAIRS.npz`, and what comes
out, the draws included, is read by `python -m benchmarks.peers --peer-results PEERS.npz`.

BayesFlow 2 runs on keras with its JAX backend. On Python 3.11 the newest that can be installed is
2.0.12, from 3.12 on it is 2.1; both stand beside sbi and the packages amortlib needs.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

DRAWS = 2000


NEEDS = {"sbi": ("sbi", "torch"), "BayesFlow": ("bayesflow", "keras", "jax")}
"""What a library needs in order to be imported: the first word of a method is its library."""


def missing(method: str) -> list[str]:
    """Packages that a method needs and that are not installed: none where it can run."""
    needs = NEEDS[method.split()[0]]
    return [name for name in needs if importlib.util.find_spec(name) is None]


def why_left_out(method: str) -> str:
    """Say what to install."""
    return (
        f"{method}: expected {', '.join(missing(method))} to be installed, got no such package: "
        "pip install 'amortlib[bench]', or run benchmarks/peer_methods.py where it is"
    )


def inside(
    low: np.ndarray, high: np.ndarray, draw: Callable[[int], np.ndarray], n: int
) -> np.ndarray:
    """Draw until `n` draws lie in the prior's box: what a density says outside is known wrong."""
    found = np.empty((0, low.size))
    for attempt in range(100):
        new = draw(attempt)
        good = np.isfinite(new).all(1) & (new >= low).all(1) & (new <= high).all(1)
        found = np.concatenate([found, new[good]])
        if len(found) >= n:
            return found[:n]
    raise RuntimeError(f"expected {n} draws in the prior's box, got {len(found)} in 100 rounds")


def _sbi(
    theta: np.ndarray,
    y: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    *,
    seed: int,
    method: str,
    max_epochs: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    import sbi.inference
    import torch
    from sbi.utils import BoxUniform

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    prior = BoxUniform(
        torch.as_tensor(low, dtype=torch.float32), torch.as_tensor(high, dtype=torch.float32)
    )
    inference = getattr(sbi.inference, method)(prior=prior, show_progress_bars=False, **settings)
    inference.append_simulations(
        torch.as_tensor(np.asarray(theta, np.float32)), torch.as_tensor(np.asarray(y, np.float32))
    )
    limit = {} if max_epochs is None else {"max_num_epochs": max_epochs}
    network = inference.train(**limit)
    posterior = inference.build_posterior()
    figures = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}

    def sampler(y: np.ndarray, n: int, seed: int) -> np.ndarray:
        torch.manual_seed(seed)
        seen = torch.as_tensor(np.asarray(y, np.float32))[None]
        return posterior.sample((n,), x=seen, show_progress_bars=False).numpy()

    return figures | {
        "sampler": sampler,
        "epochs": float(inference.summary["epochs_trained"][-1]),
        "parameters": sum(p.numel() for p in network.parameters()),
    }


def _bayesflow(
    theta: np.ndarray,
    y: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    *,
    seed: int,
    network: str,
    max_epochs: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    # With another backend the time would be another's; with torch as its backend BayesFlow also
    # switches gradients off for the whole process, and sbi after it could not be trained.
    os.environ["KERAS_BACKEND"] = "jax"
    import bayesflow
    import keras

    if keras.backend.backend() != "jax":
        raise RuntimeError(
            f"expected keras on its JAX backend, got {keras.backend.backend()}: keras was imported "
            "before, with another"
        )
    # A line for every call of its sampler.
    logging.getLogger("bayesflow").setLevel(logging.WARNING)
    keras.utils.set_random_seed(seed)
    wall, cpu = time.perf_counter(), time.process_time()
    workflow = bayesflow.BasicWorkflow(
        inference_network=getattr(bayesflow.networks, network)(**settings),
        inference_variables="theta",
        inference_conditions="y",
    )
    # Its rate falls to zero as a cosine and the last weights are kept: there is no early stop for
    # which pairs would have to be held out, so that it sees all of them.
    limit = {} if max_epochs is None else {"epochs": max_epochs}
    pairs = {"theta": np.asarray(theta, np.float32), "y": np.asarray(y, np.float32)}
    history = workflow.fit_offline(pairs, verbose=0, **limit)
    figures = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}

    def sampler(y: np.ndarray, n: int, seed: int) -> np.ndarray:
        seen = {"y": np.asarray(y, np.float32)[None]}

        def draw(attempt: int) -> np.ndarray:
            # 1,000 apart: no attempt at one observation has the seed of another observation.
            drawn = workflow.sample(num_samples=n, conditions=seen, seed=seed + 1000 * attempt)
            return np.asarray(drawn["theta"][0])

        return inside(low, high, draw, n)

    weights = workflow.approximator.trainable_weights
    return figures | {
        "sampler": sampler,
        "epochs": float(len(history.history["loss"])),
        "parameters": sum(int(np.prod(weight.shape)) for weight in weights),
    }


METHODS: dict[str, Callable[..., dict[str, Any]]] = {
    "sbi NPE maf": partial(_sbi, method="NPE", density_estimator="maf"),
    "sbi NPE nsf": partial(_sbi, method="NPE", density_estimator="nsf"),
    "sbi NPSE": partial(_sbi, method="NPSE"),
    "BayesFlow spline coupling": partial(_bayesflow, network="CouplingFlow", transform="spline"),
    "BayesFlow flow matching": partial(_bayesflow, network="FlowMatching"),
}


def main() -> None:
    """Train every method on every task of the file, and write draws and figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="by default all here")
    parser.add_argument("--task", help="one task of the file; by default all")
    parser.add_argument("--epochs", type=int, help="stop here; by default where they do")
    args = parser.parse_args()
    methods = args.methods or [method for method in METHODS if not missing(method)]
    for method in methods or METHODS:
        if missing(method):
            parser.error(why_left_out(method))
    out = {}
    with np.load(args.pairs, allow_pickle=False) as data:
        tasks = dict.fromkeys(name.split("|")[0] for name in data.files)
        for task in [args.task] if args.task else tasks:
            parts = ("theta", "y", "low", "high", "observations")
            theta, y, low, high, observations = (data[f"{task}|{part}"] for part in parts)
            for method in methods:
                got = METHODS[method](theta, y, low, high, seed=1, max_epochs=args.epochs)
                draws = [got["sampler"](one, DRAWS, i) for i, one in enumerate(observations)]
                start = time.perf_counter()
                got["sampler"](observations[0], 1000, 0)
                one = time.perf_counter() - start
                figures = [got[k] for k in ("wall_s", "cpu_s", "epochs", "parameters")]
                name = f"{task}|{method}"
                out |= {
                    f"{name}|draws": np.stack(draws),
                    f"{name}|figures": np.array([*figures, one]),
                    f"{name}|pairs": np.array(len(theta)),
                    f"{name}|first_pairs": theta[:100],
                }
                print(name, {k: v for k, v in got.items() if k != "sampler"}, flush=True)
    np.savez_compressed(args.out, **out)


if __name__ == "__main__":
    main()
