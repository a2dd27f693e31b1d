"""The objective of distillation: to take several steps of a teacher in one (`ddim.diffusion.distillation`).

Each batch has equally many images at each of the S timesteps of the student, whose noise schedule has the noise of S of
the teacher's timesteps. A noised image x_t goes through k steps of the teacher to x_s; the network learns the v (or the
x_0) that takes x_t there in one step of DDIM. Nothing else differs from training: data, optimizer, averages,
checkpoints and resuming are those of `ddim.training.trainer`.

The images decide where the teacher is asked, not what is learned: the teacher's own samples serve as well.

A teacher with classes is given those of the images, with guidance of its own (Meng et al., arXiv 2210.03142): what two
evaluations per step of the teacher give, the student gives with one.

On a GPU the k steps of the teacher are recorded as one CUDA graph, so that they are one launch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddim.diffusion.distillation import Segments, check_starts, divide_segments, follow_teacher, velocity_target
from ddim.diffusion.equations import make_steps
from ddim.diffusion.guidance import ConditionalDenoiser, Conditions, Guidance, Predictor
from ddim.diffusion.loop import StepSettings
from ddim.engine.cuda import CUDAEngine, fill, record_graph
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler, check_own_steps
from ddim.training.config import DistillConfig, ObjectiveConfig, TrainConfig
from ddim.training.discrete import DiscreteObjective
from ddim.training.machine import PRECISIONS
from ddim.training.objective import DenoisingObjective, Objective, loss_weights

logger = logging.getLogger(__name__)

CONTRACTION = 0.04
"""An error of x_s / sqrt(alpha_s) that has five times the noise of the signal counts half; chosen by measurement on
digits (docs/distillation.md)."""


def make_objective(config: TrainConfig, scheduler: Any, device: torch.device) -> Objective:
    """Create the objective that a configuration describes.

    Args:
        config: the configuration; with `distill.teacher`, the teacher is loaded.
        scheduler: of the network that is trained.
        device: device to train on.

    Returns:
        `DistillationObjective` where there is a teacher, `DiscreteObjective` of the discrete process, else
        `DenoisingObjective`.

    Raises:
        FileNotFoundError: if the teacher does not exist.
        ValueError: if the teacher or the scheduler does not allow these steps.

    Example:
        >>> from ddim.training.config import load_config
        >>> make_objective(load_config("digits"), DDIMScheduler(), torch.device("cpu"))  # doctest: +ELLIPSIS
        <ddim.training.objective.DenoisingObjective object at ...>
    """
    if config.process == "discrete":
        return DiscreteObjective(scheduler, config.objective.antithetic, config.objective.weighting)
    if config.distill.teacher is None:
        return DenoisingObjective(scheduler, config.objective.antithetic)
    pipe = DDIMPipeline.from_pretrained(config.distill.teacher).to(device)
    pipe.unet.requires_grad_(False).eval()
    return DistillationObjective(pipe, scheduler, config.distill, config.precision)


class DistillationObjective(DenoisingObjective):
    """Several steps of a teacher in one.

    Args:
        teacher: the model whose steps are taken, on the device to train on.
        scheduler: of the student, with the noise of `config.starts` at its own
            (`ddim.diffusion.distillation.student_betas`); it predicts v or x_0.
        config: where the student's steps start, and how many of the teacher they are.
        precision: `fp32`, or `bf16` or `fp16` for autocast of the teacher on a GPU; on a CPU it runs in float32, on
            its engine.

    Attributes:
        teacher: as given.
        device: of the teacher.

    Raises:
        ValueError: if the teacher has fewer timesteps than steps or no null class for its guidance, or the schedules
            or prediction types do not fit.

    References:
        Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512; Meng et al.,
        On Distillation of Guided Diffusion Models, arXiv 2210.03142.
    """

    def __init__(
        self, teacher: DDIMPipeline, scheduler: DDIMScheduler, config: DistillConfig, precision: str = "fp32"
    ) -> None:
        super().__init__(scheduler)
        given = check_own_steps(teacher.scheduler)
        starts = check_starts(config.starts, len(given))
        alphas = given.alphas_cumprod_float64
        own = scheduler.alphas_cumprod_float64[::-1]
        if len(own) != len(starts) or not np.allclose(own, alphas[starts], rtol=1e-6, atol=0):
            raise ValueError("the student must have the noise of its teacher's timesteps at its own, got other noise")
        self._prediction_type, self._weighting = scheduler.config.prediction_type, config.weighting
        self._alphas = scheduler.alphas_cumprod
        check_student_prediction(self._prediction_type)
        # Kept, because engines do not keep their network alive.
        self.teacher, self.device, self._precision = teacher, teacher.device, precision
        steps = make_steps(divide_segments(starts, config.substeps), alphas)
        self._segments = Segments.of(steps, len(starts), config.order).to(self.device)
        # By segment: the noisiest is first.
        levels = self._alphas.flip(0).to(self.device)
        self._signal, self._noise = levels.sqrt(), (1 - levels).sqrt()
        self._settings = StepSettings(given.config.prediction_type, given.clip)
        self._guidance = Guidance(config.guidance_scale)
        if self._guidance.is_active and (teacher.classes is None or not teacher.classes.has_null):
            raise ValueError(f"guidance_scale {self._guidance.scale:g} requires a teacher with a null class")
        self._predict = _predictor_of(teacher, self._segments.timesteps.flatten().tolist())
        self._recorded: RecordedTarget | None = None
        self._records = self.device.type == "cuda"

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw timesteps of the student, equally many of each; see `Objective.draw_timesteps`."""
        S, device = len(self._alphas), generator.device
        first = torch.randint(S, (), generator=generator, device=device)
        return (torch.arange(count, device=device) + first) % S

    def spread_timesteps(self, count: int) -> Tensor:
        """Return the timesteps of the student in turn; see `Objective.spread_timesteps`."""
        return torch.arange(count) % len(self._alphas)

    def loss_weights(self, config: ObjectiveConfig) -> Tensor:
        """Return weights by the error of the image, with a mean of 1.

        An error of v is multiplied by sin(phi_t - phi_s) in x_s, and counts 1 / sqrt(alpha_s) times as much in units of
        x_0. Further steps lead from there to the image; where the noise is much larger than all differences between
        images they lead to nearly the same ones whatever x_s is. So the weight is

            sin^2(phi_t - phi_s) / (alpha_s + c (1 - alpha_s)),        c = CONTRACTION

        Args:
            config: the weighting that is used instead where `distill.weighting` is `objective`.

        Returns:
            float32 (S,).
        """
        if self._weighting == "objective":
            return loss_weights(self._alphas, self._prediction_type, config.weighting, config.gamma)
        # Where each segment ends, the next one starts; the last one ends without noise.
        ends = torch.cat([self._signal[1:] ** 2, self._signal.new_ones(1)])
        weights = self._segments.rotations[:, 1] ** 2 / (ends + CONTRACTION * (1 - ends))
        if self._prediction_type == "sample":
            weights = weights / self._noise**2
        return (weights / weights.mean()).flip(0)

    @torch.no_grad()
    def target(
        self, x0: Tensor, noise: Tensor, timesteps: Tensor, noisy: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Return the v or the x_0 that takes x_t where the teacher leads; see `Objective.target`."""
        inputs = (noisy, len(self._alphas) - 1 - timesteps, *(() if labels is None else (labels,)))
        if self._records:
            recorded = self._get_recorded(inputs)
            if recorded is not None:
                return recorded(*inputs)
        return self._compute(noisy.contiguous(), *inputs[1:])

    def _compute(self, x: Tensor, index: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the targets of x_t, (n, C, H, W), in the segments `index`, int64 (n,), for the classes `labels`."""
        classes, baseline = self.teacher.classes, None
        if self._guidance.is_active and labels is not None and classes is not None:
            baseline = torch.full_like(labels, classes.count)
        denoiser = ConditionalDenoiser(self._predict, Conditions(labels, baseline, self._guidance))
        with self._autocast():
            x_prev = follow_teacher(denoiser, x, self._segments, index, self._settings)
        v = velocity_target(x, x_prev, self._segments, index)
        if self._prediction_type == "v_prediction":
            return v
        signal, noise = self._signal[index, None, None, None], self._noise[index, None, None, None]
        return signal * x - noise * v

    def _autocast(self) -> AbstractContextManager[None]:
        is_used = self.device.type == "cuda" and self._precision != "fp32"
        # A recorded graph must not depend on weights that autocast has cached.
        return torch.autocast(self.device.type, PRECISIONS[self._precision], is_used, cache_enabled=False)

    def _get_recorded(self, like: Sequence[Tensor]) -> RecordedTarget | None:
        """Return the recorded computation for a batch's shape; `None` for another shape than the first one's."""
        if self._recorded is None:
            try:
                self._recorded = RecordedTarget(self._compute, like)
            except RuntimeError as error:
                logger.warning(
                    "the teacher's steps cannot be recorded and run one by one: %s", str(error).split("\n")[0]
                )
                self._records = False
                return None
        return self._recorded if self._recorded.shape == like[0].shape else None


def check_student_prediction(prediction_type: str) -> None:
    """Check what a student predicts.

    Args:
        prediction_type: of its scheduler.

    Raises:
        ValueError: if it is `epsilon`.

    Example:
        >>> check_student_prediction("sample")
    """
    if prediction_type == "epsilon":
        raise ValueError(
            "prediction_type of a student must be v_prediction or sample, got epsilon, which says nothing about x_0 "
            "where there is only noise"
        )


class RecordedTarget:
    """A function of x_t, segments and classes, recorded as a CUDA graph.

    Args:
        compute: the function: takes (N, C, H, W) and int64 (N,), with classes another int64 (N,); returns (N, C, H, W).
        like: what it takes, of the shapes that it is recorded for, on a CUDA device.

    Attributes:
        shape: of x_t.
    """

    def __init__(self, compute: Callable[..., Tensor], like: Sequence[Tensor]) -> None:
        x, device = like[0], like[0].device
        self.shape = x.shape
        with torch.no_grad():
            self._inputs = [torch.zeros(t.shape, dtype=t.dtype, device=device) for t in like]
            self._result = torch.zeros(x.shape, device=device)

        def run() -> None:
            with torch.no_grad():
                self._result.copy_(compute(*self._inputs))

        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graph = record_graph(run, stream)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run the graph; the result is the caller's to keep."""
        for buffer, tensor in zip(self._inputs, inputs, strict=True):
            fill(buffer, tensor)
        self._graph.replay()
        return self._result.clone()


def _predictor_of(teacher: DDIMPipeline, timesteps: list[int]) -> Predictor:
    """Return the teacher as a function of x_t, one timestep and one class per sample, run by its fastest engine."""
    if teacher.device.type == "cuda":
        predict = CUDAEngine(teacher.unet).predict
        return lambda x, t, labels: predict(x, t, labels)[:, : x.shape[1]].float()
    return teacher.sampler.predictor(timesteps)
