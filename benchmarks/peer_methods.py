"""Methods of other libraries, at their defaults, on pairs from a file.

    python benchmarks/peer_methods.py PAIRS.npz PEERS.npz [--methods ...] [--task two_moons]

Needs numpy and sbi and nothing of amortlib, so that it runs in an environment of its own. The
pairs are written by `python -m benchmarks.peers --save-pairs PAIRS.npz`, and what comes out, the
draws included, is read by `python -m benchmarks.peers --peer-results PEERS.npz`.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

DRAWS = 2000


def sbi_is_here() -> bool:
    """Whether sbi can be imported, and torch, without which it cannot."""
    return all(importlib.util.find_spec(name) is not None for name in ("sbi", "torch"))


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


METHODS: dict[str, Callable[..., dict[str, Any]]] = {
    "sbi NPE maf": partial(_sbi, method="NPE", density_estimator="maf"),
    "sbi NPE nsf": partial(_sbi, method="NPE", density_estimator="nsf"),
    "sbi NPSE": partial(_sbi, method="NPSE"),
}


def main() -> None:
    """Train every method on every task of the file, and write draws and figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--task", help="one task of the file; by default all")
    parser.add_argument("--epochs", type=int, help="stop here; by default where sbi does")
    args = parser.parse_args()
    out = {}
    with np.load(args.pairs, allow_pickle=False) as data:
        tasks = dict.fromkeys(name.split("|")[0] for name in data.files)
        for task in [args.task] if args.task else tasks:
            parts = ("theta", "y", "low", "high", "observations")
            theta, y, low, high, observations = (data[f"{task}|{part}"] for part in parts)
            for method in args.methods:
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
