"""Who listens to which run, without a server."""

from __future__ import annotations

import asyncio

import pytest

from ddim.app import listeners as module
from ddim.app.listeners import MAX_KEYS, MAX_UNHEARD_RUNS, Listeners


def test_run_waits_for_a_stream_of_its_session_or_its_own() -> None:
    async def check() -> None:
        for key in ("session", "run"):
            listeners = Listeners()
            waiting = asyncio.ensure_future(listeners.arrived({"session", "run"}))
            await asyncio.sleep(0)
            assert not waiting.done()
            listeners.open(key)
            assert await waiting

    asyncio.run(check())


def test_waiting_for_a_listener_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LISTEN_SECONDS", 0.01)

    async def check() -> None:
        listeners = Listeners()
        listeners.open("another")
        assert not await listeners.arrived({"run"})

    asyncio.run(check())


def test_oldest_unheard_run_is_given_up_for_another() -> None:
    async def check() -> None:
        listeners = Listeners()
        waiting = [asyncio.ensure_future(listeners.arrived({str(i)})) for i in range(MAX_UNHEARD_RUNS + 2)]
        done, others = await asyncio.wait(waiting, timeout=0.05)
        assert done == set(waiting[:2])
        assert not any(task.result() for task in done)
        for i in range(MAX_UNHEARD_RUNS + 2):
            listeners.open(str(i))
        assert await asyncio.gather(*others) == [True] * MAX_UNHEARD_RUNS

    asyncio.run(check())


def test_run_ends_with_its_last_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER_SECONDS", 0.02)

    async def check() -> None:
        listeners = Listeners()
        for _ in range(3):
            listeners.open("run")
        left = asyncio.ensure_future(listeners.left({"run"}))
        listeners.close("run")
        listeners.close("run")
        await asyncio.sleep(0.01)
        assert not left.done()
        # A stream that the server ended counts a little longer.
        listeners.close_soon("run")
        await asyncio.sleep(0)
        assert not left.done()
        await asyncio.wait_for(left, 1)

    asyncio.run(check())


def test_remembered_keys_are_bounded() -> None:
    listeners = Listeners()
    for i in range(MAX_KEYS + 10):
        listeners.expect(str(i))
    assert not listeners.is_known("9")
    assert listeners.is_known("10")
    listeners.forget("10")
    assert not listeners.is_known("10")
