"""Nested Laplace: exp(-J) as it is along its widest direction, a Gaussian that changes across it.

Where a gap is long, or the forward model bends, the posterior is a curved ridge, and a Gaussian at
its highest point says nothing of the curve. J itself does: from the minimum a few steps lead out
along the widest axis, and at each of them one Gauss-Newton step across finds the ridge, its width
and its height. Along the ridge the density is then what J says; across it is the Gaussian of the
place. Nothing is learned, and where J is a parabola nothing is changed.

The marginal along the axis is that of Tierney and Kadane (1986), *Accurate approximations for
posterior moments and marginal densities*, J. Am. Stat. Assoc. 81, section 4; with the conditionals
it is the nested approximation of Rue, Martino and Chopin (2009), *Approximate Bayesian inference
for latent Gaussian models by using integrated nested Laplace approximations*, J. R. Stat. Soc. B
71, with the axis in the place of their hyperparameter.
"""

import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float

from amortlib.encoders import AbstractEncoder
from amortlib.energy import Energy
from amortlib.gaussian import AbstractDistribution, Gaussian, GaussMarkov
from amortlib.heads.base import AbstractHead
from amortlib.posterior import AmortizedPosterior
from amortlib.search import Field, component_starts, search_ends
from amortlib.types import Array, Event, Fixed, Key

__all__ = [
    "NestedContext",
    "NestedEncoder",
    "NestedHead",
    "NestedLaplace",
    "NestedMixture",
    "SharedHead",
    "nested_laplace",
    "nested_posterior",
]

_LOG_2PI = math.log(2.0 * math.pi)

_OUT = (0.8, 1.8, 3.2, 6.0)
"""How far out along the axis the ridge is looked for, in standard deviations of Laplace's
approximation, to either side."""

_CELLS = 8
"""Between two of these places the log-density along the ridge is so many straight pieces."""

_HIGHEST = 1e4
"""What J counts as where it is higher, or no number: a forward model far from home can overflow."""

_WIDE = (0.03, 2.2)
"""Share of the density across the ridge that is wider, and by how much: with tails that are too
thin a few draws carry all weight (Hesterberg 1995, *Weighted average importance sampling and
defensive mixture distributions*, Technometrics 37)."""

_ROUNDS = 2
"""How often what several ridges say of the same place is brought to what J says of it."""

SHARE = 0.02
"""Weight of the guess beside what J says: it covers what no ridge does."""

_ODDS = (-6.0, 6.0)
"""Bounds on the log-odds of a learned weight."""


def _log_cells(at: Float[Array, " g"], log_density: Float[Array, " g"]) -> Float[Array, " c"]:
    """Log of the mass between neighbouring places, the log-density straight between them."""
    low, rise = log_density[:-1], jnp.diff(log_density)
    flat = jnp.abs(rise) < 1e-3
    safe = jnp.where(flat, 1.0, rise)
    top = jnp.maximum(low, low + rise)
    steep = top + jnp.log(-jnp.expm1(-jnp.abs(safe))) - jnp.log(jnp.abs(safe))
    return jnp.where(flat, low + 0.5 * rise, steep) + jnp.log(jnp.diff(at))


def _cell(at: Float[Array, " g"], a: Float[Array, ""]) -> tuple[Array, Array]:
    """The cell that `a` is in, and where in it: below 0 or above 1 outside of them all."""
    i = jnp.clip(jnp.searchsorted(at, a) - 1, 0, at.size - 2)
    return i, (a - at[i]) / (at[i + 1] - at[i])


