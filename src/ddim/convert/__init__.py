"""Other people's checkpoints of DDPM and DDIM U-Nets made into pipeline folders of this library.

    a file  --checkpoint-->  its tensors  --ddpm, openai-->  a plan  --placement-->  the U-Net's tensors

A layout (`ddpm`, `openai`) knows the names of one family of code. From the names and shapes of a checkpoint's tensors
it reads the network's configuration and which of the checkpoint's modules becomes which of the U-Net's. Every tensor
must find its place, with its shape; what the U-Net cannot compute exactly as the original did is refused.

A third layout, `diffusers`, is any folder that `DDIMPipeline.from_pretrained` loads; it is written as of today.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim.convert import ddpm, openai
from ddim.convert.checkpoint import read_checkpoint
from ddim.convert.openai import OpenAIFlags
from ddim.convert.placement import Plan, build
from ddim.devices import choose_dtype
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.validation import integer

LAYOUTS = ("auto", "ddpm", "openai", "diffusers")

# Where the published models attend when they do so at a single size.
ATTENTION_SIZE = 16


def convert(
    checkpoint: str | Path,
    out: str | Path,
    layout: str = "auto",
    image_size: int | None = None,
    flags: OpenAIFlags | None = None,
    schedule: Mapping[str, Any] | None = None,
    ema: bool = True,
    dtype: str | torch.dtype = torch.float32,
    overwrite: bool = False,
) -> DDIMPipeline:
    """Write a checkpoint as a pipeline folder.

    Args:
        checkpoint: a file of PyTorch or safetensors; for `diffusers` a folder, or what else
            `DDIMPipeline.from_pretrained` takes.
        out: the folder, made where it is missing.
        layout: one of `LAYOUTS`. `ddpm` is that of `ermongroup/ddim` and `pesser/pytorch_diffusion`, `openai` that of
            `openai/improved-diffusion` and `openai/guided-diffusion`; `auto` tells them apart by the names of tensors.
        image_size: height and width of the pictures, which shapes do not tell; unless given, the size that has the only
            level with attention at 16x16.
        flags: what shapes do not tell of an `openai` checkpoint.
        schedule: `num_train_timesteps`, `beta_schedule`, `beta_start` and `beta_end` of `DDIMScheduler`, where they are
            not the paper's (linear from 0.0001 to 0.02, 1000 timesteps).
        ema: take the averaged weights of a training checkpoint, where it has them.
        dtype: of the weights that are written: a floating dtype, or a name in `ddim.devices.DTYPES`.
        overwrite: replace the files of a pipeline in a folder that is not empty; other files stay.

    Returns:
        The pipeline as it was written, in evaluation mode.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        FileExistsError: if the folder is not empty and `overwrite` is false.
        ValueError: if the checkpoint is damaged, of no known layout, not complete, or of a network that the U-Net
            cannot express; or if an option is missing or has nothing to say about such a checkpoint.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}")
    weights_dtype = choose_dtype(dtype) if isinstance(dtype, str) else dtype
    _check_target(Path(out), overwrite)
    if layout == "diffusers" or (layout == "auto" and Path(checkpoint).is_dir()):
        if image_size is not None or flags is not None or schedule:
            raise ValueError(f"{checkpoint} tells its own image size, heads and schedule; leave those options out")
        pipe = DDIMPipeline.from_pretrained(checkpoint, torch_dtype=weights_dtype)
    else:
        tensors = read_checkpoint(Path(checkpoint), ema)
        pipe = make_pipeline(tensors, str(checkpoint), layout, image_size, flags, schedule, weights_dtype)
    pipe.save_pretrained(out)
    return pipe


def make_pipeline(
    tensors: Mapping[str, Tensor],
    source: str,
    layout: str = "auto",
    image_size: int | None = None,
    flags: OpenAIFlags | None = None,
    schedule: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> DDIMPipeline:
    """A pipeline from the tensors of a checkpoint.

    Args:
        tensors: by their original names, as `read_checkpoint` gives them.
        source: where they come from, for messages.
        layout: `ddpm`, `openai` or `auto`.
        image_size: as for `convert`, and so are the others.

    Raises:
        ValueError: as `convert`.
    """
    layout = find_layout(tensors, source) if layout == "auto" else layout
    schedule = dict(schedule or {})
    if layout == "openai":
        schedule = openai.default_betas(schedule)
    scheduler = DDIMScheduler(**schedule)
    try:
        if layout == "openai":
            plan, tensors = openai.read(tensors, flags or OpenAIFlags(), len(scheduler))
        elif flags is not None:
            raise ValueError("heads and what else flags tell are for the layout openai only")
        else:
            plan = ddpm.read(tensors)
        config = plan.config | {"sample_size": sample_size(plan.config, image_size)}
        unet = build(Plan(config, plan.modules, plan.head_dim), tensors, dtype)
    except ValueError as error:
        raise ValueError(f"cannot convert {source} (layout {layout}): {error}") from None
    return DDIMPipeline(unet, scheduler)


def find_layout(tensors: Mapping[str, Tensor], source: str) -> str:
    """`ddpm` or `openai`, by the names of a checkpoint's tensors; ValueError for others."""
    for layout, prefix in (("ddpm", "down."), ("openai", "input_blocks.")):
        if any(name.startswith(prefix) for name in tensors):
            return layout
    raise ValueError(
        f"{source} is of no known layout: it has no tensors down.* (ddpm) or input_blocks.* (openai) but "
        f"{', '.join(sorted(tensors)[:3]) or 'none'}; of a diffusers model, give the whole folder"
    )


def sample_size(config: Mapping[str, Any], given: int | None) -> int:
    """The size of a network's pictures: as given, or that which has the only level with attention at 16x16.

    Args:
        config: of the U-Net.
        given: in pixels.

    Raises:
        ValueError: if it is not known, or cannot be halved as often as the network does.
    """
    types = config["down_block_types"]
    if given is None:
        attended = [level for level, name in enumerate(types) if name.startswith("Attn")]
        if len(attended) != 1:
            raise ValueError(
                f"it does not tell the size of its pictures ({len(attended)} levels with attention); give --image-size"
            )
        given = ATTENTION_SIZE * 2 ** attended[0]
    size, multiple = integer("image_size", given, 1), 2 ** (len(types) - 1)
    if size % multiple:
        raise ValueError(f"image_size is {size}; a network of {len(types)} levels takes multiples of {multiple}")
    return size


def _check_target(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file, not a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out} is not empty; give another folder, or --overwrite")
