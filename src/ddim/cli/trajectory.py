"""`ddim trajectory` and `ddim consistency`: one code, looked at over time and over numbers of steps."""

from __future__ import annotations

from typing import Annotated

import typer

from ddim.cli import options
from ddim.cli.common import check_fps, choose_timesteps, finish, load_pipeline, number, parse_timesteps, with_spacing
from ddim.validation import integer


def trajectory(
    out: Annotated[
        str,
        typer.Option("--out", "-o", help="x.png has a row of x_t and one of the predicted x_0; x.gif and x.webp move."),
    ] = "trajectory.png",
    model: options.Model = "mnist",
    count: options.Count = 4,
    seed: options.Seed = 0,
    steps: options.Steps = 50,
    eta: options.Eta = 0.0,
    frames: Annotated[int, typer.Option(help="How many of the steps to show, evenly spread.")] = 10,
    at: Annotated[str | None, typer.Option(help="The timesteps to show, in place of --frames.")] = None,
    spacing: options.Spacing = None,
    timesteps: options.Timesteps = None,
    order: options.Order = None,
    fps: options.Fps = 10.0,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    engine: options.Engine = "auto",
) -> None:
    """Watch pictures appear: x_t and the x_0 predicted from it, step by step, and the end.

    The path of the result is printed.

    Examples:

      ddim trajectory --count 2 --frames 8

      ddim trajectory --count 16 --frames 50 --out appear.gif
    """
    from ddim.io.image_files import (
        ANIMATION_SUFFIXES,
        check_output_path,
        is_animation_path,
        save_animation,
        save_image,
        stack_rows,
    )

    target = check_output_path(out, {".png": ""} | ANIMATION_SUFFIXES, folder_allowed=False)
    check_fps(fps)
    own_timesteps, own_frames = parse_timesteps(timesteps), parse_timesteps(at, "--at")
    integer("--count", count, 1)
    pipe = load_pipeline(model, device, dtype, engine)
    seeds = range(seed, seed + count)
    walked = choose_timesteps(pipe, steps, spacing, own_timesteps)
    shown = pipe.trajectory(count, steps, frames, seeds=seeds, eta=eta, timesteps=walked, order=order, at=own_frames)
    replaced = int(target.exists())
    samples, predicted = [*shown.samples, shown.images], [*shown.pred_original_samples, shown.images]
    if is_animation_path(out):
        save_animation([stack_rows(pair) for pair in zip(samples, predicted, strict=True)], out, fps)
    else:
        rows = [[frame[i] for frame in part] for i in range(count) for part in (samples, predicted)]
        save_image(stack_rows(rows, len(samples)), target)
    finish(target, replaced, f"timesteps {', '.join(map(str, shown.timesteps))}, then the end")


def consistency(
    out: Annotated[
        str, typer.Option("--out", "-o", help="A PNG: a row a number of steps, a column a seed.")
    ] = "consistency.png",
    model: options.Model = "mnist",
    count: options.Count = 8,
    seed: options.Seed = 0,
    steps: Annotated[str, typer.Option(help="Numbers of steps.")] = "10,20,50,100",
    spacing: options.Spacing = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    engine: options.Engine = "auto",
) -> None:
    """Paint the same codes with different numbers of steps: the code decides the picture.

    The path of the result is printed.

    Examples:

      ddim consistency

      ddim consistency --count 12 --steps 5,10,100
    """
    from ddim.diffusion.noise import check_seeds, noise_from_seeds
    from ddim.io.image_files import check_output_path, save_image, stack_rows

    target = check_output_path(out, {".png": ""}, folder_allowed=False)
    integer("--count", count, 1)
    numbers = parse_timesteps(steps, "--steps") or []
    pipe = with_spacing(load_pipeline(model, device, dtype, engine), spacing)
    seeds = check_seeds(range(seed, seed + count), count)
    latents = noise_from_seeds((count, *pipe.sample_shape), seeds, pipe.device)()
    rows = pipe.consistency(latents, numbers)
    replaced = int(target.exists())
    save_image(stack_rows(rows), target)
    finish(target, replaced, f"{number(count, 'code')}, rows of {', '.join(map(str, numbers))} steps")
