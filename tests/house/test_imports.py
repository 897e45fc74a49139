"""The order of the house: modules of amortlib import downwards only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "amortlib"

ORDER = [
    "types",
    "export",
    "gaussian",
    "modes",
    "dynamics",
    "observation",
    "problems",
    "pairs",
    "energy",
    "laplace",
    "solvers",
    "encoders",
    "heads",
    "posterior",
    "symmetry",
    "supports",
    "refine",
    "search",
    "nested",
    "objectives",
    "training",
    "calibration",
    "guard",
    "bundle",
    "catalogue",
    "alert",
    "deploy",
]
"""A module may import only modules that stand before it (or belong to its own folder)."""

FORBIDDEN = {
    "heads": {"energy", "solvers", "laplace"},
}
"""Beyond the order: heads never see energies."""

CONCRETE_HEADS_HIDDEN_FROM = {"training", "calibration"}
"""These work with any head, so they may import `heads.base` and nothing else of heads."""

OUTSIDE = {"matplotlib", "ipywidgets", "anywidget", "IPython", "_kit", "book", "tools", "tests"}
"""Nothing in the package may import these."""


def imported(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of everything that a file imports, relative ones resolved."""
    parts = (package.name, *path.relative_to(package).with_suffix("").parts)
    folder = parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = folder[: len(folder) - node.level + 1]
                base = ".".join((*above, *filter(None, [node.module])))
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def violations(package: Path) -> list[str]:
    """Return one message for every import that breaks the order."""
    found = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        own = relative.parts[0].removesuffix(".py")
        for line, name in imported(path, package):
            where = f"{package.name}/{relative.as_posix()}:{line}"
            top, *rest = name.split(".")
            if top in OUTSIDE:
                found.append(f"{where} imports {name}; the package stands without it")
            if name.endswith(".*"):
                found.append(f"{where} uses import *")
            if top != package.name or own == "__init__":
                continue
            other = rest[0] if rest else ""
            if other not in ORDER or own not in ORDER:
                # Names of the package itself (its version) would be a circle.
                found.append(f"{where} imports {name}, which has no place in the order")
            elif ORDER.index(other) > ORDER.index(own):
                found.append(f"{where} imports {name}, which stands above it")
            elif other in FORBIDDEN.get(own, set()):
                found.append(f"{where} imports {name}; {own} never see {other}")
            elif own in CONCRETE_HEADS_HIDDEN_FROM and other == "heads" and rest[1:2] != ["base"]:
                found.append(f"{where} imports {name}; {own} never sees concrete heads")
    return found


def test_every_module_has_its_place() -> None:
    modules = {
        path.name.removesuffix(".py")
        for path in PACKAGE.iterdir()
        if (path.suffix == ".py" and path.name != "__init__.py")
        or (path.is_dir() and (path / "__init__.py").exists())
    }
    assert modules
    assert modules <= set(ORDER), f"no place in the order: {sorted(modules - set(ORDER))}"


def test_imports_go_downwards() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("gaussian.py", "from amortlib.energy import Energy", "stands above it"),
        ("gaussian.py", "from .energy import Energy", "stands above it"),
        ("gaussian.py", "from . import energy", "stands above it"),
        ("energy.py", "def f():\n    import amortlib.training", "stands above it"),
        ("heads/flow.py", "from amortlib.energy import Energy", "never see energy"),
        ("heads/flow.py", "from ..laplace import x", "never see laplace"),
        ("training.py", "from amortlib.heads.regression import Head", "concrete heads"),
        ("calibration.py", "from amortlib.heads import regression", "concrete heads"),
        ("types.py", "import matplotlib.pyplot as plt", "stands without it"),
        ("types.py", "from ipywidgets import interact", "stands without it"),
        ("types.py", "from numpy import *", "import *"),
        ("types.py", "from amortlib import __version__", "no place in the order"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path: Path, file: str, line: str, message: str) -> None:
    path = tmp_path / "amortlib" / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n", encoding="utf-8")
    (found,) = violations(tmp_path / "amortlib")
    assert message in found
    assert file in found


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("energy.py", "from amortlib.gaussian import Gaussian"),
        ("heads/flow.py", "from amortlib.heads.base import Head"),
        ("heads/flow.py", "from .base import Head"),
        ("heads/flow.py", "from amortlib.encoders import Encoder"),
        ("training.py", "from amortlib.heads.base import Head"),
        ("types.py", "import numpy as np"),
    ],
)
def test_an_allowed_import_passes(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / "amortlib" / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n", encoding="utf-8")
    assert violations(tmp_path / "amortlib") == []
