"""The variational cost J, and the Gibbs posterior p(x | y, m) = exp(-J / T) / Z that it is.

`J` is a *sum* over observed entries, never a mean: a mean would be the same cost at another
temperature, and so another posterior.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from amortlib.gaussian import Gaussian, GaussMarkov
from amortlib.types import Array, Event

__all__ = ["Energy", "EnergyTerms", "GibbsPosterior"]

_LOG_2PI = math.log(2.0 * math.pi)


class EnergyTerms(eqx.Module):
    """The parts of J at one state.

    Attributes:
        background: 1/2 |x - x_b|^2 in the metric of B^-1.
        observation: 1/2 sum over observed entries of |y - H(M(x))|^2 in the metric of R^-1.
    """

    background: Float[Array, ""]
    observation: Float[Array, ""]

    @property
    def total(self) -> Float[Array, ""]:
        """J."""
        return self.background + self.observation


class Energy(eqx.Module):
    """J(x; y, m) = 1/2 |x - x_b|^2_{B^-1} + 1/2 sum_{t: m_t} |y_t - H_t(M_t(x))|^2_{R_t^-1}.

    Courtier (1997), *Dual formulation of four-dimensional variational assimilation*,
    Q. J. R. Meteorol. Soc. 123, equation 1; the mask makes the sum run over what was seen.

    Attributes:
        prior: background density N(x_b, B).
        forward: x -> H(M(x)), shape of the observations.
        obs_sd: square root of the diagonal of R for events that carry no `sd` of their own.
    """

    prior: Gaussian | GaussMarkov
    forward: Callable[[Array], Array]
    obs_sd: float | Array | None = None

    def sd(self, event: Event) -> Float[Array, "*obs"]:
        """Square root of the diagonal of R, one at masked entries."""
        sd = event.error_sd
        if sd is None:
            if self.obs_sd is None:
                raise ValueError("expected an event with its sd, or an Energy with obs_sd")
            sd = jnp.where(event.mask, jnp.asarray(self.obs_sd, event.y.dtype), 1.0)
        return sd

    def innovation(self, x: Float[Array, " d"], event: Event) -> Float[Array, "*obs"]:
        """y - H(M(x)) at observed entries, zero at masked ones."""
        clean = self.forward(x)
        if jnp.shape(clean) != event.y.shape:
            raise ValueError(
                f"expected forward(x) to have the shape of y, {event.y.shape}, "
                f"got {jnp.shape(clean)}"
            )
        return jnp.where(event.mask, event.values - clean, 0.0)

    def terms(self, x: Float[Array, " d"], event: Event) -> EnergyTerms:
        """The background and observation parts of J."""
        scaled = self.innovation(x, event) / self.sd(event)
        return EnergyTerms(0.5 * self.prior.mahalanobis(x), 0.5 * jnp.sum(scaled**2))

    def residual(self, v: Float[Array, " d"], event: Event) -> Float[Array, " r"]:
        """r(v) with J(x_b + B^{1/2} v) = 1/2 |r(v)|^2: v itself, then the scaled innovations.

        J in the control variable v is a sum of squares, which is what Gauss-Newton methods need,
        and its background part has the identity for a Hessian, whatever B is.
        """
        scaled = self.innovation(self.prior.colour(v), event) / self.sd(event)
        return jnp.concatenate([v, scaled.reshape(-1)])

    def __call__(self, x: Float[Array, " d"], event: Event) -> Float[Array, ""]:
        """J, in nats."""
        return self.terms(x, event).total

    def at_control(self, v: Float[Array, " d"], event: Event) -> Float[Array, ""]:
        """J at the state x_b + B^{1/2} v, in nats: half the sum of squares of `residual`."""
        return 0.5 * jnp.sum(self.residual(v, event) ** 2)

    def log_joint(self, x: Float[Array, " d"], event: Event) -> Float[Array, ""]:
        """log p(x, y | m): -J plus the two Gaussian normalisers, of the prior and of the noise."""
        noise = jnp.where(event.mask, jnp.log(self.sd(event)) + 0.5 * _LOG_2PI, 0.0)
        at_mean = self.prior.log_prob(self.prior.loc)
        return at_mean - self(x, event) - jnp.sum(noise)


class GibbsPosterior(eqx.Module):
    """p(x | y, m) = exp(-J(x) / T) / Z.

    At T = 1 it is Bayes' posterior. T -> 0 leaves the minimiser of J, which is what variational
    assimilation returns; T > 1 flattens.

    Attributes:
        energy: J.
        temperature: T.
    """

    energy: Energy
    temperature: float | Array = 1.0

    def __check_init__(self):
        traced = isinstance(self.temperature, Tracer)
        if not traced and not np.all(np.asarray(self.temperature) > 0):
            raise ValueError(f"expected a positive temperature, got {self.temperature}")

    def log_density(self, x: Float[Array, " d"], event: Event) -> Float[Array, ""]:
        """-J / T: the log-density up to the constant -log Z, which no x changes."""
        return -self.energy(x, event) / self.temperature

    def gaussian(self, event: Event) -> Gaussian:
        """The posterior, exactly, where `forward` is affine: J is quadratic there.

        One Newton step from x_b finds the mode, the Hessian of J over T is the precision. For
        another `forward` this is a Gaussian at one Newton step, and not the posterior.
        """

        def cost(x):
            return self.energy(x, event)

        start = self.energy.prior.loc
        hessian = jax.hessian(cost)(start)
        mode = start - jnp.linalg.solve(hessian, jax.grad(cost)(start))
        return Gaussian.from_precision(mode, hessian / self.temperature)

    def log_normaliser(self, event: Event) -> Float[Array, ""]:
        """log Z = log of the integral of exp(-J / T), exactly, where `forward` is affine."""
        exact = self.gaussian(event)
        # log p = -J/T - log Z holds at every x; the mode is the best conditioned one.
        return self.log_density(exact.loc, event) - exact.log_prob(exact.loc)

    def log_normaliser_grid(self, axes: tuple[Array, ...], event: Event) -> Float[Array, ""]:
        """log Z by the rectangle rule on a grid: any `forward`, but one or two dimensions.

        Args:
            axes: one evenly spaced array for each component of x, wide enough to hold the mass.
            event: the event.
        """
        if len(axes) > 2:
            raise ValueError(f"expected one or two axes, got {len(axes)}: the grid grows as n^d")
        grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
        cell = sum(jnp.log(axis[1] - axis[0]) for axis in axes)
        return jax.nn.logsumexp(jax.vmap(lambda x: self.log_density(x, event))(grid)) + cell
