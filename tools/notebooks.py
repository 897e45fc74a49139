"""Chapters as notebooks that run elsewhere: plain Markdown, outputs as built, a cell that fetches.

A chapter is a page of MyST. Opened by a program that knows Jupyter alone, its directives and roles
would be read as text. Here each becomes what Markdown has for it: numbers that the run has glued
into the prose, formulas with their numbers, authors and years, exercises and solutions.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import nbformat
from pybtex.database import BibliographyData

SETUP = """\
# Away from the book's own folder: fetch the package, the style of the figures and the data.
import importlib.util, os, pathlib, subprocess, sys

if not (importlib.util.find_spec("amortlib") and importlib.util.find_spec("_kit")):
    home = pathlib.Path("amortlib-book").resolve()
    if not home.exists():
        subprocess.run(["git", "clone", "--depth=1", "{url}", str(home)], check=True)
    needed = ("flowjax", "diffrax", "optimistix", "anywidget", "myst_nb", "blackjax", "sklearn")
    if not all(map(importlib.util.find_spec, needed)):
        install = [sys.executable, "-m", "pip", "install", "-q", f"{{home}}[book]"]
        subprocess.run(install, check=True)
    sys.path[:0] = [str(home), str(home / "book")]
    os.chdir(home / "book")
"""

_FENCE = re.compile(r"^(?P<fence>`{3,}|:{3,})\{(?P<name>[a-z-]+)\}[ ]*(?P<title>.*)$")
_OPTION = re.compile(r"^:([a-z-]+):\s*(.*)$")
_ROLE = re.compile(r"\{(cite:p|cite:t|doc|eq|glue:text)\}`([^`]+)`")


class NotebookError(ValueError):
    """A chapter that cannot be written as a plain notebook; says what stands where."""


@dataclass
class Book:
    """What a chapter refers to outside itself.

    Attributes:
        titles: of pages, by the last part of their name.
        equations: number of an equation and the page it stands on, by label.
        references: the bibliography.
        url: of the repository.
    """

    titles: Mapping[str, str]
    equations: Mapping[str, tuple[str, str]]
    references: BibliographyData
    url: str


def equations_of(text: str) -> list[str]:
    """Labels of a page's numbered equations, in order."""
    return re.findall(r"^```\{math\}\n:label: (\S+)$", text, flags=re.MULTILINE)


def authors(book: Book, key: str) -> tuple[str, str]:
    """The authors of an entry, as a text names them, and the year.

    Raises:
        NotebookError: on a key that the bibliography lacks.
    """
    if key not in book.references.entries:
        raise NotebookError(f"expected a key of the bibliography, got {key!r}")
    entry = book.references.entries[key]
    people = entry.persons.get("author") or entry.persons.get("editor") or []
    names = [" ".join([*p.prelast_names, *p.last_names]).strip("{}") for p in people]
    if len(names) > 2:
        names = [f"{names[0]} et al."]
    year = entry.fields.get("year", "no year")
    return " and ".join(names) or entry.fields["title"], year


@dataclass
class _Page:
    """One chapter on its way."""

    book: Book
    name: str
    glued: Mapping[str, Any]
    titles: dict[str, str] = field(default_factory=dict)
    """Titles of exercises by label, for their solutions."""


def glued(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """Values that cells of an executed notebook have glued, by name."""
    found: dict[str, Any] = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            name = output.get("metadata", {}).get("scrapbook", {}).get("name")
            if name is not None:
                text = output["data"]["text/plain"]
                try:
                    found[name] = ast.literal_eval(text)
                except (ValueError, SyntaxError):
                    found[name] = text
    return found


def _role(page: _Page, match: re.Match[str]) -> str:
    role, text = match.groups()
    if role == "glue:text":
        name, _, form = text.partition(":")
        if name not in page.glued:
            raise NotebookError(f"{page.name}: expected a glued value {name!r}, found none")
        return format(page.glued[name], form)
    if role == "eq":
        if text not in page.book.equations:
            raise NotebookError(f"{page.name}: expected a labelled equation, got {text!r}")
        number, where = page.book.equations[text]
        return f"({number})" if where == page.name else f"({number}) of *{page.book.titles[where]}*"
    if role == "doc":
        if text not in page.book.titles:
            raise NotebookError(f"{page.name}: expected a page of the book, got {text!r}")
        return f"*{page.book.titles[text]}*"
    cited = [authors(page.book, key.strip()) for key in text.split(",")]
    if role == "cite:t":
        return ", ".join(f"{who} ({year})" for who, year in cited)
    return "(" + "; ".join(f"{who}, {year}" for who, year in cited) + ")"


def _quoted(title: str, body: list[str]) -> list[str]:
    return [f"> **{title}**", ">", *(f"> {line}".rstrip() for line in body)]


def _directive(page: _Page, name: str, title: str, options: dict[str, str], body: list[str]) -> Any:
    label = options.get("label", "")
    if name == "math":
        tag = f" \\tag{{{page.book.equations[label][0]}}}" if label else ""
        return ["$$", *body, *([tag.strip()] if tag else []), "$$"]
    if name == "admonition":
        return _quoted(title, body)
    if name == "exercise":
        page.titles[label] = title
        return [f"**Exercise: {title}**", "", *body]
    if name == "solution-start":
        return [f"**Solution: {page.titles.get(title, title)}**"]
    if name == "solution-end":
        return []
    if name == "bibliography":
        return [f"{' and '.join(authors(page.book, k))}" for k in page.book.references.entries]
    raise NotebookError(f"{page.name}: a plain notebook has nothing for the directive {name!r}")


def _lines(page: _Page, lines: list[str]) -> list[str]:
    out: list[str] = []
    at = 0
    while at < len(lines):
        opening = _FENCE.match(lines[at])
        if opening is None:
            out.append(lines[at])
            at += 1
            continue
        close = next((k for k in range(at + 1, len(lines)) if lines[k] == opening["fence"]), None)
        if close is None:
            raise NotebookError(f"{page.name}: {lines[at]!r} is not closed")
        body, options = lines[at + 1 : close], {}
        while body and (option := _OPTION.match(body[0])):
            options[option[1]] = option[2]
            body = body[1:]
        while body and not body[0].strip():
            body = body[1:]
        body = _lines(page, body)
        out += _directive(page, opening["name"], opening["title"], options, body)
        at = close + 1
    return out


def plain(text: str, page: _Page) -> str:
    """MyST as Markdown with formulas.

    Raises:
        NotebookError: on a directive that it has nothing for, or a name that leads nowhere.
    """
    lines = "\n".join(_lines(page, text.split("\n")))
    return _ROLE.sub(lambda match: _role(page, match), lines).strip("\n")


def portable(executed: nbformat.NotebookNode, name: str, book: Book) -> nbformat.NotebookNode:
    """An executed chapter as a notebook for anywhere.

    Args:
        executed: the notebook with its outputs.
        name: the last part of the page's name.
        book: what it refers to.

    Raises:
        NotebookError: see [`plain`][tools.notebooks.plain].
    """
    made = copy.deepcopy(executed)
    page = _Page(book, name, glued(executed))
    cells = []
    for cell in made.cells:
        if cell.cell_type == "markdown":
            cell.source = plain(cell.source, page)
            if not cell.source:
                continue
        cells.append(cell)
    setup = nbformat.v4.new_code_cell(SETUP.format(url=book.url), id="setup")
    made.cells = [*cells[:1], setup, *cells[1:]]
    made.metadata = nbformat.from_dict(
        {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
        }
    )
    made.nbformat, made.nbformat_minor = 4, 5
    nbformat.validate(made)
    return made
