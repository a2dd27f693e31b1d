"""Links of the Markdown files, which are written for the repository, as links of the site.

A link leads from one file of the repository to another. In the site the two have other places; what is not in the site,
such as a folder of tests, keeps its text and loses its link.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping

CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^)\s]+)\)")
FILE = re.compile(r"[\w/.-]+[.]md")
ATTRIBUTE = re.compile(r'\b(src|href)="([^"]+)"')
ELSEWHERE = re.compile(r"[a-z]+:|#")
"""How links begin that lead to another host, or stay on the page."""
PLACEHOLDER = re.compile("\x00(\\d+)\x00")


def move_links(text: str, source: str, places: Mapping[str, str], titles: Mapping[str, str]) -> str:
    """Return a page with the links that it has in the site.

    Args:
        text: Markdown.
        source: the path of the page in the repository.
        places: paths in the repository with those in the site.
        titles: of pages, by their path in the site; a link that is named for a file gets the title of its page.

    Returns:
        The same with relative links between places of the site; HTML attributes name the pages that Markdown becomes.

    Example:
        >>> places = {"README.md": "index.md", "docs/x.md": "x.md"}
        >>> move_links("[a](../README.md#b) [`t`](../tests) [x.md](x.md)", "docs/x.md", places, {"x.md": "X"})
        '[a](index.md#b) `t` [X](x.md)'
    """
    code: list[str] = []

    def hide(match: re.Match[str]) -> str:
        code.append(match[0])
        return f"\x00{len(code) - 1}\x00"

    def move(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        moved = move_target(target, source, places)
        if moved is None:
            return label
        if FILE.fullmatch(label):
            label = titles.get(place_of(target, source, places) or "", label)
        return f"{mark}[{label}]({moved})"

    def move_attribute(match: re.Match[str]) -> str:
        name, target = match.groups()
        moved = move_target(target, source, places) or target
        return f'{name}="{re.sub(r"[.]md(?=#|$)", ".html", moved)}"'

    text = LINK.sub(move, CODE.sub(hide, text))
    return PLACEHOLDER.sub(lambda match: code[int(match[1])], ATTRIBUTE.sub(move_attribute, text))


def place_of(target: str, source: str, places: Mapping[str, str]) -> str | None:
    """Return the path in the site of what a link of a page leads to; `None` for what the site does not have."""
    path = target.partition("#")[0]
    return places.get(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))


def move_target(target: str, source: str, places: Mapping[str, str]) -> str | None:
    """Return the target of a link of a page in the site; `None` for one that the site does not have."""
    if ELSEWHERE.match(target):
        return target
    place = place_of(target, source, places)
    if place is None:
        return None
    _, mark, anchor = target.partition("#")
    return posixpath.relpath(place, posixpath.dirname(places[source]) or ".") + mark + anchor
