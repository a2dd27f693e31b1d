"""Whole-process times: imports, help, and from the shell to the first saved picture.

    python -m benchmarks.startup [--repeats 5]

Every row is a fresh process. Rows are interleaved, so that a machine whose speed drifts treats all alike; medians are
printed. Before timing, the pictures of both libraries are compared.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from PIL import Image

from ddim.hub import builtin_models

PEER = """
import sys, torch
from diffusers import DDIMPipeline
pipe = DDIMPipeline.from_pretrained(sys.argv[1])
pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=10).images[0].save(sys.argv[2])
"""
OURS = PEER.replace("from diffusers", "from ddim")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    model = str(builtin_models()["mnist"])
    with tempfile.TemporaryDirectory() as folder:
        ours, peer = f"{folder}/ours.png", f"{folder}/peer.png"
        rows = {
            "import torch": [sys.executable, "-c", "import torch"],
            "import ddim": [sys.executable, "-c", "import torch, ddim"],
            "from ddim import DDIMPipeline": [sys.executable, "-c", "import torch; from ddim import DDIMPipeline"],
            "from diffusers import DDIMPipeline": [
                sys.executable,
                "-c",
                "import torch; from diffusers import DDIMPipeline",
            ],
            "ddim --help": [sys.executable, "-m", "ddim", "--help"],
            "first picture, 10 steps: ddim": [sys.executable, "-c", OURS, model, ours],
            "first picture, 10 steps: diffusers": [sys.executable, "-c", PEER, model, peer],
        }
        times: dict[str, list[float]] = {name: [] for name in rows}
        for repeat in range(repeats + 1):
            for name, command in rows.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                if repeat:  # The first round fills the disk cache.
                    times[name].append(time.perf_counter() - start)
        pixels = [np.asarray(Image.open(path), int) for path in (ours, peer)]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"largest difference of the two pictures: {np.abs(pixels[0] - pixels[1]).max()} of 255\n")
    print("| process | median s | fastest | slowest |\n|---|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} | {max(seconds):.2f} |")


if __name__ == "__main__":
    main()
