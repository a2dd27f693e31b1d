"""Class labels as users write them in one text, on the command line and the web page, without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ddim.validation import pluralize, shown

if TYPE_CHECKING:
    from ddim.io.class_labels import ClassLabels

ALL = "all"
"""The text that stands for every class."""


def parse_labels(text: str, classes: ClassLabels | None) -> list[str]:
    """Split a text into labels.

    Args:
        text: an index, a name, several of them separated by commas, or `all`.
        classes: of the model; a name may hold commas itself.

    Returns:
        At least one label.

    Raises:
        ValueError: for an empty label.

    Example:
        >>> parse_labels("3, cat", None)
        ['3', 'cat']
    """
    names = () if classes is None else classes.names
    if text in names:
        return [text]
    if text == ALL and classes is not None:
        return [str(index) for index in range(classes.count)]
    labels = [part.strip() for part in text.split(",")]
    if not all(labels):
        raise ValueError(f"labels must be indices or names, separated by commas, got {shown(text)}")
    return labels


def spread(labels: Sequence[str], count: int, count_name: str = "count") -> str | list[str]:
    """Return one label per image, as many images for each label.

    Args:
        labels: at least one.
        count: the number of images.
        count_name: what messages call it.

    Returns:
        The label, if it is one; else a list of `count`.

    Raises:
        ValueError: if the images cannot be divided equally.

    Example:
        >>> spread(["cat", "dog"], 4)
        ['cat', 'cat', 'dog', 'dog']
    """
    if len(labels) == 1:
        return labels[0]
    if count % len(labels):
        raise ValueError(f"{count_name} must be a multiple of the {pluralize(len(labels), 'label')}, got {count}")
    return [label for label in labels for _ in range(count // len(labels))]
