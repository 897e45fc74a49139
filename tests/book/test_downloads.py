"""What a reader takes home: chapters as notebooks that run elsewhere, and the book in a zip."""

from __future__ import annotations

import os
import re
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbclient import NotebookClient
from pybtex.database import BibliographyData, parse_string

from tools import licences
from tools.chapters import read_page, toc_names
from tools.downloads import ARCHIVE, write_archive
from tools.licences import PACKAGES, TEXTS_FILE, write_licence_texts
from tools.notebooks import Book, NotebookError, equations_of, portable

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

NAMES = toc_names(ROOT)
NOTEBOOKS = [name for name in NAMES if read_page(ROOT, name).is_notebook]
ELSEWHERE = ("book/gibbs",)
"""Notebooks that run whole here; all of them with AMORTLIB_ALL=1. Their cells are the build's."""
if os.environ.get("AMORTLIB_ALL"):
    ELSEWHERE = tuple(NOTEBOOKS)

PAGE = """# A title

:::{admonition} Objectives
:class: tip

- one
:::

As {cite:t}`kalman1960` has it {cite:p}`kalman1960,evensen2009`, {glue:text}`share:.1f`% hold.

```{math}
:label: eq-here
x = y
```

See {eq}`eq-here`, {eq}`eq-there` and {doc}`other`.

```{exercise} Why?
:label: ex-why

Say why: {eq}`eq-here`.
```

````{solution-start} ex-why
:class: dropdown
````

Because.

````{solution-end}
````
"""

PLAIN = """# A title

> **Objectives**
>
> - one

As Kalman (1960) has it (Kalman, 1960; van Leeuwen et al., 2009), 12.3% hold.

$$
x = y
\\tag{1.1}
$$

See (1.1), (2.2) of *Another page* and *Another page*.

**Exercise: Why?**

Say why: (1.1).

**Solution: Why?**

Because."""

REFERENCES = """
@article{kalman1960, author = {Kalman, R. E.}, title = {A}, year = 1960}
@article{evensen2009, author = {van Leeuwen, P. and Evensen, G. and B, C}, title = {B}, year = 2009}
"""


def small_book() -> Book:
    return Book(
        titles={"page": "A title", "other": "Another page"},
        equations={"eq-here": ("1.1", "page"), "eq-there": ("2.2", "other")},
        references=parse_string(REFERENCES, "bibtex"),
        url="https://example.org/book",
    )


def small_notebook(text: str, value: Any = 12.34) -> nbformat.NotebookNode:
    output = nbformat.v4.new_output(
        "display_data",
        {"text/plain": repr(value)},
        metadata={"scrapbook": {"name": "share", "mime_prefix": ""}},
    )
    code = nbformat.v4.new_code_cell("glue('share', 12.34)", outputs=[output])
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text), code])


def test_a_page_becomes_plain_markdown_with_its_numbers() -> None:
    made = portable(small_notebook(PAGE), "page", small_book())
    first, setup, code = made.cells
    assert first.source == PLAIN
    assert "https://example.org/book" in setup.source
    assert code.source == "glue('share', 12.34)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{glue:text}`other:.1f`", "glued value 'other'"),
        ("{cite:p}`nobody`", "key of the bibliography, got 'nobody'"),
        ("{doc}`nowhere`", "page of the book, got 'nowhere'"),
        ("{eq}`eq-nowhere`", "labelled equation, got 'eq-nowhere'"),
        ("```{figure} a.png\n```", "nothing for the directive 'figure'"),
        ("```{math}\nx", "not closed"),
    ],
)
def test_what_leads_nowhere_is_named(text: str, message: str) -> None:
    with pytest.raises(NotebookError, match=re.escape(message)):
        portable(small_notebook(text), "page", small_book())


def test_a_bibliography_without_the_key_says_so() -> None:
    book = small_book()
    book.references = BibliographyData()
    with pytest.raises(NotebookError, match="kalman1960"):
        portable(small_notebook(PAGE), "page", book)


@pytest.mark.parametrize("docname", NOTEBOOKS)
def test_a_chapter_is_offered_as_a_notebook(html: Path, docname: str) -> None:
    """The button of the page leads to it; its cells are the page's, and its prose is plain."""
    page = BeautifulSoup((html / f"{docname}.html").read_text(encoding="utf-8"), "html.parser")
    (button,) = page.select("a.btn-download-notebook-button")
    path = (html / docname).parent / str(button["href"])
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)

    source = (ROOT / f"{docname}.md").read_text(encoding="utf-8")
    fences = re.findall(r"^```\{code-cell\}.*?^```$", source, flags=re.MULTILINE | re.DOTALL)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.id != "setup"]
    assert len(code) == len(fences)
    for cell, fence in zip(code, fences, strict=True):
        assert fence.removesuffix("```").rstrip().endswith(cell.source)
    assert any(cell.outputs for cell in code), "outputs come along"

    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.findall(r"\{[a-z:]+\}`", prose) == []
    assert re.findall(r"^(?:`{3,}|:{3,})\{.*", prose, flags=re.MULTILINE) == []
    # Numbers of formulas are those of the page.
    numbers = {box["id"]: box.select_one(".eqno").text for box in page.select("div.math[id]")}  # ty: ignore
    for label in equations_of(source):
        assert f"\\tag{{{numbers[f'equation-{label}'].strip('()#')}}}" in prose


