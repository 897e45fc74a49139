"""Refinement: a few damped Gauss-Newton steps on J from a head's guess, and a posterior there.

With k > 0 steps this is 4DVar with a learned warm start, and a learned posterior around where it
ends: it evaluates the forward model and its derivative for every event. Only with k = 0 and no
probes is an answer a single forward pass of a network.
"""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from amortlib.encoders import AbstractEncoder
from amortlib.energy import Energy
from amortlib.gaussian import Gaussian
from amortlib.heads.base import AbstractHead
from amortlib.heads.flow import FlowDistribution, FlowHead
from amortlib.modes import stationary_point
from amortlib.posterior import AmortizedPosterior
from amortlib.types import Array, Event, Fixed, Key

__all__ = [
    "RefinedContext",
    "RefinedEncoder",
    "RefinedFlowHead",
    "RefinedLaplaceHead",
    "probe_directions",
    "refine",
    "refined_posterior",
]

Derivative = Literal["implicit", "unrolled"]

_FIRST_DAMPING = 1e-3
"""First damping, as a share of the curvature; it falls tenfold where a step lowers J."""

_GUESS_LOG_WEIGHT = -3.0
"""Log of the weight that the guess itself starts with beside the refined points."""

_LARGEST_RISE = 1e4
"""Bound on what a probe may say, in nats: a forward model far from home can overflow."""


def refine(
    energy: Energy,
    v: Float[Array, " d"],
    event: Event,
    *,
    steps: int,
    derivative: Derivative = "implicit",
) -> Float[Array, " d"]:
    """`steps` damped Gauss-Newton steps on J from the control variable `v`, x = x_b + B^{1/2} v.

    Levenberg (1944) and Marquardt (1963), J. SIAM 11: a step solves (J'J + l diag J'J) s = -J'r;
    where it lowers J it is taken and l falls tenfold, else l rises tenfold and the point stays.
    J never rises, whatever the start. A fixed number of steps, so that it can be compiled into
    one program with the network before it, and differentiated.

    Args:
        energy: J.
        v: where to start.
        event: the event.
        steps: k; with 0 the start is returned, as it is.
        derivative: of the result in `event.y`. `"unrolled"`: of the steps and of the start, as
            they are. `"implicit"`: that of the minimum, by the implicit function theorem with the
            full Hessian at the end; right where the end is stationary, and blind to the start.

    Raises:
        ValueError: on a negative number of steps, or another derivative.
    """
    if steps < 0:
        raise ValueError(f"expected steps >= 0, got {steps}")
    if derivative not in ("implicit", "unrolled"):
        raise ValueError(f"expected 'implicit' or 'unrolled', got {derivative!r}")
    if steps == 0:
        return v

    def residual(v: Array) -> tuple[Array, Array]:
        r = energy.residual(v, event)
        return r, r

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        v, r, jacobian, damping = carry
        square = jacobian.T @ jacobian
        damped = square + damping * jnp.diag(jnp.diagonal(square))
        trial = v - jnp.linalg.solve(damped, jacobian.T @ r)
        slope, there = jax.jacfwd(residual, has_aux=True)(trial)
        lower = jnp.sum(there**2) <= jnp.sum(r**2)
        accepted = (trial, there, slope, damping / 10.0)
        refused = (v, r, jacobian, damping * 10.0)
        return jax.tree.map(lambda a, b: jnp.where(lower, a, b), accepted, refused), None

    slope, r = jax.jacfwd(residual, has_aux=True)(v)
    start = (v, r, slope, jnp.asarray(_FIRST_DAMPING, v.dtype))
    (v, *_), _ = jax.lax.scan(step, start, None, length=steps)
    if derivative == "unrolled":
        return v

    def cost(v: Array) -> Array:
        return energy.at_control(v, event)

    return stationary_point(cost, v)


def probe_directions(d: int) -> Float[np.ndarray, "p d"]:
    """Where J is looked at around a refined point, in whitened coordinates.

    1.5 and 3 standard deviations out along every axis, and 2 along the diagonals of every pair
    of axes: 4 d + 2 d (d - 1) points.
    """
    eye = np.eye(d)
    out = [sign * far * eye[i] for i in range(d) for far in (1.5, 3.0) for sign in (1.0, -1.0)]
    for i in range(d):
        for j in range(i):
            for a, b in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
                out.append(np.sqrt(2.0) * (a * eye[i] + b * eye[j]))
    return np.stack(out)


_PROFILE = np.array([1.0, 2.5, 6.0])
"""How far out along an axis J is looked at, in standard deviations of Laplace's approximation."""

_STRETCH = (0.8, 4.0)
"""Bounds on how wide an axis may be found, in the same units. A line that leaves a curved ridge
says that the ridge is narrow, and what is around it need not be."""


