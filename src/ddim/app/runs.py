"""How work runs: one run at a time on the device, in a thread beside the server, with progress, stopped within a step.

    async for event in run_events(lambda run: run.pipeline(pipe)(16).images):
        ...                            RunProgress, RunProgress, RunPreview, RunProgress, ..., RunResult

Work is a function of a `Run`, from which it gets its pipelines. Their progress bars report each step; and when the run
is cancelled, because its user stopped it or left, they raise `Cancelled`, so that sampling, encoding and interpolation
all end at their next step. Whoever stops iterating over `run_events` cancels the run.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from ddim.app.pictures import show_output
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler

T = TypeVar("T")

REPORT_SECONDS = 0.1
"""Least time between reports of one kind: each costs the server time, which the network would have had."""

MAX_WAITING_RUNS = 16
"""Runs that wait for the device; further ones are refused."""

_device_thread = ThreadPoolExecutor(1, "device")
"""One thread for all runs: PyTorch's thread pool belongs to the thread that calls it."""

_line: list[Run] = []
"""The runs in order; the first one has the device. It belongs to the server's event loop."""


class Cancelled(BaseException):
    """The run was cancelled. Not an `Exception`: no handler on the way may take it for a failure."""


class Unheard(RuntimeError):
    """Nobody listens to the run."""


@dataclass(frozen=True)
class RunWaiting:
    """A run waits for the device.

    Attributes:
        ahead: runs before it.
    """

    ahead: int


@dataclass(frozen=True)
class RunProgress:
    """How far a run is.

    Attributes:
        done: steps done.
        total: steps of the run.
        seconds: since its start.
    """

    done: int
    total: int
    seconds: float


@dataclass(frozen=True)
class RunPreview:
    """An intermediate result: of sampling, the list of predicted x_0 as PIL images."""

    value: Any


@dataclass(frozen=True)
class RunResult(Generic[T]):
    """The result of a run.

    Attributes:
        value: what the work returned.
        seconds: since its start.
    """

    value: T
    seconds: float


class Audience(Protocol):
    """Who listens to a run."""

    async def arrived(self) -> bool:
        """Wait until somebody listens; return whether somebody does."""

    async def left(self) -> None:
        """Wait until nobody listens any more."""


