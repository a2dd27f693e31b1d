"""`ddim trajectory` and `ddim consistency`: the same latents over the timesteps and over numbers of steps."""

from __future__ import annotations

from typing import Annotated

import typer

from ddim.cli import options
from ddim.cli.common import (
    DEFAULT_MODEL,
    SamplingOptions,
    check_fps,
    choose_model,
    load_pipeline,
    parse_integers,
    report_result,
    show_images,
    with_spacing,
)
from ddim.cli.conditions import NO_CONDITIONS, ConditionOptions, takes_conditions
from ddim.validation import integer, pluralize


@takes_conditions
def trajectory(
    model: options.ModelArgument = None,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            help="x.png has a row of x_t and one of the predicted x_0 per seed; x.gif and x.webp are animations.",
        ),
    ] = "trajectory.png",
    model_option: options.ModelOption = None,
    weights: options.Weights = None,
    count: options.Count = 4,
    seed: options.Seed = 0,
    steps: options.Steps = 50,
    eta: options.Eta = 0.0,
    frames: Annotated[int, typer.Option(help="Number of steps to show, evenly spaced.")] = 10,
    at: Annotated[str | None, typer.Option(help="Timesteps to show instead of --frames, such as 900,500,0.")] = None,
    spacing: options.Spacing = None,
    timesteps: options.Timesteps = None,
    order: options.Order = None,
    fps: options.Fps = 10.0,
    scale: options.Scale = None,
    conditions: ConditionOptions = NO_CONDITIONS,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    engine: options.Engine = "auto",
) -> None:
    """Show how images form: x_t and the x_0 predicted from it, step by step, and the result.

    The path of the result is printed.

    Examples:
      ddim trajectory --count 2 --frames 8

      ddim trajectory --count 16 --frames 50 --out appear.gif
    """
    from ddim.io.image_files import (
        ANIMATION_SUFFIXES,
        check_output_path,
        enlarge,
        is_animation_path,
        save_animation,
        save_image,
        stack_rows,
    )

    target = check_output_path(out, {".png": ""} | ANIMATION_SUFFIXES, folder_allowed=False)
    check_fps(fps)
    sampling = SamplingOptions.parse(steps, spacing, timesteps, eta=eta, order=order)
    frame_timesteps = None if at is None else parse_integers(at, "--at")
    integer("--count", count, 1)
    pipe = load_pipeline(choose_model(model, model_option, DEFAULT_MODEL, weights), device, dtype, engine)
    result = pipe.trajectory(
        count,
        steps,
        frames,
        seeds=range(seed, seed + count),
        eta=sampling.eta,
        timesteps=sampling.choose_timesteps(pipe),
        order=sampling.order,
        at=frame_timesteps,
        output_type="np",
        **conditions.condition(pipe, count),
    )
    num_replaced = int(target.exists())
    samples, predicted = (
        [show_images(pipe, images) for images in (*states, result.images)]
        for states in (result.samples, result.pred_original_samples)
    )
    tile = samples[-1][0]
    if is_animation_path(out):
        pairs = [stack_rows(pair) for pair in zip(samples, predicted, strict=True)]
        save_animation([enlarge(pair, tile, scale) for pair in pairs], out, fps)
    else:
        rows = [[frame[i] for frame in part] for i in range(count) for part in (samples, predicted)]
        save_image(enlarge(stack_rows(rows, len(samples)), tile, scale), target)
    report_result(target, num_replaced, f"timesteps {', '.join(map(str, result.timesteps))}, then the result")


@takes_conditions
def consistency(
    model: options.ModelArgument = None,
    out: Annotated[
        str, typer.Option("--out", "-o", help="PNG to write: one row per number of steps, one column per seed.")
    ] = "consistency.png",
    model_option: options.ModelOption = None,
    weights: options.Weights = None,
    count: options.Count = 8,
    seed: options.Seed = 0,
    steps: Annotated[str, typer.Option(help="Numbers of steps, separated by commas.")] = "10,20,50,100",
    spacing: options.Spacing = None,
    scale: options.Scale = None,
    conditions: ConditionOptions = NO_CONDITIONS,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    engine: options.Engine = "auto",
) -> None:
    """Sample the same latents with different numbers of steps: the latent decides the image.

    The path of the result is printed.

    Examples:
      ddim consistency

      ddim consistency --count 12 --steps 5,10,100
    """
    from ddim.diffusion.noise import check_seeds, noise_from_seeds
    from ddim.io.image_files import check_output_path, enlarge, save_image, stack_rows

    target = check_output_path(out, {".png": ""}, folder_allowed=False)
    integer("--count", count, 1)
    numbers_of_steps = parse_integers(steps, "--steps", "10,20,50")
    name = choose_model(model, model_option, DEFAULT_MODEL, weights)
    pipe = with_spacing(load_pipeline(name, device, dtype, engine), spacing)
    seeds = check_seeds(range(seed, seed + count), count)
    latents = noise_from_seeds((count, *pipe.sample_shape), seeds, pipe.device)()
    rows = [
        show_images(pipe, images)
        for images in pipe.consistency(latents, numbers_of_steps, output_type="np", **conditions.condition(pipe, count))
    ]
    num_replaced = int(target.exists())
    save_image(enlarge(stack_rows(rows), rows[0][0], scale), target)
    summary = f"{pluralize(count, 'latent')}, rows of {', '.join(map(str, numbers_of_steps))} steps"
    report_result(target, num_replaced, summary)
