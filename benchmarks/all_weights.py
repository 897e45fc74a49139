"""Every weight file that pages and benchmarks load, and the command that makes it.

    python -m benchmarks.make_weights --list
    python -m benchmarks.make_weights --all [--quick]

In the order in which they are made: none needs another that stands below it. Each command runs in
a process of its own, as by hand, and writes its files with the record of what they reach.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import bimodal, flow_lorenz63, fourdvarnet, make_weights, nested, refinement

ROOT = Path(__file__).parent.parent
RECIPES: dict[str, tuple[Path, ...]] = {
    "make_weights": (make_weights.FILE,),
    "fourdvarnet": (fourdvarnet.FILE,),
    "flow_lorenz63": (flow_lorenz63.FILE,),
    "refinement": (refinement.FILE,),
    "nested": (nested.FILE,),
    "bimodal": tuple(bimodal.FILES.values()),
}
"""Name of a benchmark, and the files that it writes."""


def listing() -> str:
    """A line for each command: what it makes."""
    return "\n".join(
        f"python -m benchmarks.{name}: {', '.join(str(f.relative_to(ROOT)) for f in files)}"
        for name, files in RECIPES.items()
    )


def make_all(
    *, quick: bool, run: Callable[..., subprocess.CompletedProcess] = subprocess.run
) -> int:
    """Run every command in order; 0 where each of them held its bars, and the names if not."""
    failed = []
    for name in RECIPES:
        command = [sys.executable, "-m", f"benchmarks.{name}", *(["--quick"] if quick else [])]
        print(" ".join(command[1:]), flush=True)
        if run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"bars that do not hold, or errors, in: {', '.join(failed)}")
    return int(bool(failed))
