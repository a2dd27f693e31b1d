"""Requests to the web page: a real server on a loopback address, and anything that a client may send.

Every answer is a result or one sentence with a status of 4xx, in time; no file is shown that was not offered; images
are those that the library samples.
"""

from __future__ import annotations

import contextlib
import io
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import h11
import httpx
import numpy as np
from hypothesis import strategies as st
from PIL import Image

from app_server import AppServer
from ddim.pipeline import DDIMPipeline
from fuzz.harness import CRASH, HANG, MAX_BYTES, MEMORY, TRACEBACK, Fault, Refused, expect, refuse
from fuzz.models import save_pipeline
from fuzz.mutations import MUTATIONS, VALUES, Mutation, mutate

API = "/gradio_api"
SECRET = "this file is not offered"
SECONDS = 18
PARAMETERS: dict[str, dict[str, Any]] = {
    "sample": {
        "model": st.just("tiny"),
        "count": st.integers(1, 3),
        "steps": st.integers(1, 4),
        "seed": st.integers(0, 9),
        "eta": st.sampled_from([0, 0.0, 1, 0.5]),
        "order": st.integers(1, 2),
        "spacing": st.sampled_from(["the model's own", "trailing", "quad"]),
    },
    "consistency": {"model": st.just("tiny"), "count": st.just(1), "seed": st.integers(0, 3)},
    "interpolate": {
        "model": st.just("tiny"),
        "seeds": st.lists(st.integers(0, 3), max_size=3),
        "pictures": st.just([]),
        "frames": st.integers(2, 3),
        "steps": st.integers(2, 3),
        "closed": st.booleans(),
    },
    "reconstruct": {"picture": st.just("uploaded"), "model": st.just("tiny"), "steps": st.just(2)},
    "edit": {
        "picture": st.just("uploaded"),
        "model": st.just("tiny"),
        "strength": st.sampled_from([0, 0.5, 1]),
        "count": st.just(1),
        "steps": st.just(2),
        "seed": st.just(0),
    },
    "inpaint": {
        "picture": st.just("uploaded"),
        "mask": st.just("uploaded"),
        "model": st.just("tiny"),
        "count": st.integers(1, 3),
        "steps": st.integers(1, 4),
        "seed": st.integers(0, 9),
        "label": st.just("any"),
        "guidance": st.just(1),
    },
    "super_resolve": {
        "picture": st.just("uploaded"),
        "model": st.just("tiny"),
        "factor": st.sampled_from([2, 4, 8]),
        "kernel": st.sampled_from(["box", "bicubic"]),
        "count": st.integers(1, 3),
        "steps": st.integers(1, 4),
        "seed": st.integers(0, 9),
        "label": st.just("any"),
        "guidance": st.just(1),
    },
    "info": {"model": st.just("tiny")},
}
FILES = ("picture", "pictures", "mask")
"""Arguments that are uploads."""

PICTURES = st.sampled_from(
    [
        *(
            {"path": "/etc/passwd"},
            {"path": "secret.txt"},
            {"path": "../secret.txt"},
            {"url": "http://127.0.0.1:1/x.png"},
        ),
        *(
            {"path": "\0"},
            {"path": ""},
            {},
            {"path": 3},
            "uploaded",
            "x.png",
            "data:image/png;base64,AAAA",
            {"path": "uploaded"},
        ),
        {"path": "uploaded", "url": "file:///etc/passwd", "meta": {"_type": "gradio.FileData"}},
    ]
)
PATHS = st.sampled_from(
    [
        *(
            "/",
            "/config",
            "/theme.css",
            "/assets/x",
            "/static/../secret.txt",
            "/x",
            "//",
            "/%00",
            "/..",
            "/docs",
            "/openapi.json",
        ),
        *(
            f"{API}/info",
            f"{API}/queue/status",
            f"{API}/queue/data",
            f"{API}/heartbeat/x",
            f"{API}/heartbeat/../x",
            f"{API}/user",
        ),
        *(
            f"{API}/call/sample/x",
            f"{API}/call/x/x",
            f"{API}/upload_progress",
            f"{API}/reset",
            f"{API}/proxy=http://x/",
        ),
        *(
            f"{API}/file={name}"
            for name in ("secret.txt", "/etc/passwd", "../secret.txt", "http://x/", "%2e%2e/secret.txt")
        ),
        *(
            f"{API}/file=%00",
            f"{API}/file=" + "x" * 3000,
            f"{API}/stream/x/y",
            f"{API}/component_server",
            f"{API}/dev/reload",
        ),
        *(
            f"{API}/custom_component/x/y/z",
            "/login",
            "/logout",
            "/robots.txt",
            "/manifest.json",
            "/pwa_icon/9",
            "/monitoring",
        ),
    ]
) | st.text(max_size=12).map(lambda text: "/" + quote(text.encode("utf-8", "replace")))
HEADERS = st.lists(
    st.sampled_from(
        [
            *(
                ("host", "evil.example"),
                ("host", ""),
                ("host", "127.0.0.1:1"),
                ("origin", "http://evil.example"),
                ("origin", "null"),
            ),
            *(
                ("x-forwarded-host", "evil.example"),
                ("content-type", "text/plain"),
                ("content-type", ""),
                ("cookie", "x=" * 2000),
            ),
            *(
                ("content-length", "99999999999"),
                ("content-length", "-1"),
                ("content-length", "0"),
                ("range", "bytes=0-"),
            ),
            *(
                ("transfer-encoding", "chunked"),
                ("expect", "100-continue"),
                ("accept-encoding", "br;q=nan"),
                ("upgrade", "websocket"),
            ),
            *(
                ("authorization", "Basic AAAA"),
                ("x-gradio-server", "http://evil.example"),
                ("if-none-match", "*"),
                ("via", "x"),
            ),
        ]
    ),
    max_size=2,
)
FOREIGN = {("host", "evil.example"), ("origin", "http://evil.example"), ("x-forwarded-host", "evil.example")}


