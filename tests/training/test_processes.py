"""Several processes and machines, started by the real launchers: the same numbers as one process, another number of
processes on resuming, and processes that fail or are stopped.
"""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from torch import Tensor

from ddim.training.checkpoint import TENSOR_FILES
from ddim.training.config import validate
from ddim.training.run import train
from digits import TINY_MODEL
from helpers import BIN, environment, read_jsonl

TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "ddim", "train"]
ACCELERATE = [str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "ddim", "train"]

SETTINGS: dict[str, Any] = {
    "data": {"source": "digits", "horizontal_flip": True},
    "model": TINY_MODEL,
    "batch_size": 16,
    "max_steps": 50,
    "log_every": 1,
    "optim": {"lr": 2e-3, "warmup_steps": 5, "accumulate": 2},
    "checkpoints": {"every": 25, "keep": 2},
    "samples": {"every": 25, "count": 1, "num_inference_steps": 1},
    "evaluate": {"every": 30, "count": 4, "num_inference_steps": 1},
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
    """The configuration as a file."""
    path = tmp_path_factory.mktemp("settings") / "mine.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


def command(launcher: list[str], settings: Path, out: Path, *options: str) -> list[str]:
    return [*launcher, "--config", str(settings), "--out", str(out), "--device", "cpu", *options]


def run(arguments: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=180)


def finish(arguments: list[str], env: dict[str, str], out: Path) -> None:
    """Run to the end; only the main process prints the path of the result."""
    done = run(arguments, env)
    assert (done.returncode, done.stdout) == (0, f"{out / 'final'}\n"), done.stderr


def losses(out: Path) -> list[float]:
    lines = [line for line in read_jsonl(out / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def ema_weights(out: Path, step: int) -> dict[str, Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:08d}" / TENSOR_FILES["ema"])


def max_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of any weight."""
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def train_single(out: Path, max_steps: int = 50) -> None:
    """Train in this process."""
    assert train(validate(SETTINGS | {"max_steps": max_steps}), out, "cpu") == out / "final"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("single") / "run"
    train_single(out)
    return out


@pytest.fixture(scope="module")
def pair(env: dict[str, str], settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes."""
    out = tmp_path_factory.mktemp("pair") / "run"
    finish(command(TORCHRUN, settings, out), env, out)
    return out


def test_two_processes_match_one(single: Path, pair: Path) -> None:
    assert len(losses(single)) == 50
    assert losses(single)[0] > 2 * losses(single)[-1]
    assert losses(pair) == pytest.approx(losses(single), abs=1e-5)
    assert max_difference(ema_weights(single, 50), ema_weights(pair, 50)) < 1e-4


def test_resumes_with_another_number_of_processes(
    single: Path, env: dict[str, str], settings: Path, tmp_path: Path
) -> None:
    """One process, then two that `accelerate` starts, then one."""
    out = tmp_path / "run"
    train_single(out, 15)
    finish(command(ACCELERATE, settings, out, "--max-steps", "35"), env, out)
    train_single(out)
    assert losses(out) == pytest.approx(losses(single), abs=1e-5)
    assert max_difference(ema_weights(single, 50), ema_weights(out, 50)) < 1e-4


def test_two_machines_train_and_one_writes(single: Path, env: dict[str, str], settings: Path, tmp_path: Path) -> None:
    """Each has its own folder; the second gets the checkpoint from the first."""
    train_single(tmp_path / "0", 20)
    port = free_port()
    machines = []
    for rank in ("0", "1"):
        launcher = [str(BIN / "torchrun"), "--nnodes", "2", "--node-rank", rank, "--nproc-per-node", "1"]
        launcher += ["--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "ddim", "train"]
        arguments = command(launcher, settings, tmp_path / rank, "--max-steps", "30")
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        machines.append(subprocess.Popen(arguments, env=env, **streams))
    ends = [(process.communicate(timeout=180)[0], process.returncode) for process in machines]
    assert ends == [(f"{tmp_path / '0' / 'final'}\n", 0), ("", 0)]
    assert not (tmp_path / "1").exists()
    assert losses(tmp_path / "0") == pytest.approx(losses(single)[:30], abs=1e-5)


def test_failure_of_one_process_ends_all(env: dict[str, str], settings: Path, tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", str(script), "train"]
    done = run(command(launcher, settings, tmp_path / "run"), env)
    assert done.returncode == 1
    assert "ddim: the disk of this machine is on fire" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "run" / "final").exists()


def test_resumes_after_sigterm_to_the_launcher(
    env: dict[str, str], settings: Path, tmp_path: Path, single: Path
) -> None:
    out = tmp_path / "run"
    arguments = command(TORCHRUN, settings, out, "--max-steps", "5000")
    with subprocess.Popen(arguments, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as p:
        deadline = time.monotonic() + 120
        metrics = out / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size) and p.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        p.send_signal(signal.SIGTERM)
        stderr = p.communicate(timeout=60)[1]
    assert p.returncode != 0
    saved = max((out / "checkpoints").iterdir())
    step = int(saved.name.removeprefix("step-"))
    assert f"ddim: stopped by SIGTERM after step {step}; saved {saved}; run again to resume" in stderr
    assert len(losses(out)) == step
    if step < 50:
        train_single(out)
        assert losses(out) == pytest.approx(losses(single), abs=1e-5)


def test_indivisible_batch_raises(env: dict[str, str], settings: Path, tmp_path: Path) -> None:
    done = run(command(TORCHRUN, settings, tmp_path / "run", "--batch-size", "18"), env)
    assert done.returncode == 1
    assert re.search(
        r"--batch-size must be a multiple of 4 \(processes: 2, optim\.accumulate: 2\), got 18", done.stderr
    )
    assert not (tmp_path / "run").exists()
