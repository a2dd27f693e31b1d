"""`ddim sample`: generate images."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, replace
from typing import Annotated

import typer

from ddim.cli import options
from ddim.cli.common import DEFAULT_MODEL, SamplingOptions, choose_model, load_pipeline, report_result, save_results
from ddim.cli.conditions import NO_CONDITIONS, ConditionOptions, takes_conditions
from ddim.validation import pluralize, shown

MAX_GRID_BYTES = 2**28
"""Pixels of a grid, which is held in memory several times."""
AUTO_TOLERANCE = 0.001
"""Default of `--tolerance`: mean squared error in [0, 1]."""


@takes_conditions
def sample(
    model: options.ModelArgument = None,
    model_option: options.ModelOption = None,
    weights: options.Weights = None,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            help="x.png and x.tiff are grids, a folder gets one file per image, x.npz holds arr_0 (NHWC), x.tar means "
            "WebDataset shards x-000000.tar, ...",
        ),
    ] = "samples.png",
    count: Annotated[
        int | None,
        typer.Option("--count", "-n", help="Number of images; defaults to 16, and to 8 of each of several labels."),
    ] = None,
    steps: Annotated[
        str,
        typer.Option(
            help="Number of function evaluations per image: fewer is faster, more is finer; auto finds the smallest "
            "that meets --tolerance."
        ),
    ] = "50",
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Of --steps auto: mean squared error, in [0, 1], to images of very many steps; defaults to 0.001."
        ),
    ] = None,
    eta: options.Eta = 0.0,
    seed: options.Seed = 0,
    batch_size: Annotated[int, typer.Option(help="Images per network call.")] = 64,
    spacing: options.Spacing = None,
    timesteps: options.Timesteps = None,
    order: options.Order = None,
    sigma_hat: options.SigmaHat = False,
    clipped_model_output: options.ClippedModelOutput = False,
    conditions: ConditionOptions = NO_CONDITIONS,
    scale: options.Scale = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the images in --out and start from the first.")
    ] = False,
    shard_size: Annotated[int, typer.Option(help="Images per tar shard, rounded to whole batches.")] = 1000,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    engine: options.Engine = "auto",
) -> None:
    """Generate images.

    The model defaults to mnist, the built-in model of digits; faces is another, of drawn faces in color.

    The path of the result is printed. A folder, x.npz and x.tar get a manifest, and the same command resumes after an
    interruption; torchrun or accelerate launch share the work among processes.

    Examples:
      ddim sample                                         # 16 digits, 50 steps, samples.png

      ddim sample --steps 20 --count 64 --out digits.png

      ddim sample --model faces --steps 20 --scale 2      # drawn faces, the built-in model in color

      ddim sample --steps auto --order 2                  # as few steps as meet the tolerance

      ddim sample --eta 1 --steps 1000 --sigma-hat        # DDPM

      ddim sample -m runs/digits --label all --guidance 2   # a row per class

      ddim sample -m google/ddpm-cifar10-32 -n 8 --out images/

      torchrun --nproc-per-node 8 -m ddim sample -n 50000 --out digits.npz
    """
    from ddim.bulk import sample_many
    from ddim.distributed import local_device, rank_and_world_size
    from ddim.io.image_files import OUTPUT_SUFFIXES, check_output_path, is_folder_path
    from ddim.pipeline import DDIMPipeline

    target = check_output_path(out, OUTPUT_SUFFIXES | {".tar": "WebDataset shards"})
    sampling = SamplingOptions.parse(
        parse_steps(steps),
        spacing,
        timesteps,
        eta=eta,
        order=order,
        sigma_hat=sigma_hat,
        clipped_model_output=clipped_model_output,
    )
    if sampling.steps is None and (timesteps is not None or spacing is not None or eta):
        raise ValueError("--steps auto requires the model's own timesteps and --eta 0; omit --timesteps and --spacing")
    if sampling.steps is not None and tolerance is not None:
        raise ValueError(f"--tolerance requires --steps auto, got --steps {steps}")
    rank, world_size = rank_and_world_size()
    name = choose_model(model, model_option, DEFAULT_MODEL, weights)
    pipe = load_pipeline(name, local_device(device), dtype, engine, takes_discrete=True)
    if sampling.steps is None and not isinstance(pipe, DDIMPipeline):
        raise ValueError(f"--steps auto requires a model of Gaussian noise, and {name} is discrete; give a number")
    num_labels = conditions.num_labels(pipe)
    if count is None:
        count = 16 if num_labels == 1 else 8 * num_labels
    condition = conditions.condition(pipe, count)
    if target.suffix.lower() in (".png", ".tiff") and not is_folder_path(out):
        check_grid(count, pipe.sample_shape, scale or 1)
    if sampling.steps is None:
        from ddim.tuning import enough_steps

        limit = AUTO_TOLERANCE if tolerance is None else tolerance
        num_steps, error = enough_steps(pipe, limit, order, **conditions.condition(pipe, num_labels))
        sampling = replace(sampling, steps=num_steps)
        if rank == 0:
            print(f"{pluralize(num_steps, 'step')}, mean squared error {error:.1e}", file=sys.stderr)
    settings = asdict(sampling.config(pipe)) | dict(condition)
    started = time.monotonic()
    if is_folder_path(out) or target.suffix.lower() in (".npz", ".tar"):
        result = sample_many(pipe, out, count, seed, batch_size, shard_size, overwrite, **settings)
        summary = f"{pluralize(result.sampled, 'image')} in {time.monotonic() - started:.1f} s"
        if result.done < result.count or result.sampled < result.count:
            summary += f"; {result.done} of {result.count} are complete"
        if rank == 0:
            report_result(target, 0, summary)
        return
    if world_size > 1:
        raise ValueError("a grid requires a single process; several processes require a folder, x.npz or x.tar")
    images = pipe.sample_images(count, seed, batch_size, output_type="np", **settings)
    seconds = time.monotonic() - started
    num_replaced = int(target.exists())
    columns = None if num_labels == 1 else count // num_labels
    note = save_results(pipe, images, out, columns, scale)
    report_result(target, num_replaced, f"{pluralize(len(images), 'image')} in {seconds:.1f} s{note}")


def parse_steps(text: str) -> int | None:
    """Parse the value of `--steps`.

    Args:
        text: an integer, or `auto`.

    Returns:
        The number of steps; `None` for `auto`.

    Raises:
        ValueError: for anything else.

    Example:
        >>> parse_steps("20"), parse_steps("auto")
        (20, None)
    """
    if text == "auto":
        return None
    if len(text) > 20 or not text.removeprefix("-").isdecimal():
        raise ValueError(f"--steps must be an integer or auto, got {shown(text)}")
    return int(text)


def check_grid(count: int, shape: tuple[int, int, int], scale: int = 1) -> None:
    """Check that images fit into one PNG.

    Args:
        count: number of images.
        shape: (C, H, W) of each.
        scale: factor by which they are enlarged.

    Raises:
        ValueError: if there are too many of them.

    Example:
        >>> check_grid(16, (1, 28, 28))
    """
    channels, height, width = shape
    largest = MAX_GRID_BYTES // (channels * height * width * scale**2)
    if count > largest:
        raise ValueError(f"--count must be at most {largest} for a grid, got {count}; write a folder, x.npz or x.tar")
