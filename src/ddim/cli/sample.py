"""`ddim sample`: paint pictures."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from ddim.cli import options


def sample(
    model: options.Model = "mnist",
    out: Annotated[
        str,
        typer.Option(
            "--out", "-o", help="x.png is a grid, x.npz holds arr_0 as uint8 NHWC, a folder gets one PNG an image."
        ),
    ] = "samples.png",
    count: Annotated[int, typer.Option("--count", "-n", help="How many pictures.")] = 16,
    steps: Annotated[int, typer.Option(help="Network evaluations a picture: fewer are faster, more are finer.")] = 50,
    eta: Annotated[float, typer.Option(help="0 is DDIM, 1 is DDPM; between them, some noise in each step.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Picture i is painted from seed + i, whatever the batch.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Pictures painted at once.")] = 64,
    spacing: Annotated[
        str | None,
        typer.Option(help="Of the timesteps: leading, trailing, linspace, quad, logsnr; the model's own unless given."),
    ] = None,
    timesteps: Annotated[
        str | None, typer.Option(help="A list of one's own in place of --steps, such as 900,600,300,0.")
    ] = None,
    order: Annotated[int, typer.Option(help="Of the method; 1 is DDIM.")] = 1,
    sigma_hat: Annotated[
        bool, typer.Option("--sigma-hat", help="Noise with DDPM's larger variance; goes with --eta 1.")
    ] = False,
    device: options.Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of the network: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Paint pictures.

    The path of the result is printed.

    Examples:

      ddim sample                                         # 16 digits, 50 steps, samples.png

      ddim sample --steps 20 --count 64 --out digits.png

      ddim sample --eta 1 --steps 1000 --sigma-hat        # DDPM

      ddim sample -m google/ddpm-cifar10-32 -n 8 --out pictures/
    """
    from ddim.devices import choose_device, choose_dtype
    from ddim.images import check_output_path, output_files, save_images
    from ddim.pipeline import DDIMPipeline

    target = check_output_path(out)
    where = choose_device(device), choose_dtype(dtype)
    own_timesteps = None if timesteps is None else parse_timesteps(timesteps)
    pipe = DDIMPipeline.from_pretrained(model).to(*where)
    if spacing is not None:
        pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
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
    note = f"; {number(replaced, 'earlier file')} replaced" if replaced else ""
    print(f"{number(len(images), 'picture')} in {seconds:.1f} s{note}", file=sys.stderr)
    print(target)


def number(n: int, noun: str) -> str:
    """`1 picture`, `2 pictures`."""
    return f"{n} {noun}{'s' * (n != 1)}"


def parse_timesteps(text: str) -> list[int]:
    """`900,600,300,0` as a list; ValueError for anything that is no whole number."""
    try:
        return [int(entry) for entry in text.split(",")]
    except ValueError:
        raise ValueError(f"--timesteps {text!r} is no list of whole numbers such as 900,600,300,0") from None
