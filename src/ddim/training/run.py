"""A whole training run, from data to a pipeline folder.

RUN/config.yaml       the configuration and its history, the data's fingerprint and the versions of packages
RUN/data.png          the images of the first step, as the network gets them
RUN/metrics.jsonl     what the run computed, see `ddim.training.metrics_logger`
RUN/tensorboard/      the same and more, for TensorBoard; see `ddim.training.trackers`
RUN/loss.png          the losses as a curve
RUN/samples/          a grid of samples every so many steps, always from the same seeds
RUN/checkpoints/      what resuming requires, each a pipeline folder too, with the averaged and the raw weights
RUN/averages/         snapshots from which averages of other lengths are combined, see `ddim.training.averages`
RUN/final/            the result: a pipeline folder for `ddim` and `diffusers`, with the averaged weights and a card
"""

from __future__ import annotations

import contextlib
import logging
import math
import platform
from collections.abc import Mapping
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from PIL import Image
from tqdm import tqdm

from ddim.data.augment import Augmentation
from ddim.data.dataset import CachedImageDataset, ImageDataset, open_dataset
from ddim.data.labels import describe_classes
from ddim.data.loader import loader_rate
from ddim.devices import choose_device
from ddim.distributed import rank_and_world_size
from ddim.io.atomic import atomic_write, is_vacant
from ddim.io.class_labels import grid_of_classes
from ddim.io.config import public_entries
from ddim.io.false_color import preview
from ddim.io.fingerprint import model_sha256
from ddim.io.image_files import make_grid, save_images
from ddim.io.images import to_values
from ddim.io.locks import LOCK_NAME, OutputLock
from ddim.io.pixel_format import NonFiniteError
from ddim.io.runs import CHECKPOINTS, FINAL, list_checkpoints
from ddim.pipeline import DDIMPipeline, ImagePipeline
from ddim.scheduler import DDIMScheduler
from ddim.training.averages import AVERAGES, remove_snapshots_after, take_over_snapshots
from ddim.training.card import model_card
from ddim.training.checkpoint import Checkpoint, load_checkpoint, load_newest, remove_partial
from ddim.training.config import (
    CLASS_ARGUMENTS,
    TrainConfig,
    check_augmentation,
    check_model,
    check_scheduler,
    flat_entries,
    incompatible_changes,
    validate,
)
from ddim.training.evaluate import evaluate
from ddim.training.history import describe_changes, extend_history, format_history
from ddim.training.machine import is_emulated
from ddim.training.metrics_logger import MetricsLogger, plot_loss
from ddim.training.optim import learning_rate
from ddim.training.processes import PROCESSES
from ddim.training.progress import Progress
from ddim.training.trackers import check_trackers
from ddim.training.trainer import Trainer

logger = logging.getLogger(__name__)

PACKAGES = ("ddim", "torch", "numpy", "pillow", "datasets", "accelerate", "safetensors", "pydantic")
"""Packages whose versions a run records."""

DATA_GRID, DATA_GRID_IMAGES = "data.png", 64

PROCESS_GROUP_TIMEOUT = timedelta(hours=6)
"""How long processes wait for each other: the main process generates samples and evaluates while the others wait."""


