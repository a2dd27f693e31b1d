"""Several processes and machines, started by the real launchers: the same numbers as one process, runs that change
their number of processes, and what happens when a process fails or is told to stop.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from torch import Tensor

from ddim.training.config import validate
from ddim.training.run import train
from digits import TINY_MODEL

BIN = Path(sys.executable).parent
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

compute = Trainer._compute_gradients

def fail(self, images):
    if os.environ["RANK"] == "1" and self.step == 7:
        raise RuntimeError("the disk of this machine is on fire")
    compute(self, images)

Trainer._compute_gradients = fail
main()
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One thread a process, caches of their own."""
    home = tmp_path_factory.mktemp("home")
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home / "cache")}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration as a file."""
    path = tmp_path_factory.mktemp("settings") / "mine.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


def command(launcher: list[str], settings: Path, out: Path, *more: str) -> list[str]:
    return [*launcher, "--config", str(settings), "--out", str(out), "--device", "cpu", *more]


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=180)


def finish(arguments: list[str], environment: dict[str, str], out: Path) -> None:
    """Run to the end; the result's path is printed once, by the main process."""
    done = run(arguments, environment)
    assert (done.returncode, done.stdout) == (0, f"{out / 'final'}\n"), done.stderr


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def averages(out: Path, step: int) -> dict[str, Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:08d}" / "ema.safetensors")


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of any weight."""
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def train_alone(out: Path, max_steps: int = 50) -> None:
    """The run of one process: this one."""
    assert train(validate(SETTINGS | {"max_steps": max_steps}), out, "cpu") == out / "final"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train_alone(out)
    return out


@pytest.fixture(scope="module")
def together(environment: dict[str, str], settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes."""
    out = tmp_path_factory.mktemp("together") / "run"
    finish(command(TORCHRUN, settings, out), environment, out)
    return out


def test_two_processes_have_the_loss_curve_of_one(alone: Path, together: Path) -> None:
    assert len(losses(alone)) == 50
    assert losses(alone)[0] > 2 * losses(alone)[-1]
    assert losses(together) == pytest.approx(losses(alone), abs=1e-5)
    assert apart(averages(alone, 50), averages(together, 50)) < 1e-4


def test_a_run_goes_on_with_another_number_of_processes(
    alone: Path, environment: dict[str, str], settings: Path, tmp_path: Path
) -> None:
    """One, then two that `accelerate` starts, then one again."""
    out = tmp_path / "run"
    train_alone(out, 15)
    finish(command(ACCELERATE, settings, out, "--max-steps", "35"), environment, out)
    train_alone(out)
    assert losses(out) == pytest.approx(losses(alone), abs=1e-5)
    assert apart(averages(alone, 50), averages(out, 50)) < 1e-4


def test_two_machines_meet_and_one_of_them_writes(
    alone: Path, environment: dict[str, str], settings: Path, tmp_path: Path
) -> None:
    """Each has a folder of its own; the second is told by the first where the run stands."""
    train_alone(tmp_path / "0", 20)
    port = free_port()
    machines = []
    for rank in ("0", "1"):
        launcher = [str(BIN / "torchrun"), "--nnodes", "2", "--node-rank", rank, "--nproc-per-node", "1"]
        launcher += ["--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "ddim", "train"]
        arguments = command(launcher, settings, tmp_path / rank, "--max-steps", "30")
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        machines.append(subprocess.Popen(arguments, env=environment, **streams))
    ends = [(process.communicate(timeout=180)[0], process.returncode) for process in machines]
    assert ends == [(f"{tmp_path / '0' / 'final'}\n", 0), ("", 0)]
    assert not (tmp_path / "1").exists()
    assert losses(tmp_path / "0") == pytest.approx(losses(alone)[:30], abs=1e-5)


def test_one_that_fails_ends_all_and_is_heard(environment: dict[str, str], settings: Path, tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", str(script), "train"]
    done = run(command(launcher, settings, tmp_path / "run"), environment)
    assert done.returncode == 1
    assert "ddim: the disk of this machine is on fire" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "run" / "final").exists()


def test_sigterm_to_the_launcher_saves_and_the_run_goes_on(
    environment: dict[str, str], settings: Path, tmp_path: Path, alone: Path
) -> None:
    out = tmp_path / "run"
    arguments = command(TORCHRUN, settings, out, "--max-steps", "5000")
    with subprocess.Popen(
        arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as p:
        deadline = time.monotonic() + 120
        metrics = out / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size) and p.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        p.send_signal(signal.SIGTERM)
        stderr = p.communicate(timeout=60)[1]
    assert p.returncode != 0
    saved = max((out / "checkpoints").iterdir())
    step = int(saved.name.removeprefix("step-"))
    assert (
        f"ddim: stopped by SIGTERM after step {step}; {saved} is saved, the same command goes on from there" in stderr
    )
    assert len(losses(out)) == step
    if step < 50:
        train_alone(out)
        assert losses(out) == pytest.approx(losses(alone), abs=1e-5)


def test_a_batch_that_cannot_be_divided_is_refused(environment: dict[str, str], settings: Path, tmp_path: Path) -> None:
    done = run(command(TORCHRUN, settings, tmp_path / "run", "--batch-size", "18"), environment)
    assert done.returncode == 1
    assert "batch_size is 18; 2 processes and optim.accumulate 2 want a multiple of 4" in done.stderr
    assert not (tmp_path / "run").exists()
