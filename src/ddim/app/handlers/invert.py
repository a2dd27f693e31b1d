"""The tab Invert: the latent of an image, found exactly and by Euler's steps, what it decodes to, and edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from ddim import validation
from ddim.app import inputs, page
from ddim.app.class_inputs import ClassInputs
from ddim.app.conditions import ANY, NO_CONDITION, ConditionSettings, guidance_of
from ddim.app.events import Endpoint, Shared, Task, Updates, event_value
from ddim.app.pictures import Picture, fit, show_output
from ddim.app.rendering import Cell, grid
from ddim.app.runs import Run, RunResult
from ddim.io.class_labels import ClassLabels
from ddim.io.false_color import preview
from ddim.io.images import to_output, to_values
from ddim.io.pixel_format import EIGHT_BIT
from ddim.pipeline import DDIMPipeline
from ddim.validation import pluralize

READY = "Upload an image, draw one, or use a pinned one."

CANVAS_SIZE = 280
"""Longer side of the canvas."""

NUM_EDITS = 8
"""Edits of one image, side by side."""

LATENT_RANGE = 3
"""Standard deviations from black to gray, and from gray to white, in the image of a latent."""


@dataclass(frozen=True)
class InversionResult:
    """The latent of an image, and the image that it decodes to.

    Attributes:
        method: `exact` or `Euler`.
        latent: the latent as an image.
        mean: of the latent's values.
        deviation: standard deviation of the latent's values.
        image: what the latent decodes to.
        mse: mean squared error per value in [0, 1].
        psnr: in dB.
        nfe: function evaluations spent on encoding.
    """

    method: str
    latent: Image.Image
    mean: float
    deviation: float
    image: Image.Image
    mse: float
    psnr: float
    nfe: int


@dataclass(frozen=True)
class InversionComparison:
    """An image of the model's size and mode, and its inversions by different methods."""

    image: Image.Image
    results: list[InversionResult]


def invert(
    run: Run, base: DDIMPipeline, image: Picture, steps: int, condition: ConditionSettings = NO_CONDITION
) -> InversionComparison:
    """Encode an image exactly and by Euler's steps, and decode both latents.

    Args:
        run: the run.
        base: the model.
        image: of the model's size.
        steps: of encoding and decoding.
        condition: classes and guidance of both.

    Returns:
        The image and both results.
    """
    pipe = run.pipeline(base)
    results = []
    for method, exact in (("exact", True), ("Euler", False)):
        output = pipe.reconstruct([image.values], steps, exact, output_type="np", **condition.arguments(1))
        latents = output.codes.latents
        scaled = to_output(latents / LATENT_RANGE, "np")
        results.append(
            InversionResult(
                method,
                preview(to_values(scaled, EIGHT_BIT), EIGHT_BIT)[0],
                float(latents.mean()),
                float(latents.std()),
                show_output(pipe, output.images)[0],
                float(output.mse[0]),
                float(output.psnr[0]),
                int(output.codes.evaluations.sum()),
            )
        )
        run.show(InversionComparison(image.shown, list(results)))
    return InversionComparison(image.shown, results)


@dataclass(frozen=True)
class EditSettings:
    """How an image is edited, once per seed; the names are those of `DDIMPipeline.edit`.

    Attributes:
        strength: fraction of the steps to go back, from 0 to 1.
        num_inference_steps: of a whole process.
        seeds: of the noise of each edit.
        condition: classes and guidance.
    """

    strength: float
    num_inference_steps: int
    seeds: range
    condition: ConditionSettings = NO_CONDITION

    @classmethod
    def checked(
        cls,
        strength: Any,
        steps: Any,
        seed: Any,
        count: Any,
        label: Any = ANY,
        guidance: Any = 1.0,
        classes: ClassLabels | None = None,
    ) -> EditSettings:
        """Check what a client sent.

        Args:
            strength: a number from 0 to 1.
            steps: an integer from 1 to `inputs.MAX_STEPS`.
            seed: an integer from 0 to `inputs.MAX_SEED`.
            count: an integer from 1 to `inputs.MAX_COUNT`.
            label: as for `ConditionSettings.checked`, like `guidance`.
            guidance: the scale.
            classes: of the model.

        Returns:
            The settings.

        Raises:
            ValueError: naming the first argument that is not allowed.
            TypeError: if `strength` or `guidance` is not a number.

        Example:
            >>> EditSettings.checked(0.5, 50, 7, 2).seeds
            range(7, 9)
        """
        first_seed, num_edits = inputs.seed(seed), inputs.integer("count", count, 1, inputs.MAX_COUNT)
        return cls(
            validation.real("strength", strength, 0, 1),
            inputs.integer("steps", steps, 1, inputs.MAX_STEPS),
            range(first_seed, first_seed + num_edits),
            ConditionSettings.checked(label, guidance, classes, num_edits),
        )


