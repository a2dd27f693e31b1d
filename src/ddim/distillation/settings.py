"""The training configuration of each student: what is chosen by the machine, by the length of the run, by the time.

Entries that a user sets replace these; `ddim.distillation.checks` has those that cannot be set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ddim.data.labels import AUTO
from ddim.distillation.stages import Stage, student_scheduler
from ddim.pipeline import DDIMPipeline
from ddim.training.config import TrainConfig, merge, validate
from ddim.training.machine import inspect_machine
from ddim.training.plan import LR_WIDTH, MIN_BATCH_SIZE, PEAK_LR, TIME_SHARE, choose_batch_size, choose_precisions

FIRST_SHARE = 0.7
"""The part of a time limit that the first student gets, where there are several."""
LATER_LR = 0.5
"""Learning rate of further students, relative to that of the first."""
GPU_BATCH_PIXELS, GPU_BATCH_SIZE = 2**20, 512
"""On a GPU: values of a batch, and images of it, at most."""
CPU_BATCH_SIZE, CPU_REPEATS = 16, 4
"""On a CPU: images of a batch, of which more would take fewer steps in the same time, and steps for each batch."""
BACKWARD = 3
"""A training step of the student costs as much as so many evaluations of the teacher."""


def choose_settings(pipe: DDIMPipeline, device: torch.device, count: int) -> dict[str, Any]:
    """Choose what depends on the machine: a run that resumes elsewhere keeps it.

    Args:
        pipe: the model.
        device: device to train on.
        count: number of images, or of the model's own samples.

    Returns:
        Entries of the training configuration.
    """
    machine = inspect_machine(device)
    size = pipe.sample_shape[1:]
    if machine.is_cpu:
        batch_size = min(CPU_BATCH_SIZE, choose_batch_size(size, count, is_cpu=True))
        precision, repeats = "fp32", CPU_REPEATS
    else:
        largest = min(GPU_BATCH_SIZE, max(MIN_BATCH_SIZE, GPU_BATCH_PIXELS // math.prod(size)), count)
        batch_size = 2 ** int(math.log2(largest))
        precision, repeats = choose_precisions(machine)[0], 1
    return {
        "batch_size": batch_size,
        "precision": precision,
        "data": {"on_device": not machine.is_cpu},
        "distill": {"repeats": repeats},
    }


def stage_settings(pipe: DDIMPipeline, index: int, max_steps: int) -> dict[str, Any]:
    """Choose what depends on the length of a run.

    Args:
        pipe: the model.
        index: number of the student, from 0.
        max_steps: the length.

    Returns:
        Entries of the training configuration.
    """
    lr = PEAK_LR * min(1.0, LR_WIDTH / pipe.unet.config.block_out_channels[0])
    return {
        "max_steps": max_steps,
        "optim": {"lr": lr * (LATER_LR if index else 1.0), "warmup_steps": min(100, max_steps // 10)},
        "ema": {"decay": round(min(0.9999, max(0.9, 1 - 20 / max_steps)), 5)},
        "checkpoints": {"every": max(1, min(1000, max_steps // 4))},
        "log_every": min(50, max(1, max_steps // 50)),
    }


def fit_lengths(stages: Sequence[Stage], seconds_per_step: float, seconds: float, repeats: int = 1) -> list[int]:
    """Choose the lengths of all runs so that they fit into a time.

    The first run gets `FIRST_SHARE`, since all further students inherit its errors, the others equal parts of the rest.

    Args:
        stages: the students.
        seconds_per_step: of a training step of the first with its teacher's evaluations.
        seconds: the time for all.
        repeats: steps that share these evaluations.

    Returns:
        Training steps, at least 1 each.

    Example:
        >>> from ddim.distillation.stages import plan_stages
        >>> from ddim.scheduler import DDIMScheduler
        >>> fit_lengths(plan_stages([4, 2, 1], DDIMScheduler()), seconds_per_step=0.1, seconds=100)
        [595, 280, 280]
    """
    later = len(stages) - 1
    shares = [FIRST_SHARE, *[(1 - FIRST_SHARE) / later] * later] if later else [1.0]
    costs = [
        seconds_per_step * (stage.substeps / repeats + BACKWARD) / (stages[0].substeps + BACKWARD) for stage in stages
    ]
    return [max(1, int(TIME_SHARE * share * seconds / cost)) for share, cost in zip(shares, costs, strict=True)]


def stage_config(
    pipe: DDIMPipeline,
    stage: Stage,
    teacher: str,
    init: str,
    source: str,
    chosen: Mapping[str, Any],
    given: Mapping[str, Any],
) -> TrainConfig:
    """Return the configuration of a student's run.

    Args:
        pipe: the model.
        stage: the student.
        teacher: the name of its teacher: the model, or the folder of the student before.
        init: the name of the model whose weights it starts from.
        source: the images.
        chosen: entries that were chosen, nested.
        given: entries that replace them.

    Returns:
        The configuration.

    Raises:
        ValueError: naming an entry that is wrong.

    Example:
        >>> from ddim.distillation.stages import plan_stages
        >>> pipe = DDIMPipeline.from_pretrained("mnist")
        >>> [stage] = plan_stages([4], pipe.scheduler)
        >>> stage_config(pipe, stage, "mnist", "mnist", "digits", {}, {}).distill.substeps
        8
    """
    S, pixel_format = stage.num_inference_steps, pipe.pixel_format
    data: dict[str, Any] = {"source": source}
    if not pixel_format.is_eight_bit:
        data["value_range"] = [list(pair) for pair in zip(pixel_format.low, pixel_format.high, strict=True)]
    objective: dict[str, Any] = {"weighting": "truncated_snr"}
    if (classes := pipe.classes) is not None:
        # The student has its teacher's classes.
        names = [classes.name_of(index) for index in range(classes.count)]
        data |= {"labels": AUTO, "class_names": names}
        objective |= {} if classes.has_null else {"class_dropout": 0.0}
    base = {
        "data": data,
        "init": init,
        "model": {"dropout": 0.0, "time_embedding_type": "learned", "num_train_timesteps": S},
        "scheduler": student_scheduler(pipe.scheduler.alphas_cumprod_float64, stage.timesteps),
        "objective": objective,
        "distill": {"teacher": teacher, "starts": list(stage.starts), "substeps": stage.substeps},
        "optim": {"decay": "linear"},
        "ema": {"sigma_rels": []},
        "samples": {"every": 0, "num_inference_steps": S},
        "evaluate": {"num_inference_steps": S},
    }
    return validate(merge(base, chosen, given))
