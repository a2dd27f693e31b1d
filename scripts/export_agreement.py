"""Compare exported models with this library, in onnxruntime and OpenVINO.

    python scripts/export_agreement.py                         the networks of all training presets, with random weights
    python scripts/export_agreement.py lsun-bedroom            the network of one preset
    python scripts/export_agreement.py --loop mnist faces      the loops of models, in 5 and 20 steps, from seeds

Prints a row of a Markdown table per model, preset or number of steps: the largest absolute difference, of predictions
for standard Gaussian x_t, or of images in units of 1/255. A network of 114 million parameters takes 3.3 GiB of memory.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import torch

from ddim import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim.diffusion.sampling_config import SamplingConfig
from ddim.export import export_onnx
from ddim.export.openvino_format import convert_model
from ddim.training.config import preset_names, read_preset

Inputs = Mapping[str, np.ndarray]


def largest_errors(pipe: DDIMPipeline, inputs: Inputs, expected: np.ndarray, **settings: Any) -> list[float]:
    """Export a model, run it by onnxruntime and, converted, by OpenVINO, and return the largest differences."""
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(pipe, Path(folder) / "model.onnx", **settings)
        converted = convert_model(onnx.load(path), pipe.dtype)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = [session.run(None, dict(inputs))[0]]
    del session
    compiled = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs.append(next(iter(compiled(dict(inputs)).values())))
    return [float(np.abs(output - expected).max()) for output in outputs]


def compare_network(preset: str, count: int) -> list[float]:
    """Return the errors of the network of a preset, with random weights."""
    torch.manual_seed(0)
    settings = read_preset(preset)
    unet = UNet2DModel.from_config({}, **settings["model"], **class_arguments(settings)).eval()
    pipe = DDIMPipeline(unet, DDIMScheduler())
    sample = torch.randn(count, *pipe.sample_shape)
    inputs = {"sample": sample, "timestep": torch.randint(0, 1000, (count,))}
    if pipe.classes is not None:
        inputs["class_labels"] = torch.arange(count) % pipe.classes.count
    with torch.no_grad():
        expected = unet(*inputs.values()).sample.numpy()
    return largest_errors(pipe, {name: tensor.numpy() for name, tensor in inputs.items()}, expected)


def class_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the classes of a preset that is trained with labels: ten, and the null class."""
    return {"num_class_embeds": 11, "has_null_class": True} if settings["data"].get("labels") else {}


def compare_loop(model: str, steps: int, count: int, dtype: torch.dtype) -> list[float]:
    """Return the errors of the images of a model's loop, in units of 1/255."""
    pipe = DDIMPipeline.from_pretrained(model).to(dtype)
    latents, _ = pipe.sampler.initial_noise(count, seeds=range(count))
    labels = None if pipe.classes is None else torch.arange(count) % pipe.classes.count
    rounded = DDIMPipeline(copy.deepcopy(pipe.unet).float(), pipe.scheduler)  # files compute in float32
    rounded.set_progress_bar_config(disable=True)
    images = rounded(
        batch_size=count, latents=latents, class_labels=labels, num_inference_steps=steps, output_type="pt"
    ).images
    inputs = {"latents": latents.numpy()} | ({} if labels is None else {"class_labels": labels.numpy()})
    errors = largest_errors(pipe, inputs, images.float().numpy(), loop=SamplingConfig(steps))
    return [255 * error for error in errors]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="presets, or with --loop models")
    parser.add_argument("--loop", action="store_true", help="compare the loops of models")
    parser.add_argument("--count", type=int, default=2, help="images")
    parser.add_argument("--dtype", default="float32", help="of the models with --loop: float32, float16 or bfloat16")
    arguments = parser.parse_args()
    rows: Iterable[tuple[str, list[float]]]
    if arguments.loop:
        dtype = getattr(torch, arguments.dtype)
        rows = (
            (f"{model}, {steps} steps, {arguments.dtype}", compare_loop(model, steps, arguments.count, dtype))
            for model in arguments.names
            for steps in (5, 20)
        )
    else:
        rows = ((name, compare_network(name, arguments.count)) for name in arguments.names or preset_names())
    for name, errors in rows:
        print(f"| {name} | {errors[0]:.1e} | {errors[1]:.1e} |", flush=True)


if __name__ == "__main__":
    main()
