"""What the server refuses before Gradio sees it: one sentence and a status of 4xx, never a 500, never a hang."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.datastructures import Headers

from app_server import AppServer
from ddim.app import guard
from ddim.app.guard import Access, Guard, is_loopback, read_body
from ddim.app.listeners import Listeners
from ddim.app.requests import Refusal
from ddim.app.uploads import UploadLedger

JSON = {"content-type": "application/json"}
SAMPLE = ["mnist", 1, 1, 0, 0, 1, "the model's own"]
LONG: dict[str, Any] = {"count": 16, "steps": 1000}
SHORT: dict[str, Any] = {"count": 1, "steps": 1}
BOUNDARY = {"content-type": "multipart/form-data; boundary=x"}


def check_sentence(answer: httpx.Response, request: object) -> None:
    text = answer.text
    assert 400 <= answer.status_code < 500, (request, answer.status_code, text)
    assert 10 < len(text) < 400, (request, text)
    assert "\n" not in text, (request, text)
    assert "Traceback" not in text


# --- malformed requests


def bodies() -> Iterator[tuple[str, str, bytes]]:
    """(path, content type, body)"""
    call, join, v2 = "/gradio_api/call/sample", "/gradio_api/queue/join", "/gradio_api/call/v2/sample"
    run, cancel, reset = "/gradio_api/run/sample", "/gradio_api/cancel", "/gradio_api/reset"
    deep = b'{"data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    nested: Any = 1
    for _ in range(40):
        nested = [nested]
    for path in (call, join, v2, run, cancel, reset):
        for body in (b"", b"{", b"null", b"3", b'"x"', b"[]", b"{}", b"\xff\xfe", deep, b'{"data": NaN}', b"\0" * 100):
            yield path, "application/json", body
        yield path, "application/json", json.dumps({"data": nested}).encode()
        yield path, "application/json", b'{"data": [' + b"1" * 5000 + b"]}"
        yield path, "application/json", json.dumps({"data": SAMPLE, "session_hash": "../../etc"}).encode()
        for content_type in ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x" * 3000):
            yield path, content_type, json.dumps({"data": SAMPLE}).encode()
    for data in ([], SAMPLE[:-1], [*SAMPLE, 1], "mnist", {"a": 1}, None, 1e308):
        yield call, "application/json", json.dumps({"data": data}).encode()
        yield join, "application/json", json.dumps({"data": data, "fn_index": 0, "session_hash": "abc"}).encode()
    for index in (-1, 10**6, 10**30, 1.5, "0", [0], {}, True, None):
        yield join, "application/json", json.dumps({"data": [], "fn_index": index, "session_hash": "abc"}).encode()
    for session in (None, 7, "", "x" * 1000, "a b", "a\0b", ["abc"], {"a": 1}):
        body = {"data": [], "fn_index": 0, "session_hash": session, "event_id": "x"}
        yield join, "application/json", json.dumps(body).encode()
        yield cancel, "application/json", json.dumps(body).encode()
    for key, value in (("trigger_id", "x"), ("trigger_id", [1]), ("event_id", 3), ("batched", "yes")):
        yield call, "application/json", json.dumps({"data": SAMPLE, key: value}).encode()
    for name in ("nothing", "sample/x/y", "%00", "..%2f..", "sample%0d%0aX: y", "x" * 5000, "SAMPLE"):
        yield f"/gradio_api/call/{name}", "application/json", json.dumps({"data": SAMPLE}).encode()
        yield f"/gradio_api/run/{name}", "application/json", json.dumps({"data": SAMPLE}).encode()
    for argument in ("stepz", "", "model\0", "a" * 3000):
        yield v2, "application/json", json.dumps({argument: 3}).encode()
    for content_type in ("", "multipart/form-data", "multipart/form-data; boundary=", "application/json"):
        yield "/gradio_api/upload", content_type, b"--x\r\n\r\n--x--"
    for part in (b"", b"x", b"--x\r\n", b"--x\r\nContent-Disposition: form-data\r\n\r\nhello\r\n--x--\r\n"):
        yield "/gradio_api/upload", "multipart/form-data; boundary=x", part
    field = b'--x\r\nContent-Disposition: form-data; name="files"\r\n\r\nno file\r\n--x--\r\n'
    yield "/gradio_api/upload", "multipart/form-data; boundary=x", field
    long = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="' + b"a" * 20_000 + b'"\r\n\r\n\r\n--x--\r\n'
    )
    yield "/gradio_api/upload", "multipart/form-data; boundary=x", long


PATHS = (
    "/nothing",
    "/.env",
    "/admin",
    "/login",
    "/logout",
    "/docs",
    "/openapi.json",
    "/monitoring",
    "/monitoring/x",
    "/pwa_icon/7",
    "/config/../../etc/passwd",
    "/gradio_api/proxy=https://x.hf.space/",
    "/gradio_api/file=https://example.org/x.png",
    "/gradio_api/file=//example.org/x",
    "/gradio_api/file=file:///etc/passwd",
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file=../../etc/passwd",
    "/gradio_api/file=%00",
    "/gradio_api/file=/proc/self/environ",
    "/gradio_api/file=.",
    "/gradio_api/file/etc/passwd",
    "/gradio_api/deep_link?session_hash=abc",
    "/gradio_api/dev/reload",
    "/gradio_api/runs",
    "/gradio_api/token",
    "/gradio_api/custom_component/x/client/y/z",
    "/gradio_api/stream/a/b/1/playlist.m3u8",
    "/gradio_api/queue/data",
    "/gradio_api/queue/data?session_hash=nobody",
    "/gradio_api/queue/data?session_hash=%00",
    "/gradio_api/call/sample/none",
    "/gradio_api/call/v2/sample/none",
    "/gradio_api/heartbeat/%00",
    "/gradio_api/heartbeat/a%20b",
    "/assets/../../../etc/passwd",
    "/assets/%2e%2e/%2e%2e/server.py",
    "/static/..%2f..%2fx",
    "/assets/none.js",
    "/svelte/none",
    "/static/%00",
    "/gradio_api/upload",
    "/gradio_api/queue/join",
    "//etc/passwd",
    "/gradio_api/upload_progress",
    "/gradio_api/upload_progress?upload_id=x",
)


def test_malformed_requests_are_refused_in_one_sentence(server: AppServer) -> None:
    num_requests = 0
    with httpx.Client(base_url=server.url, timeout=20) as client:
        for path, content_type, body in bodies():
            headers = {"content-type": content_type} if content_type else {}
            started = time.monotonic()
            answer = client.post(path, content=body, headers=headers)
            # All arguments have defaults.
            if answer.is_success:
                assert (path, body) == ("/gradio_api/call/v2/sample", b"{}")
            else:
                check_sentence(answer, (path, content_type, body[:80]))
            assert time.monotonic() - started < 10
            num_requests += 1
        for path in PATHS:
            check_sentence(client.get(path), path)
            num_requests += 1
        for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "XYZZY"):
            for path in ("/", "/gradio_api/call/sample", "/gradio_api/queue/data"):
                check_sentence(client.request(method, path), (method, path))
                num_requests += 1
    assert num_requests > 200
    assert len(server.call("/sample", count=1, steps=1)["images"]) == 1
    assert "Traceback" not in server.log.read_text()


def exchange(server: AppServer, data: bytes, chunks: Iterator[bytes] | None = None) -> tuple[bytes, int]:
    """Send bytes over a socket, and return the answer and the number of bytes that could be sent."""
    parts = urlsplit(server.url)
    num_sent = 0
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
        connection.sendall(data)
        try:
            for chunk in chunks or ():
                connection.sendall(chunk)
                num_sent += len(chunk)
        except OSError:
            pass
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except OSError:
            pass
    return answer, num_sent


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"NONSENSE\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"POST /gradio_api/call/sample HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -3\r\n\r\n",
        b"POST /gradio_api/call/sample HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: " + b"9" * 50 + b"\r\n\r\n",
        b"POST /gradio_api/call/sample HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_malformed_http_is_refused(server: AppServer, data: bytes) -> None:
    answer, _ = exchange(server, data + b"\r\n" * 3)
    assert answer.startswith(b"HTTP/1.1 4"), answer[:200]


def test_websockets_are_refused(server: AppServer) -> None:
    answer = server.http.get(
        "/gradio_api/queue/join",
        headers={
            "connection": "upgrade",
            "upgrade": "websocket",
            "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
            "sec-websocket-version": "13",
        },
    )
    assert 400 <= answer.status_code < 500


# --- bodies


def chunks(size: int, total: int) -> Iterator[bytes]:
    for _ in range(total // size):
        yield f"{size:x}\r\n".encode() + b"x" * size + b"\r\n"


@pytest.mark.parametrize("path", ["/gradio_api/call/sample", "/gradio_api/queue/join", "/gradio_api/cancel"])
def test_chunked_bodies_are_counted(server: AppServer, path: str) -> None:
    headers = "Host: 127.0.0.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    head = f"POST {path} HTTP/1.1\r\n{headers}"
    before = server.memory()
    answer, num_sent = exchange(server, head.encode(), chunks(100_000, 200_000_000))
    # What lies in the buffers of both sockets was not read.
    assert num_sent < 20_000_000
    assert server.memory() < before + 20_000_000
    assert not answer or b" 413 " in answer.splitlines()[0]


def test_chunked_body_gets_its_sentence(server: AppServer) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 100_000

    answer = server.http.post("/gradio_api/call/sample", content=body(), headers=JSON)
    assert (answer.status_code, answer.text) == (413, "a request has at most 2,000,000 bytes")


def test_endless_upload_ends_and_leaves_nothing(server: AppServer) -> None:
    part = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="%d.png"\r\n\r\n' + b"x" * 9_000_000 + b"\r\n"
    )

    def body() -> Iterator[bytes]:
        for index in range(12):
            data = part.replace(b"%d", str(index).encode())
            for start in range(0, len(data), 500_000):
                yield data[start : start + 500_000]

    answer = server.http.post("/gradio_api/upload", content=body(), headers=BOUNDARY)
    assert answer.status_code == 413
    assert answer.text == "uploads exceed the maximum allowed size of 81 MB per request"
    assert not [path for path in server.folder.rglob("*") if path.is_file() and path.stat().st_size > 5_000_000]
    # A refused upload does not count.
    assert server.http.post("/gradio_api/upload", files={"files": ("x.png", bytes(1000))}).is_success


Receive = Callable[[], Any]


def receive_parts(*parts: bytes, then: float = 60) -> Receive:
    """The `receive` of a body whose parts arrive at once, and whose end does not."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.sleep(then)
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    return receive


