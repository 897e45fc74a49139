"""The built book, and a browser to look at it with."""

from __future__ import annotations

import functools
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.browser import ARGUMENTS, NoBrowserError, find_browser
from tools.chapters import Page, read_pages

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"


@pytest.fixture(scope="session")
def pages() -> list[Page]:
    """The pages of the table of contents."""
    return read_pages(ROOT)


@pytest.fixture(scope="session")
def html(pages: list[Page]) -> Path:
    """Build the book as `make book` does, and return the folder of its pages."""
    run = subprocess.run(
        [sys.executable, "-m", "tools.build_book"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(run.stdout)
    assert run.returncode == 0, f"make book fails:\n{run.stdout[-6000:]}"
    assert pages
    return HTML


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing for each request."""


@pytest.fixture(scope="session")
def site(html: Path) -> Iterator[str]:
    """Serve the built book over http on this machine."""
    handler = functools.partial(_QuietHandler, directory=str(html))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    """Start Chromium; without one the tests fail, and say where one was looked for."""
    from playwright.sync_api import sync_playwright

    try:
        path = find_browser()
    except NoBrowserError as error:
        pytest.fail(str(error))
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield started
        started.close()
