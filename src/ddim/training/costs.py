"""Estimates what a run would cost, from a few of its steps: parameters, operations, memory, time. Writes nothing.

A step takes the time of its update (AdamW and the average, which depend on the parameters alone) and of its gradients,
which is proportional to the operations of the network:

    seconds per step = update + gradients * (operations of the whole batch) / (operations measured)

On a CPU no more than `MEASURED_FLOP_PER_CORE` are measured, of fewer images, or of smaller ones where a single image is
too much, so that an estimate takes seconds however large the run. `torch.compile`, which compiles for minutes, is left
out of it.
"""

from __future__ import annotations

import functools
import json
import logging
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddim.data.config import DataConfig
from ddim.data.dataset import CachedImageDataset, choose_cache, open_dataset
from ddim.data.loader import Batches, loader_rate
from ddim.info import count_flop
from ddim.io.images import height_and_width
from ddim.nn.layers import ResnetBlock2D
from ddim.training.config import TrainConfig, describe_preset, preset_names, read_preset
from ddim.training.machine import is_emulated
from ddim.training.metrics_logger import memory_mib
from ddim.training.run import check_batch_size, complete_config, resolve_length, start_processes
from ddim.training.trainer import Trainer, network_arguments
from ddim.unet import UNet2DModel

logger = logging.getLogger(__name__)

MEASURED_FLOP_PER_CORE = 20e9
"""Operations of a measured step per CPU core: a second or less. Much smaller batches take longer per image."""
PASSES = 3
"""Operations of a step relative to those of the forward pass: the backward pass counts as two."""
EMULATED_SLOWDOWN = 10
"""About how much longer a CPU without instructions for 16 bits takes for operations on them."""
TIMED_STEPS = 5
TIMED_SECONDS = 2.5
"""No further step is timed after this time."""
READ_IMAGES = 64
"""Images that are read to measure how fast they can be."""
STATE_COPIES = 5
"""Float32 numbers per parameter: weight, average, gradient, two moments; `ema.sigma_rels` adds averages."""


class RunCosts(NamedTuple):
    """Costs of a run.

    Attributes:
        images: number of images that are trained on.
        parameters: number of parameters of the network.
        state_mib: MiB for weights, their averages, gradients and AdamW's two moments; per process, but for the averages
            that `ddim ema` combines, which the main process alone has.
        peak_mib: memory of a process during a step, in MiB: measured on a GPU, computed from the feature maps on a CPU.
        gflop_per_step: 10^9 operations per step; multiply and add count as two, the backward pass as two forward
            passes.
        seconds_per_step: of the update and the gradients, medians of the timed steps.
        seconds_per_sample: of one function evaluation on one image, without gradients.
        loader_images_per_second: rate of the loader when nothing else runs.
        reading_seconds: time for decoding all images once, before the first step; 0 where they are decoded at each
            visit.
        hours: time for all steps and grids of samples, without checkpoints.
        measured: what was measured, in words.
    """

    images: int
    parameters: int
    state_mib: float
    peak_mib: float
    gflop_per_step: float
    seconds_per_step: float
    seconds_per_sample: float
    loader_images_per_second: float
    reading_seconds: float
    hours: float
    measured: str


