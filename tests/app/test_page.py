"""The page of `ddim app` in a real browser, as a user goes through it, in both color schemes and on a phone's screen.

Screenshots are written to the folder screenshots/ of the checkout.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from app_server import AppServer
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel
from digits import TINY_MODEL

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

DESKTOP: Any = {"width": 1200, "height": 900}
PHONE: Any = {"width": 390, "height": 844}
TABS = ("Sample", "Steps", "Interpolate", "Invert", "Restore", "Model")

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


@pytest.fixture(scope="module")
def desktop(browser: Browser) -> BrowserContext:
    """A browser whose cache all tests share."""
    return browser.new_context(viewport=DESKTOP, accept_downloads=True)


@contextlib.contextmanager
def watched(browser: Browser, desktop: BrowserContext, server: AppServer) -> Iterator[Callable[..., Page]]:
    """`open_page(...)`: the page in a new tab, or in a new browser of other settings.

    It contacts no other host, none of its scripts fails, and the server logs no failure.
    """
    hosts, failures, pages = set[str](), list[str](), list[Page]()

    def open_page(**settings: Any) -> Page:
        page = (browser.new_context(**{"viewport": DESKTOP} | settings) if settings else desktop).new_page()
        pages.append(page)
        page.set_default_timeout(180_000)
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.add_init_script(SHIFTS)
        page.goto(server.url)
        button(page, "Sample").wait_for()
        return page

    expect.set_options(timeout=180_000)
    yield open_page
    for page in pages:
        page.close()
    assert hosts - {""} == {urlsplit(server.url).netloc}
    assert not failures
    assert "Traceback" not in server.log.read_text()


@pytest.fixture
def visit(browser: Browser, desktop: BrowserContext, server: AppServer) -> Iterator[Callable[..., Page]]:
    """`visit(...)`: the page as it is when it has loaded, as `watched` opens it."""
    with watched(browser, desktop, server) as open_page:
        yield open_page


@pytest.fixture(scope="module")
def loaded(browser: Browser, desktop: BrowserContext, server: AppServer) -> Iterator[Page]:
    """The page of `page`: loading it takes most of the time of a short test."""
    with watched(browser, desktop, server) as open_page:
        yield open_page()


@pytest.fixture
def page(loaded: Page) -> Page:
    """A page that other tests have used, for those that set all that they depend on and leave no image pinned."""
    loaded.bring_to_front()  # a tab behind another draws a frame per second
    tab(loaded, "Sample")
    return loaded


@pytest.fixture(scope="module")
def phone(browser: Browser, desktop: BrowserContext, server: AppServer) -> Iterator[Page]:
    """The page on a phone, which is dark when it loads."""
    with watched(browser, desktop, server) as open_page:
        yield open_page(viewport=PHONE, is_mobile=True, has_touch=True, color_scheme="dark")


def button(page: Page, name: str) -> Locator:
    # What folds away has an arrow in its name.
    return page.get_by_role("button", name=re.compile(rf"^{re.escape(name)}( \W+)?$"))


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def shot(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def sample(page: Page, num_evaluations: int | None = None) -> None:
    """Sample, and wait for the result: with as many function evaluations, where the one before had another number."""
    status = page.locator("#sample-status")
    before = status.inner_text()
    button(page, "Sample").click()
    try:
        expect(status).not_to_have_text(before, timeout=3000)
    except AssertionError:
        # Gradio passes over clicks while the run before ends, some moments after its result is shown.
        button(page, "Sample").click()
    # As a number of its own: 320 ends in 20.
    expect(status).to_contain_text(re.compile(rf"\b{num_evaluations or ''} in all\."))


def set_number(page: Page, label: str, value: int) -> None:
    field = page.get_by_label(label).filter(visible=True).first
    field.fill(str(value))
    field.press("Tab")


def few_steps(page: Page) -> None:
    """Sample little, where it matters little what."""
    set_number(page, "number input for Steps", 2)
    set_number(page, "number input for Images", 2)


def set_seeds(page: Page, text: str) -> None:
    page.get_by_label("Seeds").fill(text)


LOOKS: dict[str, tuple[Any, Any]] = {"dark": ("dark", DESKTOP), "phone": ("light", PHONE), "light": ("light", DESKTOP)}


def check_looks(page: Page, name: str) -> None:
    """Look at a tab with its results in every look; the last one is that of the walk."""
    assert not page.evaluate(UNNAMED)
    for look, (scheme, size) in LOOKS.items():
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size(size)
        expect(page.locator("body.dark")).to_have_count(int(scheme == "dark"))
        for tab_name in TABS:
            expect(page.get_by_role("tab", name=tab_name, exact=True)).to_be_visible()
        shot(page, f"{look}-{name}")
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]


def test_every_tab_works(page: Page) -> None:
    """One walk through all tabs, as a user would go."""
    expect(page.locator("#header")).to_contain_text(
        "Model: mnist, gray, 28 x 28 pixels; in the tab Model also color, tiny, faces"
    )
    set_number(page, "number input for Steps", 2)
    sample(page, 32)
    images = page.locator("#sample-images")
    expect(images.locator("img")).to_have_count(16)
    expect(images).to_contain_text("seed 15")
    for index in (0, 3):
        images.get_by_role("button").nth(index).click()
        expect(images.locator("[aria-pressed=true]")).to_have_count(1 + (index > 0))
    check_looks(page, "sample")

    tab(page, "Interpolate")
    ends = page.locator("#endpoints")
    expect(ends.get_by_role("button")).to_have_count(2)
    set_seeds(page, "14")
    button(page, "Add seeds").click()
    expect(ends.get_by_role("button")).to_have_count(3)
    expect(page.get_by_label("Seeds")).to_have_value("")
    set_number(page, "number input for Steps", 2)
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
    check_looks(page, "interpolate")
    for count in (2, 1, 0):
        ends.get_by_role("button").last.click()
        expect(ends.get_by_role("button")).to_have_count(count)

    tab(page, "Invert")
    draw(page)
    button(page, "Use the drawing").click()
    expect(page.locator("#seen")).to_contain_text("28 x 28")
    set_number(page, "number input for Steps", 2)
    button(page, "Edit").click()
    expect(page.locator("#edited img")).to_have_count(8)
    # The place of an inversion that was not asked for is not held free.
    status, edits = page.locator("#invert-status").bounding_box(), page.locator("#edited h3").bounding_box()
    assert status is not None
    assert edits is not None
    assert edits["y"] - status["y"] - status["height"] < 60

    tab(page, "Model")
    expect(page.locator("#model-size")).to_contain_text("1,805,121")
    button(page, "Model card").click()
    expect(page.get_by_text("Handwritten digits, 28x28, gray")).to_be_visible()
    check_looks(page, "model")


def draw(page: Page) -> None:
    """Draw a line on the canvas."""
    box = page.locator("#draw canvas").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.45 * box["width"], box["y"] + 0.8 * box["height"], steps=5)
    page.mouse.up()


def test_page_follows_the_model(visit: Callable[..., Page], request: pytest.FixtureRequest) -> None:
    """Another model, of another size and of color images: nothing of the one before stays."""
    page = visit()
    few_steps(page)
    sample(page)
    page.locator("#sample-images").get_by_role("button").first.click()
    expect(page.locator("#sample-images [aria-pressed=true]")).to_have_count(1)
    tab(page, "Invert")
    button(page, "Use the image pinned last").click()
    expect(page.locator("#seen")).to_contain_text("28 x 28")
    tab(page, "Restore")
    button(page, "Use the image pinned last").filter(visible=True).click()
    expect(page.locator("#sheet canvas")).to_be_visible()

    tab(page, "Model")
    name = page.get_by_label("Model", exact=True).last
    name.fill("color")
    name.press("Enter")
    button(page, "Open").click()
    for tab_name in TABS:
        tab(page, tab_name)
        expect(page.locator("#header")).to_contain_text("Model: color, color, 32 x 32 pixels")
    assert "digit" not in page.locator("body").inner_text()
    # Other browsers keep their model; this one loads the page now.
    phone = request.getfixturevalue("phone")
    expect(phone.locator("#header")).to_contain_text("Model: mnist, gray, 28 x 28 pixels")
    page.bring_to_front()  # a tab behind another draws a frame per second
    expect(page.locator("#seen")).to_contain_text("no image yet")
    expect(page.locator("#sheet")).to_contain_text("no image yet")
    expect(page.locator("#endpoints button")).to_have_count(0)

    tab(page, "Sample")
    expect(page.locator("#sample-images img")).to_have_count(0)
    expect(page.locator("#sample-images .empty")).to_have_count(2)
    expect(button(page, "Grid as PNG")).to_be_disabled()
    button(page, "The same in Python and on the command line").click()
    program, command = page.locator(".cm-content").first, page.locator(".cm-content").last
    expect(program).to_contain_text("from_pretrained('color')")
    expect(command).to_contain_text("ddim sample --model color --count 2 --seed 0 --steps 2")
    sample(page)
    expect(page.locator("#sample-images img")).to_have_count(2)

    tab(page, "Steps")
    set_number(page, "number input for Latents", 1)
    button(page, "Compare").click()
    expect(page.locator("#steps-images section")).to_have_count(4)
    expect(page.locator("#steps-images section").last).to_contain_text("DDPM, 50 steps")
    expect(page.get_by_text("times as fast as DDPM")).to_be_visible()
    check_looks(page, "color-steps")

    # The seeds in the box are interpolated without further ado.
    tab(page, "Interpolate")
    expect(page.get_by_text("Between seeds alone every frame is a sample")).to_be_visible()
    set_number(page, "number input for Steps", 2)
    set_seeds(page, "3, 14")
    button(page, "Interpolate").click()
    expect(page.locator("#walk .strip img")).to_have_count(11)
    expect(page.locator("#endpoints button")).to_have_count(2)
    expect(page.get_by_label("Seeds")).to_have_value("")

    tab(page, "Invert")
    assert drawn_pixel(page, 5, 5) == [255, 255, 255]
    page.get_by_label("Color").fill("#ff0000")
    draw(page)
    assert drawn_pixel(page, 135, 140) == [255, 0, 0]
    button(page, "Use the drawing").click()
    expect(page.locator("#seen")).to_contain_text("32 x 32")
    set_number(page, "number input for Steps", 2)
    button(page, "Edit").click()
    expect(page.locator("#edited img")).to_have_count(8)
    check_looks(page, "color-invert")


def test_what_is_marked_is_filled_in(page: Page, run_command: Callable[[list[str]], Path], tmp_path: Path) -> None:
    """With the mouse and from the keyboard; the command samples the same answers of the files that the page offers."""
    tab(page, "Restore")
    status, marked = page.locator("#restore-status"), page.locator("#sheet output")
    button(page, "Restore").click()
    expect(status).to_contain_text("An image is missing; upload one, sample one, or use a pinned one.")
    digit = Image.new("L", (28, 28))
    digit.paste(200, (12, 4, 17, 24))
    digit.save(tmp_path / "digit.png")
    page.locator("#restore-file input[type=file]").set_input_files(tmp_path / "digit.png")
    expect(marked).to_have_text("Nothing is marked yet.")
    button(page, "Restore").click()
    expect(status).to_contain_text("Nothing is marked; brush over what is unknown, or give a box.")

    box = page.locator("#sheet canvas").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 6 / 28, box["y"] + box["height"] * 14 / 28)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 22 / 28, box["y"] + box["height"] * 14 / 28, steps=3)
    page.mouse.up()
    # Rows 12 and 15 of a round brush of 4 pixels are shorter by a pixel at each end.
    expect(marked).to_have_text(f"{2 * 20 + 2 * 18} of 784 pixels are unknown.")
    for label, value in (("x", 2), ("y", 2), ("width", 3), ("height", 4)):
        page.locator("#sheet").get_by_label(label, exact=True).fill(str(value))
    page.keyboard.press("Enter")
    expect(marked).to_have_text(f"{76 + 12} of 784 pixels are unknown.")
    page.get_by_label("Erase").check()
    button(page, "Erase the box").click()
    expect(marked).to_have_text("76 of 784 pixels are unknown.")

    set_number(page, "number input for Answers", 2)
    set_number(page, "number input for Steps", 5)
    button(page, "Restore").click()
    expect(status).to_contain_text("2 answers in")
    names = ("measurement", "mask", "answer-0", "answer-1", "mean", "spread")
    images = {}
    for name in names:
        with page.expect_download() as download:
            page.get_by_role("link", name=f"Save {name}.png").click()
        download.value.save_as(tmp_path / f"{name}.png")
        images[name] = np.asarray(Image.open(tmp_path / f"{name}.png"))
    assert images["mask"][12:16, 6:22].all()
    assert np.count_nonzero(images["mask"]) == 76
    known = images["mask"] == 0
    assert np.array_equal(images["measurement"][known], np.asarray(digit)[known])
    button(page, "The same on the command line").click()
    command = page.locator(".cm-content").filter(visible=True).inner_text().split()
    files = [str(tmp_path / word) if word in ("measurement.png", "mask.png") else word for word in command[1:]]
    expected = np.load(run_command([*files[:-1], "restored.npz"]))["arr_0"]
    for index, answer in enumerate(expected):
        assert np.array_equal(images[f"answer-{index}"], answer[..., 0])
    check_looks(page, "restore")

    page.get_by_label("Super-resolve").check()
    expect(page.locator("#reduced")).to_contain_text("7 x 7 pixels: the measurement")
    button(page, "Restore").click()
    expect(page.locator("#restored img").first).to_have_js_property("naturalWidth", 7)
    expect(page.locator("#restored img")).to_have_count(1 + 2 + 2)
    page.get_by_label("Inpaint").check()
    expect(marked).to_have_text("76 of 784 pixels are unknown.")

    set_number(page, "number input for Steps", 1000)
    button(page, "Restore").click()
    expect(status).to_contain_text("step ")
    button(page, "Stop").filter(visible=True).press("Enter")
    expect(status).to_contain_text("Stopped.")


def drawn_pixel(page: Page, x: int, y: int) -> Any:
    """The color of a pixel on the screen: of the canvas, or of its background before it was drawn on."""
    image = page.locator("#draw canvas").screenshot()
    return list(Image.open(io.BytesIO(image)).convert("RGB").getpixel((x, y)))


def test_tracks_of_sliders_are_dark_in_the_dark(phone: Page) -> None:
    phone.bring_to_front()
    slider = phone.locator("input[type=range]").first
    image = Image.open(io.BytesIO(slider.screenshot())).convert("L")
    # Beyond the middle there is neither the thumb nor what is selected.
    right = np.asarray(image)[:, image.width * 3 // 4 :]
    assert right.max() < 150


def test_phone(phone: Page) -> None:
    phone.bring_to_front()
    few_steps(phone)
    button(phone, "Sample").tap()
    expect(phone.locator("#sample-images img")).to_have_count(2)
    for name in TABS:
        phone.get_by_role("tab", name=name, exact=True).tap()
        assert phone.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    phone.get_by_role("tab", name="Restore", exact=True).tap()
    button(phone, "Sample it").tap()
    # The brush of 4 x 4 pixels without its corners.
    phone.locator("#sheet canvas").tap()
    expect(phone.locator("#sheet output")).to_have_text("12 of 784 pixels are unknown.")


def test_images_load_without_layout_shifts(page: Page) -> None:
    set_number(page, "number input for Steps", 2)
    set_number(page, "number input for Images", 16)
    sample(page, 32)
    before = page.evaluate("window.shifted")
    # Longer than the half second after an input whose shifts are not counted.
    set_number(page, "number input for Steps", 20)
    page.wait_for_timeout(600)
    sample(page, 320)
    # The authors of the measure call less than 0.1 good.
    assert page.evaluate("window.shifted") - before < 0.02


def test_downloads_match_ddim_sample(page: Page, tmp_path: Path, run_command: Callable[[list[str]], Path]) -> None:
    set_number(page, "number input for Steps", 5)
    set_number(page, "number input for Images", 4)
    sample(page, 20)
    names = {"Grid as PNG": "grid.png", "Array as NPZ": "array.npz"}
    for name, file in names.items():
        expect(button(page, name)).to_be_enabled()
        with page.expect_download() as download:
            button(page, name).click()
        download.value.save_as(tmp_path / file)
    with page.expect_download() as download:
        page.get_by_role("link", name="Save seed-3.png").click()
    download.value.save_as(tmp_path / "three.png")
    arguments = ["sample", "-n", "4", "--steps", "5", "--seed", "0"]
    expected_grid = run_command([*arguments, "--out", "expected.png"])
    expected_array = run_command([*arguments, "--out", "expected.npz"])
    assert (tmp_path / "grid.png").read_bytes() == expected_grid.read_bytes()
    with np.load(tmp_path / "array.npz") as array, np.load(expected_array) as expected:
        assert np.array_equal(array["arr_0"], expected["arr_0"])
        with Image.open(tmp_path / "three.png") as three:
            assert np.array_equal(np.asarray(three), array["arr_0"][3, ..., 0])


def test_shown_command_and_program_sample_the_same_images(page: Page, run_command: Callable[[list[str]], Path]) -> None:
    set_number(page, "Seed", 5)
    set_number(page, "number input for Steps", 7)
    set_number(page, "number input for Images", 3)
    sample(page, 21)
    button(page, "The same in Python and on the command line").click()
    blocks = page.locator(".cm-content").filter(visible=True)
    expect(blocks).to_have_count(2)
    code = [block.inner_text() for block in blocks.all()]
    program, command = ("\n".join(text.splitlines()) for text in code)
    assert command.startswith("ddim sample ")
    path = run_command(command.split()[1:])
    scope: dict[str, Any] = {}
    exec(program, scope)
    with Image.open(path) as grid:
        for index, image in enumerate(scope["images"]):
            left, top = index % 2 * 30 + 2, index // 2 * 30 + 2
            shown = np.asarray(grid)[::3, ::3][top : top + 28, left : left + 28]
            assert np.array_equal(shown, np.asarray(image))


def test_classes_and_guidance(
    visit: Callable[..., Page],
    server: AppServer,
    run_command: Callable[[list[str]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model with classes shows a choice of them, which no other model has; the command samples the same images."""
    page = visit()
    choice, guidance = page.get_by_label("Class", exact=True), page.get_by_label("number input for Guidance")
    expect(choice).to_have_count(0)
    tab(page, "Model")
    name = page.get_by_label("Model", exact=True).last
    name.fill("tiny")
    name.press("Enter")
    button(page, "Open").click()
    expect(page.locator("#header")).to_contain_text("Model: tiny")

    tab(page, "Sample")
    expect(choice).to_have_value("any")
    set_number(page, "number input for Steps", 3)
    set_number(page, "number input for Images", 7)
    choose(page, "all, a row per class")
    # As many images of each class.
    expect(page.get_by_label("number input for Images")).to_have_value("8")
    guidance.fill("1.5")
    guidance.press("Tab")
    sample(page)
    expect(page.locator("#sample-status")).to_contain_text("6 function evaluations per image, 48 in all")
    expect(page.locator("#sample-images img")).to_have_count(8)
    expect(page.locator("#sample-images li").nth(4)).to_contain_text("1, seed 4")
    check_looks(page, "classes-sample")
    button(page, "The same in Python and on the command line").click()
    expect(page.locator(".cm-content")).to_have_count(2)
    code = [block.inner_text() for block in page.locator(".cm-content").all()]
    program, command = ("\n".join(text.splitlines()) for text in code)
    assert "--label all --guidance 1.5" in command
    with page.expect_download() as download:
        button(page, "Grid as PNG").click()
    download.value.save_as(tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes() == run_command(command.split()[1:]).read_bytes()
    scope: dict[str, Any] = {}
    monkeypatch.chdir(server.folder)
    exec(program, scope)
    with page.expect_download() as download:
        button(page, "Array as NPZ").click()
    download.value.save_as(tmp_path / "array.npz")
    with np.load(tmp_path / "array.npz") as array:
        assert np.array_equal(np.stack([np.asarray(image) for image in scope["images"]]), array["arr_0"][..., 0])

    # Guidance is that of a class. A seed with a class does not decide a frame: the image itself is pinned.
    choose(page, "any")
    set_number(page, "number input for Images", 1)
    sample(page)
    expect(page.locator("#sample-images li")).to_have_count(1)
    page.locator("#sample-images").get_by_role("button").click()
    expect(page.locator("#sample-images [aria-pressed=true]")).to_have_count(1)
    choose(page, "dog")
    sample(page)
    expect(page.locator("#sample-images li")).to_contain_text("dog, seed 0")
    page.locator("#sample-images").get_by_role("button").click()
    tab(page, "Interpolate")
    expect(page.locator("#endpoints li")).to_have_text(["seed 0", "image"])

    tab(page, "Invert")
    button(page, "Use the image pinned last").click()
    expect(page.locator("#seen")).to_contain_text("8 x 8")
    set_number(page, "number input for Steps", 3)
    choose(page, "cat")
    button(page, "Edit").click()
    expect(page.locator("#edited img")).to_have_count(8)
    check_looks(page, "classes-invert")


def test_page_starts_with_a_model_with_classes(desktop: BrowserContext, tmp_path: Path) -> None:
    """All tabs have its classes; the numbers of steps compared are few, because it has few timesteps."""
    expect.set_options(timeout=180_000)
    torch.manual_seed(0)
    classes: dict[str, Any] = {"num_class_embeds": 3, "class_names": ("cat", "dog"), "has_null_class": True}
    unet = UNet2DModel(**TINY_MODEL, **classes)
    DDIMPipeline(unet, DDIMScheduler(num_train_timesteps=8)).save_pretrained(tmp_path / "pets")
    # The eager engine starts fast: compiled kernels pay off for more than a few images.
    with AppServer(tmp_path, "pets", "--engine", "eager") as server:
        page = desktop.new_page()
        page.set_default_timeout(180_000)
        page.goto(server.url)
        few_steps(page)
        choose(page, "dog")
        sample(page)
        expect(page.locator("#sample-images li").last).to_contain_text("dog, seed 1")

        tab(page, "Steps")
        set_number(page, "number input for Latents", 1)
        choose(page, "cat")
        button(page, "Compare").click()
        expect(page.locator("#steps-images section")).to_have_count(2)

        tab(page, "Interpolate")
        set_number(page, "number input for Steps", 2)
        set_number(page, "number input for Frames per leg", 3)
        several = page.get_by_label("Class", exact=True).filter(visible=True)
        several.fill("cat, dog")
        several.press("Enter")
        set_seeds(page, "5, 5")
        button(page, "Interpolate").click()
        frames = page.locator("#walk .strip img")
        expect(frames).to_have_count(3)
        # The latent is the same, the class is not.
        assert frames.first.get_attribute("src") != frames.last.get_attribute("src")
        set_seeds(page, "6")
        button(page, "Interpolate").click()
        refusal = "The number of endpoints must be a multiple of the 2 labels, got 3"
        expect(page.locator("#interpolate-status")).to_contain_text(refusal)

        tab(page, "Invert")
        draw(page)
        button(page, "Use the drawing").click()
        expect(page.locator("#seen")).to_contain_text("8 x 8")
        set_number(page, "number input for Steps", 2)
        button(page, "Invert").click()
        expect(page.locator("#inverted section")).to_have_count(2)
        expect(page.get_by_text("Encoded and decoded in")).to_be_visible()
        check_looks(page, "invert")
        page.close()
        assert "Traceback" not in server.log.read_text()


def choose(page: Page, name: str) -> None:
    """Choose a class."""
    page.get_by_label("Class", exact=True).filter(visible=True).click()
    page.get_by_role("option", name=name, exact=True).click()


def test_failures_are_shown_on_the_page(page: Page, tmp_path: Path) -> None:
    tab(page, "Interpolate")
    set_seeds(page, "")
    button(page, "Interpolate").click()
    expect(page.get_by_role("alert").first).to_contain_text("A path must have 2 to 8 endpoints, got 0")
    page.get_by_label("Seeds").fill("three")
    button(page, "Add seeds").click()
    expect(page.get_by_role("alert").first).to_contain_text("Seeds must be integers such as 3, 14, 15, got 'three'")
    (tmp_path / "text.png").write_text("I am a text.")
    tab(page, "Invert")
    page.locator("input[type=file]").last.set_input_files(tmp_path / "text.png")
    alert = page.get_by_role("alert").filter(has_text="ext.png is not an image of a known format")
    expect(alert).to_have_count(1)


def long_run(page: Page) -> None:
    """Start minutes of work, and wait for previews."""
    set_number(page, "number input for Steps", 1000)
    set_number(page, "number input for Images", 16)
    button(page, "Sample").click()
    expect(page.locator("#sample-images img")).to_have_count(16)
    expect(page.locator("#sample-status")).to_contain_text("of 1000")


def test_stop_frees_the_device(page: Page) -> None:
    long_run(page)
    # By keyboard: a click waits for the page to be still, which may take long on a busy machine.
    button(page, "Stop").first.press("Enter")
    expect(page.locator("#sample-status")).to_contain_text("Stopped.")
    few_steps(page)
    sample(page, 4)
    expect(page.locator("#sample-images img")).to_have_count(2)


def test_position_in_the_queue_is_shown(page: Page, server: AppServer) -> None:
    few_steps(page)
    with server.listen("/sample", server.post("/sample", count=16, steps=1000)) as reports:
        next(report for report in reports if "done" in report)
        button(page, "Sample").click()
        expect(page.locator("#sample-status")).to_contain_text("Waiting: 1 run before this one.")
        shot(page, "light-queue")
    expect(page.locator("#sample-status")).to_contain_text("in all.")


def test_closing_the_tab_frees_the_device(visit: Callable[..., Page], server: AppServer) -> None:
    page = visit()
    long_run(page)
    page.close()
    assert len(server.call("/sample", count=1, steps=1)["images"]) == 1


def test_keyboard_suffices(page: Page) -> None:
    set_number(page, "number input for Steps", 2)
    set_number(page, "number input for Images", 3)
    button(page, "Sample").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#sample-status")).to_contain_text("6 in all.")
    page.locator("#sample-images").get_by_role("button").first.focus()
    page.keyboard.press("Space")
    expect(page.locator("#sample-images [aria-pressed=true]")).to_have_count(1)
