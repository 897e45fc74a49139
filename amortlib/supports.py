"""Parameters on bounded supports: rates that are positive, shares between zero and one.

A head answers with a density over the whole space. A bijection carries it to where parameters live:
with x = T(u), u unconstrained,

    log q(x | y) = log q_u(T^-1(x) | y) - log |det dT/du|,

so that no draw can leave the support, and log-densities are as exact as those of u: a formula for
Gaussians, mixtures and flows, the end of an ODE for score heads. Train on T^-1(x), as `unbounded`
makes a problem of it, and ask `on_support` for the answer. Stan does likewise: Carpenter et al.
(2017), *Stan: a probabilistic programming language*, J. Stat. Softw. 76.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flowjax.bijections import AbstractBijection, Affine, Chain, Exp, Identity, Sigmoid, Stack
from jaxtyping import ArrayLike, Bool, Float

from amortlib.gaussian import AbstractDistribution, Gaussian, GaussMarkov, quasi_normal
from amortlib.heads.base import AbstractHead
from amortlib.heads.flow import FlowDistribution
from amortlib.heads.mixture import GaussianMixture
from amortlib.heads.score import ScoreDistribution
from amortlib.posterior import AmortizedPosterior
from amortlib.problems.base import InvalidProblemError, InverseProblem
from amortlib.types import Array, Key, PyTree

__all__ = ["Box", "BoxDistribution", "BoxHead", "on_support", "unbounded"]

_POINTS = 512
"""Quasi-random points behind the moments, for each component."""


class Box(eqx.Module):
    """A support of intervals, half-lines and lines, one a parameter, and its bijection.

    Between two ends T(u) = low + (high - low) sigmoid(u); from one end on T(u) = low + exp(u), or
    high - exp(u); with no end T(u) = u. flowjax's bijections, applied one a parameter. No ends
    belong to a draw but by rounding: what rounding puts on an end, or beyond, is moved inside by
    one unit in the last place, so that densities stay finite.

    Attributes:
        low: lower ends, `-inf` where there is none.
        high: upper ends, `inf` where there is none.
    """

    low: tuple[float, ...] = eqx.field(static=True)
    high: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, low: ArrayLike | Sequence[float], high: ArrayLike | Sequence[float]):
        """Set the ends.

        Args:
            low: lower ends, a number or shape `(d,)`; `-inf` for none.
            high: upper ends, likewise; `inf` for none.

        Raises:
            ValueError: where an interval is empty or an end is NaN.
        """
        ends = np.broadcast_arrays(np.atleast_1d(low), np.atleast_1d(high))
        lows, highs = (np.array(end, float) for end in ends)
        if lows.ndim != 1 or not (lows < highs).all():
            raise ValueError(f"expected low < high, each of shape (d,), got {lows} and {highs}")
        # T counts in the precision of the parameters, which is single unless told otherwise.
        widths = (highs - lows).astype(np.float32)
        if not (widths >= np.finfo(np.float32).tiny).all():
            raise ValueError(
                f"expected a width that single precision can hold, got {lows} and {highs}"
            )
        self.low, self.high = tuple(map(float, lows)), tuple(map(float, highs))

    @property
    def dim(self) -> int:
        """Number of parameters."""
        return len(self.low)

    @property
    def bijection(self) -> AbstractBijection:
        """T, from unconstrained parameters to the support."""
        return Stack([_map(*ends) for ends in zip(self.low, self.high, strict=True)])

    def inside(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """`x`, moved off the ends by what rounding may have put it there."""
        info = jnp.finfo(x.dtype)
        eps, largest = float(info.eps), float(info.max) / 4.0
        # Not the least number there is: one over it is the slope of T^-1, and must not overflow.
        tiny = float(info.tiny) ** 0.75

        def step(end: float, width: float) -> float:
            # Next to zero numbers are as fine as they get, elsewhere as fine as their size allows.
            size = max(abs(end), width if math.isfinite(width) else 0.0)
            return eps * size if size > 0 else tiny

        # The lower end of an interval is the origin that T counts from; from the upper end it is a
        # whole width away.
        ends = list(zip(self.low, self.high, strict=True))
        # A half-line has an end where numbers do: exp(u) overflows from u = 89 on. A whole line is
        # left as it is.
        up = [
            low + step(low, 0.0)
            if math.isfinite(low)
            else (-largest if math.isfinite(high) else low)
            for low, high in ends
        ]
        down = [
            high - step(high, high - low)
            if math.isfinite(high)
            else (largest if math.isfinite(low) else high)
            for low, high in ends
        ]
        return jnp.clip(x, jnp.array(up, x.dtype), jnp.array(down, x.dtype))

    def to_support(self, u: Float[Array, " d"]) -> Float[Array, " d"]:
        """T(u), inside the support."""
        return self.inside(self.bijection.transform(u))

    def to_line(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """T^-1(x); an end counts as the nearest number inside."""
        return self.bijection.inverse(self.inside(x))

    def log_slope(self, u: Float[Array, " d"]) -> Float[Array, ""]:
        """log |det dT/du|."""
        return self.bijection.transform_and_log_det(u)[1]

    def holds(self, x: Float[Array, " d"]) -> Bool[Array, " d"]:
        """Whether each is in its interval, finite ends included; NaN and infinity are nowhere."""
        if jnp.shape(x) != (self.dim,):
            raise ValueError(f"expected a state of shape {(self.dim,)}, got {jnp.shape(x)}")
        low, high = (jnp.asarray(end, x.dtype) for end in (self.low, self.high))
        return (x >= low) & (x <= high) & jnp.isfinite(x)


def _map(low: float, high: float) -> AbstractBijection:
    if math.isfinite(low) and math.isfinite(high):
        return Chain([Sigmoid(), Affine(low, high - low)])
    if math.isfinite(low):
        return Chain([Exp(), Affine(low, 1.0)])
    if math.isfinite(high):
        return Chain([Exp(), Affine(high, 1.0), _mirror(high)])
    return Identity()


def _mirror(high: float) -> AbstractBijection:
    """x -> 2 high - x: what lies above an end is then below it."""
    scale = eqx.tree_at(lambda a: a.scale, Affine(2.0 * high), jnp.array(-1.0))
    return scale


class BoxDistribution(AbstractDistribution):
    """A density on a support: that of T(u), u from a density on the whole space.

    Log-densities are as exact as those of `inner`, which `exact_log_prob` states: the density of a
    score has the errors of its flow ODE, and none besides. There `log_prob` takes the exact trace,
    d derivatives a step, and `log_prob_estimate` Hutchinson's estimate of it.

    Mean, covariance and standard deviation are averages over quasi-random points, without a key.
    The *mode* is T of the mode of u: the highest point of a density depends on the coordinates, and
    in those of the support it may sit on an end, where the density can be infinite. In the
    unconstrained ones there is always one.

    Attributes:
        inner: the density of u.
        box: the support.
    """

    inner: AbstractDistribution
    box: Box = eqx.field(static=True)

    @property
    def exact_log_prob(self) -> bool:
        """Whether that of `inner` is."""
        return self.inner.exact_log_prob

    def _carried(
        self, log_prob: Callable[[Array], Array], x: Float[Array, " d"]
    ) -> Float[Array, ""]:
        """Log-density at `x`, from that of u."""
        held = jnp.all(self.box.holds(x))
        # Where `x` is outside, some point inside stands in for it, so that no NaN gets into
        # derivatives.
        u = self.box.to_line(jnp.where(held, x, self.box.to_support(jnp.zeros_like(x))))
        return jnp.where(held, log_prob(u) - self.box.log_slope(u), -jnp.inf)

    def log_prob(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log-density at `x`; minus infinity outside of the support."""
        return self._carried(self.inner.log_prob, x)

    def log_prob_estimate(
        self, x: Float[Array, " d"], *, key: Key, probes: int = 1
    ) -> Float[Array, ""]:
        """Log-density at `x` where `inner` is a score's, with the trace estimated.

        The slope of T is exact here too. See
        [`ScoreDistribution`][amortlib.heads.ScoreDistribution] for what the estimate is worth.

        Args:
            x: where; minus infinity outside of the support.
            key: draws the probes.
            probes: how many.

        Raises:
            TypeError: where the log-density is no estimate to begin with.
            ValueError: on less than one probe.
        """
        inner = self.inner
        if not isinstance(inner, ScoreDistribution):
            raise TypeError(
                "expected the density of a score head, whose log-density can be estimated, got "
                f"{type(inner).__name__}: ask for log_prob, which is exact"
            )
        return self._carried(lambda u: inner.log_prob_estimate(u, key=key, probes=probes), x)

    def sample(self, n: int, *, key: Key) -> Float[Array, "n d"]:
        """`n` independent draws, every one of them inside the support."""
        if n < 1:
            raise ValueError(f"expected at least one sample, got n={n}")
        return jax.vmap(self.box.to_support)(self.inner.sample(n, key=key))

    def mode(self) -> Float[Array, " d"]:
        """T of the mode of u; for a Gaussian u each component's median."""
        return self.box.to_support(self.inner.mode())

    def _points(self) -> tuple[Float[Array, "p d"], Float[Array, " p"]]:
        """Points of the support that stand for draws, and their weights."""
        inner = self.inner
        if isinstance(inner, FlowDistribution | ScoreDistribution):
            u, weight = inner.points_of_components()
        elif isinstance(inner, GaussianMixture):
            z = jnp.asarray(quasi_normal(_POINTS, self.box.dim), inner.part.loc.dtype)
            u = inner.of_each(lambda part: jax.vmap(part.colour)(z))
            weight = jnp.exp(inner.log_weight)
        elif isinstance(inner, Gaussian | GaussMarkov):
            z = jnp.asarray(quasi_normal(_POINTS, self.box.dim), inner.loc.dtype)
            u, weight = jax.vmap(inner.colour)(z)[None], jnp.ones(1)
        else:
            raise TypeError(
                "expected a Gaussian, a mixture, a flow or a score for moments without a key, got "
                f"{type(inner).__name__}: average over draws instead"
            )
        each = jnp.repeat(weight / u.shape[1], u.shape[1])
        return jax.vmap(self.box.to_support)(u.reshape(-1, self.box.dim)), each

    def mean(self) -> Float[Array, " d"]:
        """The mean, by quasi-random points."""
        x, weight = self._points()
        return weight @ x

    def covariance(self) -> Float[Array, "d d"]:
        """The covariance, by quasi-random points."""
        x, weight = self._points()
        off = x - weight @ x
        return (off * weight[:, None]).T @ off

    def sd(self) -> Float[Array, " d"]:
        """Standard deviation of each parameter, by quasi-random points."""
        x, weight = self._points()
        return jnp.sqrt(weight @ (x - weight @ x) ** 2)


