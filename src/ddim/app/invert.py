"""The tab that finds the code of a picture, goes there and back, and edits it."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from ddim.app import inputs, page
from ddim.app.rendering import Cell, grid
from ddim.app.runs import Result, Run
from ddim.app.tab import COPY_CHUNK_BYTES, Endpoint, Plan, Shared, Updates, answering, fit, following, number, run_by
from ddim.io.images import to_output
from ddim.pipeline import DDIMPipeline

EDITS = 8
"""Of one picture, side by side."""

MAX_DRAWING = 1_000_000

CODE_RANGE = 3
"""Standard deviations from black to grey, and from grey to white, where a code is shown."""


@dataclass(frozen=True)
class Inversion:
    """A picture's code, and what came back from it.

    Attributes:
        name: `exact` or `Euler`.
        code: as a picture.
        mean: of the code.
        deviation: of the code.
        image: that came back.
        mse: mean squared error per value in [0, 1].
        psnr: in dB.
        evaluations: of the network, on the way to the code.
    """

    name: str
    code: Image.Image
    mean: float
    deviation: float
    image: Image.Image
    mse: float
    psnr: float
    evaluations: int


@dataclass(frozen=True)
class Inverted:
    """A picture as the model sees it, and its inversions."""

    picture: Image.Image
    ways: list[Inversion]


def invert(run: Run, base: DDIMPipeline, picture: Image.Image, steps: int) -> Inverted:
    """The code of a picture, found exactly and by Euler's steps, and what it decodes to."""
    pipe = run.pipeline(base)
    fitted = fit(pipe, picture)
    ways = []
    for name, exact in (("exact", True), ("Euler", False)):
        result = pipe.reconstruct([fitted], steps, exact)
        code = result.codes.latents
        seen_code: Any = to_output(code / CODE_RANGE, "pil")
        ways.append(
            Inversion(
                name,
                seen_code[0],
                float(code.mean()),
                float(code.std()),
                result.images[0],
                float(result.mse[0]),
                float(result.psnr[0]),
                int(result.codes.evaluations.sum()),
            )
        )
        run.show(Inverted(fitted, list(ways)))
    return Inverted(fitted, ways)


@dataclass(frozen=True)
class Edits:
    """Settings of edits, of which each has noise of its own; the names are those of `DDIMPipeline.edit`."""

    strength: float
    num_inference_steps: int
    seeds: range

    @classmethod
    def checked(cls, strength: Any, steps: Any, seed: Any, count: Any) -> Edits:
        """From what a client sent; ValueError for the first that is not allowed."""
        first, number = inputs.seed(seed), inputs.whole("count", count, 1, inputs.MAX_COUNT)
        return cls(
            inputs.real("strength", strength, 0, 1),
            inputs.whole("steps", steps, 1, inputs.MAX_STEPS),
            range(first, first + number),
        )


def edit(run: Run, base: DDIMPipeline, picture: Image.Image, edits: Edits) -> list[Image.Image]:
    """A picture covered with noise up to `strength`, and painted from there, once for each seed."""
    pipe = run.pipeline(base)
    pictures = [fit(pipe, picture)] * len(edits.seeds)
    return pipe.edit(pictures, edits.strength, edits.num_inference_steps, seeds=edits.seeds).images


def check_picture(picture: Image.Image | None) -> Image.Image:
    """ValueError if there is none."""
    if picture is None:
        raise ValueError("there is no picture yet; upload one, draw one, or take a pinned one")
    return picture


DRAW = """
const canvas = element.querySelector('canvas');
const brush = canvas.getContext('2d');
const clear = () => { brush.fillStyle = '#000'; brush.fillRect(0, 0, canvas.width, canvas.height); };
const at = (event) => {
  const box = canvas.getBoundingClientRect();
  const scale = canvas.width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
};
let last = null;
const line = (event) => {
  const here = at(event);
  brush.beginPath(); brush.moveTo(...(last || here)); brush.lineTo(...here); brush.stroke();
  last = here;
};
clear();
Object.assign(brush, { strokeStyle: '#fff', lineWidth: 22, lineCap: 'round', lineJoin: 'round' });
canvas.addEventListener('pointerdown', (event) => { canvas.setPointerCapture(event.pointerId); line(event); });
canvas.addEventListener('pointermove', (event) => { if (last) line(event); });
for (const end of ['pointerup', 'pointercancel']) canvas.addEventListener(end, () => { last = null; });
element.addEventListener('click', (event) => {
  if (event.target.closest('[data-clear]')) clear();
  if (event.target.closest('[data-take]')) trigger('select', { value: canvas.toDataURL('image/png') });
});
"""
"""White strokes on black; the drawing is sent when it is taken."""

CANVAS = """<div class="draw"><canvas width="280" height="280" role="img" aria-label="Draw here"></canvas>
<button type="button" data-take>Take the drawing</button> <button type="button" data-clear>Clear</button></div>"""


def drawing(address: Any) -> Image.Image:
    """The picture in a `data:` address; ValueError for anything else."""
    start = "data:image/png;base64,"
    if not isinstance(address, str) or not address.startswith(start) or len(address) > MAX_DRAWING:
        raise ValueError("the drawing is no PNG of at most 1 MB")
    try:
        data = base64.b64decode(address.removeprefix(start), validate=True)
    except binascii.Error:
        raise ValueError("the drawing is no PNG of at most 1 MB") from None
    return inputs.decode(io.BytesIO(data), "the drawing")


