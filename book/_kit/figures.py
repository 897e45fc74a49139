"""Drawings that several pages share. They take plain arrays and know no widget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from _kit import style


@dataclass(frozen=True)
class GapPicture:
    """All that the picture of one gappy event shows, as plain arrays of shape `(n,)`.

    Attributes:
        t: times.
        truth: the state that the simulator drew.
        y: observations; entries where `mask` is false are not drawn.
        mask: `True` = observed.
        exact_mean: mean of the exact posterior.
        exact_sd: its standard deviation.
        head_mean: mean of the amortized posterior.
        head_sd: its standard deviation.
        kl: KL(exact || amortized) in nats.
    """

    t: np.ndarray
    truth: np.ndarray
    y: np.ndarray
    mask: np.ndarray
    exact_mean: np.ndarray
    exact_sd: np.ndarray
    head_mean: np.ndarray
    head_sd: np.ndarray
    kl: float

    def words(self) -> str:
        """The picture in one sentence, for whoever does not see it."""
        missing = int((~self.mask).sum())
        widest = float(self.head_sd.max())
        return (
            f"{missing} of {self.mask.size} times are missing; the amortized standard deviation "
            f"is {float(self.head_sd.min()):.2f} at its smallest and {widest:.2f} at its largest, "
            f"and the amortized posterior is {self.kl:.4f} nats from the exact one."
        )


def draw_gap(picture: GapPicture, *, ylim: tuple[float, float] = (-3.5, 3.5)) -> Figure:
    """Truth, observations, exact and amortized posterior of one event.

    The figure is made without pyplot, so that nothing is left open behind a moving slider.
    """
    figure = Figure(figsize=style.WIDE)
    ax = figure.add_subplot()
    p = picture
    style.gap_shade(ax, p.t, p.mask)
    style.band(ax, p.t, p.head_mean, p.head_sd, style.AMORTIZED, "amortized, 95%")
    ax.plot(p.t, p.exact_mean, "--", color=style.EXACT, label="exact, 95%")
    for side in (-1.96, 1.96):
        ax.plot(p.t, p.exact_mean + side * p.exact_sd, "--", color=style.EXACT, linewidth=1.0)
    ax.plot(p.t, p.truth, color=style.TRUTH, linewidth=1.2, label="truth")
    ax.plot(p.t[p.mask], p.y[p.mask], "o", color=style.OBS, label="observations")
    ax.set(xlabel="time step", ylabel="state", ylim=ylim, xlim=(p.t[0] - 0.5, p.t[-1] + 0.5))
    ax.set_title(f"KL(exact || amortized) = {p.kl:.4f} nats")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def coverage_bars(
    levels: ArrayLike, shares: ArrayLike, errors: ArrayLike, names: list[str]
) -> Figure:
    """Observed against stated coverage, one panel of bars with their sampling error.

    Args:
        levels: stated levels, `(k,)`.
        shares: observed shares, `(m, k)`, a row for each name.
        errors: one standard error of each share, `(m, k)`.
        names: what each row is.
    """
    levels, shares, errors = np.asarray(levels), np.asarray(shares), np.asarray(errors)
    figure = Figure(figsize=style.WIDE)
    ax = figure.add_subplot()
    width = 0.8 / len(names)
    for row, name in enumerate(names):
        at = np.arange(levels.size) + (row - (len(names) - 1) / 2) * width
        ax.bar(
            at,
            100 * shares[row],
            width * 0.92,
            yerr=200 * errors[row],
            color=style.CYCLE[row],
            label=name,
            error_kw={"ecolor": style.INK, "capsize": 4},
        )
    for i, level in enumerate(levels):
        ax.plot([i - 0.45, i + 0.45], [100 * level] * 2, color=style.INK, linewidth=1.2)
    ax.set_xticks(np.arange(levels.size), [f"{100 * level:.0f}%" for level in levels])
    ax.set(xlabel="stated coverage", ylabel="observed coverage (%)", ylim=(0, 105))
    figure.legend(loc="outside lower center", ncols=2)
    return figure
