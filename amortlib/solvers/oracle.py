"""The oracle: 4DVar from many starts, in double precision, which says when it is unsure."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from amortlib.energy import Energy
from amortlib.laplace import residual_jacobian
from amortlib.solvers.incremental import IncrementalFourDVar
from amortlib.types import Array, Event, InvalidEventError, Key, to_double

__all__ = ["Oracle", "OracleAnalysis"]

SINGLE_MINIMUM = 5.0
"""An event has a single minimum when no other lies within this many nats of the lowest."""

_SAME = 1e-2
"""Two ends of a search nearer than this, in background standard deviations, are one minimum."""


class OracleAnalysis(eqx.Module):
    """What the oracle says of a batch of events; numpy arrays in double precision.

    Attributes:
        mode: lowest minimum found.
        energy: J there, in nats.
        covariance: inverse of the full Hessian there; NaN where that is not positive definite.
        gauss_newton_covariance: inverse of the Gauss-Newton Hessian.
        jacobian: d mode / dy by the implicit function theorem with the full Hessian.
        gain: its Gauss-Newton approximation.
        gradient_norm: norm of the gradient of J in the control variable at `mode`.
        converged: whether `mode` is stationary and a minimum.
        hits: how many starts ended in it.
        minima: how many different minima were found.
        rise: J at the next lowest minimum minus J at the lowest, infinite where there is none.
        unseen: probability that one more start would end in a minimum not yet seen.
        sure: whether it converged, was found more than once, and `unseen` is small.
        starts: how many starts were made.
        ends: where each start ended.
        end_energy: J there; infinite for starts not made and for searches that did not end well.
        distinct: marks one end of each different minimum.
    """

    mode: Float[np.ndarray, "e d"]
    energy: Float[np.ndarray, " e"]
    covariance: Float[np.ndarray, "e d d"]
    gauss_newton_covariance: Float[np.ndarray, "e d d"]
    jacobian: Float[np.ndarray, "e d *obs"]
    gain: Float[np.ndarray, "e d *obs"]
    gradient_norm: Float[np.ndarray, " e"]
    converged: Bool[np.ndarray, " e"]
    hits: Int[np.ndarray, " e"]
    minima: Int[np.ndarray, " e"]
    rise: Float[np.ndarray, " e"]
    unseen: Float[np.ndarray, " e"]
    sure: Bool[np.ndarray, " e"]
    starts: Int[np.ndarray, " e"]
    ends: Float[np.ndarray, "e s d"]
    end_energy: Float[np.ndarray, "e s"]
    distinct: Bool[np.ndarray, "e s"]

    @property
    def single(self) -> Bool[np.ndarray, " e"]:
        """Whether no other minimum lies within `SINGLE_MINIMUM` nats of the lowest."""
        return self.rise >= SINGLE_MINIMUM

    def summary(self) -> str:
        """What a person wants to know of the batch, in a few lines."""
        n = self.energy.size
        return (
            f"{n} events: {int(self.converged.sum())} converged, {int(self.sure.sum())} sure, "
            f"{int(self.single.sum())} with a single minimum within {SINGLE_MINIMUM:g} nats; "
            f"{int(np.median(self.starts))} starts in the median, {int(self.starts.max())} at most"
        )


class Oracle(eqx.Module):
    """Finds the lowest minimum of J, event by event, and all that the gates ask of it.

    Searches start at the background and at draws of the prior, each by incremental 4DVar; the
    best end is polished by Newton steps on the full Hessian. The starts of all events run as one
    flat batch. Events of which it is not sure get as many starts again, until it is or the limit
    is reached; of those that are left it says so.

    How sure: after N searches that found w minima, Boender and Rinnooy Kan (1987), *Bayesian
    stopping rules for multistart global optimization methods*, Math. Program. 37, expect a share
    w (w + 1) / (N (N - 1)) of all starts to lead to minima that nobody has seen.

    Runs in double precision, inside; nothing global is changed.

    Attributes:
        energy: J.
        starts: searches in a round.
        rounds: at most.
        unseen: largest probability of an unseen minimum at which it is sure.
        batch: events in one compiled batch; bounds the memory.
        tolerance: on the gradient at the end of a search, see `IncrementalFourDVar`.
        max_outer: bound on the steps of one search.
    """

    energy: Energy
    starts: int = 16
    rounds: int = 4
    unseen: float = 0.03
    batch: int = 256
    tolerance: float = 1e-4
    max_outer: int = 64

    def __check_init__(self):
        if self.starts < 3 or self.rounds < 1 or self.batch < 1:
            raise ValueError(
                "expected starts >= 3, rounds >= 1 and batch >= 1, "
                f"got {self.starts}, {self.rounds}, {self.batch}"
            )

    def __call__(self, events: Event, *, key: Key) -> OracleAnalysis:
        """Analyse a batch of events.

        Args:
            events: arrays with a leading axis, as `InverseProblem.batch` makes them.
            key: draws the starts.

        Raises:
            InvalidEventError: on events of another shape than the forward model's, none at all,
                or a value that is not finite at an observed entry.
        """
        self._check(events)
        with jax.enable_x64(True):
            return self._analyse(to_double(self.energy), to_double(events), key)

    def _check(self, events: Event) -> None:
        prior = self.energy.prior
        shape = jax.eval_shape(self.energy.forward, prior.loc).shape
        if events.y.shape[1:] != shape or events.mask.shape != events.y.shape:
            raise InvalidEventError(
                f"expected a batch of events of shape (n, {', '.join(map(str, shape))}), got y of "
                f"shape {events.y.shape} and a mask of shape {events.mask.shape}"
            )
        if events.y.shape[0] == 0:
            raise InvalidEventError("expected at least one event, got an empty batch")
        bad = np.asarray(events.mask) & ~np.isfinite(np.asarray(events.y))
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            raise InvalidEventError(
                f"expected finite values at observed entries, got {np.asarray(events.y)[at]} at "
                f"index {at} ({int(bad.sum())} such entries)"
            )

    def _analyse(self, energy: Energy, events: Event, key: Key) -> OracleAnalysis:
        n, d = events.y.shape[0], energy.prior.loc.size
        total = self.starts * self.rounds
        ends, values = np.zeros((n, total, d)), np.full((n, total), np.inf)
        made = np.zeros(n, int)
        unsure = np.arange(n)
        for i in range(self.rounds):
            here = slice(self.starts * i, self.starts * (i + 1))
            v = jax.random.normal(jax.random.fold_in(key, i), (n, self.starts, d))
            # The first start of all is the background, where a single 4DVar would start.
            v = np.asarray(v.at[:, 0].set(0.0) if i == 0 else v)
            ends[unsure, here], values[unsure, here] = self._in_batches(
                lambda rows, v=v: _search(
                    energy,
                    _take(events, rows),
                    jnp.asarray(v[rows]),
                    self.tolerance,
                    self.max_outer,
                ),
                unsure,
                n,
            )
            made[unsure] += self.starts
            census = _census(ends, values, self.unseen)
            unsure = np.flatnonzero(~census["sure"])
            if unsure.size == 0:
                break
        best = ends[np.arange(n), census.pop("best")]
        figures = self._in_batches(
            lambda rows: _polish(energy, _take(events, rows), jnp.asarray(best[rows])),
            np.arange(n),
            n,
        )
        census["sure"] &= figures["converged"]
        states = np.asarray(_colour(energy, jnp.asarray(ends)))
        return OracleAnalysis(**figures, **census, starts=made, ends=states, end_energy=values)

    def _in_batches(self, run: Callable[[np.ndarray], Any], rows: np.ndarray, n: int) -> Any:
        """Run on some of `n` events in batches of one size, so that one program serves them all."""
        size = min(self.batch, n)
        parts = []
        for start in range(0, rows.size, size):
            some = rows[start : start + size]
            padded = np.concatenate([some, np.full(size - some.size, some[-1])])
            out = jax.tree.map(np.asarray, run(padded))
            parts.append(jax.tree.map(lambda a, k=some.size: a[:k], out))
        return jax.tree.map(lambda *a: np.concatenate(a), *parts)


def _take(events: Event, rows: np.ndarray) -> Event:
    return jax.tree.map(lambda a: a[rows], events)


@eqx.filter_jit
def _colour(energy: Energy, v: Float[Array, "e s d"]) -> Float[Array, "e s d"]:
    return jax.vmap(jax.vmap(energy.prior.colour))(v)


@eqx.filter_jit
def _search(
    energy: Energy, events: Event, starts: Float[Array, "e s d"], tolerance: float, max_outer: int
) -> tuple[Float[Array, "e s d"], Float[Array, "e s"]]:
    """Where each search ended, and J there; infinite where it did not converge."""
    solver = IncrementalFourDVar(energy, tolerance, max_outer=max_outer)

    def one(event, v):
        found = solver(event, throw=False, start=energy.prior.colour(v))
        return energy.prior.whiten(found.mode), jnp.where(found.converged, found.energy, jnp.inf)

    return jax.vmap(lambda event, vs: jax.vmap(lambda v: one(event, v))(vs))(events, starts)


@eqx.filter_jit
def _polish(
    energy: Energy, events: Event, v: Float[Array, "e d"], steps: int = 10
) -> dict[str, Array]:
    """Newton steps on the full Hessian, then all that is said of the mode.

    The forward model appears in two places, the loop's body and the last look: each more is seconds
    of compilation.
    """
    d = v.shape[-1]

    def one(event, v):
        def cost_at(v):
            return energy.at_control(v, event)

        def local(v):
            cost, slope = jax.value_and_grad(cost_at)(v)
            return slope, (cost, slope)

        def newton(i, at):
            v, cost, slope, curvature = at
            trial = v - jnp.linalg.solve(curvature, slope)
            bend, (there, gradient) = jax.jacfwd(local, has_aux=True)(trial)
            lower = there < cost
            flatter = jnp.linalg.norm(gradient) < jnp.linalg.norm(slope)
            # In a narrow valley the first is the test, in the last digits the second.
            better = (trial, there, gradient, bend)
            take = (i == 0) | lower | flatter
            return jax.tree.map(lambda a, b: jnp.where(take, a, b), better, at)

        # The first pass only looks: its step is zero, and what it sees counts, finite or not.
        start = (v, jnp.zeros((), v.dtype), jnp.zeros_like(v), jnp.eye(d, dtype=v.dtype))
        v, cost, slope, curvature = jax.lax.fori_loop(0, steps + 1, newton, start)
        tangent = residual_jacobian(energy, v, event)
        root = jax.vmap(energy.prior.colour)(jnp.eye(d, dtype=v.dtype)) - energy.prior.loc
        # d slope / dy = J_o^T R^{-1/2}, with J_o the rows of the innovations.
        across = tangent[d:].T / energy.sd(event).reshape(-1)
        is_minimum = jnp.all(jnp.isfinite(jnp.linalg.cholesky(curvature)))
        norm = jnp.linalg.norm(slope)

        def covariance(curvature):
            return root.T @ jnp.linalg.solve(curvature, root)

        def derivative(curvature):
            flat = -root.T @ jnp.linalg.solve(curvature, across)
            return flat.reshape(d, *event.y.shape)

        gauss_newton = tangent.T @ tangent
        return {
            "mode": energy.prior.colour(v),
            "energy": cost,
            "covariance": jnp.where(is_minimum, covariance(curvature), jnp.nan),
            "gauss_newton_covariance": covariance(gauss_newton),
            "jacobian": derivative(curvature),
            "gain": derivative(gauss_newton),
            "gradient_norm": norm,
            # Rounding of a sum of squares of size J leaves this much of a gradient.
            "converged": is_minimum & (norm <= 1e-7 * (1.0 + jnp.linalg.norm(v))),
        }

    return jax.vmap(one)(events, v)


def _census(
    ends: Float[np.ndarray, "e s d"], values: Float[np.ndarray, "e s"], limit: float
) -> dict[str, np.ndarray]:
    """Count the minima among the ends of the searches of each event."""
    n, total = values.shape
    out = {
        "best": np.argmin(values, axis=1),
        "hits": np.zeros(n, int),
        "minima": np.zeros(n, int),
        "rise": np.full(n, np.inf),
        "unseen": np.ones(n),
        "sure": np.zeros(n, bool),
        "distinct": np.zeros((n, total), bool),
    }
    for e in range(n):
        at = np.flatnonzero(np.isfinite(values[e]))
        at = at[np.argsort(values[e, at], kind="stable")]
        if at.size < 2:
            continue
        v = ends[e, at]
        apart = np.linalg.norm(v[:, None] - v[None], axis=-1)
        same = apart <= _SAME * (1.0 + np.linalg.norm(v, axis=-1))
        first = ~np.tril(same, -1).any(axis=1)
        found, searches = int(first.sum()), at.size
        out["distinct"][e, at[first]] = True
        out["hits"][e] = same[0].sum()
        out["minima"][e] = found
        if found > 1:
            out["rise"][e] = values[e, at[first][1]] - values[e, at[0]]
        out["unseen"][e] = min(1.0, found * (found + 1) / (searches * (searches - 1)))
    out["sure"] = (out["hits"] >= 2) & (out["unseen"] <= limit)
    return out
