"""A promoted head at work: what the catalogue and the alert ask of it, and of the solver."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from amortlib.catalogue import Status
from amortlib.guard import Guard, Trust
from amortlib.laplace import laplace
from amortlib.posterior import in_buckets
from amortlib.solvers import IncrementalFourDVar
from amortlib.types import Array, Event, Key

__all__ = ["GuardedHead", "WarmStart"]


class GuardedHead(eqx.Module):
    """An answer for `reprocess` and `Alert`: the head's, or refined, with the guard's word on it.

    Attributes:
        guard: which holds the head and J.

    Raises:
        amortlib.guard.GuardError: on a guard around another head or another J than it was set with.
    """

    guard: Guard

    def __check_init__(self):
        self.guard.check()

    def __call__(self, event: Event, key: Key) -> dict[str, Array]:
        """Mode and standard deviations of one event, `(d,)` each, and a status.

        TRUSTED with the head's own; REFINED with the point where the guard's steps on J ended and
        Laplace's approximation there; DISTRUSTED with the head's own, for the solver to better.
        """
        said = self.guard(event, key=key)
        q = self.guard.posterior.value(event)
        around = laplace(self.guard.energy.value, said.refined, event, full=False)
        refined = said.trust == Trust.REFINE
        codes = jnp.array([Status.TRUSTED, Status.REFINED, Status.DISTRUSTED])
        return {
            "mode": jnp.where(refined, said.refined, q.mode()),
            "sd": jnp.where(refined, around.sd(), q.sd()),
            "status": codes[said.trust],
        }


class WarmStart:
    """A fallback for `reprocess` and `Alert`: incremental 4DVar from the head's mode.

    Events in any number share one program for each power of two. An event on which the solver does
    not converge keeps the head's answer and stays DISTRUSTED.
    """

    def __init__(self, solver: IncrementalFourDVar):
        """Set the solver."""

        def solve(event: Event, start: Float[Array, " d"]) -> tuple[Array, Array, Array]:
            found = solver(event, throw=False, start=start)
            return found.mode, jnp.sqrt(jnp.diagonal(found.covariance)), found.converged

        self._solve = solve

    def __call__(
        self, events: Event, answers: dict[str, np.ndarray], keys: Any
    ) -> dict[str, np.ndarray]:
        """Better answers to a batch of events; where the head has no finite mode, from 0 on.

        Args:
            events: with a leading axis.
            answers: those of a [`GuardedHead`][].
            keys: not read: the solver draws nothing.
        """
        start = np.nan_to_num(answers["mode"], posinf=0.0, neginf=0.0)
        mode, sd, fine = in_buckets(self._solve, events, start)
        fine = fine & np.isfinite(mode).all(axis=1) & np.isfinite(sd).all(axis=1)
        return {
            "mode": np.where(fine[:, None], mode, answers["mode"]),
            "sd": np.where(fine[:, None], sd, answers["sd"]),
            "status": np.where(fine, Status.SOLVED, Status.DISTRUSTED),
        }
