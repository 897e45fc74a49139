"""The fault explorer at the ends of its sliders, its shapes, and the drawings of the gates."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from _kit import style
from _kit.faults import (
    BINS,
    CRITICAL,
    EVENTS,
    LEVELS,
    FaultExplorer,
    fault_explorer,
    fault_picture,
    judge_ranks,
    shape_of,
)
from _kit.gates_figures import binomial_band, coverage_curves, event_statistics, rank_histograms
from _kit.noise import normals
from scipy import stats


@pytest.fixture(scope="module")
def explorer() -> FaultExplorer:
    return fault_explorer()


@pytest.mark.parametrize(
    ("fault", "component", "energy"),
    [
        ((0.0, 1.0, 0.7), "flat", "flat"),
        ((0.0, 0.7, 0.7), "U-shaped", "sloped to the right"),
        ((0.0, 1.4, 0.7), "humped", "sloped to the left"),
        ((-0.5, 1.0, 0.7), "sloped to the right", None),
        ((0.5, 1.0, 0.7), "sloped to the left", None),
        ((0.0, 1.0, 0.0), "flat", "sloped to the left"),
    ],
)
def test_each_fault_has_its_shape(fault, component: str, energy: str | None) -> None:
    """And a wrong correlation leaves the component flat: only the energy sees it."""
    picture = fault_picture(*fault)
    assert picture.shape == component
    if energy is not None:
        assert picture.energy_shape == energy
    assert picture.component.sum() == picture.energy.sum() == EVENTS


def test_at_both_ends_of_every_slider_there_is_a_picture(explorer: FaultExplorer) -> None:
    for bias, width, correlation in itertools.product((-1, 1), (0.5, 2), (-0.95, 0.95)):
        explorer.bias, explorer.width, explorer.correlation = bias, width, correlation
        picture = explorer.picture()
        assert picture.component.shape == picture.energy.shape == (BINS,)
        assert picture.shape in picture.words()
        assert not picture.passed
        assert np.all(np.diff(picture.coverage) >= 0)


def test_the_gate_of_the_page_is_that_of_the_package() -> None:
    """The sum of squares with nine degrees of freedom, one of two statistics at 1%."""
    assert abs(stats.chi2.isf(0.01 / 2, BINS - 1) - CRITICAL) < 1e-3
    assert fault_picture(0.0, 1.0, 0.7).passed
    assert not fault_picture(0.0, 1.0, 0.0).passed


def test_coverage_is_the_share_of_truths_within() -> None:
    """Of a normal head with the wrong width: 2 Phi(w z) - 1, to 4 standard errors and the steps
    of 99 draws."""
    levels = LEVELS[1:-1]
    z = stats.norm.ppf(0.5 + levels / 2)
    for width in (0.6, 1.0, 1.5):
        expected = 2 * stats.norm.cdf(width * z) - 1
        seen = fault_picture(0.0, width, 0.7).coverage[1:-1]
        error = 4 * np.sqrt(expected * (1 - expected) / EVENTS) + 0.02
        assert np.all(np.abs(seen - expected) < error)


def test_the_noise_is_standard_normal() -> None:
    """Kolmogorov and Smirnov's test at 1 in 1,000, and neighbours that do not know each other."""
    z = normals(3, 20_001)
    assert z.size == 20_001
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 4 / np.sqrt(z.size)
    assert not np.array_equal(z, normals(4, z.size))


def test_ranks_of_ones_own_are_judged_by_the_test_of_the_package() -> None:
    """Of a head that is too narrow, as its own numbers have it; whatever the number of draws."""
    rng = np.random.default_rng(0)
    u = stats.norm.cdf(1.2 * rng.normal(size=400))  # of the truth under the head
    ranks = rng.binomial(199, u)
    found = judge_ranks((ranks, ranks), 199, "mine")
    counts = np.histogram(ranks, np.arange(0, 201, 20))[0]
    np.testing.assert_allclose(found["counts"], [counts * EVENTS / 400] * 2)
    p = 2 * stats.chisquare(counts).pvalue  # the smaller of two, adjusted by Holm
    assert 1e-4 < p < 0.01
    assert found["said"] == (
        f"“mine”: over 400 events p is {p:.2g} by the component and {p:.2g} by the energy, "
        "and the gate closes."
    )
    inside = np.abs(2 * stats.norm.cdf(stats.norm.ppf(u)) - 1)
    expected = [(inside <= level).mean() for level in LEVELS]
    np.testing.assert_allclose(found["coverage"], expected, atol=0.05)
    even = judge_ranks(np.arange(100), 99, "mine")
    assert even["said"].endswith("p is 1 by the component, and the gate stays open.")


def test_a_function_of_ones_own_is_asked_at_every_position() -> None:
    mine = fault_explorer(compare=lambda bias, *_: np.arange(100) * (bias == 0), label="mine")
    assert mine.overlay["said"].endswith("stays open.")
    mine.bias = 0.5
    assert mine.overlay["said"].endswith("p is below 0.0001 by the component, and the gate closes.")
    assert mine.overlay["label"] == "mine"


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (np.arange(49), "at least 50 events, got 49"),
        (np.arange(101), "from 0 to 99, the number of draws, got int64 from 0 to 100"),
        (np.arange(100) / 2, "whole numbers"),
        (np.arange(100).reshape(2, 50), r"shape \(n,\), or a pair of these, got shapes"),
        ((np.arange(100), np.arange(60)), "a pair of these, got shapes"),
    ],
)
def test_what_are_no_ranks_is_refused(ranks: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fault_explorer(compare=ranks)


def test_the_display_leaves_no_figure_open(explorer: FaultExplorer) -> None:
    before = plt.get_fignums()
    assert "data:image/png" in explorer.to_html()
    assert plt.get_fignums() == before


def test_uneven_counts_are_not_called_flat() -> None:
    assert shape_of(np.array([100] * 4 + [40, 160] + [100] * 4)) == "uneven"


def test_the_band_holds_as_many_bars_as_it_says() -> None:
    """99% of counts, to three standard errors of 20,000 of them."""
    counts = np.random.default_rng(0).binomial(1000, 0.1, 20_000)
    low, high = binomial_band(1000, 10)
    inside = np.mean((counts >= low) & (counts <= high))
    assert abs(inside - 0.99) < 3 * np.sqrt(0.99 * 0.01 / 20_000) + 0.002


def test_drawings_show_what_they_are_given() -> None:
    style.use()
    figure = rank_histograms([np.full(10, 50), np.arange(10)], ["one", "two"])
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["one", "two"]
    assert [bar.get_height() for bar in figure.axes[1].patches if bar.get_width() < 0.1] == [
        *range(10)
    ]
    levels = np.linspace(0, 1, 5)
    figure = coverage_curves(levels, [levels, levels**2], ["right", "wrong"], 0.04)
    np.testing.assert_allclose(figure.axes[0].lines[1].get_ydata(), levels**2)
    heads = [("a", [0.0, 0.1]), ("b", [2.0, 1.0])]
    figure = event_statistics([("agreement", 1.0, heads), ("adjoint", 0.05, heads)])
    for ax, limit in zip(figure.axes, (1.0, 0.05), strict=True):
        assert ax.lines[0].get_xdata().min() > 0  # zero has a place on the axis
        assert list(ax.lines[2].get_xdata()) == [limit, limit]
