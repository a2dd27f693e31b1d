"""The tab Restore: an image, what is unknown of it, and the images that agree with what is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from ddim import validation
from ddim.app import inputs, page
from ddim.app.brush import read_marks, show_image, show_sheet
from ddim.app.class_inputs import ClassInputs
from ddim.app.conditions import ConditionSettings, guidance_of
from ddim.app.events import Endpoint, Shared, Task, Updates, make_download_folder
from ddim.app.handlers.interpolate import make_endpoints
from ddim.app.measurements import Hole, Measurement, Reduced, Source, factors
from ddim.app.rendering import Cell, grid
from ddim.app.restoration import Restored, RestoreSettings, restore
from ddim.app.runs import RunResult
from ddim.io.sample_files import save_samples
from ddim.pipeline import DDIMPipeline
from ddim.validation import pluralize

READY = "Upload an image, sample one, or use a pinned one."

INPAINT = "Inpaint"
SUPER_RESOLVE = "Super-resolve"
TASKS = (INPAINT, SUPER_RESOLVE)


def show_restored(restored: Restored) -> str:
    """Return the results as HTML: what was given, the answers, and what they have in common.

    Args:
        restored: the results.
    """
    measurement, settings = restored.measurement, restored.settings
    shape = restored.mean.shown.size[::-1]
    given = [Cell(measurement.picture.shown, "measured", "the measurement", "measurement.png")]
    if isinstance(measurement, Hole):
        given.append(Cell(measurement.mask, "mask", "the mask: white is unknown", "mask.png"))
    answers = [
        Cell(answer.shown, f"seed {seed}", f"answer with noise of seed {seed}", f"answer-{seed}.png")
        for answer, seed in zip(restored.answers, settings.seeds, strict=True)
    ]
    rows = [
        ("Given", "what the answers agree with", given),
        ("Answers", f"{pluralize(restored.nfe, 'function evaluation')} each", answers),
    ]
    if settings.count > 1:
        both = [
            Cell(restored.mean.shown, "mean", "mean of the answers", "mean.png"),
            Cell(restored.spread, "spread", "standard deviation of the answers", "spread.png"),
        ]
        rows.append(("All answers", f"white in the spread is a deviation of {restored.max_spread:.2f}", both))
    sections = [
        f"<section><div><h3>{name}</h3><small>{note}</small></div>{grid(cells, shape, name)}</section>"
        for name, note, cells in rows
    ]
    return f'<div class="rows">{"".join(sections)}</div>'


def save(restored: Restored, base: DDIMPipeline, downloads: str | Path) -> tuple[str, str]:
    """Write the measurement and the answers as arrays.

    Args:
        restored: the results.
        base: the model.
        downloads: the folder of all downloads.

    Returns:
        The paths of both.
    """
    folder = make_download_folder(downloads)
    paths = folder / "measurement.npz", folder / "answers.npz"
    for pictures, path in zip(([restored.measurement.picture], restored.answers), paths, strict=True):
        values = [np.atleast_3d(np.asarray(picture.values)) for picture in pictures]
        save_samples(values, base.pixel_format, path)
    return str(paths[0]), str(paths[1])


@dataclass(frozen=True, eq=False)
class RestoreHandlers:
    """The event handlers of the tab, and the components that they update."""

    shared: Shared
    status: gr.HTML
    source: gr.State
    sheet: gr.HTML
    reduced: gr.HTML
    reduction: gr.Group
    factor: gr.Dropdown
    restored: gr.HTML
    measurement_file: gr.DownloadButton
    answers_file: gr.DownloadButton
    command: gr.Code
    class_inputs: ClassInputs

    def use_upload(self, model: str, path: Any) -> Updates:
        """Use an uploaded image.

        Args:
            model: the model's name.
            path: of the upload.

        Returns:
            The updates.

        Raises:
            ValueError: if it is not an image.
        """
        base = self.shared.models.open(model)
        source: Source = inputs.upload(path, self.shared.uploads, lambda image: Source.of(base, image))
        text = "The image is ready."
        if source.small:
            width, height = source.small.shown.size
            factor = base.sample_shape[2] // width
            text = f"The image of {width} x {height} pixels is ready: it can be super-resolved by {factor} as it is."
        return self._use(source, text)

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
        if not endpoints or endpoints[-1].picture is None:
            raise ValueError("no image is pinned; click one in the tab Sample first")
        return self._use(Source(endpoints[-1].picture))

    def sample(self, model: str, seed: Any, label: Any, guidance: Any) -> Task[list[Endpoint]]:
        """Return the task of sampling an image.

        Args:
            model: the model's name.
            seed: of the image.
            label: its class, or `any`.
            guidance: of a class.

        Raises:
            ValueError: if an input is not allowed.
        """
        base, checked = self.shared.models.open(model), inputs.seed(seed)
        condition = ConditionSettings.checked(label, guidance_of(label, guidance), base.classes, 1)

        def show_result(result: RunResult[list[Endpoint]]) -> Updates:
            picture = result.value[0].picture
            assert picture is not None
            return self._use(Source(picture))

        return Task(
            "Sampling", lambda run: make_endpoints(run, base, [checked], (), condition), lambda _: {}, show_result
        )

    def _use(self, source: Source, text: str = "The image is ready.") -> Updates:
        return {
            self.source: source,
            self.sheet: show_sheet(source.picture.shown),
            self.status: page.status(text),
        }

    def follow(self, model: str, source: Source | None, task: Any, factor: Any, kernel: Any) -> Updates:
        """Show what the task takes: the image to mark, or the small one.

        Args:
            model: the model's name.
            source: the image of the tab.
            task: one of `TASKS`.
            factor: of super-resolution.
            kernel: of super-resolution.

        Returns:
            The updates.

        Raises:
            ValueError: if an input is not allowed.
        """
        is_inpainting = validation.choice("task", task, TASKS) == INPAINT
        shown = show_image(None)
        if source and not is_inpainting:
            image = Reduced.of(self.shared.models.open(model), source, factor, kernel).picture.shown
            shown = show_image(image, f"{image.width} x {image.height} pixels: the measurement")
        return {
            # Hidden, not removed: what is marked stays.
            self.sheet: gr.HTML(visible=True if is_inpainting else "hidden"),
            self.reduced: gr.HTML(value=shown, visible=not is_inpainting),
            self.reduction: gr.Group(visible=not is_inpainting),
        }

    def clear(self, model: str) -> Updates:
        """Remove the image and its results, which are those of another model.

        Args:
            model: the model's name.

        Returns:
            The updates.
        """
        pipe = self.shared.models.open(model)
        choices = factors(pipe)
        return {
            **self.class_inputs.follow(pipe.classes),
            self.status: page.status(READY),
            self.source: None,
            self.sheet: show_sheet(None),
            self.reduced: show_image(None),
            self.factor: gr.Dropdown(choices=choices, value=default_factor(choices)),
            self.restored: "",
            self.measurement_file: gr.DownloadButton(value=None, interactive=False),
            self.answers_file: gr.DownloadButton(value=None, interactive=False),
            self.command: "",
        }

    def restore(
        self, marks: Any, model: str, source: Source | None, task: Any, factor: Any, kernel: Any, *values: Any
    ) -> Task[Restored]:
        """Return the task of the restoration.

        Args:
            marks: what was marked, as `read_marks` takes it.
            model: the model's name.
            source: the image of the tab.
            task: one of `TASKS`.
            factor: of super-resolution.
            kernel: of super-resolution.
            values: the arguments of `RestoreSettings.checked` but the last.

        Raises:
            ValueError: if an input is not allowed.
            TypeError: if the guidance is not a number.
        """
        base, image = self.shared.models.open(model), inputs.present_image(source, "sample")
        count, steps, seed, label, guidance = values
        scale = guidance_of(label, guidance)
        settings = RestoreSettings.checked(count, steps, seed, label, scale, base.classes)
        measurement: Measurement
        if validation.choice("task", task, TASKS) == INPAINT:
            measurement = Hole.of(base, image.picture, read_marks(base, marks))
        else:
            measurement = Reduced.of(base, image, factor, kernel)

        def show_result(result: RunResult[Restored]) -> Updates:
            measurement_path, answers_path = save(result.value, base, self.shared.downloads)
            text = f"{pluralize(settings.count, 'answer')} in {result.seconds:.2f} s."
            return {
                self.status: page.status(text, 1),
                self.restored: show_restored(result.value),
                self.measurement_file: gr.DownloadButton(value=measurement_path, interactive=True),
                self.answers_file: gr.DownloadButton(value=answers_path, interactive=True),
                self.command: result.value.as_command(model),
            }

        return Task("Restoring", lambda run: restore(run, base, measurement, settings), lambda _: {}, show_result)


def default_factor(choices: Sequence[int]) -> int | None:
    """Return the factor that a model starts with: 4, or the largest one below it.

    Args:
        choices: of `ddim.app.measurements.factors`.

    Example:
        >>> default_factor([2, 4, 7]), default_factor([3, 9]), default_factor([])
        (4, 3, None)
    """
    return max((factor for factor in choices if factor <= 4), default=next(iter(choices), None))
