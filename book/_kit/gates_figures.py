"""Drawings of what the gates find. They take plain arrays and know no widget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from _kit import style


def binomial_band(n: int, bins: int, z: float = 2.576) -> tuple[float, float]:
    """Where 99% of the counts of one bin lie, for n uniform ranks: normal approximation."""
    p = 1.0 / bins
    half = z * np.sqrt(n * p * (1.0 - p))
    return max(n * p - half, 0.0), n * p + half


def rank_histogram(ax: Axes, counts: ArrayLike, title: str = "") -> None:
    """Counts of ranks, and the band in which an exact posterior's bars lie.

    Args:
        ax: where to draw.
        counts: one for each bin.
        title: of the panel.
    """
    counts = np.asarray(counts)
    bins, n = counts.size, int(counts.sum())
    low, high = binomial_band(n, bins)
    ax.axhspan(low, high, color=style.GAP, linewidth=0, zorder=0)
    ax.axhline(n / bins, color=style.PRIOR, linewidth=1.0)
    ax.bar((np.arange(bins) + 0.5) / bins, counts, 0.92 / bins, color=style.AMORTIZED)
    ax.set(xlim=(0, 1), xlabel="rank of the truth", title=title)
    ax.set_xticks([0, 0.5, 1], ["0", "L/2", "L"])


def rank_histograms(counts: Sequence[ArrayLike], titles: Sequence[str]) -> Figure:
    """Some rank histograms, two in a row, with one scale."""
    rows = (len(counts) + 1) // 2
    figure = Figure(figsize=(style.WIDE[0], 2.5 * rows + 0.3))
    axes = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False)
    for ax, row, title in zip(axes.flat, counts, titles, strict=False):
        rank_histogram(ax, row, title)
        ax.label_outer()
    for ax in axes[:, 0]:
        ax.set_ylabel("events")
    for ax in axes.flat[len(counts) :]:
        ax.remove()
    return figure


def coverage_curves(
    levels: ArrayLike, shares: Sequence[ArrayLike], names: Sequence[str], band: float
) -> Figure:
    """Observed against stated coverage, curves within or outside the band of an exact posterior.

    Args:
        levels: stated probabilities, `(k,)`.
        shares: observed ones, a curve for each name.
        names: what each curve is.
        band: half-width in which the whole curve of an exact posterior stays.
    """
    levels = np.asarray(levels)
    figure = Figure(figsize=style.NARROW)
    ax = figure.add_subplot()
    ax.fill_between(levels, levels - band, levels + band, color=style.GAP, linewidth=0)
    for share, name, color, line in zip(
        shares, names, style.CYCLE, ("-", "--", ":", "-."), strict=False
    ):
        ax.plot(levels, np.asarray(share), line, color=color, label=name)
    ax.set(xlabel="stated probability", ylabel="share of events", xlim=(0, 1), ylim=(0, 1))
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def event_statistics(
    panels: Sequence[tuple[str, float, Sequence[tuple[str, ArrayLike]]]],
) -> Figure:
    """Distribution of a statistic over events against its threshold, a panel for each gate.

    Args:
        panels: name, threshold, and for each head its name and its values.
    """
    figure = Figure(figsize=style.WIDE)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, (name, threshold, heads) in zip(axes, panels, strict=True):
        for (head, values), color, line in zip(heads, style.CYCLE, ("-", "--", ":"), strict=False):
            # A statistic of zero has no place on a logarithmic axis: it stands at its left end.
            at = np.sort(np.maximum(np.asarray(values, float), 1e-6))
            share = np.arange(1, at.size + 1) / at.size
            ax.step(at, 100 * share, line, where="post", color=color, label=head)
        ax.axvline(threshold, color=style.OBS, linewidth=1.2)
        ax.set(xscale="log", title=name, xlabel="statistic", ylim=(0, 103))
    axes[0].set_ylabel("events at or below (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def several_minima(
    heads: Sequence[tuple[str, ArrayLike, ArrayLike]], c2st: float, weights: float
) -> Figure:
    """Events with several minima against a reference: a dot for each, and the mean of each head.

    Args:
        heads: for each its name, the accuracy of the classifier on every event, and the error of
            the weights of the pieces in times of its Monte Carlo floor.
        c2st: what the mean of the first may be at most.
        weights: what the mean of the second may be at most.
    """
    figure = Figure(figsize=style.WIDE)
    panels = (
        ("told from the reference (C2ST)", c2st),
        ("error of the weights / its floor", weights),
    )
    rng = np.random.default_rng(0)
    for k, (ax, (label, limit)) in enumerate(
        zip(figure.subplots(1, 2, sharey=True), panels, strict=True)
    ):
        for row, entry in enumerate(heads):
            values = np.asarray(entry[k + 1], float)
            spread = row + 0.12 * rng.uniform(-1, 1, values.size)
            ax.plot(values, spread, "o", color=style.AMORTIZED, alpha=0.45, markersize=5)
            ax.plot(values.mean(), row, "|", color=style.EXACT, markersize=26, markeredgewidth=3)
        ax.axvline(limit, color=style.OBS, linewidth=1.2)
        ax.set(xlabel=label, ylim=(len(heads) - 0.5, -0.5))
        if k:
            ax.set_xscale("log")
    figure.axes[0].set_yticks(range(len(heads)), [entry[0] for entry in heads])
    return figure
