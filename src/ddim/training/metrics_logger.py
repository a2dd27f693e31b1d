"""Metrics of a run: `metrics.jsonl`, TensorBoard, the loss curve.

RUN/metrics.jsonl      what the run computes: a line every `log_every` steps, equal to the byte however often the run
                       was stopped and resumed
RUN/tensorboard/       the same, what differs between executions (images per second, memory), and the grids of samples
RUN/loss.png           the losses of metrics.jsonl as a curve
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from ddim.io.atomic import atomic_write
from ddim.training.progress import Progress, StepMetrics


class MetricsLogger:
    """Writes the metrics of a run.

    Args:
        out: folder of the run.
        step: step at which the run starts or resumes. Lines of later steps, written by a process that was killed before
            its next checkpoint, are dropped, and so is an incomplete line.
        log_every: steps between lines.
        device: device whose memory is reported.
    """

    def __init__(self, out: Path, step: int, log_every: int, device: torch.device) -> None:
        self.path, self.log_every, self.device = out / "metrics.jsonl", log_every, device
        self.path.touch()
        text = self.path.read_text(errors="replace")
        valid = "".join(line for line in text.splitlines(keepends=True) if _line_step(line) <= step)
        if valid != text:
            with atomic_write(self.path) as temporary:
                temporary.write_text(valid)
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

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
        """Append a line to `metrics.jsonl`, and write the same to TensorBoard.

        Args:
            step: number of steps taken.
            values: numbers, lists of numbers, or `None`, by name.
        """
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, list):
                self.log_scalars(step, **{f"{name}/{index + 1}": entry for index, entry in enumerate(value)})
            else:
                self.log_scalars(step, **{name: value})

    def log_scalars(self, step: int, **values: float | None) -> None:
        """Write numbers to TensorBoard alone.

        Args:
            step: number of steps taken.
            values: numbers by name; `None` values are skipped.
        """
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(name, value, step)
        self._board.flush()

    def log_image(self, step: int, image: Image.Image) -> None:
        """Write an image to TensorBoard.

        Args:
            step: number of steps taken.
            image: a gray or RGB image.
        """
        pixels = np.asarray(image)
        self._board.add_image("samples", pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")

    def close(self) -> None:
        """Close TensorBoard's file."""
        self._board.close()


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
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
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
