"""Plans: networks that fit any images, lengths that fit the time, given entries that are kept, the one-line command."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ddim.cli import main
from ddim.cli.train_tables import plan_table
from ddim.data.dataset import CachedImageDataset
from ddim.data.survey import ImageSurvey
from ddim.info import count_flop
from ddim.io.image_files import make_grid
from ddim.io.images import height_and_width
from ddim.pipeline import DDIMPipeline
from ddim.training.config import load_config, merge, merge_config, preset_names, validate
from ddim.training.costs import MEASURED_FLOP_PER_CORE, RunCosts, estimate_costs, measured_part, memory_bytes
from ddim.training.machine import Machine, inspect_machine
from ddim.training.plan import (
    RECIPE,
    TIME_SHARE,
    Plan,
    choose_batch_size,
    choose_model,
    choose_precisions,
    choose_rates,
    choose_size,
    choose_steps,
    configure,
    fit_memory,
    leaves_network_out,
    plan_run,
)
from ddim.training.run import BatchSizeError, complete_config, resolve_length, train
from ddim.training.trainer import Trainer
from ddim.unet import UNet2DModel
from digits import TINY_MODEL, digits, write_digits
from image_data import write_hugging_face

LAPTOP, SERVER = Machine("cpu", "", 2, 2**33, ()), Machine("cpu", "", 64, 2**37, ("bf16",))
GPU, OLD_GPU = Machine("cuda", "A100", 16, 2**36, ("bf16", "fp16")), Machine("cuda", "P100", 8, 2**34, ())
MACHINES = [LAPTOP, SERVER, GPU, OLD_GPU]
SMALL = {"model": {"block_out_channels": [8, 8]}, "max_steps": 2, "samples": {"every": 0, "count": 2}}
"""What makes a planned run short."""


def make_survey(count: int, *sizes: tuple[int, int], channels: int = 3) -> ImageSurvey:
    return ImageSurvey("pics", count, list(sizes), [("RGB", len(sizes))], channels, None)


def make_costs(seconds_per_step: float = 0.1, seconds_per_sample: float = 0.001) -> RunCosts:
    return RunCosts(500, 10**6, 20, 500, 100, seconds_per_step, seconds_per_sample, 1e5, 1.0, 0.0, "all")


def parameters(model: Mapping[str, Any]) -> int:
    with torch.device("meta"):
        return UNet2DModel(**model).num_parameters()


# --- size and network


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([(28, 28)] * 5, 64, 28),
        ([(32, 32)] * 5, 64, 32),
        ([(8, 8)] * 5, 64, 8),
        ([(30, 30)] * 5, 64, 28),
        ([(500, 500)] * 5, 64, 64),
        ([(1000, 800), (900, 1200), (640, 480)], 128, 128),
        ([(100, 70)] * 8 + [(20, 20)] * 2, 128, 16),
        ([(100, 70)] * 19 + [(20, 20)], 128, 64),
        ([(5, 5), (6, 6)], 64, 4),
        ([(1, 1)], 64, 2),
        ([(40, 64)] * 3, 64, (40, 64)),
        ([(64, 24)] * 3, 64, (64, 24)),
        ([(480, 640)] * 3, 64, (48, 72)),
        ([(40, 64), (64, 40)], 64, 32),
    ],
)
def test_size_is_that_of_the_images_up_to_a_limit(
    sizes: list[tuple[int, int]], limit: int, expected: int | tuple[int, int]
) -> None:
    assert choose_size(sizes, limit) == height_and_width(expected)


@pytest.mark.parametrize("machine", [LAPTOP, GPU])
@pytest.mark.parametrize("side", [8, 12, 28, 30, 32, 48, 50, 64, 128])
def test_networks_take_their_images(side: int, machine: Machine) -> None:
    for channels in (1, 3):
        given = {"sample_size": side} if side in (30, 50) else {}
        model = choose_model(make_survey(5000, (side, side), channels=channels), machine, given)
        size = model["sample_size"]
        assert size == (min(side, 64) if machine.is_cpu and not given else side)
        assert all(width % 16 == 0 for width in model["block_out_channels"])
        validate({"data": {"source": "pics"}, "model": model})
        # What the network requires, and, of some, the network itself.
        assert size % 2 ** (len(model["block_out_channels"]) - 1) == 0
        with torch.device("meta"):
            network = UNet2DModel(**model)
            if machine is LAPTOP and side in (8, 30, 64):
                output = network(torch.empty(2, channels, size, size), torch.tensor(0)).sample
                assert output.shape == (2, channels, size, size)
        smallest = size // 2 ** (len(model["block_out_channels"]) - 1)
        assert 4 <= smallest <= 16 or size == 50


def test_networks_grow_with_images_and_size() -> None:
    by_count = [parameters(choose_model(make_survey(n, (32, 32)), GPU, {})) for n in (100, 2000, 10_000, 50_000)]
    by_size = [parameters(choose_model(make_survey(2000, (s, s)), GPU, {})) for s in (8, 16, 32, 64, 128)]
    by_machine = [parameters(choose_model(make_survey(50_000, (32, 32)), m, {})) for m in (LAPTOP, SERVER, GPU)]
    for sizes in (by_count, by_size, by_machine):
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[-1]


@pytest.mark.parametrize("channels", [[32, 64], [24, 48, 72], [8, 16], [100], [64, 64, 96, 160]])
def test_given_channels_are_kept_and_completed(channels: list[int]) -> None:
    model = choose_model(make_survey(500, (32, 32)), LAPTOP, {"block_out_channels": channels})
    assert model["block_out_channels"] == channels
    assert len(model["down_block_types"]) == len(model["up_block_types"]) == len(channels)
    UNet2DModel(**model)


def test_odd_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^training configuration, model\.sample_size: must be even, got 33$"):
        choose_model(make_survey(500, (64, 64)), LAPTOP, {"sample_size": 33})


# --- batch, precision, memory


@pytest.mark.parametrize("count", [1, 2, 3, 40, 500, 10**6])
@pytest.mark.parametrize("size", [(8, 8), (32, 32), (64, 64), (256, 256)])
def test_batches_are_powers_of_two_that_there_are_images_for(size: tuple[int, int], count: int) -> None:
    for is_cpu in (True, False):
        batch_size = choose_batch_size(size, count, is_cpu)
        assert batch_size <= count
        assert math.log2(batch_size).is_integer()


def test_sixteen_bits_where_the_machine_has_them() -> None:
    assert [choose_precisions(machine) for machine in MACHINES] == [["fp32"], ["fp32", "bf16"], ["bf16"], ["fp32"]]
    assert inspect_machine(torch.device("cpu")).device == "cpu"


def test_batches_shrink_to_the_memory() -> None:
    config = complete_config(load_config("digits"))
    needed = memory_bytes(config, 128)
    assert fit_memory(config, 128, 1, 10 * needed) == 128
    assert fit_memory(config, 128, 1, needed) < 128
    assert fit_memory(config, 128, 1, 0) == 1
    assert fit_memory(config, 96, 24, 0) == 24
    assert memory_bytes(config.model_copy(update={"gradient_checkpointing": True}), 128) < needed


def test_memory_is_that_of_the_saved_tensors() -> None:
    """What autograd saves is counted by its own hooks; several layers save the same tensor."""
    config = complete_config(load_config("digits"))
    model = UNet2DModel(**config.model).train()
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.zeros(64, 1, 8, 8), 0).sample
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    measured = sum(size for pointer, size in saved.items() if pointer not in weights)
    computed = memory_bytes(config, 64) - memory_bytes(config, 0)
    assert output.requires_grad
    assert 0.7 < computed / measured < 1.5


# --- length


def test_lengths_fit_the_time() -> None:
    config, costs = complete_config(load_config("digits")), make_costs(seconds_per_step=0.5)
    steps, limit = choose_steps(config, costs, 500, True, max_minutes=10)
    assert limit == "time"
    assert 0.5 < steps * costs.seconds_per_step / 600 < TIME_SHARE
    steps, limit = choose_steps(config, make_costs(seconds_per_step=5), 10**6, True, None)
    assert limit == "night"
    assert steps * 5 < 8 * 3600
    fast = make_costs(seconds_per_step=0.001)
    lengths = [choose_steps(config, fast, count, True, None) for count in (5, 500, 5000, 50_000)]
    assert {limit for _, limit in lengths} == {"images"}
    assert [steps for steps, _ in lengths] == sorted(steps for steps, _ in lengths)
    assert choose_steps(config, fast, 5000, False, None)[0] > lengths[2][0]
    assert choose_steps(config, costs, 500, True, max_minutes=1e-6) == (1, "time")


@pytest.mark.parametrize("max_steps", [1, 2, 19, 1000, 10**6])
def test_rates_are_valid_for_any_length(max_steps: int) -> None:
    config = complete_config(load_config("digits"))
    rates = choose_rates(max_steps, make_costs(), config)
    chosen = validate(merge(config.model_dump(), {"max_steps": max_steps}, rates))
    assert chosen.optim.warmup_steps <= max_steps / 20
    assert chosen.optim.decay_steps is not None
    assert chosen.optim.decay_steps + chosen.optim.warmup_steps <= max(1, max_steps)
    assert chosen.checkpoints.every <= max_steps
    assert 0.9 <= chosen.ema.decay <= 0.9999


def test_epochs_are_visits_of_every_image() -> None:
    config = load_config("digits", overrides={"epochs": 3, "data.holdout": 17})
    resolved = resolve_length(config, 1797)
    assert resolved.max_steps == math.ceil(3 * 1780 / 128)
    assert resolve_length(resolved, 1797) == resolved
    # The length that is set later replaces the other.
    assert merge_config("digits", overrides={"epochs": 3}).get("max_steps") is None
    assert merge({"epochs": 3}, {"max_steps": 5}) == {"max_steps": 5}
    with pytest.raises(ValueError, match=r"^training configuration, epochs: has no effect beside max_steps"):
        load_config("digits", settings=["epochs=3", "max_steps=5"])


# --- costs


@pytest.mark.parametrize("name", preset_names())
def test_little_is_measured_of_every_preset(name: str) -> None:
    config = load_config(name, overrides={"data.source": "digits"})
    size, levels = config.model["sample_size"], len(config.model["block_out_channels"])
    with torch.device("meta"):
        flop = 3 * count_flop(UNet2DModel(**config.model))
    budget = 2 * MEASURED_FLOP_PER_CORE
    batch, (height, width) = measured_part(config.batch_size, (size, size), flop, budget, 2 ** (levels - 1))
    assert 1 <= batch <= config.batch_size
    assert height == width
    assert batch * flop * (height / size) ** 2 <= budget


def test_estimates_scale_what_is_measured(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the batch predicts the time of all of it."""
    config = make_config(model=TINY_MODEL, batch_size=32)
    whole = estimate_costs(config, "cpu")
    assert whole.measured == "32 of 32 images, 8x8"
    monkeypatch.setattr("ddim.training.costs.MEASURED_FLOP_PER_CORE", 16 * whole.gflop_per_step / 32 * 1e9)
    part = estimate_costs(config, "cpu")
    assert part.measured == "16 of 32 images, 8x8"
    assert part.gflop_per_step == whole.gflop_per_step
    assert 0.3 < part.seconds_per_step / whole.seconds_per_step < 6


