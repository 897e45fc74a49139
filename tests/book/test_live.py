"""The live widgets in a browser, without a kernel and without a network.

Each widget is put on a bare page that is opened from disk, as the built book may be.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _kit.break_even import BreakEven, break_even
from _kit.bundle import JS, BundleError, bundle, page_script
from _kit.faults import LEVELS, FaultExplorer, fault_explorer
from _kit.heads import load_ou_head
from _kit.holes import one_hole
from _kit.ladder import RefinementLadder, refinement_ladder
from _kit.landscape import EnergyLandscape, energy_landscape
from _kit.live import ROLES as COLOURS
from _kit.live import LiveWidget
from _kit.widgets import GapExplorer, gap_explorer
from _kit.windowed import oracle_minima
from _kit.windows import FixedSteps
from axe_playwright_python.sync_playwright import Axe

from amortlib.calibration import jacobian_error, mode_distance
from amortlib.energy import Energy
from amortlib.observation import Select, gap
from amortlib.posterior import regression_posterior
from amortlib.problems import InverseProblem, lorenz63
from amortlib.refine import refine
from amortlib.solvers import Oracle
from amortlib.types import Event, to_double

pytestmark = pytest.mark.slow


def two_heads() -> GapExplorer:
    posterior, problem = load_ou_head()
    plain = regression_posterior(
        "cholesky", key=jax.random.key(0), prior=problem.prior, uses_sd=True
    )
    return gap_explorer({"information": posterior, "untrained": plain}, problem)


def window() -> InverseProblem:
    """The window of the chapter The variational ladder."""
    return FixedSteps.in_place(lorenz63(noise=2.0, substeps=2, operator=Select((0, 1))))


EXAMPLES: dict[str, Callable[[], LiveWidget]] = {
    "break even": lambda: break_even(solver=4e-3, head=2e-6, training=60.0),
    "faults": lambda: fault_explorer(width=0.7),
    "gap": lambda: gap_explorer(*load_ou_head()),
    "gap, two heads": two_heads,
    "holes": lambda: one_hole(length=1),
    "ladder": lambda: refinement_ladder(),
    "landscape": lambda: energy_landscape(window(), length=8, event=1),
}

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>A widget</title>
<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="live.css">
<script defer src="live.js"></script></head><body><main><h1>A widget</h1>{}</main></body></html>"""

DRAWN = """async () => {
  while (document.querySelector('.live[aria-busy]')) await new Promise(requestAnimationFrame);
}"""
"""Until a picture that has been begun is there: on a slow machine it takes some frames."""

FINISHED = """async () => {
  while (document.querySelector('.live:is([aria-busy], [data-later])'))
    await new Promise(requestAnimationFrame);
}"""
"""Until all of a picture is there, and what is drawn after the moves too."""

AT_ONCE = """(() => {
  const { port1, port2 } = new MessageChannel();
  const waiting = [];
  port1.onmessage = () => waiting.shift()(performance.now());
  window.requestAnimationFrame = (act) => { waiting.push(act); port2.postMessage(null); };
  const wait = window.setTimeout;
  window.setTimeout = (act, ms) => wait(act, ms / 10);
})();"""
"""Frames that come as soon as they are asked for, and short rests: work cut into pieces of 4 ms a
frame takes a quarter of the time."""

READY = """() => document.querySelector('.live-words')?.textContent
  || document.querySelector('[role=alert]')"""

EVERYWHERE = f"""async () => {{
  const finished = {FINISHED};"""
EVERYWHERE += """
  // Both ends of every slider, every choice, and a hundred random positions of them all.
  let seed = 1;
  const random = () => (seed = (seed * 48271) % 2147483647) / 2147483647;
  const inputs = [...document.querySelectorAll('.live input, .live select')];
  const put = (input, share) => {
    if (input.tagName === 'SELECT') {
      const last = input.options.length - 1;
      input.selectedIndex = Math.min(last, Math.floor(share * (last + 1)));
      return input.dispatchEvent(new Event('change'));
    }
    input.value = Number(input.min) + share * (Number(input.max) - Number(input.min));
    input.dispatchEvent(new Event('input'));
  };
  const wrong = [], words = new Set();
  const look = () => {
    for (const alert of document.querySelectorAll('[role=alert]'))
      wrong.push(`${alert.textContent} at ${inputs.map((i) => i.value)}`);
    const plots = [...document.querySelectorAll('.live-plot')].map((plot) => plot.outerHTML);
    if (/NaN|Infinity|undefined/.test(plots.join('')))
      wrong.push(inputs.map((i) => i.value).join());
    const said = document.querySelector('.live-words')?.textContent ?? '';
    if (!said || /NaN|undefined/.test(said)) wrong.push(`${said} at ${inputs.map((i) => i.value)}`);
    words.add(said);
  };
  for (const input of inputs) for (const share of [0, 1]) {
    put(input, share);
    await finished();
    look();
  }
  for (let i = 0; i < 100; i++) {
    for (const input of inputs) put(input, random());
    await finished();
    look();
  }
  return {wrong, words: words.size, controls: inputs.length};
}"""


PUT = """async (values) => { for (const [name, value] of Object.entries(values)) {
  const input = document.querySelector(`[data-name=${name}]`);
  input.value = value; input.dispatchEvent(new Event('input')); }
  await (%s)(); }"""
PUT %= DRAWN


