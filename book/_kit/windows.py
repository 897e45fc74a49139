"""A forecast window in its smallest form, for pages that compile many programs around one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from amortlib.problems import InverseProblem, Window


class FixedSteps(eqx.Module):
    """x_0 -> H(states), as a `Window`, by the classical Runge-Kutta scheme in one plain loop.

    Four stages a step where a `Window` takes six, and the scheme that `js/lorenz.mjs` mirrors. Each
    program around a window compiles it anew: a page that searches, differentiates twice and samples
    has dozens. It has to agree with the window that it stands in for.

    Attributes:
        dynamics: deterministic, has `vector_field(t, x, args)`.
        operator: H, maps the states of the window, shape `(n, k)`, to clean observations.
        dt: time from one state of the window to the next.
        states: n, that at the initial time included.
        substeps: internal steps from one state to the next.
    """

    dynamics: Any
    operator: Callable[[jax.Array], jax.Array]
    dt: jax.Array
    states: int = eqx.field(static=True)
    substeps: int = eqx.field(static=True)

    @classmethod
    def like(cls, window: Window) -> FixedSteps:
        """The same window, in this form."""
        return cls(window.dynamics, window.operator, window.dt, window.states, window.substeps)

    @classmethod
    def in_place(cls, problem: InverseProblem) -> InverseProblem:
        """The problem with its window in this form."""
        return eqx.tree_at(lambda p: p.forward, problem, cls.like(problem.forward))

    def model(self, x: jax.Array) -> jax.Array:
        """The forecast from one state of the window to the next."""
        return self._steps(x, self.substeps)[-1]

    def trajectory(self, x0: jax.Array) -> jax.Array:
        """The states of the window from its initial one."""
        later = self._steps(x0, (self.states - 1) * self.substeps)
        return jnp.concatenate([x0[None], later[self.substeps - 1 :: self.substeps]])

    def _steps(self, x: jax.Array, steps: int) -> jax.Array:
        h = self.dt / self.substeps

        def f(x: jax.Array) -> jax.Array:
            return self.dynamics.vector_field(0.0, x, None)

        def step(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            k1 = f(x)
            k2 = f(x + h / 2 * k1)
            k3 = f(x + h / 2 * k2)
            k4 = f(x + h * k3)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            return x, x

        return jax.lax.scan(step, x, None, length=steps)[1]

    def __call__(self, x0: jax.Array) -> jax.Array:
        """What would be seen without noise."""
        return self.operator(self.trajectory(x0))