def edit(run: Run, base: DDIMPipeline, image: Picture, settings: EditSettings) -> list[Image.Image]:
    """Add noise to an image up to a strength and sample from there, once per seed.

    Args:
        run: the run.
        base: the model.
        image: of the model's size.
        settings: how it is edited.

    Returns:
        An edit per seed.
    """
    pipe = run.pipeline(base)
    count, steps = len(settings.seeds), settings.num_inference_steps
    condition = settings.condition.arguments(count)
    edits = pipe.edit([image.values] * count, settings.strength, steps, "np", seeds=settings.seeds, **condition)
    return show_output(pipe, edits.images)


def show_comparison(comparison: InversionComparison) -> str:
    """Return inversions as HTML: a row per method, of the image, its latent and what the latent decodes to.

    Args:
        comparison: of `invert`.
    """
    sections = []
    shape = comparison.image.size[::-1]
    for result in comparison.results:
        cells = [
            Cell(comparison.image, "image", "the image at the model's size"),
            Cell(result.latent, "latent", f"its latent, found by {result.method} steps"),
            Cell(result.image, "decoded", f"what the {result.method} latent decodes to"),
        ]
        facts = {
            "latent: mean": f"{result.mean:+.3f}",
            "latent: deviation": f"{result.deviation:.3f}",
            "mean squared error": f"{result.mse:.1e}",
            "PSNR": f"{result.psnr:.1f} dB",
            "function evaluations": f"{result.nfe:,}",
        }
        name = result.method[:1].upper() + result.method[1:]
        sections.append(
            f'<section class="way"><h3>{name}</h3>{grid(cells, shape, name, 3)}{page.table(facts)}</section>'
        )
    return f'<div class="ways">{"".join(sections)}</div>'


def show_image(image: Image.Image | None) -> str:
    """Return the image of the tab as HTML, or an empty box.

    Args:
        image: of the model's size and mode.
    """
    if image is None:
        return grid([Cell(None, "no image yet")], (1, 1), "Image", 1)
    label = f"{image.width} x {image.height}, the model's size"
    return grid([Cell(image, label, "the image at the model's size")], image.size[::-1], "Image", 1)


def show_canvas(shape: tuple[int, int, int]) -> str:
    """Return a canvas of a model's shape as HTML: white on black for gray images, any colors on white for others.

    Args:
        shape: (C, H, W) of the model's images.
    """
    channels, height, width = shape
    scale = CANVAS_SIZE / max(height, width)
    background = "#000000" if channels == 1 else "#ffffff"
    colors = (
        '<label>Color <input type="color" value="#1f4e9e" data-color></label> '
        '<button type="button" data-fill>Fill</button>'
    )
    return f"""<div class="draw"><canvas width="{width * scale:.0f}" height="{height * scale:.0f}" role="img"
aria-label="Draw here" data-background="{background}"
style="aspect-ratio:{width}/{height};background:{background}"></canvas><div class="tools">
<button type="button" data-use>Use the drawing</button> <button type="button" data-clear>Clear</button>
{colors if channels > 1 else ""}</div></div>"""


