"""One hole, two answers: widen the gap until the posterior splits, and ask several heads."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import ipywidgets as ipw
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from _kit import style
from amortlib.observation import gap
from amortlib.posterior import AmortizedPosterior
from amortlib.problems import InverseProblem
from amortlib.types import Event

_EVENTS = 12
_DRAWS = 1000
_TIMES = 5
_SAMPLE = eqx.filter_jit(lambda model, event, key: model.sample(event, _DRAWS, key=key))


@dataclass(frozen=True)
class HolePicture:
    """What one head says of one event.

    Attributes:
        draws: of the state at the first time, `(n, 3)`.
        truth: the state that the simulator drew, `(3,)`.
        missing: how many times are missing, from the first on.
        head: its name.
    """

    draws: np.ndarray
    truth: np.ndarray
    missing: int
    head: str

    @property
    def right(self) -> float:
        """The share of the draws with a positive x."""
        return float((self.draws[:, 0] > 0).mean())

    def words(self) -> str:
        """The picture in one sentence, for whoever does not see it."""
        return (
            f"The {self.head} head with the first {self.missing} of {_TIMES} times missing: "
            f"{100 * self.right:.0f}% of its draws have a positive x and "
            f"{100 * (1 - self.right):.0f}% a negative one; the truth is x = {self.truth[0]:.1f}."
        )


def draw_hole(picture: HolePicture) -> Figure:
    """Draws in the plane of x and y, and a histogram of x above it."""
    figure = Figure(figsize=style.WIDE)
    top, ax = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.4))
    x, y = picture.draws[:, 0], picture.draws[:, 1]
    top.hist(x, bins=np.linspace(-25, 25, 101), color=style.AMORTIZED)
    top.set(yticks=[], title=f"{picture.head}, first {picture.missing} times missing")
    ax.plot(x, y, ".", color=style.AMORTIZED, alpha=0.35, markersize=3, label="draws")
    ax.plot(*picture.truth[:2], "*", color=style.TRUTH, markersize=12, label="truth")
    ax.set(xlabel="x at the first time", ylabel="y", xlim=(-25, 25), ylim=(-32, 32))
    ax.legend(loc="upper left")
    return figure


def hole_picture(
    model: AmortizedPosterior, problem: InverseProblem, *, missing: int, event: int, head: str
) -> HolePicture:
    """Ask one head about one event whose first `missing` times are not seen.

    The same event number gives the same state and the same errors, so that a slider changes one
    thing at a time.
    """
    truth, seen = problem.simulate(jax.random.key(7000 + event))
    mask = jnp.broadcast_to(gap(_TIMES, 0, missing)[:, None], seen.y.shape)
    draws = _SAMPLE(model, Event(seen.y, mask), jax.random.key(event))
    return HolePicture(np.asarray(draws), np.asarray(truth), missing, head)


class HoleExplorer(ipw.VBox):
    """A slider for the gap, one for the event, and a choice of heads; a picture and its words.

    Where a kernel runs, a move asks the chosen head anew. In the rendered book, which has none,
    the display is the picture for the settings it was made with.
    """

    def __init__(
        self,
        models: dict[str, AmortizedPosterior],
        problem: InverseProblem,
        *,
        missing: int = 1,
        event: int = 0,
        head: str | None = None,
    ):
        """Set the first position of the controls.

        Args:
            models: heads by their names.
            problem: the Lorenz-63 window whose sign is lost.
            missing: how many times the gap takes, from the first on.
            event: which window.
            head: which head; by default the last.
        """
        self.models, self.problem = models, problem
        look = {
            "style": {"description_width": "7em"},
            "layout": ipw.Layout(width="100%", max_width="36em"),
        }
        self.missing = ipw.IntSlider(missing, 0, _TIMES - 1, description="times missing", **look)
        self.event = ipw.IntSlider(event, 0, _EVENTS - 1, description="event", **look)
        self.head = ipw.Dropdown(
            options=list(models), value=head or list(models)[-1], description="head", **look
        )
        self.controls = [self.missing, self.event, self.head]
        self.image = ipw.Image(format="png", layout=ipw.Layout(width="100%", max_width="46em"))
        self.words = ipw.HTML()
        for control in self.controls:
            control.observe(self._redraw, names="value")
        self._redraw()
        super().__init__([*self.controls, self.image, self.words])

    def picture(self) -> HolePicture:
        """What the chosen head says where the sliders stand now."""
        return hole_picture(
            self.models[self.head.value],
            self.problem,
            missing=self.missing.value,
            event=self.event.value,
            head=self.head.value,
        )

    def _redraw(self, change: Any = None) -> None:
        picture = self.picture()
        data = io.BytesIO()
        draw_hole(picture).savefig(data, format="png")
        self.image.value = data.getvalue()
        self.words.value = f'<span role="status">{picture.words()}</span>'

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        # Beside the live view, the picture as it stands: what a page without a kernel can show.
        bundle = super()._repr_mimebundle_(**kwargs)
        data = dict(bundle[0] if isinstance(bundle, tuple) else bundle)
        data["image/png"] = base64.b64encode(self.image.value).decode("ascii")
        return data


def hole_explorer(
    models: dict[str, AmortizedPosterior], problem: InverseProblem, **first: Any
) -> HoleExplorer:
    """Widen the gap and watch the posterior split; see [`HoleExplorer`][] for the settings."""
    return HoleExplorer(models, problem, **first)
