"""`ddim encode` and `ddim decode`: images to latents and back."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated, Any

import typer

from ddim.cli import options
from ddim.cli.common import (
    DEFAULT_MODEL,
    SamplingOptions,
    count_replaced,
    load_latents_pipeline,
    load_pipeline,
    read_images,
    report_result,
    save_results,
    split_model,
)
from ddim.cli.conditions import NO_CONDITIONS, ConditionOptions, takes_conditions
from ddim.validation import pluralize, real, shown


@takes_conditions
def encode(
    images: options.Images,
    out: Annotated[
        str, typer.Option("--out", "-o", help="File of latents to write: x.npz or x.safetensors.")
    ] = "codes.npz",
    model: options.ModelOption = None,
    weights: options.Weights = None,
    steps: options.Steps = 50,
    spacing: options.Spacing = None,
    timesteps: options.Timesteps = None,
    exact: options.Exact = True,
    tolerance: options.Tolerance = 1e-5,
    max_iterations: options.MaxIterations = 50,
    resize: options.Resize = False,
    batch_size: options.LatentBatchSize = 8,
    conditions: ConditionOptions = NO_CONDITIONS,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    engine: options.Engine = "auto",
) -> None:
    """Encode images as latents, from which ddim decode restores them.

    The latents are written with the settings that made them; the path is printed.

    Examples:
      ddim encode digit.png --out digit.npz

      ddim encode photos/ --resize --steps 20 --out codes.safetensors
    """
    from ddim.io.fingerprint import model_sha256
    from ddim.io.image_files import check_output_path
    from ddim.io.latent_files import LATENT_SUFFIXES, LatentSettings, save_latents

    target = check_output_path(out, LATENT_SUFFIXES, folder_allowed=False)
    sampling = SamplingOptions.parse(steps, spacing, timesteps)
    name, paths = split_model(images, model, weights)
    originals = read_images(paths)
    pipe = load_pipeline(name or DEFAULT_MODEL, device, dtype, engine)
    started = time.monotonic()
    condition: Any = conditions.record(pipe, len(originals))
    result = pipe.encode(
        originals,
        steps,
        exact,
        tolerance,
        max_iterations=max_iterations,
        timesteps=sampling.choose_timesteps(pipe),
        resize=resize,
        batch_size=batch_size,
        **condition or {},
    )
    seconds = time.monotonic() - started
    residual = [float(entry) for entry in result.residual]
    settings = LatentSettings(
        name or DEFAULT_MODEL,
        model_sha256(pipe),
        result.timesteps,
        exact,
        tolerance,
        residual,
        condition=condition,
    )
    num_replaced = int(target.exists())
    save_latents(target, result.latents, settings)
    nfe = float(result.evaluations.sum(1).float().mean())
    summary = f"{pluralize(len(originals), 'latent')} in {seconds:.1f} s, {nfe:.0f} function evaluations per image"
    report_result(target, num_replaced, f"{summary}, mean squared error {float(result.mse.mean()):.1e}")


@takes_conditions
def decode(
    codes: Annotated[list[str], typer.Argument(help="File of latents that ddim encode wrote.", show_default=False)],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            help="x.png and x.tiff are grids, x.npz holds arr_0 (NHWC), a folder gets one file per image.",
        ),
    ] = "decoded.png",
    direction: Annotated[
        str | None,
        typer.Option(help="File that ddim direction wrote: added to the latents, whose norms are kept (experimental)."),
    ] = None,
    strength: Annotated[float, typer.Option(help="Multiple of the --direction that is added.")] = 1.0,
    model: options.ModelOption = None,
    weights: options.Weights = None,
    steps: Annotated[
        int | None, typer.Option(help="Number of function evaluations per image; defaults to that of the latents.")
    ] = None,
    spacing: options.Spacing = None,
    timesteps: options.Timesteps = None,
    force: options.Force = False,
    scale: options.Scale = None,
    batch_size: options.LatentBatchSize = 8,
    conditions: ConditionOptions = NO_CONDITIONS,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    engine: options.Engine = "auto",
) -> None:
    """Decode latents into images: the inverse of ddim encode, by the model that the file names.

    Latents of another model or of other timesteps are refused without --force: they decode to other images. Classes and
    guidance default to those of the encoding; another --label edits the image. The path of the result is printed.

    Examples:
      ddim decode digit.npz --out digit.png

      ddim decode codes.safetensors --steps 20 --force --out images/

      ddim decode digits.npz --direction three.safetensors --strength 3
    """
    from ddim.diffusion.interpolation import add_direction
    from ddim.io.image_files import check_output_path
    from ddim.io.latent_files import check_latent_settings, load_latents

    target = check_output_path(out)
    sampling = SamplingOptions.parse(steps, spacing, timesteps)
    name, files = split_model(codes, model, weights)
    if len(files) > 1:
        raise ValueError(f"give one file of latents, got {shown(files[0])} and {shown(files[1])}")
    file = files[0]
    latents, settings = load_latents(file)
    pipe = load_latents_pipeline(file, settings, name, device, dtype, engine)
    num_replaced = count_replaced(pipe, out, len(latents))
    chosen = settings.timesteps
    if sampling != SamplingOptions(None):
        num_steps = len(chosen) if steps is None else steps
        chosen = pipe.latent_timesteps(num_steps, replace(sampling, steps=num_steps).choose_timesteps(pipe))
    check_latent_settings(file, settings, pipe, chosen, force)
    if direction is not None:
        directions, direction_settings = load_latents(direction, "direction")
        check_latent_settings(direction, direction_settings, pipe, chosen, force)
        latents = add_direction(latents, directions[0], real("strength", strength))
    started = time.monotonic()
    condition: Any = settings.condition or {}
    if conditions != NO_CONDITIONS:
        condition = conditions.condition(pipe, len(latents))
    images = pipe.decode(latents, timesteps=chosen, batch_size=batch_size, output_type="np", **condition).images
    seconds = time.monotonic() - started
    note = save_results(pipe, images, out, scale=scale)
    summary = f"{pluralize(len(latents), 'image')} in {seconds:.1f} s, {pluralize(len(chosen), 'step')}"
    named = f" of the model {shown(settings.model)}, which {file} names" if name is None else ""
    report_result(target, num_replaced, f"{summary}{named}{note}")
