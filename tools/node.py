"""Find a node to run JavaScript with: the one that comes with Playwright, else the system's.

Playwright's Python package, pinned for the page tests, drives the browser from a node of its own;
so the JavaScript of the book can be tested wherever its pages can, and nothing more is installed.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path


def find_node() -> str:
    """Return the path of a node, or raise `FileNotFoundError` naming where it was looked for."""
    spec = importlib.util.find_spec("playwright")
    if spec is not None and spec.origin is not None:
        driver = Path(spec.origin).parent / "driver"
        for name in ("node", "node.exe"):
            if (driver / name).is_file():
                return str(driver / name)
    found = shutil.which("node")
    if found is None:
        raise FileNotFoundError(
            "expected a node to run the book's JavaScript with, found none: not in the playwright "
            "package (pip install playwright) and not on the path"
        )
    return found
