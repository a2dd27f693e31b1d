"""Who listens to which run.

Gradio answers the request for a run at once, and its client then opens a stream of events, by its session or by the id
of the run. A run whose stream is not open does not start, and ends when the last stream is closed.

All functions belong to the event loop of the server.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

from gradio.context import LocalContext

LISTEN_SECONDS = 10
"""How long a run waits for its listener."""

MAX_UNHEARD_RUNS = 32
"""Runs that wait for a listener; the oldest one is given up for another."""

LINGER_SECONDS = LISTEN_SECONDS
"""How long a stream counts after the server has ended it: the client may just have asked for another run, which then
has as long as any other to be listened to."""

MAX_KEYS = 4096
"""Sessions and runs that are remembered."""


class Listeners:
    """The open streams, by key: the id of a session or of a run."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self._known: OrderedDict[str, None] = OrderedDict()
        self._waiters: set[asyncio.Future[None]] = set()
        self._unheard: list[asyncio.Future[None]] = []

    def expect(self, key: str) -> None:
        """Remember a key for which a run was requested.

        Args:
            key: of the session or the run.
        """
        self._known[key] = None
        self._known.move_to_end(key)
        while len(self._known) > MAX_KEYS:
            self._known.popitem(last=False)

    def forget(self, key: str) -> None:
        """Forget a key whose run has ended.

        Args:
            key: of the run.
        """
        self._known.pop(key, None)

    def is_known(self, key: str) -> bool:
        """Return whether a run was requested for a key.

        Args:
            key: of the session or the run.
        """
        return key in self._known

    def open(self, key: str) -> None:
        """Note that a stream was opened.

        Args:
            key: of the session or the run.
        """
        self._open[key] += 1
        self._wake()

    def close(self, key: str) -> None:
        """Note that the client has left a stream.

        Args:
            key: of the session or the run.
        """
        self._open[key] -= 1
        if self._open[key] <= 0:
            del self._open[key]
        self._wake()

    def close_soon(self, key: str) -> None:
        """Note that the server has ended a stream, after `LINGER_SECONDS`.

        Args:
            key: of the session or the run.
        """
        asyncio.get_running_loop().call_later(LINGER_SECONDS, self.close, key)

    def is_open(self, keys: Collection[str]) -> bool:
        """Return whether a stream of one of the keys is open.

        Args:
            keys: of a run and its session.
        """
        return any(key in self._open for key in keys)

    async def arrived(self, keys: Collection[str]) -> bool:
        """Wait until somebody listens.

        Args:
            keys: of a run and its session.

        Returns:
            Whether somebody does; `False` after `LISTEN_SECONDS`, or when `MAX_UNHEARD_RUNS` others wait.
        """
        if self.is_open(keys):
            return True
        given_up = asyncio.get_running_loop().create_future()
        self._unheard.append(given_up)
        while len(self._unheard) > MAX_UNHEARD_RUNS:
            _wake(self._unheard.pop(0))
        waiting = asyncio.ensure_future(self._until(lambda: self.is_open(keys)))
        try:
            await asyncio.wait({waiting, given_up}, timeout=LISTEN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            return self.is_open(keys)
        finally:
            waiting.cancel()
            if given_up in self._unheard:
                self._unheard.remove(given_up)

    async def left(self, keys: Collection[str]) -> None:
        """Wait until nobody listens any more.

        Args:
            keys: of a run and its session.
        """
        await self._until(lambda: not self.is_open(keys))

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            changed = asyncio.get_running_loop().create_future()
            self._waiters.add(changed)
            try:
                await changed
            finally:
                self._waiters.discard(changed)

    def _wake(self) -> None:
        for waiter in self._waiters:
            _wake(waiter)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


listeners = Listeners()
"""Those of the server of this process."""


def cancel_index(event: str) -> int:
    """Return what stands for the function in a request that cancels one event.

    Args:
        event: its id.

    Example:
        >>> cancel_index("0123456789abcdef")
        1757737011
    """
    return zlib.crc32(event.encode())


def session_of_this_event() -> str | None:
    """Return the id of the session whose event Gradio is handling; `None` for a client without one."""
    return getattr(LocalContext.request.get(None), "session_hash", None)


@dataclass(frozen=True)
class StreamAudience:
    """Who listens to a run of the page: streams of its session, or of the run itself.

    Attributes:
        keys: of the session and the run.
    """

    keys: frozenset[str]

    @classmethod
    def of_this_event(cls) -> StreamAudience:
        """Return the audience of the event that Gradio is handling.

        Gradio cancels tasks by their names, which hold the session and the function: all runs of a client that called
        one function. The task of the event is renamed, so that `cancel_index` stands for it alone.
        """
        session, event = session_of_this_event(), LocalContext.event_id.get(None)
        if event and (task := asyncio.current_task()):
            task.set_name(f"{session}_{cancel_index(event)}<gradio-sep>{event}")
        return cls(frozenset(key for key in (session, event) if key))

    async def arrived(self) -> bool:
        """Wait until somebody listens; return whether somebody does."""
        return await listeners.arrived(self.keys)

    async def left(self) -> None:
        """Wait until nobody listens any more."""
        await listeners.left(self.keys)
