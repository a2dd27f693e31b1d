"""Whole-process times: imports, help, and from the shell to the first saved image.

    python -m benchmarks.startup [--repeats 5]

Images are sampled in 10 steps by the built-in model and by a network of the usual size for CIFAR-10 (random weights),
from the same folder for both libraries, by the same five lines; and by `ddim sample`, also with empty caches, as on a
machine where it never ran, with and without its engine. Every row is a fresh process. Rows are interleaved, so that
drifts of the machine's speed affect all alike; medians are printed. The images of both libraries are compared.
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
DIFFUSERS = """
import sys, torch
from diffusers import DDIMPipeline
pipe = DDIMPipeline.from_pretrained(sys.argv[1])
pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=10).images[0].save(sys.argv[2])
"""
DDIM = DIFFUSERS.replace("from diffusers", "from ddim")
WITHOUT_CACHE = 'XDG_CACHE_HOME=$(mktemp -d -p "$0") DDIM_KERNEL_CACHE= exec "$@"'
"""Runs a command as the first on a machine, whose caches are empty; the first argument is a folder for them."""


def first_image_commands(name: str, model: Path, folder: Path) -> dict[str, list[str]]:
    """Return commands by row name; the images of the two libraries are `ddim.png` and `diffusers.png` in `folder`."""
    folder.mkdir()
    ours, theirs, sampled = (str(folder / f"{file}.png") for file in ("ddim", "diffusers", "sampled"))
    command = [sys.executable, "-m", "ddim", "sample", "--model", str(model), "--steps", "10", "--count", "1"]
    return {
        f"first image, {name}: ddim": [sys.executable, "-c", DDIM, str(model), ours],
        f"first image, {name}: ddim sample": [*command, "--out", sampled],
        **{
            f"first image on a machine, {name}: ddim sample {' '.join(options)}".strip(): [
                *("sh", "-c", WITHOUT_CACHE, str(folder)),
                *(*command, "--out", sampled, *options),
            ]
            for options in ((), ("--engine", "eager"))
        },
        f"first image, {name}: diffusers": [sys.executable, "-c", DIFFUSERS, str(model), theirs],
    }


def main() -> None:
    """Run all processes, interleaved, and print their times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="processes per row")
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
            rows |= first_image_commands(name, save_pipeline(name, folder / "models"), folder / name)
        times: dict[str, list[float]] = {name: [] for name in rows}
        for repeat in range(repeats + 1):
            for name, command in rows.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                if repeat:  # The first round fills the disk cache.
                    times[name].append(time.perf_counter() - start)
        for name in NETWORKS:
            ours, theirs = (
                np.asarray(Image.open(folder / name / f"{file}.png"), int) for file in ("ddim", "diffusers")
            )
            differences[name] = np.abs(ours - theirs).max()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}\n")
    print("| process | median s | fastest | slowest |\n|---|---|---|---|")
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in times.items():
        print(f"| {name} | {medians[name]:.2f} | {min(seconds):.2f} | {max(seconds):.2f} |")
    print()
    for name, difference in differences.items():
        ours, sampled, theirs = (
            medians[f"first image, {name}: {library}"] for library in ("ddim", "ddim sample", "diffusers")
        )
        print(
            f"{name}: diffusers / ddim {theirs / ours:.2f}, diffusers / ddim sample {theirs / sampled:.2f}; "
            f"largest difference of the two images: {difference} of 255"
        )


if __name__ == "__main__":
    main()
