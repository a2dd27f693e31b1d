"""The objective of distillation: a network that meets its targets samples what its teacher samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ddim import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim.data.dataset import CachedImageDataset
from ddim.diffusion.equations import ddim_step
from ddim.diffusion.loop import StepSettings, sample
from ddim.diffusion.sampling_config import SamplingConfig
from ddim.distillation.stages import student_scheduler
from ddim.engine.cuda import Rerun
from ddim.training import distilling
from ddim.training.config import DistillConfig, ObjectiveConfig, TrainConfig
from ddim.training.distilling import CONTRACTION, DistillationObjective, make_objective
from ddim.training.objective import DenoisingObjective
from ddim.training.trainer import Trainer
from digits import TINY_MODEL
from helpers import randn, seeded


def make_teacher(**scheduler: Any) -> DDIMPipeline:
    """Return a tiny network of random weights."""
    torch.manual_seed(0)
    return DDIMPipeline(UNet2DModel(**TINY_MODEL).eval(), DDIMScheduler(**{"clip_sample": False} | scheduler))


ALPHAS = DDIMScheduler().alphas_cumprod_float64
STARTS = {1: (999,), 2: (999, 499), 4: (999, 749, 499, 249)}
"""The timesteps of a teacher where steps of its student start, by the number of steps."""


def make_student_scheduler(S: int, timesteps: Sequence[int] = (), **scheduler: Any) -> DDIMScheduler:
    return DDIMScheduler.from_config({}, **student_scheduler(ALPHAS, timesteps or STARTS[S]) | scheduler)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("predicted", ["v_prediction", "sample"])
def test_exact_student_samples_the_images_of_its_teacher(prediction_type: str, predicted: str) -> None:
    teacher = make_teacher(prediction_type=prediction_type)
    scheduler = make_student_scheduler(4, prediction_type=predicted)
    objective = DistillationObjective(teacher, scheduler, DistillConfig(substeps=3))

    def student(x: Tensor, t: Tensor) -> Tensor:
        return objective.target(x, x, t.expand(len(x)), x)

    x = randn(3, 1, 8, 8)
    steps = scheduler.make_steps(scheduler.make_timesteps(4))
    *_, last = sample(student, x, steps, StepSettings(predicted))
    timesteps = teacher.scheduler.make_timesteps(12, "trailing")
    teacher.set_progress_bar_config(disable=True)
    expected = teacher.sampler.run(x, teacher.sampler.plan(SamplingConfig(timesteps=timesteps)))
    torch.testing.assert_close(last.sample, expected, atol=1e-3 * float(expected.abs().max()), rtol=0)


def test_steps_may_start_anywhere() -> None:
    """A student of uneven steps samples what its teacher samples, each step divided evenly."""
    starts = (999, 649, 399)
    teacher, scheduler = make_teacher(prediction_type="v_prediction"), make_student_scheduler(3, starts)
    objective = DistillationObjective(teacher, scheduler, DistillConfig(starts=starts, substeps=2))
    x = randn(3, 1, 8, 8)
    steps = scheduler.make_steps(scheduler.make_timesteps(3))
    *_, last = sample(lambda x, t: objective.target(x, x, t.expand(len(x)), x), x, steps, StepSettings("v_prediction"))
    teacher.set_progress_bar_config(disable=True)
    plan = teacher.sampler.plan(SamplingConfig(timesteps=[999, 824, 649, 524, 399, 199]))
    expected = teacher.sampler.run(x, plan)
    assert plan.steps[-1].alpha_prev == 1
    torch.testing.assert_close(last.sample, expected, atol=1e-4, rtol=0)


def test_teacher_steps_end_in_a_clean_image() -> None:
    """Also where the teacher's own steps end at its first alpha."""
    scheduler, x = make_student_scheduler(1), randn(2, 1, 8, 8)
    targets = [
        DistillationObjective(
            make_teacher(set_alpha_to_one=to_one), scheduler, DistillConfig(starts=STARTS[1], substeps=8)
        ).target(x, x, torch.zeros(2, dtype=torch.int64), x)
        for to_one in (True, False)
    ]
    assert torch.equal(*targets)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5, 0.0])
