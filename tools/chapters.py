"""What the build driver, the Sphinx extension and the tests know about the book's chapters."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

WALL_BUDGET_S = 90.0
"""Seconds a chapter may take from kernel start to its last cell, alone on two cores."""

MEMORY_BUDGET_MB = 1000.0
"""Largest resident memory of a chapter's kernel processes, in megabytes (10**6 bytes)."""

STATE_FILE = Path("_build/execution/state.json")
"""Where the driver keeps what it knows of each executed chapter, relative to the root."""


@dataclass(frozen=True)
class Page:
    """One page of the table of contents: its Sphinx name, file, front matter and title."""

    docname: str
    path: Path
    front_matter: dict[str, Any]
    title: str

    @property
    def is_chapter(self) -> bool:
        """Whether the page declares itself a chapter (objectives, exercises, summary)."""
        return self.front_matter.get("kind") == "chapter"

    @property
    def is_notebook(self) -> bool:
        """Whether the page holds code cells that the build executes."""
        text_format = (
            self.front_matter.get("jupytext", {})
            .get("text_representation", {})
            .get("format_name", None)
        )
        return self.front_matter.get("file_format") == "mystnb" or text_format == "myst"


def front_matter(text: str, where: str) -> dict[str, Any]:
    """Return the YAML front matter of a page, or an empty dictionary when it has none."""
    match = re.match(r"---\n(.*?\n)(?:---|\.\.\.)\s*\n", text, flags=re.DOTALL)
    if match is None:
        return {}
    try:
        data = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: the front matter is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{where}: the front matter must be a mapping, as in `minutes: 20`")
    return data


def read_page(root: Path, docname: str) -> Page:
    """Read one page of the table of contents."""
    path = root / (docname if docname.endswith(".md") else f"{docname}.md")
    if not path.is_file():
        raise FileNotFoundError(f"_toc.yml names {docname}, but there is no file {path}")
    text = path.read_text(encoding="utf-8")
    body = re.sub(r"\A---\n.*?\n---\s*\n", "", text, flags=re.DOTALL)  # YAML comments look alike
    heading = re.search(r"^# +(.+?)\s*$", body, flags=re.MULTILINE)
    title = heading.group(1) if heading else docname
    return Page(docname.removesuffix(".md"), path, front_matter(text, str(path)), title)


def _names(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for name in ("root", "file"):
            if name in node:
                yield node[name]
        for value in node.values():
            if isinstance(value, dict | list):
                yield from _names(value)
    elif isinstance(node, list):
        for item in node:
            yield from _names(item)


def toc_names(root: Path) -> list[str]:
    """Return the names in `_toc.yml`, in order."""
    return list(_names(yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))))


def read_pages(root: Path) -> list[Page]:
    """Read every page that `_toc.yml` names, in the order of the table of contents."""
    return [read_page(root, name) for name in toc_names(root)]


def empty_state() -> dict[str, Any]:
    """Return the state of a book of which nothing has been executed."""
    return {"format": 1, "chapters": {}}


def read_state(root: Path) -> dict[str, Any]:
    """Read the execution state; an absent or unreadable one counts as nothing executed."""
    try:
        state = json.loads((root / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return empty_state()
    if not isinstance(state, dict) or state.get("format") != 1:
        return empty_state()
    return state


def within_budget(entry: dict[str, Any]) -> str:
    """Say whether a chapter keeps its budgets: `yes`, `no`, or `not alone`.

    The last is for one that took too long beside others, of which nobody knows.
    """
    if entry["peak_mb"] > MEMORY_BUDGET_MB:
        return "no"
    if entry["wall_s"] <= WALL_BUDGET_S:
        return "yes"
    return "not alone" if entry["machine"].get("together", 1) > 1 else "no"


def describe_machine(machine: dict[str, Any]) -> str:
    """Say in one line what a measurement was made on."""
    cores = machine["cores"]
    jax = f", jax {machine['jax']}" if machine.get("jax") else ""
    together = machine.get("together", 1)
    company = f", {together} chapters at a time" if together > 1 else ""
    return (
        f"{cores} core{'s' if cores != 1 else ''}, {machine['cpu']}, "
        f"{machine['system']}, Python {machine['python']}{jax}{company}"
    )
