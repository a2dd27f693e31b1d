"""The net around the command line: every exception is one sentence and status 1; options that would be ignored."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from cli_batch import Commands as Batch
from ddim.cli import app
from ddim.cli.checks import COMMAND_CONFLICTS, COMMAND_MAXIMA, CONFLICTS, MAXIMA, NOT_EMPTY, SAMPLING
from ddim.cli.common import SamplingOptions
from ddim.cli.failures import Commands, describe
from ddim.extras import EXTRAS, missing_module
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel
from digits import TINY_MODEL
from helpers import environment, messages
from programs import run_cli, run_python

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def fail(error: BaseException) -> int:
    """Run a command that raises an exception; what it prints is captured by pytest."""
    failing = typer.Typer(cls=Commands)

    @failing.command()
    def sample() -> None:
        raise error

    @failing.callback()
    def options() -> None:
        pass

    with pytest.raises(SystemExit) as stop:
        failing(["sample"])
    if isinstance(stop.value.code, str):
        print(stop.value.code, file=sys.stderr)
        return 1
    return int(stop.value.code or 0)


class TestExceptions:
    @pytest.mark.parametrize(
        "kind",
        [
            *(ValueError, TypeError, RuntimeError, OSError, ImportError, MemoryError, EOFError, KeyError, IndexError),
            *(AttributeError, OverflowError, ZeroDivisionError, RecursionError, NotImplementedError, AssertionError),
            *(StopIteration, ArithmeticError, LookupError, BufferError, UnicodeError, torch.OutOfMemoryError),
        ],
    )
    @pytest.mark.parametrize("arguments", [(), ("two\nlines",)])
    def test_any_is_one_sentence(self, kind: type[Exception], arguments: Any, capsys: Any) -> None:
        assert fail(kind(*arguments)) == 1
        stderr = capsys.readouterr().err
        assert stderr.startswith("ddim: ")
        assert stderr.count("\n") == 1
        assert len(stderr) > len("ddim: x\n")

    def test_debugging_shows_the_traceback(self, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DDIM_DEBUG", "1")
        assert fail(KeyError("latents")) == 1
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "Traceback (most recent call last):"
        assert "raise error" in "\n".join(lines)
        assert lines[-1].startswith("ddim: unexpected error (KeyError: 'latents')")

    def test_interruption(self, capsys: Any) -> None:
        assert fail(KeyboardInterrupt()) == 130
        assert capsys.readouterr().err == "ddim: interrupted\n"

    @pytest.mark.parametrize(
        ("code", "words"),
        [
            (errno.ENOENT, "x.png does not exist"),
            (errno.EACCES, "x.png cannot be opened: you have no permission"),
            (errno.EISDIR, "x.png is a folder, not a file"),
            (errno.ENOSPC, "x.png cannot be written: the disk is full"),
            (errno.ELOOP, "x.png cannot be opened: too many levels of symbolic links"),
        ],
    )
    def test_system_errors_in_words(self, code: int, words: str) -> None:
        import os

        assert describe(OSError(code, os.strerror(code), "x.png")) == words
        assert "Errno" not in describe(OSError(code, os.strerror(code)))

    def test_missing_module_names_its_extra(self) -> None:
        error = ModuleNotFoundError("No module named 'torchmetrics.image'", name="torchmetrics.image")
        assert describe(error) == missing_module("this", "torchmetrics")
        assert describe(error).endswith("install it with: pip install 'ddim[train]'")

    def test_full_disk_behind_stdout(self, tmp_path: Path) -> None:
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "ddim", "info", "mnist"],
                env=environment(tmp_path),
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert done.returncode == 1
        assert messages(done.stderr) == ["ddim: the disk is full"]


class TestExtras:
    def test_extras_bring_their_modules(self) -> None:
        """Each extra named in a message has a package with that name, or one that brings it."""
        import re
        import tomllib

        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
        packages = {"sklearn": "scikit-learn", "yaml": "pyyaml", "torch_fidelity": "torch-fidelity"}
        packages |= {"fastapi": "gradio", "uvicorn": "gradio", "pyarrow": "datasets"}
        for module, extra in EXTRAS.items():
            listed = {re.split("[<>=]", entry)[0] for entry in project["optional-dependencies"][extra]}
            assert packages.get(module, module) in listed

    @pytest.mark.parametrize(
        ("module", "arguments"),
        [
            ("torchmetrics", ["evaluate", "x.npz", "--reference", "x.npz"]),
            ("gradio", ["app"]),
            ("accelerate", ["train", "--out", "run"]),
            ("torch_fidelity", ["evaluate", "x.npz", "--reference", "x.npz", "--features", "inception"]),
            ("datasets", ["evaluate", "owner/name", "--reference", "x.npz"]),
            ("sklearn", ["evaluate", "digits", "--reference", "x.npz"]),
        ],
    )
    def test_missing_extra(self, module: str, arguments: list[str], tmp_path: Path) -> None:
        import numpy as np

        np.savez(tmp_path / "x.npz", np.zeros((5, 8, 8), np.uint8))
        program = f"import sys; sys.modules[{module!r}] = None\nfrom ddim.cli import main\nmain()"
        done = run_python(program, *arguments, env=environment(tmp_path), cwd=tmp_path)
        assert done.returncode == 1
        (message,) = messages(done.stderr)
        assert message.endswith(f" requires {module}; install it with: pip install 'ddim[{EXTRAS[module]}]'")


REFUSED: dict[str, tuple[list[str], str]] = {
    "steps": (
        ["sample", "--steps", "5", "--timesteps", "9,0"],
        "--steps has no effect beside --timesteps; leave it out",
    ),
    "spacing": (["encode", "x.png", "--spacing", "quad", "--timesteps", "9,0"], "--spacing has no effect beside"),
    "shards": (["sample", "--shard-size", "5"], "--shard-size has no effect unless --out is x.tar"),
    "frames": (["trajectory", "--frames", "5", "--at", "9"], "--frames has no effect beside --at"),
    "grid": (["interpolate", "1", "2", "--frames", "5", "--grid", "2x2"], "--frames has no effect beside --grid"),
    "fps": (["interpolate", "1", "2", "--fps", "5"], "--fps has no effect unless --out is x.gif or x.webp"),
    "euler": (["encode", "x.png", "--euler", "--tolerance", "1e-3"], "--tolerance has no effect beside --euler"),
    "table": (["evaluate", "mnist", "--table", "1", "--order", "2"], "--order has no effect beside --table"),
    "files": (["evaluate", "x/", "--reference", "y/", "--steps", "5"], "--steps has no effect on images of files"),
    "reference count": (["evaluate", "x/", "--reference-count", "5"], "--reference-count has no effect without"),
    "heads": (
        ["convert", "x.pt", "--out", "x", "--heads", "1", "--head-channels", "8"],
        "--head-channels has no effect beside --heads",
    ),
    "dry run": (
        ["train", "--preset", "digits", "--dry-run", "--max-minutes", "1"],
        "--max-minutes has no effect beside --dry-run",
    ),
    "two lengths": (
        ["train", "--preset", "digits", "--out", "run", "--max-steps", "5", "--epochs", "1"],
        "--epochs has no effect beside --max-steps",
    ),
    "count": (["sample", "--count", str(10**11)], "--count must be an integer of at most 100000000, got 100000000000"),
    "wide": (["trajectory", "--count", "5000"], "--count must be an integer of at most 1024, got 5000"),
    "large grid": (["sample", "--count", "10000000"], "--count must be at most 342392 for a grid, got 10000000; write"),
    "frames without end": (
        ["interpolate", "1", "2", "--frames", "1000000"],
        "--frames must be an integer of at most 10000, got",
    ),
    "grid without end": (["interpolate", "1", "2", "3", "4", "--grid", "9999x9999"], "--grid must have at most 10000"),
    "tolerance": (["encode", "x.png", "--tolerance", "1e-12"], "--tolerance must be a number of at least 1e-08"),
    "auto": (["sample", "--steps", "auto", "--tolerance", "1e-12"], "--tolerance must be a number of at least 1e-08"),
    "empty out": (["sample", "--out", ""], "--out must not be empty, got ''"),
    "empty model": (["sample", ""], "MODEL must not be empty"),
    "empty served model": (["app", "mnist", ""], "MODELS must not be empty, got ''"),
    "empty configuration": (["train", "--out", "run", "--config", ""], "--config must not be empty, got ''"),
    "empty folder of a run": (["train", "--preset", "digits", "--out", ""], "--out must not be empty, got ''"),
    "empty reference": (["evaluate", "x", "--reference", ""], "--reference must not be empty"),
    "empty image": (["edit", "x.png", ""], "IMAGES must not be empty"),
    "empty point": (["interpolate", "", "1"], "POINTS must not be empty"),
    "empty source": (["direction", "", "a"], "SOURCES must not be empty"),
    "many edits": (["edit", "x.png", "-n", "2000000"], "--count must be an integer of at most 10000, got 2000000"),
    "many codes": (
        ["tune", "mnist", "--codes", "100000000", "--out", "x"],
        "--codes must be an integer from 1 to 10000",
    ),
    "seed": (["sample", "--seed", "-1"], "--seed must be an integer of at least 0, got -1"),
    "seed of edit": (["edit", "x.png", "--seed", "-1"], "--seed must be an integer of at least 0, got -1"),
    "two models": (["sample", "mnist", "--model", "other"], "give one model, got 'mnist' and --model 'other'"),
    "no model": (["tune", "--out", "x"], "give a model: mnist, mnist-labels, faces, a folder, or a hub id"),
    "run on a file": (["train", "--preset", "digits", "--out", "file"], "file is a file, not a folder"),
    "no configuration": (
        ["train", "--config", "none.yaml", "--out", "run"],
        "the configuration none.yaml cannot be read: no such file or directory",
    ),
    "wrong npz": (["decode", "x.npz"], "it has no array 'latents'"),
    "inception score": (["evaluate", "x.npz", "--metrics", "is"], "--features must be mnist or inception for the"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_work(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    arguments, expected = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", np.zeros((5, 8, 8), np.uint8))
    Path("file").touch()
    monkeypatch.setattr(sys, "argv", ["ddim", *arguments])
    before = sorted(tmp_path.iterdir())
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, SystemExit)
    message = str(result.exception.code)
    assert message.startswith("ddim: ")
    assert expected in message
    assert sorted(tmp_path.iterdir()) == before


def test_conflicts_name_parameters() -> None:
    parameters = {name: {p.name for p in command.params} for name, command in COMMANDS.items()}
    everywhere = set().union(*parameters.values())
    assert {*MAXIMA, *NOT_EMPTY, *SAMPLING, *(option for c in CONFLICTS for option in c.options)} <= everywhere
    for command, conflicts in COMMAND_CONFLICTS.items():
        assert {option for conflict in conflicts for option in conflict.options} <= parameters[command]
    for command, maxima in COMMAND_MAXIMA.items():
        assert maxima.keys() <= parameters[command]


def test_long_arguments_are_shortened(tmp_path: Path) -> None:
    before = [
        *(["sample", "--steps"], ["sample", "--timesteps"], ["sample", "--out"], ["edit"], ["info"], ["decode"]),
        *(["interpolate", "3"], ["evaluate"], ["tune", "-o", "new"], ["train", "--out", "run", "--preset"]),
        *(["train", "--out", "run", "--preset", "mnist", "--set"], ["convert", "--out", "new"], ["encode", "-m"]),
    ]
    long = ["x" * 10_000, "x/" * 5_000, f"optim.lr={'x' * 10_000}"]
    table = {f"{arguments} {value[:10]}": [*arguments, value] for arguments in before for value in long}
    with Batch(tmp_path, table) as commands:
        for name in table:
            assert commands[name].code in (1, 2), name
            assert len(commands[name].stderr) < 2000, name


class TestModels:
    @pytest.fixture
    def save(self, tmp_path: Path) -> Any:
        def save(**changes: Any) -> str:
            torch.manual_seed(0)
            DDIMPipeline(UNet2DModel(**TINY_MODEL | changes), DDIMScheduler()).save_pretrained(tmp_path / "model")
            return str(tmp_path / "model")

        return save

    @pytest.mark.parametrize("embed_type", [None, "timestep", "identity"])
    def test_class_conditional(self, save: Any, embed_type: str | None, tmp_path: Path) -> None:
        model = save(class_embed_type=embed_type, num_class_embeds=3)
        done = run_cli("info", model, env=environment(tmp_path))
        assert done.returncode == 0, done.stderr
        done = run_cli("sample", model, "--out", tmp_path / "x.png", env=environment(tmp_path))
        expected = "--label must be given: the model has 3 classes and was trained without a null class"
        if embed_type is not None:
            expected = f"{model} takes other conditions than class labels, which are supported in Python alone"
        assert messages(done.stderr) == [f"ddim: {expected}"]

    def test_non_finite_weights(self, save: Any, tmp_path: Path) -> None:
        model = save()
        pipe = DDIMPipeline.from_pretrained(model)
        with torch.no_grad():
            pipe.unet.conv_in.bias[0] = float("nan")
        pipe.save_pretrained(model)
        done = run_cli("sample", model, "--out", tmp_path / "x.png", env=environment(tmp_path))
        assert done.returncode == 1
        assert "are damaged: conv_in.bias has values that are NaN or infinite" in messages(done.stderr)[0]
        assert not (tmp_path / "x.png").exists()

    @pytest.mark.parametrize("out", ["x.png", "x.npz", "folder"])
    def test_non_finite_images(self, save: Any, tmp_path: Path, out: str) -> None:
        model = save()
        pipe = DDIMPipeline.from_pretrained(model)
        with torch.no_grad():
            pipe.unet.conv_out.weight.fill_(3e38)
        pipe.save_pretrained(model)
        done = run_cli("sample", model, "-n", "1", "--steps", "2", "--out", tmp_path / out, env=environment(tmp_path))
        assert done.returncode == 1
        assert messages(done.stderr)[-1] == (
            "ddim: images must be finite, got NaN or infinity: the network's predictions overflow"
        )
        assert not list(tmp_path.rglob("*.png"))

    @pytest.mark.parametrize(
        "arguments", [["info", "--model", "mnist"], ["info", "mnist"], ["info", "-m", "mnist", "mnist"]]
    )
    def test_option_and_argument(self, arguments: list[str]) -> None:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0
        assert "model: mnist" in result.stdout


def test_latents_name_their_model(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    torch.manual_seed(0)
    DDIMPipeline(UNet2DModel(**TINY_MODEL), DDIMScheduler()).save_pretrained(tmp_path / "tiny")
    Image.fromarray(np.full((8, 8), 100, np.uint8)).save(tmp_path / "x.png")
    where: Any = {"env": environment(tmp_path), "cwd": tmp_path}
    done = run_cli("encode", "x.png", "-m", "tiny", "--steps", "3", "-o", "x.safetensors", **where)
    assert done.returncode == 0, done.stderr
    for command in (["decode", "x.safetensors"], ["interpolate", "x.safetensors", "3", "--frames", "2"]):
        done = run_cli(*command, **where)
        assert done.returncode == 0, done.stderr
    (tmp_path / "tiny").rename(tmp_path / "moved")
    done = run_cli("decode", "x.safetensors", **where)
    assert "x.safetensors was encoded with the model 'tiny', which is not there" in messages(done.stderr)[0]
    assert run_cli("decode", "x.safetensors", "--model", "moved", **where).returncode == 0


def test_edit_adds_noise_by_default(tmp_path: Path) -> None:
    """Without a seed it is seed 0, not the encoding of the image, which gives the image back."""
    import numpy as np
    from PIL import Image

    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "x.png")
    where: Any = {"env": environment(tmp_path), "cwd": tmp_path}
    for options in (["-o", "a.npz"], ["-o", "b.npz", "--seed", "0"]):
        done = run_cli("edit", "x.png", "--steps", "4", "--strength", "1", *options, **where)
        assert done.returncode == 0, done.stderr
    a, b = (np.load(tmp_path / name)["arr_0"] for name in ("a.npz", "b.npz"))
    assert np.array_equal(a, b)
    assert a.max() > 128


def test_evaluate_works_by_default(tmp_path: Path) -> None:
    import numpy as np

    random = np.random.default_rng(0)
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", random.integers(0, 256, (8, 4, 4), np.uint8))
    done = run_cli("evaluate", "a.npz", "--reference", "b.npz", env=environment(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "features          Pixels-16-" in done.stdout
    assert "compared by the features pixels, whose distances are not those of published figures" in done.stderr


def test_noise_is_refused_before_a_second_order_model_samples() -> None:
    pipe: Any = SimpleNamespace(scheduler=DDIMScheduler(solver_order=2))
    with pytest.raises(ValueError, match=r"the model's solver_order=2 requires eta=0 .*, got eta=1; give order=1"):
        SamplingOptions(4, eta=1.0, sigma_hat=True).config(pipe)
    assert SamplingOptions(4, eta=1.0, order=1).config(pipe).order == 1
