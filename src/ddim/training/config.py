"""The configuration of a training run: one checked tree of values.

It is merged from a preset, a YAML file, settings and overrides, later ones replacing earlier ones.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from ddim.annotations import check_arguments
from ddim.data.config import DataConfig, Section
from ddim.data.labels import NONE
from ddim.io.array_files import MAX_CHANNELS
from ddim.io.images import height_and_width
from ddim.training.power_average import MAX_SIGMA_REL, MIN_SIGMA_REL
from ddim.training.processes import PROCESSES
from ddim.unet import UNet2DModel
from ddim.validation import as_integer, choice, find_nearest, join_choices, nearest, shorten, shown

PRESETS = resources.files("ddim.training") / "presets"

MAX_FEATURES = 4096
"""Most features of a Fréchet distance, whose covariances grow with their square."""

MAX_YAML_VALUES = 100_000
"""Values of a YAML file, each alias counted as what it stands for: a few lines of aliases can stand for billions."""

LENGTHS = ("max_steps", "epochs")
"""The entries that say how long a run is; it has one of them."""

Beta = Annotated[float, Field(ge=0, lt=1)]
Length = Annotated[float, Field(ge=MIN_SIGMA_REL, le=MAX_SIGMA_REL)]


class ObjectiveConfig(Section):
    """The loss; see `ddim.training.objective`. What the network predicts is `scheduler.prediction_type`.

    Attributes:
        weighting: weights of timesteps: `simple` (DDPM's), `min_snr` or `truncated_snr`; of the discrete process
            `simple` (cross-entropy of x_0) or `kl` (divergence of the posteriors).
        gamma: bound of the signal-to-noise ratio for `min_snr`.
        antithetic: draw timesteps in pairs t, T - 1 - t.
        class_dropout: part of the labels, drawn anew in every step, that are replaced by the null class, which guidance
            and sampling without a class require; 0 trains no null class. It has no effect without `data.labels`.

    Example:
        >>> ObjectiveConfig(weighting="min_snr").gamma
        5.0
    """

    weighting: Literal["simple", "min_snr", "truncated_snr", "kl"] = "simple"
    gamma: PositiveFloat = Field(default=5.0, allow_inf_nan=False)
    antithetic: bool = True
    class_dropout: float = Field(default=0.1, ge=0, lt=1)


class DistillConfig(Section):
    """Distillation of another model's steps; see `ddim.training.distilling`. `ddim distill` fills it in.

    Attributes:
        teacher: model whose steps the network learns to take at once, named as in `init`; null to learn from images
            alone.
        starts: timesteps of the teacher where steps of the network start, decreasing from its last one: as many as the
            network has timesteps.
        substeps: steps of the teacher for each step of the network.
        order: order of the teacher's solver: 1 (DDIM) or 2.
        guidance_scale: guidance of a teacher with classes, which the network's samples then have without any: what it
            learns for the null class is not guided.
        weighting: weights of the network's timesteps: `image`, by the error that reaches the image, or `objective`, by
            `objective.weighting`.
        repeats: steps that take each batch, with what the teacher made of it: the teacher's evaluations cost more than
            the network's step.
        teacher_sha256: SHA-256 of the teacher, which runs record; a run resumes only with the same.

    Example:
        >>> DistillConfig(teacher="mnist").substeps
        8
    """

    teacher: str | None = None
    starts: tuple[NonNegativeInt, ...] = (999, 749, 499, 249)
    substeps: PositiveInt = 8
    order: Literal[1, 2] = 1
    guidance_scale: NonNegativeFloat = 1.0
    weighting: Literal["image", "objective"] = "image"
    repeats: PositiveInt = 1
    teacher_sha256: str | None = None


class OptimConfig(Section):
    """AdamW with gradient clipping and a learning-rate schedule.

    The learning rate rises linearly for `warmup_steps`, stays at `lr`, and falls to zero over the last `decay_steps`.

    Attributes:
        lr: peak learning rate.
        betas: decay rates of AdamW's two moments.
        eps: AdamW's epsilon.
        weight_decay: AdamW's decoupled weight decay.
        warmup_steps: steps of the linear warm-up.
        decay: shape of the decay: `constant` (none), `linear` or `cosine`.
        decay_steps: steps of the decay; defaults to all steps after the warm-up.
        grad_clip: largest norm of the gradient.
        accumulate: backward passes that a batch is divided into, to save memory.

    Example:
        >>> OptimConfig(lr=1e-4).warmup_steps
        5000
    """

    lr: PositiveFloat = Field(default=2e-4, allow_inf_nan=False)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = Field(default=1e-8, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: NonNegativeInt = 5000
    decay: Literal["constant", "linear", "cosine"] = "constant"
    decay_steps: PositiveInt | None = None
    grad_clip: PositiveFloat = 1.0
    accumulate: PositiveInt = 1


class EmaConfig(Section):
    """Moving averages of the weights: the one that is sampled from and that a run results in, and those for `ddim ema`.

    Attributes:
        decay: decay rate per step of the exponential average that is sampled from.
        warmup: use at most (1 + n) / (10 + n) as the decay after n steps, so that the first weights fade quickly.
        sigma_rel: sample from a power-function average of this length instead (`ddim.training.power_average`): its
            standard deviation relative to the number of steps.
        sigma_rels: lengths of the power-function averages that are tracked beside it, from which `ddim ema`
            reconstructs any other after training; empty for none. Each takes 4 bytes of memory per parameter.
        snapshots: largest number of their snapshots; each takes 2 bytes on the disk per parameter and length.

    Example:
        >>> EmaConfig().decay
        0.9999
    """

    decay: float = Field(default=0.9999, ge=0, lt=1)
    warmup: bool = True
    sigma_rel: Length | None = None
    sigma_rels: tuple[Length, ...] = (0.05, 0.10)
    snapshots: PositiveInt = 16


class SampleConfig(Section):
    """Grids of samples that are generated from the averaged weights during training.

    Attributes:
        every: steps between grids; 0 disables them.
        count: samples per grid.
        num_inference_steps: sampling steps.

    Example:
        >>> SampleConfig().count
        64
    """

    every: NonNegativeInt = 1000
    count: PositiveInt = 64
    num_inference_steps: PositiveInt = 50


class EvaluateConfig(Section):
    """Evaluation of the averaged weights during training; see `ddim.training.evaluate`.

    Attributes:
        every: steps between evaluations; 0 disables them.
        count: samples generated for the Fréchet distance; 0 disables it.
        num_inference_steps: sampling steps.
        features: features that the distance is measured on: `pixels`.

    Example:
        >>> EvaluateConfig().every
        0
    """

    every: NonNegativeInt = 0
    count: NonNegativeInt = 1000
    num_inference_steps: PositiveInt = 50
    features: Literal["pixels"] = "pixels"


class CheckpointConfig(Section):
    """When checkpoints are written, and which are kept.

    Attributes:
        every: steps between checkpoints.
        keep: number of checkpoints to keep, the newest.
        keep_every: keep checkpoints of multiples of this step as well; 0 for none.

    Example:
        >>> CheckpointConfig().keep
        2
    """

    every: PositiveInt = 1000
    keep: PositiveInt = 2
    keep_every: NonNegativeInt = 0


class TrainConfig(Section):
    """Everything that decides what a run computes.

    Attributes:
        data: the images.
        model: arguments of `UNet2DModel`, `sample_size` among them, with the images' channels. With `init` they
            override single arguments of that model.
        init: weights to start from, as `DDIMPipeline.from_pretrained` takes them: a built-in model, a folder, a hub id.
        process: `gaussian` noise, or `discrete` values (`ddim.discrete`): gray values are rounded to the nearest of
            `scheduler.num_values`, 2 by default, and noise draws some of them anew.
        scheduler: arguments of `DDIMScheduler`: the betas, the prediction type, how the result is sampled. Where they
            are omitted, the scheduler of `init` decides; without `init`, `clip_sample` is false, and the others have
            the defaults of `DDIMScheduler`. Of the discrete process they are those of `DiscreteDDIMScheduler`.
        objective: the loss.
        distill: distillation of another model's steps.
        optim: the optimizer.
        ema: the averaged weights.
        samples: grids of samples during training.
        evaluate: evaluation during training.
        checkpoints: when checkpoints are written, and which are kept.
        batch_size: images per step, over all processes.
        max_steps: step at which the run ends.
        epochs: length of the run in visits of every image, instead of `max_steps`, which follows from it.
        seed: decides weights, data order, timesteps and noise.
        precision: `fp32`, or `bf16` or `fp16` (with loss scaling) for autocast. Weights stay in float32.
        channels_last: keep feature maps in NHWC, the faster layout on CPUs and GPUs alike.
        gradient_checkpointing: save memory by computing residual blocks twice.
        compile: compile the network by `torch.compile`, which takes minutes and is meant for GPUs.
        log_every: steps between lines of the metrics.
        trackers: where metrics and samples are logged as well: `tensorboard`, `wandb`, `mlflow`.

    Example:
        >>> config = TrainConfig(data=DataConfig(source="digits"), model={"sample_size": 8})
        >>> config.batch_size
        128
    """

    data: DataConfig
    model: dict[str, Any] = Field(default_factory=dict)
    init: str | None = None
    process: Literal["gaussian", "discrete"] = "gaussian"
    scheduler: dict[str, Any] = Field(default_factory=dict)
    objective: ObjectiveConfig = ObjectiveConfig()
    distill: DistillConfig = DistillConfig()
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    samples: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    batch_size: PositiveInt = 128
    max_steps: PositiveInt = 800_000
    epochs: PositiveFloat | None = Field(default=None, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, lt=2**63)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    gradient_checkpointing: bool = False
    compile: bool = False
    log_every: PositiveInt = 50
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)


SECTION_EXAMPLES = {"model": "sample_size", "scheduler": "prediction_type"}
"""An entry of each section whose entries are the arguments of a class."""
OTHER_NAMES = {
    "learning_rate": "optim.lr",
    "steps": "max_steps",
    "num_steps": "max_steps",
    "num_epochs": "epochs",
    "resolution": "model.sample_size",
    "image_size": "model.sample_size",
    "size": "model.sample_size",
    "channels": "model.in_channels",
    "mixed_precision": "precision",
    "gradient_accumulation_steps": "optim.accumulate",
    "max_grad_norm": "optim.grad_clip",
    "prediction_type": "scheduler.prediction_type",
    "label": "data.labels",
    "num_class_embeds": "data.labels",
    "cond_drop_prob": "objective.class_dropout",
}
"""Entries by the names that other projects give them."""

CLASS_ARGUMENTS = ("class_embed_type", "num_class_embeds", "class_names", "has_null_class")
"""Arguments of `UNet2DModel` that follow from the labels of the data."""

RESUME_MAY_CHANGE = (
    "data.source",
    "data.split",
    "data.column",
    "data.dtype",
    "data.cache",
    "data.on_device",
    "data.labels",
    "data.max_unreadable",
    "init",
    "distill.teacher",
    "scheduler.clip_sample",
    "scheduler.clip_sample_range",
    "scheduler.dynamic_thresholding_ratio",
    "scheduler.sample_max_value",
    "scheduler.set_alpha_to_one",
    "scheduler.steps_offset",
    "scheduler.thresholding",
    "scheduler.timestep_spacing",
    "samples",
    "evaluate",
    "checkpoints",
    "max_steps",
    "optim.lr",
    "optim.decay",
    "optim.decay_steps",
    "ema.snapshots",
    "trackers",
    "gradient_checkpointing",
    "compile",
)
"""Entries that may differ when a run resumes: none of them changes, beyond rounding, what an earlier step has computed.

Of the scheduler these are the entries that sampling alone uses. The content of the data is compared, not its location.
The learning rate is a function of the step, `max_steps` and three entries of `optim`: where these change, it is from
the next step on that of a run which had the new values from its start. The record of the run says where
(`ddim.training.history`).
"""


def preset_names() -> list[str]:
    """Return the names of the presets that ship with the package.

    Returns:
        Names in alphabetical order.

    Example:
        >>> "mnist" in preset_names()
        True
    """
    return sorted(Path(entry.name).stem for entry in PRESETS.iterdir() if entry.name.endswith(".yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """Read a preset as a tree of values.

    Args:
        name: one of `preset_names()`.

    Returns:
        Nested dictionaries, as in the preset's YAML file.

    Raises:
        ValueError: if no such preset exists.

    Example:
        >>> read_preset("mnist")["model"]["sample_size"]
        28
    """
    choice("preset", name, preset_names())
    return yaml.safe_load((PRESETS / f"{name}.yaml").read_text())


def describe_preset(name: str) -> str:
    """Return the sentence in the first line of a preset's file.

    Args:
        name: one of `preset_names()`.

    Example:
        >>> describe_preset("digits").startswith("scikit-learn's 1,797 digits")
        True
    """
    return (PRESETS / f"{name}.yaml").read_text().partition("\n")[0].removeprefix("# ")


def load_config(
    preset: str | None = None,
    config_file: Path | None = None,
    settings: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Merge a configuration from its parts, and check it.

    Args:
        preset: one of `preset_names()`; `None` starts from nothing.
        config_file: a YAML file whose entries replace the preset's.
        settings: `key=value` strings with a dotted key and a YAML value (`optim.lr=2e-4`); they replace both.
        overrides: values by dotted key that replace all others; `None` values are skipped.

    Returns:
        The checked configuration.

    Raises:
        ValueError: naming the wrong entry and what is allowed.
        FileNotFoundError: if the file cannot be read.

    Example:
        >>> load_config("digits", settings=["optim.lr=1e-3"], overrides={"seed": 7}).optim.lr
        0.001
    """
    return validate(merge_config(preset, config_file, settings, overrides))


def merge_config(
    preset: str | None = None,
    config_file: Path | None = None,
    settings: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Merge a configuration from its parts; see `load_config`.

    Args:
        preset: one of `preset_names()`; `None` starts from nothing.
        config_file: a YAML file, or the `config.yaml` of a run.
        settings: `key=value` strings.
        overrides: values by dotted key.
        base: nested mappings that all other parts override.

    Returns:
        Nested dictionaries, unchecked.

    Raises:
        ValueError: naming what is wrong with a part; `epochs` beside `max_steps` in one of them.
        FileNotFoundError: if the file cannot be read.

    Example:
        >>> merge_config(settings=["optim.lr=1e-3"], overrides={"seed": 7}, base={"seed": 1, "batch_size": 8})
        {'seed': 7, 'batch_size': 8, 'optim': {'lr': 0.001}}
    """
    file = {} if config_file is None else as_configuration(read_yaml(config_file))
    direct: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"settings must be of the form key=value, such as optim.lr=2e-4, got {shown(setting)}")
        _merge(direct, _nested(key.split("."), _yaml_value(value)))
    for key, value in (overrides or {}).items():
        if value is not None:
            _merge(direct, _nested(key.split("."), value))
    return merge(base, {} if preset is None else read_preset(preset), file, direct)


def merge(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Merge trees of values, entry by entry; a length, in steps or in epochs, replaces one of either kind.

    Args:
        parts: nested mappings, later ones overriding earlier ones.

    Returns:
        A new tree.

    Raises:
        ValueError: if one of them has both lengths.

    Example:
        >>> merge({"optim": {"lr": 1, "eps": 2}, "max_steps": 10}, {"optim": {"lr": 3}, "epochs": 5})
        {'optim': {'lr': 3, 'eps': 2}, 'epochs': 5}
    """
    tree: dict[str, Any] = {}
    for part in parts:
        lengths = [name for name in LENGTHS if part.get(name) is not None]
        if len(lengths) == 2:
            raise _invalid("epochs", "has no effect beside max_steps; leave one of them out")
        if lengths:
            tree = {name: value for name, value in tree.items() if name not in LENGTHS}
        _merge(tree, copy.deepcopy(dict(part)))
    return tree


def as_configuration(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration in the content of a YAML file, which may be the record of a run (`RUN/config.yaml`).

    Args:
        tree: the content.

    Returns:
        Its entry `config`, which a configuration does not have, or all of it.

    Example:
        >>> as_configuration({"config": {"seed": 1}, "versions": {}}), as_configuration({"seed": 1})
        ({'seed': 1}, {'seed': 1})
    """
    config = tree.get("config")
    return config if isinstance(config, dict) else tree


def validate(tree: Mapping[str, Any]) -> TrainConfig:
    """Check a tree of values.

    Args:
        tree: nested mappings, as in a YAML file.

    Returns:
        The configuration.

    Raises:
        ValueError: in one sentence that names the first wrong entry.

    Example:
        >>> validate({"data": {"source": "digits"}, "model": {"sample_size": 8}, "seed": -1})
        Traceback (most recent call last):
        ValueError: training configuration, seed: must be greater than or equal to 0, got -1
    """
    # Types and bounds of single entries.
    try:
        config = TrainConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        *sections, name = first["loc"]
        if sections and isinstance(name, int) and first["type"] in ("missing", "too_long"):
            # A list that is too short is reported as the number that it lacks.
            first |= {"loc": tuple(sections), "type": "tuple_type"}
        raise _invalid(".".join(map(str, first["loc"])), _describe(first)) from None
    # Entries that depend on each other; with `init`, on those of its model as well, and then `complete_config` checks.
    if config.init is None:
        check_model(config.model)
    _check_section("model", UNet2DModel.__init__, config.model)
    _check_section("scheduler", PROCESSES[config.process].scheduler.__init__, config.scheduler)
    _check_process(config)
    optim = config.optim
    if config.batch_size % optim.accumulate:
        raise _invalid("optim.accumulate", f"must divide batch_size ({config.batch_size}), got {optim.accumulate}")
    height, width = height_and_width(config.model.get("sample_size", 1))
    num_values = config.model.get("in_channels", 3) * height * width
    measures_distance = config.evaluate.every and config.evaluate.count
    if measures_distance and (config.evaluate.count < 2 or num_values > MAX_FEATURES):
        raise _invalid(
            "evaluate.count",
            f"the Fréchet distance of pixels requires at least 2 samples of at most {MAX_FEATURES} values each, got "
            f"{config.evaluate.count} of {num_values}; 0 disables it",
        )
    if config.model:
        check_augmentation(config.data, config.model)
    if config.init is None:
        check_scheduler(config.scheduler, config.process)
    if config.data.class_names is not None and config.data.labels == NONE:
        raise _invalid("data.class_names", "requires data.labels: auto, or a column, got none")
    if config.data.balanced and config.data.labels == NONE:
        raise _invalid("data.balanced", "requires data.labels: auto, or a column, got none")
    ema = config.ema
    for entry, values in (("ema.sigma_rels", ema.sigma_rels), ("trackers", config.trackers)):
        if len(set(values)) < len(values):
            raise _invalid(entry, f"must differ from each other, got {shown(list(values))}")
    if ema.sigma_rel is not None and ema.model_copy(update={"decay": 0.9999, "warmup": True}) != ema:
        raise _invalid("ema.decay", "has no effect beside ema.sigma_rel; leave ema.decay and ema.warmup out")
    if optim.decay_steps is not None and optim.decay == "constant":
        raise _invalid("optim.decay_steps", "requires optim.decay to be linear or cosine, got constant")
    return config


def check_incomplete(tree: Mapping[str, Any]) -> TrainConfig:
    """Check a tree of values that may leave out what else is required: the images, the network, the batch.

    Args:
        tree: nested mappings.

    Returns:
        A configuration that has placeholders for what is left out.

    Raises:
        ValueError: in one sentence that names the first wrong entry.

    Example:
        >>> check_incomplete({"optim": {"lr": 0.001}}).optim.lr
        0.001
    """
    optim = tree.get("optim")
    accumulate = optim.get("accumulate", 1) if isinstance(optim, Mapping) else 1
    placeholders = {
        "data": {"source": "images"},
        "model": {"sample_size": 8},
        "optim": {"decay": "linear"},
        "batch_size": accumulate,
    }
    return validate(merge(placeholders, tree))


def check_model(model: Mapping[str, Any]) -> None:
    """Check what training requires of the network's arguments.

    Args:
        model: arguments of `UNet2DModel`.

    Raises:
        ValueError: naming the wrong argument.

    Example:
        >>> check_model({"sample_size": (8, 12)})
        >>> check_model({"sample_size": 0})
        Traceback (most recent call last):
        ValueError: training configuration, model.sample_size: must be a positive integer, or two (height, width), got 0
    """
    size, channels = model.get("sample_size"), model.get("in_channels", 3)
    sides = [as_integer(side) for side in (size if isinstance(size, list | tuple) else [size, size])]
    if len(sides) != 2 or not all(side is not None and side >= 1 for side in sides):
        raise _invalid("model.sample_size", f"must be a positive integer, or two (height, width), got {shown(size)}")
    outputs = model.get("out_channels", 3)
    integer_channels = as_integer(channels)
    if integer_channels is None or not 1 <= integer_channels <= MAX_CHANNELS or channels != outputs:
        raise _invalid(
            "model.in_channels",
            f"must be equal to model.out_channels, both from 1 (gray) to {MAX_CHANNELS}, got {shown(channels)} and "
            f"{shown(outputs)}",
        )
    if "pixel_format" in model:
        raise _invalid("model.pixel_format", "is not an entry; the data, and data.value_range, decide it")
    for name in CLASS_ARGUMENTS:
        if model.get(name) not in (None, False):
            raise _invalid(f"model.{name}", "is not an entry; the data, and data.labels, decide it")


def check_augmentation(data: DataConfig, model: Mapping[str, Any]) -> None:
    """Check that the augmentations fit the network's images.

    Args:
        data: the `data` section.
        model: arguments of `UNet2DModel`.

    Raises:
        ValueError: naming the entry that does not.

    Example:
        >>> check_augmentation(DataConfig(source="digits", rotate=True), {"sample_size": (8, 12)})
        Traceback (most recent call last):
        ValueError: training configuration, data.rotate: requires images of equal height and width, got 8 and 12
    """
    height, width = height_and_width(model.get("sample_size", 1))
    if data.rotate and height != width:
        raise _invalid("data.rotate", f"requires images of equal height and width, got {height} and {width}")
    channels = model.get("in_channels", 3)
    for name in ("brightness", "contrast", "saturation", "hue"):
        if getattr(data, name) and channels != 3:
            raise _invalid(f"data.{name}", f"requires 8-bit images of three channels, got model.in_channels={channels}")


def _check_process(config: TrainConfig) -> None:
    """Check the entries that only one process has."""
    weightings = PROCESSES[config.process].weightings
    if config.objective.weighting not in weightings:
        raise _invalid(
            "objective.weighting",
            f"must be one of {join_choices(weightings)} for process={config.process}, got {config.objective.weighting}",
        )
    for entry, value in (("init", config.init), ("distill.teacher", config.distill.teacher)):
        if config.process != "gaussian" and value is not None:
            raise _invalid(entry, f"requires process=gaussian, got {config.process}")


def check_scheduler(scheduler: Mapping[str, Any], process: str = "gaussian") -> None:
    """Check what training requires of the scheduler's arguments.

    Args:
        scheduler: arguments of the scheduler of the process, such as `DDIMScheduler`.
        process: one of `ddim.training.processes.PROCESSES`.

    Raises:
        ValueError: naming the wrong argument.

    Example:
        >>> check_scheduler({"clip_sample": False})
    """
    try:
        PROCESSES[process].scheduler.from_config({}, **scheduler)
    except (TypeError, ValueError) as error:
        raise _invalid("scheduler", str(error)) from None
    if process != "gaussian":
        return
    betas = scheduler.get("trained_betas")
    has_zero_snr = scheduler.get("rescale_betas_zero_snr") or (betas is not None and max(betas) >= 1)
    if has_zero_snr and scheduler.get("prediction_type", "epsilon") == "epsilon":
        raise _invalid(
            "scheduler.prediction_type",
            "must be v_prediction or sample where the schedule ends in pure noise, of which epsilon says nothing, got "
            "epsilon",
        )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: the file.

    Returns:
        Nested dictionaries.

    Raises:
        FileNotFoundError: if the file cannot be read.
        ValueError: if it is not valid YAML, or not a mapping.

    Example:
        >>> read_yaml(Path("missing.yaml"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        FileNotFoundError: the configuration missing.yaml cannot be read: ...
    """
    try:
        # Opening a pipe would wait for a writer.
        is_special = path.exists() and not path.is_file()
        text = "" if is_special else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or "").lower() if isinstance(error, OSError) else "it is not UTF-8 text"
        raise FileNotFoundError(f"the configuration {shorten(str(path))} cannot be read: {reason}") from None
    if is_special:
        raise FileNotFoundError(f"the configuration {path} cannot be read: it is not a regular file")
    try:
        tree = _parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"the configuration {path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"the configuration {path} must hold entries such as 'batch_size: 64'")
    return tree


def incompatible_changes(old: TrainConfig, new: TrainConfig) -> list[str]:
    """List the changed entries that keep a run from resuming.

    Args:
        old: the configuration that the run started with.
        new: the configuration to resume it with.

    Returns:
        One phrase per entry, such as `seed: expected 0, got 1`; empty if the run can resume.

    Example:
        >>> old = load_config("digits")
        >>> incompatible_changes(old, old.model_copy(update={"seed": 1, "compile": True}))
        ['seed: expected 0, got 1']
    """
    return [
        f"{key}: expected {old_value}, got {new_value}"
        for key, (old_value, new_value) in sorted(changed_entries(old, new).items())
        if not any(key == entry or key.startswith(f"{entry}.") for entry in RESUME_MAY_CHANGE)
    ]


def changed_entries(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Compare two configurations.

    Args:
        old: a configuration.
        new: another one.

    Returns:
        The old and the new value of each entry that differs, by its dotted key; `None` where an argument is missing.

    Example:
        >>> old = load_config("digits")
        >>> changed_entries(old, old.model_copy(update={"seed": 1}))
        {'seed': (0, 1)}
    """
    old_values, new_values = flat_entries(old), flat_entries(new)
    return {
        key: (old_values.get(key), new_values.get(key))
        for key in old_values | new_values
        if old_values.get(key) != new_values.get(key)
    }


def flat_entries(config: TrainConfig) -> dict[str, Any]:
    """Return all entries of a configuration.

    Args:
        config: the configuration.

    Returns:
        Values as JSON holds them, by dotted key.

    Example:
        >>> flat_entries(load_config("digits"))["data.source"]
        'digits'
    """
    return dict(_leaves(config.model_dump(mode="json")))


def _check_section(section: str, constructor: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Check names and types of the arguments of a constructor."""
    names = list(signature(constructor).parameters)[1:]
    for name in arguments:
        if name not in names:
            raise _invalid(f"{section}.{name}", f"is not an entry{nearest(name, names)}")
    try:
        check_arguments(constructor, arguments)
    except (TypeError, ValueError) as error:
        name, _, reason = str(error).partition(" ")
        raise _invalid(f"{section}.{name}", reason) from None


def _describe(error: Mapping[str, Any]) -> str:
    """Return what is wrong with an entry."""
    *sections, name = map(str, error["loc"])
    if error["type"] == "missing":
        return "is required"
    if error["type"] == "extra_forbidden":
        return f"is not an entry{_suggest(name, '.'.join(sections))}"
    if error["type"] in ("model_type", "dict_type"):
        section = cast(type[BaseModel], TrainConfig.model_fields[name].annotation)
        example = SECTION_EXAMPLES.get(name) or next(entry_names(section))
        return f"must be a section with entries such as {name}.{example}, got {shown(error['input'])}"
    if error["type"] in ("tuple_type", "too_long"):
        default = _default([*sections, name])
        example = f" such as {list(default)}" if isinstance(default, tuple) else ""
        return f"must be a list of numbers{example}, got {shown(error['input'])}"
    # Some messages add how the value was read.
    allowed = re.sub(r", (unable to|got a|input was) .*", "", error["msg"]).replace("Input should be", "must be")
    return f"{allowed}, got {shown(error['input'])}"


def _suggest(name: str, section: str) -> str:
    """Return the entry that was meant by a name: the nearest of its section, or of all; or a list of its section's."""
    entries = list(entry_names(TrainConfig))
    if name in OTHER_NAMES:
        return f" (did you mean {OTHER_NAMES[name]}?)"
    siblings = {entry.rpartition(".")[2]: entry for entry in entries if entry.rpartition(".")[0] == section}
    everywhere = {entry.rpartition(".")[2]: entry for entry in reversed(entries)}
    for by_name in (siblings, everywhere):
        if (match := find_nearest(name, by_name)) is not None:
            return f" (did you mean {by_name[match]}?)"
    return f"; {section or 'the configuration'} has {', '.join(siblings)}"


def entry_names(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield dotted names of all entries of a section, those of its sections after it.

    Args:
        section: the class of the section.
        prefix: before every name.

    Yields:
        Names such as `optim`, `optim.lr`.

    Example:
        >>> list(entry_names(ObjectiveConfig, "objective."))
        ['objective.weighting', 'objective.gamma', 'objective.antithetic', 'objective.class_dropout']
    """
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from entry_names(field.annotation, f"{prefix}{name}.")


def _default(names: Sequence[str]) -> Any:
    """Return the default of the entry of a section."""
    section, field = TrainConfig.model_fields, None
    for name in names:
        field = section[name]
        section = getattr(field.annotation, "model_fields", {})
    return None if field is None else field.default


def _invalid(entry: str, reason: str) -> ValueError:
    return ValueError(f"training configuration, {shorten(entry)}: {reason}")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parse_yaml(text: str) -> Any:
    """Parse YAML, and refuse what is not a tree of moderate size."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except Exception:  # dates that do not exist, numbers of thousands of digits, nesting beyond Python's stack
        raise ValueError("it holds a value that cannot be read, or is nested too deeply") from None
    if _expanded_size(value, {}) > MAX_YAML_VALUES:
        raise ValueError(f"it must be a tree of at most {MAX_YAML_VALUES} values, with its aliases written out")
    return value


def _expanded_size(value: Any, sizes: dict[int, float]) -> float:
    """Return the number of values in a tree, those of an alias as often as it is used; infinite if it holds itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in sizes:
        sizes[id(value)] = math.inf
        children = value.values() if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(value)]


def _yaml_value(text: str) -> Any:
    try:
        value = _parse_yaml(text)
    except ValueError:
        raise ValueError(f"{shown(text)} is not a valid YAML value") from None
    try:
        # YAML 1.1 reads 2e-4, without a dot, as a string.
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _nested(keys[1:], value) if len(keys) > 1 else value}


def _merge(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Replace entries of a tree in place, section by section."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value
