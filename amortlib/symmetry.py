"""A symmetry that one knows of a problem, built into any posterior by averaging over its images.

Where a map g of states and events changes no energy, J(g x; g e) = J(x; e), the posterior moves
with it: p(g x | g e) = p(x | e). A network has to learn that, and learns it nearly. The average
over the group, q(x | e) = mean_g q(g x | g e), has it exactly, is a density again, and is no
farther from the posterior in the mean over events (KL is convex). Nothing is trained. See Cohen and
Welling (2016), *Group equivariant convolutional networks*, ICML, for symmetries that are built in,
and Yarotsky (2018), *Universal approximations of invariant maps by neural networks*,
arXiv:1804.10306, for averaging over them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float

from amortlib.encoders import AbstractEncoder
from amortlib.energy import Energy
from amortlib.gaussian import (
    AbstractDistribution,
    Gaussian,
    GaussMarkov,
    mixture_covariance,
)
from amortlib.heads.base import AbstractHead
from amortlib.modes import density_mode
from amortlib.posterior import AmortizedPosterior
from amortlib.problems import InverseProblem
from amortlib.types import Array, Event, Fixed, Key

__all__ = [
    "SymmetricDistribution",
    "SymmetricEncoder",
    "SymmetricHead",
    "Symmetry",
    "symmetric_posterior",
]

_CLOSE = 1e-4
"""Two numbers of the size of one that differ by less are the same."""


class Symmetry(eqx.Module):
    """A map x -> A x of states that keeps volume, and what it does to an event.

    Attributes:
        matrix: A, shape `(d, d)`, |det A| = 1.
        event: an event -> the event that would have been seen of A x.
    """

    matrix: Fixed
    event: Callable[[Event], Event] = eqx.field(static=True)

    def __init__(self, matrix: ArrayLike, event: Callable[[Event], Event]):
        """Set both.

        Raises:
            ValueError: on a matrix that is not square, or changes volume.
        """
        a = np.asarray(matrix, float)
        if a.ndim != 2 or a.shape[0] != a.shape[1]:
            raise ValueError(f"expected a matrix of shape (d, d), got {a.shape}")
        volume = abs(float(np.linalg.det(a)))
        if not abs(volume - 1.0) < _CLOSE:
            raise ValueError(f"expected a map that keeps volume, |det A| = 1, got {volume:.4g}")
        self.matrix, self.event = Fixed(jnp.asarray(a)), event

    def __call__(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """The image of a state."""
        return self.matrix.value @ x


class SymmetricDistribution(AbstractDistribution):
    """mean_g q_g(g x), over a group of maps.

    Attributes:
        parts: what is said of the image of the event under each map, arrays with a leading axis.
        maps: the matrices, shape `(g, d, d)`, the identity first.
    """

    parts: AbstractDistribution
    maps: Float[Array, "g d d"]

    @property
    def exact_log_prob(self) -> bool:
        """Whether that of the parts is."""
        return self.parts.exact_log_prob

    def _each(self, ask: Callable[..., Array], *args: Array) -> Array:
        """Ask every part, each with its own row of the arguments."""
        return eqx.filter_vmap(ask)(self.parts, *args)

    def _back(self, x: Float[Array, "g *n d"]) -> Float[Array, "g *n d"]:
        inverse = jnp.linalg.inv(self.maps)
        return jnp.einsum("gij,g...j->g...i", inverse, x)

    def log_prob(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log-density at `x`."""
        each = self._each(lambda q, x: q.log_prob(x), self.maps @ x)
        return jax.nn.logsumexp(each) - jnp.log(float(self.maps.shape[0]))

    def sample(self, n: int, *, key: Key) -> Float[Array, "n d"]:
        """`n` independent draws, at the price of as many of every part."""
        if n < 1:
            raise ValueError(f"expected at least one sample, got n={n}")
        k_which, k_draw = jax.random.split(key)
        g = self.maps.shape[0]
        keys = jax.random.split(k_draw, g)
        draws = self._back(self._each(lambda q, key: q.sample(n, key=key), keys))
        which = jax.random.randint(k_which, (n,), 0, g)
        return draws[which, jnp.arange(n)]

    def mode(self) -> Float[Array, " d"]:
        """The highest point, by ascent from the best of those of the parts."""
        starts = self._back(self._each(lambda q: q.mode()))
        scale = jax.lax.stop_gradient(self.sd())
        best = density_mode(lambda u: self.log_prob(scale * u), starts / scale)
        return scale * best

    def mean(self) -> Float[Array, " d"]:
        """The mean."""
        return self._back(self._each(lambda q: q.mean())).mean(0)

    def covariance(self) -> Float[Array, "d d"]:
        """The covariance: of each part, and of their means."""
        inverse = jnp.linalg.inv(self.maps)
        within = self._each(lambda q: q.covariance())
        means = self._back(self._each(lambda q: q.mean()))
        moved = jnp.einsum("gij,gjk,glk->gil", inverse, within, inverse)
        g = self.maps.shape[0]
        return mixture_covariance(jnp.full(g, 1.0 / g), means, moved)

    def sd(self) -> Float[Array, " d"]:
        """Standard deviation of each component."""
        return jnp.sqrt(jnp.diagonal(self.covariance()))


