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
ATTRIBUTE = re.compile(r'\b(src|href)="([^"]+)"')
ELSEWHERE = re.compile(r"[a-z]+:|#")
"""How links begin that lead to another host, or stay on the page."""
PLACEHOLDER = re.compile("\x00(\\d+)\x00")


def move_links(text: str, source: str, places: Mapping[str, str]) -> str:
    """Return a page with the links that it has in the site.

    Args:
        text: Markdown.
        source: the path of the page in the repository.
        places: paths in the repository with those in the site.

    Returns:
        The same with relative links between places of the site; HTML attributes name the pages that Markdown becomes.

    Example:
        >>> places = {"README.md": "index.md", "docs/x.md": "x.md"}
        >>> move_links("[a](../README.md#b) [`t`](../tests) <a href='c'>", "docs/x.md", places)
        "[a](index.md#b) `t` <a href='c'>"
    """
    code: list[str] = []

    def hide(match: re.Match[str]) -> str:
        code.append(match[0])
        return f"\x00{len(code) - 1}\x00"

    def move(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        moved = move_target(target, source, places)
        return label if moved is None else f"{mark}[{label}]({moved})"

    def move_attribute(match: re.Match[str]) -> str:
        name, target = match.groups()
        moved = move_target(target, source, places) or target
        return f'{name}="{re.sub(r"[.]md(?=#|$)", ".html", moved)}"'

    text = LINK.sub(move, CODE.sub(hide, text))
    return PLACEHOLDER.sub(lambda match: code[int(match[1])], ATTRIBUTE.sub(move_attribute, text))


def move_target(target: str, source: str, places: Mapping[str, str]) -> str | None:
    """Return the target of a link of a page in the site; `None` for one that the site does not have."""
    if ELSEWHERE.match(target):
        return target
    path, mark, anchor = target.partition("#")
    place = places.get(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))
    if place is None:
        return None
    return posixpath.relpath(place, posixpath.dirname(places[source]) or ".") + mark + anchor
