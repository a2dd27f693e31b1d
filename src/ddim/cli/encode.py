"""`ddim encode` and `ddim decode`: images to latent codes and back."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from ddim.cli import options
from ddim.cli.common import choose_timesteps, finish, load_pipeline, number, parse_timesteps, read_images


def encode(
    images: options.Images,
    out: Annotated[str, typer.Option("--out", "-o", help="codes.npz or codes.safetensors.")] = "codes.npz",
    model: options.Model = "mnist",
    steps: options.Steps = 50,
    spacing: options.Spacing = None,
    timesteps: options.Timesteps = None,
    exact: options.Exact = True,
    tolerance: options.Tolerance = 1e-5,
    max_iterations: options.MaxIterations = 50,
    resize: options.Resize = False,
    batch_size: options.InverseBatch = 8,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    engine: options.Engine = "auto",
) -> None:
    """Turn images into latent codes, from which ddim decode gives them back.

    The codes and the settings they were made with are written; the path is printed.

    Examples:

      ddim encode digit.png --out digit.npz

      ddim encode photos/ --resize --steps 20 --out codes.safetensors
    """
    from ddim.io.fingerprint import model_sha256
    from ddim.io.image_files import check_output_path
    from ddim.io.latent_files import LATENT_SUFFIXES, LatentSettings, save_latents

    target = check_output_path(out, LATENT_SUFFIXES, folder_allowed=False)
    own_timesteps = parse_timesteps(timesteps)
    pictures = read_images(images)
    pipe = load_pipeline(model, device, dtype, engine)
    started = time.monotonic()
    codes = pipe.encode(
        pictures,
        steps,
        exact,
        tolerance,
        max_iterations=max_iterations,
        timesteps=choose_timesteps(pipe, steps, spacing, own_timesteps),
        resize=resize,
        batch_size=batch_size,
    )
    seconds = time.monotonic() - started
    settings = LatentSettings(
        model, model_sha256(pipe), codes.timesteps, exact, tolerance, [float(r) for r in codes.residual]
    )
    replaced = int(target.exists())
    save_latents(target, codes.latents, settings)
    cost = float(codes.evaluations.sum(1).float().mean())
    told = f"{cost:.0f} evaluations an image, mean squared error {float(codes.mse.mean()):.1e}"
    finish(target, replaced, f"{number(len(pictures), 'code')} in {seconds:.1f} s, {told}")


def decode(
    codes: Annotated[str, typer.Argument(help="What ddim encode wrote.", show_default=False)],
    out: Annotated[
        str,
        typer.Option(
            "--out", "-o", help="x.png is a grid, x.npz holds arr_0 as uint8 NHWC, a folder gets one PNG an image."
        ),
    ] = "decoded.png",
    model: options.Model = "mnist",
    steps: Annotated[int | None, typer.Option(help="Those of the codes unless given.")] = None,
    spacing: options.Spacing = None,
    timesteps: options.Timesteps = None,
    force: options.Force = False,
    batch_size: options.InverseBatch = 8,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    engine: options.Engine = "auto",
) -> None:
    """Turn latent codes into pictures: the inverse of ddim encode.

    Codes mean nothing to another model and little along other timesteps: they are refused unless forced. The path of
    the result is printed.

    Examples:

      ddim decode digit.npz --out digit.png

      ddim decode codes.safetensors --steps 20 --force --out pictures/
    """
    from ddim.io.image_files import check_output_path, output_files, save_images
    from ddim.io.latent_files import check_latent_settings, load_latents

    target = check_output_path(out)
    own_timesteps = parse_timesteps(timesteps)
    latents, settings = load_latents(codes)
    pipe = load_pipeline(model, device, dtype, engine)
    walked = settings.timesteps
    if (steps, own_timesteps, spacing) != (None, None, None):
        steps = len(walked) if steps is None else steps
        walked = pipe.latent_timesteps(steps, choose_timesteps(pipe, steps, spacing, own_timesteps))
    check_latent_settings(codes, settings, pipe, walked, force)
    started = time.monotonic()
    pictures = pipe.decode(latents, timesteps=walked, batch_size=batch_size).images
    seconds = time.monotonic() - started
    replaced = sum(file.exists() for file in output_files(out, len(latents)))
    save_images(pictures, out)
    finish(target, replaced, f"{number(len(latents), 'picture')} in {seconds:.1f} s")