def profile_sd(rise: Float[Array, "2 p"]) -> Float[Array, ""]:
    """Standard deviation of exp(-J) along a line through a minimum, in units of Laplace's.

    Between the points at which J is known its deviation from the parabola is interpolated.

    Args:
        rise: J less J at the minimum, at minus and plus `_PROFILE` standard deviations.
    """
    at = np.concatenate([[0.0], _PROFILE])
    t = np.linspace(0.0, _PROFILE[-1], 61)
    flat = jnp.zeros((2, 1), rise.dtype)
    # Square roots are nearly linear, as those of a parabola are.
    root = jnp.concatenate([flat, jnp.sqrt(jnp.maximum(rise, 1e-6))], axis=1)
    density = jnp.exp(-(jax.vmap(lambda r: jnp.interp(t, at, r))(root) ** 2))
    mass = jnp.sum(density)
    mean = jnp.sum(density * np.stack([-t, t])) / mass
    sd = jnp.sqrt(jnp.maximum(jnp.sum(density * t**2) / mass - mean**2, 1e-6))
    return jnp.clip(sd, *_STRETCH)


def _widths(
    above: Callable[[Array], Array], v: Float[Array, " d"], inner: Float[Array, "d d"]
) -> Float[Array, " d"]:
    """[`profile_sd`][] along every column of `inner`."""
    far = np.stack([-_PROFILE, _PROFILE])

    def along(axis: Array) -> Array:
        return profile_sd(jax.vmap(jax.vmap(lambda t: above(v + t * axis)))(far))

    return jax.vmap(along, in_axes=1)(inner)


