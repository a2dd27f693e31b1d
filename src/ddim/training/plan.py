"""What a run would cost, found out by a few of its steps: parameters, operations, memory, time. Writes nothing."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from ddim.data.dataset import loader_rate
from ddim.info import count_flop
from ddim.training.config import TrainConfig, describe_preset, preset_names, read_preset
from ddim.training.metrics_logger import memory_mib
from ddim.training.run import complete, load, start_processes
from ddim.training.trainer import Trainer
from ddim.unet import UNet2DModel

STEPS = 5


class Plan(NamedTuple):
    """The costs of a run.

    Attributes:
        images: that are trained on.
        parameters: of the network.
        state_mib: weights, their average, gradients and the two moments of AdamW, in MiB, of each process.
        peak_mib: the most memory in use after a few steps, in MiB: of the GPU, or of the process.
        gflop_per_step: multiply and add count as two; the backward pass counts as two forward passes.
        seconds_per_step: the median of five, after two that are not counted.
        loader_images_per_second: what the data gives when nothing else is done.
        hours: for all steps, without samples and checkpoints.
    """

    images: int
    parameters: int
    state_mib: float
    peak_mib: float
    gflop_per_step: float
    seconds_per_step: float
    loader_images_per_second: float
    hours: float


def plan(config: TrainConfig, device: str | torch.device = "auto") -> Plan:
    """Try a run out.

    Args:
        config: the checked configuration.
        device: as for `ddim.training.run.train`.

    Raises:
        ValueError: as `ddim.training.run.train`.
        FileNotFoundError: as there.
    """
    config = complete(config)
    accelerator, where = start_processes(device)
    trainer = Trainer(config, load(config, accelerator, where), Path(), where, accelerator)
    seconds = []
    for _ in range(STEPS + 2):
        started = time.perf_counter()
        trainer.take_step()
        seconds.append(time.perf_counter() - started)
    step = statistics.median(seconds[2:])
    parameters = trainer.model.num_parameters()
    return Plan(
        images=len(trainer.batches.indices),
        parameters=parameters,
        state_mib=5 * 4 * parameters / 2**20,
        peak_mib=memory_mib(where),
        gflop_per_step=3 * config.batch_size * count_flop(trainer.model) / 1e9,
        seconds_per_step=step,
        loader_images_per_second=loader_rate(trainer.batches),
        hours=step * config.max_steps / 3600,
    )


def preset_table() -> str:
    """The presets that ship with the package: name, parameters, images, steps, and what each is for."""
    rows = []
    for name in preset_names():
        preset = read_preset(name)
        with torch.device("meta"):
            parameters = UNet2DModel(**preset["model"]).num_parameters()
        size = preset["model"]["sample_size"]
        rows.append(
            f"{name:<14} {parameters:>12,} parameters  {size:>3}x{size:<3}  {preset['max_steps']:>9,} steps of "
            f"{preset['batch_size']:<4} {describe_preset(name)}"
        )
    return "\n".join(rows)
