"""The layout of `openai/improved-diffusion` and `openai/guided-diffusion` (unet.py in both).

    time_embed.{0,2}   label_emb   out.{0,2}
    input_blocks.0.0                                       the first convolution
    input_blocks.{n}.0.{in_layers.{0,2},emb_layers.1,out_layers.{0,3},skip_connection}   a residual block
    input_blocks.{n}.1.{norm,qkv,proj_out}                 attention after it
    input_blocks.{n}.0.op, output_blocks.{n}.{1,2}.conv    resampling, or a residual block instead
    middle_block.{0,1,2}                                   residual block, attention, residual block

Blocks are numbered through all levels. Group norms have 32 groups and epsilon 1e-5. A network that also predicts its
variance has twice the channels at its end; epsilon is the first half.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddim.convert.placement import ConversionPlan, count_numbered, matrix_shape, rename_parts
from ddim.nn.layers import Timesteps
from ddim.validation import integer

logger = logging.getLogger(__name__)

GROUPS, EPSILON = 32, 1e-5
REFERENCE_TIMESTEPS = 1000
"""The number of timesteps that the code's linear schedule and its rescaled timesteps refer to."""
SUPER_RESOLUTION_CHANNELS = 6
"""Input channels of networks that are conditioned on a small image."""

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out"}


@dataclass(frozen=True)
class OpenAIFlags:
    """Flags of the training script that the shapes of a checkpoint do not determine.

    Attributes:
        heads: heads per attention (`num_heads`); either this or `head_channels` is required.
        head_channels: channels per head (`num_head_channels`).
        new_attention_order: whether queries, keys and values were split before heads (`use_new_attention_order`).
        rescale_timesteps: whether the network was given t 1000 / T instead of t (`rescale_timesteps`); required unless
            T is 1000.

    Example:
        >>> OpenAIFlags(heads=4).new_attention_order
        False
    """

    heads: int | None = None
    head_channels: int | None = None
    new_attention_order: bool = False
    rescale_timesteps: bool | None = None


def with_default_betas(schedule: dict[str, Any]) -> dict[str, Any]:
    """Add the code's linear betas, those of 1000 timesteps times 1000 / T, to arguments of a scheduler without betas.

    Args:
        schedule: arguments of `DDIMScheduler`.

    Returns:
        The arguments; unchanged if T is 1000 or the schedule is not linear.

    References:
        `get_named_beta_schedule` in gaussian_diffusion.py of openai/improved-diffusion.

    Example:
        >>> with_default_betas({"num_train_timesteps": 4000})["beta_end"]
        0.005
    """
    T = schedule.get("num_train_timesteps")
    if T is None or T < 1 or schedule.get("beta_schedule", "linear") != "linear":
        return schedule
    return {"beta_start": 0.0001 * REFERENCE_TIMESTEPS / T, "beta_end": 0.02 * REFERENCE_TIMESTEPS / T} | schedule


