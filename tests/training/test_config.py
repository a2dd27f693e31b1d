"""Training configurations: presets against the papers and `diffusers`, precedence, invalid entries, and which entries
may change when a run resumes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from pydantic import ValidationError

from ddim.scheduler import DDIMScheduler
from ddim.training.config import (
    PRESETS,
    changed_entries,
    describe_preset,
    incompatible_changes,
    load_config,
    preset_names,
    read_preset,
    validate,
)
from ddim.unet import UNet2DModel

MINIMAL: dict[str, Any] = {"data": {"source": "images"}, "model": {"sample_size": 8}}
DATA = {"data.source": "images"}

# Of google/ddpm-cifar10-32, google/ddpm-bedroom-256 and google/ddpm-church-256; the DDIM paper's CelebA model.
PAPER = {"cifar10": 35_746_307, "celeba64": 78_700_803, "lsun-bedroom": 113_673_219, "lsun-church": 113_673_219}


def with_entry(key: str, value: Any) -> dict[str, Any]:
    """The minimal configuration with the entry of a dotted key replaced."""
    tree: dict[str, Any] = {name: dict(section) for name, section in MINIMAL.items()}
    *sections, last = key.split(".")
    branch = tree
    for section in sections:
        branch = branch.setdefault(section, {})
    branch[last] = value
    return tree


def count(config: dict[str, Any], network: Any = UNet2DModel) -> int:
    """How many parameters a network of these arguments has."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in network(**config).parameters())


# --- presets


def test_preset_names_match_files() -> None:
    files = {Path(entry.name).stem for entry in PRESETS.iterdir()}
    assert preset_names() == sorted(files)
    assert {"mnist", "mnist-labels", "faces", "digits", "digits-labels", "cifar10-small", *PAPER} == files


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_and_build(name: str) -> None:
    config = load_config(name, overrides=DATA)
    with torch.device("meta"):
        network = UNet2DModel(**config.model)
    scheduler = DDIMScheduler(**config.scheduler)
    assert (scheduler.config.beta_start, scheduler.config.beta_end, len(scheduler)) == (1e-4, 0.02, 1000)
    of_v = ("faces", "mnist-labels", "digits-labels")
    assert scheduler.config.prediction_type == ("v_prediction" if name in of_v else "epsilon")
    assert config.data.labels == ("label" if name.endswith("-labels") else "none")
    channels, size = config.model["in_channels"], config.model["sample_size"]
    shape = (1, channels, size, size)
    sample = torch.zeros(shape, device="meta")
    assert network(sample, torch.zeros((), device="meta")).sample.shape == shape


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_read_afresh_and_described_by_their_first_line(name: str) -> None:
    tree = read_preset(name)
    text = (PRESETS / f"{name}.yaml").read_text()
    assert tree == yaml.safe_load(text)
    tree["data"]["source"] = "elsewhere"
    assert read_preset(name)["data"].get("source") != "elsewhere"
    description = describe_preset(name)
    assert text.startswith(f"# {description}\n")
    assert description.endswith(".")


