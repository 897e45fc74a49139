"""Can a classifier tell draws of q from draws of the posterior?"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from amortlib.types import Array, Key

__all__ = ["c2st"]

_BATCH = 200
"""Points in a minibatch, and below the passes over the data and the rate of Adam: with these the
score of three pairs of samples was that of scikit-learn's classifier to within its spread."""
_PASSES = 60
_RATE = 5e-3


@eqx.filter_jit
def c2st(
    x: Float[Array, "n d"], y: Float[Array, "m e"], *, key: Key, folds: int = 5
) -> Float[Array, ""]:
    """Held-out accuracy of a classifier between two samples: 0.5 where it cannot tell, 1 at worst.

    The classifier two-sample test of Lopez-Paz and Oquab (2017, arXiv:1610.06545) with the
    network of Lueckmann et al. (2021, arXiv:2101.04653): two hidden layers of 10 d units, judged
    by cross-validation on points scaled by the mean and the sd of `x`. In single precision.
    Where both are draws of one density the score has an sd of about 0.5 / sqrt(n).

    Args:
        x: the reference sample.
        y: the other.
        key: the folds, the first weights, the minibatches.
        folds: parts that the points are cut into; what is left over is not used.

    Raises:
        ValueError: on samples of other shapes, or of fewer than `_BATCH` points.
    """
    n, d = x.shape
    if y.shape != (n, d):
        raise ValueError(f"expected two samples of one shape, got {x.shape} and {y.shape}")
    size = 2 * n // folds
    if folds < 2 or size * (folds - 1) < _BATCH:
        raise ValueError(
            f"expected at least 2 folds and {_BATCH} points to learn from, got {folds} folds of "
            f"{size}"
        )
    centre, scale = x.mean(0), x.std(0)
    # A component that never varies tells by being elsewhere at all.
    scale = jnp.where(scale > 0, scale, 1.0)
    points = ((jnp.concatenate([x, y]) - centre) / scale).astype(jnp.float32)
    labels = jnp.repeat(jnp.array([0.0, 1.0], jnp.float32), n)
    k_order, key = jax.random.split(key)
    order = jax.random.permutation(k_order, 2 * n)[: folds * size].reshape(folds, size)
    steps = _PASSES * (size * (folds - 1) // _BATCH)
    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, steps))

    def logit(net: list, z: Array) -> Array:
        for w, b in net[:-1]:
            z = jax.nn.relu(z @ w + b)
        return (z @ net[-1][0] + net[-1][1])[..., 0]

    def one(fold: Array, key: Key) -> Array:
        k_weights, k_batch = jax.random.split(key)
        rest = jnp.where(jnp.arange(folds - 1) >= fold, 1, 0) + jnp.arange(folds - 1)
        learn = order[rest].reshape(-1)
        widths = (d, 10 * d, 10 * d, 1)
        net = [
            (
                jax.random.normal(k, (a, b), jnp.float32) * (2.0 / a) ** 0.5,
                jnp.zeros(b, jnp.float32),
            )
            for a, b, k in zip(widths[:-1], widths[1:], jax.random.split(k_weights, 3), strict=True)
        ]

        def step(carry: tuple, key: Key) -> tuple[tuple, None]:
            net, state = carry
            some = learn[jax.random.randint(key, (_BATCH,), 0, learn.size)]

            def loss(net: list) -> Array:
                each = optax.sigmoid_binary_cross_entropy(logit(net, points[some]), labels[some])
                return jnp.mean(each)

            updates, state = optimizer.update(jax.grad(loss)(net), state)
            return (optax.apply_updates(net, updates), state), None

        (net, _), _ = jax.lax.scan(
            step, (net, optimizer.init(net)), jax.random.split(k_batch, steps)
        )
        held = order[fold]
        return jnp.mean((logit(net, points[held]) > 0) == (labels[held] > 0.5))

    return jnp.mean(jax.vmap(one)(jnp.arange(folds), jax.random.split(key, folds)))
