"""An assimilation window: the states that a forecast passes through, and what is seen of them."""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import ArrayLike, Float

from amortlib.dynamics import explicit_step, explicit_tableau
from amortlib.gaussian import Gaussian, GaussMarkov
from amortlib.types import Array

__all__ = ["WeakWindow", "Window"]


class Window(eqx.Module):
    """x_0 -> H(x_0, M(x_0), M(M(x_0)), ...): the forward model of strong-constraint 4DVar.

    The model is perfect: the initial state is all there is to know. Its derivative is that of
    the discrete model, since the internal step is fixed.

    Attributes:
        dynamics: deterministic, has `vector_field(t, x, args)`.
        operator: H, maps the states of the window, shape `(n, k)`, to clean observations.
        dt: time from one state of the window to the next.
        states: n, the number of states, that at the initial time included.
        substeps: internal steps of the integrator from one state to the next.
        solver: a diffrax solver.
        adjoint: how `diffrax.diffeqsolve` is differentiated. `diffrax.DirectAdjoint()` gives
            tangent-linear products and adjoint ones; `diffrax.RecursiveCheckpointAdjoint()` adjoint
            ones alone, in the least memory; `diffrax.ForwardMode()` tangent-linear ones alone.
            With `None` the steps of an explicit Runge-Kutta method of diffrax are taken in a plain
            loop: both kinds of products, the same numbers, and a program that is smaller by far.
    """

    dynamics: Any
    operator: Callable[[Array], Array]
    dt: Float[Array, ""]
    states: int = eqx.field(static=True)
    substeps: int = eqx.field(static=True)
    solver: dfx.AbstractSolver
    adjoint: dfx.AbstractAdjoint | None

    def __init__(
        self,
        dynamics: Any,
        operator: Callable[[Array], Array],
        *,
        dt: ArrayLike,
        states: int,
        substeps: int = 5,
        solver: dfx.AbstractSolver | None = None,
        adjoint: dfx.AbstractAdjoint | None = None,
    ):
        """Set the window; arguments as the attributes, the solver by default Tsit5.

        Raises:
            ValueError: on fewer than two states, no substep, or dynamics with a diffusion.
        """
        if states < 2 or substeps < 1:
            raise ValueError(f"expected states >= 2 and substeps >= 1, got {states}, {substeps}")
        if hasattr(dynamics, "diffusion"):
            raise ValueError(
                f"expected deterministic dynamics, got {type(dynamics).__name__} with a diffusion; "
                "errors of the model are controls of their own in a WeakWindow"
            )
        self.dynamics, self.operator = dynamics, operator
        self.dt = jnp.asarray(dt, float)
        self.states, self.substeps = states, substeps
        self.solver = dfx.Tsit5() if solver is None else solver
        self.adjoint = adjoint

    def model(self, x: Float[Array, " k"]) -> Float[Array, " k"]:
        """M: the forecast from one state of the window to the next."""
        return self._integrate(x, 2)[-1]

    def trajectory(self, x0: Float[Array, " k"]) -> Float[Array, "n k"]:
        """The states of the window from its initial one."""
        return self._integrate(x0, self.states)

    def _integrate(self, x: Float[Array, " k"], states: int) -> Float[Array, "n k"]:
        # Every internal step is saved and the states are picked out of them: interpolation at
        # given times would double the cost of the adjoint.
        steps = (states - 1) * self.substeps
        times = self.dt / self.substeps * jnp.arange(steps + 1)
        tableau = explicit_tableau(self.solver)
        if self.adjoint is None and tableau is not None:
            return self._loop(tableau, x, times)[:: self.substeps]
        solution = dfx.diffeqsolve(
            dfx.ODETerm(self.dynamics.vector_field),
            self.solver,
            t0=times[0],
            t1=times[-1],
            dt0=None,
            y0=x,
            saveat=dfx.SaveAt(t0=True, steps=True),
            stepsize_controller=dfx.StepTo(times),
            adjoint=dfx.DirectAdjoint() if self.adjoint is None else self.adjoint,
            max_steps=steps,
        )
        return solution.ys[:: self.substeps]

    def _loop(self, tableau: dfx.ButcherTableau, x: Float[Array, " k"], times: Array) -> Array:
        """`x` and the states after an explicit Runge-Kutta step from each time to the next."""

        def step(x: Array, span: tuple[Array, Array]) -> tuple[Array, Array]:
            x = explicit_step(tableau, self.dynamics.vector_field, span[0], span[1] - span[0], x)
            return x, x

        _, later = jax.lax.scan(step, x, (times[:-1], times[1:]))
        return jnp.concatenate([x[None], later])

    def __call__(self, x0: Float[Array, " k"]) -> Float[Array, "*obs"]:
        """What would be seen without noise."""
        return self.operator(self.trajectory(x0))


class WeakWindow(eqx.Module):
    """(x_0, eta_1, ..., eta_T) -> H(x_0, M(x_0) + eta_1, ...): the model is allowed to be wrong.

    The forward model of weak-constraint 4DVar in its forcing form: Tremolet (2006), *Accounting
    for an imperfect model in 4D-Var*, Q. J. R. Meteorol. Soc. 132, section 2. The control is flat,
    x_0 first, then one model error for each later state.

    Attributes:
        window: the model and the operator.
    """

    window: Window

    def trajectory(self, control: Float[Array, " d"]) -> Float[Array, "n k"]:
        """The states of the window, each the forecast from the one before plus its error."""
        blocks = control.reshape(self.window.states, -1)

        def step(x, eta):
            nxt = self.window.model(x) + eta
            return nxt, nxt

        _, rest = jax.lax.scan(step, blocks[0], blocks[1:])
        return jnp.concatenate([blocks[:1], rest])

    def __call__(self, control: Float[Array, " d"]) -> Float[Array, "*obs"]:
        """What would be seen without noise."""
        return self.window.operator(self.trajectory(control))

    def prior(self, background: Gaussian, model_error_sd: ArrayLike) -> GaussMarkov:
        """Density of the control: N(x_b, B) for x_0 and N(0, Q) for each model error, independent.

        Args:
            background: of x_0.
            model_error_sd: square root of the diagonal of Q, a number or shape `(k,)`.

        Raises:
            ValueError: on a standard deviation that is not positive: Q = 0 is the strong
                constraint, and has a window of its own.
        """
        k, errors = background.loc.size, self.window.states - 1
        if not isinstance(model_error_sd, Tracer) and not np.all(np.asarray(model_error_sd) > 0):
            raise ValueError(
                f"expected model_error_sd > 0, got {model_error_sd}; a model without error is a "
                "strong constraint: use the Window itself"
            )
        sd = jnp.broadcast_to(jnp.asarray(model_error_sd, background.loc.dtype), (k,))
        precisions = jnp.broadcast_to(jnp.diag(sd**-2), (errors, k, k))
        diag = jnp.concatenate([background.precision()[None], precisions])
        loc = jnp.concatenate([background.loc, jnp.zeros(errors * k, background.loc.dtype)])
        return GaussMarkov.from_precision(loc, diag, jnp.zeros((errors, k, k), diag.dtype))
