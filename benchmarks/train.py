"""Training rate: `ddim train` against a bare loop with the U-Nets of `ddim` and `diffusers`.

    python -m benchmarks.train [--preset mnist] [--batch-size 64] [--rounds 9] [--device cuda]

A bare loop is the model, the loss, the backward pass and a step of fused AdamW on one fixed batch: no data, no noise,
no clipping, no average, no log. `ddim train` is the trainer's loop with all of these, on random images. Rounds of a few
steps of each row are interleaved, so that drifts of the machine's speed affect all alike; medians and their ratios are
printed. Before timing, all networks get the same weights, and their losses and gradients are compared.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ddim import UNet2DModel
from ddim.data.dataset import CachedImageDataset
from ddim.training.config import TrainConfig, load_config
from ddim.training.machine import PRECISIONS
from ddim.training.metrics_logger import MetricsLogger
from ddim.training.optim import learning_rate
from ddim.training.progress import Progress
from ddim.training.run import start_processes
from ddim.training.trainer import Trainer

TRAINER = "ddim train"
DDIM, DDIM_NCHW = "bare loop, ddim", "bare loop, ddim, NCHW"
DIFFUSERS, DIFFUSERS_NHWC = "bare loop, diffusers", "bare loop, diffusers, channels_last"


class BareLoop:
    """The model, the loss, the backward pass and the optimizer's step on one batch."""

    def __init__(
        self, network: nn.Module, channels_last: bool, batch: tuple[Tensor, Tensor, Tensor], config: TrainConfig
    ):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.noisy, self.target, self.timesteps = batch
        self.noisy = self.noisy.contiguous(memory_format=layout)
        self.network: Any = network.to(device=self.noisy.device, memory_format=layout).train()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, fused=True)
        self.precision = config.precision
        if config.compile:
            self.network = torch.compile(self.network)

    def gradients(self) -> Tensor:
        """Compute the gradients; return the loss."""
        with torch.autocast(self.noisy.device.type, PRECISIONS[self.precision], self.precision != "fp32"):
            predicted = self.network(self.noisy, self.timesteps).sample
        loss = (predicted.float() - self.target).square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        """Compute the gradients and step the optimizer."""
        self.gradients()
        self.optimizer.step()


def timed(step: Callable[[], None], count: int, device: torch.device) -> float:
    """Return the seconds that `count` steps take."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(loops: dict[str, BareLoop]) -> None:
    """Print how far losses and gradients of all networks are from those of `DDIM`."""
    reference = loops[DDIM]
    loss = reference.gradients()
    expected = dict(reference.network.named_parameters())
    for name, loop in loops.items():
        if name == DDIM:
            continue
        other_loss = loop.gradients()
        parameters = dict(loop.network.named_parameters())
        norm = torch.stack([p.grad.norm() for p in expected.values()]).norm()
        difference = torch.stack([(parameters[key].grad - p.grad).norm() for key, p in expected.items()]).norm() / norm
        print(
            f"{name}: loss {float(other_loss):.6f} against {float(loss):.6f}, "
            f"relative difference of gradients {float(difference):.1e}"
        )


def main() -> None:
    """Train in interleaved rounds, and print rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mnist", help="of ddim train")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step")
    parser.add_argument("--set", nargs="*", default=["precision=fp32", "compile=false"], help="entries of the preset")
    parser.add_argument("--steps", type=int, default=3, help="steps per row and round")
    parser.add_argument("--rounds", type=int, default=9, help="rounds after a warm-up")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    total = (options.rounds + 1) * options.steps
    overrides = {
        "data.source": "random",
        "batch_size": options.batch_size,
        "max_steps": total,
        "checkpoints.every": total,
        "log_every": options.steps,
        "model.dropout": 0.0,
    }
    config = load_config(options.preset, settings=options.set, overrides=overrides)
    accelerator, device = start_processes(options.device)
    size, channels = config.model["sample_size"], config.model["in_channels"]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4 * config.batch_size, channels, size, size), dtype=torch.uint8, generator=generator)

    torch.manual_seed(0)
    networks = {name: UNet2DModel(**config.model) for name in (DDIM, DDIM_NCHW)}
    networks |= {name: diffusers.UNet2DModel(**config.model) for name in (DIFFUSERS, DIFFUSERS_NHWC)}
    for network in networks.values():
        network.load_state_dict(networks[DDIM].state_dict())
    shape = (config.batch_size, channels, size, size)
    noisy, target = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    timesteps = torch.randint(1000, (config.batch_size,), generator=generator).to(device)
    loops = {
        name: BareLoop(network, name in (DDIM, DIFFUSERS_NHWC), (noisy, target, timesteps), config)
        for name, network in networks.items()
    }
    compare(loops)

    seconds: dict[str, list[float]] = {name: [] for name in (TRAINER, *loops)}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, CachedImageDataset(images), Path(folder), device, accelerator)
        metrics_logger = MetricsLogger(Path(folder), 0, config.log_every, device)
        started = time.perf_counter()

        def after_step(progress: Progress) -> None:
            """Run a round of each bare loop at the end of a round of the trainer."""
            nonlocal started
            metrics_logger.log_step(progress, learning_rate(config.optim, progress.step - 1, config.max_steps))
            if progress.step % options.steps:
                return
            synchronize(device)
            seconds[TRAINER].append(time.perf_counter() - started)
            for name, loop in loops.items():
                seconds[name].append(timed(loop.step, options.steps, device))
            started = time.perf_counter()

        trainer.train(after_step)
        metrics_logger.close()

    # The first round warms up.
    rates = {name: [config.batch_size * options.steps / s for s in values[1:]] for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"\n{options.preset}, batch {config.batch_size}, {config.precision}, {platform.machine()}, {device_name}")
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}\n")
    print("| row | images/s | slowest | fastest |\n|---|---|---|---|")
    for name, values in rates.items():
        print(f"| {name} | {medians[name]:.1f} | {min(values):.1f} | {max(values):.1f} |")
    theirs = max(medians[DIFFUSERS], medians[DIFFUSERS_NHWC])
    print(f"\nddim train / bare loop, ddim: {medians[TRAINER] / max(medians[DDIM], medians[DDIM_NCHW]):.3f}")
    print(f"ddim train / bare loop, diffusers (the better layout): {medians[TRAINER] / theirs:.3f}")


if __name__ == "__main__":
    main()