@dataclass(frozen=True, eq=False)
class InvertHandlers:
    """The event handlers of the tab, and the components that they update."""

    shared: Shared
    status: gr.HTML
    image: gr.State
    shown_image: gr.HTML
    canvas: gr.HTML
    inverted: gr.HTML
    edited: gr.HTML
    class_inputs: ClassInputs

    def use_upload(self, model: str, path: str) -> Updates:
        """Use an uploaded image.

        Args:
            model: the model's name.
            path: of the upload.

        Returns:
            The updates.

        Raises:
            ValueError: if it is not an image.
        """
        return self._use(inputs.upload(path, self.shared.uploads, lambda image: self._fit(model, image)))

    def use_drawing(self, model: str, event: gr.EventData) -> Updates:
        """Use the drawing.

        Args:
            model: the model's name.
            event: its value is the drawing's `data:` URL.

        Returns:
            The updates.

        Raises:
            ValueError: if it is not a drawing.
        """
        return self._use(inputs.drawing(event_value(event), lambda image: self._fit(model, image)))

    def use_last_pinned(self, model: str, endpoints: Sequence[Endpoint]) -> Updates:
        """Use the image that was pinned last.

        Args:
            model: the model's name.
            endpoints: those of the session.

        Returns:
            The updates.

        Raises:
            ValueError: if no image is pinned.
        """
        if not endpoints:
            raise ValueError("no image is pinned; click one in the tab Sample first")
        return self._use(inputs.present_image(endpoints[-1].picture, "draw"))

    def _fit(self, model: str, image: Image.Image) -> Picture:
        return fit(self.shared.models.open(model), image)

    def _use(self, image: Picture) -> Updates:
        return {
            self.image: image,
            self.shown_image: show_image(image.shown),
            self.status: page.status("The image is ready."),
        }

    def clear(self, model: str) -> Updates:
        """Remove the image and its results, which are those of another model, and give the canvas the model's shape.

        Args:
            model: the model's name.

        Returns:
            The updates.
        """
        pipe = self.shared.models.open(model)
        return {
            **self.class_inputs.follow(pipe.classes),
            self.status: page.status(READY),
            self.image: None,
            self.shown_image: show_image(None),
            self.canvas: show_canvas(pipe.sample_shape),
            self.inverted: "",
            self.edited: "",
        }

    def invert(
        self, model: str, image: Picture | None, steps: Any, label: Any, guidance: Any
    ) -> Task[InversionComparison]:
        """Return the task of the inversion.

        Args:
            model: the model's name.
            image: the image of the tab.
            steps: of encoding and decoding.
            label: the class.
            guidance: its scale.

        Raises:
            ValueError: if an input is not allowed.
            TypeError: if the guidance is not a number.
        """
        checked, S = inputs.present_image(image, "draw"), inputs.integer("steps", steps, 2, inputs.MAX_STEPS)
        classes = self.shared.models.open(model).classes
        condition = ConditionSettings.checked(label, guidance_of(label, guidance), classes, 1)

        def show_result(result: RunResult[InversionComparison]) -> Updates:
            text = f"Encoded and decoded in {result.seconds:.2f} s."
            return {self.status: page.status(text, 1), self.inverted: show_comparison(result.value)}

        return Task(
            "Inverting",
            lambda run: invert(run, self.shared.models.open(model), checked, S, condition),
            lambda comparison: {self.inverted: show_comparison(comparison)},
            show_result,
        )

    def edit(
        self,
        model: str,
        image: Picture | None,
        strength: Any,
        steps: Any,
        seed: Any,
        label: Any,
        guidance: Any,
    ) -> Task[list[Image.Image]]:
        """Return the task of `NUM_EDITS` edits.

        Args:
            model: the model's name.
            image: the image of the tab.
            strength: fraction of the steps to go back.
            steps: of a whole process.
            seed: of the first edit's noise.
            label: the class that the edits are sampled from.
            guidance: its scale.

        Raises:
            ValueError: if an input is not allowed.
            TypeError: if the strength or the guidance is not a number.
        """
        checked, classes = inputs.present_image(image, "draw"), self.shared.models.open(model).classes
        scale = guidance_of(label, guidance)
        settings = EditSettings.checked(strength, steps, seed, NUM_EDITS, label, scale, classes)

        def show_result(result: RunResult[list[Image.Image]]) -> Updates:
            cells = [
                Cell(edited, f"seed {seed}", f"edit with noise of seed {seed}", f"edit-{seed}.png")
                for edited, seed in zip(result.value, settings.seeds, strict=True)
            ]
            images = grid(cells, checked.shown.size[::-1], "Edits")
            text = f"{pluralize(len(cells), 'edit')} in {result.seconds:.2f} s."
            return {
                self.status: page.status(text, 1),
                self.edited: f"<h3>Edits of strength {settings.strength:g}</h3>{images}",
            }

        return Task(
            "Editing",
            lambda run: edit(run, self.shared.models.open(model), checked, settings),
            lambda _: {},
            show_result,
        )
