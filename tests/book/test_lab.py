"""The chapters' other home: pages of MyST opened as notebooks in JupyterLab, with a kernel."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tools.chapters import read_page, toc_names

ROOT = Path(__file__).resolve().parents[2]
IN_LAB = ("book/simulation",)
"""Chapters that run whole here; all of them with AMORTLIB_ALL=1, which takes as long as the build.

What runs in the build is what runs here, cell by cell, so that one shows the way of all.
"""
NOTEBOOKS = [name for name in toc_names(ROOT) if read_page(ROOT, name).is_notebook]
if os.environ.get("AMORTLIB_ALL"):
    IN_LAB = tuple(NOTEBOOKS)

pytestmark = pytest.mark.slow

NOTEBOOK = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

```{code-cell} ipython3
from _kit.heads import load_ou_head
from _kit.widgets import gap_explorer
gap = gap_explorer(*load_ou_head(), compare=lambda e: (0 * e.y, 0 * e.y + 1), label="white noise")
gap
```

```{code-cell} ipython3
from _kit.break_even import break_even
from _kit.faults import fault_explorer
at_zero = lambda bias, *_: [int(bias == 0) * i for i in range(100)]
faults = fault_explorer(compare=at_zero, label="even")
faults
```

```{code-cell} ipython3
even = break_even(solver=4e-3, head=2e-6, training=60.0, compare=(0.0, lambda: sum(range(1000))))
even
```

```{code-cell} ipython3
print("kernel:", gap.length, gap.start, faults.bias, even.share)
faults.width = 0.5
```
"""

SOLVED_LIVE = (
    NOTEBOOK.partition("```{code-cell}")[0]
    + """```{code-cell} ipython3
from _kit.holes import one_hole
from _kit.ladder import refinement_ladder
from _kit.landscape import energy_landscape
from _kit.windows import FixedSteps
from amortlib.observation import Select
from amortlib.problems import lorenz63
from ipywidgets import VBox
window = FixedSteps.in_place(
    lorenz63(states=6, dt=0.08, substeps=1, noise=2.0, operator=Select((0, 1)))
)
live = {"compare": "oracle", "label": "oracle, live"}
ladder = refinement_ladder(**live)
landscape = energy_landscape(window, length=0, **live)
holes = one_hole(**live)
VBox([ladder, landscape, holes])
```
"""
)
"""Within a box, which asks for no still pictures."""

WINDOWS = {"ladder": "From network to solver", "landscape": "Energy landscape",
           "holes": "One hole, two answers"}  # fmt: skip
"""Their names in the kernel, and on the page."""

MOVE = """([kind, name, value]) => {
  const group = [...document.querySelectorAll('.live')].find((g) => g.ariaLabel === kind);
  const input = group.querySelector(`[data-name=${name}]`);
  input.value = value;
  input.dispatchEvent(new Event('input'));
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """JupyterLab as Binder starts it (`postBuild`), over the chapters and one page of widgets."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "page.md").write_text(NOTEBOOK, encoding="utf-8")
    (folder / "solved.md").write_text(SOLVED_LIVE, encoding="utf-8")
    # The chapters' folder as a reader has it: what JupyterLab saves must not come back here.
    for name in ("data", "weights", "_kit"):
        (folder / name).symlink_to(ROOT / "book" / name)
    for name in NOTEBOOKS:
        shutil.copy2(ROOT / f"{name}.md", folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scripts = Path(sys.executable).parent
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'book'}",
        "JUPYTER_CONFIG_DIR": str(folder / ".config"),
        # Kernels keep compiled programs where this process does, which compiles none meanwhile.
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    viewer = [scripts / "jupytext-config", "set-default-viewer", "markdown"]
    subprocess.run(viewer, env=environment, check=True)
    settings = {"port": port, "root_dir": folder, "token": "", "password": ""}
    flags = [f"--ServerApp.{name}={value}" for name, value in settings.items()]
    flags.append("--LabApp.expose_app_in_browser=True")
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [scripts / "jupyter", "lab", "--no-browser", "--allow-root", *flags],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"{address}/api")
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                pytest.fail(f"JupyterLab does not start:\n{(folder / 'log').read_text()[-3000:]}")
            yield address
        finally:
            server.terminate()
            server.wait(timeout=30)


def opened(browser: Any, lab: str, name: str) -> tuple[Any, list[str]]:
    """A page as a notebook with an idle kernel, and the errors that are yet to come."""
    page = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(error.stack))
    # A workspace of its own: JupyterLab opens again what was open before, and shows that first.
    page.goto(f"{lab}/lab/workspaces/{name}/tree/{name}.md")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=90_000)
    # Before the kernel answers, a cell that is run is forgotten.
    page.wait_for_function(
        "jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'",
        timeout=90_000,
    )
    assert page.evaluate("jupyterapp.shell.currentWidget.context.path") == f"{name}.md"
    return page, errors


