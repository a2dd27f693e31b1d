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

import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ddim.devices import choose_device
from ddim.distillation.checks import check_guidance, check_images, check_settings, check_teacher
from ddim.distillation.samples import SAMPLE_COUNT, SAMPLE_SHARE, SAMPLES, choose_count, generate_samples
from ddim.distillation.settings import choose_settings, fit_lengths, stage_config, stage_settings
from ddim.distillation.stages import Stage, plan_stages
from ddim.distributed import rank_and_world_size
from ddim.io.atomic import atomic_write, is_vacant, replace_folder
from ddim.io.fingerprint import model_sha256
from ddim.io.runs import CHECKPOINTS, FINAL, checkpoint_step, list_checkpoints
from ddim.pipeline import DDIMPipeline
from ddim.training.config import TrainConfig, merge, merge_config, read_yaml
from ddim.training.costs import estimate_costs
from ddim.training.distilling import check_student_prediction
from ddim.training.run import check_batch_size, train
from ddim.training.trainer import training_bar
from ddim.validation import integer, pluralize, real

logger = logging.getLogger(__name__)

RECORD, RUNS = "distillation.yaml", "runs"
TEACHER_ORDER = 2
"""Order of the model's solver in the steps that the first student takes at once."""
FIRST_LENGTH, LATER_LENGTH = 8000, 4000
"""Training steps of the first student and of each further one."""
MIN_LENGTH = 20
"""Training steps per student, at least, where a time limit decides them: fewer teach nothing."""


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
        **({} if count is None else {"count": count}),
        **({} if pipe.classes is None else {"guidance_scale": guidance_scale}),
    }
    record = _read_record(out / RECORD, identity)
    if record is None:
        if data is None and count is None:
            seconds = SAMPLE_SHARE * (deadline - time.monotonic())
            identity["count"] = choose_count(pipe, target, guidance_scale, seconds)
        settings_chosen = choose_settings(pipe, target, identity.get("count", SAMPLE_COUNT))
        record = {"model": model, **identity, "settings": settings_chosen}
    # What is wrong with an entry or the images is reported before samples are generated.
    config = stage_config(pipe, stages[0], model, model, data or SAMPLES, record["settings"], given)
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
            config = stage_config(pipe, stages[0], model, model, source, settings, given)
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
        configs.append(stage_config(pipe, stage, teacher, previous, source, chosen, given))
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
