"""`ddim export`: a step of a training run as a model of its own; models in the formats of other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddim.cli import options
from ddim.cli.common import SamplingOptions, count_model_files, load_pipeline, report_result, with_weights
from ddim.validation import choice, pluralize

FOLDER, ONNX, OPENVINO = FORMATS = ("folder", "onnx", "openvino")
SUFFIXES = {".onnx": ONNX, ".xml": OPENVINO}
"""Formats by the suffixes of their files."""


def choose_format(name: str | None, out: str) -> str:
    """Return the format that a user asks for.

    Args:
        name: the value of `--format`.
        out: that of `--out`, whose suffix names the format where `--format` does not.

    Raises:
        ValueError: for another format.

    Example:
        >>> choose_format(None, "digits.onnx"), choose_format(None, "digits"), choose_format("openvino", "digits.xml")
        ('onnx', 'folder', 'openvino')
    """
    return SUFFIXES.get(Path(out).suffix.lower(), FOLDER) if name is None else choice("--format", name, FORMATS)


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="A training run or one of its checkpoints; for onnx and openvino any model, as --model of other "
            "commands.",
            show_default=False,
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write; or x.onnx, or x.xml with x.bin beside it.")],
    file_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="folder (what ddim and diffusers load), onnx, or openvino; defaults to what the suffix of --out says.",
            show_default=False,
        ),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(help="Step of the checkpoint of a training run; defaults to the newest.", show_default=False),
    ] = None,
    weights: options.Weights = None,
    dtype: options.Dtype = "float32",
    loop: Annotated[
        bool, typer.Option("--loop", help="Export the whole sampling loop, noise to images, not the network alone.")
    ] = False,
    steps: options.Steps = 50,
    spacing: options.Spacing = None,
    timesteps: options.Timesteps = None,
    order: options.Order = None,
    clipped_model_output: options.ClippedModelOutput = False,
    guidance: Annotated[
        float, typer.Option(help="Scale of guidance, of a model with classes: 1 is none, more is more typical images.")
    ] = 1.0,
    negative_label: Annotated[
        str | None, typer.Option(help="Class to guide away from, instead of none: an index or a name.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that exist, or the model in a folder that is not empty.")
    ] = False,
) -> None:
    """Write a model for other programs: a plain folder that ddim and diffusers load, or a file for ONNX or OpenVINO.

    A folder holds a checkpoint of a training run, one set of weights and nothing that training alone needs. A file
    holds the network, or with --loop the whole sampling loop: noise and, for models with classes, labels in, images in
    [0, 1] out. Its weights are of the --dtype, and it computes in float32. What is written is printed.

    Examples:
      ddim export runs/mine --out mine

      ddim export runs/mine --step 20000 --weights raw --dtype float16 --out mine-raw

      ddim export mnist --out mnist.onnx

      ddim export mnist-labels --loop --steps 20 --guidance 1.2 --out digits.xml
    """
    chosen = choose_format(file_format, out)
    if chosen == FOLDER:
        if loop:
            raise ValueError("--loop requires a file as --out, x.onnx or x.xml")
        _export_folder(model, Path(out), step, weights, dtype, overwrite)
        return
    from ddim.export import check_target, export_onnx, export_openvino, target_files

    sampling = SamplingOptions.parse(steps, spacing, timesteps, order=order, clipped_model_output=clipped_model_output)
    path = check_target(out, next(suffix for suffix, name in SUFFIXES.items() if name == chosen), overwrite)
    name = with_weights(model, weights) if step is None else _checkpoint(model, step, weights)
    pipe = load_pipeline(name, "cpu", dtype)
    config = sampling.config(pipe) if loop else None
    num_replaced = sum(file.is_file() for file in target_files(path))
    write = export_onnx if chosen == ONNX else export_openvino
    write(pipe, path, config, guidance_scale=guidance, negative_label=negative_label, overwrite=overwrite)
    what = "the network" if config is None else f"the loop of {pluralize(len(pipe.scheduler.timesteps), 'step')}"
    report_result(path, num_replaced, f"{what}, {pipe.unet.num_parameters():,} parameters, {dtype}")


def _export_folder(run: str, folder: Path, step: int | None, weights: str | None, dtype: str, overwrite: bool) -> None:
    """Write a checkpoint of a training run as a plain pipeline folder."""
    from ddim.devices import choose_dtype
    from ddim.discrete.pipeline import open_pipeline
    from ddim.io.runs import check_model_folder

    target = choose_dtype(dtype)
    check_model_folder(folder, overwrite)
    name = _checkpoint(run, step, weights)
    pipe = open_pipeline(name).to(target)
    num_replaced = count_model_files(folder)
    pipe.save_pretrained(folder)
    checkpoint = Path(name.partition("@")[0]).name
    report_result(folder, num_replaced, f"{checkpoint}, {pipe.unet.num_parameters():,} parameters, {dtype}")


def _checkpoint(model: str, step: int | None, weights: str | None) -> str:
    """Return the name of a checkpoint of a training run, with the variant of its weights."""
    from ddim.io.runs import split_variant
    from ddim.training.averages import find_checkpoint

    name, variant = split_variant(model)
    try:
        checkpoint = find_checkpoint(Path(name), step)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; others are exported to x.onnx or x.xml") from None
    return with_weights(str(checkpoint) if variant is None else f"{checkpoint}@{variant}", weights)
