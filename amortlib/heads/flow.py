"""The flow head: an invertible map, conditioned on the context, of a Gaussian's white noise.

    x = mu + L f(z; c),    z ~ N(0, I),
    log q(x) = log N(g(w; c); 0, I) + log |det dg/dw| - log |det L|,

with w = L^-1 (x - mu) and g the inverse of f. (mu, L) is either the prior, or itself predicted
from the context by a regression head. The second is far better where posteriors are narrow: the
flow then has a shape to learn, and not also a place and a width.

Papamakarios, Nalisnick, Rezende, Mohamed and Lakshminarayanan (2021), *Normalizing flows for
probabilistic modeling and inference*, J. Mach. Learn. Res. 22.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import flowjax.bijections as bij
import jax
import jax.numpy as jnp
from jaxtyping import Float
from paramax import Parameterize, unwrap

from amortlib.gaussian import AbstractDistribution, Gaussian, GaussMarkov, quasi_normal
from amortlib.heads.base import AbstractHead
from amortlib.modes import density_mode
from amortlib.types import Array, Fixed, Key

__all__ = ["FlowDistribution", "FlowHead"]

_LOG_2PI = math.log(2.0 * math.pi)

_LOG_SCALE_BOUND = 3.0
"""Bound on the log of the scale that one layer applies: e^3 is 20 to one."""

SPLINE_INTERVAL = 4.0
"""Splines bend what lies between minus this and this, in standard deviations of the base."""


def _bounded_exp(x: Array) -> Array:
    return jnp.exp(_LOG_SCALE_BOUND * jnp.tanh(x / _LOG_SCALE_BOUND))


def _transformer(name: str, knots: int) -> bij.AbstractBijection:
    """A map of one number; its parameters are zero at the identity, and are what a net predicts."""
    affine = eqx.tree_at(lambda a: a.scale, bij.Affine(), Parameterize(_bounded_exp, jnp.zeros(())))
    if name == "affine":
        return affine
    spline = bij.RationalQuadraticSpline(knots=knots, interval=SPLINE_INTERVAL)
    return bij.Chain([affine, spline])


def _shrunk(net: eqx.nn.MLP, factor: float) -> eqx.nn.MLP:
    """Near-identity start: the last layer's weights small, its bias zero."""

    def scale(weight: Any) -> Any:
        # Masked weights are wrapped: where(mask, weight, 0).
        return jax.tree.map(lambda a: a * factor if eqx.is_inexact_array(a) else a, weight)

    last = net.layers[-1]
    assert last.bias is not None
    return eqx.tree_at(
        lambda n: (n.layers[-1].weight, n.layers[-1].bias),
        net,
        (scale(last.weight), jnp.zeros_like(last.bias)),
        is_leaf=lambda node: isinstance(node, Parameterize),
    )


def _layer(
    kind: str, transformer: bij.AbstractBijection, dim: int, condition: int, net: dict, key: Key
) -> bij.AbstractBijection:
    if kind == "coupling":
        coupling = bij.Coupling(
            key,
            transformer=transformer,
            untransformed_dim=dim // 2,
            dim=dim,
            cond_dim=condition,
            **net,
        )
        return eqx.tree_at(lambda c: c.conditioner, coupling, replace_fn=lambda n: _shrunk(n, 0.1))
    masked = bij.MaskedAutoregressive(
        key, transformer=transformer, dim=dim, cond_dim=condition, **net
    )
    return eqx.tree_at(
        lambda m: m.masked_autoregressive_mlp, masked, replace_fn=lambda n: _shrunk(n, 0.1)
    )


