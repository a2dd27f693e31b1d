"""Painting many pictures: how fast, by one process and by several, and in how much memory.

    python -m benchmarks.bulk [--count 2000] [--steps 20]

Each row is the whole command `ddim sample --out x.npz`, start-up and file included, in a process of its own; rows are
interleaved, medians of the rounds are printed. The files of all rows are compared byte by byte. Memory is the largest
resident size of the process (of the largest, where there are several).
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

MEMORY = ((100, 1), (10_000, 1))
"""Pictures and steps of the runs whose memory is compared."""


def paint(folder: Path, count: int, steps: int, processes: int, threads: int) -> tuple[float, float, str]:
    """Seconds, MiB of the largest process, and a hash of the file."""
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
    parser = argparse.ArgumentParser(description="Pictures a second, and memory.")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    ways = [(1, 1), (1, cores), (cores, 1)]
    print(f"built-in model, {options.count} pictures, {options.steps} steps, batches of 64")
    print(f"ddim {__version__}, torch {torch.__version__}, {platform.machine()}, {cores} cores\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds: dict[tuple[int, int], list[float]] = {way: [] for way in ways}
        hashes = set()
        for _ in range(options.rounds):
            for way in ways:
                taken, _, digest = paint(folder, options.count, options.steps, *way)
                seconds[way].append(taken)
                hashes.add(digest)
        print("| processes | threads each | seconds | pictures/s | slowest | fastest |\n|---|---|---|---|---|---|")
        for (processes, threads), values in seconds.items():
            rates = [options.count / value for value in values]
            middle = statistics.median(values)
            print(
                f"| {processes} | {threads} | {middle:.1f} | {options.count / middle:.1f} | {min(rates):.1f} "
                f"| {max(rates):.1f} |"
            )
        print(f"\nbytes: {'the same in all rows' if len(hashes) == 1 else f'{len(hashes)} different files'}\n")
        print("| pictures | steps | largest resident size, MiB |\n|---|---|---|")
        peaks = []
        for count, steps in MEMORY:
            peaks.append(paint(folder, count, steps, 1, 1)[1])
            print(f"| {count} | {steps} | {peaks[-1]:.0f} |")
        print(f"\nratio {peaks[-1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
