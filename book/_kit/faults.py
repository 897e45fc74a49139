"""Sliders for a bias, over-confidence and a wrong correlation, and the rank histograms they make.

The posterior is the simplest with all three: two numbers with standard normal posteriors that are
correlated. A head answers with another mean, another width and another correlation.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import ipywidgets as ipw
import numpy as np
from matplotlib.figure import Figure

from _kit import style
from _kit.gates_figures import binomial_band, rank_histogram

EVENTS = 1000
DRAWS = 99
BINS = 10
CORRELATION = 0.7
"""Of the exact posterior."""


@dataclass(frozen=True)
class FaultPicture:
    """Rank histograms of a head with a fault, `(BINS,)` each.

    Attributes:
        component: of the first number.
        energy: of J.
        shape: what the first histogram looks like, in a word.
        energy_shape: likewise the second.
    """

    component: np.ndarray
    energy: np.ndarray
    shape: str
    energy_shape: str

    def words(self) -> str:
        """The picture in one sentence."""
        return (
            f"The histogram of the component is {self.shape}, that of the energy "
            f"{self.energy_shape}."
        )


def shape_of(counts: np.ndarray) -> str:
    """A word for a rank histogram: flat, U-shaped, humped, or sloped to one side.

    Compares the outer fifths with each other and with the middle, at three standard errors.
    """
    n, fifth = counts.sum(), counts.size // 5
    left, right = counts[:fifth].sum() / n, counts[-fifth:].sum() / n
    share = fifth / counts.size
    tilt = (right - left) / np.sqrt(2 * share / n)
    ends = (left + right - 2 * share) / np.sqrt(2 * share * (1 - 2 * share) / n)
    if abs(tilt) > 3 and abs(tilt) > abs(ends):
        return "sloped to the right" if tilt > 0 else "sloped to the left"
    if ends > 3:
        return "U-shaped"
    if ends < -3:
        return "humped"
    low, high = binomial_band(int(n), counts.size, z=3.5)
    return "flat" if low <= counts.min() and counts.max() <= high else "uneven"


def fault_picture(bias: float, width: float, correlation: float) -> FaultPicture:
    """Rank the truth among draws of the faulty head, over 1,000 events.

    The same random numbers at every setting, so that a slider changes one thing.

    Args:
        bias: added to both means, in posterior standard deviations.
        width: the head's standard deviation over the exact one; below one is over-confident.
        correlation: that the head states; the exact one is `CORRELATION`.
    """
    rng = np.random.default_rng(0)

    def coloured(z: np.ndarray, rho: float) -> np.ndarray:
        return np.stack([z[..., 0], rho * z[..., 0] + np.sqrt(1 - rho**2) * z[..., 1]], -1)

    # In posterior units, from the exact mean: what the data are then makes no difference.
    truth = coloured(rng.normal(size=(EVENTS, 2)), CORRELATION)
    draws = bias + width * coloured(rng.normal(size=(EVENTS, DRAWS, 2)), correlation)

    def energy(x: np.ndarray) -> np.ndarray:
        square = x[..., 0] ** 2 - 2 * CORRELATION * x[..., 0] * x[..., 1] + x[..., 1] ** 2
        return 0.5 * square / (1 - CORRELATION**2)

    def histogram(at_draws: np.ndarray, at_truth: np.ndarray) -> np.ndarray:
        ranks = (at_draws < at_truth[:, None]).sum(axis=1)
        return np.bincount(ranks * BINS // (DRAWS + 1), minlength=BINS)

    component = histogram(draws[..., 0], truth[:, 0])
    of_energy = histogram(energy(draws), energy(truth))
    return FaultPicture(component, of_energy, shape_of(component), shape_of(of_energy))


def draw_faults(picture: FaultPicture) -> Figure:
    """Both histograms."""
    figure = Figure(figsize=style.WIDE)
    left, right = figure.subplots(1, 2, sharey=True)
    rank_histogram(left, picture.component, "a component")
    rank_histogram(right, picture.energy, "the energy J")
    left.set_ylabel("events")
    left.set_ylim(0, max(250, 1.05 * max(picture.component.max(), picture.energy.max())))
    return figure


class FaultExplorer(ipw.VBox):
    """Sliders for the fault, the two histograms, and their shapes in words.

    Where a kernel runs, moving a slider ranks anew. In the rendered book, which has none, the
    display is the picture for the settings it was made with.
    """

    def __init__(self, *, bias: float = 0.0, width: float = 1.0, correlation: float = CORRELATION):
        """Set the first position of the sliders; arguments as of [`fault_picture`][]."""
        style_ = {"description_width": "9em"}
        layout = ipw.Layout(width="100%", max_width="36em")

        def slider(value: float, low: float, high: float, name: str) -> ipw.FloatSlider:
            return ipw.FloatSlider(
                value, min=low, max=high, step=0.05, description=name, style=style_, layout=layout
            )

        self.bias = slider(bias, -1.0, 1.0, "bias (sd)")
        self.width = slider(width, 0.5, 2.0, "stated sd / exact")
        self.correlation = slider(correlation, -0.95, 0.95, "stated correlation")
        self.controls = [self.bias, self.width, self.correlation]
        self.image = ipw.Image(format="png", layout=ipw.Layout(width="100%", max_width="46em"))
        self.words = ipw.HTML()
        for control in self.controls:
            control.observe(self._redraw, names="value")
        self._redraw()
        super().__init__([*self.controls, self.image, self.words])

    def picture(self) -> FaultPicture:
        """The histograms where the sliders stand now."""
        return fault_picture(self.bias.value, self.width.value, self.correlation.value)

    def _redraw(self, change: Any = None) -> None:
        picture = self.picture()
        data = io.BytesIO()
        draw_faults(picture).savefig(data, format="png")
        self.image.value = data.getvalue()
        self.words.value = f'<span role="status">{picture.words()}</span>'

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        # Beside the live view, the picture as it stands: what a page without a kernel can show.
        bundle = super()._repr_mimebundle_(**kwargs)
        data = dict(bundle[0] if isinstance(bundle, tuple) else bundle)
        data["image/png"] = base64.b64encode(self.image.value).decode("ascii")
        return data


def fault_explorer(**first: float) -> FaultExplorer:
    """Break a posterior and watch the ranks; see [`FaultExplorer`][] for the settings."""
    return FaultExplorer(**first)
