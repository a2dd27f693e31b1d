"""Several processes and machines: the same numbers as one process, another number of processes on resuming, and
processes that fail or are stopped, as the launchers `torchrun` and `accelerate` see them.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from torch import Tensor

import ddim
from ddim.training.checkpoint import TENSOR_FILES
from ddim.training.config import validate
from ddim.training.run import train
from digits import TINY_MODEL, write_digits
from helpers import environment, messages, read_jsonl
from programs import free_port, launcher_environment, run_pair, run_python, start_cli, start_torchrun

# Forked from a launcher that has imported everything; those of `accelerate` are not.
TORCHRUN = ["--standalone", "--nproc-per-node", "2", "--start-method", "fork", "--run-path"]
ACCELERATE = ["launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "ddim", "train"]

SETTINGS: dict[str, Any] = {
    "model": TINY_MODEL
    | {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]},
    "batch_size": 16,
    "max_steps": 30,
    "log_every": 1,
    "optim": {"lr": 1e-2, "warmup_steps": 5, "accumulate": 2},
    "checkpoints": {"every": 15, "keep": 2},
    "samples": {"every": 15, "count": 1, "num_inference_steps": 1},
    "evaluate": {"every": 20, "count": 4, "num_inference_steps": 1},
}

FAILING = """
import os
from ddim.cli import main
from ddim.training.trainer import Trainer

compute = Trainer.compute_gradients

def fail(self, images):
    if os.environ["RANK"] == "1" and self.step == 7:
        raise RuntimeError("the disk of this machine is on fire")
    compute(self, images)

