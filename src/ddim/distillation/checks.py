"""What can be distilled, and with which settings: everything that is refused before any work."""

from __future__ import annotations

from typing import Any

from ddim.data.labels import AUTO, read_labels
from ddim.data.sources import open_source
from ddim.diffusion.guidance import Guidance
from ddim.pipeline import DDIMPipeline
from ddim.training.config import TrainConfig

DECIDED = ("init", "process", "epochs", "model", "scheduler", "data.source", "data.class_names")
"""Entries of the training configuration, and sections, that a distillation decides itself."""
DECIDED_OF_TEACHER = ("teacher", "starts", "substeps", "guidance_scale", "teacher_sha256")
"""Those of its section `distill`."""
OPEN = ("model.dropout", "scheduler.prediction_type")
"""Entries of such sections that may be set."""


def check_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Check that settings leave alone what a distillation decides itself.

    Args:
        given: entries of the training configuration, nested.

    Returns:
        The same.

    Raises:
        ValueError: naming an entry that cannot be set.

    Example:
        >>> check_settings({"optim": {"lr": 1e-3}})
        {'optim': {'lr': 0.001}}
        >>> check_settings({"init": "mnist"})
        Traceback (most recent call last):
        ValueError: init cannot be set: the model and the arguments of a distillation decide it
    """
    decided = {*DECIDED, *(f"distill.{name}" for name in DECIDED_OF_TEACHER)}
    for section, value in given.items():
        names = [f"{section}.{name}" for name in value] if isinstance(value, dict) else [section]
        for name in names:
            if value is not None and name not in OPEN and (name in decided or section in decided):
                hint = "; use max_steps" if name == "epochs" else ""
                raise ValueError(f"{name} cannot be set: the model and the arguments of a distillation decide it{hint}")
    return given


def check_images(config: TrainConfig, pipe: DDIMPipeline, model: str) -> None:
    """Check that images can be found, and have the classes of the model.

    Args:
        config: of the first student's run.
        pipe: the model.
        model: its name, for messages.

    Raises:
        FileNotFoundError: if the images do not exist.
        ValueError: if they have no classes, or others, or cannot be read.
    """
    data = config.data
    source = open_source(data.source, data.split, data.column)
    if pipe.classes is not None:
        if data.labels == AUTO and not source.label_columns():
            raise ValueError(
                f"data has no labels, and {model} has classes; give images with labels, or none, for the model's own "
                "samples"
            )
        read_labels(source, data.labels, class_names=data.class_names)


def check_teacher(pipe: DDIMPipeline, model: str) -> None:
    """Check that a model can be distilled.

    Args:
        pipe: the model.
        model: its name, for messages.

    Raises:
        ValueError: if it has other conditions than class labels, predicts something else than images, or embeds
            timesteps as `fourier`, or its configuration lacks the size of its images.

    Example:
        >>> check_teacher(DDIMPipeline.from_pretrained("mnist"), "mnist")
    """
    config = pipe.unet.config
    if pipe.unet.class_embedding is not None and pipe.classes is None:
        raise ValueError(f"model must have class labels or be unconditional, {model} takes other conditions")
    if config.time_embedding_type == "fourier":
        raise ValueError(
            f"model must embed timesteps as positional or learned, {model} does as fourier, with too many features for "
            "a student's table"
        )
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise ValueError(
            f"model must predict as many channels as it takes, or twice as many with a variance, {model} takes "
            f"{config.in_channels} and predicts {config.out_channels}"
        )
    pipe.sample_shape  # noqa: B018  # raises where the configuration lacks the size


def check_guidance(pipe: DDIMPipeline, model: str, guidance_scale: float) -> float:
    """Check the guidance that a student is to learn.

    Args:
        pipe: the model.
        model: its name, for messages.
        guidance_scale: w, at least 0.

    Returns:
        The scale.

    Raises:
        ValueError: if it is out of range, or the model has no null class to guide away from.

    Example:
        >>> check_guidance(DDIMPipeline.from_pretrained("mnist"), "mnist", 2)
        Traceback (most recent call last):
        ValueError: guidance_scale requires a model with classes and a null class, which mnist does not have
    """
    scale = Guidance(guidance_scale).scale
    if scale != 1 and (pipe.classes is None or not pipe.classes.has_null):
        raise ValueError(f"guidance_scale requires a model with classes and a null class, which {model} does not have")
    return scale
