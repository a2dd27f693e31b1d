"""Three kinds of clipping against the number of steps: whether more steps converge, and to what.

    python -m benchmarks.clipping --data mnist/test.parquet --out benchmarks/results

The built-in model's images of 128 seeds by DDIM:

1. Mean squared difference per value in [0, 1] between the images of S steps and of the next larger S.
2. Fréchet distance of the images of S steps to those of `--data`, on the features of the classifier of digits.

Results that `clipping.json` in `--out` has are not measured again; delete it for a new run.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import write_files
from benchmarks.steps import Results
from ddim import DDIMPipeline, DDIMScheduler
from ddim.evaluation.features import load_features
from ddim.evaluation.image_sets import BATCH_SIZE, ImageSet, open_files
from ddim.evaluation.metrics import compute_features, frechet

STEPS = (10, 20, 50, 100, 200, 500)
NUM_IMAGES = 128
KINDS = {
    "nothing": (False, False),
    "the predicted x_0 (`clip_sample`)": (True, False),
    "and epsilon with it (`use_clipped_model_output`)": (True, True),
}
"""`clip_sample` and `use_clipped_model_output`, by what is clipped."""


def measure(
    pipe: DDIMPipeline, use_clipped_model_output: bool, distance: Callable[[ImageSet], float]
) -> dict[str, list[float]]:
    """Sample in all numbers of steps; return the differences between neighbors, and each one's distance to the data."""
    images = [
        pipe(
            seeds=range(NUM_IMAGES),
            num_inference_steps=number,
            use_clipped_model_output=use_clipped_model_output,
            output_type="pt",
        ).images
        for number in STEPS
    ]
    return {
        "differences": [float((a - b).double().square().mean()) for a, b in itertools.pairwise(images)],
        "distances": [distance(as_image_set(samples)) for samples in images],
    }


def as_image_set(images: Tensor) -> ImageSet:
    """Wrap images (N, C, H, W) in [0, 1] as a set, rounded to 8 bits."""
    N, C, H, W = images.shape
    batches = (images * 255).round().to(torch.uint8).split(BATCH_SIZE)
    return ImageSet("samples", (C, H, W), N, batches.__getitem__, from_files=False)


def table(columns: Iterable[Any], rows: dict[str, list[str]]) -> str:
    """Format rows of cells as Markdown, by what is clipped."""
    head = ["clipped", *map(str, columns)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join([name, *cells])} |" for name, cells in rows.items())])


def main() -> None:
    """Measure what is not cached; write and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="images: a parquet file, a folder, ...")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="a folder for clipping.json and clipping.md"
    )
    arguments = parser.parse_args()

    pipe = DDIMPipeline.from_pretrained("mnist")
    pipe.set_progress_bar_config(disable=True)
    extractor = load_features("mnist", pipe.sample_shape)
    real = compute_features(open_files(arguments.data, shape=pipe.sample_shape), extractor)

    def distance(images: ImageSet) -> float:
        return frechet(compute_features(images, extractor).values, real.values)

    results = Results(arguments.out / "clipping.json")
    rows = {}
    for name, (clip_sample, use_clipped) in KINDS.items():
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=clip_sample)
        rows[name] = results.get(name, lambda use_clipped=use_clipped: measure(pipe, use_clipped, distance))
    pairs = [f"{a} to {b}" for a, b in itertools.pairwise(STEPS)]
    differences = {name: [f"{value:.1e}" for value in row["differences"]] for name, row in rows.items()}
    distances = {name: [f"{value:.1f}" for value in row["distances"]] for name, row in rows.items()}
    text = f"{table(pairs, differences)}\n\n{table(STEPS, distances)}\n\ntorch {torch.__version__}\n"
    write_files(arguments.out, {"clipping.md": text})
    print(text)


if __name__ == "__main__":
    main()