Trainer.compute_gradients = fail
main()
"""


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of all processes."""
    return environment(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration as a file, of images in a folder: reading them imports nothing large."""
    folder = tmp_path_factory.mktemp("settings")
    data = {"source": str(write_digits(folder / "images", 200)), "horizontal_flip": True}
    (folder / "mine.yaml").write_text(yaml.safe_dump(SETTINGS | {"data": data}))
    return folder / "mine.yaml"


def command(launcher: list[str], settings: Path, out: Path, *options: str) -> list[str]:
    return [*launcher, "--config", str(settings), "--out", str(out), "--device", "cpu", *options]


def losses(out: Path) -> list[float]:
    lines = [line for line in read_jsonl(out / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def ema_weights(out: Path, step: int) -> dict[str, Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:08d}" / TENSOR_FILES["ema"])


def max_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of any weight."""
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def train_single(settings: Path, out: Path, max_steps: int = 30) -> None:
    """Train in this process."""
    config = validate(yaml.safe_load(settings.read_text()) | {"max_steps": max_steps})
    assert train(config, out, "cpu") == out / "final"


@pytest.fixture(scope="module")
def single(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("single") / "run"
    train_single(settings, out)
    return out


@pytest.fixture(scope="module")
def pair(env: dict[str, str], settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes."""
    out = tmp_path_factory.mktemp("pair") / "run"
    first, second = run_pair(*command(["train"], settings, out), env=env)
    assert (first.returncode, first.stdout) == (0, f"{out / 'final'}\n"), first.stderr
    assert (second.returncode, second.stdout) == (0, ""), second.stderr
    return out


def test_two_processes_match_one(single: Path, pair: Path) -> None:
    assert len(losses(single)) == 30
    assert losses(single)[0] > 2 * losses(single)[-1]
    assert losses(pair) == pytest.approx(losses(single), abs=1e-5)
    assert max_difference(ema_weights(single, 30), ema_weights(pair, 30)) < 1e-4


def test_two_processes_match_one_with_labels(env: dict[str, str], tmp_path: Path) -> None:
    images = write_digits(tmp_path / "images", 60)
    for index, path in enumerate(sorted(images.glob("*.png"))):
        folder = images / f"class-{min(index % 5, 2)}"
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)
    data = {"source": str(images), "labels": "auto", "balanced": True}
    labeled = SETTINGS | {"data": data, "max_steps": 8, "checkpoints": {"every": 8}, "evaluate": {"every": 0}}
    (tmp_path / "labels.yaml").write_text(yaml.safe_dump(labeled))
    train_single(tmp_path / "labels.yaml", tmp_path / "single", 8)
    for done in run_pair(*command(["train"], tmp_path / "labels.yaml", tmp_path / "pair"), env=env):
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "pair") == pytest.approx(losses(tmp_path / "single"), abs=1e-5)
    assert max_difference(*(ema_weights(tmp_path / run, 8) for run in ("single", "pair"))) < 1e-4


def test_resumes_with_another_number_of_processes(
    single: Path, env: dict[str, str], settings: Path, tmp_path: Path
) -> None:
    """One process, then two that `accelerate` starts, then one."""
    out = tmp_path / "run"
    train_single(settings, out, 10)
    launch = "from accelerate.commands.accelerate_cli import main; main()"
    done = run_python(launch, *command(ACCELERATE, settings, out, "--max-steps", "18"), env=env)
    # Only the main process prints the path of the result.
    assert (done.returncode, done.stdout) == (0, f"{out / 'final'}\n"), done.stderr
    train_single(settings, out)
    assert losses(out) == pytest.approx(losses(single), abs=1e-5)
    assert max_difference(ema_weights(single, 30), ema_weights(out, 30)) < 1e-4


def test_two_machines_train_and_one_writes(single: Path, env: dict[str, str], settings: Path, tmp_path: Path) -> None:
    """Each has its own folder; the second gets the checkpoint from the first."""
    train_single(settings, tmp_path / "0", 12)
    port = free_port()
    machines = []
    for rank in range(2):
        arguments = command(["train"], settings, tmp_path / str(rank), "--max-steps", "22")
        variables = launcher_environment(rank, 2, port, machines=2)
        machines.append(start_cli(*arguments, env=env | variables))
    ends = [(program.communicate()[0], program.returncode) for program in machines]
    assert ends == [(f"{tmp_path / '0' / 'final'}\n", 0), ("", 0)]
    assert not (tmp_path / "1").exists()
    assert losses(tmp_path / "0") == pytest.approx(losses(single)[:22], abs=1e-5)


def test_failure_of_one_process_ends_all(env: dict[str, str], settings: Path, tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    arguments = command([*TORCHRUN, str(script), "train"], settings, tmp_path / "run")
    with start_torchrun(*arguments, env=env) as program:
        stdout, stderr = program.communicate()
    assert program.returncode == 1
    assert "ddim: the disk of this machine is on fire" in stderr
    assert stdout == ""
    assert not (tmp_path / "run" / "final").exists()


def test_resumes_after_sigterm_to_the_launcher(
    env: dict[str, str], settings: Path, tmp_path: Path, single: Path
) -> None:
    out = tmp_path / "run"
    script = str(Path(ddim.__file__).with_name("__main__.py"))
    arguments = command([*TORCHRUN, script, "train"], settings, out, "--max-steps", "5000")
    with start_torchrun(*arguments, env=env) as p:
        deadline = time.monotonic() + 120
        metrics = out / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size) and p.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        p.send_signal(signal.SIGTERM)
        stderr = p.communicate()[1]
    assert p.returncode != 0
    saved = max((out / "checkpoints").iterdir())
    step = int(saved.name.removeprefix("step-"))
    assert f"ddim: stopped by SIGTERM after step {step}; saved {saved}; run again to resume" in stderr
    assert len(losses(out)) == step
    if step <= 25:
        train_single(settings, out, step + 5)
        assert losses(out) == pytest.approx(losses(single)[: step + 5], abs=1e-5)


def test_indivisible_batch_raises(env: dict[str, str], settings: Path, tmp_path: Path) -> None:
    for done in run_pair(*command(["train"], settings, tmp_path / "run", "--batch-size", "18"), env=env):
        assert done.returncode == 1
        assert messages(done.stderr) == [
            "ddim: --batch-size must be a multiple of 4 (processes: 2, optim.accumulate: 2), got 18"
        ]
    assert not (tmp_path / "run").exists()