class Request(NamedTuple):
    """A request.

    Attributes:
        kind: `call` and `run` an endpoint, `plain`, `upload` or `raw`.
        path: of the address, or the endpoint's name.
        method: of HTTP.
        body: values by name of an endpoint, or any JSON.
        headers: that replace or join the usual ones.
        data: of an upload.
        mutations: damage to the bytes of a raw request, or of an uploaded image.
    """

    kind: str
    path: str
    method: str = "POST"
    body: Any = None
    headers: list[tuple[str, str]] = []  # noqa: RUF012 - a default of a named tuple, never changed
    data: bytes = b""
    mutations: list[Mutation] = []  # noqa: RUF012


@st.composite
def requests(draw: Callable[[Any], Any]) -> Request:
    """Draw a call of an endpoint, with valid values or hostile ones, or any other request."""
    kind = draw(st.sampled_from(["call", "call", "call", "run", "plain", "upload", "raw"]))
    headers = draw(st.just([]) | st.just([]) | HEADERS)
    if kind in ("call", "run"):
        name = draw(st.sampled_from(["sample", "sample", *PARAMETERS]))
        body = {key: draw(value) for key, value in PARAMETERS[name].items()}
        for key in draw(st.sampled_from([[], [draw(st.sampled_from(sorted(body)))]])):
            body[key] = draw(PICTURES | VALUES if key in FILES else VALUES)
        if draw(st.integers(0, 9)) == 0:
            body[draw(st.sampled_from(["x", "session_hash", "data", "fn_index", "event_id"]))] = draw(VALUES)
        return Request(kind, name, body=body, headers=headers)
    if kind == "plain":
        method = draw(
            st.sampled_from(["GET", "GET", "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "X"])
        )
        return Request(kind, draw(PATHS), method, draw(st.none() | VALUES), headers)
    if kind == "upload":
        data = draw(st.sampled_from([b"", b"x" * 100, b"GIF89a", encode_image()]) | st.binary(max_size=50))
        return Request(
            kind,
            draw(st.sampled_from(["x.png", "../x.png", "", "x" * 400, "\0.png", "é.png"])),
            "POST",
            None,
            headers,
            data,
        )
    path = draw(st.sampled_from([f"{API}/call/sample", f"{API}/queue/join", f"{API}/upload", "/", f"{API}/cancel"]))
    body = draw(
        st.sampled_from([{"data": ["tiny", 1, 1, 0, 0, 1, "quad"]}, {"data": []}, {"session_hash": "x"}]) | VALUES
    )
    return Request(kind, path, "POST", body, headers, b"", draw(MUTATIONS))


EXAMPLES = requests()


def make_image() -> np.ndarray:
    """Return an image of the model's size whose lower half is bright, which makes it a mask, too."""
    return np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)


def encode_image() -> bytes:
    """Return a small PNG."""
    stream = io.BytesIO()
    Image.fromarray(make_image()).save(stream, "PNG")
    return stream.getvalue()


class Check:
    """Sends requests to one server after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "app"
        self.folder.mkdir()
        save_pipeline(self.folder / "tiny")
        (self.folder / "secret.txt").write_text(SECRET)
        self.pipe = DDIMPipeline.from_pretrained(self.folder / "tiny")
        self.pipe.set_progress_bar_config(disable=True)
        self.server = AppServer(self.folder, "tiny").__enter__()
        self.client = httpx.Client(base_url=self.server.url, timeout=SECONDS)
        answer = self.client.post(f"{API}/upload", files={"files": ("x.png", encode_image())})
        self.uploaded = answer.json()[0]

    def close(self) -> None:
        """End the server."""
        self.client.close()
        with contextlib.suppress(AssertionError):
            self.server.__exit__()

    def __call__(self, request: Request) -> None:
        """Send a request and judge the answer, and what became of the server."""
        written = self.server.log.stat().st_size
        try:
            {"call": self.call, "run": self.call, "plain": self.send, "upload": self.upload, "raw": self.raw}[
                request.kind
            ](request)
        except httpx.TimeoutException as error:
            raise Fault(HANG, f"no answer in {SECONDS} s: {error!r}") from None
        except (h11.LocalProtocolError, httpx.LocalProtocolError, httpx.InvalidURL, httpx.UnsupportedProtocol):
            raise Refused("the client does not send this") from None
        except httpx.RemoteProtocolError:
            if not request.headers:
                raise
            raise Refused("the server closed the connection") from None
        finally:
            if self.server.process.poll() is not None:
                raise Fault(CRASH, f"the server ended with {self.server.process.returncode}: {self.log(0)}")
            if self.server.memory() > MAX_BYTES:
                raise Fault(MEMORY, f"the server has {self.server.memory() >> 20} MB")
            if "Traceback" in self.log(written):
                raise Fault(TRACEBACK, self.log(written))

    def log(self, start: int) -> str:
        """Return what the server has logged from a position on."""
        return self.server.log.read_bytes()[start:].decode(errors="replace")[-3000:]

    def call(self, request: Request) -> None:
        """Call an endpoint, and listen to the run if it is short."""
        body = replace_uploads(request.body, self.uploaded)
        name = request.path
        path = f"{API}/call/v2/{name}" if request.kind == "call" else f"{API}/run/{name}"
        content = body if request.kind == "call" else {"data": list(body.values())}
        if request.kind == "run" and is_long(body):
            return
        answer = self.client.post(
            path, content=to_json(content), headers=make_headers(request.headers, "application/json")
        )
        check_answer(answer, request.headers)
        if request.kind == "run":
            self.check_result(name, body, answer.json()["data"][0])
            return
        if is_long(body):
            raise Refused("a long run, which nobody listens to")
        with self.server.listen(f"/{name}", answer.json()["event_id"]) as reports:
            last = list(reports)[-1]
        if not isinstance(last, dict) or "error" in last:
            refuse(str(last.get("error") if isinstance(last, dict) else last))
        self.check_result(name, body, last)

    def check_result(self, name: str, body: dict[str, Any], result: Any) -> None:
        """Compare the images of samples with those of the library."""
        expect(isinstance(result, dict), f"a result {result!r:.300}")
        # What the endpoint `info` says of a model's images is text.
        for image in result.get("images", []) if name != "info" else []:
            expect(self.folder in Path(image["path"]).parents, f"a file {image['path']}")
        if name in ("inpaint", "super_resolve"):
            self.check_answers(name, body, result)
        if name != "sample" or body["eta"] or body["spacing"] != "the model's own":
            return
        count, seed = int(body["count"]), int(body["seed"])
        expect(len(result["images"]) == count, f"{len(result['images'])} images instead of {count}")
        expect(result["seeds"] == list(range(seed, seed + count)), f"seeds {result['seeds']}")
        settings = {"num_inference_steps": int(body["steps"]), "order": int(body["order"])}
        expected = self.pipe.sample_images(count, seed, **settings)
        for image, own in zip(result["images"], expected, strict=True):
            largest = int(np.abs(self.pixels(image) - np.asarray(own, int)).max())
            expect(largest <= 1, "an image that is not the library's")

    def check_answers(self, name: str, body: dict[str, Any], result: Any) -> None:
        """Compare what is known of the answers of a restoration with the image that was uploaded."""
        expect(len(result["images"]) == int(body["count"]), f"{len(result['images'])} answers")
        image = make_image().astype(float)
        for answer in result["images"]:
            pixels = self.pixels(answer).astype(float)
            if name == "inpaint":
                expect(bool((abs(pixels - image)[image < 128] <= 1).all()), "known pixels that are not the image's")
            elif body["kernel"] == "box":
                f = int(body["factor"])
                means = [values.reshape(8 // f, f, 8 // f, f).mean((1, 3)) for values in (pixels, image)]
                expect(float(abs(means[0] - means[1]).max()) < 2, "an answer of another measurement")

    def pixels(self, image: dict[str, Any]) -> np.ndarray:
        """Return an image of a result."""
        answer = self.client.get(f"{API}/file={quote(image['path'])}")
        return np.asarray(Image.open(io.BytesIO(answer.content)), int)

    def send(self, request: Request) -> None:
        """Send a request with any path and method."""
        content = None if request.body is None else to_json(request.body)
        headers = make_headers(request.headers, "application/json")
        with self.client.stream(request.method, request.path, content=content, headers=headers) as answer:
            if answer.headers.get("content-type", "").startswith("text/event-stream"):
                return
            answer.read()
        expect(SECRET not in answer.text and "root:" not in answer.text, "a file that is not offered")
        check_answer(answer, request.headers, has_body=request.method != "HEAD")

    def upload(self, request: Request) -> None:
        """Upload a file."""
        files = {"files": (request.path, request.data)}
        answer = self.client.post(f"{API}/upload", files=files, headers=make_headers(request.headers, None))
        check_answer(answer, request.headers)
        for path in answer.json():
            expect(self.folder in Path(path).resolve().parents and Path(path).is_file(), f"uploaded to {path}")
            expect(Path(path).read_bytes() == request.data, "another file than the one that was uploaded")

    def raw(self, request: Request) -> None:
        """Send bytes that may not be HTTP, and close."""
        address = urlsplit(self.server.url)
        content = to_json(request.body)
        lines = [f"POST {request.path} HTTP/1.1", f"Host: {address.netloc}", f"Content-Length: {len(content)}"]
        lines += [
            "Content-Type: application/json",
            "Connection: close",
            *(f"{name}: {value}" for name, value in request.headers),
        ]
        data = mutate("\r\n".join(lines).encode() + b"\r\n\r\n" + content, request.mutations)
        with socket.create_connection((address.hostname, address.port), timeout=SECONDS) as connection:
            answer = b""
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                while part := connection.recv(65536):
                    answer += part
            except TimeoutError:
                if not answer:
                    raise Fault(HANG, f"no answer in {SECONDS} s") from None
            except ConnectionError:
                pass
        status = answer.split(b" ")[1] if answer.startswith(b"HTTP/") else b"400"
        if status.startswith(b"5"):
            raise Fault(TRACEBACK, f"status {status!r}: {answer[-1000:]!r}")
        if not status.startswith(b"2"):
            raise Refused(answer[-200:].decode(errors="replace").replace("\n", " "))


def make_headers(changes: list[tuple[str, str]], content_type: str | None) -> list[tuple[str, str]]:
    """Return headers, those of an example instead of the usual ones."""
    names = {name for name, _ in changes}
    usual = [] if content_type is None or "content-type" in names else [("content-type", content_type)]
    return [*usual, *changes]


def check_answer(answer: httpx.Response, headers: list[tuple[str, str]], has_body: bool = True) -> None:
    """Raise a refusal, or a fault where a refusal is not one sentence, or a foreign page got an answer."""
    if answer.status_code >= 500:
        raise Fault(TRACEBACK, f"status {answer.status_code}: {answer.text[:2000]}")
    if answer.status_code >= 400:
        if not has_body:
            raise Refused(str(answer.status_code))
        refuse(answer.text)
    foreign = [header for header in headers if header in FOREIGN and header[0] != "x-forwarded-host"]
    expect(not foreign, f"status {answer.status_code} for {foreign}")


def replace_uploads(value: Any, path: str) -> Any:
    """Return a value with the path of the uploaded image instead of its name."""
    if value == "uploaded":
        return {"path": path, "meta": {"_type": "gradio.FileData"}}
    if isinstance(value, dict):
        return {
            key: path if item == "uploaded" and key == "path" else replace_uploads(item, path)
            for key, item in value.items()
        }
    return value


def is_long(body: dict[str, Any]) -> bool:
    """Return whether a run would take many steps, or many images."""
    return any(
        isinstance(value, int | float) and value > 64
        for key, value in body.items()
        if key in ("count", "steps", "frames")
    )


def to_json(value: Any) -> bytes:
    """Return the body of a request; surrogates are what JSON escapes them to."""
    return json.dumps(value).encode()


def make_check(folder: Path) -> Check:
    """Return the check of a request."""
    return Check(folder)
