"""Time of the static page of docs/browser in Chromium, and its images beside those of the library.

    python -m benchmarks.browser --model mnist --steps 20 --count 16
    python -m benchmarks.browser --model faces --steps 4 --count 4 --runtime node_modules/onnxruntime-web

The page is built with the model's loop, served from this machine alone, and sampled from `--repeats` times after a
first time, which loads the model. Shown are the median seconds from pressing Sample to the drawn images, the first
time, and the largest difference of a byte from the images of the same seeds in Python. Requires Debian's chromium;
without `--runtime` npm fetches it.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from playwright.sync_api import Page, sync_playwright

from ddim import DDIMPipeline

ROOT = Path(__file__).parents[1]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A handler that writes no log."""

    def log_message(self, *args: object) -> None:
        """Write nothing."""


@contextmanager
def serve(site: Path) -> Iterator[str]:
    """Serve a folder on this machine, and return its address."""
    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def time_sampling(page: Page, count: int, steps: int) -> float:
    """Press Sample, and return the seconds until the images are drawn."""
    page.evaluate("document.getElementById('images').removeAttribute('data-bytes')")
    started = time.perf_counter()
    page.get_by_role("button", name="Sample").click()
    page.locator("canvas[data-bytes]").wait_for()
    page.get_by_text(f"{count} images in {steps} steps.").wait_for()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print a table."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mnist")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--runtime", type=Path, help="folder of the npm package onnxruntime-web")
    args = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("benchmarks.browser: install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        command = [sys.executable, ROOT / "scripts/browser_page.py", args.model, "--out", folder]
        runtime = [] if args.runtime is None else ["--runtime", args.runtime]
        subprocess.run([*command, "--steps", str(args.steps), *runtime], check=True)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(300_000)
        with serve(Path(folder)) as address:
            page.goto(address)
            page.get_by_role("option", name=args.model, exact=True).wait_for(state="attached")
            page.get_by_label("Images", exact=True).fill(str(args.count))
            first = time_sampling(page, args.count, args.steps)
            seconds = statistics.median(time_sampling(page, args.count, args.steps) for _ in range(args.repeats))
            pixels = np.array(json.loads(page.locator("canvas").get_attribute("data-bytes") or ""))
            seed, threads = page.get_by_label("Seed", exact=True).input_value(), page.evaluate("crossOriginIsolated")
            version = browser.version
        browser.close()
    pipe = DDIMPipeline.from_pretrained(args.model)
    images = pipe.sample_images(args.count, seed=int(seed), num_inference_steps=args.steps)
    expected = np.stack([np.asarray(image) for image in images]).reshape(args.count, *pipe.sample_shape[1:], -1)
    difference = np.abs(pixels.reshape(args.count, *pipe.sample_shape) - expected.transpose(0, 3, 1, 2)).max()
    print(f"Chromium {version}, {'several threads' if threads else 'one thread'}\n")
    print(
        "| model | images | steps | seconds | the first time | largest difference of 255 |\n|---|---|---|---|---|---|"
    )
    print(f"| {args.model} | {args.count} | {args.steps} | {seconds:.2f} | {first:.2f} | {difference} |")


if __name__ == "__main__":
    main()
