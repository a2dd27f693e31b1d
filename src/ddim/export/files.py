"""`export_onnx` and `export_openvino`: checks, the graph, the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ddim.diffusion.sampling_config import SamplingConfig
from ddim.export.graphs import Graph, NetworkGraph, StepGraph, check_exportable, float_sampler
from ddim.export.metadata import describe_graph
from ddim.export.onnx_format import make_model
from ddim.export.openvino_format import convert_model
from ddim.extras import require
from ddim.io.atomic import atomic_write, write_folder
from ddim.pipeline import DDIMPipeline
from ddim.sampler import evaluating
from ddim.validation import shown

if TYPE_CHECKING:
    import onnx

ONNX_SUFFIX, OPENVINO_SUFFIX = ".onnx", ".xml"


def export_onnx(
    pipe: DDIMPipeline,
    path: str | os.PathLike[str],
    loop: SamplingConfig | None = None,
    *,
    guidance_scale: float = 1.0,
    negative_label: int | str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model's network, or its whole sampling loop, as an ONNX file of opset 18, with its weights inside.

    The network maps `sample` (N, C, H, W) float32, `timestep` int64 (N,), and for a model with classes `class_labels`
    int64 (N,), to `prediction` (N, C, H, W). The loop maps `latents` (N, C, H, W), the initial noise, and
    `class_labels` to `images` (N, C, H, W), the values that a call of the pipeline returns for `output_type="pt"`: in
    [0, 1], or in the units of other data than 8-bit images. N is free.

    Weights are stored in the network's dtype; all else is float32.

    Args:
        pipe: the model, on the CPU.
        path: the file to write; its name must end in `.onnx`.
        loop: the settings of the loop; `None` for the network alone.
        guidance_scale: w of `ddim.diffusion.guidance`, of a loop with classes.
        negative_label: a class to guide away from, instead of the null class.
        overwrite: replace a file that exists.

    Returns:
        The path.

    Raises:
        ImportError: without the extra `export`.
        FileExistsError: if the file exists and `overwrite` is false.
        ValueError: for a path, a network or settings that cannot be exported, eta above 0 among them.
        TypeError: for a scheduler that does not take the steps of `DDIMScheduler`, or a network that is not a module.

    Example:
        >>> pipe = DDIMPipeline.from_pretrained("mnist")
        >>> export_onnx(pipe, "loop.onnx", SamplingConfig(20, eta=1))
        Traceback (most recent call last):
        ValueError: an exported loop requires eta=0 (deterministic sampling), got eta=1
    """
    target = check_target(path, ONNX_SUFFIX, overwrite)
    model = _convert(pipe, loop, guidance_scale, negative_label)
    with atomic_write(target) as temporary:
        temporary.write_bytes(model.SerializeToString())
    return target


def export_openvino(
    pipe: DDIMPipeline,
    path: str | os.PathLike[str],
    loop: SamplingConfig | None = None,
    *,
    guidance_scale: float = 1.0,
    negative_label: int | str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model's network, or its whole sampling loop, as a model of OpenVINO: `x.xml`, and `x.bin` beside it.

    It is the model of `export_onnx`, converted. Its metadata are the runtime info under `ddim`. On devices whose
    default is another precision, compile it with the hint `INFERENCE_PRECISION_HINT="f32"` for the same numbers.

    Args:
        pipe: as for `export_onnx`, and so are all others.
        path: the file to write; its name must end in `.xml`.
        loop: the settings of the loop; `None` for the network alone.
        guidance_scale: w of `ddim.diffusion.guidance`, of a loop with classes.
        negative_label: a class to guide away from, instead of the null class.
        overwrite: replace files that exist.

    Returns:
        The path.

    Raises:
        ImportError: without the extra `export`.
        FileExistsError: if one of the files exists and `overwrite` is false.
        ValueError: as `export_onnx`.
        TypeError: as `export_onnx`.

    Example:
        >>> export_openvino(DDIMPipeline.from_pretrained("mnist"), "mnist.onnx")
        Traceback (most recent call last):
        ValueError: path must end in .xml, got 'mnist.onnx'
    """
    target = check_target(path, OPENVINO_SUFFIX, overwrite)
    model = _convert(pipe, loop, guidance_scale, negative_label)
    import openvino

    converted = convert_model(model, pipe.dtype)
    with write_folder(target.parent) as temporary:
        openvino.save_model(converted, temporary / target.name, compress_to_fp16=False)
    return target


def check_target(path: str | os.PathLike[str], suffix: str, overwrite: bool) -> Path:
    """Check, before any work, that a file can be written, and that what writes it is installed.

    Args:
        path: the file.
        suffix: that its name must end in.
        overwrite: allow a file that exists.

    Returns:
        The path.

    Raises:
        ImportError: without the extra `export`.
        ValueError: for another suffix.
        FileExistsError: if it, or for OpenVINO the file of its weights, exists and `overwrite` is false.
        FileNotFoundError: if its folder does not exist.
        IsADirectoryError: if it is a folder.

    Example:
        >>> check_target("model.onnx", ".onnx", overwrite=False)
        PosixPath('model.onnx')
    """
    require("export", "onnx", "onnxscript", *(["openvino"] if suffix == OPENVINO_SUFFIX else []))
    target = Path(path)
    if target.suffix != suffix:
        raise ValueError(f"path must end in {suffix}, got {shown(str(target))}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is not a folder")
    for existing in target_files(target):
        if existing.is_dir():
            raise IsADirectoryError(f"{existing} is a folder, not a file")
        if existing.exists() and not overwrite:
            raise FileExistsError(f"{existing} exists; pass overwrite=True to replace it")
    return target


def target_files(target: Path) -> list[Path]:
    """Return the files that an export writes.

    Args:
        target: the file that is named.

    Example:
        >>> [path.name for path in target_files(Path("digits.xml"))]
        ['digits.xml', 'digits.bin']
    """
    return [target, target.with_suffix(".bin")] if target.suffix == OPENVINO_SUFFIX else [target]


def _convert(
    pipe: DDIMPipeline, loop: SamplingConfig | None, guidance_scale: float, negative_label: int | str | None
) -> onnx.ModelProto:
    """Return the ONNX model of the network or the loop."""
    check_exportable(pipe)
    if loop is None and (guidance_scale != 1 or negative_label is not None):
        raise ValueError("guidance is part of a loop: guidance_scale and negative_label require loop")
    sampler = float_sampler(pipe)
    with evaluating(sampler.unet):
        graph: Graph = (
            NetworkGraph(sampler) if loop is None else StepGraph(sampler, loop, guidance_scale, negative_label)
        )
        graph.eval()
        dtype = str(pipe.dtype).removeprefix("torch.")
        return make_model(graph, pipe.dtype, describe_graph(graph, sampler, dtype))
