"""The rates that a report states are those that were measured, and no better."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, chi2

from amortlib.calibration import ALPHA, BINS, DRAWS, EVENTS, FALSE_ALARM, GateReport, rates
from amortlib.calibration.rates import JACOBIAN, MEASURED_ALARMS, POWER
from benchmarks.gates import PATH, PIECES, TIMES

from .test_report import N, made

DATA = Path(__file__).resolve().parents[2] / "book" / "data"


def results(name: str) -> dict:
    data = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    assert not data["quick"]
    assert all(bar["holds"] for bar in data["bars"])
    return data["results"]


def exact_rate(events: int, bins: int, p: float) -> float:
    """Probability that Pearson's p is at most `p`, by the exact law of a uniform multinomial.

    The counts are independent Poisson numbers, given their sum. A table of the probability of each
    pair (sum of the deviations from the expected count, sum of their squares) is built bin by bin.
    """
    mean = events // bins
    assert mean * bins == events
    # chi-square = (sum of squares) / mean; the largest sum that is not rejected.
    top = math.ceil(chi2.isf(p, bins - 1) * mean) - 1
    half, widest = math.isqrt(bins * top) + 1, math.isqrt(top)
    table = np.zeros((2 * half + 1, top + 1))
    table[half, 0] = 1.0
    for _ in range(bins):
        more = np.zeros_like(table)
        for off in range(-min(widest, mean), widest + 1):
            k, square = mean + off, off * off
            chance = math.exp(-mean + k * math.log(mean) - math.lgamma(k + 1))
            low, high = max(0, -off), 2 * half + 1 - max(0, off)
            more[low + off : high + off, square:] += chance * table[low:high, : top + 1 - square]
        table = more
    of_sum = math.exp(-events + events * math.log(events) - math.lgamma(events + 1))
    return 1.0 - table[half].sum() / of_sum


@pytest.mark.parametrize(
    ("events", "bins", "statistics"),
    [(60, 10, 2), (100, 20, 3), (250, 10, 4), (1000, 10, TIMES + 1)],
)
def test_an_exact_posterior_fails_sbc_at_most_at_the_stated_rate(
    events: int, bins: int, statistics: int
) -> None:
    """Bonferroni's bound with the exact law in place of chi-square's: more than `ALPHA`, and so
    what is stated has to be more."""
    bound = statistics * exact_rate(events, bins, ALPHA / statistics)
    assert ALPHA < bound < FALSE_ALARM


def test_the_exact_law_is_that_of_draws() -> None:
    """Of 60 events in 10 bins, against 400,000 multinomial draws, five standard errors."""
    n, level = 400_000, 0.01
    counts = np.random.default_rng(0).multinomial(60, [0.1] * 10, size=n)
    share = np.mean(chi2.sf(((counts - 6) ** 2).sum(axis=1) / 6, 9) <= level)
    assert abs(share - exact_rate(60, 10, level)) < 5 * np.sqrt(level / n)


def test_the_stated_rate_is_above_what_was_measured_with_confidence() -> None:
    record = results("alarms")
    for part in ("fresh", "both"):
        row = record[part]
        found = binomtest(row["alarms"], row["samples"], alternative="less")
        upper = found.proportion_ci(0.95).high
        assert upper == pytest.approx(row["upper"])
        assert upper <= FALSE_ALARM
    both = record["both"]
    assert (both["alarms"], both["samples"]) == MEASURED_ALARMS
    first = results("gates")
    share = first["characteristics"]["exact"]["report"]
    assert record["before"]["alarms"] == round(share * first["alarms"])
    assert both["samples"] == record["fresh"]["samples"] + first["alarms"]
    # Two pieces, in the first run.
    row = first["characteristics"][PIECES[0]]["report"] * first["alarms"]
    found = binomtest(round(row), first["alarms"], alternative="less")
    assert found.proportion_ci(0.95).high <= FALSE_ALARM


def test_the_stated_power_is_that_of_the_table() -> None:
    record = results("gates")
    of_sbc = {
        row["head"]: {int(n): share for n, share in row["share"].items()}
        for row in record["sizes"]
        if (row["draws"], row["bins"]) == (DRAWS, BINS) and not row["head"].startswith("exact")
    }
    assert of_sbc == POWER
    stated = rates(EVENTS, EVENTS, DRAWS, BINS)
    faults = {*PATH, *PIECES} - {PATH[0], PIECES[0]}
    assert stated.power is not None
    assert set(stated.power) == faults == {*POWER, *JACOBIAN}
    for name, share in stated.power.items():
        measured = record["characteristics"][name]["report"]
        assert share == pytest.approx(measured, abs=1e-3)
        assert share >= 0.99


@pytest.mark.parametrize(
    ("sizes", "events"),
    [
        ((1000, 1000, 99, 10), 1000),
        ((1999, 1900, 99, 10), 1000),
        ((999, 999, 99, 10), 500),
        ((249, 249, 99, 10), None),
        ((1000, 1000, 19, 10), None),
        ((1000, 1000, 99, 20), None),
    ],
)
def test_power_is_stated_for_no_more_than_there_is(sizes: tuple, events: int | None) -> None:
    found = rates(*sizes)
    assert found.events == events
    assert found.false_alarm == FALSE_ALARM
    assert (found.power is None) == (events is None)


def test_the_report_says_it_in_words_and_in_its_file() -> None:
    few = made()
    assert few.rates.power is None
    assert "at most 1.25% of samples (measured: 155 of 16,000)" in str(few)
    assert "at these sizes was not measured" in str(few)
    times = 1000 // N + 1
    sizes = {
        name: np.concatenate([getattr(few, name)] * times)
        for name in ("agreement", "adjoint", "single", "sure", "ranks", "tarp", "coverage")
    }
    many = dataclasses.replace(few, **sizes, kl=None, ess=None, khat=None)
    assert "each is caught in at least 100.0% of samples (of 1000 events" in str(many)
    data = json.loads(many.to_json())
    assert data["rates"]["false_alarm"] == FALSE_ALARM
    assert data["rates"]["power"]["no correlations"] == POWER["no correlations"][1000]
    assert str(GateReport.from_json(many.to_json())) == str(many)
    # Where an event in a hundred is struck, and few have a single minimum, none may be.
    rare = rates(1000, 50, DRAWS, BINS).power
    assert rare is not None
    assert rare["Jacobian x 1.1, 1 in 100"] == pytest.approx(1 - 0.99**50)
