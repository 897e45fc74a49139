"""The fault explorer at the ends of its sliders, its shapes, and the drawings of the gates."""

import base64
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from _kit import style
from _kit.faults import BINS, EVENTS, FaultExplorer, fault_explorer, fault_picture, shape_of
from _kit.gates_figures import binomial_band, coverage_curves, event_statistics, rank_histograms

PNG = b"\x89PNG\r\n\x1a\n"


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


def test_every_slider_at_both_ends_gives_a_picture(explorer: FaultExplorer) -> None:
    for values in itertools.product(*((c.min, c.max) for c in explorer.controls)):
        for control, value in zip(explorer.controls, values, strict=True):
            control.value = value
        picture = explorer.picture()
        assert picture.component.shape == picture.energy.shape == (BINS,)
        assert bytes(explorer.image.value).startswith(PNG)
        assert picture.shape in explorer.words.value


def test_the_display_carries_a_picture_and_leaves_no_figure_open(explorer: FaultExplorer) -> None:
    before = plt.get_fignums()
    image = explorer.image.value
    explorer.width.value = 1.23
    assert explorer.image.value != image
    assert plt.get_fignums() == before
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]) == explorer.image.value
    assert all(control.description for control in explorer.controls)


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
