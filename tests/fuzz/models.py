"""Tiny models that the targets damage: a network of 4,000 parameters, a pipeline, and original checkpoints."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel

TINY: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [4, 8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 4,
    "norm_num_groups": 2,
}


@cache
def tiny_unet() -> UNet2DModel:
    """Return the network, always with the same weights."""
    torch.manual_seed(0)
    return UNet2DModel(**TINY).eval()


def save_pipeline(folder: Path, **scheduler: Any) -> Path:
    """Write the pipeline and return its folder."""
    DDIMPipeline(tiny_unet(), DDIMScheduler(**scheduler)).save_pretrained(folder)
    return folder


def original(layout: str) -> dict[str, Tensor]:
    """Return the tensors of a network of one level as `ddpm` or `openai` name them."""
    torch.manual_seed(1)
    c, t = 32, 128

    def layer(*shape: int) -> dict[str, Tensor]:
        return {"weight": torch.randn(shape) / 8, "bias": torch.randn(shape[0]) / 8}

    def norm(channels: int) -> dict[str, Tensor]:
        return {"weight": 1 + torch.randn(channels) / 8, "bias": torch.randn(channels) / 8}

    def block(inputs: int, names: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
        parts = norm(inputs), layer(c, inputs, 3, 3), layer(c, t), norm(c), layer(c, c, 3, 3), layer(c, inputs, 1, 1)
        return dict(zip(names, parts if inputs != c else parts[:-1], strict=False))

    modules: dict[str, dict[str, Tensor]]
    if layout == "ddpm":
        names = ("norm1", "conv1", "temb_proj", "norm2", "conv2", "nin_shortcut")
        blocks = {"down.0.block.0": c, "mid.block_1": c, "mid.block_2": c, "up.0.block.0": 2 * c, "up.0.block.1": 2 * c}
        modules = {"temb.dense.0": layer(t, c), "temb.dense.1": layer(t, t), "conv_in": layer(c, 1, 3, 3)}
        modules |= {"norm_out": norm(c), "conv_out": layer(1, c, 3, 3), "mid.attn_1.norm": norm(c)}
        modules |= {f"mid.attn_1.{part}": layer(c, c, 1, 1) for part in ("q", "k", "v", "proj_out")}
    else:
        names = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
        blocks = {"input_blocks.1.0": c, "middle_block.0": c, "middle_block.2": c}
        blocks |= {"output_blocks.0.0": 2 * c, "output_blocks.1.0": 2 * c}
        modules = {"time_embed.0": layer(t, c), "time_embed.2": layer(t, t), "input_blocks.0.0": layer(c, 1, 3, 3)}
        modules |= {"out.0": norm(c), "out.2": layer(1, c, 3, 3), "middle_block.1.norm": norm(c)}
        modules |= {"middle_block.1.qkv": layer(3 * c, c, 1), "middle_block.1.proj_out": layer(c, c, 1)}
    for name, inputs in blocks.items():
        modules |= {f"{name}.{part}": tensors for part, tensors in block(inputs, names).items()}
    return {f"{name}.{kind}": tensor for name, tensors in modules.items() for kind, tensor in tensors.items()}
