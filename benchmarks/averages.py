"""Averages of any length: how near reconstructed ones are to tracked ones, and what tracking costs.

    python -m benchmarks.averages

1. A small network is trained on scikit-learn's digits for 2,000 steps, with the default snapshots, and beside them
   averages of further lengths are tracked. The table has, by length, the norm of the difference between the
   reconstructed and the tracked weights, relative to the norm of the tracked ones, and relative to their distance from
   the last step's weights.
2. The time of an update of two averages of a preset's network, beside that of a step of the benchmark of training.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim.data.dataset import open_dataset
from ddim.training.averages import PowerAverages, RunAverages
from ddim.training.config import TrainConfig, load_config, read_preset
from ddim.training.progress import Progress
from ddim.training.run import complete_config
from ddim.training.trainer import Trainer
from ddim.unet import UNet2DModel

LENGTHS = (0.05, 0.055, 0.06, 0.065, 0.07, 0.075, 0.08, 0.085, 0.09, 0.095, 0.10, 0.15, 0.20, 0.25)
NETWORK: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
}
UPDATES = 50


def make_config(steps: int) -> TrainConfig:
    """Return the configuration of a run of some minutes."""
    settings = ["data.source=digits", "batch_size=16", f"max_steps={steps}", "optim.lr=2e-3", "optim.warmup_steps=50"]
    return complete_config(load_config(settings=settings, overrides={"model": NETWORK}))


def measure_errors(steps: int) -> list[tuple[float, float, float]]:
    """Return, by length, both relative errors."""
    config = make_config(steps)
    with tempfile.TemporaryDirectory() as folder:
        dataset = open_dataset(config.data, 8, 1)
        trainer = Trainer(config, dataset, Path(folder), torch.device("cpu"))
        tracked = PowerAverages(trainer.model, LENGTHS)

        def after_step(progress: Progress) -> None:
            tracked.update(progress.step)
            progress.pending_metrics.clear()

        trainer.train(after_step)
        averages, last = RunAverages(Path(folder)), flat(dict(trainer.model.named_parameters()))
        rows = []
        for length in LENGTHS:
            weights = flat(dict(averages.reconstruct(length).pipe.unet.named_parameters()))
            expected = flat(tracked.averages[length])
            error = float((weights - expected).norm())
            rows.append((length, error / float(expected.norm()), error / float((last - expected).norm())))
        return rows


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """Return all values in one vector, float64."""
    return torch.cat([tensors[name].detach().double().flatten() for name in sorted(tensors)])


def measure_update(preset: str) -> tuple[int, float]:
    """Return the number of parameters of a preset's network, and the milliseconds of an update of two averages."""
    model = UNet2DModel(**read_preset(preset)["model"])
    averages, seconds = PowerAverages(model, (0.05, 0.10)), []
    for step in range(1, UPDATES + 1):
        start = time.process_time()
        averages.update(step)
        seconds.append(time.process_time() - start)
    return model.num_parameters(), 1000 * statistics.median(seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="steps of the run")
    options = parser.parse_args()
    for preset in ("digits", "mnist", "cifar10-small"):
        parameters, milliseconds = measure_update(preset)
        print(f"{preset}: {parameters:,} parameters, {milliseconds:.1f} ms per update of two averages", flush=True)
    print("sigma_rel  error / norm  error / distance")
    for length, error, distance in measure_errors(options.steps):
        print(f"{length:<9}  {error:<12.1e}  {distance:.1e}")


if __name__ == "__main__":
    main()
