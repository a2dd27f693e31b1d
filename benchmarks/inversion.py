"""Table 2 of the paper, the error of encoding and decoding, for four encoders.

    python -m benchmarks.inversion --data mnist/test.parquet

encodes the first 256 images of a data set with the built-in model and decodes them in the same number of steps, by

- Euler: `pipe.encode(images, S, exact=False)`, equation (13) of the paper;
- exact: `pipe.encode(images, S)`;
- pair: `pipe.encode(images, S, method="pair")`, two states of second order;
- diffusers: its `DDIMInverseScheduler` and its `DDIMScheduler`, with the same network and configuration, but for
  `set_alpha_to_one=False`, which favors it over its default.

All four use the same network, run by the CPU engine. The error is the mean squared error per pixel in [0, 1], before
clipping and rounding. Numbers of steps above 200 take two hours on two cores (`--images-beyond` uses fewer images for
them). Results are cached in `--cache`, one file per 32 images, with a hash of the weights, so that a run can be resumed
and several can share the work: `--part 0/2` and `--part 1/2` do every other file each, and a run without it prints the
table. `--noise` shows why latents of clean images are not quite centered.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from ddim import DDIMPipeline
from ddim.data.config import DataConfig
from ddim.data.dataset import open_dataset
from ddim.inversion import InversionConfig, invert, invertible_steps
from ddim.io.atomic import atomic_write
from ddim.io.json_files import to_json
from ddim.io.weights import digest

IMAGES_PER_FILE = 32
NUM_NOISY_IMAGES = 64
MANY_STEPS = 200
PAPER = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}


def reconstruct_with_diffusers(pipe: DDIMPipeline, samples: Tensor, steps: int) -> Tensor:
    """Encode and decode samples as scripts for `diffusers` do."""
    settings = dict(pipe.scheduler.config) | {"set_alpha_to_one": False}
    settings.pop("trained_betas", None)
    x = samples
    for scheduler in (
        diffusers.DDIMInverseScheduler.from_config(settings),
        diffusers.DDIMScheduler.from_config(settings),
    ):
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
    return x


def moments(latents: Tensor) -> dict[str, list[float]]:
    """Return the mean and the standard deviation of each latent."""
    flat = latents.flatten(1)
    return {"mean": flat.mean(1).tolist(), "std": flat.std(1).tolist()}


@torch.no_grad()
def measure(pipe: DDIMPipeline, samples: Tensor, steps: int) -> dict:
    """Measure errors, moments of latents and costs; lists have one entry per image."""
    result: dict = {}
    encoders: dict[str, dict[str, Any]] = {"euler": {"exact": False}, "exact": {}, "pair": {"method": "pair"}}
    for name, settings in encoders.items():
        reconstruction = pipe.reconstruct(samples, steps, output_type="pt", **settings)
        encoded = reconstruction.codes
        result[name] = {"mse": reconstruction.mse.tolist()} | moments(encoded.latents)
        result[name]["evaluations"] = encoded.evaluations.sum(1).tolist()
        if name == "exact":
            unsolved = encoded.residuals > encoded.tolerance
            result[name]["missed"] = {
                str(t): int(n) for t, n in zip(encoded.timesteps, unsolved.sum(0).tolist(), strict=True) if n
            }
    parts = [reconstruct_with_diffusers(pipe, part, steps) for part in samples.split(8)]
    result["diffusers"] = {"mse": ((torch.cat(parts) - samples) / 2).double().square().flatten(1).mean(1).tolist()}
    return result


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    column = torch.tensor(values, dtype=torch.float64)
    return float(column.mean()), float(column.std() / len(values) ** 0.5)


def report(rows: dict[int, dict]) -> None:
    """Print both tables: number of steps -> merged results."""
    names = ["steps", "images", "paper, CIFAR-10", "diffusers", "Euler", "exact", "Euler / exact"]
    names += ["evaluations per step", "not solved", "pair", "evaluations per step"]
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for steps, row in rows.items():
        euler, exact, pair, theirs = (
            sum(row[k]["mse"]) / len(row[k]["mse"]) for k in ("euler", "exact", "pair", "diffusers")
        )
        costs = [sum(row[k]["evaluations"]) / len(row[k]["evaluations"]) / steps for k in ("exact", "pair")]
        unsolved = ", ".join(f"{n} at t = {t}" for t, n in row["exact"]["missed"].items()) or "none"
        errors = [f"{theirs:.1e}", f"{euler:.1e}", f"{exact:.1e}", f"{euler / exact:,.0f}"]
        images = len(row["exact"]["mse"])
        columns = [steps, images, PAPER.get(steps, ""), *errors, f"{costs[0]:.1f}", unsolved]
        print(f"| {' | '.join(map(str, columns))} | {pair:.1e} | {costs[1]:.1f} |")
    print(
        "\nlatents: mean and standard deviation over the pixels of an image, averaged over images, ± standard error\n"
    )
    names = [f"{name}: {moment}" for name in ("Euler", "exact", "pair") for moment in ("mean", "standard deviation")]
    print(f"| steps | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    for steps, row in rows.items():
        cells = [
            "{:.3f} ± {:.3f}".format(*mean_and_error(row[name][moment]))
            for name in ("euler", "exact", "pair")
            for moment in ("mean", "std")
        ]
        print(f"| {steps} | {' | '.join(cells)} |")


def merge(blocks: list[Any]) -> Any:
    """Concatenate lists and add counts, key by key."""
    first = blocks[0]
    if isinstance(first, list):
        return [entry for block in blocks for entry in block]
    if isinstance(first, int):
        return sum(blocks)
    keys = dict.fromkeys(key for entry in blocks for key in entry)
    return {key: merge([entry[key] for entry in blocks if key in entry]) for key in keys}


def noisy_latent_moments(pipe: DDIMPipeline, samples: Tensor, steps: int) -> list[str]:
    """Describe the exact latents of images with the noise of timestep 0, which all training images have.

    Clean images lack it, and differ in this from every image that the deterministic process can generate.
    """
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(0))
    noisy = pipe.scheduler.add_noise(samples, noise, torch.tensor(0))
    # Not by `encode`, which refuses values outside [-1, 1].
    encoded, _ = invert(pipe.sampler, noisy, invertible_steps(pipe.scheduler, steps), InversionConfig(verify=False))
    columns = moments(encoded.latents)
    return [f"{name} {{:.3f}} ± {{:.3f}}".format(*mean_and_error(columns[name])) for name in ("mean", "std")]


def main() -> None:
    """Measure what is not cached, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of images, or a parquet file")
    parser.add_argument("--images", type=int, default=256, help="number of images, up to 200 steps")
    parser.add_argument("--images-beyond", type=int, default=256, help="number of images, above 200 steps")
    parser.add_argument("--noise", action="store_true", help="print the moments of latents of 64 images with noise")
    parser.add_argument("--steps", type=int, nargs="+", default=list(PAPER), help="numbers of steps")
    parser.add_argument("--cache", type=Path, default=Path("runs/inversion"), help="a folder for results")
    parser.add_argument("--part", default="", help="such as 0/2: every other file, without the table")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    pipe = DDIMPipeline.from_pretrained("mnist")
    channels, height, _ = pipe.sample_shape
    dataset = open_dataset(DataConfig(source=str(options.data)), height, channels)
    samples = dataset.read(torch.arange(min(options.images, dataset.shape[0]))).float() / 127.5 - 1
    if options.noise:
        for steps in options.steps:
            cells = noisy_latent_moments(pipe, samples[:NUM_NOISY_IMAGES], steps)
            print(f"{steps} steps, with the noise of timestep 0: " + ", ".join(cells))
        return
    options.cache.mkdir(parents=True, exist_ok=True)
    weights = digest(pipe.unet.state_dict())
    part_index, num_parts = map(int, (options.part or "0/1").split("/"))
    rows = {}
    for steps in options.steps:
        blocks = []
        selected = samples if steps <= MANY_STEPS else samples[: options.images_beyond]
        for number, first in enumerate(range(0, len(selected), IMAGES_PER_FILE)):
            part = selected[first : first + IMAGES_PER_FILE]
            path = options.cache / f"{steps}-{first}-{len(part)}.json"
            if number % num_parts != part_index:
                continue
            cached = json.loads(path.read_text()) if path.exists() else {}
            if cached.get("weights") != weights or "pair" not in cached["result"]:
                result = {"weights": weights, "result": measure(pipe, part, steps)}
                with atomic_write(path) as temporary:
                    temporary.write_text(to_json(result))
            blocks.append(json.loads(path.read_text())["result"])
        rows[steps] = merge(blocks)
    if num_parts == 1:
        report(rows)


if __name__ == "__main__":
    main()
