"""The guard: event by event, is the head's answer to be trusted, refined, or left to the solver?

It looks at what can be known without the truth and without the solver, from the head itself and
from J. Two signs have a meaning of their own: a head whose mode is more than one standard deviation
from where a few steps on J end is wrong by the gates' own measure, and where those steps have not
ended, nobody knows. Every other sign has a distribution on simulated events for which the head is
right, and an event that stands in its tail is an alarm. The level is set so that a stated share of
such events raise one, all signs together: the rate of *false* alarms.

What it cannot see: a J that is wrong in a way that data fit. Where the forward model errs, the
solver that minimises the same J errs with the head, and both are at peace with the data.
"""

import enum
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from amortlib.calibration.adjoint import ADJOINT, jacobian_error
from amortlib.calibration.agreement import AGREEMENT, mode_distance
from amortlib.calibration.fingerprint import fingerprint, problem_fingerprint
from amortlib.calibration.importance import importance_figures
from amortlib.energy import Energy
from amortlib.laplace import laplace, mode_jacobian, residual_jacobian
from amortlib.posterior import AmortizedPosterior
from amortlib.refine import refine
from amortlib.types import Array, Event, Fixed, Key

__all__ = ["Guard", "GuardError", "Judgement", "Signs", "Thresholds", "Trust", "calibrate"]

DRAWS = 100
"""Draws of q for its importance weights: 20 of them are the tail that k-hat is fitted to."""

STEPS = 4
"""Damped Gauss-Newton steps from the head's mode: to the minimum, if the head is near it."""

LEFT = 0.3
"""Newton's step from where those ended, in sd: what is longer than this has not arrived."""


class GuardError(ValueError):
    """A guard that cannot be set: the message says what was expected and what came."""


class Trust(enum.IntEnum):
    """What to do with the head's answer."""

    TRUST = 0
    REFINE = 1
    SOLVE = 2


class Signs(eqx.Module):
    """What the head and J say of one event; a large value is a bad sign in each.

    Attributes:
        distance: from the head's mode to where a few steps on J end, by the measure of the gate
            of posterior agreement, `max_i |x - x'|_i / sd_i`, with the curvature of J there.
        left: Newton's step from there, in sd of the same curvature.
        slope: relative error of the Jacobian of the head's mode, by the measure of the gate of
            adjoint calibration, against that of a minimum at the refined point; 0 where the guard
            was not set to ask for it.
        fall: by how much the steps lowered J, in nats.
        weights: minus the effective share of draws of q as draws of exp(-J); 0 where q's
            log-density is not exact.
        khat: Pareto k-hat of the same weights; 0 likewise.
        high: the misfit left at the refined point, too large for the noise: 2 J as a normal score
            of chi-square with as many degrees of freedom as there are observations.
        low: the same, too small.
        context: root mean square of the context's features, standardised by those of the events
            that the guard was set with.
    """

    distance: Float[Array, ""]
    left: Float[Array, ""]
    slope: Float[Array, ""]
    fall: Float[Array, ""]
    weights: Float[Array, ""]
    khat: Float[Array, ""]
    high: Float[Array, ""]
    low: Float[Array, ""]
    context: Float[Array, ""]


_MENDS = ("fall", "weights", "khat")
"""Signs of a head that is not where J has its minimum, or not of its shape: refinement mends them,
as long as data and J agree."""

_STAYS = ("high", "low", "context")
"""Signs that data and J do not agree, or of an event of another kind."""


class Judgement(eqx.Module):
    """What the guard makes of one event.

    Attributes:
        trust: a [`Trust`][], as a whole number.
        tail: smallest share, over signs but the first three, of the simulated events on which the
            head is right that look as bad or worse.
        signs: what was seen.
        refined: the state after the guard's own steps on J, shape `(d,)`.
    """

    trust: Array
    tail: Float[Array, ""]
    signs: Signs
    refined: Float[Array, " d"]


