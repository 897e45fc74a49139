"""Find browsers for the page tests: the system's, Playwright's Chromium, or one from apt."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

SYSTEM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FIREFOX_NAMES = ("firefox-esr", "firefox")

ARGUMENTS = (
    "--headless",
    "--no-sandbox",  # a container's root may not use the sandbox
    "--disable-gpu",
    # A browser's own errands would count as requests that a page makes.
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
"""How Chromium is started."""


class NoBrowserError(RuntimeError):
    """No browser can be had; the message says what was tried and what to do."""


def from_system(names: tuple[str, ...] = SYSTEM_NAMES) -> str | None:
    """Return a browser that is installed on the system."""
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    return None


def _playwright_path() -> str | None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).is_file() else None


def from_playwright() -> str | None:
    """Return Playwright's own Chromium, downloading it when it is not there."""
    found = _playwright_path()
    if found:
        return found
    command = [sys.executable, "-m", "playwright", "install", "chromium"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    return _playwright_path() if run.returncode == 0 else None


def from_apt(names: tuple[str, ...] = SYSTEM_NAMES) -> str | None:
    """Install the first of the names with apt, which only root can do."""
    if shutil.which("apt-get") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return None
    import fcntl

    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # Test processes side by side may each want a browser, and apt works for one at a time.
    with Path(tempfile.gettempdir(), "amortlib-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if found := from_system(names):
            return found
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", names[0]]):
            run = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=900, check=False
            )
            if run.returncode:
                return None
    return from_system(names)


SOURCES: tuple[tuple[str, Callable[[], str | None]], ...] = (
    (f"the system ({', '.join(SYSTEM_NAMES)})", from_system),
    ("Playwright's own download (playwright install chromium)", from_playwright),
    ("apt, as root (apt-get install chromium)", from_apt),
)

FIREFOX_SOURCES: tuple[tuple[str, Callable[[], str | None]], ...] = (
    (f"the system ({', '.join(FIREFOX_NAMES)})", partial(from_system, FIREFOX_NAMES)),
    ("apt, as root (apt-get install firefox-esr)", partial(from_apt, FIREFOX_NAMES)),
)


def find_browser(
    sources: tuple[tuple[str, Callable[[], str | None]], ...] = SOURCES,
    what: str = "a Chromium",
    hint: str = "`.venv/bin/playwright install chromium`",
) -> str:
    """Return the path of a browser, or raise `NoBrowserError` naming everything tried."""
    tried = []
    for name, source in sources:
        try:
            found = source()
        except Exception as error:  # a source that breaks is a source that has none
            tried.append(f"{name}: {type(error).__name__}: {error}")
            continue
        if found:
            return found
        tried.append(f"{name}: none")
    raise NoBrowserError(
        f"The page tests need {what}, and none could be had.\n  tried "
        + "\n  tried ".join(tried)
        + f"\nInstall one, for instance with {hint}."
    )


def find_firefox() -> str:
    """Return the path of a Firefox, or raise `NoBrowserError` naming everything tried."""
    return find_browser(FIREFOX_SOURCES, "a Firefox", "the packages of your system")


def main() -> int:
    """Print the browser's path."""
    try:
        print(find_browser())
    except NoBrowserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
