"""The classes of a class-conditional model: how many, their names, and the null class that stands for none of them.

A network with classes has an embedding of `num_class_embeds` rows. The last of them is the null class where the model
was trained with one: images whose label was dropped. Names and the null class are settings that only this library has,
in the configuration of `UNet2DModel`, which other libraries pass over:

    {"num_class_embeds": 11, "_ddim": {"class_names": ["zero", ..., "nine"], "has_null_class": true}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddim.validation import as_integer, nearest, shown

Labels = int | str | Sequence[int | str] | Tensor
"""Class labels as users give them: indices or names, one for all images or one per image."""

MAX_NAMES_SHOWN = 20


@dataclass(frozen=True)
class ClassLabels:
    """The classes of a model.

    Attributes:
        count: the number of classes, without the null class.
        names: of the classes; empty where they have none.
        has_null: whether the model was trained with a null class, whose label is `count`.

    Raises:
        ValueError: for another number of names than classes, or a name that stands for two classes.

    Example:
        >>> classes = ClassLabels(3, ("cat", "dog", "frog"), has_null=True)
        >>> classes.resolve(["dog", 2], 2)
        tensor([1, 2])
        >>> classes.null(2)
        tensor([3, 3])
    """

    count: int
    names: tuple[str, ...] = ()
    has_null: bool = False

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError("num_class_embeds must be at least 1, and 2 with has_null_class=True")
        if self.names and len(self.names) != self.count:
            raise ValueError(f"class_names must hold {self.count} names, got {len(self.names)}")
        if len(set(self.names)) != len(self.names) or not all(isinstance(name, str) and name for name in self.names):
            raise ValueError(f"class_names must be different names, none of them empty, got {shown(list(self.names))}")

    @classmethod
    def of(cls, config: Any) -> ClassLabels | None:
        """Return the classes of a network.

        Args:
            config: of the network, of any library.

        Returns:
            The classes; `None` for an unconditional network, and for one that takes other conditions than labels.

        Raises:
            ValueError: if the configuration contradicts itself.

        Example:
            >>> from types import SimpleNamespace
            >>> ClassLabels.of(SimpleNamespace(num_class_embeds=10)).count
            10
            >>> ClassLabels.of(SimpleNamespace(num_class_embeds=None)) is None
            True
        """
        rows, embed_type = getattr(config, "num_class_embeds", None), getattr(config, "class_embed_type", None)
        if rows is None or embed_type is not None:
            return None
        own = config.get("_ddim") if isinstance(config, Mapping) else None
        own = own if isinstance(own, Mapping) else {}
        return cls.parse(rows, own.get("class_names"), own.get("has_null_class", False))

    @classmethod
    def parse(cls, num_class_embeds: int, class_names: Sequence[str] | None, has_null_class: bool) -> ClassLabels:
        """Return the classes of the settings of a network.

        Args:
            num_class_embeds: classes, with the null class.
            class_names: their names, without the null class; `None` for none.
            has_null_class: whether the last class is the null class.

        Raises:
            ValueError: if the settings contradict each other.

        Example:
            >>> ClassLabels.parse(3, ["cat", "dog"], has_null_class=True).count
            2
        """
        return cls(num_class_embeds - bool(has_null_class), tuple(class_names or ()), bool(has_null_class))

    def resolve(self, labels: Labels, count: int, name: str = "class_labels") -> Tensor:
        """Return the indices of classes, one per image.

        Args:
            labels: indices or names, one for all images or one per image.
            count: the number of images.
            name: of the argument, for messages.

        Returns:
            int64 (count,), on the CPU.

        Raises:
            ValueError: for a class that does not exist, or another number of labels.
            TypeError: for labels of another type.

        Example:
            >>> ClassLabels(2, ("cat", "dog")).resolve("dig", 1)
            Traceback (most recent call last):
            ValueError: class_labels must be from 0 to 1 or one of cat, dog, got 'dig' (did you mean 'dog'?)
        """
        if hasattr(labels, "tolist"):  # tensors and NumPy's arrays
            labels = labels.tolist()
        entries = list(labels) if isinstance(labels, Sequence) and not isinstance(labels, str) else [labels]
        if not entries or len(entries) not in (1, count):
            raise ValueError(f"{name} must be one label, or one per image ({count}), got {len(entries)}")
        indices = torch.tensor([self._index(entry, name) for entry in entries])
        return indices.expand(count) if len(entries) == 1 else indices

    def null(self, count: int) -> Tensor:
        """Return the label of the null class, once per image.

        Args:
            count: the number of images.

        Returns:
            int64 (count,), on the CPU.

        Raises:
            ValueError: if the model has no null class.
        """
        if not self.has_null:
            raise ValueError(
                f"class_labels must be given: the model has {self.count} classes and was trained without a null class"
            )
        return torch.tensor([self.count]).expand(count)

    def name_of(self, index: int) -> str:
        """Return the name of a class; its index where classes have no names.

        Args:
            index: from 0 to `count` - 1.
        """
        return self.names[index] if self.names else str(index)

    def _index(self, label: Any, name: str) -> int:
        if isinstance(label, str):
            if label in self.names:
                return self.names.index(label)
            index = int(label) if label.isascii() and label.isdecimal() and len(label) < 10 else None
        elif (index := as_integer(label)) is None:
            raise TypeError(f"{name} must be integers or names, got {shown(label)}")
        if index is None or not 0 <= index < self.count:
            shown_names = ", ".join(self.names[:MAX_NAMES_SHOWN]) + ", ..." * (len(self.names) > MAX_NAMES_SHOWN)
            allowed = f"from 0 to {self.count - 1}" + (f" or one of {shown_names}" if self.names else "")
            raise ValueError(f"{name} must be {allowed}, got {shown(label)}{nearest(label, self.names)}")
        return index


def grid_of_classes(count: int, num_classes: int) -> tuple[int, int]:
    """Return rows and columns of a grid with a row per class.

    Args:
        count: number of images, about; the first classes are shown where there are more classes.
        num_classes: number of classes.

    Example:
        >>> grid_of_classes(64, 10), grid_of_classes(64, 1000)
        ((10, 6), (8, 8))
    """
    rows = min(num_classes, max(1, round(count**0.5)) if num_classes > count else num_classes)
    return rows, max(1, round(count / rows))


def count_labels(labels: Labels | None) -> int:
    """Return the number of labels: 1 for a single one, and for none.

    Args:
        labels: as users give them.

    Example:
        >>> count_labels("smile"), count_labels([3, 8])
        (1, 2)
    """
    if labels is None or isinstance(labels, str) or not hasattr(labels, "__len__"):
        return 1
    return len(labels) if not isinstance(labels, Tensor) or labels.ndim else 1


def arguments_of_batch(arguments: Mapping[str, Any], first: int, batch_size: int, count: int) -> dict[str, Any]:
    """Return arguments with the labels of a batch; beyond the last of all images the last label is repeated.

    Args:
        arguments: among them may be `class_labels` and `negative_labels`, one for all images or one per image.
        first: index of the batch's first image.
        batch_size: images per batch.
        count: the number of all images.

    Raises:
        ValueError: for another number of labels.

    Example:
        >>> arguments_of_batch({"class_labels": [3, 8, 5], "eta": 1}, first=2, batch_size=2, count=3)
        {'class_labels': [5, 5], 'eta': 1}
    """
    return take_labels(arguments, [min(index, count - 1) for index in range(first, first + batch_size)], count)


def take_labels(arguments: Mapping[str, Any], rows: Sequence[int], count: int) -> dict[str, Any]:
    """Return arguments with the labels of some images.

    Args:
        arguments: among them may be `class_labels` and `negative_labels`, one for all images or one per image.
        rows: indices of the images.
        count: the number of all images.

    Raises:
        ValueError: for another number of labels.

    Example:
        >>> take_labels({"class_labels": [3, 8, 5], "eta": 1}, rows=[2, 0], count=3)
        {'class_labels': [5, 3], 'eta': 1}
    """
    result = dict(arguments)
    for name in result.keys() & {"class_labels", "negative_labels"}:
        labels = result[name]
        if (given := count_labels(labels)) == 1:
            continue
        if given != count:
            raise ValueError(f"{name} must be one label, or one per image ({count}), got {given}")
        result[name] = [labels[row] for row in rows]
    return result


def check_class_settings(
    num_class_embeds: int | None, class_embed_type: str | None, class_names: Sequence[str] | None, has_null_class: bool
) -> None:
    """Check that the names and the null class of a network fit its classes.

    Args:
        num_class_embeds: of `UNet2DModel`, as all others.
        class_embed_type: the network has classes where this is `None` and `num_class_embeds` is not.
        class_names: names of the classes.
        has_null_class: whether the last class is the null class.

    Raises:
        ValueError: if they do not.

    Example:
        >>> check_class_settings(None, None, ["cat"], False)
        Traceback (most recent call last):
        ValueError: class_names and has_null_class require num_class_embeds, and class_embed_type=None
    """
    if num_class_embeds is not None and class_embed_type is None:
        ClassLabels.parse(num_class_embeds, class_names, has_null_class)
    elif class_names or has_null_class:
        raise ValueError("class_names and has_null_class require num_class_embeds, and class_embed_type=None")
