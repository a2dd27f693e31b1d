"""What stands between the page and the network: the server, its limits, and what browsers are told not to fetch."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from gradio import processing_utils
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddim.app import api, interpolate, invert, model, page, runs, sample, steps
from ddim.app.inputs import MAX_MEGABYTES
from ddim.app.models import Models
from ddim.app.tab import Shared, listed

MAX_WAITING = 16
"""Runs that wait; one more is told that the queue is full."""

MAX_BODY = 2_000_000
"""Bytes of a request that is no upload."""

KEPT_FOR = 3600
"""Seconds before files of a run, and uploads, are deleted."""

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "base-uri 'self'; form-action 'self'"
)
"""Browsers fetch from this server alone, whatever a model card or Gradio's own page asks for."""


class Guard:
    """Middleware: adds `POLICY` to each answer, and refuses bodies that are too large before they are read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        # Uploads have Gradio's own limit.
        if not scope["path"].endswith("/upload") and length.isdigit() and int(length) > MAX_BODY:
            answer = PlainTextResponse(f"a request has at most {MAX_BODY:,} bytes", 413)
            await answer(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self._app(scope, receive, send_guarded)


async def _fetch_nothing(url: str, cache_dir: str) -> str:
    """Stands where Gradio would download a file that a client names by its address."""
    raise gr.Error("give the picture itself; this server fetches nothing from other addresses", print_exception=False)


def build(models: Models, files: str) -> gr.Blocks:
    """The page and its endpoints, not yet served.

    Args:
        models: that it may open.
        files: a folder for what it offers for download.
    """
    with gr.Blocks(title="ddim", analytics_enabled=False, delete_cache=(KEPT_FOR, KEPT_FOR)) as blocks:
        listing = gr.HTML(listed([]), js_on_load=page.CLICKS, elem_id="endpoints", min_height=130, render=False)
        shared = Shared(models, gr.State(models.names[0]), gr.State([]), listing, get_upload_folder(), files)
        page.header()
        for name, tab in (
            ("Sample", sample.tab),
            ("Steps", steps.tab),
            ("Interpolate", interpolate.tab),
            ("Invert", invert.tab),
            ("Model", model.tab),
        ):
            with gr.Tab(name):
                tab(shared)
        api.endpoints(shared)
    return blocks.queue(max_size=MAX_WAITING)


def serve(
    names: Sequence[str],
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    allow_paths: bool = False,
    open_browser: bool = True,
    device: str = "auto",
    engine: str = "auto",
) -> None:
    """Serve the page until the program is interrupted or told to end (SIGTERM); its address is printed.

    Args:
        names: of the models that are opened at once, as for `DDIMPipeline.from_pretrained`.
        host: the address to listen at.
        port: 0 for a free one.
        share: publish it on the internet through Gradio's servers.
        allow_paths: let the page open any folder of this machine as a model.
        open_browser: show it.
        device: where networks are put.
        engine: how they are run.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: for a damaged one, an unknown device or engine.
        OSError: if the port is taken, or the host is none of this machine.
    """
    models = Models(names, allow_paths, device, engine)
    processing_utils.async_ssrf_protected_download = _fetch_nothing
    number = check_port(host, port)
    with tempfile.TemporaryDirectory(prefix="ddim-app-") as temporary:
        # Of Gradio: uploads, and copies of what is offered for download.
        os.environ["GRADIO_TEMP_DIR"] = str(Path(temporary, "gradio"))
        files = Path(temporary, "files")
        files.mkdir()
        blocks = build(models, str(files))
        _, address, public = blocks.launch(
            server_name=host,
            server_port=number,
            share=share,
            inbrowser=open_browser,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=MAX_MEGABYTES * 1_000_000,
            footer_links=["api", "settings"],
            ssr_mode=False,
            theme=page.THEME,
            css=page.CSS,
            run_history=False,
            show_error=True,
            app_kwargs={"middleware": [Middleware(Guard)]},
        )
        print(public or address, flush=True)
        if threading.current_thread() is threading.main_thread():
            # Ends as Ctrl+C does.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        finally:
            runs.stop()
            blocks.close(verbose=False)


def check_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        OSError: if it is taken, or the host is none of this machine.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(f"cannot listen at {host}, port {port}: {error.strerror}; try another --port") from None
        return int(probe.getsockname()[1])