def plan_conversion(
    tensors: Mapping[str, Tensor], flags: OpenAIFlags, T: int
) -> tuple[ConversionPlan, dict[str, Tensor]]:
    """Read the configuration and the module table from names and shapes of a checkpoint's tensors.

    Args:
        tensors: tensors by their original names.
        flags: what the shapes do not determine.
        T: number of timesteps that the network was trained with.

    Returns:
        The plan, and the tensors to place: those of the checkpoint without the predicted variance, and with a table of
        embeddings if the network was given rescaled timesteps.

    Raises:
        ValueError: if a tensor or a flag is missing, or the U-Net cannot compute what the network did.
    """
    levels, layers = _depth(tensors)
    channels = [matrix_shape(tensors, f"{_input(level, 0, layers)}.0.in_layers.2.weight")[0] for level in range(levels)]
    width, in_channels = matrix_shape(tensors, "input_blocks.0.0.weight")[:2]
    embedded = matrix_shape(tensors, "time_embed.0.weight")[1]
    if not width == channels[0] == embedded:
        raise ValueError(
            f"the time embedding has {embedded} channels, the first convolution {width} and the first level "
            f"{channels[0]}; the U-Net has one number for all"
        )
    placed = _without_variance(tensors, in_channels)
    downs = [f"{_input(level, 0, layers)}.1.norm.weight" in tensors for level in range(levels)]
    ups = [f"{_output(level, 0, layers)}.1.norm.weight" in tensors for level in range(levels)]
    attended = [c for c, attention in zip(channels, downs, strict=True) if attention]
    attended += [c for c, attention in zip(reversed(channels), ups, strict=True) if attention]
    head_dim = _head_dim([*attended, channels[-1]], flags)
    resample = "resnet" if f"{_input(0, layers, layers)}.0.in_layers.2.weight" in tensors and levels > 1 else "conv"
    doubled = matrix_shape(tensors, f"{_input(0, 0, layers)}.0.emb_layers.1.weight")[0] == 2 * channels[0]

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
        # With scale and shift, the U-Net's middle attention has a norm only if this is given.
        "attn_norm_num_groups": GROUPS,
        "norm_eps": EPSILON,
        "resnet_time_scale_shift": "scale_shift" if doubled else "default",
        "downsample_padding": 1,
        "freq_shift": 0,
        "flip_sin_to_cos": True,
    }
    if "label_emb.weight" in tensors:
        config["num_class_embeds"] = num_classes = matrix_shape(tensors, "label_emb.weight")[0]
        logger.warning("the model is class-conditional: give class_labels, from 0 to %d", num_classes - 1)
    if _uses_rescaled_timesteps(flags, T):
        # The U-Net cannot scale timesteps, but a table of embeddings can hold those of the scaled ones.
        config |= {"time_embedding_type": "learned", "num_train_timesteps": T}
        placed["time_proj.weight"] = Timesteps(width, True, 0)(torch.arange(T) * (REFERENCE_TIMESTEPS / T))
    fused_head_dim = None if flags.new_attention_order else head_dim
    return ConversionPlan(config, modules(levels, layers, ups), fused_head_dim), placed


def modules(levels: int, layers: int, ups: Sequence[bool]) -> dict[str, str]:
    """Return the checkpoint's module for each of the U-Net's.

    Args:
        levels: number of levels.
        layers: residual blocks per level on the downward path.
        ups: which levels have attention on the upward path, in the order in which they run.

    Returns:
        Names of the U-Net's modules -> names of the checkpoint's.

    Example:
        >>> modules(1, 1, [False])["mid_block.attentions.0.to_q"]
        'middle_block.1.qkv'
    """
    table = {
        "time_proj": "time_proj",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "class_embedding": "label_emb",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        **rename_parts("mid_block.resnets.0", "middle_block.0", RESNET),
        **rename_parts("mid_block.attentions.0", "middle_block.1", ATTENTION),
        **rename_parts("mid_block.resnets.1", "middle_block.2", RESNET),
    }
    for level, attention in enumerate(ups):
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        for i in range(layers):
            table |= rename_parts(f"{down}.resnets.{i}", f"{_input(level, i, layers)}.0", RESNET)
            table |= rename_parts(f"{down}.attentions.{i}", f"{_input(level, i, layers)}.1", ATTENTION)
        for i in range(layers + 1):
            table |= rename_parts(f"{up}.resnets.{i}", f"{_output(level, i, layers)}.0", RESNET)
            table |= rename_parts(f"{up}.attentions.{i}", f"{_output(level, i, layers)}.1", ATTENTION)
        downsampler = f"{_input(level, layers, layers)}.0"
        upsampler = f"{_output(level, layers, layers)}.{2 if attention else 1}"
        table |= rename_parts(f"{down}.downsamplers.0", downsampler, RESNET | {"conv": "op"})
        table |= rename_parts(f"{up}.upsamplers.0", upsampler, RESNET | {"conv": "conv"})
    return table


def _input(level: int, i: int, layers: int) -> str:
    """Return the name of block i of a level on the downward path; the one after the last is its downsampler."""
    return f"input_blocks.{1 + level * (layers + 1) + i}"


def _output(level: int, i: int, layers: int) -> str:
    """Return the name of block i of a level on the upward path, in running order; the last holds the upsampler."""
    return f"output_blocks.{level * (layers + 1) + i}"


