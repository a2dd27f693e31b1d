"""The layout of `ermongroup/ddim` (models/diffusion.py) and `pesser/pytorch_diffusion`: DDPM's own network in PyTorch.

    temb.dense.{0,1}   conv_in   norm_out   conv_out
    down.{level}.block.{i}.{norm1,conv1,temb_proj,norm2,conv2,nin_shortcut}   down.{level}.downsample.conv
    down.{level}.attn.{i}.{norm,q,k,v,proj_out}
    mid.{block_1,attn_1,block_2}
    up.{level}...      as down, with upsample.conv; up.0 is the last to run

Group norms have 32 groups and epsilon 1e-6; attention has one head.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ddim.convert.placement import Plan, count, renamed, shape

GROUPS, EPSILON = 32, 1e-6

RESNET = {"norm1": "norm1", "conv1": "conv1", "time_emb_proj": "temb_proj", "norm2": "norm2", "conv2": "conv2"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def read(tensors: Mapping[str, Tensor]) -> Plan:
    """Configuration and places, from names and shapes; the values of the tensors do not matter.

    Raises:
        ValueError: if a tensor is missing that the configuration is read from, or the U-Net has no such configuration.
    """
    levels = count(tensors, r"down\.(\d+)\.block\.0\.conv1\.weight")
    layers = count(tensors, r"down\.0\.block\.(\d+)\.conv1\.weight")
    channels = [shape(tensors, f"down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    if not levels:
        raise ValueError("down.0.block.0.conv1.weight is missing")
    width, in_channels = shape(tensors, "conv_in.weight")[:2]
    out_channels = shape(tensors, "conv_out.weight")[0]
    if width != channels[0]:
        raise ValueError(
            f"conv_in makes {width} channels and the first level has {channels[0]}; the U-Net has one number for both"
        )
    if in_channels != out_channels:
        raise ValueError(f"it makes {out_channels} channels of {in_channels}; a prediction has as many as the pictures")

    def block_type(way: str, level: int) -> str:
        attention = "Attn" if f"{way}.{level}.attn.0.norm.weight" in tensors else ""
        return f"{attention}{way.capitalize()}Block2D"

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
    # The code can also name its shortcuts so; those of 3x3 pixels, which it never builds, the shapes give away.
    shortcut = "conv_shortcut" if any(".conv_shortcut." in name for name in tensors) else "nin_shortcut"
    return Plan(config, modules(levels, layers, shortcut))


def modules(levels: int, layers: int, shortcut: str) -> dict[str, str]:
    """The U-Net's modules -> the checkpoint's.

    Args:
        levels: of the network.
        layers: residual blocks of each level on the way down.
        shortcut: what a residual block's 1x1 convolution is called.
    """
    resnet = RESNET | {"conv_shortcut": shortcut}
    table = {
        "time_embedding.linear_1": "temb.dense.0",
        "time_embedding.linear_2": "temb.dense.1",
        "conv_in": "conv_in",
        "conv_norm_out": "norm_out",
        "conv_out": "conv_out",
        **renamed("mid_block.resnets.0", "mid.block_1", resnet),
        **renamed("mid_block.attentions.0", "mid.attn_1", ATTENTION),
        **renamed("mid_block.resnets.1", "mid.block_2", resnet),
    }
    for level in range(levels):
        down, up = f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}"
        table[f"{down}.downsamplers.0.conv"] = f"down.{level}.downsample.conv"
        table[f"{up}.upsamplers.0.conv"] = f"up.{level}.upsample.conv"
        for new, old, blocks in ((down, f"down.{level}", layers), (up, f"up.{level}", layers + 1)):
            for i in range(blocks):
                table |= renamed(f"{new}.resnets.{i}", f"{old}.block.{i}", resnet)
                table |= renamed(f"{new}.attentions.{i}", f"{old}.attn.{i}", ATTENTION)
    return table
