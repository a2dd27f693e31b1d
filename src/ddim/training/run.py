"""A whole training run, from data to a pipeline folder.

RUN/config.yaml       the configuration, the data's fingerprint and the versions of everything
RUN/metrics.jsonl     what it computed, see `ddim.training.metrics_logger`
RUN/tensorboard/      the same and more, for TensorBoard
RUN/loss.png          the losses as a curve
RUN/samples/          a grid every so many steps, always from the same seeds
RUN/checkpoints/      what is needed to go on; the raw weights are in the last one
RUN/final/            the result: a pipeline folder for `ddim` and `diffusers`, with the averaged weights and a card
"""

from __future__ import annotations

import logging
import platform
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from ddim.data.dataset import CachedPictures, ImageDataset, loader_rate, open_pictures
from ddim.devices import choose_device
from ddim.io.atomic import atomic_write
from ddim.io.image_files import make_grid, save_images
from ddim.pipeline import DDIMPipeline
from ddim.training.card import model_card
from ddim.training.checkpoint import Checkpoint, clean, load_checkpoint, load_newest
from ddim.training.config import TrainConfig, check_model, differences, validate
from ddim.training.evaluate import evaluate
from ddim.training.metrics_logger import MetricsLogger, plot_loss
from ddim.training.optim import learning_rate
from ddim.training.trainer import Progress, Trainer

logger = logging.getLogger(__name__)

PACKAGES = ("ddim", "torch", "numpy", "pillow", "datasets", "accelerate", "safetensors", "pydantic")
# The main process paints and measures while the others wait.
PROCESS_GROUP_TIMEOUT = timedelta(hours=6)


def train(
    config: TrainConfig,
    out: Path,
    device: str | torch.device = "auto",
    resume: Literal["auto", "never"] | Path = "auto",
    max_minutes: float | None = None,
) -> Path:
    """Run to the end, or go on with a run that was begun. Each of several processes calls this.

    Args:
        config: the checked configuration.
        out: the run's folder.
        device: where to train; several processes take a GPU each, or, with `cpu`, none.
        resume: `auto` takes up the newest checkpoint in `out` that is whole; `never` wants `out` empty or not there; a
            path is that of a checkpoint to go on from.
        max_minutes: end after so much time; the same call goes on from there.

    Returns:
        `out/final`.

    Raises:
        FileNotFoundError: if there is no data, or no such checkpoint.
        ValueError: if the data, a run that is there, or the checkpoint does not fit the configuration.
        FileExistsError: if `out` has something in it and `resume` is `never`, or it is no run.
        TrainingStopped: on a signal or a loss that is no number.
    """
    config = complete(config)
    accelerator, where = start_processes(device)
    pictures = load(config, accelerator, where)
    record = _record(config, pictures, where)
    # The main process alone looks into the folder, which need not be on the other machines.
    found: list[Checkpoint | None] = [None]
    if accelerator.is_main_process:
        _check_run(record, config, out, resume)
        found = [load_checkpoint(resume) if isinstance(resume, Path) else load_newest(out / "checkpoints")]
    trainer = Trainer(config, pictures, out, where, accelerator)
    painted = [config.samples.num_inference_steps]
    if config.evaluate.every and config.evaluate.count:
        painted.append(config.evaluate.num_inference_steps)
    for steps in painted:
        # A number of steps that cannot be taken shall be told now.
        trainer.scheduler.make_steps(trainer.scheduler.make_timesteps(steps))
    (checkpoint,) = broadcast_object_list(found)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    if not accelerator.is_main_process:
        trainer.train(lambda progress: progress.records.clear(), max_minutes)
        accelerator.wait_for_everyone()
        return out / "final"
    out.mkdir(parents=True, exist_ok=True)
    clean(out / "checkpoints")
    with atomic_write(out / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(record, sort_keys=False))
    _run(trainer, out, max_minutes)
    final = _finish(trainer, out, record)
    accelerator.wait_for_everyone()
    return final


def complete(config: TrainConfig) -> TrainConfig:
    """The configuration with the network's arguments of `init`, where it has none of its own."""
    if config.init is None or config.model:
        return config
    unet = DDIMPipeline.from_pretrained(config.init).unet.config
    model = {key: list(value) if isinstance(value, tuple) else value for key, value in unet.items()}
    check_model(model)
    return config.model_copy(update={"model": model})


def start_processes(device: str | torch.device) -> tuple[Accelerator, torch.device]:
    """Join the other processes, where `accelerate launch` or `torchrun` has started several; and this one's device."""
    wanted = choose_device(device)
    accelerator = Accelerator(
        cpu=wanted.type == "cpu",
        mixed_precision="no",  # the trainer's own, by the configuration
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_GROUP_TIMEOUT)],
    )
    if wanted.type == "cuda":
        torch.backends.cudnn.benchmark = True
    return accelerator, accelerator.device if accelerator.num_processes > 1 else wanted


