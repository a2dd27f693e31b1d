"""Fewer steps: learned timesteps, and the smallest number of steps that is enough.

Images sampled from the same latents in S steps and in very many differ by the error of the steps,

    error(tau) = mean over latents and values of (image along tau - image of the limit)^2

in [0, 1], as the mean squared errors of Table 2 in arXiv 2010.02502. The paper chooses its subsequences tau by formula
(appendix D.2). `tune` searches for the one of length S with the least error for a given model:

1. it starts from the best of the formulas of `ddim.diffusion.schedule.SPACINGS`; best by the mean of the latents' root
   mean square errors, here and below, because a few latents that lead to another image altogether would dominate the
   plain mean;
2. it moves one timestep between its neighbors, or stretches all timesteps from one on towards 0 or away from it, and
   keeps what lowers the error, with shorter and shorter moves.

A move leaves the steps before it unchanged, and the predictions there are reused; and a trial is pruned when the first
latents show an error above that of the best so far: it costs about a third of a run. Errors are cached in the user's
cache folder, so that a search that was stopped resumes; the search itself is deterministic. Its result is evaluated on
other latents than those it was found with.

The limit is taken from `REFERENCE_STEPS` steps of order 2, without clipping: clipping the predicted x_0 adds an error
of its own at every step, however small, and then the limit does not exist (`docs/fewer-steps.md`).

With noise (eta > 0) images of different subsequences are compared along one path of it. Between two timesteps a step
adds to x / sqrt(alpha) what single steps would have added, one after the other,

    sum over u of sigma_u / sqrt(alpha_{u-1}) noise_u

scaled to the standard deviation of the step, with noise_u standard Gaussian, the same for all subsequences.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ddim.diffusion.equations import Step, sigma_ddim
from ddim.diffusion.guidance import Conditions
from ddim.diffusion.loop import StepSettings, sample
from ddim.diffusion.noise import MAX_SEED, NoiseSource, check_seeds, noise_from_generator, noise_from_seeds
from ddim.diffusion.schedule import SPACINGS
from ddim.extras import require
from ddim.io.atomic import atomic_write
from ddim.io.cache import Cache
from ddim.io.class_labels import count_labels
from ddim.io.fingerprint import model_sha256
from ddim.io.json_files import to_json
from ddim.latents import Condition
from ddim.pipeline import DDIMPipeline
from ddim.sampler import evaluating
from ddim.scheduler import DDIMScheduler
from ddim.validation import integer, real

NUM_LATENTS = 64
"""Latents that a search measures errors on; as many others evaluate its result."""
MAX_LATENTS = 10_000
"""Their images of very many steps are kept in memory."""
BATCH_SIZE = 32
REFERENCE_STEPS = 100
MOVE_LENGTHS = (1 / 2, 1 / 4, 1 / 8)
"""Lengths of moves, one per round: parts of the distance to the next timestep, or of the stretch to 0."""
PRUNE_RATIO = 1.02
"""A trial is pruned when the first latents have this many times the error of the best timesteps so far."""
MAX_STEPS = 200
"""The largest number of steps that `enough_steps` tries."""


@dataclass(frozen=True)
class TunedTimesteps:
    """Timesteps found for a model, and their error.

    Attributes:
        timesteps: decreasing, S of them.
        error: mean squared error in [0, 1] on latents that the search has not seen.
        classic: the errors of the formulas on the same latents, by spacing.
        order: the order of the solver they were found for.
        eta: the noise of the process they were found for.
    """

    timesteps: list[int]
    error: float
    classic: dict[str, float]
    order: int
    eta: float

    def added_to(self, scheduler: DDIMScheduler) -> DDIMScheduler:
        """Return a scheduler like this one that takes these timesteps when S steps are asked for.

        Its `solver_order` becomes that of the timesteps, and lists that were learned for another order are dropped.

        Args:
            scheduler: whose configuration is extended.

        Example:
            >>> tuned = TunedTimesteps([900, 300, 0], 0.001, {}, order=2, eta=0.0)
            >>> tuned.added_to(DDIMScheduler()).make_timesteps(3)
            [900, 300, 0]
        """
        known = dict(scheduler.timesteps_by_steps) if scheduler.solver_order == self.order else {}
        S = str(len(self.timesteps))
        known[S] = list(self.timesteps)
        # Coefficients of as many steps would be used instead.
        others = {key: rows for key, rows in scheduler.coefficients_by_steps.items() if key != S}
        return DDIMScheduler.from_config(
            scheduler.config, solver_order=self.order, timesteps_by_steps=known, coefficients_by_steps=others or None
        )


def tune(
    pipe: DDIMPipeline,
    num_inference_steps: int = 10,
    order: int = 2,
    eta: float = 0.0,
    *,
    num_latents: int = NUM_LATENTS,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
    **condition: Unpack[Condition],
) -> TunedTimesteps:
    """Search for the subsequence of S timesteps with the least error for a model.

    Args:
        pipe: the model; its scheduler decides whether the predicted x_0 is clipped.
        num_inference_steps: S, from 1 to the number of timesteps the model was trained with.
        order: of the solver, 1 to 4.
        eta: the noise of the process; 0 above order 1.
        num_latents: latents on which errors are measured, at most 10000.
        seed: of the first latent; as many latents after them evaluate the result.
        batch_size: latents per network evaluation.
        progress: show a bar.
        condition: classes and guidance, as for a call of the pipeline; of several labels latents take one after the
            other, in turn.

    Returns:
        The timesteps and their error.

    Raises:
        ValueError: for an argument out of range.
    """
    num_latents = integer("num_latents", num_latents, 1, MAX_LATENTS)
    S = num_inference_steps
    seeds = range(seed, seed + num_latents), range(seed + num_latents, seed + 2 * num_latents)
    search_errors, test_errors = (ErrorEvaluator(pipe, order, eta, part, batch_size, condition) for part in seeds)
    formulas = {spacing: pipe.scheduler.make_timesteps(S, spacing) for spacing in SPACINGS}
    # Some give fewer timesteps than are asked for.
    formulas = {name: timesteps for name, timesteps in formulas.items() if len(timesteps) == S}
    trials = len(formulas) + 4 * S * len(MOVE_LENGTHS)
    with tqdm(total=trials, desc=f"{S} steps", unit="trial", disable=not progress) as bar:

        def error(timesteps: Sequence[int]) -> float:
            bar.update()
            return search_errors.mean_rmse(timesteps)

        errors = {name: error(timesteps) for name, timesteps in formulas.items()}
        start = min(errors, key=lambda name: errors[name])
        best = search(error, formulas[start], len(pipe.scheduler), search_errors.set_best)
        bar.total = bar.n
    classic = {name: test_errors.mse(timesteps) for name, timesteps in formulas.items()}
    best_error = test_errors.mse(best)
    # The search may have overfitted its latents.
    name = min(classic, key=lambda name: classic[name])
    if classic[name] < best_error:
        best, best_error = formulas[name], classic[name]
    return TunedTimesteps(best, best_error, classic, order, float(eta))


def search(
    error: Callable[[Sequence[int]], float],
    start: Sequence[int],
    num_train_timesteps: int,
    on_improvement: Callable[[Sequence[int]], None] = lambda _: None,
) -> list[int]:
    """Minimize the error of decreasing timesteps by moving them one at a time, in shorter and shorter moves.

    Args:
        error: of decreasing timesteps; deterministic.
        start: the timesteps to start from.
        num_train_timesteps: T; timesteps stay within 0 and T - 1.
        on_improvement: called with the start, and with each better list found.

    Returns:
        As many timesteps as `start` has, of at most its error.

    Example:
        >>> best = search(lambda timesteps: abs(timesteps[0] - 700), [900, 0], 1000)
        >>> abs(best[0] - 700) < 50
        True
    """
    best, lowest = list(start), error(start)
    on_improvement(best)
    for length in MOVE_LENGTHS:
        for index in range(len(best)):
            for move in (length, -length, 1 + length / 2, 1 - length / 2):
                trial = _moved(best, index, move, num_train_timesteps)
                if trial != best and (trial_error := error(trial)) < lowest:
                    best, lowest = trial, trial_error
                    on_improvement(best)
    return best


def _moved(timesteps: list[int], index: int, move: float, num_train_timesteps: int) -> list[int]:
    """Return timesteps after a move.

    A move below 3/4 in size goes by that part of the distance to a neighbor, towards noise where it is positive; a
    larger one is a factor by which all timesteps from `index` on are stretched.
    """
    trial = list(timesteps)
    t = timesteps[index]
    if abs(move) < 0.75:
        above = timesteps[index - 1] if index else num_train_timesteps
        below = timesteps[index + 1] if index + 1 < len(timesteps) else -1
        gap = above - t if move > 0 else t - below
        distance = min(max(1, round(abs(move) * gap)), gap - 1)
        trial[index] += distance if move > 0 else -distance
    else:
        above = timesteps[index - 1] if index else num_train_timesteps
        for i in range(index, len(trial)):
            # Distinct, and leaving enough timesteps below for those that follow.
            smallest = len(trial) - 1 - i
            trial[i] = max(smallest, min(above - 1, round(trial[i] * move)))
            above = trial[i]
    return trial


def enough_steps(
    pipe: DDIMPipeline,
    tolerance: float,
    order: int | None = None,
    *,
    num_latents: int = 32,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    **condition: Unpack[Condition],
) -> tuple[int, float]:
    """Find the smallest number of steps whose error at eta = 0 is within a tolerance.

    The error is assumed to fall with the number of steps: it is measured for 1, 2, 4, ... steps, then between the last
    that was too large and the first that was not.

    Args:
        pipe: the model.
        tolerance: mean squared error in [0, 1]; above 0, below 1.
        order: of the solver, 1 to 4; defaults to the scheduler's `solver_order`, and to learned coefficients where it
            has some.
        num_latents: latents on which the error is measured, at most 10000.
        seed: of the first of them.
        batch_size: latents per network evaluation.
        condition: classes and guidance, as for a call of the pipeline; of several labels latents take one after the
            other, in turn.

    Returns:
        The number of steps, and its error.

    Raises:
        ValueError: for an argument out of range, or if `MAX_STEPS` steps are not enough.
        TypeError: for a tolerance that is not a number.
    """
    tolerance = real("tolerance", tolerance, above=0, below=1)
    scheduler = pipe.scheduler
    takes_learned = order is None
    order = scheduler.solver_order if order is None else order
    seeds = range(seed, seed + integer("num_latents", num_latents, 1, MAX_LATENTS))
    errors = ErrorEvaluator(pipe, order, 0.0, seeds, batch_size, condition)

    def error(number: int) -> float:
        learned = scheduler.make_learned_steps(number) if takes_learned else None
        if learned is not None:
            return errors.mse_of_steps(learned)
        return errors.mse(scheduler.make_timesteps(number, order=order))

    largest = min(MAX_STEPS, len(scheduler))
    too_few, enough = 0, 1
    while error(enough) > tolerance:
        if enough == largest:
            raise ValueError(
                f"tolerance must be at least the error of {largest} steps, {error(enough):.1e}, got {tolerance:g}"
            )
        too_few, enough = enough, min(2 * enough, largest)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if error(middle) <= tolerance else (middle, enough)
    return enough, error(enough)


class ErrorEvaluator:
    """Measures the errors of subsequences of timesteps on some latents of a model, and caches them.

    Args:
        pipe: the model.
        order: of the solver, 1 to 4.
        eta: the noise of the process.
        seeds: of the latents.
        batch_size: latents per network evaluation.
        condition: classes and guidance; of several labels latents take one after the other, in turn.

    Raises:
        ValueError: for an argument out of range, or a condition that the model does not take.
    """

    def __init__(
        self,
        pipe: DDIMPipeline,
        order: int,
        eta: float,
        seeds: Sequence[int],
        batch_size: int,
        condition: Condition | None = None,
    ) -> None:
        self.pipe, self.order, self.eta = pipe, order, eta
        self._conditions = pipe.conditions(len(seeds), **in_turn(condition or {}, len(seeds)))
        size = integer("batch_size", batch_size, 1)
        checked = check_seeds(seeds, len(seeds))
        self._batches = [checked[first : first + size] for first in range(0, len(checked), size)]
        # The best timesteps so far, and the predictions along them, batch by batch.
        self._best: tuple[list[int], list[list[Tensor]]] = [], []
        self._latest = self._best
        self._best_rmse: list[float] = []
        self._limits: dict[int, Tensor] = {}
        overridden = ("timestep_spacing", *DDIMScheduler.own_settings)
        config = {key: value for key, value in pipe.scheduler.config.items() if key[0] != "_" and key not in overridden}
        key = {
            "model_sha256": model_sha256(pipe),
            "scheduler": config,
            "dtype": str(pipe.dtype),
            "order": order,
            "eta": eta,
            "seeds": [checked[0], len(checked)],
            "batch_size": size,
            "settings": [REFERENCE_STEPS, PRUNE_RATIO],
        } | (_describe_condition(self._conditions) if condition else {})
        sha256 = hashlib.sha256(to_json(key).encode()).hexdigest()
        self._cache, self._entry = Cache("tuning"), sha256
        self._errors = self._cache.read(self._entry, _parse_errors) or {}

    def mse(self, timesteps: Sequence[int]) -> float:
        """Return the mean squared error in [0, 1], infinite where the trial was pruned.

        Args:
            timesteps: decreasing.
        """
        return self._mean([mse for mse, _ in self._errors_of(timesteps)])

    def mse_of_steps(self, steps: Sequence[Step]) -> float:
        """Return the mean squared error in [0, 1] of steps with learned coefficients.

        Args:
            steps: of `DDIMScheduler.make_learned_steps`.
        """
        return self._mean([self._compare(self._sample(steps, batch, [], clip=True)[0], batch)[0]
                           for batch in range(len(self._batches))])  # fmt: skip

    def mean_rmse(self, timesteps: Sequence[int]) -> float:
        """Return the mean of the latents' root mean square errors in [0, 1], infinite where the trial was pruned.

        Args:
            timesteps: decreasing.
        """
        return self._mean([rmse for _, rmse in self._errors_of(timesteps)])

    def set_best(self, timesteps: Sequence[int]) -> None:
        """Prune later trials by the error of these timesteps, and reuse the predictions along them.

        Args:
            timesteps: decreasing; measured already.
        """
        self._best_rmse = [rmse for _, rmse in self._errors[_key(timesteps)]]
        if self._latest[0] == list(timesteps):
            self._best = self._latest

    def _errors_of(self, timesteps: Sequence[int]) -> list[tuple[float, float]]:
        key = _key(timesteps)
        if key not in self._errors:
            self._errors[key] = self._measure(list(timesteps))
            self._cache.write(self._entry, [to_json(self._errors).encode()])
        return self._errors[key]

    def _mean(self, values: list[float]) -> float:
        """Return the mean over all latents, from the means of batches."""
        if len(values) < len(self._batches):
            return math.inf
        total = sum(value * len(batch) for value, batch in zip(values, self._batches, strict=True))
        return total / sum(map(len, self._batches))

    def _measure(self, timesteps: list[int]) -> list[tuple[float, float]]:
        """Return both errors of each batch; of the first batches alone, where the trial is pruned."""
        steps = self.pipe.scheduler.make_steps(timesteps, self.eta, order=self.order)
        best, predictions = self._best
        shared = next((i for i, (a, b) in enumerate(zip(best, timesteps, strict=False)) if a != b), len(best))
        errors: list[tuple[float, float]] = []
        self._latest = timesteps, []
        for batch in range(len(self._batches)):
            known = predictions[batch][:shared] if predictions else []
            images, outputs = self._sample(steps, batch, known, clip=True)
            self._latest[1].append(outputs)
            errors.append(self._compare(images, batch))
            if self._best_rmse and sum(rmse for _, rmse in errors) > PRUNE_RATIO * sum(self._best_rmse[: len(errors)]):
                break
        return errors

    def _compare(self, images: Tensor, batch: int) -> tuple[float, float]:
        """Return both errors of the images of a batch."""
        squared = ((images - self._limit(batch)) / 2).double().square().flatten(1).mean(1)
        return float(squared.mean()), float(squared.sqrt().mean())

    def _limit(self, batch: int) -> Tensor:
        """Return the images of very many steps, (N, C, H, W) in [-1, 1]."""
        if batch not in self._limits:
            scheduler = self.pipe.scheduler
            timesteps = scheduler.make_timesteps(min(REFERENCE_STEPS, len(scheduler)), "blend")
            steps = scheduler.make_steps(timesteps, self.eta, order=1 if self.eta else 2)
            self._limits[batch] = self._sample(steps, batch, [], clip=False)[0]
        return self._limits[batch]

    def _sample(
        self, steps: Sequence[Step], batch: int, known: Sequence[Tensor], clip: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Return images and the prediction of each step, which at the first steps is `known`."""
        sampler, seeds = self.pipe.sampler, self._batches[batch]
        shape = (len(seeds), *sampler.sample_shape)
        first = sum(map(len, self._batches[:batch]))
        conditions = self._conditions and self._conditions.take(slice(first, first + len(seeds)))
        predict = sampler.denoiser(steps, conditions=conditions)
        outputs: list[Tensor] = []

        def denoiser(x: Tensor, timestep: Tensor) -> Tensor:
            outputs.append(known[len(outputs)] if len(outputs) < len(known) else predict(x, timestep))
            return outputs[-1]

        scheduler = sampler.scheduler
        x = noise_from_seeds(shape, seeds, sampler.device)().to(sampler.sample_dtype)
        noise = self._noise(steps, shape, seeds[0]) if self.eta else None
        settings = StepSettings(scheduler.config.prediction_type, scheduler.clip if clip else None, noise=noise)
        with torch.no_grad(), evaluating(sampler.unet):
            for state in sample(denoiser, x, steps, settings):
                x = state.sample
        return x.clamp(-1, 1), outputs

    def _noise(self, steps: Sequence[Step], shape: Sequence[int], seed: int) -> NoiseSource:
        """Return the noise of each step, all along the same path (see the module's text)."""
        alphas, device = self.pipe.scheduler.alphas_cumprod_float64, self.pipe.device

        def draw() -> Iterator[Tensor]:
            for step in steps:
                total, variance = torch.zeros(tuple(shape), device=device), 0.0
                for u in range(step.timestep, max(step.prev_timestep, 0), -1):
                    alpha, alpha_prev = float(alphas[u]), float(alphas[u - 1])
                    weight = sigma_ddim(alpha, alpha_prev, self.eta) / math.sqrt(alpha_prev)
                    # The path's seeds are far from those of latents.
                    generator = torch.Generator().manual_seed((seed + 1) * 2**32 + u & MAX_SEED)
                    total += weight * noise_from_generator(shape, generator, device, torch.float32)()
                    variance += weight**2
                yield total / math.sqrt(variance) if variance else total

        return draw().__next__