class Shelf:
    """Pages of widgets on disk, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, LiveWidget] = {}
        (folder / "live.js").write_text(page_script(), encoding="utf-8")
        shutil.copy2(JS / "live.css", folder / "live.css")

    def widget(self, name: str) -> LiveWidget:
        if name not in self.made:
            self.made[name] = EXAMPLES[name]()
            self.put(name, self.made[name].to_html())
        return self.made[name]

    def put(self, name: str, content: str) -> str:
        path = self.folder / f"{re.sub(r'[^a-z]', '', name)}.html"
        path.write_text(PAGE.format(content), encoding="utf-8")
        return path.as_uri()

    def address(self, name: str) -> str:
        self.widget(name)
        return (self.folder / f"{re.sub(r'[^a-z]', '', name)}.html").as_uri()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("live"))


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A tab without a network that fails on any complaint of the page."""
    context = browser.new_context(
        viewport={"width": 800, "height": 900}, offline=True, has_touch=True
    )
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
    page.complaints = complaints
    yield page
    context.close()


def opened(tab: Any, address: str) -> Any:
    tab.goto(address, wait_until="load")
    tab.wait_for_function(READY)
    return tab


def put(tab: Any, widget: LiveWidget, at: dict[str, Any]) -> None:
    """Move the sliders on the page, and the same ones of the widget in Python."""
    tab.evaluate(PUT, at)
    for name, position in at.items():
        setattr(widget, name, position)


