"""The layout of the tab Model: facts about the session's model, and a field to open another."""

from __future__ import annotations

import gradio as gr

from ddim.app import page
from ddim.app.events import INSTANT_EVENT, RUN_EVENT, Shared, follow_run
from ddim.app.handlers.model import ModelHandlers, show_card, show_configuration, show_size


def tab(shared: Shared) -> None:
    """Lay out the tab and connect its events.

    Args:
        shared: what every tab is given.
    """
    first = shared.models.names[0]
    facts = shared.models.facts(first)
    page.lead("The model of the other tabs. Others are opened by name, or by an id of the Hugging Face hub.")
    with gr.Row(equal_height=False, elem_classes="ends"):
        name = gr.Dropdown(shared.models.names, value=first, allow_custom_value=True, label="Model", scale=3,
                           min_width=200)  # fmt: skip
        start = gr.Button("Open", variant="primary", scale=1, min_width=96)
    status = gr.HTML(page.status(f"{first} is open."))
    size = gr.HTML(show_size(facts), elem_id="model-size")
    with gr.Accordion("Configuration", open=False):
        configuration = gr.HTML(show_configuration(facts))
    with gr.Accordion("Model card", open=False):
        card = gr.Markdown(show_card(facts), elem_id="card")

    handlers = ModelHandlers(shared, status, size, configuration, card)
    start.click(
        follow_run(handlers.open, status), name, [status, shared.model, shared.header, size, configuration, card],
        **RUN_EVENT,
    )  # fmt: skip
    shared.model.change(handlers.unpin, None, [shared.endpoints, shared.endpoint_list], **INSTANT_EVENT)
