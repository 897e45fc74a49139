"""Refuse notebooks that are stored with outputs: `python -m tools.no_outputs FILE ...`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path


def complaint(path: Path) -> str | None:
    """Return what is wrong with one file, or None."""
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text(encoding="utf-8")).get("cells", [])
        if any(cell.get("outputs") or cell.get("execution_count") for cell in cells):
            return f"{path}: holds outputs; chapters are stored without them, as MyST .md files"
    # An output that was pasted into Markdown shows as an embedded picture.
    elif re.search(r"data:image/[a-z+]+;base64,", path.read_text(encoding="utf-8")):
        return f"{path}: holds an embedded picture; let a cell draw it"
    return None


def main(names: list[str]) -> int:
    """Check the named files; return 1 when one of them holds outputs."""
    complaints = [text for name in names if (text := complaint(Path(name)))]
    print("\n".join(complaints), end="\n" if complaints else "")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
