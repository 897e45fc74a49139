"""The search: a network proposes several starts, each takes damped steps on J, the best end wins.

A single guess leads to a single minimum, and a long gap makes others. A mixture density network
knows of them: its components' means are the starts. Steps cost what J and its derivative cost, so
the field narrows as it goes: after each step the starts that stand highest drop out, before the
derivative is asked for where the others stand. The Gauss-Newton step converges slowly where the
forward model is curved and the data do not fit well, so Newton's is tried beside it. What its
Hessian has beyond the Gauss-Newton one is learned from how the Jacobian changed on the way: no
second derivative is computed, which would cost six times a first one in three dimensions.

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
    """How many starts are still searched at each step, and whether Newton's step is tried.

    Attributes:
        widths: starts that take step 1, 2, ..., k; never growing. Its length is k.
        newton: whether Newton's step is tried beside the Gauss-Newton one, from the second step on:
            the first one knows of no other Hessian.
    """

    widths: tuple[int, ...] = eqx.field(static=True)
    newton: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        widths = self.widths
        if any(w < 1 for w in widths) or list(widths) != sorted(widths, reverse=True):
            raise ValueError(f"expected widths of at least 1 that never grow, got {widths}")
        if not isinstance(self.newton, bool):
            raise TypeError(f"expected newton to be True or False, got {self.newton!r}")

    @property
    def steps(self) -> int:
        """k."""
        return len(self.widths)

    @classmethod
    def narrowing(cls, starts: int, steps: int, *, least: int = 2, newton: bool = True) -> "Field":
        """Halves the field after every step from the first on, down to `least`.

        Successive halving: Jamieson and Talwalkar (2016), *Non-stochastic best arm identification
        and hyperparameter optimization*, AISTATS.
        """
        widths = tuple(max(min(least, starts), starts >> i) for i in range(steps))
        return cls(widths, newton)


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
    """J at a point, its derivatives, and what is known of the Hessian beyond Gauss and Newton's.

    Attributes:
        v: the point, control variables.
        cost: J there.
        residual: r, of which J is half the sum of squares.
        jacobian: that of r.
        bend: the estimate of sum_i r_i Hess r_i; zero before the first step.
    """

    v: Float[Array, " d"]
    cost: Float[Array, ""]
    residual: Float[Array, " r"]
    jacobian: Float[Array, "r d"]
    bend: Float[Array, "d d"]

    @property
    def slope(self) -> Float[Array, " d"]:
        """The gradient of J."""
        return self.jacobian.T @ self.residual


def _look(energy: Energy, v: Float[Array, " d"], event: Event) -> _Local:
    def residual(v: Array) -> tuple[Array, Array]:
        r = energy.residual(v, event)
        return r, r

    jacobian, r = jax.jacfwd(residual, has_aux=True)(v)
    return _Local(v, 0.5 * jnp.sum(r**2), r, jacobian, jnp.zeros((v.size, v.size), v.dtype))


def _hessians(
    energy: Energy, v: Float[Array, " d"], event: Event
) -> tuple[Float[Array, "d d"], Float[Array, "d d"]]:
    """The full Hessian of J, and the Gauss-Newton one."""

    def slope(v: Array) -> tuple[Array, Array]:
        at = _look(energy, v, event)
        return at.slope, at.jacobian.T @ at.jacobian

    # Forward over forward: d (d + 1) directions in one pass, and no backward one.
    full, gauss = jax.jacfwd(slope, has_aux=True)(v)
    return 0.5 * (full + full.T), gauss


def _learned(at: _Local, there: _Local) -> Float[Array, "d d"]:
    """The estimate of the bend after a step, from how the Jacobian changed on it.

    The structured secant update of Dennis, Gay and Welsch (1981), ACM TOMS 7, 348-368, without
    their sizing, which forgets: the new estimate S is symmetric and has S s = (A_there - A_at)^T
    r_there, for the step s and the Jacobian A, and is the nearest to the old one in the norm in
    which the whole Hessian is the identity. A step that tells nothing, because it has no length or
    its slope did not rise, leaves the estimate as it was.
    """
    step, rise = there.v - at.v, there.slope - at.slope
    wanted = there.slope - at.jacobian.T @ there.residual
    along = step @ rise
    told = along > 0
    along = jnp.where(told, along, 1.0)
    off = wanted - at.bend @ step
    both = jnp.outer(off, rise) / along
    new = at.bend + both + both.T - (off @ step) * jnp.outer(rise, rise) / along**2
    return jnp.where(told & jnp.all(jnp.isfinite(new)), new, at.bend)


def _trials(at: _Local, damping: Array, newton: bool) -> Float[Array, "t d"]:
    """Where the step leads: the Gauss-Newton one, and beside it Newton's where that is asked for.

    Newton's converges at the minimum and can go astray far from it, the other way round with
    Gauss-Newton's. Where J curves downwards there is no Newton's step, and NaN is a trial refused.
    """
    gauss, slope = at.jacobian.T @ at.jacobian, at.slope
    damped = gauss + damping * jnp.diag(jnp.diagonal(gauss))
    steps = [_solve(damped, slope)]
    if newton:
        steps.append(_solve(damped + at.bend, slope))
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
    (A + l diag A_gn) s = -slope, with A the Gauss-Newton Hessian A_gn; from the second step on also
    with A = A_gn + S, where S is the structured secant estimate of what is missing by Dennis, Gay
    and Welsch (1981), ACM TOMS 7, and the lower of the two ends counts. A step that lowers J is
    taken and l falls tenfold, else l rises tenfold and the point stays. J at the end is above J at
    no start.

    Args:
        energy: J.
        starts: control variables, at least as many as `field.widths[0]`; of more the lowest take
            the first step. With no step at all the lowest start is the answer.
        event: the event.
        field: how many starts take each step.
        derivative: in `event.y`: `"implicit"`, that of a minimum of J, with the full Hessian, taken
            one Newton step further on than the end, where that is nearer; `"unrolled"`, that
            of the steps and of the starts.

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
    return _minimum(energy, ends[_lowest(cost)], event)


def search_ends(
    energy: Energy, starts: Float[Array, "s d"], event: Event, *, field: Field
) -> Float[Array, "w d"]:
    """Where the last starts of a field end, in control variables: minima, or on the way to one.

    The lowest of them is the answer of [`search`][], and all have the derivative in `event.y` that
    a minimum has. Arguments and errors are those of `search`.
    """
    _check(starts, field)
    ends, _ = _search(*_held((energy, starts, event)), field)
    return jax.vmap(lambda v: _minimum(energy, v, event))(ends)


def component_starts(energy: Energy, mixture: AbstractDistribution) -> Float[Array, "s d"]:
    """A mixture's component means, as control variables.

    Raises:
        TypeError: on what is no mixture.
    """
    if not isinstance(mixture, GaussianMixture):
        raise TypeError(f"expected a guess that is a mixture, got {type(mixture).__name__}")
    return jax.vmap(energy.prior.whiten)(mixture.part.loc)


def _minimum(energy: Energy, v: Float[Array, " d"], event: Event) -> Float[Array, " d"]:
    """The end of a search, with the derivative of the minimum of J that it is next to."""
    return stationary_point(lambda v: energy.at_control(v, event), v, polish=True)


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

    looks = jax.vmap(lambda v: _look(energy, v, event))
    costs = jax.vmap(lambda v: energy.at_control(v, event))

    def moved(at: _Local, damping: Array, newton: bool) -> tuple[Array, Array, Array]:
        """Where each start stands after a step, J there, and whether it moved."""
        trials = jax.vmap(lambda a, d: _trials(a, d, newton))(at, damping)
        height = jax.vmap(costs)(trials)
        best = _lowest(height)
        each = jnp.arange(best.size)
        lower = height[each, best] <= at.cost
        v = jnp.where(lower[:, None], trials[each, best], at.v)
        return v, jnp.where(lower, height[each, best], at.cost), lower

    def step(carry: tuple[_Local, Array], newton: bool, width: int) -> tuple[_Local, Array]:
        at, damping = carry
        v, cost, lower = moved(at, damping, newton)
        damping = jnp.where(lower, damping / 10.0, damping * 10.0)
        # Who drops out is known from J alone; only where the others stand is its derivative needed.
        at, v, damping, lower = narrowed((at, v, damping, lower), cost, width)
        there = looks(v)
        bend = jnp.where(lower[:, None, None], jax.vmap(_learned)(at, there), at.bend)
        return eqx.tree_at(lambda there: there.bend, there, bend), damping

    v, first = starts, field.widths[0] if field.steps else 1
    if field.steps == 0:
        cost = costs(v)
        return narrowed((v, cost), cost, 1)
    if first < starts.shape[0]:
        (v,) = narrowed((v,), costs(v), first)
    carry = looks(v), jnp.full(v.shape[0], _FIRST_DAMPING, v.dtype)
    newton = [field.newton and i > 0 for i in range(field.steps)]
    kinds = zip(field.widths[:-1], field.widths[1:], newton[:-1], strict=True)
    for (width, then, now), alike in itertools.groupby(kinds):
        if width > then:
            carry = step(carry, now, then)
            continue
        # Steps of one kind are one loop, which compiles once.
        carry, _ = jax.lax.scan(
            lambda c, _, now=now, then=then: (step(c, now, then), None),
            carry,
            None,
            length=len(list(alike)),
        )
    v, cost, _ = moved(*carry, newton[-1])
    return v, cost


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
        full, gauss = _hessians(energy, v, event)
        inner = jnp.linalg.cholesky(full)
        precision = jnp.where(jnp.all(jnp.isfinite(inner)), full, gauss)
        spread = Gaussian.from_precision(jnp.zeros_like(v), precision).chol
        root = jax.vmap(energy.prior.colour, in_axes=1, out_axes=1)(spread)
        root = root - energy.prior.loc[:, None]
        chol = jnp.linalg.cholesky(root @ root.T)
        return SearchContext(energy.prior.colour(v), chol, energy.at_control(v, event))


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
