"""`ddim export`: a step of a training run as a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddim.cli import options
from ddim.cli.common import count_model_files, report_result, with_weights


def export(
    run: Annotated[str, typer.Argument(help="The folder of a training run.", show_default=False)],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write.", show_default=False)],
    step: Annotated[
        int | None, typer.Option(help="Step of the checkpoint; defaults to the newest.", show_default=False)
    ] = None,
    weights: options.Weights = None,
    dtype: options.Dtype = "float32",
    overwrite: options.OverwriteModel = False,
) -> None:
    """Write a checkpoint of a training run as a plain pipeline folder, which ddim and diffusers load.

    The folder is printed. It holds one set of weights and nothing that training alone needs.

    Examples:
      ddim export runs/mine --out mine

      ddim export runs/mine --step 20000 --weights raw --dtype float16 --out mine-raw
    """
    from ddim.devices import choose_dtype
    from ddim.discrete.pipeline import open_pipeline
    from ddim.io.runs import check_model_folder, split_variant
    from ddim.training.averages import find_checkpoint

    target = choose_dtype(dtype)
    folder = Path(out)
    check_model_folder(folder, overwrite)
    name, variant = split_variant(run)
    checkpoint = find_checkpoint(Path(name), step)
    model = str(checkpoint) if variant is None else f"{checkpoint}@{variant}"
    pipe = open_pipeline(with_weights(model, weights)).to(target)
    num_replaced = count_model_files(folder)
    pipe.save_pretrained(folder)
    report_result(folder, num_replaced, f"{checkpoint.name}, {pipe.unet.num_parameters():,} parameters, {dtype}")
