"""Time to quality: a quick run writes its data, and the bars compare with the right rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers import OURS, Result, bars

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_quick_run_writes_its_data(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    full = [sys.executable, "-m", "benchmarks.peers", "--quick", "--json", str(out)]
    full += ["--task", "two_moons"]
    run = subprocess.run(full, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    data = json.loads(out.read_text(encoding="utf-8"))
    assert data["bars"]
    assert {row["method"] for row in data["results"]} >= {OURS, "flowjax coupling"}


def _row(method: str, core: float, score: float) -> Result:
    return Result(method, "slcp", core, core, 1.0, 1, [score])


def test_bars_compare_with_the_best_and_with_the_fastest_as_good() -> None:
    """A fast method that is worse than the best does not count for the time."""
    others = [_row("good", 100.0, 0.80), _row("as good", 50.0, 0.805), _row("fast", 1.0, 0.9)]
    quality, speed = bars([_row(OURS, 40.0, 0.79), *others])
    assert (quality.bar, speed.bar) == (0.80, 50.0)
    assert quality.holds
    assert speed.holds
    quality, speed = bars([_row(OURS, 60.0, 0.81), *others])
    assert not quality.holds
    assert not speed.holds
