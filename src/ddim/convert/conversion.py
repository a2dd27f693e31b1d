"""The steps from a checkpoint to a pipeline folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim.convert import ddpm, openai
from ddim.convert.checkpoint import read_checkpoint
from ddim.convert.openai import OpenAIFlags
from ddim.convert.placement import ConversionPlan, build_unet
from ddim.devices import choose_dtype
from ddim.io.runs import check_model_folder
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.validation import choice, integer, shown

LAYOUTS = ("auto", "ddpm", "openai", "diffusers")
"""The naming schemes of checkpoints; `auto` detects which of the others it is."""
ATTENTION_SIZE = 16
"""Height and width of the feature maps to which the published models with a single attention level apply attention."""


@dataclass(frozen=True)
class CheckpointSettings:
    """Settings of the training that a checkpoint does not record.

    Attributes:
        image_size: height and width of the images; `None` for the size at which the only level with attention is 16x16.
        flags: flags of the training script of an `openai` checkpoint; `None` for other layouts.
        schedule: `num_train_timesteps`, `beta_schedule`, `beta_start` and `beta_end` of `DDIMScheduler`, where they
            differ from the paper's (linear from 0.0001 to 0.02, 1000 timesteps).

    Example:
        >>> CheckpointSettings(image_size=64).schedule
        {}
    """

    image_size: int | None = None
    flags: OpenAIFlags | None = None
    schedule: Mapping[str, Any] = field(default_factory=dict)


DEFAULT_SETTINGS = CheckpointSettings()


def convert(
    checkpoint: str | Path,
    out: str | Path,
    layout: str = "auto",
    settings: CheckpointSettings = DEFAULT_SETTINGS,
    ema: bool = True,
    dtype: str | torch.dtype = torch.float32,
    overwrite: bool = False,
) -> DDIMPipeline:
    """Write a checkpoint as a pipeline folder.

    Args:
        checkpoint: a PyTorch or safetensors file; for `diffusers` a folder, or anything else that
            `DDIMPipeline.from_pretrained` loads.
        out: the folder; it is created if missing.
        layout: one of `LAYOUTS`. `ddpm` is the layout of `ermongroup/ddim` and `pesser/pytorch_diffusion`, `openai`
            that of `openai/improved-diffusion` and `openai/guided-diffusion`; `auto` recognizes them by the tensors'
            names.
        settings: what the checkpoint does not record.
        ema: use the averaged weights of a training checkpoint if it has any.
        dtype: dtype of the weights written: a floating dtype, or a name in `ddim.devices.DTYPES`.
        overwrite: replace the files of a pipeline in a folder that is not empty; other files stay.

    Returns:
        The pipeline as written, in evaluation mode.

    Raises:
        FileNotFoundError: if the checkpoint does not exist.
        FileExistsError: if the folder is not empty and `overwrite` is false.
        NotADirectoryError: if `out` is a file.
        ValueError: if the checkpoint is damaged, incomplete, of an unrecognized layout, or of a network that
            `UNet2DModel` cannot express; or if a setting is missing or does not apply to such a checkpoint.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     pipe = convert("mnist", f"{folder}/digits", layout="diffusers", dtype="float16")
        >>> pipe.dtype
        torch.float16
    """
    choice("layout", layout, LAYOUTS)
    weights_dtype = choose_dtype(dtype) if isinstance(dtype, str) else dtype
    check_model_folder(Path(out), overwrite)
    if layout == "diffusers" or (layout == "auto" and Path(checkpoint).is_dir()):
        if settings.image_size is not None or settings.flags is not None or settings.schedule:
            raise ValueError(f"{checkpoint} records its own image size, heads and schedule; leave them out")
        pipe = DDIMPipeline.from_pretrained(checkpoint, torch_dtype=weights_dtype)
    else:
        tensors = read_checkpoint(Path(checkpoint), ema)
        pipe = make_pipeline(tensors, str(checkpoint), layout, settings, weights_dtype)
    pipe.save_pretrained(out)
    return pipe


def make_pipeline(
    tensors: Mapping[str, Tensor],
    source: str,
    layout: str = "auto",
    settings: CheckpointSettings = DEFAULT_SETTINGS,
    dtype: torch.dtype = torch.float32,
) -> DDIMPipeline:
    """Build a pipeline from the tensors of a checkpoint.

    Args:
        tensors: tensors by their original names, as `read_checkpoint` returns them.
        source: the checkpoint's name in messages.
        layout: `ddpm`, `openai` or `auto`.
        settings: what the checkpoint does not record.
        dtype: floating dtype of the pipeline.

    Returns:
        The pipeline, in evaluation mode.

    Raises:
        ValueError: if the checkpoint is incomplete, of an unrecognized layout, or of a network that `UNet2DModel`
            cannot express; or if a setting is missing or does not apply to such a checkpoint.
    """
    layout = detect_layout(tensors, source) if layout == "auto" else layout
    schedule = dict(settings.schedule)
    if layout == "openai":
        schedule = openai.with_default_betas(schedule)
    scheduler = DDIMScheduler(**schedule)
    try:
        if layout == "openai":
            plan, tensors = openai.plan_conversion(tensors, settings.flags or OpenAIFlags(), len(scheduler))
        elif settings.flags is not None:
            raise ValueError(f"flags of heads, their order and timesteps require layout='openai', got {shown(layout)}")
        else:
            plan = ddpm.plan_conversion(tensors)
        config = plan.config | {"sample_size": sample_size(plan.config, settings.image_size)}
        unet = build_unet(ConversionPlan(config, plan.modules, plan.head_dim), tensors, dtype)
    except ValueError as error:
        raise ValueError(f"cannot convert {source} (layout {layout}): {error}") from None
    return DDIMPipeline(unet, scheduler)


def detect_layout(tensors: Mapping[str, Tensor], source: str) -> str:
    """Recognize the layout of a checkpoint by the names of its tensors.

    Args:
        tensors: tensors by their original names.
        source: the checkpoint's name in messages.

    Returns:
        `ddpm` or `openai`.

    Raises:
        ValueError: if it is neither.

    Example:
        >>> detect_layout({"input_blocks.0.0.weight": torch.zeros(32, 3, 3, 3)}, "model.pt")
        'openai'
    """
    for layout, prefix in (("ddpm", "down."), ("openai", "input_blocks.")):
        if any(name.startswith(prefix) for name in tensors):
            return layout
    raise ValueError(
        f"{source} has an unrecognized checkpoint layout: expected tensors down.* (ddpm) or input_blocks.* (openai), "
        f"got {', '.join(sorted(tensors)[:3]) or 'none'}; convert diffusers models as a whole folder"
    )


def sample_size(config: Mapping[str, Any], image_size: int | None) -> int:
    """Return the size of a network's images.

    Args:
        config: configuration of the U-Net.
        image_size: the size in pixels if it is known; `None` for that at which the only level with attention is 16x16.

    Returns:
        Height and width in pixels.

    Raises:
        ValueError: if it cannot be determined, or is not divisible by 2 once per downsampling.

    Example:
        >>> sample_size({"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}, None)
        32
    """
    types = config["down_block_types"]
    if image_size is None:
        attended = [level for level, name in enumerate(types) if name.startswith("Attn")]
        if len(attended) != 1:
            raise ValueError(
                f"its shapes do not determine the size of its images ({len(attended)} levels with attention); pass "
                "image_size"
            )
        image_size = ATTENTION_SIZE * 2 ** attended[0]
    size, multiple = integer("image_size", image_size, 1), 2 ** (len(types) - 1)
    if size % multiple:
        raise ValueError(f"image_size must be a multiple of {multiple} for {len(types)} levels, got {size}")
    return size
