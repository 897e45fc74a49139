"""One style for every figure of the book.

    from _kit import style
    style.use()

Each role of the book has one colour, everywhere. The colours keep their distance under the
common forms of colour blindness, and each is dark enough on the card to write text in. Figures
are drawn on a light, opaque card, so that they read the same on a light and on a dark page.
"""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

TRUTH = "#1a1a1a"
"""The state that the simulator drew."""
OBS = "#9c1c1c"
"""Observations."""
EXACT = "#0a5fb4"
"""The exact posterior, or the reference that stands in for it."""
AMORTIZED = "#aa5f00"
"""The posterior that a head returns."""
PRIOR = "#6b7078"
"""The prior, or background."""
GAP = "#dcdee6"
"""The ground behind a gap: a shade, never a line or a letter."""

CARD = "#fafaf7"
"""The card that every figure is drawn on."""
INK = "#26282c"
"""Axes, ticks and text."""

CYCLE = (EXACT, AMORTIZED, OBS, PRIOR, TRUTH)
"""The order of colours for lines that have no role."""

WIDE = (6.0, 3.4)
"""A figure over the whole column, in inches."""
NARROW = (4.2, 3.4)
"""A figure that needs less, in inches."""

SETTINGS: dict[str, Any] = {
    "figure.figsize": WIDE,
    "figure.dpi": 150,
    "figure.facecolor": CARD,
    "figure.edgecolor": CARD,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": CARD,
    "savefig.edgecolor": CARD,
    "savefig.pad_inches": 0.15,
    # The font that matplotlib ships, so that nothing has to be fetched or installed.
    "font.family": ["DejaVu Sans"],
    # Letters keep 9 pixels when the figure is 328 pixels wide, as it is on a phone.
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.labelsize": 12,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "legend.fontsize": 12,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": CARD,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=list(CYCLE)),
    "axes.titlelocation": "left",
    "axes.grid": False,
    "grid.color": "#dcdcd6",
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "image.cmap": "cividis",
}


def use() -> None:
    """Make this the style of every figure from here on, whatever was set before."""
    mpl.rcdefaults()
    mpl.rcParams.update(SETTINGS)


def band(
    ax: Axes,
    t: ArrayLike,
    mean: ArrayLike,
    sd: ArrayLike,
    color: str,
    label: str,
    z: float = 1.96,
) -> tuple[Line2D, PolyCollection]:
    """Draw a mean and the band of `z` standard deviations on either side of it.

    `t`, `mean` and `sd` have the same shape `(n,)`. The label names the line; the band has
    none, so that a legend holds one entry. Returns the line and the band.
    """
    t, mean, sd = np.asarray(t), np.asarray(mean), np.asarray(sd)
    if not (t.shape == mean.shape == sd.shape and t.ndim == 1):
        raise ValueError(
            f"t, mean and sd must share one shape (n,); got {t.shape}, {mean.shape}, {sd.shape}"
        )
    (line,) = ax.plot(t, mean, color=color, label=label)
    fill = ax.fill_between(t, mean - z * sd, mean + z * sd, color=color, alpha=0.22, linewidth=0)
    return line, fill


def gap_edges(t: ArrayLike, mask: ArrayLike) -> list[tuple[float, float]]:
    """Return the (start, end) of every run of missing entries.

    `t` increases and `mask` is `True` where something is observed. An edge lies halfway
    between the missing entry and its observed neighbour, or at the end of the record.
    """
    t, mask = np.asarray(t, dtype=float), np.asarray(mask, dtype=bool)
    if t.shape != mask.shape or t.ndim != 1:
        raise ValueError(f"t and mask must share one shape (n,); got {t.shape} and {mask.shape}")
    edges = []
    start = None
    for index, observed in enumerate([*mask, True]):
        if not observed and start is None:
            start = index
        elif observed and start is not None:
            left = t[0] if start == 0 else (t[start - 1] + t[start]) / 2
            right = t[-1] if index == len(t) else (t[index - 1] + t[index]) / 2
            edges.append((float(left), float(right)))
            start = None
    return edges


def gap_shade(ax: Axes, t: ArrayLike, mask: ArrayLike, label: str | None = "gap") -> None:
    """Shade every gap of a record behind the lines; the first carries the legend's label."""
    for left, right in gap_edges(t, mask):
        ax.axvspan(left, right, color=GAP, linewidth=0, zorder=0, label=label)
        label = None
