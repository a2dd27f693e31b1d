"""Images as HTML: embedded in the page, one label per image, in boxes whose size is known before they load."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image


@dataclass(frozen=True)
class Cell:
    """An image on the page.

    Attributes:
        image: the image; `None` for an empty box.
        label: the text below it.
        alt: the text that a screen reader reads for it.
        file: the name under which it can be saved; empty if it cannot.
        action: the name of the button that the image is; empty if it is not a button.
        value: sent to the page by a click on the button.
        pressed: whether it is marked.
    """

    image: Image.Image | None
    label: str = ""
    alt: str = ""
    file: str = ""
    action: str = ""
    value: int = 0
    pressed: bool = False


def data_url(image: Image.Image) -> str:
    """Encode an image as a `data:` URL.

    Args:
        image: the image.

    Returns:
        The URL, of a PNG.

    Example:
        >>> data_url(Image.new("L", (1, 1)))[:26]
        'data:image/png;base64,iVBO'
    """
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def grid(cells: Sequence[Cell], shape: tuple[int, int], name: str, columns: int | None = None) -> str:
    """Return a list of images as HTML.

    Args:
        cells: the images, in order.
        shape: (H, W) of an image, for boxes that are still empty.
        name: of the list, for screen readers.
        columns: images per row; defaults to as many as fit.

    Example:
        >>> grid([Cell(None)], (28, 28), "Images")
        '<ul class="images" aria-label="Images"><li><span class="empty" style="aspect-ratio:28/28"></span></li></ul>'
    """
    style = f' style="--columns:{columns}"' if columns else ""
    kind = "images fixed" if columns else "images"
    items = "".join(_item(cell, *shape) for cell in cells)
    return f'<ul class="{kind}" aria-label="{escape(name)}"{style}>{items}</ul>'


def _item(cell: Cell, height: int, width: int) -> str:
    style = f'style="aspect-ratio:{width}/{height}"'
    url = data_url(cell.image) if cell.image is not None else ""
    content = f'<img src="{url}" alt="{escape(cell.alt)}" {style}>' if url else f'<span class="empty" {style}></span>'
    if url and cell.action:
        pressed = str(cell.pressed).lower()
        content = (
            f'<button type="button" data-value="{cell.value}" aria-pressed="{pressed}" title="{escape(cell.action)}" '
            f'aria-label="{escape(cell.action)}: {escape(cell.alt)}">{content}</button>'
        )
    save = (
        f'<a href="{url}" download="{escape(cell.file)}" aria-label="Save {escape(cell.file)}">PNG</a>'
        if url and cell.file
        else ""
    )
    label = f'<span class="label">{escape(cell.label)}{save}</span>' if cell.label or cell.file else ""
    return f"<li>{content}{label}</li>"
