"""Build the book: execute the chapters that need it, then render the HTML strictly.

    python -m tools.build_book [--root FOLDER] [--together N] [--strict-budgets]

A chapter is executed again when its code cells change, or anything that they can import or
read: the package, the book's kit, data and weights, the pinned requirements. A chapter whose
prose alone has changed is rendered again, not executed again. Executed chapters go into the
jupyter-cache that myst-nb reads, so the rendering step only merges outputs; the driver checks
that it did not execute anything itself.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import psutil
from jupyter_book.config import get_final_config
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from myst_nb.core.config import NbParserConfig
from myst_nb.core.read import create_nb_reader
from myst_parser.config.main import MdParserConfig
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from tools.chapters import (
    MEMORY_BUDGET_MB,
    STATE_FILE,
    WALL_BUDGET_S,
    Page,
    describe_machine,
    read_pages,
    read_state,
)
from tools.downloads import ARCHIVE, write_archive, write_notebooks

REPOSITORY = Path(__file__).resolve().parent.parent

CACHE_FOLDER = Path("_build/.jupyter_cache")
DOCTREES = Path("_build/.doctrees")
HTML = Path("_build/html")

INPUTS = ("amortlib", "book/_kit", "book/data", "book/weights", "requirements.txt")
"""What any chapter can import or read: a change here executes every chapter again."""

SITE_INPUTS = ("_config.yml", "_toc.yml", "requirements.txt", "book")
"""With the Sphinx extension and what was executed: a change here renders every page again.

All of them, because pages hang together: a citation that is new on one page renumbers those of the
list of references, and Sphinx would leave the links of the other pages as they were.
"""

EXTENSION = (
    "tools/book_extension.py",
    "tools/chapters.py",
    "tools/downloads.py",
    "tools/notebooks.py",
)
"""What shapes the pages beside the book's own files."""

CELL_TIMEOUT_S = 900
"""Seconds after which a cell is taken to hang; four times the longest on a slow machine."""

TOGETHER = 4
"""Chapters executed side by side at most: more would need more memory than a laptop may spare."""


class ChapterError(Exception):
    """A chapter could not be executed; the message names the chapter and the cell."""


@dataclass
class Execution:
    """One executed chapter: its notebook with outputs, and what it cost."""

    notebook: nbformat.NotebookNode
    wall_s: float
    peak_mb: float
    first_figure_s: float | None


@dataclass
class PeakMemory:
    """The largest resident memory of a process and its children, while it runs.

    The kernel's own high-water mark is exact where the system keeps one (Linux); sampling
    adds its children, and is all there is elsewhere.
    """

    interval_s: float = 0.2
    peak_bytes: int = 0
    _process: psutil.Process | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self, pid: int) -> None:
        """Begin to watch a process."""
        self._process = psutil.Process(pid)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(self.interval_s):
            self.sample()

    def sample(self) -> None:
        """Take one reading; a process that has ended leaves the peak as it was."""
        if self._process is None:
            return
        with contextlib.suppress(psutil.Error, OSError):
            resident = self._process.memory_info().rss
            for child in self._process.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    resident += child.memory_info().rss
            status = Path(f"/proc/{self._process.pid}/status")
            high_water = 0
            if status.exists():
                found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
                high_water = int(found.group(1)) * 1024 if found else 0
            self.peak_bytes = max(self.peak_bytes, resident, high_water)

    def stop(self) -> None:
        """Stop watching."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


def cores() -> int:
    """Return how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS has no affinity
        return os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Describe the machine that a measurement is made on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(
            r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8")
        )
        cpu = found.group(1).strip() if found else cpu
    try:
        jax = importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        jax = None
    return {
        "cores": cores(),
        "cpu": cpu,
        "system": platform.system(),
        "python": platform.python_version(),
        "jax": jax,
    }


def digest_of(root: Path, inputs: tuple[str, ...]) -> str:
    """Return one hash over the names and the content of files and folders."""
    digest = hashlib.sha256()
    for name in inputs:
        top = root / name
        files = sorted(top.rglob("*")) if top.is_dir() else [top]
        for path in files:
            if not path.is_file() or "__pycache__" in path.parts:
                continue
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def site_key(root: Path, state: dict[str, Any]) -> str:
    """Return the hash of everything that shapes the rendered pages."""
    extension = digest_of(REPOSITORY, EXTENSION)
    executed = json.dumps(state, sort_keys=True)
    text = digest_of(root, SITE_INPUTS) + extension + executed
    return hashlib.sha256(text.encode()).hexdigest()