def train(
    config: TrainConfig,
    out: Path,
    device: str | torch.device = "auto",
    resume: Literal["auto", "never"] | Path = "auto",
    max_minutes: float | None = None,
    shared_bar: tqdm[Any] | None = None,
) -> Path:
    """Train to the end, or resume a run. Each of several processes calls this.

    Args:
        config: the checked configuration.
        out: folder of the run.
        device: device to train on; several processes take one GPU each, or none with `cpu`.
        resume: `auto` resumes from the newest complete checkpoint in `out`, if any; `never` requires `out` to be empty
            or missing; a path is the checkpoint to resume from.
        max_minutes: stop after this time; the same call resumes. `None` for no limit.
        shared_bar: a bar of several runs to advance; `None` for one of this run.

    Returns:
        `out/final`.

    Raises:
        FileNotFoundError: if the data or the checkpoint does not exist.
        ValueError: if the data, the run in `out`, or the checkpoint does not fit the configuration.
        FileExistsError: if `out` is not empty and `resume` is `never`, or it is not a run.
        RuntimeError: if another process writes to `out`.
        ImportError: if the package of a tracker is not installed.
        TrainingStopped: on a signal, or a non-finite loss or gradient.
    """
    # Check everything before anything is written.
    check_trackers(config.trackers)
    config = complete_config(config)
    accelerator, local_device = start_processes(device)
    if is_emulated(config.precision, local_device):
        logger.warning("this CPU has no instructions for %s: precision=fp32 is faster", config.precision)
    dataset = prepare_dataset(config, accelerator, local_device)
    config = resolve_length(config, dataset.shape[0])
    record = _make_record(config, dataset, local_device)
    # Only the main process reads and writes `out`, which other machines need not have.
    is_main = accelerator.is_main_process
    with OutputLock(out / LOCK_NAME) if is_main else contextlib.nullcontext():
        loaded: list[Checkpoint | None] = [None]
        if is_main:
            old_record = _check_run(record, config, out, resume)
            loaded = [load_checkpoint(resume) if isinstance(resume, Path) else load_newest(out / CHECKPOINTS)]
            step = 0 if loaded[0] is None else loaded[0].step
            if isinstance(resume, Path) and step > config.max_steps:
                raise ValueError(f"max_steps must be at least the step resumed from, {step}, got {config.max_steps}")
            if old_record is not None:
                _continue_record(record, old_record, config, step)
        trainer = Trainer(config, dataset, out, local_device, accelerator)
        _check_sampling(trainer)
        (checkpoint,) = broadcast_object_list(loaded)
        if checkpoint is not None:
            trainer.restore(checkpoint)

        if not is_main:
            trainer.train(lambda progress: progress.pending_metrics.clear(), max_minutes)
            accelerator.wait_for_everyone()
            return out / FINAL
        remove_partial(out / CHECKPOINTS)
        remove_snapshots_after(out / AVERAGES, trainer.step)
        if isinstance(resume, Path):
            take_over_snapshots(resume, out / AVERAGES)
        with atomic_write(out / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(record, allow_unicode=True, sort_keys=False), encoding="utf-8")
        _write_data(trainer, out / DATA_GRID)
        _train_and_log(trainer, out, max_minutes, shared_bar)
        final = _write_result(trainer, out, record)
        accelerator.wait_for_everyone()
        return final


def complete_config(config: TrainConfig) -> TrainConfig:
    """Fill in the arguments of the network and of the scheduler that the configuration leaves out.

    With `init` they are those of the model that it names, so that fine-tuning keeps its network, its schedule, its
    prediction type and how it is sampled; entries of the configuration override single ones. Timesteps that were
    learned for its weights are not taken over.

    Args:
        config: the checked configuration.

    Returns:
        A configuration with `model`, and with the entries of `scheduler` that are not defaults of `DDIMScheduler`;
        `clip_sample` is always among them, unless the process is discrete.

    Raises:
        FileNotFoundError: if the model `config.init` does not exist.
        ValueError: if training does not support its network or its schedule.

    Example:
        >>> from ddim.training.config import load_config
        >>> complete_config(load_config("digits")).scheduler
        {'clip_sample': False}
        >>> complete_config(load_config("digits", settings=["scheduler.clip_sample=true"])).scheduler
        {'clip_sample': True}
    """
    scheduler_defaults = PROCESSES[config.process].scheduler_defaults
    model, scheduler = config.model, dict(scheduler_defaults)
    if config.init is not None:
        pipe = DDIMPipeline.from_pretrained(config.init)
        if (embed_type := getattr(pipe.unet.config, "class_embed_type", None)) is not None:
            raise ValueError(f"init: training does not support class_embed_type={embed_type}, which {config.init} has")
        trained = {name: v for name, v in _plain_values(pipe.unet.config).items() if name not in CLASS_ARGUMENTS}
        # A learned variance is not trained, and DDIM does not use it.
        if trained["out_channels"] == 2 * trained["in_channels"]:
            trained["out_channels"] = trained["in_channels"]
        model = trained | model
        defaults = DDIMScheduler().config
        scheduler = {
            name: value
            for name, value in _plain_values(pipe.scheduler.config).items()
            if name in scheduler_defaults or (name in defaults and value != defaults[name])
        }
    scheduler |= config.scheduler
    check_model(model)
    check_augmentation(config.data, model)
    check_scheduler(scheduler, config.process)
    distill = config.distill
    if distill.teacher is not None:
        sha256 = model_sha256(DDIMPipeline.from_pretrained(distill.teacher))
        distill = distill.model_copy(update={"teacher_sha256": sha256})
    return config.model_copy(update={"model": model, "scheduler": scheduler, "distill": distill})


