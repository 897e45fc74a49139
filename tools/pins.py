"""Regenerate the pins: `requirements.txt` and Binder's `environment.yml`.

    python -m tools.pins              resolve anew (needs uv) and write both files
    python -m tools.pins --environment    write environment.yml from requirements.txt only

The pins hold names, versions and markers, and no addresses: where packages come from is
the business of whoever installs them.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements.txt"
ENVIRONMENT = ROOT / "environment.yml"

EXTRAS = ("book", "test")


def resolve() -> str:
    """Resolve pyproject.toml for every supported Python and system, with one version each."""
    uv = shutil.which("uv")
    if uv is None:
        raise SystemExit("make pins resolves with uv, which is not installed: pip install uv")
    command = [uv, "pip", "compile", "pyproject.toml", "--quiet", "--upgrade"]
    for extra in EXTRAS:
        command += ["--extra", extra]
    # One version for all supported Pythons, so that every reader runs the same book.
    command += ["--universal", "--python-version", "3.11", "--fork-strategy", "fewest"]
    command += ["--no-header", "--no-annotate"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"uv could not resolve pyproject.toml:\n{run.stderr}")
    return run.stdout


def read_pins(text: str) -> list[str]:
    """Return the requirement lines of a requirements file."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def environment_text(pins: list[str]) -> str:
    """Return environment.yml for these pins."""
    lines = [
        "# What Binder installs. Written by `make pins` from requirements.txt: do not edit.",
        "name: amortlib",
        "channels:",
        "  - conda-forge",
        "dependencies:",
        "  - python=3.12",
        "  - pip",
        "  - pip:",
        *[f'      - "{pin}"' for pin in pins],
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Write the files."""
    parser = argparse.ArgumentParser(prog="python -m tools.pins", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--environment", action="store_true", help="keep requirements.txt")
    options = parser.parse_args(arguments)
    if not options.environment:
        REQUIREMENTS.write_text("\n".join(read_pins(resolve())) + "\n", encoding="utf-8")
    pins = read_pins(REQUIREMENTS.read_text(encoding="utf-8"))
    ENVIRONMENT.write_text(environment_text(pins), encoding="utf-8")
    print(f"{len(pins)} pins in {REQUIREMENTS.name} and {ENVIRONMENT.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
