"""`ddim evaluate`: how good pictures are, in numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ddim.cli import options
from ddim.cli.common import choose_timesteps, load_pipeline, parse_timesteps, with_spacing


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
    table: Annotated[
        int | None,
        typer.Option(help="Of the paper: 1 (Fréchet distance by steps and eta) or 2 (error of encoding and decoding)."),
    ] = None,
    figure: Annotated[int | None, typer.Option(help="Of the paper: 4 (time and quality by steps).")] = None,
    table_steps: Annotated[
        str | None, typer.Option(help="Numbers of steps of a table, such as 10,20,50; the paper's unless given.")
    ] = None,
    steps: options.Steps = 50,
    eta: options.Eta = 0.0,
    seed: options.Seed = 0,
    spacing: options.Spacing = None,
    timesteps: options.Timesteps = None,
    order: options.Order = None,
    sigma_hat: Annotated[
        bool, typer.Option("--sigma-hat", help="Noise with DDPM's larger variance; goes with --eta 1.")
    ] = False,
    out: Annotated[
        list[str] | None,
        typer.Option(
            "--out",
            "-o",
            help="Write the result to a .json, .csv or .md file besides, a table to .json, .md or as a plot to .png or "
            ".svg; can be given again.",
        ),
    ] = None,
    device: options.Device = "auto",
    engine: options.Engine = "auto",
) -> None:
    """Judge pictures by numbers.

    A table is printed, with everything that changes the numbers. Figures with other features than inception compare
    with nobody else's.

    Examples:

      ddim evaluate mnist --reference mnist/test.parquet --features mnist -n 2000

      ddim evaluate pictures/ --reference owner/dataset --metrics fid,kid

      ddim evaluate samples.npz --metrics is --out score.json --out score.md

      ddim evaluate mnist --reference mnist/test.parquet --features mnist -n 500 --table 1 --out t.md --out t.png

      torchrun --nproc-per-node 8 -m ddim evaluate my-model --reference owner/dataset -n 50000
    """
    from ddim import distributed
    from ddim.evaluation import report
    from ddim.evaluation.image_sets import ImageSet, is_model, open_files, sample_image_set

    if table is not None or figure is not None:
        chosen = parse_timesteps(table_steps, "--table-steps")
        where = (samples, distributed.local_device(device), spacing, engine)
        _paper(where, reference, reference_count, split, features, count, seed, table, figure, chosen, out or [])
        return
    if table_steps is not None:
        raise ValueError("--table-steps goes with --table or --figure")
    wanted = [name.strip() for name in metrics.split(",")]
    outputs = report.check_outputs(out or [])
    own_timesteps = parse_timesteps(timesteps)
    settings: dict[str, Any] = {
        "num_inference_steps": steps,
        "eta": eta,
        "order": order,
        "use_sigma_hat": sigma_hat,
    }

    def open_set(source: str, number: int | None, shape: tuple[int, int, int] | None) -> ImageSet:
        if is_model(source):
            pipe = load_pipeline(source, distributed.local_device(device), engine=engine)
            walked = choose_timesteps(pipe, steps, spacing, own_timesteps)
            number = 10_000 if number is None else number
            return sample_image_set(pipe, number, seed, source, timesteps=walked, **settings)
        return open_files(source, number, shape, split)

    first = open_set(samples, count, None)
    second = None if reference is None else open_set(reference, reference_count, first.shape)
    with distributed.init() as group:
        result = report.evaluate(first, second, features, wanted, group)
    if not group.is_main:
        return
    if is_model(samples):
        result["settings"] |= settings | {"timesteps": own_timesteps, "seed": seed, "spacing": spacing}
    for path in outputs:
        report.write_report(result, Path(path))
    print(report.format_table(result))
    for path in outputs:
        print(f"also in {path}", file=sys.stderr)


def _paper(
    where: tuple[str, str, str | None, str],
    reference: str | None,
    reference_count: int | None,
    split: str,
    features: str,
    count: int | None,
    seed: int,
    table: int | None,
    figure: int | None,
    steps: list[int] | None,
    out: list[str],
) -> None:
    """The paper's tables and its figure."""
    from ddim import distributed
    from ddim.evaluation import paper_tables as tables
    from ddim.evaluation.features import load_features
    from ddim.evaluation.image_sets import is_model, open_files
    from ddim.io.atomic import atomic_write
    from ddim.io.image_files import check_output_path
    from ddim.io.json_files import to_json

    if (table, figure) not in ((1, None), (2, None), (None, 4)):
        raise ValueError("give one of --table 1, --table 2 and --figure 4")
    model, device, spacing, engine = where
    if not is_model(model):
        raise ValueError(f"{model} is no model; the paper's tables are of one")
    if reference is None:
        raise ValueError("give the data as --reference: pictures, not a model")
    for path in out:
        check_output_path(path, {".json": "", ".md": "Markdown", ".png": "a plot", ".svg": "a plot"}, False)
    pipe = load_pipeline(model, device, engine=engine)
    if spacing is None and pipe.sample_shape == tables.CIFAR_SHAPE:
        spacing = "quad"
    pipe = with_spacing(pipe, spacing)
    with distributed.init() as group:
        if table == 2:
            pipe.set_progress_bar_config(disable=True)
            images = open_files(reference, 256 if count is None else count, pipe.sample_shape, split)
            result = tables.table_2(pipe, images, steps or tables.TABLE_2_STEPS, group)
        else:
            data = open_files(reference, reference_count, pipe.sample_shape, split)
            extractor = load_features(features, pipe.sample_shape)
            number = 50_000 if count is None else count
            make = tables.table_1 if table == 1 else tables.figure_4
            result = make(pipe, data, extractor, number, seed, steps or tables.TABLE_1_STEPS, group)
    if not group.is_main:
        return
    for path in out:
        if path.endswith((".png", ".svg")):
            tables.plot(result, Path(path))
            continue
        with atomic_write(Path(path)) as temporary:
            text = result.markdown() if path.endswith(".md") else to_json(result.json())
            temporary.write_text(text, encoding="utf-8")
    print(result.markdown(), end="")
