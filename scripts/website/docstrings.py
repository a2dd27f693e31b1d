"""Docstrings as the site shows them."""

from __future__ import annotations

import re
from typing import Any

import griffe

TECHNICAL = re.compile(r"TypeVar|logging[.]")
"""Values of names that are not of interest to a reader."""
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Name the sections of examples as griffe knows them, and show constants that have no docstring.

    The attributes of a class need none: its own docstring describes them.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object.

        Args:
            obj: what has been read: a module, class, function or attribute.
        """
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub("Examples:", obj.docstring.value)
        elif isinstance(obj, griffe.Attribute) and obj.parent is obj.module and not TECHNICAL.match(str(obj.value)):
            obj.docstring = griffe.Docstring("", parent=obj)