def _plain_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments in a component's configuration, as YAML holds them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in public_entries(config).items()}


def start_processes(device: str | torch.device) -> tuple[Accelerator, torch.device]:
    """Join the processes that `accelerate launch` or `torchrun` has started, if any.

    Args:
        device: `auto`, or a device's name.

    Returns:
        The processes, and the device of this one.

    Raises:
        ValueError: if the launcher's environment is incomplete or contradicts itself.

    Example:
        >>> accelerator, device = start_processes("cpu")
        >>> accelerator.num_processes, device
        (1, device(type='cpu'))
    """
    chosen = choose_device(device)
    rank_and_world_size()
    accelerator = Accelerator(
        cpu=chosen.type == "cpu",
        mixed_precision="no",  # the trainer applies autocast itself, as the configuration says
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_GROUP_TIMEOUT)],
    )
    if chosen.type == "cuda":
        torch.backends.cudnn.benchmark = True
    return accelerator, accelerator.device if accelerator.num_processes > 1 else chosen


def prepare_dataset(config: TrainConfig, accelerator: Accelerator, device: torch.device) -> ImageDataset:
    """Open the images of a run; processes of one machine share what the first of them decodes.

    Args:
        config: the configuration, with `model`.
        accelerator: the processes.
        device: device of this process.

    Returns:
        The images, on the device where `data.on_device` is set.

    Raises:
        FileNotFoundError: if the source does not exist or holds no image.
        ValueError: if more images than allowed cannot be read, or there are fewer images than a batch
            (`BatchSizeError`).
        RuntimeError: if the hub cannot be reached or refuses.
    """
    with accelerator.local_main_process_first():
        size, channels = config.model["sample_size"], config.model.get("in_channels", 3)
        dataset = open_dataset(config.data, size, channels, shared=accelerator.num_processes > 1)
    if Augmentation.of(config.data).changes_color and not dataset.pixel_format.is_eight_bit:
        raise ValueError(
            "data.brightness, contrast, saturation and hue must be 0 for images that do not have 8 bits, got "
            f"{dataset.pixel_format.dtype}"
        )
    if config.process == "discrete" and not dataset.pixel_format.is_eight_bit:
        raise ValueError(f"process=discrete requires images of 8 bits, got {dataset.pixel_format.dtype}")
    check_batch_size(config, dataset.shape[0])
    if config.data.on_device and isinstance(dataset, CachedImageDataset):
        dataset = dataset.to(device)
    return dataset


class BatchSizeError(ValueError):
    """A batch of more images than there are.

    Attributes:
        largest: the largest batch that there are images for.

    Example:
        >>> raise BatchSizeError("batch_size must be at most 40, got 128", largest=40)
        Traceback (most recent call last):
        ddim.training.run.BatchSizeError: batch_size must be at most 40, got 128
    """

    def __init__(self, message: str, largest: int) -> None:
        super().__init__(message)
        self.largest = largest


def check_batch_size(config: TrainConfig, count: int) -> None:
    """Check that there are as many images as a batch has.

    Args:
        config: the configuration.
        count: number of images, those held out included.

    Raises:
        BatchSizeError: if there are fewer.

    Example:
        >>> from ddim.training.config import load_config
        >>> check_batch_size(load_config("digits"), 1797)
    """
    holdout = config.data.holdout
    if count - holdout < config.batch_size:
        raise BatchSizeError(
            f"batch_size must be at most the number of images to train on, {count - holdout} ({config.data.source} has "
            f"{count}, data.holdout is {holdout}), got {config.batch_size}",
            count - holdout,
        )


def resolve_length(config: TrainConfig, count: int) -> TrainConfig:
    """Replace a length in epochs by one in steps.

    Args:
        config: the configuration.
        count: number of images, those held out included.

    Returns:
        The configuration without `epochs`; the last epoch ends in the last step.

    Example:
        >>> from ddim.training.config import load_config
        >>> config = resolve_length(load_config("digits", overrides={"epochs": 2}), count=1797)
        >>> config.max_steps, config.epochs
        (29, None)
    """
    if config.epochs is None:
        return config
    max_steps = math.ceil(config.epochs * (count - config.data.holdout) / config.batch_size)
    return config.model_copy(update={"max_steps": max(1, max_steps), "epochs": None})


