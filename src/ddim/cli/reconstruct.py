"""`ddim reconstruct`: how well images survive latent space."""

from __future__ import annotations

from typing import Annotated

import typer

from ddim.cli import options
from ddim.cli.common import (
    DEFAULT_MODEL,
    SamplingOptions,
    fit_images,
    load_pipeline,
    read_images,
    report_result,
    show_images,
    split_model,
)
from ddim.cli.conditions import NO_CONDITIONS, ConditionOptions, takes_conditions
from ddim.validation import pluralize


@takes_conditions
def reconstruct(
    images: options.Images,
    out: Annotated[
        str, typer.Option("--out", "-o", help="PNG to write: the images above their reconstructions.")
    ] = "reconstructed.png",
    model: options.ModelOption = None,
    weights: options.Weights = None,
    steps: options.Steps = 50,
    spacing: options.Spacing = None,
    timesteps: options.Timesteps = None,
    exact: options.Exact = True,
    method: Annotated[
        str,
        typer.Option(
            help="Of exact encoding: solve, each step's equation, or pair, which keeps two states for about one "
            "evaluation per step."
        ),
    ] = "solve",
    tolerance: options.Tolerance = 1e-5,
    max_iterations: options.MaxIterations = 50,
    resize: options.Resize = False,
    scale: options.Scale = None,
    batch_size: options.LatentBatchSize = 8,
    conditions: ConditionOptions = NO_CONDITIONS,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    engine: options.Engine = "auto",
) -> None:
    """Encode images, decode their latents, and report the error.

    A table is printed, with the mean squared error per value in [0, 1], the peak signal-to-noise ratio in dB, the
    function evaluations spent on encoding and the largest residual of a step; then the path of the PNG.

    Examples:
      ddim reconstruct digits/ --out side_by_side.png

      ddim reconstruct digits/ --euler --steps 20

      ddim reconstruct digits/ --method pair --steps 20
    """
    from ddim.io.image_files import check_output_path, enlarge, save_image, stack_rows

    target = check_output_path(out, {".png": ""}, folder_allowed=False)
    sampling = SamplingOptions.parse(steps, spacing, timesteps)
    name, paths = split_model(images, model, weights)
    originals = read_images(paths)
    pipe = load_pipeline(name or DEFAULT_MODEL, device, dtype, engine)
    result = pipe.reconstruct(
        originals,
        steps,
        exact,
        tolerance,
        max_iterations=max_iterations,
        timesteps=sampling.choose_timesteps(pipe),
        resize=resize,
        batch_size=batch_size,
        method=method,
        output_type="np",
        **conditions.condition(pipe, len(originals)),
    )
    nfe, residual = result.codes.evaluations.sum(1), result.codes.residual
    print("image       mse   psnr  evaluations  residual")
    for index in range(len(originals)):
        print(
            f"{index:5d}  {result.mse[index]:.2e}  {result.psnr[index]:5.1f}  {nfe[index]:11d}  {residual[index]:.2e}"
        )
    mean = result.mse.mean(), result.psnr.mean(), nfe.double().mean(), residual.mean()
    print(" mean  {:.2e}  {:5.1f}  {:11.0f}  {:.2e}".format(*mean))
    num_replaced = int(target.exists())
    shown = show_images(pipe, result.images)
    save_image(enlarge(stack_rows([fit_images(pipe, originals), shown]), shown[0], scale), target)
    report_result(target, num_replaced, pluralize(len(originals), "image"))
