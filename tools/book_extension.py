"""The book's Sphinx extension: generated tables, and pages that ask nothing of the network.

Directives: `chapter-table` (the landing page's table, from each chapter's front matter) and
`chapter-times` (what each chapter costs, from the last execution).
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

from tools.chapters import (
    MEMORY_BUDGET_MB,
    STATE_FILE,
    WALL_BUDGET_S,
    Page,
    describe_machine,
    read_pages,
    read_state,
    within_budget,
)
from tools.downloads import ARCHIVE
from tools.licences import write_licence_texts

MATHJAX_PARTS = (
    "tex-chtml.js",
    "output/chtml/fonts/woff-v2",
    "input/tex/extensions",  # loaded when a formula first uses one, \cancel for instance
)
"""What a page needs of MathJax; the menu, SVG output and speech rules are left out."""


class BookDirective(SphinxDirective):
    """A directive that writes a table about the book's chapters."""

    has_content = False

    @property
    def root(self) -> Path:
        """The folder that holds `_toc.yml`."""
        return Path(self.env.srcdir)

    def pages(self) -> list[Page]:
        """Read the pages, and have Sphinx read this page again when one of them changes."""
        pages = read_pages(self.root)
        for page in pages:
            if page.docname != self.env.docname:
                self.env.note_dependency(str(page.path))
        return pages

    def link(self, page: Page) -> nodes.Node:
        """Return a link to a page, resolved by Sphinx and reported when it is broken."""
        reference = addnodes.pending_xref(
            "",
            nodes.inline("", page.title, classes=["std", "std-doc"]),
            refdoc=self.env.docname,
            refdomain="std",
            reftype="doc",
            reftarget=f"/{page.docname}",
            refexplicit=True,
            refwarn=True,
        )
        return nodes.paragraph("", "", reference)

    @staticmethod
    def table(header: list[str], rows: list[list[str | nodes.Node]], css: str) -> nodes.table:
        """Return a table with one header row."""
        group = nodes.tgroup(cols=len(header))
        group += [nodes.colspec(colwidth=1) for _ in header]

        def row(cells: list[Any]) -> nodes.row:
            made = nodes.row()
            for cell in cells:
                content = cell if isinstance(cell, nodes.Node) else nodes.paragraph(text=cell)
                made += nodes.entry("", content)
            return made

        group += nodes.thead("", row(list(header)))
        group += nodes.tbody("", *[row(cells) for cells in rows])
        return nodes.table("", group, classes=["colwidths-auto", css])


class ChapterTable(BookDirective):
    """The chapters, what each is about, and how many minutes it takes to work through."""

    def run(self) -> list[nodes.Node]:
        """Write the table."""
        rows: list[list[str | nodes.Node]] = []
        for page in self.pages():
            if not page.is_chapter:
                continue
            missing = [name for name in ("description", "minutes") if name not in page.front_matter]
            if missing:
                raise self.error(f"{page.docname}: the front matter lacks {' and '.join(missing)}")
            description = str(page.front_matter["description"])
            rows.append([self.link(page), description, str(page.front_matter["minutes"])])
        if not rows:
            return [nodes.paragraph(text="This book has no chapters yet.")]
        return [self.table(["Chapter", "What it is about", "Minutes"], rows, "chapter-table")]


class ChapterTimes(BookDirective):
    """Wall time and peak memory of each chapter, as measured when it was last executed."""

    def run(self) -> list[nodes.Node]:
        """Write the table, or say that nothing has been measured."""
        self.env.note_dependency(str(self.root / STATE_FILE))
        measured = read_state(self.root)["chapters"]
        pages = [page for page in self.pages() if page.is_notebook]
        if not any(page.docname in measured for page in pages):
            text = "Nothing has been measured yet: build the book with make book."
            return [nodes.paragraph(text=text)]
        rows: list[list[str | nodes.Node]] = []
        machines: dict[str, list[str]] = {}
        for page in pages:
            entry = measured.get(page.docname)
            if entry is None:
                rows.append([self.link(page), *["not measured"] * 3, "unknown"])
                continue
            first = entry.get("first_figure_s")
            rows.append(
                [
                    self.link(page),
                    "none" if first is None else f"{first:.1f}",
                    f"{entry['wall_s']:.1f}",
                    f"{entry['peak_mb']:.0f}",
                    within_budget(entry),
                ]
            )
            machines.setdefault(describe_machine(entry["machine"]), []).append(page.title)
        budget = f"Within {WALL_BUDGET_S:.0f} s and {MEMORY_BUDGET_MB:.0f} MB"
        header = ["Chapter", "First figure (s)", "Wall time (s)", "Peak memory (MB)", budget]
        result: list[nodes.Node] = [self.table(header, rows, "chapter-times")]
        for machine, titles in machines.items():
            which = "" if len(machines) == 1 else f" ({', '.join(titles)})"
            result.append(nodes.paragraph(text=f"Measured on {machine}{which}."))
        return result


def mathjax_folder() -> Path:
    """Return where the installed package keeps MathJax."""
    found = importlib.util.find_spec("sphinx-mathjax-offline")
    if found is None or found.origin is None:
        raise ExtensionError(
            "MathJax is taken from the package sphinx-mathjax-offline, which is not installed: "
            "install requirements.txt"
        )
    return Path(found.origin).parent / "static" / "mathjax"


