"""The model's own samples, which its students learn from where no images are given."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from ddim.bulk import sample_many
from ddim.pipeline import DDIMPipeline

SAMPLES = "samples.npz"
SAMPLE_COUNT, SAMPLE_STEPS, SAMPLE_BATCH, GPU_SAMPLE_BATCH = 4096, 20, 64, 512
"""How many samples, in how many steps, and in batches of what size, on a GPU too."""
SAMPLE_SHARE, MIN_SAMPLES, TIMED_SAMPLES = 0.2, 256, 8
"""The part of a time limit that may go to them, where their number is not given; how many there are at least, and how
many are timed."""


def choose_count(pipe: DDIMPipeline, device: torch.device, guidance_scale: float, seconds: float) -> int:
    """Choose how many samples of the model are made, from the time that a few take.

    Args:
        pipe: the model.
        device: where they are made.
        guidance_scale: of a model with classes.
        seconds: the time for all of them; infinity for no limit.

    Returns:
        The number: a multiple of `MIN_SAMPLES`, at most `SAMPLE_COUNT`.

    Example:
        >>> choose_count(DDIMPipeline.from_pretrained("mnist"), torch.device("cpu"), 1.0, math.inf)
        4096
    """
    if seconds == math.inf:
        return SAMPLE_COUNT
    settings = _sampling_settings(pipe.to(device), TIMED_SAMPLES, guidance_scale)
    started = time.monotonic()
    pipe.sample_images(TIMED_SAMPLES, output_type="np", **settings)
    affordable = seconds * TIMED_SAMPLES / (time.monotonic() - started)
    return min(SAMPLE_COUNT, max(1, int(affordable) // MIN_SAMPLES) * MIN_SAMPLES)


def generate_samples(
    pipe: DDIMPipeline, out: Path, count: int, device: torch.device, guidance_scale: float = 1.0
) -> Path:
    """Generate the model's own samples to distill on, of all classes alike; those that are present are kept.

    Args:
        pipe: the model.
        out: the folder.
        count: number of samples.
        device: where to generate them.
        guidance_scale: of a model with classes.

    Returns:
        The file.
    """
    path = out / SAMPLES
    batch_size = SAMPLE_BATCH if device.type == "cpu" else GPU_SAMPLE_BATCH
    settings = _sampling_settings(pipe, count, guidance_scale)
    sample_many(pipe.to(device), path, count, batch_size=batch_size, **settings)
    return path


def _sampling_settings(pipe: DDIMPipeline, count: int, guidance_scale: float) -> dict[str, Any]:
    """Return the settings of the model's own samples, of all classes alike."""
    own_steps = pipe.scheduler.distilled_steps
    settings = {"num_inference_steps": own_steps or SAMPLE_STEPS, "order": 1 if own_steps else 2}
    if pipe.classes is None:
        return settings
    labels = [index % pipe.classes.count for index in range(count)]
    return {**settings, "class_labels": labels, "guidance_scale": guidance_scale}