def test_a_page_opens_as_a_notebook_and_widgets_and_kernel_follow_each_other(
    browser: Any, lab: str
) -> None:
    page, errors = opened(browser, lab, "page")
    cells = page.query_selector_all(".jp-Notebook .jp-CodeCell")
    assert len(cells) == 4

    def run(cell: Any) -> None:
        cell.query_selector(".cm-content").click()
        page.keyboard.press("Shift+Enter")
        page.wait_for_function(
            "(cell) => /\\[(\\d+|\\*)\\]/.test(cell.querySelector('.jp-InputPrompt').textContent)",
            arg=cell,
            timeout=30_000,
        )

    for i, cell in enumerate(cells[:3], start=1):
        run(cell)
        page.wait_for_function(
            f"document.querySelectorAll('.jp-OutputArea .live-plot').length >= {i}",
            timeout=120_000,
        )
    page.wait_for_function("document.querySelectorAll('.live').length === 3")
    assert page.query_selector(".live-error") is None
    # What the kernel computes is drawn beside what the page computes.
    page.wait_for_function(
        "document.querySelector('.live-legend').textContent.includes('white noise')"
    )

    # A frame comes after its plot is there, and a busy machine takes its time.
    page.wait_for_function(
        "[...document.querySelectorAll('.live-words')].every((words) => words.textContent)"
    )
    words = page.locator(".live-words")
    assert "“even”: over 100 events p is 1 by the component" in words.nth(1).inner_text()
    assert re.search(
        r"“yours”: [\d.]+ [mµ]s an event; the head is ahead", words.nth(2).inner_text()
    )

    page.evaluate(MOVE, ["Gap explorer", "length", 23])
    page.evaluate(MOVE, ["Faults and what shows them", "bias", 0.5])
    page.evaluate(MOVE, ["When amortizing pays", "share", 0.25])
    page.wait_for_function("!document.querySelector('.live[aria-busy]')")
    assert "22 of 32 times are missing" in words.nth(0).inner_text()
    page.wait_for_timeout(1000)  # the kernel hears of it
    run(cells[3])
    page.wait_for_function(
        "[...document.querySelectorAll('.jp-OutputArea-output')]"
        ".some((output) => output.textContent.includes('kernel: 23 10 0.5 0.25'))",
        timeout=30_000,
    )
    page.wait_for_function("!document.querySelector('.live[aria-busy]')")
    assert re.search("“even”: .* and the gate closes", words.nth(1).inner_text())
    # And back: what the kernel sets moves the slider.
    width = ".live:has([data-name=width]) [data-name=width]"
    page.wait_for_function(f"document.querySelector('{width}').value === '0.5'", timeout=30_000)
    page.wait_for_function("!document.querySelector('.live[aria-busy]')")
    assert re.search("95% of the truths, [4-7]", words.nth(1).inner_text())
    assert errors == []
    page.context.close()


# The model of the notebook that is open, whatever of it is in sight.
CELLS = """() => jupyterapp.shell.currentWidget.content.model.cells"""

DONE = f"""() => [...({CELLS})()].filter((cell) => cell.type === 'code').every(
  (cell) => cell.executionCount !== null && cell.executionState !== 'running')"""

FAILED = f"""() => [...({CELLS})()].filter((cell) => cell.type === 'code').flatMap(
  (cell, i) => cell.outputs.toJSON().filter((output) => output.output_type === 'error').map(
    (output) => `cell ${{i + 1}}: ${{output.ename}}: ${{output.evalue}}`))"""

ASK = """async (code) => {
  const { kernel } = jupyterapp.shell.currentWidget.sessionContext.session;
  const future = kernel.requestExecute({ code: '', user_expressions: { it: code } });
  const { it } = (await future.done).content.user_expressions;
  return it.status === 'ok' ? it.data['text/plain'] : `${it.ename}: ${it.evalue}`;
}"""

SLIDERS = """() => [...document.querySelectorAll('.live input[type=range]')].map((input) => ({
  kind: input.closest('.live').ariaLabel, name: input.dataset.name, now: Number(input.value),
  low: Number(input.min), high: Number(input.max), step: Number(input.step) }))"""

TRAIT = """[getattr(w, {name!r})
 for w in __import__('ipywidgets').widgets.widget._instances.values()
 if getattr(w, 'title', None) == {kind!r}]"""


