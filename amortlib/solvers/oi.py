"""Optimal interpolation: the analysis in closed form, where the forward model is affine."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx

from amortlib.energy import Energy
from amortlib.laplace import gauss_newton_hessian
from amortlib.solvers.base import AbstractSolver, Analysis
from amortlib.types import Event

__all__ = ["OptimalInterpolation"]


class OptimalInterpolation(AbstractSolver):
    """The best linear unbiased estimate (BLUE), x_b + K (y - H(x_b)), with H linearised at x_b.

    Two forms of one gain (Lorenc 1986, *Analysis methods for numerical weather prediction*,
    Q. J. R. Meteorol. Soc. 112; the identity is that of Sherman, Morrison and Woodbury):

        gain form           K = B H^T (H B H^T + R)^-1            a solve in observation space
        information form    K = (B^-1 + H^T R^-1 H)^-1 H^T R^-1    a solve in state space

    The first is the cheaper one where observations are fewer than components of the state. For an
    affine forward model the analysis is the posterior mean, exactly; for another it is a single
    step from the background, and `gradient_norm` says how far that is from the minimum.

    Attributes:
        energy: J.
        form: `"gain"` or `"information"`.
    """

    energy: Energy
    form: Literal["gain", "information"] = eqx.field(static=True, default="gain")

    def __check_init__(self):
        if self.form not in ("gain", "information"):
            raise ValueError(f"expected form 'gain' or 'information', got {self.form!r}")

    def __call__(self, event: Event, *, throw: bool = True) -> Analysis:
        """Analyse one event; nothing is iterated, so only non-finite numbers can fail."""
        energy, x_b = self.energy, self.energy.prior.loc
        innovation = energy.innovation(x_b, event).reshape(-1)
        h = -jax.jacfwd(lambda x: energy.innovation(x, event).reshape(-1))(x_b)
        sd = energy.sd(event).reshape(-1)
        if self.form == "gain":
            hb = h @ energy.prior.covariance()
            spd = lx.positive_semidefinite_tag
            operator = lx.MatrixLinearOperator(hb @ h.T + jnp.diag(sd**2), spd)

            def solve(rhs):
                return lx.linear_solve(operator, rhs, lx.Cholesky(), throw=False).value

            mode = x_b + hb.T @ solve(innovation)
            covariance = energy.prior.covariance() - hb.T @ jax.vmap(solve, 1, 1)(hb)
        else:
            precision = gauss_newton_hessian(energy, x_b, event)
            operator = lx.MatrixLinearOperator(precision, lx.positive_semidefinite_tag)

            def solve(rhs):
                return lx.linear_solve(operator, rhs, lx.Cholesky(), throw=False).value

            mode = x_b + solve(h.T @ (innovation / sd**2))
            covariance = jax.vmap(solve, 1, 1)(jnp.eye(x_b.size, dtype=x_b.dtype))
        value = energy(mode, event)
        slope = jax.jacfwd(lambda v: energy.at_control(v, event))
        finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(covariance))
        result = optx.RESULTS.where(finite, optx.RESULTS.successful, optx.RESULTS.nonfinite)
        analysis = Analysis(
            mode=mode,
            energy=value,
            covariance=covariance,
            outer_steps=jnp.asarray(0),
            inner_steps=jnp.asarray(0),
            gradient_norm=jnp.linalg.norm(slope(energy.prior.whiten(mode))),
            result=result,
        )
        return result.error_if(analysis, ~finite) if throw else analysis
