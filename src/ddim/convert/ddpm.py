"""The layout of `ermongroup/ddim` (models/diffusion.py) and `pesser/pytorch_diffusion`: DDPM's network in PyTorch.

    temb.dense.{0,1}   conv_in   norm_out   conv_out
    down.{level}.block.{i}.{norm1,conv1,temb_proj,norm2,conv2,nin_shortcut}   down.{level}.downsample.conv
    down.{level}.attn.{i}.{norm,q,k,v,proj_out}
    mid.{block_1,attn_1,block_2}
    up.{level}...      as down, with upsample.conv; up.0 runs last

Group norms have 32 groups and epsilon 1e-6; attention has one head.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ddim.convert.placement import ConversionPlan, count_numbered, matrix_shape, rename_parts

GROUPS, EPSILON = 32, 1e-6

RESNET = {"norm1": "norm1", "conv1": "conv1", "time_emb_proj": "temb_proj", "norm2": "norm2", "conv2": "conv2"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def plan_conversion(tensors: Mapping[str, Tensor]) -> ConversionPlan:
    """Read the configuration and the module table from names and shapes of a checkpoint's tensors.

    Args:
        tensors: tensors by their original names; their values do not matter.

    Returns:
        The plan.

    Raises:
        ValueError: if a tensor is missing that the configuration is read from, or the U-Net has no such configuration.
    """
    levels = count_numbered(tensors, r"down\.(\d+)\.block\.0\.conv1\.weight")
    layers = count_numbered(tensors, r"down\.0\.block\.(\d+)\.conv1\.weight")
    channels = [matrix_shape(tensors, f"down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    if not levels:
        raise ValueError("down.0.block.0.conv1.weight is missing")
    width, in_channels = matrix_shape(tensors, "conv_in.weight")[:2]
    out_channels = matrix_shape(tensors, "conv_out.weight")[0]
    if width != channels[0]:
        raise ValueError(
            f"conv_in makes {width} channels and the first level has {channels[0]}; the U-Net has one number for both"
        )
    if in_channels != out_channels:
        raise ValueError(f"it makes {out_channels} channels of {in_channels}; a prediction has as many as the images")

    def block_type(direction: str, level: int) -> str:
        attention = "Attn" if f"{direction}.{level}.attn.0.norm.weight" in tensors else ""
        return f"{attention}{direction.capitalize()}Block2D"

    config = {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "down_block_types": tuple(block_type("down", level) for level in range(levels)),
        "up_block_types": tuple(block_type("up", level) for level in reversed(range(levels))),
        "attention_head_dim": None,
        "norm_num_groups": GROUPS,
        "norm_eps": EPSILON,
        "downsample_padding": 0,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
    }
    # The code has a second name for shortcuts. In configurations that it never builds they are of 3x3 pixels, which the
    # check of shapes refuses.
    shortcut = "conv_shortcut" if any(".conv_shortcut." in name for name in tensors) else "nin_shortcut"
    return ConversionPlan(config, modules(levels, layers, shortcut))


def modules(levels: int, layers: int, shortcut: str) -> dict[str, str]:
    """Return the checkpoint's module for each of the U-Net's.

    Args:
        levels: number of levels.
        layers: residual blocks per level on the downward path.
        shortcut: the name of a residual block's 1x1 convolution.

    Returns:
        Names of the U-Net's modules -> names of the checkpoint's.

    Example:
        >>> modules(1, 1, "nin_shortcut")["mid_block.attentions.0.to_q"]
        'mid.attn_1.q'
    """
    resnet = RESNET | {"conv_shortcut": shortcut}
    table = {
        "time_embedding.linear_1": "temb.dense.0",
        "time_embedding.linear_2": "temb.dense.1",
        "conv_in": "conv_in",
        "conv_norm_out": "norm_out",
        "conv_out": "conv_out",
        **rename_parts("mid_block.resnets.0", "mid.block_1", resnet),
        **rename_parts("mid_block.attentions.0", "mid.attn_1", ATTENTION),
        **rename_parts("mid_block.resnets.1", "mid.block_2", resnet),
    }
    for level in range(levels):
        down, up = f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}"
        table[f"{down}.downsamplers.0.conv"] = f"down.{level}.downsample.conv"
        table[f"{up}.upsamplers.0.conv"] = f"up.{level}.upsample.conv"
        for new, old, blocks in ((down, f"down.{level}", layers), (up, f"up.{level}", layers + 1)):
            for i in range(blocks):
                table |= rename_parts(f"{new}.resnets.{i}", f"{old}.block.{i}", resnet)
                table |= rename_parts(f"{new}.attentions.{i}", f"{old}.attn.{i}", ATTENTION)
    return table
