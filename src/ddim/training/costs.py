"""Estimates what a run would cost, from a few of its steps: parameters, operations, memory, time. Writes nothing."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from ddim.data.loader import loader_rate
from ddim.info import count_flop
from ddim.training.config import TrainConfig, describe_preset, preset_names, read_preset
from ddim.training.metrics_logger import memory_mib
from ddim.training.run import complete_config, prepare_dataset, start_processes
from ddim.training.trainer import Trainer
from ddim.unet import UNet2DModel

WARMUP_STEPS, TIMED_STEPS = 2, 5


class RunCosts(NamedTuple):
    """Costs of a run.

    Attributes:
        images: number of images that are trained on.
        parameters: number of parameters of the network.
        state_mib: MiB for weights, their averages, gradients and AdamW's two moments; per process, but for the averages
            that `ddim ema` combines, which the main process alone has.
        peak_mib: peak memory after a few steps, in MiB: of the GPU, or of the process.
        gflop_per_step: 10^9 operations per step; multiply and add count as two, the backward pass as two forward
            passes.
        seconds_per_step: median of the timed steps.
        loader_images_per_second: rate of the loader when nothing else runs.
        hours: time for all steps, without samples and checkpoints.
    """

    images: int
    parameters: int
    state_mib: float
    peak_mib: float
    gflop_per_step: float
    seconds_per_step: float
    loader_images_per_second: float
    hours: float


def estimate_costs(config: TrainConfig, device: str | torch.device = "auto") -> RunCosts:
    """Take a few steps of a run and extrapolate.

    Args:
        config: the checked configuration.
        device: device to train on: `auto`, or a device's name.

    Returns:
        The costs.

    Raises:
        FileNotFoundError: if the data does not exist.
        ValueError: if the data does not fit the configuration.
    """
    config = complete_config(config)
    accelerator, local_device = start_processes(device)
    dataset = prepare_dataset(config, accelerator, local_device)
    trainer = Trainer(config, dataset, Path(), local_device, accelerator)
    seconds = []
    for _ in range(WARMUP_STEPS + TIMED_STEPS):
        start = time.perf_counter()
        trainer.take_step()
        seconds.append(time.perf_counter() - start)
    seconds_per_step = statistics.median(seconds[WARMUP_STEPS:])
    parameters = trainer.model.num_parameters()
    return RunCosts(
        images=len(trainer.batches.indices),
        parameters=parameters,
        state_mib=(5 + len(config.ema.sigma_rels)) * 4 * parameters / 2**20,
        peak_mib=memory_mib(local_device),
        gflop_per_step=3 * config.batch_size * count_flop(trainer.model) / 1e9,
        seconds_per_step=seconds_per_step,
        loader_images_per_second=loader_rate(trainer.batches),
        hours=seconds_per_step * config.max_steps / 3600,
    )


def preset_table() -> str:
    """Format the presets that ship with the package as a table.

    Returns:
        One line per preset: name, parameters, image size, steps, batch size and purpose.
    """
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