class NestedLaplace(AbstractDistribution):
    """A ridge: a number along an axis, of any density, and a Gaussian across that goes with it.

    In control variables x = x_b + B^{1/2} v, and there in the axes of the Hessian at a minimum:
    v = centre + axes (a, b), with q(a) piecewise exponential and b | a Gaussian around a curve. Its
    log-density, draws, mean and covariance are exact.

    Attributes:
        prior: N(x_b, B).
        centre: the minimum, a control variable, shape `(d,)`.
        axes: directions in columns, the widest first, shape `(d, d)`.
        at: places along the axis, rising, shape `(n,)`.
        middle: the ridge there, `(n, d-1)`.
        drift: its slope, `(n, d-1)`.
        width: Cholesky factors of the covariance across, `(n, d-1, d-1)`.
        grid: places between which the log-density of a is straight, `(g,)`.
        log_density: of a there, `(g,)`; outside it falls as a straight line.
        fall: slopes of these two lines, positive, `(2,)`.
        height: J along the grid, in nats, `(g,)`.
        log_mass: of what the density was before it was brought to one.
    """

    exact_log_prob: ClassVar[bool] = True

    prior: Gaussian | GaussMarkov
    centre: Float[Array, " d"]
    axes: Float[Array, "d d"]
    at: Float[Array, " n"]
    middle: Float[Array, "n e"]
    drift: Float[Array, "n e"]
    width: Float[Array, "n e e"]
    grid: Float[Array, " g"]
    log_density: Float[Array, " g"]
    fall: Float[Array, "2"]
    height: Float[Array, " g"]
    log_mass: Float[Array, ""]

    def ridge(self, a: Float[Array, ""]) -> tuple[Float[Array, " e"], Float[Array, "e e"]]:
        """The middle of the ridge at `a`, a cubic between the places, and the factor across."""
        i, t = _cell(self.at, a)
        t = jnp.clip(t, 0.0, 1.0)
        step = self.at[i + 1] - self.at[i]
        middle = _hermite(t, step, *((f[i], f[i + 1]) for f in (self.middle, self.drift)))
        scale = jnp.diagonal(self.width, axis1=1, axis2=2)
        unit = self.width / scale[:, None, :]
        log_scale = (1.0 - t) * jnp.log(scale[i]) + t * jnp.log(scale[i + 1])
        return middle, ((1.0 - t) * unit[i] + t * unit[i + 1]) * jnp.exp(log_scale)

    def point(self, a: Float[Array, ""], w: Float[Array, " e"]) -> Float[Array, " d"]:
        """The control variable at `a` along and, in standard deviations, `w` across."""
        middle, width = self.ridge(a)
        return self.centre + self.axes @ jnp.concatenate([a[None], middle + width @ w])

    def log_along(self, a: Float[Array, ""]) -> Float[Array, ""]:
        """Log-density of a."""
        i, t = _cell(self.grid, a)
        low, high = self.log_density[i], self.log_density[i + 1]
        inside = low + (high - low) * jnp.clip(t, 0.0, 1.0)
        before = jnp.maximum(self.grid[0] - a, 0.0)
        after = jnp.maximum(a - self.grid[-1], 0.0)
        return inside - self.fall[0] * before - self.fall[1] * after

    def _log_masses(self) -> Float[Array, " m"]:
        """Of both tails, first and last, and of the cells between."""
        tails = self.log_density[jnp.array([0, -1])] - jnp.log(self.fall)
        return jnp.concatenate([tails[:1], _log_cells(self.grid, self.log_density), tails[1:]])

    def normalised(self) -> "NestedLaplace":
        """The same with a density of a that integrates to one, and what it was before."""
        mass = jax.nn.logsumexp(self._log_masses())
        new = self.log_density - mass, self.log_mass + mass
        return eqx.tree_at(lambda q: (q.log_density, q.log_mass), self, new)

    def log_prob_control(self, v: Float[Array, " d"]) -> Float[Array, ""]:
        """Log-density of the control variable."""
        a, *b = self.axes.T @ (v - self.centre)
        middle, width = self.ridge(a)
        w = jax.scipy.linalg.solve_triangular(width, jnp.stack(b) - middle, lower=True)
        square, (share, wide) = jnp.sum(w**2), _WIDE
        log_det = jnp.sum(jnp.log(jnp.diagonal(width)))
        narrow = math.log(1.0 - share) - 0.5 * square
        broad = math.log(share) - 0.5 * square / wide**2 - w.size * math.log(wide)
        across = jnp.logaddexp(narrow, broad) - 0.5 * w.size * _LOG_2PI - log_det
        return self.log_along(a) + across

    def log_prob(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log-density at `x`."""
        return self.log_prob_control(self.prior.whiten(x)) - _log_volume(self.prior)

    def along(self, u: Float[Array, ""]) -> Float[Array, ""]:
        """The place along the axis that a share `u` of the density comes before."""
        mass = jnp.exp(self._log_masses())
        upto = jnp.cumsum(mass)
        i = jnp.minimum(jnp.searchsorted(upto, u * upto[-1]), mass.size - 1)
        # The uniform number again, within the piece that it has fallen into.
        inside = (u * upto[-1] - jnp.where(i > 0, upto[i - 1], 0.0)) / mass[i]
        inside = jnp.clip(inside, 1e-7, 1.0 - 1e-7)
        cell = jnp.clip(i - 1, 0, self.grid.size - 2)
        rise = self.log_density[cell + 1] - self.log_density[cell]
        flat = jnp.abs(rise) < 1e-3
        safe = jnp.where(flat, 1.0, rise)
        # From the higher end downwards, where nothing overflows.
        down = jnp.where(safe > 0, 1.0 - inside, inside)
        far = -jnp.log1p(-down * -jnp.expm1(-jnp.abs(safe))) / jnp.abs(safe)
        t = jnp.where(flat, inside, jnp.where(safe > 0, 1.0 - far, far))
        within = self.grid[cell] + t * (self.grid[cell + 1] - self.grid[cell])
        a = jnp.where(i == 0, self.grid[0] + jnp.log(inside) / self.fall[0], within)
        after = self.grid[-1] - jnp.log1p(-inside) / self.fall[1]
        return jnp.where(i > self.grid.size - 1, after, a)

    def draw(
        self, u: Float[Array, ""], w: Float[Array, " e"], chosen: Float[Array, ""]
    ) -> Float[Array, " d"]:
        """The state that two uniform numbers and a standard normal vector make."""
        share, wide = _WIDE
        across = jnp.where(chosen < share, wide, 1.0) * w
        return self.prior.colour(self.point(self.along(u), across))

    def sample(self, n: int, *, key: Key) -> Float[Array, "n d"]:
        """`n` independent draws."""
        if n < 1:
            raise ValueError(f"expected at least one sample, got n={n}")
        k_along, k_across = jax.random.split(key)
        u = jax.random.uniform(k_along, (2, n), self.centre.dtype)
        w = jax.random.normal(k_across, (n, self.centre.size - 1), self.centre.dtype)
        return jax.vmap(self.draw)(u[0], w, u[1])

    def mode(self) -> Float[Array, " d"]:
        """The minimum of J that the ridge was followed from; of its own density nearly the top."""
        return self.prior.colour(self.centre)

    def _moments(self) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
        """Mean and covariance of the control variable, by the midpoint rule along the ridge."""
        mass = jnp.exp(self._log_masses())[1:-1]
        mass = mass / jnp.sum(mass)
        a = 0.5 * (self.grid[1:] + self.grid[:-1])
        middle, width = jax.vmap(self.ridge)(a)
        place = self.centre + jnp.concatenate([a[:, None], middle], axis=1) @ self.axes.T
        mean = mass @ place
        off = place - mean
        share, wide = _WIDE
        spread = 1.0 - share + share * wide**2
        within = spread * jnp.einsum("g,gij,gkj->ik", mass, width, width)
        across = self.axes[:, 1:]
        cells = jnp.sum(mass * jnp.diff(self.grid) ** 2) / 12.0
        within = across @ within @ across.T + cells * jnp.outer(self.axes[:, 0], self.axes[:, 0])
        return mean, (off * mass[:, None]).T @ off + within

    def mean(self) -> Float[Array, " d"]:
        """The mean."""
        return self.prior.colour(self._moments()[0])

    def covariance(self) -> Float[Array, "d d"]:
        """The covariance."""
        return _coloured(self.prior, self._moments()[1])

    def sd(self) -> Float[Array, " d"]:
        """Standard deviation of each component."""
        return jnp.sqrt(jnp.diagonal(self.covariance()))


def _hermite(
    t: Float[Array, ""], step: Float[Array, ""], value: tuple, slope: tuple
) -> Float[Array, "..."]:
    """The cubic with these values and slopes at 0 and 1, at `t`."""
    square, cube = t**2, t**3
    ends = (2.0 * cube - 3.0 * square + 1.0) * value[0] + (3.0 * square - 2.0 * cube) * value[1]
    bends = (cube - 2.0 * square + t) * slope[0] + (cube - square) * slope[1]
    return ends + step * bends


def _log_volume(prior: Gaussian | GaussMarkov) -> Float[Array, ""]:
    """log det B^{1/2}."""
    return -prior.log_prob(prior.loc) - 0.5 * prior.loc.size * _LOG_2PI


def _coloured(prior: Gaussian | GaussMarkov, spread: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """The covariance of the state, of that of the control variable."""

    def column(v: Array) -> Array:
        return prior.colour(v) - prior.loc

    half = jax.vmap(column, in_axes=1, out_axes=1)(spread)
    return jax.vmap(column, in_axes=0, out_axes=0)(half)


class _Node(eqx.Module):
    """The ridge at one place along the axis.

    Attributes:
        middle: where J is lowest across, to one step.
        drift: how that place moves along the axis.
        width: Cholesky factor of the inverse Gauss-Newton Hessian across.
        height: J.
        slope: of J along the ridge.
    """

    middle: Float[Array, " e"]
    drift: Float[Array, " e"]
    width: Float[Array, "e e"]
    height: Float[Array, ""]
    slope: Float[Array, ""]


def nested_laplace(energy: Energy, v: Float[Array, " d"], event: Event) -> NestedLaplace:
    """The ridge of exp(-J) through a minimum, followed along the widest axis of the Hessian there.

    J and its derivative are asked for at nine places, and J alone at eight more.

    Args:
        energy: J, of at least two numbers.
        v: a minimum, as a control variable.
        event: the event.

    Raises:
        ValueError: on a state of a single number, which has nothing across.
    """
    if v.size < 2:
        raise ValueError(f"expected a state of at least two numbers, got {v.size}")

    def residual(v: Array) -> tuple[Array, Array]:
        r = energy.residual(v, event)
        return r, r

    jacobian, r = jax.jacfwd(residual, has_aux=True)(v)
    # Which way to look is a choice, and not a function to be differentiated: where nothing is seen
    # all directions are alike.
    curvature, axes = jnp.linalg.eigh(jax.lax.stop_gradient(jacobian.T @ jacobian))
    sd = 1.0 / jnp.sqrt(curvature[0])

    def place(a: Array, b: Array) -> Array:
        return v + axes @ jnp.concatenate([a[None], b])

    def across(jacobian: Array, r: Array) -> tuple[Array, Array, Array, Array]:
        """Width, drift, Gauss-Newton step and the slope of J along."""
        along, sides = jacobian @ axes[:, 0], jacobian @ axes[:, 1:]
        width = Gaussian.from_precision(jnp.zeros(v.size - 1, v.dtype), sides.T @ sides).chol
        drift = -width @ (width.T @ (sides.T @ along))
        step = -width @ (width.T @ (sides.T @ r))
        return width, drift, step, (along + sides @ drift) @ r

    def cost(r: Array) -> Array:
        return 0.5 * jnp.sum(r**2)

    width, drift, _, slope = across(jacobian, r)
    home = _Node(jnp.zeros(v.size - 1, v.dtype), drift, width, cost(r), slope)

    def onward(carry: tuple[Array, _Node], a: Array) -> tuple[tuple[Array, _Node], _Node]:
        before, last = carry
        middle = last.middle + last.drift * (a - before)
        jacobian, r = jax.jacfwd(residual, has_aux=True)(place(a, middle))
        width, drift, step, slope = across(jacobian, r)
        height, lower = cost(r), energy.at_control(place(a, middle + step), event)
        better = lower <= height
        middle = jnp.where(better, middle + step, middle)
        here = _Node(middle, drift, width, jnp.where(better, lower, height), slope)
        # Where J overflows or is no number there is no ridge: it stays as wide as it was, unlikely.
        leaves = jax.tree.leaves(here)
        sane = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
        sane = sane & (here.height < _HIGHEST)
        highest, none = jnp.asarray(_HIGHEST, v.dtype), jnp.zeros_like
        gone = _Node(last.middle, none(drift), last.width, highest, none(slope))
        here = jax.tree.map(lambda a, b: jnp.where(sane, a, b), here, gone)
        return (a, here), here

    out = sd * jnp.asarray(_OUT, v.dtype)

    def side(places: Array) -> _Node:
        return jax.lax.scan(onward, (jnp.zeros((), v.dtype), home), places)[1]

    both = jax.vmap(side)(jnp.stack([-out, out]))
    left, right = (jax.tree.map(lambda leaf, i=i: leaf[i], both) for i in (0, 1))
    nodes = jax.tree.map(
        lambda low, mid, high: jnp.concatenate([low[::-1], mid[None], high]), left, home, right
    )
    at = jnp.concatenate([-out[::-1], jnp.zeros(1, v.dtype), out])

    t = np.arange(_CELLS) / _CELLS
    grid = jnp.append((at[:-1, None] + jnp.diff(at)[:, None] * t).reshape(-1), at[-1])

    def height_at(a: Array) -> Array:
        i, t = _cell(at, a)
        pairs = ((f[i], f[i + 1]) for f in (nodes.height, nodes.slope))
        return _hermite(t, at[i + 1] - at[i], *pairs)

    height = jnp.clip(jax.vmap(height_at)(grid), 0.0, _HIGHEST)
    made = NestedLaplace(
        energy.prior, v, axes, at, nodes.middle, nodes.drift, nodes.width, grid,
        jnp.zeros_like(grid), jnp.zeros(2, v.dtype), height, jnp.zeros((), v.dtype),
    )  # fmt: skip
    wide = jax.vmap(lambda a: jnp.sum(jnp.log(jnp.diagonal(made.ridge(a)[1]))))(grid)
    log_density = wide - height
    ends = jnp.stack([log_density[1] - log_density[0], log_density[-2] - log_density[-1]])
    steps = jnp.stack([grid[1] - grid[0], grid[-1] - grid[-2]])
    # Beyond the last place the density falls on, and at least within a standard deviation.
    fall = jnp.maximum(ends / steps, 1.0 / sd)
    made = eqx.tree_at(lambda q: (q.log_density, q.fall), made, (log_density, fall)).normalised()
    # With the Gaussian across it is the integral of exp(-J) over the control variable.
    mass = made.log_mass + 0.5 * (v.size - 1) * _LOG_2PI
    return eqx.tree_at(lambda q: q.log_mass, made, mass)


def _together(ridges: NestedLaplace, v: Float[Array, " d"]) -> Float[Array, ""]:
    """What several ridges make of log exp(-J) at a control variable: -J where they are right."""
    each = jax.vmap(lambda q: q.log_mass + q.log_prob_control(v))(ridges)
    return jax.nn.logsumexp(jnp.where(jnp.isfinite(each), each, -_HIGHEST))


def _told_apart(ridges: NestedLaplace) -> NestedLaplace:
    """Ridges, stacked, that together say of a place what J says of it, and each its share.

    Two that were followed from one minimum, or from two ends of the same ridge, would count it
    twice. Along each the density is brought to exp(-J) in the sum of all, the fixed point of which
    is that of the EM algorithm for densities that may have any shape along the ridges.
    """

    def spine(q: NestedLaplace) -> Array:
        flat = jnp.zeros(q.centre.size - 1, q.centre.dtype)
        return jax.vmap(lambda a: q.point(a, flat))(q.grid)

    spines = jax.vmap(spine)(ridges)

    both = jax.vmap(jax.vmap(_together, in_axes=(None, 0)), in_axes=(None, 0))
    for _ in range(_ROUNDS):
        off = -ridges.height - both(ridges, spines)
        # At the top of a Gaussian its wider share is missing; more than this is no overlap.
        off = jnp.where(jnp.isfinite(off), jnp.clip(off, -3.0, 1.0), 0.0)
        ridges = eqx.tree_at(lambda q: q.log_density, ridges, ridges.log_density + off)
        ridges = jax.vmap(lambda q: q.normalised())(ridges)
    return ridges


class NestedMixture(AbstractDistribution):
    """Ridges, and beside them what a network makes of the event without J.

    Attributes:
        ridges: [`NestedLaplace`][], arrays with a leading axis of k.
        log_weight: log of the weight of each, normalised, shape `(k,)`.
        beside: covers what no ridge does.
        share: weight of that.
        best: the lowest minimum of J that was found, a state, with its derivative.
    """

    ridges: NestedLaplace
    log_weight: Float[Array, " k"]
    beside: AbstractDistribution
    share: Float[Array, ""]
    best: Float[Array, " d"]

    @property
    def exact_log_prob(self) -> bool:
        """Whether that of what stands beside the ridges is."""
        return self.beside.exact_log_prob

    def log_near(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log-density of the ridges alone at `x`."""
        each = self.log_weight + jax.vmap(lambda q: q.log_prob(x))(self.ridges)
        return jax.nn.logsumexp(jnp.where(jnp.isfinite(each), each, -_HIGHEST))

    def log_prob(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log-density at `x`."""
        near, far = self.log_near(x), self.beside.log_prob(x)
        return jnp.logaddexp(jnp.log1p(-self.share) + near, jnp.log(self.share) + far)

    def sample(self, n: int, *, key: Key) -> Float[Array, "n d"]:
        """`n` independent draws."""
        if n < 1:
            raise ValueError(f"expected at least one sample, got n={n}")
        k_which, k_along, k_across, k_beside, k_share = jax.random.split(key, 5)
        dtype, d = self.best.dtype, self.best.size
        which = jax.random.categorical(k_which, self.log_weight, shape=(n,))
        u = jax.random.uniform(k_along, (2, n), dtype)
        w = jax.random.normal(k_across, (n, d - 1), dtype)

        def one(k: Array, u: Array, w: Array, chosen: Array) -> Array:
            return jax.tree.map(lambda leaf: leaf[k], self.ridges).draw(u, w, chosen)

        near = jax.vmap(one)(which, u[0], w, u[1])
        far = self.beside.sample(n, key=k_beside)
        apart = jax.random.uniform(k_share, (n, 1), dtype) < self.share
        return jnp.where(apart, far, near)

    def mode(self) -> Float[Array, " d"]:
        """The lowest minimum of J that was found; of this density nearly the top.

        A minimum of J is the top of exp(-J), and it moves with the data as that does. The top of an
        approximation need not.
        """
        return self.best

    def mean(self) -> Float[Array, " d"]:
        """The mean."""
        near = jnp.exp(self.log_weight) @ jax.vmap(lambda q: q.mean())(self.ridges)
        return (1.0 - self.share) * near + self.share * self.beside.mean()

    def covariance(self) -> Float[Array, "d d"]:
        """The covariance: of each part, and of their means."""
        places = jax.vmap(lambda q: q.mean())(self.ridges)
        within = jax.vmap(lambda q: q.covariance())(self.ridges)
        places = jnp.concatenate([places, self.beside.mean()[None]])
        within = jnp.concatenate([within, self.beside.covariance()[None]])
        weight = jnp.append((1.0 - self.share) * jnp.exp(self.log_weight), self.share)
        off = places - self.mean()
        return jnp.tensordot(weight, within, 1) + (off * weight[:, None]).T @ off

    def sd(self) -> Float[Array, " d"]:
        """Standard deviation of each component."""
        return jnp.sqrt(jnp.diagonal(self.covariance()))


_LOOK_ALONG, _LOOK_ACROSS = (0.08, 0.3, 0.5, 0.7, 0.92), 1.5
"""Where J is looked at beside a ridge: shares of the density along, standard deviations across."""

_LOOK_ON = (0.02, 0.25, 0.5, 0.75, 0.98)
"""Where J is looked at on it."""


def _doubt(
    energy: Energy, ridges: NestedLaplace, weight: Float[Array, " k"], event: Event
) -> Float[Array, " f"]:
    """How far what the ridges say is from J, seen at places around the heaviest of them.

    Differences of the log-density, in nats, by their inverse hyperbolic sine; then the weights of
    the ridges, their widths in control variables and the height of each, as logarithms and roots.
    """
    best = jax.tree.map(lambda leaf: leaf[jnp.argmax(weight)], ridges)
    e = best.centre.size - 1
    flat, eye = jnp.zeros((1, e), best.centre.dtype), jnp.eye(e, dtype=best.centre.dtype)
    beside = _LOOK_ACROSS * jnp.concatenate([eye, -eye])

    def off(u: Array, w: Array) -> Array:
        v = best.point(best.along(u), w)
        height = energy.at_control(v, event)
        height = jnp.where(jnp.isfinite(height), jnp.minimum(height, _HIGHEST), _HIGHEST)
        return jnp.arcsinh(-height - _together(ridges, v))

    def at(shares: tuple[float, ...], across: Array) -> Array:
        u = jnp.asarray(shares, across.dtype)
        return jax.vmap(lambda u: jax.vmap(lambda w: off(u, w))(across))(u).reshape(-1)

    spreads = jax.vmap(lambda q: jnp.log(jnp.diagonal(q._moments()[1])))(ridges)
    middle = ridges.height[:, ridges.height.shape[1] // 2]
    parts = at(_LOOK_ALONG, beside), at(_LOOK_ON, flat), weight.clip(-20.0)
    found = jnp.concatenate([*parts, spreads.reshape(-1), jnp.sqrt(jnp.maximum(middle, 0.0))])
    return jnp.where(jnp.isfinite(found), found, 0.0)


class NestedContext(eqx.Module):
    """What the search and the ridges hand to a head.

    Attributes:
        ridges: [`NestedLaplace`][], arrays with a leading axis of k.
        log_weight: log of the weight of each, normalised, shape `(k,)`.
        best: the lowest end of the search, a state.
        doubt: how far what the ridges say is from J at places around them, `(f,)`.
        beside: what is said without J: the answer of the network that the search started from, or
            the context that another encoder made of the event.
    """

    ridges: NestedLaplace
    log_weight: Float[Array, " k"]
    best: Float[Array, " d"]
    doubt: Float[Array, " f"]
    beside: Any

    def mixture(self, beside: AbstractDistribution, share: Float[Array, ""]) -> NestedMixture:
        """The ridges, and a density beside them with a weight."""
        return NestedMixture(self.ridges, self.log_weight, beside, share, self.best)


class NestedEncoder(AbstractEncoder):
    """A mixture's guesses, the search on J from them, and the ridge of exp(-J) through each end.

    Attributes:
        guess: a posterior whose answer is a [`GaussianMixture`][amortlib.heads.GaussianMixture],
            held fixed.
        energy: J, held fixed.
        beside: an encoder for what is said without J; where there is none it is the guess.
        field: how many starts take each step; those of the last one are the ends.
    """

    guess: Fixed
    energy: Fixed
    beside: AbstractEncoder | None
    obs_shape: tuple[int, ...] | None = eqx.field(static=True)
    uses_sd: bool = eqx.field(static=True)
    field: Field = eqx.field(static=True)

    def __init__(
        self,
        guess: AmortizedPosterior,
        energy: Energy,
        *,
        field: Field,
        beside: AbstractEncoder | None = None,
    ):
        """Set the parts; arguments as the attributes.

        Raises:
            ValueError: on a field without a step.
        """
        if not field.steps:
            raise ValueError("expected a field of at least one step, got none")
        self.guess, self.energy, self.beside = Fixed(guess), Fixed(energy), beside
        self.obs_shape, self.uses_sd = guess.encoder.obs_shape, guess.encoder.uses_sd
        self.field = field

    def __call__(self, event: Event) -> NestedContext:
        """Context of one event.

        Raises:
            TypeError: where the guess is no mixture.
            ValueError: on a state of a single number.
        """
        energy, guess = self.energy.value, self.guess.value(event)
        ends = search_ends(energy, component_starts(energy, guess), event, field=self.field)
        ridges = _told_apart(jax.vmap(lambda v: nested_laplace(energy, v, event))(ends))
        # Of an end where J overflows nothing is known.
        mass = jnp.where(jnp.isfinite(ridges.log_mass), ridges.log_mass, -_HIGHEST)
        weight = jax.nn.log_softmax(mass)
        height = jax.vmap(lambda v: energy.at_control(v, event))(ends)
        lowest = jnp.argmin(jnp.where(jnp.isfinite(height), height, jnp.inf))
        doubt = _doubt(energy, ridges, weight, event)
        beside = guess if self.beside is None else self.beside(event)
        return NestedContext(ridges, weight, energy.prior.colour(ends[lowest]), doubt, beside)

    @property
    def doubts(self) -> int:
        """How many numbers `NestedContext.doubt` has."""
        d, k = self.energy.tree.prior.loc.size, self.field.widths[-1]
        return len(_LOOK_ALONG) * 2 * (d - 1) + len(_LOOK_ON) + k * (d + 2)


class NestedHead(AbstractHead):
    """The ridges, and the guess beside them with a fixed weight; nothing to learn.

    Attributes:
        share: weight of the guess.
    """

    share: float = eqx.field(static=True)

    def __init__(self, share: float = SHARE):
        """Set the weight.

        Raises:
            ValueError: where it is not between 0 and 1.
        """
        if not 0.0 < share < 1.0:
            raise ValueError(f"expected a share between 0 and 1, got {share}")
        self.share = share

    def __call__(self, context: NestedContext) -> NestedMixture:
        """The mixture for one context."""
        share = jnp.asarray(self.share, context.best.dtype)
        return context.mixture(context.beside, share)


class SharedHead(AbstractHead):
    """The ridges, and beside them what another head says, with a weight that is learned.

    Structure knows the posterior where J has a ridge, a network where it is folded or in pieces; by
    how far J is from what the ridges say it is told which of the two an event is.

    Attributes:
        head: says what is said without J, from the context of its encoder, one array.
        net: the logarithm of the odds of it against the ridges.
        centre: usual value of each number of `NestedContext.doubt`.
        scale: and its standard deviation.
    """

    head: AbstractHead
    net: eqx.nn.MLP
    centre: Fixed
    scale: Fixed

    def __init__(
        self,
        head: AbstractHead,
        doubts: int,
        features: int,
        *,
        key: Key,
        centre: ArrayLike = 0.0,
        scale: ArrayLike = 1.0,
        width: int = 96,
        depth: int = 2,
    ):
        """Set the sizes.

        Args:
            head: from a context of `features` numbers.
            doubts: `NestedEncoder.doubts`.
            features: length of the context of the head.
            key: initialises the weights of the net.
            centre: of the doubts, a number or one for each.
            scale: likewise.
            width: of the net.
            depth: of it.
        """
        self.head = head
        self.net = eqx.nn.MLP(doubts + features, 1, width, depth, jax.nn.gelu, key=key)
        self.centre = Fixed(jnp.broadcast_to(jnp.asarray(centre, float), (doubts,)))
        self.scale = Fixed(jnp.broadcast_to(jnp.asarray(scale, float), (doubts,)))

    def log_odds(self, doubt: Float[Array, " f"], beside: Float[Array, " c"]) -> Float[Array, ""]:
        """Of the head against the ridges; never so far that either is forgotten."""
        usual = jnp.clip((doubt - self.centre.value) / self.scale.value, -5.0, 5.0)
        return jnp.clip(self.net(jnp.concatenate([usual, beside]))[0], *_ODDS)

    def __call__(self, context: NestedContext) -> NestedMixture:
        """The mixture for one context."""
        share = jax.nn.sigmoid(self.log_odds(context.doubt, context.beside))
        return context.mixture(self.head(context.beside), share)


def nested_posterior(
    guess: AmortizedPosterior, energy: Energy, *, field: Field, share: float = SHARE
) -> AmortizedPosterior:
    """A mixture's guesses, the search on J from them, and the ridges of exp(-J) around its ends.

    Args:
        guess: a posterior whose answer is a mixture; held fixed.
        energy: J.
        field: how many starts take each step; a ridge is followed from each end of the last.
        share: weight of the guess beside the ridges.

    Raises:
        ValueError: on a field without a step, or a share that is not between 0 and 1.
    """
    return AmortizedPosterior(NestedEncoder(guess, energy, field=field), NestedHead(share))
