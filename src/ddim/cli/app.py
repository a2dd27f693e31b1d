"""`ddim app`: the library as a web page."""

from __future__ import annotations

from typing import Annotated

import typer

from ddim.cli import options
from ddim.cli.common import DEFAULT_MODEL, with_weights
from ddim.extras import require
from ddim.validation import integer


def app(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Built-in models, folders or hub ids; the page starts with the first; defaults to the built-in ones, "
            "mnist before the others.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="A model, as an argument; can be repeated.", show_default=False),
    ] = None,
    weights: options.Weights = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on: 127.0.0.1 is this machine only, 0.0.0.0 the whole network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 chooses a free one.")] = 7860,
    share: Annotated[
        bool, typer.Option("--share", help="Publish the page on the internet, through Gradio's servers.")
    ] = False,
    allow_paths: Annotated[
        bool, typer.Option("--allow-paths", help="Let the page open any folder of this machine as a model.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Another name that the page is reached by, such as a reverse proxy's; may be repeated.",
            show_default=False,
        ),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
    device: options.Device = "auto",
    engine: options.Engine = "auto",
) -> None:
    """Serve a web page where DDIM can be seen at work: sample, compare, interpolate, invert, restore.

    The page's address is printed. It works without internet and sends nothing anywhere; Ctrl+C stops it.

    Examples:
      ddim app

      ddim app runs/mnist/final --port 8000 --no-open

      ddim app mnist google/ddpm-cifar10-32 --device cuda
    """
    require("the page", "gradio")
    integer("--port", port, 0, 65535)
    from ddim.app import Access, serve
    from ddim.io.hub import builtin_models

    given = [*(models or []), *(model or [])] or dict.fromkeys([DEFAULT_MODEL, *builtin_models()])
    names = [with_weights(name, weights) for name in given]
    access = Access(host, share, frozenset(name.lower() for name in allow_host or ()))
    serve(names, access, port, allow_paths, open_browser, device, engine)
