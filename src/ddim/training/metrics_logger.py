"""Watching a run: `metrics.jsonl`, TensorBoard, the curve.

RUN/metrics.jsonl      what the run computed: a line every so many steps, equal to the byte however often the run was
                       stopped and taken up again
RUN/tensorboard/       the same, and what a run computes differently each time: images a second, memory; and the grids
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

from ddim.io.atomic import atomic_write
from ddim.training.trainer import Progress, Record


class MetricsLogger:
    """Writes down what a run comes to.

    Args:
        out: the run's folder.
        step: where the run is taken up; what was written of later steps, by a run that died since, is dropped, and so
            is a line that it left unfinished.
        log_every: steps between lines.
        device: whose memory is told.
    """

    def __init__(self, out: Path, step: int, log_every: int, device: torch.device) -> None:
        self.path, self.log_every, self.device = out / "metrics.jsonl", log_every, device
        self.path.touch()
        text = self.path.read_text(errors="replace")
        kept = "".join(line for line in text.splitlines(keepends=True) if _step_of(line) <= step)
        if kept != text:
            with atomic_write(self.path) as temporary:
                temporary.write_text(kept)
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def add(self, progress: Progress, learning_rate: float) -> None:
        """Take in a step."""
        if progress.step % self.log_every:
            return
        self.write(progress.step, summary(progress.records) | {"learning_rate": learning_rate})
        self.show(progress.step, images_per_second=progress.images_per_second, memory_mib=memory_mib(self.device))
        progress.records.clear()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """A line of the metrics, and the same in TensorBoard."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, list):
                self.show(step, **{f"{name}/{index + 1}": entry for index, entry in enumerate(value)})
            else:
                self.show(step, **{name: value})

    def show(self, step: int, **values: float | None) -> None:
        """Numbers for TensorBoard alone."""
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(name, value, step)
        self._board.flush()

    def picture(self, step: int, picture: Any) -> None:
        """A PIL image for TensorBoard."""
        pixels = np.asarray(picture)
        self._board.add_image("samples", pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")

    def close(self) -> None:
        """Let TensorBoard's file go."""
        self._board.close()


def summary(records: list[Record]) -> dict[str, Any]:
    """Means over steps: the loss, the loss without weights by quartile of the timestep (the least noisy first; `None`
    where no sample fell), the gradient's norm (`None` where all were infinite: steps that loss scaling has skipped).
    """
    norms = [record.grad_norm for record in records if math.isfinite(record.grad_norm)]
    sums = [math.fsum(column) for column in zip(*(record.quartile_sums for record in records), strict=True)]
    counts = [math.fsum(column) for column in zip(*(record.quartile_counts for record in records), strict=True)]
    return {
        "loss": math.fsum(record.loss for record in records) / len(records),
        "loss_by_quartile": [s / c if c else None for s, c in zip(sums, counts, strict=True)],
        "grad_norm": math.fsum(norms) / len(norms) if norms else None,
    }


def memory_mib(device: torch.device) -> float:
    """Memory in use, in MiB: the most so far of the GPU, or what this process holds."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20


def plot_loss(metrics: Path, path: Path) -> None:
    """Draw the losses of a `metrics.jsonl`, those by quartile as well, on a logarithmic scale, into a PNG."""
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


def _step_of(line: str) -> float:
    """The step of a line of the metrics; infinity if it is not whole."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
