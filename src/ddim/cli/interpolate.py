"""`ddim interpolate`: pictures between pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddim.cli import options
from ddim.cli.common import check_fps, choose_timesteps, finish, load_pipeline, number, read_images
from ddim.validation import integer

if TYPE_CHECKING:
    from torch import Tensor

    from ddim.pipeline import DDIMPipeline


def interpolate(
    points: Annotated[
        list[str],
        typer.Argument(help="Two or more of: an image, a file of codes, a seed.", show_default=False),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out", "-o", help="x.png is a strip, a row a leg; x.gif and x.webp are animations; or a folder."
        ),
    ] = "interpolation.png",
    frames: Annotated[int, typer.Option(help="Of each leg from point to point, both ends included.")] = 11,
    closed: Annotated[bool, typer.Option("--closed", help="Come back to the first point.")] = False,
    grid: Annotated[
        str | None, typer.Option(help="ROWSxCOLUMNS between four points, the corners, in place of a path.")
    ] = None,
    fps: options.Fps = 10.0,
    model: options.Model = "mnist",
    steps: Annotated[int | None, typer.Option(help="Those of the codes, or else 50, unless given.")] = None,
    spacing: options.Spacing = None,
    resize: options.Resize = False,
    force: options.Force = False,
    batch_size: options.InverseBatch = 8,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    engine: options.Engine = "auto",
) -> None:
    """Walk from point to point in latent space, by spherical interpolation, and paint what lies there.

    Images are encoded exactly, so that the walk passes through them. The path of the result is printed.

    Examples:

      ddim interpolate 3 14 --out strip.png

      ddim interpolate one.png seven.png 3 --frames 25 --closed --out walk.gif

      ddim interpolate 1 2 3 4 --grid 8x8 --out grid.png
    """
    from ddim.io.image_files import (
        ANIMATION_SUFFIXES,
        OUTPUT_SUFFIXES,
        check_output_path,
        is_folder_path,
        output_files,
        save_animation,
        save_image,
        save_images,
        stack_rows,
    )

    target = check_output_path(out, OUTPUT_SUFFIXES | ANIMATION_SUFFIXES)
    check_fps(fps)
    integer("--frames", frames, 2)
    shape = parse_grid(grid)
    if shape is not None and closed:
        raise ValueError("--closed is for paths; a --grid has no end to close")
    pipe = load_pipeline(model, device, dtype, engine)
    codes, timesteps = collect_codes(pipe, points, shape is not None, steps, spacing, resize, force, batch_size)
    pictures = pipe.interpolate(
        codes,
        frames=frames if shape is None else shape,
        closed=closed,
        timesteps=timesteps,
        batch_size=batch_size,
    ).images
    replaced = sum(file.exists() for file in output_files(out, len(pictures)))
    suffix = "" if is_folder_path(out) else target.suffix.lower()
    if suffix in ANIMATION_SUFFIXES:
        save_animation(pictures, out, fps)
    elif suffix == ".png" and shape is None:
        ends = range(0, len(pictures) if closed else len(pictures) - 1, frames - 1)
        around = [*pictures, pictures[0]]
        save_image(stack_rows([around[end : end + frames] for end in ends], frames), target)
    else:
        save_images(pictures, out, columns=shape and shape[1])
    finish(target, replaced, number(len(pictures), "frame"))


def parse_grid(text: str | None) -> tuple[int, int] | None:
    """`8x6` as (8, 6)."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) >= 2 for part in parts):
        raise ValueError(f"--grid {text!r} is not ROWSxCOLUMNS, such as 8x8, each at least 2")
    return int(parts[0]), int(parts[1])


def collect_codes(
    pipe: DDIMPipeline,
    points: list[str],
    grid: bool,
    steps: int | None,
    spacing: str | None,
    resize: bool,
    force: bool,
    batch_size: int,
) -> tuple[list[Tensor], list[int]]:
    """The codes of all points, in order, and the timesteps that belong to them."""
    from ddim.diffusion.noise import check_seeds, noise_from_seeds
    from ddim.io.latent_files import LATENT_SUFFIXES, check_latent_settings, load_latents
    from ddim.validation import integer

    files = {point: load_latents(point) for point in points if Path(point).suffix.lower() in LATENT_SUFFIXES}
    seeds = {point: int(point) for point in points if point.removeprefix("-").isdecimal()}
    check_seeds([integer("a seed", seed, 0) for seed in seeds.values()], len(seeds))
    names = [point for point in points if point not in files and point not in seeds]
    images = {name: read_images([name]) for name in names}
    if steps is None and spacing is None and files:
        timesteps = next(iter(files.values()))[1].timesteps
    else:
        steps = 50 if steps is None else steps
        timesteps = pipe.latent_timesteps(steps, choose_timesteps(pipe, steps, spacing, None))
    for name, (_, settings) in files.items():
        check_latent_settings(name, settings, pipe, timesteps, force)
    for name, (latents, _) in files.items():
        if latents.shape[1:] != pipe.sample_shape:
            raise ValueError(
                f"{name} holds codes of shape {tuple(latents.shape[1:])}; the model takes {pipe.sample_shape}"
            )
    count = sum(len(files[p][0]) if p in files else len(images.get(p, "1")) for p in points)
    if count < 2:
        raise ValueError("one point was given; an interpolation has at least two")
    if grid and count != 4:
        raise ValueError(f"a grid lies between four points, its corners; {count} were given")
    codes: dict[str, list[Tensor]] = {name: list(latents.to(pipe.device)) for name, (latents, _) in files.items()}
    if images:
        flat = [image for group in images.values() for image in group]
        found = iter(pipe.encode(flat, timesteps=timesteps, resize=resize, batch_size=batch_size).latents)
        codes |= {name: [next(found) for _ in group] for name, group in images.items()}
    for name, seed in seeds.items():
        codes[name] = list(noise_from_seeds((1, *pipe.sample_shape), [seed], pipe.device)())
    return [code for point in points for code in codes[point]], timesteps
