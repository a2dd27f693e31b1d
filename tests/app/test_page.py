"""The page of `ddim app` in a real browser, as a user goes through it, in both color schemes and on a phone's width.

Screenshots are written to the folder screenshots/ of the checkout.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from app_server import AppServer

CHROMIUM = shutil.which("chromium")
SCREENSHOTS = Path(__file__).parents[2] / "screenshots"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="requires chromium")

SHIFTS = """
window.shifted = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifted += entry.value;
}).observe({ type: 'layout-shift', buffered: true });
"""
"""Adds up what the browser calls layout shifts."""

UNNAMED = """
() => [...document.querySelectorAll('button, input, select, textarea, [role=slider]')]
  .filter((e) => e.checkVisibility() && !e.closest('footer'))
  .filter((e) => !(e.labels?.length || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby')
    || e.title || e.innerText?.trim()))
  .map((e) => e.outerHTML.slice(0, 200))
"""
"""Controls for which a screen reader has no name."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Without a sandbox: tests may run as root.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, server: AppServer) -> Iterator[Callable[..., Page]]:
    """`visit(...)`: the page in a new browser context; it contacts no other host, and none of its scripts fails."""
    hosts, failures, contexts = set[str](), list[str](), []

    def open_page(**settings: Any) -> Page:
        settings = {"viewport": {"width": 1200, "height": 900}, "accept_downloads": True} | settings
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(180_000)
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.add_init_script(SHIFTS)
        page.goto(server.url)
        button(page, "Sample").wait_for()
        return page

    expect.set_options(timeout=180_000)
    yield open_page
    for context in contexts:
        context.close()
    assert hosts - {""} == {urlsplit(server.url).netloc}
    assert not failures


def button(page: Page, name: str) -> Locator:
    # What folds away has an arrow in its name.
    return page.get_by_role("button", name=re.compile(rf"^{re.escape(name)}( \W+)?$"))


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def shot(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def sample(page: Page) -> None:
    button(page, "Sample").click()
    expect(page.locator("#sample-status")).to_contain_text("in all.")


def set_number(page: Page, label: str, value: int) -> None:
    field = page.get_by_label(label).filter(visible=True).first
    field.fill(str(value))
    field.press("Tab")


def walk_through(page: Page, look: str) -> None:
    """Use every tab, as a user would."""
    sample(page)
    images = page.locator("#sample-images")
    expect(images.locator("img")).to_have_count(16)
    expect(images).to_contain_text("seed 15")
    for index in (0, 3):
        images.get_by_role("button").nth(index).click()
        expect(images.locator("[aria-pressed=true]")).to_have_count(1 + (index > 0))
    shot(page, f"{look}-sample")
    assert not page.evaluate(UNNAMED)

    tab(page, "Steps")
    set_number(page, "number input for Latents", 1)
    button(page, "Compare").click()
    expect(page.locator("#steps-images section")).to_have_count(6)
    expect(page.get_by_text("times as fast as DDPM")).to_be_visible()
    shot(page, f"{look}-steps")
    assert not page.evaluate(UNNAMED)

    tab(page, "Interpolate")
    ends = page.locator("#endpoints")
    expect(ends.get_by_role("button")).to_have_count(2)
    page.get_by_label("Seeds").fill("14")
    button(page, "Add seeds").click()
    expect(ends.get_by_role("button")).to_have_count(3)
    button(page, "Interpolate").click()
    walk = page.locator("#walk")
    expect(walk.locator(".strip img")).to_have_count(21)
    slider = walk.get_by_role("slider")
    slider.fill("10")
    expect(walk.locator("figcaption")).to_have_text("frame 11 of 21")
    middle = walk.locator(".strip img").nth(10).get_attribute("src")
    assert walk.locator("figure img").get_attribute("src") == middle
    walk.get_by_role("button", name="Play").click()
    expect(walk.locator("figcaption")).not_to_have_text("frame 11 of 21")
    walk.get_by_role("button", name="Pause").click()
    shot(page, f"{look}-interpolate")
    assert not page.evaluate(UNNAMED)
    ends.get_by_role("button").last.click()
    expect(ends.get_by_role("button")).to_have_count(2)

    tab(page, "Invert")
    box = page.locator("#draw canvas").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.45 * box["width"], box["y"] + 0.8 * box["height"], steps=5)
    page.mouse.up()
    button(page, "Use the drawing").click()
    expect(page.locator("#seen")).to_contain_text("28 x 28")
    set_number(page, "number input for Steps", 10)
    button(page, "Invert").click()
    expect(page.locator("#inverted section")).to_have_count(2)
    expect(page.get_by_text("Encoded and decoded in")).to_be_visible()
    button(page, "Edit").click()
    expect(page.locator("#edited img")).to_have_count(8)
    shot(page, f"{look}-invert")
    assert not page.evaluate(UNNAMED)

    tab(page, "Model")
    expect(page.locator("#model-size")).to_contain_text("1,805,121")
    button(page, "Model card").click()
    expect(page.get_by_text("Handwritten digits, 28x28, gray")).to_be_visible()
    shot(page, f"{look}-model")
    assert not page.evaluate(UNNAMED)


LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
}


@pytest.mark.parametrize("look", LOOKS)
def test_every_tab_works(visit: Callable[..., Page], look: str) -> None:
    page = visit(**LOOKS[look])
    walk_through(page, look)
    width = page.viewport_size["width"] if page.viewport_size else 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_images_load_without_layout_shifts(visit: Callable[..., Page]) -> None:
    page = visit()
    sample(page)
    before = page.evaluate("window.shifted")
    set_number(page, "number input for Steps", 100)
    page.wait_for_timeout(600)
    sample(page)
    # The authors of the measure call less than 0.1 good.
    assert page.evaluate("window.shifted") - before < 0.02


