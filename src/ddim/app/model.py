"""The tab that tells what the model is, and opens another."""

from __future__ import annotations

import re
from typing import Any

import gradio as gr

from ddim.app import page
from ddim.app.runs import Result, Run
from ddim.app.tab import COPY_CHUNK_BYTES, Plan, Shared, Updates, following, listed, run_by


def about(facts: dict[str, Any]) -> str:
    """Size and cost as HTML."""
    shown = {
        "model": facts["model"],
        "parameters": f"{facts['parameters']:,}",
        "GFLOP a picture and step": facts["gflop_per_image_and_step"],
        "files": f"{facts['layout']}, {facts['weights']}",
    }
    return page.table(shown)


def configuration(facts: dict[str, Any]) -> str:
    """Both configurations as HTML."""
    return f"<h3>Network</h3>{page.table(facts['unet'])}<h3>Scheduler</h3>{page.table(facts['scheduler'])}"


def card(facts: dict[str, Any]) -> str:
    """The model card as Markdown, without its header, and with words in place of pictures that lie elsewhere."""
    text = re.sub(r"\A---\n.*?\n---\n", "", facts["card"], flags=re.DOTALL)
    return re.sub(r"!\[([^]]*)]\([^)]*\)", r"*(picture: \1)*", text) or "This model has no card here."


def tab(shared: Shared) -> None:
    """Lay the tab out and connect it."""
    first = shared.models.names[0]
    facts = shared.models.facts(first)
    page.lead("What the other tabs run. Others are opened by their names, or by ids of the Hugging Face hub.")
    with gr.Row(equal_height=False, elem_classes="ends"):
        name = gr.Dropdown(shared.models.names, value=first, allow_custom_value=True, label="Model", scale=3,
                           min_width=200)  # fmt: skip
        go = gr.Button("Open", variant="primary", scale=1, min_width=96)
    status = gr.HTML(page.status(f"{first} is open."))
    size = gr.HTML(about(facts), elem_id="model-size")
    with gr.Accordion("Configuration", open=False):
        settings = gr.HTML(configuration(facts))
    with gr.Accordion("Model card", open=False):
        text = gr.Markdown(card(facts), elem_id="card")

    def prepare(wanted: Any) -> Plan[dict[str, Any]]:
        checked = shared.models.check(wanted)

        def work(run: Run) -> dict[str, Any]:
            shared.models.open(checked)
            return shared.models.facts(checked)

        def done(result: Result[dict[str, Any]]) -> Updates:
            return {
                status: page.status(f"{checked} is open."),
                shared.model: checked,
                size: about(result.value),
                settings: configuration(result.value),
                text: card(result.value),
            }

        return Plan("Opening", work, lambda _: {}, done)

    go.click(following(prepare, status), name, [status, shared.model, size, settings, text], **run_by(status))
    # What was pinned are pictures and codes of another model.
    shared.model.change(lambda: ([], listed([])), None, [shared.endpoints, shared.listing], **COPY_CHUNK_BYTES)
