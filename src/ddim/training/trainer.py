"""The training loop.

Each step draws x_0 from the data, t and epsilon, and takes a step of AdamW down the gradient of the objective
(`ddim.training.objective`). Samples are generated from an exponential moving average of the weights.

Every random number of step n is a function of (seed, n), so that a resumed run computes what an uninterrupted one
would. All processes draw the numbers of the whole batch and use their part: the number of processes changes nothing but
the order of sums (and dropout, which each process draws for its own part).

With labels the network takes the class of each image. Some labels, drawn anew in every step, are replaced by the null
class, which stands for all classes: guidance needs it (arXiv 2207.12598).

Losses stay on the device until they are needed, so that the loop does not wait for a GPU at every step.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from ddim.data.augment import Augmentation
from ddim.data.dataset import ImageDataset
from ddim.data.labels import ImageLabels
from ddim.data.loader import Batches, Prefetcher, split_holdout
from ddim.data.seeding import generator_for
from ddim.distributed import ProcessGroup
from ddim.io.class_labels import MAX_NAMES_SHOWN, ClassLabels
from ddim.io.pixel_format import EIGHT_BIT, PixelFormat
from ddim.io.runs import CHECKPOINTS, checkpoint_step, list_checkpoints
from ddim.pipeline import DDIMPipeline, ImagePipeline
from ddim.training.averages import AVERAGES, PowerAverages, save_snapshot, snapshot_interval
from ddim.training.checkpoint import Checkpoint, save_checkpoint
from ddim.training.config import TrainConfig
from ddim.training.distilling import make_objective
from ddim.training.finetuning import fit_classes, fit_timesteps, load_weights, nearest_timesteps
from ddim.training.machine import PRECISIONS
from ddim.training.objective import QUARTILES, by_quartile
from ddim.training.optim import ema_update, learning_rate, make_optimizer, zero_last_layers
from ddim.training.processes import PROCESSES, channel_arguments
from ddim.training.progress import Progress, StepMetrics, TrainingStopped
from ddim.training.repeats import RepeatedBatches
from ddim.unet import UNet2DModel
from ddim.validation import pluralize

logger = logging.getLogger(__name__)

SYNC_EVERY = 10
"""Steps between synchronizations with a GPU: losses are checked and signals exchanged."""


class Trainer:
    """A run in a folder: builds the model, trains it, writes checkpoints.

    Args:
        config: the configuration, completed (`ddim.training.run.complete_config`).
        dataset: the images, of the size and channels of the model.
        out: folder of the run; nothing is written before the first checkpoint.
        device: device of this process.
        accelerator: the processes; defaults to this one alone.

    Attributes:
        model: the network being trained.
        ema: the moving average of its weights, a `UNet2DModel`; the one to sample from.
        averages: further averages of its weights, for `ddim ema`; none in processes other than the main one.
        scheduler: the noise schedule.
        objective: what the network learns to predict.
        optimizer: AdamW.
        grad_scaler: loss scaling, enabled for fp16.
        batches: this process's images of each step.
        step: number of steps taken.
        pending_metrics: metrics of the steps that no line of `metrics.jsonl` covers yet; checkpoints save them.
        seconds: time spent in `train`, over all parts of the run.
        held_out: indices of the images that are not trained on.
        classes: of the network; `None` without labels.

    Raises:
        ValueError: if the model does not take such images, or the batch cannot be divided among the processes.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: ImageDataset,
        out: Path,
        device: torch.device,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.config, self.dataset, self.out, self.device = config, dataset, out, device
        self.accelerator = accelerator or Accelerator(cpu=device.type == "cpu")
        processes = self.accelerator.num_processes
        multiple = processes * config.optim.accumulate
        if config.batch_size % multiple:
            raise ValueError(
                f"batch_size must be a multiple of {multiple} (processes: {processes}, optim.accumulate: "
                f"{config.optim.accumulate}), got {config.batch_size}"
            )

        # The objective.
        self.scheduler = PROCESSES[config.process].scheduler.from_config({}, **config.scheduler)
        self.objective = make_objective(config, self.scheduler, device)
        self._loss_weights = self.objective.loss_weights(config.objective).to(device)
        self._repeated = RepeatedBatches(config.distill.repeats)

        # The network, its average, and the optimizer.
        self.model = build_model(config, dataset.pixel_format, dataset.labels).to(device)
        self.classes = ClassLabels.of(self.model.config)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.ema = copy.deepcopy(self.model)
        self._update_average = ema_update(config.ema)
        # Counted here: `AveragedModel` moves its counter to the device, and what reads it there waits for it.
        self._num_averaged = 0
        self.ema.disable_gradient_checkpointing()
        self.ema.requires_grad_(False).eval()
        # Listed once: walking a small network for them takes some percent of its step.
        self._model_parameters, self._ema_parameters = (
            list(network.parameters()) for network in (self.model, self.ema)
        )
        # Only the main process saves them.
        self.averages = PowerAverages(self.model, config.ema.sigma_rels if self.accelerator.is_main_process else ())
        self.optimizer = make_optimizer(self.model, config.optim)
        self.grad_scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

        # The data.
        size = config.model["sample_size"]
        trained, self.held_out = split_holdout(dataset.shape[0], config.data.holdout, config.seed)
        group = ProcessGroup(self.accelerator.process_index, processes)
        augmentation = Augmentation.of(config.data)
        self.batches = Batches(
            dataset, trained, config.batch_size, config.seed, size, augmentation, group, config.data.balanced
        )
        self._fetch_stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._fetch_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

        # Progress.
        self.step = 0
        self.seconds = 0.0
        self.pending_metrics: list[StepMetrics] = []
        self._device_metrics: list[Tensor] = []

        # What a step calls: the model, wrapped for several processes and compiled where asked.
        self._network: Any = self.accelerator.prepare_model(self.model, device_placement=False)
        if config.compile:
            self._network = torch.compile(self._network)
        with torch.no_grad():
            # A trial run raises the model's own errors for images that do not fit, before anything is written.
            zero = torch.zeros(1, dtype=torch.int64, device=device)
            image = torch.zeros(1, dataset.shape[1], *self.batches.size, device=device)
            self.model(self.objective.noised(image, image, zero), 0, None if self.classes is None else zero)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Args:
            checkpoint: of a run with the same model.

        Raises:
            ValueError: if it is of another model.
        """
        try:
            self.model.load_state_dict(checkpoint.tensors["model"])
            self.ema.load_state_dict(checkpoint.tensors["ema"])
        except RuntimeError as error:
            raise ValueError(f"the checkpoint is of another model: {str(error).splitlines()[-1].strip()}") from None
        self._num_averaged = checkpoint.state["averaged"]
        if self.averages.averages and checkpoint.tensors[AVERAGES]:
            self.averages.load_state_dict(checkpoint.tensors[AVERAGES])
        elif self.averages.averages:
            logger.warning("the checkpoint has no averages for `ddim ema`; this run does not track them")
            self.averages = PowerAverages(self.model, ())
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in checkpoint.tensors["optimizer"].items():
            index, _, key = name.partition(".")
            like = self._model_parameters[int(index)]
            # The fused kernel requires moments in the memory layout of the weights.
            aligned = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape else tensor.to(like.device)
            moments.setdefault(int(index), {})[key] = aligned
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        if checkpoint.state["scaler"]:
            self.grad_scaler.load_state_dict(checkpoint.state["scaler"])
        self.step, self.seconds = checkpoint.step, checkpoint.state["seconds"]
        self.pending_metrics = [
            StepMetrics(loss, norm, tuple(sums), tuple(counts))
            for loss, norm, sums, counts in checkpoint.state["records"]
        ]

    def save(self) -> Path:
        """Write a checkpoint of this step; called in the main process.

        Returns:
            The folder of the checkpoint.

        Raises:
            OSError: if it cannot be written.
        """
        moments = {
            f"{index}.{key}": tensor
            for index, state in self.optimizer.state_dict()["state"].items()
            for key, tensor in state.items()
        }
        tensors = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": moments,
            AVERAGES: self.averages.state_dict(),
        }
        state = {
            "averaged": self._num_averaged,
            "scaler": self.grad_scaler.state_dict(),
            "seconds": self.seconds,
            "records": self.pending_metrics,
        }
        pipe = self.make_pipeline()
        configs = {
            pipe.config_name: pipe.to_json_string(),
            f"unet/{self.ema.config_name}": self.ema.to_json_string(),
            f"scheduler/{self.scheduler.config_name}": self.scheduler.to_json_string(),
        }
        keep, keep_every = self.config.checkpoints.keep, self.config.checkpoints.keep_every
        return save_checkpoint(self.out / CHECKPOINTS, self.step, tensors, state, keep, keep_every, configs)

    def make_pipeline(self) -> ImagePipeline:
        """Return a pipeline of the averaged weights, without a copy."""
        pipe: ImagePipeline = PROCESSES[self.config.process].pipeline(self.ema, self.scheduler)
        return pipe

    def train(
        self,
        after_step: Callable[[Progress], None],
        max_minutes: float | None = None,
        shared_bar: tqdm[Any] | None = None,
    ) -> bool:
        """Train from the current step to `max_steps`, with checkpoints on the way and at the end.

        SIGINT and SIGTERM let the current step finish, save, and stop; a second signal ends the program at once.

        Args:
            after_step: called after each step, before its checkpoint.
            max_minutes: stop, with a checkpoint, after this time; `None` for no limit.
            shared_bar: a bar of several runs to advance, which stays open; `None` for one of this run.

        Returns:
            Whether `max_steps` is reached.

        Raises:
            TrainingStopped: on a signal, or a non-finite loss or gradient.
        """
        config, is_main = self.config, self.accelerator.is_main_process
        start, first_step, earlier_seconds = time.monotonic(), self.step, self.seconds
        deadline = math.inf if max_minutes is None else start + 60 * max_minutes
        prefetcher = Prefetcher(self._fetch, config.max_steps - 1)
        if shared_bar is None:
            bar = training_bar(config.max_steps, first_step, "training", is_main)
        else:
            bar = shared_bar
            bar.initial, bar.n = bar.initial + first_step, bar.n + first_step
        self.model.train()
        try:
            with stop_signals() as signals:
                while self.step < config.max_steps:
                    step = self.step + 1
                    saves = step % config.checkpoints.every == 0 or step == config.max_steps
                    stops = is_late = False

                    # Gradients, while the next batch is fetched.
                    self.compute_gradients(*prefetcher[self.step])

                    # Check losses before the update, so that no non-finite gradient reaches a checkpoint; all processes
                    # agree whether to stop.
                    if saves or self._synchronizes(step):
                        stops, is_late = self._synchronize(bool(signals), time.monotonic() > deadline)

                    # Update the weights and their average.
                    self.apply_gradients()
                    self.step = step

                    # Report.
                    self.seconds = earlier_seconds + time.monotonic() - start
                    rate = (step - first_step) * config.batch_size / (time.monotonic() - start)
                    bar.update()
                    if self.pending_metrics:
                        loss = f"{self.pending_metrics[-1].loss:.4f}"
                        bar.set_postfix(loss=loss, images=f"{rate:.0f}/s", refresh=False)
                    after_step(Progress(step, self.pending_metrics, rate))

                    # Save, and stop where asked.
                    self._save_snapshot()
                    if (saves or stops or is_late) and is_main:
                        path = self.save()
                    if stops:
                        name = signal.Signals(signals[0]).name if signals else "a signal to another process"
                        checkpoint = f"saved {path}; " if is_main else ""
                        raise TrainingStopped(f"stopped by {name} after step {step}; {checkpoint}run again to resume")
                    if is_late:
                        break
        finally:
            if shared_bar is None:
                bar.close()
            prefetcher.close()
        return self.step >= config.max_steps

    def _save_snapshot(self) -> None:
        """Write a snapshot of the averages, where one is due after this step."""
        maximum = self.config.ema.snapshots
        if self.averages.averages and self.step % snapshot_interval(self.step, maximum) == 0:
            save_snapshot(self.out / AVERAGES, self.step, self.averages.state_dict(), maximum)

    def take_step(self) -> StepMetrics:
        """Take a single step, without checkpoints and signals.

        Returns:
            Its metrics.

        Raises:
            TrainingStopped: on a non-finite loss or gradient.
        """
        self.model.train()
        self.compute_gradients(*self._fetch(self.step))
        self._synchronize(False, False)
        self.apply_gradients()
        self.step += 1
        return self.pending_metrics.pop()

    def draw(self, images: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the random numbers of this process's part of a batch.

        Args:
            images: (n, C, H, W) on the device, in the data's units.
            number: of the batch: without repeats, the number of steps taken before.

        Returns:
            x_0 in [-1, 1], the noise, both float32 (n, C, H, W), and timesteps, int64 (n,).
        """
        local, batch_size = self.batches.local, self.config.batch_size
        generator = generator_for(self.config.seed, "step", number, self.device)
        timesteps = self.objective.draw_timesteps(batch_size, generator)
        noise = self.objective.draw_noise((batch_size, *images.shape[1:]), generator)
        return self.dataset.pixel_format.to_samples(images).clamp(-1, 1), noise[local], timesteps[local]

    def drop_labels(self, labels: Tensor, number: int) -> Tensor:
        """Replace some labels of this process's part of a batch by the null class.

        Args:
            labels: int64 (n,) on the device.
            number: of the batch.

        Returns:
            int64 (n,).
        """
        if self.classes is None or not self.classes.has_null:
            return labels
        generator = generator_for(self.config.seed, "class dropout", number, self.device)
        numbers = torch.rand(self.config.batch_size, generator=generator, device=self.device)[self.batches.local]
        return labels.masked_fill(numbers < self.config.objective.class_dropout, self.classes.count)

    def compute_gradients(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Compute the clipped gradients of this step, averaged over all processes, and queue its metrics.

        Args:
            images: this process's part of the batch, (n, C, H, W) on the device, in the data's units.
            labels: their classes, int64 (n,) on the device, where the network has classes.
        """
        config = self.config

        # Draw x_0, the noise and t; noise x_0 to x_t.
        number = self._repeated.number(self.step)
        x0, noise, timesteps = self.draw(images, number)
        noisy = self.objective.noised(x0, noise, timesteps)
        if config.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        labels = None if labels is None else self.drop_labels(labels, number)
        target = self._repeated.target(self.step, lambda: self.objective.target(x0, noise, timesteps, noisy, labels))
        # Dropout draws from the global generators; each process seeds its own.
        purpose = f"dropout {self.accelerator.process_index}"
        torch.manual_seed(generator_for(config.seed, purpose, self.step).initial_seed())

        # Forward and backward, in `accumulate` passes over parts of the batch.
        self.optimizer.zero_grad(set_to_none=True)
        passes = config.optim.accumulate
        parts = [tensor.chunk(passes) for tensor in (noisy, timesteps, target)]
        # The network takes labels only where it has classes.
        labels_of_parts = [()] * passes if labels is None else zip(labels.chunk(passes))
        losses = []
        for index, (x, t, y, c) in enumerate(zip(*parts, labels_of_parts, strict=True)):
            # The processes exchange gradients once, in the last pass.
            is_last = index == passes - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self._network):
                with torch.autocast(self.device.type, PRECISIONS[config.precision], config.precision != "fp32"):
                    predicted = self._network(x, t, *c).sample
                sample_losses = self.objective.losses(predicted, y, x, t)
                loss = (self._loss_weights[t] * sample_losses).mean() / passes
                self.grad_scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            losses.append(sample_losses.detach())

        # Clip.
        self.grad_scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self._model_parameters, config.optim.grad_clip)

        # Queue the metrics without waiting for the device.
        sample_losses = torch.cat(losses)
        loss = (self._loss_weights[timesteps] * sample_losses).mean()
        sums, counts = by_quartile(sample_losses, timesteps, len(self.scheduler))
        self._device_metrics.append(torch.cat([loss[None], grad_norm.detach()[None], sums, counts]))

    def _fetch(self, step: int) -> tuple[Tensor, ...]:
        """Read this process's images of a step, and their classes if they have any; copy them to the device."""
        number = self._repeated.number(step)
        if self._fetch_stream is None:
            return tuple(tensor.to(self.device) for tensor in self.batches.read_labeled(number) if tensor is not None)
        # On a stream of its own: what waits for a copy in here would wait for the steps that are queued on the default
        # stream, and leave the device without work until the next one is queued.
        with torch.cuda.stream(self._fetch_stream):
            tensors = tuple(tensor for tensor in self.batches.read_labeled(number) if tensor is not None)
            tensors = tuple(t if t.is_cuda else t.pin_memory().to(self.device, non_blocking=True) for t in tensors)
        self._fetch_stream.synchronize()
        for tensor in tensors:
            tensor.record_stream(torch.cuda.current_stream(self.device))
        return tensors

    def apply_gradients(self) -> None:
        """Update the weights and their average by the gradients of this step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optim, self.step, self.config.max_steps)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        self._update_average(self._ema_parameters, self._model_parameters, self._num_averaged)
        self._num_averaged += 1
        self.averages.update(self.step + 1)

    def _synchronizes(self, step: int) -> bool:
        """Return whether losses and signals are checked in a step: always where that costs nothing."""
        return self.device.type == "cpu" or step % SYNC_EVERY == 0 or step % self.config.log_every == 0

    def _synchronize(self, stops: bool, is_late: bool) -> tuple[bool, bool]:
        """Move the queued metrics of all processes to the CPU, and exchange what each process has noticed.

        Args:
            stops: whether this process has received a signal.
            is_late: whether this process has passed the time limit.

        Returns:
            Whether any process has received a signal, and whether any has passed the time limit.

        Raises:
            TrainingStopped: if a loss or gradient is not finite.
        """
        # One reduction for everything: a row per step, its metrics and the two flags.
        rows = torch.stack(self._device_metrics)
        flags = torch.tensor([[stops, is_late]], device=self.device).expand(len(rows), 2)
        rows = self.accelerator.reduce(torch.cat([rows, flags], 1), "sum").double().cpu()
        rows[:, :2] /= self.accelerator.num_processes
        self._device_metrics.clear()
        for steps_ago, row in zip(reversed(range(len(rows))), rows.tolist(), strict=True):
            loss, grad_norm = row[:2]
            # Loss scaling provokes infinite gradients, and skips such steps.
            is_finite = math.isfinite(loss) and (math.isfinite(grad_norm) or self.grad_scaler.is_enabled())
            if not is_finite:
                raise self._non_finite(self.step - steps_ago, loss, grad_norm)
            sums, counts = row[2 : 2 + QUARTILES], row[2 + QUARTILES : 2 + 2 * QUARTILES]
            self.pending_metrics.append(StepMetrics(loss, grad_norm, tuple(sums), tuple(counts)))
        return bool(rows[-1, -2] > 0), bool(rows[-1, -1] > 0)

    def _non_finite(self, step: int, loss: float, grad_norm: float) -> TrainingStopped:
        rate = learning_rate(self.config.optim, step, self.config.max_steps)
        checkpoints = list_checkpoints(self.out / CHECKPOINTS)
        advice = "resume the run with a lower optim.lr" if checkpoints else "start the run again with a lower optim.lr"
        if checkpoints and checkpoint_step(checkpoints[0]) >= step:
            # The weights that gave this loss are those of the last checkpoint.
            earlier = [path for path in checkpoints if checkpoint_step(path) < step]
            advice = f"delete {self.out / CHECKPOINTS} and start the run again with a lower optim.lr"
            if earlier:
                advice = f"use resume={earlier[0]} and a lower optim.lr"
        return TrainingStopped(
            f"loss {loss} or gradient norm {grad_norm} is not finite in step {step + 1} at learning rate {rate:.3g}; "
            f"last checkpoint: {checkpoints[0] if checkpoints else 'none'}; {advice}"
        )


def training_bar(total: int, initial: int, description: str, is_shown: bool = True) -> tqdm[Any]:
    """Open the progress bar of one run, or of several.

    Args:
        total: steps, of all runs.
        initial: steps that have been taken before.
        description: of what the steps are.
        is_shown: whether it is shown.

    Returns:
        The bar, to be closed.

    Example:
        >>> training_bar(10, 3, "training", is_shown=False).total
        10
    """
    return tqdm(total=total, initial=initial, desc=description, unit="step", dynamic_ncols=True, disable=not is_shown)


def network_arguments(config: TrainConfig, labels: ImageLabels | None) -> dict[str, Any]:
    """Return the arguments of the network that follow from the labels of the images and from the process.

    Args:
        config: the configuration; with `objective.class_dropout` there is a null class, the last one.
        labels: classes of the images; `None` for none.

    Returns:
        Arguments of `UNet2DModel`.

    Example:
        >>> from ddim.training.config import load_config
        >>> labels = ImageLabels(("cat", "dog"), torch.tensor([1, 0]), "label")
        >>> network_arguments(load_config("digits"), labels)
        {'num_class_embeds': 3, 'class_names': ['cat', 'dog'], 'has_null_class': True}
    """
    channels = channel_arguments(PROCESSES[config.process].scheduler.from_config({}, **config.scheduler), config.model)
    if labels is None:
        return channels
    has_null = config.objective.class_dropout > 0
    return channels | {
        "num_class_embeds": len(labels.names) + has_null,
        "class_names": list(labels.names),
        "has_null_class": has_null,
    }


def build_model(
    config: TrainConfig, pixel_format: PixelFormat = EIGHT_BIT, labels: ImageLabels | None = None
) -> UNet2DModel:
    """Build the network that a run starts from, on the CPU: new, or with the weights of `config.init`.

    Where the images have other channels than the model `config.init`, its input and output layers are new; where they
    have other classes, the embeddings of these are.

    Args:
        config: the checked configuration.
        pixel_format: the type and the ranges of the images' values, which the network records.
        labels: classes of the images; `None` for none.

    Returns:
        The network.

    Raises:
        ValueError: if the arguments or the weights do not fit.
        FileNotFoundError: if the model `config.init` does not exist.

    Example:
        >>> from ddim.training.config import load_config
        >>> build_model(load_config("digits", settings=["model.block_out_channels=[8, 8]"])).num_parameters()
        18521
    """
    torch.manual_seed(config.seed)
    arguments = config.model | network_arguments(config, labels)
    model = UNet2DModel.from_config({}, **arguments, pixel_format=pixel_format.record())
    if config.init is None:
        zero_last_layers(model)
        return model
    pipe = DDIMPipeline.from_pretrained(config.init)
    source, weights = pipe.unet, pipe.unet.state_dict()
    try:
        if config.distill.teacher is not None:
            own = PROCESSES[config.process].scheduler.from_config({}, **config.scheduler)
            weights = fit_timesteps(weights, source, nearest_timesteps(pipe.scheduler, own))
        weights, new_classes = fit_classes(weights, ClassLabels.of(source.config), model)
        new_layers = load_weights(model, weights)
    except ValueError as error:
        raise ValueError(f"init: the weights of {config.init} do not fit the model: {error}") from None
    if new_layers:
        logger.info(
            "%s has %s, the images have %s: %s are new, all other weights are kept",
            *(config.init, pluralize(source.config.in_channels, "channel"), model.config.in_channels),
            " and ".join(new_layers),
        )
    if new_classes:
        shown_classes = ", ".join(new_classes[:MAX_NAMES_SHOWN]) + ", ..." * (len(new_classes) > MAX_NAMES_SHOWN)
        logger.info("%s does not have the classes %s: their embeddings are new", config.init, shown_classes)
    return model


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM of a `with` block; a second one ends the program at once.

    Yields:
        A list that the signal's number is appended to.

    Example:
        >>> with stop_signals() as signals:
        ...     signal.raise_signal(signal.SIGTERM)
        >>> signals == [signal.SIGTERM]
        True
    """
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