def test_exact_student_has_the_classes_and_the_guidance_of_its_teacher(guidance_scale: float) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY_MODEL, num_class_embeds=4, class_names=("a", "b", "c"), has_null_class=True).eval()
    teacher = DDIMPipeline(unet, DDIMScheduler(clip_sample=False, prediction_type="v_prediction"))
    scheduler = make_student_scheduler(2)
    config = DistillConfig(starts=STARTS[2], substeps=3, guidance_scale=guidance_scale)
    objective = DistillationObjective(teacher, scheduler, config)
    labels, x = torch.tensor([2, 0, 1]), randn(3, 1, 8, 8)

    def student(x: Tensor, t: Tensor) -> Tensor:
        return objective.target(x, x, t.expand(len(x)), x, labels)

    *_, last = sample(student, x, scheduler.make_steps(scheduler.make_timesteps(2)), StepSettings("v_prediction"))
    teacher.set_progress_bar_config(disable=True)
    expected = teacher(
        3,
        latents=x,
        timesteps=teacher.scheduler.make_timesteps(6, "trailing"),
        class_labels=labels.tolist(),
        guidance_scale=guidance_scale,
        output_type="pt",
    ).images
    torch.testing.assert_close((last.sample / 2 + 0.5).clamp(0, 1), expected, atol=1e-4, rtol=0)
    null = torch.full_like(labels, 3)
    t = torch.full_like(labels, 1)
    unguided = DistillationObjective(teacher, scheduler, config.model_copy(update={"guidance_scale": 1.0}))
    torch.testing.assert_close(objective.target(x, x, t, x, null), unguided.target(x, x, t, x, null), atol=1e-4, rtol=0)


def test_teacher_clips_where_its_scheduler_does() -> None:
    scheduler = make_student_scheduler(1)
    config = DistillConfig(starts=STARTS[1], substeps=2)
    x, t = 3 * randn(2, 1, 8, 8), torch.tensor([0, 0])
    targets = [
        DistillationObjective(make_teacher(clip_sample=clips), scheduler, config).target(x, x, t, x)
        for clips in (True, False)
    ]
    # The only step ends in the clipped x_0.
    alpha = float(scheduler.alphas_cumprod_float64[0])
    x0 = [alpha**0.5 * x - (1 - alpha) ** 0.5 * v for v in targets]
    assert float(x0[0].abs().max()) <= 1 + 1e-4 < float(x0[1].abs().max())


@pytest.mark.parametrize("predicted", ["v_prediction", "sample"])
def test_weights_are_those_of_errors_in_the_image(predicted: str) -> None:
    scheduler = make_student_scheduler(4, prediction_type=predicted)
    objective = DistillationObjective(make_teacher(), scheduler, DistillConfig())
    x, output, change = (randn(1, 1, 8, 8, seed=seed) for seed in range(3))
    errors = []
    for step in reversed(scheduler.make_steps(scheduler.make_timesteps(4))):
        moved = [ddim_step(y, x, step, predicted)[0] for y in (output, output + change)]
        signal = step.alpha_prev + CONTRACTION * (1 - step.alpha_prev)
        errors.append(float((moved[1] - moved[0]).square().mean()) / signal)
    expected = torch.tensor(errors) / (sum(errors) / 4)
    torch.testing.assert_close(objective.loss_weights(ObjectiveConfig()), expected, rtol=1e-3, atol=1e-6)


def test_weights_of_the_objective() -> None:
    config = ObjectiveConfig(weighting="truncated_snr")
    objective = DistillationObjective(make_teacher(), make_student_scheduler(4), DistillConfig(weighting="objective"))
    alphas = DDIMScheduler().alphas_cumprod[[249, 499, 749, 999]]
    snr = alphas / (1 - alphas)
    torch.testing.assert_close(objective.loss_weights(config), snr.clamp_min(1) / (snr + 1))


def test_batches_have_equally_many_images_at_each_timestep() -> None:
    objective = DistillationObjective(make_teacher(), make_student_scheduler(4), DistillConfig())
    drawn = [objective.draw_timesteps(16, seeded(seed)) for seed in range(8)]
    for timesteps in drawn:
        values, counts = timesteps.unique(return_counts=True)
        assert values.tolist() == [0, 1, 2, 3]
        assert counts.tolist() == [4, 4, 4, 4]
    # In a batch that S does not divide, no timestep is always the one with fewer images.
    assert len({int(timesteps[0]) for timesteps in drawn}) > 1
    assert objective.spread_timesteps(5).tolist() == [0, 1, 2, 3, 0]


