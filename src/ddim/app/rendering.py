"""Pictures as HTML: inside the page, with a label each, in boxes whose size is known before they come."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image


@dataclass(frozen=True)
class Cell:
    """A picture on the page.

    Attributes:
        image: what is shown; `None` for an empty box.
        label: below it.
        alt: what a screen reader says of it.
        file: the name under which it can be saved; empty where it cannot be.
        act: what a click on it tells the page, and what the button is called; empty where it is no button.
        value: told with `act`.
        pressed: whether it is marked.
    """

    image: Image.Image | None
    label: str = ""
    alt: str = ""
    file: str = ""
    act: str = ""
    value: int = 0
    pressed: bool = False


def data_url(image: Image.Image) -> str:
    """A picture as an address that holds it."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def grid(cells: Sequence[Cell], shape: tuple[int, int], name: str, columns: int | None = None) -> str:
    """A list of pictures that wraps, or one of fixed columns.

    Args:
        cells: in order.
        shape: (H, W) of a picture, for boxes that are still empty.
        name: of the list, for screen readers.
        columns: pictures a row; as many as there is room for unless given.
    """
    style = f' style="--columns:{columns}"' if columns else ""
    kind = "pictures fixed" if columns else "pictures"
    items = "".join(_item(cell, *shape) for cell in cells)
    return f'<ul class="{kind}" aria-label="{escape(name)}"{style}>{items}</ul>'


def _item(cell: Cell, height: int, width: int) -> str:
    box = f'style="aspect-ratio:{width}/{height}"'
    url = data_url(cell.image) if cell.image is not None else ""
    picture = f'<img src="{url}" alt="{escape(cell.alt)}" {box}>' if url else f'<span class="empty" {box}></span>'
    if url and cell.act:
        pressed = str(cell.pressed).lower()
        picture = (
            f'<button type="button" data-act="{escape(cell.act)}" data-value="{cell.value}" aria-pressed="{pressed}" '
            f'title="{escape(cell.act)}" aria-label="{escape(cell.act)}: {escape(cell.alt)}">{picture}</button>'
        )
    save = (
        f'<a href="{url}" download="{escape(cell.file)}" aria-label="Save {escape(cell.file)}">PNG</a>'
        if url and cell.file
        else ""
    )
    label = f'<span class="label">{escape(cell.label)}{save}</span>' if cell.label or cell.file else ""
    return f"<li>{picture}{label}</li>"
