"""Networks to measure, and folders with their pipelines, which `ddim` and `diffusers` both load.

Speed does not depend on what a network has learned: the larger two have the architectures of published models and
random weights, the same in every run.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ddim import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim.io.hub import builtin_models
from ddim.training.config import read_preset

PRESETS = {"cifar10": "cifar10", "lsun": "lsun-bedroom"}
"""Training presets with the architectures of google/ddpm-cifar10-32 and google/ddpm-bedroom-256."""

NETWORKS = ("cifar10", "mnist", "lsun")


def make_unet(name: str) -> UNet2DModel:
    """Create one of `NETWORKS`, float32 and in evaluation mode; `mnist` is the built-in model."""
    if name not in PRESETS:
        return UNet2DModel.from_pretrained(builtin_models()[name] / "unet")
    torch.manual_seed(0)
    return UNet2DModel(**read_preset(PRESETS[name])["model"]).eval()


def save_pipeline(name: str, folder: Path) -> Path:
    """Return a folder with a pipeline of one of `NETWORKS`: the built-in model's, or one written into `folder`."""
    if name not in PRESETS:
        return builtin_models()[name]
    DDIMPipeline(make_unet(name), DDIMScheduler()).save_pretrained(folder / name)
    return folder / name
