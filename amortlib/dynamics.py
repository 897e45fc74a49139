"""Dynamics M: Ornstein-Uhlenbeck, Lorenz-63 and Lorenz-96, integrated by diffrax."""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import ArrayLike, Float

from amortlib.gaussian import Gaussian, GaussMarkov
from amortlib.types import Array, Key

__all__ = [
    "Lorenz63",
    "Lorenz96",
    "OrnsteinUhlenbeck",
    "climatology",
    "explicit_step",
    "explicit_tableau",
    "trajectory",
]


class OrnsteinUhlenbeck(eqx.Module):
    """The stationary process dx = -(x / timescale) dt + sd sqrt(2 / timescale) dW.

    The one Gaussian process that is both stationary and Markov (Doob 1942): its covariance at a
    lag s is sd^2 exp(-|s| / timescale) and its precision on any grid is tridiagonal.

    Attributes:
        sd: stationary standard deviation, in the units of the state.
        timescale: e-folding time, in the units of time.
    """

    sd: Float[Array, ""]
    timescale: Float[Array, ""]

    def __init__(self, sd: ArrayLike = 1.0, timescale: ArrayLike = 1.0):
        self.sd = jnp.asarray(sd, float)
        self.timescale = jnp.asarray(timescale, float)

    def vector_field(self, t: ArrayLike, x: Float[Array, " d"], args: None) -> Float[Array, " d"]:
        """Drift, -x / timescale."""
        return -x / self.timescale

    def diffusion(self, t: ArrayLike, x: Float[Array, " d"], args: None) -> Float[Array, " d"]:
        """Diffusion coefficient, sd sqrt(2 / timescale), one independent noise a component."""
        return jnp.full_like(x, self.sd * jnp.sqrt(2.0 / self.timescale))

    def transition(self, dt: Float[Array, "*n"]) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
        """Exact step over `dt`: mean `a` x(t) and variance `q` of x(t + dt); returns (a, q)."""
        a = jnp.exp(-dt / self.timescale)
        return a, -(self.sd**2) * jnp.expm1(-2.0 * dt / self.timescale)

    @eqx.filter_jit
    def prior(self, times: Float[Array, " n"], loc: ArrayLike = 0.0) -> GaussMarkov:
        """Stationary density of the path on a grid of increasing times, O(n).

        Args:
            times: the grid, increasing.
            loc: mean of the path, a number or shape `(n,)`.
        """
        a, q = self.transition(jnp.diff(times))
        # log p(x_1) + sum log p(x_{i+1} | x_i), term by term: each factor of the Markov chain adds
        # (x_{i+1} - a x_i)^2 / q to the quadratic form.
        diag = jnp.concatenate([self.sd[None] ** -2, 1.0 / q])
        diag = diag.at[:-1].add(a**2 / q)
        lower = -a / q
        mean = jnp.broadcast_to(jnp.asarray(loc, diag.dtype), times.shape)
        return GaussMarkov.from_precision(mean, diag[:, None, None], lower[:, None, None])


class Lorenz63(eqx.Module):
    """The three-variable convection model of Lorenz (1963), J. Atmos. Sci. 20, equations 25-27.

    Attributes:
        sigma: Prandtl number.
        rho: Rayleigh number over its critical value.
        beta: geometric factor.
    """

    sigma: Float[Array, ""]
    rho: Float[Array, ""]
    beta: Float[Array, ""]

    def __init__(self, sigma: ArrayLike = 10.0, rho: ArrayLike = 28.0, beta: ArrayLike = 8.0 / 3.0):
        self.sigma = jnp.asarray(sigma, float)
        self.rho = jnp.asarray(rho, float)
        self.beta = jnp.asarray(beta, float)

    def vector_field(self, t: ArrayLike, x: Float[Array, "3"], args: None) -> Float[Array, "3"]:
        """dx/dt."""
        a, b, c = x
        return jnp.stack([self.sigma * (b - a), a * (self.rho - c) - b, a * b - self.beta * c])


class Lorenz96(eqx.Module):
    """The ring of Lorenz (1996), *Predictability: a problem partly solved*, equation 1.

    dx_i/dt = (x_{i+1} - x_{i-2}) x_{i-1} - x_i + F, indices modulo the number of sites (at least
    four). With 40 sites and F = 8 a time of 0.05 is about six hours of weather.

    Attributes:
        forcing: F.
    """

    forcing: Float[Array, ""]

    def __init__(self, forcing: ArrayLike = 8.0):
        self.forcing = jnp.asarray(forcing, float)

    def vector_field(self, t: ArrayLike, x: Float[Array, " n"], args: None) -> Float[Array, " n"]:
        """dx/dt."""
        ahead, behind, two_behind = jnp.roll(x, -1), jnp.roll(x, 1), jnp.roll(x, 2)
        return (ahead - two_behind) * behind - x + self.forcing


