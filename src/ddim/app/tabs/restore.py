"""The layout of the tab Restore: an image, a brush for what is unknown, and the answers."""

from __future__ import annotations

import gradio as gr

from ddim.app import inputs, page
from ddim.app.brush import show_image, show_sheet
from ddim.app.class_inputs import ClassInputs
from ddim.app.events import INSTANT_EVENT, RUN_EVENT, Shared, follow_run, report_errors, stop_runs
from ddim.app.handlers.restore import INPAINT, READY, TASKS, RestoreHandlers, default_factor
from ddim.app.measurements import factors
from ddim.app.restoration import RestoreSettings
from ddim.restoration import KERNELS

BRUSH = """
// The canvas has the image's own pixels, so that a stroke covers whole ones; it is shown magnified, above the image.
const COLOR = '#e11d48';
const canvas = () => element.querySelector('canvas');
const tool = (name) => element.querySelector(`[data-${name}]`);
const fill = (x, y, width, height) => {
  const brush = canvas().getContext('2d');
  if (tool('erase').checked) return brush.clearRect(x, y, width, height);
  brush.fillStyle = COLOR;
  brush.fillRect(x, y, width, height);
};
const report = () => {
  if (!canvas()) return;
  const { width, height } = canvas();
  const { data } = canvas().getContext('2d').getImageData(0, 0, width, height);
  let count = 0;
  for (let i = 3; i < data.length; i += 4) count += data[i] > 127;
  tool('marked').textContent = count
    ? `${count} of ${width * height} pixels are unknown.` : 'Nothing is marked yet.';
};
const clear = () => {
  if (!canvas()) return;
  canvas().getContext('2d').clearRect(0, 0, canvas().width, canvas().height);
  report();
};
const dab = (x, y) => {
  const size = Number(tool('size').value), radius = size / 2;
  const left = Math.round(x - radius), top = Math.round(y - radius);
  for (let row = 0; row < size; row++) {
    const half = Math.sqrt(radius ** 2 - (row + 0.5 - radius) ** 2);
    const start = Math.round(radius - half), end = Math.round(radius + half);
    fill(left + start, top + row, end - start, 1);
  }
};
let last = null;
const stroke = (event) => {
  const box = canvas().getBoundingClientRect();
  const scale = canvas().width / box.width;
  const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
  const [fromX, fromY] = last || [x, y];
  const steps = Math.max(1, Math.ceil(Math.max(Math.abs(x - fromX), Math.abs(y - fromY))));
  for (let i = 1; i <= steps; i++) dab(fromX + (x - fromX) * i / steps, fromY + (y - fromY) * i / steps);
  last = [x, y];
};
const markBox = () => {
  const fields = ['x', 'y', 'width', 'height'].map((name) => tool(`box-${name}`));
  if (!fields.every((field) => field.value !== '' && field.reportValidity())) return;
  fill(...fields.map((field) => Number(field.value)));
  report();
};
element.addEventListener('pointerdown', (event) => {
  if (event.target.tagName !== 'CANVAS' || event.button) return;
  event.preventDefault();
  event.target.setPointerCapture(event.pointerId);
  stroke(event);
});
element.addEventListener('pointermove', (event) => { if (last) stroke(event); });
for (const end of ['pointerup', 'pointercancel']) {
  element.addEventListener(end, () => { if (last) { last = null; report(); } });
}
element.addEventListener('click', (event) => {
  if (event.target.closest('[data-clear]')) clear();
  if (event.target.closest('[data-box]')) markBox();
});
element.addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && event.target.type === 'number') markBox();
});
element.addEventListener('change', (event) => {
  if (event.target.matches('[data-erase]')) {
    tool('box').textContent = event.target.checked ? 'Erase the box' : 'Mark the box';
  }
});
watch('value', clear);
"""
"""A brush of whole pixels, a box that the keyboard marks, and the count of what is marked; another image is clean."""

READ_MARKS = """
(...values) => {
  const marked = document.querySelector('#sheet canvas');
  if (!marked) return ['', ...values.slice(1)];
  const { width, height } = marked;
  const mask = Object.assign(document.createElement('canvas'), { width, height });
  const brush = mask.getContext('2d');
  brush.drawImage(marked, 0, 0);
  for (const [rule, color] of [['source-in', '#ffffff'], ['destination-over', '#000000']]) {
    brush.globalCompositeOperation = rule;
    brush.fillStyle = color;
    brush.fillRect(0, 0, width, height);
  }
  return [mask.toDataURL('image/png'), ...values.slice(1)];
}
"""
"""Makes what is marked the first input: white on black."""


