"""The default sample sizes are those of the table that is shown, and the table holds its bars."""

import json
from pathlib import Path

from amortlib.calibration import ALPHA, BINS, DRAWS, EVENTS
from benchmarks.gates import EVENTS_GRID, PATH, PIECES, POWER

TABLE = Path(__file__).resolve().parents[2] / "book" / "data" / "gates.json"


def test_the_defaults_are_the_fewest_events_at_which_every_fault_is_caught() -> None:
    data = json.loads(TABLE.read_text(encoding="utf-8"))
    assert not data["quick"]
    assert all(bar["holds"] for bar in data["bars"])
    results = data["results"]
    stated = (results["events"], results["draws"], results["bins"], results["alpha"])
    assert stated == (EVENTS, DRAWS, BINS, ALPHA)
    assert results["repetitions"] >= 500
    heads = [*PATH, *PIECES]
    assert sorted(results["characteristics"]) == sorted(heads)
    for name, row in results["characteristics"].items():
        if not name.startswith("exact"):
            assert row["report"] >= POWER
    power = {
        n: min(
            row["share"][str(n)]
            for row in results["sizes"]
            if (row["draws"], row["bins"]) == (DRAWS, BINS) and not row["head"].startswith("exact")
        )
        for n in EVENTS_GRID
    }
    assert min(n for n in EVENTS_GRID if power[n] >= POWER) == EVENTS
