"""Classes and guidance on the page: what clients send, checked, and the same as a command and as a program."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from ddim import validation
from ddim.app import inputs
from ddim.io.class_labels import ClassLabels
from ddim.io.label_text import ALL, parse_labels, spread
from ddim.latents import Condition
from ddim.validation import shown

ANY = "any"
"""The label that stands for no class: the null class, or a model without classes."""


@dataclass(frozen=True)
class ConditionSettings:
    """What samples are conditioned on.

    Attributes:
        label: as it was given: `any`, `all`, an index, a name, or several of them separated by commas.
        labels: the classes that share the images equally, one after the other; none for the null class, and for models
            without classes.
        guidance_scale: 1 for no guidance.
    """

    label: str = ANY
    labels: tuple[str, ...] = ()
    guidance_scale: float = 1.0

    @classmethod
    def checked(
        cls, label: Any, guidance: Any, classes: ClassLabels | None, count: int | None, count_name: str = "count"
    ) -> ConditionSettings:
        """Check what a client sent.

        Args:
            label: `ANY`, `ALL`, an index, a name, or several of them separated by commas.
            guidance: a number from 0 to `inputs.MAX_GUIDANCE`; 1 without a class.
            classes: of the model; `None` for a model without.
            count: the number of images, which several labels share equally; `None` where they need not.
            count_name: what messages call the number.

        Returns:
            The settings.

        Raises:
            ValueError: for a class that the model does not have, guidance that it does not take, or images that the
                labels cannot share.
            TypeError: if `guidance` is not a number.

        Example:
            >>> ConditionSettings.checked("cat", 1.5, ClassLabels(2, ("cat", "dog"), has_null=True), 16).labels
            ('cat',)
            >>> ConditionSettings.checked(7, 1.5, None, 16)
            Traceback (most recent call last):
            ValueError: label and guidance require a model with classes
        """
        scale = validation.real("guidance", guidance, 0, inputs.MAX_GUIDANCE)
        text = str(label) if isinstance(label, int) and not isinstance(label, bool) else label
        if not isinstance(text, str):
            raise ValueError(f"label must be any, all, or a class, got {shown(label)}")
        is_any = text == ANY and not (classes and ANY in classes.names)
        if classes is None:
            if not is_any or scale != 1:
                raise ValueError("label and guidance require a model with classes")
            return cls()
        if is_any:
            if scale != 1:
                raise ValueError("guidance requires a label")
            classes.null(count or 1)
            return cls()
        if scale != 1 and not classes.has_null:
            raise ValueError(f"guidance must be 1, got {scale:g}: the model was trained without a null class")
        labels = parse_labels(text, classes)
        if count is not None:
            spread(labels, count, count_name)
        classes.resolve(labels, len(labels), "label")
        return cls(text, tuple(labels), scale)

    @property
    def is_any(self) -> bool:
        """Whether the samples are of no class."""
        return not self.labels

    @property
    def evaluations_per_step(self) -> int:
        """Function evaluations per image and step: two for guidance, of the class and of the null class."""
        return 1 if self.guidance_scale in (0, 1) else 2

    def arguments(self, count: int) -> Condition:
        """Return the keyword arguments of a pipeline.

        Args:
            count: the number of images.

        Example:
            >>> ConditionSettings("3,8", ("3", "8"), 2.0).arguments(4)
            {'class_labels': ['3', '3', '8', '8'], 'guidance_scale': 2.0}
        """
        if self.is_any:
            return {}
        return {"class_labels": spread(self.labels, count), "guidance_scale": self.guidance_scale}

    def columns(self, count: int) -> int | None:
        """Return the images per row of a grid with a row per label; `None` for one label.

        Args:
            count: the number of images.

        Example:
            >>> ConditionSettings("3,8", ("3", "8")).columns(16)
            8
        """
        return count // len(self.labels) if len(self.labels) > 1 else None

    def name_of(self, index: int, count: int) -> str:
        """Return the label of an image, as text before its seed; an empty one without.

        Args:
            index: of the image.
            count: the number of images.

        Example:
            >>> ConditionSettings("3,8", ("3", "8")).name_of(3, 4)
            '8, '
        """
        return f"{self.labels[index * len(self.labels) // count]}, " if self.labels else ""

    def as_python(self, count: int) -> str:
        """Return further arguments of a call in a program.

        Args:
            count: the number of images.

        Example:
            >>> ConditionSettings("3", ("3",), 1.5).as_python(16)
            ", class_labels='3', guidance_scale=1.5"
        """
        if self.is_any:
            return ""
        labels = repr(self.labels[0])
        if len(self.labels) > 1:
            labels = f"[label for label in {list(self.labels)} for _ in range({count // len(self.labels)})]"
        return f", class_labels={labels}, guidance_scale={self.guidance_scale}"

    def as_command(self) -> str:
        """Return further options of a command.

        Example:
            >>> ConditionSettings("all", ("0", "1"), 1.5).as_command()
            ' --label all --guidance 1.5'
        """
        return "" if self.is_any else f" --label {shlex.quote(self.label)} --guidance {self.guidance_scale}"


NO_CONDITION = ConditionSettings()
"""No class, and no guidance."""


def guidance_of(label: Any, guidance: Any) -> Any:
    """Return the guidance of the page's slider, which counts for a class alone.

    Args:
        label: what was chosen.
        guidance: where the slider stands.

    Example:
        >>> guidance_of("any", 2.0), guidance_of("cat", 2.0)
        (1.0, 2.0)
    """
    return 1.0 if label == ANY else guidance


def label_choices(classes: ClassLabels | None, max_rows: int = 0) -> list[tuple[str, str]]:
    """Return what a user chooses a class from: texts that are shown, and labels.

    Args:
        classes: of the model; `None` for a model without.
        max_rows: the largest number of classes that may be chosen at once.

    Returns:
        At least one choice; the first one is the default.

    Example:
        >>> label_choices(ClassLabels(2, ("cat", "dog"), has_null=True), max_rows=8)
        [('any', 'any'), ('all, a row per class', 'all'), ('cat', 'cat'), ('dog', 'dog')]
    """
    if classes is None:
        return [(ANY, ANY)]
    names = [classes.name_of(index) for index in range(classes.count)]
    every = [(ANY, ANY)] if classes.has_null else []
    if 1 < classes.count <= max_rows:
        every.append((f"{ALL}, a row per class", ALL))
    return [choice for choice in every if choice[1] not in names] + [(name, name) for name in names]
