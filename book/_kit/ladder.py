"""The way from network to solver, live: steps on J from a head's guess, and the three gates."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import traitlets
from matplotlib.figure import Figure

from _kit import style
from _kit.heads import load_lorenz63_flow
from _kit.landscape import packed_events
from _kit.packing import pack_posterior
from _kit.windowed import Answer, WindowWidget
from _kit.windows import FixedSteps
from amortlib.energy import Energy
from amortlib.posterior import AmortizedPosterior
from amortlib.problems import InverseProblem, lorenz63
from amortlib.refine import refine
from amortlib.types import Event, to_double

_EVENTS = 100
_SHOWN = (0, 1, 2, 4)
"""Numbers of steps in the still picture."""


def _problem() -> InverseProblem:
    """The window that the guess was trained on, in plain steps: two from state to state do."""
    return FixedSteps.in_place(lorenz63(substeps=2))


class RefinementLadder(WindowWidget):
    """The number of steps, the gap, the event and how the answer is differentiated.

    The page makes the guess, takes the steps, finds the oracle's minima and judges 100 windows.

    Attributes:
        steps: k, 0 to 6.
        start: first missing time, of five.
        length: how many times are missing.
        event: which window, of 100.
        derivative: `"implicit"` or `"unrolled"`.
    """

    steps = traitlets.Int(0).tag(sync=True)
    derivative = traitlets.Unicode("implicit").tag(sync=True)
    guess = traitlets.Bytes().tag(sync=True)

    def __init__(
        self,
        guess: AmortizedPosterior | None = None,
        *,
        steps: int = 0,
        start: int = 0,
        length: int = 0,
        event: int = 0,
        compare: Answer | None = None,
        label: str = "yours",
    ):
        """Set the first position; other arguments as the attributes.

        Args:
            guess: a plain Cholesky head for the window; by default the one that ships.
            steps: k.
            start: first missing time.
            length: how many times are missing.
            event: which window.
            compare: see [`compare`][_kit.windowed.WindowWidget.compare].
            label: its name.

        Raises:
            amortlib.CheckpointError: where weights are missing or damaged.
        """
        if guess is None:
            guess = load_lorenz63_flow()[0].encoder.guess.tree
        self.model = guess
        with jax.enable_x64(True):
            self.problem = to_double(_problem())
            settings, data = packed_events(self.problem, _EVENTS)
        super().__init__(
            kind="ladder",
            title="From network to solver",
            steps=steps,
            start=start,
            length=length,
            event=event,
            events=_EVENTS,
            window=settings,
            data=data,
            guess=pack_posterior(guess),
        )
        self.compare(compare, label)

    def way(self) -> np.ndarray:
        """J after 0, 1, 2 and 4 steps from the guess, in double precision."""
        with jax.enable_x64(True):
            energy = Energy(self.problem.prior, self.problem.forward)
            model = to_double(self.model)

            @eqx.filter_jit
            def run(model, energy, y, mask, sd):
                event = Event(y, mask, sd)
                v = energy.prior.whiten(model(event).mean())
                ends = [refine(energy, v, event, steps=k, derivative="unrolled") for k in _SHOWN]
                return jnp.stack([energy(energy.prior.colour(end), event) for end in ends])

            event = self.seen()
            sd = jnp.broadcast_to(self.problem.obs_noise.sd, event.y.shape)
            return np.asarray(run(model, energy, event.y, event.mask, sd))

    def still(self) -> tuple[Figure, str]:
        """J after each step, drawn by matplotlib."""
        way = self.way()
        figure = Figure(figsize=style.WIDE)
        ax = figure.add_subplot()
        ax.semilogy(_SHOWN, np.maximum(way, 1e-3), "o-", color=style.AMORTIZED)
        ax.set(xlabel="steps, k", ylabel="J, nats")
        return figure, (
            f"J of one window along the way from the guess: {way[0]:.2f} nats at the guess, "
            f"{way[1]:.2f} after one step, {way[-1]:.2f} after four."
        )


def refinement_ladder(guess: AmortizedPosterior | None = None, **first: Any) -> RefinementLadder:
    """Take steps and watch the gates; see [`RefinementLadder`][] for the settings."""
    return RefinementLadder(guess, **first)
