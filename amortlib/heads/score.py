"""The score head: a network that takes noise off, and the densities that follow from it.

Noise of standard deviation sigma is added to the state, u_sigma = u + sigma eps, and a network
learns to predict it. The prediction n(u, sigma) is all that is needed: the score of the density
at that noise level is -n / sigma, and

    du / dsigma = n(u, sigma)                              (the probability-flow ODE)
    du = 2 n dsigma + sqrt(2 sigma) dw, sigma falling      (the reverse SDE)

carry noise back to states. Song et al. (2021), *Score-based generative modeling through stochastic
differential equations*, arXiv:2011.13456, equations 6 and 13; in this form, with the noise level
for time, Karras et al. (2022), *Elucidating the design space of diffusion-based generative
models*, arXiv:2206.00364, equations 1 and 6.

Everything happens in whitened coordinates u, x = m(c) + L(c) u, in which states have a size of
about one: those of the prior, or, far better, those of a Gaussian or a mixture of Gaussians that a
base head predicts for the event.
"""

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Float, Int

from amortlib.dynamics import explicit_step, explicit_tableau
from amortlib.gaussian import AbstractDistribution, Gaussian, GaussMarkov, quasi_normal
from amortlib.heads.base import AbstractHead
from amortlib.heads.mixture import GaussianMixture
from amortlib.heads.regression import _small
from amortlib.modes import density_mode
from amortlib.types import Array, Fixed, Key

__all__ = [
    "EDM",
    "VP",
    "AbstractDenoiser",
    "AbstractNoise",
    "FlowODE",
    "ReverseSDE",
    "ScoreDistribution",
    "ScoreHead",
]

_LOG_2PI = math.log(2.0 * math.pi)


# --- noise levels ----------------------------------------------------------------------------


class AbstractNoise(eqx.Module):
    """Noise levels sigma: the grid of a sampler, the draws of training, and the preconditioning.

    The network's output F enters the predicted noise as n = a(sigma) u + b(sigma) F(s(sigma) u),
    where `a`, `b`, `s` keep input, output and target of the network at a size of one.

    Attributes:
        sigma_min: smallest level, in units of the whitened state: answers are blurred by it.
        sigma_max: largest, where the density is all but that of the noise.
    """

    sigma_min: eqx.AbstractVar[float]
    sigma_max: eqx.AbstractVar[float]

    @abc.abstractmethod
    def sigma(self, t: Float[Array, ""]) -> Float[Array, ""]:
        """The level at time t of a sampler, from `sigma_max` at t = 0 to `sigma_min` at t = 1."""

    @abc.abstractmethod
    def draw(self, n: int, *, key: Key) -> Float[Array, " n"]:
        """`n` levels to train on."""

    @abc.abstractmethod
    def weight(self, sigma: Float[Array, ""]) -> Float[Array, ""]:
        """What the squared error of the predicted noise counts at a level."""

    @abc.abstractmethod
    def preconditioning(
        self, sigma: Float[Array, ""]
    ) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
        """a, b and s."""


def _check_levels(noise: AbstractNoise) -> None:
    if not 0 < noise.sigma_min < noise.sigma_max:
        raise ValueError(
            f"expected 0 < sigma_min < sigma_max, got {noise.sigma_min}, {noise.sigma_max}"
        )


