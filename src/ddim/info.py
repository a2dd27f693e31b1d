"""Facts about a model that require no sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddim.discrete.pipeline import open_pipeline
from ddim.io import hub
from ddim.io.config import public_entries
from ddim.io.images import height_and_width
from ddim.io.runs import split_variant
from ddim.io.weights import choose_weights
from ddim.nn.layers import Attention
from ddim.pipeline import ImagePipeline, component_folder
from ddim.unet import UNet2DModel

DEFAULT_SAMPLE_SIZE = 32
"""Height and width at which a network without a `sample_size` is counted."""


def describe(model: str | Path) -> dict[str, Any]:
    """Describe a model: its files, size, cost and configuration.

    Args:
        model: the name of a built-in model, a folder, or a hub id such as `google/ddpm-cifar10-32`.

    Returns:
        `model`, `found` (the folder), `layout` (`diffusers` or `flat`), `weights` (the file), `parameters`,
        `gflop_per_image_and_step` (one function evaluation on one image; a multiplication and an addition count as
        two), `images` (their channels, type of values, and for other than 8 bits the ranges), `distilled_steps` (the
        steps of a student, of other models left out), `unet` and `scheduler` (their configurations).

    Raises:
        FileNotFoundError: if the model does not exist, or files are missing in it.
        ValueError: if a file is damaged or does not fit the others.

    Example:
        >>> describe("mnist")["parameters"]
        1805121
    """
    name, variant = split_variant(model)
    folder = hub.find_model(name, variant=variant)
    pipe = open_pipeline(folder, variant=variant)
    weights_folder = component_folder(folder, "unet", pipe.unet.config_name)
    steps = getattr(pipe.scheduler, "distilled_steps", None)
    return {
        "model": str(model),
        "found": str(folder),
        "layout": "diffusers" if weights_folder != folder else "flat",
        "weights": choose_weights([path.name for path in weights_folder.iterdir()], variant),
        "parameters": pipe.unet.num_parameters(),
        "gflop_per_image_and_step": round(count_flop(pipe.unet) / 1e9, 3),
        "images": _describe_images(pipe),
        **({} if steps is None else {"distilled_steps": steps}),
        "unet": public_entries(pipe.unet.config),
        "scheduler": public_entries(pipe.scheduler.config),
    }


def _describe_images(pipe: ImagePipeline) -> dict[str, Any]:
    """Return what images the model has."""
    size, pixel_format = pipe.unet.config.sample_size, pipe.pixel_format
    sides = {} if size is None else dict(zip(("height", "width"), height_and_width(size), strict=True))
    num_values = pipe.scheduler.config.get("num_values")
    channels = pipe.unet.config.in_channels // (num_values or 1)
    facts = {**sides, "channels": channels, "dtype": pixel_format.dtype}
    if num_values is not None:
        return facts | {"num_values": num_values}
    if pixel_format.is_eight_bit:
        return facts
    return facts | {"low": list(pixel_format.low), "high": list(pixel_format.high)}


def count_flop(unet: UNet2DModel) -> int:
    """Count the floating-point operations of one function evaluation on one image.

    Args:
        unet: the network, on any device.

    Returns:
        Operations of convolutions, matrix products and attention; a multiplication and an addition count as two.

    Example:
        >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(32,), down_block_types=("DownBlock2D",),
        ...                    up_block_types=("UpBlock2D",))
        >>> count_flop(unet) > 0
        True
    """
    height, width = height_and_width(unet.config.sample_size or DEFAULT_SAMPLE_SIZE)
    with torch.device("meta"):
        network = UNet2DModel.from_config(unet.config)
    levels = len(network.down_blocks)
    positions = [(height >> level) * (width >> level) for level in range(levels)]
    total = _count_layers(network.conv_in, positions[0]) + _count_layers(network.conv_out, positions[0])
    total += _count_layers(network.time_embedding, 1)
    if network.class_embedding is not None:
        total += _count_layers(network.class_embedding, 1)
    if network.mid_block is not None:
        total += _count_layers(network.mid_block, positions[-1])
    # Resampling layers run at the size that they lead to.
    block: Any
    for level, block in enumerate(network.down_blocks):
        total += _count_block(block, positions[level], block.downsamplers, positions[min(level + 1, levels - 1)])
    for level, block in zip(reversed(range(levels)), network.up_blocks, strict=True):
        total += _count_block(block, positions[level], block.upsamplers, positions[max(level - 1, 0)])
    return total


def _count_block(block: Any, positions: int, resamplers: nn.Module | None, resampled_positions: int) -> int:
    """Count the operations of a down or up block, given the positions of its feature maps and of what it leads to."""
    total = _count_layers(block, positions)
    if resamplers is not None:
        total += _count_layers(resamplers, resampled_positions) - _count_layers(resamplers, positions)
    return total


def _count_layers(module: nn.Module, positions: int) -> int:
    """Count the operations of all layers of a module on feature maps of so many positions."""
    total = 0
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d):
            total += 2 * layer.weight.numel() * positions
        elif isinstance(layer, nn.Linear):
            # The time is projected once for all positions.
            total += 2 * layer.weight.numel() * (1 if name.endswith("time_emb_proj") else positions)
        elif isinstance(layer, Attention):
            # Queries with keys, and the attention with values.
            total += 2 * 2 * layer.to_q.out_features * positions**2
    return total
