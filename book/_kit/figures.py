"""Drawings that several pages share. They take plain arrays and know no widget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
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


def ellipse(
    ax: Axes, centre: ArrayLike, covariance: ArrayLike, color: str, label: str | None, **look: Any
) -> Ellipse:
    """The ellipse that holds 95% of a Gaussian in the plane.

    Args:
        ax: where to draw.
        centre: mean, `(2,)`.
        covariance: `(2, 2)`.
        color: of its line.
        label: for the legend.
        look: further settings of the patch.
    """
    values, vectors = np.linalg.eigh(np.asarray(covariance, float))
    width, height = 2 * np.sqrt(5.991 * values)
    angle = float(np.degrees(np.arctan2(vectors[1, 0], vectors[0, 0])))
    settings = {"linewidth": 1.8, "zorder": 3} | look
    patch = Ellipse(
        tuple(np.asarray(centre, float)),
        width,
        height,
        angle=angle,
        fill=False,
        edgecolor=color,
        label=label,
        **settings,
    )
    ax.add_patch(patch)
    return patch


@dataclass(frozen=True)
class LandscapePicture:
    """The minima of J for one gappy window, and what lies around them, as plain arrays.

    Attributes:
        t: observed times, `(n,)`.
        mask: `True` = observed, `(n,)`.
        y: observations of one component, `(n,)`; entries where `mask` is false are not drawn.
        true_path: what would have been seen without error, `(n,)`.
        paths: the same from each minimum, `(k, n)`, with k one or two.
        names: of the two components of the plane.
        true_state: truth in the plane, `(2,)`.
        modes: minima in the plane, lowest first, `(k, 2)`.
        covariances: Laplace's, from the full Hessian at each, `(k, 2, 2)`.
        background: prior mean in the plane, `(2,)`.
        background_covariance: its covariance, `(2, 2)`.
        draws: of the reference, `(m, 2)`.
        at: positions along the line: with two minima 0 and 1 are they, with one they are
            standard deviations along the weakest direction.
        line: J there minus J at the lowest minimum.
        minima: how many different minima were found within 20 nats.
        rise: J at the next one minus J at the lowest, infinite where there is none.
        inside: share of the posterior in the ellipsoid that Laplace's approximation at the lowest
            minimum takes for 95%.
    """

    t: np.ndarray
    mask: np.ndarray
    y: np.ndarray
    true_path: np.ndarray
    paths: np.ndarray
    names: tuple[str, str]
    true_state: np.ndarray
    modes: np.ndarray
    covariances: np.ndarray
    background: np.ndarray
    background_covariance: np.ndarray
    draws: np.ndarray
    at: np.ndarray
    line: np.ndarray
    minima: int
    rise: float
    inside: float

    def words(self) -> str:
        """The picture in a sentence or two, for whoever does not see it."""
        missing = int((~self.mask).sum())
        many = len(self.modes) > 1
        found = (
            f"J has {self.minima} minima within 20 nats, the second {self.rise:.1f} nats above the "
            "lowest"
            if many
            else "J has one minimum within 20 nats"
        )
        return (
            f"{missing} of {self.mask.size} times are missing; {found}. The region that Laplace's "
            f"approximation at the lowest takes for 95% holds {100 * self.inside:.0f}% of the "
            "posterior."
        )


def draw_landscape(picture: LandscapePicture) -> Figure:
    """The paths from the minima, J along a line through them, and the plane of the control."""
    p = picture
    many = len(p.modes) > 1
    figure = Figure(figsize=(6.4, 6.4))
    axes = figure.subplot_mosaic([["path", "path"], ["line", "plane"]], height_ratios=[1.0, 1.35])
    looks = [(style.AMORTIZED, "o", "lowest minimum"), (style.OBS, "s", "second minimum")]
    looks = looks[: len(p.modes)]

    ax = axes["path"]
    style.gap_shade(ax, p.t, p.mask)
    ax.plot(p.t, p.true_path, color=style.TRUTH, linewidth=1.2, label="truth")
    for path, (color, _, _) in zip(p.paths, looks, strict=True):
        ax.plot(p.t, path, color=color)
    ax.plot(p.t[p.mask], p.y[p.mask], "x", color=style.INK, label="observations")
    ax.set(xlabel="time step", ylabel=f"{p.names[0]}(t)", xlim=(p.t[0] - 0.5, p.t[-1] + 0.5))
    ax.set_ylim(-24, 24)

    ax = axes["line"]
    ax.plot(p.at, p.line, color=style.EXACT)
    ends = [(0.0, 0.0), (1.0, p.rise)]
    for (at, value), (color, marker, _) in zip(ends, looks, strict=False):
        ax.plot(at, value, marker, color=color, markersize=8, zorder=4)
    top = max(8.0, 1.4 * p.rise) if many else 8.0
    ax.set_ylim(-0.05 * top, top)
    ax.set_title("J above its minimum")
    ax.set_xlabel("first to second minimum" if many else "sd, weakest direction")

    ax = axes["plane"]
    ax.plot(*p.draws.T, ".", color=style.EXACT, markersize=3, label="posterior", zorder=1)
    ellipse(
        ax, p.background, p.background_covariance, style.PRIOR, "background, 95%", linestyle=":"
    )
    for mode, covariance, (color, marker, label) in zip(p.modes, p.covariances, looks, strict=True):
        ax.plot(*mode, marker, color=color, markersize=8, label=label, zorder=4)
        if np.isfinite(covariance).all() and (np.linalg.eigvalsh(covariance) > 0).all():
            ellipse(ax, mode, covariance, color, None)
    ax.plot(*p.true_state, "*", color=style.TRUTH, markersize=12, zorder=5)
    spread = 3.0 * np.sqrt(np.diag(p.background_covariance))
    ax.set_xlim(p.background[0] - spread[0], p.background[0] + spread[0])
    ax.set_ylim(p.background[1] - spread[1], p.background[1] + spread[1])
    ax.set(xlabel=f"{p.names[0]} at time 0", title=f"{p.names[1]} at time 0")

    handles, labels = axes["path"].get_legend_handles_labels()
    more = ax.get_legend_handles_labels()
    figure.legend(handles + more[0], labels + more[1], loc="outside lower center", ncols=2)
    return figure