@pytest.mark.parametrize(("name", "parameters"), PAPER.items())
def test_paper_presets_match_published_networks(name: str, parameters: int) -> None:
    model = read_preset(name)["model"]
    assert count(model) == parameters
    assert count(model, diffusers.UNet2DModel) == parameters
    # The number of parameters alone does not fix channels and attention.
    multiples = [channels // 128 for channels in model["block_out_channels"]]
    assert multiples == {32: [1, 2, 2, 2], 64: [1, 2, 2, 2, 4], 256: [1, 1, 2, 2, 4, 4]}[model["sample_size"]]
    assert model["layers_per_block"] == 2
    assert (model["norm_num_groups"], model["norm_eps"], model["attention_head_dim"]) == (32, 1e-6, None)


@pytest.mark.parametrize("name", PAPER)
def test_paper_presets_attend_at_16_by_16_only(name: str) -> None:
    model = read_preset(name)["model"]
    levels = range(len(model["block_out_channels"]))
    down = [model["sample_size"] // 2**level for level in levels if "Attn" in model["down_block_types"][level]]
    up = [model["sample_size"] // 2**level for level in levels if "Attn" in model["up_block_types"][::-1][level]]
    assert down == up == [16]


@pytest.mark.parametrize("name", PAPER)
def test_paper_presets_match_published_settings(name: str) -> None:
    """DDPM (arXiv 2006.11239), appendix B, and its code; DDIM (arXiv 2010.02502), appendix D.1."""
    config = load_config(name, overrides=DATA)
    large = config.model["sample_size"] == 256
    assert config.optim.lr == (2e-5 if large else 2e-4)
    assert config.batch_size == (64 if large else 128)
    assert config.model["dropout"] == (0.0 if large else 0.1)
    assert config.data.horizontal_flip
    assert (config.data.crop, config.objective.weighting) == ("center", "simple")
    assert (config.optim.warmup_steps, config.optim.decay, config.optim.grad_clip) == (5000, "constant", 1.0)
    assert (config.optim.betas, config.optim.eps, config.optim.weight_decay) == ((0.9, 0.999), 1e-8, 0.0)
    assert config.ema.decay == 0.9999
    steps = {"cifar10": 800_000, "celeba64": 800_000, "lsun-bedroom": 2_400_000, "lsun-church": 1_200_000}
    assert config.max_steps == steps[name]
    assert config.precision == "fp32"


def test_mnist_preset() -> None:
    config = load_config("mnist")
    assert count(config.model) == 1_805_121
    assert 2 * count(config.model) <= 4e6
    assert (config.model["sample_size"], config.model["in_channels"]) == (28, 1)
    assert not config.data.horizontal_flip


def test_small_cifar10_preset_is_small() -> None:
    parameters = count(load_config("cifar10-small").model)
    assert 8e6 < parameters < 10e6
    assert 2 * parameters <= 20e6
    assert parameters < count(read_preset("cifar10")["model"]) / 3


@pytest.mark.parametrize("name", ["mnist", "faces"])
def test_built_in_model_matches_its_preset(name: str) -> None:
    config = load_config(name)
    built_in = UNet2DModel.from_pretrained(name, subfolder="unet").config
    assert {key: built_in[key] for key in config.model} == config.model


@pytest.mark.parametrize("name", ["imagenet", "", "mnist.yaml", "../presets/mnist"])
def test_unknown_preset_raises(name: str) -> None:
    with pytest.raises(ValueError, match=r"^preset must be one of celeba64, .*mnist-labels, got '.*'( |$)") as caught:
        load_config(name, overrides=DATA)
    assert all(preset in str(caught.value) for preset in preset_names())
    with pytest.raises(ValueError, match="preset must be one of"):
        read_preset(name)


@pytest.mark.parametrize("name", preset_names())
def test_preset_without_source_requires_one(name: str) -> None:
    if "source" in read_preset(name)["data"]:
        assert load_config(name).data.source == read_preset(name)["data"]["source"]
    else:
        with pytest.raises(ValueError, match=r"training configuration, data\.source: is required"):
            load_config(name)


# --- precedence


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"optim": {"lr": 3e-4}, "batch_size": 7, "seed": 1, "model": {"dropout": 0.1}}))
    preset = load_config("mnist")

    both = load_config("mnist", file)
    assert (both.optim.lr, both.batch_size, both.seed) == (3e-4, 7, 1)
    assert both.optim.warmup_steps == preset.optim.warmup_steps
    assert both.model == preset.model | {"dropout": 0.1}
    assert both.max_steps == preset.max_steps

    settings = ["batch_size=9", "seed=2", "ema.decay=0.5", "seed=3", "data.crop=none"]
    three = load_config("mnist", file, settings)
    assert (three.batch_size, three.seed, three.ema.decay, three.optim.lr) == (9, 3, 0.5, 3e-4)
    assert (three.data.crop, three.data.source) == ("none", preset.data.source)

    overrides = DATA | {"seed": 4, "batch_size": None, "checkpoints.every": 7, "ema.decay": None}
    all_four = load_config("mnist", file, settings, overrides)
    assert (all_four.batch_size, all_four.seed, all_four.ema.decay) == (9, 4, 0.5)
    assert (all_four.data.source, all_four.data.crop) == ("images", "none")
    assert all_four.checkpoints.model_dump() == preset.checkpoints.model_dump() | {"every": 7}