def load(config: TrainConfig, accelerator: Accelerator, device: torch.device) -> ImageDataset:
    """The images; several processes of a machine share what the first of them decodes.

    Raises:
        ValueError: besides what `open_pictures` raises, if there are fewer images than a batch takes.
    """
    with accelerator.local_main_process_first():
        size, channels = config.model["sample_size"], config.model.get("in_channels", 3)
        pictures = open_pictures(config.data, size, channels, shared=accelerator.num_processes > 1)
    left = pictures.shape[0] - config.data.holdout
    if left < config.batch_size:
        raise ValueError(
            f"{config.data.source} has {pictures.shape[0]} images, of which {config.data.holdout} are held out; that "
            f"is too few for a batch_size of {config.batch_size}"
        )
    if config.data.on_device and isinstance(pictures, CachedPictures):
        pictures = CachedPictures(pictures.pixels.to(device), str(device), pictures.fingerprint)
    return pictures


def _run(trainer: Trainer, out: Path, max_minutes: float | None) -> None:
    """Train, and write down what comes of it."""
    config = trainer.config
    N, C, H, W = trainer.pictures.shape
    logger.info(
        "%s: %d images, %d x %d x %d, in %s; the loader gives %.0f images/s",
        *(config.data.source, N, C, H, W, trainer.pictures.place, loader_rate(trainer.batches)),
    )
    watch = MetricsLogger(out, trainer.step, config.log_every, trainer.device)

    def after_step(progress: Progress) -> None:
        watch.add(progress, learning_rate(config.optim, progress.step - 1, config.max_steps))
        if config.samples.every and progress.step % config.samples.every == 0:
            watch.picture(progress.step, _paint(trainer, out / "samples" / f"step-{progress.step:08d}.png"))
        measures = config.evaluate.every and progress.step % config.evaluate.every == 0
        if measures and (values := evaluate(trainer, _pipeline(trainer))):
            watch.write(progress.step, values)

    try:
        if not trainer.train(after_step, max_minutes):
            said = "the time is up after step %d of %d; the same command goes on from there"
            logger.warning(said, trainer.step, config.max_steps)
    finally:
        watch.close()


def _finish(trainer: Trainer, out: Path, record: dict[str, Any]) -> Path:
    """Write the result: the pipeline, then what describes it."""
    final = out / "final"
    _pipeline(trainer).save_pretrained(final)
    _paint(trainer, final / "samples.png")
    plot_loss(out / "metrics.jsonl", out / "loss.png")
    for name, content in (
        ("loss.png", (out / "loss.png").read_bytes()),
        ("README.md", model_card(trainer, out, record).encode()),
    ):
        with atomic_write(final / name) as temporary:
            temporary.write_bytes(content)
    return final


def _pipeline(trainer: Trainer) -> DDIMPipeline:
    pipe = DDIMPipeline(trainer.ema, trainer.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _paint(trainer: Trainer, path: Path) -> Any:
    """A grid from the averaged weights, always from seeds 0, 1, 2, ...; in a file, and returned."""
    samples = trainer.config.samples
    images = _pipeline(trainer).paint(samples.count, num_inference_steps=samples.num_inference_steps)
    path.parent.mkdir(exist_ok=True)
    save_images(images, path)
    return make_grid(images)


def _record(config: TrainConfig, pictures: ImageDataset, device: torch.device) -> dict[str, Any]:
    """What goes into `config.yaml`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "config": config.model_dump(mode="json"),
        "data": {"images": pictures.shape[0], "sha256": pictures.fingerprint},
        "device": f"{device.type} ({name})",
        "versions": {
            **{package: _version(package) for package in PACKAGES},
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _check_run(record: dict[str, Any], config: TrainConfig, out: Path, resume: Literal["auto", "never"] | Path) -> None:
    """Compare with the run that is in the folder, if there is one."""
    # A process that died at once may have left no more than the beginning of config.yaml.
    if not out.exists() or all(path.name.startswith(".config-") for path in out.iterdir()):
        return
    path = out / "config.yaml"
    if resume == "never":
        raise FileExistsError(f"{out} is not empty; give another folder, or --resume auto to go on with the run in it")
    if not path.is_file():
        raise FileExistsError(f"{out} is not empty and holds no run (no config.yaml); give another folder")
    try:
        there = yaml.safe_load(path.read_text())
        changed = differences(validate(there["config"]), config)
        if there["data"] != record["data"]:
            changed.append(f"data: {there['data']['images']} other images there, {record['data']['images']} here")
    except (yaml.YAMLError, ValueError, KeyError, TypeError):
        raise FileExistsError(f"{path} is no record of a run; give another folder") from None
    if changed:
        raise ValueError(
            f"the run in {out} was begun with other settings ({'; '.join(changed)}); "
            "go on with those, or give another folder"
        )
