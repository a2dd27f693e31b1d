"""Restoration on the page: images that agree with a measurement, their mean and their spread."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ddim.app import inputs
from ddim.app.conditions import ANY, NO_CONDITION, ConditionSettings
from ddim.app.measurements import Measurement
from ddim.app.pictures import Picture, pictures_of
from ddim.app.runs import Run
from ddim.diffusion.restoration import METHODS
from ddim.io.class_labels import ClassLabels
from ddim.pipeline import DDIMPipeline

DEFAULT_STEPS = METHODS["ddnm"].default_steps
"""Those of the method that restores without noise."""


@dataclass(frozen=True)
class RestoreSettings:
    """How a measurement is restored; answer i has the noise of seed `seed + i`.

    Attributes:
        count: number of answers.
        num_inference_steps: number of steps.
        seed: of the first answer.
        condition: classes and guidance.
    """

    count: int = 4
    num_inference_steps: int = DEFAULT_STEPS
    seed: int = 0
    condition: ConditionSettings = NO_CONDITION

    @classmethod
    def checked(
        cls,
        count: Any,
        steps: Any,
        seed: Any,
        label: Any = ANY,
        guidance: Any = 1.0,
        classes: ClassLabels | None = None,
    ) -> RestoreSettings:
        """Check what a client sent.

        Args:
            count: an integer from 1 to `inputs.MAX_LATENTS`.
            steps: an integer from 1 to `inputs.MAX_STEPS`.
            seed: an integer from 0 to `inputs.MAX_SEED`.
            label: as for `ConditionSettings.checked`, like `guidance`.
            guidance: the scale.
            classes: of the model.

        Returns:
            The settings.

        Raises:
            ValueError: naming the first argument that is not allowed.
            TypeError: if `guidance` is not a number.

        Example:
            >>> RestoreSettings.checked(2, 80, 7).seeds
            range(7, 9)
        """
        num_answers = inputs.integer("count", count, 1, inputs.MAX_LATENTS)
        return cls(
            num_answers,
            inputs.integer("steps", steps, 1, inputs.MAX_STEPS),
            inputs.seed(seed),
            ConditionSettings.checked(label, guidance, classes, num_answers),
        )

    @property
    def seeds(self) -> range:
        """The seed of each answer."""
        return range(self.seed, self.seed + self.count)


@dataclass(frozen=True, eq=False)
class Restored:
    """Images that agree with a measurement.

    Attributes:
        measurement: what was given.
        settings: how it was restored.
        answers: images of the model's size.
        mean: of the answers.
        spread: the standard deviation of the answers, over all channels, as a gray image; white is `max_spread`.
        max_spread: the largest standard deviation of a pixel, of values in [0, 1]; 0 for one answer.
        nfe: function evaluations per answer.
    """

    measurement: Measurement
    settings: RestoreSettings
    answers: list[Picture]
    mean: Picture
    spread: Image.Image
    max_spread: float
    nfe: int

    @property
    def keeps_values(self) -> bool:
        """Whether images are shown as they are."""
        return self.mean.shown is self.mean.values

    def as_command(self, model: str) -> str:
        """Return a command that samples the same images.

        Args:
            model: the model's name.
        """
        suffix, settings = "png" if self.keeps_values else "npz", self.settings
        return (
            f"{self.measurement.as_command(f'measurement.{suffix}')} --model {shlex.quote(model)} "
            f"--count {settings.count} --seed {settings.seed} --steps {settings.num_inference_steps}"
            f"{settings.condition.as_command()} --out restored.{suffix}"
        )


def restore(run: Run, base: DDIMPipeline, measurement: Measurement, settings: RestoreSettings) -> Restored:
    """Sample images that agree with a measurement.

    Args:
        run: the run.
        base: the model.
        measurement: what is known.
        settings: how they are sampled.

    Returns:
        The images, their mean and their spread.

    Raises:
        ValueError: if the model was trained with fewer timesteps.
    """
    pipe, condition = run.pipeline(base), settings.condition
    result = measurement.restore(
        pipe,
        num_inference_steps=settings.num_inference_steps,
        output_type="np",
        samples=settings.count,
        seeds=settings.seeds,
        **condition.arguments(settings.count),
    )
    deviation = result.std[0].mean(0).cpu().double()
    largest = float(deviation.max())
    spread = (deviation / (largest or 1) * 255).round().to(torch.uint8)
    return Restored(
        measurement,
        settings,
        pictures_of(pipe, result.images),
        pictures_of(pipe, result.mean)[0],
        Image.fromarray(spread.numpy()),
        largest,
        result.nfe * condition.evaluations_per_step,
    )