def test_file_alone_suffices(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    assert load_config(config_file=file) == validate(MINIMAL)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("optim.lr=2e-4", 2e-4),
        ("optim.lr=1", 1.0),
        ("optim.decay_steps=10", 10),
        ("model.block_out_channels=[8, 16]", [8, 16]),
        ("model.attention_head_dim=null", None),
        ("model.act_fn=mish", "mish"),
        ("data.horizontal_flip=true", True),
        ("data.column=img", "img"),
        ("scheduler.prediction_type=v_prediction", "v_prediction"),
        ("data.source=a=b", "a=b"),
        ("objective.weighting=min_snr", "min_snr"),
    ],
)
def test_settings_are_parsed_as_yaml(setting: str, value: Any) -> None:
    tree: Any = load_config("mnist", settings=[setting]).model_dump()
    for key in setting.split("=")[0].split("."):
        tree = tree[key]
    assert tree == value
    assert type(tree) is type(value)


def test_defaults_match_the_paper() -> None:
    config = validate(MINIMAL)
    assert config.optim.lr == 2e-4
    assert config.ema.decay == 0.9999
    assert config.batch_size == 128
    assert config.max_steps == 800_000
    assert (config.optim.decay, config.objective.weighting, config.precision) == ("constant", "simple", "fp32")


def test_configuration_is_frozen() -> None:
    config = validate(MINIMAL)
    for section, entry in ((config, "seed"), (config.data, "source"), (config.optim, "lr"), (config.ema, "decay")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, entry, 1)


@pytest.mark.parametrize("name", preset_names())
def test_yaml_round_trip(name: str) -> None:
    config = load_config(name, overrides=DATA)
    again = validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
    assert again == config
    assert incompatible_changes(config, again) == []


