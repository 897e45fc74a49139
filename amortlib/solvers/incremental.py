"""Incremental 4DVar: a Gauss-Newton loop around conjugate gradients on linear models."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Float, Int

from amortlib.energy import Energy
from amortlib.solvers.base import AbstractSolver, Analysis, analyse
from amortlib.types import Array, Event

__all__ = ["IncrementalFourDVar"]


class IncrementalFourDVar(AbstractSolver):
    """Minimises J by a sequence of quadratic costs of increments.

    Courtier, Thepaut and Hollingsworth (1994), *A strategy for operational implementation of
    4D-Var, using an incremental approach*, Q. J. R. Meteorol. Soc. 120. With x = x_b + B^{1/2} v
    (the control-variable transform) each outer step linearises the forward model at v, as the
    tangent-linear model L with its adjoint L^T, and finds the increment dv of

        (I + L^T R^-1 L) dv = -grad J(v)

    by conjugate gradients, matrix-free: an inner step is one tangent-linear and one adjoint run.
    The transform starts the spectrum at one, so the number of inner steps is bounded by the number
    of observations, whatever B is.

    Pure Gauss-Newton steps may raise J in a chaotic window, or throw v many standard deviations
    off, into a minimum that nobody wants. So the first steps are damped, (lambda + 1) I + ..., as
    in Levenberg-Marquardt; a step that raises J is thrown away and the next is damped more, and
    after good ones the damping falls until it is gone. Gratton, Lawless and Nichols (2007),
    *Approximate Gauss-Newton methods for nonlinear least squares problems*, SIAM J. Optim. 18, say
    when plain steps converge.

    J of a long window folds into many minima where that of its first part has one. Pires, Vautard
    and Talagrand (1996), *On extending the limits of variational assimilation in nonlinear chaotic
    systems*, Tellus 48A, let the times of the observations in one after the other and follow the
    minimum: quasi-static assimilation.

    Attributes:
        energy: J. Its forward model needs both kinds of products, as a `Window` has by default.
        tolerance: ends where the norm of the gradient in v is below this, relative to one plus the
            norm of v; or where the increment no longer changes J in floating point.
        inner_tolerance: residual, relative to the gradient, at which an inner loop ends.
        max_outer: bound on the outer steps.
        max_inner: bound on the inner steps of each. In exact arithmetic the smaller of the numbers
            of observations and of controls is enough; by default five more than that.
        damping: lambda at the first step. v is in units of the background's standard deviation,
            so 10 is a step of a third of one; 0 starts with a pure Gauss-Newton step.
        matrix: make L as a matrix once an outer step, one tangent-linear run a control, all in
            one batch, and let inner steps multiply by it; else make them run the linear models.
            By default up to 16 controls: a small model is bound by its time loop, and one batch
            of runs costs hardly more than one run.
        quasi_static: outer steps, at most, before the next of the observed times is let in; the
            leading axis of y is time. By default all are there from the start.
    """

    energy: Energy
    tolerance: float = eqx.field(static=True, default=1e-5)
    inner_tolerance: float = eqx.field(static=True, default=1e-3)
    max_outer: int = eqx.field(static=True, default=64)
    max_inner: int | None = eqx.field(static=True, default=None)
    damping: float = eqx.field(static=True, default=10.0)
    matrix: bool | None = eqx.field(static=True, default=None)
    quasi_static: int | None = eqx.field(static=True, default=None)

    def __call__(
        self, event: Event, *, throw: bool = True, start: Float[Array, " d"] | None = None
    ) -> Analysis:
        """Analyse one event, from the background or from another `start`, shape `(d,)`."""
        energy = self.energy
        first = jnp.zeros_like(energy.prior.loc) if start is None else energy.prior.whiten(start)
        eps = jnp.finfo(first.dtype).eps

        def scaled(v):
            return energy.residual(v, event)[v.size :]

        level, last = self._levels(event)

        def cost(v, r, stage):
            return 0.5 * (jnp.sum(v**2) + jnp.sum(jnp.where(level <= stage, r, 0.0) ** 2))

        def step(carry):
            v, r, damping, growth, stage, within, outer, inner, _ = carry
            tangent, adjoint = self._models(scaled, v)
            j = cost(v, r, stage)

            def weighted_adjoint(r):
                return adjoint(jnp.where(level <= stage, r, 0.0))

            gradient = v + weighted_adjoint(r)
            operator = lx.FunctionLinearOperator(
                lambda dv: (1.0 + damping) * dv + weighted_adjoint(tangent(dv)),
                jax.ShapeDtypeStruct(v.shape, v.dtype),
                lx.positive_semidefinite_tag,
            )
            limit = min(r.size, v.size) + 5 if self.max_inner is None else self.max_inner
            # The absolute part matters: an entry of the gradient may be zero and stay so.
            tol = self.inner_tolerance
            unit = jnp.maximum(jnp.max(jnp.abs(gradient)), jnp.finfo(v.dtype).tiny)
            solver = lx.CG(rtol=tol, atol=tol, max_steps=limit)
            solution = lx.linear_solve(operator, -gradient / unit, solver, throw=False)
            dv = unit * solution.value
            new_v = v + dv
            new_r = scaled(new_v)
            new_j = cost(new_v, new_r, stage)
            small = jnp.linalg.norm(gradient) <= self.tolerance * (1.0 + jnp.linalg.norm(v))
            # By how much the quadratic cost says that J falls: below rounding, nothing is left.
            quadratic = -0.5 * jnp.dot(gradient, dv) + 0.5 * damping * jnp.sum(dv**2)
            still = small | (quadratic <= eps * j)
            ratio = jnp.where(jnp.isfinite(new_j), (j - new_j) / quadratic, -1.0)
            keep = (ratio > 1e-4) & ~small
            # Nielsen (1999), Damping parameter in Marquardt's method, section 2.2.
            eased = damping * jnp.maximum(0.1, 1.0 - (2.0 * ratio - 1.0) ** 3)
            eased = jnp.where(eased < 1e-3, 0.0, eased)
            tightened = jnp.where(small, damping, jnp.maximum(growth * damping, 0.1))
            more = (stage < last) & (still | (within + 1 >= (self.quasi_static or 0)))
            return (
                jnp.where(keep, new_v, v),
                jnp.where(keep, new_r, r),
                jnp.where(keep, eased, tightened),
                jnp.where(keep | small, 2.0, 2.0 * growth),
                stage + more,
                jnp.where(more, 0, within + 1),
                outer + 1,
                inner + solution.stats["num_steps"],
                still & (stage >= last),
            )

        def going_on(carry):
            return (carry[6] < self.max_outer) & ~carry[8]

        zero, undamped = jnp.asarray(0), jnp.zeros((), first.dtype)
        begin = (
            first,
            scaled(first),
            undamped + self.damping,
            undamped + 2.0,
            zero,
            zero,
            zero,
            zero,
            jnp.asarray(False),
        )
        v, *_, outer, inner, done = jax.lax.while_loop(going_on, step, begin)
        result = optx.RESULTS.where(
            done, optx.RESULTS.successful, optx.RESULTS.nonlinear_max_steps_reached
        )
        return analyse(
            energy, v, event, outer_steps=outer, inner_steps=inner, result=result, throw=throw
        )

    def _levels(self, event: Event) -> tuple[Int[Array, " r"], Int[Array, ""]]:
        """For each entry of y the stage at which it is let in, and the last stage there is."""
        if not self.quasi_static:
            return jnp.zeros(event.mask.size, int), jnp.asarray(0)
        seen = event.mask.reshape(event.mask.shape[0], -1).any(axis=1)
        rank = jnp.maximum(jnp.cumsum(seen) - 1, 0)
        shape = (-1,) + (1,) * (event.mask.ndim - 1)
        return jnp.broadcast_to(rank.reshape(shape), event.mask.shape).reshape(-1), rank[-1]

    def _models(
        self, scaled: Callable[[Array], Array], v: Float[Array, " d"]
    ) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
        """The tangent-linear model at `v` and its adjoint."""
        if self.matrix if self.matrix is not None else v.size <= 16:
            jacobian = jax.jacfwd(scaled)(v)
            return lambda dv: jacobian @ dv, lambda r: jacobian.T @ r
        _, tangent = jax.linearize(scaled, v)
        transpose = jax.linear_transpose(tangent, v)
        return tangent, lambda r: transpose(r)[0]
