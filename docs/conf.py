"""How Sphinx makes the site of these pages: ``make docs`` writes it to ``site/``.

Some pages are files that lie elsewhere, beside what they describe: the README, the changelog, the plugins' own.
A page that is nothing but an include of one stands for it, and links to the file lead to the page.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import ourvidz_core

DOCS = Path(__file__).parent
_INCLUDE = re.compile(r"^```\{include\} (\S+)\n```$", re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")

project = "OurVidz"
release = version = ourvidz_core.__version__
copyright = "the OurVidz authors"  # noqa: A001 - Sphinx names it so
extensions = ["myst_parser"]
# It fetches nothing from another server, so that a page is whole without a network; check_site.py watches that.
html_theme = "furo"
html_title = "OurVidz"
html_theme_options = {"top_of_page_buttons": []}  # the sources are not beside the pages
html_copy_source = False
html_show_sphinx = False
nitpicky = True
# Links such as settings.md#ourvidz-wan name a heading the way that repository browsers do.
myst_heading_anchors = 4


def included_pages() -> dict[Path, Path]:
    """Files outside of docs/, and the pages that stand for them."""
    return {
        (page.parent / target).resolve(): page
        for page in DOCS.rglob("*.md")
        for target in _INCLUDE.findall(page.read_text("utf-8"))
    }


def _on_source_read(_: object, docname: str, source: list[str]) -> None:
    page, pages = DOCS / f"{docname}.md", included_pages()
    source[0] = _rebased(source[0], page, page, pages)
    source[0] = _INCLUDE.sub(lambda found: _included(page, (page.parent / found[1]).resolve(), pages), source[0])


def _included(page: Path, file: Path, pages: dict[Path, Path]) -> str:
    return _rebased(file.read_text("utf-8"), file, page, pages)


def _rebased(text: str, written_in: Path, shown_in: Path, pages: dict[Path, Path]) -> str:
    """``text`` with its relative links as they are from ``shown_in``."""

    def rebase(found: re.Match[str]) -> str:
        target = (written_in.parent / found[1]).resolve()
        return os.path.relpath(pages.get(target, target), shown_in.parent) + (found[2] or "")

    return _LINK.sub(rebase, text)


def setup(app: object) -> None:
    """Tell Sphinx what to call."""
    app.connect("source-read", _on_source_read)  # type: ignore[attr-defined]
