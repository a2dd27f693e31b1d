"""How work runs: one piece at a time on the device, in a thread beside the server; told step by step, and stopped
within a step.

    async for event in start(lambda run: run.pipeline(pipe)(16).images):
        ...                            Step, Step, Preview, Step, ..., Result

A piece of work is a function of a `Run`, from which it gets its pipelines. Their progress bars tell each step; and when
the run shall stop, because its user says so or has left, they raise `Cancelled`, so that sampling, encoding and
interpolation all end at their next step. Whoever stops listening to `start` stops the run.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from ddim.io.images import to_output
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler

T = TypeVar("T")

SECONDS_BETWEEN = 0.1
"""Steps and previews are told no more often than that: each costs the server time, which the network would have had."""

_device = ThreadPoolExecutor(1, "device")
"""One thread for all runs: PyTorch's own threads belong to the one that asks them to work."""


_running: weakref.WeakSet[Run] = weakref.WeakSet()


class Cancelled(BaseException):
    """The run shall stop. Not an `Exception`: nothing on the way may take it for a failure of its own."""


@dataclass(frozen=True)
class Step:
    """How far the run is: `done` of `total` steps, after `seconds`."""

    done: int
    total: int
    seconds: float


@dataclass(frozen=True)
class Preview:
    """What there is to be seen by now: of sampling, the list of predicted x_0 as PIL images."""

    value: Any


@dataclass(frozen=True)
class Result(Generic[T]):
    """What the work returned, after `seconds`."""

    value: T
    seconds: float


class Run:
    """A piece of work that is under way.

    Args:
        tell: takes the `Step`s and `Preview`s, in the thread of the work.
    """

    def __init__(self, tell: Callable[[Any], Any]) -> None:
        self._tell = tell
        self._cancelled = threading.Event()
        self.started = time.monotonic()
        self._told = self._shown = 0.0
        _running.add(self)

    def cancel(self) -> None:
        """Stop at the next step."""
        self._cancelled.set()

    def pipeline(self, base: DDIMPipeline) -> DDIMPipeline:
        """A pipeline of this run alone, on the network of another.

        Args:
            base: lends its network, which stays where it is.
        """
        return _Pipeline(base, self)

    def check(self) -> None:
        """`Cancelled` if the run shall stop."""
        if self._cancelled.is_set():
            raise Cancelled

    def step(self, done: int, total: int) -> None:
        """Tell that a step is done; `Cancelled` if the run shall stop."""
        self.check()
        now = time.monotonic()
        if now - self._told >= SECONDS_BETWEEN or done == total:
            self._told = now
            self._tell(Step(done, total, now - self.started))

    def preview(self, pipe: DDIMPipeline, index: int, timestep: int, tensors: dict[str, Any]) -> None:
        """A `callback_on_step_end` that shows the predicted x_0."""
        now = time.monotonic()
        if now - self._shown >= SECONDS_BETWEEN:
            self._shown = now
            self.show(to_output(tensors["pred_original_sample"], "pil"))

    def show(self, value: Any) -> None:
        """Tell what there is to be seen."""
        self._tell(Preview(value))


class _Bar(tqdm):  # type: ignore[type-arg]
    """Prints nothing; tells a run of each step."""

    def __init__(self, run: Run, total: int) -> None:
        super().__init__(disable=True)
        self._run, self._done, self._total = run, 0, total

    def update(self, n: float | None = 1) -> bool | None:
        self._done += int(n or 0)
        self._run.step(self._done, self._total)
        return None


class _Pipeline(DDIMPipeline):
    def __init__(self, base: DDIMPipeline, run: Run) -> None:
        # A scheduler of its own: a call sets its timesteps.
        super().__init__(base.unet, DDIMScheduler.from_config(base.scheduler.config), base.engine)
        self._run = run

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> tqdm[Any]:
        return _Bar(self._run, total or 0)


async def start(work: Callable[[Run], T]) -> AsyncGenerator[Step | Preview | Result[T], None]:
    """Do a piece of work in the thread of the device, after those that were started before.

    Yields:
        A `Step` or `Preview` now and then, and in the end the `Result`. When the iterator is closed or its task
        cancelled, the run is stopped.

    Raises:
        Exception: what the work raises.
    """
    loop, told = asyncio.get_running_loop(), asyncio.Queue[Step | Preview | None]()

    def tell(event: Step | Preview | None) -> None:
        loop.call_soon_threadsafe(told.put_nowait, event)

    run = Run(tell)

    def do() -> T:
        try:
            run.started = time.monotonic()
            run.check()
            return work(run)
        finally:
            tell(None)

    future = loop.run_in_executor(_device, do)
    try:
        while (event := await told.get()) is not None:
            yield event
        yield Result(await future, time.monotonic() - run.started)
    finally:
        run.cancel()
        # Nobody is left to be told what it came to.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())


async def finish(work: Callable[[Run], T]) -> Result[T]:
    """Do a piece of work as `start`, and wait for its result."""
    async with aclosing(start(work)) as events:
        async for event in events:
            if isinstance(event, Result):
                return event
    raise RuntimeError("the work ended without a result")


def stop() -> None:
    """End all runs at their next steps, and begin none; for the end of the program."""
    _device.shutdown(wait=False, cancel_futures=True)
    for run in list(_running):
        run.cancel()
