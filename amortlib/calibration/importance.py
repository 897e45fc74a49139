"""How well q stands in for exp(-J): KL, effective sample size and Pareto k-hat from its weights.

All from one sample of q. None can know of probability far from where q draws: of a missing mode
k-hat may catch the shadow, where it is near, and the two others do not.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Float

from amortlib.types import Array

__all__ = ["KHAT", "ImportanceFigures", "importance_figures", "pareto_khat"]

KHAT = 0.7
"""Above it importance weights cannot be trusted: Vehtari et al. (2024)."""


class ImportanceFigures(eqx.Module):
    """What the importance weights of q against exp(-J) say, for one event.

    Attributes:
        kl: KL(p || q) in nats, estimated; too small where `khat` is large.
        ess: effective sample size as a share of the draws, 1 for an exact q.
        khat: shape of the weights' tail, see [`pareto_khat`][].
    """

    kl: Float[Array, ""]
    ess: Float[Array, ""]
    khat: Float[Array, ""]


def importance_figures(log_weight: Float[Array, " s"]) -> ImportanceFigures:
    """Figures of one sample.

    With weights w normalised to a sum of one, KL(p || q) = E_p[log p/q] is estimated by
    sum w log(S w), which is never negative and at most log S; the share of the sample that is
    effective is 1 / (S sum w^2) (Kong, Liu and Wong 1994, J. Am. Stat. Assoc. 89, section 4.1).
    Where q is exact the estimate of KL is zero whatever was drawn.

    Args:
        log_weight: -J(x) - log q(x) at draws x of q. Minus infinity where exp(-J) is zero.
    """
    log_share = jax.nn.log_softmax(log_weight)
    share, size = jnp.exp(log_share), log_weight.size
    terms = jnp.where(share > 0, share * log_share, 0.0)
    return ImportanceFigures(
        kl=jnp.maximum(jnp.sum(terms) + math.log(size), 0.0),
        ess=1.0 / (size * jnp.sum(share**2)),
        khat=pareto_khat(log_weight),
    )


def pareto_khat(log_weight: Float[Array, " s"]) -> Float[Array, ""]:
    """Shape k of the generalised Pareto law fitted to the largest weights.

    The weights have finite moments up to 1/k. Below 0.5 their variance is finite; above 0.7 the
    number of draws that would be needed grows out of reach: Vehtari, Simpson, Gelman, Yao and
    Gabry (2024), *Pareto smoothed importance sampling*, JMLR 25, arXiv:1507.02646. The fit is that
    of Zhang and Stephens (2009), Technometrics 51, to the min(S/5, 3 sqrt(S)) largest weights,
    drawn towards 0.5 as ten more weights would.

    Zero where the largest weights are all equal: there is no tail to fit.

    Raises:
        ValueError: on fewer than 25 weights, of which fewer than 5 are a tail.
    """
    size = log_weight.size
    if size < 25:
        raise ValueError(f"expected at least 25 weights, got {size}")
    tail = math.ceil(min(0.2 * size, 3.0 * math.sqrt(size)))
    ordered = jnp.sort(log_weight)
    top = ordered[-1]
    x = jnp.exp(ordered[-tail:] - top) - jnp.exp(ordered[-tail - 1] - top)
    # Weights that differ by rounding alone are equal.
    flat = x[-1] <= jnp.finfo(x.dtype).eps ** 0.5
    # The fit divides by the largest value and by a quartile; keep both off zero.
    x = jnp.where(flat, jnp.arange(1.0, tail + 1.0, dtype=x.dtype), x)
    quartile = jnp.maximum(x[int(tail / 4 + 0.5) - 1], jnp.finfo(x.dtype).tiny * 1e6)

    # Posterior mean of b = -k / sigma under a weak prior, on a grid of quantiles of that prior.
    points = 30 + int(math.sqrt(tail))
    grid = jnp.arange(1, points + 1, dtype=x.dtype) - 0.5
    b = 1.0 / x[-1] + (1.0 - jnp.sqrt(points / grid)) / (3.0 * quartile)
    # Rounded up to 1 / x[-1], b would have the logarithm of zero for the largest value.
    b = jnp.minimum(b, (1.0 - 8.0 * jnp.finfo(x.dtype).eps) / x[-1])
    k = jnp.mean(jnp.log1p(-b[:, None] * x), axis=1)
    # Where b is zero the law is exponential, and -b / k is its limit, one over the mean.
    near = jnp.abs(b) * x[-1] < jnp.finfo(x.dtype).eps ** 0.5
    rate = jnp.where(near, 1.0 / jnp.mean(x), -b / jnp.where(near, 1.0, k))
    likelihood = tail * (jnp.log(rate) - k - 1.0)
    mean_b = jnp.sum(b * jax.nn.softmax(likelihood))
    shape = jnp.mean(jnp.log1p(-mean_b * x))
    shape = (tail * shape + 10 * 0.5) / (tail + 10)
    return jnp.where(flat, 0.0, shape)