class BoxHead(AbstractHead):
    """A head over unconstrained parameters whose answers are carried to a support.

    Attributes:
        head: context -> density of u.
        box: the support.
    """

    head: AbstractHead
    box: Box = eqx.field(static=True)

    def __call__(self, context: PyTree) -> BoxDistribution:
        """The density on the support, for one context."""
        return BoxDistribution(self.head(context), self.box)


def on_support(posterior: AmortizedPosterior, box: Box) -> AmortizedPosterior:
    """The posterior of the parameters themselves, from one of T^-1 of them.

    Args:
        posterior: trained on an [`unbounded`][] problem.
        box: the support.
    """
    return AmortizedPosterior(posterior.encoder, BoxHead(posterior.head, box))


class _FreePrior(eqx.Module):
    draw: Callable[[Key], Array]
    box: Box = eqx.field(static=True)

    def __call__(self, key: Key) -> Array:
        return self.box.to_line(self.draw(key))


class _FreeForward(eqx.Module):
    forward: Callable[[Array], Array]
    box: Box = eqx.field(static=True)

    def __call__(self, u: Array) -> Array:
        return self.forward(self.box.to_support(u))


def unbounded(
    problem: InverseProblem, box: Box, *, key: Key, draws: int = 4096
) -> tuple[InverseProblem, Gaussian]:
    """The same problem in unconstrained parameters, and the mean and covariance of those.

    The Gaussian is no prior: it gives heads the place and the size of their parameters. The
    problem's `prior` is left out, since that of u is in general none in closed form.

    Args:
        problem: whose `prior_sample` draws parameters on the support.
        box: the support.
        key: draws the parameters behind the Gaussian.
        draws: how many of them.

    Raises:
        InvalidProblemError: on parameters of another number, or outside the support; the message
            names the parameter, its value and the key that made it. Also on all that
            [`InverseProblem.check`][amortlib.problems.InverseProblem.check] refuses.
    """
    problem.check(key)
    shape = jax.eval_shape(problem.prior_sample, key).shape
    if shape != (box.dim,):
        raise InvalidProblemError(
            f"expected prior_sample(key) of shape ({box.dim},), the ends of the box, got {shape}"
        )

    # One program: a bijection, operation by operation, is many small ones to compile.
    @jax.jit
    def drawn(keys):
        x = jax.vmap(problem.prior_sample)(keys)
        u = jax.vmap(box.to_line)(x)
        # Parameters whose draws hardly differ still get a positive spread.
        spread = jnp.cov(u.T, ddof=1).reshape(box.dim, box.dim) + 1e-8 * jnp.eye(box.dim)
        return x, jax.vmap(box.holds)(x), u.mean(0), jnp.linalg.cholesky(spread)

    keys = jax.random.split(key, draws)
    x, held, centre, root = drawn(keys)
    held = np.asarray(held)
    if not held.all():
        row, column = (int(i[0]) for i in np.nonzero(~held))
        words = np.asarray(jax.random.key_data(keys[row])).tolist()
        raise InvalidProblemError(
            f"expected parameter {column} between {box.low[column]:g} and {box.high[column]:g}, "
            f"got {float(x[row, column]):g} from prior_sample with the key {words}; "
            f"{int((~held.all(axis=1)).sum())} of {draws} draws are outside the support"
        )
    free = dataclasses.replace(
        problem,
        prior_sample=_FreePrior(problem.prior_sample, box),
        forward=_FreeForward(problem.forward, box),
        prior=None,
    )
    return free, Gaussian(centre, root)
