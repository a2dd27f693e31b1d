"""Trackers of experiments: TensorBoard, Weights & Biases, MLflow, through the classes of `accelerate`.

TensorBoard's files are in `RUN/tensorboard`. The others get a new run per execution of the training, named after the
folder, in the project or experiment `ddim`; their own environment variables choose others, and a run to continue
(`WANDB_PROJECT`, `WANDB_RUN_ID`; `MLFLOW_EXPERIMENT_NAME`, `MLFLOW_RUN_ID`, `MLFLOW_TRACKING_URI`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ddim.extras import require

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "ddim"
"""Project or experiment of a run, where the environment names no other."""


def check_trackers(names: Sequence[str]) -> None:
    """Check, before any work, that the packages of trackers are installed.

    Args:
        names: `tensorboard`, `wandb`, `mlflow`.

    Raises:
        ImportError: if one is missing, with the command that installs it.

    Example:
        >>> check_trackers(["tensorboard"])
    """
    for name in names:
        require(f"the tracker {name}", name)


def start_trackers(names: Sequence[str], out: Path, step: int, config: Mapping[str, Any]) -> list[GeneralTracker]:
    """Start trackers of a run; called in the main process.

    Args:
        names: as for `check_trackers`.
        out: folder of the run.
        step: step at which the run starts or resumes. What TensorBoard has of later steps, logged by a process that was
            killed before its next checkpoint, is hidden.
        config: entries of the configuration, by dotted key.

    Returns:
        The trackers.
    """
    from accelerate.tracking import MLflowTracker, TensorBoardTracker, WandBTracker

    name = out.resolve().name
    makers = {
        "tensorboard": lambda: TensorBoardTracker("tensorboard", out, purge_step=step + 1),
        "wandb": lambda: WandBTracker(os.environ.get("WANDB_PROJECT", PROJECT), name=name, dir=str(out)),
        "mlflow": lambda: MLflowTracker(PROJECT, run_name=name),
    }
    trackers: list[GeneralTracker] = [makers[name]() for name in names]
    for tracker in trackers:
        tracker.start()
        # TensorBoard would get a folder of its own per execution; RUN/config.yaml says the same.
        if config and tracker.name != "tensorboard":
            plain = {key: value if isinstance(value, int | float) else str(value) for key, value in config.items()}
            tracker.store_init_configuration(plain)
    return trackers


def log_image(tracker: Any, step: int, image: Image.Image, file: Path) -> None:
    """Log a grid of samples.

    Args:
        tracker: one of `start_trackers`.
        step: number of steps taken.
        image: a gray or RGB image.
        file: the same as a file.
    """
    if tracker.name == "tensorboard":
        tracker.log_images({"samples": np.atleast_3d(np.asarray(image))[None]}, step, dataformats="NHWC")
    elif tracker.name == "wandb":
        tracker.log_images({"samples": [image]}, step)
    else:
        tracker.log_artifact(str(file), "samples")