def test_slow_body_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "CHUNK_SECONDS", 0.05)
    with pytest.raises(Refusal, match="the body of the request is too slow") as caught:
        asyncio.run(read_body(receive_parts(b"{"), {}))
    assert caught.value.status == 408


def test_trickling_body_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    with pytest.raises(Refusal, match="too slow"):
        asyncio.run(read_body(receive, {}))


def test_body_that_ends_early_is_refused() -> None:
    with pytest.raises(Refusal, match="the body of the request ended early"):
        asyncio.run(read_body(receive_parts(b"{", then=0), {}))


def test_failures_of_gradio_become_one_sentence() -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError("secret")

    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    guarded = Guard(fail, Access("127.0.0.1"), {}, Listeners(), UploadLedger())
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")], "query_string": b""}
    asyncio.run(guarded(scope, receive_parts(), send))
    assert sent[0]["status"] == 400
    assert sent[1]["body"] == b"the request is malformed (KeyError)"


def test_sum_of_uploads_is_limited() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'["x.png"]'})

    guarded = Guard(app, Access("127.0.0.1"), {}, Listeners(), UploadLedger(max_client=1000))

    def upload(client: str) -> int:
        headers = {
            b"host": b"localhost",
            b"content-type": b"multipart/form-data; boundary=x",
            b"content-length": b"800",
        }
        scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": list(headers.items())}
        messages = [{"type": "http.request", "body": bytes(400), "more_body": more} for more in (True, False)]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return messages.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(guarded(scope | {"client": (client, 1)}, receive, send))
        return int(sent[0]["status"])

    assert [upload("a"), upload("a"), upload("b"), upload("a")] == [200, 413, 200, 413]


