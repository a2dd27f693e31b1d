"""Check the site that `mkdocs build` has written: every link, no other host, every public name.

    python scripts/check_website.py [FOLDER]

Links and anchors are those of the pages as browsers get them, those of generated pages and of HTML in Markdown
included. What a page loads (scripts, styles, images, fonts) must come from the site itself; a link that a reader
follows may lead anywhere. Prints each fault, and ends with status 1 if there is any.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

from website.pages import ROOT, modules, public_names

SITE = ROOT / "build/docs"
LOADING = {("script", "src"), ("img", "src"), ("link", "href"), ("source", "src"), ("iframe", "src"), ("video", "src")}
"""Attributes whose target a browser loads without being asked."""
STYLE_URL = re.compile(r"url\([\"']?((?:https?:)?//[^)\"']+)|@import\s+[\"']((?:https?:)?//[^\"']+)")
HOST = re.compile(r"(?:https?:)?//")


class Links(HTMLParser):
    """What a page links to, and the anchors that it has.

    Attributes:
        targets: of each link: the tag, the attribute and the target.
        anchors: ids and names of elements.
    """

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[tuple[str, str, str]] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take the links and the anchors of an element."""
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value)
            elif name in ("href", "src"):
                self.targets.append((tag, name, value))


def read_pages(site: Path) -> dict[Path, Links]:
    """Return the links of all pages of a site."""
    pages = {}
    for path in sorted(site.rglob("*.html")):
        pages[path] = Links()
        pages[path].feed(path.read_text())
    return pages


def broken_links(site: Path, pages: dict[Path, Links]) -> Iterator[str]:
    """Iterate over links to files and anchors that the site does not have."""
    for path, links in pages.items():
        for _, _, target in links.targets:
            place, anchor = urldefrag(target)
            if re.match(r"[a-z]+:|//", target) or path.name == "404.html":
                continue
            file = (path.parent / unquote(place)).resolve() if place else path
            file = file / "index.html" if file.is_dir() else file
            if not file.is_relative_to(site.resolve()) or not file.exists():
                yield f"{path.relative_to(site)}: no file {target}"
            elif anchor and file in pages and unquote(anchor) not in pages[file].anchors:
                yield f"{path.relative_to(site)}: no anchor {target}"


def other_hosts(site: Path, pages: dict[Path, Links]) -> Iterator[str]:
    """Iterate over what pages and styles load from other hosts."""
    for path, links in pages.items():
        for tag, name, target in links.targets:
            if (tag, name) in LOADING and HOST.match(target):
                yield f"{path.relative_to(site)}: loads {target}"
    for path in sorted(site.rglob("*.css")):
        for match in STYLE_URL.finditer(path.read_text()):
            yield f"{path.relative_to(site)}: loads {match[1] or match[2]}"


def missing_names(site: Path, pages: dict[Path, Links]) -> Iterator[str]:
    """Iterate over public names of the package that have no entry on the page of their module."""
    for module, path in modules().items():
        page = pages.get(site / "api" / f"{module}.html")
        for name, _ in public_names(path, module):
            if page is None or name not in page.anchors:
                yield f"no entry of {name}"


def find_faults(site: Path) -> list[str]:
    """Return what is wrong with a site, a line each."""
    pages = read_pages(site)
    if not pages:
        return [f"{site} has no pages; run make docs"]
    return [*broken_links(site, pages), *other_hosts(site, pages), *missing_names(site, pages)]


if __name__ == "__main__":
    faults = find_faults(Path(sys.argv[1]) if len(sys.argv) > 1 else SITE)
    print("\n".join(faults) or "every link, anchor and public name is there")
    sys.exit(bool(faults))
