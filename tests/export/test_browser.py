"""The page that samples in the browser: its noise is PyTorch's, its images those of `ddim sample`.

The page's test requires Chromium, and the npm package onnxruntime-web in the folder that the variable
DDIM_ONNXRUNTIME_WEB names.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import sync_playwright

from ddim import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim.diffusion.interpolation import slerp
from digits import TINY_MODEL
from helpers import error, seeded

ROOT = Path(__file__).parents[2]
NODE, CHROMIUM, RUNTIME = shutil.which("node"), shutil.which("chromium"), os.environ.get("DDIM_ONNXRUNTIME_WEB")
SEEDS = ((0, 784), (7, 16), (123456789012, 12288), (2**32 + 1, 100), (2**53 - 1, 37))
"""Seeds and sizes, some of them not multiples of 16."""
STEPS = 3


@pytest.mark.skipif(NODE is None, reason="requires node")
def test_noise_is_that_of_pytorch(tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs/browser/noise.js", tmp_path / "noise.mjs")
    script = f"""
        import {{ randn, slerp }} from "./noise.mjs";
        const noises = {json.dumps(SEEDS)}.map(([seed, size]) => Array.from(randn(seed, size)));
        console.log(JSON.stringify([noises, Array.from(slerp(randn(3, 64), randn(4, 64), 0.3))]));
    """
    (tmp_path / "test.mjs").write_text(script)
    result = subprocess.run([str(NODE), "test.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True)
    noises, between = json.loads(result.stdout)
    for (seed, size), noise in zip(SEEDS, noises, strict=True):
        assert error(torch.tensor(noise), torch.randn(size, generator=seeded(seed))) < 3e-6
    ends = [torch.randn(64, generator=seeded(seed)) for seed in (3, 4)]
    assert error(torch.tensor(between), slerp(*ends, 0.3)) < 3e-6


@pytest.fixture
def pipe(tmp_path: Path) -> DDIMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY_MODEL).eval()
    unet.conv_out.weight.data.mul_(0.1)
    pipe = DDIMPipeline(unet.half(), DDIMScheduler(prediction_type="v_prediction"))
    pipe.save_pretrained(tmp_path / "tiny")
    return pipe.to(torch.float32)


@pytest.fixture
def address(pipe: DDIMPipeline, tmp_path: Path) -> Iterator[str]:
    command = [sys.executable, ROOT / "scripts/browser_page.py", tmp_path / "tiny", "--out", tmp_path / "site"]
    subprocess.run([*command, "--steps", str(STEPS), "--runtime", str(RUNTIME)], check=True, capture_output=True)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "site")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.skipif(CHROMIUM is None or RUNTIME is None, reason="requires chromium and DDIM_ONNXRUNTIME_WEB")
def test_page_samples_the_images_of_the_library(pipe: DDIMPipeline, address: str) -> None:
    pipe.set_progress_bar_config(disable=True)
    outside = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: None if request.url.startswith(address) else outside.append(request.url))
        page.goto(address)
        page.get_by_role("option", name="tiny").wait_for(state="attached")
        assert page.evaluate("crossOriginIsolated")  # the requirement of threads
        results = []
        for seed, count, other in (("5", "16", ""), ("5", "3", "9")):
            page.get_by_label("Seed", exact=True).fill(seed)
            page.get_by_label("Images", exact=True).fill(count)
            page.get_by_label("Interpolate to seed").fill(other)
            page.get_by_role("button", name="Sample").click()
            page.get_by_text(f"{count} images in {STEPS} steps.").wait_for()
            results.append(np.array(json.loads(page.locator("canvas").get_attribute("data-bytes") or "")))
        browser.close()
    assert [url for url in outside if not url.startswith(("blob:", "data:"))] == []
    digits = np.stack([np.asarray(image) for image in pipe.sample_images(16, seed=5, num_inference_steps=STEPS)])
    assert np.abs(results[0].reshape(digits.shape) - digits).max() <= 2
    ends = [torch.randn(1, 8, 8, generator=seeded(seed)) for seed in (5, 9)]
    latents = slerp(*ends, torch.linspace(0, 1, 3))
    between = pipe(latents=latents, num_inference_steps=STEPS, output_type="np").images
    assert np.abs(results[1].reshape(3, 8, 8) - 255 * between[..., 0]).max() <= 2
