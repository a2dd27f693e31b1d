"""The command line: help, files, streams, exit codes, and a message of one line for every mistake.

Commands run in one process (`cli_batch`), each when a test first needs it; where start-up matters, as separate
programs.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from PIL import Image

from cli_batch import Commands, Result, environment
from ddim.cli import app
from ddim.info import count_flop
from ddim.pipeline import DDIMPipeline
from ddim.unet import UNet2DModel
from ddim.version import __version__
from digits import TINY_MODEL, write_digits
from helpers import public
from programs import run_python

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def program(folder: Path, *command: str) -> Result:
    """The result of a separate program."""
    done = subprocess.run(command, cwd=folder, env=environment(folder / "home"), capture_output=True, text=True)
    return Result(done.returncode, done.stdout, done.stderr, [])


DDIM = str(Path(sys.executable).parent / "ddim")
TRAIN = ["train", "--config", "mine.yaml", "--data", "images", "--device", "cpu"]
QUICK = ["sample", "-n", "2", "--steps", "2", "--device", "cpu"]

GOOD = {
    "help": ["--help"],
    **{f"help {name}": [name, "--help"] for name in COMMANDS},
    "short help": ["train", "-h"],
    "grid": ["sample", "-n", "5", "--steps", "2", "--out", "grid.png"],
    "grid again": ["sample", "-n", "5", "--steps", "2", "--out", "again.png"],
    "grid as it is": ["sample", "-n", "5", "--steps", "2", "--scale", "1", "--out", "small.png"],
    "enlarged": ["sample", "-n", "1", "--steps", "1", "--scale", "2", "--out", "enlarged.png"],
    "single": ["sample", "-n", "1", "--seed", "3", "--steps", "2", "--out", "single.png"],
    "encode single": ["encode", "single.png", "--steps", "2", "--euler", "--out", "single-latent.npz"],
    "npz": ["sample", "--count", "5", "--steps", "2", "-o", "x.npz"],
    "folder": ["sample", "-n", "5", "--steps", "2", "--out", "images of digits/"],
    "third": ["sample", "-n", "1", "--seed", "3", "--steps", "2", "--out", "third.npz"],
    "batches": ["sample", "-n", "5", "--batch-size", "2", "--steps", "2", "--out", "batches.npz"],
    "replaced": ["sample", "-n", "1", "--steps", "1", "--out", "old.png"],
    "folder again": ["sample", "-n", "6", "--steps", "1", "--out", "images again", "--overwrite"],
    "resumed": ["sample", "-n", "6", "--steps", "1", "--out", "images again"],
    "shards": ["sample", "-n", "6", "--steps", "1", "--out", "shards.tar", "--batch-size", "2", "--shard-size", "5"],
    "default name": ["sample", "-n", "1", "--steps", "1"],
    "timesteps": ["sample", "-n", "2", "--timesteps", "900,600,300,0", "-o", "timesteps.npz"],
    "trailing": [*QUICK, "--spacing", "trailing", "-o", "trailing.npz"],
    "eta": [*QUICK, "--steps", "10", "--eta", "1", "-o", "eta.npz"],
    "sigma-hat": [*QUICK, "--steps", "10", "--eta", "1", "--sigma-hat", "-o", "sigma-hat.npz"],
    "ten": [*QUICK, "--steps", "10", "-o", "ten.npz"],
    "bfloat16": [*QUICK, "--steps", "10", "--dtype", "bfloat16", "-o", "bfloat16.npz"],
    "info": ["info"],
    "info json": ["info", "mnist", "--json"],
    "train": [*TRAIN, "--out", "runs/one", "--set", "optim.lr=1e-3", "--max-steps", "12"],
    "train again": [*TRAIN, "--out", "runs/one", "--set", "optim.lr=1e-3", "--max-steps", "12"],
    "info trained": ["info", "runs/one/final", "--json"],
    "sample trained": ["sample", "-m", "runs/one/final", "-n", "3", "--steps", "3", "-o", "trained.npz"],
}

REQUIRES = {
    "resumed": ["folder again"],
    "train again": ["train"],
    "bad other images": ["resumed"],
    "bad other settings": ["train"],
    "bad never resume": ["train"],
}
"""What has to run before, where it cannot be seen from the arguments."""

BAD: dict[str, tuple[list[str], int, str]] = {
    "no steps": (["sample", "--steps", "0"], 1, "^ddim: --steps must be an integer of at least 1, got 0"),
    "negative steps": (["sample", "--steps", "-5"], 1, "^ddim: --steps must be an integer of at least 1, got -5"),
    "too many steps": (
        ["sample", "--steps", "2000"],
        1,
        "^ddim: --steps .*2000.* 1000 timesteps|^ddim: --steps .* 1000.* 2000",
    ),
    "fractional steps": (["sample", "--steps", "2.5"], 1, "^ddim: --steps must be an integer or auto, got '2.5'"),
    "eta -1": (["sample", "--eta", "-1"], 1, r"^ddim: --eta must be a number of at least 0, got -1\.0"),
    "eta nan": (["sample", "--eta", "nan"], 1, "^ddim: --eta must be a number of at least 0, got nan"),
    "eta inf": (["sample", "--eta", "inf"], 1, "^ddim: --eta must be a number of at least 0, got inf"),
    "eta much": (["sample", "--eta", "much"], 2, "Invalid value for '--eta'"),
    "scale": (["sample", "--scale", "0"], 1, "^ddim: --scale must be an integer from 1 to 64, got 0"),
    "scale of a folder": (["sample", "--scale", "2", "-o", "new/"], 1, "^ddim: --scale has no effect on a folder"),
    "count": (["sample", "--count", "0"], 1, "^ddim: --count must be an integer of at least 1, got 0"),
    "batch size": (["sample", "--batch-size", "0"], 1, "^ddim: --batch-size must be an integer of at least 1, got 0"),
    "order": (["sample", "--order", "5"], 1, r"^ddim: --order must be 1 \(DDIM\) or 2, 3 or 4 .*, got 5"),
    "order and eta": (["sample", "--order", "2", "--eta", "1"], 1, "^ddim: --order 2 requires --eta 0 .*, got --eta 1"),
    "seed": (["sample", "--seed", "-1"], 1, "^ddim: --seed must be an integer of at least 0, got -1"),
    "large seed": (["sample", "--seed", str(2**63)], 1, "seed"),
    "spacing": (["sample", "--spacing", "even"], 1, "^ddim: --spacing .*must be one of leading, "),
    "rising timesteps": (
        ["sample", "--timesteps", "10,20"],
        1,
        "^ddim: --timesteps must be strictly decreasing, got 20 after 10",
    ),
    "words as timesteps": (
        ["sample", "--timesteps", "a,b"],
        1,
        "^ddim: --timesteps must be integers separated by commas, .*'a,b'",
    ),
    "no timesteps": (["sample", "--timesteps", ""], 1, "^ddim: --timesteps must be integers separated by commas, .*''"),
    "large timesteps": (
        ["sample", "--timesteps", "2000,0"],
        1,
        "^ddim: --timesteps must be integers from 0 to 999, got 2000",
    ),
    "model": (
        ["sample", "-m", "monalisa"],
        1,
        r"the model 'monalisa' does not exist: it is not built in \(faces, mnist, mnist-labels\)",
    ),
    "nearest model": (["sample", "-m", "face"], 1, "^ddim: the model 'face' does not exist: .*did you mean '?faces'?"),
    "hub model": (
        ["sample", "-m", "nobody/nothing"],
        1,
        "the model nobody/nothing is neither a folder nor in the cache",
    ),
    "unknown images": (
        ["sample", "-n", "2", "--steps", "1", "--out", "unknown"],
        1,
        r"unknown/00000\.png exists, and no manifest\.json .*--overwrite",
    ),
    "other images": (
        ["sample", "-n", "6", "--steps", "2", "--out", "images again"],
        1,
        r"other settings \(timesteps=\[500, 0\] instead of \[0\]\)",
    ),
    "empty folder": (
        ["sample", "-m", "empty"],
        1,
        r"empty is not a model: neither scheduler/",
    ),
    "file": (["sample", "-m", "mine.yaml"], 1, "the model 'mine.yaml' does not exist"),
    "missing folder": (["sample", "--out", "missing/x.png"], 1, "the folder missing does not exist"),
    "suffix": (["sample", "--out", "x.jpg"], 1, r"^ddim: --out must end in \.png .* or be a folder, got 'x\.jpg'"),
    "file as folder": (["sample", "--out", "mine.yaml/x.png"], 1, r"mine\.yaml is a file, not a folder"),
    "device": (["sample", "--device", "cuda"], 1, "^ddim: --device must be .*, got 'cuda'|no CUDA device"),
    "unknown device": (["sample", "--device", "abacus"], 1, "^ddim: --device must be .*, got 'abacus'"),
    "engine": (["sample", "--engine", "steam"], 1, "engine must be one of auto, eager, or compile, got 'steam'"),
    "dtype": (
        ["sample", "--dtype", "float99"],
        1,
        "^ddim: --dtype must be one of float32, bfloat16, or float16, got 'float99'",
    ),
    "sigma-hat": (["sample", "--sigma-hat"], 1, "--sigma-hat .*--eta 1"),
    "nothing clipped": (
        ["sample", "--use-clipped-model-output"],
        1,
        r"^ddim: --use-clipped-model-output requires a model whose scheduler clips .* \(clip_sample or thresholding\)$",
    ),
    "unknown option": (["sample", "--stepz", "3"], 2, "No such option: --stepz"),
    "unknown command": (["draw"], 2, "No such command 'draw'"),
    "app model": (["app", "monalisa"], 1, "the model 'monalisa' does not exist"),
    "app port": (["app", "--port", "70000"], 1, "^ddim: --port must be an integer from 0 to 65535, got 70000"),
    "app host": (["app", "--host", "192.0.2.1"], 1, r"cannot listen on 192\.0\.2\.1, port 7860: .*choose another port"),
    "app device": (["app", "--device", "abacus"], 1, "^ddim: --device must be .*, got 'abacus'"),
    "info": (["info", "monalisa"], 1, "the model 'monalisa' does not exist"),
    "info empty": (["info", "empty"], 1, "empty"),
    "no data": ([*TRAIN, "--data", "missing", "--out", "run"], 1, "missing does not exist"),
    "data without images": ([*TRAIN, "--data", "empty", "--out", "run"], 1, "empty contains no images"),
    "train without data": (["train", "--config", "mine.yaml", "--out", "run"], 1, "data: is required"),
    "train without out": (TRAIN, 2, "give a folder for the run, such as --out runs/mine"),
    "preset": ([*TRAIN, "--preset", "imagenet", "--out", "run"], 1, "preset must be one of .*mnist"),
    "unknown key": ([*TRAIN, "--set", "optim.rate=1", "--out", "run"], 1, r"optim\.rate: is not an entry"),
    "no key": (
        [*TRAIN, "--set", "optim.lr", "--out", "run"],
        1,
        "--set must be of the form key=value, .*, got 'optim.lr'",
    ),
    "wrong value": ([*TRAIN, "--set", "batch_size=none", "--out", "run"], 1, "batch_size: .*integer"),
    "unknown model key": ([*TRAIN, "--set", "model.color=1", "--out", "run"], 1, "color"),
    "no such config": (["train", "--config", "none.yaml", "--data", "images", "--out", "run"], 1, "none.yaml"),
    "max steps": ([*TRAIN, "--max-steps", "0", "--out", "run"], 1, "max_steps: .*greater than 0"),
    "evaluate nothing": (["evaluate", "mnist", "-n", "0"], 1, "--count must be an integer of at least 1, got 0"),
    "evaluate against nothing": (
        ["evaluate", "mnist", "--reference-count", "0"],
        1,
        "--reference-count must be an integer of at least 1, got 0",
    ),
    "hub id": ([*TRAIN, "--push-to-hub", "foo", "--out", "run"], 1, "--push-to-hub must be"),
    "resume": ([*TRAIN, "--resume", "maybe", "--out", "run"], 1, "the checkpoint maybe does not exist"),
    "other settings": ([*TRAIN, "--seed", "9", "--out", "runs/one"], 1, "another configuration .*seed: expected 0"),
    "never resume": ([*TRAIN, "--resume", "never", "--out", "runs/one"], 1, "runs/one is not empty"),
    "no run": ([*TRAIN, "--out", "images"], 1, "images is not empty and does not hold a run"),
    "train device": ([*TRAIN, "--device", "cuda", "--out", "run"], 1, "^ddim: --device must be .*, got 'cuda'"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: digits, a configuration, an old image, an empty folder."""
    folder = tmp_path_factory.mktemp("cli")
    write_digits(folder / "images", 30)
    config: dict[str, Any] = {
        "model": TINY_MODEL,
        "batch_size": 8,
        "max_steps": 1000,
        "optim": {"warmup_steps": 4},
        "samples": {"every": 6, "count": 4, "num_inference_steps": 2},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    Image.new("L", (3, 3)).save(folder / "old.png")
    (folder / "empty").mkdir()
    (folder / "images again").mkdir()
    (folder / "unknown").mkdir()
    (folder / "unknown" / "00000.png").write_text("mine")
    for name in ("00000.png", "00005.png", "00006.png"):
        (folder / "images again" / name).write_text("old")
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Iterator[Commands]:
    """Of all commands above; each runs when a test first needs it."""
    mistakes = {f"bad {name}": arguments for name, (arguments, _, _) in BAD.items()}
    with Commands(folder, GOOD | mistakes, REQUIRES) as commands:
        yield commands


def pixels(path: Path) -> np.ndarray:
    with np.load(path) as file:
        return file["arr_0"].astype(int)


# --- start and help


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("train", "ema", "export", "convert")])
def test_model_is_an_option_and_an_argument(name: str) -> None:
    kinds = {parameter.param_type_name for parameter in COMMANDS[name].params if "--model" not in parameter.opts}
    assert "argument" in kinds
    assert "-m" in next(parameter.opts for parameter in COMMANDS[name].params if "--model" in parameter.opts)


