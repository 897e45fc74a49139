"""The build driver, on a book of two small chapters with a package of one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bs4 import BeautifulSoup

from tools import build_book
from tools.build_book import budget_messages
from tools.chapters import STATE_FILE, within_budget

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

HEADER = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  name: python3
  display_name: Python 3
kind: chapter
description: About {name}.
minutes: {minutes}
---
# Chapter {name}
"""

# Every execution leaves a line in a file outside the book, which is how they are counted.
FIRST = (
    HEADER.format(name="one", minutes=11)
    + """
```{code-cell} ipython3
import os
from pathlib import Path
import amortlib
with Path(os.environ["EXECUTIONS"]).open("a") as file:
    file.write("one\\n")
print("value", amortlib.VALUE)
```

```{code-cell} ipython3
---
mystnb:
  image:
    alt: A single red point stands for the picture of a slider.
---
import base64
import sys
from IPython.display import display
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8DwHwAFBQIAX8jx"
    "0gAAAABJRU5ErkJggg=="
)
display(
    {
        "application/vnd.jupyter.widget-view+json": {"version_major": 2, "model_id": "a"},
        "image/png": PIXEL,
        "text/plain": "Slider()",
    },
    raw=True,
)
print("a progress bar", file=sys.stderr)
```
"""
)

SECOND = (
    HEADER.format(name="two", minutes=22)
    + """
Prose.

```{code-cell} ipython3
import os
from pathlib import Path
with Path(os.environ["EXECUTIONS"]).open("a") as file:
    file.write("two\\n")
block = bytearray(120_000_000)
block[::4096] = b"x" * len(block[::4096])
```

```{code-cell} ipython3
1 + 1
```
"""
)

INDEX = """# Small book

```{chapter-table}
```

```{chapter-times}
```
"""


