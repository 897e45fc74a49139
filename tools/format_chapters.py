"""Format the code cells of the chapters, as ruff formats modules.

    python -m tools.format_chapters [--check]

A page shows about 84 characters of code beside the table of contents, so cells are shorter than
the modules' lines. What ruff cannot break (a long string) is reported.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BOOK = Path(__file__).resolve().parent.parent / "book"
WIDTH = 84

CELL = re.compile(
    r"^(?P<open>(?P<fence>`{3,})\{code-cell\}[^\n]*\n"
    r"(?:---\n.*?\n---\n|(?::[^\n]*\n)+)?\n*)"
    r"(?P<code>.*?\n)(?P<close>(?P=fence)\n)",
    flags=re.DOTALL | re.MULTILINE,
)


def formatted(code: str) -> str:
    """Return the code as ruff writes it."""
    run = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--line-length", str(WIDTH), "-"],
        input=code,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise ValueError(run.stderr.strip())
    return run.stdout


def format_page(text: str) -> str:
    """Return a page with all of its cells formatted."""
    return CELL.sub(lambda cell: cell["open"] + formatted(cell["code"]) + cell["close"], text)


def long_lines(text: str) -> list[str]:
    """Return the lines of code that a page would cut off."""
    cells = CELL.finditer(text)
    return [line for cell in cells for line in cell["code"].splitlines() if len(line) > WIDTH]


def main(arguments: list[str]) -> int:
    """Format, or check, every page."""
    check = "--check" in arguments
    failed = False
    for path in sorted(BOOK.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        try:
            new = format_page(text)
        except ValueError as error:
            print(f"{path.name}: a cell that ruff cannot read: {error}")
            failed = True
            continue
        if new != text and check:
            print(f"{path.name}: would be formatted; run make format")
            failed = True
        elif new != text:
            path.write_text(new, encoding="utf-8")
            print(f"{path.name}: formatted")
        for line in long_lines(new):
            print(f"{path.name}: longer than {WIDTH} characters: {line.strip()}")
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
