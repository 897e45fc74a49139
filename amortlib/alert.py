"""The alert: events that come one by one, each with a time by which it must be answered."""

import time
from collections.abc import Callable

import equinox as eqx
import jax
import numpy as np

from amortlib.catalogue import Answer, Fallback, Status, finite_rows, unusable
from amortlib.types import Array, Event, InvalidEventError, Key

__all__ = ["Alert", "Reply"]

_SLACK = 1.5
"""The solver is asked only where so many times its usual time is left."""


class Reply(eqx.Module):
    """What was answered to one event.

    Attributes:
        answer: named arrays; empty where there is no answer.
        status: what became of the event.
        seconds: from the event's coming in to the answer.
        in_time: whether that was within the budget.
    """

    answer: dict[str, np.ndarray]
    status: Status
    seconds: float
    in_time: bool


class Alert:
    """Answers events as they come in, within a budget of time.

    The head answers first. Where the guard in `answer` says DISTRUSTED and there is time left for
    the solver, the solver is asked; where there is not, the head's answer goes out marked as one
    not to be trusted: late is worse than marked. Everything is compiled before the first event,
    and the time that a compiled call takes is measured then.

    Attributes:
        budget: seconds an event.
        solver_seconds: what the fallback took when it was tried, the median of five calls; infinite
            without one.
    """

    def __init__(
        self,
        answer: Answer,
        example: Event,
        *,
        key: Key,
        budget: float,
        fallback: Fallback | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Compile for events like an example.

        Args:
            answer: as for [`reprocess`][amortlib.catalogue.reprocess].
            example: one event of the shape that will come; its values do not matter.
            key: event i is answered with this key folded with i.
            budget: seconds.
            fallback: as for `reprocess`; it is given batches of one.
            clock: seconds, rising.

        Raises:
            ValueError: on a budget that is not positive, or an answer without a status.
        """
        if not budget > 0:
            raise ValueError(f"expected a budget of seconds > 0, got {budget}")
        self.budget, self._clock, self._key = budget, clock, key
        self._shapes = [np.shape(leaf) for leaf in jax.tree.leaves(example)]
        self._fallback, self._count = fallback, 0
        self._run = eqx.filter_jit(answer)
        first = self._run(example, key)
        if not isinstance(first, dict) or "status" not in first:
            raise ValueError("expected the answer to be a dictionary with a `status`")
        self.solver_seconds = np.inf
        if fallback is not None:
            times = []
            for _ in range(6):
                start = clock()
                self._solve(example, _to_numpy(first), key)
                times.append(clock() - start)
            self.solver_seconds = float(np.median(times[1:]))  # the first one compiled

    def _solve(self, event: Event, found: dict[str, np.ndarray], key: Key) -> dict[str, np.ndarray]:
        assert self._fallback is not None
        batch = jax.tree.map(lambda a: np.asarray(a)[None], event)
        given = {name: array[None] for name, array in found.items()}
        better = self._fallback(batch, given, key[None])
        better = {"status": np.array([Status.SOLVED])} | better
        return {name: np.asarray(np.asarray(array)[0]) for name, array in better.items()}

    def __call__(self, event: Event) -> Reply:
        """Answer one event.

        An event with a value that cannot be used is refused, in its status, and the stream goes
        on.

        Raises:
            InvalidEventError: on an event of another shape than the example's, for which nothing
                is compiled.
        """
        start = self._clock()
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(event)]
        if shapes != self._shapes:
            raise InvalidEventError(f"expected an event of shapes {self._shapes}, got {shapes}")
        key = jax.random.fold_in(self._key, self._count)
        self._count += 1
        if unusable(jax.tree.map(lambda a: np.asarray(a)[None], event))[0]:
            return self._reply({}, Status.REFUSED, start)
        found = _to_numpy(self._run(event, key))
        status = Status(int(found["status"]))
        unsure = status == Status.DISTRUSTED or not _finite(found)
        left = self.budget - (self._clock() - start)
        if unsure and _SLACK * self.solver_seconds <= left:
            found = found | self._solve(event, found, key)
            status = Status(int(found["status"]))
        if not _finite(found):
            return self._reply({}, Status.FAILED, start)
        del found["status"]
        return self._reply(found, status, start)

    def _reply(self, answer: dict[str, np.ndarray], status: Status, start: float) -> Reply:
        took = self._clock() - start
        return Reply(answer, status, took, took <= self.budget)


def _finite(found: dict[str, np.ndarray]) -> bool:
    return bool(finite_rows({name: np.asarray(array)[None] for name, array in found.items()})[0])


def _to_numpy(found: dict[str, Array]) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in found.items()}
