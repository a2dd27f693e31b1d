"""`ddim edit`: take images part of the way to noise and sample from there."""

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
    split_model,
)
from ddim.validation import pluralize


def edit(
    images: options.Images,
    out: Annotated[
        str,
        typer.Option(
            "--out", "-o", help="x.png shows the images above their edits; x.npz and a folder get the edits alone."
        ),
    ] = "edited.png",
    strength: Annotated[
        float, typer.Option(help="Fraction of the steps to go back: 0 keeps the image, 1 keeps nothing.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of the first image's noise: seed + i for image i.")] = 0,
    model: options.ModelOption = None,
    steps: options.Steps = 50,
    eta: options.Eta = 0.0,
    spacing: options.Spacing = None,
    timesteps: options.Timesteps = None,
    order: options.Order = None,
    resize: options.Resize = False,
    batch_size: options.LatentBatchSize = 8,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    engine: options.Engine = "auto",
) -> None:
    """Take images part of the way to noise and sample from there (SDEdit).

    The path of the result is printed.

    Examples:
      ddim edit sketch.png --strength 0.6

      ddim edit digits/ --seed 7 --strength 0.4 --out edited/
    """
    from ddim.io.image_files import check_output_path, is_folder_path, output_files, save_image, save_images, stack_rows

    target = check_output_path(out)
    sampling = SamplingOptions.parse(steps, spacing, timesteps, eta=eta, order=order)
    name, paths = split_model(images, model)
    originals = read_images(paths)
    pipe = load_pipeline(name or DEFAULT_MODEL, device, dtype, engine)
    edited = pipe.edit(
        originals,
        strength,
        steps,
        seeds=range(seed, seed + len(originals)),
        eta=sampling.eta,
        timesteps=sampling.choose_timesteps(pipe),
        order=sampling.order,
        resize=resize,
        batch_size=batch_size,
    ).images
    num_replaced = sum(file.exists() for file in output_files(out, len(edited)))
    if target.suffix.lower() == ".png" and not is_folder_path(out):
        save_image(stack_rows([fit_images(pipe, originals), edited]), target)
    else:
        save_images(edited, out)
    report_result(target, num_replaced, pluralize(len(edited), "image"))
