"""Whole commands, killed by SIGKILL at random moments and started again, against the same commands uninterrupted.

    python -m tests.fuzz.kills [--kills 60] [--seed 0] [--jobs folder,npz,tar,train,tune,evaluate]

In the end all outputs must be equal to the byte, and nothing may be left over: neither beside the output, nor in the
folder of temporary files, nor in the caches, whose content may differ. A run that ends before it is killed begins anew.
Prints a line per job; the exit status is 1 if a job differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from digits import TINY_MODEL, write_digits
from helpers import BIN, environment

START_SECONDS = 2.0
"""Roughly what a command needs before its work begins."""
EARLY_SHARE = 8
"""One kill of so many comes before that."""
DONE = "holds a pipeline; give another --out"
"""How `ddim tune` refuses a folder that it has completed: a process can be killed after its last write."""


def make_jobs(model: Path, images: Path, config: Path) -> dict[str, list[str]]:
    """Return the arguments of `ddim` by the name of a job.

    Args:
        model: a pipeline folder.
        images: a folder of images.
        config: of a training run.
    """
    sample = ["sample", "--model", str(model), "--count", "600", "--steps", "30", "--batch-size", "8", "--out"]
    reference = ["--reference", str(images), "--metrics", "fid,precision", "--count", "400", "--steps", "40"]
    return {
        "folder": [*sample, "images/"],
        "npz": [*sample, "images.npz"],
        "tar": [*sample, "images.tar", "--shard-size", "160"],
        "train": ["train", "--config", str(config), "--device", "cpu", "--out", "run"],
        "tune": ["tune", str(model), "--steps", "6", "--out", "tuned"],
        "evaluate": ["evaluate", str(model), *reference, "--out", "score.json"],
    }


def start(arguments: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """Start a job in a folder, with temporary files and caches of its own below it."""
    for name in ("work", "tmp"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    kernels = folder.parents[1] / "kernels"  # compiled once
    variables = environment(folder, TMPDIR=str(folder / "tmp"), DDIM_KERNEL_CACHE=str(kernels))
    command = [str(BIN / "ddim"), *arguments]
    return subprocess.Popen(
        command, cwd=folder / "work", env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(arguments: Sequence[str], folder: Path) -> None:
    """Run a job to its end.

    Raises:
        RuntimeError: if it fails.
    """
    process = start(arguments, folder)
    _, stderr = process.communicate()
    if process.returncode and DONE not in stderr:
        raise RuntimeError(f"{' '.join(arguments)}: exit status {process.returncode}\n{stderr[-2000:]}")


def kill_at_random(arguments: Sequence[str], folder: Path, duration: float, chance: random.Random) -> bool:
    """Start a job and kill it.

    Args:
        arguments: of `ddim`.
        folder: where it runs.
        duration: of an uninterrupted run, seconds.
        chance: decides when.

    Returns:
        Whether it was still running.
    """
    is_early = chance.randrange(EARLY_SHARE) == 0
    delay = chance.uniform(0, START_SECONDS) if is_early else chance.uniform(START_SECONDS, duration)
    process = start(arguments, folder)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def contents(folder: Path) -> dict[str, str]:
    """Return a hash of every file below a folder; of those that hold times, their names alone."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): "" if _holds_times(path, folder) else hashlib.sha256(_content(path)).hexdigest()
        for path in files
        if not path.name.startswith("events.out.tfevents")
    }


def _holds_times(path: Path, folder: Path) -> bool:
    return path.relative_to(folder).parts[0] == "cache" or path.name in ("README.md", "SHA256SUMS")


def _content(path: Path) -> bytes:
    """Return the bytes of a file, without the seconds that a training run's state records."""
    content = path.read_bytes()
    if path.name != "state.json":
        return content
    state = json.loads(content)
    state.pop("seconds")
    return json.dumps(state, sort_keys=True).encode()


def compare(killed: dict[str, str], uninterrupted: dict[str, str]) -> list[str]:
    """Return a line per file that differs, is missing or was left over."""
    lines = []
    for name in sorted(killed.keys() | uninterrupted.keys()):
        if name not in killed:
            lines.append(f"missing: {name}")
        elif name not in uninterrupted:
            lines.append(f"left over: {name}")
        elif killed[name] != uninterrupted[name]:
            lines.append(f"differs: {name}")
    return lines


def run_job(
    arguments: Sequence[str], folder: Path, kills: int, chance: random.Random, report: Callable[[str], None]
) -> list[str]:
    """Run a job once without and once with kills.

    Args:
        arguments: of `ddim`.
        folder: where both run.
        kills: how often it is killed.
        chance: decides when.
        report: called with a line when it is done.

    Returns:
        What differs.
    """
    begun = time.monotonic()
    finish(arguments, folder / "uninterrupted")
    duration = time.monotonic() - begun
    struck = 0
    for _ in range(kills):
        if kill_at_random(arguments, folder / "killed", duration, chance):
            struck += 1
        else:
            shutil.rmtree(folder / "killed" / "work")
    finish(arguments, folder / "killed")
    differences = compare(contents(folder / "killed"), contents(folder / "uninterrupted"))
    files = len(contents(folder / "uninterrupted"))
    report(f"{struck} of {kills} kills struck a run of {duration:.1f} s; {files} files, {len(differences)} differ")
    return differences


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description="Kill whole commands at random moments and compare their outputs.")
    parser.add_argument("--kills", type=int, default=60, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", default="folder,npz,tar,train,tune,evaluate", help="separated by commas")
    options = parser.parse_args()
    names = options.jobs.split(",")
    faults = 0
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = write_digits(folder / "digits", 400)
        training = {
            "data": {"source": str(images)},
            "model": TINY_MODEL,
            "optim": {"warmup_steps": 10},
            "checkpoints": {"every": 7, "keep": 2},
            "samples": {"every": 20, "count": 4, "num_inference_steps": 2},
            "batch_size": 16,
            "max_steps": 60,
        }
        config = folder / "training.yaml"
        config.write_text(yaml.safe_dump(training))
        setup = folder / "setup" / "once"
        finish(["train", "--config", str(config), "--device", "cpu", "--out", "model"], setup)
        # Kernels are compiled here, so that no run's duration includes it.
        finish(["sample", "--model", "model", "--count", "8", "--steps", "2", "--out", "samples/"], setup)
        jobs = make_jobs(setup / "work" / "model" / "final", images, config)
        for number, name in enumerate(names):
            kills = options.kills // len(names) + (number < options.kills % len(names))
            chance = random.Random(f"{options.seed} {name}")
            lines = run_job(jobs[name], folder / name, kills, chance, lambda line, name=name: print(f"{name:9} {line}"))
            for line in lines:
                print(f"  {line}")
            faults += len(lines)
    print(f"{faults} differences")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