def in_turn(condition: Condition, count: int) -> Condition:
    """Return a condition with labels for a number of latents, which take several in turn.

    Args:
        condition: with one label or several.
        count: the number of latents.

    Example:
        >>> in_turn({"class_labels": [3, 8]}, 3)
        {'class_labels': [3, 8, 3]}
    """
    result: Any = dict(condition)
    for name in result.keys() & {"class_labels", "negative_labels"}:
        if (given := count_labels(result[name])) > 1:
            result[name] = [result[name][index % given] for index in range(count)]
    turned: Condition = result
    return turned


def _describe_condition(conditions: Conditions | None) -> dict[str, Any]:
    """Return what identifies conditions in the cache."""
    if conditions is None:
        return {}
    guide: Any = conditions.guide
    return {
        "labels": None if conditions.labels is None else conditions.labels.tolist(),
        "baseline_labels": None if conditions.baseline_labels is None else conditions.baseline_labels.tolist(),
        "guidance": [conditions.guidance.scale, conditions.guidance.interval],
        "guide_sha256": None if guide is None else model_sha256(guide),
    }


def _parse_errors(content: np.ndarray) -> dict[str, list[tuple[float, float]]]:
    """Read the cached errors of a search: those of each batch, by timesteps."""
    errors = json.loads(content.tobytes())
    if not all(errors.values()):
        raise ValueError("errors of no batch")
    return {str(key): [(float(mse), float(rmse)) for mse, rmse in batches] for key, batches in errors.items()}