def _normal_score(square: Array, count: Array) -> Array:
    """Of a chi-square value: Wilson and Hilferty (1931), PNAS 17. Zero without observations."""
    n = jnp.maximum(count, 1)
    score = (jnp.cbrt(square / n) - (1.0 - 2.0 / (9.0 * n))) / jnp.sqrt(2.0 / (9.0 * n))
    return jnp.where(count > 0, score, 0.0)


def _flat_context(posterior: AmortizedPosterior, event: Event) -> Float[Array, " c"]:
    context = eqx.filter(posterior.encoder(event), eqx.is_inexact_array)
    return ravel_pytree(context)[0]


class Thresholds(eqx.Module):
    """What [`calibrate`][] has set: all of a guard but the head and J, kept beside the weights.

    Attributes:
        head: digest of the weights that it was set with.
        problem: digest of the prior, the forward model and R, where it is fixed.
        rate: share of false alarms: among events as simulated on which the head is right.
        slopes: whether the Jacobian of the head's mode is looked at.
        level: an event whose `tail` is below this is an alarm.
        wrong: share of the simulated events on which the head is not right.
        seen: values of each sign on the others, sorted, arrays of shape `(n,)`.
        centre: mean of the context's features on them.
        scale: their standard deviations.
    """

    head: str = eqx.field(static=True)
    problem: str = eqx.field(static=True)
    rate: float = eqx.field(static=True)
    slopes: bool = eqx.field(static=True)
    level: float
    wrong: float
    seen: Signs
    centre: Float[Array, " c"]
    scale: Float[Array, " c"]

    def guard(self, posterior: AmortizedPosterior, energy: Energy) -> "Guard":
        """The guard again, around its head.

        Args:
            posterior: the head that it was set with.
            energy: the J that it was set with.

        Raises:
            GuardError: on another head or another J, or on thresholds that no guard can have.
        """
        self._check_values()
        # In the precision that is switched on, whichever they were set in.
        here = jax.tree.map(lambda leaf: jnp.asarray(leaf) if eqx.is_array(leaf) else leaf, self)
        made = Guard(Fixed(posterior), Fixed(energy), here)
        made.check()
        return made

    def _check_values(self) -> None:
        if not (0.0 < self.rate < 1.0 and 0.0 <= self.level <= 1.0 and 0.0 <= self.wrong <= 1.0):
            raise GuardError(
                "expected a rate, a level and a share of wrong answers between 0 and 1, got "
                f"{self.rate:g}, {self.level:g} and {self.wrong:g}"
            )
        for name in Signs.__dataclass_fields__:
            values = np.asarray(getattr(self.seen, name))
            # NaN compares with nothing, and so is found here, too.
            if values.size == 0 or not (values[:-1] <= values[1:]).all() or np.isnan(values[0]):
                raise GuardError(
                    f"expected the seen values of {name!r} in rising order, got others"
                )


class Guard(eqx.Module):
    """Judges the head's answer to an event; made by [`calibrate`][].

    Attributes:
        posterior: the head.
        energy: J.
        thresholds: what was set with these two, see [`Thresholds`][].
    """

    posterior: Fixed
    energy: Fixed
    thresholds: Thresholds

    def check(self) -> None:
        """Whether the head and J are those that the guard was set with.

        Raises:
            GuardError: where the head's weights are others, for what is usual for one head is not
                for another; where the prior, the forward model or R of J is another.
        """
        found = fingerprint(self.posterior.tree)
        if found != self.thresholds.head:
            raise GuardError(
                f"expected the head that the guard was set with, {self.thresholds.head[:12]}, got "
                f"{found[:12]}: calibrate the guard of the head that is to answer"
            )
        found = problem_fingerprint(self.energy.tree)
        if found != self.thresholds.problem:
            raise GuardError(
                f"expected the J that the guard was set with, {self.thresholds.problem[:12]}, got "
                f"{found[:12]}: the prior, the forward model or R is another"
            )

    def signs(self, event: Event, *, key: Key) -> tuple[Signs, Float[Array, " d"]]:
        """The signs of one event, and the refined state."""
        parts, set_so = (self.posterior.value, self.energy.value), self.thresholds
        return _signs(*parts, event, set_so.centre, set_so.scale, key, set_so.slopes)

    def __call__(self, event: Event, *, key: Key) -> Judgement:
        """Judge one event; the key draws from q.

        A sign that is not a number is the worst there is.
        """
        signs, refined = self.signs(event, key=key)
        seen, level = self.thresholds.seen, self.thresholds.level
        tails = {n: _tail(getattr(seen, n), getattr(signs, n)) for n in (*_MENDS, *_STAYS)}
        mends = jnp.stack([tails[name] for name in _MENDS]).min()
        stays = jnp.stack([tails[name] for name in _STAYS]).min()
        # A comparison with NaN is false: asked this way round, it raises the alarm.
        refine_it = ~(signs.distance <= AGREEMENT) | ~(signs.slope < ADJOINT)
        refine_it = refine_it | (mends < level)
        solve_it = ~(signs.left <= LEFT) | (stays < level)
        trust = jnp.where(refine_it, int(Trust.REFINE), int(Trust.TRUST))
        trust = jnp.where(solve_it, int(Trust.SOLVE), trust)
        return Judgement(trust, jnp.minimum(mends, stays), signs, refined)


