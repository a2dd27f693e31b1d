"""Whole-process times: imports, help, and from the shell to the first saved picture.

    python -m benchmarks.startup [--repeats 5]

Pictures are painted in 10 steps by the built-in model and by a network of the size that is usual for CIFAR-10 (random
weights), from the same folder for both libraries, by the same five lines; and by `ddim sample`. Every row is a fresh
process. Rows are interleaved, so that a machine whose speed drifts treats all alike; medians are printed. The pictures
of both libraries are compared.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.networks import save_pipeline

NETWORKS = ("mnist", "cifar10")

IMPORT = "import torch; from {} import DDIMPipeline"
PEER = """
import sys, torch
from diffusers import DDIMPipeline
pipe = DDIMPipeline.from_pretrained(sys.argv[1])
pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=10).images[0].save(sys.argv[2])
"""
OURS = PEER.replace("from diffusers", "from ddim")


def first_pictures(name: str, model: Path, folder: Path) -> dict[str, list[str]]:
    """Commands by the names of their rows; the pictures of the two libraries are ours.png and peer.png."""
    folder.mkdir()
    ours, peer, sampled = (str(folder / f"{file}.png") for file in ("ours", "peer", "sampled"))
    command = [sys.executable, "-m", "ddim", "sample", "--model", str(model), "--steps", "10", "--count", "1"]
    return {
        f"first picture, {name}: ddim": [sys.executable, "-c", OURS, str(model), ours],
        f"first picture, {name}: ddim sample": [*command, "--out", sampled],
        f"first picture, {name}: diffusers": [sys.executable, "-c", PEER, str(model), peer],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Whole-process times.")
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    rows = {
        "import torch": [sys.executable, "-c", "import torch"],
        "import ddim": [sys.executable, "-c", "import torch, ddim"],
        **{
            f"from {library} import DDIMPipeline": [sys.executable, "-c", IMPORT.format(library)]
            for library in ("ddim", "diffusers")
        },
        "ddim --help": [sys.executable, "-m", "ddim", "--help"],
    }
    differences = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in NETWORKS:
            rows |= first_pictures(name, save_pipeline(name, folder / "models"), folder / name)
        times: dict[str, list[float]] = {name: [] for name in rows}
        for repeat in range(repeats + 1):
            for name, command in rows.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                if repeat:  # The first round fills the disk cache.
                    times[name].append(time.perf_counter() - start)
        for name in NETWORKS:
            ours, peer = (np.asarray(Image.open(folder / name / f"{file}.png"), int) for file in ("ours", "peer"))
            differences[name] = np.abs(ours - peer).max()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}\n")
    print("| process | median s | fastest | slowest |\n|---|---|---|---|")
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in times.items():
        print(f"| {name} | {medians[name]:.2f} | {min(seconds):.2f} | {max(seconds):.2f} |")
    print()
    for name, difference in differences.items():
        ours, sampled, peer = (medians[f"first picture, {name}: {way}"] for way in ("ddim", "ddim sample", "diffusers"))
        print(
            f"{name}: diffusers / ddim {peer / ours:.2f}, diffusers / ddim sample {peer / sampled:.2f}; "
            f"largest difference of the two pictures: {difference} of 255"
        )


if __name__ == "__main__":
    main()
