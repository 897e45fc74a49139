"""The search: a network proposes several starts, each takes damped steps on J, the best end wins.

A single guess leads to a single minimum, and a long gap makes others. A mixture density network
knows of them: its components' means are the starts. Steps cost what J and its derivative cost, so
the field narrows as it goes: after each step the starts that stand highest drop out, and the last
few try Newton's step on the full Hessian beside the Gauss-Newton one: that converges slowly where
the forward model is curved and the data do not fit well.

It is 4DVar with learned starts and a fixed number of steps: one compiled program with its network.
"""

import itertools
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from amortlib.encoders import AbstractEncoder
from amortlib.energy import Energy
from amortlib.gaussian import AbstractDistribution, Gaussian
from amortlib.heads.base import AbstractHead
from amortlib.heads.mixture import GaussianMixture
from amortlib.modes import stationary_point
from amortlib.posterior import AmortizedPosterior
from amortlib.types import Array, Event, Fixed

__all__ = [
    "Field",
    "SearchContext",
    "SearchEncoder",
    "SearchHead",
    "component_starts",
    "search",
    "search_ends",
    "search_posterior",
]

Derivative = Literal["implicit", "unrolled"]

_FIRST_DAMPING = 1e-3
"""First damping, as a share of the curvature; it falls tenfold where a step lowers J."""

_UNROLLED = 8
"""Up to this dimension small systems are solved in plain arithmetic, which vectorises."""


class Field(eqx.Module):
    """How many starts are still searched at each step, and how many of the steps are Newton's.

    Attributes:
        widths: starts that take step 1, 2, ..., k; never growing. Its length is k.
        newton: how many of the last steps are tried with the full Hessian too.
    """

    widths: tuple[int, ...] = eqx.field(static=True)
    newton: int = eqx.field(static=True, default=2)

    def __check_init__(self):
        widths = self.widths
        if any(w < 1 for w in widths) or list(widths) != sorted(widths, reverse=True):
            raise ValueError(f"expected widths of at least 1 that never grow, got {widths}")
        if not 0 <= self.newton <= len(widths):
            raise ValueError(f"expected 0 <= newton <= {len(widths)} steps, got {self.newton}")

    @property
    def steps(self) -> int:
        """k."""
        return len(self.widths)

    @classmethod
    def narrowing(cls, starts: int, steps: int, *, least: int = 2, newton: int = 2) -> "Field":
        """Halves the field after every step from the first on, down to `least`.

        Successive halving: Jamieson and Talwalkar (2016), *Non-stochastic best arm identification
        and hyperparameter optimization*, AISTATS.
        """
        widths = tuple(max(min(least, starts), starts >> i) for i in range(steps))
        return cls(widths, min(newton, steps))


def _solve(matrix: Float[Array, "d d"], rhs: Float[Array, " d"]) -> Float[Array, " d"]:
    """Solution of a symmetric positive system; NaN where it is not positive definite."""
    d = rhs.size
    if d > _UNROLLED:
        low = jnp.linalg.cholesky(matrix)
        return jax.scipy.linalg.cho_solve((low, True), rhs)
    # Thousands of systems of three equations: calls into a library cost more than they compute.
    low = [[matrix[i, j] for j in range(i + 1)] for i in range(d)]
    for j in range(d):
        for m in range(j):
            low[j][j] = low[j][j] - low[j][m] ** 2
        low[j][j] = jnp.sqrt(low[j][j])
        for i in range(j + 1, d):
            for m in range(j):
                low[i][j] = low[i][j] - low[i][m] * low[j][m]
            low[i][j] = low[i][j] / low[j][j]
    x = [rhs[i] for i in range(d)]
    for i in range(d):
        for m in range(i):
            x[i] = x[i] - low[i][m] * x[m]
        x[i] = x[i] / low[i][i]
    for i in reversed(range(d)):
        for m in range(i + 1, d):
            x[i] = x[i] - low[m][i] * x[m]
        x[i] = x[i] / low[i][i]
    return jnp.stack(x)


