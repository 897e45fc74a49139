"""The house's rules over the repository: style, types, no outputs, no large files."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tools.chapters import read_pages
from tools.format_chapters import format_page, long_lines
from tools.format_chapters import main as format_chapters
from tools.no_outputs import complaint

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(sys.executable).parent

LARGEST = 500_000


def repository_files() -> list[Path]:
    """Return the files of the repository: git's when it is a checkout, else all of the tree."""
    skip = {".git", ".venv", "_build", "__pycache__", "dist"}
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        paths = [ROOT / name for name in run.stdout.split("\0") if name]
    else:
        paths = [path for path in ROOT.rglob("*") if not skip & set(path.parts)]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("ty", "check", "amortlib"),
        ("ty", "check", "tools"),
    ],
    ids=" ".join,
)
def test_style_and_types(command: tuple[str, ...]) -> None:
    program = TOOLS / command[0]
    assert program.exists(), f"{command[0]} is not installed beside {sys.executable}"
    run = subprocess.run(
        [str(program), *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_code_cells_are_formatted_and_fit_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert format_chapters(["--check"]) == 0, capsys.readouterr().out


def test_a_cell_is_formatted_and_its_options_are_kept() -> None:
    page = """Prose  stays .

````{solution-start} a
````

```{code-cell} ipython3
---
mystnb:
  image:
    alt: A  sentence.
---
x = {'a' :1}
```

```{code-cell} ipython3
:tags: [remove-cell]

f( 1 )
```
"""
    wanted = page.replace("{'a' :1}", '{"a": 1}').replace("f( 1 )", "f(1)")
    assert format_page(page) == wanted
    assert long_lines(page.replace("f( 1 )", "f(" + "1" * 90 + ")")) == ["f(" + "1" * 90 + ")"]


def test_no_import_star_anywhere() -> None:
    for path in repository_files():
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    assert all(name.name != "*" for name in node.names), f"{path}:{node.lineno}"
        elif path.suffix == ".md" and path.parent.name == "book":
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"^\s*from \S+ import \*", text, flags=re.MULTILINE), path


def test_the_package_leaves_the_settings_of_jax_alone() -> None:
    for path in (ROOT / "amortlib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert not called.endswith("config.update"), f"{path}:{node.lineno}"


def test_no_outputs_are_stored() -> None:
    stored = [path for path in repository_files() if path.suffix in {".ipynb", ".md"}]
    assert stored
    assert [text for path in stored if (text := complaint(path))] == []


def test_a_stored_output_is_caught(tmp_path: Path) -> None:
    notebook = tmp_path / "x.ipynb"
    notebook.write_text('{"cells": [{"outputs": [{"text": "1"}]}]}', encoding="utf-8")
    assert "holds outputs" in (complaint(notebook) or "")
    page = tmp_path / "x.md"
    page.write_text("![a](data:image/png;base64,AAAA)", encoding="utf-8")
    assert "embedded picture" in (complaint(page) or "")


def test_no_large_files() -> None:
    large = {
        path.relative_to(ROOT).as_posix(): path.stat().st_size
        for path in repository_files()
        if path.stat().st_size > LARGEST
    }
    assert large == {}


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    assert {"book", "test", "quick", "lint", "pins", "clean"} <= targets
    for name in ("README.md", "CONTRIBUTING.md", ".pre-commit-config.yaml", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        named = set(re.findall(r"(?:`|^|timed )make ([a-z]+)\b", text, flags=re.MULTILINE))
        assert named <= targets, f"{name} names {sorted(named - targets)}"


def test_ci_runs_what_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.split("```sh\n", 1)[1].split("```", 1)[0]
    said = re.findall(r"^make \w+", block, flags=re.MULTILINE)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"^timed (make \w+)", script, flags=re.MULTILINE) == said
    assert "set -euo pipefail" in script


def test_make_does_not_mask_a_failure_behind_a_pipe(tmp_path: Path) -> None:
    head = (ROOT / "Makefile").read_text(encoding="utf-8").split("PYTHON ?=", 1)[0]
    (tmp_path / "Makefile").write_text(head + "\nx:\n\t@false | cat\n", encoding="utf-8")
    run = subprocess.run(["make", "x"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode != 0


def test_make_refuses_an_unsupported_python(tmp_path: Path) -> None:
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    fake = tmp_path / "python3"
    # An interpreter that fails the version question, as an older one would.
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
    fake.chmod(0o755)
    run = subprocess.run(
        ["make", "book", f"PYTHON={fake}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "needs Python 3.11, 3.12 or 3.13" in run.stderr
    assert "PYTHON=" in run.stderr
    assert not (tmp_path / ".venv").exists()


def test_executable_scripts() -> None:
    for name in (".ci/run", "postBuild"):
        path = ROOT / name
        assert path.stat().st_mode & 0o111, f"{name} must be executable"
        assert "set -euo pipefail" in path.read_text(encoding="utf-8")
    assert "jupytext-config set-default-viewer markdown" in (ROOT / "postBuild").read_text()


def test_pre_commit_hooks_call_programs_that_exist() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    assert any("ruff" in entry for entry in entries)
    for entry in entries:
        assert (TOOLS / Path(entry.split()[0]).name).exists(), entry


def test_chapters_open_as_notebooks() -> None:
    """JupyterLab and Binder need the jupytext and kernelspec headers."""
    for page in read_pages(ROOT):
        if page.is_notebook:
            text_format = page.front_matter["jupytext"]["text_representation"]
            assert text_format["format_name"] == "myst", page.docname
            assert page.front_matter["kernelspec"]["name"] == "python3", page.docname


def test_no_test_is_left_out() -> None:
    """What cannot be run fails, and says what it misses: a test that is skipped shows nothing."""
    words = re.compile(r"pytest\.(skip|xfail|importorskip)\b|mark\.(skip|skipif|xfail)\b")
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__).resolve()]
    assert tests
    left = [str(path.relative_to(ROOT)) for path in tests if words.search(path.read_text("utf-8"))]
    assert left == []