def test_version(tmp_path: Path) -> None:
    for command in ([DDIM], [sys.executable, "-m", "ddim"]):
        assert program(tmp_path, *command, "--version") == Result(0, f"ddim {__version__}\n", "", [])


def test_help_lists_every_command(results: Commands) -> None:
    code, stdout, stderr, _ = results["help"]
    assert (code, stderr) == (0, "")
    assert "Usage: ddim [OPTIONS] COMMAND" in stdout
    assert "Example: ddim sample --model mnist --steps 20 --count 16 --out digits.png" in stdout
    training = {"train", "ema", "export", "distill"}
    latent_space = {"encode", "decode", "reconstruct", "interpolate", "trajectory", "consistency", "edit", "direction"}
    restoration = {"inpaint", "super-resolve", "restore"}
    others = {"sample", "tune", "evaluate", "convert", "info", "app"}
    assert COMMANDS.keys() == others | training | latent_space | restoration
    for name in (*COMMANDS, "--version", "--help"):
        assert re.search(rf"│ {name} ", stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_option(results: Commands, name: str) -> None:
    code, stdout, stderr, evaluations = results[f"help {name}"]
    assert (code, stderr, evaluations) == (0, "", [])
    for parameter in COMMANDS[name].params:
        for option in parameter.opts:
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", stdout)
        assert parameter.help.split(";")[0] in " ".join(stdout.replace("│", " ").split())
    examples = stdout.split("Examples:")[1].split("╭")[0].strip().splitlines()
    assert len([line for line in examples if line.strip().startswith(f"ddim {name}")]) >= 2


# --- images


def test_sample_writes_a_grid(results: Commands, folder: Path) -> None:
    code, stdout, stderr, evaluations = results["grid"]
    assert (code, stdout) == (0, "grid.png\n")
    assert "2/2" in stderr
    assert re.search(r"^5 images in \d+\.\d s$", stderr, re.MULTILINE)
    assert evaluations == [(500, 5, "torch.float32"), (0, 5, "torch.float32")]
    with Image.open(results.output("grid")) as grid:
        # Enlarged, so that digits of 28 pixels have 64 or more.
        assert (grid.mode, grid.size) == ("L", (3 * (3 * 30 + 2), 3 * (2 * 30 + 2)))


def test_the_same_command_gives_the_same_bytes(results: Commands, folder: Path) -> None:
    assert results["grid again"].code == 0
    assert results.output("grid").read_bytes() == results.output("grid again").read_bytes()


def test_formats_hold_the_same_images(results: Commands, folder: Path) -> None:
    assert results["npz"].stdout == "x.npz\n"
    arrays = pixels(results.output("npz"))
    assert arrays.shape == (5, 28, 28, 1)
    with np.load(results.output("npz")) as file:
        assert file["arr_0"].dtype == np.uint8

    assert results["folder"].stdout.strip() == "images of digits"
    files = sorted(results.output("folder").glob("*.png"))
    assert [path.name for path in files] == [f"{index:05d}.png" for index in range(5)]
    with Image.open(results.output("grid")) as grid:
        for index, (path, array) in enumerate(zip(files, arrays, strict=True)):
            with Image.open(path) as image:
                assert np.array_equal(np.asarray(image), array[..., 0])
            left, top = index % 3 * 30 + 2, index // 3 * 30 + 2
            # A grid is sampled by the network itself, files by its engine.
            cut = np.asarray(grid, int)[::3, ::3][top : top + 28, left : left + 28]
            assert np.abs(cut - array[..., 0]).max() <= 1
    assert len({array.tobytes() for array in arrays}) == 5


def test_image_i_depends_on_seed_plus_i(results: Commands, folder: Path) -> None:
    expected = pixels(results.output("npz"))
    third = pixels(results.output("third"))
    assert third.shape == (1, 28, 28, 1)
    # To within the rounding of another batch size.
    assert np.abs(third[0] - expected[3]).max() <= 1
    assert np.abs(pixels(results.output("batches")) - expected).max() <= 1
    assert [size for _, size, _ in results["batches"].evaluations] == [2] * 6


def test_replaced_files_are_reported(results: Commands, folder: Path) -> None:
    assert re.search("^1 image .*; 1 earlier file replaced$", results["replaced"].stderr, re.MULTILINE)
    assert "replaced" not in results["folder"].stderr
    assert len(list(results.output("folder again").glob("*.png"))) == 6
    with Image.open(results.output("replaced")) as image:
        assert image.size == (28, 28)


def test_scale_of_a_grid(results: Commands) -> None:
    with Image.open(results.output("grid")) as chosen, Image.open(results.output("grid as it is")) as exact:
        assert exact.size == (3 * 30 + 2, 2 * 30 + 2)
        assert np.array_equal(np.kron(np.asarray(exact), np.ones((3, 3), np.uint8)), np.asarray(chosen))
    with Image.open(results.output("enlarged")) as image:
        assert image.size == (56, 56)


def test_single_image_is_read_back(results: Commands) -> None:
    with Image.open(results.output("single")) as image:
        assert np.array_equal(np.asarray(image), pixels(results.output("third"))[0, ..., 0])
    assert results["encode single"].code == 0, results["encode single"].stderr


def test_completed_command_samples_nothing(results: Commands) -> None:
    assert results["resumed"].evaluations == []
    assert re.search("^0 images .*; 6 of 6 are complete$", results["resumed"].stderr, re.MULTILINE)


def test_tar_shards(results: Commands, folder: Path) -> None:
    assert results["shards"].stdout == "shards.tar\n"
    assert sorted(path.name for path in folder.glob("shards*")) == [
        *("shards-000000.tar", "shards-000001.tar", "shards.tar.manifest.json"),
    ]


def test_default_output_path(results: Commands, folder: Path) -> None:
    assert results["default name"].stdout == "samples.png\n"
    assert (folder / "samples.png").is_file()


def test_timesteps_and_spacing_choose_the_timesteps(results: Commands) -> None:
    assert [t for t, _, _ in results["timesteps"].evaluations] == [900, 600, 300, 0]
    assert [t for t, _, _ in results["trailing"].evaluations] == [999, 499]


def test_eta_and_sigma_hat_add_noise(results: Commands, folder: Path) -> None:
    names = ("ten", "eta", "sigma-hat")
    for name in names:
        assert results[name].code == 0
        assert [t for t, _, _ in results[name].evaluations] == list(range(900, -1, -100))
    arrays = [pixels(results.output(name)) for name in names]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(arrays[a] - arrays[b]).mean() > 5
    pipe = DDIMPipeline.from_pretrained("mnist")
    pipe.set_progress_bar_config(disable=True)
    images = pipe.sample_images(2, num_inference_steps=10, eta=1.0, use_sigma_hat=True)
    assert np.abs(np.stack([np.asarray(image) for image in images])[..., None] - arrays[2]).max() <= 1


def test_dtype_sets_the_precision(results: Commands, folder: Path) -> None:
    """Of the weights, which the engine widens: images differ by their rounding."""
    assert {dtype for _, _, dtype in results["bfloat16"].evaluations} == {"torch.float32"}
    difference = np.abs(pixels(results.output("bfloat16")) - pixels(results.output("ten")))
    assert 0 < difference.mean() < 8


def test_only_results_go_to_stdout(results: Commands) -> None:
    for name, arguments in GOOD.items():
        assert results[name].code == 0, results[name].stderr
        assert "Traceback" not in results[name].stderr
        if arguments[0] in ("sample", "train") and "help" not in name:
            assert len(results[name].stdout.splitlines()) == 1


# --- facts


def test_info_describes_the_model(results: Commands) -> None:
    lines = results["info"].stdout.splitlines()
    assert {"model: mnist", "layout: diffusers", "parameters: 1,805,121", "unet:", "  sample_size: 28"} <= set(lines)
    assert "  prediction_type: epsilon" in lines
    facts = json.loads(results["info json"].stdout)
    pipe = DDIMPipeline.from_pretrained("mnist")
    assert facts["parameters"] == 1_805_121
    assert facts["unet"] == json.loads(json.dumps(public(pipe.unet.config)))
    assert facts["scheduler"] == public(pipe.scheduler.config)
    assert facts["weights"] == "diffusion_pytorch_model.safetensors"
    assert facts["gflop_per_image_and_step"] == round(count_flop(pipe.unet) / 1e9, 3)
    assert results["info"].stderr == results["info json"].stderr == ""
    assert not results["info"].evaluations


def flop(**settings: Any) -> int:
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        **settings,
    )  # fmt: skip
    return count_flop(network)


