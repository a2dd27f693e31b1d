"""`ddim edit`: take images part of the way to noise and sample from there."""

from __future__ import annotations

from typing import Annotated

import typer

from ddim.cli import options
from ddim.cli.common import (
    DEFAULT_MODEL,
    SamplingOptions,
    count_replaced,
    fit_images,
    load_pipeline,
    read_images,
    report_result,
    save_results,
    show_images,
    split_model,
)
from ddim.cli.conditions import NO_CONDITIONS, ConditionOptions, takes_conditions
from ddim.validation import pluralize


@takes_conditions
def edit(
    images: options.Images,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            help="x.png shows images above their edits; x.npz and a folder get the edits alone.",
        ),
    ] = "edited.png",
    strength: Annotated[
        float, typer.Option(help="Fraction of the steps to go back: 0 keeps the image, 1 keeps nothing.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of the first edit's noise: seed + i for edit i.")] = 0,
    count: Annotated[
        int | None,
        typer.Option("--count", "-n", help="Number of edits of a single image; several images have one edit each."),
    ] = None,
    model: options.ModelOption = None,
    weights: options.Weights = None,
    steps: options.Steps = 50,
    eta: options.Eta = 0.0,
    spacing: options.Spacing = None,
    timesteps: options.Timesteps = None,
    order: options.Order = None,
    resize: options.Resize = False,
    scale: options.Scale = None,
    batch_size: options.LatentBatchSize = 8,
    conditions: ConditionOptions = NO_CONDITIONS,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    engine: options.Engine = "auto",
) -> None:
    """Take images part of the way to noise and sample from there (SDEdit).

    The path of the result is printed.

    Examples:
      ddim edit sketch.png --strength 0.6 --count 8

      ddim edit digits/ --seed 7 --strength 0.4 --out edited/
    """
    from ddim.io.image_files import (
        check_output_path,
        enlarge,
        is_folder_path,
        save_image,
        stack_rows,
    )

    target = check_output_path(out)
    sampling = SamplingOptions.parse(steps, spacing, timesteps, eta=eta, order=order)
    name, paths = split_model(images, model, weights)
    originals = read_images(paths)
    if count is not None and len(originals) > 1:
        raise ValueError(f"--count requires a single image, got {len(originals)}")
    num_edits = len(originals) if count is None else count
    pipe = load_pipeline(name or DEFAULT_MODEL, device, dtype, engine)
    num_replaced = count_replaced(pipe, out, num_edits)
    edited = pipe.edit(
        originals,
        strength,
        steps,
        seeds=range(seed, seed + num_edits),
        eta=sampling.eta,
        timesteps=sampling.choose_timesteps(pipe),
        order=sampling.order,
        resize=resize,
        batch_size=batch_size,
        output_type="np",
        **conditions.condition(pipe, num_edits),
    ).images
    if target.suffix.lower() == ".png" and not is_folder_path(out):
        shown = show_images(pipe, edited)
        save_image(enlarge(stack_rows([fit_images(pipe, originals), shown]), shown[0], scale), target)
    else:
        save_results(pipe, edited, out)
    report_result(target, num_replaced, pluralize(len(edited), "image"))
