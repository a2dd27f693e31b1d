"""How long a user of `ddim app` waits, in a real browser: 16 digits, 20 steps, the built-in model.

    python -m benchmarks.app [--repeats 5]

Medians and maxima of the times from pressing Sample to the first preview on the page, and to the finished images; from
pressing Stop, or closing the tab, during a run of minutes, to the answer of another client's smallest run; and of a
step of the run that was stopped. Requires Debian's chromium.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gradio_client import Client
from playwright.sync_api import Browser, Page, sync_playwright


def open_page(browser: Browser, url: str) -> Page:
    """Open the page and wait until it can be used."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(120_000)
    page.goto(url)
    page.get_by_role("button", name="Sample", exact=True).wait_for()
    return page


def start_sampling(page: Page, steps: int, count: int) -> None:
    """Set the numbers of steps and images, and press Sample."""
    for label, value in (("Steps", steps), ("Images", count)):
        field = page.get_by_label(f"number input for {label}").first
        field.fill(str(value))
        field.press("Tab")
    page.get_by_role("button", name="Sample", exact=True).click()


def time_sampling(browser: Browser, url: str) -> tuple[float, float]:
    """Return the seconds to the first preview and to the end."""
    page = open_page(browser, url)
    start_sampling(page, 20, 16)
    started = time.perf_counter()
    page.locator("#sample-images img").first.wait_for()
    preview = time.perf_counter() - started
    page.get_by_text("in all.").wait_for()
    seconds = time.perf_counter() - started
    page.close()
    return preview, seconds


def time_until_free(browser: Browser, url: str, client: Client, leave: Callable[[Page], None]) -> float:
    """Return the seconds until another client's run of one step is answered."""
    page = open_page(browser, url)
    start_sampling(page, 1000, 64)
    page.locator("#sample-images img").first.wait_for()
    started = time.perf_counter()
    leave(page)
    client.predict(count=1, steps=1, api_name="/sample")
    seconds = time.perf_counter() - started
    if not page.is_closed():
        page.close()
    return seconds


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="How long a user of the page waits.")
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = subprocess.Popen(
            [sys.executable, "-m", "ddim", "app", "mnist", "--port", "0", "--no-open"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=os.environ | {"TMPDIR": folder},
        )
        try:
            assert server.stdout is not None
            started = time.perf_counter()
            url = server.stdout.readline().strip()
            rows["from the shell to the address"] = [time.perf_counter() - started]
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            client = Client(url, verbose=False, download_files=str(Path(folder, "downloads")))
            for _ in range(repeats):
                preview, seconds = time_sampling(browser, url)
                step = client.predict(count=64, steps=10, api_name="/sample")["seconds"] / 10
                idle = time.perf_counter()
                client.predict(count=1, steps=1, api_name="/sample")
                for name, value in (
                    ("from Sample to the first preview", preview),
                    ("from Sample to the finished images", seconds),
                    ("a step of 64 images", step),
                    ("another client's run of one step, with nothing before it", time.perf_counter() - idle),
                    ("the same, after Stop in a run of 64 images", time_until_free(browser, url, client, stop)),
                    (
                        "the same, after closing the tab of such a run",
                        time_until_free(browser, url, client, Page.close),
                    ),
                ):
                    rows.setdefault(name, []).append(value)
            browser.close()
        finally:
            server.terminate()
            server.wait()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {repeats} repeats\n")
    print("| seconds | median | slowest |\n|---|---|---|")
    for name, values in rows.items():
        print(f"| {name} | {statistics.median(values):.2f} | {max(values):.2f} |")


def stop(page: Page) -> None:
    """Press Stop."""
    page.get_by_role("button", name="Stop", exact=True).first.click()


if __name__ == "__main__":
    main()
