"""The outermost layer of the server: everything that a request must pass before Gradio sees it.

Refusals are one sentence and a status of 4xx. Bodies are counted as they arrive, whatever their headers say, and a
client that is slower than the limits is refused too. On a loopback address the names `Host` and `Origin` must be this
machine's own: a foreign page must not reach the server through a browser on this machine, whatever address its name
resolves to.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddim.app.listeners import Listeners, cancel_index
from ddim.app.requests import (
    SESSION,
    Function,
    Refusal,
    check_body,
    check_path,
    find_route,
    parse_body,
    stream_key,
)
from ddim.app.uploads import UploadLedger
from ddim.validation import shown

MAX_BODY_BYTES = 2_000_000
"""Size of a request that is not an upload."""

CHUNK_SECONDS = 10
"""Time in which the next part of a body must arrive."""

BODY_SECONDS = 15
"""Time in which a whole body that is not an upload must arrive."""

UPLOAD_SECONDS = 300
"""Time in which a whole upload must arrive."""

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
"""Browsers fetch from this server only, whatever a model card or Gradio's own page refers to."""

HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
)

HOST_HEADERS = ("host", "x-forwarded-host", "x-gradio-server")
"""Headers from which Gradio makes its own address."""


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine only.

    Args:
        host: the address to listen on.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("0.0.0.0")
        (True, False)
    """
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class Access:
    """Who may use the server.

    Attributes:
        host: the address that it listens on.
        share: whether it is published on the internet.
        allowed: further names that it is reached by.
    """

    host: str
    share: bool = False
    allowed: frozenset[str] = frozenset()

    def check(self, headers: Headers) -> None:
        """Check the names in the headers of a request.

        Args:
            headers: of the request.

        Raises:
            Refusal: 421 for the name of another host, 403 for a page of another origin.

        Example:
            >>> Access("127.0.0.1").check(Headers({"host": "localhost:7860"}))
        """
        if self.share:
            return
        if is_loopback(self.host):
            check_host(headers, {"localhost", "127.0.0.1", "::1", self.host.strip("[]"), *self.allowed})
        check_origin(headers, self.allowed)


class Guard:
    """Middleware that refuses what the page does not need.

    Args:
        app: the application that it wraps.
        access: who may use the server.
        functions: what may be called, by index.
        listeners: notes who listens to which run.
        uploads: counts uploads.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        functions: Mapping[int, Function],
        listeners: Listeners,
        uploads: UploadLedger,
    ) -> None:
        self._app, self._access, self._functions = app, access, functions
        self._listeners, self._uploads = listeners, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as ASGI asks.

        Args:
            scope: describes the request.
            receive: returns the next part of its body.
            send: takes the parts of the response.
        """
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "this server has no websockets"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        response = _Response(send, scope["path"])
        try:
            self._access.check(Headers(scope=scope))
            await self._dispatch(scope, receive, response)
        except Refusal as refusal:
            await response.refuse(scope, refusal.status, str(refusal))
        except Exception as error:
            # All work reports its failures itself: what ends here is Gradio's way to refuse a malformed request.
            if os.environ.get("DDIM_DEBUG"):
                traceback.print_exc()
            await response.refuse(scope, 400, f"the request is malformed ({type(error).__name__})")

    async def _dispatch(self, scope: Scope, receive: Receive, response: _Response) -> None:
        path = scope["path"]
        route, names = find_route(scope["method"], path)
        if not SESSION.fullmatch(names.get("session", "x")):
            raise Refusal(400, "the session must be up to 64 letters and digits")
        match route.kind:
            case "plain":
                check_path(path)
                await self._app(scope, receive, response.send)
            case "stream":
                key = stream_key(names, scope["query_string"].decode("latin-1"), self._listeners)
                await self._answer_stream(key, "key" in names, scope, receive, response)
            case "json":
                await self._answer_json(path, names, scope, receive, response)
            case "upload":
                await self._answer_upload(scope, receive, response)

    async def _answer_stream(self, key: str, is_run: bool, scope: Scope, receive: Receive, response: _Response) -> None:
        """Answer by a stream, which ends as soon as its client leaves."""
        left = asyncio.Event()

        async def wait_until_left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()

        async def receive_end() -> Message:
            await left.wait()
            return {"type": "http.disconnect"}

        self._listeners.open(key)
        watch = asyncio.ensure_future(wait_until_left())
        answer = asyncio.ensure_future(self._app(scope, receive_end, response.send))
        try:
            await asyncio.wait({watch, answer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if is_run:
                self._listeners.forget(key)
            if response.is_complete:
                self._listeners.close_soon(key)
            else:
                self._listeners.close(key)
            watch.cancel()
            answer.cancel()
        # Whatever becomes of a stream is in the stream.
        await asyncio.gather(watch, answer, return_exceptions=True)
        if not left.is_set():
            await response.refuse(scope, 404, "the stream of events broke off")

    async def _answer_json(
        self, path: str, names: Mapping[str, str], scope: Scope, receive: Receive, response: _Response
    ) -> None:
        headers = Headers(scope=scope)
        data = await read_body(receive, headers)
        body = parse_body(data, headers.get("content-type", ""))
        check_body(path, names, body, self._functions)
        if isinstance(session := body.get("session_hash"), str):
            self._listeners.expect(session)
        if "/cancel" in path:
            data = json.dumps(body | {"fn_index": cancel_index(body["event_id"])}).encode()
        response.on_body = self._expect_run
        messages = iter([{"type": "http.request", "body": data, "more_body": False}])

        async def receive_read() -> Message:
            return next(messages, None) or await receive()

        await self._app(scope, receive_read, response.send)

    def _expect_run(self, data: bytes) -> None:
        """Remember the run that a response names."""
        answer = json.loads(data or b"null")
        if isinstance(answer, dict) and isinstance(run := answer.get("event_id"), str):
            self._listeners.expect(run)

    async def _answer_upload(self, scope: Scope, receive: Receive, response: _Response) -> None:
        """Pass an upload on part by part; Gradio removes what arrived when a part raises `MultiPartException`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + UPLOAD_SECONDS
        length = Headers(scope=scope).get("content-length", "")
        if not Headers(scope=scope).get("content-type", "").startswith("multipart/form-data"):
            raise Refusal(415, "the content type of an upload must be multipart/form-data")
        response.on_body = lambda body: "an upload must have files in its field 'files'" if body == b"[]" else None
        try:
            with self._uploads.upload((scope.get("client") or ("unknown", 0))[0]) as upload:
                if length.isdecimal():
                    self._uploads.check(upload, int(length[:20]))

                async def receive_counted() -> Message:
                    try:
                        message = await asyncio.wait_for(receive(), min(CHUNK_SECONDS, deadline - loop.time()))
                        self._uploads.add(upload, len(message.get("body", b"")))
                    except TimeoutError:
                        raise MultiPartException("the upload is too slow") from None
                    except ValueError as error:
                        raise MultiPartException(str(error)) from None
                    if message["type"] == "http.disconnect":
                        raise MultiPartException("the upload ended early")
                    return message

                await self._app(scope, receive_counted, response.send)
                if response.status >= 400:
                    upload.num_bytes = 0
        except ValueError as error:
            raise Refusal(413, str(error)) from None