def trajectory(
    dynamics: Any,
    x0: Float[Array, " d"],
    times: Float[Array, " n"],
    *,
    dt: ArrayLike,
    key: Key | None = None,
    solver: dfx.AbstractSolver | None = None,
    adjoint: dfx.AbstractAdjoint | None = None,
    max_steps: int | None = 4096,
) -> Float[Array, "n d"]:
    """Integrate from `x0` at `times[0]` and return the state at `times`.

    Args:
        dynamics: has `vector_field(t, x, args)` and, for a stochastic one, `diffusion`.
        x0: initial state.
        times: increasing; the first is the time of `x0`.
        dt: internal step, in the units of time. Fixed, so that the derivative is that of the
            discrete model, as variational assimilation needs.
        key: draws the Brownian path; needed where the dynamics has a `diffusion`, and only there.
        solver: by default classical Tsit5 for ODEs and Euler-Maruyama for SDEs.
        adjoint: how to differentiate; by default diffrax's own choice, reverse mode with
            checkpoints. Pass `diffrax.ForwardMode()` for Jacobian-vector products and
            `diffrax.DirectAdjoint()` for both.
        max_steps: bound on the internal steps, which reverse mode needs; `None` for long runs
            that nobody differentiates.

    Raises:
        ValueError: where a key is missing for stochastic dynamics, or given without need.
    """
    noisy = hasattr(dynamics, "diffusion")
    if noisy and key is None:
        raise ValueError(f"expected a key: {type(dynamics).__name__} is stochastic")
    if not noisy and key is not None:
        raise ValueError(f"got a key, but {type(dynamics).__name__} is deterministic")
    drift = dfx.ODETerm(dynamics.vector_field)
    terms = drift
    if noisy:
        shape = jax.ShapeDtypeStruct(x0.shape, x0.dtype)
        path = dfx.VirtualBrownianTree(times[0], times[-1], dt / 2, shape, key)

        def noise(t, x, args):
            return lx.DiagonalLinearOperator(dynamics.diffusion(t, x, args))

        terms = dfx.MultiTerm(drift, dfx.ControlTerm(noise, path))
    if solver is None:
        solver = dfx.Euler() if noisy else dfx.Tsit5()
    solution = dfx.diffeqsolve(
        terms,
        solver,
        t0=times[0],
        t1=times[-1],
        dt0=dt,
        y0=x0,
        saveat=dfx.SaveAt(ts=times),
        stepsize_controller=dfx.ConstantStepSize(),
        adjoint=dfx.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
        max_steps=max_steps,
    )
    return solution.ys


def explicit_tableau(solver: dfx.AbstractSolver) -> dfx.ButcherTableau | None:
    """The tableau of an explicit Runge-Kutta method of diffrax; `None` of any other solver.

    With [`explicit_step`][] in a plain loop its fixed steps are a program that is smaller by far
    than `diffrax.diffeqsolve`, whose derivatives are of both kinds, and whose numbers are the same.
    """
    tableau = getattr(solver, "tableau", None)
    explicit = isinstance(solver, dfx.AbstractERK) and isinstance(tableau, dfx.ButcherTableau)
    return tableau if explicit else None


def explicit_step(
    tableau: dfx.ButcherTableau,
    field: Callable[[Array, Any, None], Any],
    t: Float[Array, ""],
    h: Float[Array, ""],
    y: Any,
) -> Any:
    """The state at `t + h` after one step from `y` at `t`, any tree of arrays.

    Args:
        tableau: of the method, see [`explicit_tableau`][].
        field: dy/dt of t, y and `None`, as diffrax calls it.
        t: time.
        h: step, negative to go backwards.
        y: state.
    """
    b, c = tableau.b_sol, (0.0, *tableau.c)
    rows = [np.zeros(0), *tableau.a_lower]
    # Stages behind the last that counts only tell the error, or begin the next step.
    stages = 1 + np.flatnonzero(b)[-1]
    slopes: list[Any] = []

    def after(weights: np.ndarray) -> Any:
        used = [(float(w), k) for w, k in zip(weights, slopes, strict=False) if w]
        if not used:
            return y
        ws, ks = zip(*used, strict=True)
        return jax.tree.map(
            lambda y, *k: y + h * sum(w * k for w, k in zip(ws, k, strict=True)), y, *ks
        )

    for i in range(stages):
        slopes.append(field(t + float(c[i]) * h, after(rows[i]), None))
    return after(b)


def climatology(
    dynamics: Any,
    x0: Float[Array, " d"],
    *,
    every: float,
    n: int,
    dt: float,
    spin_up: float,
) -> tuple[Gaussian, Float[Array, "n d"]]:
    """Mean and covariance of a long run on the attractor, and the states they are made from.

    Args:
        dynamics: deterministic dynamics.
        x0: where the run starts, before the spin-up.
        every: time between the states kept; longer than the decorrelation time, so that they
            count as nearly independent.
        n: how many states are kept.
        dt: internal step.
        spin_up: time run and thrown away first.
    """
    times = jnp.concatenate([jnp.zeros(1), spin_up + every * jnp.arange(n)])
    states = trajectory(dynamics, x0, times, dt=dt, max_steps=None)[1:]
    return Gaussian.from_covariance(states.mean(0), jnp.cov(states.T)), states
