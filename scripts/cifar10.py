"""Train the CIFAR-10 model on one GPU for some minutes, evaluate it and export its weights; started again, it resumes.

    python scripts/cifar10.py --data cifar10/train.parquet --minutes 25
    python scripts/cifar10.py --data cifar10/train.parquet --minutes 25                      # resumes, on this machine
    python scripts/cifar10.py --data cifar10/train.parquet --minutes 25 --init cifar10-fp16  # continues, on another

    runs/cifar10/             the run, as `ddim train` leaves it
    runs/cifar10/export/      a pipeline folder: averaged weights in fp16, in files of at most --max-shard-size
    runs/cifar10/export/samples-10.png, -20.png, -50.png
    runs/cifar10/export/measured.json

A run resumes exactly from its checkpoints, which take 16 bytes per parameter. If those are too large to move, --init
starts a new run from exported weights, 2 bytes per parameter: with new moments, and another warm-up.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch

from ddim import DDIMPipeline
from ddim.data.dataset import open_dataset
from ddim.devices import choose_device
from ddim.evaluation.features import Pixels
from ddim.evaluation.image_sets import sample_image_set
from ddim.evaluation.metrics import frechet
from ddim.io.image_files import save_images
from ddim.io.json_files import to_json
from ddim.training.config import TrainConfig, load_config
from ddim.training.run import train

GRID_IMAGES = 64


def measure(pipe: DDIMPipeline, config: TrainConfig, count: int) -> dict[str, Any]:
    """Compute the Fréchet distance, on pixels, of samples to as many training images, for 10, 20 and 50 steps."""
    size, channels = config.model["sample_size"], config.model["in_channels"]
    dataset = open_dataset(config.data, size, channels)
    chosen = torch.randperm(dataset.shape[0], generator=torch.Generator().manual_seed(0))
    real, other = dataset.read(chosen[:count]), dataset.read(chosen[count : 2 * count])
    features = Pixels((channels, size, size))
    distances = {"count": count, "features": "pixels", "real against real": frechet(features(other), features(real))}
    for steps in (10, 20, 50):
        generated = torch.cat(list(sample_image_set(pipe, count, num_inference_steps=steps).batches()))
        distances[f"{steps} steps"] = frechet(features(generated), features(real))
    return distances


def main() -> None:
    """Train, export, sample grids and evaluate."""
    parser = argparse.ArgumentParser(description="Train, evaluate and export the CIFAR-10 model.")
    parser.add_argument("--data", required=True, help="a parquet file, or any other --data of ddim train")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"), help="the run's folder")
    parser.add_argument("--minutes", type=float, default=25, help="training time")
    parser.add_argument("--init", help="a folder of exported weights to start a new run from")
    parser.add_argument("--count", type=int, default=2000, help="samples to evaluate")
    parser.add_argument("--max-shard-size", default="15MB", help="of the exported weights")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--set", nargs="*", default=[], help="entries of the preset cifar10-small, key=value")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    overrides = {"data.source": options.data, "init": options.init}
    is_gpu = choose_device(options.device).type == "cuda"
    settings = [f"compile={str(is_gpu).lower()}", *options.set]
    config = load_config("cifar10-small", settings=settings, overrides=overrides)
    final = train(config, options.out, options.device, max_minutes=options.minutes)

    export = options.out / "export"
    DDIMPipeline.from_pretrained(final, torch_dtype=torch.float16).save_pretrained(
        export, max_shard_size=options.max_shard_size
    )
    pipe = DDIMPipeline.from_pretrained(export).to(choose_device(options.device))
    pipe.set_progress_bar_config(disable=True)
    for steps in (10, 20, 50):
        save_images(pipe.sample_images(GRID_IMAGES, num_inference_steps=steps), export / f"samples-{steps}.png")
    distances = measure(pipe, config, options.count)
    (export / "measured.json").write_text(to_json(distances))
    print(json.dumps(distances))


if __name__ == "__main__":
    main()