def test_downloads_match_ddim_sample(
    visit: Callable[..., Page], tmp_path: Path, run_commands: Callable[..., None]
) -> None:
    page = visit()
    sample(page)
    names = {"Grid as PNG": "grid.png", "Array as NPZ": "array.npz"}
    for name, file in names.items():
        expect(button(page, name)).to_be_enabled()
        with page.expect_download() as download:
            button(page, name).click()
        download.value.save_as(tmp_path / file)
    with page.expect_download() as download:
        page.get_by_role("link", name="Save seed-3.png").click()
    download.value.save_as(tmp_path / "three.png")
    arguments = ["sample", "-n", "16", "--steps", "20", "--seed", "0"]
    run_commands(tmp_path, [*arguments, "--out", "expected.png"], [*arguments, "--out", "expected.npz"])
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    with np.load(tmp_path / "array.npz") as array, np.load(tmp_path / "expected.npz") as expected:
        assert np.array_equal(array["arr_0"], expected["arr_0"])
        with Image.open(tmp_path / "three.png") as three:
            assert np.array_equal(np.asarray(three), array["arr_0"][3, ..., 0])


def test_shown_command_and_program_sample_the_same_images(
    visit: Callable[..., Page], tmp_path: Path, run_commands: Callable[..., None]
) -> None:
    page = visit()
    set_number(page, "Seed", 5)
    set_number(page, "number input for Images", 3)
    sample(page)
    button(page, "The same in Python and on the command line").click()
    expect(page.locator(".cm-content")).to_have_count(2)
    code = [block.inner_text() for block in page.locator(".cm-content").all()]
    program, command = ("\n".join(text.splitlines()) for text in code)
    assert command.startswith("ddim sample ")
    run_commands(tmp_path, command.split()[1:])
    scope: dict[str, Any] = {}
    exec(program, scope)
    with Image.open(tmp_path / "samples.png") as grid:
        for index, image in enumerate(scope["images"]):
            left, top = index % 2 * 30 + 2, index // 2 * 30 + 2
            assert np.array_equal(np.asarray(grid.crop((left, top, left + 28, top + 28))), np.asarray(image))


def test_failures_are_shown_on_the_page(visit: Callable[..., Page]) -> None:
    page = visit()
    tab(page, "Interpolate")
    button(page, "Interpolate").click()
    expect(page.get_by_role("alert").first).to_contain_text("A path must have 2 to 8 endpoints, got 0")
    page.get_by_label("Seeds").fill("three")
    button(page, "Add seeds").click()
    expect(page.get_by_role("alert").first).to_contain_text("Seeds must be integers such as 3, 14, 15, got 'three'")


def test_unreadable_upload_is_reported(visit: Callable[..., Page], tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("I am a text.")
    Image.new("RGB", (40, 30), "white").save(tmp_path / "white.png")
    page = visit()
    tab(page, "Invert")
    page.locator("input[type=file]").last.set_input_files(tmp_path / "text.png")
    expect(page.get_by_role("alert").first).to_contain_text("ext.png is not an image of a known format")


def long_run(page: Page) -> None:
    """Start minutes of work, and wait for previews."""
    set_number(page, "number input for Steps", 1000)
    set_number(page, "number input for Images", 64)
    button(page, "Sample").click()
    expect(page.locator("#sample-images img")).to_have_count(64)
    expect(page.locator("#sample-status")).to_contain_text("of 1000")


def test_stop_frees_the_device(visit: Callable[..., Page]) -> None:
    page = visit()
    long_run(page)
    # By keyboard: a click waits for the page to be still, which may take long on a busy machine.
    button(page, "Stop").first.press("Enter")
    expect(page.locator("#sample-status")).to_contain_text("Stopped.")
    set_number(page, "number input for Steps", 2)
    set_number(page, "number input for Images", 1)
    sample(page)
    expect(page.locator("#sample-images img")).to_have_count(1)


def test_position_in_the_queue_is_shown(visit: Callable[..., Page], server: AppServer) -> None:
    earlier = server.client().submit(count=64, steps=1000, api_name="/sample")
    while not earlier.outputs():
        time.sleep(0.1)
    page = visit()
    button(page, "Sample").click()
    expect(page.locator("#sample-status")).to_contain_text("queue: 1/1")
    shot(page, "light-queue")
    # Gradio's box around it has no height; it must not cut off what is in it.
    box = page.locator("#sample-status .wrap.minimal")
    assert box.evaluate("e => getComputedStyle(e).overflow") == "visible"
    earlier.cancel()
    expect(page.locator("#sample-status")).to_contain_text("in all.")


def test_closing_the_tab_frees_the_device(visit: Callable[..., Page], server: AppServer) -> None:
    page = visit()
    long_run(page)
    page.close()
    assert len(server.call("/sample", count=1, steps=1)["images"]) == 1


def test_keyboard_suffices(visit: Callable[..., Page]) -> None:
    page = visit()
    button(page, "Sample").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#sample-status")).to_contain_text("in all.")
    page.locator("#sample-images").get_by_role("button").first.focus()
    page.keyboard.press("Space")
    expect(page.locator("#sample-images [aria-pressed=true]")).to_have_count(1)
