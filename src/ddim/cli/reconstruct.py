"""`ddim reconstruct`: how well images survive latent space."""

from __future__ import annotations

from typing import Annotated

import typer

from ddim.cli import options
from ddim.cli.common import (
    choose_timesteps,
    finish,
    fit_images,
    load_pipeline,
    number,
    parse_timesteps,
    read_images,
)


def reconstruct(
    images: options.Images,
    out: Annotated[
        str, typer.Option("--out", "-o", help="The images above what came back of them, a PNG.")
    ] = "reconstructed.png",
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
    """Encode images, decode their codes, and tell the error.

    A table is printed, with the mean squared error per value in [0, 1], the peak signal-to-noise ratio in dB, the
    network evaluations spent on encoding and the largest residual of a step; then the path of the picture.

    Examples:

      ddim reconstruct digits/ --out side_by_side.png

      ddim reconstruct digits/ --euler --steps 20
    """
    from ddim.io.image_files import check_output_path, save_image, stack_rows

    target = check_output_path(out, {".png": ""}, folder_allowed=False)
    own_timesteps = parse_timesteps(timesteps)
    pictures = read_images(images)
    pipe = load_pipeline(model, device, dtype, engine)
    result = pipe.reconstruct(
        pictures,
        steps,
        exact,
        tolerance,
        max_iterations=max_iterations,
        timesteps=choose_timesteps(pipe, steps, spacing, own_timesteps),
        resize=resize,
        batch_size=batch_size,
    )
    spent, residual = result.codes.evaluations.sum(1), result.codes.residual
    print("image       mse   psnr  evaluations  residual")
    for index in range(len(pictures)):
        print(
            f"{index:5d}  {result.mse[index]:.2e}  {result.psnr[index]:5.1f}  {spent[index]:11d}  {residual[index]:.2e}"
        )
    mean = result.mse.mean(), result.psnr.mean(), spent.double().mean(), residual.mean()
    print(" mean  {:.2e}  {:5.1f}  {:11.0f}  {:.2e}".format(*mean))
    replaced = int(target.exists())
    save_image(stack_rows([fit_images(pipe, pictures), result.images]), target)
    finish(target, replaced, number(len(pictures), "image"))