def _write_data(trainer: Trainer, path: Path) -> None:
    """Write a grid of images of the first step, unless an earlier part of the run has."""
    if path.exists():
        return
    pixel_format = trainer.dataset.pixel_format
    values = pixel_format.to_array(pixel_format.to_unit(trainer.batches[0][:DATA_GRID_IMAGES]))
    save_images(preview(values, pixel_format), path)


def _train_and_log(trainer: Trainer, out: Path, max_minutes: float | None, shared_bar: tqdm[Any] | None = None) -> None:
    config = trainer.config
    N, C, H, W = trainer.dataset.shape
    logger.info(
        "%s: %d images, %d x %d x %d, in %s; the loader delivers %.0f images/s",
        *(config.data.source, N, C, H, W, trainer.dataset.location, loader_rate(trainer.batches)),
    )
    if trainer.dataset.labels is not None:
        logger.info("%s", describe_classes(trainer.dataset.labels))
    elif trainer.dataset.unused_labels is not None:
        logger.info("labels are not used: %s; data.labels: auto trains with them", trainer.dataset.unused_labels)
    entries = flat_entries(config)
    metrics_logger = MetricsLogger(out, trainer.step, config.log_every, trainer.device, config.trackers, entries)

    def after_step(progress: Progress) -> None:
        step = progress.step
        metrics_logger.log_step(progress, learning_rate(config.optim, step - 1, config.max_steps))
        evaluates = config.evaluate.every and step % config.evaluate.every == 0
        try:
            if config.samples.every and step % config.samples.every == 0:
                file = out / "samples" / f"step-{step:08d}.png"
                metrics_logger.log_image(step, _write_samples(trainer, file), file)
            if evaluates and (values := evaluate(trainer, _make_pipeline(trainer))):
                metrics_logger.log(step, values)
        except NonFiniteError as error:
            # The run itself may recover: these are samples of the weights so far.
            logger.warning("no samples of step %d: %s", step, error)

    try:
        if not trainer.train(after_step, max_minutes, shared_bar):
            logger.warning(
                "time limit reached after step %d of %d; run again to resume", trainer.step, config.max_steps
            )
    finally:
        metrics_logger.close()


def _write_result(trainer: Trainer, out: Path, record: dict[str, Any]) -> Path:
    """Write the pipeline, then what describes it."""
    final = out / FINAL
    _make_pipeline(trainer).save_pretrained(final)
    try:
        _write_samples(trainer, final / "samples.png")
    except NonFiniteError as error:
        logger.warning("no samples of the result: %s", error)
    plot_loss(out / "metrics.jsonl", out / "loss.png")
    for name, content in (
        ("loss.png", (out / "loss.png").read_bytes()),
        ("README.md", model_card(trainer, out, record).encode()),
    ):
        with atomic_write(final / name) as temporary:
            temporary.write_bytes(content)
    return final


def _make_pipeline(trainer: Trainer) -> ImagePipeline:
    """Wrap the averaged weights, without a copy."""
    pipe = trainer.make_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _write_samples(trainer: Trainer, path: Path) -> Image.Image:
    """Write a grid of samples of the averaged weights, from seeds 0, 1, 2, ..., and return it."""
    samples = trainer.config.samples
    pipe = _make_pipeline(trainer)
    count, columns, labels = samples.count, None, None
    if trainer.classes is not None:
        # A row per class.
        rows, columns = grid_of_classes(count, trainer.classes.count)
        count, labels = rows * columns, [row for row in range(rows) for _ in range(columns)]
    output = pipe.sample_images(
        count, num_inference_steps=samples.num_inference_steps, output_type="np", class_labels=labels
    )
    images = preview(to_values(output, pipe.pixel_format), pipe.pixel_format)
    path.parent.mkdir(exist_ok=True)
    save_images(images, path, columns=columns)
    return make_grid(images, columns)


