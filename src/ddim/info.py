"""What can be said of a model without sampling from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ddim.io import hub
from ddim.io.weights import choose_weights
from ddim.pipeline import DDIMPipeline, component_folder
from ddim.unet import UNet2DModel


def describe(model: str | Path) -> dict[str, Any]:
    """Facts about a model.

    Args:
        model: as for `DDIMPipeline.from_pretrained`.

    Returns:
        `model`, `found` (the folder), `layout` (`diffusers` or `flat`), `weights` (the file), `parameters`,
        `gflop_per_image_and_step` (multiply and add count as two; one network evaluation on one image), `unet` and
        `scheduler` (their configurations).

    Raises:
        FileNotFoundError: as `DDIMPipeline.from_pretrained`.
        ValueError: as there.
    """
    folder = hub.find_model(model)
    pipe = DDIMPipeline.from_pretrained(folder)
    weights_folder = component_folder(folder, "unet", pipe.unet.config_name)
    return {
        "model": str(model),
        "found": str(folder),
        "layout": "diffusers" if weights_folder != folder else "flat",
        "weights": choose_weights(path.name for path in weights_folder.iterdir()),
        "parameters": pipe.unet.num_parameters(),
        "gflop_per_image_and_step": round(count_flop(pipe.unet) / 1e9, 3),
        "unet": dict(pipe.unet.config),
        "scheduler": dict(pipe.scheduler.config),
    }


def count_flop(unet: UNet2DModel) -> int:
    """Floating-point operations of one network evaluation on one image: convolutions, matrix products and attention."""
    size = unet.config.sample_size or 32
    height, width = (size, size) if isinstance(size, int) else size
    # On the meta device shapes are computed and nothing else.
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = UNet2DModel.from_config(unet.config).eval()
        network(torch.empty(1, network.config.in_channels, height, width), torch.zeros((), dtype=torch.int64))
    return counter.get_total_flops()
