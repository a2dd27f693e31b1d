"""The server: the page, the guard around it, and its life from start to SIGTERM."""

from __future__ import annotations

import inspect
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import gradio as gr
from gradio import processing_utils
from gradio.routes import App
from gradio.utils import get_upload_folder

from ddim.app import api, page, runs
from ddim.app.events import Shared, show_endpoints
from ddim.app.folders import server_folder
from ddim.app.guard import Access, Guard
from ddim.app.inputs import MAX_MEGABYTES
from ddim.app.listeners import MAX_UNHEARD_RUNS, listeners
from ddim.app.models import ModelCache
from ddim.app.pictures import describe_images
from ddim.app.requests import Function
from ddim.app.runs import MAX_WAITING_RUNS
from ddim.app.tabs import interpolate, invert, model, restore, sample, steps
from ddim.app.uploads import UPLOAD_LIFETIME_SECONDS, UploadLedger

MAX_EVENTS = MAX_UNHEARD_RUNS + 2 * MAX_WAITING_RUNS
"""Events that Gradio handles at a time: runs that wait for a listener or the device, and those that are refused."""

CLEAN_SECONDS = 60
"""Time between looks for old files of runs and uploads."""
IDLE_SECONDS = 0.05
"""How long Gradio's queue sleeps where it is empty; by its own default a thousandth of a second, a tenth of a core."""


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
    with gr.Blocks(
        title="ddim", analytics_enabled=False, delete_cache=(CLEAN_SECONDS, UPLOAD_LIFETIME_SECONDS)
    ) as blocks:
        endpoint_list = gr.HTML(show_endpoints([]), js_on_load=page.CLICKS, elem_id="endpoints", render=False)
        first = models.names[0]
        header = gr.HTML(page.header(first, describe_images(models.open(first)), models.names), elem_id="header")
        shared = Shared(models, gr.State(first), header, gr.State([]), endpoint_list, get_upload_folder(), downloads)
        for name, tab in (
            ("Sample", sample.tab),
            ("Steps", steps.tab),
            ("Interpolate", interpolate.tab),
            ("Invert", invert.tab),
            ("Restore", restore.tab),
            ("Model", model.tab),
        ):
            with gr.Tab(name):
                tab(shared)
        api.add_endpoints(shared)
    # Runs wait in `ddim.app.runs`; this bounds what arrives faster than Gradio takes it.
    return blocks.queue(max_size=MAX_WAITING_RUNS, api_open=False)


def functions(blocks: gr.Blocks) -> dict[int, Function]:
    """Return what requests may call, by index.

    Args:
        blocks: the page.
    """
    return {
        index: Function(
            function.api_name if isinstance(function.api_name, str) else "",
            len(function.inputs),
            tuple(inspect.signature(function.fn).parameters) if function.fn and function.api_visibility == "public"
            else (),
        )
        for index, function in blocks.fns.items()
    }  # fmt: skip


def guarded(blocks: gr.Blocks, access: Access) -> Callable[[App], AbstractAsyncContextManager[None]]:
    """Return a lifespan of the application that makes a `Guard` its outermost layer, around Gradio's own.

    Args:
        blocks: the page.
        access: who may use the server.
    """

    @asynccontextmanager
    async def lifespan(app: App) -> AsyncIterator[None]:
        assert app.middleware_stack is not None
        app.middleware_stack = Guard(app.middleware_stack, access, functions(blocks), listeners, UploadLedger())
        yield

    return lifespan


def serve(
    names: Sequence[str],
    access: Access,
    port: int = 7860,
    allow_paths: bool = False,
    open_browser: bool = True,
    device: str = "auto",
    engine: str = "auto",
) -> None:
    """Serve the page until the program is interrupted or gets SIGTERM; its address is printed.

    Args:
        names: models that are opened at once: built-in models, folders or hub ids, at least one.
        access: who may use the server; with the address to listen on, and whether the page is published on the internet
            through Gradio's servers.
        port: the port to listen on; 0 for a free one.
        allow_paths: let the page open any folder of this machine as a model.
        open_browser: open the page in a browser.
        device: where networks run: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        engine: how they run: `auto`, `eager` or `compile`.

    Raises:
        FileNotFoundError: if no such model exists.
        ValueError: if a model is damaged, or no such device or engine exists.
        OSError: if the port is taken, or the host is not an address of this machine.
    """
    host = access.host.strip("[]")
    models = ModelCache(names, allow_paths, device, engine)
    processing_utils.async_ssrf_protected_download = _fetch_nothing
    free_port = check_port(host, port)
    with server_folder() as temporary:
        # Gradio stores uploads there, and copies of files that are offered for download.
        os.environ["GRADIO_TEMP_DIR"] = str(temporary / "gradio")
        downloads = temporary / "downloads"
        downloads.mkdir()
        blocks = build(models, str(downloads))
        blocks._queue.sleep_when_free = IDLE_SECONDS
        _, address, public = blocks.launch(
            server_name=f"[{host}]" if ":" in host else host,  # Gradio makes an address of it
            server_port=free_port,
            share=access.share,
            inbrowser=open_browser,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=MAX_MEGABYTES * 1_000_000,
            footer_links=["api"],
            ssr_mode=False,
            theme=page.THEME,
            css=page.CSS,
            run_history=False,
            max_threads=MAX_EVENTS,
            show_error=True,
            app_kwargs={"lifespan": guarded(blocks, access)},
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
