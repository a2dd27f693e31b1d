"""`ddim convert`: checkpoints of other projects as pipeline folders."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddim.cli import options
from ddim.cli.common import count_model_files, report_result

if TYPE_CHECKING:
    from ddim.convert import OpenAIFlags
    from ddim.pipeline import DDIMPipeline


def convert(
    checkpoint: Annotated[
        str, typer.Argument(help="A PyTorch or safetensors file, or a diffusers folder.", show_default=False)
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write.", show_default=False)],
    layout: Annotated[
        str,
        typer.Option(help="Naming scheme of the checkpoint: ddpm, openai or diffusers; auto detects it."),
    ] = "auto",
    image_size: Annotated[
        int | None,
        typer.Option(help="Height and width of the images; defaults to what a single level with attention implies."),
    ] = None,
    heads: Annotated[int | None, typer.Option(help="openai: num_heads of the training.")] = None,
    head_channels: Annotated[
        int | None, typer.Option(help="openai: num_head_channels of the training, instead of --heads.")
    ] = None,
    new_attention_order: Annotated[
        bool, typer.Option("--new-attention-order", help="openai: trained with use_new_attention_order.")
    ] = False,
    rescale_timesteps: Annotated[
        bool | None,
        typer.Option(
            "--rescale-timesteps/--plain-timesteps",
            help="openai: trained with rescale_timesteps or not; required if --steps-trained is not 1000.",
        ),
    ] = None,
    steps_trained: Annotated[
        int | None, typer.Option(help="Number of timesteps of the training; defaults to 1000.")
    ] = None,
    beta_schedule: Annotated[
        str | None,
        typer.Option(
            help="Noise schedule of the training; defaults to linear; squaredcos_cap_v2 is the cosine schedule."
        ),
    ] = None,
    beta_start: Annotated[
        float | None, typer.Option(help="First beta; defaults to 0.0001, for openai times 1000 / --steps-trained.")
    ] = None,
    beta_end: Annotated[
        float | None, typer.Option(help="Last beta; defaults to 0.02, for openai times 1000 / --steps-trained.")
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema/--raw", help="Use the averaged weights if there are any, or the raw ones.")
    ] = True,
    dtype: options.Dtype = "float32",
    overwrite: options.OverwriteModel = False,
) -> None:
    """Convert a checkpoint into a pipeline folder that every other command and diffusers load.

    Checkpoints are those of ermongroup/ddim, pytorch_diffusion, improved-diffusion and guided-diffusion, and old
    diffusers folders. The folder is printed. Networks that cannot be expressed exactly are refused, and so are files
    that could run code.

    Examples:
      ddim convert ema_diffusion_cifar10_model-790000.ckpt --out cifar10

      ddim convert ckpt.pth --raw --out celeba

      ddim convert lsun_uncond_100M_2400K_bs64.pt --heads 1 --out bedroom

      ddim convert cifar10_uncond_50M_500K.pt --heads 4 --image-size 32 --steps-trained 4000 --rescale-timesteps
      --beta-schedule squaredcos_cap_v2 --out cifar10-cosine
    """
    from ddim.convert import CheckpointSettings, OpenAIFlags
    from ddim.convert import convert as convert_checkpoint

    flags = OpenAIFlags(heads, head_channels, new_attention_order, rescale_timesteps)
    schedule = {
        "num_train_timesteps": steps_trained,
        "beta_schedule": beta_schedule,
        "beta_start": beta_start,
        "beta_end": beta_end,
    }
    folder = Path(out)
    num_replaced = count_model_files(folder)
    pipe = convert_checkpoint(
        checkpoint,
        folder,
        layout,
        CheckpointSettings(
            image_size,
            None if flags == OpenAIFlags() else flags,
            {name: value for name, value in schedule.items() if value is not None},
        ),
        ema,
        dtype,
        overwrite,
    )
    if not (layout == "diffusers" or (layout == "auto" and Path(checkpoint).is_dir())):
        for line in assumptions(pipe, flags, schedule, image_size):
            print(f"assumed: {line}", file=sys.stderr)
    size = pipe.unet.config.sample_size
    report_result(folder, num_replaced, f"{pipe.unet.num_parameters():,} parameters, sample_size {size}")


def assumptions(
    pipe: DDIMPipeline, flags: OpenAIFlags, schedule: Mapping[str, Any], image_size: int | None
) -> list[str]:
    """Return what a checkpoint does not record and the user did not give, with the options that change it.

    Args:
        pipe: the converted model.
        flags: those that were given.
        schedule: arguments of the scheduler; `None` where they were not given.
        image_size: the size that was given, if any.

    Returns:
        One phrase per assumption.
    """
    config = pipe.scheduler.config
    lines = []
    if schedule["num_train_timesteps"] is None:
        lines.append(f"{config.num_train_timesteps} timesteps of training (--steps-trained)")
    if None in (schedule["beta_schedule"], schedule["beta_start"], schedule["beta_end"]):
        betas = f"{config.beta_schedule} betas from {config.beta_start:g} to {config.beta_end:g}"
        lines.append(f"{betas} (--beta-schedule, --beta-start, --beta-end)")
    if image_size is None:
        lines.append(f"images of {pipe.unet.config.sample_size} pixels (--image-size)")
    if (flags.heads is not None or flags.head_channels is not None) and not flags.new_attention_order:
        lines.append("heads split before queries, keys and values (--new-attention-order)")
    clipping = "the predicted x_0 is clipped" if config.clip_sample else "the predicted x_0 is not clipped"
    lines.append(f"{clipping}, and epsilon not recomputed from it (ddim sample --use-clipped-model-output)")
    return lines
