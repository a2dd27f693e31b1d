"""How an event of the page becomes a run, and what the tabs share: the models and the state of a session."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Generic, TypeVar

import gradio as gr
from PIL import Image

from ddim.app import page
from ddim.app.listeners import StreamAudience, session_of_this_event
from ddim.app.models import ModelCache
from ddim.app.pictures import Picture
from ddim.app.rendering import Cell, grid
from ddim.app.runs import Run, RunPreview, RunProgress, RunResult, RunWaiting, run_events
from ddim.validation import pluralize

T = TypeVar("T")
Event = TypeVar("Event")

Updates = dict[Any, Any]
"""New values of components."""

REPORTED_ERRORS = (ValueError, TypeError, OSError, RuntimeError, MemoryError)
"""Failures whose message is shown to the user, as on the command line."""

DEVICE_EVENT: dict[str, Any] = {"concurrency_limit": None}
"""Arguments of events that run the network: Gradio starts them at once, and they wait in `ddim.app.runs`."""

RUN_EVENT: dict[str, Any] = DEVICE_EVENT | {"show_progress": "hidden", "api_visibility": "private"}
"""Arguments of events of the page that run the network."""

INSTANT_EVENT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Arguments of events that do not run the network."""

DOWNLOAD_SECONDS = 60
"""Age at which folders of downloads are deleted; Gradio copies files as soon as they are named to it."""


@dataclass(frozen=True, eq=False)  # Gradio hashes the values of a session, and images have no hash.
class Endpoint:
    """A point that an interpolation passes through: the latent of a seed, or an image, which will be encoded.

    Attributes:
        picture: the image; `None` for a seed that has not been sampled.
        seed: of the latent; `None` for an image.
    """

    picture: Picture | None
    seed: int | None = None

    @property
    def image(self) -> Image.Image | None:
        """The image as it is shown."""
        return None if self.picture is None else self.picture.shown

    @property
    def label(self) -> str:
        """The text below the endpoint."""
        return "image" if self.seed is None else f"seed {self.seed}"


@dataclass(frozen=True)
class Shared:
    """What every tab is given.

    Attributes:
        models: the models that may be opened.
        model: the name of the session's model.
        header: the page's title, which names the session's model; updated together with `model`.
        endpoints: a list of `Endpoint`s: what the user pinned.
        endpoint_list: the endpoints as HTML, in the tab Interpolate; updated together with `endpoints`.
        uploads: the folder of uploaded files.
        downloads: the folder of files that are offered for download.
    """

    models: ModelCache
    model: gr.State
    header: gr.HTML
    endpoints: gr.State
    endpoint_list: gr.HTML
    uploads: str
    downloads: str


@dataclass(frozen=True)
class Task(Generic[T]):
    """A run that an event handler asks for.

    Attributes:
        description: shown on the page while it runs.
        work: called with the run, as for `ddim.app.runs.run_events`.
        show_preview: returns the updates for the value of a `RunPreview`.
        show_result: returns the updates for the result.
    """

    description: str
    work: Callable[[Run], T]
    show_preview: Callable[[Any], Updates]
    show_result: Callable[[RunResult[T]], Updates]


def follow_run(prepare: Callable[..., Task[Any]], status: gr.HTML) -> Callable[..., AsyncIterator[Updates]]:
    """Make an event handler that runs a task and follows it on the page.

    Args:
        prepare: takes the event's inputs, checks them, and returns the task.
        status: shows the state of the run, or the reason of its failure.

    Returns:
        The handler.
    """

    async def handle(*values: Any) -> AsyncIterator[Updates]:
        audience = StreamAudience.of_this_event()
        with _stoppable(status) as stopped:
            try:
                # Decoding an image, or opening a model, takes its time.
                task = await asyncio.to_thread(prepare, *values)
                yield {status: page.status(task.description, 0)}
                async with aclosing(run_events(task.work, audience)) as events:
                    async for event in _until(stopped, events):
                        if isinstance(event, RunWaiting):
                            yield {status: page.status(f"Waiting: {pluralize(event.ahead, 'run')} before this one.")}
                        elif isinstance(event, RunProgress):
                            details = f"step {event.done} of {event.total}, {event.seconds:.1f} s"
                            yield {status: page.status(task.description, event.done / max(1, event.total), details)}
                        elif isinstance(event, RunPreview):
                            yield _some(task.show_preview(event.value))
                        else:
                            yield _some(task.show_result(event))
                if stopped.is_set():
                    yield {status: page.status("Stopped.")}
            except REPORTED_ERRORS as error:
                yield {status: page.failed(error)}

    return handle


