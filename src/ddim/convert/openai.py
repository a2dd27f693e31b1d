"""The layout of `openai/improved-diffusion` and `openai/guided-diffusion` (unet.py in both).

    time_embed.{0,2}   label_emb   out.{0,2}
    input_blocks.0.0                                       the first convolution
    input_blocks.{n}.0.{in_layers.{0,2},emb_layers.1,out_layers.{0,3},skip_connection}   a residual block
    input_blocks.{n}.1.{norm,qkv,proj_out}                 attention after it
    input_blocks.{n}.0.op, output_blocks.{n}.{1,2}.conv    resampling, or a residual block in its place
    middle_block.{0,1,2}                                   residual block, attention, residual block

Blocks are numbered through all levels. Group norms have 32 groups and epsilon 1e-5. A network that also predicts its
variance has twice the channels at its end; epsilon is the first half.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddim.convert.placement import Plan, count, renamed, shape
from ddim.nn.layers import Timesteps
from ddim.validation import integer

logger = logging.getLogger(__name__)

GROUPS, EPSILON = 32, 1e-5
# The number of timesteps that the code's linear schedule and its rescaled timesteps refer to.
STEPS = 1000
# Channels in, of networks that are also given a small picture.
SUPER_RESOLUTION = 6

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out"}


class OpenAIFlags(NamedTuple):
    """What the shapes of a checkpoint do not tell; flags of the scripts that trained it.

    Attributes:
        heads: of each attention (`num_heads`); this or the next is needed.
        head_channels: channels a head (`num_head_channels`).
        new_attention_order: queries, keys and values were split before heads (`use_new_attention_order`).
        rescale_timesteps: the network was told t 1000 / T in place of t (`rescale_timesteps`); needed unless T is 1000.
    """

    heads: int | None = None
    head_channels: int | None = None
    new_attention_order: bool = False
    rescale_timesteps: bool | None = None


def default_betas(schedule: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a scheduler, with the linear betas of this code where none are given: those of 1000 steps, times
    1000 / T (`get_named_beta_schedule`).
    """
    T = schedule.get("num_train_timesteps")
    if T is None or T < 1 or schedule.get("beta_schedule", "linear") != "linear":
        return schedule
    return {"beta_start": 0.0001 * STEPS / T, "beta_end": 0.02 * STEPS / T} | schedule


