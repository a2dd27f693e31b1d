"""Steps with learned coefficients: what a sampler does in few steps, chosen for one model.

A step of a multistep method (`ddim.diffusion.solvers`) is decided by the timestep t of its x, by the timestep that the
network is given, and by the weights of the last predictions,

    x_prev = step of DDIM + k_0 epsilon + sum over j of k_j (epsilon - epsilon of j steps before)

DDIM has k_j = 0 and gives the network t itself. With few steps other numbers serve a model better: they are learned by
`ddim.coefficients`, and kept in the scheduler's configuration as rows

    [t, timestep of the network, k_0, k_1, ..., k_j]                       j at most 3, and at most the steps before

References:
    Timesteps of the network apart from t: LD3, arXiv 2405.15506; learned coefficients: S4S, arXiv 2502.17423.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddim.diffusion.equations import MAX_CORRECTIONS, Step
from ddim.diffusion.schedule import check_timesteps, entries_by_steps
from ddim.validation import shown

MAX_WEIGHT = 1e3
"""Weights are smaller than this: those of every solver are of the order of 1."""

Row = Sequence[float]
"""The numbers of a step: t, the network's timestep, k_0, k_1, ..."""


def check_coefficients_by_steps(by_steps: Mapping[Any, Any], num_train_timesteps: int) -> dict[int, list[list[float]]]:
    """Check learned coefficients, keyed by their number of steps.

    Args:
        by_steps: for some numbers of steps a row per step; the keys are integers or their digits (as in JSON).
        num_train_timesteps: T.

    Returns:
        The same with integers as keys and lists as values.

    Raises:
        ValueError: naming the number of steps whose entry is not allowed.
        TypeError: if it is not a mapping.

    Example:
        >>> check_coefficients_by_steps({"2": [[900, 880, 0.1], [300, 310, 0.0, -0.2]]}, 1000)
        {2: [[900, 880, 0.1], [300, 310, 0.0, -0.2]]}
    """
    checked: dict[int, list[list[float]]] = {}
    for name, count, S, rows in entries_by_steps("coefficients_by_steps", by_steps, "rows"):
        if not isinstance(rows, Sequence) or isinstance(rows, str) or S is None or len(rows) != S:
            raise ValueError(f"{name} must list {count} rows, got {shown(rows)}")
        for index, row in enumerate(rows):
            longest = 3 + min(index, MAX_CORRECTIONS)
            if not isinstance(row, Sequence) or isinstance(row, str) or not 3 <= len(row) <= longest:
                raise ValueError(f"{name}, row {index} must have 3 to {longest} numbers, got {shown(row)}")
            if not all(_is_weight(value) for value in row[2:]):
                raise ValueError(f"{name}, row {index} must have weights between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}")
        for column, values in enumerate(zip(*(row[:2] for row in rows), strict=True)):
            try:
                check_timesteps(values, num_train_timesteps)
            except ValueError as error:
                raise ValueError(f"{name}, column {column}: {error}") from None
        checked[S] = [[int(row[0]), int(row[1]), *map(float, row[2:])] for row in rows]
    return checked


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_WEIGHT


def learned_steps(
    rows: Sequence[Row], alphas_cumprod: Sequence[float] | NDArray[np.float64], final_alpha: float = 1.0
) -> list[Step]:
    """Return the steps of learned coefficients.

    Args:
        rows: a row per step. t and the network's timestep may lie between integers.
        alphas_cumprod: the schedule, length T; between timesteps its logarithm is interpolated linearly.
        final_alpha: alpha after the last step.

    Returns:
        Steps with `direction_offset` and `corrections`; their `timestep` is the network's.

    Example:
        >>> first, last = learned_steps([[2, 2, 0.1], [0, 1, 0.0, 0.5]], [0.9, 0.8, 0.7])
        >>> first.alpha_prev, last.timestep, last.corrections
        (0.9, 1, (0.5,))
    """
    alphas = [_alpha_at(row[0], alphas_cumprod) for row in rows] + [float(final_alpha)]
    network_timesteps = [round(row[1]) for row in rows] + [-1]
    return [
        Step(
            network_timesteps[index],
            network_timesteps[index + 1],
            alphas[index],
            alphas[index + 1],
            corrections=tuple(row[3:]),
            direction_offset=row[2],
        )
        for index, row in enumerate(rows)
    ]


def _alpha_at(t: float, alphas_cumprod: Sequence[float] | NDArray[np.float64]) -> float:
    below = min(int(t), len(alphas_cumprod) - 1)
    if t == below:
        return float(alphas_cumprod[below])
    low, high = (math.log(max(float(alphas_cumprod[i]), 1e-300)) for i in (below, below + 1))
    return math.exp(low + (t - below) * (high - low))