def check_host(headers: Headers, names: Collection[str]) -> None:
    """Check that a request names a host of this server: a foreign name may resolve to any address.

    Args:
        headers: of the request.
        names: hosts that requests may name.

    Raises:
        Refusal: 421 for another host.
    """
    for value in [value for header in HOST_HEADERS for value in headers.getlist(header)]:
        if _split(value if "://" in value else f"//{value}").hostname not in names:
            raise Refusal(
                421,
                f"the host must be one of {', '.join(sorted(names))}, got {shown(value)}; "
                "others require a server started with --host or --allow-host",
            )


def check_origin(headers: Headers, names: Collection[str]) -> None:
    """Check that a request comes from a page of this server, or from a program, which names no origin.

    Args:
        headers: of the request.
        names: hosts that the server is reached by, whatever a proxy made of the host that the browser named.

    Raises:
        Refusal: 403 for a page of another origin.
    """
    for origin in headers.getlist("origin"):
        parts, host = _split(origin), headers.get("x-forwarded-host") or headers.get("host", "")
        if parts.netloc.lower() != host.lower() and parts.hostname not in names:
            raise Refusal(403, f"the origin must be this server, got {shown(origin)}; others require --allow-host")


def _split(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError:
        return SplitResult("", "", "", "", "")


async def read_body(receive: Receive, headers: Mapping[str, str]) -> bytes:
    """Read the body of a request that is not an upload.

    Args:
        receive: returns its next part.
        headers: of the request.

    Returns:
        The body.

    Raises:
        Refusal: 413 once it has more than `MAX_BODY_BYTES`, 408 when it is too slow, 400 if it ends early.
    """
    too_large = Refusal(413, f"a request has at most {MAX_BODY_BYTES:,} bytes")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
        raise too_large
    loop = asyncio.get_running_loop()
    deadline = loop.time() + BODY_SECONDS
    body = bytearray()
    while True:
        try:
            message = await asyncio.wait_for(receive(), max(0, min(CHUNK_SECONDS, deadline - loop.time())))
        except TimeoutError:
            raise Refusal(408, "the body of the request is too slow") from None
        if message["type"] == "http.disconnect":
            raise Refusal(400, "the body of the request ended early")
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise too_large
        if not message.get("more_body", False):
            return bytes(body)


def explain(path: str, body: bytes) -> str:
    """Return why Gradio refused a request, as one sentence.

    Args:
        path: of the request.
        body: of Gradio's response.

    Example:
        >>> explain("/x", b'{"detail": [{"loc": ["body", "data"], "msg": "Input should be a valid list"}]}')
        'body.data: Input should be a valid list'
    """
    text = body.decode(errors="replace")
    try:
        answer = json.loads(text)
    except ValueError:
        answer = text
    detail = answer.get("detail", answer.get("error")) if isinstance(answer, dict) else answer
    if isinstance(detail, list) and detail and isinstance(detail[0], dict):
        place = ".".join(str(part) for part in detail[0].get("loc", ()))
        detail = f"{place}: {detail[0].get('msg', 'invalid')}"
    if detail in ("Not Found", "Forbidden", "Bad Request", None, "", []):
        return f"nothing is offered at {shown(path)}"
    if detail == "Internal Server Error":
        return "the request is malformed"
    return " ".join(str(detail).split())


class _Response:
    """A response on its way: adds `HEADERS`, and makes one sentence of every refusal.

    `on_body` is called with the whole body of a response that is none, and returns why it is refused after all.

    Args:
        send: takes the parts of the response.
        path: of the request.
    """

    def __init__(self, send: Send, path: str) -> None:
        self._send, self._path = send, path
        self._start: Message | None = None
        self._body = bytearray()
        self._started = self.is_complete = False
        self.status = 0
        self.on_body: Callable[[bytes], str | None] | None = None

    async def send(self, message: Message) -> None:
        """Take a part of Gradio's response."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], *HEADERS]
            if self.status >= 400 or self.on_body:
                self._start = message
                return
        elif self._start is not None:
            self._body += message.get("body", b"")
            if message.get("more_body", False):
                return
            await self._send_collected()
            return
        self._started = True
        await self._send(message)
        self.is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def _send_collected(self) -> None:
        start, body = self._start, bytes(self._body)
        assert start is not None
        self._started = True
        if self.status >= 400:
            self.status = 400 if self.status == 500 else self.status
            await self._refusal(self.status, explain(self._path, body))({"type": "http"}, _nothing, self._send)
            return
        if self.on_body and (reason := self.on_body(body)):
            self.status = 400
            await self._refusal(400, reason)({"type": "http"}, _nothing, self._send)
            return
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})

    async def refuse(self, scope: Scope, status: int, sentence: str) -> None:
        """Refuse the request, unless it has been answered."""
        if not self._started:
            self._started = True
            await self._refusal(status, sentence)(scope, _nothing, self._send)

    @staticmethod
    def _refusal(status: int, sentence: str) -> PlainTextResponse:
        # The rest of the body is not read.
        headers = {name.decode(): value.decode() for name, value in HEADERS} | {"connection": "close"}
        return PlainTextResponse(sentence, status, headers)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