def read(tensors: Mapping[str, Tensor], flags: OpenAIFlags, T: int) -> tuple[Plan, dict[str, Tensor]]:
    """Configuration and places, from names and shapes.

    Args:
        tensors: of a checkpoint.
        flags: what they do not tell.
        T: number of timesteps the network was trained with.

    Returns:
        The plan, and the tensors that it places: those given, with epsilon alone at the end, and with a table of
        embeddings where the network was told rescaled timesteps.

    Raises:
        ValueError: if a tensor or a flag is missing, or the U-Net cannot compute what the network did.
    """
    levels, layers = _depth(tensors)
    channels = [shape(tensors, f"{_input(level, 0, layers)}.0.in_layers.2.weight")[0] for level in range(levels)]
    width, in_channels = shape(tensors, "input_blocks.0.0.weight")[:2]
    embedded = shape(tensors, "time_embed.0.weight")[1]
    if not width == channels[0] == embedded:
        raise ValueError(
            f"the time embedding has {embedded} channels, the first convolution {width} and the first level "
            f"{channels[0]}; the U-Net has one number for all"
        )
    halved = _epsilon_only(tensors, in_channels)
    downs = [f"{_input(level, 0, layers)}.1.norm.weight" in tensors for level in range(levels)]
    ups = [f"{_output(level, 0, layers)}.1.norm.weight" in tensors for level in range(levels)]
    attended = [c for c, attention in zip(channels, downs, strict=True) if attention]
    attended += [c for c, attention in zip(reversed(channels), ups, strict=True) if attention]
    head_dim = _head_dim([*attended, channels[-1]], flags)
    resample = "resnet" if f"{_input(0, layers, layers)}.0.in_layers.2.weight" in tensors and levels > 1 else "conv"
    doubled = shape(tensors, f"{_input(0, 0, layers)}.0.emb_layers.1.weight")[0] == 2 * channels[0]

    config = {
        "in_channels": in_channels,
        "out_channels": in_channels,
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "down_block_types": tuple(_block_type("Down", attention, resample) for attention in downs),
        "up_block_types": tuple(_block_type("Up", attention, resample) for attention in ups),
        "downsample_type": resample,
        "upsample_type": resample,
        "attention_head_dim": head_dim,
        "norm_num_groups": GROUPS,
        # With scale and shift the U-Net's middle attention has no norm unless told.
        "attn_norm_num_groups": GROUPS,
        "norm_eps": EPSILON,
        "resnet_time_scale_shift": "scale_shift" if doubled else "default",
        "downsample_padding": 1,
        "freq_shift": 0,
        "flip_sin_to_cos": True,
    }
    if "label_emb.weight" in tensors:
        config["num_class_embeds"] = shape(tensors, "label_emb.weight")[0]
        logger.warning("the model is class-conditional: its unet takes class_labels, but no command gives it any")
    if _rescaled(flags, T):
        # The U-Net has no such factor, but a table of embeddings can hold the result.
        config |= {"time_embedding_type": "learned", "num_train_timesteps": T}
        halved["time_proj.weight"] = Timesteps(width, True, 0)(torch.arange(T) * (STEPS / T))
    fused = None if flags.new_attention_order else head_dim
    return Plan(config, modules(levels, layers, ups), fused), halved


def modules(levels: int, layers: int, ups: Sequence[bool]) -> dict[str, str]:
    """The U-Net's modules -> the checkpoint's.

    Args:
        levels: of the network.
        layers: residual blocks of each level on the way down.
        ups: which levels have attention on the way up, in the order they run.
    """
    table = {
        "time_proj": "time_proj",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "class_embedding": "label_emb",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        **renamed("mid_block.resnets.0", "middle_block.0", RESNET),
        **renamed("mid_block.attentions.0", "middle_block.1", ATTENTION),
        **renamed("mid_block.resnets.1", "middle_block.2", RESNET),
    }
    for level, attention in enumerate(ups):
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        for i in range(layers):
            table |= renamed(f"{down}.resnets.{i}", f"{_input(level, i, layers)}.0", RESNET)
            table |= renamed(f"{down}.attentions.{i}", f"{_input(level, i, layers)}.1", ATTENTION)
        for i in range(layers + 1):
            table |= renamed(f"{up}.resnets.{i}", f"{_output(level, i, layers)}.0", RESNET)
            table |= renamed(f"{up}.attentions.{i}", f"{_output(level, i, layers)}.1", ATTENTION)
        downsampler = f"{_input(level, layers, layers)}.0"
        upsampler = f"{_output(level, layers, layers)}.{2 if attention else 1}"
        table |= renamed(f"{down}.downsamplers.0", downsampler, RESNET | {"conv": "op"})
        table |= renamed(f"{up}.upsamplers.0", upsampler, RESNET | {"conv": "conv"})
    return table


def _input(level: int, i: int, layers: int) -> str:
    """Block i of a level on the way down; the one after the last is its downsampler."""
    return f"input_blocks.{1 + level * (layers + 1) + i}"


def _output(level: int, i: int, layers: int) -> str:
    """Block i of a level on the way up, levels counted as they run; the last also holds the upsampler."""
    return f"output_blocks.{level * (layers + 1) + i}"


