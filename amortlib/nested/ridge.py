"""The ridge of exp(-J) through one minimum: along its widest axis as J says, a Gaussian across."""

import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from amortlib.energy import Energy
from amortlib.gaussian import AbstractDistribution, Gaussian, GaussMarkov
from amortlib.types import Array, Event, Key

__all__ = ["HIGHEST", "NestedLaplace", "nested_laplace"]

_LOG_2PI = math.log(2.0 * math.pi)

_OUT = (0.8, 1.8, 3.2, 6.0)
"""How far out along the axis the ridge is looked for, in standard deviations of Laplace's
approximation, to either side."""

_CELLS = 8
"""Between two of these places the log-density along the ridge is so many straight pieces."""

HIGHEST = 1e4
"""What J counts as where it is higher, or no number: a forward model far from home can overflow."""

_WIDE = (0.03, 2.2)
"""Share of the density across the ridge that is wider, and by how much: with tails that are too
thin a few draws carry all weight (Hesterberg 1995, *Weighted average importance sampling and
defensive mixture distributions*, Technometrics 37)."""


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
        sane = sane & (here.height < HIGHEST)
        highest, none = jnp.asarray(HIGHEST, v.dtype), jnp.zeros_like
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

    height = jnp.clip(jax.vmap(height_at)(grid), 0.0, HIGHEST)
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
