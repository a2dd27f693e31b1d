"""Distillation: students that sample in one to four steps what their teacher samples in many.

    OUT/distillation.yaml   what is distilled from what, and the settings that were chosen
    OUT/samples.npz         the teacher's own samples, where no images are given
    OUT/runs/4/             the training run of the student of 4 steps (`ddim.training.run`), and so on
    OUT/4/                  that student: an ordinary pipeline folder for `ddim` and `diffusers`

The first student starts from the model's weights and learns to do several of the model's steps in one; it predicts v,
whatever the model predicts. Every further one starts from the student before it, and learns to do as many of its steps
in one as its own number of steps requires: two, where the numbers are halved. `ddim.diffusion.distillation` has the
mathematics, docs/fewer-steps.md what was measured.

References:
    Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from ddim.bulk import sample_many
from ddim.data.labels import AUTO, read_labels
from ddim.data.sources import open_source
from ddim.devices import choose_device
from ddim.diffusion.distillation import check_starts, divide_segments, student_betas
from ddim.diffusion.guidance import Guidance
from ddim.distributed import rank_and_world_size
from ddim.io.atomic import atomic_write, is_vacant, replace_folder
from ddim.io.fingerprint import model_sha256
from ddim.io.runs import CHECKPOINTS, FINAL, checkpoint_step, list_checkpoints
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.training.config import TrainConfig, merge, merge_config, read_yaml, validate
from ddim.training.costs import estimate_costs
from ddim.training.distilling import check_student_prediction
from ddim.training.machine import inspect_machine
from ddim.training.plan import LR_WIDTH, MIN_BATCH_SIZE, PEAK_LR, TIME_SHARE, choose_batch_size, choose_precisions
from ddim.training.run import check_batch_size, train
from ddim.training.trainer import training_bar
from ddim.validation import integer, pluralize, real

logger = logging.getLogger(__name__)

RECORD, RUNS, SAMPLES = "distillation.yaml", "runs", "samples.npz"
TEACHER_STEPS, TEACHER_ORDER = 32, 2
"""Steps of the model that the first student takes at once, about, and the order of its solver there."""
FIRST_LENGTH, LATER_LENGTH = 8000, 4000
"""Training steps of the first student and of each further one."""
FIRST_SHARE = 0.7
"""The part of a time limit that the first student gets, where there are several."""
LATER_LR = 0.5
"""Learning rate of further students, relative to that of the first."""
SAMPLE_COUNT, SAMPLE_STEPS, SAMPLE_BATCH = 4096, 20, 64
"""The model's own samples that are distilled on where no images are given: how many, and in how many steps."""
SAMPLE_SHARE, MIN_SAMPLES, TIMED_SAMPLES = 0.2, 256, 8
"""The part of a time limit that may go to them, where their number is not given; how many there are at least, and how
many are timed."""
GPU_BATCH_PIXELS, GPU_BATCH_SIZE, GPU_SAMPLE_BATCH = 2**20, 512, 512
CPU_BATCH_SIZE, CPU_REPEATS = 16, 4
"""On a CPU: images of a batch, of which more would take fewer steps in the same time, and steps for each batch."""
BACKWARD = 3
"""A training step of the student costs as much as so many evaluations of the teacher."""
MIN_LENGTH = 20
"""Training steps per student, at least, where a time limit decides them: fewer teach nothing."""
DECIDED = ("init", "process", "epochs", "model", "scheduler", "data.source", "data.class_names")
"""Entries of the training configuration, and sections, that a distillation decides itself."""
DECIDED_OF_TEACHER = ("teacher", "starts", "substeps", "guidance_scale", "teacher_sha256")
"""Those of its section `distill`."""
OPEN = ("model.dropout", "scheduler.prediction_type")
"""Entries of such sections that may be set."""


