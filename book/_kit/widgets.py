"""The gap explorer: move a gap through a path, and see the exact and the amortized posterior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import traitlets
from matplotlib.figure import Figure

from _kit.figures import GapPicture, draw_gap
from _kit.live import LiveWidget
from _kit.packing import pack, pack_posterior
from amortlib.gaussian import condition, kl
from amortlib.observation import gap
from amortlib.posterior import AmortizedPosterior
from amortlib.problems import InverseProblem
from amortlib.types import Event

_EVENTS = 20


@eqx.filter_jit
def _answers(posterior: AmortizedPosterior, prior: Any, event: Event) -> tuple[jax.Array, ...]:
    exact = condition(prior, jnp.eye(event.y.shape[0]), event)
    q = posterior(event)
    return exact.mean(), exact.sd(), q.mean(), q.sd(), kl(exact, q)


def _path(problem: InverseProblem, event: int) -> tuple[jax.Array, jax.Array]:
    """The path of an event, and its observation errors in standard deviations."""
    k_state, k_noise = jax.random.split(jax.random.key(event))
    truth = problem.prior_sample(k_state)
    return truth, jax.random.normal(k_noise, truth.shape)


def _seen(
    problem: InverseProblem, start: int, length: int, noise: float, event: int
) -> tuple[jax.Array, Event]:
    """The path of an event, and what a gap leaves to be seen of it."""
    truth, errors = _path(problem, event)
    mask = gap(truth.size, start, length)
    return truth, Event(truth + noise * errors, mask, jnp.full(truth.shape, noise))


def gap_picture(
    posterior: AmortizedPosterior,
    problem: InverseProblem,
    *,
    start: int,
    length: int,
    noise: float,
    event: int,
) -> GapPicture:
    """Evaluate both posteriors for one position of the sliders.

    The same event number gives the same path and the same standardised errors, so that a slider
    changes one thing at a time.

    Args:
        posterior: a head for the problem; told the error bars where it reads them.
        problem: a problem in which every site of the state is observed.
        start: first missing time.
        length: how many times are missing.
        noise: standard deviation of the observation error.
        event: which path.
    """
    if problem.prior is None:
        raise ValueError("expected a problem with its prior: the exact posterior needs it")
    truth, observed = _seen(problem, start, length, noise, event)
    mean, spread, head_mean, head_sd, distance = _answers(posterior, problem.prior, observed)
    return GapPicture(
        t=np.arange(truth.size),
        truth=np.asarray(truth),
        y=np.asarray(observed.y),
        mask=np.asarray(observed.mask),
        exact_mean=np.asarray(mean),
        exact_sd=np.asarray(spread),
        head_mean=np.asarray(head_mean),
        head_sd=np.asarray(head_sd),
        kl=max(float(distance), 0.0),  # rounding may leave it a little below zero
    )


class GapExplorer(LiveWidget):
    """Gap, noise, event and head by sliders, or by dragging the gap in the picture.

    The heads and the exact posterior are computed by the page itself. With a kernel a function of
    your own can be drawn beside them: it is called with the [`Event`][amortlib.types.Event] at
    every position, and returns a mean and a standard deviation, or a Gaussian.

    Attributes:
        start: first missing time.
        length: how many times are missing.
        noise: standard deviation of the observation error.
        event: which path, of 20.
        head: name of the head that is shown.
        problem: as it was given.
        posteriors: the heads by name.
    """

    start = traitlets.Int(10).tag(sync=True)
    length = traitlets.Int(10).tag(sync=True)
    noise = traitlets.Float(0.3).tag(sync=True)
    event = traitlets.Int(0).tag(sync=True)
    head = traitlets.Unicode().tag(sync=True)
    events = traitlets.Int(_EVENTS).tag(sync=True)
    heads = traitlets.Dict().tag(sync=True)
    paths = traitlets.Bytes().tag(sync=True)
    noise_range = traitlets.List(traitlets.Float()).tag(sync=True)

    def __init__(
        self,
        posterior: AmortizedPosterior | Mapping[str, AmortizedPosterior],
        problem: InverseProblem,
        *,
        start: int = 10,
        length: int = 10,
        noise: float = 0.3,
        event: int = 0,
        noise_range: tuple[float, float] | None = (0.1, 1.0),
        compare: Callable[[Event], Any] | None = None,
        label: str = "yours, 95%",
    ):
        """Set the first position.

        Args:
            posterior: a head for the problem, or several by name.
            problem: a problem in which every site of a scalar Markov path is observed.
            start: first missing time.
            length: how many times are missing.
            noise: standard deviation of the observation error.
            event: which path.
            noise_range: ends of the noise slider; `None` for heads that know one noise only,
                which leaves the slider out.
            compare: drawn beside the heads where a kernel runs.
            label: its name.

        Raises:
            ValueError: on a problem without a prior, a head that the pages do not know, or a
                first position off the sliders.
        """
        if problem.prior is None:
            raise ValueError("expected a problem with its prior: the exact posterior needs it")
        heads = posterior if isinstance(posterior, Mapping) else {"amortized": posterior}
        n = problem.prior.loc.size
        ends = {"start": (start, n - 1), "length": (length, n), "event": (event, _EVENTS - 1)}
        for name, (value, last) in ends.items():
            if not 0 <= value <= last:
                raise ValueError(f"expected 0 <= {name} <= {last}, got {value}")
        self.problem, self.posteriors = problem, dict(heads)
        self._compare, self._label = compare, label
        truth, errors = jax.vmap(lambda i: _path(problem, i))(jnp.arange(_EVENTS))
        super().__init__(
            kind="gap",
            title="Gap explorer",
            start=start,
            length=length,
            noise=noise,
            event=event,
            head=next(iter(heads)),
            heads={name: pack_posterior(made) for name, made in heads.items()},
            paths=pack({"prior": problem.prior, "truth": truth, "errors": errors}),
            noise_range=[noise, noise] if noise_range is None else list(noise_range),
        )
        if compare is not None:
            self.draw_beside(self._compared, ["start", "length", "noise", "event"])

    def seen(self) -> Event:
        """The event as the sliders stand."""
        return _seen(self.problem, self.start, self.length, self.noise, self.event)[1]

    def picture(self) -> GapPicture:
        """Both posteriors as the sliders stand, computed by amortlib."""
        return gap_picture(
            self.posteriors[self.head],
            self.problem,
            start=self.start,
            length=self.length,
            noise=self.noise,
            event=self.event,
        )

    def still(self) -> tuple[Figure, str]:
        """Both posteriors, drawn by matplotlib."""
        picture = self.picture()
        return draw_gap(picture), picture.words()

    def _compared(self) -> dict[str, Any]:
        assert self._compare is not None
        answer = self._compare(self.seen())
        mean, sd = answer if isinstance(answer, tuple) else (answer.mean(), answer.sd())
        mean, sd = (np.asarray(a, float).tolist() for a in (mean, sd))
        return {"mean": mean, "sd": sd, "label": self._label}


def gap_explorer(
    posterior: AmortizedPosterior | Mapping[str, AmortizedPosterior],
    problem: InverseProblem,
    **first: Any,
) -> GapExplorer:
    """Move the gap and watch both posteriors answer; see [`GapExplorer`][] for the settings."""
    return GapExplorer(posterior, problem, **first)
