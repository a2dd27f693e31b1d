"""Runs that are followed on the page: a stop is the run's own last report, and reaches no other run."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import gradio as gr
import pytest

from ddim.app import events
from ddim.app.events import Task, follow_run, stop_runs
from ddim.app.listeners import StreamAudience
from ddim.app.runs import Run


def work(run: Run) -> None:
    for _ in range(20):
        run.check()
        time.sleep(0.02)


async def reports(status: gr.HTML) -> list[str]:
    """What is shown in a place of the page while a run is followed there."""
    task = Task("Working", work, lambda value: {}, lambda result: {status: "result"})
    return [update[status] async for update in follow_run(lambda: task, status)() if status in update]


@pytest.mark.parametrize("stopped", ["running", "waiting"])
def test_stop_is_the_last_report_of_the_run(monkeypatch: pytest.MonkeyPatch, stopped: str) -> None:
    monkeypatch.setattr(StreamAudience, "of_this_event", classmethod(lambda cls: None))
    with gr.Blocks():
        running, waiting = gr.HTML(), gr.HTML()

    async def stop_one() -> dict[str, Any]:
        tasks = {"running": asyncio.ensure_future(reports(running))}
        await asyncio.sleep(0.05)
        tasks["waiting"] = asyncio.ensure_future(reports(waiting))
        await asyncio.sleep(0.05)
        await stop_runs(running if stopped == "running" else waiting)()
        return {name: (await task)[-1] for name, task in tasks.items()}

    last = asyncio.run(stop_one())
    assert "Stopped." in last.pop(stopped)
    assert list(last.values()) == ["result"]
    assert not events._stops