@pytest.mark.parametrize("docname", ELSEWHERE)
def test_a_chapter_runs_elsewhere(html: Path, tmp_path: Path, docname: str) -> None:
    """Alone in an empty folder: the first cell fetches the repository, and the rest runs."""
    folder, tools = tmp_path / "elsewhere", tmp_path / "bin"
    folder.mkdir()
    tools.mkdir()
    # There is no network here: a git that knows one repository.
    git = tools / "git"
    git.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nln -s {ROOT} "$4"\n', "utf-8")
    git.chmod(0o755)
    path = html / "_sources" / f"{docname}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in {"PYTHONPATH", "MPLBACKEND", "JUPYTER_CONFIG_DIR"}
    }
    environment["PATH"] = f"{tools}{os.pathsep}{environment['PATH']}"
    client = NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(folder)}}, kernel_name="python3"
    )
    client.execute(env=environment)
    asked = (tmp_path / "asked").read_text(encoding="utf-8")
    assert asked.startswith("clone --depth=1 https://github.com/amortlib/amortlib ")
    assert (folder / "amortlib-book").is_symlink()
    assert any("image/png" in str(cell.get("outputs")) for cell in notebook.cells)


def test_the_zip_holds_the_book_and_opens_offline(html: Path, browser: Any, tmp_path: Path) -> None:
    """Unpacked elsewhere, from disk, without a network: from the first page on to a chapter."""
    page = BeautifulSoup((html / "book" / "gibbs.html").read_text(encoding="utf-8"), "html.parser")
    (button,) = page.select("a.btn-download-book-button")
    archive = (html / "book" / str(button["href"])).resolve()
    assert archive == (html / ARCHIVE).resolve()
    with zipfile.ZipFile(archive) as packed:
        assert packed.testzip() is None
        inside = set(packed.namelist())
        packed.extractall(tmp_path)
    on_disk = {p.relative_to(html).as_posix() for p in html.rglob("*") if p.is_file()}
    assert inside == {f"amortlib-book/{name}" for name in on_disk - {ARCHIVE}}

    context = browser.new_context(offline=True)
    tab = context.new_page()
    complaints: list[str] = []
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on(
        "console",
        lambda message: message.type in {"error", "warning"} and complaints.append(message.text),
    )
    tab.on("requestfailed", lambda request: complaints.append(request.url))
    tab.goto((tmp_path / "amortlib-book" / "index.html").as_uri(), wait_until="load")
    tab.wait_for_selector("table.chapter-table")
    tab.click("table.chapter-table a >> nth=2")
    tab.wait_for_selector(".live-plot")
    assert tab.evaluate("document.fonts.ready.then(() => MathJax.startup.promise).then(() => 1)")
    assert complaints == []
    context.close()


def test_every_part_of_the_pages_has_its_licence(html: Path) -> None:
    """Each file is named in the list that the pages link to, and nothing is that is not there."""
    index = (html / "book" / "index.html").read_text(encoding="utf-8")
    assert 'href="../_static/licences.txt"' in index
    text = (html / "_static" / "licences.txt").read_text(encoding="utf-8")
    patterns = [p for line in text.splitlines() if line.startswith("    ") for p in line.split()]
    static = html / "_static"
    files = [p.relative_to(static).as_posix() for p in static.rglob("*") if p.is_file()]

    def names(pattern: str, file: str) -> bool:
        return fnmatch(file, f"{pattern}*" if pattern.endswith("/") else pattern)

    assert [file for file in files if not any(names(p, file) for p in patterns)] == []
    assert [p for p in patterns if not any(names(p, file) for file in files)] == []
    # The zip carries the texts too, those that their packages come with and the two that do not.
    with zipfile.ZipFile(html / ARCHIVE) as archive:
        (inside,) = [name for name in archive.namelist() if name.endswith(f"/{TEXTS_FILE}")]
        texts = archive.read(inside).decode()
    assert [name for name in PACKAGES if f"\n{name}: LICENSE" not in f"\n{texts}"] == []
    for words in (
        "Version 2.0, January 2004",
        "END OF TERMS AND CONDITIONS",
        "SIL OPEN FONT LICENSE Version 1.1",
        "OTHER DEALINGS IN THE FONT SOFTWARE",
        "Bootstrap v5",
    ):
        assert words in texts


def test_a_package_without_its_licence_stops_the_build(tmp_path: Path) -> None:
    for broken, message in (
        ({"PACKAGES": ("no-such-package",)}, "no-such-package goes with the pages"),
        ({"APACHE": ("the Apache License", "packaging", "NONE")}, "NONE in the package packaging"),
        ({"FONTS": ("fonts", "packaging", "LICENSE.APACHE")}, "found another text"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in broken.items():
                patch.setattr(licences, name, value)
            with pytest.raises(licences.LicenceMissingError, match=message):
                write_licence_texts(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_archive_is_whole_or_not_there(tmp_path: Path) -> None:
    """The same files give the same bytes, and one that cannot be read leaves the old archive."""
    (tmp_path / "a.html").write_text("a", encoding="utf-8")
    first = write_archive(tmp_path).read_bytes()
    os.utime(tmp_path / "a.html", (1e9, 1e9))
    assert write_archive(tmp_path).read_bytes() == first
    (tmp_path / "b.html").symlink_to(tmp_path / "a.html")
    (tmp_path / "c.html").write_text("c", encoding="utf-8")
    broken = tmp_path / "c.html"
    original = Path.read_bytes

    def read(path: Path) -> bytes:
        if path == broken:
            raise OSError("the disk is gone")
        return original(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        with pytest.raises(OSError, match="the disk is gone"):
            write_archive(tmp_path)
    assert (tmp_path / ARCHIVE).read_bytes() == first
