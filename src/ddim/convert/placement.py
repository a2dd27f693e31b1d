"""The tensors of a checkpoint put into a U-Net: every one has its place, with its shape, or the checkpoint is refused.

Where several of the U-Net's modules are one in the checkpoint (queries, keys and values), its tensor is cut.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddim.unet import UNet2DModel

SHOWN = 3


class Plan(NamedTuple):
    """What a layout reads from the names and shapes of a checkpoint's tensors.

    Attributes:
        config: arguments of `UNet2DModel`.
        modules: the U-Net's modules -> the checkpoint's; entries that this U-Net lacks do no harm.
        head_dim: channels a head of attention whose projections are one tensor, (heads, 3, head_dim, ...) in this
            order; `None` where there is but one head.
    """

    config: dict[str, Any]
    modules: dict[str, str]
    head_dim: int | None = None


def build(plan: Plan, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> UNet2DModel:
    """The U-Net of a plan with the tensors of a checkpoint, in evaluation mode.

    Args:
        plan: as a layout made it.
        tensors: by their original names.
        dtype: of the U-Net's parameters.

    Raises:
        ValueError: if the configuration is none that the U-Net has, for the first three tensors that are missing, left
            over, misshapen or not of floating numbers, and for numbers that are not finite in `dtype`.
    """
    with torch.device("meta"):
        unet = UNet2DModel(**plan.config)
    placed = {name: tensor.to(dtype) for name, tensor in place(plan, unet, tensors).items()}
    for name, tensor in placed.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite, or too large for {dtype}")
    unet.load_state_dict(placed, assign=True)
    return unet.eval()


def place(plan: Plan, unet: UNet2DModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the U-Net's names, each in memory of its own.

    Args:
        plan: as for `build`.
        unet: the network of the plan, on any device.
        tensors: as for `build`.

    Raises:
        ValueError: as `build`.
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
        parts = [tensors[old]] if len(new) == 1 else _cut(tensors[old], len(new), plan.head_dim)
        for name, part in zip(new, parts, strict=True):
            placed[name] = part.reshape(shapes[name]).clone()
    return placed


def shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Of a tensor that a configuration is read from, with at least a dimension more than a bias has.

    Raises:
        ValueError: if it is missing or has none.
    """
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    if tensors[name].ndim < 2:
        raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}; it must be a matrix or a kernel")
    return tuple(tensors[name].shape)


def count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number in the pattern's first group among the names; 0 if none matches."""
    matches = (re.fullmatch(pattern, name) for name in tensors)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def renamed(new: str, old: str, parts: Mapping[str, str]) -> dict[str, str]:
    """The modules of one block: its parts, with the block's names before them."""
    return {f"{new}.{part}": f"{old}.{old_part}" for part, old_part in parts.items()}


def _check(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} has no place in this network" for name in tensors if name not in expected]
    for name, wanted in expected.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if _squeezed(tuple(tensor.shape)) != _squeezed(wanted):
            problems.append(f"{name} has shape {tuple(tensor.shape)} instead of {wanted}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} holds {tensor.dtype} instead of floating numbers")
    if problems:
        more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
        raise ValueError(f"{'; '.join(problems[:SHOWN])}{more}")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel of one pixel is a matrix."""
    return shape[:2] if math.prod(shape[2:]) == 1 else shape


def _cut(tensor: Tensor, count: int, head_dim: int | None) -> list[Tensor]:
    """(heads * count * head_dim, ...) to `count` times (heads * head_dim, ...)."""
    rest = tensor.shape[1:]
    heads_first = tensor.reshape(-1, count, head_dim or len(tensor) // count, *rest)
    return [part.reshape(-1, *rest) for part in heads_first.unbind(1)]