def _tail(seen: Float[Array, " n"], value: Float[Array, ""]) -> Float[Array, ""]:
    """Share of `seen`, and the value itself, that is at least `value`."""
    worse = seen.size - jnp.searchsorted(seen, value, side="left")
    worse = jnp.where(jnp.isnan(value), 0, worse)
    return (worse + 1.0) / (seen.size + 1.0)


def _signs(
    posterior: AmortizedPosterior,
    energy: Energy,
    event: Event,
    centre: Array,
    scale: Array,
    key: Key,
    slopes: bool,
) -> tuple[Signs, Array]:
    q, prior = posterior(event), energy.prior
    v = prior.whiten(q.mode())

    def cost(v: Array) -> Array:
        return energy.at_control(v, event)

    end = refine(energy, v, event, steps=STEPS, derivative="unrolled")
    there = prior.colour(end)
    around = laplace(energy, there, event, full=False)
    jacobian = residual_jacobian(energy, end, event)
    newton = jnp.linalg.solve(jacobian.T @ jacobian, jacobian.T @ energy.residual(end, event))
    least = cost(end)
    if q.exact_log_prob:
        x = q.sample(DRAWS, key=key)
        figures = importance_figures(jax.vmap(lambda x: -energy(x, event) - q.log_prob(x))(x))
        weights, khat = -figures.ess, figures.khat
    else:
        weights = khat = jnp.zeros((), v.dtype)
    slope = jnp.zeros((), v.dtype)
    if slopes:
        moves = posterior.mode_jacobian(event)
        slope = jacobian_error(moves, mode_jacobian(energy, there, event), event.mask)
    score = _normal_score(2.0 * least, jnp.sum(event.mask))
    features = (_flat_context(posterior, event) - centre) / scale
    signs = Signs(
        distance=mode_distance(q.mode(), there, around.covariance()),
        left=jnp.linalg.norm(jacobian @ newton),
        slope=slope,
        fall=cost(v) - least,
        weights=weights,
        khat=khat,
        high=score,
        low=-score,
        context=jnp.sqrt(jnp.mean(features**2)),
    )
    return signs, there