def _make_record(config: TrainConfig, dataset: ImageDataset, device: torch.device) -> dict[str, Any]:
    """Return the content of `config.yaml`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    pixel_format = dataset.pixel_format.record()
    data = {"images": dataset.shape[0], "sha256": dataset.fingerprint, "identity": dataset.identity}
    if (labels := dataset.labels) is not None:
        data["labels"] = {"column": labels.column, "classes": list(labels.names), "sha256": labels.sha256()}
    return {
        "config": config.model_dump(mode="json"),
        "data": data | ({} if pixel_format is None else {"pixel_format": pixel_format}),
        "device": f"{device.type} ({name})",
        "versions": {
            **{package: _package_version(package) for package in PACKAGES},
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
    }


def _package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _check_sampling(trainer: Trainer) -> None:
    """Raise for a number of sampling steps that the scheduler cannot take, before training starts."""
    config, scheduler = trainer.config, trainer.scheduler
    counts = {"samples": config.samples.num_inference_steps}
    if config.evaluate.every and config.evaluate.count:
        counts["evaluate"] = config.evaluate.num_inference_steps
    for section, num_inference_steps in counts.items():
        try:
            scheduler.make_steps(scheduler.make_timesteps(num_inference_steps))
        except ValueError as error:
            raise ValueError(f"training configuration, {section}.num_inference_steps: {error}") from None


def holds_run(out: Path, resume: Literal["auto", "never"] | Path = "auto") -> bool:
    """Return whether a folder holds a run to resume; one that is missing, or as good as empty, does not.

    Args:
        out: folder of the run.
        resume: as for `train`.

    Raises:
        FileExistsError: if it holds something else, or a run that must not be resumed.

    Example:
        >>> holds_run(Path("missing"))
        False
    """
    if is_vacant(out):
        return False
    if resume == "never":
        raise FileExistsError(f"{out} is not empty; use resume='auto' to resume the run in it, or another folder")
    if not (out / "config.yaml").is_file():
        raise FileExistsError(f"{out} is not empty and does not hold a run (no config.yaml); use another folder")
    return True


def _check_run(
    record: dict[str, Any], config: TrainConfig, out: Path, resume: Literal["auto", "never"] | Path
) -> dict[str, Any] | None:
    """Compare with the run in `out`, if there is one, and return its record; `None` where nothing is resumed."""
    if not holds_run(out, resume):
        return None
    path = out / "config.yaml"
    try:
        old = yaml.safe_load(path.read_text())
        changes = incompatible_changes(validate(old["config"]), config)
        format_history(old.get("history", ()))
        if not _is_same_data(old["data"], record["data"]):
            changes.append(f"data: expected {_describe(old['data'])}, got {_describe(record['data'])}")
    except (yaml.YAMLError, ValueError, KeyError, TypeError):
        raise FileExistsError(f"{path} is not the record of a run; use another folder") from None
    if not list_checkpoints(out / CHECKPOINTS) and not (out / FINAL).exists():
        # Nothing that was computed is kept: the run starts again, with whatever configuration.
        return None
    if changes:
        raise ValueError(
            f"the run in {out} has another configuration ({'; '.join(changes)}); resume it with its own, or use "
            "another folder"
        )
    return dict(old)


def _continue_record(record: dict[str, Any], old: dict[str, Any], config: TrainConfig, step: int) -> None:
    """Add to a run's record what changes when it resumes, and log it."""
    old_config = validate(old["config"])
    for line in describe_changes(old_config, config, step):
        logger.info("%s", line)
    if step >= config.max_steps:
        logger.info("the run is complete at step %d of %d; a larger max_steps trains on", step, config.max_steps)
    if history := extend_history(old.get("history", ()), old_config, config, step):
        record["history"] = history


def _is_same_data(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Return whether two records are of the same images, by their pixels, or by their files where no pixels are cached.

    The same files can be read as 8 bits and as 16.

    The record of a run that began before files were recorded has pixels alone.
    """
    if old["images"] != new["images"] or old.get("pixel_format") != new.get("pixel_format"):
        return False
    if old.get("labels", {}).get("sha256") != new.get("labels", {}).get("sha256"):
        return False
    return old["sha256"] == new["sha256"] or old.get("identity") == new["identity"]


def _describe(data: dict[str, Any]) -> str:
    dtype = data.get("pixel_format", {}).get("dtype", "uint8")
    labels = data.get("labels")
    classes = f", {len(labels['classes'])} classes (SHA-256 {str(labels['sha256'])[:16]})" if labels else ""
    return (
        f"{data['images']} images ({'' if dtype == 'uint8' else f'{dtype}, '}SHA-256 {str(data['sha256'])[:16]})"
        f"{classes}"
    )
