"""The inputs of class and guidance, which several tabs have for models with classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from ddim.app.conditions import label_choices
from ddim.io.class_labels import ClassLabels

MAX_SLIDER_GUIDANCE = 5


@dataclass(frozen=True, eq=False)
class ClassInputs:
    """A choice of a class and a slider for guidance, which are shown for models with classes only.

    Attributes:
        group: holds both.
        label: the choice of the class.
        guidance: the slider.
        max_rows: the largest number of classes that `all` may stand for.
    """

    group: gr.Group
    label: gr.Dropdown
    guidance: gr.Slider
    max_rows: int

    @classmethod
    def lay_out(cls, classes: ClassLabels | None, max_rows: int = 0, list_info: str | None = None) -> ClassInputs:
        """Add the inputs to the page that is being built.

        Args:
            classes: of the page's first model; `None` for a model without.
            max_rows: the largest number of classes that `all` may stand for; 0 offers no `all`.
            list_info: shown where a list of classes may be typed too; `None` where it may not.

        Returns:
            The inputs.
        """
        choices = label_choices(classes, max_rows)
        with gr.Group(visible=classes is not None) as group:
            label = gr.Dropdown(choices, value=choices[0][1], label="Class", info=list_info,
                                allow_custom_value=list_info is not None)  # fmt: skip
            guidance = gr.Slider(0, MAX_SLIDER_GUIDANCE, 1.0, step=0.1, label="Guidance", visible=has_guidance(classes),
                                 info="Of a class: more is more typical, 1 is none.")  # fmt: skip
        return cls(group, label, guidance, max_rows)

    @property
    def components(self) -> list[Any]:
        """What changes with the model."""
        return [self.group, self.label, self.guidance]

    def default_label(self, classes: ClassLabels | None) -> str:
        """Return the first choice of a model.

        Args:
            classes: of the model; `None` for a model without.
        """
        return label_choices(classes, self.max_rows)[0][1]

    def follow(self, classes: ClassLabels | None) -> dict[Any, Any]:
        """Return the updates for another model, with its first choice and without guidance.

        Args:
            classes: of the model; `None` for a model without.
        """
        choices = label_choices(classes, self.max_rows)
        return {
            self.group: gr.Group(visible=classes is not None),
            self.label: gr.Dropdown(choices=choices, value=self.default_label(classes)),
            self.guidance: gr.Slider(value=1.0, visible=has_guidance(classes)),
        }


def has_guidance(classes: ClassLabels | None) -> bool:
    """Return whether a model can be guided by its null class.

    Args:
        classes: of the model; `None` for a model without.

    Example:
        >>> has_guidance(ClassLabels(10)), has_guidance(ClassLabels(10, has_null=True))
        (False, True)
    """
    return classes is not None and classes.has_null
