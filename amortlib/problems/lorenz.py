"""Lorenz-63 and Lorenz-96 windows: chaos that is seen in part, with gaps.

In all of them the control is Gaussian, with the climatology of the attractor for its background,
and the simulator draws from that same Gaussian: exp(-J) is the exact posterior, whatever the
attractor looks like.
"""

from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import ArrayLike, Float

from amortlib.dynamics import Lorenz63, Lorenz96
from amortlib.gaussian import Gaussian, GaussMarkov
from amortlib.observation import AbstractGaps, ContiguousGaps, GaussianNoise, Select
from amortlib.problems.base import DrawOne, InverseProblem
from amortlib.problems.window import WeakWindow, Window
from amortlib.types import Array

__all__ = [
    "SignLost",
    "lorenz63",
    "lorenz63_climatology",
    "lorenz63_model_error",
    "lorenz63_sign_lost",
    "lorenz96",
    "lorenz96_climatology",
]

# Long runs, 200,000 and 2,000,000 values; the last digit given is about one standard error.
# Energy balances hold to it: E x^2 = E xy = beta E z for Lorenz-63, E x^2 = F E x for Lorenz-96.
_L63_MEAN = (0.0, 0.0, 23.55)
_L63_COV = ((62.8, 62.8, 0.0), (62.8, 81.0, 0.0), (0.0, 0.0, 74.3))
_L96_MEAN = 2.34
_L96_LAGS = (13.25, 0.86, -4.79, -1.70, 0.83, 1.32, 0.44, -0.67, -0.58, 0.10, 0.33, 0.16)


def _problem(
    prior: Gaussian | GaussMarkov,
    forward: Callable[[Array], Array],
    noise: float,
    gaps: AbstractGaps | None,
) -> InverseProblem:
    """The control drawn from the background that J uses; up to 80% of the times missed at once."""
    return InverseProblem(
        prior_sample=DrawOne(prior),
        forward=forward,
        obs_noise=GaussianNoise(noise),
        gaps=ContiguousGaps(0.0, 0.8) if gaps is None else gaps,
        prior=prior,
    )


def lorenz63_climatology() -> Gaussian:
    """Mean and covariance of the standard Lorenz-63 attractor.

    From 100 runs of 1,000 time units, a state every 0.5. The symmetry (x, y) -> (-x, -y) of the
    equations holds exactly here: the means of x and y and their covariances with z are zero.
    """
    return Gaussian.from_covariance(jnp.array(_L63_MEAN), jnp.array(_L63_COV))


def lorenz63(
    *,
    states: int = 10,
    dt: float = 0.05,
    substeps: int = 5,
    noise: float = 0.5,
    gaps: AbstractGaps | None = None,
    operator: Callable[[Array], Array] | None = None,
    adjoint: dfx.AbstractAdjoint | None = None,
) -> InverseProblem:
    """A window of Lorenz-63: x and y seen at every other state, z never.

    The control is x_0, three numbers.

    Args:
        states: states in the window.
        dt: time between them.
        substeps: internal steps from one to the next.
        noise: sd of the observation error.
        gaps: by default one contiguous gap that misses any share from none to 80%.
        operator: H of the states, `(n, 3)` to observations; by default x and y at every other.
        adjoint: how to differentiate the model, see [`Window`][].
    """
    prior = lorenz63_climatology()
    seen = Select((0, 1), stride=2) if operator is None else operator
    window = Window(Lorenz63(), seen, dt=dt, states=states, substeps=substeps, adjoint=adjoint)
    return _problem(prior, window, noise, gaps)


def lorenz63_model_error(
    *,
    states: int = 10,
    dt: float = 0.05,
    substeps: int = 5,
    noise: float = 0.5,
    model_error_sd: ArrayLike = 0.5,
    gaps: AbstractGaps | None = None,
    adjoint: dfx.AbstractAdjoint | None = None,
) -> InverseProblem:
    """The same window when the model errs: every forecast from state to state adds N(0, Q).

    The control is (x_0, eta_1, ..., eta_{n-1}), flat; its `forward` is a [`WeakWindow`][].

    Args:
        states: states in the window.
        dt: time between them.
        substeps: internal steps from one to the next.
        noise: sd of the observation error.
        model_error_sd: square root of the diagonal of Q, a number or shape `(3,)`.
        gaps: as in [`lorenz63`][].
        adjoint: likewise.
    """
    window = Window(
        Lorenz63(),
        Select((0, 1), stride=2),
        dt=dt,
        states=states,
        substeps=substeps,
        adjoint=adjoint,
    )
    weak = WeakWindow(window)
    prior = weak.prior(lorenz63_climatology(), model_error_sd)
    return _problem(prior, weak, noise, gaps)


