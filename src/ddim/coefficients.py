"""Learned coefficients: the best few steps for a model, found without training it.

With S steps, images differ from those of very many steps by an error that depends on a few numbers per step: its
timestep, the timestep that the network is given, and the weights of the last predictions (`ddim.diffusion.learned`).
`learn` minimizes it over all of them together,

    r(theta) = image of theta from a latent - image of the limit from the same latent

by the method of Gauss and Newton with Levenberg and Marquardt's damping. The derivatives of r are finite differences:
a number of step k has no effect on the steps before, whose states are kept, so that all derivatives of S steps cost
about 4 S^2 / 2 evaluations per latent, without gradients and in the engine. Latents count by the inverse of their own
error, so that the sum of squares becomes the mean root mean square error, which a few latents whose image is another
one altogether do not dominate; it is also what decides whether a move is kept.

The timesteps are rounded in the end, and the weights are fitted once more. The result is evaluated on other latents
than those it was found with, beside the formulas and the learned timesteps of the scheduler; the best is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ddim.diffusion.equations import MAX_CORRECTIONS, Step, ddim_step
from ddim.diffusion.guidance import Conditions
from ddim.diffusion.loop import Denoiser, StepSettings, sample
from ddim.diffusion.noise import noise_from_seeds
from ddim.diffusion.schedule import SPACINGS
from ddim.diffusion.solvers import add_corrections
from ddim.latents import Condition
from ddim.pipeline import DDIMPipeline
from ddim.sampler import evaluating
from ddim.scheduler import DDIMScheduler
from ddim.tuning import BATCH_SIZE, MAX_LATENTS, REFERENCE_STEPS, in_turn
from ddim.validation import integer

NUM_LATENTS = 32
"""Latents that coefficients are fitted to; as many others evaluate the result."""
MAX_LEARNED_STEPS = 20
"""The largest number of steps whose coefficients are learned; with more, formulas are near the limit."""
MAX_EVALUATIONS_PER_LATENT = 1600
"""Function evaluations of a fit, without those of the limit."""
LAST_EVALUATIONS_PER_LATENT = 60
"""Further ones, of the fit of the weights to the rounded timesteps."""
ORDERS = (1, 2)
"""Orders of the formulas that a fit starts from and is compared with."""
SMALLEST_ERROR = 1e-3
"""Latents with smaller root mean square errors count as much as those with this one."""
SMALLEST_DAMPING, FIRST_DAMPING, LARGEST_DAMPING = 1e-6, 1e-3, 1e3
DAMPING_FACTOR = 8.0
"""Damping grows by this where a move is not kept, and shrinks by it where one is."""
LEAST_GAIN = 0.002
"""A fit ends with a move that lowers the error by a smaller part of it."""
WEIGHT_DIFFERENCE = 0.02
"""By which a weight is changed for its derivative."""
TIMESTEP_DIFFERENCE, RELATIVE_TIMESTEP_DIFFERENCE = 3.0, 0.05
"""By which a timestep is changed for its derivative: the larger of the number and the part of the timestep."""


@dataclass(frozen=True)
class LearnedCoefficients:
    """Coefficients found for a model, and their error.

    Attributes:
        rows: a row per step, as `ddim.diffusion.learned` describes them.
        error: mean squared error in [0, 1] on latents that the fit has not seen.
        others: the errors of formulas and learned timesteps on the same latents, by name.
        evaluations: function evaluations, those of the limit and of the comparison included.
    """

    rows: list[list[float]]
    error: float
    others: dict[str, float]
    evaluations: int

    def added_to(self, scheduler: DDIMScheduler) -> DDIMScheduler:
        """Return a scheduler like this one that takes these steps when so many are asked for.

        Args:
            scheduler: whose configuration is extended.

        Example:
            >>> learned = LearnedCoefficients([[900, 880, 0.1], [300, 310, 0.0, -0.2]], 0.001, {}, 100)
            >>> scheduler = learned.added_to(DDIMScheduler())
            >>> scheduler.set_timesteps(2)
            >>> scheduler.timesteps.tolist()
            [880, 310]
        """
        known = dict(scheduler.coefficients_by_steps) | {str(len(self.rows)): self.rows}
        return DDIMScheduler.from_config(scheduler.config, coefficients_by_steps=known)


def learn(
    pipe: DDIMPipeline,
    num_inference_steps: int = 5,
    *,
    num_latents: int = NUM_LATENTS,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
    **condition: Unpack[Condition],
) -> LearnedCoefficients:
    """Learn the coefficients of S steps for a model, deterministically.

    Args:
        pipe: the model; its scheduler decides whether the predicted x_0 is clipped.
        num_inference_steps: S, from 1 to 20.
        num_latents: latents that the coefficients are fitted to, at most 10000.
        seed: of the first latent; as many latents after them evaluate the result.
        batch_size: latents per network evaluation.
        progress: show a bar.
        condition: classes and guidance, as for a call of the pipeline; of several labels latents take one after the
            other, in turn.

    Returns:
        The coefficients and their error.

    Raises:
        ValueError: for an argument out of range.
    """
    S = integer("num_inference_steps", num_inference_steps, 1, min(MAX_LEARNED_STEPS, len(pipe.scheduler)))
    count = integer("num_latents", num_latents, 1, MAX_LATENTS)
    size = integer("batch_size", batch_size, 1)
    fitted, unseen = (Runs(pipe, range(first, first + count), size, condition) for first in (seed, seed + count))
    with tqdm(total=1.0, desc=f"{S} steps", unit="", disable=not progress, bar_format="{l_bar}{bar}|") as bar:
        candidates = dict(start_rows(pipe.scheduler, S))
        errors = {name: fitted.mean_rmse(rows) for name, rows in candidates.items()}
        best = candidates[min(errors, key=lambda name: errors[name])]
        budget = MAX_EVALUATIONS_PER_LATENT * count + fitted.evaluations

        def advance() -> None:
            bar.update(min(1.0, fitted.evaluations / budget) - bar.n)

        rows = fit(fitted, best, budget, advance)
        last = budget + LAST_EVALUATIONS_PER_LATENT * count
        rows = fit(fitted, _rounded(rows, len(pipe.scheduler)), last, advance, weights_only=True)
        bar.update(1 - bar.n)
    others = {name: unseen.mse(candidate) for name, candidate in candidates.items()}
    error = unseen.mse(rows)
    name = min(others, key=lambda name: others[name])
    if others[name] < error:
        rows, error = candidates[name], others[name]
    rows = [[int(row[0]), int(row[1]), *row[2:]] for row in rows]
    return LearnedCoefficients(rows, error, others, fitted.evaluations + unseen.evaluations)


def start_rows(scheduler: DDIMScheduler, num_inference_steps: int) -> Iterator[tuple[str, list[list[float]]]]:
    """Yield the steps of formulas, and those that a scheduler has learned, as rows, with their names.

    Args:
        scheduler: whose timesteps they are.
        num_inference_steps: S.
    """
    S = num_inference_steps
    lists = {f"{spacing}, order {order}": (scheduler.make_timesteps(S, spacing), order)
             for order in ORDERS for spacing in SPACINGS}  # fmt: skip
    lists["the model's own"] = scheduler.make_timesteps(S), scheduler.solver_order
    for name, (timesteps, order) in lists.items():
        if len(timesteps) == S:
            steps = scheduler.make_steps(timesteps, order=order)
            yield name, [[step.timestep, step.timestep, 0.0, *step.corrections] for step in steps]


class Runs:
    """Samples latents along any steps, and compares their images with those of the limit.

    Args:
        pipe: the model.
        seeds: of the latents.
        batch_size: latents per network evaluation.
        condition: classes and guidance; of several labels latents take one after the other, in turn.

    Attributes:
        evaluations: function evaluations so far.
    """

    def __init__(self, pipe: DDIMPipeline, seeds: Sequence[int], batch_size: int, condition: Condition) -> None:
        self.pipe, self.evaluations = pipe, 0
        sampler = pipe.sampler
        conditions: Conditions | None = pipe.conditions(len(seeds), **in_turn(condition, len(seeds)))
        scheduler = sampler.scheduler
        self._prediction_type, self._clip = scheduler.config.prediction_type, scheduler.clip
        batch_size = min(batch_size, len(seeds))
        self._denoiser: Denoiser = sampler.denoiser([], batch_size, conditions=conditions)
        shape = (len(seeds), *sampler.sample_shape)
        self.start = noise_from_seeds(shape, list(seeds), sampler.device)().to(sampler.sample_dtype)
        timesteps = scheduler.make_timesteps(min(REFERENCE_STEPS, len(scheduler)), "blend")
        # Without clipping, which would add an error of its own at every step.
        settings = StepSettings(self._prediction_type)
        *_, last = sample(self.predict, self.start, scheduler.make_steps(timesteps, order=2), settings)
        self.limit = last.sample.clamp(-1, 1)

    def steps(self, rows: Sequence[Sequence[float]]) -> list[Step]:
        """Return the steps of rows.

        Args:
            rows: a row per step.
        """
        return self.pipe.scheduler.make_row_steps(rows)

    def predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Return the network's output, and count its evaluations.

        Args:
            x: of all latents, (N, C, H, W).
            timestep: that it is given, int64 ().
        """
        self.evaluations += len(x)
        with torch.no_grad(), evaluating(self.pipe.unet):
            return self._denoiser(x, timestep)

    def take(self, x: Tensor, step: Step, output: Tensor, history: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Take a step, and return x_prev and epsilon.

        Args:
            x: x_t, (N, C, H, W).
            step: its coefficients.
            output: of the network.
            history: earlier epsilons, the last one first.
        """
        x_prev, x0 = ddim_step(output, x, step, self._prediction_type, self._clip)
        return add_corrections(x_prev, x0, x, step.coefficients(), history)

    def finish(
        self,
        steps: Sequence[Step],
        index: int,
        x: Tensor,
        history: Sequence[Tensor],
        output: Tensor | None = None,
        before: list[tuple[Tensor, list[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """Return the images of a run from one of its steps on.

        Args:
            steps: of the whole run.
            index: of the step that is taken first.
            x: before it.
            history: earlier epsilons, the last one first.
            output: of the network at it, where it is known.
            before: gets x, the history and the output before each step.
        """
        earlier = list(history)
        for step in steps[index:]:
            if output is None:
                output = self.predict(x, torch.tensor(step.timestep, device=x.device))
            if before is not None:
                before.append((x, earlier, output))
            x, epsilon = self.take(x, step, output, earlier)
            earlier, output = [epsilon, *earlier][:MAX_CORRECTIONS], None
        return x

    def errors(self, rows: Sequence[Sequence[float]]) -> Tensor:
        """Return the mean squared error in [0, 1] of each latent, float64 (N,).

        Args:
            rows: a row per step.
        """
        return self.errors_of(self.finish(self.steps(rows), 0, self.start, []))

    def errors_of(self, images: Tensor) -> Tensor:
        """Return the mean squared error in [0, 1] of images, float64 (N,).

        Args:
            images: (N, C, H, W).
        """
        return ((images.clamp(-1, 1) - self.limit) / 2).double().square().flatten(1).mean(1)

    def mse(self, rows: Sequence[Sequence[float]]) -> float:
        """Return the mean squared error in [0, 1].

        Args:
            rows: a row per step.
        """
        return float(self.errors(rows).mean())

    def mean_rmse(self, rows: Sequence[Sequence[float]]) -> float:
        """Return the mean root mean square error in [0, 1].

        Args:
            rows: a row per step.
        """
        return float(self.errors(rows).sqrt().mean())


class State:
    """A run of some rows, step by step, from which runs of other rows can start.

    Args:
        runs: takes the steps.
        rows: a row per step.

    Attributes:
        images: the result, (N, C, H, W).
    """

    def __init__(self, runs: Runs, rows: list[list[float]]) -> None:
        self.runs, self.rows = runs, rows
        self._before: list[tuple[Tensor, list[Tensor], Tensor]] = []
        self.images = runs.finish(runs.steps(rows), 0, runs.start, [], before=self._before)

    def changed(self, index: int, column: int, rows: list[list[float]]) -> Tensor:
        """Return the images of rows that differ in one number.

        Args:
            index: the step whose number it is.
            column: 0 for t, 1 for the network's timestep, others for weights.
            rows: all rows.
        """
        # Where x_t is comes from the step before.
        first = max(0, index - 1) if column == 0 else index
        x, history, output = self._before[first]
        return self.runs.finish(self.runs.steps(rows), first, x, history, None if column == 1 else output)


def fit(
    runs: Runs, rows: list[list[float]], budget: int, advance: Callable[[], None], weights_only: bool = False
) -> list[list[float]]:
    """Minimize the mean root mean square error of rows.

    Args:
        runs: measures it.
        rows: to start from.
        budget: function evaluations of `runs` at which it ends.
        advance: called after each iteration.
        weights_only: leave the timesteps as they are.

    Returns:
        Rows of at most the same error.
    """
    T = len(runs.pipe.scheduler)
    rows = [[*row, *[0.0] * (3 + min(index, MAX_CORRECTIONS) - len(row))] for index, row in enumerate(rows)]
    free = [(i, c) for i, row in enumerate(rows) for c in range(2 if weights_only else 0, len(row))]
    lowest, damping = runs.mean_rmse(rows), FIRST_DAMPING
    has_converged = False
    while runs.evaluations < budget and damping < LARGEST_DAMPING and not has_converged:
        state = State(runs, rows)
        differences, jacobian = _derivatives(state, free, T)
        residual = state.images - runs.limit
        counts = (1 / (runs.errors_of(state.images).sqrt() + SMALLEST_ERROR)).sqrt()
        J = (jacobian * counts.view(-1, *[1] * (jacobian.ndim - 2))).flatten(1).double()
        r = (residual.double() * counts.view(-1, *[1] * (residual.ndim - 1))).flatten()
        normal, gradient = J @ J.T, J @ r
        while damping < LARGEST_DAMPING:
            damped = normal + damping * torch.diag(normal.diagonal() + 1e-9 * normal.diagonal().max())
            move = -torch.linalg.solve(damped, gradient).cpu().numpy() * differences
            trial = _moved(rows, free, move, T)
            error = runs.mean_rmse(trial)
            if error < lowest:
                has_converged = lowest - error < LEAST_GAIN * lowest
                rows, lowest, damping = trial, error, max(damping / DAMPING_FACTOR, SMALLEST_DAMPING)
                break
            damping *= DAMPING_FACTOR
        advance()
    return rows


def _derivatives(
    state: State, free: Sequence[tuple[int, int]], num_train_timesteps: int
) -> tuple[NDArray[np.float64], Tensor]:
    """Return the differences that numbers were changed by, (P,), and the changes of the images, (P, N, C, H, W)."""
    differences, changes = [], []
    for index, column in free:
        t = state.rows[index][column]
        of_timestep = max(TIMESTEP_DIFFERENCE, RELATIVE_TIMESTEP_DIFFERENCE * t)
        difference = WEIGHT_DIFFERENCE if column > 1 else of_timestep
        for sign in (1, -1):
            rows = _moved(state.rows, [(index, column)], np.array([sign * difference]), num_train_timesteps)
            moved = rows[index][column] - t
            # A timestep of the network that is rounded to the one before changes nothing.
            if abs(moved) > 1e-9 and (column != 1 or round(rows[index][1]) != round(t)):
                break
        else:
            moved = 0.0
        differences.append(difference)
        change = state.changed(index, column, rows) - state.images if moved else torch.zeros_like(state.images)
        changes.append(change * (difference / moved) if moved else change)
    return np.array(differences), torch.stack(changes)


def _moved(
    rows: Sequence[Sequence[float]], free: Sequence[tuple[int, int]], move: NDArray[np.float64], T: int
) -> list[list[float]]:
    """Return rows after a move of some of their numbers, with timesteps that decrease within 0 and T - 1."""
    moved = [list(row) for row in rows]
    for (index, column), value in zip(free, move, strict=True):
        moved[index][column] += float(value)
    last = len(moved) - 1
    for column in (0, 1):
        above = float(T)
        for index, row in enumerate(moved):
            row[column] = min(max(row[column], float(last - index)), above - 1)
            above = row[column]
    return moved


def _rounded(rows: Sequence[Sequence[float]], T: int) -> list[list[float]]:
    """Return rows with integers as timesteps, distinct in each column."""
    rounded = [[float(round(row[0])), float(round(row[1])), *row[2:]] for row in rows]
    return _moved(rounded, [], np.array([]), T)