def whitened_covariance(energy: Energy, covariance: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """That of the control variable, B^{-1/2} C B^{-T/2}, of a covariance C of the state."""
    loc, white = energy.prior.loc[:, None], jax.vmap(energy.prior.whiten, in_axes=1)
    spread = white(white(covariance + loc) + loc)
    return 0.5 * (spread + spread.T)


class RefinedContext(eqx.Module):
    """What refinement hands to a head: refined points, the guess last, and J seen from each.

    Attributes:
        loc: refined points and the guess's mean, `(s, d)`.
        chol: Cholesky factors of the inverse Gauss-Newton Hessians there, and of the guess's own
            covariance, `(s, d, d)`.
        features: `(s, f)`.
        log_weight: log of the weight of each point by Laplace's approximation, points that are
            one and the same counted once, `(s,)`; a constant for the guess.
    """

    loc: Float[Array, "s d"]
    chol: Float[Array, "s d d"]
    features: Float[Array, "s f"]
    log_weight: Float[Array, " s"]

    def roughness(self) -> Float[Array, " s"]:
        """How far J is from a parabola around each point: zero where it is one.

        Root mean square over the [`probe_directions`][] of the inverse hyperbolic sine of the
        difference, in nats: of a large one its logarithm.
        """
        d = self.loc.shape[1]
        probes = 4 * d + 2 * d * (d - 1)
        # They stand before the misfit and the three numbers that compare the points.
        rises = self.features[:, -probes - 4 : -4]
        return jnp.sqrt(jnp.mean(rises**2, axis=1))


class RefinedEncoder(AbstractEncoder):
    """A head's guess, k steps on J from it, and J around where they end, in its own units.

    With several starts the others stand 1.5 standard deviations of the guess to either side of
    its mean, along its widest axes; they may end in other minima, and long gaps make those.

    The features are the mask, the refined point in the control variable, the slope of J in
    whitened coordinates, the logarithms and ratios of the local widths, and by how much J at
    the [`probe_directions`][] differs from the parabola. Nothing in them depends on the units of
    the state or of the observations.

    Far from a parabola the widths of Laplace's approximation say little: with a `profile` each of
    its axes is given the width that exp(-J) has along it, and what is said of the surroundings is
    said in these units.

    Attributes:
        guess: a posterior whose answer is Gaussian, held fixed.
        energy: J, held fixed.
        steps: k.
        starts: s, an odd number.
        derivative: see [`refine`][].
        profile: whether widths are those of exp(-J) along each axis, or Laplace's.
    """

    guess: Fixed
    energy: Fixed
    obs_shape: tuple[int, ...] | None = eqx.field(static=True)
    uses_sd: bool = eqx.field(static=True)
    steps: int = eqx.field(static=True)
    starts: int = eqx.field(static=True)
    derivative: Derivative = eqx.field(static=True)
    profile: bool = eqx.field(static=True)

    def __init__(
        self,
        guess: AmortizedPosterior,
        energy: Energy,
        *,
        steps: int,
        starts: int = 1,
        derivative: Derivative = "implicit",
        profile: bool = False,
    ):
        """Set the parts.

        Raises:
            ValueError: on a negative number of steps, or starts that are not odd or too many.
        """
        d = energy.prior.loc.size
        if steps < 0:
            raise ValueError(f"expected steps >= 0, got {steps}")
        if starts % 2 != 1 or not 1 <= starts <= 2 * d + 1:
            raise ValueError(f"expected an odd number of starts up to {2 * d + 1}, got {starts}")
        self.guess, self.energy = Fixed(guess), Fixed(energy)
        self.obs_shape, self.uses_sd = guess.encoder.obs_shape, guess.encoder.uses_sd
        self.steps, self.starts, self.derivative = steps, starts, derivative
        self.profile = profile

    def first(self, event: Event) -> tuple[Float[Array, "s d"], Float[Array, "d d"]]:
        """Control variables to start from, and the Cholesky factor of the guess's covariance."""
        guess = self.guess.value(event)
        v = self.energy.value.prior.whiten(guess.mode())
        spread = whitened_covariance(self.energy.value, guess.covariance())
        if self.starts == 1:
            return v[None], jnp.linalg.cholesky(spread)
        # Starts to the side are a choice, and not a function to be differentiated.
        widths, axes = jnp.linalg.eigh(jax.lax.stop_gradient(spread))
        m = self.starts // 2
        side = 1.5 * (axes * jnp.sqrt(jnp.maximum(widths, 0.0)))[:, ::-1][:, :m].T
        return jnp.concatenate([v[None], v + side, v - side]), jnp.linalg.cholesky(spread)

    def _look(
        self, v: Array, event: Event, inner: Array | None = None
    ) -> tuple[Array, Array, Array, Array]:
        """Point, width, features and J at a control variable; `inner`, if not J's own width."""
        energy = self.energy.value
        prior, d = energy.prior, v.size

        def residual(v: Array) -> tuple[Array, Array]:
            r = energy.residual(v, event)
            return r, r

        jacobian, r = jax.jacfwd(residual, has_aux=True)(v)
        cost = 0.5 * jnp.sum(r**2)

        def above(v: Array) -> Array:
            rise = energy.at_control(v, event) - cost
            return jnp.where(jnp.isfinite(rise), jnp.minimum(rise, _LARGEST_RISE), _LARGEST_RISE)

        if inner is None:
            inner = Gaussian.from_precision(jnp.zeros_like(v), jacobian.T @ jacobian).chol
            if self.profile:
                inner = inner * _widths(above, v, inner)
        root = jax.vmap(prior.colour, in_axes=1, out_axes=1)(inner) - prior.loc[:, None]
        chol = jnp.linalg.cholesky(root @ root.T)
        slope = inner.T @ (jacobian.T @ r)
        probes = jnp.asarray(probe_directions(d), v.dtype)

        def rise(u: Array) -> Array:
            return above(v + inner @ u) - 0.5 * jnp.sum(u**2)

        below = inner[jnp.tril_indices(d, -1)]
        features = jnp.concatenate(
            [
                event.mask.reshape(-1).astype(v.dtype),
                v,
                jnp.arcsinh(slope),
                jnp.log(jnp.diagonal(inner)),
                jnp.arcsinh(10.0 * below),
                jnp.arcsinh(jax.vmap(rise)(probes)),
                jnp.log1p(cost)[None],
            ]
        )
        return prior.colour(v), chol, features, cost

    def ends(
        self, event: Event
    ) -> tuple[Float[Array, "s d"], Float[Array, " d"], Float[Array, "d d"]]:
        """Refined control variables; the guess's own, and the Cholesky factor of its spread."""
        energy = self.energy.value
        starts, spread = self.first(event)
        ends = jax.vmap(
            lambda v: refine(energy, v, event, steps=self.steps, derivative=self.derivative)
        )(starts)
        return ends, starts[0], spread

    def __call__(self, event: Event) -> RefinedContext:
        """Context of one event."""
        ends, centre, spread = self.ends(event)
        loc, chol, features, cost = jax.vmap(lambda v: self._look(v, event))(ends)
        evidence = jnp.sum(jnp.log(jnp.diagonal(chol, axis1=1, axis2=2)), axis=1) - cost

        # Several starts in one minimum are one point: their weight is shared among them.
        def apart(low: Array, at: Array) -> Array:
            white = jax.scipy.linalg.solve_triangular(low, (loc - at).T, lower=True)
            return jnp.sum(white**2, axis=0)

        same = jnp.sum(jnp.exp(-0.5 * jax.vmap(apart)(chol, loc)), axis=1)
        weight = jax.nn.log_softmax(evidence - jnp.log(same))
        last = self._look(centre, event, spread)
        loc, chol, features, cost = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b[None]]), (loc, chol, features, cost), last
        )
        same = jnp.append(same, 0.0)
        weight = jnp.append(weight, _GUESS_LOG_WEIGHT)
        relative = jnp.stack([jnp.arcsinh(cost - cost.min()), weight.clip(-10.0), same], axis=1)
        return RefinedContext(loc, chol, jnp.concatenate([features, relative], 1), weight)

    @property
    def size(self) -> int:
        """Number of features at a point; needs the shape of the events."""
        if self.obs_shape is None:
            raise ValueError("expected a guess that knows the shape of its events")
        y = jax.ShapeDtypeStruct(self.obs_shape, self.energy.tree.prior.loc.dtype)
        seen = jax.ShapeDtypeStruct(self.obs_shape, bool)
        context = jax.eval_shape(lambda y, m: self(Event(y, m, jnp.ones_like(y))), y, seen)
        return int(context.features.shape[1])


