"""What training minimises: each objective maps a model, a batch and a key to a number."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Float

from amortlib.energy import Energy
from amortlib.gaussian import AbstractDistribution, Gaussian, GaussMarkov
from amortlib.posterior import AmortizedPosterior
from amortlib.types import Array, Event, Key

__all__ = ["Lesson", "ModeMatch", "NegativeELBO", "dsm", "elbo", "nll"]


def nll(
    model: AmortizedPosterior, batch: tuple[Float[Array, "n d"], Event], key: Key
) -> Float[Array, ""]:
    """Mean negative log-likelihood -log q(x | y, m) over a batch of simulated pairs, in nats.

    Over fresh pairs from p(x, y) its expectation is E_y KL(p(x | y) || q(x | y)) plus a constant:
    the forward KL divergence, averaged over events (Papamakarios and Murray 2016,
    arXiv:1605.06376, proposition 1). No posterior is needed to minimise it.
    """
    x, event = batch
    return -jnp.mean(jax.vmap(model.log_prob)(x, event))


def dsm(
    model: AmortizedPosterior, batch: tuple[Float[Array, "n d"], Event], key: Key
) -> Float[Array, ""]:
    """Mean denoising loss over a batch of simulated pairs: how well the head takes noise off.

    The head adds noise to the state of each pair, at levels that it draws, and predicts it. The
    best prediction is minus sigma times the score of p(x | y, m) at that level: Vincent (2011), *A
    connection between score matching and denoising autoencoders*, Neural Comput. 23, equation 11;
    over pairs of p(x, y) for every event at once, as in Batzolis et al. (2021), *Conditional image
    generation with score-based diffusion models*, arXiv:2111.13606, theorem 1. The weighting of the
    levels, and whatever a head learns beside its score, are the head's own.

    Args:
        model: a posterior whose head has `denoising_loss(context, x, key=key)`.
        batch: states, shape `(n, d)`, and events with a leading axis of n.
        key: draws the noise and its levels.

    Raises:
        ValueError: on a head without a denoising loss.
    """
    x, events = batch
    loss = getattr(model.head, "denoising_loss", None)
    if loss is None:
        raise ValueError(
            f"expected a head with a denoising loss, got {type(model.head).__name__}; "
            "train it with nll"
        )
    keys = jax.random.split(key, x.shape[0])
    return jnp.mean(
        jax.vmap(lambda x, event, key: loss(model.context(event), x, key=key))(x, events, keys)
    )


def elbo(
    q: AbstractDistribution, energy: Energy, event: Event, n: int, *, key: Key
) -> Float[Array, ""]:
    """Evidence lower bound -E_q[J] + H[q] = log Z(y, m) - KL(q || p), in nats, from `n` draws.

    Its expectation is never more than log Z, and is log Z at the posterior and nowhere else:
    Jordan, Ghahramani, Jaakkola and Saul (1999), *An introduction to variational methods for
    graphical models*, Machine Learning 37, section 6; Z is that of exp(-J), so that constants
    which J leaves out are left out here too.

    J is averaged over draws and the gradient of the result passes through them (the
    reparameterisation of Kingma and Welling 2014, arXiv:1312.6114, section 2.4): value and
    gradient are unbiased for every `n`. The entropy of a Gaussian is exact. That of another
    density is minus the mean of log q over the same draws; there the sum is log Z without any
    error where q is the posterior, draw by draw. `q.sample` has to be a differentiable map of
    its noise.

    Args:
        q: density of the state, shape `(d,)`.
        energy: J.
        event: the event; masked entries count for nothing.
        n: number of draws.
        key: draws them.

    Raises:
        ValueError: on less than one draw.
    """
    if n < 1:
        raise ValueError(f"expected at least one draw, got n={n}")
    x = q.sample(n, key=key)
    if isinstance(q, Gaussian | GaussMarkov):
        entropy = q.entropy()
    else:
        entropy = -jnp.mean(jax.vmap(q.log_prob)(x))
    return entropy - jnp.mean(jax.vmap(lambda x: energy(x, event))(x))


class NegativeELBO(eqx.Module):
    """Mean over a batch of events of minus the [`elbo`][] of the model's answer, in nats.

    Its expectation is E_y KL(q(x | y) || p(x | y)) plus a constant, the reverse KL divergence
    averaged over events: amortized variational inference (Kingma and Welling 2014,
    arXiv:1312.6114, equation 3). The states of the pairs are not read; J and its gradient are.

    Where q is far from the posterior J is huge, and so is its gradient: clip it, or start from
    a model that [`nll`][] has trained.

    Attributes:
        energy: J.
        samples: draws of q for each event.
    """

    energy: Energy
    samples: int = eqx.field(static=True, default=8)

    def __check_init__(self):
        if self.samples < 1:
            raise ValueError(f"expected samples >= 1, got {self.samples}")

    def __call__(
        self,
        model: Callable[[Event], AbstractDistribution],
        batch: tuple[Array, Event],
        key: Key,
    ) -> Float[Array, ""]:
        """The loss on a batch; each event has draws of its own.

        Args:
            model: event -> density: an amortized posterior, or the free density of one event.
            batch: states, shape `(n, d)`, and events with a leading axis of n.
            key: draws from the densities.
        """
        _, events = batch
        keys = jax.random.split(key, events.y.shape[0])

        def one(event, key):
            return elbo(model(event), self.energy, event, self.samples, key=key)

        return -jnp.mean(jax.vmap(one)(events, keys))


class Lesson(eqx.Module):
    """What a solver has to teach of an event, or of many with a leading axis.

    Attributes:
        mode: x*, the minimum of J.
        chol: lower Cholesky factor of the covariance there, the unit that misses are measured in.
        jacobian: d x*/dy, of shape `(d, *obs)`; zero at masked entries.
    """

    mode: Float[Array, "*n d"]
    chol: Float[Array, "*n d d"]
    jacobian: Float[Array, "..."]


class ModeMatch(eqx.Module):
    """Distillation of the mode alone, and of how it moves: the head's against a solver's.

    For an event with the solver's mode x*, covariance P* = L L^T and Jacobian A* = d x*/dy,

        |L^-1 (mode_q - x*)|^2 / d + slope |A_q - A*|_F^2 / |A*|_F^2,

    averaged over the batch; masked entries count for nothing. Targets are functions of the
    event, without the noise of a simulated state. Training on derivatives too is the Sobolev
    training of Czarnecki, Osindero, Jaderberg, Swirszcz and Pascanu (2017), arXiv:1706.04859;
    as in their section 2 the Jacobian is not formed: E |M u|^2 = |M|_F^2 where the entries of u
    are random signs, and M u takes one tangent of the network.

    Attributes:
        slope: weight of the Jacobian's part; with 0 it is not computed.
        probes: random directions an event.
    """

    slope: float = eqx.field(static=True, default=1.0)
    probes: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        if self.slope < 0 or self.probes < 1:
            raise ValueError(
                f"expected slope >= 0 and probes >= 1, got {self.slope} and {self.probes}"
            )

    def __call__(
        self, model: AmortizedPosterior, batch: tuple[Lesson, Event], key: Key
    ) -> Float[Array, ""]:
        """The loss on a batch.

        Args:
            model: a posterior whose `mode` can be differentiated.
            batch: lessons and their events, with a leading axis of n.
            key: draws the directions.
        """
        lessons, events = batch

        def one(lesson: Lesson, event: Event, key: Key) -> Array:
            def mode(y: Array) -> Array:
                return model.mode(eqx.tree_at(lambda e: e.y, event, y))

            def miss(x: Array) -> Array:
                return Gaussian(lesson.mode, lesson.chol).mahalanobis(x) / x.size

            if self.slope == 0:
                return miss(mode(event.y))
            x, move = jax.linearize(mode, event.y)
            size = jnp.sum(jnp.where(event.mask, lesson.jacobian, 0.0) ** 2)

            def along(key: Key) -> Array:
                sign = jax.random.rademacher(key, event.y.shape, event.y.dtype)
                u = jnp.where(event.mask, sign, 0.0)
                want = lesson.jacobian.reshape(x.size, -1) @ u.reshape(-1)
                return jnp.sum((move(u) - want) ** 2)

            off = jnp.mean(jax.vmap(along)(jax.random.split(key, self.probes)))
            # Where nothing is seen neither mode may move, and no direction is left.
            return miss(x) + self.slope * off / jnp.where(size > 0, size, 1.0)

        keys = jax.random.split(key, events.y.shape[0])
        return jnp.mean(jax.vmap(one)(lessons, events, keys))