def _key(timesteps: Sequence[int]) -> str:
    return ",".join(map(str, timesteps))


def draw_timesteps(lists: Mapping[str, Sequence[int]], num_train_timesteps: int, width: int = 64) -> str:
    """Draw subsequences as lines of text, one mark per timestep, on a square-root scale, which widens the small ones.

    Args:
        lists: timesteps by name.
        num_train_timesteps: T.
        width: of a line, in characters.

    Example:
        >>> print(draw_timesteps({"a": [9, 4, 0]}, 10, width=7))
        a  |···|·|
        t  0     9
    """
    longest = max(map(len, lists))
    lines = []
    for name, timesteps in lists.items():
        line = ["·"] * width
        for t in timesteps:
            line[round(math.sqrt(t / max(1, num_train_timesteps - 1)) * (width - 1))] = "|"
        lines.append(f"{name:<{longest}}  {''.join(line)}")
    end = str(num_train_timesteps - 1)
    lines.append(f"{'t':<{longest}}  0{end:>{width - 1}}")
    return "\n".join(lines)


def plot_timesteps(lists: Mapping[str, Sequence[int]], path: Path) -> None:
    """Plot subsequences, one row per name.

    Args:
        lists: timesteps by name.
        path: a PNG or SVG, by the suffix.
    """
    require("a plot", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.6 + 0.4 * len(lists)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, timesteps in enumerate(lists.values()):
        axes.plot(timesteps, [row] * len(timesteps), "|", markersize=14, markeredgewidth=2)
    axes.set(yticks=range(len(lists)), yticklabels=list(lists), xlabel="timestep", xscale="symlog")
    axes.invert_yaxis()
    with atomic_write(path) as temporary:
        figure.savefig(temporary)
