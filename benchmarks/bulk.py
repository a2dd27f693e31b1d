"""Bulk sampling: images per second by one process and by several, and memory.

    python -m benchmarks.bulk [--count 2000] [--steps 20]

Each row is the whole command `ddim sample --out x.npz`, startup and file included, in a fresh process; rows are
interleaved, and medians of the rounds are printed. The files of all rows are compared byte by byte. Memory is the peak
resident size of the process (of the largest, if there are several).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ddim.version import __version__

MEMORY_RUNS = ((100, 1), (10_000, 1))
"""Images and steps of the runs whose memory is compared."""


def run_sample(folder: Path, count: int, steps: int, processes: int, threads: int) -> tuple[float, float, str]:
    """Run `ddim sample`; return the seconds, the MiB of the largest process, and a hash of the file."""
    out = folder / f"{count}-{processes}-{threads}.npz"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "ddim", "sample", "--device", "cpu"]
    command += ["-n", str(count), "--steps", str(steps), "--out", str(out), "--overwrite"][
        : -1 if processes > 1 else None
    ]
    for file in folder.glob(f"{out.name}*"):
        file.unlink()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise RuntimeError(f"{' '.join(command)} failed")
    return seconds, usage.ru_maxrss / 1024, hashlib.sha256(out.read_bytes()).hexdigest()


def main() -> None:
    """Run all rows, interleaved, and print rates and memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="images per run")
    parser.add_argument("--steps", type=int, default=20, help="steps per image")
    parser.add_argument("--rounds", type=int, default=3, help="runs per row")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    layouts = [(1, 1), (1, cores), (cores, 1)]
    print(f"built-in model, {options.count} images, {options.steps} steps, batches of 64")
    print(f"ddim {__version__}, torch {torch.__version__}, {platform.machine()}, {cores} cores\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds: dict[tuple[int, int], list[float]] = {layout: [] for layout in layouts}
        hashes = set()
        for _ in range(options.rounds):
            for layout in layouts:
                elapsed, _, digest = run_sample(folder, options.count, options.steps, *layout)
                seconds[layout].append(elapsed)
                hashes.add(digest)
        print("| processes | threads each | seconds | images/s | slowest | fastest |\n|---|---|---|---|---|---|")
        for (processes, threads), values in seconds.items():
            rates = [options.count / value for value in values]
            median = statistics.median(values)
            print(
                f"| {processes} | {threads} | {median:.1f} | {options.count / median:.1f} | {min(rates):.1f} "
                f"| {max(rates):.1f} |"
            )
        print(f"\nbytes: {'the same in all rows' if len(hashes) == 1 else f'{len(hashes)} different files'}\n")
        print("| images | steps | peak resident size, MiB |\n|---|---|---|")
        peaks = []
        for count, steps in MEMORY_RUNS:
            peaks.append(run_sample(folder, count, steps, 1, 1)[1])
            print(f"| {count} | {steps} | {peaks[-1]:.0f} |")
        print(f"\nratio {peaks[-1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
