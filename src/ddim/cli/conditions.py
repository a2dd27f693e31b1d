"""The options of classes and guidance, which all commands that sample share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ddim.io.label_text import parse_labels, spread
from ddim.validation import shown

if TYPE_CHECKING:
    from ddim.io.class_labels import ClassLabels
    from ddim.latents import Condition
    from ddim.pipeline import DDIMPipeline

OPTIONS: dict[str, tuple[Any, Any]] = {
    "label": (
        Annotated[
            str | None,
            typer.Option(
                help="Class of the images, an index or a name, of a model with classes; several, separated by commas, "
                "or all, share the images equally, one after the other."
            ),
        ],
        None,
    ),
    "guidance": (
        Annotated[
            float,
            typer.Option(
                help="Scale of guidance: 1 is none, more makes images more typical of their class, 0 ignores it."
            ),
        ],
        1.0,
    ),
    "guidance_interval": (
        Annotated[
            str | None, typer.Option(help="Timesteps between which guidance acts, such as 200,800; defaults to all.")
        ],
        None,
    ),
    "negative_label": (
        Annotated[str | None, typer.Option(help="Class to guide away from, instead of none, as --label.")],
        None,
    ),
    "guide": (
        Annotated[
            str | None,
            typer.Option(
                help="A weaker model to guide away from, such as RUN/checkpoints/step-N, instead of the class."
            ),
        ],
        None,
    ),
}
"""The options by name: their annotations, as Typer reads them, and their defaults."""


@dataclass(frozen=True)
class ConditionOptions:
    """The options of classes and guidance, as they were given.

    Attributes:
        label: `--label`: an index, a name, several of them separated by commas, or `all`.
        guidance: `--guidance`, the scale.
        guidance_interval: `--guidance-interval`: two timesteps, such as `200,800`.
        negative_label: `--negative-label`, as `label` without `all`.
        guide: `--guide`: the name of a model.

    Example:
        >>> ConditionOptions(label="3", guidance=2.0).label
        '3'
    """

    label: str | None = None
    guidance: float = 1.0
    guidance_interval: str | None = None
    negative_label: str | None = None
    guide: str | None = None

    def condition(self, pipe: DDIMPipeline, count: int) -> Condition:
        """Return the options as arguments of the library, checked.

        Args:
            pipe: the model.
            count: the number of images. With several labels, each has as many of them, in consecutive order.

        Raises:
            ValueError: for options that the model does not take.
            FileNotFoundError: if the guide does not exist.
        """
        condition: dict[str, Any] = {"guidance_scale": self.guidance}
        for name, text in (("class_labels", self.label), ("negative_labels", self.negative_label)):
            if text is not None:
                condition[name] = spread(parse_labels(text, pipe.classes), count)
        if self.guidance_interval is not None:
            condition["guidance_interval"] = _parse_interval(self.guidance_interval)
        if self.guide is not None:
            from ddim.pipeline import DDIMPipeline

            guide = DDIMPipeline.from_pretrained(self.guide, engine=pipe.engine)
            condition["guide"] = guide.to(pipe.device, pipe.dtype)
        pipe.conditions(count, **condition)
        result: Condition = condition  # type: ignore[assignment]
        return result

    def record(self, pipe: DDIMPipeline, count: int) -> dict[str, Any] | None:
        """Return the options as a file of latents holds them, as arguments of `decode`.

        Args:
            pipe: the model.
            count: the number of images.

        Returns:
            Plain values; `None` without options.

        Raises:
            ValueError: for a guide, which a file cannot hold, and for options that the model does not take.
        """
        if self == NO_CONDITIONS:
            return None
        if self.guide is not None:
            raise ValueError("--guide cannot be recorded in a file of latents; use --negative-label or the null class")
        condition: dict[str, Any] = dict(self.condition(pipe, count))
        for name in condition.keys() & {"class_labels", "negative_labels"}:
            classes = cast("ClassLabels", pipe.classes)
            condition[name] = classes.resolve(condition[name], count, name).tolist()
        return condition

    def num_labels(self, pipe: DDIMPipeline) -> int:
        """Return the number of labels that `--label` names; 1 without it.

        Args:
            pipe: the model.
        """
        return 1 if self.label is None else len(parse_labels(self.label, pipe.classes))


NO_CONDITIONS = ConditionOptions()
"""The options as they are where none is given."""


def takes_conditions(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command so that it has the options of classes and guidance, which it gets as one argument.

    Args:
        command: a function with an argument `conditions`, which gets `ConditionOptions`.

    Returns:
        The command with `OPTIONS` in its place.

    Example:
        >>> @takes_conditions
        ... def show(model: str, conditions: ConditionOptions = NO_CONDITIONS) -> None:
        ...     print(model, conditions.label)
        >>> show("mnist", label="3")
        mnist 3
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        command(*args, **kwargs, conditions=ConditionOptions(**given))

    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name != "conditions":
            parameters.append(parameter)
            continue
        for name, (annotation, default) in OPTIONS.items():
            parameters.append(parameter.replace(name=name, annotation=annotation, default=default))
    vars(wrapped)["__signature__"] = signature.replace(parameters=parameters)
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def _parse_interval(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() and len(part) < 10 for part in parts):
        raise ValueError(f"--guidance-interval must be two timesteps, such as 200,800, got {shown(text)}")
    return int(parts[0]), int(parts[1])
