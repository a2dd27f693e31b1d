"""Fewer steps: learned timesteps, and the number of steps that is enough.

Pictures painted from the same codes in S steps and in very many differ by the error of the steps,

    error(tau) = mean over codes and values of (picture along tau - picture of the limit)^2

in [0, 1], as the mean squared errors of Table 2 in arXiv 2010.02502. The paper picks its subsequences tau by formula
(appendix D.2). `tune` searches for the one of length S with the least error for a given model:

1. it starts from the best of the formulas of `ddim.diffusion.schedule.SPACINGS`; best by the mean of the codes' roots of their
   errors, here and below, because a few codes that end in another picture altogether would decide the plain mean;
2. it moves one timestep between its neighbours, or stretches all timesteps from one on towards 0 or away from it, and
   keeps what lowers the error, with shorter and shorter moves.

A move leaves the steps before it as they were, and what the network said there is not asked again; and a trial ends
when the first codes tell that it is hopeless: it costs about a third of a run. Errors are kept in the user's cache
folder, so that a search that was stopped goes on; the search itself is without chance. What it found is judged by other
codes than those it was found with.

The limit is taken from `REFERENCE_STEPS` steps of order 2, without clipping: clipping the predicted x_0 adds something
of its own at every step, however small, and then there is no limit (`docs/fewer-steps.md`).

With noise (eta > 0) pictures of different subsequences are compared along one path of it. Between two timesteps a step
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
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddim.diffusion.equations import Step, sigma_ddim
from ddim.diffusion.loop import StepSettings, sample
from ddim.diffusion.noise import MAX_SEED, NoiseSource, check_seeds, noise_from_generator, noise_from_seeds
from ddim.diffusion.schedule import SPACINGS
from ddim.io.atomic import atomic_write
from ddim.io.cache import cache_folder
from ddim.io.config import to_json
from ddim.io.fingerprint import model_sha256
from ddim.pipeline import DDIMPipeline
from ddim.sampler import evaluating
from ddim.scheduler import DDIMScheduler
from ddim.validation import integer, real

CODES = 64
"""Codes that a search looks at; as many others judge what it found."""
BATCH = 32
REFERENCE_STEPS = 100
ROUNDS = (1 / 2, 1 / 4, 1 / 8)
"""Lengths of moves: parts of the way to the next timestep, or of the stretch to 0."""
PRUNE_RATIO = 1.02
"""Timesteps are given up when the first codes have so many times the error of the best so far."""
MAX_STEPS_TRIED = 200


@dataclass(frozen=True)
class Tuned:
    """Timesteps found for a model, and what they are worth.

    Attributes:
        timesteps: decreasing, S of them.
        error: on codes that the search has not seen.
        classic: errors of the formulas on the same codes, by spacing.
        order: that they are for.
        eta: that they are for.
    """

    timesteps: list[int]
    error: float
    classic: dict[str, float]
    order: int
    eta: float

    def added_to(self, scheduler: DDIMScheduler) -> DDIMScheduler:
        """A scheduler like this one that takes these timesteps when so many steps are asked for.

        Its `solver_order` becomes that of the timesteps, and lists that were learned for another order are dropped.
        """
        config = scheduler.config
        known = dict(config.timesteps_by_steps or {}) if config.solver_order == self.order else {}
        known[str(len(self.timesteps))] = list(self.timesteps)
        return DDIMScheduler.from_config(config, solver_order=self.order, timesteps_by_steps=known)


def tune(
    pipe: DDIMPipeline,
    num_inference_steps: int = 10,
    order: int = 2,
    eta: float = 0.0,
    *,
    codes: int = CODES,
    seed: int = 0,
    batch_size: int = BATCH,
    progress: bool = True,
) -> Tuned:
    """The subsequence of S timesteps that suits a model best.

    Args:
        pipe: the model; its scheduler says whether the predicted x_0 is clipped.
        num_inference_steps: S, from 1 to the number of timesteps the model was trained with.
        order: of the method, 1 or 2.
        eta: of equation (16); at order 2 it is 0.
        codes: how many the search looks at.
        seed: of the first code; as many codes after them judge the result.
        batch_size: codes that the network sees at once.
        progress: show a bar.

    Raises:
        ValueError: for an argument out of range.
    """
    codes = integer("codes", codes, 1)
    judge, other = (ErrorEvaluator(pipe, order, eta, range(s, s + codes), batch_size) for s in (seed, seed + codes))
    formulas = {spacing: pipe.scheduler.make_timesteps(num_inference_steps, spacing) for spacing in SPACINGS}
    # Some give fewer timesteps than are asked for.
    formulas = {name: steps for name, steps in formulas.items() if len(steps) == num_inference_steps}
    trials = len(formulas) + 4 * num_inference_steps * len(ROUNDS)
    with tqdm(total=trials, desc=f"{num_inference_steps} steps", unit="trial", disable=not progress) as bar:

        def error(timesteps: Sequence[int]) -> float:
            bar.update()
            return judge.typical(timesteps)

        errors = {name: error(steps) for name, steps in formulas.items()}
        start = min(errors, key=lambda name: errors[name])
        best = search(error, formulas[start], len(pipe.scheduler), judge.keep)
        bar.total = bar.n
    classic = {name: other.error(steps) for name, steps in formulas.items()}
    found = other.error(best)
    # The search may have learned its codes by heart.
    name = min(classic, key=lambda name: classic[name])
    if classic[name] < found:
        best, found = formulas[name], classic[name]
    return Tuned(best, found, classic, order, float(eta))


def search(
    error: Callable[[Sequence[int]], float],
    start: Sequence[int],
    num_train_timesteps: int,
    keep: Callable[[Sequence[int]], None] = lambda _: None,
) -> list[int]:
    """Decreasing timesteps of little error, by the moves of the module's text.

    Args:
        error: of decreasing timesteps; deterministic.
        start: where to start.
        num_train_timesteps: T; timesteps stay within 0 and T - 1.
        keep: told each time a better list is found, and about the start.

    Returns:
        As many timesteps as `start` has, of at most its error.
    """
    best, lowest = list(start), error(start)
    keep(best)
    for length in ROUNDS:
        for index in range(len(best)):
            for move in (length, -length, 1 + length / 2, 1 - length / 2):
                trial = _moved(best, index, move, num_train_timesteps)
                if trial != best and (found := error(trial)) < lowest:
                    best, lowest = trial, found
                    keep(best)
    return best


def _moved(timesteps: list[int], index: int, move: float, num_train_timesteps: int) -> list[int]:
    """Timesteps after a move: by a part of the way to a neighbour (|move| below 1), towards noise where it is positive;
    or all from `index` on stretched by a factor near 1.
    """
    trial = list(timesteps)
    t = timesteps[index]
    if abs(move) < 0.75:
        above = timesteps[index - 1] if index else num_train_timesteps
        below = timesteps[index + 1] if index + 1 < len(timesteps) else -1
        way = above - t if move > 0 else t - below
        distance = min(max(1, round(abs(move) * way)), way - 1)
        trial[index] += distance if move > 0 else -distance
    else:
        above = timesteps[index - 1] if index else num_train_timesteps
        for i in range(index, len(trial)):
            # Distinct, and with room for those that follow.
            room = len(trial) - 1 - i
            trial[i] = max(room, min(above - 1, round(trial[i] * move)))
            above = trial[i]
    return trial


def enough_steps(
    pipe: DDIMPipeline,
    tolerance: float,
    order: int | None = None,
    *,
    codes: int = 32,
    seed: int = 0,
    batch_size: int = BATCH,
) -> tuple[int, float]:
    """The smallest number of steps whose error, on the pipeline's own timesteps with eta = 0, is at most a tolerance.

    The error is taken to fall with the number of steps: it is looked at for 1, 2, 4, ... steps, then between the last
    that was too large and the first that was not.

    Args:
        pipe: the model.
        tolerance: mean squared error in [0, 1].
        order: of the method; the scheduler's `solver_order` unless given.
        codes: how many the error is measured on.
        seed: of the first of them.
        batch_size: codes that the network sees at once.

    Returns:
        The number of steps, and its error.

    Raises:
        ValueError: for an argument out of range, or if `MAX_STEPS_TRIED` steps are not enough.
    """
    if not 0 < real("tolerance", tolerance) < 1:
        raise ValueError(f"tolerance is {tolerance}; it must lie above 0 and below 1")
    scheduler = pipe.scheduler
    order = scheduler.config.solver_order if order is None else order
    judge = ErrorEvaluator(pipe, order, 0.0, range(seed, seed + integer("codes", codes, 1)), batch_size)

    def error(number: int) -> float:
        return judge.error(scheduler.make_timesteps(number, order=order))

    most = min(MAX_STEPS_TRIED, len(scheduler))
    few, many = 0, 1
    while error(many) > tolerance:
        if many == most:
            raise ValueError(
                f"{most} steps come to an error of {error(most):.1e}, more than the tolerance of {tolerance:g}; give a "
                "larger one"
            )
        few, many = many, min(2 * many, most)
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if error(middle) <= tolerance else (middle, many)
    return many, error(many)


class ErrorEvaluator:
    """Errors of subsequences, for some codes of a model.

    Args:
        pipe: the model.
        order: of the method.
        eta: of equation (16).
        seeds: of the codes.
        batch_size: codes that the network sees at once.
    """

    def __init__(self, pipe: DDIMPipeline, order: int, eta: float, seeds: Sequence[int], batch_size: int) -> None:
        self.pipe, self.order, self.eta = pipe, order, eta
        size = integer("batch_size", batch_size, 1)
        checked = check_seeds(seeds, len(seeds))
        self._parts = [checked[first : first + size] for first in range(0, len(checked), size)]
        # The best timesteps so far, and what the network said along them, part by part.
        self._kept: tuple[list[int], list[list[Tensor]]] = [], []
        self._latest = self._kept
        self._best: list[float] = []
        self._limits: dict[int, Tensor] = {}
        config = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
        for name in ("timestep_spacing", "timesteps_by_steps", "solver_order"):
            config.pop(name)
        key = {
            "model_sha256": model_sha256(pipe),
            "scheduler": config,
            "dtype": str(pipe.dtype),
            "order": order,
            "eta": eta,
            "seeds": [checked[0], len(checked)],
            "batch_size": size,
            "settings": [REFERENCE_STEPS, PRUNE_RATIO],
        }
        sha256 = hashlib.sha256(to_json(key).encode()).hexdigest()
        self._path = cache_folder() / "tuning" / f"{sha256}.json"
        self._errors = self._read()

    def error(self, timesteps: Sequence[int]) -> float:
        """Mean squared error in [0, 1] along these timesteps, infinite for hopeless ones; known ones cost nothing."""
        return self._mean([squared for squared, _ in self._known(timesteps)])

    def typical(self, timesteps: Sequence[int]) -> float:
        """The same for the mean of the codes' roots of their mean squared errors."""
        return self._mean([root for _, root in self._known(timesteps)])

    def _known(self, timesteps: Sequence[int]) -> list[tuple[float, float]]:
        name = _name(timesteps)
        if name not in self._errors:
            self._errors[name] = self._measure(list(timesteps))
            self._write()
        return self._errors[name]

    def _mean(self, values: list[float]) -> float:
        """Over all codes, from the means of parts."""
        if len(values) < len(self._parts):
            return math.inf
        return sum(e * len(part) for e, part in zip(values, self._parts, strict=True)) / sum(map(len, self._parts))

    def keep(self, timesteps: Sequence[int]) -> None:
        """Compare what follows with these timesteps, the best so far."""
        self._best = [root for _, root in self._errors[_name(timesteps)]]
        if self._latest[0] == list(timesteps):
            self._kept = self._latest

    def _measure(self, timesteps: list[int]) -> list[tuple[float, float]]:
        """Both errors of the parts; of the first of them, if those are hopeless."""
        steps = self.pipe.scheduler.make_steps(timesteps, self.eta, order=self.order)
        kept, outputs = self._kept
        same = next((i for i, (a, b) in enumerate(zip(kept, timesteps, strict=False)) if a != b), len(kept))
        errors: list[tuple[float, float]] = []
        self._latest = timesteps, []
        for part in range(len(self._parts)):
            pictures, said = self._walk(steps, part, outputs[part][:same] if outputs else [], clip=True)
            self._latest[1].append(said)
            squared = ((pictures - self._limit(part)) / 2).double().square().flatten(1).mean(1)
            errors.append((float(squared.mean()), float(squared.sqrt().mean())))
            if self._best and sum(root for _, root in errors) > PRUNE_RATIO * sum(self._best[: len(errors)]):
                break
        return errors

    def _limit(self, part: int) -> Tensor:
        """Pictures of very many steps, (N, C, H, W) in [-1, 1]."""
        if part not in self._limits:
            scheduler = self.pipe.scheduler
            timesteps = scheduler.make_timesteps(min(REFERENCE_STEPS, len(scheduler)), "blend")
            steps = scheduler.make_steps(timesteps, self.eta, order=1 if self.eta else 2)
            self._limits[part] = self._walk(steps, part, [], clip=False)[0]
        return self._limits[part]

    def _walk(
        self, steps: Sequence[Step], part: int, known: Sequence[Tensor], clip: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Images, and what the network said at each step; at the first steps it is `known`."""
        pipe, seeds = self.pipe, self._parts[part]
        shape = (len(seeds), *pipe.sample_shape)
        ask = pipe._denoiser(steps)
        said: list[Tensor] = []

        def denoiser(x: Tensor, timestep: Tensor) -> Tensor:
            said.append(known[len(said)] if len(said) < len(known) else ask(x, timestep))
            return said[-1]

        scheduler = pipe.scheduler
        x = noise_from_seeds(shape, seeds, pipe.device)().to(pipe._sample_dtype)
        noise = self._noise(steps, shape, seeds[0]) if self.eta else None
        settings = StepSettings(scheduler.config.prediction_type, scheduler.clip if clip else None, noise=noise)
        with torch.no_grad(), evaluating(pipe.unet):
            for state in sample(denoiser, x, steps, settings):
                x = state.sample
        return x.clamp(-1, 1), said

    def _noise(self, steps: Sequence[Step], shape: Sequence[int], seed: int) -> NoiseSource:
        """What the steps add, each along the same path; see the module's text."""
        alphas, device = self.pipe.scheduler._alphas_cumprod, self.pipe.device

        def draw() -> Iterator[Tensor]:
            for step in steps:
                total, variance = torch.zeros(tuple(shape), device=device), 0.0
                for u in range(step.timestep, max(step.prev_timestep, 0), -1):
                    alpha, alpha_prev = float(alphas[u]), float(alphas[u - 1])
                    weight = sigma_ddim(alpha, alpha_prev, self.eta) / math.sqrt(alpha_prev)
                    # Seeds of the path's own, far from those of codes.
                    generator = torch.Generator().manual_seed((seed + 1) * 2**32 + u & MAX_SEED)
                    total += weight * noise_from_generator(shape, generator, device, torch.float32)()
                    variance += weight**2
                yield total / math.sqrt(variance) if variance else total

        return draw().__next__

    def _read(self) -> dict[str, list[tuple[float, float]]]:
        """What is known; a damaged file is as good as none."""
        try:
            known = json.loads(self._path.read_text())
            return {str(name): [(float(squared), float(root)) for squared, root in e] for name, e in known.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def _write(self) -> None:
        """Keep what is known, where that can be done."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._path) as temporary:
                temporary.write_text(to_json(self._errors))
        except OSError:
            return


def _name(timesteps: Sequence[int]) -> str:
    return ",".join(map(str, timesteps))


def draw_timesteps(lists: Mapping[str, Sequence[int]], num_train_timesteps: int, width: int = 64) -> str:
    """Subsequences as lines of text, a mark a timestep, on a scale of square roots, which widens the small ones.

    Args:
        lists: timesteps by name.
        num_train_timesteps: T.
        width: of a line, in characters.
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


def plot_timesteps(lists: Mapping[str, Sequence[int]], path: Any) -> None:
    """The same as a picture.

    Args:
        lists: timesteps by name.
        path: a PNG or SVG, by the suffix.
    """
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
