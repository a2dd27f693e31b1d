"""Training configurations: presets, precedence of their sources, and that every wrong entry is named in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ddim.scheduler import DDIMScheduler
from ddim.training.config import TrainConfig, differences, load_config, preset_names, validate
from ddim.unet import UNet2DModel

MINIMAL: dict[str, Any] = {"data": "pictures", "model": {"sample_size": 8}}
DATA = {"data": "pictures"}


def with_entry(key: str, value: Any) -> dict[str, Any]:
    """The minimal configuration with the entry of a dotted key replaced."""
    tree = {**MINIMAL, "model": dict(MINIMAL["model"])}
    *sections, last = key.split(".")
    branch = tree
    for section in sections:
        branch = branch.setdefault(section, {})
    branch[last] = value
    return tree


# --- presets


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_and_build(name: str) -> None:
    config = load_config(name, overrides=DATA)
    with torch.device("meta"):
        network = UNet2DModel(**config.model)
    DDIMScheduler(**config.scheduler)
    channels, size = config.model["in_channels"], config.model["sample_size"]
    shape = (1, channels, size, size)
    sample = torch.zeros(shape, device="meta")
    assert network(sample, torch.zeros((), device="meta")).sample.shape == shape


def test_the_mnist_preset() -> None:
    config = load_config("mnist", overrides=DATA)
    with torch.device("meta"):
        network = UNet2DModel(**config.model)
    assert network.num_parameters() == 1_805_121
    assert 2 * network.num_parameters() <= 4e6
    assert (config.model["sample_size"], config.model["in_channels"]) == (28, 1)
    assert not config.horizontal_flip


def test_the_built_in_model_has_the_preset_configuration() -> None:
    config = load_config("mnist", overrides=DATA)
    built_in = UNet2DModel.from_pretrained("mnist", subfolder="unet").config
    assert {key: built_in[key] for key in config.model} == config.model


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"there is no preset 'imagenet'; there are .*mnist"):
        load_config("imagenet", overrides=DATA)


# --- precedence


def test_later_sources_replace_earlier_ones(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"optim": {"lr": 3e-4}, "batch_size": 7, "seed": 1, "model": {"dropout": 0.1}}))
    preset = load_config("mnist", overrides=DATA)

    both = load_config("mnist", file, overrides=DATA)
    assert (both.optim.lr, both.batch_size, both.seed) == (3e-4, 7, 1)
    assert both.optim.warmup_steps == preset.optim.warmup_steps
    assert both.model == preset.model | {"dropout": 0.1}
    assert both.max_steps == preset.max_steps

    settings = ["batch_size=9", "seed=2", "optim.ema_decay=0.5", "seed=3"]
    three = load_config("mnist", file, settings, DATA)
    assert (three.batch_size, three.seed, three.optim.ema_decay, three.optim.lr) == (9, 3, 0.5, 3e-4)

    all_four = load_config("mnist", file, settings, DATA | {"seed": 4, "batch_size": None})
    assert (all_four.batch_size, all_four.seed) == (9, 4)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("optim.lr=2e-4", 2e-4),
        ("optim.lr=1", 1.0),
        ("model.block_out_channels=[8, 16]", [8, 16]),
        ("model.attention_head_dim=null", None),
        ("model.act_fn=mish", "mish"),
        ("horizontal_flip=true", True),
        ("scheduler.prediction_type=v_prediction", "v_prediction"),
        ("data=a=b", "a=b"),
    ],
)
def test_values_of_settings_are_yaml(setting: str, value: Any) -> None:
    tree: Any = load_config("mnist", settings=["data=pictures", setting]).model_dump()
    for key in setting.split("=")[0].split("."):
        tree = tree[key]
    assert tree == value
    assert type(tree) is type(value)


def test_defaults_are_those_of_the_paper() -> None:
    config = validate(MINIMAL)
    assert config.optim.lr == 2e-4
    assert config.optim.ema_decay == 0.9999
    assert config.batch_size == 128
    assert config.max_steps == 800_000


def test_a_configuration_survives_yaml() -> None:
    config = load_config("mnist", overrides=DATA)
    assert validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


# --- wrong entries


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("batch_size", 0, "greater than 0"),
        ("batch_size", 2.5, "integer"),
        ("batch_size", "many", "integer"),
        ("max_steps", -1, "greater than 0"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**63, "less than 9223372036854775808"),
        ("precision", "fp16", "'fp32' or 'bf16'"),
        ("horizontal_flip", "perhaps", "boolean"),
        ("checkpoint_every", 0, "greater than 0"),
        ("keep_checkpoints", 0, "greater than 0"),
        ("optim", 5, "dictionary"),
        ("optim.lr", 0, "greater than 0"),
        ("optim.lr", -1e-3, "greater than 0"),
        ("optim.lr", float("nan"), "finite"),
        ("optim.lr", float("inf"), "finite"),
        ("optim.lr", "fast", "number"),
        ("optim.betas.1", 1.0, "less than 1"),
        ("optim.weight_decay", -1, "greater than or equal to 0"),
        ("optim.warmup_steps", -1, "greater than or equal to 0"),
        ("optim.grad_clip", 0, "greater than 0"),
        ("optim.ema_decay", 1, "less than 1"),
        ("optim.momentum", 0.9, "not permitted"),
        ("samples.every", -1, "greater than or equal to 0"),
        ("samples.count", 0, "greater than 0"),
        ("samples.num_inference_steps", 0, "greater than 0"),
        ("samples.steps", 5, "not permitted"),
        ("learning_rate", 1, "not permitted"),
        ("model", 5, "dictionary"),
        ("data", 5, "string"),
    ],
)
def test_wrong_entries_are_named(key: str, value: Any, allowed: str) -> None:
    tree = with_entry("optim.betas", [0.9, value]) if key == "optim.betas.1" else with_entry(key, value)
    with pytest.raises(ValueError, match=rf"^training configuration, {key}: .*{allowed}") as caught:
        validate(tree)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [None, 0, -8, 8.0, [8, 8], True, "8"])
def test_sample_size_is_one_positive_number(size: Any) -> None:
    with pytest.raises(ValueError, match=r"model\.sample_size: give the height and width .* as one positive number"):
        validate(with_entry("model.sample_size", size))
    with pytest.raises(ValueError, match=r"model\.sample_size"):
        validate(DATA | {"model": {}})


@pytest.mark.parametrize(("inputs", "outputs"), [(2, 2), (4, 4), (1, None), (1, 3), (None, 1), ("one", "one")])
def test_channels_are_grey_or_colour_on_both_sides(inputs: Any, outputs: Any) -> None:
    model = {"sample_size": 8, "in_channels": inputs, "out_channels": outputs}
    with pytest.raises(ValueError, match=r"model\.in_channels: it and model\.out_channels must both be 1 .* or 3"):
        validate(DATA | {"model": {key: value for key, value in model.items() if value is not None}})


@pytest.mark.parametrize("tree", [{"model": {"sample_size": 8}}, {"data": "pictures"}])
def test_missing_entries_are_named(tree: dict[str, Any]) -> None:
    missing = "data" if "model" in tree else "model"
    with pytest.raises(ValueError, match=f"training configuration, {missing}: Field required"):
        validate(tree)


@pytest.mark.parametrize("setting", ["optim.lr", "", "batch_size:4"])
def test_a_setting_without_a_value(setting: str) -> None:
    with pytest.raises(ValueError, match=rf"--set '{setting}' is no key=value, such as optim\.lr=2e-4"):
        load_config("mnist", settings=[setting], overrides=DATA)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("optim.lr=[1", r"'\[1' is no YAML value"),
        ("optim.lrate=1", r"optim\.lrate: "),
        ("optim.lr.first=1", r"optim\.lr: "),
        ("=1", "configuration, : "),
    ],
)
def test_a_wrong_setting(setting: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        load_config("mnist", settings=[setting], overrides=DATA)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size: [", "is no YAML"),
        ("- 1", "must hold entries such as 'batch_size: 64'"),
        ("", "must hold entries"),
        ("just words", "must hold entries"),
        ("!!python/object/apply:os.system ['true']", "is no YAML"),
    ],
)
def test_a_wrong_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"the configuration .*mine\.yaml {message}") as caught:
        load_config("mnist", file, overrides=DATA)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    for name in ("missing.yaml", "binary.yaml", "."):
        with pytest.raises(FileNotFoundError, match="cannot be read"):
            load_config("mnist", tmp_path / name, overrides=DATA)


# --- continuing with others


def test_differences() -> None:
    old: TrainConfig = validate(MINIMAL)
    free = {"data": "elsewhere", "max_steps": 5, "checkpoint_every": 1, "keep_checkpoints": 9, "samples": {"every": 0}}
    assert differences(old, validate(MINIMAL | free)) == []
    changed = validate(MINIMAL | {"seed": 1, "optim": {"lr": 1e-3}, "batch_size": 64})
    found = differences(old, changed)
    assert [sentence.split(":")[0] for sentence in found] == ["optim", "batch_size", "seed"]
    assert found[2] == "seed: 0 there, 1 here"


def test_the_end_of_a_run_that_decays_towards_it_is_fixed() -> None:
    decaying = MINIMAL | {"optim": {"decay_steps": 10}, "max_steps": 20}
    assert differences(validate(decaying), validate(decaying | {"max_steps": 30})) == ["max_steps: 20 there, 30 here"]
