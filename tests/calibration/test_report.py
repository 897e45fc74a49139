"""The report: what it refuses, what it says, and that a file gives it back."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from amortlib.calibration import GateError, GateReport

N = 60


def made(**changes) -> GateReport:
    """A report of 60 events of a state of one number, all of them well."""
    ranks = np.arange(2 * N).reshape(N, 2) % 100
    ranks[:, 1] = (np.arange(N) * 100) // N
    even = (np.arange(N) * 100) // N
    return GateReport(
        **{
            "agreement": np.full(N, 0.1),
            "adjoint": np.full(N, 0.01),
            "single": np.ones(N, bool),
            "sure": np.ones(N, bool),
            "names": ("x0", "J"),
            "ranks": np.stack([even, even], 1),
            "draws": 99,
            "bins": 10,
            "tarp": even,
            "coverage": even,
            "average": np.full((2, 10), N // 10),
            "kl": np.full(N, 0.02),
            "ess": np.full(N, 0.9),
            "khat": np.full(N, 0.3),
            "importance_draws": 100,
            "excluded": 0,
            "head": "ab" * 32,
            "problem": "cd" * 32,
            "versions": {"amortlib": "0"},
        }
        | changes
    )


def at(index: int, value: float, other: float) -> np.ndarray:
    return np.where(np.arange(N) == index, value, other)


def test_verdicts_name_the_events_that_fail() -> None:
    assert made().passed
    report = made(agreement=at(4, 1.2, 0.1), adjoint=at(9, np.inf, 0.01))
    agreement, adjoint, sbc = report.gates
    assert (agreement.failing, adjoint.failing) == ((4,), (9,))
    assert sbc.passed
    assert report.failing == (4, 9)
    assert not report.passed
    assert "Failing events: 4, 9." in str(report)


@pytest.mark.parametrize(
    ("name", "value", "passes"),
    [("agreement", 1.0, True), ("agreement", 1.0001, False), ("adjoint", 0.05, False)],
)
def test_the_thresholds_stand_where_they_are_said_to(name: str, value: float, passes: bool) -> None:
    assert made(**{name: at(0, value, 0.01)}).passed is passes


def test_a_fault_on_an_event_with_several_minima_is_shown_and_fails_nothing() -> None:
    report = made(agreement=at(3, 40.0, 0.1), single=np.arange(N) != 3)
    assert report.passed
    assert report.gates[0].events == N - 1
    assert "1 events have several minima" in str(report)


def test_uneven_ranks_fail_and_are_named() -> None:
    skew = made().ranks.copy()
    skew[:, 1] //= 2
    report = made(ranks=skew)
    assert not report.passed
    assert report.sbc_adjusted["J"] < 1e-6 < report.sbc_adjusted["x0"]
    assert "not uniform: J" in str(report)
    assert report.histogram("J").sum() == N
    assert report.histogram("J")[5:].sum() == 0
    assert report.histogram("tarp").tolist() == [6] * 10
    with pytest.raises(KeyError, match="expected one of"):
        report.histogram("x7")


def test_it_says_what_a_reader_has_to_know() -> None:
    words = str(made(sure=np.arange(N) > 1, excluded=3, khat=np.full(N, 0.9)))
    for part in (
        "all three gates hold",
        "at most 4.9% of such events fail",  # 1 - 0.05^(1/60)
        "not sure that it found",
        "3 more events were left out",
        "a small fault may pass SBC",
        "above 0.7 on 100.0% of events",
        "Weights abababababab, problem cdcdcdcdcdcd.",
    ):
        assert part in words
    assert "—" not in words


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agreement": at(2, np.nan, 0.1)}, "NaN at 1 of 60 events, the first of them event 2"),
        ({"khat": np.full(N, np.nan)}, "expected numbers in khat"),
        ({"agreement": np.zeros(0)}, "an empty sample passes nothing"),
        ({"adjoint": np.zeros(3)}, "expected adjoint of shape"),
        ({"single": np.ones(3, bool)}, "expected single of shape"),
        ({"single": np.zeros(N, bool)}, "at least one event with a single minimum"),
        ({"ranks": np.zeros((N, 3), int)}, "expected ranks of shape"),
        ({"tarp": np.full(N, 100)}, "expected tarp from 0 to 99"),
        ({"bins": 30}, "divide L \\+ 1 = 100"),
        ({"bins": 20, "average": np.full((2, 20), 3)}, "at least 100 events for 20 bins, got 60"),
    ],
)
def test_what_means_nothing_is_an_error_and_not_a_verdict(changes: dict, message: str) -> None:
    with pytest.raises(GateError, match=message):
        made(**changes)


def test_a_file_gives_the_report_back(tmp_path: Path) -> None:
    report = made(adjoint=at(1, np.inf, 0.01), excluded=2)
    path = tmp_path / "report.json"
    text = report.to_json(path)
    assert path.read_text(encoding="utf-8").strip() == text
    assert json.loads(text)["gates"][1]["failing"] == [1]
    back = GateReport.from_json(text)
    for field in dataclasses.fields(GateReport):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(report, field.name))
    assert str(back) == str(report)
    assert back.to_json() == text


def test_other_files_are_refused() -> None:
    data = json.loads(made(agreement=at(4, 1.2, 0.1)).to_json())

    def read(**changes):
        return GateReport.from_json(json.dumps({**data, **changes}))

    with pytest.raises(GateError, match="its numbers say False"):
        read(passed=True)
    with pytest.raises(GateError, match="expected version 2"):
        read(version=3)
    with pytest.raises(GateError, match="written by GateReport"):
        GateReport.from_json("[1, 2]")
    with pytest.raises(GateError, match="in JSON"):
        GateReport.from_json("{")
    with pytest.raises(GateError, match="expected a whole report: KeyError"):
        GateReport.from_json(json.dumps({k: v for k, v in data.items() if k != "ranks"}))
    with pytest.raises(GateError, match="expected a whole report: GateError"):
        read(adjoint=[0.1, 0.2])
