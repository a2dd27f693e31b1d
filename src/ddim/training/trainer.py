"""The training loop.

Each step draws x_0 from the data, t and epsilon, and takes a step of AdamW down the gradient of the objective
(`ddim.training.objective`). Samples are drawn from an exponential moving average of the weights.

Every random number of step n is a function of (seed, n), so that a resumed run computes what an uninterrupted one
would.
All processes draw the numbers of the whole batch and take their part: how many there are changes nothing but the order
of sums (and dropout, which each process draws for its own part).

Losses stay on the device until they are needed, so that a GPU is never waited for in between.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from ddim.data.dataset import Batches, ImageDataset, Prefetcher, generator_for, split_holdout
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.training.checkpoint import Checkpoint, newest_first, save_checkpoint
from ddim.training.config import TrainConfig
from ddim.training.objective import QUARTILES, by_quartile, draw_timesteps, loss_weights
from ddim.training.optim import ema_update, learning_rate, make_optimizer, zero_last_layers
from ddim.unet import UNet2DModel

SYNC_EVERY = 10
"""Steps between looks at losses and signals, on devices that would have to be waited for."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingStopped(RuntimeError):
    """A run that cannot or shall not go on; the message says why and where it can be taken up again."""


class Record(NamedTuple):
    """What a step came to: its loss, the gradient's norm before clipping, and, by quartile of the timestep, the sum and
    number of its samples' losses without weights.
    """

    loss: float
    grad_norm: float
    quartile_sums: tuple[float, ...]
    quartile_counts: tuple[float, ...]


@dataclass
class Progress:
    """Where a run stands after a step.

    Attributes:
        step: how many steps have been taken.
        records: of the steps that no line of the metrics has counted yet, the latest last; a consumer clears the list.
            On a GPU it lags behind, but for the steps that `Trainer` reads.
        images_per_second: since the run was started or taken up.
    """

    step: int
    records: list[Record]
    images_per_second: float


