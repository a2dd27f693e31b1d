"""The server: its limits, its content security policy, and its life from start to SIGTERM."""

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

from ddim.app import api, page, runs
from ddim.app.events import Shared, show_endpoints
from ddim.app.inputs import MAX_MEGABYTES
from ddim.app.models import ModelCache
from ddim.app.tabs import interpolate, invert, model, sample, steps

MAX_QUEUED_RUNS = 16
"""Runs that wait; further ones are refused."""

MAX_BODY_BYTES = 2_000_000
"""Size of a request that is not an upload."""

FILE_LIFETIME_SECONDS = 3600
"""Age at which the files of runs and uploads are deleted."""

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "base-uri 'self'; form-action 'self'"
)
"""Browsers fetch from this server only, whatever a model card or Gradio's own page refers to."""


class Guard:
    """Middleware that adds `POLICY` to each response, and refuses bodies that are too large before they are read.

    Args:
        app: the application that it wraps.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as ASGI asks.

        Args:
            scope: describes the request.
            receive: returns the next part of its body.
            send: takes the parts of the response.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        # Gradio limits uploads itself.
        if not scope["path"].endswith("/upload") and length.isdigit() and int(length) > MAX_BODY_BYTES:
            answer = PlainTextResponse(f"a request has at most {MAX_BODY_BYTES:,} bytes", 413)
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
    """Replace the function with which Gradio downloads a file that a client names by its address."""
    raise gr.Error("give the image itself; this server fetches nothing from other addresses", print_exception=False)


def build(models: ModelCache, downloads: str) -> gr.Blocks:
    """Build the page and its endpoints, not yet served.

    Args:
        models: the models that it may open.
        downloads: a folder for the files that it offers for download.

    Returns:
        The page.
    """
    with gr.Blocks(title="ddim", analytics_enabled=False, delete_cache=(FILE_LIFETIME_SECONDS,) * 2) as blocks:
        endpoint_list = gr.HTML(
            show_endpoints([]), js_on_load=page.CLICKS, elem_id="endpoints", min_height=130, render=False
        )
        shared = Shared(models, gr.State(models.names[0]), gr.State([]), endpoint_list, get_upload_folder(), downloads)
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
        api.add_endpoints(shared)
    return blocks.queue(max_size=MAX_QUEUED_RUNS)


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
    """Serve the page until the program is interrupted or gets SIGTERM; its address is printed.

    Args:
        names: models that are opened at once: built-in models, folders or hub ids, at least one.
        host: the address to listen on.
        port: the port to listen on; 0 for a free one.
        share: publish the page on the internet through Gradio's servers.
        allow_paths: let the page open any folder of this machine as a model.
        open_browser: open the page in a browser.
        device: where networks run: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        engine: how they run: `auto`, `eager` or `compile`.

    Raises:
        FileNotFoundError: if no such model exists.
        ValueError: if a model is damaged, or no such device or engine exists.
        OSError: if the port is taken, or the host is not an address of this machine.
    """
    models = ModelCache(names, allow_paths, device, engine)
    processing_utils.async_ssrf_protected_download = _fetch_nothing
    free_port = check_port(host, port)
    with tempfile.TemporaryDirectory(prefix="ddim-app-") as temporary:
        # Gradio stores uploads there, and copies of files that are offered for download.
        os.environ["GRADIO_TEMP_DIR"] = str(Path(temporary, "gradio"))
        downloads = Path(temporary, "downloads")
        downloads.mkdir()
        blocks = build(models, str(downloads))
        _, address, public = blocks.launch(
            server_name=host,
            server_port=free_port,
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
            # SIGTERM ends the server as Ctrl+C does.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        finally:
            runs.stop_all()
            blocks.close(verbose=False)


def check_port(host: str, port: int) -> int:
    """Check that a port is free.

    Args:
        host: the address to listen on.
        port: the port; 0 for any free one.

    Returns:
        The port.

    Raises:
        OSError: if it is taken, or the host is not an address of this machine.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(f"cannot listen on {host}, port {port}: {error.strerror}; choose another port") from None
        return int(probe.getsockname()[1])
