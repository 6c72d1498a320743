"""Check a built site as a browser would read it: every link has its target, and nothing comes from elsewhere.

``python docs/check_site.py SITE`` ends with 1 and names what it found. A page that fetched a font or a script from
another server would not be whole without a network, and would tell that server who reads it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Elements whose address is fetched when the page is shown.
_FETCHING = {"script": "src", "img": "src", "link": "href", "source": "src", "iframe": "src"}
#: Links that name a page but fetch nothing.
_NAMING = {"canonical", "search", "index", "next", "prev"}


class _Page(HTMLParser):
    """The ids of a page, what it links to, and what it fetches."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = {""}
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if (name := _FETCHING.get(tag)) in values and values.get("rel") not in _NAMING:
            self.fetched.append(values[str(name)])


def faults(site: Path) -> Iterator[str]:
    """What is wrong with the pages below ``site``."""
    pages = {path: _Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site} has no pages"
    for path, page in pages.items():
        shown = path.relative_to(site)
        for address in page.fetched:
            if urlsplit(address).netloc:
                yield f"{shown} fetches {address}"
        for address in [*page.links, *page.fetched]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                yield f"{shown} leads to {address}, which is not there"
            elif target in pages and unquote(parts.fragment) not in pages[target].ids:
                yield f"{shown} leads to {address}, and {target.relative_to(site)} has no such place"


def main() -> int:
    """Check the site that the command line names."""
    found = list(faults(Path(sys.argv[1]).resolve()))
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