class RefinedLaplaceHead(AbstractHead):
    """Laplace's approximation at the refined point of the largest weight, Gauss-Newton Hessian.

    Where a gap is long it can be far from the posterior, too narrow or in the wrong minimum.
    """

    def __call__(self, context: RefinedContext) -> Gaussian:
        """The Gaussian for one context."""
        best = jnp.argmax(context.log_weight[:-1])  # not the guess
        return Gaussian(context.loc[best], context.chol[best])


class RefinedFlowHead(AbstractHead):
    """A mixture of flows in the whitened coordinates of the refined points: x = x_k + L_k f(z; c).

    One flow serves all points. It sees J around each, in units in which every event looks alike,
    so that what it learns of one event it knows of all.
    """

    net: eqx.nn.MLP
    weigh: eqx.nn.Linear
    inner: FlowHead

    def __init__(
        self,
        features: int,
        dim: int,
        *,
        key: Key,
        condition: int = 32,
        encoder_width: int = 96,
        encoder_depth: int = 2,
        **sizes: Any,
    ):
        """Set the sizes.

        Args:
            features: of a point: `RefinedEncoder.size`.
            dim: dimension of the state.
            key: initialises the weights.
            condition: numbers that the flow's layers see of the features.
            encoder_width: of the net that makes them.
            encoder_depth: of it.
            sizes: passed on to [`FlowHead`][amortlib.heads.FlowHead].
        """
        k_net, k_weigh, k_flow = jax.random.split(key, 3)
        self.net = eqx.nn.MLP(
            features, condition, encoder_width, encoder_depth, jax.nn.gelu, key=k_net
        )
        weigh = eqx.nn.Linear(condition, 1, key=k_weigh)
        self.weigh = jax.tree.map(lambda a: 0.1 * a, weigh)
        unit = Gaussian(jnp.zeros(dim), jnp.eye(dim))
        # The net above takes the place of the head's own projection.
        self.inner = FlowHead(1, unit, dim=dim, key=k_flow, condition=condition, **sizes)

    def __call__(self, context: RefinedContext) -> FlowDistribution:
        """The mixture for one context."""
        condition = jax.vmap(self.net)(context.features)
        learned = jax.vmap(self.weigh)(condition)[:, 0]
        return self.inner.around(
            jax.vmap(Gaussian)(context.loc, context.chol),
            condition,
            jax.nn.log_softmax(context.log_weight.clip(-20.0) + learned),
        )


def refined_posterior(
    guess: AmortizedPosterior,
    energy: Energy,
    *,
    steps: int,
    kind: str = "laplace",
    starts: int = 1,
    derivative: Derivative = "implicit",
    profile: bool = False,
    key: Key | None = None,
    **sizes: Any,
) -> AmortizedPosterior:
    """A guess, `steps` damped Gauss-Newton steps on J from it, and a posterior around the end.

    Args:
        guess: a posterior whose answer is Gaussian; held fixed.
        energy: J.
        steps: k.
        kind: `"laplace"`, with nothing to train; `"flow"`, to be trained.
        starts: points to refine from, odd.
        derivative: of the refined point, `"implicit"` or `"unrolled"`.
        profile: whether the widths there are those of exp(-J), see [`RefinedEncoder`][].
        key: initialises the weights of the flow.
        sizes: passed on to [`RefinedFlowHead`][].

    Raises:
        ValueError: on another kind, or a flow without a key.
    """
    encoder = RefinedEncoder(
        guess, energy, steps=steps, starts=starts, derivative=derivative, profile=profile
    )
    if kind == "laplace":
        return AmortizedPosterior(encoder, RefinedLaplaceHead())
    if kind != "flow":
        raise ValueError(f"expected kind 'laplace' or 'flow', got {kind!r}")
    if key is None:
        raise ValueError("expected a key: the weights of a flow have to be drawn")
    head = RefinedFlowHead(encoder.size, energy.prior.loc.size, key=key, **sizes)
    return AmortizedPosterior(encoder, head)
