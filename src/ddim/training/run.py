"""A whole training run, from data to a pipeline folder.

RUN/config.yaml       the configuration, the data's fingerprint and the versions of everything
RUN/metrics.jsonl     a line every 50 steps: step, loss (mean of those 50), gradient norm, images a second
RUN/loss.png          the losses in it as a curve
RUN/samples/          a grid every so many steps, always from the same seeds
RUN/checkpoints/      what is needed to go on
RUN/final/            the result: a pipeline folder for `ddim` and `diffusers`, with the averaged weights
"""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml
from torch import Tensor

from ddim.files import write_whole
from ddim.images import save_images
from ddim.pipeline import DDIMPipeline
from ddim.training.config import TrainConfig, differences, validate
from ddim.training.curve import plot_loss
from ddim.training.data import fingerprint, load_images
from ddim.training.trainer import Progress, Trainer
from ddim.version import __version__

LOG_EVERY = 50


def train(config: TrainConfig, out: Path, device: torch.device, resume: bool = True) -> Path:
    """Run to the end, or go on with a run that was begun.

    Args:
        config: the checked configuration.
        out: the run's folder.
        device: where to train.
        resume: take up the newest checkpoint in `out`; otherwise `out` must be empty or not exist.

    Returns:
        `out/final`.

    Raises:
        FileNotFoundError: if there is no data.
        ValueError: if the data, or a run that is there, does not fit the configuration.
        FileExistsError: if `out` has something in it and `resume` is false, or it is no run.
        TrainingStopped: on a signal or a loss that is no number.
    """
    images = load_images(Path(config.data), config.model["sample_size"], config.model.get("in_channels", 3))
    record = _check_run(config, out, images, resume)
    trainer = Trainer(config, images, out, device)
    if config.samples.every:
        # A number of steps that cannot be taken shall be told now.
        trainer.scheduler.make_steps(trainer.scheduler.make_timesteps(config.samples.num_inference_steps))
    trainer.resume()
    out.mkdir(parents=True, exist_ok=True)
    with write_whole(out / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(record, sort_keys=False))
    log = MetricsLog(out / "metrics.jsonl", trainer.step, trainer.losses)

    def after_step(progress: Progress) -> None:
        log.add(progress)
        samples = config.samples
        if samples.every and progress.step % samples.every == 0:
            _paint(trainer, out / "samples" / f"step-{progress.step:08d}.png")

    trainer.train(after_step)
    final = out / "final"
    DDIMPipeline(trainer.ema, trainer.scheduler).save_pretrained(final)
    if config.samples.every:
        _paint(trainer, out / "samples" / "final.png")
    if log.path.exists():
        plot_loss(log.path, out / "loss.png")
    return final


def _check_run(config: TrainConfig, out: Path, images: Tensor, resume: bool) -> dict[str, Any]:
    """What goes into `config.yaml`, after comparing it with what is there."""
    record = {
        "config": config.model_dump(mode="json"),
        "data": {"images": len(images), "sha256": fingerprint(images)},
        "versions": {
            "ddim": __version__,
            "torch": str(torch.__version__),
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
    }
    if not out.exists() or not any(out.iterdir()):
        return record
    path = out / "config.yaml"
    if not resume:
        raise FileExistsError(f"{out} is not empty; give another folder, or --resume auto to go on with the run in it")
    if not path.is_file():
        raise FileExistsError(f"{out} is not empty and holds no run (no config.yaml); give another folder")
    try:
        there = yaml.safe_load(path.read_text())
        changed = differences(validate(there["config"]), config)
        if there["data"] != record["data"]:
            changed.append(f"data: {there['data']['images']} other images there, {len(images)} here")
    except (yaml.YAMLError, ValueError, KeyError, TypeError):
        raise FileExistsError(f"{path} is no record of a run; give another folder") from None
    if changed:
        raise ValueError(
            f"the run in {out} was begun with other settings ({'; '.join(changed)}); "
            "go on with those, or give another folder"
        )
    return record


class MetricsLog:
    """`metrics.jsonl`: a line every `LOG_EVERY` steps.

    Args:
        path: of the file.
        step: lines after this step are from a run that died since its last checkpoint; they are dropped, and so is one
            that it left unfinished.
        losses: of the steps since the last line; filled and cleared here.
    """

    def __init__(self, path: Path, step: int, losses: list[float]) -> None:
        self.path, self.losses = path, losses
        text = path.read_text() if path.exists() else ""
        kept = "".join(line for line in text.splitlines(keepends=True) if _step_of(line) <= step)
        if kept != text:
            with write_whole(path) as temporary:
                temporary.write_text(kept)

    def add(self, progress: Progress) -> None:
        """Take in a step."""
        self.losses.append(progress.loss)
        if progress.step % LOG_EVERY:
            return
        line = {
            "step": progress.step,
            "loss": sum(self.losses) / len(self.losses),
            "grad_norm": progress.grad_norm,
            "images_per_second": round(progress.images_per_second, 1),
        }
        self.losses.clear()
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _step_of(line: str) -> float:
    """The step of a line of the metrics; infinity if it is not whole."""
    return float(json.loads(line)["step"]) if line.endswith("}\n") else math.inf


def _paint(trainer: Trainer, path: Path) -> None:
    """A grid from the averaged weights, always from seeds 0, 1, 2, ..."""
    samples = trainer.config.samples
    pipe = DDIMPipeline(trainer.ema, trainer.scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = pipe.paint(samples.count, num_inference_steps=samples.num_inference_steps)
    path.parent.mkdir(exist_ok=True)
    save_images(images, path)
