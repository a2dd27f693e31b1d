"""The tab that shows the paper's two claims at once: few steps are enough, and the code decides the picture."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from ddim.app import inputs, page
from ddim.app.rendering import Cell, grid
from ddim.app.runs import Result, Run
from ddim.app.tab import COPY_CHUNK_BYTES, Plan, Shared, Updates, following, run_by
from ddim.pipeline import DDIMPipeline

NUMBERS = (5, 10, 20, 50, 100)
"""Of DDIM's steps; DDPM takes all there are."""


@dataclass(frozen=True)
class Row:
    """The same codes painted in one way: its name, the steps, the pictures and the time they took."""

    name: str
    steps: int
    images: list[Image.Image]
    seconds: float


def compare(run: Run, base: DDIMPipeline, seed: int, count: int) -> list[Row]:
    """The codes of `count` seeds by DDIM in each of `NUMBERS` of steps, and by DDPM in all of them."""
    pipe = run.pipeline(base)
    T = len(pipe.scheduler)
    ways: list[tuple[str, int, dict[str, Any]]] = [("DDIM", number, {}) for number in NUMBERS if number < T]
    rows: list[Row] = []
    for name, number, settings in [*ways, ("DDPM", T, {"eta": 1.0, "use_sigma_hat": True})]:
        started = time.monotonic()
        output: Any = pipe(count, num_inference_steps=number, seeds=range(seed, seed + count), **settings)
        rows.append(Row(name, number, output.images, time.monotonic() - started))
        run.show(list(rows))
    return rows


def show(rows: Sequence[Row], seed: int) -> str:
    """The rows as HTML, one below the other, so that a column is a code."""
    sections = []
    for row in rows:
        name = f"{row.name}, {row.steps} steps"
        cells = [
            Cell(image, f"seed {seed + i}" if row is rows[0] else "", f"seed {seed + i} by {name}")
            for i, image in enumerate(row.images)
        ]
        pictures = grid(cells, row.images[0].size[::-1], name, len(cells))
        sections.append(
            f"<section><div><h3>{escape(name)}</h3><small>{row.seconds:.2f} s</small></div>{pictures}</section>"
        )
    return f'<div class="rows">{"".join(sections)}</div>'


def conclude(rows: Sequence[Row]) -> str:
    """The two claims, as this run bears them out."""
    ddpm, twenty = rows[-1], next((row for row in rows if row.steps >= 20), rows[0])
    ratio = ddpm.seconds / max(twenty.seconds, 1e-9)
    return f"DDIM in {twenty.steps} steps was {ratio:.0f} times as fast as DDPM in {ddpm.steps}."


def tab(shared: Shared) -> None:
    """Lay the tab out and connect it."""
    page.lead(
        "The paper's two claims. <b>Speed</b>: DDIM needs 10 to 100 steps where DDPM takes 1000. <b>Consistency</b>: "
        "without noise on the way the code decides the picture, so that a column shows the same digit however many "
        "steps are taken; DDPM draws noise in each step and lands somewhere else.",
    )
    with gr.Row(equal_height=True):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=inputs.MAX_SEED, min_width=120)
        count = gr.Slider(1, inputs.MAX_CODES, 4, step=1, label="Codes", min_width=200)
    with gr.Row():
        go = gr.Button("Compare", variant="primary", min_width=120)
        stop = gr.Button("Stop", min_width=96)
    status = gr.HTML(page.status("Nothing is painted yet. DDPM comes last and takes longest."))
    pictures = gr.HTML(elem_id="steps-pictures", min_height=420)

    def prepare(model: str, seed: Any, count: Any) -> Plan[list[Row]]:
        first, codes = inputs.seed(seed), inputs.whole("codes", count, 1, inputs.MAX_CODES)

        def done(result: Result[list[Row]]) -> Updates:
            return {status: page.status(conclude(result.value), 1), pictures: show(result.value, first)}

        return Plan(
            "Painting",
            lambda run: compare(run, shared.models.open(model), first, codes),
            lambda rows: {pictures: show(rows, first)},
            done,
        )

    run = gr.on(
        [go.click, seed.submit],
        following(prepare, status),
        [shared.model, seed, count],
        [status, pictures],
        **run_by(status),
    )
    stop.click(lambda: page.status("Stopped."), None, status, cancels=run, **COPY_CHUNK_BYTES)