class Run:
    """Work in progress.

    Args:
        report: takes the run's events, in any thread.
    """

    def __init__(self, report: Callable[[Any], Any]) -> None:
        self._report = report
        self._cancelled = threading.Event()
        self.started = time.monotonic()
        self._last_progress = self._last_preview = 0.0

    def cancel(self) -> None:
        """Stop at the next step."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._cancelled.is_set()

    def wait(self, ahead: int) -> None:
        """Report the runs before this one.

        Args:
            ahead: how many.
        """
        self._report(RunWaiting(ahead))

    def pipeline(self, base: DDIMPipeline) -> DDIMPipeline:
        """Make a pipeline of this run alone on the network of another.

        Args:
            base: lends its network, which stays on its device.

        Returns:
            The pipeline; its steps are reported, and end when the run is cancelled.
        """
        # The scheduler is copied: a call sets its timesteps.
        scheduler = DDIMScheduler.from_config(base.scheduler.config)
        return _RunPipeline(base.unet, scheduler, base.engine, self)

    def check(self) -> None:
        """Raise `Cancelled` if the run was cancelled.

        Raises:
            Cancelled: if it was.
        """
        if self._cancelled.is_set():
            raise Cancelled

    def step(self, done: int, total: int) -> None:
        """Report a step.

        Args:
            done: steps done.
            total: steps of the run.

        Raises:
            Cancelled: if the run was cancelled.
        """
        self.check()
        now = time.monotonic()
        if now - self._last_progress >= REPORT_SECONDS or done == total:
            self._last_progress = now
            self._report(RunProgress(done, total, now - self.started))

    def preview(self, pipe: DDIMPipeline, index: int, timestep: int, tensors: dict[str, Any]) -> None:
        """Report the predicted x_0: a `callback_on_step_end` of `DDIMPipeline`.

        Args:
            pipe: the pipeline that samples.
            index: of the step.
            timestep: of the step.
            tensors: with `pred_original_sample`, (N, C, H, W) in [-1, 1].
        """
        now = time.monotonic()
        if now - self._last_preview >= REPORT_SECONDS:
            self._last_preview = now
            self.show(show_output(pipe, pipe.sampler.to_output(tensors["pred_original_sample"], "np")))

    def show(self, value: Any) -> None:
        """Report an intermediate result.

        Args:
            value: the result.
        """
        self._report(RunPreview(value))


def _reporting(run: Run, items: Sequence[Any]) -> Iterator[Any]:
    """Yield items, and report each to a run when the next one is asked for."""
    for done, item in enumerate(items, 1):
        yield item
        run.step(done, len(items))


class _RunPipeline(DDIMPipeline):
    """A pipeline whose progress bars report to a run."""

    def __init__(self, unet: Any, scheduler: DDIMScheduler, engine: str, run: Run) -> None:
        super().__init__(unet, scheduler, engine=engine)
        self._run = run

    def progress_bar(  # type: ignore[override]
        self, iterable: Iterable[Any] | None = None, total: int | None = None
    ) -> Iterator[Any]:
        return _reporting(self._run, list(range(total or 0) if iterable is None else iterable))


Event = RunWaiting | RunProgress | RunPreview


async def run_events(
    work: Callable[[Run], T], audience: Audience | None = None
) -> AsyncGenerator[RunWaiting | RunProgress | RunPreview | RunResult[T], None]:
    """Do work in the thread of the device, after the runs that were started before.

    Args:
        work: called with the run.
        audience: who listens to the run; `None` for whoever iterates.

    Yields:
        `RunWaiting`, `RunProgress` and `RunPreview` events, and at the end the `RunResult`. When the iterator is closed
        or its task cancelled, or the audience leaves, the run is cancelled.

    Raises:
        Unheard: if the audience does not come, or leaves.
        RuntimeError: if `MAX_WAITING_RUNS` runs wait already.
        Exception: whatever the work raises.
    """
    if audience and not await audience.arrived():
        raise Unheard("nobody listens to this run; open its stream of events right after asking for it")
    if len(_line) > MAX_WAITING_RUNS:
        raise RuntimeError(f"the queue is full: {MAX_WAITING_RUNS} runs wait already; try again later")
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | None]()

    def report(event: Event | None) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    run = Run(report)

    def execute() -> T:
        try:
            run.started = time.monotonic()
            run.check()
            return work(run)
        finally:
            report(None)

    async def leave() -> None:
        assert audience is not None
        await audience.left()
        run.cancel()
        # At once: whoever iterates may take its time to come back.
        _leave_line(run)
        report(None)

    leaving = asyncio.ensure_future(leave()) if audience else None
    _line.append(run)
    future = loop.run_in_executor(_device_thread, execute)
    try:
        if len(_line) > 1:
            yield RunWaiting(len(_line) - 1)
        while (event := await events.get()) is not None:
            yield event
        if run.is_cancelled:
            raise Unheard("nobody listens to this run any more")
        yield RunResult(await future, time.monotonic() - run.started)
    finally:
        run.cancel()
        _leave_line(run)
        if leaving:
            leaving.cancel()
        # A run that waits leaves the executor; the outcome of a cancelled one is retrieved, so that it is not logged.
        future.cancel()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())


def _leave_line(run: Run) -> None:
    """Take a run out of the line, if it is in it, and let the others know their places."""
    if run in _line:
        _line.remove(run)
        for ahead, other in enumerate(_line):
            if ahead:
                other.wait(ahead)


def stop_all() -> None:
    """Cancel all runs and start none; for the end of the program."""
    _device_thread.shutdown(wait=False, cancel_futures=True)
    for run in list(_line):
        run.cancel()
