"""The loss curve of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from ddim.files import write_whole


def plot_loss(metrics: Path, path: Path) -> None:
    """Draw the losses of a `metrics.jsonl`, on a logarithmic scale, into a PNG."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    with write_whole(path) as temporary:
        figure.savefig(temporary, dpi=100)
