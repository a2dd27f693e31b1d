"""`ddim train`, killed repeatedly, against the same run without interruption: no bit of the result, of the optimizer's
state or of the metrics may differ.
"""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ddim.io.runs import checkpoint_step, list_checkpoints
from ddim.training.checkpoint import TENSOR_FILES, load_checkpoint
from ddim.training.config import TrainConfig
from ddim.training.run import train
from helpers import environment, file_names, messages
from programs import Program, start_cli

STEPS, CHECKPOINT_EVERY, LOG_EVERY = 110, 7, 3
LAST_INTERRUPTED = 45  # long before the end, which a process that waits for the processor may miss


@pytest.fixture(scope="module")
def config(make_config: Callable[..., TrainConfig]) -> TrainConfig:
    """Everything that draws random numbers, with lines and checkpoints at different steps."""
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
def begin(config: TrainConfig, tmp_path: Path) -> Callable[[Path], Program]:
    """Start the command for a folder, always with the same arguments."""
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = ["train", "--config", str(file), "--device", "cpu", "--out"]
    return lambda out: start_cli(*command, out, env=environment(tmp_path))


def last_line(out: Path) -> int:
    """The step of the last complete line of the metrics."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def modified_ns(out: Path) -> int:
    """When the metrics were last modified, in nanoseconds."""
    path = out / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0


def first_step(stderr: str) -> int:
    """The step at which a run resumed, by its progress bar."""
    return int(re.findall(rf"(\d+)/{STEPS}", stderr)[0])


def test_killed_run_equals_uninterrupted_run(
    config: TrainConfig, begin: Callable[[Path], Program], tmp_path: Path
) -> None:
    rng, out, uninterrupted = random.Random(0), tmp_path / "run", tmp_path / "uninterrupted"
    newest = 0
    targets = sorted(rng.sample(range(3, LAST_INTERRUPTED - 15), 3))
    numbers = [signal.SIGKILL] * 3 + [signal.SIGTERM]
    for number, target in zip(numbers, [*targets, LAST_INTERRUPTED], strict=True):
        last_modified = modified_ns(out)
        with begin(out) as process:
            deadline = time.monotonic() + 120
            # The previous process may have written lines after its last checkpoint.
            while (
                (modified_ns(out) == last_modified or last_line(out) < max(target, newest + 1))
                and process.poll() is None
                and time.monotonic() < deadline
            ):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(number)
            stdout, stderr = process.communicate()
        assert (process.returncode, stdout) == (1 if number == signal.SIGTERM else -number, ""), stderr
        # It resumed from the last complete checkpoint.
        assert first_step(stderr) == newest
        checkpoints = list_checkpoints(out / "checkpoints")
        logged = last_line(out)
        if number == signal.SIGTERM:
            stopped = [line for line in messages(stderr) if line.startswith("ddim: stopped")]
            step = checkpoint_step(checkpoints[0])
            assert stopped == [
                f"ddim: stopped by SIGTERM after step {step}; saved {checkpoints[0]}; run again to resume"
            ]
            assert "Traceback" not in stderr
        newest = checkpoint_step(checkpoints[0]) if checkpoints else 0
        assert all(load_checkpoint(path).step == checkpoint_step(path) for path in checkpoints)
        # Only the steps since are lost.
        assert newest <= logged + LOG_EVERY
        assert logged < newest + CHECKPOINT_EVERY + LOG_EVERY
        assert not (out / "final").exists()

    for folder in (out, uninterrupted):
        train(config, folder, "cpu")
    assert (out / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
    assert file_names(out / "averages") == file_names(uninterrupted / "averages")
    for path in (uninterrupted / "averages").iterdir():
        assert (out / "averages" / path.name).read_bytes() == path.read_bytes()
    names = [path.name for path in list_checkpoints(uninterrupted / "checkpoints")]
    assert names == [f"step-{STEPS:08d}", f"step-{STEPS // CHECKPOINT_EVERY * CHECKPOINT_EVERY:08d}"]
    # Nor is anything partial left.
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == sorted(names)
    for name in names:
        ours, theirs = (folder / "checkpoints" / name for folder in (out, uninterrupted))
        for file in TENSOR_FILES.values():
            assert (ours / file).read_bytes() == (theirs / file).read_bytes()
        states = [json.loads((path / "state.json").read_text()) for path in (ours, theirs)]
        assert all(state.pop("seconds") > 0 for state in states)
        assert states[0] == states[1]
    for name in ("samples.png", "loss.png", "unet/config.json", "scheduler/scheduler_config.json"):
        assert (out / "final" / name).read_bytes() == (uninterrupted / "final" / name).read_bytes()