# --- invalid entries


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("batch_size", 0, "greater than 0"),
        ("batch_size", 2.5, "integer"),
        ("batch_size", "many", "integer"),
        ("max_steps", -1, "greater than 0"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**63, "less than 9223372036854775808"),
        ("precision", "fp8", "'fp32', 'bf16' or 'fp16'"),
        ("compile", "perhaps", "boolean"),
        ("log_every", 0, "greater than 0"),
        ("init", 5, "string"),
        ("data", 5, "a section with entries such as data.source, got 5"),
        ("data", "images", "a section with entries"),
        ("data.source", 5, "string"),
        ("data.source", "", "at least 1 character"),
        ("data.split", None, "string"),
        ("data.crop", "left", "'center', 'random' or 'none'"),
        ("data.horizontal_flip", "perhaps", "boolean"),
        ("data.cache", "cloud", "'auto', 'memory', 'disk' or 'none'"),
        ("data.holdout", -1, "greater than or equal to 0"),
        ("data.max_unreadable", -1, "greater than or equal to 0"),
        ("data.folder", "images", "is not an entry"),
        ("objective.weighting", "p2", "'simple', 'min_snr', 'truncated_snr' or 'kl'"),
        ("objective.gamma", 0, "greater than 0"),
        ("objective.gamma", float("inf"), "finite"),
        ("objective.antithetic", 2, "boolean"),
        ("objective.loss", "l1", "is not an entry"),
        ("optim", 5, "a section with entries such as optim.lr"),
        ("optim.lr", 0, "greater than 0"),
        ("optim.lr", -1e-3, "greater than 0"),
        ("optim.lr", float("nan"), "finite"),
        ("optim.lr", float("inf"), "finite"),
        ("optim.lr", "fast", "number"),
        ("optim.betas", 0.9, r"must be a list of numbers such as \[0\.9, 0\.999\], got 0\.9"),
        ("optim.betas", [0.9], r"must be a list of numbers such as \[0\.9, 0\.999\], got \[0\.9\]"),
        ("optim.betas", [0.9, 0.9, 0.9], "must be a list of numbers such as"),
        ("epochs", 0, "greater than 0"),
        ("optim.eps", 0, "greater than 0"),
        ("optim.weight_decay", -1, "greater than or equal to 0"),
        ("optim.warmup_steps", -1, "greater than or equal to 0"),
        ("optim.decay", "exponential", "'constant', 'linear' or 'cosine'"),
        ("optim.decay_steps", 0, "greater than 0"),
        ("optim.grad_clip", 0, "greater than 0"),
        ("optim.grad_clip", float("nan"), "greater than 0"),
        ("optim.accumulate", 0, "greater than 0"),
        ("optim.momentum", 0.9, "is not an entry"),
        ("optim.ema_decay", 0.9, "is not an entry"),
        ("ema.decay", 1, "less than 1"),
        ("ema.decay", -0.1, "greater than or equal to 0"),
        ("ema.decay", float("nan"), "less than 1|greater than or equal to 0"),
        ("ema.sigma_rel", 0.3, "less than or equal to 0.28"),
        ("ema.sigma_rels", 0.05, "a list of numbers such as"),
        ("ema.sigma_rels", [0.05, 0.05], "must differ"),
        ("ema.snapshots", 0, "greater than 0"),
        ("trackers", ["wandb", "wandb"], "must differ"),
        ("ema.every", 10, "is not an entry"),
        ("samples.every", -1, "greater than or equal to 0"),
        ("samples.count", 0, "greater than 0"),
        ("samples.num_inference_steps", 0, "greater than 0"),
        ("samples.steps", 5, "is not an entry"),
        ("evaluate.every", -1, "greater than or equal to 0"),
        ("evaluate.count", -1, "greater than or equal to 0"),
        ("evaluate.num_inference_steps", 0, "greater than 0"),
        ("evaluate.features", "inception", "'pixels'"),
        ("checkpoints.every", 0, "greater than 0"),
        ("checkpoints.keep", 0, "greater than 0"),
        ("checkpoints.keep_every", -1, "greater than or equal to 0"),
        ("checkpoint_every", 5, "is not an entry"),
        ("learning_rate", 1, "is not an entry"),
        ("model", 5, "a section with entries such as model.sample_size, got 5"),
        ("scheduler", "linear", "a section with entries such as scheduler.prediction_type"),
    ],
)
def test_invalid_entry_is_named(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"^training configuration, {key}: .*({allowed})") as caught:
        validate(with_entry(key, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("optim.warmup_step", r"optim\.warmup_step: is not an entry \(did you mean optim\.warmup_steps\?\)"),
        ("optim.learning_rate", r"optim\.learning_rate: is not an entry \(did you mean optim\.lr\?\)"),
        ("optim.momentum", r"optim\.momentum: is not an entry; optim has lr, betas, eps, "),
        ("image_size", r"image_size: is not an entry \(did you mean model\.sample_size\?\)"),
        ("weight_decay", r"weight_decay: is not an entry \(did you mean optim\.weight_decay\?\)"),
        ("batchsize", r"batchsize: is not an entry \(did you mean batch_size\?\)"),
        ("zzz", "zzz: is not an entry; the configuration has data, model, init, "),
        (
            "model.block_out_channel",
            r"model\.block_out_channel: is not an entry .did you mean 'block_out_channels'",
        ),
        ("scheduler.beta_schedul", r"scheduler\.beta_schedul: is not an entry \(did you mean 'beta_schedule'\?\)"),
    ],
)
def test_nearest_entry_is_named(key: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^training configuration, {message}"):
        validate(with_entry(key, 1))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", "many", "batch_size: must be a valid integer, got 'many'"),
        ("max_steps", 0, "max_steps: must be greater than 0, got 0"),
        ("model.block_out_channels", 32, r"model\.block_out_channels: must be a list of integers, got 32"),
        ("scheduler.beta_start", "low", r"scheduler\.beta_start: must be a finite number, got 'low'"),
        ("precision", "x" * 10_000, r"precision: must be 'fp32', 'bf16' or 'fp16', got 'x{59}\.\.\."),
    ],
)
def test_message_names_what_is_allowed_and_what_was_given(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^training configuration, {message}$"):
        validate(with_entry(key, value))


@pytest.mark.parametrize(("betas", "index"), [([0.9, 1.0], 1), ([1.5, 0.9], 0), ([0.9, -0.1], 1)])
def test_invalid_beta_is_named(betas: list[float], index: int) -> None:
    with pytest.raises(ValueError, match=rf"^training configuration, optim\.betas\.{index}: .*(less|greater) than"):
        validate(with_entry("optim.betas", betas))


@pytest.mark.parametrize("size", [None, 0, -8, 8.0, [8, 0], [8, 8, 8], [8], True, "8", "88"])
def test_sample_size_must_be_one_or_two_positive_integers(size: Any) -> None:
    message = r"model\.sample_size: must be a positive integer, or two \(height, width\), got "
    with pytest.raises(ValueError, match=message):
        validate(with_entry("model.sample_size", size))


@pytest.mark.parametrize("inputs", [1, 2, 3, 4, 5, 16])
def test_rectangles_of_1_to_16_channels_are_accepted(inputs: int) -> None:
    model = {"sample_size": [8, 12], "in_channels": inputs, "out_channels": inputs}
    assert validate(MINIMAL | {"model": model}).model == model


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(17, 17), (0, 0), (2, 4), (1, None), (1, 3), (None, 1), ("gray", "gray"), (2.0, 2.0)]
)
def test_channels_must_be_equal_on_both_sides(inputs: Any, outputs: Any) -> None:
    model = {"sample_size": 8, "in_channels": inputs, "out_channels": outputs}
    message = r"model\.in_channels: must be equal to model\.out_channels, both from 1 \(gray\) to 16, got "
    with pytest.raises(ValueError, match=message):
        validate(MINIMAL | {"model": {key: value for key, value in model.items() if value is not None}})


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        ({"rotate": True}, {"sample_size": [8, 12]}, r"data\.rotate: requires images of equal .*, got 8 and 12"),
        ({"hue": 0.1}, {"in_channels": 1, "out_channels": 1}, r"data\.hue: requires 8-bit images of three channels"),
        ({"brightness": 1.5}, {}, r"data\.brightness: must be less than or equal to 1, got 1\.5"),
        ({"hue": 0.6}, {}, r"data\.hue: must be less than or equal to 0\.5, got 0\.6"),
        ({}, {"pixel_format": None}, r"model\.pixel_format: is not an entry; the data, and data\.value_range, decide"),
    ],
)
def test_augmentations_must_fit_the_images(data: dict[str, Any], model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^training configuration, {message}"):
        validate({"data": {"source": "images"} | data, "model": {"sample_size": 8} | model})


def test_missing_entry_is_named() -> None:
    with pytest.raises(ValueError, match=r"^training configuration, data: is required$"):
        validate({"model": {"sample_size": 8}})
    with pytest.raises(ValueError, match=r"^training configuration, data\.source: is required$"):
        validate(MINIMAL | {"data": {"crop": "none"}})
    for model in ({}, {"model": {}}):
        with pytest.raises(ValueError, match=r"^training configuration, model\.sample_size: "):
            validate({"data": {"source": "images"}} | model)


def test_model_is_optional_with_init() -> None:
    config = validate({"data": {"source": "images"}, "init": "mnist"})
    assert (config.init, config.model) == ("mnist", {})
    assert validate(MINIMAL | {"init": "mnist"}).model == {"sample_size": 8}
    assert validate(MINIMAL | {"init": "mnist", "model": {"dropout": 0.1}}).model == {"dropout": 0.1}
    with pytest.raises(ValueError, match=r"model\.dropout_rate: is not an entry"):
        validate(MINIMAL | {"init": "mnist", "model": {"dropout_rate": 0.1}})


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "good"), [(8, 2, True), (8, 8, True), (8, 3, False), (4, 8, False)]
)
def test_accumulate_must_divide_the_batch(batch_size: int, accumulate: int, good: bool) -> None:
    tree = MINIMAL | {"batch_size": batch_size, "optim": {"accumulate": accumulate}}
    if good:
        assert validate(tree).optim.accumulate == accumulate
    else:
        message = (
            rf"^training configuration, optim\.accumulate: must divide batch_size \({batch_size}\), got {accumulate}$"
        )
        with pytest.raises(ValueError, match=message):
            validate(tree)


