"""What moves the weights: AdamW with its learning rate, and the average that follows them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ddim.training.config import EmaConfig, OptimConfig
from ddim.unet import UNet2DModel


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all parameters, one fused kernel a step."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """Of the step that follows `step` steps: up in `warmup_steps`, constant, and down in the last `decay_steps`.

    It is a function of the step alone, so that there is no schedule to save.
    """
    up = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.decay == "constant":
        return config.lr * up
    decay_steps = config.decay_steps or max(1, max_steps - config.warmup_steps)
    left = min(1.0, (max_steps - step) / decay_steps)
    down = left if config.decay == "linear" else (1 - math.cos(math.pi * left)) / 2
    return config.lr * min(up, down)


def ema_update(config: EmaConfig) -> Callable[[Any, Any, Any], None]:
    """The averaging rule for `torch.optim.swa_utils.AveragedModel`."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor | int) -> None:
        n = int(num_averaged)
        decay = min(config.decay, (1 + n) / (10 + n)) if config.warmup else config.decay
        torch._foreach_lerp_(averaged, current, 1 - decay)

    return update


def zero_last_layers(model: UNet2DModel) -> None:
    """Start every residual branch and the output at zero, as DDPM does: the network begins as nearly linear and learns
    faster.
    """
    for name, module in model.named_modules():
        if name.endswith(("conv2", "to_out.0", "conv_out")) and isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
