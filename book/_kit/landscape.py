"""The energy landscape of a window, live: J through its minima, and the posterior beside them."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import traitlets
from matplotlib.figure import Figure

from _kit.figures import LandscapePicture, draw_landscape
from _kit.packing import pack, window_settings
from _kit.windowed import Answer, WindowWidget
from amortlib.energy import Energy
from amortlib.observation import gap
from amortlib.problems import InverseProblem
from amortlib.solvers import IncrementalFourDVar, importance_sample
from amortlib.types import Event, to_double

_EVENTS = 20
_STARTS = 24
_DRAWS, _DOTS = 4000, 300
_RIVAL = 20.0  # nats: a minimum higher than this above the lowest is no rival
_SAME = 1e-2  # as the oracle: ends nearer than this, in background sd, are one minimum
_CHI2_95 = 7.8147  # of three degrees of freedom


@eqx.filter_jit
def _survey(
    problem: InverseProblem, event: jax.Array, start: jax.Array, length: jax.Array
) -> dict[str, jax.Array]:
    """All that is drawn. The gap and the event are arguments: one program serves all of them."""
    energy = Energy(problem.prior, problem.forward)
    prior = energy.prior
    truth, drawn = problem.simulate(jax.random.key(event))
    at_times = gap(drawn.y.shape[0], start, length)
    seen = Event(drawn.y, jnp.broadcast_to(at_times[:, None], drawn.y.shape), drawn.sd)

    # Starts are the same for every gap, so that what a slider changes is the gap alone.
    v = _starts(prior.loc.size)
    solver = IncrementalFourDVar(energy, tolerance=1e-5)
    found = jax.vmap(lambda v: solver(seen, throw=False, start=prior.colour(v)))(v)
    values = jnp.where(found.converged, found.energy, jnp.inf)
    ends = jax.vmap(prior.whiten)(found.mode)
    low = jnp.argmin(values)
    apart = jnp.linalg.norm(ends - ends[low], axis=1)
    other = apart > _SAME * (1.0 + jnp.linalg.norm(ends, axis=1))
    next_low = jnp.argmin(jnp.where(other, values, jnp.inf))
    rise = jnp.where(other, values, jnp.inf)[next_low] - values[low]
    two = rise <= _RIVAL
    modes = jnp.stack([found.mode[low], jnp.where(two, found.mode[next_low], found.mode[low])])

    def cost(v):
        return energy(prior.colour(v), seen)

    curvatures = jax.vmap(jax.hessian(cost))(jax.vmap(prior.whiten)(modes))
    bend, ways = jnp.linalg.eigh(curvatures[0])
    # The weakest direction, its sense fixed so that it does not flip from gap to gap.
    weakest = ways[:, 0] * jnp.sign(ways[jnp.argmax(jnp.abs(ways[:, 0])), 0])
    across = jnp.where(two, ends[next_low] - ends[low], weakest / jnp.sqrt(bend[0]))
    at = jnp.where(two, jnp.linspace(-0.3, 1.3, 321), jnp.linspace(-4.0, 4.0, 321))
    line = jax.vmap(lambda s: cost(ends[low] + s * across))(at)

    near = jnp.where((values <= values[low] + _RIVAL)[:, None], found.mode, modes[0])
    sample = importance_sample(energy, seen, near, _DRAWS, key=jax.random.key(1))
    weight = jnp.nan_to_num(sample.log_weight, nan=-jnp.inf)  # a forecast that overflows
    sample = eqx.tree_at(lambda s: s.log_weight, sample, weight)
    off = jax.vmap(prior.whiten)(sample.x) - prior.whiten(modes[0])
    held = jnp.einsum("ni,ij,nj->n", off, curvatures[0], off) <= _CHI2_95
    root = jax.vmap(prior.colour, out_axes=1)(jnp.eye(prior.loc.size)) - prior.loc[:, None]
    clean = jax.vmap(problem.forward)(jnp.concatenate([truth[None], modes]))
    return {
        "mask": at_times,
        "y": seen.values,
        "true_state": truth,
        "true_path": clean[0],
        "paths": clean[1:],
        "modes": modes,
        "covariances": root @ jnp.linalg.inv(curvatures) @ root.T,
        "two": two,
        "rise": rise,
        "at": at,
        "line": line - values[low],
        "energy": values[low],
        "ends": ends,
        "values": values,
        "draws": sample.resample(_DOTS, key=jax.random.key(2)),
        "effective_size": sample.effective_size,
        "inside": jnp.sum(jnp.where(held, sample.weight, 0.0)),
    }


def _count(ends: np.ndarray, values: np.ndarray) -> int:
    """How many different minima lie within the reach of the picture."""
    order = np.argsort(values, kind="stable")
    order = order[values[order] <= values[order[0]] + _RIVAL]
    kept: list[np.ndarray] = []
    for end in ends[order]:
        reach = _SAME * (1.0 + np.linalg.norm(end))
        if all(np.linalg.norm(end - other) > reach for other in kept):
            kept.append(end)
    return len(kept)


def _observed(problem: InverseProblem) -> tuple[int, ...]:
    """Shape of the observations; the problem may be one in double precision."""
    with jax.enable_x64(True):
        return problem.shapes()[1]


def landscape_picture(
    problem: InverseProblem,
    *,
    start: int,
    length: int,
    event: int,
    components: tuple[int, int] = (0, 2),
    names: tuple[str, str] = ("x", "z"),
) -> LandscapePicture:
    """Find the minima for one position of the sliders, and what lies around them.

    Searches by incremental 4DVar from the background and from 23 draws of it, the same for every
    gap. All in double precision, inside.

    Args:
        problem: a window with its prior; observations have two axes, time first.
        start: first missing time.
        length: how many times are missing.
        event: which pair of the simulator.
        components: of the control, for the plane.
        names: their names.

    Raises:
        ValueError: on a problem without a prior, or whose observations have no second axis.
    """
    if problem.prior is None:
        raise ValueError("expected a problem with its prior: J needs it")
    shape = _observed(problem)
    if len(shape) != 2:
        raise ValueError(f"expected observations of shape (times, components), got {shape}")
    with jax.enable_x64(True):
        background = np.asarray(problem.prior.mean(), float)
        spread = np.asarray(problem.prior.covariance(), float)
        here = (np.int64(event), np.int64(start), np.int64(length))
        found = {k: np.asarray(a) for k, a in _survey(to_double(problem), *here).items()}
    i, j = components
    shown = 2 if found["two"] else 1
    plane = np.ix_([i, j], [i, j])
    return LandscapePicture(
        t=np.arange(shape[0]),
        mask=found["mask"],
        y=found["y"][:, 0],
        true_path=found["true_path"][:, 0],
        paths=found["paths"][:shown, :, 0],
        names=names,
        true_state=found["true_state"][[i, j]],
        modes=found["modes"][:shown, [i, j]],
        covariances=np.stack([c[plane] for c in found["covariances"][:shown]]),
        background=background[[i, j]],
        background_covariance=spread[plane],
        draws=found["draws"][:, [i, j]],
        at=found["at"],
        line=found["line"],
        minima=_count(found["ends"], found["values"]),
        rise=float(found["rise"]),
        inside=float(found["inside"]),
    )


class EnergyLandscape(WindowWidget):
    """The gap and the event by sliders, or by dragging; a picture of J, and its words.

    The page searches, differentiates and samples by itself.

    Attributes:
        start: first missing time.
        length: how many times are missing.
        event: which pair of the simulator, of 20.
        problem: as it was given.
    """

    components = traitlets.List(traitlets.Int(), [0, 2]).tag(sync=True)
    names = traitlets.List(traitlets.Unicode(), ["x", "z"]).tag(sync=True)

    def __init__(
        self,
        problem: InverseProblem,
        *,
        start: int = 0,
        length: int = 6,
        event: int = 0,
        compare: Answer | None = None,
        label: str = "yours",
    ):
        """Set the first position of the sliders.

        Args:
            problem: see [`landscape_picture`][]; its forward model is a
                [`FixedSteps`][_kit.windows.FixedSteps] of Lorenz-63.
            start: first missing time.
            length: how many times are missing.
            event: which pair of the simulator.
            compare: see [`compare`][_kit.windowed.WindowWidget.compare].
            label: its name.

        Raises:
            ValueError: on a problem that the page cannot compute.
        """
        if problem.prior is None:
            raise ValueError("expected a problem with its prior: J needs it")
        with jax.enable_x64(True):
            self.problem = to_double(problem)
            settings, data = packed_events(self.problem)
        super().__init__(
            kind="landscape",
            title="Energy landscape",
            start=start,
            length=length,
            event=event,
            events=_EVENTS,
            window=settings,
            data=data,
        )
        self.compare(compare, label)

    def picture(self) -> LandscapePicture:
        """The landscape where the sliders stand, computed by amortlib."""
        return landscape_picture(
            self.problem, start=self.start, length=self.length, event=self.event
        )

    def still(self) -> tuple[Figure, str]:
        """The landscape, drawn by matplotlib."""
        picture = self.picture()
        return draw_landscape(picture), picture.words()


def _starts(dim: int) -> jax.Array:
    """Where searches start, in control variables: the background and draws of it."""
    return jax.random.normal(jax.random.key(0), (_STARTS, dim)).at[0].set(0.0)


def packed_events(
    problem: InverseProblem, events: int = _EVENTS, mirror: tuple[float, ...] | None = None
) -> tuple[dict[str, Any], bytes]:
    """A window for `js/lorenz.mjs`: its settings, and its background, events and starts.

    Args:
        problem: in double precision, within `jax.enable_x64`.
        events: how many pairs of the simulator, of the keys 0, 1, ...
        mirror: a symmetry of J, factors of the control variables: half of the starts are then
            images of the others, so that no minimum is found without its image.
    """
    simulate = jax.jit(jax.vmap(lambda i: problem.simulate(jax.random.key(i))))
    truth, drawn = simulate(jnp.arange(events))
    sd = np.unique(np.asarray(problem.obs_noise.sd))
    if sd.size != 1:
        raise ValueError(f"expected one noise for all observations, got {sd.size}")
    prior = problem.prior
    starts = _starts(prior.loc.size)
    if mirror is not None:
        half = starts[: _STARTS // 2]
        starts = jnp.concatenate([half, half * jnp.asarray(mirror)])
    data = {
        "loc": prior.loc,
        "chol": prior.chol,
        "truth": truth,
        "y": drawn.y,
        "starts": starts,
    }
    return window_settings(problem) | {"noise": float(sd[0])}, pack(data)


def energy_landscape(problem: InverseProblem, **first: Any) -> EnergyLandscape:
    """Move the gap and watch the minima of J; see [`EnergyLandscape`][] for the settings."""
    return EnergyLandscape(problem, **first)