def tab(shared: Shared) -> None:
    """Lay out the tab and connect its events.

    Args:
        shared: what every tab is given.
    """
    first, defaults = shared.models.open(shared.models.names[0]), RestoreSettings()
    choices = factors(first)
    source, marks = gr.State(None), gr.Textbox(visible=False)
    page.lead(
        "A model knows what images look like; what is left of an image says which one it is. Brush over what is "
        "unknown, or let the image be small: there are many images that agree with the rest, and each answer is one of "
        "them. Their mean is the best guess, and their spread shows what is left open.",
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=280):
            file = gr.File(label="Image", type="filepath", height=120, elem_id="restore-file")
            with gr.Row(equal_height=False, elem_classes="ends"):
                image_seed = gr.Number(0, label="Seed of an image", precision=0, minimum=0, maximum=inputs.MAX_SEED,
                                       scale=3, min_width=120)  # fmt: skip
                sample = gr.Button("Sample it", size="md", scale=1, min_width=96)
            use_pinned = gr.Button("Use the image pinned last", size="md")
            task = gr.Radio(TASKS, value=INPAINT, label="Task")
            with gr.Group(visible=False) as reduction:
                factor = gr.Dropdown(choices, value=default_factor(choices), label="Factor",
                                     info="An image so much smaller than the model's is taken as it is.")  # fmt: skip
                kernel = gr.Radio(list(KERNELS), value=next(iter(KERNELS)), label="Kernel",
                                  info="How images are made small: means of squares, or as PIL does.")  # fmt: skip
        with gr.Column(scale=3, min_width=300):
            sheet = gr.HTML(show_sheet(None), js_on_load=BRUSH, elem_id="sheet")
            reduced = gr.HTML(show_image(None), elem_id="reduced", visible=False)
    with gr.Row(equal_height=True):
        count = gr.Slider(1, inputs.MAX_LATENTS, defaults.count, step=1, label="Answers", min_width=200)
        steps = gr.Slider(1, inputs.MAX_STEPS, defaults.num_inference_steps, step=1, label="Steps", min_width=200)
        seed = gr.Number(defaults.seed, label="Seed", precision=0, minimum=0, maximum=inputs.MAX_SEED, min_width=120,
                         info="Answer i has seed + i.")  # fmt: skip
    class_inputs = ClassInputs.lay_out(first.classes)
    with gr.Row():
        start = gr.Button("Restore", variant="primary", min_width=120)
        stop = gr.Button("Stop", min_width=96)
    status = gr.HTML(page.status(READY), elem_id="restore-status")
    restored = gr.HTML(elem_id="restored")
    with gr.Row():
        measurement_file = gr.DownloadButton("Measurement as NPZ", interactive=False, size="md", min_width=140)
        answers_file = gr.DownloadButton("Answers as NPZ", interactive=False, size="md", min_width=140)
    with gr.Accordion("The same on the command line", open=False):
        command = gr.Code(language="shell", label="Command line")

    handlers = RestoreHandlers(
        *(shared, status, source, sheet, reduced, reduction, factor),
        *(restored, measurement_file, answers_file, command, class_inputs),
    )
    condition = [class_inputs.label, class_inputs.guidance]
    image, results = [source, sheet, status], [restored, measurement_file, answers_file, command]
    file.upload(report_errors(handlers.use_upload, status), [shared.model, file], image, **INSTANT_EVENT)
    use_pinned.click(
        report_errors(handlers.use_last_pinned, status), [shared.model, shared.endpoints], image, **INSTANT_EVENT
    )
    gr.on(
        [sample.click, image_seed.submit],
        follow_run(handlers.sample, status),
        [shared.model, image_seed, *condition],
        image,
        **RUN_EVENT,
    )
    gr.on(
        [start.click, seed.submit],
        follow_run(handlers.restore, status),
        [marks, shared.model, source, task, factor, kernel, count, steps, seed, *condition],
        [status, *results],
        js=READ_MARKS,
        **RUN_EVENT,
    )
    stop.click(stop_runs(status), **INSTANT_EVENT)
    gr.on(
        [task.change, factor.change, kernel.change, source.change],
        report_errors(handlers.follow, status),
        [shared.model, source, task, factor, kernel],
        [status, sheet, reduced, reduction],
        **INSTANT_EVENT,
    )
    shared.model.change(
        handlers.clear,
        shared.model,
        [*image, reduced, factor, *results, *class_inputs.components],
        **INSTANT_EVENT,
    )