def execution_key(notebook: nbformat.NotebookNode, inputs_digest: str) -> str:
    """Return the hash of a chapter's code cells and of all that they can import or read.

    Cell metadata belongs to it, because myst-nb takes a cell's metadata (its alt text, say)
    from the cached notebook; prose does not.
    """
    cells = [[cell.source, cell.metadata] for cell in notebook.cells if cell.cell_type == "code"]
    settings = {
        name: notebook.metadata[name]
        for name in ("kernelspec", "mystnb")
        if name in notebook.metadata
    }
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    text = json.dumps([cells, settings, inputs_digest, python], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def markdown_config(root: Path) -> MdParserConfig:
    """Return the Markdown settings that Sphinx will use, from the book's own `_config.yml`."""
    path_before = list(sys.path)
    sphinx, _ = get_final_config(
        user_yaml=root / "_config.yml", cli_config={"latex_individualpages": False}, sourcedir=root
    )
    sys.path[:] = path_before
    values = {
        name: sphinx[f"myst_{name}"]
        for name, _, item in MdParserConfig().as_triple()
        if f"myst_{name}" in sphinx and "sphinx" not in item.metadata.get("omit", [])
    }
    return MdParserConfig(**values)


def read_notebook(page: Page, config: MdParserConfig) -> nbformat.NotebookNode:
    """Read a chapter exactly as myst-nb reads it, so that both compute the same hash."""
    text = page.path.read_text(encoding="utf-8")
    reader = create_nb_reader(str(page.path), config, NbParserConfig(), text)
    if reader is None:
        raise ChapterError(f"{page.docname}: not a MyST notebook; check its front matter")
    return reader.read(text)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Return the code cells of a notebook, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kernel_environment(root: Path) -> dict[str, str]:
    """Return the environment of a chapter's kernel."""
    environment = dict(os.environ)
    environment["JAX_PLATFORMS"] = "cpu"  # the same numbers on every machine
    # The chapter must see the package beside it, whatever else is installed.
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(root), *filter(None, [environment.get("PYTHONPATH")])]
    )
    environment["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    environment.pop("MPLBACKEND", None)  # the kernel's inline backend, whoever builds
    return environment


def plain(text: str) -> str:
    """Remove terminal colours from a traceback."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)


def failure(page: Page, notebook: nbformat.NotebookNode, index: int, reason: str) -> ChapterError:
    """Say which chapter and cell failed, with its source."""
    cells = code_cells(notebook)
    number = sum(cell.cell_type == "code" for cell in notebook.cells[: index + 1])
    lines = notebook.metadata.get("source_map")
    line = f", {page.path.name} line {lines[index] + 1}" if lines else ""
    source = textwrap.indent(notebook.cells[index].source, "    ")
    return ChapterError(
        f"{page.docname}: code cell {number} of {len(cells)}{line} failed\n"
        f"  the cell:\n{source}\n  what happened:\n{textwrap.indent(plain(reason), '    ')}"
    )


def execute(page: Page, notebook: nbformat.NotebookNode, root: Path) -> Execution:
    """Execute one chapter in a fresh kernel; raise `ChapterError` when a cell fails."""
    memory = PeakMemory()
    current = 0
    first_figure_s: float | None = None

    def on_start(**_: Any) -> None:
        pid = getattr(getattr(client.km, "provisioner", None), "pid", None)
        if pid is not None:
            memory.start(pid)

    def on_cell_start(*, cell_index: int, **_: Any) -> None:
        nonlocal current
        current = cell_index

    def on_cell_executed(*, cell_index: int, **_: Any) -> None:
        nonlocal first_figure_s
        memory.sample()
        if first_figure_s is None and has_figure(notebook.cells[cell_index]):
            first_figure_s = time.perf_counter() - begin

    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        kernel_name=notebook.metadata.get("kernelspec", {}).get("name", "python3"),
        resources={"metadata": {"path": str(page.path.parent)}},
        store_widget_state=False,  # a static page shows the picture, so the state is dead weight
        record_timing=False,
        on_notebook_start=on_start,
        on_cell_start=on_cell_start,
        on_cell_executed=on_cell_executed,
    )
    begin = time.perf_counter()
    try:
        client.execute(env=kernel_environment(root))
    except CellExecutionError as error:
        raise failure(page, notebook, current, error.traceback) from None
    except CellTimeoutError:
        reason = f"The cell ran for more than {CELL_TIMEOUT_S} seconds."
        raise failure(page, notebook, current, reason) from None
    except nbformat.ValidationError as error:
        reason = f"The cell's output is not one that a notebook can hold: {error.message[:300]}"
        raise failure(page, notebook, current, reason) from None
    except DeadKernelError:
        reason = "The kernel died; most often that means that memory ran out."
        raise failure(page, notebook, current, reason) from None
    finally:
        memory.stop()
    wall_s = time.perf_counter() - begin
    return Execution(notebook, wall_s, memory.peak_bytes / 1e6, first_figure_s)


def execute_all(
    pages: list[Page], notebooks: dict[str, nbformat.NotebookNode], root: Path, together: int
) -> Iterator[tuple[Page, Execution | ChapterError]]:
    """Execute chapters, some of them at a time, and yield each as it ends.

    A chapter compiles on one core for half of its time, so that two finish sooner side by side.
    """

    def run(position: int, page: Page) -> Execution:
        print(f"[{position}/{len(pages)}] executing {page.docname} ...", flush=True)
        return execute(page, notebooks[page.docname], root)

    with ThreadPoolExecutor(together) as pool:
        futures = {pool.submit(run, n, page): page for n, page in enumerate(pages, start=1)}
        try:
            for future in as_completed(futures):
                try:
                    result = future.result()
                except ChapterError as error:
                    result = error
                yield futures[future], result
        except BaseException:
            # Ctrl-C, or a mistake: no one waits for kernels that no one will read.
            pool.shutdown(wait=False, cancel_futures=True)
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
            raise


def has_figure(cell: nbformat.NotebookNode) -> bool:
    """Whether a cell shows a picture or a live widget."""
    return any(
        "image/png" in data or "data-live=" in str(data.get("text/html", ""))
        for data in (output.get("data", {}) for output in cell.get("outputs", []))
    )


def report_stderr(page: Page, notebook: nbformat.NotebookNode) -> None:
    """Print what cells wrote to stderr: it is kept off the page, not out of sight."""
    for number, cell in enumerate(code_cells(notebook), start=1):
        text = "".join(
            output.text
            for output in cell.outputs
            if output.output_type == "stream" and output.name == "stderr"
        ).rstrip()
        if text:
            lines = plain(text).replace("\r", "\n").splitlines()
            print(f"  note: {page.docname}, code cell {number}, wrote to stderr:")
            print(textwrap.indent("\n".join(lines[-12:]), "    "))


def write_state(root: Path, state: dict[str, Any]) -> None:
    """Write the state so that a reader finds the old file or the new one, never a half."""
    path = root / STATE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(state, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


@contextlib.contextmanager
def one_build_at_a_time(root: Path) -> Generator[None]:
    """Hold the book's build lock, waiting for another build of the same folder to end."""
    try:
        import fcntl
    except ImportError:  # Windows: nothing to hold
        yield
        return
    path = root / STATE_FILE.parent / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("Another build of this book is running; waiting for it to end.", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def in_cache(cache: Any, notebook: nbformat.NotebookNode) -> bool:
    """Whether the cache holds this notebook, record and file both."""
    try:
        cache.get_cache_bundle(cache.match_cache_notebook(notebook).pk)
    except (KeyError, OSError):
        return False
    return True


def store(cache: Any, page: Page, execution: Execution, state: dict[str, Any]) -> str:
    """Put an executed chapter into the cache, drop its old record, and return its hash."""
    record = cache.cache_notebook_bundle(
        CacheBundleIn(
            execution.notebook, str(page.path), data={"execution_seconds": execution.wall_s}
        ),
        check_validity=False,
        overwrite=True,
    )
    old = state["chapters"].get(page.docname, {}).get("cache_hash")
    others = {
        entry["cache_hash"] for name, entry in state["chapters"].items() if name != page.docname
    }
    if old and old != record.hashkey and old not in others:
        for stale in cache.list_cache_records():
            if stale.hashkey == old:
                with contextlib.suppress(KeyError):
                    cache.remove_cache(stale.pk)
    return record.hashkey


def check_distinct(cache: Any, notebooks: dict[str, Any]) -> None:
    """Refuse two chapters with the same code cells: the cache could not tell them apart."""
    seen: dict[str, str] = {}
    for docname, notebook in notebooks.items():
        _, key = cache.create_hashed_notebook(notebook)
        if key in seen:
            raise ChapterError(
                f"{docname} and {seen[key]} have the same code cells, and the cache of outputs "
                "cannot tell them apart: give one of them a cell of its own"
            )
        seen[key] = docname


def render(root: Path, from_scratch: bool) -> int:
    """Run jupyter-book strictly; return its exit code."""
    if from_scratch:
        for folder in (DOCTREES, HTML):
            shutil.rmtree(root / folder, ignore_errors=True)
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(REPOSITORY), *filter(None, [environment.get("PYTHONPATH")])]
    )
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    command += ["build", str(root), "-W", "--keep-going"]
    sys.stdout.flush()
    return subprocess.run(command, cwd=root, env=environment, check=False).returncode


