"""Expected error messages."""

from __future__ import annotations

import re


def matches(text: str, expected: str) -> bool:
    """Whether a message contains an expectation, in which " ... " stands for any text."""
    return re.search(".*".join(map(re.escape, expected.split(" ... "))), text) is not None