def value(tab: Any, name: str) -> float:
    return float(tab.input_value(f"[data-name={name}]"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_slider_to_both_ends_and_a_hundred_positions(
    tab: Any, shelf: Shelf, name: str
) -> None:
    """At each the whole picture is waited for, and no error is shown."""
    tab.add_init_script(AT_ONCE)
    opened(tab, shelf.address(name))
    assert tab.query_selector(".live-still") is None, "the still picture gives way to the live one"
    found = tab.evaluate(EVERYWHERE)
    assert found["wrong"] == []
    assert found["controls"] >= 2
    assert found["words"] > 10, "the words follow the picture"
    assert tab.complaints == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_slider_by_keyboard(tab: Any, shelf: Shelf, name: str) -> None:
    opened(tab, shelf.address(name))
    for slider in tab.query_selector_all(".live input[type=range]"):
        slider.focus()
        tab.keyboard.press("Home")
        low = float(slider.input_value())
        tab.keyboard.press("ArrowRight")
        assert float(slider.input_value()) > low
        tab.keyboard.press("End")
        assert float(slider.input_value()) == float(slider.get_attribute("max"))
        assert tab.evaluate("(input) => input.labels.length", slider) == 1
        assert slider.get_attribute("aria-valuetext")
    assert tab.complaints == []


MARKS = "() => [...document.querySelectorAll('.live-plot')].map((plot) => plot.innerHTML).join()"

SELECTS = {"gap, two heads": "head", "holes": "shown", "ladder": "derivative"}
"""The choices of the widgets."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_choice_by_keyboard(tab: Any, shelf: Shelf, name: str) -> None:
    """An arrow takes the next one: picture and words change, the ladder's picture aside, for how
    an answer is differentiated changes no answer. The other arrow brings both back."""
    opened(tab, shelf.address(name))
    names = "() => [...document.querySelectorAll('.live select')].map((one) => one.dataset.name)"
    assert tab.evaluate(names) == ([SELECTS[name]] if name in SELECTS else [])
    if name not in SELECTS:
        return
    if name == "ladder":
        tab.evaluate(PUT, {"steps": 1})
    seen = []
    for key in (None, "ArrowDown", "ArrowUp"):
        tab.focus(".live select")
        if key:
            tab.keyboard.press(key)
        tab.evaluate(FINISHED)
        chosen = tab.evaluate("document.querySelector('.live select').selectedIndex")
        seen.append((chosen, tab.inner_text(".live-words"), tab.evaluate(MARKS)))
    assert [chosen for chosen, *_ in seen] == [0, 1, 0]
    assert seen[0] == seen[2]
    assert seen[0][1] != seen[1][1]
    assert name == "ladder" or seen[0][2] != seen[1][2]
    assert tab.query_selector(".live select").evaluate("(select) => select.labels.length") == 1
    assert tab.complaints == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_tab_walks_through_every_control_once_and_leaves(tab: Any, shelf: Shelf, name: str) -> None:
    """In the order that they are read in: line by line, and the gap in the picture below last."""
    content = shelf.widget(name).to_html()
    before, after = "<button id='before'>b</button>", "<button id='after'>a</button>"
    opened(tab, shelf.put(f"{name} tab", before + content + after))
    there = """() => [...document.querySelector('.live').querySelectorAll(
      'input, select, button, [tabindex]')].map((one) => {
        const { x, y, height } = one.getBoundingClientRect();
        return [one.dataset.name ?? one.dataset.handle, 'name' in one.dataset, x, y + height / 2];
      })"""
    stops = tab.evaluate(there)
    names = [stop for stop, *_ in stops]
    assert len(names) == len(set(names)) >= 3
    controls = [(x, y) for _, control, x, y in stops if control]
    for (x, y), (next_x, next_y) in itertools.pairwise(controls):
        assert next_y > y + 14 or (abs(next_y - y) <= 14 and next_x > x)
    handles = [y for _, control, _, y in stops if not control]
    assert [control for _, control, *_ in stops] == [True] * len(controls) + [False] * len(handles)
    assert all(y > controls[-1][1] + 14 for y in handles)
    now = """() => { const { dataset, id } = document.activeElement;
      return dataset.name ?? dataset.handle ?? id; }"""
    tab.focus("#before")
    walked = []
    for _ in range(len(names) + 1):
        tab.keyboard.press("Tab")
        walked.append(tab.evaluate(now))
    assert walked == [*names, "after"]
    tab.keyboard.press("Shift+Tab")
    assert tab.evaluate(now) == names[-1]
    assert tab.complaints == []


LISTEN = """async ([name, value]) => {
  const spoken = document.querySelector('.live-spoken');
  window.heard = [];
  new MutationObserver(() => heard.push(spoken.textContent)).observe(
    spoken, { childList: true, characterData: true, subtree: true });
  const slider = document.querySelector(`[data-name=${name}]`);
  for (let i = 1; i <= 20; i++) {
    slider.value = Number(slider.min) + ((value - slider.min) * i) / 20;
    slider.dispatchEvent(new Event('input'));
    await new Promise((done) => setTimeout(done, 40));
  }
  return [spoken.textContent, heard];
}"""
"""Drag a slider from its lower end in 0.8 seconds."""

DRAGS = {
    "break even": ("events", 3.5, "For 3,200 events"),
    "faults": ("bias", 0.5, "sloped to the right"),
    "gap": ("length", 16, "16 of 32 times are missing"),
    "holes": ("length", 3, "3 of 5 times are missing"),
    "ladder": ("steps", 3, "After 3 steps"),
    "landscape": ("length", 3, "3 of 10 times are missing"),
}
"""Which slider, to where, and what is said of it."""


@pytest.mark.parametrize("name", DRAGS)
def test_a_screen_reader_hears_where_a_drag_has_ended(tab: Any, shelf: Shelf, name: str) -> None:
    """Nothing on the way, and the words under the picture when the hand rests: at once, and again
    where the rest of the picture has come later."""
    opened(tab, shelf.address(name))
    region = tab.query_selector(".live-spoken")
    assert region.get_attribute("role") == "status"
    assert tab.query_selector(".live-words").get_attribute("role") is None, "said twice"
    same = """() => document.querySelector('.live-spoken').textContent
      === document.querySelector('.live-words').textContent"""
    tab.evaluate(FINISHED)
    tab.wait_for_function(same)
    first = region.text_content()
    assert first
    slider, end, words = DRAGS[name]
    during, heard = tab.evaluate(LISTEN, [slider, end])
    assert (during, heard) == (first, [])
    tab.evaluate(FINISHED)
    tab.wait_for_function(f"() => heard.length && ({same})()")
    heard = tab.evaluate("heard")
    assert len(heard) <= 2
    assert heard[-1] == tab.inner_text(".live-words") != first
    assert words in heard[-1]
    assert tab.complaints == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_widget_has_its_text_alternatives(tab: Any, shelf: Shelf, name: str) -> None:
    """A sentence for the still picture, words under the live one, and a name for each panel."""
    widget = shelf.widget(name)
    opened(tab, shelf.address(name))
    alt = re.search(r'<img alt="([^"]*)"', widget.to_html())[1]
    assert alt.startswith(f"{widget.title}. ")
    for sentence in (alt, tab.inner_text(".live-words")):
        assert len(sentence.split()) > 8
        assert sentence.endswith(".")
    assert tab.get_attribute(".live", "aria-label") == widget.title
    panels = tab.query_selector_all(".live-plot > [role=img]")
    assert len(panels) == len(tab.query_selector_all(".live-plot")) >= 1
    assert all(len(panel.get_attribute("aria-label").split()) > 5 for panel in panels)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_phone_shows_all_of_it(browser: Any, shelf: Shelf, name: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 800})
    tab = opened(context.new_page(), shelf.address(name))
    wide = """() => [...document.querySelectorAll('.live *')].filter(
      (node) => node.getBoundingClientRect().right > document.documentElement.clientWidth
    ).map((node) => node.outerHTML.slice(0, 80))"""
    assert tab.evaluate(wide) == []
    context.close()


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_barrier_is_found(tab: Any, shelf: Shelf, name: str) -> None:
    """axe-core's rules for WCAG 2.1 AA."""
    opened(tab, shelf.address(name))
    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
    found = Axe().run(tab, options=rules).response["violations"]
    assert [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found] == []


# --- mouse and finger ---


IN_SIGHT = """(node) => {
  node.scrollIntoView({ block: 'center' });
  const { x, y, width, height } = node.getBoundingClientRect();
  return [x + width / 2, y + height / 2, width];
}"""
"""Where the middle of an element is, and how wide it is."""

SHARE = "(slider) => (slider.value - slider.min) / (slider.max - slider.min)"

GAP = """(live) => ['start', 'length'].map(
  (name) => Number(live.querySelector(`[data-name=${name}]`).value))"""


def by_mouse(tab: Any, x: float, y: float, to: float) -> None:
    tab.mouse.move(x, y)
    tab.mouse.down()
    for share in (0.5, 1.0):
        tab.mouse.move(x + share * (to - x), y)
    tab.mouse.up()


def by_finger(tab: Any, x: float, y: float, to: float) -> None:
    touch = tab.context.new_cdp_session(tab)
    for kind, share in (("Start", 0.0), ("Move", 0.5), ("Move", 1.0), ("End", None)):
        points = [] if share is None else [{"x": x + share * (to - x), "y": y}]
        touch.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})
        if kind == "Move":
            tab.wait_for_timeout(40)  # moves of a finger are handed on with the next frame
    touch.detach()


