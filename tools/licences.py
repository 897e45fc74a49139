"""The texts of the licences of what the pages carry, from the installed packages themselves.

`book/assets/licences.txt` says what is whose and under which licence. Most of these ask that their
text goes with every copy, and a zip of the book is a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

TEXTS_FILE = "licence-texts.txt"

PACKAGES = (
    "pydata-sphinx-theme",  # with those of Bootstrap's and Font Awesome's scripts
    "sphinx-book-theme",
    "sphinx",
    "pygments",
    "accessible-pygments",
    "sphinx-copybutton",
    "sphinx-togglebutton",
    "sphinx-design",
    "myst-nb",
    "sphinx-exercise",
)
"""Packages that put files of their own on the pages, and come with their licence."""

APACHE = "the Apache License 2.0 (MathJax)", "packaging", "LICENSE.APACHE"
FONTS = "the SIL Open Font License 1.1 (Font Awesome's fonts)", "matplotlib", "LICENSE_STIX"
"""Licences of what comes without their text: the text is the same in another package."""

FONTS_BEGIN = "SIL OPEN FONT LICENSE Version 1.1"


class LicenceMissingError(RuntimeError):
    """A package that has no licence where one is looked for."""


def licence_texts() -> str:
    """All of them, one after the other, each below the name of what it belongs to.

    Raises:
        LicenceMissingError: where a package, or the licence in it, is not found.
    """
    parts = [
        (f"{name}: {file.name}", _read(found, file))
        for name in PACKAGES
        for found in [_installed(name)]
        for file in _licences(found, name)
    ]
    for title, name, file in (APACHE, FONTS):
        found = _installed(name)
        at = [path for path in found.files or () if PurePosixPath(path).name == file]
        if not at:
            raise LicenceMissingError(f"expected {file} in the package {name}, found none")
        parts.append((title, _read(found, PurePosixPath(at[0]))))
    title, text = parts[-1]
    if FONTS_BEGIN not in text:
        raise LicenceMissingError(f"expected {FONTS_BEGIN!r} in {FONTS[2]}, found another text")
    parts[-1] = title, text[text.index(FONTS_BEGIN) :]
    return (
        "\n\n".join(f"{title}\n{'=' * len(title)}\n\n{text.strip()}" for title, text in parts)
        + "\n"
    )


def write_licence_texts(folder: Path) -> Path:
    """Write them into a folder.

    Raises:
        LicenceMissingError: as [`licence_texts`][]; nothing is written then.
    """
    path = folder / TEXTS_FILE
    path.write_text(licence_texts(), encoding="utf-8")
    return path


def _installed(name: str) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError as error:
        raise LicenceMissingError(
            f"the licence of {name} goes with the pages, and it is not installed: "
            "install requirements.txt"
        ) from error


def _licences(found: Distribution, name: str) -> Iterator[PurePosixPath]:
    files = sorted(PurePosixPath(path) for path in found.files or ())
    named = [path for path in files if "LICENSE" in path.name and path.suffix != ".pyc"]
    if not named:
        raise LicenceMissingError(f"expected a LICENSE in the package {name}, found none")
    yield from named


def _read(found: Distribution, file: PurePosixPath) -> str:
    return Path(str(found.locate_file(str(file)))).read_text(encoding="utf-8")
