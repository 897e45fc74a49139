"""Live controls of the book. A widget holds sliders; what it draws lives in `figures`."""

from __future__ import annotations

import base64
import io
from typing import Any

import equinox as eqx
import ipywidgets as ipw
import jax
import jax.numpy as jnp
import numpy as np

from _kit.figures import GapPicture, draw_gap
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
    k_state, k_noise = jax.random.split(jax.random.key(event))
    truth = problem.prior_sample(k_state)
    y = truth + noise * jax.random.normal(k_noise, truth.shape)
    sd = jnp.full(truth.shape, noise)
    observed = Event(y, gap(truth.size, start, length), sd)
    mean, spread, head_mean, head_sd, distance = _answers(posterior, problem.prior, observed)
    return GapPicture(
        t=np.arange(truth.size),
        truth=np.asarray(truth),
        y=np.asarray(y),
        mask=np.asarray(observed.mask),
        exact_mean=np.asarray(mean),
        exact_sd=np.asarray(spread),
        head_mean=np.asarray(head_mean),
        head_sd=np.asarray(head_sd),
        kl=max(float(distance), 0.0),  # rounding may leave it a little below zero
    )


class GapExplorer(ipw.VBox):
    """Sliders for the gap's start and length, the noise and the event; a picture and its words.

    Where a kernel runs, moving a slider evaluates both posteriors anew. In the rendered book,
    which has none, the display is the picture for the settings it was made with.
    """

    def __init__(
        self,
        posterior: AmortizedPosterior,
        problem: InverseProblem,
        *,
        start: int = 10,
        length: int = 10,
        noise: float = 0.3,
        event: int = 0,
        noise_range: tuple[float, float] | None = (0.1, 1.0),
    ):
        """Set the first position of the sliders.

        Args:
            posterior: a head for the problem.
            problem: a problem in which every site of the state is observed.
            start: first missing time.
            length: how many times are missing.
            noise: standard deviation of the observation error.
            event: which path.
            noise_range: ends of the noise slider; `None` for a head that knows one noise only,
                which leaves the slider out.
        """
        self.posterior = posterior
        self.problem = problem
        n = problem.shapes()[0][0]
        style_ = {"description_width": "7em"}
        layout = ipw.Layout(width="100%", max_width="36em")
        self.start = ipw.IntSlider(
            start, 0, n - 1, description="gap start", style=style_, layout=layout
        )
        self.length = ipw.IntSlider(
            length, 0, n, description="gap length", style=style_, layout=layout
        )
        low, high = (noise, noise) if noise_range is None else noise_range
        self.noise = ipw.FloatSlider(
            noise, min=low, max=high, step=0.05, description="noise sd", style=style_, layout=layout
        )
        self.event = ipw.IntSlider(
            event, 0, _EVENTS - 1, description="event", style=style_, layout=layout
        )
        self.controls = [self.start, self.length, self.noise, self.event]
        if noise_range is None:
            self.controls.remove(self.noise)
        self.image = ipw.Image(format="png", layout=ipw.Layout(width="100%", max_width="46em"))
        self.words = ipw.HTML()
        for control in self.controls:
            control.observe(self._redraw, names="value")
        self._redraw()
        super().__init__([*self.controls, self.image, self.words])

    def picture(self) -> GapPicture:
        """Both posteriors where the sliders stand now."""
        return gap_picture(
            self.posterior,
            self.problem,
            start=self.start.value,
            length=self.length.value,
            noise=self.noise.value,
            event=self.event.value,
        )

    def _redraw(self, change: Any = None) -> None:
        picture = self.picture()
        data = io.BytesIO()
        draw_gap(picture).savefig(data, format="png")
        self.image.value = data.getvalue()
        self.words.value = f'<span role="status">{picture.words()}</span>'

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        # Beside the live view, the picture as it stands: what a page without a kernel can show.
        bundle = super()._repr_mimebundle_(**kwargs)
        data = dict(bundle[0] if isinstance(bundle, tuple) else bundle)
        data["image/png"] = base64.b64encode(self.image.value).decode("ascii")
        return data


def gap_explorer(
    posterior: AmortizedPosterior, problem: InverseProblem, **first: Any
) -> GapExplorer:
    """Move the gap and watch both posteriors answer; see [`GapExplorer`][] for the settings."""
    return GapExplorer(posterior, problem, **first)