PATHS = """(kind) => {
  const live = [...document.querySelectorAll('.live')].find((one) => one.ariaLabel === kind);
  const plot = live.querySelector('.live-plot');
  const of = (color, dash) => [...plot.querySelectorAll(`path[stroke="${color}"]`)]
    .filter((path) => (path.getAttribute('stroke-dasharray') ?? '') === dash)
    .flatMap((path) => (path.getAttribute('d') ?? '').split('M').slice(1))
    .map((line) => line.match(/-?[\\d.]+/g).map(Number).filter((_, i) => i % 2));
  return { kernel: of('#1a1a1a', '2 4'), oracle: of('#0a5fb4', '7 4'),
           height: Number(plot.getAttribute('height')),
           legend: live.querySelector('.live-legend').textContent,
           error: live.querySelector('.live-error')?.textContent };
}"""
"""Heights of the kernel's paths, in pixels from above, and of the ladder's own oracle."""

TOPS = {"ladder": 24, "landscape": 24, "holes": 22}
"""Where the axis of x ends, on both sides."""


def test_the_oracle_is_solved_live_beside_the_page(browser: Any, lab: str) -> None:
    """For each widget on a window: the kernel's minima are drawn where it says they start, and
    named; they follow a slider of the page, and what the kernel sets moves page and paths."""
    page, errors = opened(browser, lab, "solved")
    page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells'); }")
    page.wait_for_function(f"({DONE})() || ({FAILED})().length", timeout=240_000, polling=200)
    assert page.evaluate(FAILED) == []
    page.wait_for_function("document.querySelectorAll('.live').length === 3", timeout=60_000)

    def solved(name: str, event: int, length: int) -> list[list[float]]:
        """The kernel's paths on the page, as soon as they are those of its answer there."""
        asked = f"[{name}.event, {name}.length, {name}.overlay['states']]"
        for _ in range(300):
            *at, states = json.loads(page.evaluate(ASK, asked))
            found = page.evaluate(PATHS, WINDOWS[name])
            assert found["error"] is None
            drawn, own = found["kernel"], found["oracle"]
            if at == [event, length] and len(drawn) == len(states):
                share = 0.5 - np.array(states)[:, 0] / (2 * TOPS[name])
                starts = 10 + (found["height"] - 54) * share
                off = np.abs(np.subtract([path[0] for path in drawn], starts)).max()
                if name == "ladder":  # whose page solves its own oracle, in JavaScript
                    off = max(off, min(np.abs(np.subtract(path, own[0])).max() for path in drawn))
                if off < 0.3:
                    break
            page.wait_for_timeout(100)
        else:
            pytest.fail(f"{name} shows {drawn} and {own}, the kernel is at {at} with {states}")
        assert "oracle, live" in found["legend"]
        return drawn

    for name, kind in WINDOWS.items():
        first = solved(name, 0, 0)
        page.evaluate(MOVE, [kind, "event", 5])
        second = solved(name, 5, 0)
        assert second != first
        assert page.evaluate(ASK, f"setattr({name}, 'length', 3)") == "None"
        assert solved(name, 5, 3) != second
        slider = f'.live[aria-label="{kind}"] [data-name=length]'
        page.wait_for_function(
            "(slider) => document.querySelector(slider).value === '3'", arg=slider
        )
    assert [error for error in errors if "_markdownOverlapsToolbar" not in error] == []
    page.evaluate("jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.context.close()


@pytest.mark.parametrize("docname", IN_LAB)
def test_a_chapter_opens_as_a_notebook_and_runs(browser: Any, lab: str, docname: str) -> None:
    """Every cell of it; then its first slider is moved, and the kernel knows."""
    page, errors = opened(browser, lab, docname.rpartition("/")[2])
    page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells'); }")
    page.wait_for_function(f"({DONE})() || ({FAILED})().length", timeout=400_000, polling=500)
    assert page.evaluate(FAILED) == []

    live = page.evaluate(f"""() => [...({CELLS})()].findIndex((cell) => cell.type === 'code'
      && JSON.stringify(cell.outputs.toJSON()).includes('data-live='))""")
    if live >= 0:
        page.evaluate(f"jupyterapp.shell.currentWidget.content.scrollToItem({live}, 'start')")
        page.wait_for_selector(".live input[type=range]", timeout=60_000)
        slider = page.evaluate(SLIDERS)[0]
        wanted = slider["low"] if slider["now"] != slider["low"] else slider["high"]
        page.evaluate(MOVE, [slider["kind"], slider["name"], wanted])
        ask = TRAIT.format(**{k: slider[k] for k in ("name", "kind")})
        for _ in range(100):
            if (known := page.evaluate(ASK, ask)) in (f"[{wanted}]", f"[{float(wanted)}]"):
                break
            page.wait_for_timeout(100)
        assert known in (f"[{wanted}]", f"[{float(wanted)}]"), slider
    # JupyterLab's own cell toolbar looks for a Markdown cell that is out of sight.
    assert [error for error in errors if "_markdownOverlapsToolbar" not in error] == []
    page.evaluate("jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.context.close()