@dataclass(frozen=True)
class Stage:
    """One student.

    Attributes:
        timesteps: of the model that is distilled, with the noise of the student's own timesteps: as many as it has
            steps.
        starts: those of its teacher with this noise: the same, where the model itself is the teacher.
        substeps: steps of its teacher for each of its own.

    Example:
        >>> Stage(timesteps=(999, 499), starts=(3, 1), substeps=2).name
        '2'
    """

    timesteps: tuple[int, ...]
    starts: tuple[int, ...]
    substeps: int

    @property
    def num_inference_steps(self) -> int:
        """S, the number of its steps."""
        return len(self.timesteps)

    @property
    def name(self) -> str:
        """The name of its folders."""
        return str(self.num_inference_steps)


def plan_stages(
    steps: Sequence[int],
    scheduler: DDIMScheduler,
    teacher_steps: int | None = None,
    direct: bool = False,
    starts: Sequence[int] | None = None,
) -> list[Stage]:
    """Return the students that lead to some numbers of steps.

    Args:
        steps: decreasing numbers of steps; each divides the one before.
        scheduler: of the model.
        teacher_steps: steps of the model that the first student learns from, a multiple of its own; defaults to the
            number of steps of a model that is a student itself, else to the last multiple up to 32.
        direct: the model is the teacher of every student.
        starts: timesteps of the model where steps of the first student start; defaults to `trailing` ones. Those of
            further students are among them.

    Returns:
        One stage per number.

    Raises:
        ValueError: naming what does not divide what, if the model has too few timesteps, or for wrong timesteps.

    Example:
        >>> plan_stages([4, 2], DDIMScheduler())
        [Stage(timesteps=(999, 749, 499, 249), starts=(999, 749, 499, 249), substeps=8), \
Stage(timesteps=(999, 499), starts=(3, 1), substeps=2)]
    """
    T = len(scheduler)
    if not steps:
        raise ValueError("num_inference_steps must be at least one number, got none")
    counts = [integer("num_inference_steps", count, 1, T) for count in steps]
    for larger, smaller in itertools.pairwise(counts):
        if smaller >= larger or larger % smaller:
            raise ValueError(
                f"num_inference_steps must decrease, each number dividing the one before, got {smaller} after {larger}"
            )
    first = counts[0]
    own_steps = scheduler.distilled_steps
    if teacher_steps is None:
        teacher_steps = own_steps or first * max(2, min(TEACHER_STEPS // first, T // first))
    teacher_steps = integer("teacher_steps", teacher_steps, 1, T)
    if own_steps is not None and teacher_steps != own_steps:
        raise ValueError(f"teacher_steps must be {own_steps}, the steps of this distilled model, got {teacher_steps}")
    if teacher_steps % first or teacher_steps == first:
        raise ValueError(
            f"teacher_steps must be a multiple of the first number of steps, {first}, and larger, got {teacher_steps}"
        )
    if starts is None:
        starts = scheduler.make_timesteps(first, "trailing", order=1)
    if len(starts) != first:
        raise ValueError(f"starts must be {first}, one for each step of the first student, got {len(starts)}")
    starts = check_starts(starts, T)
    divide_segments(starts, teacher_steps // first)
    stages: list[Stage] = []
    for count in counts:
        timesteps = tuple(starts[:: first // count])
        if stages and not direct:
            taught = stages[-1].num_inference_steps
            own = tuple(range(taught - 1, -1, -(taught // count)))
            stages.append(Stage(timesteps, own, taught // count))
        else:
            stages.append(Stage(timesteps, timesteps, teacher_steps // count))
    return stages


def student_scheduler(alphas_cumprod: NDArray[np.float64], timesteps: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of a student's scheduler.

    Args:
        alphas_cumprod: alpha_t of the model, (T,).
        timesteps: S of the model's, decreasing, with the noise of the student's.

    Returns:
        Arguments of `DDIMScheduler`, by which `diffusers` takes the same steps.

    Example:
        >>> student_scheduler(DDIMScheduler().alphas_cumprod_float64, [999, 499])["timesteps_by_steps"]
        {'2': [1, 0]}
    """
    S = len(timesteps)
    return {
        "num_train_timesteps": S,
        "trained_betas": student_betas(alphas_cumprod, timesteps),
        "rescale_betas_zero_snr": False,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "steps_offset": 0,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "thresholding": False,
        "timesteps_by_steps": {str(S): list(range(S - 1, -1, -1))},
    }


def distill(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    steps: int | Sequence[int] = (4,),
    data: str | os.PathLike[str] | None = None,
    *,
    count: int | None = None,
    teacher_steps: int | None = None,
    starts: Sequence[int] | None = None,
    guidance_scale: float = 1.0,
    direct: bool = False,
    settings: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
    max_minutes: float | None = None,
    device: str | torch.device = "auto",
) -> list[Path]:
    """Distill a model into students of fewer steps, or resume.

    Args:
        model: the teacher of the first student: a built-in model, a folder, a run, or a hub id.
        out: folder for the students; empty, missing, or that of the same call, which resumes.
        steps: numbers of steps, decreasing; each divides the one before. One number for a single student.
        data: images of the kind that the model generates, as `ddim train` takes them; `None` for its own samples.
        count: number of the model's own samples, where no images are given; defaults to 4,096, and with `max_minutes`
            to as many as a fifth of the time allows.
        teacher_steps: steps of the model that the first student learns from; see `plan_stages`.
        starts: timesteps of the model where steps of the first student start; see `plan_stages`.
        guidance_scale: of the model, which must have classes and a null class. The first student learns the guided
            steps, and its samples are guided without any guidance of their own.
        direct: every student learns from the model itself, instead of from the student before it. A training step then
            takes `teacher_steps` / S evaluations of the model, and no errors of earlier students are learned.
        settings: `key=value` entries of the training configuration, which replace what is chosen here. What this call
            or the model decides cannot be set: the network, the schedule, the teacher and its steps, the data.
        overrides: the same by dotted key.
        max_minutes: stop after this time, or once the model's own samples are there; the same call resumes. Where no
            `max_steps` is set, the call that starts to train also chooses the lengths of the runs so that all fit into
            the time that is left.
        device: device to train on.

    Returns:
        The folders of the students that are complete, in the order of `steps`.

    Raises:
        FileNotFoundError: if the model or the data does not exist.
        FileExistsError: if `out` holds something else.
        ValueError: if the steps do not fit each other or the model, an entry is wrong or cannot be set, the images lack
            the model's classes, the time is too short, or `out` holds the distillation of another model or to other
            steps, or students of another length that others have learned from.
        TrainingStopped: on a signal, or a non-finite loss or gradient.
    """
    # Check everything before anything is written.
    model, out, target = os.fspath(model), Path(out), choose_device(device)
    data = None if data is None else os.fspath(data)
    steps = [steps] if isinstance(steps, int) else steps
    deadline = math.inf
    if max_minutes is not None:
        deadline = time.monotonic() + 60 * real("max_minutes", max_minutes, above=0)
    if rank_and_world_size()[1] > 1:
        raise ValueError("distillation runs in a single process, got several")
    if not is_vacant(out) and not (out / RECORD).is_file():
        raise FileExistsError(f"{out} is not empty and does not hold a distillation (no {RECORD}); use another folder")
    pipe = DDIMPipeline.from_pretrained(model)
    check_teacher(pipe, model)
    guidance_scale = check_guidance(pipe, model, guidance_scale)
    stages = plan_stages(steps, pipe.scheduler, teacher_steps, direct, starts)
    if data is not None and count is not None:
        raise ValueError("count is of the model's own samples, and data gives images; leave one of them out")
    if count is not None:
        count = integer("count", count, 1)
    given = check_settings(merge_config(None, None, settings, overrides))
    identity: dict[str, Any] = {
        "model_sha256": model_sha256(pipe),
        "steps": [stage.num_inference_steps for stage in stages],
        "starts": list(stages[0].starts),
        "substeps": [stage.substeps for stage in stages],
        "direct": direct,
        "data": data,
    }
    if count is not None:
        identity["count"] = count
    if pipe.classes is not None:
        identity["guidance_scale"] = guidance_scale
    record = _read_record(out / RECORD, identity)
    if record is None:
        if data is None and count is None:
            seconds = SAMPLE_SHARE * (deadline - time.monotonic())
            identity["count"] = choose_count(pipe, target, guidance_scale, seconds)
        chosen_settings = choose_settings(pipe, target, identity.get("count", SAMPLE_COUNT))
        record = {"model": model, **identity, "settings": chosen_settings}
    # What is wrong with an entry or the images is reported before samples are generated.
    config = _stage_config(pipe, stages[0], model, model, data or SAMPLES, record["settings"], given)
    check_student_prediction(config.scheduler["prediction_type"])
    if data is None:
        check_batch_size(config, record.get("count", SAMPLE_COUNT))
    else:
        check_images(config, pipe, model)
    is_new = not out.exists()
    _write_record(out / RECORD, record)
    try:
        configs = _plan_runs(pipe, model, out, stages, record, given, target, deadline)
        return _run_stages(out, stages, configs, target, deadline)
    except (ValueError, OSError):
        # Nothing but the record: another call may be another distillation.
        if [path.name for path in out.iterdir()] == [RECORD]:
            (out / RECORD).unlink()
            if is_new:
                out.rmdir()
        raise


def _plan_runs(
    pipe: DDIMPipeline,
    model: str,
    out: Path,
    stages: Sequence[Stage],
    record: dict[str, Any],
    given: Mapping[str, Any],
    device: torch.device,
    deadline: float,
) -> list[TrainConfig]:
    """Generate the model's own samples where they are missing, choose the lengths of the runs; return all of them."""
    settings, scale = record["settings"], record.get("guidance_scale", 1.0)
    source = record["data"] or str(generate_samples(pipe, out, record.get("count", SAMPLE_COUNT), device, scale))
    if "lengths" not in record:
        record["lengths"] = [FIRST_LENGTH, *[LATER_LENGTH] * (len(stages) - 1)]
        if deadline < math.inf and "max_steps" not in given:
            config = _stage_config(pipe, stages[0], model, model, source, settings, given)
            seconds_per_step = estimate_costs(config, device).seconds_per_step
            seconds = deadline - time.monotonic()
            record["lengths"] = fit_lengths(stages, seconds_per_step, seconds, config.distill.repeats)
            if min(record["lengths"]) < MIN_LENGTH:
                raise ValueError(
                    f"max_minutes is too short for {MIN_LENGTH} training steps of each student, of which those of the "
                    f"first take {seconds_per_step:.2g} s each; the same call with more time, or with max_steps, goes "
                    "on from here"
                )
        _write_record(out / RECORD, record)

    previous, configs = model, []
    for index, (stage, length) in enumerate(zip(stages, record["lengths"], strict=True)):
        chosen = merge(settings, stage_settings(pipe, index, length))
        if index == 0 or record["direct"]:
            order = 1 if pipe.scheduler.distilled_steps else TEACHER_ORDER
            chosen = merge(chosen, {"distill": {"guidance_scale": scale, "order": order}})
        teacher = model if record["direct"] else previous
        configs.append(_stage_config(pipe, stage, teacher, previous, source, chosen, given))
        previous = str(out / RUNS / stage.name / FINAL)
    if not record["direct"]:
        check_lengths(out, stages, configs)
    return configs


def _run_stages(
    out: Path, stages: Sequence[Stage], configs: Sequence[TrainConfig], device: torch.device, deadline: float
) -> list[Path]:
    """Run what is not complete, with one bar; return the folders of the students that are complete."""
    done: list[Path] = []
    lengths = [config.max_steps for config in configs]
    with training_bar(sum(lengths), 0, "distilling") as bar:
        for index, (stage, config) in enumerate(zip(stages, configs, strict=True)):
            run, result = out / RUNS / stage.name, out / stage.name
            count = pluralize(stage.num_inference_steps, "step")
            bar.set_description(count)
            if not (result.is_dir() and _trained_steps(run) == config.max_steps):
                minutes = (deadline - time.monotonic()) / 60
                if minutes <= 0:
                    logger.warning("time limit reached before the student of %s; run again to resume", count)
                    break
                final = train(config, run, device, "auto", minutes if minutes < math.inf else None, bar)
                if _trained_steps(run) < config.max_steps:
                    break
                with replace_folder(result) as temporary:
                    shutil.copytree(final, temporary, dirs_exist_ok=True)
            else:
                bar.initial += config.max_steps
                bar.n = sum(lengths[: index + 1])
            done.append(result)
    return done


def check_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Check that settings leave alone what a distillation decides itself.

    Args:
        given: entries of the training configuration, nested.

    Returns:
        The same.

    Raises:
        ValueError: naming an entry that cannot be set.

    Example:
        >>> check_settings({"optim": {"lr": 1e-3}})
        {'optim': {'lr': 0.001}}
        >>> check_settings({"init": "mnist"})
        Traceback (most recent call last):
        ValueError: init cannot be set: the model and the arguments of a distillation decide it
    """
    decided = {*DECIDED, *(f"distill.{name}" for name in DECIDED_OF_TEACHER)}
    for section, value in given.items():
        names = [f"{section}.{name}" for name in value] if isinstance(value, dict) else [section]
        for name in names:
            if value is not None and name not in OPEN and (name in decided or section in decided):
                hint = "; use max_steps" if name == "epochs" else ""
                raise ValueError(f"{name} cannot be set: the model and the arguments of a distillation decide it{hint}")
    return given


def check_images(config: TrainConfig, pipe: DDIMPipeline, model: str) -> None:
    """Check that images can be found, and have the classes of the model.

    Args:
        config: of the first student's run.
        pipe: the model.
        model: its name, for messages.

    Raises:
        FileNotFoundError: if the images do not exist.
        ValueError: if they have no classes, or others, or cannot be read.
    """
    data = config.data
    source = open_source(data.source, data.split, data.column)
    if pipe.classes is not None:
        if data.labels == AUTO and not source.label_columns():
            raise ValueError(
                f"data has no labels, and {model} has classes; give images with labels, or none, for the model's own "
                "samples"
            )
        read_labels(source, data.labels, class_names=data.class_names)


def check_lengths(out: Path, stages: Sequence[Stage], configs: Sequence[TrainConfig]) -> None:
    """Check that no student changes from which another one has learned.

    Args:
        out: the folder.
        stages: the students, each of which learns from the one before.
        configs: of their runs.

    Raises:
        ValueError: naming the lengths that a student has and should have.
    """
    for index, (stage, config) in enumerate(zip(stages, configs, strict=True)):
        trained = _trained_steps(out / RUNS / stage.name)
        if trained != config.max_steps and any((out / RUNS / later.name).exists() for later in stages[index + 1 :]):
            raise ValueError(
                f"max_steps must be {trained} as before: students of fewer steps have learned from that of "
                f"{pluralize(stage.num_inference_steps, 'step')}; got {config.max_steps}; use another folder"
            )


def check_teacher(pipe: DDIMPipeline, model: str) -> None:
    """Check that a model can be distilled.

    Args:
        pipe: the model.
        model: its name, for messages.

    Raises:
        ValueError: if it has other conditions than class labels, predicts something else than images, or embeds
            timesteps as `fourier`, or its configuration lacks the size of its images.

    Example:
        >>> check_teacher(DDIMPipeline.from_pretrained("mnist"), "mnist")
    """
    config = pipe.unet.config
    if pipe.unet.class_embedding is not None and pipe.classes is None:
        raise ValueError(f"model must have class labels or be unconditional, {model} takes other conditions")
    if config.time_embedding_type == "fourier":
        raise ValueError(
            f"model must embed timesteps as positional or learned, {model} does as fourier, with too many features for "
            "a student's table"
        )
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise ValueError(
            f"model must predict as many channels as it takes, or twice as many with a variance, {model} takes "
            f"{config.in_channels} and predicts {config.out_channels}"
        )
    pipe.sample_shape  # noqa: B018  # raises where the configuration lacks the size


def check_guidance(pipe: DDIMPipeline, model: str, guidance_scale: float) -> float:
    """Check the guidance that a student is to learn.

    Args:
        pipe: the model.
        model: its name, for messages.
        guidance_scale: w, at least 0.

    Returns:
        The scale.

    Raises:
        ValueError: if it is out of range, or the model has no null class to guide away from.

    Example:
        >>> check_guidance(DDIMPipeline.from_pretrained("mnist"), "mnist", 2)
        Traceback (most recent call last):
        ValueError: guidance_scale requires a model with classes and a null class, which mnist does not have
    """
    scale = Guidance(guidance_scale).scale
    if scale != 1 and (pipe.classes is None or not pipe.classes.has_null):
        raise ValueError(f"guidance_scale requires a model with classes and a null class, which {model} does not have")
    return scale


def choose_settings(pipe: DDIMPipeline, device: torch.device, count: int) -> dict[str, Any]:
    """Choose what depends on the machine: a run that resumes elsewhere keeps it.

    Args:
        pipe: the model.
        device: device to train on.
        count: number of images, or of the model's own samples.

    Returns:
        Entries of the training configuration.
    """
    machine = inspect_machine(device)
    size = pipe.sample_shape[1:]
    if machine.is_cpu:
        batch_size = min(CPU_BATCH_SIZE, choose_batch_size(size, count, is_cpu=True))
        precision, repeats = "fp32", CPU_REPEATS
    else:
        largest = min(GPU_BATCH_SIZE, max(MIN_BATCH_SIZE, GPU_BATCH_PIXELS // math.prod(size)), count)
        batch_size = 2 ** int(math.log2(largest))
        precision, repeats = choose_precisions(machine)[0], 1
    return {
        "batch_size": batch_size,
        "precision": precision,
        "data": {"on_device": not machine.is_cpu},
        "distill": {"repeats": repeats},
    }


def stage_settings(pipe: DDIMPipeline, index: int, max_steps: int) -> dict[str, Any]:
    """Choose what depends on the length of a run.

    Args:
        pipe: the model.
        index: number of the student, from 0.
        max_steps: the length.

    Returns:
        Entries of the training configuration.
    """
    lr = PEAK_LR * min(1.0, LR_WIDTH / pipe.unet.config.block_out_channels[0])
    return {
        "max_steps": max_steps,
        "optim": {"lr": lr * (LATER_LR if index else 1.0), "warmup_steps": min(100, max_steps // 10)},
        "ema": {"decay": round(min(0.9999, max(0.9, 1 - 20 / max_steps)), 5)},
        "checkpoints": {"every": max(1, min(1000, max_steps // 4))},
        "log_every": min(50, max(1, max_steps // 50)),
    }


def fit_lengths(stages: Sequence[Stage], seconds_per_step: float, seconds: float, repeats: int = 1) -> list[int]:
    """Choose the lengths of all runs so that they fit into a time.

    The first run gets `FIRST_SHARE`, since all further students inherit its errors, the others equal parts of the rest.

    Args:
        stages: the students.
        seconds_per_step: of a training step of the first with its teacher's evaluations.
        seconds: the time for all.
        repeats: steps that share these evaluations.

    Returns:
        Training steps, at least 1 each.

    Example:
        >>> fit_lengths(plan_stages([4, 2, 1], DDIMScheduler()), seconds_per_step=0.1, seconds=100)
        [595, 280, 280]
    """
    later = len(stages) - 1
    shares = [FIRST_SHARE, *[(1 - FIRST_SHARE) / later] * later] if later else [1.0]
    costs = [
        seconds_per_step * (stage.substeps / repeats + BACKWARD) / (stages[0].substeps + BACKWARD) for stage in stages
    ]
    return [max(1, int(TIME_SHARE * share * seconds / cost)) for share, cost in zip(shares, costs, strict=True)]


def choose_count(pipe: DDIMPipeline, device: torch.device, guidance_scale: float, seconds: float) -> int:
    """Choose how many samples of the model are made, from the time that a few take.

    Args:
        pipe: the model.
        device: where they are made.
        guidance_scale: of a model with classes.
        seconds: the time for all of them; infinity for no limit.

    Returns:
        The number: a multiple of `MIN_SAMPLES`, at most `SAMPLE_COUNT`.

    Example:
        >>> choose_count(DDIMPipeline.from_pretrained("mnist"), torch.device("cpu"), 1.0, math.inf)
        4096
    """
    if seconds == math.inf:
        return SAMPLE_COUNT
    settings = _sampling_settings(pipe.to(device), TIMED_SAMPLES, guidance_scale)
    started = time.monotonic()
    pipe.sample_images(TIMED_SAMPLES, output_type="np", **settings)
    affordable = seconds * TIMED_SAMPLES / (time.monotonic() - started)
    return min(SAMPLE_COUNT, max(1, int(affordable) // MIN_SAMPLES) * MIN_SAMPLES)


def _sampling_settings(pipe: DDIMPipeline, count: int, guidance_scale: float) -> dict[str, Any]:
    """Return the settings of the model's own samples, of all classes alike."""
    own_steps = pipe.scheduler.distilled_steps
    settings = {"num_inference_steps": own_steps or SAMPLE_STEPS, "order": 1 if own_steps else 2}
    if pipe.classes is None:
        return settings
    labels = [index % pipe.classes.count for index in range(count)]
    return {**settings, "class_labels": labels, "guidance_scale": guidance_scale}


def generate_samples(
    pipe: DDIMPipeline, out: Path, count: int, device: torch.device, guidance_scale: float = 1.0
) -> Path:
    """Generate the model's own samples to distill on, of all classes alike; those that are present are kept.

    Args:
        pipe: the model.
        out: the folder.
        count: number of samples.
        device: where to generate them.
        guidance_scale: of a model with classes.

    Returns:
        The file.
    """
    path = out / SAMPLES
    batch_size = SAMPLE_BATCH if device.type == "cpu" else GPU_SAMPLE_BATCH
    settings = _sampling_settings(pipe, count, guidance_scale)
    sample_many(pipe.to(device), path, count, batch_size=batch_size, **settings)
    return path


def _stage_config(
    pipe: DDIMPipeline,
    stage: Stage,
    teacher: str,
    init: str,
    source: str,
    chosen: Mapping[str, Any],
    given: Mapping[str, Any],
) -> TrainConfig:
    """Return the configuration of a student's run."""
    S, pixel_format = stage.num_inference_steps, pipe.pixel_format
    data: dict[str, Any] = {"source": source}
    if not pixel_format.is_eight_bit:
        data["value_range"] = [list(pair) for pair in zip(pixel_format.low, pixel_format.high, strict=True)]
    objective: dict[str, Any] = {"weighting": "truncated_snr"}
    if (classes := pipe.classes) is not None:
        # The student has its teacher's classes.
        names = [classes.name_of(index) for index in range(classes.count)]
        data |= {"labels": AUTO, "class_names": names}
        objective |= {} if classes.has_null else {"class_dropout": 0.0}
    base = {
        "data": data,
        "init": init,
        "model": {"dropout": 0.0, "time_embedding_type": "learned", "num_train_timesteps": S},
        "scheduler": student_scheduler(pipe.scheduler.alphas_cumprod_float64, stage.timesteps),
        "objective": objective,
        "distill": {"teacher": teacher, "starts": list(stage.starts), "substeps": stage.substeps},
        "optim": {"decay": "linear"},
        "ema": {"sigma_rels": []},
        "samples": {"every": 0, "num_inference_steps": S},
        "evaluate": {"num_inference_steps": S},
    }
    return validate(merge(base, chosen, given))


def _read_record(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the record of a folder, and compare it with what is asked for; `None` where there is none."""
    if not path.is_file():
        return None
    record = read_yaml(path)
    if not isinstance(record.get("settings"), dict):
        raise FileExistsError(f"{path} is not the record of a distillation; use another folder")
    changes = [
        f"{key}: expected {record.get(key)}, got {value}" for key, value in identity.items() if record.get(key) != value
    ]
    if changes:
        raise ValueError(f"{path.parent} holds another distillation ({'; '.join(changes)}); use another folder")
    return record


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(yaml.safe_dump(dict(record), allow_unicode=True, sort_keys=False), encoding="utf-8")


def _trained_steps(run: Path) -> int:
    """Return the number of steps that a run has taken, by its newest checkpoint."""
    checkpoints = list_checkpoints(run / CHECKPOINTS)
    return checkpoint_step(checkpoints[0]) if checkpoints else 0