class _Local(eqx.Module):
    """J at a point, its slope, and two curvatures, one and the same before Newton's steps."""

    v: Float[Array, " d"]
    cost: Float[Array, ""]
    slope: Float[Array, " d"]
    gauss: Float[Array, "d d"]
    full: Float[Array, "d d"]


def _cost(energy: Energy, v: Float[Array, " d"], event: Event) -> Float[Array, ""]:
    return 0.5 * jnp.sum(energy.residual(v, event) ** 2)


def _look(energy: Energy, v: Float[Array, " d"], event: Event, full: bool) -> _Local:
    def residual(v: Array) -> tuple[Array, Array]:
        r = energy.residual(v, event)
        return r, r

    def local(v: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        jacobian, r = jax.jacfwd(residual, has_aux=True)(v)
        slope = jacobian.T @ r
        return slope, (0.5 * jnp.sum(r**2), slope, jacobian.T @ jacobian)

    if not full:
        _, (cost, slope, gauss) = local(v)
        return _Local(v, cost, slope, gauss, gauss)
    # Forward over forward: d (d + 1) directions in one pass, and no backward one.
    curvature, (cost, slope, gauss) = jax.jacfwd(local, has_aux=True)(v)
    return _Local(v, cost, slope, gauss, 0.5 * (curvature + curvature.T))


def _trials(at: _Local, damping: Array, newton: bool) -> Float[Array, "t d"]:
    """Where the step leads: the Gauss-Newton one, and beside it Newton's where that is asked for.

    Newton's converges at the minimum and can go astray far from it, the other way round with
    Gauss-Newton's. Where J curves downwards there is no Newton's step, and NaN is a trial refused.
    """
    extra = damping * jnp.diag(jnp.diagonal(at.gauss))
    steps = [_solve(at.gauss + extra, at.slope)]
    if newton:
        steps.append(_solve(at.full + extra, at.slope))
    return at.v - jnp.stack(steps)


def search(
    energy: Energy,
    starts: Float[Array, "s d"],
    event: Event,
    *,
    field: Field,
    derivative: Derivative = "implicit",
) -> Float[Array, " d"]:
    """The lowest end of a narrowing field of damped searches on J, in control variables.

    Steps are those of Levenberg (1944) and Marquardt (1963), J. SIAM 11, on x = x_b + B^{1/2} v:
    (A + l diag A_gn) s = -slope, with A the Gauss-Newton Hessian A_gn; in the last steps also with
    A the full one, and the lower of the two ends counts. A step that lowers J is taken and l falls
    tenfold, else l rises tenfold and the point stays. J at the end is above J at no start.

    Args:
        energy: J.
        starts: control variables, at least as many as `field.widths[0]`; of more the lowest take
            the first step. With no step at all the lowest start is the answer.
        event: the event.
        field: how many starts take each step.
        derivative: in `event.y`: `"implicit"`, that of a minimum of J, with the full Hessian;
            `"unrolled"`, that of the steps and of the starts.

    Raises:
        ValueError: on too few starts, or another derivative.
    """
    if derivative not in ("implicit", "unrolled"):
        raise ValueError(f"expected 'implicit' or 'unrolled', got {derivative!r}")
    _check(starts, field)
    if derivative == "unrolled":
        ends, cost = _search(energy, starts, event, field)
        return ends[_lowest(cost)]
    ends, cost = _search(*_held((energy, starts, event)), field)
    return stationary_point(lambda v: _cost(energy, v, event), ends[_lowest(cost)])


def search_ends(
    energy: Energy, starts: Float[Array, "s d"], event: Event, *, field: Field
) -> Float[Array, "w d"]:
    """Where the last starts of a field end, in control variables: minima, or on the way to one.

    The lowest of them is the answer of [`search`][], and all have the derivative in `event.y` that
    a minimum has. Arguments and errors are those of `search`.
    """
    _check(starts, field)
    ends, _ = _search(*_held((energy, starts, event)), field)
    return jax.vmap(lambda v: stationary_point(lambda v: _cost(energy, v, event), v))(ends)


def component_starts(energy: Energy, mixture: AbstractDistribution) -> Float[Array, "s d"]:
    """A mixture's component means, as control variables.

    Raises:
        TypeError: on what is no mixture.
    """
    if not isinstance(mixture, GaussianMixture):
        raise TypeError(f"expected a guess that is a mixture, got {type(mixture).__name__}")
    return jax.vmap(energy.prior.whiten)(mixture.part.loc)


def _check(starts: Array, field: Field) -> None:
    first = field.widths[0] if field.steps else 1
    if starts.ndim != 2 or starts.shape[0] < first:
        raise ValueError(f"expected starts of shape (s, d), s >= {first}, got {starts.shape}")


def _lowest(cost: Float[Array, "*b n"]) -> Int[Array, "*b"]:
    return jnp.argmin(jnp.where(jnp.isfinite(cost), cost, jnp.inf), axis=-1)


def _held(tree: Any) -> Any:
    """The tree, through which nothing is differentiated: a search need not be traced for it."""
    return jax.tree.map(lambda a: jax.lax.stop_gradient(a) if eqx.is_inexact_array(a) else a, tree)


def _search(
    energy: Energy, starts: Array, event: Event, field: Field
) -> tuple[Float[Array, "w d"], Float[Array, " w"]]:
    """Where the starts of the last step end, and J there."""

    def narrowed(tree: tuple, cost: Array, width: int) -> tuple:
        if width == cost.shape[0]:
            return tree
        # A start at which J overflows drops out first; top_k would take NaN for the largest.
        height = jnp.where(jnp.isfinite(cost), cost, jnp.inf)
        _, best = jax.lax.top_k(-height, width)
        return jax.tree.map(lambda leaf: leaf[best], tree)

    def looks(v: Array, full: bool) -> _Local:
        return jax.vmap(lambda v: _look(energy, v, event, full))(v)

    def costs(v: Array) -> Array:
        return jax.vmap(lambda v: _cost(energy, v, event))(v)

    def lowest(tree: Any, cost: Array) -> Any:
        """Of the trials of each start, on the second axis, the lowest."""
        best = _lowest(cost)
        return jax.tree.map(lambda leaf: leaf[jnp.arange(best.size), best], tree)

    def step(carry: tuple[_Local, Array], now: bool, then: bool) -> tuple[_Local, Array]:
        at, damping = carry
        trials = jax.vmap(lambda a, d: _trials(a, d, now))(at, damping)
        there = jax.vmap(lambda v: looks(v, then))(trials)
        there = lowest(there, there.cost)
        lower = there.cost <= at.cost

        def choose(a: Array, b: Array) -> Array:
            return jnp.where(lower.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

        at = jax.tree.map(choose, there, at)
        return at, jnp.where(lower, damping / 10.0, damping * 10.0)

    v, first = starts, field.widths[0] if field.steps else 1
    if field.steps == 0:
        cost = costs(v)
        return narrowed((v, cost), cost, 1)
    if first < starts.shape[0]:
        (v,) = narrowed((v,), costs(v), first)
    # Step i is taken from the look before it, so Newton's curvature is made one step early.
    newton = [i >= field.steps - field.newton for i in range(field.steps)]
    carry = looks(v, newton[0]), jnp.full(v.shape[0], _FIRST_DAMPING, v.dtype)
    kinds = zip(field.widths[:-1], newton[:-1], newton[1:], strict=True)
    for (width, now, then), alike in itertools.groupby(kinds):
        carry = narrowed(carry, carry[0].cost, width)
        # Steps of one kind are one loop, which compiles once.
        carry, _ = jax.lax.scan(
            lambda c, _, now=now, then=then: (step(c, now, then), None),
            carry,
            None,
            length=len(list(alike)),
        )
    at, damping = narrowed(carry, carry[0].cost, field.widths[-1])
    # Of the last step nothing but J is needed.
    trials = jax.vmap(lambda a, d: _trials(a, d, newton[-1]))(at, damping)
    cost = jnp.concatenate([at.cost[:, None], jax.vmap(costs)(trials)], axis=1)
    trials = jnp.concatenate([at.v[:, None], trials], axis=1)
    return lowest((trials, cost), cost)


class SearchContext(eqx.Module):
    """What the search hands to a head.

    Attributes:
        loc: the lowest end, a state; it carries the derivative that was asked for.
        chol: Cholesky factor of the inverse Hessian of J there, the full one where it is positive
            definite, the Gauss-Newton one elsewhere.
        energy: J there, in nats.
    """

    loc: Float[Array, " d"]
    chol: Float[Array, "d d"]
    energy: Float[Array, ""]


class SearchEncoder(AbstractEncoder):
    """A mixture's component means, the search from them, and the curvature of J at its end.

    Attributes:
        guess: a posterior whose answer is a [`GaussianMixture`][amortlib.heads.GaussianMixture],
            held fixed.
        energy: J, held fixed.
        field: how many starts take each step.
        derivative: see [`search`][].
    """

    guess: Fixed
    energy: Fixed
    obs_shape: tuple[int, ...] | None = eqx.field(static=True)
    uses_sd: bool = eqx.field(static=True)
    field: Field = eqx.field(static=True)
    derivative: Derivative = eqx.field(static=True)

    def __init__(
        self,
        guess: AmortizedPosterior,
        energy: Energy,
        *,
        field: Field,
        derivative: Derivative = "implicit",
    ):
        """Set the parts; arguments as the attributes."""
        self.guess, self.energy = Fixed(guess), Fixed(energy)
        self.obs_shape, self.uses_sd = guess.encoder.obs_shape, guess.encoder.uses_sd
        self.field, self.derivative = field, derivative

    def __call__(self, event: Event) -> SearchContext:
        """Context of one event.

        Raises:
            TypeError: where the guess is no mixture.
        """
        energy = self.energy.value
        starts = component_starts(energy, self.guess.value(event))
        v = search(energy, starts, event, field=self.field, derivative=self.derivative)
        here = _look(energy, v, event, full=True)
        inner = jnp.linalg.cholesky(here.full)
        precision = jnp.where(jnp.all(jnp.isfinite(inner)), here.full, here.gauss)
        spread = Gaussian.from_precision(jnp.zeros_like(v), precision).chol
        root = jax.vmap(energy.prior.colour, in_axes=1, out_axes=1)(spread)
        root = root - energy.prior.loc[:, None]
        return SearchContext(energy.prior.colour(v), jnp.linalg.cholesky(root @ root.T), here.cost)


class SearchHead(AbstractHead):
    """Laplace's approximation at the end of the search.

    Its mode is the minimum; its shape is right where J is a parabola as far out as the posterior
    reaches, and knows of no other minimum.
    """

    def __call__(self, context: SearchContext) -> Gaussian:
        """The Gaussian for one context."""
        return Gaussian(context.loc, context.chol)


def search_posterior(
    guess: AmortizedPosterior,
    energy: Energy,
    *,
    field: Field,
    derivative: Derivative = "implicit",
) -> AmortizedPosterior:
    """A mixture's guesses, the search on J from them, and Laplace's approximation at its end.

    Args:
        guess: a posterior whose answer is a mixture; held fixed.
        energy: J.
        field: how many starts take each step.
        derivative: of the mode in the observations, see [`search`][].
    """
    encoder = SearchEncoder(guess, energy, field=field, derivative=derivative)
    return AmortizedPosterior(encoder, SearchHead())