def test_all_that_is_dragged_follows_mouse_and_finger(tab: Any, shelf: Shelf) -> None:
    """Every slider, by one or the other, and the gap and its edges on the plots that have them, by
    both, on one page of all widgets."""
    kinds = ("break even", "faults", "gap", "holes", "ladder", "landscape")
    opened(tab, shelf.put("all", "".join(shelf.widget(name).to_html() for name in kinds)))
    for kind, live in zip(kinds, tab.query_selector_all(".live"), strict=True):
        for i, slider in enumerate(live.query_selector_all("input[type=range]")):
            drag, share = ((by_mouse, 0.2), (by_finger, 0.8))[i % 2]
            x, y, width = slider.evaluate(IN_SIGHT)
            drag(tab, x, y, x + (share - 0.5) * width)
            assert abs(slider.evaluate(SHARE) - share) < 0.15, (kind, i, drag)
        if kind in ("break even", "faults"):  # they have no gap
            continue
        for name, position in (("start", 1), ("length", 2)):
            live.query_selector(f"[data-name={name}]").fill(str(position))
        step = live.query_selector("[data-handle=body]").evaluate(IN_SIGHT)[2] / 2
        for drag, handle, by, expected in (
            (by_mouse, "right", 2, [1, 4]),
            (by_finger, "left", 1, [2, 3]),
            (by_finger, "body", -2, [0, 3]),
            (by_mouse, "left", 5, [3, 0]),  # beyond the other edge: nothing, and never less
        ):
            x, y, _ = live.query_selector(f"[data-handle={handle}]").evaluate(IN_SIGHT)
            drag(tab, x, y, x + by * step)
            assert live.evaluate(GAP) == expected, (kind, handle, drag)
    assert tab.complaints == []


# --- the gap explorer ---


def test_the_gap_is_moved_by_keys(tab: Any, shelf: Shelf) -> None:
    opened(tab, shelf.address("gap"))
    for handle, key, expected in (
        ("body", "ArrowRight", (11, 10)),
        ("left", "ArrowLeft", (10, 11)),
        ("right", "PageUp", (10, 16)),
        ("right", "End", (10, 22)),
        ("body", "Home", (0, 22)),
    ):
        tab.focus(f"[data-handle={handle}]")
        tab.keyboard.press(key)
        assert (value(tab, "start"), value(tab, "length")) == expected
    slider = tab.query_selector("[data-handle=right]")
    assert slider.get_attribute("role") == "slider"
    assert slider.get_attribute("aria-valuenow") == "22"


def test_the_page_says_what_amortlib_says(tab: Any, shelf: Shelf) -> None:
    """The sentence under the picture, at 40 positions: one nat in 10,000 may be rounded apart."""
    widget = shelf.widget("gap")
    assert isinstance(widget, GapExplorer)
    opened(tab, shelf.address("gap"))
    rng = np.random.default_rng(0)
    for _ in range(40):
        at = {
            "start": int(rng.integers(32)),
            "length": int(rng.integers(33)),
            "event": int(rng.integers(20)),
            "noise": round(0.05 * int(rng.integers(2, 21)), 2),
        }
        put(tab, widget, at)
        said, expected = tab.inner_text(".live-words"), widget.picture().words()
        number = r"\d+(?:\.\d+)?"
        assert re.sub(number, "#", said) == re.sub(number, "#", expected)
        numbers = [[float(n) for n in re.findall(number, text)] for text in (said, expected)]
        np.testing.assert_allclose(*numbers, atol=0.0101)
        assert abs(numbers[0][-1] - numbers[1][-1]) <= 2.1e-4


# --- the others ---


def test_ranks_on_the_page_are_those_of_numpy(tab: Any, shelf: Shelf) -> None:
    """The same noise on both sides: the same histograms in the same words."""
    widget = shelf.widget("faults")
    assert isinstance(widget, FaultExplorer)
    opened(tab, shelf.address("faults"))
    rng = np.random.default_rng(0)
    for _ in range(20):
        at = {
            "bias": round(0.05 * int(rng.integers(-20, 21)), 2),
            "width": round(0.05 * int(rng.integers(10, 41)), 2),
            "correlation": round(0.05 * int(rng.integers(-19, 20)), 2),
        }
        put(tab, widget, at)
        assert tab.inner_text(".live-words") == widget.picture().words()


def test_what_a_kernel_has_answered_is_drawn_beside_the_page(tab: Any, shelf: Shelf) -> None:
    """The oracle's minima, solved by the kernel: as many paths, and where the page's own are."""
    widget = energy_landscape(
        window(), length=8, event=1, compare=oracle_minima(window()), label="the oracle"
    )
    opened(tab, shelf.put("kernel", widget.to_html()))
    assert "the oracle" in tab.inner_text(".live-legend")
    ends = """(dash) => [...document.querySelector('.live-plot').querySelectorAll('path')]
      .filter((path) => (path.getAttribute('stroke-dasharray') ?? '') === dash)
      .flatMap((path) => path.getAttribute('d').split('M').slice(1))
      .map((line) => Number(line.match(/-?[\\d.]+/g).at(-1)))"""
    theirs = sorted(tab.evaluate(ends, "2 4"))
    assert len(theirs) == len(widget.overlay["states"]) >= 1
    best = tab.evaluate(ends, "")
    assert all(min(abs(y - other) for other in best) < 1.0 for y in theirs[:2])
    assert tab.complaints == []


PATHS = """(live, dash) => [...live.querySelectorAll('.live-plot')].map(
  (plot) => [...plot.querySelectorAll('path[stroke="#1a1a1a"]')].filter(
    (path) => (path.getAttribute('stroke-dasharray') ?? '') === dash)
  .flatMap((path) => path.getAttribute('d').match(/-?[\\d.]+/g) ?? []).map(Number))"""
"""Coordinates of the lines in black, by plot."""


