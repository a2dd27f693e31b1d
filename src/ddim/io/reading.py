"""Why a file cannot be read, in words about the file: readers of other libraries raise errors of many kinds."""

from __future__ import annotations

import errno
import re
import zlib

ABOUT_THE_READER = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, NotImplementedError, RecursionError, UnicodeError),
    zlib.error,
)
"""Kinds of errors whose messages are about a reader's own code."""
ABOUT_ITS_BUFFERS = re.compile(r"overflow|buffer size")
"""What other messages have in common that are about a reader's own code: that of safetensors for impossible shapes."""
DAMAGED = "it is damaged"
MAX_REASON = 200
"""Characters of a reason: longer ones repeat what the file holds."""


def reader_reason(error: Exception) -> str:
    """Return why a file cannot be read.

    Args:
        error: what its reader raised.

    Returns:
        The start of the error's message on one line; "it is damaged" where the message is about the reader.

    Example:
        >>> reader_reason(ValueError("it has no array 'latents'"))
        "it has no array 'latents'"
        >>> reader_reason(OSError(22, "Invalid argument")), reader_reason(KeyError("x"))
        ('it is damaged', 'it is damaged')
    """
    if isinstance(error, OSError) and error.errno is not None:
        # Damaged offsets lead to impossible positions in the file.
        return DAMAGED if error.errno == errno.EINVAL else (error.strerror or "").lower()
    if isinstance(error, ABOUT_THE_READER):
        return DAMAGED
    text = " ".join(str(error).split())
    if ABOUT_ITS_BUFFERS.search(text):
        return "it claims more than it can hold"
    return (text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}...") or DAMAGED
