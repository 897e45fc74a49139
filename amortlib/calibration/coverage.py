"""Beyond the gates: expected coverage, distance to random points, and the average posterior.

Each is a rank, or a number that is uniform for an exact posterior, and so is judged as the ranks
of simulation-based calibration are.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from amortlib.calibration.sbc import rank
from amortlib.gaussian import Gaussian, GaussMarkov
from amortlib.types import Array, Key

__all__ = ["coverage_curve", "curve_band", "density_rank", "prior_pit", "tarp_rank"]


def density_rank(
    log_q: Float[Array, ""], log_q_draws: Float[Array, " l"], *, key: Key
) -> Int[Array, ""]:
    """How many draws have a higher density than the truth, from 0 to L.

    Divided by L it is the content of the smallest highest-density region that holds the truth;
    expected coverage at a level is the share of events where it is at most the level: Hermans et
    al. (2022), *A trust crisis in simulation-based inference?*, TMLR, arXiv:2110.06581, where
    expected coverage is defined.
    """
    return rank(-log_q, -log_q_draws, key=key)


def tarp_rank(
    truth: Float[Array, " d"],
    draws: Float[Array, "l d"],
    reference: Float[Array, " d"],
    *,
    key: Key,
) -> Int[Array, ""]:
    """How many draws lie nearer to a reference point than the truth does, from 0 to L.

    Lemos, Coogan, Hezaveh and Perreault-Levasseur (2023), *Sampling-based accuracy testing of
    posterior estimators for general inference*, ICML, arXiv:2302.03026. The reference may be drawn
    from anything that does not know the truth; it has to depend on the data, or the test is blind
    to a head that returns the prior.

    Args:
        truth: the state, in units in which distance means something (whitened by the prior).
        draws: of the posterior, in the same units.
        reference: likewise.
        key: breaks ties.
    """
    distance = jnp.linalg.norm(draws - reference, axis=-1)
    return rank(jnp.linalg.norm(truth - reference), distance, key=key)


def prior_pit(
    prior: Gaussian | GaussMarkov, x: Float[Array, " d"], sd: Float[Array, " d"]
) -> Float[Array, " e"]:
    """d + 1 numbers that are uniform where x is a draw of the prior.

    One for each component, and the last for the distance from the background. The posterior
    averaged over the data is the prior: Geweke (2004), *Getting it right*, J. Am. Stat. Assoc.
    99. So one draw of q from each event must look like draws of the prior. Necessary, and far
    from sufficient: the prior itself passes.

    Args:
        prior: N(x_b, B).
        x: a state.
        sd: square root of the diagonal of B.
    """
    marginal = jax.scipy.stats.norm.cdf((x - prior.loc) / sd)
    radius = jax.scipy.special.gammainc(0.5 * x.size, 0.5 * prior.mahalanobis(x))
    return jnp.append(marginal, radius)


def coverage_curve(
    ranks: Int[np.ndarray, " n"], draws: int, levels: Float[np.ndarray, " k"]
) -> Float[np.ndarray, " k"]:
    """Share of events whose region at each level holds the truth.

    Args:
        ranks: of [`density_rank`][] or [`tarp_rank`][].
        draws: L.
        levels: stated probabilities. Exact at multiples of 1 / (L + 1).
    """
    # The rank is uniform on L + 1 values, so the share with rank < c (L + 1) is c. The small
    # number keeps a level such as 0.29, times 100, from losing an event to rounding.
    below = np.asarray(ranks)[:, None] < np.asarray(levels) * (draws + 1) - 1e-9
    return below.mean(axis=0)


def curve_band(n: int, alpha: float = 0.05) -> float:
    """Half-width within which the whole curve of an exact posterior stays, but for alpha.

    The inequality of Dvoretzky, Kiefer and Wolfowitz, with the constant of Massart (1990),
    Ann. Probab. 18: right for every number n of events.
    """
    return float(np.sqrt(np.log(2.0 / alpha) / (2.0 * n)))
