"""The configuration of a training run: one checked tree of values, from a preset, a YAML file and the command line,
later ones first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

PRESETS = resources.files("ddim.training") / "presets"

Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of the sections below: entries that do not exist are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimConfig(Section):
    """AdamW, gradient clipping, and an exponential moving average of the weights.

    The learning rate rises linearly for `warmup_steps`, stays at `lr`, and falls linearly over the last `decay_steps`.
    """

    lr: PositiveFloat = Field(default=2e-4, allow_inf_nan=False)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: NonNegativeInt = 5000
    decay_steps: NonNegativeInt = 0
    grad_clip: PositiveFloat = 1.0
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)


class SampleConfig(Section):
    """The grid of samples that is painted from the averaged weights every `every` steps (0: never)."""

    every: NonNegativeInt = 1000
    count: PositiveInt = 64
    num_inference_steps: PositiveInt = 50


class TrainConfig(Section):
    """Everything that decides what a run computes.

    Attributes:
        data: a folder of images or a parquet file.
        model: arguments of `UNet2DModel`; `sample_size` is required.
        scheduler: arguments of `DDIMScheduler`: the betas and the prediction type.
        optim: the optimiser.
        samples: the grids on the way.
        batch_size: images a step.
        max_steps: where the run ends.
        seed: of weights, data order, timesteps and noise.
        precision: `fp32`, or `bf16` for autocast.
        horizontal_flip: mirror each image with probability 1/2.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: how many of the newest stay on disk.
    """

    data: str
    model: dict[str, Any]
    scheduler: dict[str, Any] = {}
    optim: OptimConfig = OptimConfig()
    samples: SampleConfig = SampleConfig()
    batch_size: PositiveInt = 128
    max_steps: PositiveInt = 800_000
    seed: int = Field(default=0, ge=0, lt=2**63)
    precision: Literal["fp32", "bf16"] = "fp32"
    horizontal_flip: bool = False
    checkpoint_every: PositiveInt = 1000
    keep_checkpoints: PositiveInt = 2


MAY_CHANGE = {"data", "max_steps", "samples", "checkpoint_every", "keep_checkpoints"}
"""Entries that may differ when a run goes on: none of them changes what an earlier step has computed.

`data` is a path; its content is compared. `max_steps` may not differ where the learning rate decays towards it.
"""


def preset_names() -> list[str]:
    """The presets that ship with the package."""
    return sorted(Path(entry.name).stem for entry in PRESETS.iterdir() if entry.name.endswith(".yaml"))


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
        overrides: entries that replace all others; `None` values are skipped.

    Raises:
        ValueError: naming the entry that is wrong and what is allowed.
        FileNotFoundError: if there is no such file.
    """
    tree: dict[str, Any] = {}
    if preset is not None:
        if preset not in preset_names():
            raise ValueError(f"there is no preset {preset!r}; there are {', '.join(preset_names())}")
        _merge(tree, yaml.safe_load((PRESETS / f"{preset}.yaml").read_text()))
    if config_file is not None:
        _merge(tree, read_yaml(config_file))
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting!r} is no key=value, such as optim.lr=2e-4")
        _merge(tree, _nested(key.split("."), _yaml_value(value)))
    _merge(tree, {key: value for key, value in (overrides or {}).items() if value is not None})
    return validate(tree)


def validate(tree: Mapping[str, Any]) -> TrainConfig:
    """Check a tree of values; ValueError in one sentence that names the first wrong entry."""
    try:
        config = TrainConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"training configuration, {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    model = config.model
    size, channels = model.get("sample_size"), model.get("in_channels", 3)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(
            "training configuration, model.sample_size: give the height and width of the images as one positive number"
        )
    if channels not in (1, 3) or channels != model.get("out_channels", 3):
        raise ValueError(
            "training configuration, model.in_channels: it and model.out_channels must both be 1 (grey) or 3 (colour)"
        )
    return config


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
    before, after = old.model_dump(), new.model_dump()
    may_change = MAY_CHANGE - ({"max_steps"} if old.optim.decay_steps else set())
    return [
        f"{key}: {before[key]} there, {after[key]} here"
        for key in after
        if key not in may_change and before[key] != after[key]
    ]


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