@dataclass
class Book:
    """A small book in a folder of its own."""

    root: Path

    def build(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "EXECUTIONS": str(self.log)}
        command = [sys.executable, "-m", "tools.build_book", "--root", str(self.root)]
        return subprocess.run(
            [*command, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    @property
    def log(self) -> Path:
        return self.root.parent / "executions"

    def executions(self) -> list[str]:
        """Return the chapters executed since the last call, sorted: some run side by side."""
        found = self.log.read_text().split() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return sorted(found)

    def state(self) -> dict[str, Any]:
        return json.loads((self.root / STATE_FILE).read_text())["chapters"]

    def page(self, name: str) -> BeautifulSoup:
        path = self.root / "_build" / "html" / "book" / f"{name}.html"
        return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.root / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Book:
    """Build the small book once."""
    root = tmp_path_factory.mktemp("small") / "root"
    (root / "book" / "assets").mkdir(parents=True)
    (root / "amortlib").mkdir()
    (root / "amortlib" / "__init__.py").write_text("VALUE = 1\n")
    shutil.copy(ROOT / "_config.yml", root)
    shutil.copytree(ROOT / "book" / "assets", root / "book" / "assets", dirs_exist_ok=True)
    toc = "format: jb-book\nroot: book/index\nchapters:\n- file: book/one\n- file: book/two\n"
    (root / "_toc.yml").write_text(toc)
    (root / "book" / "references.bib").write_text("")
    for name, text in {"index": INDEX, "one": FIRST, "two": SECOND}.items():
        (root / "book" / f"{name}.md").write_text(text)
    book = Book(root)
    run = book.build()
    assert run.returncode == 0, run.stdout
    assert book.executions() == ["one", "two"]
    assert "a progress bar" in run.stdout
    assert f"Open {root / '_build' / 'html' / 'index.html'}" in run.stdout
    return book


@pytest.fixture
def book(built: Book, tmp_path: Path) -> Book:
    """A copy of the built book to change, its times of modification kept."""
    shutil.copytree(built.root, tmp_path / "root")
    return Book(tmp_path / "root")


@pytest.fixture
def execute(
    book: Book, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Build all but the pages, which take longest, and return the exit code and the text."""
    monkeypatch.setenv("EXECUTIONS", str(book.log))
    monkeypatch.setattr(build_book, "render", lambda root, from_scratch: 0)

    def run(*arguments: str) -> tuple[int, str]:
        code = build_book.main(["--root", str(book.root), *arguments])
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return run


def test_a_second_build_executes_nothing(built: Book) -> None:
    run = built.build()
    assert run.returncode == 0, run.stdout
    assert built.executions() == []
    assert "0 executed, 2 unchanged" in run.stdout
    print(run.stdout.splitlines()[-2])


def test_times_and_memory_are_recorded_and_shown(built: Book) -> None:
    state = built.state()
    assert set(state) == {"book/one", "book/two"}
    for entry in state.values():
        assert entry["wall_s"] > 0
        assert entry["peak_mb"] > 10
        assert entry["machine"]["cores"] >= 1
    assert 0 < state["book/one"]["first_figure_s"] < state["book/one"]["wall_s"]
    assert state["book/two"]["first_figure_s"] is None
    # Chapter two fills 120 MB that chapter one does not.
    extra = state["book/two"]["peak_mb"] - state["book/one"]["peak_mb"]
    assert 90 < extra < 200
    table = built.page("index").find("table", class_="chapter-times")
    assert table is not None
    rows = [[cell.get_text(strip=True) for cell in row.find_all("td")] for row in table("tr")]
    peak = f"{state['book/two']['peak_mb']:.0f}"
    wall = f"{state['book/two']['wall_s']:.1f}"
    assert rows[2] == ["Chapter two", "none", wall, peak, "yes"]


def test_the_landing_table_comes_from_the_front_matter(built: Book) -> None:
    table = built.page("index").find("table", class_="chapter-table")
    assert table is not None
    rows = [[cell.get_text(strip=True) for cell in row.find_all("td")] for row in table("tr")]
    assert rows[1:] == [["Chapter one", "About one.", "11"], ["Chapter two", "About two.", "22"]]
    assert [link["href"] for link in table("a")] == ["one.html", "two.html"]


def test_a_picture_of_a_widget_wins_and_keeps_its_alt_text(built: Book) -> None:
    page = built.page("one")
    (image,) = page.find("article")("img")
    assert image["alt"] == "A single red point stands for the picture of a slider."
    outputs = "".join(str(output) for output in page("div", class_="cell_output"))
    assert image["src"] in outputs
    assert "widget-view" not in outputs
    assert "Slider()" not in outputs
    assert not page("script", type=re.compile("widget"))


def test_progress_stays_off_the_page(built: Book) -> None:
    outputs = [output.get_text() for output in built.page("one")("div", class_="cell_output")]
    assert any("value 1" in text for text in outputs)
    assert not any("a progress bar" in text for text in outputs)


@pytest.mark.parametrize("name", ["amortlib/deep/new.py", "book/_kit/x.py", "book/data/a.csv"])
def test_an_edit_of_what_chapters_use_executes_them_again(
    book: Book, execute: Callable[..., tuple[int, str]], name: str
) -> None:
    path = book.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("VALUE = 2\n")
    assert execute()[0] == 0
    assert book.executions() == ["one", "two"]


def test_an_edit_of_the_package_reaches_the_page(book: Book) -> None:
    (book.root / "amortlib" / "__init__.py").write_text("VALUE = 2\n")
    run = book.build()
    assert run.returncode == 0, run.stdout
    assert book.executions() == ["one", "two"]
    assert "value 2" in book.page("one").get_text()
    assert "value 1" not in book.page("one").get_text()


def test_an_edit_of_one_chapters_code_executes_that_chapter(
    book: Book, execute: Callable[..., tuple[int, str]]
) -> None:
    book.edit("book/two.md", "1 + 1", "20 + 21")
    assert execute()[0] == 0
    assert book.executions() == ["two"]
    # The cache holds the two chapters as they are, and no record of the old one.
    executed = book.root / "_build" / ".jupyter_cache" / "executed"
    assert len(list(executed.iterdir())) == 2


def test_an_edit_of_an_alt_text_shows(book: Book) -> None:
    book.edit("book/one.md", "A single red point stands", "A lone red point stands")
    assert book.build().returncode == 0
    assert book.executions() == ["one"]
    assert book.page("one").find("article").find("img")["alt"].startswith("A lone red point")


def test_an_edit_of_prose_renders_and_executes_nothing(book: Book) -> None:
    book.edit("book/two.md", "Prose.", "Other prose.")
    assert book.build().returncode == 0
    assert book.executions() == []
    assert "Other prose." in book.page("two").get_text()


def test_a_lost_cache_is_filled_again(book: Book, execute: Callable[..., tuple[int, str]]) -> None:
    shutil.rmtree(book.root / "_build" / ".jupyter_cache")
    assert execute()[0] == 0
    assert book.executions() == ["one", "two"]


def test_a_damaged_state_counts_as_nothing_executed(
    book: Book, execute: Callable[..., tuple[int, str]]
) -> None:
    (book.root / STATE_FILE).write_text('{"format": 1, "chap')
    assert execute()[0] == 0
    assert book.executions() == ["one", "two"]


def test_a_raising_cell_fails_the_build_and_is_named(
    book: Book, execute: Callable[..., tuple[int, str]]
) -> None:
    before = book.state()
    book.edit("book/one.md", 'print("a progress bar", file=sys.stderr)', "planted = 1 / 0")
    book.edit("book/two.md", "1 + 1", "2 + 2")
    code, text = execute()
    assert code != 0
    assert "book/one: code cell 2 of 2, one.md line" in text
    assert "planted = 1 / 0" in text
    assert "ZeroDivisionError" in text
    assert "no page was rendered" in text
    # The other chapter was still executed, and the failed one's record is the earlier one.
    assert book.executions() == ["one", "two"]
    after = book.state()
    assert after["book/one"] == before["book/one"]
    assert after["book/two"]["key"] != before["book/two"]["key"]
    # Taking the mistake back needs no execution: its outputs are still in the cache.
    book.edit("book/one.md", "planted = 1 / 0", 'print("a progress bar", file=sys.stderr)')
    assert execute()[0] == 0
    assert book.executions() == []


def test_chapters_run_side_by_side_and_one_by_one(
    book: Book, execute: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    # Each chapter waits for the other to begin: side by side both end, one by one the first fails.
    wait = """import os, pathlib, time
mine, other = (pathlib.Path({folder!r}) / name for name in {names!r})
mine.touch()
begin = time.monotonic()
while not other.exists():
    assert time.monotonic() < begin + {limit}, "alone"
    time.sleep(0.1)
"""
    paths = [book.root / "book" / f"{name}.md" for name in ("one", "two")]
    before = [path.read_text() for path in paths]

    def plant(folder: Path, limit: float) -> None:
        folder.mkdir()
        for path, text, names in zip(paths, before, (("one", "two"), ("two", "one")), strict=True):
            cell = wait.format(folder=str(folder), names=names, limit=limit)
            path.write_text(f"{text}\n```{{code-cell}} ipython3\n{cell}```\n")

    plant(tmp_path / "both", 60)
    code, text = execute("--together", "2")
    assert code == 0, text
    assert "2 chapters at a time" in text
    plant(tmp_path / "each", 1)
    code, text = execute("--together", "1")
    assert code == 1
    assert "alone" in text
    with pytest.raises(SystemExit):
        execute("--together", "0")


def test_a_dying_kernel_fails_the_build_and_is_named(
    book: Book, execute: Callable[..., tuple[int, str]]
) -> None:
    book.edit("book/two.md", "1 + 1", "os._exit(1)")
    code, text = execute()
    assert code != 0
    assert "book/two: code cell 2 of 2" in text
    assert "The kernel died" in text


def test_a_warning_fails_the_build_every_time(book: Book) -> None:
    book.edit("book/two.md", "Prose.", "See [](nowhere.md).")
    for _ in range(2):  # Sphinx by itself would not repeat a warning of an unchanged page
        run = book.build()
        assert run.returncode != 0, run.stdout
        assert "nowhere" in run.stdout
        assert "not rendered cleanly" in run.stdout
    book.edit("book/two.md", "See [](nowhere.md).", "Prose.")
    run = book.build()
    assert run.returncode == 0, run.stdout
    assert book.executions() == []


def test_memory_over_budget_fails_the_build_every_time(
    book: Book, execute: Callable[..., tuple[int, str]]
) -> None:
    for _ in range(2):
        code, text = execute("--memory-budget-mb", "150")
        assert code != 0
        assert "book/two used" in text
        assert "its budget is 150 MB" in text
    assert execute()[0] == 0


def test_chapters_with_equal_cells_are_refused(
    book: Book, execute: Callable[..., tuple[int, str]]
) -> None:
    shutil.copy(book.root / "book" / "one.md", book.root / "book" / "two.md")
    code, text = execute()
    assert code != 0
    assert "book/two and book/one have the same code cells" in text


def test_a_page_that_is_missing_is_named(
    book: Book, execute: Callable[..., tuple[int, str]]
) -> None:
    (book.root / "book" / "two.md").unlink()
    code, text = execute()
    assert code != 0
    assert "_toc.yml names book/two" in text


def test_a_plain_jupyter_book_build_works_too(book: Book) -> None:
    shutil.rmtree(book.root / "_build")
    shutil.copytree(ROOT / "tools", book.root / "tools")
    run = subprocess.run(
        [str(Path(sys.executable).with_name("jupyter-book")), "build", ".", "-W", "--keep-going"],
        cwd=book.root,
        env={**os.environ, "EXECUTIONS": str(book.log), "PYTHONPATH": str(book.root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert book.executions() == ["one", "two"]
    assert "Nothing has been measured yet" in book.page("index").get_text()


@pytest.mark.parametrize(
    ("wall_s", "peak_mb", "together", "word"),
    [
        (90.0, 1000.0, 2, "yes"),
        (90.1, 1000.0, 2, "not alone"),
        (90.1, 1000.0, 1, "no"),
        (10.0, 1001.0, 2, "no"),
    ],
)
def test_a_chapter_that_ran_beside_others_is_not_judged_by_its_time(
    wall_s: float, peak_mb: float, together: int, word: str
) -> None:
    entry = {"wall_s": wall_s, "peak_mb": peak_mb, "machine": {"together": together}}
    assert within_budget(entry) == word


def test_budgets() -> None:
    state = {
        "chapters": {
            "slow": {"wall_s": 200.0, "peak_mb": 10.0},
            "stuck": {"wall_s": 400.0, "peak_mb": 10.0},
            "large": {"wall_s": 1.0, "peak_mb": 1001.0},
            "fits": {"wall_s": 90.0, "peak_mb": 1000.0},
        }
    }
    names = [*state["chapters"], "never measured"]
    errors, warnings = budget_messages(state, names, 90.0, 1000.0, strict=False)
    assert [text.split()[0] for text in errors] == ["large"]
    assert [text.split()[0] for text in warnings] == ["slow", "stuck"]
    errors, warnings = budget_messages(state, names, 90.0, 1000.0, strict=True)
    assert [text.split()[0] for text in errors] == ["slow", "stuck", "large"]
    assert warnings == []
