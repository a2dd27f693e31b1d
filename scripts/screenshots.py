"""Take the README's screenshots of `ddim app`: docs/images/app-sample.png and app-steps.png.

    python scripts/screenshots.py [--out docs/images]

Times are on the page, so the machine should be free. Requires Debian's chromium.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

VIEWPORT = {"width": 1280, "height": 800}
NUM_COLORS = 64
TIMEOUT_MS = 600_000


def press(page: Page, name: str, finished: str) -> None:
    """Press a button and wait until the page shows a text."""
    page.get_by_role("button", name=name, exact=True).filter(visible=True).click()
    page.get_by_text(finished).wait_for()


def shoot(page: Page, path: Path) -> None:
    """Write the whole page with few colors, which makes the file small."""
    # The pointer leaves the button, which would be drawn as pointed at.
    page.mouse.move(0, 0)
    image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    image.quantize(NUM_COLORS).save(path, optimize=True)
    print(path)


def main() -> None:
    """Start the page, use both tabs, and write the images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="a folder")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = subprocess.Popen(
            [sys.executable, "-m", "ddim", "app", "mnist", "--port", "0", "--no-open"],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": folder},
        )
        try:
            assert server.stdout is not None
            # Without a sandbox: the script may run as root.
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport=VIEWPORT)
            page.set_default_timeout(TIMEOUT_MS)
            page.goto(server.stdout.readline().strip())
            press(page, "Sample", "in all.")
            shoot(page, out / "app-sample.png")
            page.get_by_role("tab", name="Steps", exact=True).click()
            press(page, "Compare", "times as fast as")
            shoot(page, out / "app-steps.png")
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
