"""Before each widget of the book stands what to predict; all of the widgets are in the book."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import jupytext

from tools.chapters import read_page, toc_names

ROOT = Path(__file__).resolve().parents[2]
MAKERS = {
    "break_even": "break-even",
    "energy_landscape": "landscape",
    "fault_explorer": "faults",
    "gap_explorer": "gap",
    "one_hole": "holes",
    "refinement_ladder": "ladder",
}
"""The function that makes a widget, and its kind in `live.mjs`."""

SHOWN = re.compile(rf"^({'|'.join(MAKERS)})\(", re.MULTILINE)
PROMPT = re.compile(
    r":::\{admonition\} Predict, then move, then explain\n:class: important\n\n"
    r"Before you move anything: (.*?)\n:::\s*$",
    re.DOTALL,
)


def prompts() -> list[tuple[str, str, str | None]]:
    """Chapter, kind of the widget and the prompt right before it, for every widget."""
    found = []
    for name in toc_names(ROOT):
        if not read_page(ROOT, name).is_notebook:
            continue
        cells = jupytext.read(ROOT / f"{name}.md").cells
        for before, cell in itertools.pairwise(cells):
            if cell.cell_type == "code" and (shown := SHOWN.search(cell.source)):
                prompt = PROMPT.search(before.source) if before.cell_type == "markdown" else None
                found.append((name, MAKERS[shown[1]], prompt and prompt[1]))
    return found


def test_every_widget_is_in_the_book() -> None:
    script = (ROOT / "book" / "_kit" / "js" / "live.mjs").read_text(encoding="utf-8")
    listed = re.search(r"const WIDGETS = \{(.*)\};", script)
    assert listed
    kinds = {part.split(":")[0].strip().strip('"') for part in listed[1].split(",")}
    assert kinds == set(MAKERS.values()) == {kind for _, kind, _ in prompts()}


def test_before_every_widget_stands_what_to_predict() -> None:
    """Three questions at least, numbered in their order."""
    for name, kind, prompt in prompts():
        assert prompt, f"{name}: no prompt right before its {kind} widget"
        numbers = [int(n) for n in re.findall(r"\((\d)\) ", prompt)]
        assert numbers == list(range(1, len(numbers) + 1)), (name, kind)
        questions = re.split(r"\(\d\) ", prompt)[1:]
        assert len(questions) >= 3, (name, kind)
        assert all("?" in question for question in questions), (name, kind)
