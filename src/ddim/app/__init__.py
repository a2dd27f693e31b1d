"""The library as a web page, by Gradio; `ddim app` opens it.

    page.py        appearance: theme, styles, scripts, small pieces of HTML
    rendering.py   images as HTML
    inputs.py      checks and limits of everything that clients send
    conditions.py  classes and guidance; class_inputs.py, their inputs on the page
    models.py      the models that may be opened
    pictures.py    images of any model, as they are shown
    measurements.py  what the tab Restore is given; restoration.py, its work; brush.py, the canvas that is marked
    runs.py        how work runs: one run at a time, with progress, stopped within a step
    events.py      how an event of the page becomes a run, and what the tabs share
    tabs/          one module per tab: its layout, and which event calls which handler
    handlers/      one module per tab: its work, the HTML of its results, its event handlers
    api.py         the same work as named endpoints
    requests.py    which requests are answered, and what their bodies must look like
    listeners.py   who listens to which run
    uploads.py     how much may be uploaded
    folders.py     the temporary folder of a server
    guard.py       the layer around Gradio that refuses what these do not allow
    server.py      the server

All results are computed by the public API of `ddim`.
"""

from __future__ import annotations

import os

# Gradio reads it when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from ddim.app.guard import Access
from ddim.app.server import build, serve

__all__ = ["Access", "build", "serve"]