# --- hosts and origins


FOREIGN_HOSTS = (
    "evil.example",
    "evil.example:7860",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "[",
    "0.0.0.0",
)


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/info"])
def test_foreign_hosts_are_refused(server: AppServer, host: str, path: str) -> None:
    answer = server.http.get(path, headers={"host": host, "origin": f"http://{host}"})
    assert answer.status_code == 421
    assert "the host must be one of 127.0.0.1, ::1, localhost, got " in answer.text
    assert "access-control-allow-origin" not in answer.headers
    forwarded = server.http.get(path, headers={"x-forwarded-host": host})
    assert forwarded.status_code == 421


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:1", "https://127.0.0.1.evil.example"]
)
def test_foreign_origins_are_refused(server: AppServer, origin: str) -> None:
    preflight = {"origin": origin, "access-control-request-method": "POST"}
    for answer in (
        server.http.get("/config", headers={"origin": origin}),
        server.http.post("/gradio_api/call/sample", json={"data": SAMPLE}, headers={"origin": origin}),
        server.http.options("/gradio_api/call/sample", headers=preflight),
    ):
        assert answer.status_code in (403, 405)
        assert "access-control-allow-origin" not in answer.headers


def test_own_names_are_accepted(server: AppServer) -> None:
    port = urlsplit(server.url).port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "localhost:9000"):
        answer = server.http.get("/config", headers={"host": host, "origin": f"http://{host}"})
        assert answer.status_code == 200, host


