"""The figure style: contrast, colour-blind safety, legibility on a phone, helpers."""

import itertools
import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from _kit import style
from hypothesis import given
from hypothesis import strategies as st

LINES = {name: getattr(style, name) for name in ("TRUTH", "OBS", "EXACT", "AMORTIZED", "PRIOR")}

# Machado, Oliveira and Fernandes (2009), severity 1, acting on linear RGB.
VISION = {
    "normal": np.eye(3),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}

LEAST_DISTANCE = 20.0
"""Between any two roles in CIELAB (1976); a difference of about 2 is just noticeable."""

PHONE_COLUMN_PX = 328
LEAST_LETTER_PX = 9.0


def linear(colour: str) -> np.ndarray:
    """Return linear RGB of #rrggbb."""
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(first: str, second: str) -> float:
    """Return the contrast ratio of WCAG 2."""
    weights = np.array([0.2126, 0.7152, 0.0722])
    low, high = sorted([float(weights @ linear(first)), float(weights @ linear(second))])
    return (high + 0.05) / (low + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    """Return CIELAB (D65) of linear RGB."""
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    small = 6 / 29
    f = np.where(xyz > small**3, np.cbrt(xyz), xyz / (3 * small**2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_contrast_of_known_pairs() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("name", [*LINES, "INK"])
def test_text_and_lines_stand_out_from_the_card(name: str) -> None:
    assert contrast(getattr(style, name), style.CARD) >= 4.5


def test_text_stays_legible_on_a_gap() -> None:
    assert contrast(style.INK, style.GAP) >= 4.5
    assert contrast(style.GAP, style.CARD) >= 1.2


@pytest.mark.parametrize("vision", VISION)
def test_roles_stay_apart(vision: str) -> None:
    for (a, first), (b, second) in itertools.combinations(LINES.items(), 2):
        matrix = VISION[vision]
        distance = np.linalg.norm(lab(matrix @ linear(first)) - lab(matrix @ linear(second)))
        assert distance >= LEAST_DISTANCE, f"{a} and {b} are {distance:.1f} apart"


def test_use_sets_the_style_whatever_was_set_before() -> None:
    with mpl.rc_context({"font.size": 3, "axes.facecolor": "black", "lines.linestyle": ":"}):
        style.use()
        assert mpl.rcParams["font.size"] == 12
        assert mpl.rcParams["lines.linestyle"] == "-"
        assert mpl.rcParams["figure.facecolor"] == style.CARD
        assert tuple(mpl.rcParams["axes.prop_cycle"].by_key()["color"]) == style.CYCLE


def test_letters_are_large_enough_on_a_phone() -> None:
    sizes = [value for name, value in style.SETTINGS.items() if re.search(r"size$", name)]
    sizes = [value for value in sizes if isinstance(value, int | float) and value > 5]
    assert len(sizes) >= 6
    width_in_points = 72 * style.WIDE[0]
    assert min(sizes) * PHONE_COLUMN_PX / width_in_points >= LEAST_LETTER_PX


def test_the_font_comes_with_matplotlib() -> None:
    from matplotlib import font_manager

    path = font_manager.findfont(style.SETTINGS["font.family"][0], fallback_to_default=False)
    assert "mpl-data" in path or Path(path).name == "DejaVuSans.ttf"


def test_band_draws_the_interval() -> None:
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    line, fill = style.band(ax, [0, 1], [1.0, 2.0], [0.5, 1.0], style.EXACT, "exact", z=2.0)
    assert line.get_label() == "exact"
    vertices = fill.get_paths()[0].vertices
    assert vertices[:, 1].min() == pytest.approx(0.0)
    assert vertices[:, 1].max() == pytest.approx(4.0)
    assert ax.get_legend_handles_labels()[1] == ["exact"]


def test_band_says_what_does_not_fit() -> None:
    from matplotlib.figure import Figure

    with pytest.raises(ValueError, match=r"\(2,\), \(2,\), \(3,\)"):
        style.band(Figure().subplots(), [0, 1], [1, 2], [1, 2, 3], style.EXACT, "exact")


def test_gap_edges_by_hand() -> None:
    t = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert style.gap_edges(t, [True, False, False, True, True, False]) == [(0.5, 2.5), (4.5, 5.0)]
    assert style.gap_edges(t, [True] * 6) == []
    assert style.gap_edges(t, [False] * 6) == [(0.0, 5.0)]
    with pytest.raises(ValueError, match="share one shape"):
        style.gap_edges(t, [True])


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_gap_edges_hold_the_missing_entries_and_no_other(mask: list[bool]) -> None:
    t = np.arange(len(mask), dtype=float)
    edges = style.gap_edges(t, mask)
    for time, observed in zip(t, mask, strict=True):
        inside = any(left <= time <= right for left, right in edges)
        assert inside is not observed
    assert all(right < left for (_, right), (left, _) in itertools.pairwise(edges))


def test_gap_shade_labels_once() -> None:
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    style.gap_shade(ax, np.arange(5.0), [False, True, False, True, False])
    assert len(ax.patches) == 3
    assert ax.get_legend_handles_labels()[1] == ["gap"]