CONVOLUTIONS = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}


def test_flop_of_convolutions_match_a_count_by_hand() -> None:
    def convolution(inputs: int, outputs: int, size: int, kernel: int = 3) -> int:
        return 2 * inputs * outputs * kernel**2 * size**2

    def block(inputs: int, outputs: int, size: int) -> int:
        """Two convolutions, the time's projection (16 channels), and a shortcut where the channels change."""
        shortcut = convolution(inputs, outputs, size, 1) if inputs != outputs else 0
        return convolution(inputs, outputs, size) + convolution(outputs, outputs, size) + 2 * 16 * outputs + shortcut

    expected = 2 * (4 * 16 + 16 * 16)  # the time embedding
    expected += convolution(1, 4, 8) + convolution(4, 1, 8)
    expected += block(4, 4, 8) + convolution(4, 4, 4)  # down, and to half the size
    expected += block(4, 8, 4)
    expected += block(8 + 8, 8, 4) + block(8 + 4, 8, 4) + convolution(8, 8, 8)  # up, and to twice the size
    expected += block(8 + 4, 4, 8) + block(4 + 4, 4, 8)
    assert flop(**CONVOLUTIONS, mid_block_type=None) == expected


def test_flop_include_attention() -> None:
    # The middle block has 4x4 positions and 8 channels: four projections, Q K^T and its product with V.
    attention = 2 * 16 * 8 * 8 * 4 + 2 * 16 * 16 * 8 * 2
    assert flop(**CONVOLUTIONS, add_attention=True) - flop(**CONVOLUTIONS, add_attention=False) == attention


