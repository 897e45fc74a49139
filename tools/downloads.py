"""What a reader takes home: each chapter as a notebook, and the whole book in a zip."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
import yaml
from pybtex.database import BibliographyData, parse_file

from tools.chapters import Page
from tools.notebooks import Book, equations_of, portable

ARCHIVE = "book.zip"
"""Name of the archive, beside the pages."""

_DATE = (2026, 1, 1, 0, 0, 0)
"""Of every file in the archive: the same pages give the same archive."""


def short(page: Page) -> str:
    """The last part of a page's name."""
    return page.docname.rpartition("/")[2]


def read_book(root: Path, pages: Sequence[Page]) -> Book:
    """What chapters refer to: titles, equations, the bibliography, the repository."""
    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
    files = [root / name for name in config.get("bibtex_bibfiles", [])]
    entries = {}
    for path in files:
        entries.update(parse_file(str(path)).entries)
    equations: dict[str, tuple[str, str]] = {}
    chapter = elsewhere = 0
    for page in pages:
        labels = equations_of(page.path.read_text(encoding="utf-8"))
        # As Sphinx has it: 3.1, 3.2 in the third chapter, and one count for pages outside.
        if page.is_chapter:
            chapter += 1
            numbers = [f"{chapter}.{i}" for i in range(1, len(labels) + 1)]
        else:
            numbers = [str(i) for i in range(elsewhere + 1, elsewhere + len(labels) + 1)]
            elsewhere += len(labels)
        equations |= {k: (n, short(page)) for k, n in zip(labels, numbers, strict=True)}
    return Book(
        titles={short(page): page.title for page in pages},
        equations=equations,
        references=BibliographyData(entries),
        url=config.get("repository", {}).get("url", ""),
    )


def write_notebooks(
    root: Path,
    html: Path,
    pages: Sequence[Page],
    executed: Mapping[str, nbformat.NotebookNode],
) -> list[Path]:
    """Write each executed chapter as a notebook that runs elsewhere, beside the pages' sources.

    Raises:
        tools.notebooks.NotebookError: on a chapter that refers to what is not there.
    """
    book, written = read_book(root, pages), []
    for page in pages:
        if page.docname in executed:
            path = html / "_sources" / f"{page.docname}.ipynb"
            path.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(portable(executed[page.docname], short(page), book), path)
            written.append(path)
    return written


def write_archive(html: Path, name: str = "amortlib-book") -> Path:
    """Write all files under `html` into a zip, in one folder of this name: all of it or nothing."""
    target, temporary = html / ARCHIVE, html / f"{ARCHIVE}.tmp"
    files = sorted(p for p in html.rglob("*") if p.is_file() and p not in {target, temporary})
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            inside = zipfile.ZipInfo(f"{name}/{path.relative_to(html).as_posix()}", _DATE)
            inside.compress_type, inside.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(inside, path.read_bytes())
    os.replace(temporary, target)
    return target
