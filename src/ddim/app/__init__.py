"""The library as a web page, by Gradio; `ddim app` opens it.

    page.py       how it looks: theme, styles, scripts
    pictures.py   pictures as HTML
    inputs.py     checks and limits of all that comes in
    models.py     which models may be opened
    runs.py       how work runs: one at a time, told step by step, stopped within one
    tab.py        what the tabs share
    sample.py, steps.py, interpolate.py, invert.py, model.py      a tab each: its work, its HTML, its layout
    api.py        the same work as named endpoints
    server.py     what stands between the page and the network

Nothing is computed here but by the public API of `ddim`.
"""

from __future__ import annotations

import os

# Before Gradio is imported, which asks then.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from ddim.app.server import build, serve

__all__ = ["build", "serve"]
