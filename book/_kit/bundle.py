"""The JavaScript of the live widgets as one text that imports nothing.

A page opened from disk may not import modules, and JupyterLab takes a widget as one module. The
sources in `js/` are modules of our own: named exports, relative imports, no cycles. Each becomes a
function of its own scope that returns what it exports, in the order in which they are needed.
"""

from __future__ import annotations

import re
from pathlib import Path

JS = Path(__file__).parent / "js"

_IMPORT = re.compile(r'^import \{([^}]*)\} from "(\.{1,2}/[\w./-]+)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?:(?:async )?function\*?|class|const|let) (\w+)", re.MULTILINE)
_LEFT = re.compile(r"^\s*(?:import|export)\b.*", re.MULTILINE)


class BundleError(ValueError):
    """A source that is not of the plain form that the bundle takes; says which and where."""


def bundle(entry: str = "live.mjs", folder: Path = JS) -> str:
    """Return a script that defines the constant `live`: what the entry exports.

    Args:
        entry: name of the module to start from.
        folder: where the modules are.

    Raises:
        BundleError: on a missing module, a cycle, or an import or export of another form.
    """
    parts: dict[Path, str] = {}
    _add((folder / entry).resolve(), folder.resolve(), parts, ())
    body = "".join(parts.values())
    last = _name((folder / entry).resolve(), folder.resolve())
    return f'"use strict";\n{body}const live = {last};\n'


def module(folder: Path = JS) -> str:
    """The front-end for anywidget: a module whose default export renders a model."""
    return f"{bundle(folder=folder)}export default {{ render: live.render }};\n"


def page_script(folder: Path = JS) -> str:
    """The script for a static page: starts every widget on it when the page is read."""
    start = "live.startAll(document);"
    return f"(() => {{\n{bundle(folder=folder)}{start}\n}})();\n"


def _name(path: Path, folder: Path) -> str:
    return "m_" + re.sub(r"\W", "_", str(path.relative_to(folder).with_suffix("")))


def _add(path: Path, folder: Path, parts: dict[Path, str], way: tuple[Path, ...]) -> None:
    if path in parts:
        return
    if path in way:
        raise BundleError(f"expected modules without a cycle, got {[p.name for p in (*way, path)]}")
    if not path.is_file():
        needs = f", which {way[-1].name} imports" if way else ""
        raise BundleError(f"expected the module {path.name}{needs}, found none in {path.parent}")
    text = path.read_text(encoding="utf-8")
    for _, source in _IMPORT.findall(text):
        _add((path.parent / source).resolve(), folder, parts, (*way, path))

    def take(match: re.Match[str]) -> str:
        names = re.sub(r"\s+as\s+", ": ", match[1].strip())
        return f"const {{ {names} }} = {_name((path.parent / match[2]).resolve(), folder)};\n"

    exported = _EXPORT.findall(text)
    text = re.sub(r"^export (?=async|function|class|const|let)", "", text, flags=re.MULTILINE)
    text = _IMPORT.sub(take, text)
    code = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)  # words in comments are no statements
    if left := _LEFT.search(code):
        raise BundleError(f"expected imports and exports by name, got {left[0]!r} in {path.name}")
    returned = f"return {{ {', '.join(exported)} }};"
    parts[path] = f"const {_name(path, folder)} = (() => {{\n{text}{returned}\n}})();\n"