class SymmetricEncoder(AbstractEncoder):
    """The contexts of an event and of its images, on a leading axis.

    Attributes:
        encoder: of one event.
        symmetries: the maps, without the identity.
    """

    encoder: AbstractEncoder
    symmetries: tuple[Symmetry, ...]
    obs_shape: tuple[int, ...] | None = eqx.field(static=True)
    uses_sd: bool = eqx.field(static=True)

    def __init__(self, encoder: AbstractEncoder, symmetries: Sequence[Symmetry]):
        """Set the parts; arguments as the attributes."""
        self.encoder, self.symmetries = encoder, tuple(symmetries)
        self.obs_shape, self.uses_sd = encoder.obs_shape, encoder.uses_sd

    def __call__(self, event: Event) -> Any:
        """Contexts of one event, the arrays of which have a leading axis."""
        images = [event, *(symmetry.event(event) for symmetry in self.symmetries)]
        together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *images)
        return eqx.filter_vmap(self.encoder)(together)


class SymmetricHead(AbstractHead):
    """The average over a group of what a head says of each image of an event.

    Attributes:
        head: of one context.
        symmetries: the maps, without the identity.
    """

    head: AbstractHead
    symmetries: tuple[Symmetry, ...]

    def __call__(self, context: Any) -> SymmetricDistribution:
        """The distribution for the contexts of one event and its images."""
        parts = eqx.filter_vmap(self.head)(context)
        matrices = [symmetry.matrix.value for symmetry in self.symmetries]
        maps = jnp.stack([jnp.eye(matrices[0].shape[0]), *matrices])
        return SymmetricDistribution(parts, maps)


def symmetric_posterior(
    posterior: AmortizedPosterior,
    symmetries: Sequence[Symmetry],
    *,
    problem: InverseProblem,
    key: Key,
    looks: int = 32,
) -> AmortizedPosterior:
    """A posterior that moves with the symmetries of its problem, whatever the network has learned.

    Answers take as many times longer as there are maps, the identity among them.

    Args:
        posterior: any, trained or not.
        symmetries: a group of maps, without the identity: one after another is again one of them.
        problem: with a Gaussian prior; J is looked at on simulated events and at their images.
        key: draws those.
        looks: how many.

    Raises:
        ValueError: on no symmetry; on a problem without a Gaussian prior; on maps of another size,
            or that are no group; where an image has another shape; and where J is not the same at
            an image, with both numbers.
    """
    if not symmetries:
        raise ValueError("expected at least one symmetry, got none")
    prior = problem.prior
    if not isinstance(prior, Gaussian | GaussMarkov):
        raise ValueError(f"expected a problem with a Gaussian prior, that has a J, got {prior}")
    d = problem.shapes()[0][0]
    maps = [np.eye(d)]
    for i, symmetry in enumerate(symmetries):
        a = np.asarray(symmetry.matrix.tree, float)
        if a.shape != (d, d):
            raise ValueError(f"symmetry {i}: expected a matrix of shape {(d, d)}, got {a.shape}")
        maps.append(a)
    for i, a in enumerate(maps):
        for j, b in enumerate(maps):
            if not any(np.abs(a @ b - c).max() < _CLOSE for c in maps):
                raise ValueError(
                    f"expected a group: symmetry {j - 1} and then {i - 1} is none of those given"
                )
    energy = Energy(prior, problem.forward)
    x, events = problem.batch(key, looks)
    for i, symmetry in enumerate(symmetries):
        images = jax.vmap(symmetry.event)(events)
        if jax.tree.map(jnp.shape, images) != jax.tree.map(jnp.shape, events):
            raise ValueError(
                f"symmetry {i}: expected an event of shape {events.y.shape[1:]}, "
                f"got {images.y.shape[1:]}"
            )
        here = np.asarray(jax.vmap(energy)(x, events))
        there = np.asarray(jax.vmap(lambda x, e, g=symmetry: energy(g(x), e))(x, images))
        off = np.abs(there - here) / (1.0 + np.abs(here))
        worst = int(np.argmax(np.where(np.isfinite(off), off, np.inf)))
        if not off[worst] < 100 * _CLOSE:
            raise ValueError(
                f"symmetry {i}: expected J = {here[worst]:.5g} at the image of a state and of its "
                f"event, as before, got {there[worst]:.5g}"
            )
    encoder = SymmetricEncoder(posterior.encoder, symmetries)
    return AmortizedPosterior(encoder, SymmetricHead(posterior.head, tuple(symmetries)))
