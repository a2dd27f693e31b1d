"""What all image sources share: the `Source` type, and the wording of other libraries' errors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

Decoded = Image.Image | np.ndarray
"""A decoded image: of PIL, or an array (H, W, C) where PIL has no mode for it."""


@dataclass(frozen=True)
class Source:
    """A collection of encoded images, read by index.

    Attributes:
        name: how messages refer to the collection.
        count: number of images, readable or not.
        fetch: returns, for a sequence of indices, one decoder per image: a function that returns the decoded image or
            raises a `ValueError` that names it. `fetch` is quick and called by one thread; decoders may run in many.
        identity: changes whenever the images do, as far as that shows without decoding them.
        read_column: returns the values of another column of a table as text, one per image; `None` where there is no
            such column.
        describe: returns how messages refer to the image at an index.
        labels: what says which class an image belongs to, such as `10 folders` or `the column label`; `None` for
            nothing.
        label_columns: returns the names of the columns that can say it.
        class_names: returns the classes of a column in the order of the data set, if that declares them; may hold
            classes that no image has.

    Example:
        >>> pixel = Image.new("L", (1, 1))
        >>> source = Source("black", 3, lambda indices: [lambda: pixel for _ in indices], identity="v1")
        >>> [decode().size for decode in source.fetch([0, 2])]
        [(1, 1), (1, 1)]
    """

    name: str
    count: int
    fetch: Callable[[Sequence[int]], list[Callable[[], Decoded]]]
    identity: str
    read_column: Callable[[str], list[str] | None] = lambda name: None
    describe: Callable[[int], str] = "image {}".format
    labels: str | None = None
    label_columns: Callable[[], tuple[str, ...]] = tuple
    class_names: Callable[[str], tuple[str, ...]] = lambda name: ()


def canonical_value(text: str) -> str:
    """Spell a value of a column as labels are spelled: whole numbers without a point, words in lower case.

    Tables that passed through other tools hold 3.0 for the class 3, or True for true.

    Args:
        text: the value as text.

    Returns:
        The same value in its usual spelling.

    Example:
        >>> [canonical_value(text) for text in ("3.0", "3", "True", "None", "2.5")]
        ['3', '3', 'true', 'none', '2.5']
    """
    with contextlib.suppress(ValueError, OverflowError):
        if (number := float(text)) == int(number):
            return str(int(number))
    return text.lower()


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error's message, or the name of its type where the message is empty.

    Args:
        error: an exception of any library.

    Returns:
        One line of text.

    Example:
        >>> first_line(ValueError("bad header\nat byte 3"))
        'bad header'
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