def test_ranks_and_costs_of_ones_own_are_drawn_beside_the_page(tab: Any, shelf: Shelf) -> None:
    """A histogram of a hundred in each bin is flat, and a line stands for the costs of a method, by
    what the solver and the head cost."""
    ranks = fault_explorer(compare=np.arange(500) % 100, label="even ranks")
    costs = {"solver": 1.0, "head": 1e-3, "training": 50.0, "share": 0.1}
    solver = break_even(**costs, compare=(0.0, 0.2011), label="mine")
    head = break_even(**costs, compare=(90.0, 0.5), label="mine")
    slow = break_even(**costs, compare=(90.0, 2.0), label="mine")
    widgets = (ranks, solver, head, slow)
    opened(tab, shelf.put("own", "".join(widget.to_html() for widget in widgets)))
    first, *others = tab.locator(".live").all()
    assert "even ranks" in first.locator(".live-legend").inner_text()
    assert first.locator(".live-words").inner_text().endswith(ranks.overlay["said"])
    component, energy, coverage = first.evaluate(PATHS, "")
    assert len(component) == 2 * 20
    assert len(set(component[1::2])) == 1
    assert energy == []
    assert len(coverage) == 2 * len(LEVELS)
    np.testing.assert_allclose(np.diff(coverage[::2]), coverage[2] - coverage[0], atol=0.11)

    for live, words in zip(
        others,
        (
            "201 ms an event; the head is ahead of it from 500 events on.",
            "500 ms an event, 1.5 min of training; it is ahead of the solver from 180 events on.",
            "2 s an event, 1.5 min of training; it is ahead of the solver at no number of events.",
        ),
        strict=True,
    ):
        assert "mine" in live.locator(".live-legend").inner_text()
        assert live.locator(".live-words").inner_text().endswith(f" “mine”: {words}")
        (line,) = live.evaluate(PATHS, "2 4")
        assert len(line) == 2 * 71
        assert (np.diff(line[1::2]) < 0.05).all(), "costs rise, and pixels count from above"
    assert tab.complaints == []


def test_the_page_finds_the_minima_that_amortlib_finds(tab: Any, shelf: Shelf) -> None:
    """Two searches, one by numbers of JavaScript and one by jax, agree on what there is: how high
    the second minimum is and what Laplace's region holds, to six standard errors of 2,500 weighted
    draws. At most one of 12 positions may have a minimum that only one of them ran into."""
    widget = shelf.widget("landscape")
    assert isinstance(widget, EnergyLandscape)
    opened(tab, shelf.address("landscape"))
    rng = np.random.default_rng(1)
    apart = 0
    for _ in range(12):
        at = {"start": int(rng.integers(4)), "length": int(rng.integers(11))}
        at["event"] = int(rng.integers(20))
        put(tab, widget, at)
        tab.wait_for_function("document.querySelector('.live-words').textContent.includes('holds')")
        said, picture = tab.inner_text(".live-words"), widget.picture()
        assert f"{(~picture.mask).sum()} of 10 times" in said
        inside = float(re.search(r"holds (\d+)%", said)[1]) / 100
        minima = re.search(r"has (\d+) minima .* second ([\d.]+) nats", said)
        if (int(minima[1]) if minima else 1) != picture.minima:
            apart += 1
            continue
        if minima:
            assert abs(float(minima[2]) - picture.rise) <= 0.051
        assert abs(inside - picture.inside) < 0.005 + 6 * np.sqrt(0.25 / 600)
    assert apart <= 1


def shares(tab: Any) -> dict[str, int]:
    """Percent of the draws of each answer with x above zero, when all have come in."""
    tab.wait_for_function(
        "document.querySelector('.live-words').textContent.includes('above zero')", timeout=60_000
    )
    said = tab.inner_text(".live-words").split("above zero:")[1]
    return {name.strip(): int(n) for name, n in re.findall(r"([A-Za-z ]+) (\d+)%", said)}


ROADS = ("score by ODE", "score by SDE")


def test_the_posterior_splits_when_the_first_time_is_hidden(tab: Any, shelf: Shelf) -> None:
    """Both pieces weigh one half: of 200 draws, within five standard errors; the heads are allowed
    their measured errors beside that. Laplace is on one side, and with no gap everyone is."""
    opened(tab, shelf.address("holes"))
    tab.evaluate(PUT, {"event": 11, "start": 0, "length": 1})
    found = shares(tab)
    assert set(found) == {"posterior", "Laplace", "regression", "flow", *ROADS}
    assert found.pop("Laplace") in (0, 100)
    tab.select_option("[data-name=shown]", "flow")
    paths = f".live-plot path[stroke-width='0.8'][stroke='{COLOURS['amortized']}']"
    tab.wait_for_selector(paths, state="attached")  # in the colour of their answer
    for name, share in found.items():
        assert abs(share - 50) < 100 * 5 * np.sqrt(0.25 / 200) + 5, name
    for event in (2, 11):
        tab.evaluate(PUT, {"event": event, "length": 0})
        found = shares(tab)
        assert len({round(share, -1) for share in found.values()}) == 1, found
        assert max(found.values()) <= 5 or min(found.values()) >= 95
    assert tab.complaints == []


WRITES = """window.writes = new Map();
new MutationObserver((records) => {
  for (const mark of new Set(records.map(({ target }) => target)))
    writes.set(mark, 1 + (writes.get(mark) ?? 0));
}).observe(document, { subtree: true, attributeFilter: ['d'] });"""
"""How often each mark has been drawn."""


