"""The training loop.

Each step draws x_0 from the data, t uniformly from 0 .. T-1 and epsilon from N(0, I), and takes a step of AdamW down
the gradient of

    L = E || target - f_theta(sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) epsilon, t) ||^2

which is equation (5) of the DDIM paper with gamma = 1, DDPM's L_simple; target is epsilon, x_0 or v by the scheduler's
prediction type. The timesteps of a batch come in pairs t, T - 1 - t, as in the original code, which lowers the variance
of the loss. Samples are drawn from an exponential moving average of the weights. Every random number of step n is a
function of (seed, n), so that a resumed run computes what an uninterrupted one would.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from ddim.scheduler import DDIMScheduler
from ddim.training.checkpoint import load_newest, save_checkpoint
from ddim.training.config import TrainConfig
from ddim.training.data import Batches, generator_for
from ddim.unet import UNet2DModel


class TrainingStopped(RuntimeError):
    """A run that cannot or shall not go on; the message says why and where it can be taken up again."""


@dataclass(frozen=True)
class Progress:
    """What a finished step reports: the step's number, its loss and gradient norm, and the images a second since the
    start.
    """

    step: int
    loss: float
    grad_norm: float
    images_per_second: float


class Trainer:
    """A run in a folder: builds the model, takes up the newest checkpoint, trains to `max_steps`.

    Args:
        config: the checked configuration.
        images: uint8 (N, C, H, W), fitting the model.
        out: the run's folder.
        device: where the network is trained.

    Attributes:
        model: the network being trained.
        ema: the moving average of its weights, a `UNet2DModel`; use this one.
        step: how many steps have been taken.
        losses: of the steps that a log has not counted yet; it keeps them here so that they are saved with the rest.

    Raises:
        ValueError: if the model does not take such images.
    """

    def __init__(self, config: TrainConfig, images: Tensor, out: Path, device: torch.device) -> None:
        self.config, self.out, self.device = config, out, device
        torch.manual_seed(config.seed)
        self.scheduler = DDIMScheduler.from_config({}, **config.scheduler)
        # NHWC is the faster layout for convolutions on CPUs and GPUs alike; it changes no value.
        self.model = UNet2DModel.from_config({}, **config.model)
        self.model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        zero_last_layers(self.model)
        self._average = AveragedModel(self.model, multi_avg_fn=ema_update(config.optim.ema_decay))
        self.ema = cast(UNet2DModel, self._average.module)
        self.ema.requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.optim.lr,
            betas=config.optim.betas,
            weight_decay=config.optim.weight_decay,
            fused=True,
        )
        self.batches = Batches(images, config.batch_size, config.seed)
        self.step = 0
        self.losses: list[float] = []
        with torch.no_grad():
            # The network itself says best what does not fit, before anything is written.
            self.model(torch.zeros(1, *images.shape[1:], device=device), 0)

    def resume(self) -> bool:
        """Take up the newest checkpoint that can be read; False where there is none."""
        state = load_newest(self.out / "checkpoints")
        if state is None:
            return False
        self.model.load_state_dict(state["model"])
        self._average.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.losses = state.get("losses", [])
        return True

    def save(self) -> Path:
        """Write a checkpoint of this step."""
        state = {
            "model": self.model.state_dict(),
            "ema": self._average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
        }
        return save_checkpoint(self.out / "checkpoints", self.step, state, self.config.keep_checkpoints)

    def train(self, after_step: Callable[[Progress], None]) -> None:
        """Train from the current step to `max_steps`, with a checkpoint every `checkpoint_every` steps and at the end.

        SIGINT and SIGTERM let the current step finish, save, and stop.

        Args:
            after_step: called after each step, before its checkpoint.

        Raises:
            TrainingStopped: on a signal, or a loss or gradient that is no number.
        """
        config = self.config
        stop_signals: list[int] = []
        handlers = {
            s: signal.signal(s, lambda number, _: stop_signals.append(number)) for s in (signal.SIGINT, signal.SIGTERM)
        }
        bar = tqdm(total=config.max_steps, initial=self.step, desc="training", unit="step", dynamic_ncols=True)
        started, first = time.monotonic(), self.step
        try:
            self.model.train()
            while self.step < config.max_steps:
                loss, grad_norm = self._take_step()
                if not math.isfinite(loss + grad_norm):
                    raise TrainingStopped(
                        f"the loss became {loss}, its gradient's norm {grad_norm}, in step {self.step + 1} at a "
                        f"learning rate of {self._learning_rate():.3g}; "
                        f"the last checkpoint in {self.out / 'checkpoints'} is from before, a lower optim.lr may help"
                    )
                self.step += 1
                rate = (self.step - first) * config.batch_size / (time.monotonic() - started)
                bar.update()
                bar.set_postfix(loss=f"{loss:.4f}", images=f"{rate:.0f}/s", refresh=False)
                after_step(Progress(self.step, loss, grad_norm, rate))
                if self.step % config.checkpoint_every == 0 or self.step == config.max_steps or stop_signals:
                    path = self.save()
                    if stop_signals:
                        name = signal.Signals(stop_signals[0]).name
                        raise TrainingStopped(
                            f"stopped by {name} after step {self.step}; {path} is saved, the same command goes on "
                            "from there"
                        )
        finally:
            bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _take_step(self) -> tuple[float, float]:
        config, n = self.config, self.step
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        x0, noise, timesteps = self._draw(n)
        # Dropout draws from the global generators.
        torch.manual_seed(generator_for(config.seed, "dropout", n).initial_seed())
        noisy = self.scheduler.add_noise(x0, noise, timesteps).contiguous(memory_format=torch.channels_last)
        target = self.scheduler.training_target(x0, noise, timesteps)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            predicted = self.model(noisy, timesteps).sample
        loss = (predicted.float() - target).square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.grad_clip))
        value = loss.item()
        if math.isfinite(value + grad_norm):
            self.optimizer.step()
            self._average.update_parameters(self.model)
        return value, grad_norm

    def _draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """x_0 in [-1, 1], epsilon and timesteps of a step."""
        config = self.config
        generator = generator_for(config.seed, "step", step)
        x0 = self.batches[step].float() / 127.5 - 1
        if config.horizontal_flip:
            flipped = torch.rand(len(x0), generator=generator) < 0.5
            x0[flipped] = x0[flipped].flip(3)
        half = torch.randint(len(self.scheduler), (len(x0) // 2 + 1,), generator=generator)
        timesteps = torch.cat([half, len(self.scheduler) - 1 - half])[: len(x0)]
        noise = torch.randn(x0.shape, generator=generator)
        return x0.to(self.device), noise.to(self.device), timesteps.to(self.device)

    def _learning_rate(self) -> float:
        """Of the next step: up in `warmup_steps`, constant, and down to almost zero in the last `decay_steps`."""
        optim = self.config.optim
        up = (self.step + 1) / max(1, optim.warmup_steps)
        down = (self.config.max_steps - self.step) / max(1, optim.decay_steps)
        return optim.lr * min(1.0, up, down)


def zero_last_layers(model: UNet2DModel) -> None:
    """Start every residual branch and the output at zero, as DDPM does: the network begins as nearly linear and learns
    faster.
    """
    for name, module in model.named_modules():
        if name.endswith(("conv2", "to_out.0", "conv_out")) and isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def ema_update(decay: float) -> Callable[[Any, Any, Any], None]:
    """The averaging rule for `AveragedModel`: decay min(decay, (1 + n) / (10 + n)) after n updates, so that early
    weights fade quickly.
    """

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor | int) -> None:
        n = int(num_averaged)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return update
