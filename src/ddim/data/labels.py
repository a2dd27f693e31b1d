"""The classes of a collection's images: which column or folder says them, their names, and one index per image.

    data.labels   none       no classes
                  auto       the column `label`, or another usual name; class folders; else the only column there is
                  COLUMN     that column: of a table, an array of an `.npz` file, an entry of `metadata.jsonl`; `folder`
                             for the names of the images' folders

Classes that have no image are left out. The others are in the order that the data set declares, else in that of their
numbers, where all names are whole numbers, else in alphabetical order.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from ddim.io.class_labels import ClassLabels
from ddim.validation import nearest, pluralize, shorten

AUTO, NONE = "auto", "none"
USUAL_NAMES = ("label", "labels", "class", "class_label", "category", "target", "folder")
"""Names of columns that `auto` looks for, in this order."""
MAX_CLASSES = 10_000
"""More classes than this are taken for another kind of column."""


@dataclass(frozen=True, eq=False)
class ImageLabels:
    """The class of each image of a collection.

    Attributes:
        names: of the classes.
        indices: of the images' classes, int64 (N,).
        column: where they come from.

    Example:
        >>> labels = ImageLabels(("cat", "dog"), torch.tensor([1, 0, 1]), "label")
        >>> labels.without([0]).indices
        tensor([0, 1])
    """

    names: tuple[str, ...]
    indices: Tensor
    column: str

    def without(self, rows: Collection[int]) -> Self:
        """Return the labels of the images that are left when some are taken out.

        Args:
            rows: indices of the images to leave out.
        """
        if not rows:
            return self
        keep = torch.ones(len(self.indices), dtype=torch.bool)
        keep[list(rows)] = False
        return replace(self, indices=self.indices[keep])

    def take(self, rows: Tensor) -> Self:
        """Return the labels of some images.

        Args:
            rows: their indices, int64 (n,), on the device of the labels.
        """
        return replace(self, indices=self.indices[rows])

    def to(self, device: torch.device | str) -> Self:
        """Return the labels on a device.

        Args:
            device: the device.
        """
        return replace(self, indices=self.indices.to(device))

    def sha256(self) -> str:
        """Return a hash of the names and of the images' classes."""
        digest = hashlib.sha256("\0".join(self.names).encode(errors="surrogatepass"))
        digest.update(self.indices.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()


class LabeledCollection(Protocol):
    """A collection whose images may have labels: a `Source`, or a set of images to evaluate."""

    @property
    def name(self) -> str:
        """How messages refer to it."""

    @property
    def read_column(self) -> Callable[[str], list[str] | None]:
        """See `Source`."""

    @property
    def label_columns(self) -> Callable[[], tuple[str, ...]]:
        """See `Source`."""

    @property
    def class_names(self) -> Callable[[str], tuple[str, ...]]:
        """See `Source`."""


def read_labels(
    source: LabeledCollection,
    labels: str,
    argument: str = "data.labels",
    min_classes: int = 2,
    class_names: Sequence[str] | None = None,
) -> ImageLabels | None:
    """Read the classes of a collection's images.

    Args:
        source: the collection.
        labels: `none`, `auto`, or the name of a column.
        argument: the name of this argument, for messages.
        min_classes: fewer are refused, and from 2 on values of which each image has another.
        class_names: the classes, in this order, with or without images; `None` for those that occur. Values may also be
            their numbers.

    Returns:
        The classes; `None` for `none`.

    Raises:
        ValueError: if such a column does not exist, `auto` has none or several to choose from, or the values are not
            classes: fewer than two, or as many as images.

    Example:
        >>> from ddim.data.base import Source
        >>> values = {"label": ["dog", "cat", "dog"], "id": ["1", "2", "3"]}
        >>> source = Source("pets", 3, lambda indices: [], "", values.get, label_columns=lambda: ("label", "id"))
        >>> read_labels(source, "auto")
        ImageLabels(names=('cat', 'dog'), indices=tensor([1, 0, 1]), column='label')
        >>> read_labels(source, "id")
        Traceback (most recent call last):
        ValueError: data.labels: id of pets is another value for each of its 3 images, which are not classes
    """
    if labels == NONE:
        return None
    column = choose_column(source, argument) if labels == AUTO else labels
    values = source.read_column(column)
    if values is None:
        columns = source.label_columns()
        allowed = f"{', '.join(map(shorten, columns))} or none{nearest(column, columns)}" if columns else "none"
        raise ValueError(f"{argument}: {source.name} has no {shorten(column)}; use {allowed}")
    # Tables that passed through other tools hold 3.0 for the class 3.
    if all(_is_whole(value.removesuffix(".0")) for value in values):
        values = [value.removesuffix(".0") for value in values]
    label = f"{argument}: {shorten(column)} of {source.name}"
    if class_names is not None:
        known = ClassLabels(len(class_names), tuple(class_names))
        return ImageLabels(known.names, known.resolve(values, len(values), label), column)
    names = order_classes(values, source.class_names(column))
    if len(names) < min_classes:
        raise ValueError(f"{label} must hold at least {min_classes} classes, got {shorten(', '.join(names))}")
    if len(names) == len(values) > 2 <= min_classes:
        raise ValueError(f"{label} is another value for each of its {len(values)} images, which are not classes")
    if len(names) > MAX_CLASSES:
        raise ValueError(f"{label} must hold at most {MAX_CLASSES} classes, got {len(names)}")
    if "" in names:
        raise ValueError(f"{label} must not be empty, which it is for {pluralize(values.count(''), 'image')}")
    index = {name: number for number, name in enumerate(names)}
    return ImageLabels(names, torch.tensor([index[value] for value in values]), column)


def choose_column(source: LabeledCollection, argument: str = "data.labels") -> str:
    """Return the column that `auto` stands for.

    Args:
        source: the collection.
        argument: the name of the argument, for messages.

    Raises:
        ValueError: if it has none, or several of which none has a usual name.

    Example:
        >>> from ddim.data.base import Source
        >>> choose_column(Source("x", 1, lambda indices: [], "", label_columns=lambda: ("hair", "label")))
        'label'
    """
    columns = source.label_columns()
    declared = [name for name in columns if source.class_names(name)]
    if (usual := next((name for name in USUAL_NAMES if name in columns), None)) is not None:
        return usual
    for names in (declared, columns):
        if len(names) == 1:
            return names[0]
    if not columns:
        raise ValueError(f"{argument}: {source.name} has no labels; use none")
    raise ValueError(
        f"{argument}: {source.name} has several columns; name one of {', '.join(map(shorten, columns))}, or none"
    )


def order_classes(values: Sequence[str], declared: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the classes that occur, in order.

    Args:
        values: of the images.
        declared: the classes in the order of the data set, if it has one.

    Example:
        >>> order_classes(["10", "2", "2"]), order_classes(["b", "a"]), order_classes(["b", "a"], ["c", "b", "a"])
        (('2', '10'), ('a', 'b'), ('b', 'a'))
    """
    occurring = set(values)
    if occurring <= set(declared):
        return tuple(name for name in declared if name in occurring)
    are_numbers = all(map(_is_whole, occurring))
    return tuple(sorted(occurring, key=lambda name: (int(name) if are_numbers else 0, name)))


def describe_classes(labels: ImageLabels, limit: int = 5) -> str:
    """Describe the classes in words: how many, their names, and how many images the smallest and the largest has.

    Args:
        labels: of the images.
        limit: names that are listed.

    Example:
        >>> describe_classes(ImageLabels(("cat", "dog"), torch.tensor([1, 0, 1]), "label"))
        '2 classes by label: cat, dog; 1 to 2 images each'
    """
    counts = Counter(labels.indices.tolist()).values()
    shown = ", ".join(map(shorten, labels.names[:limit])) + ", ..." * (len(labels.names) > limit)
    images = f"{min(counts):,}" if len(set(counts)) == 1 else f"{min(counts):,} to {max(counts):,}"
    return f"{len(labels.names)} classes by {shorten(labels.column)}: {shown}; {images} images each"


def _is_whole(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdecimal() and len(digits) < 19
