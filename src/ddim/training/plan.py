"""The plan of a run: what a configuration leaves out, chosen from the images and the machine.

Sizes and lengths are functions of what was found. For a batch of B images, a network whose first level has w channels
and a run of n steps:

    levels      until the smaller side is about 8 pixels; channels w, 2w, 3w, 4w, 4w, ...; attention up to 16 pixels
    w           grows with the number of images and, from 64 pixels, with the size, up to what the device can train
    lr          1e-3 * 32 / w, after a warm-up of n / 20 steps; over the last 0.4 n steps it falls to 0
    average     over the last n / 10 steps: decay 1 - 10 / n
    n B         400,000 images for a collection of 2,000, growing with the root of their number; on GPUs 8 times as
                many; no longer than a night, or than the time limit

What was measured to be best stands in `RECIPE`. Every entry that the configuration has is kept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils import broadcast_object_list

from ddim.data.labels import describe_classes, read_labels
from ddim.data.sources import open_source
from ddim.data.survey import ImageSurvey, survey_images
from ddim.io.images import height_and_width
from ddim.pipeline import DDIMPipeline
from ddim.training.config import (
    LENGTHS,
    TrainConfig,
    as_configuration,
    check_incomplete,
    merge,
    read_yaml,
    validate,
)
from ddim.training.costs import RunCosts, count_hours, estimate_costs, left_to_the_run, memory_bytes
from ddim.training.machine import Machine, inspect_machine
from ddim.training.run import complete_config, holds_run, resolve_length, start_processes

logger = logging.getLogger(__name__)

RECIPE: Mapping[str, Any] = {
    # v is well conditioned at every timestep: its network is as good with little noise as with much, where an error of
    # epsilon is amplified (arXiv 2202.00512). Without clipping more sampling steps converge to a limit.
    "scheduler": {"prediction_type": "v_prediction", "clip_sample": False},
    # For v the plain mean squared error weighs x_0 by SNR + 1. Antithetic timesteps have less variance.
    "objective": {"weighting": "simple", "antithetic": True},
    # A decaying learning rate reaches in a fixed time what a constant one does not.
    "optim": {"decay": "linear"},
    # Letters, digits and most arrays are not what they were when mirrored.
    "data": {"horizontal_flip": False},
    # Small grids: on a CPU one of 64 images in 50 steps takes as long as tens of training steps.
    "samples": {"count": 36, "num_inference_steps": 20},
}
"""Entries that do not depend on the images or the machine."""

SIDES = (8, 16, 24, 32, 48, 64, 96, 128)
"""Heights and widths that images of several sizes are fitted to."""
CPU_SIDE, GPU_SIDE = 64, 128
"""Heights and widths that are chosen at most; larger ones have to be given."""
SIDE_QUANTILE = 0.1
"""The part of the images that may have to be enlarged."""
SMALLEST_SIDE = 8
"""Side of the smallest feature maps, about."""
ATTENTION_SIDE = 16
"""Feature maps up to this side have attention; its cost grows with the fourth power of the side."""
WIDTHS = (32, 64, 96, 128)
"""Channels of the first level. Compiled kernels require multiples of 16."""
WIDTH_IMAGES = (1_000, 5_000, 30_000)
"""Numbers of images from which a network may have the next width."""
CPU_WIDTH_CORES = (8, 32)
"""Numbers of cores from which a CPU trains the next width in reasonable time."""
MAX_FACTOR = 4
HEAD_CHANNELS, MAX_GROUPS = 64, 32
PEAK_LR, LR_WIDTH = 1e-3, 32
CPU_BATCH_PIXELS, GPU_BATCH_PIXELS = 32 * 32 * 32, 128 * 64 * 64
"""Pixels of a batch; on a CPU larger ones make a step longer and no image cheaper."""
MIN_BATCH_SIZE, CPU_BATCH_SIZE, GPU_BATCH_SIZE = 16, 64, 128
MEMORY_SHARE = 0.6
"""The part of the free memory that a run may take."""
VISITS, VISITS_COUNT = 400_000, 2_000
MIN_VISITS, MAX_VISITS, GPU_FACTOR = 200_000, 2_000_000, 8
MAX_EPOCHS = 1_000
"""A collection of few images is learned by heart long before."""
NIGHT_HOURS = 8.0
TIME_SHARE = 0.85
"""The part of a time limit that is planned; the rest is for checkpoints, the start and other programs."""
CHECKPOINT_SECONDS = 300
GRIDS, GRID_SHARE = 8, 0.1
"""Grids of samples during a run, at most, and the part of its time that they may take."""
FINE_TUNING_FACTOR = 0.25
"""Learning rate and length of fine-tuning, relative to those of a new network."""

Limit = Literal["given", "images", "night", "time"]


class Plan(NamedTuple):
    """What was found, what was chosen, and what it will cost.

    Attributes:
        survey: what the images are like.
        machine: what the machine offers.
        config: the whole configuration.
        costs: of the run, measured.
        limit: what decides its length: the configuration, the number of images, a night, or the time limit.
        classes: the classes that it trains with, in words; `None` without labels.
    """

    survey: ImageSurvey
    machine: Machine
    config: TrainConfig
    costs: RunCosts
    limit: Limit
    classes: str | None = None


NETWORK = {"sample_size", "block_out_channels", "down_block_types", "up_block_types"}
"""The arguments without which a network is not decided: its levels and their blocks."""


def leaves_network_out(tree: Mapping[str, Any]) -> bool:
    """Return whether a configuration leaves the network to a plan, or that of a model to start from.

    Args:
        tree: nested mappings, as `merge_config` returns them.

    Example:
        >>> leaves_network_out({"data": {"source": "pics"}})
        True
        >>> leaves_network_out({"model": {"sample_size": 32, "block_out_channels": [32, 64]}})
        True
    """
    model = tree.get("model") or {}
    return not isinstance(model, Mapping) or not model.keys() >= NETWORK


def plan_run(tree: Mapping[str, Any], device: str | torch.device = "auto", max_minutes: float | None = None) -> Plan:
    """Choose what a configuration leaves out. Each of several processes calls this, and all get the same.

    Args:
        tree: nested mappings; `data.source` is required.
        device: device to train on: `auto`, or a device's name.
        max_minutes: time limit of the run, which then is as long as fits into it; `None` for none.

    Returns:
        The plan.

    Raises:
        FileNotFoundError: if the data or the model to start from does not exist.
        ValueError: naming a wrong entry, before any image is read; if no image can be read.
    """
    # What is given is checked first.
    given = check_incomplete(tree)
    given_model = dict(tree.get("model") or {})
    accelerator, local_device = start_processes(device)
    machine = inspect_machine(local_device)
    source = open_source(given.data.source, given.data.split, given.data.column)
    labels = read_labels(source, given.data.labels, class_names=given.data.class_names)
    with left_to_the_run():
        survey = survey_images(source)

    # The network.
    if given.init is None:
        recipe = {name: entry for name, entry in RECIPE.items() if name != "scheduler" or given.process == "gaussian"}
        chosen = merge(recipe, {"model": choose_model(survey, machine, given_model)})
    else:
        # The model to start from keeps its network and its scheduler.
        recipe = {name: RECIPE[name] for name in ("optim", "samples")}
        chosen = merge(recipe, {"model": adapt_model(given.init, survey, machine)})
    shortest = {} if any(name in tree for name in LENGTHS) else {"max_steps": 1}
    multiple = accelerator.num_processes * given.optim.accumulate
    config = complete_config(validate(merge(chosen, {"batch_size": multiple}, shortest, tree)))

    # The batch, the precision that is fastest, and what a step costs.
    if "batch_size" not in tree:
        count = survey.count - config.data.holdout
        batch_size = choose_batch_size(height_and_width(config.model["sample_size"]), count, machine.is_cpu)
        batch_size = fit_memory(config, max(1, batch_size // multiple) * multiple, multiple, machine.free_bytes)
        config = config.model_copy(update={"batch_size": batch_size})
    precisions = [config.precision] if "precision" in tree else choose_precisions(machine)
    candidates = [config.model_copy(update={"precision": precision}) for precision in precisions]
    estimates = [(candidate, estimate_costs(candidate, device)) for candidate in candidates]
    config, costs = min(estimates, key=lambda estimate: estimate[1].seconds_per_step)

    # The length, and what is relative to it.
    limit: Limit = "given"
    max_steps = resolve_length(config, survey.count).max_steps
    if shortest:
        max_steps, limit = choose_steps(config, costs, survey.count, machine.is_cpu, max_minutes)
    rates = choose_rates(max_steps, costs, config)
    settings = config.model_dump(exclude={"epochs"}) | {"max_steps": max_steps}
    config = validate(merge(settings, rates, {name: value for name, value in tree.items() if name not in LENGTHS}))
    config = complete_config(config)
    costs = costs._replace(hours=count_hours(config, costs.seconds_per_step, costs.seconds_per_sample))
    # Times differ between processes.
    classes = None if labels is None else describe_classes(labels)
    (plan,) = broadcast_object_list([Plan(survey, machine, config, costs, limit, classes)])
    return plan


def configure(
    tree: Mapping[str, Any],
    out: Path | None,
    device: str | torch.device = "auto",
    resume: Literal["auto", "never"] | Path = "auto",
    max_minutes: float | None = None,
) -> tuple[TrainConfig, Plan | None]:
    """Complete a configuration that leaves the network out: by the run in a folder that it resumes, else by a plan.

    Args:
        tree: nested mappings, as `merge_config` returns them.
        out: folder of the run; `None` for none.
        device: device to train on: `auto`, or a device's name.
        resume: as for `ddim.training.run.train`.
        max_minutes: time limit of the run.

    Returns:
        The checked configuration, and the plan, `None` where there was nothing to choose.

    Raises:
        FileNotFoundError: if the data or the model to start from does not exist.
        FileExistsError: if `out` holds something else than a run, or one that must not be resumed.
        ValueError: naming a wrong entry; if there are neither images nor a run.
    """
    if not leaves_network_out(tree):
        return validate(tree), None
    accelerator, _ = start_processes(device)
    recorded: list[dict[str, Any] | None] = [None]
    # Other machines need not have the folder.
    if out is not None and accelerator.is_main_process and holds_run(out, resume):
        recorded = [as_configuration(read_yaml(out / "config.yaml"))]
    (record,) = broadcast_object_list(recorded)
    if record is not None:
        return validate(merge(record, tree)), None
    data = tree.get("data", {})
    if isinstance(data, Mapping) and "source" not in data:
        raise ValueError(
            "source must name the images to train on, such as a folder"
            + ("" if out is None else f": {out} holds no run to resume")
        )
    if accelerator.is_main_process:
        logger.info("looking at the images")
    plan = plan_run(tree, device, max_minutes)
    return plan.config, plan


def choose_size(sizes: Sequence[tuple[int, int]], limit: int) -> tuple[int, int]:
    """Choose the height and width of a model from those of the images.

    Images of one size keep it, up to the area of the limit's square; others are fitted to a square of one of `SIDES`,
    which few of them fall short of.

    Args:
        sizes: (H, W) of a sample of the images.
        limit: side of the largest square.

    Returns:
        Height and width, multiples of what the levels of `count_levels` require.

    Example:
        >>> choose_size([(28, 28)] * 3, limit=64), choose_size([(80, 128)] * 3, limit=64)
        ((28, 28), (48, 80))
        >>> choose_size([(480, 640), (100, 70), (300, 300)], limit=128)
        (64, 64)
    """
    height, width = sizes[0]
    scale = min(1.0, limit / math.sqrt(height * width))
    if len(set(sizes)) > 1:
        sides = sorted(min(size) for size in sizes)
        side = sides[int(SIDE_QUANTILE * len(sides))]
        height = width = max((standard for standard in SIDES if standard <= min(side, limit)), default=side)
        scale = 1.0
    multiple = 2 ** (count_levels(round(min(height, width) * scale)) - 1)
    height, width = (max(multiple, round(side * scale) // multiple * multiple) for side in (height, width))
    return height, width


def as_sample_size(size: tuple[int, int]) -> int | list[int]:
    """Return a height and a width as a `sample_size`: one number for squares.

    Example:
        >>> as_sample_size((8, 8)), as_sample_size((8, 12))
        (8, [8, 12])
    """
    return size[0] if size[0] == size[1] else list(size)


def count_levels(side: int) -> int:
    """Return the number of levels of a network, such that its smallest feature maps have a side of about 8 pixels.

    Args:
        side: the smaller of height and width, in pixels.

    Example:
        >>> [count_levels(side) for side in (8, 28, 32, 64, 256)]
        [2, 3, 3, 4, 6]
    """
    return max(2, round(math.log2(max(1, side) / SMALLEST_SIDE)) + 1)


def choose_model(survey: ImageSurvey, machine: Machine, given: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the arguments of a network.

    Args:
        survey: what the images are like.
        machine: what the machine offers.
        given: arguments of `UNet2DModel` that are decided; the others are made to fit them.

    Returns:
        Arguments of `UNet2DModel`.

    Raises:
        ValueError: if the given size cannot be halved.

    Example:
        >>> survey = ImageSurvey("pics", 500, [(32, 32)], [("RGB", 500)], 3, None)
        >>> model = choose_model(survey, Machine("cpu", "", 2, 2**33, ()), {})
        >>> model["block_out_channels"], model["down_block_types"]
        ([32, 64, 96], ['DownBlock2D', 'AttnDownBlock2D', 'AttnDownBlock2D'])
    """
    size = given.get("sample_size")
    height, width = (
        choose_size(survey.sizes, CPU_SIDE if machine.is_cpu else GPU_SIDE) if size is None else height_and_width(size)
    )
    channels = given.get("in_channels", given.get("out_channels", survey.channels))
    block_out_channels = given.get("block_out_channels")
    if block_out_channels is None:
        levels = count_levels(min(height, width))
        while height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
            levels -= 1
        if levels < 2:
            raise ValueError(f"training configuration, model.sample_size: must be even, got {size}")
        first = choose_width(survey.count, min(height, width), machine)
        block_out_channels = [first * min(level + 1, MAX_FACTOR) for level in range(levels)]
    attends = [
        level > 0 and min(height, width) // 2**level <= ATTENTION_SIDE for level in range(len(block_out_channels))
    ]
    divisor = math.gcd(*block_out_channels)
    return {
        "sample_size": as_sample_size((height, width)),
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": list(block_out_channels),
        "layers_per_block": 1 if machine.is_cpu else 2,
        "down_block_types": ["AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
        "up_block_types": ["AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)],
        "attention_head_dim": largest_divisor(divisor, HEAD_CHANNELS),
        # Four channels per group at the first level, as in DDPM's network.
        "norm_num_groups": largest_divisor(divisor, min(MAX_GROUPS, max(1, divisor // 4))),
    }


def choose_width(count: int, side: int, machine: Machine) -> int:
    """Choose the channels of a network's first level.

    Args:
        count: number of images.
        side: the smaller of height and width, in pixels.
        machine: what the machine offers.

    Returns:
        One of `WIDTHS`.

    Example:
        >>> gpu, cpu = Machine("cuda", "", 16, 2**36, ("bf16",)), Machine("cpu", "", 2, 2**33, ())
        >>> [choose_width(count, 32, gpu) for count in (500, 2000, 50_000)], choose_width(50_000, 32, cpu)
        ([32, 64, 128], 32)
    """
    supported = sum(count >= minimum for minimum in WIDTH_IMAGES) + (side >= 64)
    affordable = sum(machine.cores >= minimum for minimum in CPU_WIDTH_CORES) if machine.is_cpu else len(WIDTHS)
    return WIDTHS[min(supported, affordable, len(WIDTHS) - 1)]


def adapt_model(init: str, survey: ImageSurvey, machine: Machine) -> dict[str, Any]:
    """Choose the arguments of a network that starts from a trained one and differs from it.

    Args:
        init: the model to start from.
        survey: what the images are like.
        machine: what the machine offers.

    Returns:
        The channels of the images; the size of the model, or, where it has none, one for the images.
    """
    network = DDIMPipeline.from_pretrained(init).unet.config
    size = network.sample_size or choose_size(survey.sizes, CPU_SIDE if machine.is_cpu else GPU_SIDE)
    size = as_sample_size(height_and_width(size))
    return {"sample_size": size, "in_channels": survey.channels, "out_channels": survey.channels}


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of a number up to a limit.

    Example:
        >>> largest_divisor(96, 64)
        48
    """
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


def choose_batch_size(size: tuple[int, int], count: int, is_cpu: bool) -> int:
    """Choose the images per step.

    Args:
        size: their height and width.
        count: number of images that are trained on.
        is_cpu: whether the network runs on a CPU.

    Returns:
        A power of two, at most `count`.

    Example:
        >>> choose_batch_size((32, 32), 500, is_cpu=True), choose_batch_size((64, 64), 500, is_cpu=True)
        (32, 16)
        >>> choose_batch_size((32, 32), 20, is_cpu=True)
        16
    """
    pixels, largest = (CPU_BATCH_PIXELS, CPU_BATCH_SIZE) if is_cpu else (GPU_BATCH_PIXELS, GPU_BATCH_SIZE)
    wanted = min(largest, max(MIN_BATCH_SIZE, pixels // math.prod(size)))
    return 2 ** int(math.log2(max(1, min(wanted, count))))


def fit_memory(config: TrainConfig, batch_size: int, multiple: int, free_bytes: int) -> int:
    """Halve a batch until a step takes no more than `MEMORY_SHARE` of the free memory.

    Args:
        config: the completed configuration.
        batch_size: images per step, a multiple of `multiple`.
        multiple: of which it must stay a multiple: processes times passes.
        free_bytes: free memory of each process.

    Returns:
        The batch, at least `multiple`.
    """
    fixed, with_one = (memory_bytes(config, count) for count in (0, 1))
    images = max(1, (MEMORY_SHARE * free_bytes - fixed) / (with_one - fixed))
    while batch_size // multiple > images and batch_size // 2 % multiple == 0:
        batch_size //= 2
    return batch_size


def choose_precisions(machine: Machine) -> list[str]:
    """Choose the precisions of which the fastest is taken.

    On a GPU with matrix units for 16 bits these are always faster. On a CPU with instructions for bfloat16 it depends
    on the network: compiled kernels, which need fewer operations, compute in float32.

    Args:
        machine: what the machine offers.

    Example:
        >>> choose_precisions(Machine("cuda", "", 16, 2**36, ("bf16", "fp16")))
        ['bf16']
        >>> choose_precisions(Machine("cpu", "", 2, 2**33, ()))
        ['fp32']
    """
    if machine.is_cpu or not machine.fast_precisions:
        return ["fp32", *machine.fast_precisions]
    return [machine.fast_precisions[0]]


def choose_steps(
    config: TrainConfig, costs: RunCosts, count: int, is_cpu: bool, max_minutes: float | None
) -> tuple[int, Limit]:
    """Choose the length of a run.

    Args:
        config: the configuration so far.
        costs: of a step.
        count: number of images.
        is_cpu: whether the network runs on a CPU.
        max_minutes: time limit; `None` for none.

    Returns:
        Number of steps, and what limits it.
    """
    visits = VISITS * math.sqrt(count / VISITS_COUNT)
    visits = min(MAX_VISITS, max(MIN_VISITS, visits)) * (1 if is_cpu else GPU_FACTOR)
    factor = 1 if config.init is None else FINE_TUNING_FACTOR
    lengths: dict[Limit, float] = {
        "images": factor * min(visits, MAX_EPOCHS * max(count, config.batch_size)) / config.batch_size,
        "night": _steps_in(3600 * NIGHT_HOURS, costs),
    }
    if max_minutes is not None:
        lengths["time"] = _steps_in(60 * max_minutes, costs)
    limit = min(lengths, key=lambda name: lengths[name])
    return max(1, math.ceil(lengths[limit])), limit


def _steps_in(seconds: float, costs: RunCosts) -> float:
    """Return the number of steps that fit into a time, beside reading the images and the grids of samples."""
    return max(0.0, (TIME_SHARE - GRID_SHARE) * seconds - costs.reading_seconds) / costs.seconds_per_step


def choose_rates(max_steps: int, costs: RunCosts, config: TrainConfig) -> dict[str, Any]:
    """Choose the entries that are relative to the length of a run or to the width of its network.

    Args:
        max_steps: the length.
        costs: of a step and of a sample.
        config: has the network.

    Returns:
        Nested dictionaries.
    """
    lr = PEAK_LR * min(1.0, LR_WIDTH / config.model["block_out_channels"][0])
    grid_seconds = config.samples.count * config.samples.num_inference_steps * costs.seconds_per_sample
    grids = min(GRIDS, max_steps, int(GRID_SHARE * max_steps * costs.seconds_per_step / grid_seconds))
    decays = {"decay_steps": max(1, round(0.4 * max_steps))} if config.optim.decay != "constant" else {}
    return {
        "optim": {
            "lr": lr if config.init is None else lr * FINE_TUNING_FACTOR,
            "warmup_steps": min(500, max_steps // 20),
            **decays,
        },
        "ema": {"decay": round(min(0.9999, max(0.9, 1 - 10 / max_steps)), 5)},
        "samples": {"every": max_steps // grids if grids else 0},
        "checkpoints": {"every": max(1, min(max_steps, round(CHECKPOINT_SECONDS / costs.seconds_per_step)))},
        "log_every": min(50, max(1, max_steps // 100)),
    }
