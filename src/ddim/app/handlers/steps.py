"""The tab Steps: the same latents sampled by DDIM in several numbers of steps, and by DDPM in all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from ddim.app import inputs, page
from ddim.app.class_inputs import ClassInputs
from ddim.app.conditions import NO_CONDITION, ConditionSettings, guidance_of
from ddim.app.events import Shared, Task, Updates
from ddim.app.pictures import show_output
from ddim.app.rendering import Cell, grid
from ddim.app.runs import Run, RunResult
from ddim.pipeline import DDIMPipeline

DDIM_STEPS = (5, 10, 20, 50, 100)
"""Numbers of steps of DDIM; DDPM takes all timesteps of the model."""

MIN_COMPARED_STEPS = 20
"""The fewest steps of DDIM whose time is compared with DDPM's."""

NOTHING_COMPARED = "Nothing has been sampled yet. DDPM comes last and takes longest."


@dataclass(frozen=True)
class ComparisonRow:
    """The same latents sampled by one method.

    Attributes:
        method: `DDIM` or `DDPM`.
        steps: number of steps.
        images: one per latent.
        seconds: spent on sampling.
    """

    method: str
    steps: int
    images: list[Image.Image]
    seconds: float


def compare(
    run: Run, base: DDIMPipeline, seed: int, count: int, condition: ConditionSettings = NO_CONDITION
) -> list[ComparisonRow]:
    """Sample the same latents by DDIM in each of `DDIM_STEPS` steps, and by DDPM in all steps.

    DDPM has order 1, whatever the model's `solver_order`.

    Args:
        run: the run.
        base: the model.
        seed: of the first latent.
        count: number of latents.
        condition: class and guidance.

    Returns:
        A row per method and number of steps.
    """
    pipe = run.pipeline(base)
    T = len(pipe.scheduler)
    methods: list[tuple[str, int, dict[str, Any]]] = [("DDIM", steps, {}) for steps in DDIM_STEPS if steps < T]
    rows: list[ComparisonRow] = []
    for method, steps, settings in [*methods, ("DDPM", T, {"eta": 1.0, "order": 1, "use_sigma_hat": True})]:
        started = time.monotonic()
        output: Any = pipe(
            count,
            num_inference_steps=steps,
            seeds=range(seed, seed + count),
            output_type="np",
            **settings,
            **condition.arguments(count),
        )
        rows.append(ComparisonRow(method, steps, show_output(pipe, output.images), time.monotonic() - started))
        run.show(list(rows))
    return rows


def show_rows(rows: Sequence[ComparisonRow], seed: int) -> str:
    """Return the rows as HTML, one below the other, so that a column is a latent.

    Args:
        rows: of `compare`.
        seed: of the first latent.
    """
    sections = []
    for row in rows:
        name = f"{row.method}, {row.steps} steps"
        cells = [
            Cell(image, f"seed {seed + i}" if row is rows[0] else "", f"seed {seed + i} by {name}")
            for i, image in enumerate(row.images)
        ]
        images = grid(cells, row.images[0].size[::-1], name, len(cells))
        sections.append(
            f"<section><div><h3>{escape(name)}</h3><small>{row.seconds:.2f} s</small></div>{images}</section>"
        )
    return f'<div class="rows">{"".join(sections)}</div>'


def summarize(rows: Sequence[ComparisonRow]) -> str:
    """Return one sentence on the speed of DDIM in this run.

    Args:
        rows: of `compare`.
    """
    ddpm, ddim = rows[-1], next((row for row in rows if row.steps >= MIN_COMPARED_STEPS), rows[0])
    ratio = ddpm.seconds / max(ddim.seconds, 1e-9)
    return f"DDIM in {ddim.steps} steps was {ratio:.0f} times as fast as DDPM in {ddpm.steps}."


@dataclass(frozen=True, eq=False)
class StepsHandlers:
    """The event handlers of the tab, and the components that they update."""

    shared: Shared
    status: gr.HTML
    images: gr.HTML
    class_inputs: ClassInputs

    def reset(self, model: str) -> Updates:
        """Remove the images, which are those of another model.

        Args:
            model: the model's name.

        Returns:
            The updates.
        """
        classes = self.shared.models.open(model).classes
        return {self.status: page.status(NOTHING_COMPARED), self.images: "", **self.class_inputs.follow(classes)}

    def compare(self, model: str, seed: Any, count: Any, label: Any, guidance: Any) -> Task[list[ComparisonRow]]:
        """Return the task of the comparison.

        Args:
            model: the model's name.
            seed: of the first latent.
            count: number of latents.
            label: the class, or `any`.
            guidance: of a class.

        Raises:
            ValueError: if an input is not allowed.
        """
        first_seed, num_latents = inputs.seed(seed), inputs.integer("latents", count, 1, inputs.MAX_LATENTS)
        classes = self.shared.models.open(model).classes
        condition = ConditionSettings.checked(label, guidance_of(label, guidance), classes, num_latents)

        def show_result(result: RunResult[list[ComparisonRow]]) -> Updates:
            rows = result.value
            return {self.status: page.status(summarize(rows), 1), self.images: show_rows(rows, first_seed)}

        return Task(
            "Sampling",
            lambda run: compare(run, self.shared.models.open(model), first_seed, num_latents, condition),
            lambda rows: {self.images: show_rows(rows, first_seed)},
            show_result,
        )
