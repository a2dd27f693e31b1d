"""Equations: LaTeX in blocks of the language `math`, as GitHub shows it, to MathML, which browsers show themselves."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

TAG = re.compile(r"\\tag\{([^}]+)\}")


def equation(source: str, *_: Any, **__: Any) -> str:
    r"""Return the HTML of an equation; `\tag{12}` becomes its number at the right, and the anchor `eq-12`.

    Args:
        source: LaTeX; the other arguments are what pymdownx.superfences gives to a formatter.
    """
    tag = TAG.search(source)
    number = f'<span class="number">({html.escape(tag[1])})</span>' if tag else ""
    name = re.sub(r"\W+", "-", tag[1].lower()) if tag else ""
    anchor = f' id="eq-{name}"' if tag else ""
    return f'<div class="equation"{anchor}>{convert(TAG.sub("", source), display="block")}{number}</div>'
