"""What every benchmark shares: flags, a clock, a table for people, a file for programs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np


@dataclass(frozen=True)
class Bar:
    """One thing that was asked for, and what was measured.

    Attributes:
        name: what it is, in words.
        value: what was measured.
        bar: the limit.
        holds: whether the value is on the right side of it.
    """

    name: str
    value: float
    bar: float
    holds: bool

    @classmethod
    def check(cls, name: str, value: float, sign: Literal["<=", ">="], bar: float) -> Bar:
        """Compare; a value that is not a number holds nothing."""
        holds = value <= bar if sign == "<=" else value >= bar
        return cls(f"{name} {sign} {bar:g}", float(value), float(bar), bool(holds))


def parser(description: str) -> argparse.ArgumentParser:
    """A parser of `--json FILE` and `--quick`, to which a benchmark can add its own flags."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as data")
    parser.add_argument(
        "--quick", action="store_true", help="a short run that only shows that it works"
    )
    return parser


def arguments(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse `--json FILE` and `--quick`."""
    return parser(description).parse_args(argv)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "device": str(jax.devices()[0].platform),
    }


def versions(also: Sequence[str] = ()) -> dict[str, str]:
    """Versions of what the numbers depend on, and of the packages named besides."""
    found = {}
    always = ("amortlib", "jax", "jaxlib", "equinox", "optax", "diffrax", "flowjax", "numpy")
    for name in (*always, *also):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def median_seconds(
    run: Callable[[], Any], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median time of a call, after one that compiles; `time.process_time` counts the processor."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = clock()
        jax.block_until_ready(run())
        times.append(clock() - start)
    return float(np.median(times))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows under a head, in aligned columns."""
    cells = [list(map(str, head)), *[list(map(str, row)) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def finish(
    args: argparse.Namespace,
    *,
    name: str,
    results: Any,
    bars: Sequence[Bar],
    seeds: dict[str, int],
    also: Sequence[str] = (),
) -> int:
    """Print the bars, write the file, and return the exit status: 0 where every bar holds.

    The file holds the versions of what every benchmark depends on, and of the packages in `also`.
    A quick run is too short to hold its bars, and exits with 0 whatever they say.
    """
    print()
    print(
        table(
            ["bar", "measured", "holds"],
            [[b.name, f"{b.value:.4g}", "yes" if b.holds else "NO"] for b in bars],
        )
    )
    if args.json is not None:
        data = {
            "benchmark": name,
            "quick": args.quick,
            "machine": machine(),
            "versions": versions(also),
            "seeds": seeds,
            "results": results,
            "bars": [asdict(bar) for bar in bars],
        }
        temporary = args.json.with_name(args.json.name + ".part")
        temporary.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")
        temporary.replace(args.json)
    return 0 if args.quick or all(bar.holds for bar in bars) else 1
