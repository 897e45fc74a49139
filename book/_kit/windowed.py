"""What the widgets on a Lorenz-63 window share: a gap, an event, and an answer of the kernel's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import traitlets

from _kit.live import LiveWidget
from amortlib.energy import Energy
from amortlib.observation import gap
from amortlib.problems import InverseProblem
from amortlib.solvers import Oracle
from amortlib.types import Event, to_double

Answer = Callable[[Event], Any] | Literal["oracle"]
"""A function of an event that returns states, or amortlib's oracle."""


class WindowWidget(LiveWidget):
    """The gap and the event; with a kernel, states that a function of yours returns for them.

    Attributes:
        start: first missing time.
        length: how many times are missing.
        event: which pair of the simulator.
        problem: the window, in double precision.
    """

    start = traitlets.Int(0).tag(sync=True)
    length = traitlets.Int(0).tag(sync=True)
    event = traitlets.Int(0).tag(sync=True)
    events = traitlets.Int(1).tag(sync=True)
    window = traitlets.Dict().tag(sync=True)
    data = traitlets.Bytes().tag(sync=True)

    problem: InverseProblem

    def seen(self) -> Event:
        """The event as the sliders stand, in double precision."""
        with jax.enable_x64(True):
            return _seen(self.problem, np.int64(self.event), self.start, self.length)

    def compare(self, answer: Answer | None, label: str) -> None:
        """Draw what `answer` returns for each event, now and whenever a slider is moved.

        Args:
            answer: called with the event, returns a state `(3,)` or several, `(n, 3)`; `"oracle"`
                for [`oracle_minima`][] of the widget's own problem; `None` for nothing. What it
                returns on a page without a kernel stays as it is here.
            label: its name in the legend.

        Raises:
            ValueError: on states of another shape, or an answer that is none of these.
        """
        if answer is None:
            return
        if answer == "oracle":
            answer = oracle_minima(self.problem)
        if not callable(answer):
            raise ValueError(f'expected a function of an event or "oracle", got {answer!r}')

        def asked() -> dict[str, Any]:
            states = np.atleast_2d(np.asarray(answer(self.seen()), float))
            if states.ndim != 2 or states.shape[1] != 3:
                raise ValueError(f"expected states of shape (n, 3), got {states.shape}")
            return {"states": states.tolist(), "label": label}

        self.draw_beside(asked, ["start", "length", "event"])


def _seen(problem: InverseProblem, event: Any, start: int, length: int) -> Event:
    _, drawn = _simulate(problem, event)
    at_times = gap(drawn.y.shape[0], start, length)
    return Event(drawn.y, jnp.broadcast_to(at_times[:, None], drawn.y.shape), drawn.sd)


@eqx.filter_jit
def _simulate(problem: InverseProblem, event: Any) -> Any:
    return problem.simulate(jax.random.key(event))


def oracle_minima(problem: InverseProblem) -> Callable[[Event], np.ndarray]:
    """The oracle, to be solved live: the different minima of an event within its reach.

    Args:
        problem: a window with its prior.

    Raises:
        ValueError: on a problem without a prior.
    """
    if problem.prior is None:
        raise ValueError("expected a problem with its prior: J needs it")
    with jax.enable_x64(True):
        precise = to_double(problem)
        oracle = Oracle(Energy(precise.prior, precise.forward))

    def answer(event: Event) -> np.ndarray:
        with jax.enable_x64(True):
            one = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], event)
            found = oracle(one, key=jax.random.key(0))
        return np.asarray(found.ends[0])[np.asarray(found.distinct[0])]

    return answer
