"""Marking what is unknown of an image with a brush: the canvas as HTML, and what was marked on it."""

from __future__ import annotations

from html import escape
from typing import Any

from PIL import Image
from torch import Tensor

from ddim.app import inputs
from ddim.app.measurements import read_mask
from ddim.app.rendering import data_url
from ddim.pipeline import DDIMPipeline

SHEET_SIZE = 336
"""Longer side of the image that is marked, in pixels of the screen; a large image has its own size."""

BRUSH_PARTS = 7
"""The brush is this many times smaller than the image, at first."""


def read_marks(base: DDIMPipeline, url: Any) -> Tensor:
    """Return what was marked as unknown.

    Args:
        base: the model.
        url: the `data:` URL of a PNG of the model's size, white where it was marked, black elsewhere.

    Returns:
        Boolean (1, H, W).

    Raises:
        ValueError: for anything else, or where nothing or everything was marked.
    """
    _, height, width = base.sample_shape

    def read(image: Image.Image) -> Tensor:
        if image.size == (width, height):
            low, high = image.convert("L").point(lambda value: 255 * (value > 127)).getextrema()
            if high == 0:
                raise ValueError("nothing is marked; brush over what is unknown, or give a box")
            if low == 255:
                raise ValueError("everything is marked; erase what is known")
        return read_mask(base, image, (width, height))

    missing: Tensor = inputs.drawing(url, read)
    return missing


def show_sheet(image: Image.Image | None) -> str:
    """Return an image that can be marked as HTML, with the tools for it; or an empty box.

    Args:
        image: of the model's size.
    """
    if image is None:
        return show_image(None)
    width, height = image.size
    numbers = "".join(
        f'<label>{label} <input type="number" data-box-{name} min="{least}" max="{most}" value="{value}"></label>'
        for label, name, least, most, value in (
            ("x", "x", 0, width - 1, width // 4),
            ("y", "y", 0, height - 1, height // 4),
            ("width", "width", 1, width, (width + 1) // 2),
            ("height", "height", 1, height, (height + 1) // 2),
        )
    )
    longer = max(width, height)
    brush = f'<input type="range" min="1" max="{longer}" value="{max(1, round(longer / BRUSH_PARTS))}" data-size>'
    return f"""<div class="brush"><div class="sheet" style="{_sheet_style(width, height)}">
<img src="{data_url(image)}" alt="the image, {width} x {height} pixels"><canvas width="{width}" height="{height}"
role="img" aria-label="Brush over what is unknown; from the keyboard, give a box below"></canvas></div>
<output data-marked role="status">Nothing is marked yet.</output>
<div class="tools"><label>Brush {brush}</label> <label><input type="checkbox" data-erase> Erase</label>
<button type="button" data-clear>Clear</button></div>
<div class="tools" role="group" aria-label="A box, in pixels">{numbers}
<button type="button" data-box>Mark the box</button></div></div>"""


def show_image(image: Image.Image | None, label: str = "") -> str:
    """Return an image as large as one that is marked as HTML, or an empty box.

    Args:
        image: of any size.
        label: the text below it.
    """
    content = '<span class="empty" style="aspect-ratio:1/1"></span>'
    width, height = (1, 1) if image is None else image.size
    if image is not None:
        content = f'<img src="{data_url(image)}" alt="{escape(label)}">'
    text = escape(label) or "no image yet"
    return (
        f'<div class="brush"><div class="sheet" style="{_sheet_style(width, height)}">{content}</div>'
        f"<output>{text}</output></div>"
    )


def _sheet_style(width: int, height: int) -> str:
    """Return a size on the screen of whole pixels per pixel, where there is room for it."""
    scale = max(1, SHEET_SIZE // max(width, height))
    return f"width:min(100%,{width * scale}px);aspect-ratio:{width}/{height}"
