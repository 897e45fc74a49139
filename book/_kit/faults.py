"""Sliders for a bias, over-confidence and a wrong correlation, and the rank histograms they make.

The posterior is the simplest with all three: two numbers with standard normal posteriors that are
correlated. A head answers with another mean, another width and another correlation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import traitlets
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from _kit import style
from _kit.gates_figures import binomial_band, rank_histogram
from _kit.live import LiveWidget
from _kit.noise import normals
from amortlib.calibration import ALPHA, bin_counts, holm, uniformity_p

Ranks = ArrayLike | tuple[ArrayLike, ArrayLike]

EVENTS = 1000
DRAWS = 99
BINS = 10
CORRELATION = 0.7
"""Of the exact posterior."""
CRITICAL = 23.589
"""Above this the sum of squares over ten bins closes the gate: one of two at 1%, after Holm."""
LEVELS = np.arange(21) / 20
TRUTH_SEED, DRAWS_SEED = 1, 2
_FEWEST = 5 * BINS
"""Events: with five expected in a bin the law of chi-square is close."""


@dataclass(frozen=True)
class FaultPicture:
    """Rank histograms of a head with a fault, `(BINS,)` each.

    Attributes:
        component: of the first number.
        energy: of J.
        coverage: share of truths in the central intervals of the component, at each of `LEVELS`.
        shape: what the first histogram looks like, in a word.
        energy_shape: likewise the second.
    """

    component: np.ndarray
    energy: np.ndarray
    coverage: np.ndarray
    shape: str
    energy_shape: str

    @property
    def passed(self) -> bool:
        """Whether the gate of simulation-based calibration stays open."""
        even = EVENTS / BINS
        chi = [float(((c - even) ** 2).sum() / even) for c in (self.component, self.energy)]
        return max(chi) < CRITICAL

    def words(self) -> str:
        """The picture in words."""
        return (
            f"The histogram of the component is {self.shape}, that of the energy "
            f"{self.energy_shape}. Of intervals said to hold 95% of the truths, "
            f"{100 * self.coverage[19]:.0f}% do. "
            f"The gate {'stays open' if self.passed else 'closes'}."
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

    def coloured(z: np.ndarray, rho: float) -> np.ndarray:
        return np.stack([z[..., 0], rho * z[..., 0] + np.sqrt(1 - rho**2) * z[..., 1]], -1)

    # In posterior units, from the exact mean: what the data are then makes no difference.
    truth = coloured(normals(TRUTH_SEED, 2 * EVENTS).reshape(EVENTS, 2), CORRELATION)
    noise = normals(DRAWS_SEED, 2 * EVENTS * DRAWS).reshape(EVENTS, DRAWS, 2)
    draws = bias + width * coloured(noise, correlation)

    def energy(x: np.ndarray) -> np.ndarray:
        square = x[..., 0] ** 2 - 2 * CORRELATION * x[..., 0] * x[..., 1] + x[..., 1] ** 2
        return 0.5 * square / (1 - CORRELATION**2)

    def histogram(ranks: np.ndarray) -> np.ndarray:
        return np.bincount(ranks * BINS // (DRAWS + 1), minlength=BINS)

    ranks = (draws[..., 0] < truth[:, None, 0]).sum(axis=1)
    component = histogram(ranks)
    of_energy = histogram((energy(draws) < energy(truth)[:, None]).sum(axis=1))
    words = shape_of(component), shape_of(of_energy)
    return FaultPicture(component, of_energy, central_coverage(ranks, DRAWS), *words)


def central_coverage(ranks: np.ndarray, draws: int) -> np.ndarray:
    """Share of truths in the central intervals of `draws` draws, at each of `LEVELS`."""
    # The smallest central interval of the draws that holds the truth.
    needed = np.abs((2 * ranks + 1) / (draws + 1) - 1)
    return (needed[:, None] <= LEVELS).mean(axis=0)


def judge_ranks(ranks: Ranks, draws: int, label: str) -> dict[str, Any]:
    """Ranks of a posterior of one's own as the page draws them, with the verdict of the gate.

    Args:
        ranks: of the truths among the draws, `(n,)` by a component, or a pair of these: by a
            component and by J. At least 50 events.
        draws: of each event.
        label: whose they are.

    Returns:
        `counts`, histograms as they would be for `EVENTS` events; `coverage` at each of `LEVELS`;
        the verdict in words as `said`; and the label.

    Raises:
        ValueError: on anything else, and where `BINS` bins do not divide the ranks.
    """
    rows = [np.asarray(row) for row in (ranks if isinstance(ranks, tuple) else (ranks,))]
    shapes = [row.shape for row in rows]
    if len(rows) > 2 or len(set(shapes)) != 1 or rows[0].ndim != 1:
        raise ValueError(f"expected ranks of shape (n,), or a pair of these, got shapes {shapes}")
    n = rows[0].size
    if n < _FEWEST:
        raise ValueError(f"expected the ranks of at least {_FEWEST} events, got {n}")
    for row in rows:
        whole = np.issubdtype(row.dtype, np.integer)
        if not whole or row.min() < 0 or row.max() > draws:
            raise ValueError(
                f"expected ranks that are whole numbers from 0 to {draws}, the number of draws, "
                f"got {row.dtype} from {row.min()} to {row.max()}"
            )
    counts = bin_counts(jnp.asarray(np.stack(rows)), draws, BINS)
    p = holm(np.asarray(uniformity_p(counts), float))
    said = [f"{value:.2g}" if value >= 1e-4 else "below 0.0001" for value in p]
    by = zip(said, ("component", "energy"), strict=False)
    found = " and ".join(f"{value} by the {name}" for value, name in by)
    gate = "stays open" if p.min() > ALPHA else "closes"
    return {
        "counts": (np.asarray(counts) * EVENTS / n).tolist(),
        "coverage": central_coverage(rows[0], draws).tolist(),
        "said": f"“{label}”: over {n:,} events p is {found}, and the gate {gate}.",
        "label": label,
    }


def draw_faults(picture: FaultPicture) -> Figure:
    """Both histograms."""
    figure = Figure(figsize=style.WIDE)
    left, right = figure.subplots(1, 2, sharey=True)
    rank_histogram(left, picture.component, "a component")
    rank_histogram(right, picture.energy, "the energy J")
    left.set_ylabel("events")
    left.set_ylim(0, max(250, 1.05 * max(picture.component.max(), picture.energy.max())))
    return figure


class FaultExplorer(LiveWidget):
    """Sliders for the fault; the two histograms, the coverage, and the gate's word.

    With a kernel the ranks of a posterior of your own are drawn beside them and judged.

    Attributes:
        bias: added to both means, in posterior standard deviations.
        width: the head's standard deviation over the exact one.
        correlation: that the head states.
    """

    bias = traitlets.Float(0.0).tag(sync=True)
    width = traitlets.Float(1.0).tag(sync=True)
    correlation = traitlets.Float(CORRELATION).tag(sync=True)

    def __init__(
        self,
        *,
        bias: float = 0.0,
        width: float = 1.0,
        correlation: float = CORRELATION,
        compare: Ranks | Callable[[float, float, float], Ranks] | None = None,
        draws: int = DRAWS,
        label: str = "yours",
    ):
        """Set the first position of the sliders.

        Args:
            bias: see [`fault_picture`][].
            width: likewise.
            correlation: likewise.
            compare: ranks, see [`judge_ranks`][], or a function that returns them for a bias, a
                width and a correlation, called at every position.
            draws: among which the truths are ranked.
            label: whose ranks they are.

        Raises:
            ValueError: on what are no ranks.
        """
        super().__init__(
            kind="faults",
            title="Faults and what shows them",
            bias=bias,
            width=width,
            correlation=correlation,
        )
        if compare is not None:

            def answer() -> dict[str, Any]:
                at = (self.bias, self.width, self.correlation)
                ranks = compare(*at) if callable(compare) else compare
                return judge_ranks(ranks, draws, label)

            self.draw_beside(answer, ["bias", "width", "correlation"])

    def picture(self) -> FaultPicture:
        """The histograms where the sliders stand now, computed by numpy."""
        return fault_picture(self.bias, self.width, self.correlation)

    def still(self) -> tuple[Figure, str]:
        """Both histograms, drawn by matplotlib."""
        picture = self.picture()
        return draw_faults(picture), picture.words()


def fault_explorer(**first: Any) -> FaultExplorer:
    """Break a posterior and watch the ranks; see [`FaultExplorer`][] for the settings."""
    return FaultExplorer(**first)