def calibrate(
    posterior: AmortizedPosterior,
    energy: Energy,
    events: Event,
    *,
    key: Key,
    rate: float = 0.01,
    slopes: bool = False,
    batch: int = 100,
) -> Guard:
    """Set a guard on simulated events.

    The events on which the head is right are those whose first three signs are within their bounds.
    Each other sign of each of them is given the share of them that look as bad or worse in it; the
    smallest of the shares is the event's `tail`. The level is the quantile of the tails at `rate`,
    so that all signs together raise an alarm on that share of events, whatever their dependence.

    Args:
        posterior: the head.
        energy: J, with a Gaussian prior.
        events: as they were simulated for training, and not used in it; with a leading axis.
        key: draws from q.
        rate: share of false alarms.
        slopes: whether to look at the Jacobian of the head's mode too, for who uses it: of J that
            takes the second derivative, of the head one tangent an observation, and a mode that
            can be differentiated.
        batch: events at once.

    Raises:
        GuardError: on a rate that is not between 0 and 1, on events so few on which the head is
            right that no level can be set (5 alarms are needed), or on a sign that is not a number.
    """
    n = events.y.shape[0]
    if not 0.0 < rate < 1.0:
        raise GuardError(f"expected a rate of false alarms between 0 and 1, got {rate}")
    if n * rate < 5:
        raise GuardError(
            f"expected at least {math.ceil(5 / rate)} events for a rate of {rate:g}, got {n}"
        )
    if not isinstance(getattr(energy.prior, "loc", None), jax.Array | np.ndarray):
        raise GuardError(f"expected J with a Gaussian prior, got {type(energy.prior).__name__}")

    @eqx.filter_jit
    def contexts(posterior: AmortizedPosterior, events: Event) -> Array:
        one = jax.vmap(lambda event: _flat_context(posterior, event))
        return one(events)

    @eqx.filter_jit
    def signs(
        parts: tuple[Any, Any], events: Event, centre: Array, scale: Array, keys: Array
    ) -> Signs:
        def one(event: Event, key: Key) -> Signs:
            return _signs(*parts, event, centre, scale, key, slopes)[0]

        return jax.vmap(one)(events, keys)

    def chunks(run: Any) -> Any:
        size, out = min(batch, n), []
        for start in range(0, n, size):
            rows = np.minimum(np.arange(start, start + size), n - 1)
            found = run(rows)
            out.append(jax.tree.map(lambda a, k=n - start: np.asarray(a)[:k], found))
        return jax.tree.map(lambda *a: np.concatenate(a), *out)

    def take(rows: np.ndarray) -> Event:
        return jax.tree.map(lambda a: a[rows], events)

    features = chunks(lambda rows: contexts(posterior, take(rows)))
    centre, scale = features.mean(0), features.std(0)
    # A feature that never moved tells nothing apart by how far it moves.
    scale = np.where(scale > 1e-6 * (1.0 + np.abs(centre)), scale, np.inf)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))
    centre, scale = jnp.asarray(centre), jnp.asarray(scale)
    found = chunks(lambda rows: signs((posterior, energy), take(rows), centre, scale, keys[rows]))
    for name in Signs.__dataclass_fields__:
        bad = np.isnan(getattr(found, name))
        if bad.any():
            raise GuardError(
                f"expected numbers, got NaN in the sign {name!r} at {int(bad.sum())} of {n} "
                f"simulated events, the first of them event {int(np.argmax(bad))}"
            )
    right = (found.distance <= AGREEMENT) & (found.left <= LEFT) & (found.slope < ADJOINT)
    kept = int(right.sum())
    if kept * rate < 5:
        raise GuardError(
            f"expected the head to be right on at least {math.ceil(5 / rate)} simulated events for "
            f"a rate of {rate:g}, got {kept} of {n}"
        )
    found = jax.tree.map(lambda a: a[right], found)
    seen = jax.tree.map(lambda a: jnp.asarray(np.sort(a)), found)
    tails = [
        np.asarray(jax.vmap(_tail, in_axes=(None, 0))(getattr(seen, name), getattr(found, name)))
        for name in (*_MENDS, *_STAYS)
    ]
    # An event is among those that it is compared with, and `_tail` counts it once more.
    least = np.min(tails, axis=0) - 1.0 / (kept + 1.0)
    thresholds = Thresholds(
        head=fingerprint(posterior),
        problem=problem_fingerprint(energy),
        rate=rate,
        slopes=slopes,
        level=float(np.quantile(least, rate)),
        wrong=1.0 - kept / n,
        seen=seen,
        centre=centre,
        scale=scale,
    )
    return Guard(Fixed(posterior), Fixed(energy), thresholds)
