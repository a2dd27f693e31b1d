"""Measuring the averaged weights on the way: the loss on images that are not trained on, and the Fréchet distance."""

from __future__ import annotations

import torch
from torch import Tensor

from ddim.data.dataset import ImageDataset, generator_for
from ddim.evaluation.features import Pixels
from ddim.evaluation.image_sets import sample_image_set
from ddim.evaluation.metrics import frechet
from ddim.pipeline import DDIMPipeline
from ddim.training.config import EvaluateConfig
from ddim.training.trainer import Trainer

BATCH = 256


def evaluate(trainer: Trainer, pipe: DDIMPipeline) -> dict[str, float]:
    """What there is to measure: `held_out_loss` where images are held out, `frechet_distance` where samples are wanted.

    Args:
        trainer: the run.
        pipe: of its averaged weights.
    """
    settings, values = trainer.config.evaluate, {}
    if len(trainer.held_out):
        values["held_out_loss"] = held_out_loss(trainer)
    if settings.count:
        values["frechet_distance"] = sample_distance(trainer, pipe, settings)
    return values


@torch.no_grad()
def held_out_loss(trainer: Trainer) -> float:
    """The simple loss of the averaged weights on the held-out images: timesteps spread evenly, always one noise."""
    scheduler, total = trainer.scheduler, 0.0
    count = len(trainer.held_out)
    timesteps = torch.arange(count) * len(scheduler) // count
    images = square(trainer.pictures, trainer.held_out, trainer.config.model["sample_size"])
    x0 = images.float() / 127.5 - 1
    noise = torch.randn(x0.shape, generator=generator_for(trainer.config.seed, "held-out noise", 0))
    for part in (slice(first, first + BATCH) for first in range(0, count, BATCH)):
        x, e, t = (tensor[part].to(trainer.device) for tensor in (x0, noise, timesteps))
        predicted = trainer.ema(scheduler.add_noise(x, e, t), t).sample
        total += float((predicted - scheduler.training_target(x, e, t)).square().flatten(1).mean(1).sum())
    return total / count


def sample_distance(trainer: Trainer, pipe: DDIMPipeline, settings: EvaluateConfig) -> float:
    """The Fréchet distance of samples from seeds 0, 1, 2, ... to the held-out images, or, where there are fewer than
    samples, to as many of those that are trained on.
    """
    indices = trainer.held_out
    if len(indices) < settings.count:
        trained = trainer.batches.indices
        chosen = torch.randperm(len(trained), generator=generator_for(trainer.config.seed, "reference", 0))
        indices = trained[chosen[: settings.count]]
    size = trainer.config.model["sample_size"]
    painted = sample_image_set(pipe, settings.count, num_inference_steps=settings.num_inference_steps)
    features = Pixels(painted.shape)
    real = [square(trainer.pictures, part, size) for part in torch.split(indices, BATCH)]
    return frechet(*(torch.cat([features(batch) for batch in batches]) for batches in (painted.batches(), real)))


def square(pictures: ImageDataset, indices: Tensor, size: int) -> Tensor:
    """Images as the model takes them, those stored larger cut in the middle: uint8 (n, C, size, size) on the CPU."""
    images = pictures.take(indices).cpu()
    margin = (images.shape[2] - size) // 2
    return images[:, :, margin : margin + size, margin : margin + size]