class SignLost(eqx.Module):
    """Sees x itself at the first time, and x^2 at the others; z at all of them.

    Lorenz-63 does not change under (x, y, z) -> (-x, -y, z), and x^2 and z do not either. Only
    the first observation says on which side the state is. A gap that covers it leaves two equal
    explanations of everything else.

    Attributes:
        stride: states from one observation to the next.
        unit: x^2 is divided by this, so that its errors are of the size of those of x.
    """

    stride: int = eqx.field(static=True, default=2)
    unit: float = 10.0

    def __call__(self, states: Float[Array, "n 3"]) -> Float[Array, "m 2"]:
        """(x, z) at the first time, (x^2 / unit, z) at the later ones."""
        seen = states[:: self.stride]
        first = jnp.arange(seen.shape[0]) == 0
        return jnp.stack([jnp.where(first, seen[:, 0], seen[:, 0] ** 2 / self.unit), seen[:, 2]], 1)


def lorenz63_sign_lost(
    *,
    states: int = 10,
    dt: float = 0.05,
    substeps: int = 5,
    noise: float = 0.5,
    gaps: AbstractGaps | None = None,
    adjoint: dfx.AbstractAdjoint | None = None,
) -> InverseProblem:
    """Lorenz-63 seen through x^2: where a gap covers the first time, the posterior is two pieces.

    See [`SignLost`][]. The prior is symmetric too, so the two pieces then have equal weight, and
    whatever gives them other weights is wrong by as much.

    Args:
        states: states in the window.
        dt: time between them.
        substeps: internal steps from one to the next.
        noise: sd of the observation error.
        gaps: as in [`lorenz63`][].
        adjoint: likewise.
    """
    return lorenz63(
        states=states,
        dt=dt,
        substeps=substeps,
        noise=noise,
        gaps=gaps,
        operator=SignLost(),
        adjoint=adjoint,
    )


def lorenz96_climatology(n: int = 40) -> Gaussian:
    """Mean and covariance of the Lorenz-96 attractor at a forcing of 8.

    The same at every site, by symmetry: a circulant covariance, from the mean, the variance and
    the covariances at the first lags of 100 runs of 500 time units with 40 sites. Covariances past
    the last lag held are taken as zero; none is more than 1.5% of the variance.

    Args:
        n: number of sites, at least 24.

    Raises:
        ValueError: on fewer sites.
    """
    if n < 2 * len(_L96_LAGS):
        raise ValueError(f"expected at least {2 * len(_L96_LAGS)} sites, got {n}")
    lag = jnp.abs(jnp.arange(n)[:, None] - jnp.arange(n)[None, :])
    lag = jnp.minimum(lag, n - lag)
    row = jnp.zeros(n).at[: len(_L96_LAGS)].set(jnp.array(_L96_LAGS))
    return Gaussian.from_covariance(jnp.full(n, _L96_MEAN), row[lag])


def lorenz96(
    n: int = 40,
    *,
    states: int = 5,
    dt: float = 0.05,
    substeps: int = 1,
    noise: float = 1.0,
    every: int = 1,
    gaps: AbstractGaps | None = None,
    adjoint: dfx.AbstractAdjoint | None = None,
) -> InverseProblem:
    """A window of Lorenz-96, for scale: the control is x_0, n numbers.

    Args:
        n: number of sites, at least 24, see [`lorenz96_climatology`][].
        states: states in the window.
        dt: time between them.
        substeps: internal steps from one to the next.
        noise: sd of the observation error.
        every: sites from one observed site to the next.
        gaps: by default one contiguous gap that misses any share from none to 80% of the times.
        adjoint: how to differentiate the model, see [`Window`][].
    """
    prior = lorenz96_climatology(n)
    window = Window(
        Lorenz96(),
        Select(tuple(range(0, n, every))),
        dt=dt,
        states=states,
        substeps=substeps,
        adjoint=adjoint,
    )
    return _problem(prior, window, noise, gaps)
