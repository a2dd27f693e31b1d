"""Restoration: errors and Fréchet distances of the methods beside RePaint and bicubic interpolation.

    python -m benchmarks.restoration hole --data mnist/test.parquet
    python -m benchmarks.restoration half super-resolution --data faces/test.parquet --model faces

Problems:

    hole                the middle quarter of the image is missing (14x14 of a digit's 28x28)
    half                the right half is missing
    super-resolution    means of 4x4 pixels are known

Each method restores the first `--count` images of the data, `--samples` times each. The errors are root mean squares
per value in [0, 1] where pixels are missing, or everywhere: of single samples, and of their means, which estimate the
image. PSNR is that of the means. The Fréchet distance is that of the samples to all images of the data.

A method is NAME, NAME:STEPS or NAME:STEPS:LENGTH,REPEATS (`ddim.diffusion.restoration.METHODS`). `repaint` is the one
of its paper, 250 steps and ten times ten back.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.report import write_files
from ddim import DDIMPipeline
from ddim.diffusion.operators import BoxDownsample, LinearOperator, Mask
from ddim.evaluation.features import load_features
from ddim.evaluation.image_sets import BATCH_SIZE, ImageSet, open_files
from ddim.evaluation.metrics import compute_features, frechet
from ddim.io.json_files import to_json

METHODS = ("ddrm", "ddnm:50:1,1", "ddnm", "mmps:20", "mmps", "pigdm", "repaint")
FACTOR = 4


class Problem(NamedTuple):
    """What is measured, and where errors count."""

    operator: LinearOperator
    counted: Tensor


def make_problem(name: str, shape: tuple[int, int, int]) -> Problem:
    """Return a problem for images of a shape."""
    _, H, W = shape
    missing = torch.zeros(H, W, dtype=torch.bool)
    if name == "super-resolution":
        return Problem(BoxDownsample(shape, FACTOR), ~missing)
    if name == "hole":
        missing[H // 4 : H - H // 4, W // 4 : W - W // 4] = True
    else:
        missing[:, W // 2 :] = True
    return Problem(Mask(shape, ~missing), missing)


class Row(NamedTuple):
    """The results of a method."""

    method: str
    evaluations: int
    seconds: float
    sample_error: float
    mean_error: float
    psnr: float
    frechet: float


def parse_method(text: str) -> dict[str, Any]:
    """Return the arguments of `restore`."""
    name, _, rest = text.partition(":")
    steps, _, resampling = rest.partition(":")
    return {
        "method": name,
        "num_inference_steps": int(steps) if steps else None,
        "resampling": tuple(int(part) for part in resampling.split(",")) if resampling else None,
    }


def root_mean_square(difference: Tensor, counted: Tensor) -> float:
    """Return the root mean square over the values of counted pixels, of images in [-1, 1] on the scale of [0, 1]."""
    return float((difference[..., counted] / 2).double().square().mean().sqrt())


def interpolate(measurement: Tensor, size: int) -> Tensor:
    """Return bicubic interpolations by PIL, (N, C, size, size) in [-1, 1]."""
    result = []
    for image in measurement.numpy():
        channels = [np.asarray(Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC)) for c in image]
        result.append(torch.from_numpy(np.stack(channels)))
    return torch.stack(result).clamp(-1, 1)


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="+", choices=("hole", "half", "super-resolution"))
    parser.add_argument("--data", required=True, help="real images, such as mnist/test.parquet")
    parser.add_argument("--model", default="mnist")
    parser.add_argument("--features", help="defaults to the model's name")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    pipe = DDIMPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    shape = pipe.sample_shape
    images = open_files(options.data, shape=shape)
    network = load_features(options.features or options.model, shape)
    reference = compute_features(images, network).values
    first = open_files(options.data, options.count, shape)
    truth = torch.cat(list(first.batches())).float() / 127.5 - 1

    def distance(restored: Tensor) -> float:
        """Return the Fréchet distance of images in [-1, 1] to the data."""
        pixels = ((restored + 1) * 127.5).round().clamp(0, 255).byte().split(BATCH_SIZE)
        restored_set = ImageSet("restored", shape, len(restored), pixels.__getitem__, from_files=False)
        return frechet(compute_features(restored_set, network).values, reference)

    results: dict[str, list[dict[str, Any]]] = {}
    for name in options.problems:
        problem = make_problem(name, shape)
        measurement = problem.operator(truth)
        rows: list[Row] = []
        for method in options.methods:
            arguments = parse_method(method)
            if arguments["method"] == "repaint" and not isinstance(problem.operator, Mask):
                continue
            started = time.perf_counter()
            output = pipe.restore(
                measurement,
                problem.operator,
                output_type="pt",
                samples=options.samples,
                seeds=range(options.count * options.samples),
                **arguments,
            )
            seconds = time.perf_counter() - started
            samples, means = output.images * 2 - 1, output.mean * 2 - 1
            rows.append(
                Row(
                    method,
                    output.nfe,
                    seconds / len(samples),
                    root_mean_square(samples - truth.repeat_interleave(options.samples, 0), problem.counted),
                    root_mean_square(means - truth, problem.counted),
                    -20 * float(np.log10(root_mean_square(means - truth, torch.ones_like(problem.counted)))),
                    distance(samples),
                )
            )
            print(name, rows[-1], flush=True)
        if name == "super-resolution":
            enlarged = interpolate(measurement, shape[2])
            error = root_mean_square(enlarged - truth, problem.counted)
            rows.append(Row("bicubic", 0, 0.0, error, error, -20 * float(np.log10(error)), distance(enlarged)))
            print(name, rows[-1], flush=True)
        results[name] = [row._asdict() for row in rows]
    write_files(options.out, {f"restoration-{options.model}.json": to_json(results)})


if __name__ == "__main__":
    main()
