"""`ddim app`: the library as a web page."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from ddim.cli import options


def app(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Built-in models, folders or hub ids; the page begins with the first; mnist unless given."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen at: 127.0.0.1 is this machine alone, 0.0.0.0 the whole network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 7860,
    share: Annotated[
        bool, typer.Option("--share", help="Publish the page on the internet, through Gradio's servers.")
    ] = False,
    allow_paths: Annotated[
        bool, typer.Option("--allow-paths", help="Let the page open any folder of this machine as a model.")
    ] = False,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Show the page in a browser.")] = True,
    device: options.Device = "auto",
    engine: options.Engine = "auto",
) -> None:
    """Open a page where DDIM can be seen at work: sample, compare, interpolate, invert.

    The page's address is printed. It needs no internet and tells nobody; Ctrl+C ends it.

    Examples:

      ddim app

      ddim app runs/mnist/final --port 8000 --no-open

      ddim app mnist google/ddpm-cifar10-32 --device cuda
    """
    if find_spec("gradio") is None:
        raise RuntimeError("the page needs gradio; install it with: pip install 'ddim[app]'")
    if not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}; it must be a number from 0 to 65535")
    from ddim.app import serve

    serve(models or ["mnist"], host, port, share, allow_paths, open_browser, device, engine)