# --- whole plans


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def write_mixed(folder: Path) -> Path:
    """Write a class folder per image, of many sizes and modes."""
    for index, mode in enumerate(["L", "RGB", "RGBA", "P", "LA", "1", "CMYK"]):
        size = (12 + 3 * index, 20 - index)
        image = Image.new("RGB", size, (30 * index, 200, 40)).convert("RGB" if mode == "LA" else mode)
        suffix = "jpg" if mode == "CMYK" else "png"
        (folder / mode).mkdir(parents=True)
        (image.convert("LA") if mode == "LA" else image).save(folder / mode / f"{index}.{suffix}")
    return folder


SOURCES = ["mixed", "parquet", "npz", "few", "arrays"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    np.savez(folder / "images.npz", images=digits(40), labels=np.arange(40))
    rng = np.random.default_rng(0)
    np.savez(folder / "arrays.npz", rng.integers(0, 5000, (12, 12, 20, 5), np.uint16))
    return {
        "arrays": str(folder / "arrays.npz"),
        "mixed": str(write_mixed(folder / "mixed")),
        "parquet": write_hugging_face(folder / "train.parquet", digits(40)),
        "npz": str(folder / "images.npz"),
        "few": str(write_digits(folder / "few", 1)),
    }


@pytest.mark.parametrize("name", SOURCES)
def test_every_kind_of_collection_is_planned_and_trained(name: str, sources: dict[str, str], tmp_path: Path) -> None:
    tree = merge(SMALL, {"data": {"source": sources[name]}})
    plan = plan_run(tree, "cpu")
    config = plan.config
    assert config.model["in_channels"] == {"mixed": 3, "arrays": 5}.get(name, 1)
    assert config.model["sample_size"] == ([12, 20] if name == "arrays" else 8)
    assert config.batch_size <= plan.survey.count
    assert config.scheduler["prediction_type"] == RECIPE["scheduler"]["prediction_type"]
    table = plan_table(plan)
    labels = {"mixed": "7 folders", "parquet": "the column label", "npz": "the array labels"}
    assert (f"labels are not used: {labels[name]}" in table) if name in labels else ("labels" not in table)
    final = train(config, tmp_path / "run", "cpu")
    height, width = height_and_width(config.model["sample_size"])
    pipe = DDIMPipeline.from_pretrained(final)
    samples = pipe(seeds=[0], num_inference_steps=2, output_type="np").images
    assert samples.shape == (1, height, width, config.model["in_channels"])
    assert samples.dtype == (np.uint16 if name == "arrays" else np.float32)
    with Image.open(tmp_path / "run" / "data.png") as grid:
        assert grid.mode == ("RGB" if name in ("mixed", "arrays") else "L")
        tile = Image.new("L", (width, height))
        assert grid.size == (tile if config.batch_size == 1 else make_grid([tile] * config.batch_size)).size


def test_given_entries_are_kept(sources: dict[str, str]) -> None:
    tree = {
        "data": {"source": sources["npz"], "horizontal_flip": True, "holdout": 4},
        "model": {"sample_size": 16, "block_out_channels": [8, 8], "layers_per_block": 2, "dropout": 0.1},
        "scheduler": {"prediction_type": "epsilon"},
        "optim": {"lr": 3e-4, "accumulate": 3, "decay": "constant"},
        "ema": {"decay": 0.5},
        "samples": {"every": 0},
        "checkpoints": {"every": 7},
        "precision": "bf16",
        "epochs": 2,
        "seed": 5,
    }
    plan = plan_run(tree, "cpu")
    chosen = leaves(plan.config.model_dump())
    assert {key: chosen[key] for key in leaves(tree) if key != "epochs"} == {
        key: value for key, value in leaves(tree).items() if key != "epochs"
    }
    assert plan.config.batch_size % 3 == 0
    assert plan.config.max_steps == math.ceil(2 * 36 / plan.config.batch_size)
    assert plan.limit == "given"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"data": {"source": "nowhere"}}, "nowhere does not exist"),
        ({"data": {"source": "digits"}, "optim": {"lr": -1}}, r"optim\.lr: must be greater than 0"),
        ({"data": {"source": "digits"}, "optim": 3}, r"optim: must be a section"),
        ({"data": {"source": "digits"}, "model": {"sample_size": "big"}}, r"model\.sample_size: "),
        ({"data": {"source": "digits"}, "model": {"block_out_channels": 32}}, "must be a list of integers, got 32"),
        ({"data": "digits"}, r"data: must be a section with entries such as data\.source"),
        ({"data": {"source": "digits"}, "init": "no-such-model"}, "no-such-model"),
    ],
)
def test_wrong_entries_are_named_before_the_images_are_read(tree: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        plan_run(tree, "cpu")
    assert "\n" not in str(caught.value)


def test_fine_tuning_keeps_the_network_and_takes_the_channels(sources: dict[str, str]) -> None:
    tree = {"data": {"source": sources["mixed"]}, "init": "mnist", "max_steps": 1}
    config = plan_run(tree, "cpu").config
    network = DDIMPipeline.from_pretrained("mnist").unet.config
    assert config.model["block_out_channels"] == list(network.block_out_channels)
    assert (config.model["sample_size"], config.model["in_channels"], config.model["out_channels"]) == (28, 3, 3)
    assert config.scheduler == complete_config(load_config("mnist", overrides={"init": "mnist"})).scheduler
    assert config.optim.lr < 1e-3


def test_only_missing_networks_are_planned() -> None:
    for name in preset_names():
        assert not leaves_network_out(merge_config(name))
    assert leaves_network_out({})
    assert leaves_network_out({"model": {"sample_size": 64}})
    assert leaves_network_out({"init": "mnist"})
    assert leaves_network_out({"model": {"sample_size": 16, "block_out_channels": [8, 16]}})
    assert not leaves_network_out({"model": TINY_MODEL})
    with pytest.raises(ValueError, match=r"^source must name the images to train on, such as a folder$"):
        configure({}, None)


# --- the command


class Done(NamedTuple):
    code: int
    stdout: str
    stderr: str


@pytest.fixture
def ddim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run `ddim` in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    write_digits(tmp_path / "pics", 40)

    def run(*arguments: str) -> Done:
        monkeypatch.setattr("sys.argv", ["ddim", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        failure = "" if isinstance(stop.value.code, int | None) else stop.value.code
        return Done(1 if failure else int(stop.value.code or 0), captured.out, captured.err + failure)

    return run


def test_one_line_trains_and_resumes(ddim: Callable[..., Done], tmp_path: Path) -> None:
    small = ("--set", "model.block_out_channels=[8, 8]", "--set", "samples.count=2")
    first = ddim("train", "--data", "pics", "--out", "run", "--max-steps", "4", *small)
    assert (first.code, first.stdout) == (0, "run/final\n"), first.stderr
    shown = " ".join(first.stderr.split())
    assert "images 40 in pics, 8x8, L machine" in shown
    assert re.search(r"machine (cpu|cuda), .* size 8x8, gray --resolution", shown)
    assert "length 4 steps" in shown
    record = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["config"]
    assert (record["max_steps"], record["batch_size"], record["model"]["block_out_channels"]) == (4, 32, [8, 8])

    # What the loader gave, from the loader itself.
    dataset = CachedImageDataset(torch.from_numpy(digits(40))[:, None])
    batch = Trainer(validate(record), dataset, tmp_path, torch.device("cpu")).batches[0][:, 0].numpy()
    expected = make_grid([Image.fromarray(pixels) for pixels in batch])
    with Image.open(tmp_path / "run" / "data.png") as grid:
        assert np.array_equal(np.asarray(grid), np.asarray(expected))

    # The folder alone resumes, and so does the same command; nothing is planned again.
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for arguments in ((), ("--data", "pics", *small)):
        again = ddim("train", "--out", "run", *arguments)
        assert (again.code, again.stdout) == (0, "run/final\n"), again.stderr
        assert "--resolution" not in again.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == lines
    sampled = ddim("sample", "--model", "run", "-n", "1", "--steps", "2", "--out", "x.png")
    assert sampled.code == 0, sampled.stderr

    other = ddim("train", "--out", "run", "--resolution", "16")
    assert other.code == 1
    assert "model.sample_size: expected 8, got 16" in other.stderr

    # Its record is a configuration.
    copied = ddim("train", "--config", "run/config.yaml", "--out", "copy")
    assert copied.code == 0, copied.stderr
    assert "--resolution" not in copied.stderr
    assert (tmp_path / "copy" / "metrics.jsonl").read_bytes() == lines


def test_command_names_what_is_missing_and_where_a_batch_comes_from(ddim: Callable[..., Done], tmp_path: Path) -> None:
    nothing = ddim("train", "--out", "run")
    assert nothing == (
        1,
        "",
        "ddim: --data must name the images to train on, such as a folder: run holds no run to resume",
    )
    for options in (("--out", "run"), ("--dry-run",)):
        large = ddim("train", "--preset", "digits", "--data", "pics", *options)
        assert (large.code, large.stderr.splitlines()[-1]) == (
            1,
            "ddim: --batch-size must be at most the number of images to train on, 40 (pics has 40, data.holdout is 0), "
            "got 128 of the preset digits; give --batch-size 40 or less",
        )
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_folders_are_checked_before_the_images(tmp_path: Path) -> None:
    (tmp_path / "photo.png").touch()
    with pytest.raises(FileExistsError, match=r"is not empty and does not hold a run \(no config\.yaml\)"):
        configure({"data": {"source": "nowhere"}}, tmp_path, "cpu")
    (tmp_path / "config.yaml").write_text("config: {seed: 1}")
    with pytest.raises(FileExistsError, match="is not empty; use resume='auto'"):
        configure({"data": {"source": "nowhere"}}, tmp_path, "cpu", resume="never")


def test_print_config(ddim: Callable[..., Done], tmp_path: Path) -> None:
    """Every option is an entry of what is printed, which loads as what it shows."""
    options = {
        "--data": ("pics", "data.source"),
        "--init": ("mnist", "init"),
        "--resolution": ("16", "model.sample_size"),
        "--epochs": ("3.5", "epochs"),
        "--batch-size": ("12", "batch_size"),
        "--accumulate": ("4", "optim.accumulate"),
        "--precision": ("bf16", "precision"),
        "--gradient-checkpointing": (None, "gradient_checkpointing"),
        "--compile": (None, "compile"),
        "--checkpoint-every": ("9", "checkpoints.every"),
        "--seed": ("7", "seed"),
    }
    arguments = [part for name, (value, _) in options.items() for part in (name, value) if part is not None]
    printed = ddim("train", "--print-config", "--preset", "mnist", *arguments)
    assert (printed.code, printed.stderr) == (0, "")
    shown = leaves(yaml.safe_load(printed.stdout))
    assert {entry: shown[entry] for _, entry in options.values()} == {
        entry: True if value is None else yaml.safe_load(value) for value, entry in options.values()
    }
    (tmp_path / "mine.yaml").write_text(printed.stdout)
    settings = [f"{entry}={'true' if value is None else value}" for value, entry in options.values()]
    assert load_config(config_file=tmp_path / "mine.yaml") == load_config("mnist", settings=settings)


def test_print_config_names_wrong_entries(ddim: Callable[..., Done]) -> None:
    wrong = ddim("train", "--print-config", "--set", "optim.learning_rate=1")
    assert wrong.code == 1
    assert "optim.learning_rate: is not an entry (did you mean optim.lr?)" in wrong.stderr


def test_plans_are_numbers_of_this_machine() -> None:
    """The table names what it shows."""
    survey = make_survey(500, (32, 32))
    config = complete_config(
        validate(merge(RECIPE, {"data": {"source": "pics"}, "model": choose_model(survey, LAPTOP, {})}))
    )
    table = plan_table(Plan(survey, LAPTOP, config, make_costs(), "time"))
    assert "what fits into --max-minutes" in table
    assert "v_prediction" in table
    assert BatchSizeError("x", 3).largest == 3


def test_labels_are_planned() -> None:
    tree = merge(SMALL, {"data": {"source": "digits", "labels": "auto"}})
    table = plan_table(plan_run(tree, "cpu"))
    assert "10 classes by label: 0, 1, 2, 3, 4, ...; 174 to 183 images each" in table
    assert "10% of them dropped, for guidance" in table
    assert "labels are not used" not in table
    table = plan_table(plan_run(merge(SMALL, {"data": {"source": "digits"}}), "cpu"))
    assert re.search(r"labels are not used: the column label +--labels auto", table)