def budget_messages(
    state: dict[str, Any], names: list[str], wall_s: float, memory_mb: float, strict: bool
) -> tuple[list[str], list[str]]:
    """Compare every chapter with its budget; return (errors, warnings)."""
    errors, warnings = [], []
    for name in names:
        entry = state["chapters"].get(name)
        if entry is None:
            continue
        if entry["peak_mb"] > memory_mb:
            errors.append(
                f"{name} used {entry['peak_mb']:.0f} MB of memory; its budget is {memory_mb:.0f} MB"
            )
        if entry["wall_s"] > wall_s:
            text = f"{name} took {entry['wall_s']:.1f} s; its budget is {wall_s:.0f} s"
            # Seconds are the machine's as much as the chapter's, and a slow one is no mistake.
            (errors if strict else warnings).append(text)
    return errors, warnings


def print_times(
    state: dict[str, Any], names: list[str], executed: set[str], failed: set[str]
) -> None:
    """Print the table of what each chapter costs."""
    if not names:
        return
    width = max(len(name) for name in names)
    print(f"\n{'chapter':<{width}}  {'wall s':>7}  {'peak MB':>8}  this build")
    for name in names:
        entry = state["chapters"].get(name)
        if name in failed or entry is None:
            print(f"{name:<{width}}  {'-':>7}  {'-':>8}  FAILED")
            continue
        what = "executed" if name in executed else "unchanged"
        print(f"{name:<{width}}  {entry['wall_s']:>7.1f}  {entry['peak_mb']:>8.0f}  {what}")
    for text in sorted(
        {describe_machine(state["chapters"][n]["machine"]) for n in names if n in state["chapters"]}
    ):
        print(f"measured on {text}")