def _order(kind: str, dim: int) -> Array:
    """Between two layers: what stood last stands first, or what was left alone is not."""
    if kind == "coupling":
        return jnp.roll(jnp.arange(dim), -(dim // 2))
    return jnp.arange(dim)[::-1]


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


class FlowDistribution(AbstractDistribution):
    """A mixture of k flows, most often of one, for one context.

    Log-density and draws are exact. Mean, covariance and standard deviation are averages over
    [`quasi_normal`][amortlib.gaussian.quasi_normal] points sent through the flow: no key, the
    same at every call, exact where the flow is affine, and elsewhere with an error that falls
    nearly as one over their number. The mode is found by ascent from the best of the same points,
    see [`density_mode`][amortlib.modes.density_mode].

    Splines have a continuous slope and no continuous curvature, so the slope of a spline flow's
    log-density jumps at its knots. Its mode may be such a point, and then it does not move
    smoothly with the data. The mode of a flow of affine layers with smooth nets does.

    Attributes:
        flow: from whitened states to noise; shared by the components.
        condition: what it is conditioned on, for each component, shape `(k, c)`.
        base: base density of each component, arrays with a leading axis of k.
        log_weight: log of the weight of each component, shape `(k,)`.
        points: number of quasi-random points, even.
        climbs: how many of them the search for the mode ascends from.
    """

    exact_log_prob: ClassVar[bool] = True

    flow: bij.AbstractBijection
    condition: Float[Array, "k c"]
    base: Gaussian | GaussMarkov
    log_weight: Float[Array, " k"]
    points: int = eqx.field(static=True)
    climbs: int = eqx.field(static=True)

    @property
    def dim(self) -> int:
        """Dimension d of the state."""
        return self.base.loc.shape[-1]

    def _log_component(
        self, x: Array, base: Gaussian | GaussMarkov, condition: Array
    ) -> Float[Array, ""]:
        z, log_det = self.flow.transform_and_log_det(base.whiten(x), condition)
        # At its mean a Gaussian's density is 1 / ((2 pi)^(d/2) |L|).
        return base.log_prob(base.loc) - 0.5 * jnp.sum(z**2) + log_det

    def _from_noise(self, z: Array, base: Gaussian | GaussMarkov, condition: Array) -> Array:
        return base.colour(self.flow.inverse(z, condition))

    def log_prob(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log-density at `x`, exact."""
        if self.log_weight.shape[0] == 1:
            return self._log_component(x, _first(self.base), self.condition[0])
        parts = jax.vmap(lambda b, c: self._log_component(x, b, c))(self.base, self.condition)
        return jax.nn.logsumexp(parts + self.log_weight)

    def noise(self, x: Float[Array, " d"]) -> Float[Array, "k d"]:
        """z with x = mu + L f(z; c) under each component, standard normal if x comes from it."""
        return jax.vmap(lambda b, c: self.flow.transform(b.whiten(x), c))(self.base, self.condition)

    def from_noise(self, z: Float[Array, " d"], component: int | Array = 0) -> Float[Array, " d"]:
        """mu + L f(z; c) of one component: a draw where z is one of N(0, I)."""
        base = jax.tree.map(lambda leaf: leaf[component], self.base)
        return self._from_noise(z, base, self.condition[component])

    def sample(self, n: int, *, key: Key) -> Float[Array, "n d"]:
        """`n` independent draws.

        Raises:
            ValueError: on less than one.
        """
        if n < 1:
            raise ValueError(f"expected at least one sample, got n={n}")
        if self.log_weight.shape[0] == 1:
            z = jax.random.normal(key, (n, self.dim), self.base.loc.dtype)
            return jax.vmap(self.from_noise)(z)
        k_which, k_noise = jax.random.split(key)
        z = jax.random.normal(k_noise, (n, self.dim), self.base.loc.dtype)
        which = jax.random.categorical(k_which, self.log_weight, shape=(n,))
        return jax.vmap(self.from_noise)(z, which)

    def points_of_components(self) -> tuple[Float[Array, "k p d"], Float[Array, " k"]]:
        """The quasi-random points sent through each component, and the weight of each."""
        z = jnp.asarray(quasi_normal(self.points, self.dim), self.base.loc.dtype)
        through = jax.vmap(lambda b, c: jax.vmap(lambda z: self._from_noise(z, b, c))(z))
        return through(self.base, self.condition), jnp.exp(self.log_weight)

    def mean(self) -> Float[Array, " d"]:
        """The mean, by quasi-random points."""
        x, weight = self.points_of_components()
        return weight @ x.mean(1)

    def covariance(self) -> Float[Array, "d d"]:
        """The covariance, by quasi-random points."""
        x, weight = self.points_of_components()
        off = x - weight @ x.mean(1)
        return jnp.einsum("k,kpi,kpj->ij", weight, off, off) / self.points

    def sd(self) -> Float[Array, " d"]:
        """Standard deviation of each component of the state, by quasi-random points."""
        x, weight = self.points_of_components()
        off = x - weight @ x.mean(1)
        return jnp.sqrt(jnp.einsum("k,kpi->i", weight, off**2) / self.points)

    def mode(self) -> Float[Array, " d"]:
        """The highest point of the density, by ascent from the best of the quasi-random points."""
        # Ascend in the whitened coordinates of one component, where the density is round.
        frame = jax.tree.map(lambda leaf: leaf[jnp.argmax(self.log_weight)], self.base)
        x, _ = self.points_of_components()
        starts = jax.vmap(frame.whiten)(x.reshape(-1, self.dim))
        best = density_mode(lambda w: self.log_prob(frame.colour(w)), starts, climbs=self.climbs)
        return frame.colour(best)


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], tree)


class FlowHead(AbstractHead):
    """A conditional normalizing flow over a Gaussian base.

    Layers are coupling layers (Dinh, Sohl-Dickstein and Bengio 2017, arXiv:1605.08803) or masked
    autoregressive ones (Papamakarios, Pavlakou and Murray 2017, arXiv:1705.07057), from flowjax.
    Each maps single numbers by monotonic rational-quadratic splines with an affine map before
    them (Durkan, Bekasov, Murray and Papamakarios 2019, arXiv:1906.04032), or by affine maps
    alone. Log-densities take one pass through either kind; draws take one pass through coupling
    layers and d through autoregressive ones, which are the more expressive for their size.

    Starts near its base: near the prior, or near the regression head's Gaussian. Scales are
    bounded, so that no step of training can overflow single precision.

    With several base heads the answer is a mixture of as many flows, each around a Gaussian of
    its own: for posteriors in separate pieces, which a single flow can only join by a thread.

    A mapped call that *returns* the distribution, `jax.vmap(head)(contexts)`, copies the weights
    for every context; map a function that returns what you want of it instead.
    """

    bases: tuple[AbstractHead, ...]
    prior: Fixed
    project: eqx.nn.Linear
    logits: eqx.nn.Linear | None
    offsets: Float[Array, "k c"]
    flow: bij.Scan
    points: int = eqx.field(static=True)
    climbs: int = eqx.field(static=True)

    def __init__(
        self,
        features: int,
        base: Gaussian | GaussMarkov | AbstractHead | Sequence[AbstractHead],
        *,
        dim: int,
        key: Key,
        kind: str = "autoregressive",
        transformer: str = "spline",
        layers: int = 4,
        condition: int = 32,
        width: int = 64,
        depth: int = 1,
        knots: int = 8,
        activation: Callable[[Array], Array] = jax.nn.gelu,
        points: int = 256,
        climbs: int = 4,
    ):
        """Set the sizes.

        Args:
            features: length of the context.
            base: the prior, which is held fixed; or a head that gives a `Gaussian` or a
                `GaussMarkov` from the same context and is trained with the flow; or several
                such heads, for a mixture.
            dim: dimension d of the state.
            key: initialises the weights.
            kind: `"autoregressive"` or `"coupling"`.
            transformer: `"spline"` or `"affine"`.
            layers: how many.
            condition: the context is brought to this length before the layers see it.
            width: of the hidden layers of each layer's net.
            depth: number of its hidden layers.
            knots: of each spline.
            activation: of the nets; a smooth one, or the density has kinks.
            points: quasi-random points for the moments and the mode, even.
            climbs: how many of them the search for the mode ascends from.

        Raises:
            ValueError: on another kind or transformer, no layer, or a base of another dimension.
        """
        if kind not in ("autoregressive", "coupling"):
            raise ValueError(f"expected kind 'autoregressive' or 'coupling', got {kind!r}")
        if transformer not in ("spline", "affine"):
            raise ValueError(f"expected transformer 'spline' or 'affine', got {transformer!r}")
        if layers < 1 or knots < 2:
            raise ValueError(f"expected layers >= 1 and knots >= 2, got {layers}, {knots}")
        quasi_normal(points, dim)  # says what is wrong with `points`
        if isinstance(base, Gaussian | GaussMarkov):
            if base.loc.shape != (dim,):
                raise ValueError(f"expected a base of shape {(dim,)}, got {base.loc.shape}")
            self.bases, self.prior = (), Fixed(base)
        else:
            self.bases = (base,) if isinstance(base, AbstractHead) else tuple(base)
            self.prior = Fixed(None)
            if not self.bases:
                raise ValueError("expected at least one base head, got none")
        k = max(1, len(self.bases))
        k_project, k_logits, k_offsets, *k_layers = jax.random.split(key, 3 + layers)
        self.project = eqx.nn.Linear(features, condition, key=k_project)
        self.logits = eqx.nn.Linear(features, k, key=k_logits) if k > 1 else None
        self.offsets = 0.1 * jax.random.normal(k_offsets, (k, condition)) * (k > 1)
        net = {"nn_width": width, "nn_depth": depth, "nn_activation": activation}
        bend = _transformer(transformer, knots)

        def layer(key: Key) -> bij.AbstractBijection:
            made = _layer(kind, bend, dim, condition, net, key)
            return made if dim == 1 else bij.Chain([made, bij.Permute(_order(kind, dim))])

        # One program for all layers: it compiles in a fraction of the time.
        self.flow = bij.Scan(eqx.filter_vmap(layer)(jnp.stack(k_layers)))
        self.points, self.climbs = points, climbs

    def __call__(self, context: Any) -> FlowDistribution:
        """The flow for one context.

        Raises:
            ValueError: where the context is not one array of features.
        """
        features = (int(self.project.in_features),)
        if not eqx.is_array(context) or context.shape != features:
            raise ValueError(
                f"expected a flat context of shape {features}, got "
                f"{getattr(context, 'shape', type(context).__name__)}: "
                "a flow takes an encoder whose context is one array"
            )
        if self.bases:
            base = _stack([head(context) for head in self.bases])
        else:
            base = _stack([self.prior.value])
        shared = jax.nn.gelu(self.project(context))
        if self.logits is None:
            log_weight = jnp.zeros(1, shared.dtype)
        else:
            log_weight = jax.nn.log_softmax(self.logits(context))
        return self.around(base, shared + self.offsets, log_weight)

    def around(
        self, base: Gaussian | GaussMarkov, condition: Float[Array, "k c"], log_weight: Array
    ) -> FlowDistribution:
        """This head's layers around bases that come from elsewhere.

        Args:
            base: k densities, arrays with a leading axis.
            condition: what the layers see at each.
            log_weight: log of the weight of each, shape `(k,)`.
        """
        return FlowDistribution(
            flow=unwrap(self.flow),
            condition=condition,
            base=base,
            log_weight=log_weight,
            points=self.points,
            climbs=self.climbs,
        )