@pytest.mark.parametrize(
    ("teacher", "student", "config", "message"),
    [
        ({}, {"prediction_type": "epsilon"}, {}, "prediction_type of a student must be v_prediction or sample, got"),
        ({"beta_end": 0.01}, {}, {}, "the student must have the noise of its teacher's timesteps at its own"),
        ({}, {}, {"starts": (999, 499)}, "the student must have the noise of its teacher's timesteps at its own"),
        ({}, {}, {"starts": (998, 749, 499, 249)}, "starts must decrease from 999, where the noise is sampled"),
        ({}, {}, {"starts": (999, 499, 749, 249)}, "starts must decrease from 999, where the noise is sampled"),
        ({}, {}, {"starts": (1000, 749, 499, 249)}, "starts must be "),
        ({}, {}, {"substeps": 251}, "substeps must be at most 250, the timesteps from 999 to 750, got 251"),
    ],
)
def test_what_does_not_fit_is_refused(
    teacher: dict[str, Any], student: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        DistillationObjective(make_teacher(**teacher), make_student_scheduler(4, **student), DistillConfig(**config))


def test_recorded_targets_are_those_that_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers of the CUDA graph, run anew each time where there is no GPU."""
    monkeypatch.setattr(distilling, "record_graph", lambda run, stream: Rerun(run))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    objective = DistillationObjective(make_teacher(), make_student_scheduler(4), DistillConfig(substeps=2))
    recorded = DistillationObjective(make_teacher(), make_student_scheduler(4), DistillConfig(substeps=2))
    recorded._records = True
    batches = [randn(4, 1, 8, 8, seed=seed).contiguous(memory_format=torch.channels_last) for seed in range(3)]
    timesteps = torch.tensor([0, 3, 2, 1])
    results = [recorded.target(x, x, timesteps, x) for x in batches]
    for x, result in zip(batches, results, strict=True):
        torch.testing.assert_close(result, objective.target(x, x, timesteps, x), rtol=1e-4, atol=1e-4)
    with_classes = DistillationObjective(make_teacher(), make_student_scheduler(4), DistillConfig(substeps=2))
    with_classes._records = True
    monkeypatch.setattr(with_classes, "_predict", lambda x, t, labels: x * labels.view(-1, 1, 1, 1))
    targets = [with_classes.target(x, x, timesteps, x, torch.full((4,), label)) for label in (0, 1, 0)]
    assert not torch.equal(targets[0], targets[1])
    # Of another shape, such as that of the last held-out images, nothing is recorded.
    assert recorded.target(batches[0][:2], batches[0][:2], timesteps[:2], batches[0][:2]).shape == (2, 1, 8, 8)


class TestTrainer:
    def test_trains_on_images_by_default(self, make_config: Callable[..., TrainConfig]) -> None:
        config = make_config()
        objective = make_objective(config, DDIMScheduler(), torch.device("cpu"))
        assert isinstance(objective, DenoisingObjective)
        assert objective.antithetic

    def test_loss_falls(self, make_config: Callable[..., TrainConfig], images: Tensor, tmp_path: Any) -> None:
        """The student becomes its teacher's steps: the loss at the end is far below that at the start."""
        # Of random weights, v alone is of the size of images.
        make_teacher(prediction_type="v_prediction").save_pretrained(tmp_path / "teacher")
        config = make_config(
            model=TINY_MODEL,
            scheduler=student_scheduler(ALPHAS, STARTS[2]),
            distill={"teacher": str(tmp_path / "teacher"), "starts": STARTS[2], "substeps": 4},
            objective={"weighting": "truncated_snr"},
            max_steps=60,
            batch_size=16,
            optim={"lr": 5e-3, "warmup_steps": 1},
        )
        trainer = Trainer(config, CachedImageDataset(images), tmp_path, torch.device("cpu"))
        losses = [trainer.take_step().loss for _ in range(60)]
        assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
