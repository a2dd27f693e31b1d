"""Facts about a model that require no sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ddim.discrete.pipeline import open_pipeline
from ddim.io import hub
from ddim.io.config import public_entries
from ddim.io.images import height_and_width
from ddim.io.runs import split_variant
from ddim.io.weights import choose_weights
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
    # On the meta device only shapes are computed.
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = UNet2DModel.from_config(unet.config).eval()
        sample, timestep = torch.empty(1, network.config.in_channels, height, width), torch.zeros((), dtype=torch.int64)
        network(sample, timestep, None if network.class_embedding is None else _class_labels(network))
    return counter.get_total_flops()


def _class_labels(network: UNet2DModel) -> torch.Tensor:
    """Return labels of a batch of one, in the form that a class-conditional network takes."""
    if isinstance(network.class_embedding, torch.nn.Embedding):
        return torch.zeros(1, dtype=torch.int64)
    if isinstance(network.class_embedding, torch.nn.Identity):
        return torch.zeros(1, network.time_embedding.linear_2.out_features)
    return torch.zeros(1)
