"""Quality against the number of steps: DDIM, order 2, learned timesteps and coefficients, students; built-in model.

    python -m benchmarks.steps --data mnist/test.parquet --students mnist-fast --out benchmarks/results

1. Mean squared error per value in [0, 1] of the images of 512 latents to those of 1,000 steps of DDIM from the same
   latents.
2. Fréchet distance of 5,000 images to those of `--data`, on the features of the classifier of digits.

With `--clipping` instead: mean squared differences between the images of S steps of DDIM and of the next larger S, for
three kinds of clipping.

Timesteps are learned with `ddim.tuning.tune`, coefficients with `ddim.coefficients.learn`, both from other latents; the
seconds that the latter took are among the results. Students are those of `ddim distill mnist --out mnist-fast`, one
per number of steps; without them their rows are left out. Results that `steps.json` in `--out` has are not
measured again, so that an interrupted run resumes; delete it for a new run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import write_files
from ddim import DDIMPipeline, DDIMScheduler
from ddim.coefficients import learn
from ddim.diffusion.noise import noise_from_seeds
from ddim.evaluation.features import load_features
from ddim.evaluation.image_sets import open_files, sample_image_set
from ddim.evaluation.metrics import compute_features, frechet
from ddim.io.json_files import to_json
from ddim.tuning import tune

STEPS = (1, 2, 4, 5, 7, 10, 15, 20)
LEARNED = (5, 7, 10, 15, 20)
METHODS = {
    "DDIM": STEPS,
    "order 2": STEPS[1:],
    "order 2, learned timesteps": LEARNED,
    "learned coefficients": LEARNED,
    "students": (1, 2, 4),
}
"""Numbers of steps by method: order 2 in a single step is DDIM."""
SEED = 100_000
"""Of the first latent: far from those that timesteps are learned with."""
BATCH_SIZE = 64


class Results:
    """Numbers by name, cached in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return a cached number, or measure and cache it."""
        if name not in self.values:
            self.values[name] = measure()
            write_files(self.path.parent, {self.path.name: to_json(self.values)})
            print(f"{name}: {self.values[name]}", flush=True)
        return self.values[name]


def with_method(
    pipe: DDIMPipeline, method: str, number: int, results: Results, students: Path | None
) -> tuple[DDIMPipeline, dict[str, Any]]:
    """Return the pipeline, and the arguments of its call, for a method and a number of steps."""
    arguments: dict[str, Any] = {"num_inference_steps": number}
    if method == "students" and students is not None:
        pipe = DDIMPipeline.from_pretrained(students / str(number))
        pipe.set_progress_bar_config(disable=True)
        return pipe, arguments
    if method == "learned coefficients":
        rows = results.get(f"coefficients, {number}", lambda: learn_rows(pipe, number, results))
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config, coefficients_by_steps={str(number): rows})
        pipe = DDIMPipeline(pipe.unet, scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe, arguments
    arguments["order"] = 1 if method == "DDIM" else 2
    if "learned" in method:
        arguments["timesteps"] = results.get(f"timesteps, {number}", lambda: tune(pipe, number).timesteps)
    return pipe, arguments


def learn_rows(pipe: DDIMPipeline, number: int, results: Results) -> list[list[float]]:
    """Learn the coefficients of a number of steps, and note how long it took."""
    started = time.perf_counter()
    rows = learn(pipe, number).rows
    results.get(f"seconds of learning coefficients, {number}", lambda: time.perf_counter() - started)
    return rows


def sample_latents(pipe: DDIMPipeline, count: int, **arguments: Any) -> Tensor:
    """Sample from the first `count` latents; return (count, C, H, W) in [0, 1]."""
    batches = []
    for first in range(0, count, BATCH_SIZE):
        seeds = range(SEED + first, SEED + first + BATCH_SIZE)
        latents = noise_from_seeds((BATCH_SIZE, *pipe.sample_shape), seeds, pipe.device)()
        batches.append(pipe(latents=latents, output_type="pt", **arguments).images)
    return torch.cat(batches)[:count]


def plot(rows: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    """Plot both results over the number of steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, values) in zip(figure.subplots(1, 2), rows.items(), strict=True):
        for method, numbers in values.items():
            axes.plot(list(numbers), list(numbers.values()), marker="o", label=method)
        axes.set(title=title, xlabel="steps", xscale="log", yscale="log")
        axes.set_xticks(STEPS, map(str, STEPS), minor=False)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in "25" else "")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path)


