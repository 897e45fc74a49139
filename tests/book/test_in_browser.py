"""Every page in a browser: offline, without errors, at phone and desktop width, light and dark."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from tools.chapters import toc_names

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "_build" / "screenshots"

pytestmark = pytest.mark.slow

NAMES = toc_names(ROOT)

SETTLED = """async () => {
  await document.fonts.ready;
  if (window.MathJax && window.MathJax.startup) await window.MathJax.startup.promise;
}"""

OPEN_EVERYTHING = """() => {
  for (const admonition of document.querySelectorAll('.admonition.dropdown.toggle-hidden'))
    admonition.querySelector('button.toggle-button').click();
  for (const details of document.querySelectorAll('details')) details.open = true;
}"""

TOO_WIDE = """() => {
  const width = document.documentElement.clientWidth;
  const own = ['auto', 'scroll', 'hidden', 'clip'];
  const scrolls = (node) => {
    for (let up = node; up && up !== document.body; up = up.parentElement)
      if (own.includes(getComputedStyle(up).overflowX)) return true;
    return false;
  };
  const wide = [...document.querySelectorAll('article *')].filter(
    (node) => node.getBoundingClientRect().right > width + 1 && !scrolls(node));
  return {page: document.documentElement.scrollWidth, width,
          wide: wide.slice(0, 5).map((node) => node.outerHTML.slice(0, 120))};
}"""


STILL = """[...document.querySelectorAll('[data-live]')].filter(
  (host) => !host.querySelector('.live-plot') || host.querySelector('[role=alert], .live-still')
).map((host) => host.dataset.live)"""

REACHED = """() => [...document.querySelectorAll('article mjx-container')].every(
  (box) => box.scrollWidth <= box.clientWidth + 1 || box.tabIndex === 0
    || getComputedStyle(box).overflowX === 'visible')"""

CUT_OFF = """[...document.querySelectorAll('div.math mjx-container')].filter(
  (box) => box.querySelector('mjx-math').getBoundingClientRect().width > box.clientWidth + 1
).map((box) => box.closest('div.math').id)"""


class Watch:
    """What a page asks for and complains of."""

    def __init__(self, page: Any, own: str) -> None:
        self.complaints: list[str] = []
        self.answers: list[Any] = []
        page.on("request", lambda request: self._request(request.url, own))
        page.on("requestfailed", lambda request: self._note(f"failed: {request.url}"))
        page.on("response", lambda response: self._response(response))
        page.on("pageerror", lambda error: self._note(f"error: {error}"))
        page.on("console", lambda message: self._console(message))

    def _note(self, text: str) -> None:
        self.complaints.append(text)

    def _request(self, url: str, own: str) -> None:
        if not url.startswith((own, "data:", "blob:")):
            self._note(f"asks for {url}")

    def _response(self, response: Any) -> None:
        self.answers.append(response)
        if response.status >= 400:
            self._note(f"{response.status}: {response.url}")

    def weights(self) -> dict[str, int]:
        """Bytes of all that was fetched, compressed as a server sends it."""
        return {a.url: len(gzip.compress(a.body(), 6)) for a in self.answers}

    def _console(self, message: Any) -> None:
        if message.type in {"error", "warning"}:
            self._note(f"console {message.type}: {message.text}")


VIEWS = (("http", 1280, ("light", "dark")), ("file", 360, ("dark", "light")))
"""From a server at a desktop's width and from disk at a phone's, in both schemes: a page is loaded
in the first, and follows the system to the second."""

FILTERS = """[...document.querySelectorAll('article .cell_output img')].map(
  (image) => getComputedStyle(image).filter).filter((filter) => filter !== 'none')"""


@pytest.fixture
def base(source: str, request: pytest.FixtureRequest, html: Path) -> str:
    """Where the book is read from."""
    return request.getfixturevalue("site") if source == "http" else html.as_uri()


@pytest.fixture
def tab(browser: Any, width: int, schemes: tuple[str, str]) -> Iterator[Any]:
    """A fresh tab with nothing stored."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=schemes[0], reduced_motion="reduce"
    )
    yield context.new_page()
    context.close()


def mathematics_is_set(page: Any) -> None:
    formulas, containers, errors = page.evaluate(
        "[document.querySelectorAll('article .math').length,"
        " document.querySelectorAll('article .math mjx-container').length,"
        " document.querySelectorAll('mjx-merror, [data-mjx-error]').length]"
    )
    font = "[...document.fonts].some(f => f.family.startsWith('MJX') && f.status === 'loaded')"
    assert errors == 0
    assert containers >= formulas
    assert not formulas or page.evaluate(font), "the fonts of the formulas were not loaded"
    assert page.evaluate(CUT_OFF) == [], "formulas wider than the text, on a desktop"


