"""What every built page and every chapter must have, read from the HTML."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from bs4 import BeautifulSoup, Tag

from tools.chapters import read_page, toc_names

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

LAUNCH = "https://mybinder.org/v2/gh/amortlib/amortlib/main?urlpath=lab/tree/{docname}.md"

NAMES = toc_names(ROOT)
EXISTING = [name for name in NAMES if (ROOT / f"{name}.md").is_file()]
CHAPTERS = [name for name in EXISTING if read_page(ROOT, name).is_chapter]
NOTEBOOKS = [name for name in EXISTING if read_page(ROOT, name).is_notebook]

every_page = pytest.mark.parametrize("docname", NAMES)
every_chapter = pytest.mark.parametrize("docname", CHAPTERS)


def read(html: Path, docname: str) -> BeautifulSoup:
    text = (html / f"{docname}.html").read_text(encoding="utf-8")
    return BeautifulSoup(text, "html.parser")


def article(html: Path, docname: str) -> Tag:
    found = read(html, docname).find("article", class_="bd-article")
    assert isinstance(found, Tag), f"{docname} has no article"
    return found


def alt_complaint(alt: str | None) -> str | None:
    """Return what keeps an alt text from being a sentence, or None."""
    if not alt or not alt.strip():
        return "there is no alt text"
    alt = alt.strip()
    if " " not in alt or re.search(r"\.(png|svg|jpe?g|gif)\b", alt):
        return f"{alt!r} looks like a file name"
    if len(alt.split()) < 6:
        return f"{alt!r} has fewer than six words"
    if not alt[0].isupper():
        return f"{alt!r} does not begin with a capital"
    if not alt.endswith("."):
        return f"{alt!r} does not end with a full stop"
    return None


def test_there_are_chapters() -> None:
    assert len(CHAPTERS) >= 4
    assert set(CHAPTERS) <= set(NOTEBOOKS), "every chapter is executed"


@every_page
def test_every_image_has_a_sentence_as_alt_text(html: Path, docname: str) -> None:
    complaints = [
        f"{image.get('src')}: {complaint}"
        for image in article(html, docname)("img")
        if (complaint := alt_complaint(image.get("alt")))
    ]
    assert complaints == []


@pytest.mark.parametrize(
    "alt",
    [
        None,
        " ",
        "../_images/70bff.png",
        "posterior_band",
        "A posterior band.",
        "the posterior band widens inside the gap.",
        "The posterior band widens inside the gap",
    ],
)
def test_what_is_no_sentence_is_caught(alt: str | None) -> None:
    assert alt_complaint(alt)


def test_a_sentence_passes() -> None:
    assert alt_complaint("The posterior band widens inside the gap.") is None


@every_chapter
def test_a_chapter_has_its_parts(html: Path, docname: str) -> None:
    content = article(html, docname)
    titles = [
        re.sub(r"^[\d.\s]+", "", title.get_text(" ", strip=True)).lower()
        for title in content(["h2", "h3", "dt", "strong"]) + content("p", class_="admonition-title")
    ]
    for part in ("objectives", "prerequisites", "summary"):
        assert any(title.startswith(part) for title in titles), f"{docname} has no {part}"
    minutes = read_page(ROOT, docname).front_matter["minutes"]
    text = content.get_text(" ", strip=True)
    assert re.search(rf"\b{minutes} minutes\b", text), f"{docname} does not say {minutes} minutes"


@every_chapter
def test_every_exercise_has_a_dropdown_solution(html: Path, docname: str) -> None:
    content = article(html, docname)
    exercises = content("div", class_="exercise")
    solutions = content("div", class_="solution")
    assert len(exercises) >= 3, f"{docname} has {len(exercises)} exercises"
    solved = set()
    for solution in solutions:
        assert "dropdown" in solution["class"], f"{docname}: a solution does not fold"
        link = solution.find("a", class_="reference")
        assert link is not None
        solved.add(link["href"].partition("#")[2])
    unsolved = {exercise["id"] for exercise in exercises} - solved
    assert not unsolved, f"{docname}: no solution for {sorted(unsolved)}"
    run = [solution for solution in solutions if solution.find("div", class_="cell")]
    assert run, f"{docname}: no solution has a cell that runs in the build"


@every_chapter
def test_a_chapter_numbers_equations_and_cites_sources(html: Path, docname: str) -> None:
    content = article(html, docname)
    assert content("span", class_="eqno"), f"{docname} has no numbered equation"
    cited = [link["href"] for link in content("a", href=re.compile(r"references\.html#"))]
    assert cited, f"{docname} cites no source"
    references = read(html, "book/references")
    for href in cited:
        assert references.find(id=href.partition("#")[2]), f"{docname}: {href} leads nowhere"


@every_page
def test_nothing_is_left_unresolved(html: Path, docname: str) -> None:
    content = article(html, docname)
    assert not content(class_=["problematic", "system-message"])
    for cell in content("div", class_="cell_output"):
        assert not cell.find(class_="traceback")


@every_page
def test_a_page_loads_nothing_from_elsewhere(html: Path, docname: str) -> None:
    page = read(html, docname)
    loaded = [tag["src"] for tag in page(["script", "img", "iframe", "source"], src=True)]
    loaded += [tag["href"] for tag in page("link", href=True) if "canonical" not in tag["rel"]]
    assert loaded
    assert [address for address in loaded if re.match(r"(https?:)?//", address)] == []
    text = str(page)
    for name in ("unpkg.com", "jsdelivr", "cdnjs", "thebe", "embed-amd", "require.js"):
        assert name not in text, f"{docname} names {name}"


@pytest.mark.parametrize("docname", NOTEBOOKS)
def test_the_launch_button_opens_this_chapter(html: Path, docname: str) -> None:
    page = read(html, docname)
    links = {link["href"] for link in page("a", href=re.compile("mybinder"))}
    assert links == {LAUNCH.format(docname=docname)}


def test_the_landing_table_holds_every_chapter(html: Path) -> None:
    table = article(html, NAMES[0]).find("table", class_="chapter-table")
    assert isinstance(table, Tag), "the landing page has no chapter-table"
    rows = [[cell.get_text(" ", strip=True) for cell in row("td")] for row in table("tr")][1:]
    pages = [read_page(ROOT, name) for name in CHAPTERS]
    assert [row[2] for row in rows] == [str(page.front_matter["minutes"]) for page in pages]


def test_the_times_page_holds_every_executed_chapter(html: Path) -> None:
    table = article(html, "book/times").find("table", class_="chapter-times")
    assert isinstance(table, Tag)
    rows = [[cell.get_text(" ", strip=True) for cell in row("td")] for row in table("tr")][1:]
    assert len(rows) == len(NOTEBOOKS)
    for row in rows:
        assert 0 < float(row[1]) <= float(row[2]), "the first figure comes before the end"
        assert float(row[3]) > 0
    assert "Measured on" in article(html, "book/times").get_text()


def test_the_root_leads_to_the_landing_page(html: Path) -> None:
    text = (html / "index.html").read_text(encoding="utf-8")
    assert 'url=book/index.html"' in text


def test_anyones_problem_takes_forty_lines() -> None:
    """The promise of the chapter: problem, training and posterior, blank lines not counted."""
    text = (ROOT / "book" / "anyone.md").read_text(encoding="utf-8")
    cells = re.findall(
        r"```\{code-cell\} ipython3\n:tags: \[user-code[^\n]*\n(.*?)```", text, re.DOTALL
    )
    lines = [line for cell in cells for line in cell.splitlines() if line.strip()]
    assert len(cells) == 2
    own = [line for line in lines if not line.startswith(("import ", "from "))]
    assert len(own) <= 40
