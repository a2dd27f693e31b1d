"""Table 2 of the paper, the error of encoding and decoding, for three ways to encode.

    python -m benchmarks.inversion --data mnist/test.parquet

encodes the first 256 images of a data set with the built-in model and decodes them in the same number of steps, by

- Euler: `pipe.encode(images, S, exact=False)`, equation (13) of the paper;
- exact: `pipe.encode(images, S)`;
- diffusers: its `DDIMInverseScheduler` and its `DDIMScheduler`, asking the same network, without clipping and with
  `set_alpha_to_one=False`, which is kinder to it than its defaults are.

All three ask the same network, run by the CPU engine. The error is the mean squared error per pixel in [0, 1] of what
it gives, before clipping and rounding. Numbers of steps beyond 200 take two hours on two cores (`--images-beyond` takes
fewer images for them). Results are kept in `--cache`, a file for every 32 images, with a hash of the weights that they
belong to, so that a run can be stopped and several can share the work: `--part 0/2` and `--part 1/2` do every other
file each, and a run without it prints the table. `--noise` shows why codes of clean images are not quite centred.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import diffusers
import torch
from torch import Tensor

from ddim import DDIMPipeline
from ddim.data.dataset import open_pictures
from ddim.io.atomic import atomic_write
from ddim.io.config import to_json
from ddim.io.weights import digest
from ddim.latents import InversionConfig, invert, invertible_steps
from ddim.training.config import DataConfig

BLOCK = 32
NOISY = 64
MANY_STEPS = 200
PAPER = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}


def peer(pipe: DDIMPipeline, samples: Tensor, steps: int) -> Tensor:
    """Encoded and decoded as in scripts for `diffusers`."""
    settings = dict(pipe.scheduler.config) | {"clip_sample": False, "set_alpha_to_one": False}
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


def moments(codes: Tensor) -> dict[str, list[float]]:
    flat = codes.flatten(1)
    return {"mean": flat.mean(1).tolist(), "std": flat.std(1).tolist()}


@torch.no_grad()
def block(pipe: DDIMPipeline, samples: Tensor, steps: int) -> dict:
    """Errors, codes and costs of some images; lists have an entry an image."""
    result: dict = {}
    for name, exact in (("euler", False), ("exact", True)):
        back = pipe.reconstruct(samples, steps, exact=exact, output_type="pt")
        result[name] = {"mse": back.mse.tolist()} | moments(back.codes.latents)
        result[name]["evaluations"] = back.codes.evaluations.sum(1).tolist()
        if exact:
            missed = back.codes.residuals > back.codes.tolerance
            result[name]["missed"] = {
                str(t): int(n) for t, n in zip(back.codes.timesteps, missed.sum(0).tolist(), strict=True) if n
            }
    parts = [peer(pipe, part, steps) for part in samples.split(8)]
    result["diffusers"] = {"mse": ((torch.cat(parts) - samples) / 2).double().square().flatten(1).mean(1).tolist()}
    return result


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    column = torch.tensor(values, dtype=torch.float64)
    return float(column.mean()), float(column.std() / len(values) ** 0.5)


def report(rows: dict[int, dict]) -> None:
    names = ["steps", "images", "paper, CIFAR-10", "diffusers", "Euler", "exact", "Euler / exact"]
    names += ["evaluations a step", "not converged"]
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for steps, row in rows.items():
        euler, exact, other = (sum(row[k]["mse"]) / len(row[k]["mse"]) for k in ("euler", "exact", "diffusers"))
        cost = sum(row["exact"]["evaluations"]) / len(row["exact"]["evaluations"]) / steps
        missed = ", ".join(f"{n} at t = {t}" for t, n in row["exact"]["missed"].items()) or "none"
        errors = [f"{other:.1e}", f"{euler:.1e}", f"{exact:.1e}", f"{euler / exact:,.0f}"]
        images = len(row["exact"]["mse"])
        print("| " + " | ".join(map(str, [steps, images, PAPER.get(steps, ""), *errors, f"{cost:.1f}", missed])) + " |")
    print("\ncodes: mean and standard deviation over the pixels of an image, averaged over images, ± standard error\n")
    print("| steps | Euler: mean | standard deviation | exact: mean | standard deviation |\n|---|---|---|---|---|")
    for steps, row in rows.items():
        cells = [
            "{:.3f} ± {:.3f}".format(*mean_and_error(row[name][moment]))
            for name in ("euler", "exact")
            for moment in ("mean", "std")
        ]
        print(f"| {steps} | {' | '.join(cells)} |")


def merge(blocks: list[dict]) -> dict:
    """Lists joined, counts added."""
    first = blocks[0]
    if isinstance(first, list):
        return [entry for block in blocks for entry in block]
    if isinstance(first, int):
        return sum(blocks)
    keys = dict.fromkeys(key for entry in blocks for key in entry)
    return {key: merge([entry[key] for entry in blocks if key in entry]) for key in keys}


def noisy_codes(pipe: DDIMPipeline, samples: Tensor, steps: int) -> list[str]:
    """Moments of the exact codes of images that carry the noise of timestep 0, as all that the network was trained on.

    Clean images lack it, and differ in this from whatever the deterministic process could have painted.
    """
    drawn = torch.randn(samples.shape, generator=torch.Generator().manual_seed(0))
    noisy = pipe.scheduler.add_noise(samples, drawn, torch.tensor(0))
    # Not by `encode`, which refuses values outside [-1, 1].
    codes, _ = invert(pipe.sampler, noisy, invertible_steps(pipe.scheduler, steps), InversionConfig(verify=False))
    found = moments(codes.latents)
    return [f"{name} {{:.3f}} ± {{:.3f}}".format(*mean_and_error(found[name])) for name in ("mean", "std")]


def main() -> None:
    parser = argparse.ArgumentParser(description="The error of encoding and decoding.")
    parser.add_argument("--data", type=Path, required=True, help="a folder of images, or a parquet file")
    parser.add_argument("--images", type=int, default=256, help="up to 200 steps")
    parser.add_argument("--images-beyond", type=int, default=256, help="beyond 200 steps")
    parser.add_argument("--noise", action="store_true", help="tell the codes of the first 64 images with that noise")
    parser.add_argument("--steps", type=int, nargs="+", default=list(PAPER))
    parser.add_argument("--cache", type=Path, default=Path("runs/inversion"))
    parser.add_argument("--part", default="", help="such as 0/2: every other file, without the table")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    pipe = DDIMPipeline.from_pretrained("mnist")
    channels, height, _ = pipe.sample_shape
    pictures = open_pictures(DataConfig(source=str(options.data)), height, channels)
    samples = pictures.take(torch.arange(min(options.images, pictures.shape[0]))).float() / 127.5 - 1
    if options.noise:
        for steps in options.steps:
            cells = noisy_codes(pipe, samples[:NOISY], steps)
            print(f"{steps} steps, with the noise of timestep 0: " + ", ".join(cells))
        return
    options.cache.mkdir(parents=True, exist_ok=True)
    weights = digest(pipe.unet.state_dict())
    turn, turns = map(int, (options.part or "0/1").split("/"))
    rows = {}
    for steps in options.steps:
        blocks = []
        chosen = samples if steps <= MANY_STEPS else samples[: options.images_beyond]
        for number, first in enumerate(range(0, len(chosen), BLOCK)):
            part = chosen[first : first + BLOCK]
            kept = options.cache / f"{steps}-{first}-{len(part)}.json"
            if number % turns != turn:
                continue
            if not kept.exists() or json.loads(kept.read_text())["weights"] != weights:
                result = {"weights": weights, "result": block(pipe, part, steps)}
                with atomic_write(kept) as temporary:
                    temporary.write_text(to_json(result))
            blocks.append(json.loads(kept.read_text())["result"])
        rows[steps] = merge(blocks)
    if turns == 1:
        report(rows)


if __name__ == "__main__":
    main()