def build(
    root: Path,
    *,
    together: int = 1,
    strict_budgets: bool = False,
    wall_budget_s: float = WALL_BUDGET_S,
    memory_budget_mb: float = MEMORY_BUDGET_MB,
) -> int:
    """Build the book in `root`; return the exit code (0 only when all of it succeeded)."""
    begin = time.perf_counter()
    root = root.resolve()
    pages = read_pages(root)
    chapters = [page for page in pages if page.is_notebook]
    config = markdown_config(root)
    state = read_state(root)
    inputs_digest = digest_of(root, INPUTS)
    cache = get_cache(str(root / CACHE_FOLDER))

    notebooks = {page.docname: read_notebook(page, config) for page in chapters}
    check_distinct(cache, notebooks)
    names = [page.docname for page in chapters]
    executed: set[str] = set()
    failures: dict[str, str] = {}

    keys = {name: execution_key(notebook, inputs_digest) for name, notebook in notebooks.items()}
    due = [
        page
        for page in chapters
        if state["chapters"].get(page.docname, {}).get("key") != keys[page.docname]
        or not in_cache(cache, notebooks[page.docname])
    ]
    for page, result in execute_all(due, notebooks, root, together):
        if isinstance(result, ChapterError):
            failures[page.docname] = str(result)
            print(f"  FAILED {result}", flush=True)
            continue
        report_stderr(page, result.notebook)
        print(f"  {page.docname}: {result.wall_s:.1f} s, {result.peak_mb:.0f} MB", flush=True)
        cache_hash = store(cache, page, result, state)
        state["chapters"][page.docname] = {
            "key": keys[page.docname],
            "cache_hash": cache_hash,
            "wall_s": round(result.wall_s, 2),
            "peak_mb": round(result.peak_mb, 1),
            "first_figure_s": result.first_figure_s and round(result.first_figure_s, 1),
            "code_cells": len(code_cells(result.notebook)),
            "machine": machine() | {"together": min(together, len(due))},
        }
        write_state(root, state)
        executed.add(page.docname)

    gone = set(state["chapters"]) - set(names)
    if gone:
        state["chapters"] = {n: e for n, e in state["chapters"].items() if n not in gone}
        write_state(root, state)

    if failures:
        print_times(state, names, executed, set(failures))
        print(f"\n{len(failures)} of {len(chapters)} chapters failed, and no page was rendered:")
        for text in failures.values():
            print(f"  {text.splitlines()[0]}")
        return 1

    # Sphinx repeats a warning only when it reads the page again. So a run that was not clean
    # leaves no site key behind, and the next one renders every page from scratch.
    key_file = root / STATE_FILE.parent / "site_key"
    wanted = site_key(root, state)
    from_scratch = not key_file.exists() or key_file.read_text(encoding="utf-8") != wanted
    key_file.unlink(missing_ok=True)
    records = {record.pk for record in cache.list_cache_records()}
    code = render(root, from_scratch)
    if {record.pk for record in cache.list_cache_records()} - records:
        print("\nThe rendering step executed a chapter itself: the driver and myst-nb disagree")
        print("on how a chapter is read. The build does not count as strict.")
        code = code or 1
    if code:
        print(f"\nThe pages were not rendered cleanly (exit code {code}); see the warnings above.")
        return code
    if from_scratch or not (root / HTML / ARCHIVE).exists():
        merged = {n: cache.merge_match_into_notebook(nb)[1] for n, nb in notebooks.items()}
        write_notebooks(root, root / HTML, pages, merged)
        write_archive(root / HTML)
    key_file.write_text(wanted, encoding="utf-8")

    errors, warnings = budget_messages(
        state, names, wall_budget_s, memory_budget_mb, strict_budgets
    )
    print_times(state, names, executed, set())
    for text in warnings:
        print(f"\n*** OVER BUDGET: {text} ***")
    for text in errors:
        print(f"\nOver budget, and the build fails: {text}")
    print(f"\n{len(executed)} executed, {len(names) - len(executed)} unchanged, ", end="")
    print(f"{time.perf_counter() - begin:.1f} s in all")
    print(f"Open {root / HTML / 'index.html'}")
    return 1 if errors else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the build from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.build_book", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="folder with _toc.yml")
    parser.add_argument(
        "--strict-budgets", action="store_true", help="any chapter over its budget fails"
    )
    parser.add_argument(
        "--together",
        type=int,
        default=min(cores(), TOGETHER),
        help="chapters executed side by side, of up to 1 GB each (default: %(default)s)",
    )
    parser.add_argument("--wall-budget-s", type=float, default=WALL_BUDGET_S)
    parser.add_argument("--memory-budget-mb", type=float, default=MEMORY_BUDGET_MB)
    options = parser.parse_args(arguments)
    if options.together < 1:
        parser.error(f"--together takes at least 1 chapter at a time, and was {options.together}")
    try:
        with one_build_at_a_time(options.root.resolve()):
            return build(
                options.root,
                together=options.together,
                strict_budgets=options.strict_budgets,
                wall_budget_s=options.wall_budget_s,
                memory_budget_mb=options.memory_budget_mb,
            )
    except (ChapterError, ValueError, FileNotFoundError) as error:
        print(f"The book cannot be built: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
