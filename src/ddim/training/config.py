"""The configuration of a training run: one checked tree of values, from a preset, a YAML file and the command line,
later ones first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

PRESETS = resources.files("ddim.training") / "presets"

MOST_FEATURES = 4096
"""Of a Fréchet distance, whose covariances grow with the square."""

Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of the sections below: entries that do not exist are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """What is learned from, see `ddim.data.dataset`.

    Attributes:
        source: a folder of images or of parquet files, a parquet or `.npz` file, the id of a data set on the hub, or
            `digits`.
        split: of a data set on the hub.
        column: of images in a data set; found by itself unless given.
        crop: how images become square: `center` cuts the largest centred square, `none` squeezes, `random` cuts, at
            each visit, a window at random from a centred square an eighth larger than the model's size.
        horizontal_flip: mirror each image with probability 1/2.
        cache: where decoded images are kept: `memory`, `disk` (a memory map), `none` (decode at each visit), or `auto`
            by their size.
        on_device: keep the decoded images on the training device.
        holdout: so many images, drawn by the seed, are not trained on; the averaged weights are measured on them.
        max_unreadable: more images than this that cannot be decoded stop the run.
    """

    source: str = Field(min_length=1)
    split: str = "train"
    column: str | None = None
    crop: Literal["center", "random", "none"] = "center"
    horizontal_flip: bool = False
    cache: Literal["auto", "memory", "disk", "none"] = "auto"
    on_device: bool = False
    holdout: NonNegativeInt = 0
    max_unreadable: NonNegativeInt = 10


class ObjectiveConfig(Section):
    """The loss, see `ddim.training.objective`. What the network predicts is `scheduler.prediction_type`.

    Attributes:
        weighting: of timesteps: `simple` (DDPM's), `min_snr` or `truncated_snr`.
        gamma: of `min_snr`.
        antithetic: timesteps in pairs t, T - 1 - t.
    """

    weighting: Literal["simple", "min_snr", "truncated_snr"] = "simple"
    gamma: PositiveFloat = Field(default=5.0, allow_inf_nan=False)
    antithetic: bool = True


class OptimConfig(Section):
    """AdamW with clipped gradients.

    The learning rate rises linearly for `warmup_steps`, stays at `lr`, and over the last `decay_steps` (everything
    after the warm-up unless given) follows `decay` down to zero.

    Attributes:
        accumulate: so many backward passes share a step's batch, to save memory.
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
    """The exponential moving average of the weights, which is what is sampled from and what a run results in.

    Attributes:
        decay: of the average.
        warmup: decay no faster than (1 + n) / (10 + n) after n steps, so that the first weights fade quickly.
    """

    decay: float = Field(default=0.9999, ge=0, lt=1)
    warmup: bool = True


class SampleConfig(Section):
    """The grid of samples that is painted from the averaged weights every `every` steps (0: never)."""

    every: NonNegativeInt = 1000
    count: PositiveInt = 64
    num_inference_steps: PositiveInt = 50


class EvaluateConfig(Section):
    """Measuring the averaged weights every `every` steps (0: never), see `ddim.training.evaluate`.

    Attributes:
        count: samples painted for the Fréchet distance; 0 leaves it out.
        num_inference_steps: of those samples.
        features: what the distance is measured on: `pixels`.
    """

    every: NonNegativeInt = 0
    count: NonNegativeInt = 1000
    num_inference_steps: PositiveInt = 50
    features: Literal["pixels"] = "pixels"


class CheckpointConfig(Section):
    """A checkpoint every `every` steps; the newest `keep` stay, and those of multiples of `keep_every` (0: none)."""

    every: PositiveInt = 1000
    keep: PositiveInt = 2
    keep_every: NonNegativeInt = 0


class TrainConfig(Section):
    """Everything that decides what a run computes.

    Attributes:
        data: what is learned from.
        model: arguments of `UNet2DModel`, `sample_size` among them; may be left out where `init` is given.
        init: weights to start from, as for `DDIMPipeline.from_pretrained`: a built-in model, a folder, a hub id.
        scheduler: arguments of `DDIMScheduler`: the betas and the prediction type.
        objective: the loss.
        optim: the optimiser.
        ema: the averaged weights.
        samples: the grids on the way.
        evaluate: the measurements on the way.
        checkpoints: when, and how many.
        batch_size: images a step, of all processes together.
        max_steps: where the run ends.
        seed: of weights, data order, timesteps and noise.
        precision: `fp32`; `bf16` or `fp16` (with loss scaling) for autocast. Weights stay in float32.
        channels_last: keep feature maps as NHWC, the faster layout on CPUs and GPUs alike.
        gradient_checkpointing: save memory, at the price of computing residual blocks twice.
        compile: `torch.compile` the network.
        log_every: steps between lines of the metrics.
    """

    data: DataConfig
    model: dict[str, Any] = {}
    init: str | None = None
    scheduler: dict[str, Any] = {}
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    samples: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    batch_size: PositiveInt = 128
    max_steps: PositiveInt = 800_000
    seed: int = Field(default=0, ge=0, lt=2**63)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    gradient_checkpointing: bool = False
    compile: bool = False
    log_every: PositiveInt = 50


RESUME_MAY_CHANGE = (
    "data.source",
    "data.split",
    "data.column",
    "data.cache",
    "data.on_device",
    "data.max_unreadable",
    "init",
    "samples",
    "evaluate",
    "checkpoints",
    "max_steps",
    "gradient_checkpointing",
    "compile",
)
"""Entries that may differ when a run goes on: none of them changes, beyond rounding, what an earlier step has computed.

The data's content is compared, not where it is. `max_steps` may not differ where the learning rate decays towards it.
"""


def preset_names() -> list[str]:
    """The presets that ship with the package."""
    return sorted(Path(entry.name).stem for entry in PRESETS.iterdir() if entry.name.endswith(".yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """A preset's tree of values; ValueError, with those there are, for an unknown name."""
    if name not in preset_names():
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(preset_names())}")
    return yaml.safe_load((PRESETS / f"{name}.yaml").read_text())


def describe_preset(name: str) -> str:
    """The sentence that a preset's file opens with, in a comment."""
    return (PRESETS / f"{name}.yaml").read_text().partition("\n")[0].removeprefix("# ")


def load_config(
    preset: str | None = None,
    config_file: Path | None = None,
    settings: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Put a configuration together.

    Args:
        preset: one of `preset_names()`.
        config_file: a YAML file whose entries replace the preset's.
        settings: `key=value` with a dotted key and a YAML value (`optim.lr=2e-4`), which replace both.
        overrides: values by dotted keys that replace all others; `None` values are skipped.

    Raises:
        ValueError: naming the entry that is wrong and what is allowed.
        FileNotFoundError: if there is no such file.
    """
    tree: dict[str, Any] = {} if preset is None else read_preset(preset)
    if config_file is not None:
        _merge(tree, read_yaml(config_file))
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {setting!r} is no key=value, such as optim.lr=2e-4")
        _merge(tree, _nested(key.split("."), _yaml_value(value)))
    for key, value in (overrides or {}).items():
        if value is not None:
            _merge(tree, _nested(key.split("."), value))
    return validate(tree)


def validate(tree: Mapping[str, Any]) -> TrainConfig:
    """Check a tree of values; ValueError in one sentence that names the first wrong entry."""
    try:
        config = TrainConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"training configuration, {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if config.model or config.init is None:
        check_model(config.model)
    optim = config.optim
    if config.batch_size % optim.accumulate:
        raise ValueError(
            f"training configuration, optim.accumulate: {optim.accumulate} does not divide batch_size, "
            f"{config.batch_size}"
        )
    size, channels = config.model.get("sample_size", 1), config.model.get("in_channels", 3)
    measures = config.evaluate.every and config.evaluate.count
    if measures and (config.evaluate.count < 2 or channels * size**2 > MOST_FEATURES):
        raise ValueError(
            f"training configuration, evaluate.count: the Fréchet distance of pixels takes two samples or more, of at "
            f"most {MOST_FEATURES} numbers each; 0 leaves it out"
        )
    if optim.decay_steps is not None and optim.decay == "constant":
        raise ValueError(
            "training configuration, optim.decay_steps: the learning rate stays constant unless optim.decay is linear "
            "or cosine"
        )
    return config


def check_model(model: Mapping[str, Any]) -> None:
    """What training asks of the network's arguments; ValueError naming the wrong one."""
    size, channels = model.get("sample_size"), model.get("in_channels", 3)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(
            "training configuration, model.sample_size: give the height and width of the images as one positive number"
        )
    if channels not in (1, 3) or channels != model.get("out_channels", 3):
        raise ValueError(
            "training configuration, model.in_channels: it and model.out_channels must both be 1 (grey) or 3 (colour)"
        )


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping; ValueError if it does not, FileNotFoundError if it is not there."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise FileNotFoundError(f"the configuration {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"the configuration {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"the configuration {path} must hold entries such as 'batch_size: 64'")
    return tree


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """What keeps `new` from continuing a run of `old`: sentences such as `seed: 0 there, 1 here`."""
    before, after = dict(_leaves(old.model_dump())), dict(_leaves(new.model_dump()))
    free = [key for key in RESUME_MAY_CHANGE if key != "max_steps" or old.optim.decay == "constant"]
    return [
        f"{key}: {before.get(key)} there, {after.get(key)} here"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not any(key == entry or key.startswith(f"{entry}.") for entry in free)
    ]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            # YAML knows no tuples.
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _yaml_value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{text!r} is no YAML value") from None
    try:
        # YAML 1.1 reads 2e-4, without a dot, as a string.
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _nested(keys[1:], value) if len(keys) > 1 else value}


def _merge(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value
