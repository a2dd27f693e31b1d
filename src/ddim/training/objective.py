"""The training objective: equation (5) of the DDIM paper (arXiv 2010.02502).

    L = E_t,x0,epsilon  w(t) || target - f_theta(sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) epsilon, t) ||^2

with t uniform over 0 .. T-1. The target is epsilon, x_0 or v, by the scheduler's prediction type. `simple` is DDPM's
L_simple, w = 1 on whatever is predicted. The other weightings are stated for the error of x_0, and SNR = alpha / (1 -
alpha) carries them over: an error of epsilon is SNR times that of x_0, an error of v is SNR + 1 times (arXiv
2202.00512, appendix D), so that

    weight on the error of x_0         epsilon         x_0           v
    min(SNR, gamma)     min_snr        min(1, g/SNR)   min(SNR, g)   min(SNR, g) / (SNR + 1)    arXiv 2303.09556
    max(SNR, 1)         truncated_snr  max(1, 1/SNR)   max(SNR, 1)   max(SNR, 1) / (SNR + 1)    arXiv 2202.00512
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ddim.scheduler import DDIMScheduler
from ddim.training.config import ObjectiveConfig

QUARTILES = 4
"""Ranges of timesteps that losses are reported for."""


class Objective(Protocol):
    """What the network learns to predict, and at which timesteps.

    `ddim.training.trainer` draws x_0, and by this object timesteps, noise and x_t; it takes steps down the gradient of
    its losses.
    """

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the timesteps of a batch.

        Args:
            count: number of timesteps, over all processes.
            generator: draws them, on its device.

        Returns:
            int64 (count,), on the device of the generator.
        """
        ...

    def spread_timesteps(self, count: int) -> Tensor:
        """Return the timesteps at which held-out images are evaluated, always the same.

        Args:
            count: number of images.

        Returns:
            int64 (count,), on the CPU.
        """
        ...

    def draw_noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw the noise of a batch.

        Args:
            shape: (n, C, H, W).
            generator: draws it, on its device.

        Returns:
            float32 (n, C, H, W), on the device of the generator.
        """
        ...

    def noised(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t as the network is given it.

        Args:
            x0: clean images in [-1, 1], float32 (n, C, H, W).
            noise: as `draw_noise` draws it.
            timesteps: int64 (n,).

        Returns:
            float32, (n, C, H, W) with the network's channels.
        """
        ...

    def loss_weights(self, config: ObjectiveConfig) -> Tensor:
        """Return the weight of every timestep on the error of what the network predicts.

        Args:
            config: the weighting of the configuration.

        Returns:
            float32 (T,), on any device.
        """
        ...

    def target(
        self, x0: Tensor, noise: Tensor, timesteps: Tensor, noisy: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Return what the network learns to predict.

        Args:
            x0: clean images, float32 (n, C, H, W).
            noise: epsilon, of the same shape.
            timesteps: int64 (n,).
            noisy: x_t, which the network is given.
            labels: the classes that it is given, int64 (n,); `None` for a network without classes.

        Returns:
            (n, C, H, W), without gradients; float32, or the int64 values of x_0 of a discrete process.
        """
        ...

    def losses(self, predicted: Tensor, target: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Return the losses of predictions, before their weights.

        Args:
            predicted: by the network, in any floating dtype, (n, C, H, W) with its channels.
            target: as `target` returns it.
            noisy: x_t, which the network was given.
            timesteps: int64 (n,).

        Returns:
            float32 (n,), one loss per image.
        """
        ...


class DenoisingObjective:
    """DDPM's objective: epsilon, x_0 or v of noised images, at all timesteps.

    Args:
        scheduler: the noise schedule and the prediction type.
        antithetic: draw timesteps in pairs, as `draw_timesteps` does.

    Example:
        >>> objective = DenoisingObjective(DDIMScheduler())
        >>> objective.spread_timesteps(4)
        tensor([  0, 250, 500, 750])
    """

    scheduler: Any

    def __init__(self, scheduler: DDIMScheduler, antithetic: bool = True) -> None:
        self.scheduler, self.antithetic = scheduler, antithetic

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the timesteps of a batch, uniform over 0 .. T-1; see `Objective.draw_timesteps`."""
        return draw_timesteps(count, len(self.scheduler), self.antithetic, generator)

    def spread_timesteps(self, count: int) -> Tensor:
        """Return evenly spaced timesteps; see `Objective.spread_timesteps`."""
        return torch.arange(count) * len(self.scheduler) // count

    def draw_noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw standard Gaussian noise; see `Objective.draw_noise`."""
        return torch.randn(tuple(shape), generator=generator, device=generator.device)

    def noised(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t; see `Objective.noised`."""
        noisy: Tensor = self.scheduler.add_noise(x0, noise, timesteps)
        return noisy

    def loss_weights(self, config: ObjectiveConfig) -> Tensor:
        """Return the weights that the configuration names; see `Objective.loss_weights`."""
        scheduler = self.scheduler
        prediction_type = scheduler.config.prediction_type
        return loss_weights(scheduler.alphas_cumprod, prediction_type, config.weighting, config.gamma)

    def target(
        self, x0: Tensor, noise: Tensor, timesteps: Tensor, noisy: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Return epsilon, x_0 or v, by the prediction type; see `Objective.target`."""
        target: Tensor = self.scheduler.training_target(x0, noise, timesteps)
        return target

    def losses(self, predicted: Tensor, target: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Return mean squared errors; see `Objective.losses`."""
        return (predicted.float() - target).square().flatten(1).mean(1)


def draw_timesteps(count: int, num_train_timesteps: int, antithetic: bool, generator: torch.Generator) -> Tensor:
    """Draw the timesteps of a batch, uniform over 0 .. T-1.

    Args:
        count: number of timesteps.
        num_train_timesteps: T.
        antithetic: draw count // 2 + 1 timesteps t and take T - 1 - t of the first ones for the others, as the original
            code does. A batch then has about as many early as late timesteps, which lowers the variance of the loss.
        generator: draws them, on its device.

    Returns:
        int64 (count,).

    Example:
        >>> t = draw_timesteps(4, 1000, antithetic=True, generator=torch.Generator().manual_seed(0))
        >>> int(t[0] + t[3])
        999
    """
    drawn = count // 2 + 1 if antithetic else count
    t = torch.randint(num_train_timesteps, (drawn,), generator=generator, device=generator.device)
    return torch.cat([t, num_train_timesteps - 1 - t])[:count] if antithetic else t


def loss_weights(alphas_cumprod: Tensor, prediction_type: str, weighting: str, gamma: float) -> Tensor:
    """Compute w(t) for every timestep, on the error of what the network predicts.

    Args:
        alphas_cumprod: (T,) float64.
        prediction_type: `epsilon`, `sample` or `v_prediction`.
        weighting: `simple`, `min_snr` or `truncated_snr`.
        gamma: bound of the signal-to-noise ratio for `min_snr`.

    Returns:
        (T,) float32.

    Raises:
        ValueError: if a weight is infinite, as for `truncated_snr` of epsilon where alpha is 0.

    References:
        Hang et al., arXiv 2303.09556 (`min_snr`); Salimans and Ho, arXiv 2202.00512 (`truncated_snr`).

    Example:
        >>> alphas = torch.tensor([0.9, 0.5], dtype=torch.float64)  # signal-to-noise ratios 9 and 1
        >>> loss_weights(alphas, "sample", "min_snr", gamma=5.0)
        tensor([5., 1.])
    """
    if weighting == "simple":
        return torch.ones(len(alphas_cumprod))
    snr = alphas_cumprod.double() / (1 - alphas_cumprod.double())
    bounded_snr = snr.clamp_max(gamma) if weighting == "min_snr" else snr.clamp_min(1.0)
    if prediction_type == "sample":
        weights = bounded_snr
    elif prediction_type == "v_prediction":
        weights = bounded_snr / (snr + 1)
    else:
        # bounded_snr / snr would be 0 / 0 where alpha is 0.
        weights = (gamma / snr).clamp_max(1.0) if weighting == "min_snr" else (1 / snr).clamp_min(1.0)
    if not bool(weights.isfinite().all()):
        raise ValueError(
            f"objective.weighting={weighting} is infinite for prediction_type={prediction_type} where alphas_cumprod "
            "is 0 or 1, as in this schedule; use v_prediction, or the weighting min_snr or simple"
        )
    return weights.float()


def by_quartile(losses: Tensor, timesteps: Tensor, num_train_timesteps: int) -> tuple[Tensor, Tensor]:
    """Sum and count losses by quartile of the timestep, the least noisy first.

    Args:
        losses: (N,), one per sample.
        timesteps: int64 (N,).
        num_train_timesteps: T.

    Returns:
        Sums and counts, two float32 tensors (4,).

    Example:
        >>> by_quartile(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 9, 999]), 1000)
        (tensor([3., 0., 0., 4.]), tensor([2., 0., 0., 1.]))
    """
    quartile = timesteps * QUARTILES // num_train_timesteps
    member = torch.nn.functional.one_hot(quartile, QUARTILES).float()
    return losses.float() @ member, member.sum(0)
