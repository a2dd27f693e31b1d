"""What the training loop reports: the metrics of single steps, and how far a run has come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class StepMetrics(NamedTuple):
    """Metrics of one step. Checkpoints store them as lists, in this order.

    Attributes:
        loss: weighted loss, mean over the batch.
        grad_norm: norm of the gradient before clipping.
        quartile_sums: sum of the samples' unweighted losses by quartile of the timestep, the least noisy first.
        quartile_counts: number of samples by quartile of the timestep.

    Example:
        >>> StepMetrics(0.5, 1.0, (1.0, 0.0, 0.0, 1.0), (2.0, 0.0, 0.0, 2.0)).loss
        0.5
    """

    loss: float
    grad_norm: float
    quartile_sums: tuple[float, ...]
    quartile_counts: tuple[float, ...]


@dataclass
class Progress:
    """State of a run after a step.

    Attributes:
        step: number of steps taken.
        pending_metrics: metrics of the steps that no line of `metrics.jsonl` covers yet, the latest last; the consumer
            clears the list. On a GPU it lags behind, except at steps that `Trainer` synchronizes.
        images_per_second: mean rate since the process started or resumed the run.

    Example:
        >>> Progress(step=1, pending_metrics=[], images_per_second=100.0).step
        1
    """

    step: int
    pending_metrics: list[StepMetrics]
    images_per_second: float


class TrainingStopped(RuntimeError):
    """A run that ended early; the message says why and how to resume.

    Example:
        >>> raise TrainingStopped("stopped by SIGTERM after step 5")
        Traceback (most recent call last):
        ddim.training.progress.TrainingStopped: stopped by SIGTERM after step 5
    """