# --- training


def test_trained_model_can_be_sampled(results: Commands, folder: Path) -> None:
    code, stdout, stderr, _ = results["train"]
    assert (code, stdout) == (0, "runs/one/final\n")
    assert "12/12" in stderr
    run = folder / "runs" / "one"
    record = yaml.safe_load((run / "config.yaml").read_text())["config"]
    assert (record["optim"]["lr"], record["max_steps"], record["data"]["source"]) == (1e-3, 12, "images")
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step-00000006.png", "step-00000012.png"]
    assert json.loads(results["info trained"].stdout)["unet"]["sample_size"] == 8
    assert results["sample trained"].stdout == "trained.npz\n"
    assert pixels(results.output("sample trained")).shape == (3, 8, 8, 1)


def test_finished_training_takes_no_step(results: Commands) -> None:
    assert results["train again"].stdout == "runs/one/final\n"
    # Only the grid at the end is sampled again.
    assert {t for t, _, _ in results["train again"].evaluations} <= {0, 500}


def test_missing_training_modules_are_reported(folder: Path) -> None:
    for name in ("accelerate", "matplotlib", "yaml"):
        code = f"import sys; sys.modules[{name!r}] = None; from ddim.cli import main; main()"
        got = run_python(code, *TRAIN, "--out", "run", env=environment(folder / "home"), cwd=folder)
        assert (got.returncode, got.stdout) == (1, "")
        assert got.stderr.startswith(f"ddim: training requires {name}")
        assert got.stderr.endswith("install it with: pip install 'ddim[train]'\n")


