"""One hole, two answers: a gap hides the sign of a Lorenz-63 window, and heads answer live."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np
import traitlets
from matplotlib.figure import Figure

from _kit import style
from _kit.heads import BIMODAL_HEADS, load_bimodal
from _kit.landscape import packed_events
from _kit.packing import pack_flow, pack_posterior, pack_score
from _kit.windowed import Answer, WindowWidget
from _kit.windows import FixedSteps
from amortlib.observation import gap
from amortlib.posterior import AmortizedPosterior
from amortlib.problems import InverseProblem, lorenz63_sign_lost
from amortlib.types import to_double

_EVENTS = 12
_NOISE = 0.5


def _problem() -> InverseProblem:
    """The window of `benchmarks.bimodal`, in plain steps: two from state to state are enough."""
    return FixedSteps.in_place(lorenz63_sign_lost(noise=_NOISE, substeps=2))


class OneHole(WindowWidget):
    """The gap and the event; draws of the posterior, of Laplace, a regression, a flow and a score.

    The page searches, weighs and samples by itself, with the weights that ship with the book. The
    draws of the score head come from noise before the reader's eyes, by the ODE and by the SDE.

    Attributes:
        start: first missing time, of five.
        length: how many times are missing.
        event: which pair of the simulator, of 12.
        shown: whose draws are drawn as paths.
    """

    shown = traitlets.Unicode("posterior").tag(sync=True)
    regression = traitlets.Bytes().tag(sync=True)
    flow = traitlets.Bytes().tag(sync=True)
    score = traitlets.Bytes().tag(sync=True)

    def __init__(
        self,
        heads: Mapping[str, AmortizedPosterior] | None = None,
        *,
        start: int = 0,
        length: int = 0,
        event: int = 0,
        compare: Answer | None = None,
        label: str = "yours",
    ):
        """Set the first position; other arguments as the attributes.

        Args:
            heads: a `"regression"`, a `"flow"` and a `"score"`; by default those that ship with
                the book.
            start: first missing time.
            length: how many times are missing.
            event: which pair.
            compare: see [`compare`][_kit.windowed.WindowWidget.compare].
            label: its name.

        Raises:
            amortlib.CheckpointError: where weights are missing or damaged.
        """
        if heads is None:
            heads = {name: load_bimodal(name)[0] for name in BIMODAL_HEADS}
        with jax.enable_x64(True):
            self.problem = to_double(_problem())
            settings, data = packed_events(self.problem, _EVENTS, mirror=(-1.0, -1.0, 1.0))
        super().__init__(
            kind="holes",
            title="One hole, two answers",
            start=start,
            length=length,
            event=event,
            events=_EVENTS,
            window=settings,
            data=data,
            regression=pack_posterior(heads["regression"]),
            flow=pack_flow(heads["flow"]),
            score=pack_score(heads["score"]),
        )
        self.compare(compare, label)

    def still(self) -> tuple[Figure, str]:
        """The truth and its mirror image, and what is seen of them."""
        with jax.enable_x64(True):
            truth, event = self.problem.simulate(jax.random.key(self.event))
            path = np.asarray(eqx.filter_jit(self.problem.forward.trajectory)(truth))[::2, 0]
            y = np.asarray(event.y)
        n = path.size
        mask = np.asarray(gap(n, self.start, self.length))
        size = np.sqrt(np.maximum(y[:, 0], 0.0) * self.problem.forward.operator.unit)
        size[0] = y[0, 0]
        figure = Figure(figsize=style.WIDE)
        ax = figure.add_subplot()
        t = np.arange(n)
        style.gap_shade(ax, t, mask)
        ax.plot(t, path, color=style.TRUTH, label="truth")
        ax.plot(t, -path, ":", color=style.TRUTH, label="its mirror image")
        later = mask & (t > 0)
        ax.plot(t[later], size[later], "o", color=style.OBS, label="observed")
        ax.plot(t[later], -size[later], "o", color=style.OBS)
        if mask[0]:
            ax.plot(0, size[0], "o", color=style.OBS)
        ax.set(xlabel="observation", ylabel="x", xlim=(-0.5, n - 0.5))
        figure.legend(loc="outside lower center", ncols=2)
        sign = "says which is right" if mask[0] else "is hidden, and both explain the rest"
        missing = int((~mask).sum())
        return figure, (
            f"A path of x and its mirror image over {n} times, {missing} of them missing; later "
            f"times know only the size of x, and the first time, which knows the sign, {sign}."
        )


def one_hole(heads: Mapping[str, AmortizedPosterior] | None = None, **first: Any) -> OneHole:
    """Widen the gap until the posterior splits; see [`OneHole`][] for the settings."""
    return OneHole(heads, **first)