@pytest.mark.parametrize(
    ("access", "host", "origin", "status"),
    [
        (Access("0.0.0.0"), "server.example:7860", "http://server.example:7860", None),
        (Access("0.0.0.0"), "server.example:7860", None, None),
        (Access("0.0.0.0"), "server.example:7860", "http://evil.example", 403),
        (Access("192.168.0.7"), "192.168.0.7", "null", 403),
        (Access("127.0.0.1", allowed=frozenset({"ddim.example"})), "ddim.example", "https://ddim.example", None),
        (Access("127.0.0.1", allowed=frozenset({"ddim.example"})), "127.0.0.1", "https://ddim.example", None),
        (Access("127.0.0.1", allowed=frozenset({"ddim.example"})), "evil.example", None, 421),
        (Access("localhost"), "127.0.0.1:7860", None, None),
        (Access("::1"), "[::1]:7860", "http://[::1]:7860", None),
        (Access("127.0.0.1", share=True), "x.gradio.live", "https://x.gradio.live", None),
    ],
)
def test_access_depends_on_the_address(access: Access, host: str, origin: str | None, status: int | None) -> None:
    headers = Headers({"host": host} | ({"origin": origin} if origin else {}))
    if status is None:
        access.check(headers)
    else:
        with pytest.raises(Refusal) as caught:
            access.check(headers)
        assert caught.value.status == status


def test_loopback_addresses_are_known() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "server"))


# --- listeners


def cpu_seconds(server: AppServer) -> float:
    import psutil

    times = psutil.Process(server.process.pid).cpu_times()
    return float(times.user + times.system)


def test_runs_that_nobody_listens_to_do_not_start(server: AppServer) -> None:
    for _ in range(40):
        server.post("/sample", **LONG)
    before = cpu_seconds(server)
    started = time.monotonic()
    assert len(server.call("/sample", count=1, steps=1)["images"]) == 1
    assert time.monotonic() - started < 10
    # A run of 16 images takes a core for a minute.
    time.sleep(1)
    assert cpu_seconds(server) - before < 3


def test_posted_run_waits_for_its_listener(server: AppServer) -> None:
    run = server.post("/sample", **SHORT)
    time.sleep(1)
    with server.listen("/sample", run) as reports:
        assert any("images" in report for report in reports)
    again = server.http.get(f"/gradio_api/call/sample/{run}")
    assert again.status_code == 404
    assert "waits for a listener" in again.text


def test_second_listener_is_refused_and_the_run_ends_with_the_first(server: AppServer) -> None:
    run = server.post("/sample", **LONG)
    with server.listen("/sample", run) as reports:
        next(report for report in reports if "done" in report)
        second = server.http.get(f"/gradio_api/call/sample/{run}")
        assert (second.status_code, second.text) == (409, f"the run '{run}' is listened to already")
    started = time.monotonic()
    assert len(server.call("/sample", count=1, steps=1)["images"]) == 1
    assert time.monotonic() - started < 10


def test_waiting_run_leaves_the_queue_with_its_listener(server: AppServer) -> None:
    with server.listen("/sample", server.post("/sample", **LONG)) as reports:
        next(report for report in reports if "done" in report)
        for _ in range(18):  # more than may wait at a time
            with server.listen("/sample", server.post("/sample", **SHORT)) as others:
                assert next(others) == {"waiting": 1}
            time.sleep(0.05)


def test_dropped_streams_leave_the_server_well(server: AppServer) -> None:
    def drop(_: int) -> None:
        parts = urlsplit(server.url)
        run = server.post("/sample", **LONG)
        with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
            connection.sendall(f"GET /gradio_api/call/sample/{run} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            connection.recv(10)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(drop, range(24)))
    # Until the server has noticed them all, its queue may be full.
    deadline = time.monotonic() + 60
    while "images" not in (result := server.run("/sample", count=1, steps=1)):
        assert "the queue is full" in str(result), result
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert len(result["images"]) == 1