@pytest.mark.parametrize(
    "schedule", [{"rescale_betas_zero_snr": True}, {"trained_betas": [0.1, 1.0]}], ids=["rescaled", "trained"]
)
def test_epsilon_requires_a_signal_at_every_timestep(schedule: dict[str, Any]) -> None:
    assert validate(MINIMAL | {"scheduler": schedule | {"prediction_type": "v_prediction"}})
    with pytest.raises(ValueError, match=r"scheduler\.prediction_type: must be v_prediction or sample where the"):
        validate(MINIMAL | {"scheduler": schedule})


def test_decay_steps_require_a_decay() -> None:
    for decay in ("linear", "cosine"):
        assert validate(MINIMAL | {"optim": {"decay": decay, "decay_steps": 10}}).optim.decay_steps == 10
        assert validate(MINIMAL | {"optim": {"decay": decay}}).optim.decay_steps is None
    for optim in ({"decay_steps": 10}, {"decay": "constant", "decay_steps": 10}):
        with pytest.raises(
            ValueError, match=r"optim\.decay_steps: requires optim\.decay to be linear or cosine, got constant$"
        ):
            validate(MINIMAL | {"optim": optim})


@pytest.mark.parametrize("setting", ["optim.lr", "", "batch_size:4", "=1"])
def test_setting_without_key_or_value_raises(setting: str) -> None:
    with pytest.raises(
        ValueError, match=rf"settings must be of the form key=value, such as optim\.lr=2e-4, got '{setting}'"
    ):
        load_config("mnist", settings=[setting])


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("optim.lr=[1", r"'\[1' is not a valid YAML value"),
        ("optim.lrate=1", r"optim\.lrate: "),
        ("optim.lr.first=1", r"optim\.lr: "),
        ("data=images", "data: "),
        ("data.source=", r"data\.source: .*string"),
        ("data.source=[a, b]", r"data\.source: .*string"),
    ],
)
def test_invalid_setting_raises(setting: str, named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        load_config("mnist", settings=[setting])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size: [", "is not valid YAML"),
        ("- 1", "must hold entries such as 'batch_size: 64'"),
        ("", "must hold entries"),
        ("just words", "must hold entries"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
)
def test_invalid_file_raises(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"the configuration .*mine\.yaml {message}") as caught:
        load_config("mnist", file)
    assert "\n" not in str(caught.value)


def test_unreadable_file_raises(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    for name in ("missing.yaml", "binary.yaml", "."):
        with pytest.raises(FileNotFoundError, match="cannot be read"):
            load_config("mnist", tmp_path / name)


# --- resuming with another configuration


# Every leaf of the configuration, and whether a run resumes with another value. A new entry fails the test below until
# it is classified.
OTHER = {
    "data.source": ("elsewhere", True),
    "data.split": ("test", True),
    "data.column": ("img", True),
    "data.dtype": ("uint8", True),
    "data.value_range": ([[0.0, 1.0]], False),
    "data.crop": ("none", False),
    "data.horizontal_flip": (True, False),
    "data.vertical_flip": (True, False),
    "data.rotate": (True, False),
    "data.brightness": (0.1, False),
    "data.contrast": (0.1, False),
    "data.saturation": (0.1, False),
    "data.hue": (0.1, False),
    "data.cache": ("disk", True),
    "data.on_device": (True, True),
    "data.labels": ("auto", True),
    "data.holdout": (5, False),
    "data.max_unreadable": (0, True),
    "model.sample_size": (16, False),
    "model.dropout": (0.5, False),
    "init": ("mnist", True),
    "process": ("discrete", False),
    "scheduler.prediction_type": ("sample", False),
    "scheduler.clip_sample": (False, True),
    "scheduler.timestep_spacing": ("trailing", True),
    "objective.weighting": ("min_snr", False),
    "objective.gamma": (4.0, False),
    "objective.antithetic": (False, False),
    "objective.class_dropout": (0.2, False),
    "distill.teacher": ("mnist", True),
    "distill.starts": ([999, 499], False),
    "distill.substeps": (2, False),
    "distill.guidance_scale": (2.0, False),
    "distill.order": (2, False),
    "distill.weighting": ("objective", False),
    "distill.repeats": (2, False),
    "distill.teacher_sha256": ("0" * 64, False),
    "optim.lr": (1e-3, True),
    "optim.betas": ([0.9, 0.99], False),
    "optim.eps": (1e-6, False),
    "optim.weight_decay": (0.1, False),
    "optim.warmup_steps": (1, False),
    "optim.decay": ("cosine", True),
    "optim.grad_clip": (2.0, False),
    "optim.accumulate": (2, False),
    "ema.decay": (0.5, False),
    "ema.warmup": (False, False),
    "ema.sigma_rel": (0.1, False),
    "ema.sigma_rels": ([0.08], False),
    "ema.snapshots": (4, True),
    "samples.every": (0, True),
    "samples.count": (1, True),
    "samples.num_inference_steps": (7, True),
    "evaluate.every": (7, True),
    "evaluate.count": (7, True),
    "evaluate.num_inference_steps": (7, True),
    "checkpoints.every": (7, True),
    "checkpoints.keep": (7, True),
    "checkpoints.keep_every": (7, True),
    "batch_size": (64, False),
    "max_steps": (5, True),
    "seed": (1, False),
    "precision": ("bf16", False),
    "channels_last": (False, False),
    "trackers": ([], True),
    "gradient_checkpointing": (True, True),
    "compile": (True, True),
}
NEITHER = {"data.balanced", "data.class_names", "optim.decay_steps", "evaluate.features", "log_every", "epochs"}
"""Entries that are compared but not changed here, and `epochs`, which a run replaces by `max_steps`."""


def test_every_entry_is_classified() -> None:
    def leaves(tree: dict[str, Any], prefix: str = "") -> set[str]:
        return set().union(
            *(
                leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}"}
                for key, value in tree.items()
            )
        )

    entries = leaves(validate(MINIMAL).model_dump()) - {"scheduler"}
    assert entries == {key for key in OTHER.keys() | NEITHER if not key.startswith("scheduler.")} - {"model.dropout"}


@pytest.mark.parametrize("key", OTHER)
def test_incompatible_changes(key: str) -> None:
    value, free = OTHER[key]
    old, new = validate(MINIMAL), validate(with_entry(key, value))
    assert old != new
    changes = incompatible_changes(old, new)
    assert [change.split(":")[0] for change in changes] == ([] if free else [key])
    assert all(change.endswith(f", got {value}") for change in changes)
    back = incompatible_changes(new, old)
    assert [change.split(":")[0] for change in back] == ([] if free else [key])


def test_all_incompatible_changes_are_listed() -> None:
    changed = MINIMAL | {"seed": 1, "optim": {"lr": 1e-3, "decay": "linear", "decay_steps": 9}, "batch_size": 64}
    assert incompatible_changes(validate(MINIMAL), validate(changed)) == [
        "batch_size: expected 128, got 64",
        "seed: expected 0, got 1",
    ]


def test_model_arguments_that_one_side_lacks_are_listed() -> None:
    old = validate(with_entry("model.block_out_channels", [8, 16]))
    new = validate(with_entry("model.dropout", 0.1))
    assert incompatible_changes(old, new) == [
        "model.block_out_channels: expected [8, 16], got None",
        "model.dropout: expected None, got 0.1",
    ]


def test_changed_entries_have_both_values() -> None:
    old, new = validate(MINIMAL), validate(MINIMAL | {"max_steps": 5, "optim": {"lr": 1e-3}, "samples": {"every": 0}})
    assert changed_entries(old, new) == {
        "optim.lr": (2e-4, 1e-3),
        "samples.every": (1000, 0),
        "max_steps": (800_000, 5),
    }


def test_power_average_excludes_the_exponential_one() -> None:
    assert validate(MINIMAL | {"ema": {"sigma_rel": 0.1}}).ema.sigma_rel == 0.1
    for entries in ({"decay": 0.9}, {"warmup": False}):
        with pytest.raises(ValueError, match=r"ema\.decay: has no effect beside ema\.sigma_rel; leave"):
            validate(MINIMAL | {"ema": {"sigma_rel": 0.1} | entries})
