"""The layout of the tab Interpolate: endpoints, settings of the path, its frames and their animation."""

from __future__ import annotations

import gradio as gr

from ddim.app import inputs, page
from ddim.app.class_inputs import ClassInputs
from ddim.app.events import INSTANT_EVENT, RUN_EVENT, Shared, follow_run, report_errors, stop_runs
from ddim.app.handlers.interpolate import READY, InterpolateHandlers

SCRUB = """
const show = (index) => {
  const slider = element.querySelector('input[type=range]');
  const frames = element.querySelectorAll('.strip img');
  if (!slider || !frames.length) return;
  slider.value = index;
  element.querySelector('.stage figure img').src = frames[index].src;
  element.querySelector('.stage figcaption').textContent = `frame ${Number(index) + 1} of ${frames.length}`;
};
let timer = null;
const play = (active) => {
  clearInterval(timer);
  timer = active ? setInterval(() => {
    const slider = element.querySelector('input[type=range]');
    if (slider) show((Number(slider.value) + 1) % (Number(slider.max) + 1));
  }, 100) : null;
  const button = element.querySelector('[data-play]');
  if (button) button.textContent = active ? 'Pause' : 'Play';
};
element.addEventListener('input', (event) => { play(false); show(event.target.value); });
element.addEventListener('click', (event) => {
  if (event.target.closest('[data-play]')) play(!timer);
});
"""
"""The slider shows a frame; the button plays them."""


def tab(shared: Shared) -> None:
    """Lay out the tab and connect its events.

    Args:
        shared: what every tab is given.
    """
    page.lead(
        "Between two latents lie other latents, which are images too. A path from latent to latent, along the sphere "
        "on which Gaussian noise lies, turns one image into another.",
        "An image has a latent as well: it is found by running DDIM backwards, and the path then passes through the "
        "image. Between seeds alone every frame is a sample, and the ends are those of the tab Sample; with an image "
        "among the ends all frames are decoded from latents, without clipping, and a seed looks a little different.",
    )
    shared.endpoint_list.render()  # type: ignore[no-untyped-call]
    with gr.Row(equal_height=False):
        with gr.Column(min_width=260):
            with gr.Row(equal_height=False, elem_classes="ends"):
                seeds = gr.Textbox("3, 14", label="Seeds", max_lines=1, scale=3, min_width=120,
                                   info="Interpolate adds them too.")  # fmt: skip
                add_seeds = gr.Button("Add seeds", size="md", scale=1, min_width=110)
            files = gr.File(label="Images", file_count="multiple", type="filepath", height=120)
        with gr.Column(min_width=260):
            frames = gr.Slider(2, inputs.MAX_FRAMES, 11, step=1, label="Frames per leg", info="Both ends included.")
            steps = gr.Slider(2, 200, 20, step=1, label="Steps", info="Of encoding and decoding.")
            closed = gr.Checkbox(label="Return to the first", value=False)
            class_inputs = ClassInputs.lay_out(
                shared.models.open(shared.models.names[0]).classes,
                list_info="Of all frames; or one per endpoint, such as 3, 8, between which frames go.",
            )
    with gr.Row():
        start = gr.Button("Interpolate", variant="primary", min_width=120)
        stop = gr.Button("Stop", min_width=96)
        animation = gr.DownloadButton("Animation as WebP", interactive=False, min_width=140)
    status = gr.HTML(page.status(READY), elem_id="interpolate-status")
    strip = gr.HTML(js_on_load=SCRUB, elem_id="walk")

    handlers = InterpolateHandlers(shared, status, strip, animation, class_inputs)
    endpoints = [status, shared.endpoints, shared.endpoint_list]
    condition = [class_inputs.label, class_inputs.guidance]
    gr.on(
        [add_seeds.click, seeds.submit],
        follow_run(handlers.add_seeds, status),
        [shared.model, shared.endpoints, seeds, *condition],
        endpoints,
        **RUN_EVENT,
    )
    files.upload(
        follow_run(handlers.add_files, status),
        [shared.model, shared.endpoints, files],
        endpoints,
        **RUN_EVENT,
    )
    start.click(
        follow_run(handlers.interpolate, status),
        [shared.model, shared.endpoints, seeds, frames, steps, closed, *condition],
        [*endpoints, strip, animation],
        **RUN_EVENT,
    )
    # The seeds in the box are those that are not endpoints yet.
    shared.endpoints.change(lambda: "", None, seeds, **INSTANT_EVENT)
    shared.model.change(
        handlers.reset, shared.model, [status, strip, animation, *class_inputs.components], **INSTANT_EVENT
    )
    stop.click(stop_runs(status), **INSTANT_EVENT)
    shared.endpoint_list.select(report_errors(handlers.remove, status), shared.endpoints, endpoints, **INSTANT_EVENT)
