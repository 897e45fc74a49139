"""The widgets' other home: a page of MyST opened as a notebook in JupyterLab, with a kernel."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

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
faults = fault_explorer()
faults
```

```{code-cell} ipython3
even = break_even(solver=4e-3, head=2e-6, training=60.0)
even
```

```{code-cell} ipython3
print("kernel:", gap.length, gap.start, faults.bias, even.share)
faults.width = 0.5
```
"""

MOVE = """([kind, name, value]) => {
  const group = [...document.querySelectorAll('.live')].find((g) => g.ariaLabel === kind);
  const input = group.querySelector(`[data-name=${name}]`);
  input.value = value;
  input.dispatchEvent(new Event('input'));
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """JupyterLab as Binder starts it (`postBuild`), over a folder with one page."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "page.md").write_text(NOTEBOOK, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scripts = Path(sys.executable).parent
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'book'}",
        "JUPYTER_CONFIG_DIR": str(folder / ".config"),
    }
    viewer = [scripts / "jupytext-config", "set-default-viewer", "markdown"]
    subprocess.run(viewer, env=environment, check=True)
    settings = {"port": port, "root_dir": folder, "token": "", "password": ""}
    flags = [f"--ServerApp.{name}={value}" for name, value in settings.items()]
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


def test_a_page_opens_as_a_notebook_and_widgets_and_kernel_follow_each_other(
    browser: Any, lab: str
) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{lab}/lab/tree/page.md")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=90_000)
    # Before the kernel answers, a cell that is run is forgotten.
    page.wait_for_function(
        "document.querySelector('#jp-bottom-panel, .jp-StatusBar-Widget, #jp-main-statusbar')"
        "?.textContent.includes('| Idle')",
        timeout=90_000,
    )
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

    page.evaluate(MOVE, ["Gap explorer", "length", 23])
    page.evaluate(MOVE, ["Faults and what shows them", "bias", 0.5])
    page.evaluate(MOVE, ["When amortizing pays", "share", 0.25])
    assert "22 of 32 times are missing" in page.inner_text(".live-words >> nth=0")
    page.wait_for_timeout(1000)  # the kernel hears of it
    run(cells[3])
    page.wait_for_function(
        "[...document.querySelectorAll('.jp-OutputArea-output')]"
        ".some((output) => output.textContent.includes('kernel: 23 10 0.5 0.25'))",
        timeout=30_000,
    )
    # And back: what the kernel sets moves the slider.
    width = ".live:has([data-name=width]) [data-name=width]"
    page.wait_for_function(f"document.querySelector('{width}').value === '0.5'", timeout=30_000)
    assert re.search("95% of the truths, [4-7]", page.inner_text(".live-words >> nth=1"))
    assert errors == []
    context.close()