class Trainer:
    """A run in a folder: builds the model, trains, writes checkpoints.

    Args:
        config: the checked configuration.
        pictures: the images, fitting the model.
        out: the run's folder.
        device: where this process trains.
        accelerator: the processes; one of its own unless given.

    Attributes:
        model: the network being trained.
        ema: the moving average of its weights, a `UNet2DModel`; use this one.
        step: how many steps have been taken.
        records: of the steps that no line of the metrics has counted yet; they are saved with the rest.
        seconds: spent in `train`, over all pieces of the run.
        held_out: indices of the images that are not trained on.

    Raises:
        ValueError: if the model does not take such images, or the batch cannot be divided among the processes.
    """

    def __init__(
        self,
        config: TrainConfig,
        pictures: ImageDataset,
        out: Path,
        device: torch.device,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.config, self.out, self.device = config, out, device
        self.accelerator = accelerator or Accelerator(cpu=device.type == "cpu")
        processes = self.accelerator.num_processes
        if config.batch_size % (processes * config.optim.accumulate):
            raise ValueError(
                f"batch_size is {config.batch_size}; {processes} processes and optim.accumulate "
                f"{config.optim.accumulate} want a multiple of {processes * config.optim.accumulate}"
            )
        self.scheduler = DDIMScheduler.from_config({}, **config.scheduler)
        self._weights = loss_weights(
            self.scheduler.alphas_cumprod,
            self.scheduler.config.prediction_type,
            config.objective.weighting,
            config.objective.gamma,
        ).to(device)
        self.model = build_model(config).to(device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self._average = AveragedModel(self.model, multi_avg_fn=ema_update(config.ema))
        self.ema = cast(UNet2DModel, self._average.module)
        self.ema.disable_gradient_checkpointing()
        self.ema.requires_grad_(False).eval()
        self.optimizer = make_optimizer(self.model, config.optim)
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        training, self.held_out = split_holdout(pictures.shape[0], config.data.holdout, config.seed)
        self.pictures = pictures
        self.batches = Batches(
            pictures,
            training,
            config.batch_size,
            config.seed,
            config.model["sample_size"],
            config.data.horizontal_flip,
            (self.accelerator.process_index, processes),
        )
        self.step = 0
        self.seconds = 0.0
        self.records: list[Record] = []
        self._unread: list[Tensor] = []
        self._network: Any = self.accelerator.prepare_model(self.model, device_placement=False)
        if config.compile:
            self._network = torch.compile(self._network)
        with torch.no_grad():
            # The network itself says best what does not fit, before anything is written.
            size = config.model["sample_size"]
            self.model(torch.zeros(1, pictures.shape[1], size, size, device=device), 0)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up a run where a checkpoint left it; ValueError if it is of another model."""
        try:
            self.model.load_state_dict(checkpoint.tensors["model"])
            self.ema.load_state_dict(checkpoint.tensors["ema"])
        except RuntimeError as error:
            raise ValueError(f"the checkpoint is of another model: {str(error).splitlines()[-1].strip()}") from None
        self._average.n_averaged.fill_(checkpoint.state["averaged"])
        moments: dict[int, dict[str, Tensor]] = {}
        parameters = list(self.model.parameters())
        for name, tensor in checkpoint.tensors["optimizer"].items():
            index, _, key = name.partition(".")
            like = parameters[int(index)]
            # The fused kernel wants moments that lie in memory as the weights do.
            fitted = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape else tensor.to(like.device)
            moments.setdefault(int(index), {})[key] = fitted
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        if checkpoint.state["scaler"]:
            self._scaler.load_state_dict(checkpoint.state["scaler"])
        self.step, self.seconds = checkpoint.step, checkpoint.state["seconds"]
        self.records = [
            Record(loss, norm, tuple(sums), tuple(counts)) for loss, norm, sums, counts in checkpoint.state["records"]
        ]

    def save(self) -> Path:
        """Write a checkpoint of this step, in the main process."""
        moments = {
            f"{index}.{key}": tensor
            for index, state in self.optimizer.state_dict()["state"].items()
            for key, tensor in state.items()
        }
        tensors = {"model": self.model.state_dict(), "ema": self.ema.state_dict(), "optimizer": moments}
        state = {
            "averaged": int(self._average.n_averaged),
            "scaler": self._scaler.state_dict(),
            "seconds": self.seconds,
            "records": self.records,
        }
        kept = self.config.checkpoints
        return save_checkpoint(self.out / "checkpoints", self.step, tensors, state, kept.keep, kept.keep_every)

    def train(self, after_step: Callable[[Progress], None], max_minutes: float | None = None) -> bool:
        """Train from the current step to `max_steps`, with a checkpoint every so many steps and at the end.

        SIGINT and SIGTERM let the current step finish, save, and stop; a second one stops at once.

        Args:
            after_step: called after each step, before its checkpoint.
            max_minutes: stop, with a checkpoint, when so much time has passed.

        Returns:
            Whether `max_steps` is reached.

        Raises:
            TrainingStopped: on a signal, or a loss or gradient that is no number.
        """
        config, main = self.config, self.accelerator.is_main_process
        started, first, before = time.monotonic(), self.step, self.seconds
        deadline = math.inf if max_minutes is None else started + 60 * max_minutes
        ahead = Prefetcher(self._fetch, config.max_steps - 1)
        bar = tqdm(
            total=config.max_steps, initial=first, desc="training", unit="step", dynamic_ncols=True, disable=not main
        )
        self.model.train()
        try:
            with stop_signals() as received:
                while self.step < config.max_steps:
                    step = self.step + 1
                    saves = step % config.checkpoints.every == 0 or step == config.max_steps
                    stops = late = False
                    self._compute_gradients(ahead[self.step])
                    if saves or self._reads(step):
                        stops, late = self._read(bool(received), time.monotonic() > deadline)
                    self._apply_gradients()
                    self.step = step
                    self.seconds = before + time.monotonic() - started
                    rate = (step - first) * config.batch_size / (time.monotonic() - started)
                    bar.update()
                    if self.records:
                        bar.set_postfix(loss=f"{self.records[-1].loss:.4f}", images=f"{rate:.0f}/s", refresh=False)
                    after_step(Progress(step, self.records, rate))
                    if (saves or stops or late) and main:
                        path = self.save()
                    if stops:
                        name = signal.Signals(received[0]).name if received else "a signal to another process"
                        saved = f"{path} is saved, " if main else ""
                        raise TrainingStopped(
                            f"stopped by {name} after step {step}; {saved}the same command goes on from there"
                        )
                    if late:
                        break
        finally:
            bar.close()
            ahead.close()
        return self.step >= config.max_steps

    def take_step(self) -> Record:
        """One step, with nothing around it: no checkpoint, no signals; TrainingStopped as in `train`."""
        self.model.train()
        self._compute_gradients(self._fetch(self.step))
        self._read(False, False)
        self._apply_gradients()
        self.step += 1
        return self.records.pop()

    def _fetch(self, step: int) -> Tensor:
        """This process's images of a step, uint8, on their way to the device."""
        images = self.batches[step]
        if self.device.type == "cuda" and images.device.type == "cpu":
            images = images.pin_memory()
        return images.to(self.device, non_blocking=True)

    def draw(self, images: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """x_0 in [-1, 1], epsilon and timesteps of this process's part of a step.

        Args:
            images: uint8 (n, C, H, W) on the device.
            step: how many steps were taken before.
        """
        local, whole = self.batches.local, self.config.batch_size
        generator = generator_for(self.config.seed, "step", step, self.device)
        timesteps = draw_timesteps(whole, len(self.scheduler), self.config.objective.antithetic, generator)
        noise = torch.randn((whole, *images.shape[1:]), generator=generator, device=self.device)
        return images.float() / 127.5 - 1, noise[local], timesteps[local]

    def _compute_gradients(self, images: Tensor) -> None:
        config = self.config
        x0, noise, timesteps = self.draw(images, self.step)
        # Dropout draws from the global generators.
        part = f"dropout {self.accelerator.process_index}"
        torch.manual_seed(generator_for(config.seed, part, self.step).initial_seed())
        noisy = self.scheduler.add_noise(x0, noise, timesteps)
        if config.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        target = self.scheduler.training_target(x0, noise, timesteps)
        self.optimizer.zero_grad(set_to_none=True)
        passes = config.optim.accumulate
        losses = []
        for index, (x, t, y) in enumerate(
            zip(*(part.chunk(passes) for part in (noisy, timesteps, target)), strict=True)
        ):
            last = index == passes - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self._network):
                with torch.autocast(self.device.type, PRECISIONS[config.precision], config.precision != "fp32"):
                    predicted = self._network(x, t).sample
                each = (predicted.float() - y).square().flatten(1).mean(1)
                loss = (self._weights[t] * each).mean() / passes
                self._scaler.scale(loss).backward()
            losses.append(each.detach())
        self._scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.grad_clip)
        each = torch.cat(losses)
        loss = (self._weights[timesteps] * each).mean()
        sums, counts = by_quartile(each, timesteps, len(self.scheduler))
        self._unread.append(torch.cat([loss[None], grad_norm.detach()[None], sums, counts]))

    def _apply_gradients(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optim, self.step, self.config.max_steps)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._average.update_parameters(self.model)

    def _reads(self, step: int) -> bool:
        """Whether losses and signals are looked at in a step: always where that costs nothing."""
        return self.device.type == "cpu" or step % SYNC_EVERY == 0 or step % self.config.log_every == 0

    def _read(self, stops: bool, late: bool) -> tuple[bool, bool]:
        """Bring the losses of all processes to the CPU, and tell whether any process wants to stop or is late.

        Raises:
            TrainingStopped: if a loss or gradient is no number.
        """
        rows = torch.stack(self._unread)
        flags = torch.tensor([[stops, late]], device=self.device).expand(len(rows), 2)
        rows = self.accelerator.reduce(torch.cat([rows, flags], 1), "sum").double().cpu()
        rows[:, :2] /= self.accelerator.num_processes
        self._unread.clear()
        for ago, row in zip(reversed(range(len(rows))), rows.tolist(), strict=True):
            loss, grad_norm = row[:2]
            # Loss scaling makes infinite gradients on purpose, and skips such steps.
            finite = math.isfinite(loss) and (math.isfinite(grad_norm) or self._scaler.is_enabled())
            if not finite:
                step = self.step - ago
                rate = learning_rate(self.config.optim, step, self.config.max_steps)
                raise TrainingStopped(
                    f"the loss became {loss}, its gradient's norm {grad_norm}, in step {step + 1} at a learning rate "
                    f"of {rate:.3g}; {self._last_checkpoint()} is from before, a lower optim.lr may help"
                )
            sums, counts = row[2 : 2 + QUARTILES], row[2 + QUARTILES : 2 + 2 * QUARTILES]
            self.records.append(Record(loss, grad_norm, tuple(sums), tuple(counts)))
        return bool(rows[-1, -2] > 0), bool(rows[-1, -1] > 0)

    def _last_checkpoint(self) -> str:
        there = newest_first(self.out / "checkpoints")
        return f"the last checkpoint, {there[0]}," if there else "no checkpoint"


def build_model(config: TrainConfig) -> UNet2DModel:
    """The network that a run starts from, on the CPU: new, or with the weights of `config.init`.

    Raises:
        ValueError: if the arguments or the weights do not fit.
        FileNotFoundError: if there is no model `config.init`.
    """
    torch.manual_seed(config.seed)
    model = UNet2DModel.from_config({}, **config.model)
    if config.init is None:
        zero_last_layers(model)
        return model
    weights = DDIMPipeline.from_pretrained(config.init).unet.state_dict()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"init: {config.init} is another model: {str(error).splitlines()[-1].strip()}") from None
    return model


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list of the SIGINT or SIGTERM that comes in the block; a second one ends the program at once."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for other in handlers:
            signal.signal(other, signal.SIG_DFL)

    handlers = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
