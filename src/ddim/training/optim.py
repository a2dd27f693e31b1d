"""AdamW with its learning-rate schedule, the moving average of the weights, and the zero initialization."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ddim.training.config import EmaConfig, OptimConfig
from ddim.training.power_average import decay as power_decay
from ddim.unet import UNet2DModel


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Create AdamW over all parameters, with one fused kernel per step.

    Args:
        model: the network.
        config: learning rate, betas, eps and weight decay.

    Returns:
        The optimizer, with all parameters in one group.
    """
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """Compute the learning rate of a step: warm-up, constant, decay.

    It is a function of the step alone, so that no schedule has to be saved.

    Args:
        config: peak, warm-up and decay.
        step: number of steps taken before.
        max_steps: step at which the run ends.

    Returns:
        The learning rate, above 0 for every step before `max_steps`.

    Example:
        >>> config = OptimConfig(lr=1.0, warmup_steps=2, decay="linear", decay_steps=4)
        >>> [learning_rate(config, step, max_steps=8) for step in range(8)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.decay == "constant":
        return config.lr * warmup
    decay_steps = config.decay_steps or max(1, max_steps - config.warmup_steps)
    remaining = min(1.0, (max_steps - step) / decay_steps)
    decay = remaining if config.decay == "linear" else (1 - math.cos(math.pi * remaining)) / 2
    return config.lr * min(warmup, decay)


def ema_update(config: EmaConfig) -> Callable[[Any, Any, Any], None]:
    """Create the function that updates an average of the weights, without waiting for the device.

    Args:
        config: decay and warm-up of an exponential average, or the length of a power-function average.

    Returns:
        A function of the averaged weights, which it changes, the current weights, and the number of updates before: as
        `torch.optim.swa_utils.AveragedModel` takes it as `multi_avg_fn`. The first update copies the weights.

    Example:
        >>> average, weights = [torch.tensor(0.0)], [torch.tensor(1.0)]
        >>> ema_update(EmaConfig(decay=0.75, warmup=False))(average, weights, 1)
        >>> average
        [tensor(0.2500)]
    """

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor | int) -> None:
        n = int(num_averaged)
        if n == 0:
            torch._foreach_copy_(averaged, current)
            return
        if config.sigma_rel is not None:
            decay = power_decay(config.sigma_rel, n + 1)
        else:
            decay = min(config.decay, (1 + n) / (10 + n)) if config.warmup else config.decay
        torch._foreach_lerp_(averaged, current, 1 - decay)

    return update


def zero_last_layers(model: UNet2DModel) -> None:
    """Set the last layer of every residual branch and of the network to zero.

    DDPM starts this way: the network begins as nearly linear and learns faster.

    Args:
        model: changed in place.

    References:
        Ho et al., Denoising Diffusion Probabilistic Models, arXiv 2006.11239 (the original code).

    Example:
        >>> model = UNet2DModel(
        ...     sample_size=8, block_out_channels=(4,), down_block_types=("DownBlock2D",), layers_per_block=1,
        ...     up_block_types=("UpBlock2D",), attention_head_dim=4, norm_num_groups=2,
        ... )
        >>> zero_last_layers(model)
        >>> bool(model.conv_out.weight.any())
        False
    """
    for name, module in model.named_modules():
        if name.endswith(("conv2", "to_out.0", "conv_out")) and isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
