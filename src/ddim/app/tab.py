"""What the tabs share: the models and the session's state, and how an event handler follows a run."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Generic, TypeVar

import gradio as gr
from PIL import Image

from ddim.app import page
from ddim.app.models import Models
from ddim.app.rendering import Cell, grid
from ddim.app.runs import Preview, Result, Run, Step, start
from ddim.io.images import fit_image
from ddim.pipeline import DDIMPipeline

T = TypeVar("T")

Updates = dict[Any, Any]
"""New values of some components."""

ANSWERED = (ValueError, TypeError, OSError, RuntimeError, MemoryError)
"""Failures that are told in their own words, as the command line does."""

DEVICE: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": 1}
"""All runs wait in one queue."""

COPIED_AFTER = 60

COPY_CHUNK_BYTES: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""How an event that asks no network is answered."""


@dataclass(frozen=True, eq=False)  # Gradio hashes what a session keeps, and pictures have no hash.
class Endpoint:
    """A point that an interpolation goes through: the code of a seed, or a picture, which will be encoded.

    Attributes:
        picture: what it looks like, of the model's size and mode; `None` where a seed has not been painted.
        seed: of the code; `None` for a picture.
    """

    picture: Image.Image | None
    seed: int | None = None

    @classmethod
    def of_seed(cls, seed: int) -> Endpoint:
        """The code of a seed, of which no picture is known."""
        return cls(None, seed)

    @property
    def label(self) -> str:
        return "picture" if self.seed is None else f"seed {self.seed}"


@dataclass(frozen=True)
class Shared:
    """What is handed to each tab.

    Attributes:
        models: those that may be opened.
        model: the name of the session's own.
        endpoints: a list of `Endpoint`s: what was pinned.
        listing: the endpoints as HTML, of the tab Interpolate; whoever changes the one changes the other.
        uploads: the folder in which uploaded files are.
        files: the folder for files that are offered for download.
    """

    models: Models
    model: gr.State
    endpoints: gr.State
    listing: gr.HTML
    uploads: str
    files: str


@dataclass(frozen=True)
class Plan(Generic[T]):
    """What an event handler wants done.

    Attributes:
        doing: what the page says meanwhile.
        work: as for `ddim.app.runs.start`.
        preview: what is updated for the value of a `Preview`.
        done: what is updated in the end.
    """

    doing: str
    work: Callable[[Run], T]
    preview: Callable[[Any], Updates]
    done: Callable[[Result[T]], Updates]


def following(prepare: Callable[..., Plan[Any]], status: gr.HTML) -> Callable[..., AsyncIterator[Updates]]:
    """An event handler that follows a run on the page.

    Args:
        prepare: takes the event's inputs, checks them, and returns what is to be done.
        status: where the run stands, and why it failed.
    """

    async def handle(*given: Any) -> AsyncIterator[Updates]:
        try:
            plan = prepare(*given)
            yield {status: page.status(plan.doing, 0)}
            async with aclosing(start(plan.work)) as events:
                async for event in events:
                    if isinstance(event, Step):
                        counted = f"step {event.done} of {event.total}, {event.seconds:.1f} s"
                        yield {status: page.status(plan.doing, event.done / max(1, event.total), counted)}
                    elif isinstance(event, Preview):
                        yield plan.preview(event.value)
                    else:
                        yield plan.done(event)
        except ANSWERED as error:
            yield {status: page.failed(error)}

    return handle


def run_by(status: gr.HTML) -> dict[str, Any]:
    """How an event of the page becomes a run: it waits in the one queue, and its position is told in `status`."""
    return DEVICE | {"show_progress": "minimal", "show_progress_on": status, "api_visibility": "private"}


def answering(answer: Callable[..., Updates], status: gr.HTML) -> Callable[..., Updates]:
    """An event handler that asks no network, and tells in `status` why it failed."""

    # Gradio hands an event over where it finds the annotation.
    @wraps(answer)
    def handle(*given: Any) -> Updates:
        try:
            return answer(*given)
        except ANSWERED as error:
            return {status: page.failed(error)}

    return handle


def listed(endpoints: Sequence[Endpoint]) -> str:
    """The endpoints as HTML; a click takes one away."""
    if not endpoints:
        return "<p>No endpoints yet: pin pictures in the tab Sample, or add seeds and files below.</p>"
    cells = [
        Cell(endpoint.picture, endpoint.label, endpoint.label, act="Remove", value=index)
        for index, endpoint in enumerate(endpoints)
    ]
    return grid(cells, (1, 1), "Endpoints")


def fit(base: DDIMPipeline, picture: Image.Image) -> Image.Image:
    """A picture as the model sees it."""
    channels, height, width = base.sample_shape
    return fit_image(picture, height, width, channels)


def fresh_folder(folder: str | Path) -> Path:
    """A new folder in there, for files that are offered for download; those of a minute ago go: Gradio has copied them
    as soon as they were named to it.
    """
    for old in Path(folder).iterdir():
        if time.time() - old.stat().st_mtime > COPIED_AFTER:
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=folder))


def number(n: int, noun: str) -> str:
    """`1 picture`, `2 pictures`."""
    return f"{n} {noun}{'s' * (n != 1)}"