def show(result: Inverted) -> str:
    """The inversions as HTML: a row each, of the picture, its code and what came back."""
    sections = []
    shape = result.picture.size[::-1]
    for way in result.ways:
        cells = [
            Cell(result.picture, "picture", "the picture as the model sees it"),
            Cell(way.code, "code", f"its code, found by {way.name} steps"),
            Cell(way.image, "back", f"what the {way.name} code decodes to"),
        ]
        facts = {
            "code: mean": f"{way.mean:+.3f}",
            "code: deviation": f"{way.deviation:.3f}",
            "error, mean squared": f"{way.mse:.1e}",
            "PSNR": f"{way.psnr:.1f} dB",
            "network evaluations": f"{way.evaluations:,}",
        }
        name = way.name[:1].upper() + way.name[1:]
        sections.append(
            f'<section class="way"><h3>{name}</h3>{grid(cells, shape, name, 3)}{page.table(facts)}</section>'
        )
    return f'<div class="ways">{"".join(sections)}</div>'


def seen(picture: Image.Image | None) -> str:
    """The picture as the model sees it, or an empty box."""
    if picture is None:
        return grid([Cell(None, "no picture yet")], (1, 1), "Picture", 1)
    cell = Cell(
        picture, f"{picture.width} x {picture.height}, as the model sees it", "the picture as the model sees it"
    )
    return grid([cell], picture.size[::-1], "Picture", 1)


def tab(shared: Shared) -> None:
    """Lay the tab out and connect it."""
    picture = gr.State(None)
    page.lead(
        "Without noise on the way each step can be taken back, so that a picture has a code, and the code gives the "
        "picture back. The paper takes Euler's step backwards, which is nearly right; here each step's equation is "
        "solved, which is right up to rounding. A good code looks like noise: mean 0, deviation 1.",
    )
    with gr.Row(equal_height=False):
        with gr.Column(min_width=240):
            file = gr.File(label="Picture", type="filepath", height=140)
            pinned = gr.Button("Take the picture pinned last")
        with gr.Column(min_width=240):
            canvas = gr.HTML(CANVAS, js_on_load=DRAW, elem_id="draw")
        with gr.Column(min_width=160):
            seen_picture = gr.HTML(seen(None), elem_id="seen")
    with gr.Row(equal_height=True):
        steps = gr.Slider(2, 200, 50, step=1, label="Steps", min_width=200)
        strength = gr.Slider(0, 1, 0.5, step=0.05, label="Strength", min_width=200,
                             info="Of an edit: how far the picture goes back to noise.")  # fmt: skip
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=inputs.MAX_SEED, min_width=120,
                         info="Of an edit's noise.")  # fmt: skip
    with gr.Row():
        go = gr.Button("Invert", variant="primary", min_width=120)
        change = gr.Button("Edit", variant="primary", min_width=120)
        stop = gr.Button("Stop", min_width=96)
    status = gr.HTML(page.status("Upload a picture, draw one, or take a pinned one."))
    inverted = gr.HTML(elem_id="inverted", min_height=300)
    edited = gr.HTML(elem_id="edited")

    def take(model: str, image: Image.Image) -> Updates:
        fitted = fit(shared.models.open(model), image)
        return {picture: fitted, seen_picture: seen(fitted), status: page.status("The picture is taken.")}

    def uploaded(model: str, path: str) -> Updates:
        return take(model, inputs.upload(path, shared.uploads))

    def drawn(model: str, event: gr.EventData) -> Updates:
        return take(model, drawing(event.value))

    def pinned_last(model: str, endpoints: Sequence[Endpoint]) -> Updates:
        if not endpoints:
            raise ValueError("no picture is pinned; click one in the tab Sample first")
        return take(model, check_picture(endpoints[-1].picture))

    def prepare(model: str, given: Image.Image | None, steps: Any) -> Plan[Inverted]:
        image, S = check_picture(given), inputs.whole("steps", steps, 2, inputs.MAX_STEPS)

        def done(result: Result[Inverted]) -> Updates:
            return {status: page.status(f"There and back in {result.seconds:.2f} s.", 1), inverted: show(result.value)}

        return Plan(
            "Inverting",
            lambda run: invert(run, shared.models.open(model), image, S),
            lambda value: {inverted: show(value)},
            done,
        )

    def prepare_edit(
        model: str, given: Image.Image | None, strength: Any, steps: Any, seed: Any
    ) -> Plan[list[Image.Image]]:
        image, edits = check_picture(given), Edits.checked(strength, steps, seed, EDITS)

        def done(result: Result[list[Image.Image]]) -> Updates:
            cells = [
                Cell(edited, f"seed {seed}", f"edit with noise of seed {seed}", f"edit-{seed}.png")
                for edited, seed in zip(result.value, edits.seeds, strict=True)
            ]
            pictures = grid(cells, image.size[::-1], "Edits")
            words = f"{number(len(cells), 'edit')} in {result.seconds:.2f} s."
            return {status: page.status(words, 1), edited: f"<h3>Edits of strength {edits.strength:g}</h3>{pictures}"}

        return Plan("Editing", lambda run: edit(run, shared.models.open(model), image, edits), lambda _: {}, done)

    taken = [picture, seen_picture, status]
    file.upload(answering(uploaded, status), [shared.model, file], taken, **COPY_CHUNK_BYTES)
    canvas.select(answering(drawn, status), shared.model, taken, **COPY_CHUNK_BYTES)
    pinned.click(answering(pinned_last, status), [shared.model, shared.endpoints], taken, **COPY_CHUNK_BYTES)
    runs: list[Any] = [
        go.click(following(prepare, status), [shared.model, picture, steps], [status, inverted], **run_by(status)),
        change.click(
            following(prepare_edit, status),
            [shared.model, picture, strength, steps, seed],
            [status, edited],
            **run_by(status),
        ),
    ]
    stop.click(lambda: page.status("Stopped."), None, status, cancels=runs, **COPY_CHUNK_BYTES)
    shared.model.change(lambda: (None, seen(None)), None, [picture, seen_picture], **COPY_CHUNK_BYTES)
