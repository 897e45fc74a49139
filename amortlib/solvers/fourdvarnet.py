"""4DVarNet: a learned prior, and a learned solver that descends on it in a few steps."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Float

from amortlib.energy import Energy
from amortlib.problems import InverseProblem, Window
from amortlib.solvers.base import AbstractSolver, Analysis, analyse
from amortlib.types import Array, Event, Fixed, InvalidEventError, Key

__all__ = [
    "FourDVarNet",
    "FourDVarNetwork",
    "LearnedPrior",
    "fourdvar_network",
    "reconstruction",
    "trajectories",
]


class LearnedPrior(eqx.Module):
    """Phi: maps a trajectory to a plausible one; a trajectory is plausible where it stays.

    Its hidden layer is bilinear, as the equations of Lorenz are: half of it is linear in the
    trajectory, and half is products of two linear maps of it.
    """

    hidden: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, size: int, width: int, *, key: Key):
        """Make the weights.

        Args:
            size: numbers in a trajectory.
            width: of each half of the hidden layer.
            key: initialises the weights.
        """
        k_hidden, k_out = jax.random.split(key)
        self.hidden = eqx.nn.Linear(size, 3 * width, key=k_hidden)
        self.out = eqx.nn.Linear(2 * width, size, key=k_out)

    def __call__(self, u: Float[Array, " s"]) -> Float[Array, " s"]:
        """Phi(u)."""
        linear, left, right = jnp.split(self.hidden(u), 3)
        return self.out(jnp.concatenate([linear, left * right]))


class FourDVarNetwork(eqx.Module):
    """What is learned: the cost U of a trajectory, and the recurrent solver that lowers it.

        U(u; y, m) = l_1 / 2 |y - H(u)|^2_{R^-1, observed} + l_2 / 2 |u - Phi(u)|^2
        u <- u - T(h),   h <- LSTM(grad U(u), h)

    Fablet, Chapron, Drumetz, Memin, Pannekoucke and Rousseau (2021), *Learning variational data
    assimilation models and solvers*, J. Adv. Model. Earth Syst. 13: their cost with a projection
    Phi for prior, and their LSTM for a solver. The trajectory u of the whole window is the
    control, in standard deviations from its mean, flat; nothing here knows the dynamics. The
    gradient is that of U, by automatic differentiation, its decades folded by asinh. Layers are
    dense, for windows of up to some hundreds of numbers.

    Attributes:
        prior: Phi.
        cell: the recurrent cell on gradients.
        out: T, from its state to an update.
        log_weights: logarithms of l_1 and l_2.
        operator: H of the states, held fixed.
        centre: mean of the states, held fixed.
        scale: their standard deviations, held fixed.
        states: number of states in the window.
        steps: of the solver.
    """

    prior: LearnedPrior
    cell: eqx.nn.LSTMCell
    out: eqx.nn.Linear
    log_weights: Float[Array, "2"]
    operator: Fixed
    centre: Fixed
    scale: Fixed
    states: int = eqx.field(static=True)
    steps: int = eqx.field(static=True)

    def __init__(
        self,
        operator: Callable[[Array], Array],
        *,
        key: Key,
        centre: Float[Array, " k"],
        scale: Float[Array, " k"],
        states: int,
        steps: int = 10,
        width: int = 64,
        memory: int = 96,
    ):
        """Make the weights.

        Args:
            operator: H, maps the states of the window, `(states, k)`, to clean observations.
            key: initialises the weights.
            centre: mean of a state, the first guess at all times.
            scale: standard deviation of each component.
            states: number of states in the window.
            steps: of the solver; in training memory and time grow with them.
            width: of the learned prior.
            memory: numbers that the recurrent cell carries from step to step.

        Raises:
            ValueError: on fewer than one step.
        """
        if steps < 1:
            raise ValueError(f"expected steps >= 1, got {steps}")
        size = states * centre.size
        k_prior, k_cell, k_out = jax.random.split(key, 3)
        self.prior = LearnedPrior(size, width, key=k_prior)
        self.cell = eqx.nn.LSTMCell(size, memory, key=k_cell)
        self.out = eqx.nn.Linear(memory, size, key=k_out)
        # Scaled innovations of a first guess are tens of standard deviations of the error.
        self.log_weights = jnp.log(jnp.array([0.01, 1.0]))
        self.operator, self.centre, self.scale = Fixed(operator), Fixed(centre), Fixed(scale)
        self.states, self.steps = states, steps

    def to_states(self, u: Float[Array, " s"]) -> Float[Array, "n k"]:
        """The trajectory in the units of the states."""
        return self.centre.value + self.scale.value * u.reshape(self.states, -1)

    def to_control(self, states: Float[Array, "n k"]) -> Float[Array, " s"]:
        """Its inverse."""
        return ((states - self.centre.value) / self.scale.value).reshape(-1)

    def cost(self, u: Float[Array, " s"], event: Event) -> Float[Array, ""]:
        """U.

        Raises:
            InvalidEventError: on an event without error bars, or of another shape than H gives.
        """
        clean = self.operator.value(self.to_states(u))
        if event.error_sd is None:
            raise InvalidEventError("expected an event with its observation-error sd, got sd=None")
        if clean.shape != event.y.shape:
            raise InvalidEventError(
                f"expected an event of shape {clean.shape}, got {event.y.shape}; "
                "map a batch of events with jax.vmap"
            )
        innovation = jnp.where(event.mask, (event.values - clean) / event.error_sd, 0.0)
        observations, prior = jnp.exp(self.log_weights)
        far = u - self.prior(u)
        return 0.5 * (observations * jnp.sum(innovation**2) + prior * jnp.sum(far**2))

    def __call__(self, event: Event) -> Float[Array, " s"]:
        """Run the learned solver from the mean; the control at its end."""
        first = jnp.zeros(self.states * self.centre.value.size, self.log_weights.dtype)
        rest = jnp.zeros(self.cell.hidden_size, first.dtype)

        def step(carry, _):
            u, memory = carry
            gradient = jax.grad(self.cost)(u, event)
            memory = self.cell(jnp.arcsinh(gradient), memory)
            return (u - self.out(memory[0]), memory), None

        (u, _), _ = jax.lax.scan(step, (first, (rest, rest)), None, length=self.steps)
        return u


class FourDVarNet(AbstractSolver):
    """A trained [`FourDVarNetwork`][] in the place of a minimiser.

    It was trained for the least mean square error, so what it aims at is the posterior mean of the
    trajectory, and not the mode: `gradient_norm` of its analysis says how far from stationary J
    is there. The covariance is the Gauss-Newton one of J at the initial state it returns. With
    nothing observed the answer is the background, by rule and not by training.

    Attributes:
        energy: J of a strong-constraint window.
        network: what was trained.
    """

    energy: Energy
    network: FourDVarNetwork

    def __check_init__(self):
        _window(self.energy.forward)

    def trajectory(self, event: Event) -> Float[Array, "n k"]:
        """The states of the window that the network returns, all at once."""
        event = dataclasses.replace(event, sd=self.energy.sd(event))
        background = _window(self.energy.forward).trajectory(self.energy.prior.loc)
        found = self.network.to_states(self.network(event))
        return jnp.where(event.mask.any(), found, background)

    def __call__(self, event: Event, *, throw: bool = True) -> Analysis:
        """Analyse one event."""
        start = self.trajectory(event)[0]
        return analyse(
            self.energy,
            self.energy.prior.whiten(start),
            event,
            outer_steps=self.network.steps,
            result=optx.RESULTS.successful,
            throw=throw,
        )


def _window(forward: Any) -> Window:
    if not isinstance(forward, Window):
        raise ValueError(
            "expected a Window for the forward model, whose control is the initial state, got "
            f"{type(forward).__name__}"
        )
    return forward


def fourdvar_network(problem: InverseProblem, *, key: Key, **sizes: int) -> FourDVarNetwork:
    """An untrained network for a problem's window, in the units of its background.

    Args:
        problem: one with a strong-constraint window and a prior.
        key: initialises the weights.
        sizes: passed on to [`FourDVarNetwork`][] (`steps`, `width`, `memory`).

    Raises:
        ValueError: on another forward model than a [`Window`][amortlib.problems.Window], or a
            problem without its prior.
    """
    window = _window(problem.forward)
    if problem.prior is None:
        raise ValueError("expected a problem with its prior: the states are scaled by it")
    return FourDVarNetwork(
        window.operator,
        key=key,
        centre=problem.prior.mean(),
        scale=problem.prior.sd(),
        states=window.states,
        **sizes,
    )


def trajectories(
    problem: InverseProblem, n: int
) -> Callable[[Key], tuple[Float[Array, "n t k"], Event]]:
    """Draws minibatches to train on: the true states of n windows, and their events.

    Args:
        problem: one with a strong-constraint window.
        n: events in a batch.

    Raises:
        ValueError: on another forward model than a [`Window`][amortlib.problems.Window].
    """
    window = _window(problem.forward)

    def batch(key: Key) -> tuple[Float[Array, "n t k"], Event]:
        start, events = problem.batch(key, n)
        return jax.vmap(window.trajectory)(start), events

    return batch


def reconstruction(
    network: FourDVarNetwork, batch: tuple[Float[Array, "n t k"], Event], key: Key
) -> Float[Array, ""]:
    """Mean over a batch of the squared error of the trajectory, in variances of a state.

    The sum over components, averaged over times: the supervised loss of Fablet et al. (2021). An
    objective for [`fit`][amortlib.training.fit].
    """
    truth, event = batch
    error = jax.vmap(network.to_control)(truth) - jax.vmap(network)(event)
    return jnp.mean(jnp.sum(error**2, axis=1)) / network.states
