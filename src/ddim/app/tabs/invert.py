"""The layout of the tab Invert: an image that is uploaded, drawn or pinned, its inversions, and its edits."""

from __future__ import annotations

import gradio as gr

from ddim.app import inputs, page
from ddim.app.class_inputs import ClassInputs
from ddim.app.events import INSTANT_EVENT, RUN_EVENT, Shared, follow_run, report_errors, stop_runs
from ddim.app.handlers.invert import READY, InvertHandlers, show_canvas, show_image

DRAW = """
// The canvas is another one when the model has another shape.
const drawing = () => {
  const canvas = element.querySelector('canvas');
  const brush = canvas.getContext('2d');
  if (!canvas.dataset.ready) {
    canvas.dataset.ready = true;
    Object.assign(brush, { lineWidth: 22, lineCap: 'round', lineJoin: 'round' });
    fill(canvas, brush, canvas.dataset.background);
  }
  brush.strokeStyle = element.querySelector('[data-color]')?.value || '#ffffff';
  return [canvas, brush];
};
const fill = (canvas, brush, color) => {
  brush.fillStyle = color;
  brush.fillRect(0, 0, canvas.width, canvas.height);
};
let last = null;
const line = (event) => {
  const [canvas, brush] = drawing();
  const box = canvas.getBoundingClientRect();
  const scale = canvas.width / box.width;
  const next = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  brush.beginPath(); brush.moveTo(...(last || next)); brush.lineTo(...next); brush.stroke();
  last = next;
};
element.addEventListener('pointerdown', (event) => {
  if (event.target.tagName !== 'CANVAS') return;
  event.target.setPointerCapture(event.pointerId);
  line(event);
});
element.addEventListener('pointermove', (event) => { if (last) line(event); });
for (const end of ['pointerup', 'pointercancel']) element.addEventListener(end, () => { last = null; });
element.addEventListener('click', (event) => {
  const [canvas, brush] = drawing();
  if (event.target.closest('[data-clear]')) fill(canvas, brush, canvas.dataset.background);
  if (event.target.closest('[data-fill]')) fill(canvas, brush, brush.strokeStyle);
  if (event.target.closest('[data-use]')) trigger('select', { value: canvas.toDataURL('image/png') });
});
"""
"""Strokes on a canvas; the drawing is sent when its button is pressed."""


def tab(shared: Shared) -> None:
    """Lay out the tab and connect its events.

    Args:
        shared: what every tab is given.
    """
    first = shared.models.open(shared.models.names[0])
    image, shape = gr.State(None), first.sample_shape
    page.lead(
        "Without noise on the way each step can be inverted, so that an image has a latent, and the latent decodes to "
        "the image. The paper takes Euler's step backwards, which is approximate; here each step's equation is "
        "solved, which is exact up to rounding. A good latent looks like noise: mean 0, deviation 1.",
    )
    with gr.Row(equal_height=False):
        with gr.Column(min_width=240):
            file = gr.File(label="Image", type="filepath", height=140)
            use_pinned = gr.Button("Use the image pinned last")
        with gr.Column(min_width=240):
            canvas = gr.HTML(show_canvas(shape), js_on_load=DRAW, elem_id="draw")
        with gr.Column(min_width=160):
            shown_image = gr.HTML(show_image(None), elem_id="seen")
    with gr.Row(equal_height=True):
        steps = gr.Slider(2, 200, 50, step=1, label="Steps", min_width=200)
        strength = gr.Slider(0, 1, 0.5, step=0.05, label="Strength", min_width=200,
                             info="Of an edit: how far the image goes back to noise.")  # fmt: skip
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=inputs.MAX_SEED, min_width=120,
                         info="Of an edit's noise.")  # fmt: skip
    class_inputs = ClassInputs.lay_out(first.classes)
    with gr.Row():
        start_inversion = gr.Button("Invert", variant="primary", min_width=120)
        start_edit = gr.Button("Edit", variant="primary", min_width=120)
        stop = gr.Button("Stop", min_width=96)
    status = gr.HTML(page.status(READY), elem_id="invert-status")
    inverted = gr.HTML(elem_id="inverted")
    edited = gr.HTML(elem_id="edited")

    handlers = InvertHandlers(shared, status, image, shown_image, canvas, inverted, edited, class_inputs)
    outputs = [image, shown_image, status]
    condition = [class_inputs.label, class_inputs.guidance]
    file.upload(report_errors(handlers.use_upload, status), [shared.model, file], outputs, **INSTANT_EVENT)
    canvas.select(report_errors(handlers.use_drawing, status), shared.model, outputs, **INSTANT_EVENT)
    use_pinned.click(
        report_errors(handlers.use_last_pinned, status), [shared.model, shared.endpoints], outputs, **INSTANT_EVENT
    )
    start_inversion.click(
        follow_run(handlers.invert, status),
        [shared.model, image, steps, *condition],
        [status, inverted],
        **RUN_EVENT,
    )
    start_edit.click(
        follow_run(handlers.edit, status),
        [shared.model, image, strength, steps, seed, *condition],
        [status, edited],
        **RUN_EVENT,
    )
    stop.click(stop_runs(status), **INSTANT_EVENT)
    shared.model.change(
        handlers.clear,
        shared.model,
        [status, image, shown_image, canvas, inverted, edited, *class_inputs.components],
        **INSTANT_EVENT,
    )