def use_own_mathjax(_app: Sphinx, config: Config) -> None:
    """Point the pages at the book's own copy of MathJax."""
    config.mathjax_path = "mathjax/tex-chtml.js"


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Copy what the pages need of MathJax into the built book."""
    if error is not None or app.builder.format != "html":
        return
    source = mathjax_folder()
    target = Path(app.outdir) / "_static" / "mathjax"
    for part in MATHJAX_PARTS:
        (target / part).parent.mkdir(parents=True, exist_ok=True)
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part, dirs_exist_ok=True)
        else:
            shutil.copy2(source / part, target / part)


def add_licence_texts(app: Sphinx, error: Exception | None) -> None:
    """Put the texts of the licences beside the list of what the pages carry."""
    static = Path(app.outdir) / "_static"
    if error is None and app.builder.format == "html" and (static / "licences.txt").is_file():
        write_licence_texts(static)


ICONS = "_static/scripts/fontawesome.js"

_ICON = re.compile(
    r'(?:"([a-z0-9-]+)"|([a-z0-9]+)):\[\d+,\d+,\[([^\]]*)\],"[0-9a-f]+",(?:"[^"]*"|\[[^\]]*\])\],?'
)
"""An icon in Font Awesome's script: its name, size, other names, code point and outline."""


def keep_used_icons(app: Sphinx, error: Exception | None) -> None:
    """Drop the icons that no page shows: they would be a quarter of what a first view fetches."""
    out = Path(app.outdir)
    if error is not None or app.builder.format != "html" or not (out / ICONS).is_file():
        return
    pages = [*out.rglob("*.html"), *(p for p in out.rglob("*.js") if p != out / ICONS)]
    used = {
        name
        for page in pages
        for name in re.findall(r"\bfa-([a-z0-9-]+)", page.read_text(encoding="utf-8"))
    }

    def kept(icon: re.Match[str]) -> str:
        names = {icon[1] or icon[2], *re.findall(r'"([^"]+)"', icon[3])}
        return icon[0] if names & used else ""

    script = (out / ICONS).read_text(encoding="utf-8")
    (out / ICONS).write_text(_ICON.sub(kept, script), encoding="utf-8")


def name_roles(
    _app: Sphinx, _pagename: str, _template: str, context: dict[str, Any], _doctree: Any
) -> None:
    """Entries of the bibliography are items of its list: docutils gives them an outdated role."""
    if "citation-list" in context.get("body", ""):
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def offer_downloads(
    app: Sphinx, pagename: str, _template: str, context: dict[str, Any], _doctree: Any
) -> None:
    """Tell the theme that the page can be had as a notebook: tools.downloads writes it."""
    if pagename in app.env.all_docs and pagename in _notebooks(app):
        context["ipynb_source"] = f"{pagename}.ipynb"


def offer_archive(
    _app: Sphinx, _pagename: str, _template: str, context: dict[str, Any], _doctree: Any
) -> None:
    """Among the downloads, the whole book."""
    for group in context.get("header_buttons", []):
        if group.get("label") == "download-buttons":
            group["buttons"].append(
                {
                    "type": "link",
                    "url": context["pathto"](ARCHIVE, 1),
                    "text": ".zip",
                    "icon": "fas fa-book",
                    "tooltip": "Download the whole book, to read offline",
                    "label": "download-book-button",
                }
            )


def _notebooks(app: Sphinx) -> set[str]:
    if not hasattr(app, "book_notebooks"):
        pages = read_pages(Path(app.srcdir))
        app.book_notebooks = {page.docname for page in pages if page.is_notebook}  # ty: ignore
    return app.book_notebooks  # ty: ignore


LIVE_SCRIPT, LIVE_STYLE = "live.js", "live.css"


def add_live_widgets(
    app: Sphinx, _pagename: str, _template: str, context: dict[str, Any], _doctree: Any
) -> None:
    """Give a page with live widgets their script and style; other pages go without."""
    if "data-live=" in context.get("body", ""):
        app.add_js_file(LIVE_SCRIPT, loading_method="defer")
        app.add_css_file(LIVE_STYLE)


def write_live_widgets(app: Sphinx, error: Exception | None) -> None:
    """Write the script and the style of the live widgets into the built book."""
    if error is not None or app.builder.format != "html":
        return
    kit = Path(app.srcdir) / "book" / "_kit"
    if not kit.is_dir():  # a book without a kit has no widgets
        return
    target = Path(app.outdir) / "_static"
    (target / LIVE_SCRIPT).write_text(_bundler(kit).page_script(kit / "js"), encoding="utf-8")
    shutil.copy2(kit / "js" / "live.css", target / LIVE_STYLE)


def _bundler(kit: Path) -> Any:
    """The kit's module that makes one script of its sources; the kit is no package to import."""
    spec = importlib.util.spec_from_file_location("book_kit_bundle", kit / "bundle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def disconnect_thebe(app: Sphinx) -> None:
    """Take sphinx-thebe off the pages.

    jupyter-book always loads it. Even when it is off it writes a script with the address of a
    network copy into every page, twice, and the second copy is an error in the browser.
    """
    for listeners in app.events.listeners.values():
        for listener in list(listeners):
            if getattr(listener.handler, "__module__", "").startswith("sphinx_thebe"):
                listeners.remove(listener)
    app.registry.css_files = [
        (name, options) for name, options in app.registry.css_files if "thebe" not in name
    ]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_directive("chapter-table", ChapterTable)
    app.add_directive("chapter-times", ChapterTimes)
    app.connect("config-inited", use_own_mathjax)
    app.connect("config-inited", lambda app, _config: disconnect_thebe(app))
    app.connect("html-page-context", name_roles)
    app.connect("html-page-context", add_live_widgets)
    app.connect("html-page-context", offer_downloads)
    app.connect("html-page-context", offer_archive, priority=502)  # the theme's own come with 501
    app.connect("build-finished", copy_mathjax)
    app.connect("build-finished", add_licence_texts)
    app.connect("build-finished", write_live_widgets)
    app.connect("build-finished", keep_used_icons)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
