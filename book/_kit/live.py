"""Live widgets in two homes: in JupyterLab with a kernel, and on the static page without one.

Both run the same JavaScript (`js/`). In JupyterLab it is the front-end of an anywidget, and the
kernel follows every control. A page without a kernel gets the widget's state in its HTML, beside a
still picture for whoever runs no scripts, and `tools.book_extension` ships the script.
"""

from __future__ import annotations

import abc
import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import anywidget
import numpy as np
import traitlets
from matplotlib.figure import Figure

from _kit import style
from _kit.bundle import JS, module

ROLES = {
    "truth": style.TRUTH,
    "obs": style.OBS,
    "exact": style.EXACT,
    "amortized": style.AMORTIZED,
    "prior": style.PRIOR,
    "gap": style.GAP,
}


def _plain(value: Any) -> Any:
    """A trait as JSON has it; bytes as `{"base64": ...}`."""
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode("ascii")}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"expected JSON or bytes in a live widget, got {type(value).__name__}")


class _Meta(type(anywidget.AnyWidget), abc.ABCMeta):
    """traitlets' classes with abstract methods."""


class LiveWidget(anywidget.AnyWidget, metaclass=_Meta):
    """The base of the book's widgets: traits that are synchronised are the whole state.

    A widget says which `kind` of `js/live.mjs` it is, gives its controls as traits, and draws a
    still picture of itself.

    Attributes:
        overlay: what a kernel answers, drawn beside the page's own; its name is the `"label"`.
    """

    _esm = module()
    _css = (JS / "live.css").read_text(encoding="utf-8")

    kind = traitlets.Unicode().tag(sync=True)
    title = traitlets.Unicode().tag(sync=True)
    roles = traitlets.Dict(ROLES).tag(sync=True)
    overlay = traitlets.Dict().tag(sync=True)

    @abc.abstractmethod
    def still(self) -> tuple[Figure, str]:
        """A picture of the widget as it stands, and the same in words."""

    def draw_beside(
        self, answer: Callable[[], dict[str, Any]], controls: Sequence[str] = ()
    ) -> None:
        """Draw what `answer` returns as the overlay, now and whenever a control is moved.

        Without a kernel it stays as it is now.
        """

        def ask(_: Any = None) -> None:
            self.overlay = answer()

        if controls:  # none would be all to traitlets
            self.observe(ask, controls)
        ask()

    def state(self) -> dict[str, Any]:
        """What the JavaScript is given on a page without a kernel."""
        own = set(self.trait_names(sync=True)) - set(anywidget.AnyWidget.class_trait_names())
        return {name: getattr(self, name) for name in sorted(own) if not name.startswith("_")}

    def to_html(self) -> str:
        """The widget for a page without a kernel: a still picture, and the state to start from."""
        figure, words = self.still()
        alt = f"{self.title}. {words}"
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=100)
        picture = base64.b64encode(data.getvalue()).decode("ascii")
        # A closing tag within a string would end the script.
        text = json.dumps(self.state(), default=_plain).replace("</", "<\\/")
        return (
            f'<div data-live="{html.escape(self.kind)}"><div class="live-still">'
            f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{picture}">'
            "<p>A still picture: the live one needs JavaScript.</p></div>"
            f'<script type="application/json">{text}</script></div>'
        )

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        data = dict(bundle[0] if isinstance(bundle, tuple) else bundle or {})
        data["text/html"] = self.to_html()
        return data
