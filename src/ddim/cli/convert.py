"""`ddim convert`: other people's checkpoints as pipeline folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddim.cli import options
from ddim.cli.common import finish

# Of a pipeline's folder, to tell which of them were there before.
FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
)


def convert(
    checkpoint: Annotated[
        str, typer.Argument(help="A file of PyTorch or safetensors, or a diffusers folder.", show_default=False)
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="The folder to write.", show_default=False)],
    layout: Annotated[
        str,
        typer.Option(help="Whose names: ddpm, openai or diffusers; auto looks."),
    ] = "auto",
    image_size: Annotated[
        int | None, typer.Option(help="Of the pictures; told by the only level with attention unless given.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="openai: num_heads of its training.")] = None,
    head_channels: Annotated[
        int | None, typer.Option(help="openai: num_head_channels of its training, in place of --heads.")
    ] = None,
    new_attention_order: Annotated[
        bool, typer.Option("--new-attention-order", help="openai: trained with use_new_attention_order.")
    ] = False,
    rescale_timesteps: Annotated[
        bool | None,
        typer.Option(
            "--rescale-timesteps/--plain-timesteps",
            help="openai: trained with rescale_timesteps; needed where --steps-trained is not 1000.",
        ),
    ] = None,
    steps_trained: Annotated[int | None, typer.Option(help="Timesteps of its training; 1000 unless given.")] = None,
    beta_schedule: Annotated[
        str | None, typer.Option(help="linear unless given; squaredcos_cap_v2 is the cosine schedule.")
    ] = None,
    beta_start: Annotated[
        float | None, typer.Option(help="0.0001 unless given; openai, times 1000 / --steps-trained.")
    ] = None,
    beta_end: Annotated[
        float | None, typer.Option(help="0.02 unless given; openai, times 1000 / --steps-trained.")
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema/--raw", help="Take averaged weights where there are some, or the raw ones.")
    ] = True,
    dtype: options.Dtype = "float32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model in a folder that is not empty.")
    ] = False,
) -> None:
    """Turn a checkpoint of ermongroup/ddim, pytorch_diffusion, improved-diffusion or guided-diffusion into a folder
    that every other command and diffusers load; or write an old diffusers folder as of today.

    The folder is printed. Networks that cannot be expressed exactly are refused, and so are files that could run code.

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
    replaced = sum((folder / name).is_file() for name in FILES)
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
    size = pipe.unet.config.sample_size
    finish(folder, replaced, f"{pipe.unet.num_parameters():,} parameters, sample_size {size}")
