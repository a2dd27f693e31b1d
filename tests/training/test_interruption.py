"""`ddim train`, killed again and again in the middle of its work, against the same run in one piece: not a bit of the
result, of the state of the optimiser or of the metrics may differ.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ddim.training.checkpoint import load_checkpoint, newest_first, step_of
from ddim.training.config import TrainConfig
from ddim.training.run import train

STEPS, CHECKPOINT_EVERY, LOG_EVERY = 120, 7, 3


@pytest.fixture(scope="module")
def config(make_config: Callable[..., TrainConfig]) -> TrainConfig:
    """Everything that draws random numbers, and lines and checkpoints out of step."""
    return make_config(
        model={"dropout": 0.2},
        data={"horizontal_flip": True, "crop": "random", "holdout": 8},
        optim={"warmup_steps": 20, "decay": "linear"},
        evaluate={"every": 20, "count": 0},
        checkpoints={"every": CHECKPOINT_EVERY, "keep": 2},
        log_every=LOG_EVERY,
        max_steps=STEPS,
        seed=11,
    )


@pytest.fixture
def begin(config: TrainConfig, tmp_path: Path) -> Callable[[Path], subprocess.Popen[str]]:
    """Start the command for a folder, always with the same arguments."""
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [str(Path(sys.executable).parent / "ddim"), "train", "--config", str(file), "--device", "cpu", "--out"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }

    def start(out: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, str(out)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


def last_line(out: Path) -> int:
    """The step of the last whole line of the metrics."""
    path = out / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in whole if line.endswith("\n")), default=0)


def written(out: Path) -> int:
    """When the metrics were written last, in nanoseconds."""
    path = out / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0


def first_step(stderr: str) -> int:
    """The step at which a run was taken up, by its progress bar."""
    return int(re.findall(rf"(\d+)/{STEPS}", stderr)[0])


def test_a_run_that_is_killed_again_and_again_is_the_run_in_one(
    config: TrainConfig, begin: Callable[[Path], subprocess.Popen[str]], tmp_path: Path
) -> None:
    chance, out, straight = random.Random(0), tmp_path / "run", tmp_path / "straight"
    newest = 0
    targets = sorted(chance.sample(range(3, STEPS - 40), 5))
    numbers = [signal.SIGKILL] * 5 + [signal.SIGTERM]
    for number, target in zip(numbers, [*targets, STEPS - 25], strict=True):
        left = written(out)
        with begin(out) as process:
            deadline = time.monotonic() + 120
            # Lines may be there that the run before wrote after its last checkpoint.
            while (
                (written(out) == left or last_line(out) < max(target, newest + 1))
                and process.poll() is None
                and time.monotonic() < deadline
            ):
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.05))
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stdout) == (1 if number == signal.SIGTERM else -number, ""), stderr
        # It went on where the last whole checkpoint was.
        assert first_step(stderr) == newest
        there = newest_first(out / "checkpoints")
        done = last_line(out)
        if number == signal.SIGTERM:
            told = [line for line in stderr.replace("\r", "\n").splitlines() if line.startswith("ddim: stopped")]
            assert told == [
                f"ddim: stopped by SIGTERM after step {step_of(there[0])}; {there[0]} is saved, the same command goes "
                "on from there"
            ]
            assert "Traceback" not in stderr
        newest = step_of(there[0]) if there else 0
        assert all(load_checkpoint(path).step == step_of(path) for path in there)
        # No more than the steps since it are lost.
        assert newest <= done + LOG_EVERY
        assert done < newest + CHECKPOINT_EVERY + LOG_EVERY
        assert not (out / "final").exists()

    for folder in (out, straight):
        train(config, folder, "cpu")
    assert (out / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    checkpoints = [path.name for path in newest_first(straight / "checkpoints")]
    assert checkpoints == [f"step-{STEPS:08d}", f"step-{STEPS // CHECKPOINT_EVERY * CHECKPOINT_EVERY:08d}"]
    # Nothing half written is left either.
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == sorted(checkpoints)
    for name in checkpoints:
        ours, theirs = (folder / "checkpoints" / name for folder in (out, straight))
        for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
            assert (ours / file).read_bytes() == (theirs / file).read_bytes()
        states = [json.loads((path / "state.json").read_text()) for path in (ours, theirs)]
        assert all(state.pop("seconds") > 0 for state in states)
        assert states[0] == states[1]
    for name in ("samples.png", "loss.png", "unet/config.json", "scheduler/scheduler_config.json"):
        assert (out / "final" / name).read_bytes() == (straight / "final" / name).read_bytes()