def _depth(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Levels, and residual blocks of each on the way down.

    It is the upsamplers that tell where a level ends: on the way down, a residual block that shrinks looks like others.
    """
    blocks = count(tensors, r"output_blocks\.(\d+)\.0\.in_layers\.2\.weight")
    if not blocks:
        raise ValueError("output_blocks.0.0.in_layers.2.weight is missing; half a network is no denoiser")
    ends = [
        index
        for index in range(blocks)
        if any(
            f"output_blocks.{index}.{place}.{part}.weight" in tensors
            for place in (1, 2)
            for part in ("conv", "in_layers.2")
        )
    ]
    length = ends[0] + 1 if ends else blocks
    levels, rest = divmod(blocks, length)
    if rest or length < 2 or ends != [(level + 1) * length - 1 for level in range(levels - 1)]:
        raise ValueError(
            f"its {blocks} output blocks, of which {len(ends)} double the size, do not make levels of equal depth"
        )
    # Where downsamplers have no tensors, their numbers are left out.
    inputs = {name.split(".")[1] for name in tensors if name.startswith("input_blocks.")}
    if not ends and len(inputs) < blocks:
        raise ValueError("it resamples without convolutions (conv_resample=False), which the U-Net cannot express")
    return levels, length - 1


def _block_type(way: str, attention: bool, resample: str) -> str:
    if attention:
        return f"Attn{way}Block2D"
    return f"Resnet{way}sampleBlock2D" if resample == "resnet" else f"{way}Block2D"


def _head_dim(attended: Sequence[int], flags: OpenAIFlags) -> int | None:
    """The U-Net's `attention_head_dim`: one number for all levels, or `None` for a single head in each.

    Args:
        attended: channels of the levels with attention.
        flags: tell the heads.

    Raises:
        ValueError: if they do not, do not divide the channels, or no one number serves all levels.
    """
    if (flags.heads is None) == (flags.head_channels is None):
        raise ValueError("its shapes do not tell the heads of attention; give --heads or --head-channels, one of them")
    name, divisor = ("heads", flags.heads) if flags.heads is not None else ("head_channels", flags.head_channels)
    divisor = integer(name, divisor, 1)
    for channels in attended:
        if channels % divisor:
            raise ValueError(f"{name} is {divisor}, which does not divide {channels}, the channels of an attention")
    dims = {channels: divisor if name == "head_channels" else channels // divisor for channels in attended}
    if all(dim == channels for channels, dim in dims.items()):
        return None
    if len(set(dims.values())) > 1:
        raise ValueError(
            f"{divisor} heads are {', '.join(map(str, sorted(set(dims.values()))))} channels each in its levels; "
            "the U-Net has one number of channels a head"
        )
    return next(iter(dims.values()))


def _rescaled(flags: OpenAIFlags, T: int) -> bool:
    """Whether the network was told other numbers than t."""
    if T == STEPS:
        return False
    if flags.rescale_timesteps is None:
        raise ValueError(
            f"a network of {T} timesteps may have been told t or t {STEPS} / {T}; give --rescale-timesteps (the "
            "default of improved-diffusion) or --plain-timesteps (of guided-diffusion)"
        )
    return flags.rescale_timesteps


def _epsilon_only(tensors: Mapping[str, Tensor], channels: int) -> dict[str, Tensor]:
    """The tensors without the half of the last convolution that predicts a variance, which DDIM has no use for."""
    made = shape(tensors, "out.2.weight")[0]
    if channels == SUPER_RESOLUTION:
        raise ValueError("it takes 6 channels: a network for super-resolution, of pictures and their small versions")
    if made not in (channels, 2 * channels):
        raise ValueError(
            f"it makes {made} channels of {channels}; epsilon has {channels}, with a variance {2 * channels}"
        )
    halved = dict(tensors)
    if made == 2 * channels:
        logger.warning("the model also predicts a variance (learn_sigma), which DDIM has no use for; it is left out")
        for name in ("out.2.weight", "out.2.bias"):
            if name in halved and len(halved[name]) == made:
                halved[name] = halved[name][:channels]
    return halved