def a_first_view_weighs_little(watch: Watch) -> None:
    """At most 2 MB, with nothing kept from an earlier page."""
    weights = watch.weights()
    heaviest = sorted(weights.items(), key=lambda item: -item[1])[:5]
    assert len(weights) > 5
    assert sum(weights.values()) <= 2_000_000, heaviest


EVERY_RULE = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
OF_COLOURS = {"type": "rule", "values": ["color-contrast", "link-in-text-block"]}
"""The rules among them whose answer another scheme can change."""


def no_barrier_is_found(page: Any, rules: dict[str, Any]) -> None:
    """axe-core's rules for WCAG 2.1 AA, with every exercise and menu open."""
    page.wait_for_function(REACHED, timeout=10_000)  # boxes are marked with the next layout
    # Of what passes a rule one example is described: all of them take most of axe-core's time.
    options = {"runOnly": rules, "resultTypes": ["violations"]}
    found = Axe().run(page, options=options).response
    assert found["passes"]
    assert [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found["violations"]] == []


def follow(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    there = "(scheme) => document.documentElement.dataset.theme === scheme"
    page.wait_for_function(there, arg=scheme, timeout=10_000)


def it_fits(page: Any) -> None:
    size = page.evaluate(TOO_WIDE)
    assert size["page"] <= size["width"], f"the page scrolls sideways: {size}"
    assert size["wide"] == []


@pytest.mark.parametrize(("source", "width", "schemes"), VIEWS)
@pytest.mark.parametrize("docname", [*NAMES, "genindex", "search"])
def test_a_page_reads_well_and_asks_for_nothing(
    tab: Any, base: str, docname: str, source: str, width: int, schemes: tuple[str, str]
) -> None:
    watch = Watch(tab, base)
    tab.goto(f"{base}/{docname}.html", wait_until="load")
    tab.evaluate(SETTLED)
    if source == "http":
        mathematics_is_set(tab)
        a_first_view_weighs_little(watch)
    tab.evaluate(OPEN_EVERYTHING)
    tab.wait_for_timeout(300)
    assert tab.evaluate(STILL) == [], "live widgets that did not start"
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for scheme in schemes:
        follow(tab, scheme)
        it_fits(tab)
        assert tab.evaluate(FILTERS) == [], "a figure is dimmed"
        name = f"{docname.replace('/', '-')}-{width}-{scheme}.png"
        tab.screenshot(path=SCREENSHOTS / name, full_page=True)
    assert watch.complaints == []
    if source == "http":  # last, for axe-core asks for style sheets itself
        no_barrier_is_found(tab, OF_COLOURS)
        follow(tab, schemes[0])
        no_barrier_is_found(tab, EVERY_RULE)


@pytest.mark.parametrize("docname", ["book/gibbs", "search"])
def test_every_icon_is_there(browser: Any, site: str, docname: str) -> None:
    """Each is drawn, and none as the blinking mark that stands for an icon that is missing."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(f"{site}/{docname}.html", wait_until="load")
    page.wait_for_function("document.querySelectorAll('svg.svg-inline--fa').length > 5")
    assert page.evaluate("document.querySelectorAll('i[class*=fa-]').length") == 0
    assert page.evaluate("document.querySelectorAll('svg.svg-inline--fa animate').length") == 0
    context.close()


def test_a_table_that_a_cell_returns_is_a_table_and_in_sight(browser: Any, site: str) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(f"{site}/book/calibration.html", wait_until="load")
    page.evaluate(SETTLED)
    widths = page.evaluate(
        "[...document.querySelectorAll('.cell_output .pst-scrollable-table-container')]"
        ".map((box) => [box.scrollWidth, box.clientWidth])"
    )
    assert widths, "calibration returns a table"
    assert all(inner <= outer + 1 for inner, outer in widths), widths
    context.close()


def test_there_is_one_search_box(browser: Any, site: str) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(f"{site}/{NAMES[0]}.html", wait_until="load")
    visible = page.evaluate(
        "[...document.querySelectorAll('.search-button__button, .search-button')]"
        ".filter((button) => button.offsetParent !== null).length"
    )
    assert visible == 1
    context.close()


@pytest.mark.parametrize("source", ["http", "file"])
def test_a_search_finds_pages_and_complains_of_nothing(
    browser: Any, base: str, source: str
) -> None:
    """From a server it shows where the word stands; from disk, where pages cannot be fetched, it
    lists their titles.
    """
    context = browser.new_context()
    page = context.new_page()
    watch = Watch(page, base)
    page.goto(f"{base}/search.html?q=posterior", wait_until="load")
    page.wait_for_function(
        "document.querySelector('#search-results')?.textContent.includes('Search finished')",
        timeout=10_000,
    )
    found = page.evaluate(
        "[...document.querySelectorAll('#search-results li a')].map((link) => link.pathname)"
    )
    assert len(found) > 5
    assert any(path.endswith("/book/gibbs.html") for path in found)
    if source == "http":
        page.wait_for_selector("#search-results li p.context", timeout=10_000)
    assert watch.complaints == []
    context.close()
