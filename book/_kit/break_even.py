"""When amortizing pays: sliders for what a solver, a head and its training cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import traitlets
from matplotlib.figure import Figure

from _kit import style
from _kit.live import LiveWidget

_ENDS = {"events": (0, 7), "solver": (-5, 4), "head": (-7, 0), "training": (0, 6)}
"""Of the sliders, powers of ten."""


def seconds_of(run: Callable[[], Any], repeats: int = 7) -> float:
    """Median seconds of a call, after a first that may compile; jax's results are waited for."""
    took = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        took.append(time.perf_counter() - start)
    return float(np.median(took[1:]))


class BreakEven(LiveWidget):
    """Sliders for the costs; total seconds against the number of events, and where lines cross.

    With a kernel a head or a solver of your own is timed and drawn beside them.

    All but `share` are decimal logarithms.

    Attributes:
        events: of the number of events.
        solver: of the solver's seconds for an event.
        head: of the head's seconds for an event.
        training: of the seconds of training.
        share: of the events, those that a guard sends back to the solver.
    """

    events = traitlets.Float(4.0).tag(sync=True)
    solver = traitlets.Float().tag(sync=True)
    head = traitlets.Float().tag(sync=True)
    training = traitlets.Float().tag(sync=True)
    share = traitlets.Float(0.0).tag(sync=True)

    def __init__(
        self,
        *,
        solver: float,
        head: float,
        training: float,
        events: float = 1e4,
        share: float = 0.0,
        compare: tuple[float, float | Callable[[], Any]] | None = None,
        label: str = "yours",
    ):
        """Set the first position.

        Args:
            solver: seconds for an event.
            head: seconds for an event.
            training: seconds.
            events: how many.
            share: that a guard sends back to the solver, 0 to 0.5.
            compare: seconds of training, 0 for a solver, and what answers one event: a function
                without arguments, which is timed here, or its seconds.
            label: its name.

        Raises:
            ValueError: on a cost that is not positive, or beyond the sliders.
        """
        given = {"events": events, "solver": solver, "head": head, "training": training}
        for name, value in given.items():
            low, high = _ENDS[name]
            if not 10.0**low <= value <= 10.0**high:
                raise ValueError(f"expected 1e{low} <= {name} <= 1e{high}, got {value}")
        if not 0 <= share <= 0.5:
            raise ValueError(f"expected 0 <= share <= 0.5, got {share}")
        logs = {name: float(np.log10(value)) for name, value in given.items()}
        super().__init__(kind="break-even", title="When amortizing pays", share=share, **logs)
        if compare is not None:
            costs = _costs(compare)
            self.draw_beside(lambda: costs | {"label": label})

    def break_even(self) -> float:
        """The number of events from which on training has paid; infinite where it never does."""
        saved = 10**self.solver * (1 - self.share) - 10**self.head
        return 10**self.training / saved if saved > 0 else np.inf

    def still(self) -> tuple[Figure, str]:
        """The two lines, drawn by matplotlib."""
        n = np.logspace(0, 7, 50)
        solver, head = 10**self.solver, 10**self.head
        figure = Figure(figsize=style.WIDE)
        ax = figure.add_subplot()
        ax.loglog(n, n * solver, color=style.EXACT, label="solver")
        total = 10**self.training + n * (head + self.share * solver)
        ax.loglog(n, total, color=style.AMORTIZED, label="head, training included")
        ax.set(xlabel="events", ylabel="seconds")
        ax.legend()
        even = self.break_even()
        found = f"from {np.ceil(even):,.0f} events on" if np.isfinite(even) else "never"
        return figure, f"Total seconds against the number of events: training has paid {found}."


def _costs(compare: Any) -> dict[str, float]:
    if not isinstance(compare, tuple) or len(compare) != 2:
        raise ValueError(
            "expected the pair (seconds of training, a function to be timed or its seconds) to "
            f"compare with, got {compare!r}"
        )
    training, each = compare
    training, seconds = float(training), seconds_of(each) if callable(each) else float(each)
    if not 0 <= training < np.inf or not 0 < seconds < np.inf:
        raise ValueError(
            "expected seconds of training from 0 and more than 0 seconds an event, got "
            f"{training} and {seconds}"
        )
    return {"training": training, "seconds": seconds}


def break_even(**first: Any) -> BreakEven:
    """Change the costs and watch the lines cross; see [`BreakEven`][] for the settings."""
    return BreakEven(**first)