@pytest.mark.parametrize("name", ["holes", "ladder", "landscape"])
@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_who_wants_no_motion_sees_no_picture_grow(
    browser: Any, shelf: Shelf, name: str, motion: str
) -> None:
    """Nothing is drawn little by little: one picture without what comes later, and one with it. Who
    has not asked for that sees draws and ranks come in."""
    context = browser.new_context(reduced_motion=motion, offline=True)
    page = context.new_page()
    page.add_init_script(WRITES)
    tab = opened(page, shelf.address(name))
    most = """async () => { const most = Math.max(...writes.values()); writes.clear();
      return [most, document.getAnimations().length]; }"""
    tab.evaluate(FINISHED)
    first, animations = tab.evaluate(most)
    assert animations == 0
    if motion == "reduce":
        assert first <= 2
        tab.evaluate(PUT, {"event": 7})
        tab.evaluate(FINISHED)
        assert 1 <= tab.evaluate(most)[0] <= 2
    else:  # the first picture is shown so on a slow machine too
        assert first > 2
    context.close()


def test_the_gates_of_the_page_are_those_of_amortlib(tab: Any, shelf: Shelf) -> None:
    """Distance and Jacobian error of windows with and without a gap, after 0 and 2 steps, in both
    ways of differentiating, against the oracle and the statistics of the package."""
    widget = shelf.widget("ladder")
    assert isinstance(widget, RefinementLadder)
    opened(tab, shelf.address("ladder"))
    places = [(event, length) for event in (0, 3, 7) for length in (0, 2)]
    with jax.enable_x64(True):
        problem, model = widget.problem, to_double(widget.model)
        energy = Energy(problem.prior, problem.forward)
        _, drawn = jax.vmap(lambda i: problem.simulate(jax.random.key(i)))(jnp.arange(8))
        which = jnp.array([event for event, _ in places])
        seen = jax.vmap(lambda n: gap(5, 1, n))(jnp.array([length for _, length in places]))
        mask = jnp.broadcast_to(seen[..., None], drawn.y[which].shape)
        events = Event(drawn.y[which], mask, jnp.full(mask.shape, float(problem.obs_noise.sd)))
        analysis = Oracle(energy)(events, key=jax.random.key(0))

        @eqx.filter_jit
        def figures(steps, derivative, event, best, covariance, jacobian):
            def mode(y):
                here = eqx.tree_at(lambda e: e.y, event, y)
                v = energy.prior.whiten(model(here).mean())
                return energy.prior.colour(
                    refine(energy, v, here, steps=steps, derivative=derivative)
                )

            slope = jax.jacfwd(mode)(event.y)
            near = mode_distance(mode(event.y), best, covariance)
            return near, jacobian_error(slope, jacobian, event.mask)

        for steps, derivative in ((0, "unrolled"), (2, "unrolled"), (2, "implicit")):
            for i, (event, length) in enumerate(places):
                oracle = (analysis.mode[i], analysis.covariance[i], analysis.jacobian[i])
                one = jax.tree.map(lambda a, i=i: a[i], events)
                near, slope = figures(steps, derivative, one, *map(jnp.asarray, oracle))
                tab.select_option("[data-name=derivative]", derivative)
                at = {"event": event, "start": 1, "length": length, "steps": steps}
                tab.evaluate(PUT, at)
                said = tab.inner_text(".live-words")
                found = re.search(r"is ([\d.]+) sd .* off by (?:more than )?([\d.]+)%", said)
                assert abs(float(found[1]) - min(float(near), 1e9)) <= 0.0051 + 1e-3 * float(near)
                if "more than" not in said:
                    slope = 100 * float(slope)
                    assert abs(float(found[2]) - slope) <= 0.051 + 1e-3 * slope


def test_steps_take_j_down_as_amortlib_takes_them(tab: Any, shelf: Shelf) -> None:
    """The widget's own record of J along the way never rises, and ends at the page's minimum."""
    widget = shelf.widget("ladder")
    assert isinstance(widget, RefinementLadder)
    way = widget.way()
    assert (np.diff(way) <= 1e-12).all()
    opened(tab, shelf.address("ladder"))
    tab.evaluate(PUT, {"event": 0, "start": 0, "length": 0, "steps": 6})
    assert "is 0.00 sd from the oracle's" in tab.inner_text(".live-words")


