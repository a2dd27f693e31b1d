"""The layout of the tab Sample: settings, the images as they form, and the same run in Python and as a command."""

from __future__ import annotations

import gradio as gr

from ddim.app import inputs, page
from ddim.app.class_inputs import ClassInputs
from ddim.app.events import INSTANT_EVENT, RUN_EVENT, Shared, follow_run, report_errors, stop_runs
from ddim.app.handlers.sample import MODELS_OWN, NOTHING_SAMPLED, SampleHandlers, SampleSettings, show_empty
from ddim.diffusion.sampling_config import ORDERS
from ddim.diffusion.schedule import SPACINGS

RANDOM_SEED = "() => Math.floor(Math.random() * 2 ** 32)"


def tab(shared: Shared) -> None:
    """Lay out the tab and connect its events.

    Args:
        shared: what every tab is given.
    """
    defaults, classes = SampleSettings(), shared.models.open(shared.models.names[0]).classes
    page.lead(
        "DDIM turns noise into images. Each image starts from a latent, a field of random numbers that its seed "
        "decides, and a network removes the noise in a number of steps.",
        "Press <b>Sample</b>. Then halve the steps: the same images come, in half the time. Raise eta: noise is added "
        "on the way, and the latent alone no longer decides.",
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=280):
            steps = gr.Slider(1, inputs.MAX_STEPS, defaults.num_inference_steps, step=1, label="Steps",
                              info="Function evaluations per image: fewer is faster, more is finer.")  # fmt: skip
            count = gr.Slider(1, inputs.MAX_COUNT, defaults.count, step=1, label="Images")
            class_inputs = ClassInputs.lay_out(classes, inputs.MAX_COUNT)
            with gr.Row(equal_height=False, elem_classes="ends"):
                seed = gr.Number(defaults.seed, label="Seed", precision=0, minimum=0, maximum=inputs.MAX_SEED, scale=3,
                                 min_width=120, info="Image i has seed + i.")  # fmt: skip
                new_seed = gr.Button("New seed", size="md", scale=1, min_width=96)
            with gr.Accordion("More settings", open=False):
                eta = gr.Slider(0, 1, defaults.eta, step=0.05, label="Eta",
                                info="0 is DDIM, 1 is DDPM; values between add some noise in each step.")  # fmt: skip
                order = gr.Radio([MODELS_OWN, ("1: DDIM", 1), *((str(order), order) for order in ORDERS[1:])],
                                 value=MODELS_OWN, label="Order",
                                 info="2 to 4 use as many predictions, and require eta = 0.")  # fmt: skip
                spacing = gr.Dropdown([MODELS_OWN, *SPACINGS], value=defaults.spacing, label="Spacing",
                                      info="Spacing of the timesteps.")  # fmt: skip
            with gr.Row():
                start = gr.Button("Sample", variant="primary", min_width=120)
                stop = gr.Button("Stop", min_width=96)
        with gr.Column(scale=5, min_width=300):
            status = gr.HTML(page.status(NOTHING_SAMPLED), elem_id="sample-status")
            images = gr.HTML(show_empty(defaults.count), js_on_load=page.CLICKS, elem_id="sample-images")
            with gr.Row():
                grid_file = gr.DownloadButton("Grid as PNG", interactive=False, size="md", min_width=120)
                array_file = gr.DownloadButton("Array as NPZ", interactive=False, size="md", min_width=120)
            with gr.Accordion("The same in Python and on the command line", open=False):
                model = shared.models.names[0]
                python = gr.Code(defaults.as_python(model), language="python", label="Python")
                command = gr.Code(defaults.as_command(model), language="shell", label="Command line")

    sampled = gr.State(None)
    handlers = SampleHandlers(
        shared, status, images, sampled, grid_file, array_file, python, command, class_inputs, count
    )
    settings = [shared.model, steps, eta, order, spacing, count, seed, class_inputs.label, class_inputs.guidance]
    outputs = [status, images, sampled, grid_file, array_file, python, command]
    gr.on(
        [start.click, seed.submit],
        follow_run(handlers.sample, status),
        settings,
        outputs,
        **RUN_EVENT,
    )
    shared.model.change(handlers.reset, settings, [*outputs, *class_inputs.components], **INSTANT_EVENT)
    class_inputs.label.change(
        report_errors(handlers.fit_count, status),
        [shared.model, class_inputs.label, count],
        [status, count],
        **INSTANT_EVENT,
    )
    stop.click(stop_runs(status), **INSTANT_EVENT)
    new_seed.click(None, None, seed, js=RANDOM_SEED, **INSTANT_EVENT)
    images.select(
        report_errors(handlers.pin, status),
        [sampled, shared.endpoints],
        [status, shared.endpoints, shared.endpoint_list, images],
        **INSTANT_EVENT,
    )
