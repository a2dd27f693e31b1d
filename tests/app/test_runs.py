"""The line of runs that wait for the device, without a server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from ddim.app.runs import MAX_WAITING_RUNS, Run, RunResult, Unheard, run_events


class Listener:
    """An audience that comes and leaves when it is told to."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def arrived(self) -> bool:
        return True

    async def left(self) -> None:
        await self.gone.wait()


async def exhaust(events: AsyncGenerator[Any, None], first: asyncio.Future[Any]) -> None:
    await first
    async for _ in events:
        pass


def test_run_leaves_the_line_with_its_listener() -> None:
    """Even if whoever iterates over its events does not come back for a while."""

    async def check() -> None:
        release, listeners = threading.Event(), []

        def work(run: Run) -> None:
            release.wait(10)

        waiting = []
        for _ in range(MAX_WAITING_RUNS + 1):
            listeners.append(Listener())
            events = run_events(work, listeners[-1])
            task = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            waiting.append((events, task))
        with pytest.raises(RuntimeError, match=f"the queue is full: {MAX_WAITING_RUNS} runs wait already"):
            await anext(run_events(work, Listener()))
        for listener in listeners:
            listener.gone.set()
        await asyncio.sleep(0.05)
        events = run_events(lambda run: 3, Listener())
        following = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.05)
        release.set()
        result = await asyncio.wait_for(following, 10)
        assert isinstance(result, RunResult)
        assert result.value == 3
        await events.aclose()
        for other, task in waiting:
            with pytest.raises(Unheard):
                await exhaust(other, task)

    asyncio.run(check())