# --- mistakes


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_reported_in_one_line(results: Commands, name: str) -> None:
    _, code, message = BAD[name]
    got = results[f"bad {name}"]
    assert (got.code, got.stdout) == (code, ""), got.stderr
    assert "Traceback" not in got.stderr
    assert re.search(message, got.stderr.replace("│", " "))
    if code == 1:
        assert len(got.stderr.splitlines()) == 1
        assert got.stderr.startswith("ddim: ")
        # An image of zeros is passed through the network to check its shapes; nothing is sampled or trained.
        assert [size for _, size, _ in got.evaluations] in ([], [1])
    else:
        assert "Usage: ddim" in got.stderr
        assert not got.evaluations


def test_mistakes_leave_nothing_behind(results: Commands, folder: Path) -> None:
    assert not (folder / "run").exists()
    assert not (folder / "missing").exists()
    assert not (folder / "x.jpg").exists()
    assert not list((folder / "empty").iterdir())


def test_separate_programs_behave_alike(results: Commands, folder: Path) -> None:
    """As in the process of the other tests."""
    for name in ("too many steps", "fractional steps"):
        assert program(folder, DDIM, *BAD[name][0])[:3] == results[f"bad {name}"][:3]
    before = hashlib.sha256(results.output("grid").read_bytes()).digest()
    code, stdout, stderr, _ = program(folder, sys.executable, "-m", "ddim", *GOOD["grid"])
    assert (code, stdout) == (0, "grid.png\n")
    assert "1 earlier file replaced" in stderr
    assert hashlib.sha256(results.output("grid").read_bytes()).digest() == before