def stop_runs(status: gr.HTML) -> Callable[[], Awaitable[None]]:
    """Make an event handler that stops the runs of the session that are followed in a place of the page.

    That a run was stopped is the last report of the run itself: no other report can come after it.

    Args:
        status: where the runs are followed.

    Returns:
        The handler.
    """

    async def handle() -> None:
        for stopped in _stops.get(_place(status), ()):
            stopped.set()

    return handle


_stops: dict[tuple[str | None, int], set[asyncio.Event]] = {}
"""What stops the runs that are followed, by the session and the place on the page."""


@contextmanager
def _stoppable(status: gr.HTML) -> Iterator[asyncio.Event]:
    """Register a run of this session, and return what `stop_runs` sets."""
    place, stopped = _place(status), asyncio.Event()
    _stops.setdefault(place, set()).add(stopped)
    try:
        yield stopped
    finally:
        _stops[place].discard(stopped)
        if not _stops[place]:
            del _stops[place]


def _place(status: gr.HTML) -> tuple[str | None, int]:
    return session_of_this_event(), status._id


async def _until(stopped: asyncio.Event, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    """Yield events until they end, or are to be stopped."""
    stopping = asyncio.ensure_future(stopped.wait())
    try:
        while True:
            coming = asyncio.ensure_future(anext(events))
            try:
                await asyncio.wait({coming, stopping}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                # Not waited for any more, by a stop or because the client has left.
                if not coming.done():
                    coming.cancel()
                    await asyncio.wait({coming})
            if coming.cancelled():
                return
            try:
                event = coming.result()
            except StopAsyncIteration:
                return
            yield event
    finally:
        stopping.cancel()


def report_errors(answer: Callable[..., Updates], status: gr.HTML) -> Callable[..., Updates]:
    """Make an event handler of a function that does not run the network.

    Args:
        answer: takes the event's inputs and returns the updates.
        status: shows the reason of a failure.

    Returns:
        The handler.
    """

    # Gradio passes the event where it finds the annotation, which `wraps` keeps.
    @wraps(answer)
    def handle(*values: Any) -> Updates:
        try:
            return _some(answer(*values))
        except REPORTED_ERRORS as error:
            return {status: page.failed(error)}

    return handle


def _some(updates: Updates) -> Updates:
    """Return updates as Gradio takes them: it counts an empty dict as a value of one component."""
    return updates or gr.skip()


def event_value(event: gr.EventData) -> Any:
    """Return the value that a script of the page sent with an event; `None` if it sent none.

    Args:
        event: the event.
    """
    return getattr(event, "value", None)


def show_endpoints(endpoints: Sequence[Endpoint]) -> str:
    """Return endpoints as HTML; a click removes one.

    Args:
        endpoints: the endpoints, in order.
    """
    if not endpoints:
        empty = grid([Cell(None, " ")] * 2, (1, 1), "Endpoints")
        return f"{empty}<p>No endpoints yet: pin images in the tab Sample, or add seeds and files below.</p>"
    cells = [
        Cell(endpoint.image, endpoint.label, endpoint.label, action="Remove", value=index)
        for index, endpoint in enumerate(endpoints)
    ]
    return grid(cells, (1, 1), "Endpoints")


def make_download_folder(parent: str | Path) -> Path:
    """Make a folder for files that are offered for download, and delete those older than `DOWNLOAD_SECONDS`.

    Args:
        parent: the folder of all downloads.

    Returns:
        The new folder.
    """
    for folder in Path(parent).iterdir():
        if time.time() - folder.stat().st_mtime > DOWNLOAD_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=parent))
