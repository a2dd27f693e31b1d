"""The tab Model: facts about the session's model, and how another is opened."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ddim.app import page
from ddim.app.events import Endpoint, Shared, Task, Updates, show_endpoints
from ddim.app.pictures import describe_images
from ddim.app.runs import Run, RunResult


def show_size(facts: dict[str, Any]) -> str:
    """Return the size and cost of a model as HTML.

    Args:
        facts: of `ModelCache.facts`.
    """
    rows = {
        "model": facts["model"],
        "parameters": f"{facts['parameters']:,}",
        "GFLOP per image and step": facts["gflop_per_image_and_step"],
        "files": f"{facts['layout']}, {facts['weights']}",
    }
    return page.table(rows)


def show_configuration(facts: dict[str, Any]) -> str:
    """Return the configurations of the network and the scheduler as HTML.

    Args:
        facts: of `ModelCache.facts`.
    """
    return f"<h3>Network</h3>{page.table(facts['unet'])}<h3>Scheduler</h3>{page.table(facts['scheduler'])}"


def show_card(facts: dict[str, Any]) -> str:
    """Return the model card as Markdown, without its header, and with text instead of its images.

    Args:
        facts: of `ModelCache.facts`.

    Example:
        >>> show_card({"card": "![loss](loss.png)"})
        '*(image: loss)*'
    """
    text = re.sub(r"\A---\n.*?\n---\n", "", facts["card"], flags=re.DOTALL)
    return re.sub(r"!\[([^]]*)]\([^)]*\)", r"*(image: \1)*", text) or "This model has no card."


@dataclass(frozen=True, eq=False)
class ModelHandlers:
    """The event handlers of the tab, and the components that they update."""

    shared: Shared
    status: gr.HTML
    size: gr.HTML
    configuration: gr.HTML
    card: gr.Markdown

    def open(self, name: Any) -> Task[dict[str, Any]]:
        """Return the task of opening a model.

        Args:
            name: what the user gave.

        Raises:
            ValueError: if it may not be opened.
        """
        model = self.shared.models.check(name)

        def work(run: Run) -> dict[str, Any]:
            kind = describe_images(self.shared.models.open(model))
            return self.shared.models.facts(model) | {"kind": kind}

        def show_result(result: RunResult[dict[str, Any]]) -> Updates:
            return {
                self.status: page.status(f"{model} is open."),
                self.shared.model: model,
                self.shared.header: page.header(model, result.value["kind"], self.shared.models.names),
                self.size: show_size(result.value),
                self.configuration: show_configuration(result.value),
                self.card: show_card(result.value),
            }

        return Task("Opening", work, lambda _: {}, show_result)

    def unpin(self) -> tuple[list[Endpoint], str]:
        """Remove all endpoints: they are images and latents of another model.

        Returns:
            No endpoints, and the list as HTML.
        """
        return [], show_endpoints([])