def test_the_lines_cross_where_the_formula_says(tab: Any, shelf: Shelf) -> None:
    widget = shelf.widget("break even")
    assert isinstance(widget, BreakEven)
    opened(tab, shelf.address("break even"))
    for at in (
        {"training": 1.8, "solver": -2.4, "head": -5.0, "share": 0.0},
        {"training": 3.0, "solver": 2.0, "head": -4.0, "share": 0.25},
        {"training": 3.0, "solver": -4.0, "head": -3.0, "share": 0.0},
    ):
        put(tab, widget, at)
        even = widget.break_even()
        words = "never pays" if np.isinf(even) else f"from {np.ceil(even):,.0f} events on"
        assert words in tab.inner_text(".live-words")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"solver": 0.0}, "1e-5 <= solver"),
        ({"training": 1e9}, "training <= 1e6"),
        ({"compare": 3.0}, "expected the pair .* got 3.0"),
        ({"compare": (-1.0, 1.0)}, "got -1.0 and 1.0"),
        ({"compare": (0.0, 0.0)}, "got 0.0 and 0.0"),
    ],
)
def test_costs_beyond_the_sliders_are_refused(bad: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        break_even(**({"solver": 1e-3, "head": 1e-6, "training": 10.0} | bad))


# --- pictures that take long ---


LONG = """<div id="here"></div><script>%s
const counts = { pieces: 0, drawn: [], shown: [], cleared: [] };
const model = new live.StaticModel({ title: "long", at: 0 });
const stage = new m_stage.Stage(document.querySelector("#here"), model);
const slider = stage.slider({ name: "at", label: "at", min: 0, max: 100 });
const axis = { label: "", from: 0, to: 100 };
const plot = stage.plot({ label: "long", x: axis, y: axis });
stage.handle(plot, { label: "at", min: () => 0, max: () => 100, get: () => stage.get("at"),
                     put: (at) => stage.set({ at }), place() {} });
const busy = (ms) => { const until = performance.now() + ms; while (performance.now() < until); };
stage.watch("at");
stage.begin(function* () {
  const at = stage.get("at");
  for (let i = 0; i < 4; i++) {
    busy(10); // longer than a move may take, on any machine
    counts.pieces++;
    if (at === 99 && i === 2) throw new Error("no 99");
    yield;
  }
  counts.drawn.push(at);
  stage.later(function* () { for (let i = 0; i < 4; i++) { busy(10); counts.pieces++; yield; } },
              (done) => counts.shown.push([at, done]), () => counts.cleared.push(at));
  return `the picture of ${at}`;
});
const move = (at) => { slider.value = at; slider.dispatchEvent(new Event("input")); };
const said = () => ["output", ".live-words"].map((one) => document.querySelector(one).textContent);
const now = () => [...said(),
  document.querySelector(".live-handle").getAttribute("aria-valuenow"),
  document.querySelector(".live").getAttribute("aria-busy")];
const frames = async (n) => { while (n--) await new Promise(requestAnimationFrame); };
</script>"""
"""A widget whose picture takes longer than a frame, and what may be asked of it."""


@pytest.fixture
def long(tab: Any, shelf: Shelf) -> Any:
    return opened(tab, shelf.put("long", LONG % bundle()))


def test_a_move_is_shown_before_its_picture_and_none_is_lost(long: Any) -> None:
    """Two moves, the second while the picture of the first is being drawn: control and handle show
    them at once, and the last picture is that of the last."""
    first, second = long.evaluate("""async () => {
      const before = counts.pieces;
      move(1);
      const first = now();
      while (counts.pieces === before) await frames(1);
      move(2);
      return [first, now()];
    }""")
    assert first == ["1", "the picture of 0", "1", "true"]
    assert second == ["2", "the picture of 0", "2", "true"]
    long.evaluate(DRAWN)
    assert long.evaluate("now()") == ["2", "the picture of 2", "2", None]
    assert long.evaluate("counts.drawn") == [0, 1, 2], "what has been begun is finished"
    assert long.complaints == []


def test_pictures_are_drawn_however_fast_the_moves_come(long: Any) -> None:
    moves = "async () => { for (let i = 1; i <= 60; i++) { move(i); await frames(1); } }"
    long.evaluate(moves)
    between = long.evaluate("counts.drawn")
    long.evaluate(DRAWN)
    drawn = long.evaluate("counts.drawn")
    assert len(between) > 2, "some on the way"
    assert len(drawn) < 60, "and not all"
    assert drawn == sorted(drawn)
    assert drawn[-1] == 60
    assert long.evaluate("said()") == ["60", "the picture of 60"]


def test_an_error_in_a_later_piece_is_said(long: Any) -> None:
    assert long.evaluate("() => { move(99); return said()[0]; }") == "99", "not in the move itself"
    long.wait_for_selector(".live-error")
    assert "cannot go on: no 99" in long.inner_text(".live-error")
    assert long.get_attribute(".live", "aria-busy") is None
    pieces = long.evaluate("counts.pieces")
    long.evaluate("frames(10)")
    assert long.evaluate("counts.pieces") == pieces


def test_the_page_says_until_when_a_picture_is_unfinished(long: Any) -> None:
    """Also when its first part is there and the rest comes later; not after it has failed."""
    begun = f"""async (at) => {{ move(at); await ({DRAWN})();
      return [document.querySelector('.live').matches('[data-later]'), counts.shown.at(-1)]; }}"""
    long.evaluate(FINISHED)
    assert long.evaluate(begun, 1) == [True, [0, True]]
    long.evaluate(FINISHED)
    assert long.evaluate("counts.shown.at(-1)") == [1, True]
    assert long.evaluate(begun, 2)[0]
    unsaid = """() => { stage.fail(new Error("no more"));
      return !document.querySelector('.live').matches('[data-later], [aria-busy]'); }"""
    assert long.evaluate(unsaid)


@pytest.mark.parametrize("when", ["move(1)", "move(1); await frames(1)", "move(1); move(2)"])
def test_a_widget_that_is_taken_down_leaves_nothing_running(long: Any, when: str) -> None:
    pieces = long.evaluate(f"async () => {{ {when}; stage.end(); return counts.pieces; }}")
    long.evaluate("frames(20)")
    assert long.evaluate("counts.pieces") == pieces
    assert long.evaluate("counts.drawn") == [0]
    assert long.complaints == []


def test_on_a_slow_machine_what_comes_later_is_shown_once(long: Any) -> None:
    """At the end, not for a picture that another follows; what an earlier one left is cleared."""
    long.evaluate(
        "async () => { for (const at of [1, 2, 3, 4, 5, 6]) { move(at); await frames(20); } }"
    )
    assert long.evaluate("stage.slow")
    long.evaluate("counts.shown.length = 0")
    long.evaluate("async () => { move(7); move(8); await frames(1); move(9); }")
    long.wait_for_function("counts.shown.length")
    long.evaluate("frames(20)")
    assert long.evaluate("counts.shown") == [[9, True]]
    assert long.evaluate("counts.cleared").count(9) == 1


@pytest.mark.parametrize("name", ["faults", "gap", "landscape"])
def test_a_slow_machine_shows_what_a_fast_one_shows(tab: Any, shelf: Shelf, name: str) -> None:
    """Keys one after the other with the processor slowed down: the same picture in the end."""
    last = "holds" if name == "landscape" else ""
    settled = "(last) => document.querySelector('.live-words').textContent.includes(last)"
    seen = []
    for rate in (1, 8):
        opened(tab, shelf.address(name))
        tab.context.new_cdp_session(tab).send("Emulation.setCPUThrottlingRate", {"rate": rate})
        slider = tab.query_selector(".live input[type=range]")
        slider.focus()
        for _ in range(3):
            tab.keyboard.press("ArrowRight")
        tab.evaluate(DRAWN)
        tab.wait_for_function(settled, arg=last)
        marks = "[...document.querySelectorAll('.live-plot')].map((plot) => plot.innerHTML)"
        seen.append([slider.input_value(), tab.inner_text(".live-words"), *tab.evaluate(marks)])
    assert seen[0] == seen[1]
    assert tab.complaints == []


# --- what cannot be shown is said ---


def test_a_widget_without_a_still_picture_cannot_be_made() -> None:
    class Nothing(LiveWidget):
        pass

    with pytest.raises(TypeError, match=r"abstract method '?still'?"):
        Nothing(kind="gap")


def test_weights_of_another_version_are_refused_in_words(tab: Any, shelf: Shelf) -> None:
    widget = shelf.widget("gap")
    content = widget.to_html()
    state = json.loads(re.search(r"<script[^>]*>(.*)</script>", content, re.DOTALL)[1])

    data = base64.b64decode(state["heads"]["amortized"]["base64"])
    for old, new, words in (
        (b'"version":"1"', b'"version":"7"', "format version 1, got version 7"),
        (data[-40:-20], b"\0" * 20, "one that is damaged"),
    ):
        assert old in data
        other = dict(state)
        other["heads"] = {
            "amortized": {"base64": base64.b64encode(data.replace(old, new)).decode()}
        }
        script = f'<script type="application/json">{json.dumps(other)}</script>'
        page = re.sub(
            r"<script.*</script>", lambda _, script=script: script, content, flags=re.DOTALL
        )
        opened(tab, shelf.put("broken", page))
        assert words in tab.inner_text("[role=alert]")
        assert tab.query_selector(".live-still img"), "the still picture stays"


def test_a_page_without_its_script_shows_the_picture(tab: Any, shelf: Shelf) -> None:
    widget = shelf.widget("gap")
    page = PAGE.format(widget.to_html()).replace("live.js", "nowhere.js")
    (shelf.folder / "bare.html").write_text(page, encoding="utf-8")
    tab.goto((shelf.folder / "bare.html").as_uri())
    assert tab.query_selector(".live-still img").get_attribute("alt")
    assert "needs JavaScript" in tab.inner_text(".live-still")


ON_PAPER = """(width) => {
  const main = document.querySelector('main');
  main.style.width = `${width}px`;
  const edge = main.getBoundingClientRect().right + 1;
  const there = (node) => node.checkVisibility() && node.getClientRects().length > 0;
  const own = [...main.querySelectorAll('.live, .live *:not(svg *)')].filter(there);
  const frames = [...main.querySelectorAll('.live-plot')].map((plot) => {
    const { width, height } = plot.getBoundingClientRect();
    const { width: w, height: h } = plot.viewBox.baseVal;
    return { scale: width / w, stretched: Math.abs(width / w - height / h),
             marks: plot.querySelectorAll('path:not([d=""])').length };
  });
  const controls = [...main.querySelectorAll('input, select, button, output, .live-handle')];
  return { frames, controls: controls.filter(there).length,
           wide: own.filter((node) => node.getBoundingClientRect().right > edge)
             .map((node) => node.outerHTML.slice(0, 80)) };
}"""
"""A printer lays the page out at the paper's width, and runs no script that could draw anew."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_on_paper_the_picture_stands_alone(tab: Any, shelf: Shelf, name: str) -> None:
    """No control; the whole picture within the page, A4 upright or half as wide, and its words."""
    opened(tab, shelf.address(name))
    tab.evaluate(FINISHED)
    tab.emulate_media(media="print")
    for width in (700, 340):
        found = tab.evaluate(ON_PAPER, width)
        assert found["controls"] == 0
        assert found["wide"] == []
        assert found["frames"]
        for frame in found["frames"]:
            assert frame["stretched"] < 0.01
            assert 0.3 < frame["scale"] < 1.01
            assert frame["marks"] > 3
    assert tab.is_visible(".live-words")
    assert tab.is_visible(".live-legend")


# --- the bundle ---


def test_the_bundle_imports_nothing() -> None:
    script = page_script()
    assert not re.search(r"^\s*(import|export)\b", script, re.MULTILINE)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", script)
    assert "startAll" in bundle()


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ({"a.mjs": 'import { b } from "./b.mjs";\n'}, "expected the module b.mjs, which a.mjs"),
        (
            {
                "a.mjs": 'import { b } from "./b.mjs";\n',
                "b.mjs": 'import { a } from "./a.mjs";\n',
            },
            "without a cycle",
        ),
        ({"a.mjs": "export default 3;\n"}, "expected imports and exports by name"),
        ({"a.mjs": 'import b from "./b.mjs";\n'}, "expected imports and exports by name"),
    ],
)
def test_a_source_of_another_form_is_refused(tmp_path: Path, sources: dict, words: str) -> None:
    for name, text in sources.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=words):
        bundle("a.mjs", tmp_path)
