"""The pages in Firefox, another engine than the other browser tests have: from disk, offline."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websocket

from tools.browser import NoBrowserError, find_firefox
from tools.chapters import toc_names

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

DRAWN = """(async () => {
  while (document.querySelector('.live[aria-busy]')) await new Promise(requestAnimationFrame);
})()"""
"""Until the pictures that have been begun are there."""

SETTLED = """(async () => {
  await document.fonts.ready;
  if (window.MathJax && window.MathJax.startup) await window.MathJax.startup.promise;
  const live = [...document.querySelectorAll('[data-live]')];
  return JSON.stringify({
    live: live.length,
    still: live.filter((host) => !host.querySelector('.live-plot')
      || host.querySelector('[role=alert], .live-still')).map((host) => host.dataset.live),
    formulas: document.querySelectorAll('article .math').length,
    set: document.querySelectorAll('article .math mjx-container').length,
    failed: document.querySelectorAll('mjx-merror, [data-mjx-error]').length,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  });
})()"""


class Firefox:
    """Firefox by WebDriver BiDi, the protocol that it speaks by itself (W3C, *WebDriver BiDi*)."""

    def __init__(self, address: str) -> None:
        self.socket = websocket.create_connection(address, timeout=120, suppress_origin=True)
        self.count = 0
        self.events: list[dict[str, Any]] = []
        self.call("session.new", capabilities={})
        events = ["log.entryAdded", "network.beforeRequestSent", "network.fetchError"]
        self.call("session.subscribe", events=events)
        self.context = self.call("browsingContext.getTree")["contexts"][0]["context"]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command; what happens in the meantime is kept."""
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.count:
                assert message["type"] == "success", message
                return message["result"]
            self.events.append(message)

    def open(self, address: str) -> None:
        """Go to a page and wait until it is loaded."""
        self.events.clear()
        self.call("browsingContext.navigate", context=self.context, url=address, wait="complete")

    def ask(self, script: str) -> Any:
        """The value of an expression, or of what it promises."""
        target = {"context": self.context}
        found = self.call("script.evaluate", expression=script, target=target, awaitPromise=True)
        assert found["type"] == "success", found
        return found["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press keys one after the other."""
        actions = [{"type": kind, "value": k} for k in keys for kind in ("keyDown", "keyUp")]
        source = {"type": "key", "id": "keyboard", "actions": actions}
        self.call("input.performActions", context=self.context, actions=[source])

    def complaints(self) -> list[str]:
        """Errors and warnings of the page, requests that failed or went elsewhere."""
        found = []
        for event in self.events:
            said = event["params"]
            if event["method"] == "log.entryAdded" and said["level"] in {"error", "warn"}:
                found.append(f"{said['level']}: {said['text']}")
            elif event["method"] == "network.fetchError":
                found.append(f"failed: {said['request']['url']}")
            elif event["method"] == "network.beforeRequestSent":
                url = said["request"]["url"]
                if not url.startswith(("file:", "data:", "blob:")):
                    found.append(f"asks for {url}")
        return found


@pytest.fixture(scope="module")
def firefox() -> Iterator[Firefox]:
    try:
        path = find_firefox()
    except NoBrowserError as error:
        pytest.fail(str(error))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [path, "--headless", "--no-remote", "--profile", profile]
        running = subprocess.Popen(
            [*command, "--remote-debugging-port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert running.stdout is not None
        try:
            said = []
            for line in running.stdout:
                said.append(line)
                if "BiDi listening on " in line:
                    yield Firefox(f"{line.split(' on ')[1].strip()}/session")
                    break
            else:
                pytest.fail(f"Firefox does not start:\n{''.join(said)[-2000:]}")
        finally:
            running.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(timeout=30)
            running.kill()


@pytest.mark.parametrize("docname", toc_names(ROOT))
def test_a_page_reads_well_in_firefox(html: Path, firefox: Firefox, docname: str) -> None:
    firefox.open((html / f"{docname}.html").as_uri())
    page = json.loads(firefox.ask(SETTLED))
    assert page["still"] == [], "live widgets that did not start"
    assert page["set"] >= page["formulas"]
    assert page["failed"] == 0
    assert page["wide"] <= 0, "the page scrolls sideways"
    assert firefox.complaints() == []


def test_the_gap_moves_by_keys_in_firefox(html: Path, firefox: Firefox) -> None:
    firefox.open((html / "book" / "regression.html").as_uri())
    firefox.ask(SETTLED)
    words = "document.querySelector('.live-words').textContent"
    slider = "document.querySelector('.live input[data-name=length]')"
    before = firefox.ask(words)
    firefox.ask(f"{slider}.focus()")
    firefox.press("\ue010")  # End
    assert firefox.ask(f"{slider}.value === {slider}.max")
    firefox.ask(DRAWN)
    assert firefox.ask(words) != before
    firefox.press("\ue011", "\ue014", "\ue014")  # Home, and twice to the right
    assert firefox.ask(f"{slider}.value") == "2"
    firefox.ask(DRAWN)
    assert "2 of 32 times are missing" in firefox.ask(words)
    assert firefox.complaints() == []