class EDM(AbstractNoise):
    """Levels, weights and preconditioning of Karras et al. (2022), arXiv:2206.00364, table 1.

        sigma(t) = (sigma_max^(1/rho) + t (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho
        log sigma ~ N(log_mean, log_sd^2) in training
        loss = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 |D(u_sigma, sigma) - u|^2

    The weight makes the loss |F - target|^2 with a target of unit variance at every level. Our
    levels end lower than those for images: a whitened state is of size one, and the density at
    `sigma_max` is matched in its mean besides.

    Attributes:
        sigma_min: smallest level.
        sigma_max: largest.
        sigma_data: size of the whitened state.
        rho: how much the grid favours small levels.
        log_mean: mean of log sigma in training.
        log_sd: its standard deviation.
    """

    sigma_min: float = eqx.field(static=True, default=0.01)
    sigma_max: float = eqx.field(static=True, default=20.0)
    sigma_data: float = eqx.field(static=True, default=1.0)
    rho: float = eqx.field(static=True, default=7.0)
    log_mean: float = eqx.field(static=True, default=-1.2)
    log_sd: float = eqx.field(static=True, default=1.2)

    def __check_init__(self):
        _check_levels(self)

    def sigma(self, t: Float[Array, ""]) -> Float[Array, ""]:
        """Karras et al. (2022), equation 5."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (high + t * (low - high)) ** self.rho

    def draw(self, n: int, *, key: Key) -> Float[Array, " n"]:
        """Log-normal levels."""
        return jnp.exp(self.log_mean + self.log_sd * jax.random.normal(key, (n,)))

    def weight(self, sigma: Float[Array, ""]) -> Float[Array, ""]:
        """Of |n - eps|^2, where D - u = sigma (eps - n)."""
        return (sigma / self.sigma_data) ** 2 + 1.0

    def preconditioning(
        self, sigma: Float[Array, ""]
    ) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
        """a, b and s.

        From D = c_skip u + c_out F and n = (u - D) / sigma; written out, because the difference
        of u and D loses all its digits where sigma is small.
        """
        total = sigma**2 + self.sigma_data**2
        return sigma / total, -self.sigma_data / jnp.sqrt(total), 1.0 / jnp.sqrt(total)


class VP(AbstractNoise):
    """Variance-preserving noise: Song et al. (2021), arXiv:2011.13456, equation 11.

        sigma(s)^2 = exp(beta_min s + beta_extra s^2 / 2) - 1,    s from 1 down to epsilon

    with s uniform in training, the network predicting the noise itself, and all levels of it
    counting alike. The state that Song et al. shrink by 1 / sqrt(1 + sigma^2) is not shrunk here:
    the flow ODE of one is that of the other in other units.

    Attributes:
        beta_min: rate of the noise at s = 0.
        beta_extra: by how much it grows until s = 1.
        epsilon: smallest s.
        sigma_min: level there.
        sigma_max: level at s = 1.
    """

    beta_min: float = eqx.field(static=True)
    beta_extra: float = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)
    sigma_min: float = eqx.field(static=True)
    sigma_max: float = eqx.field(static=True)

    def __init__(self, beta_min: float = 0.1, beta_extra: float = 9.9, epsilon: float = 1e-3):
        """Set the rates; arguments as the attributes.

        Raises:
            ValueError: on rates that are not positive, or an epsilon that is not between 0 and 1.
        """
        if not (beta_min > 0 and beta_extra >= 0 and 0 < epsilon < 1):
            raise ValueError(
                "expected beta_min > 0, beta_extra >= 0 and 0 < epsilon < 1, got "
                f"{beta_min}, {beta_extra}, {epsilon}"
            )
        self.beta_min, self.beta_extra, self.epsilon = beta_min, beta_extra, epsilon
        self.sigma_min = math.sqrt(math.expm1(self._exponent(epsilon)))
        self.sigma_max = math.sqrt(math.expm1(self._exponent(1.0)))

    def _exponent(self, s: Any) -> Any:
        return self.beta_min * s + 0.5 * self.beta_extra * s**2

    def sigma(self, t: Float[Array, ""]) -> Float[Array, ""]:
        """At s = 1 - t (1 - epsilon)."""
        return jnp.sqrt(jnp.expm1(self._exponent(1.0 - t * (1.0 - self.epsilon))))

    def draw(self, n: int, *, key: Key) -> Float[Array, " n"]:
        """Levels at uniform s."""
        return jax.vmap(self.sigma)(jax.random.uniform(key, (n,)))

    def weight(self, sigma: Float[Array, ""]) -> Float[Array, ""]:
        """One."""
        return jnp.ones_like(sigma)

    def preconditioning(
        self, sigma: Float[Array, ""]
    ) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
        """n = F(u / sqrt(1 + sigma^2))."""
        one = jnp.ones_like(sigma)
        return 0.0 * one, one, 1.0 / jnp.sqrt(1.0 + sigma**2)


# --- denoisers -------------------------------------------------------------------------------


class AbstractDenoiser(eqx.Module):
    """Predicts the noise in u_sigma = u + sigma eps, in whitened coordinates.

    The best prediction is E[eps | u_sigma] = -sigma grad log p_sigma(u_sigma): Vincent (2011),
    *A connection between score matching and denoising autoencoders*, Neural Comput. 23. Where the
    coordinates are those of a mixture, there is one density for each of its components.
    """

    @abc.abstractmethod
    def predict_noise(
        self, u: Float[Array, " d"], sigma: Float[Array, ""], component: Int[Array, ""]
    ) -> Float[Array, " d"]:
        """n(u, sigma)."""

    def denoise(
        self, u: Float[Array, " d"], sigma: Float[Array, ""], component: Int[Array, ""]
    ) -> Float[Array, " d"]:
        """D(u, sigma) = u - sigma n, an estimate of E[u_0 | u_sigma = u]."""
        return u - sigma * self.predict_noise(u, sigma, component)

    def score(
        self, u: Float[Array, " d"], sigma: Float[Array, ""], component: Int[Array, ""]
    ) -> Float[Array, " d"]:
        """-n / sigma, an estimate of grad log p_sigma(u)."""
        return -self.predict_noise(u, sigma, component) / sigma


class _Learned(AbstractDenoiser):
    """The network of a head, told its context: what depends on it alone is computed once."""

    net: "_Network"
    noise: AbstractNoise
    told: Float[Array, "depth width"]

    def predict_noise(
        self, u: Float[Array, " d"], sigma: Float[Array, ""], component: Int[Array, ""]
    ) -> Float[Array, " d"]:
        a, b, s = self.noise.preconditioning(sigma)
        return a * u + b * self.net(s * u, sigma, component, self.told)


class _Network(eqx.Module):
    """F: a multilayer perceptron on u, whose layers are shifted by context, level and component."""

    first: eqx.nn.Linear
    layers: tuple[eqx.nn.Linear, ...]
    last: eqx.nn.Linear
    context: eqx.nn.Linear
    level: eqx.nn.Linear
    component: Float[Array, "k depth width"]
    depth: int = eqx.field(static=True)
    width: int = eqx.field(static=True)

    _FREQUENCIES: ClassVar[int] = 4

    def __init__(
        self, features: int, dim: int, components: int, *, width: int, depth: int, key: Key
    ):
        keys = jax.random.split(key, depth + 4)
        self.depth, self.width = depth, width
        self.first = eqx.nn.Linear(dim, width, key=keys[0])
        self.layers = tuple(eqx.nn.Linear(width, width, key=k) for k in keys[1:depth])
        self.last = _small(eqx.nn.Linear(width, dim, key=keys[depth]), 0.1)
        self.context = eqx.nn.Linear(features, depth * width, key=keys[depth + 1])
        level = 1 + 2 * self._FREQUENCIES
        self.level = eqx.nn.Linear(level, depth * width, use_bias=False, key=keys[depth + 2])
        shape = (components, depth, width)
        # With one component there is nothing to tell apart.
        spread = 0.0 if components == 1 else 0.5
        self.component = spread * jax.random.normal(keys[depth + 3], shape)

    def tell(self, context: Float[Array, " features"]) -> Float[Array, "depth width"]:
        """What the layers need to know of the context."""
        return self.context(context).reshape(self.depth, self.width)

    def __call__(
        self,
        u: Float[Array, " d"],
        sigma: Float[Array, ""],
        component: Int[Array, ""],
        told: Float[Array, "depth width"],
    ) -> Float[Array, " d"]:
        at = jnp.log(sigma) / 4.0
        wave = at * jnp.pi * 2.0 ** jnp.arange(self._FREQUENCIES, dtype=at.dtype) / 2.0
        said = jnp.concatenate([at[None], jnp.sin(wave), jnp.cos(wave)])
        shift = told + self.level(said).reshape(told.shape) + self.component[component]
        h = jax.nn.silu(self.first(u) + shift[0])
        for layer, more in zip(self.layers, shift[1:], strict=True):
            h = h + jax.nn.silu(layer(h) + more)
        return self.last(h)


# --- samplers --------------------------------------------------------------------------------


class _Trip(eqx.Module):
    """Where a sampler came to, and in how many steps.

    Attributes:
        u: the end, shape `(d,)`; or all that was saved, with a leading axis.
        steps: steps taken, those refused included.
    """

    u: Float[Array, "*saved d"]
    steps: Int[Array, ""]


class AbstractSampler(eqx.Module):
    """Carries a point from the largest noise level to the smallest.

    Attributes:
        steps: fixed steps on the noise's own grid; with a `tolerance` the most that may be tried.
        tolerance: relative and absolute error a step, for a PID controller that chooses them;
            `None` for fixed steps.
        solver: a diffrax solver.
    """

    steps: eqx.AbstractVar[int]
    tolerance: eqx.AbstractVar[float | None]
    solver: eqx.AbstractVar[dfx.AbstractSolver]

    @abc.abstractmethod
    def terms(
        self,
        noise: AbstractNoise,
        predict: Callable[[Array, Array], Array],
        u: Float[Array, " d"],
        *,
        key: Key,
    ) -> dfx.AbstractTerm:
        """What diffrax integrates over t from 0 to 1."""

    def __call__(
        self,
        noise: AbstractNoise,
        predict: Callable[[Array, Array], Array],
        u: Float[Array, " d"],
        *,
        key: Key,
        saveat: dfx.SaveAt | None = None,
    ) -> _Trip:
        """Carry one point.

        Args:
            noise: the levels.
            predict: n, of a point and a level.
            u: the start, a draw of the density at `sigma_max`.
            key: drives the SDE; the ODE does not read it.
            saveat: what to return; by default the end alone.
        """
        terms = self.terms(noise, predict, u, key=key)
        return _Trip(*_integrate(self, terms, u, forwards=True, saveat=saveat))


def _check_sampler(sampler: AbstractSampler) -> None:
    if sampler.steps < 1 or not (sampler.tolerance is None or sampler.tolerance > 0):
        raise ValueError(
            "expected steps >= 1 and a positive tolerance or None, got "
            f"{sampler.steps}, {sampler.tolerance}"
        )


def _integrate(
    how: AbstractSampler,
    terms: dfx.AbstractTerm,
    y0: Any,
    *,
    forwards: bool,
    saveat: dfx.SaveAt | None = None,
) -> tuple[Any, Int[Array, ""]]:
    """Integrate over t, from 0 to 1 or from 1 to 0, in the precision of `y0`.

    The end, or what was saved with a leading axis; and how many steps it took.

    Fixed steps of an explicit Runge-Kutta method to the end are taken in a plain loop: the same
    numbers, and a program that is traced and compiled in a part of the time.
    """
    dtype = jax.tree.leaves(y0)[0].dtype
    ends = jnp.asarray([0.0, 1.0] if forwards else [1.0, 0.0], dtype)
    grid = jnp.linspace(ends[0], ends[1], how.steps + 1, dtype=dtype)
    tableau = explicit_tableau(how.solver)
    ode = isinstance(terms, dfx.ODETerm)
    if ode and tableau is not None and how.tolerance is None and saveat is None:

        def step(y: Any, span: tuple[Array, Array]) -> tuple[Any, None]:
            return explicit_step(tableau, terms.vector_field, span[0], span[1] - span[0], y), None

        return jax.lax.scan(step, y0, (grid[:-1], grid[1:]))[0], jnp.asarray(how.steps)
    if how.tolerance is None:
        # `StepTo` meets every point of the grid exactly, whatever the rounding of 1 / steps.
        controller: dfx.AbstractStepSizeController = dfx.StepTo(grid)
        first = None
    else:
        controller = dfx.PIDController(how.tolerance, how.tolerance, pcoeff=0.2, icoeff=0.4)
        first = (ends[1] - ends[0]) / 50.0
    solution = dfx.diffeqsolve(
        terms,
        how.solver,
        t0=ends[0],
        t1=ends[1],
        dt0=first,
        y0=y0,
        saveat=dfx.SaveAt(t1=True) if saveat is None else saveat,
        stepsize_controller=controller,
        # Derivatives in both modes: those of the mode need one inside the other.
        adjoint=dfx.DirectAdjoint(),
        max_steps=how.steps,
    )
    saved = solution.ys if saveat is not None else jax.tree.map(lambda leaf: leaf[-1], solution.ys)
    return saved, jnp.asarray(solution.stats["num_steps"])


def _rate(noise: AbstractNoise, t: Array) -> tuple[Array, Array]:
    """sigma and dsigma / dt at t."""
    t = jnp.asarray(t)
    return jax.jvp(noise.sigma, (t,), (jnp.ones_like(t),))


class FlowODE(AbstractSampler):
    """The probability-flow ODE: every start has one end, and so a density.

    Attributes:
        steps: fixed steps, or with a `tolerance` the most that may be tried.
        tolerance: of the adaptive steps, or `None`.
        solver: by default Heun's method, second order, the choice of Karras et al. (2022).
    """

    steps: int = eqx.field(static=True, default=24)
    tolerance: float | None = eqx.field(static=True, default=None)
    solver: dfx.AbstractSolver = eqx.field(default_factory=dfx.Heun)

    def __check_init__(self):
        _check_sampler(self)

    def terms(
        self,
        noise: AbstractNoise,
        predict: Callable[[Array, Array], Array],
        u: Float[Array, " d"],
        *,
        key: Key,
    ) -> dfx.AbstractTerm:
        """du/dt = n dsigma/dt."""

        def drift(t, u, args):
            sigma, rate = _rate(noise, t)
            return rate * predict(u, sigma)

        return dfx.ODETerm(drift)


class ReverseSDE(AbstractSampler):
    """The reverse SDE: noise is taken off twice as fast, and half of it is put back.

    It forgives more: an error made at one level is partly washed out at the next, at the price of
    more steps.

    Attributes:
        steps: fixed steps, or with a `tolerance` the most that may be tried.
        tolerance: of the adaptive steps, or `None`.
        solver: by default ShARK, of strong order 1.5 where the noise does not depend on the
            state, as here: Foster, dos Reis and Strange (2024), *High order splitting methods for
            SDEs satisfying a commutativity condition*, SIAM J. Numer. Anal. 62.
    """

    steps: int = eqx.field(static=True, default=48)
    tolerance: float | None = eqx.field(static=True, default=None)
    solver: dfx.AbstractSolver = eqx.field(default_factory=dfx.ShARK)

    def __check_init__(self):
        _check_sampler(self)

    def terms(
        self,
        noise: AbstractNoise,
        predict: Callable[[Array, Array], Array],
        u: Float[Array, " d"],
        *,
        key: Key,
    ) -> dfx.AbstractTerm:
        """du = 2 n dsigma + sqrt(-2 sigma dsigma/dt) dw."""

        def drift(t, u, args):
            sigma, rate = _rate(noise, t)
            return 2.0 * rate * predict(u, sigma)

        def diffusion(t, u, args):
            sigma, rate = _rate(noise, t)
            return lx.DiagonalLinearOperator(jnp.full(u.shape, jnp.sqrt(-2.0 * sigma * rate)))

        shape, area = jax.ShapeDtypeStruct(u.shape, u.dtype), dfx.SpaceTimeLevyArea
        if self.tolerance is None:
            path: dfx.AbstractBrownianPath = dfx.UnsafeBrownianPath(shape, key, levy_area=area)
        else:
            # A step that is refused and tried again must see the same path.
            path = dfx.VirtualBrownianTree(0.0, 1.0, 1e-4, shape, key, levy_area=area)
        return dfx.MultiTerm(dfx.ODETerm(drift), dfx.ControlTerm(diffusion, path))


# --- the distribution ------------------------------------------------------------------------


class ScoreDistribution(AbstractDistribution):
    """The density whose score a denoiser knows: p(x) = sum_k w_k p_k(u_k(x)) |du_k/dx|.

    Samples come from `sampler`. The log-density integrates the divergence of the flow ODE along
    the path from `x` to the largest noise: Song et al. (2021), arXiv:2011.13456, equation 39 and
    appendix D.2. Its value has three errors, all measured in the tests on densities known in
    closed form: the solver's, which `density` bounds; that of taking the density at `sigma_max`
    for a Gaussian of unit variance, of order |variance - 1| / (2 sigma_max^2) nats a dimension; and
    the blur by `sigma_min`, which adds its square to the variance. A
    *learned* score is besides the gradient of no density: the value is the exact log-density of
    what the ODE samples, not of what the SDE does.

    Attributes:
        denoiser: predicts the noise.
        noise: its levels.
        log_weight: log w_k, shape `(k,)`.
        frame: the coordinates, x = m_k + L_k u; a Gaussian or `GaussMarkov` whose arrays have a
            leading axis of k.
        sampler: how `sample` carries noise to states.
        density: how `log_prob`, `mode`, `mean`, `covariance` and `sd` do; no randomness there.
        points: number of quasi-random base points of the moments, even; see
            [`quasi_normal`][amortlib.gaussian.quasi_normal].
    """

    exact_log_prob: ClassVar[bool] = False

    denoiser: AbstractDenoiser
    noise: AbstractNoise
    log_weight: Float[Array, " k"]
    frame: Gaussian | GaussMarkov
    sampler: AbstractSampler
    density: FlowODE
    points: int = eqx.field(static=True)

    def at(self, component: Int[Array, ""]) -> Gaussian | GaussMarkov:
        """The coordinates of one component, whose number may be traced."""
        return jax.tree.map(lambda leaf: leaf[component], self.frame)

    def _far(self, component: Int[Array, ""]) -> tuple[Float[Array, " d"], float]:
        """Mean and sd of the density at the largest noise.

        The mean is the denoiser's answer at the origin, that is E[u] up to 1 / sigma_max^2: with
        it levels need not go up to where a mean of any size drowns.
        """
        origin = jnp.zeros(self.frame.loc.shape[-1], self.frame.loc.dtype)
        top = jnp.asarray(self.noise.sigma_max, origin.dtype)
        return self.denoiser.denoise(origin, top, component), math.sqrt(
            1.0 + self.noise.sigma_max**2
        )

    def start(self, z: Float[Array, " d"], component: Int[Array, ""]) -> Float[Array, " d"]:
        """Where a sampler starts from standard normal `z`: a draw at the largest noise."""
        mean, sd = self._far(component)
        return mean + sd * z

    def carry(
        self,
        sampler: AbstractSampler,
        z: Float[Array, " d"],
        component: Int[Array, ""],
        *,
        key: Key,
        saveat: dfx.SaveAt | None = None,
    ) -> _Trip:
        """One trip from standard normal `z` to whitened coordinates u, with its steps counted."""
        return sampler(
            self.noise,
            lambda u, sigma: self.denoiser.predict_noise(u, sigma, component),
            self.start(z, component),
            key=key,
            saveat=saveat,
        )

    def sample(self, n: int, *, key: Key) -> Float[Array, "n d"]:
        """`n` independent draws by `sampler`.

        Raises:
            ValueError: on less than one draw.
        """
        if n < 1:
            raise ValueError(f"expected at least one sample, got n={n}")
        k_which, k_start, k_path = jax.random.split(key, 3)
        which = jax.random.categorical(k_which, self.log_weight, shape=(n,))
        z = jax.random.normal(k_start, (n, self.frame.loc.shape[-1]), self.frame.loc.dtype)

        def one(z, k, key):
            return self.at(k).colour(self.carry(self.sampler, z, k, key=key).u)

        return jax.vmap(one)(z, which, jax.random.split(k_path, n))

    def log_prob(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log-density at `x` by the flow ODE, with the exact trace of the Jacobian.

        The trace costs d forward derivatives of the denoiser at every step; beyond a few dozen
        dimensions see `log_prob_estimate`.
        """
        eye = jnp.eye(x.size, dtype=x.dtype)
        return jax.nn.logsumexp(self.log_weight + self._log_parts(x, eye))

    def log_prob_estimate(
        self, x: Float[Array, " d"], *, key: Key, probes: int = 1
    ) -> Float[Array, ""]:
        """Log-density at `x`, the trace estimated: one derivative a probe, whatever d.

        Hutchinson (1990), *A stochastic estimator of the trace of the influence matrix*: with
        random signs e, E[e^T A e] = tr A. The same probes serve the whole path, so that the
        estimate for one component is unbiased, as in Grathwohl et al. (2019), *FFJORD*,
        arXiv:1810.01367. Between components it goes through a logarithm of a sum, which is
        biased upwards where two of them matter at `x`.

        Args:
            x: where.
            key: draws the probes.
            probes: how many; the variance falls with their number.

        Raises:
            ValueError: on less than one probe.
        """
        if probes < 1:
            raise ValueError(f"expected at least one probe, got {probes}")
        signs = jax.random.rademacher(key, (probes, x.size), x.dtype)
        # Scaled so that sum of e^T A e is the trace in both: with the unit vectors, exactly.
        return jax.nn.logsumexp(self.log_weight + self._log_parts(x, signs / math.sqrt(probes)))

    def _log_parts(self, x: Float[Array, " d"], e: Float[Array, "p d"]) -> Float[Array, " k"]:
        """log p_k(u_k(x)) |du_k/dx| of every component, traces being sum_p e_p^T A e_p."""

        def one(component):
            frame = self.at(component)
            u = frame.whiten(x)
            # log |du/dx| is what the frame's own density has beyond that of u.
            log_det = frame.log_prob(x) + 0.5 * jnp.sum(u**2) + 0.5 * x.size * _LOG_2PI

            def drift(t, state, args):
                u, _ = state
                sigma, rate = _rate(self.noise, t)

                def predict(u):
                    return self.denoiser.predict_noise(u, sigma, component)

                n, push = jax.linearize(predict, u)
                return rate * n, rate * jnp.sum(jax.vmap(push)(e) * e)

            (end, change), _ = _integrate(
                self.density,
                dfx.ODETerm(drift),
                (u, jnp.zeros((), x.dtype)),
                forwards=False,
            )
            mean, sd = self._far(component)
            z = (end - mean) / sd
            far = -0.5 * jnp.sum(z**2) - x.size * (math.log(sd) + 0.5 * _LOG_2PI)
            return far + change + log_det

        return jax.vmap(one)(jnp.arange(self.log_weight.size))

    def points_of_components(self) -> tuple[Float[Array, "k n d"], Float[Array, " k"]]:
        """Where the flow ODE takes the base points of each component, and the weight of each."""
        unused = jax.random.key(0)  # an ODE draws nothing
        points = jnp.asarray(
            quasi_normal(self.points, self.frame.loc.shape[-1]), self.frame.loc.dtype
        )

        def one(k):
            frame = self.at(k)
            return jax.vmap(lambda z: frame.colour(self.carry(self.density, z, k, key=unused).u))(
                points
            )

        return jax.vmap(one)(jnp.arange(self.log_weight.size)), jnp.exp(self.log_weight)

    def mode(self) -> Float[Array, " d"]:
        """The point of highest `log_prob`, by ascent from the best images of the base points."""
        images, _ = self.points_of_components()
        # Ascend in the whitened coordinates of one component, where the density is round.
        frame = self.at(jnp.argmax(self.log_weight))
        few = images[:, : max(1, _MODE_STARTS // self.log_weight.size)]
        starts = jax.vmap(frame.whiten)(few.reshape(-1, images.shape[-1]))
        best = density_mode(lambda u: self.log_prob(frame.colour(u)), starts, polish=2)
        return frame.colour(best)

    def mean(self) -> Float[Array, " d"]:
        """The mean over the images of the base points."""
        images, weight = self.points_of_components()
        return weight @ images.mean(axis=1)

    def covariance(self) -> Float[Array, "d d"]:
        """The covariance over the images of the base points."""
        images, weight = self.points_of_components()
        off = images - weight @ images.mean(axis=1)
        return jnp.einsum("k,kni,knj->ij", weight, off, off) / images.shape[1]

    def sd(self) -> Float[Array, " d"]:
        """Standard deviation of each component of the state."""
        return jnp.sqrt(jnp.diagonal(self.covariance()))


_MODE_STARTS = 16
"""Images of base points among which the ascent for the mode finds its start."""


# --- the head --------------------------------------------------------------------------------


class ScoreHead(AbstractHead):
    """From a context to a density given by its score.

    Trained by denoising score matching ([`dsm`][amortlib.objectives.dsm]): `denoising_loss` is
    the mean squared error of the predicted noise, weighted by `noise.weight`. With a base head the
    coordinates are those of its answer to the same context, and the base learns beside it by
    maximum likelihood; the score sees the coordinates through a stopped gradient, since a loss
    measured in units that it may choose would choose them.

    With a mixture for a base, each component has coordinates and a density of its own. A state
    belongs to component k with the base's own probability, P(k | x, c). At the maximum of the
    base's likelihood the mean of these is w_k(c), so that the pieces add up to the posterior, for
    whatever mixture the base is.

    Attributes:
        prior: coordinates where there is no base.
        base: context -> Gaussian, single-site `GaussMarkov`, or `GaussianMixture`; or `None`.
        noise: levels, weights, preconditioning.
        sampler: of draws.
        density: of everything that is not random.
        draws: noise levels a state in one evaluation of the loss.
    """

    prior: Fixed
    base: AbstractHead | None
    net: _Network
    noise: AbstractNoise
    sampler: AbstractSampler
    density: FlowODE
    points: int = eqx.field(static=True)
    draws: int = eqx.field(static=True)

    def __init__(
        self,
        features: int,
        prior: Gaussian | GaussMarkov,
        *,
        key: Key,
        base: AbstractHead | None = None,
        noise: AbstractNoise | None = None,
        sampler: AbstractSampler | None = None,
        density: FlowODE | None = None,
        width: int = 128,
        depth: int = 3,
        draws: int = 4,
        points: int = 256,
    ):
        """Set the sizes.

        Args:
            features: length of the context.
            prior: background density of the state.
            key: initialises the weights.
            base: predicts the coordinates; by default they are those of the prior.
            noise: by default [`EDM`][].
            sampler: by default [`FlowODE`][].
            density: by default [`FlowODE`][] with 12 steps of `diffrax.Tsit5`.
            width: of the network's layers.
            depth: their number.
            draws: noise levels a state in one evaluation of the loss.
            points: base points of the moments, even.

        Raises:
            ValueError: on sizes that are too small.
        """
        dim = prior.loc.size
        if width < 1 or depth < 1 or draws < 1:
            raise ValueError(f"expected width, depth and draws >= 1, got {width}, {depth}, {draws}")
        self.prior, self.base = Fixed(prior), base
        self.noise = EDM() if noise is None else noise
        self.sampler = FlowODE() if sampler is None else sampler
        self.density = FlowODE(12, solver=dfx.Tsit5()) if density is None else density
        self.draws = draws
        quasi_normal(points, dim)  # says what is wrong with `points`
        self.points = points
        components = getattr(base, "components", 1)
        self.net = _Network(features, dim, components, width=width, depth=depth, key=key)

    def frames(
        self, context: Float[Array, " features"]
    ) -> tuple[Float[Array, " k"], Gaussian | GaussMarkov]:
        """Log-weights and coordinates of the components, for one context."""
        said = self.prior.value if self.base is None else self.base(context)
        if isinstance(said, GaussianMixture):
            return said.log_weight, said.part
        if not isinstance(said, Gaussian | GaussMarkov):
            raise ValueError(
                "expected a base that returns a Gaussian or a mixture of Gaussians, "
                f"got {type(said).__name__}"
            )
        return jnp.zeros(1, said.loc.dtype), jax.tree.map(lambda leaf: leaf[None], said)

    def __call__(self, context: Float[Array, " features"]) -> ScoreDistribution:
        """The density for one context."""
        log_weight, frame = self.frames(context)
        denoiser = _Learned(self.net, self.noise, self.net.tell(context))
        return ScoreDistribution(
            denoiser,
            self.noise,
            log_weight,
            frame,
            self.sampler,
            self.density,
            self.points,
        )

    def denoising_loss(
        self, context: Float[Array, " features"], x: Float[Array, " d"], *, key: Key
    ) -> Float[Array, ""]:
        """Weighted squared error of the predicted noise for one pair, a sum over d.

        A base adds its negative log-likelihood, in nats.
        """
        log_weight, frame = self.frames(context)
        log_joint = log_weight + jax.vmap(lambda part: part.log_prob(x))(frame)
        k_which, k_level, k_noise = jax.random.split(key, 3)
        component = jax.random.categorical(k_which, jax.lax.stop_gradient(log_joint))
        own = jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf[component]), frame)
        u = own.whiten(x)
        denoiser = _Learned(self.net, self.noise, self.net.tell(context))
        sigma = self.noise.draw(self.draws, key=k_level).astype(u.dtype)
        eps = jax.random.normal(k_noise, (self.draws, u.size), u.dtype)

        def error(sigma, eps):
            n = denoiser.predict_noise(u + sigma * eps, sigma, component)
            return self.noise.weight(sigma) * jnp.sum((n - eps) ** 2)

        loss = jnp.mean(jax.vmap(error)(sigma, eps))
        return loss if self.base is None else loss - jax.nn.logsumexp(log_joint)