def compare_clipping(pipe: DDIMPipeline, count: int) -> str:
    """Measure whether more steps converge for three kinds of clipping; return a table."""
    numbers = (10, 20, 50, 100, 200, 500)
    kinds = {
        "not at all": (False, False),
        "the predicted x_0 (`clip_sample`)": (True, False),
        "and epsilon with it (`use_clipped_model_output`)": (True, True),
    }
    pairs = list(itertools.pairwise(numbers))
    lines = [f"| clipped | {' | '.join(f'{a} to {b}' for a, b in pairs)} |", "|---" * (1 + len(pairs)) + "|"]
    for name, (clip, use_clipped) in kinds.items():
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=clip)
        settings = {"seeds": range(count), "use_clipped_model_output": use_clipped, "output_type": "pt"}
        images = {S: pipe(num_inference_steps=S, **settings).images for S in numbers}
        values = [float((images[a] - images[b]).double().square().mean()) for a, b in pairs]
        lines.append(f"| {name} | {' | '.join(f'{value:.1e}' for value in values)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not cached; write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="images: a parquet file, a folder, ...")
    parser.add_argument("--students", type=Path, help="folder of `ddim distill mnist --steps 4,2,1`")
    parser.add_argument("--clipping", action="store_true", help="compare kinds of clipping instead")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="a folder for steps.json, steps.md, steps.png"
    )
    parser.add_argument("--latents", type=int, default=512, help="of the mean squared error")
    parser.add_argument("--images", type=int, default=5000, help="of the Fréchet distance")
    arguments = parser.parse_args()

    pipe = DDIMPipeline.from_pretrained("mnist")
    pipe.set_progress_bar_config(disable=True)
    if arguments.clipping:
        print(compare_clipping(pipe, BATCH_SIZE))
        return
    if arguments.data is None:
        parser.error("--data is required")
    results = Results(arguments.out / "steps.json")
    limit: list[Tensor] = []

    def error(method: str, number: int) -> float:
        if not limit:
            limit.append(sample_latents(pipe, arguments.latents, num_inference_steps=1000))
        sampled, settings = with_method(pipe, method, number, results, arguments.students)
        images = sample_latents(sampled, arguments.latents, **settings)
        return float((images - limit[0]).double().square().mean())

    extractor = load_features("mnist", pipe.sample_shape)
    real = compute_features(open_files(arguments.data, shape=pipe.sample_shape), extractor)

    def distance(method: str, number: int) -> float:
        sampled, settings = with_method(pipe, method, number, results, arguments.students)
        generated = sample_image_set(sampled, arguments.images, name=f"{method}, {number}", **settings)
        return frechet(compute_features(generated, extractor).values, real.values)

    titles = {
        f"mean squared error to 1,000 steps, {arguments.latents} latents": error,
        f"Fréchet distance, {arguments.images:,} images": distance,
    }
    methods = {method: numbers for method, numbers in METHODS.items() if arguments.students or method != "students"}
    rows = {
        title: {
            method: {n: results.get(f"{title}: {method}, {n}", lambda m=measure, a=(method, n): m(*a)) for n in numbers}
            for method, numbers in methods.items()
        }
        for title, measure in titles.items()
    }
    lines = [f"| {' | '.join(['', 'steps', *map(str, STEPS)])} |", "|---" * (2 + len(STEPS)) + "|"]
    for title, values in rows.items():
        for method, numbers in values.items():
            cells = [f"{numbers[n]:.3g}" if n in numbers else "" for n in STEPS]
            lines.append(f"| {' | '.join([title, method, *cells])} |")
    lines += ["", f"torch {torch.__version__}", ""]
    write_files(arguments.out, {"steps.md": "\n".join(lines)})
    plot(rows, arguments.out / "steps.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
