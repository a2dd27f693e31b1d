"""Batches that several steps take, with the targets of the first: for objectives whose targets are expensive.

A target of distillation costs several evaluations of the teacher, more than the student's forward and backward pass.
With r repeats the steps visit windows of W batches r times,

    batch of step n = W floor(n / (W r)) + n mod W

so that W - 1 other batches lie between two visits. A visit draws the same images, noise and timesteps. A resumed run
computes again what it no longer has: targets depend on their batch alone.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

WINDOW = 64
"""Batches in a window: W. Their targets are kept in memory."""


class RepeatedBatches:
    """Which batch each step takes, and the targets of the batches of the current window.

    Args:
        repeats: visits of each batch, r; at least 1.
        window: batches in a window, W; at least 1.

    Example:
        >>> batches = RepeatedBatches(repeats=2, window=3)
        >>> [batches.number(step) for step in range(8)]
        [0, 1, 2, 0, 1, 2, 3, 4]
    """

    def __init__(self, repeats: int, window: int = WINDOW) -> None:
        self.repeats, self.window = repeats, window
        self._targets: dict[int, Tensor] = {}

    def number(self, step: int) -> int:
        """Return the number of the batch that a step takes.

        Args:
            step: number of steps taken before.

        Returns:
            The number, from 0.
        """
        return step // (self.window * self.repeats) * self.window + step % self.window

    def target(self, step: int, compute: Callable[[], Tensor]) -> Tensor:
        """Return the target of a step's batch: as a visit before it computed it, else computed now.

        Args:
            step: number of steps taken before.
            compute: computes the target, which depends on the batch alone.

        Returns:
            The target.

        Example:
            >>> import torch
            >>> batches = RepeatedBatches(repeats=2, window=1)
            >>> [int(batches.target(step, lambda step=step: torch.tensor(step))) for step in range(4)]
            [0, 0, 2, 2]
        """
        number, visit = self.number(step), step // self.window % self.repeats
        target = self._targets.pop(number, None) if visit else None
        if target is None:
            target = compute()
        if visit < self.repeats - 1:
            self._targets[number] = target
        return target
