"""The layout of the tab Steps: few steps suffice, and the latent decides the image."""

from __future__ import annotations

import gradio as gr

from ddim.app import inputs, page
from ddim.app.class_inputs import ClassInputs
from ddim.app.events import INSTANT_EVENT, RUN_EVENT, Shared, follow_run, stop_runs
from ddim.app.handlers.steps import NOTHING_COMPARED, StepsHandlers


def tab(shared: Shared) -> None:
    """Lay out the tab and connect its events.

    Args:
        shared: what every tab is given.
    """
    page.lead(
        "The paper's two claims. <b>Speed</b>: DDIM needs 10 to 100 steps where DDPM takes all timesteps "
        "of the model, usually 1000. <b>Consistency</b>: "
        "without noise on the way the latent decides the image, so that a column shows the same image however many "
        "steps are taken; DDPM draws noise in each step and ends at another image.",
    )
    with gr.Row(equal_height=True):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=inputs.MAX_SEED, min_width=120)
        count = gr.Slider(1, inputs.MAX_LATENTS, 4, step=1, label="Latents", min_width=200)
    class_inputs = ClassInputs.lay_out(shared.models.open(shared.models.names[0]).classes)
    with gr.Row():
        start = gr.Button("Compare", variant="primary", min_width=120)
        stop = gr.Button("Stop", min_width=96)
    status = gr.HTML(page.status(NOTHING_COMPARED), elem_id="steps-status")
    images = gr.HTML(elem_id="steps-images")

    handlers = StepsHandlers(shared, status, images, class_inputs)
    gr.on(
        [start.click, seed.submit],
        follow_run(handlers.compare, status),
        [shared.model, seed, count, class_inputs.label, class_inputs.guidance],
        [status, images],
        **RUN_EVENT,
    )
    shared.model.change(handlers.reset, shared.model, [status, images, *class_inputs.components], **INSTANT_EVENT)
    stop.click(stop_runs(status), **INSTANT_EVENT)
