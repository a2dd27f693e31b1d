"""Placement of a checkpoint's tensors in a U-Net: every tensor is used, with its shape, or the checkpoint is refused.

If several of the U-Net's modules are one in the checkpoint (queries, keys and values), its tensor is split.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddim.unet import UNet2DModel

MAX_PROBLEMS_SHOWN = 3


@dataclass(frozen=True)
class ConversionPlan:
    """What a layout reads from the names and shapes of a checkpoint's tensors.

    Attributes:
        config: arguments of `UNet2DModel`.
        modules: names of the U-Net's modules -> names of the checkpoint's; entries that this U-Net lacks are ignored.
        head_dim: channels per head of attention whose projections are one tensor, (heads, 3, head_dim, ...) in this
            order; `None` for a single head.

    Example:
        >>> ConversionPlan({"in_channels": 1}, {"conv_in": "input_blocks.0.0"}).head_dim is None
        True
    """

    config: dict[str, Any]
    modules: dict[str, str]
    head_dim: int | None = None


def build_unet(plan: ConversionPlan, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> UNet2DModel:
    """Build the U-Net of a plan from the tensors of a checkpoint.

    Args:
        plan: the configuration and the module table.
        tensors: tensors by their original names.
        dtype: floating dtype of the U-Net's parameters.

    Returns:
        The U-Net, in evaluation mode.

    Raises:
        ValueError: if the U-Net has no such configuration, if tensors are missing, unexpected, of another shape or not
            floating (it names the first three), or if values are non-finite in `dtype`.
    """
    with torch.device("meta"):
        unet = UNet2DModel(**plan.config)
    placed = {name: tensor.to(dtype) for name, tensor in place_tensors(plan, unet, tensors).items()}
    for name, tensor in placed.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} must be finite in {dtype}, got NaN, infinity or values that are too large")
    unet.load_state_dict(placed, assign=True)
    return unet.eval()


def place_tensors(plan: ConversionPlan, unet: UNet2DModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of a checkpoint's tensors under the U-Net's names.

    Args:
        plan: the configuration and the module table.
        unet: the network of the plan, on any device.
        tensors: tensors by their original names.

    Returns:
        A tensor for every parameter of the U-Net.

    Raises:
        ValueError: if tensors are missing, unexpected, of another shape or not floating; it names the first three.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in unet.state_dict().items()}
    names: dict[str, list[str]] = {}
    for name in shapes:
        module, _, kind = name.rpartition(".")
        names.setdefault(f"{plan.modules[module]}.{kind}", []).append(name)
    expected = {old: (sum(shapes[name][0] for name in new), *shapes[new[0]][1:]) for old, new in names.items()}
    _check(expected, tensors)
    placed: dict[str, Tensor] = {}
    for old, new in names.items():
        parts = [tensors[old]] if len(new) == 1 else _split(tensors[old], len(new), plan.head_dim)
        for name, part in zip(new, parts, strict=True):
            placed[name] = part.reshape(shapes[name]).clone()
    return placed


def matrix_shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Return the shape of a weight that the configuration is read from.

    Args:
        tensors: tensors by their original names.
        name: the weight's name.

    Returns:
        Its shape, of at least two dimensions.

    Raises:
        ValueError: if it is missing or has fewer dimensions.

    Example:
        >>> matrix_shape({"conv_in.weight": torch.zeros(32, 3, 3, 3)}, "conv_in.weight")
        (32, 3, 3, 3)
    """
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    if tensors[name].ndim < 2:
        raise ValueError(f"{name} must be a matrix or a convolution kernel, got shape {tuple(tensors[name].shape)}")
    return tuple(tensors[name].shape)


def count_numbered(tensors: Mapping[str, Tensor], pattern: str) -> int:
    r"""Count numbered modules by the names of tensors.

    Args:
        tensors: tensors by their original names.
        pattern: a regular expression whose first group is the number.

    Returns:
        One more than the largest number; 0 if no name matches.

    Example:
        >>> count_numbered({"down.0.weight": torch.zeros(1), "down.1.weight": torch.zeros(1)}, r"down\.(\d+)\.weight")
        2
    """
    matches = (re.fullmatch(pattern, name) for name in tensors)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def rename_parts(new: str, old: str, parts: Mapping[str, str]) -> dict[str, str]:
    """Return the module table of one block.

    Args:
        new: the block's name in the U-Net.
        old: its name in the checkpoint.
        parts: the parts' names in the U-Net -> in the checkpoint.

    Returns:
        The parts' full names in the U-Net -> in the checkpoint.

    Example:
        >>> rename_parts("mid_block.attentions.0", "mid.attn_1", {"to_q": "q"})
        {'mid_block.attentions.0.to_q': 'mid.attn_1.q'}
    """
    return {f"{new}.{part}": f"{old}.{old_part}" for part, old_part in parts.items()}


def _check(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in expected]
    for name, shape in expected.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if _squeezed(tuple(tensor.shape)) != _squeezed(shape):
            problems.append(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} must be floating, got {tensor.dtype}")
    if problems:
        more = f" (and {len(problems) - MAX_PROBLEMS_SHOWN} more)" if len(problems) > MAX_PROBLEMS_SHOWN else ""
        raise ValueError(f"{'; '.join(problems[:MAX_PROBLEMS_SHOWN])}{more}")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a 1x1 kernel as that of a matrix; other shapes as they are."""
    return shape[:2] if math.prod(shape[2:]) == 1 else shape


def _split(tensor: Tensor, count: int, head_dim: int | None) -> list[Tensor]:
    """Split (heads * count * head_dim, ...) into `count` tensors (heads * head_dim, ...)."""
    rest = tensor.shape[1:]
    heads_first = tensor.reshape(-1, count, head_dim or len(tensor) // count, *rest)
    return [part.reshape(-1, *rest) for part in heads_first.unbind(1)]
