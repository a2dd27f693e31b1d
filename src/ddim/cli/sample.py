"""`ddim sample`: paint pictures."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from ddim.cli import options
from ddim.cli.common import finish, load_pipeline, number, parse_timesteps


def sample(
    model: options.Model = "mnist",
    out: Annotated[
        str,
        typer.Option(
            "--out", "-o", help="x.png is a grid, x.npz holds arr_0 as uint8 NHWC, a folder gets one PNG an image."
        ),
    ] = "samples.png",
    count: options.Count = 16,
    steps: options.Steps = 50,
    eta: options.Eta = 0.0,
    seed: options.Seed = 0,
    batch_size: Annotated[int, typer.Option(help="Pictures painted at once.")] = 64,
    spacing: options.Spacing = None,
    timesteps: options.Timesteps = None,
    order: Annotated[int, typer.Option(help="Of the method; 1 is DDIM.")] = 1,
    sigma_hat: Annotated[
        bool, typer.Option("--sigma-hat", help="Noise with DDPM's larger variance; goes with --eta 1.")
    ] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
) -> None:
    """Paint pictures.

    The path of the result is printed.

    Examples:

      ddim sample                                         # 16 digits, 50 steps, samples.png

      ddim sample --steps 20 --count 64 --out digits.png

      ddim sample --eta 1 --steps 1000 --sigma-hat        # DDPM

      ddim sample -m google/ddpm-cifar10-32 -n 8 --out pictures/
    """
    from ddim.images import check_output_path, output_files, save_images

    target = check_output_path(out)
    own_timesteps = parse_timesteps(timesteps)
    pipe = load_pipeline(model, device, dtype, spacing)
    started = time.monotonic()
    images = pipe.paint(
        count,
        seed,
        batch_size,
        eta=eta,
        num_inference_steps=steps,
        timesteps=own_timesteps,
        order=order,
        use_sigma_hat=sigma_hat,
    )
    seconds = time.monotonic() - started
    replaced = sum(file.exists() for file in output_files(out, count))
    save_images(images, out)
    finish(target, replaced, f"{number(len(images), 'picture')} in {seconds:.1f} s")
