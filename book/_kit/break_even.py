"""When amortizing pays: sliders for what a solver, a head and its training cost."""

from __future__ import annotations

import numpy as np
import traitlets
from matplotlib.figure import Figure

from _kit import style
from _kit.live import LiveWidget

_ENDS = {"events": (0, 7), "solver": (-5, 4), "head": (-7, 0), "training": (0, 6)}
"""Of the sliders, powers of ten."""


class BreakEven(LiveWidget):
    """Sliders for the costs; total seconds against the number of events, and where lines cross.

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
    ):
        """Set the first position.

        Args:
            solver: seconds for an event.
            head: seconds for an event.
            training: seconds.
            events: how many.
            share: that a guard sends back to the solver, 0 to 0.5.

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


def break_even(**first: float) -> BreakEven:
    """Change the costs and watch the lines cross; see [`BreakEven`][] for the settings."""
    return BreakEven(**first)
