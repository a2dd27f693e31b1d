"""`ddim evaluate`: how good pictures are, in numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ddim.cli import options
from ddim.cli.common import load_pipeline, parse_timesteps


def evaluate(
    samples: Annotated[
        str,
        typer.Argument(
            help="What is judged: a model (mnist, a folder), which paints --count pictures; or pictures: a folder, an "
            ".npz or parquet file, tar shards, a data set."
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(help="What it is compared with: pictures, or a model. Needed for all but the inception score."),
    ] = None,
    metrics: Annotated[str, typer.Option(help="Some of fid,kid,is,precision,recall.")] = "fid,kid,precision,recall",
    features: Annotated[
        str, typer.Option(help="pixels, mnist (a classifier of digits), inception, or a TorchScript file.")
    ] = "inception",
    count: Annotated[
        int | None,
        typer.Option("--count", "-n", help="How many pictures: of a model, 10000 unless given; of files, all."),
    ] = None,
    reference_count: Annotated[int | None, typer.Option(help="How many of the reference; all unless given.")] = None,
    split: Annotated[str, typer.Option(help="Of data sets on the hub.")] = "train",
    steps: options.Steps = 50,
    eta: options.Eta = 0.0,
    seed: options.Seed = 0,
    spacing: options.Spacing = None,
    timesteps: options.Timesteps = None,
    sigma_hat: Annotated[
        bool, typer.Option("--sigma-hat", help="Noise with DDPM's larger variance; goes with --eta 1.")
    ] = False,
    out: Annotated[
        list[str] | None,
        typer.Option("--out", "-o", help="Write the result to a .json, .csv or .md file besides; can be given again."),
    ] = None,
    device: options.Device = "auto",
) -> None:
    """Judge pictures by numbers.

    A table is printed, with everything that changes the numbers. Figures with other features than inception compare
    with nobody else's.

    Examples:

      ddim evaluate mnist --reference mnist/test.parquet --features mnist -n 2000

      ddim evaluate pictures/ --reference owner/dataset --metrics fid,kid

      ddim evaluate samples.npz --metrics is --out score.json --out score.md
    """
    from ddim.evaluation.report import check_outputs, describe, table, write
    from ddim.evaluation.sets import ImageSet, is_model, open_files, paint_set

    wanted = [name.strip() for name in metrics.split(",")]
    outputs = check_outputs(out or [])
    settings: dict[str, Any] = {
        "num_inference_steps": steps,
        "eta": eta,
        "timesteps": parse_timesteps(timesteps),
        "use_sigma_hat": sigma_hat,
    }

    def open_set(source: str, number: int | None, shape: tuple[int, int, int] | None) -> ImageSet:
        if is_model(source):
            pipe = load_pipeline(source, device, spacing=spacing)
            return paint_set(pipe, 10_000 if number is None else number, seed, source, **settings)
        return open_files(source, number, shape, split)

    first = open_set(samples, count, None)
    second = None if reference is None else open_set(reference, reference_count, first.shape)
    result = describe(first, second, features, wanted)
    if is_model(samples):
        result["settings"] |= settings | {"seed": seed, "spacing": spacing}
    for path in outputs:
        write(result, Path(path))
    print(table(result))
    for path in outputs:
        print(f"also in {path}", file=sys.stderr)
