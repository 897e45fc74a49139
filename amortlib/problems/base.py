"""An inverse problem is a prior, a forward model and a noise, and a pattern of gaps over them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from amortlib.gaussian import AbstractDistribution
from amortlib.observation import GaussianNoise, VaryingGaussianNoise
from amortlib.types import Array, Event, Key

__all__ = ["DrawOne", "InvalidProblemError", "InverseProblem", "simulate_pair"]


class InvalidProblemError(ValueError):
    """One of a user's functions does not fit: the message names it, and the key that shows it."""


def simulate_pair(
    key: Key,
    prior_sample: Callable[[Key], Array],
    forward: Callable[[Array], Array],
    obs_noise: Callable[[Key, Array], Array],
) -> tuple[Array, Array]:
    """Draw one pair (x, y) from the joint density p(x) p(y | x).

    Args:
        key: random key; split between the state and the noise.
        prior_sample: key -> state x, shape `(d,)`.
        forward: x -> H(M(x)), what would be seen without noise, any shape.
        obs_noise: key and H(M(x)) -> y, the noisy observation. It is given the clean value, and
            not only its shape, so that noise may depend on it.

    Returns:
        x and y. Every pair is an independent draw, so y says of x just what the posterior says.
    """
    k_state, k_noise = jax.random.split(key)
    x = prior_sample(k_state)
    return x, obs_noise(k_noise, forward(x))


class InverseProblem(eqx.Module):
    """Three functions and a gap pattern: all that is asked of a user.

    Attributes:
        prior_sample: key -> x, shape `(d,)`.
        forward: x -> clean observations.
        obs_noise: key, clean observations -> y. A `VaryingGaussianNoise` draws a level for every
            event and writes it into the event's `sd`; a `GaussianNoise` writes its own.
        gaps: key, shape -> mask.
        prior: the density that `prior_sample` draws from, where it is known in closed form.
            Solvers and exact answers need it, heads do not.
    """

    prior_sample: Callable[[Key], Array]
    forward: Callable[[Array], Array]
    obs_noise: Any
    gaps: Callable[[Key, tuple[int, ...]], Array]
    prior: AbstractDistribution | None = None

    def simulate(self, key: Key) -> tuple[Array, Event]:
        """One state and one event seen of it."""
        k_pair, k_level, k_mask = jax.random.split(key, 3)
        noise = self.obs_noise
        if isinstance(noise, VaryingGaussianNoise):
            noise = noise.draw(k_level)
        x, y = simulate_pair(k_pair, self.prior_sample, self.forward, noise)
        sd = jnp.broadcast_to(noise.sd, y.shape) if isinstance(noise, GaussianNoise) else None
        return x, Event(y, self.gaps(k_mask, y.shape), sd)

    @eqx.filter_jit
    def batch(self, key: Key, n: int) -> tuple[Array, Event]:
        """`n` independent pairs, stacked on a leading axis. Fresh key, fresh minibatch."""
        return jax.vmap(self.simulate)(jax.random.split(key, n))

    def with_gaps(self, gaps: Callable[[Key, tuple[int, ...]], Array]) -> "InverseProblem":
        """The same problem under another pattern of gaps: to validate on, or to ask about."""
        return dataclasses.replace(self, gaps=gaps)

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of x and of y, found without running anything."""
        x, event = jax.eval_shape(self.simulate, jax.random.key(0))
        return x.shape, event.y.shape

    def check(self, key: Key, n: int = 64) -> None:
        """Draw `n` pairs and look at them, before hours are spent on training with them.

        Raises:
            InvalidProblemError: on a function that returns a wrong shape or type, or values that
                are not finite; the message names the function and the key that made them. Also
                on noise whose level is not positive, of which no logarithm can be read.
        """
        keys = jax.random.split(key, n)
        x = _call("prior_sample", lambda: jax.eval_shape(self.prior_sample, keys[0]))
        if not isinstance(x, jax.ShapeDtypeStruct) or len(x.shape) != 1:
            raise InvalidProblemError(
                f"expected prior_sample(key) to return one array of shape (d,), got {x}"
            )
        _refuse_no_floats("prior_sample(key)", x)
        y = _call("forward", lambda: jax.eval_shape(self.forward, x))
        if not isinstance(y, jax.ShapeDtypeStruct) or len(y.shape) == 0 or 0 in y.shape:
            raise InvalidProblemError(
                f"expected forward(x) to return one array with at least one entry, got {y}"
            )
        _refuse_no_floats("forward(x)", y)
        noise = self.obs_noise
        if isinstance(noise, VaryingGaussianNoise):
            noise = noise.draw(keys[0])
        noisy = _call("obs_noise", lambda: jax.eval_shape(noise, keys[0], y))
        if not isinstance(noisy, jax.ShapeDtypeStruct) or noisy.shape != y.shape:
            raise InvalidProblemError(
                f"expected obs_noise(key, clean) to keep the shape {y.shape}, got {noisy}"
            )
        _refuse_no_floats("obs_noise(key, clean)", noisy)
        mask = _call("gaps", lambda: jax.eval_shape(lambda k: self.gaps(k, y.shape), keys[0]))
        if (
            not isinstance(mask, jax.ShapeDtypeStruct)
            or mask.shape != y.shape
            or mask.dtype != jnp.bool_
        ):
            raise InvalidProblemError(
                f"expected gaps(key, shape) to return booleans of shape {y.shape}, got {mask}"
            )
        # One compiled program: run eagerly, every primitive would be compiled by itself.
        states, events = jax.jit(jax.vmap(self.simulate))(keys)
        clean = jax.jit(jax.vmap(self.forward))(states)
        for name, values in (
            ("prior_sample", states),
            ("forward", clean),
            ("obs_noise", events.y),
        ):
            finite = np.isfinite(np.asarray(values)).reshape(n, -1).all(axis=1)
            if not finite.all():
                bad = int(np.argmin(finite))
                words = keys[bad] if keys.dtype == jnp.uint32 else jax.random.key_data(keys[bad])
                raise InvalidProblemError(
                    f"{name} returned values that are not finite in {int((~finite).sum())} of "
                    f"{n} draws; the first was made by simulate with the key "
                    f"{np.asarray(words).tolist()}"
                )
        if events.sd is not None and not (np.asarray(events.sd) > 0).all():
            raise InvalidProblemError(
                f"expected obs_noise to have a positive sd, got {np.asarray(events.sd).min()}"
            )


def _call(name: str, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as err:
        raise InvalidProblemError(
            f"{name} raised {type(err).__name__} when called as documented: {err}"
        ) from err


def _refuse_no_floats(call: str, made: jax.ShapeDtypeStruct) -> None:
    # Integers would train: a whole-number state has no density, and no slope by which to learn.
    if not jnp.issubdtype(made.dtype, jnp.floating):
        raise InvalidProblemError(
            f"expected {call} to return real floating-point numbers, got dtype {made.dtype}; "
            "write .astype(float) where they are counts"
        )


class DrawOne(eqx.Module):
    """key -> one draw of a density: a `prior_sample` made of a prior.

    Attributes:
        density: what is drawn from.
    """

    density: AbstractDistribution

    def __call__(self, key: Key) -> Array:
        """One draw, shape `(d,)`."""
        return self.density.sample(1, key=key)[0]