def _depth(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the number of levels, and of residual blocks per level on the downward path.

    Levels end at upsamplers; on the downward path, a residual block that downsamples has the names of any other.
    """
    blocks = count_numbered(tensors, r"output_blocks\.(\d+)\.0\.in_layers\.2\.weight")
    if not blocks:
        raise ValueError("output_blocks.0.0.in_layers.2.weight is missing; the upward path is required")
    ends = [
        index
        for index in range(blocks)
        if any(
            f"output_blocks.{index}.{position}.{part}.weight" in tensors
            for position in (1, 2)
            for part in ("conv", "in_layers.2")
        )
    ]
    length = ends[0] + 1 if ends else blocks
    levels, rest = divmod(blocks, length)
    if rest or length < 2 or ends != [(level + 1) * length - 1 for level in range(levels - 1)]:
        raise ValueError(
            f"its {blocks} output blocks, of which {len(ends)} double the size, do not make levels of equal depth"
        )
    # Downsamplers without tensors leave gaps in the numbers.
    inputs = {name.split(".")[1] for name in tensors if name.startswith("input_blocks.")}
    if not ends and len(inputs) < blocks:
        raise ValueError("it resamples without convolutions (conv_resample=False), which the U-Net cannot express")
    return levels, length - 1


def _block_type(direction: str, attention: bool, resample: str) -> str:
    if attention:
        return f"Attn{direction}Block2D"
    return f"Resnet{direction}sampleBlock2D" if resample == "resnet" else f"{direction}Block2D"


def _head_dim(attended: Sequence[int], flags: OpenAIFlags) -> int | None:
    """Return the U-Net's `attention_head_dim`: one number for all levels, or `None` for a single head in each.

    Args:
        attended: channels of the levels with attention.
        flags: give the heads or their channels.

    Raises:
        ValueError: if they give neither or both, do not divide the channels, or need different numbers per level.
    """
    if (flags.heads is None) == (flags.head_channels is None):
        raise ValueError("its shapes do not determine the heads of attention; pass heads or head_channels, one of them")
    name, divisor = ("heads", flags.heads) if flags.heads is not None else ("head_channels", flags.head_channels)
    divisor = integer(name, divisor, 1)
    for channels in attended:
        if channels % divisor:
            raise ValueError(f"{name} must divide {channels}, the channels of an attention, got {divisor}")
    dims = {channels: divisor if name == "head_channels" else channels // divisor for channels in attended}
    if all(dim == channels for channels, dim in dims.items()):
        return None
    if len(set(dims.values())) > 1:
        raise ValueError(
            f"{divisor} heads have {', '.join(map(str, sorted(set(dims.values()))))} channels each in its levels; "
            "the U-Net has one number of channels per head"
        )
    return next(iter(dims.values()))


def _uses_rescaled_timesteps(flags: OpenAIFlags, T: int) -> bool:
    """Return whether the network was given t 1000 / T instead of t."""
    if T == REFERENCE_TIMESTEPS:
        return False
    if flags.rescale_timesteps is None:
        raise ValueError(
            f"a network of {T} timesteps may have been given t or t {REFERENCE_TIMESTEPS} / {T}; pass "
            "rescale_timesteps=True (the default of improved-diffusion) or rescale_timesteps=False (that of "
            "guided-diffusion)"
        )
    return flags.rescale_timesteps


def _without_variance(tensors: Mapping[str, Tensor], channels: int) -> dict[str, Tensor]:
    """Return the tensors without the half of the last convolution that predicts a variance, which DDIM does not use."""
    outputs = matrix_shape(tensors, "out.2.weight")[0]
    if channels == SUPER_RESOLUTION_CHANNELS:
        raise ValueError("it takes 6 channels: a network for super-resolution, conditioned on a small image")
    if outputs not in (channels, 2 * channels):
        raise ValueError(
            f"it makes {outputs} channels of {channels}; epsilon has {channels}, with a variance {2 * channels}"
        )
    result = dict(tensors)
    if outputs == 2 * channels:
        logger.warning("the model also predicts a variance (learn_sigma), which DDIM does not use; it is dropped")
        for name in ("out.2.weight", "out.2.bias"):
            if name in result and len(result[name]) == outputs:
                result[name] = result[name][:channels]
    return result
