"""Evaluation of the averaged weights during training: the loss on held-out images, and the Fréchet distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddim.data.seeding import generator_for
from ddim.evaluation.features import Pixels
from ddim.evaluation.image_sets import sample_image_set
from ddim.evaluation.metrics import frechet
from ddim.pipeline import ImagePipeline
from ddim.training.trainer import Trainer

BATCH_SIZE = 256


def evaluate(trainer: Trainer, pipe: ImagePipeline) -> dict[str, float]:
    """Compute the metrics that the configuration enables.

    Args:
        trainer: the run.
        pipe: a pipeline with its averaged weights.

    Returns:
        `held_out_loss` where images are held out, `frechet_distance` where `evaluate.count` is not 0.
    """
    values = {}
    if len(trainer.held_out):
        values["held_out_loss"] = held_out_loss(trainer)
    if trainer.config.evaluate.count:
        values["frechet_distance"] = sample_distance(trainer, pipe)
    return values


@torch.no_grad()
def held_out_loss(trainer: Trainer) -> float:
    """Compute the loss of the averaged weights on the held-out images, without the weights of timesteps.

    Timesteps are evenly spaced and the noise is the same at every call, so that values can be compared.

    Args:
        trainer: the run, with at least one held-out image.

    Returns:
        Mean squared error of what the network predicts; of the discrete process, nats per value.
    """
    objective, total = trainer.objective, 0.0
    count = len(trainer.held_out)
    timesteps = objective.spread_timesteps(count)
    images, labels = trainer.dataset.read_labeled(trainer.held_out)
    images = center_crop(images.cpu(), trainer.batches.size)
    x0 = trainer.dataset.pixel_format.to_samples(images).clamp(-1, 1)
    noise = objective.draw_noise(x0.shape, generator_for(trainer.config.seed, "held-out noise", 0))
    for part in (slice(start, start + BATCH_SIZE) for start in range(0, count, BATCH_SIZE)):
        x, e, t = (tensor[part].to(trainer.device) for tensor in (x0, noise, timesteps))
        classes = None if labels is None else labels[part].to(trainer.device)
        noisy = objective.noised(x, e, t)
        target = objective.target(x, e, t, noisy, classes)
        total += float(objective.losses(trainer.ema(noisy, t, classes).sample, target, noisy, t).sum())
    return total / count


def sample_distance(trainer: Trainer, pipe: ImagePipeline) -> float:
    """Compute the Fréchet distance of samples from seeds 0, 1, 2, ... to real images.

    The real images are the held-out ones, or, where these are fewer than the samples, as many trained ones.

    Args:
        trainer: the run.
        pipe: a pipeline with its averaged weights.

    Returns:
        The distance of their pixels in [0, 1].
    """
    settings, pixel_format = trainer.config.evaluate, trainer.dataset.pixel_format
    indices = trainer.held_out
    if len(indices) < settings.count:
        trained = trainer.batches.indices
        order = torch.randperm(len(trained), generator=generator_for(trainer.config.seed, "reference", 0))
        indices = trained[order[: settings.count]]
    classes: dict[str, Any] = {}
    if (labels := trainer.dataset.labels) is not None:
        # Samples have the classes of the real images.
        real_classes = labels.indices.cpu()[indices]
        classes["class_labels"] = real_classes[torch.arange(settings.count) % len(real_classes)].tolist()
    samples = sample_image_set(pipe, settings.count, num_inference_steps=settings.num_inference_steps, **classes)
    parts = torch.split(indices, BATCH_SIZE)
    real = [center_crop(trainer.dataset.read(part).cpu(), trainer.batches.size) for part in parts]
    if not pixel_format.is_eight_bit:
        real = [pixel_format.to_unit(values) for values in real]
    features = Pixels(samples.shape)
    return frechet(*(torch.cat([features(batch) for batch in batches]) for batches in (samples.batches(), real)))


def center_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut the center out of images that are stored larger than the model takes.

    Args:
        images: (n, C, H, W), at least as large as `size`.
        size: height and width of the result, in pixels.

    Returns:
        (n, C, *size), a view.

    Example:
        >>> center_crop(torch.arange(9).reshape(1, 1, 3, 3), (1, 1))
        tensor([[[[4]]]])
    """
    top, left = ((stored - side) // 2 for stored, side in zip(images.shape[2:], size, strict=True))
    return images[:, :, top : top + size[0], left : left + size[1]]
