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
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from ddim.io.images import to_output
from ddim.pipeline import DDIMPipeline
from ddim.sampler import Sampler
from ddim.scheduler import DDIMScheduler

T = TypeVar("T")

REPORT_SECONDS = 0.1
"""Least time between reports of one kind: each costs the server time, which the network would have had."""

_device_thread = ThreadPoolExecutor(1, "device")
"""One thread for all runs: PyTorch's thread pool belongs to the thread that calls it."""

_active_runs: weakref.WeakSet[Run] = weakref.WeakSet()


class Cancelled(BaseException):
    """The run was cancelled. Not an `Exception`: no handler on the way may take it for a failure."""


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


class Run:
    """Work in progress.

    Args:
        report: takes the `RunProgress` and `RunPreview` events, in the thread of the work.
    """

    def __init__(self, report: Callable[[Any], Any]) -> None:
        self._report = report
        self._cancelled = threading.Event()
        self.started = time.monotonic()
        self._last_progress = self._last_preview = 0.0
        _active_runs.add(self)

    def cancel(self) -> None:
        """Stop at the next step."""
        self._cancelled.set()

    def pipeline(self, base: DDIMPipeline) -> DDIMPipeline:
        """Make a pipeline of this run alone on the network of another.

        Args:
            base: lends its network, which stays on its device.

        Returns:
            The pipeline; its steps are reported, and end when the run is cancelled.
        """
        # The scheduler is copied: a call sets its timesteps.
        scheduler = DDIMScheduler.from_config(base.scheduler.config)
        pipe = DDIMPipeline(base.unet, scheduler, base.engine)
        pipe.sampler = _RunSampler(base.unet, scheduler, base.engine, self)
        return pipe

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
            self.show(to_output(tensors["pred_original_sample"], "pil"))

    def show(self, value: Any) -> None:
        """Report an intermediate result.

        Args:
            value: the result.
        """
        self._report(RunPreview(value))


class _RunBar(tqdm):  # type: ignore[type-arg]
    """A progress bar that prints nothing and reports each step to a run."""

    def __init__(self, run: Run, total: int) -> None:
        super().__init__(disable=True)
        self._run, self._done, self._total = run, 0, total

    def update(self, n: float | None = 1) -> bool | None:
        self._done += int(n or 0)
        self._run.step(self._done, self._total)
        return None


class _RunSampler(Sampler):
    """A sampler whose progress bars report to a run."""

    def __init__(self, unet: Any, scheduler: DDIMScheduler, engine: str, run: Run) -> None:
        super().__init__(unet, scheduler, engine)
        self._run = run

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> tqdm[Any]:
        return _RunBar(self._run, total or 0)


async def run_events(work: Callable[[Run], T]) -> AsyncGenerator[RunProgress | RunPreview | RunResult[T], None]:
    """Do work in the thread of the device, after the runs that were started before.

    Args:
        work: called with the run.

    Yields:
        `RunProgress` and `RunPreview` events, and at the end the `RunResult`. When the iterator is closed or its task
        cancelled, the run is cancelled.

    Raises:
        Exception: whatever the work raises.
    """
    loop, events = asyncio.get_running_loop(), asyncio.Queue[RunProgress | RunPreview | None]()

    def report(event: RunProgress | RunPreview | None) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    run = Run(report)

    def execute() -> T:
        try:
            run.started = time.monotonic()
            run.check()
            return work(run)
        finally:
            report(None)

    future = loop.run_in_executor(_device_thread, execute)
    try:
        while (event := await events.get()) is not None:
            yield event
        yield RunResult(await future, time.monotonic() - run.started)
    finally:
        run.cancel()
        # The outcome of a cancelled run is retrieved, so that asyncio does not log it.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())


def stop_all() -> None:
    """Cancel all runs and start none; for the end of the program."""
    _device_thread.shutdown(wait=False, cancel_futures=True)
    for run in list(_active_runs):
        run.cancel()