def estimate_costs(config: TrainConfig, device: str | torch.device = "auto") -> RunCosts:
    """Take a few steps of a run, or of a part of its batch, and extrapolate.

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
    if accelerator.is_main_process:
        logger.info("measuring a few steps")
    size = height_and_width(config.model["sample_size"])
    with left_to_the_run():
        # Images are decoded when they are read, so that opening a large collection takes no time.
        lazy = open_dataset(
            config.data.model_copy(update={"cache": "none"}), config.model["sample_size"], config.model["in_channels"]
        )
    count = lazy.shape[0]
    config = resolve_length(config, count)
    check_batch_size(config, count)

    start = time.perf_counter()
    first = torch.arange(min(count, READ_IMAGES))
    pixels, classes = lazy.read_labeled(first)
    reading_rate = len(pixels) / (time.perf_counter() - start)
    is_cached = _cache(config.data, count * pixels[0].nbytes, accelerator.num_processes > 1) != "none"
    labels = None
    if lazy.labels is not None and classes is not None:
        labels = replace(lazy.labels, indices=classes)
    dataset = CachedImageDataset(pixels, pixel_format=lazy.pixel_format, labels=labels)

    arguments = network_arguments(config, labels)
    network = _meta_network(config.model | arguments)
    flop_per_image = PASSES * count_flop(network)
    local_batch = config.batch_size // accelerator.num_processes
    budget = float("inf")
    if local_device.type == "cpu":
        slowdown = EMULATED_SLOWDOWN if is_emulated(config.precision, local_device) else 1
        budget = MEASURED_FLOP_PER_CORE * torch.get_num_threads() / slowdown
    batch, measured_size = measured_part(local_batch, size, flop_per_image, budget, 2 ** (len(network.down_blocks) - 1))
    part = config.model_copy(
        update={
            "model": config.model
            | {"sample_size": measured_size[0] if len(set(measured_size)) == 1 else list(measured_size)},
            "batch_size": batch * accelerator.num_processes,
            "optim": config.optim.model_copy(update={"accumulate": 1}),
            "data": config.data.model_copy(update={"holdout": 0}),
            "compile": False,
        }
    )
    resident = memory_mib(local_device)
    with left_to_the_run():
        trainer = Trainer(part, dataset, Path(), local_device, accelerator)
    update, gradients, sampling = _time_steps(trainer)
    scale = local_batch * size[0] * size[1] / (batch * measured_size[0] * measured_size[1])
    seconds_per_step = update + gradients * scale
    seconds_per_sample = sampling * scale / local_batch
    peak_mib = memory_mib(local_device)
    if local_device.type == "cpu":
        peak_mib = resident + memory_bytes(config, local_batch // config.optim.accumulate, arguments) / 2**20
    cached_rate = loader_rate(
        Batches(dataset, torch.arange(len(pixels)), config.batch_size, config.seed, config.model["sample_size"])
    )
    return RunCosts(
        images=count - config.data.holdout,
        parameters=network.num_parameters(),
        state_mib=memory_bytes(config, 0, arguments) / 2**20,
        peak_mib=peak_mib,
        gflop_per_step=config.batch_size * flop_per_image / 1e9,
        seconds_per_step=seconds_per_step,
        seconds_per_sample=seconds_per_sample,
        loader_images_per_second=cached_rate if is_cached else reading_rate,
        reading_seconds=count / reading_rate if is_cached else 0.0,
        hours=count_hours(config, seconds_per_step, seconds_per_sample),
        measured=f"{batch} of {local_batch} images, {measured_size[0]}x{measured_size[1]}",
    )


def measured_part(
    batch_size: int, size: tuple[int, int], flop_per_image: float, budget: float, multiple: int
) -> tuple[int, tuple[int, int]]:
    """Choose the part of a batch that a number of operations suffices for.

    Args:
        batch_size: images of the whole batch.
        size: their height and width.
        flop_per_image: operations of one of them, proportional to its pixels.
        budget: operations that may be measured.
        multiple: of which height and width must stay multiples.

    Returns:
        Number of images, at least 1, and their height and width, which are halved while one image is too much.

    Example:
        >>> measured_part(64, (32, 32), 1e9, budget=10e9, multiple=4)
        (10, (32, 32))
        >>> measured_part(64, (256, 256), 640e9, budget=40e9, multiple=32)
        (1, (64, 64))
    """
    height, width = size
    while flop_per_image > budget and height % (2 * multiple) == 0 and width % (2 * multiple) == 0:
        height, width, flop_per_image = height // 2, width // 2, flop_per_image / 4
    return max(1, min(batch_size, int(budget / flop_per_image) if budget < float("inf") else batch_size)), (
        height,
        width,
    )


def memory_bytes(config: TrainConfig, batch_size: int, classes: Mapping[str, Any] = MappingProxyType({})) -> int:
    """Compute the memory of a training step: weights, average, gradients, moments, and the feature maps.

    The feature maps that the backward pass needs are the outputs of all layers; with gradient checkpointing, a residual
    block keeps its output alone.

    Args:
        config: the completed configuration.
        batch_size: images per backward pass.
        classes: arguments of the network that `config.model` does not have (`ddim.training.trainer.network_arguments`).

    Returns:
        Bytes.

    Example:
        >>> from ddim.training.config import load_config
        >>> 50e6 < memory_bytes(load_config("digits"), batch_size=128) < 500e6
        True
    """
    model = json.dumps(config.model | dict(classes), sort_keys=True)
    parameters, numbers = _count_numbers(model, config.gradient_checkpointing)
    bytes_per_number = 4 if config.precision == "fp32" else 2
    copies = STATE_COPIES + len(config.ema.sigma_rels)
    return copies * 4 * parameters + batch_size * bytes_per_number * numbers


@functools.cache
def _count_numbers(model: str, gradient_checkpointing: bool) -> tuple[int, int]:
    """Count the parameters of a network, and the numbers of the feature maps of one image.

    Args:
        model: arguments of the network, as JSON.
        gradient_checkpointing: whether residual blocks keep their outputs alone.
    """
    network, numbers = _meta_network(json.loads(model)), 0

    def add(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal numbers
        numbers += output.numel() if isinstance(output, Tensor) else 0

    recomputed: set[nn.Module] = set()
    for module in network.modules():
        is_block = gradient_checkpointing and isinstance(module, ResnetBlock2D)
        if is_block:
            recomputed.update(child for child in module.modules() if child is not module)
        if module not in recomputed and (is_block or not any(module.children())):
            module.register_forward_hook(add)
    height, width = height_and_width(network.config.sample_size)
    with torch.device("meta"), torch.no_grad():
        zero = torch.zeros((), dtype=torch.int64)
        label = None if network.class_embedding is None else zero[None]
        network(torch.empty(1, network.config.in_channels, height, width), zero, label)
    return network.num_parameters(), numbers


def count_hours(config: TrainConfig, seconds_per_step: float, seconds_per_sample: float) -> float:
    """Compute the time of all steps and of all grids of samples, the last one included.

    Args:
        config: lengths and intervals.
        seconds_per_step: measured.
        seconds_per_sample: of a function evaluation on one image, measured.

    Returns:
        Hours.
    """
    samples = config.samples
    grids = 1 + (config.max_steps // samples.every if samples.every else 0)
    grid_seconds = samples.count * samples.num_inference_steps * seconds_per_sample
    return (config.max_steps * seconds_per_step + grids * grid_seconds) / 3600


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


def _time_steps(trainer: Trainer) -> tuple[float, float, float]:
    """Return seconds of the update, of the gradients, and of an evaluation without them, of a trainer's batch."""
    images, labels = (t if t is None else t.to(trainer.device) for t in trainer.batches.read_labeled(0))
    assert images is not None
    trainer.model.train()
    updates: list[float] = []
    gradients: list[float] = []
    start = time.perf_counter()
    # The first step compiles kernels and allocates memory.
    while len(updates) < 1 + TIMED_STEPS and (len(updates) < 2 or time.perf_counter() - start < TIMED_SECONDS):
        first = _clock(trainer.device)
        trainer.compute_gradients(images, labels)
        second = _clock(trainer.device)
        trainer.apply_gradients()
        updates.append(_clock(trainer.device) - second)
        gradients.append(second - first)
        if len(updates) == 1:
            start = time.perf_counter()
    x0, _, timesteps = trainer.draw(images, 0)
    with torch.no_grad():
        first = _clock(trainer.device)
        trainer.ema(x0, timesteps, labels)
        sampling = _clock(trainer.device) - first
    return statistics.median(updates[1:]), statistics.median(gradients[1:]), sampling


def _clock(device: torch.device) -> float:
    """Return the time in seconds at which the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _meta_network(model: Mapping[str, Any]) -> UNet2DModel:
    """Build a network without weights, to count with."""
    with torch.device("meta"):
        return UNet2DModel.from_config({}, **model)


def _cache(config: DataConfig, num_bytes: int, shared: bool) -> str:
    return choose_cache(num_bytes, shared) if config.cache == "auto" else config.cache


@contextmanager
def left_to_the_run() -> Iterator[None]:
    """Leave out warnings about the images and the weights, which the run itself reports.

    Example:
        >>> with left_to_the_run():
        ...     logging.getLogger("ddim.data").warning("an image is black")
    """
    loggers = [logging.getLogger(name) for name in ("ddim.data", "ddim.io", "ddim.training.trainer")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
