"""Metrics of a run: `metrics.jsonl`, trackers, the loss curve.

RUN/metrics.jsonl      what the run computes: a line every `log_every` steps, equal to the byte however often the run
                       was stopped and resumed
RUN/tensorboard/       the same, what differs between executions (images per second, memory), and the grids of samples;
                       likewise for other trackers (`ddim.training.trackers`)
RUN/loss.png           the losses of metrics.jsonl as a curve
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import torch
from PIL import Image

from ddim.io.atomic import atomic_write
from ddim.training.progress import Progress, StepMetrics
from ddim.training.trackers import log_image, start_trackers


class MetricsLogger:
    """Writes the metrics of a run.

    Args:
        out: folder of the run.
        step: step at which the run starts or resumes. Lines of later steps, written by a process that was killed before
            its next checkpoint, are dropped, and so is an incomplete line.
        log_every: steps between lines.
        device: device whose memory is reported.
        trackers: names of the trackers that get the same: `tensorboard`, `wandb`, `mlflow`.
        config: entries of the configuration by dotted key, for the trackers.
    """

    def __init__(
        self,
        out: Path,
        step: int,
        log_every: int,
        device: torch.device,
        trackers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.path, self.log_every, self.device = out / "metrics.jsonl", log_every, device
        self.path.touch()
        text = self.path.read_text(errors="replace")
        valid = "".join(line for line in text.splitlines(keepends=True) if _line_step(line) <= step)
        if valid != text:
            with atomic_write(self.path) as temporary:
                temporary.write_text(valid)
        self._trackers = start_trackers(trackers, out, step, config)

    def log_step(self, progress: Progress, learning_rate: float) -> None:
        """Log the metrics since the last line, and clear them, every `log_every` steps; otherwise do nothing.

        Args:
            progress: state of the run after a step.
            learning_rate: learning rate of that step.
        """
        if progress.step % self.log_every:
            return
        self.log(progress.step, summarize(progress.pending_metrics) | {"learning_rate": learning_rate})
        self.log_scalars(
            progress.step, images_per_second=progress.images_per_second, memory_mib=memory_mib(self.device)
        )
        progress.pending_metrics.clear()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`, and log the same to the trackers.

        Args:
            step: number of steps taken.
            values: numbers, lists of numbers, or `None`, by name.
        """
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        scalars: dict[str, float | None] = {}
        for name, value in values.items():
            if isinstance(value, list):
                scalars |= {f"{name}/{index + 1}": entry for index, entry in enumerate(value)}
            else:
                scalars[name] = value
        self.log_scalars(step, **scalars)

    def log_scalars(self, step: int, **values: float | None) -> None:
        """Log numbers to the trackers alone.

        Args:
            step: number of steps taken.
            values: numbers by name; `None` values are skipped.
        """
        numbers = {name: value for name, value in values.items() if value is not None}
        for tracker in self._trackers:
            tracker.log(numbers, step=step)

    def log_image(self, step: int, image: Image.Image, file: Path) -> None:
        """Log an image to the trackers.

        Args:
            step: number of steps taken.
            image: a gray or RGB image.
            file: the same as a file.
        """
        for tracker in self._trackers:
            log_image(tracker, step, image, file)

    def close(self) -> None:
        """End the trackers' runs."""
        for tracker in self._trackers:
            tracker.finish()


def summarize(metrics: list[StepMetrics]) -> dict[str, Any]:
    """Average the metrics of several steps.

    Args:
        metrics: at least one.

    Returns:
        `loss`; `loss_by_quartile`, unweighted, by quartile of the timestep, the least noisy first (`None` for a
        quartile without samples); `grad_norm` (`None` where all are infinite: steps that loss scaling skipped).

    Example:
        >>> steps = [StepMetrics(1.0, 2.0, (3.0,), (2.0,)), StepMetrics(3.0, 4.0, (1.0,), (2.0,))]
        >>> summarize(steps)
        {'loss': 2.0, 'loss_by_quartile': [1.0], 'grad_norm': 3.0}
    """
    norms = [step.grad_norm for step in metrics if math.isfinite(step.grad_norm)]
    sums = [math.fsum(column) for column in zip(*(step.quartile_sums for step in metrics), strict=True)]
    counts = [math.fsum(column) for column in zip(*(step.quartile_counts for step in metrics), strict=True)]
    return {
        "loss": math.fsum(step.loss for step in metrics) / len(metrics),
        "loss_by_quartile": [s / c if c else None for s, c in zip(sums, counts, strict=True)],
        "grad_norm": math.fsum(norms) / len(norms) if norms else None,
    }


def memory_mib(device: torch.device) -> float:
    """Measure the memory in use.

    Args:
        device: a GPU, or the CPU.

    Returns:
        MiB: the peak of the GPU, or what this process holds now.

    Example:
        >>> memory_mib(torch.device("cpu")) > 1
        True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20


def plot_loss(metrics: Path, path: Path) -> None:
    """Plot the losses of a `metrics.jsonl`, in total and by quartile, on a logarithmic scale.

    Args:
        metrics: the `metrics.jsonl`.
        path: PNG file to write.

    Raises:
        OSError: if it cannot be written.
    """
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    figure = Figure(figsize=(6, 3))
    # Fixed margins: a layout that fits them draws everything twice.
    axes = figure.subplots(gridspec_kw={"left": 0.165, "right": 0.985, "bottom": 0.16, "top": 0.97})
    steps = [line["step"] for line in lines]
    names = ("least noisy quarter", "second", "third", "noisiest")
    for index, name in enumerate(names):
        values = [line["loss_by_quartile"][index] or math.nan for line in lines]
        axes.plot(steps, values, linewidth=0.6, label=name)
    axes.plot(steps, [line["loss"] for line in lines], linewidth=1.2, color="black", label="all timesteps")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="x-small", ncols=2)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100)


def _line_step(line: str) -> float:
    """Return the step of a line of the metrics; infinity if the line is damaged or incomplete."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
