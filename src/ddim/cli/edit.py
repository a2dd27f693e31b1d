"""`ddim edit`: take images part of the way to noise and paint from there."""

from __future__ import annotations

from typing import Annotated

import typer

from ddim.cli import options
from ddim.cli.common import choose_timesteps, finish, load_pipeline, number, parse_timesteps, read_images


def edit(
    images: options.Images,
    out: Annotated[
        str,
        typer.Option(
            "--out", "-o", help="x.png has the images above their edits; x.npz and a folder take the edits alone."
        ),
    ] = "edited.png",
    strength: Annotated[
        float, typer.Option(help="The share of the steps to go back: 0 keeps the image, 1 keeps nothing.")
    ] = 0.5,
    seed: Annotated[
        int | None, typer.Option(help="Cover image i with noise from seed + i; without, it is encoded.")
    ] = None,
    model: options.Model = "mnist",
    steps: options.Steps = 50,
    eta: options.Eta = 0.0,
    spacing: options.Spacing = None,
    timesteps: options.Timesteps = None,
    order: options.Order = None,
    resize: options.Resize = False,
    batch_size: options.InverseBatch = 8,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    engine: options.Engine = "auto",
) -> None:
    """Take images part of the way to noise and sample from there (SDEdit).

    The path of the result is printed.

    Examples:

      ddim edit sketch.png --seed 0 --strength 0.6

      ddim edit digits/ --seed 7 --strength 0.4 --out edited/
    """
    from ddim.io.image_files import check_output_path, is_folder_path, output_files, save_image, save_images, stack_rows
    from ddim.io.images import fit_image

    target = check_output_path(out)
    own_timesteps = parse_timesteps(timesteps)
    pictures = read_images(images)
    pipe = load_pipeline(model, device, dtype, engine)
    edited = pipe.edit(
        pictures,
        strength,
        steps,
        seeds=None if seed is None else range(seed, seed + len(pictures)),
        eta=eta,
        timesteps=choose_timesteps(pipe, steps, spacing, own_timesteps),
        order=order,
        resize=resize,
        batch_size=batch_size,
    ).images
    replaced = sum(file.exists() for file in output_files(out, len(edited)))
    if target.suffix.lower() == ".png" and not is_folder_path(out):
        channels, height, width = pipe.sample_shape
        originals = [fit_image(picture, height, width, channels) for picture in pictures]
        save_image(stack_rows([originals, edited]), target)
    else:
        save_images(edited, out)
    finish(target, replaced, number(len(edited), "picture"))
