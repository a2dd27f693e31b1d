"""The tab Sample: sampling, its images as HTML, and the same run in Python and on the command line."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ddim import validation
from ddim.app import inputs, page
from ddim.app.class_inputs import ClassInputs
from ddim.app.conditions import NO_CONDITION, ConditionSettings, guidance_of
from ddim.app.events import Endpoint, Shared, Task, Updates, event_value, make_download_folder, show_endpoints
from ddim.app.pictures import Picture, pictures_of
from ddim.app.rendering import Cell, grid
from ddim.app.runs import Run, RunResult
from ddim.diffusion.sampling_config import ORDERS, SamplingConfig
from ddim.diffusion.schedule import SPACINGS
from ddim.io.class_labels import ClassLabels
from ddim.io.label_text import ALL
from ddim.io.pixel_format import PixelFormat
from ddim.io.sample_files import save_samples
from ddim.pipeline import DDIMPipeline
from ddim.validation import pluralize

MODELS_OWN = "the model's own"
"""The order and the spacing that leave the steps to the model, with what it has learned for their number."""

NOTHING_SAMPLED = "Nothing has been sampled yet."


@dataclass(frozen=True)
class SampleSettings:
    """What to sample; image i is that of seed `seed + i`.

    Attributes:
        num_inference_steps: number of steps.
        eta: 0 for DDIM, 1 for DDPM.
        order: of the method, 1 to 4; `None` for the model's own.
        spacing: of the timesteps.
        count: number of images.
        seed: of the first image.
        condition: classes and guidance.
    """

    num_inference_steps: int = 20
    eta: float = 0.0
    order: int | None = None
    spacing: str = MODELS_OWN
    count: int = 16
    seed: int = 0
    condition: ConditionSettings = NO_CONDITION

    @classmethod
    def checked(
        cls,
        steps: Any,
        eta: Any,
        order: Any,
        spacing: Any,
        count: Any,
        seed: Any,
    ) -> SampleSettings:
        """Check what a client sent; classes are checked by `of_class`.

        Args:
            steps: an integer from 1 to `inputs.MAX_STEPS`.
            eta: a number from 0 to `inputs.MAX_ETA`.
            order: `MODELS_OWN`, or 1 to 4.
            spacing: `MODELS_OWN` or one of `SPACINGS`.
            count: an integer from 1 to `inputs.MAX_COUNT`.
            seed: an integer from 0 to `inputs.MAX_SEED`.

        Returns:
            The settings.

        Raises:
            ValueError: naming the first argument that is not allowed.
            TypeError: if `eta` is not a number.
        """
        return cls(
            inputs.integer("steps", steps, 1, inputs.MAX_STEPS),
            validation.real("eta", eta, 0, inputs.MAX_ETA),
            None if order == MODELS_OWN else inputs.integer("order", order, 1, ORDERS[-1]),
            validation.choice("spacing", spacing, [MODELS_OWN, *SPACINGS]),
            inputs.integer("count", count, 1, inputs.MAX_COUNT),
            inputs.seed(seed),
        )

    def of_class(self, label: Any, guidance: Any, classes: ClassLabels | None) -> SampleSettings:
        """Return the same settings for images of a class, after checking what a client sent.

        Args:
            label: as for `ConditionSettings.checked`.
            guidance: the scale.
            classes: of the model; `None` for none.

        Raises:
            ValueError: if the model has no such class, or the scale is not allowed.
            TypeError: if `guidance` is not a number.
        """
        return replace(self, condition=ConditionSettings.checked(label, guidance, classes, self.count))

    @property
    def seeds(self) -> range:
        """The seed of each image."""
        return range(self.seed, self.seed + self.count)

    @property
    def nfe(self) -> int:
        """Function evaluations per image."""
        return self.num_inference_steps * self.condition.evaluations_per_step

    @property
    def columns(self) -> int | None:
        """Images per row, where there is a row per class; else `None`."""
        return self.condition.columns(self.count)

    @property
    def names(self) -> list[str]:
        """The text below each image: its class, if it has one, and its seed."""
        return [f"{self.condition.name_of(index, self.count)}seed {seed}" for index, seed in enumerate(self.seeds)]

    def config(self, pipe: DDIMPipeline) -> SamplingConfig:
        """Return the settings of the sampler.

        Args:
            pipe: has the scheduler whose timesteps are spaced.

        Returns:
            The settings.

        Raises:
            ValueError: if two of them exclude each other.
        """
        steps = self.num_inference_steps
        timesteps = None if self.spacing == MODELS_OWN else pipe.scheduler.make_timesteps(steps, self.spacing)
        return SamplingConfig(steps, self.eta, timesteps, self.order)

    def as_python(self, model: str, to_pil: bool = True) -> str:
        """Return a program that samples the same images.

        Args:
            model: the model's name.
            to_pil: whether the images are PIL images, not arrays.
        """
        output = "" if to_pil else ", output_type='np'"
        lines = ["from ddim import DDIMPipeline", "", f"pipe = DDIMPipeline.from_pretrained({model!r})"]
        steps = f"num_inference_steps={self.num_inference_steps}"
        if self.spacing != MODELS_OWN:
            lines.append(f"timesteps = pipe.scheduler.make_timesteps({self.num_inference_steps}, {self.spacing!r})")
            steps = "timesteps=timesteps"
        order = "" if self.order is None else f", order={self.order}"
        lines.append(
            f"images = pipe.sample_images({self.count}, seed={self.seed}, {steps}, eta={self.eta}{order}"
            f"{self.condition.as_python(self.count)}{output})"
        )
        return "\n".join(lines)

    def as_command(self, model: str, to_png: bool = True) -> str:
        """Return a command that samples the same images.

        Args:
            model: the model's name.
            to_png: whether PNG keeps the images; an array is written otherwise.
        """
        order = "" if self.order is None else f" --order {self.order}"
        spacing = "" if self.spacing == MODELS_OWN else f" --spacing {self.spacing}"
        return (
            f"ddim sample --model {shlex.quote(model)} --count {self.count} --seed {self.seed} "
            f"--steps {self.num_inference_steps} --eta {self.eta}{order}{spacing}"
            f"{self.condition.as_command()} --out samples.{'png' if to_png else 'npz'}"
        )


@dataclass(frozen=True, eq=False)  # as `Endpoint`
class SampledImages:
    """Images, and the settings that they were sampled with."""

    settings: SampleSettings
    pictures: list[Picture]
    pixel_format: PixelFormat

    @cached_property
    def images(self) -> list[Image.Image]:
        """The images as they are shown."""
        return [picture.shown for picture in self.pictures]

    @property
    def keeps_values(self) -> bool:
        """Whether images are shown as they are."""
        return self.pictures[0].shown is self.pictures[0].values

    def endpoint(self, index: int) -> Endpoint:
        """Return an image as the endpoint of a path.

        Args:
            index: of the image.

        Returns:
            Its seed; or the image itself, if it has a class, or noise was added on the way.
        """
        is_decided_by_seed = self.settings.eta == 0 and self.settings.condition.is_any
        seed = self.settings.seeds[index] if is_decided_by_seed else None
        return Endpoint(self.pictures[index], seed)


def sample(run: Run, base: DDIMPipeline, settings: SampleSettings) -> SampledImages:
    """Sample the images of `ddim sample` with the same settings.

    Args:
        run: the run.
        base: the model.
        settings: what to sample.

    Returns:
        The images.

    Raises:
        ValueError: if two settings exclude each other, or the model was trained with fewer timesteps.
    """
    pipe = run.pipeline(base)
    arguments = asdict(settings.config(pipe)) | dict(settings.condition.arguments(settings.count))
    output: Any = pipe(
        settings.count, seeds=settings.seeds, output_type="np", callback_on_step_end=run.preview, **arguments
    )
    return SampledImages(settings, pictures_of(pipe, output.images), pipe.pixel_format)


def show_empty(count: int) -> str:
    """Return boxes without images as HTML.

    Args:
        count: how many.
    """
    return grid([Cell(None, " ")] * count, (1, 1), "Images")


def show_preview(images: Sequence[Image.Image], settings: SampleSettings) -> str:
    """Return unfinished images as HTML.

    Args:
        images: the predicted x_0.
        settings: what is sampled.
    """
    cells = [
        Cell(image, name, f"image of {name}, unfinished") for image, name in zip(images, settings.names, strict=True)
    ]
    return grid(cells, images[0].size[::-1], "Images", settings.columns)


def show_images(sampled: SampledImages, endpoints: Sequence[Endpoint] = ()) -> str:
    """Return images as HTML; each can be pinned and saved, and the pinned ones are marked.

    Args:
        sampled: the images.
        endpoints: what is pinned.
    """
    pinned = {id(endpoint.image) for endpoint in endpoints}
    settings = sampled.settings
    cells = [
        Cell(image, name, f"image of {name}", f"seed-{seed}.png", "Pin", index, id(image) in pinned)
        for index, (image, name, seed) in enumerate(zip(sampled.images, settings.names, settings.seeds, strict=True))
    ]
    return grid(cells, sampled.images[0].size[::-1], "Images", settings.columns)


def save(sampled: SampledImages, downloads: str | Path) -> tuple[str, str]:
    """Write images as `ddim sample` does.

    Args:
        sampled: the images.
        downloads: the folder of all downloads.

    Returns:
        The paths of the grid and of the array.
    """
    folder = make_download_folder(downloads)
    grid_path, array_path = folder / "samples.png", folder / "samples.npz"
    values = [np.atleast_3d(np.asarray(picture.values)) for picture in sampled.pictures]
    save_samples(values, sampled.pixel_format, grid_path, sampled.settings.columns, scale=None)
    save_samples(values, sampled.pixel_format, array_path)
    return str(grid_path), str(array_path)


@dataclass(frozen=True, eq=False)
class SampleHandlers:
    """The event handlers of the tab, and the components that they update."""

    shared: Shared
    status: gr.HTML
    images: gr.HTML
    sampled: gr.State
    grid_file: gr.DownloadButton
    array_file: gr.DownloadButton
    python: gr.Code
    command: gr.Code
    class_inputs: ClassInputs
    count: gr.Slider

    def sample(self, model: str, *values: Any) -> Task[SampledImages]:
        """Return the task of sampling.

        Args:
            model: the model's name.
            values: the arguments of `SampleSettings.checked`, the class and the scale of guidance.

        Raises:
            ValueError: if an input is not allowed.
            TypeError: if an input is not a number.
        """
        settings = self._check(model, *values)

        def show_result(result: RunResult[SampledImages]) -> Updates:
            nfe, images = settings.nfe, result.value.images
            grid_path, array_path = save(result.value, self.shared.downloads)
            text = (
                f"{pluralize(len(images), 'image')} in {result.seconds:.2f} s: {pluralize(nfe, 'function evaluation')} "
                f"per image, {nfe * len(images)} in all. Click an image to pin it for the other tabs."
            )
            return {
                self.status: page.status(text, 1),
                self.images: show_images(result.value),
                self.sampled: result.value,
                self.grid_file: gr.DownloadButton(value=grid_path, interactive=True),
                self.array_file: gr.DownloadButton(value=array_path, interactive=True),
                self.python: settings.as_python(model, result.value.keeps_values),
                self.command: settings.as_command(model, result.value.keeps_values),
            }

        return Task(
            "Sampling",
            lambda run: sample(run, self.shared.models.open(model), settings),
            lambda images: {self.images: show_preview(images, settings)},
            show_result,
        )

    def _check(self, model: str, *values: Any) -> SampleSettings:
        """Check the settings of the tab."""
        steps, eta, order, spacing, count, seed, label, guidance = values
        classes = self.shared.models.open(model).classes
        scale = guidance_of(label, guidance)
        return SampleSettings.checked(steps, eta, order, spacing, count, seed).of_class(label, scale, classes)

    def reset(self, model: str, *values: Any) -> Updates:
        """Remove the images, which are those of another model, and return the program and the command for this one.

        Args:
            model: the model's name.
            values: the arguments of `SampleSettings.checked`, the class and the scale of guidance; the class is the
                first choice of this model, and the defaults stand in for what is not allowed.

        Returns:
            The updates.
        """
        classes = self.shared.models.open(model).classes
        label = self.class_inputs.default_label(classes)
        steps, eta, order, spacing, count, seed, *_ = values
        try:
            settings = SampleSettings.checked(steps, eta, order, spacing, count, seed).of_class(label, 1.0, classes)
        except (ValueError, TypeError):
            settings = SampleSettings()
        return {
            self.status: page.status(NOTHING_SAMPLED),
            self.images: show_empty(settings.count),
            self.sampled: None,
            self.grid_file: gr.DownloadButton(value=None, interactive=False),
            self.array_file: gr.DownloadButton(value=None, interactive=False),
            self.python: settings.as_python(model),
            self.command: settings.as_command(model),
            **self.class_inputs.follow(classes),
        }

    def fit_count(self, model: str, label: Any, count: Any) -> Updates:
        """Make the number of images one that all classes share equally, where all were chosen.

        Args:
            model: the model's name.
            label: what was chosen.
            count: the number of images.

        Returns:
            The updates.

        Raises:
            ValueError: if the number of images is not allowed.
        """
        classes = self.shared.models.open(model).classes
        if label != ALL or classes is None:
            return {}
        num_images = inputs.integer("count", count, 1, inputs.MAX_COUNT)
        columns = min(max(1, round(num_images / classes.count)), inputs.MAX_COUNT // classes.count)
        return {self.count: classes.count * columns}

    def pin(self, sampled: SampledImages | None, endpoints: list[Endpoint], event: gr.EventData) -> Updates:
        """Pin the image that was clicked, or unpin it.

        Args:
            sampled: the images of the last run.
            endpoints: what is pinned.
            event: the click; its value is the image's index.

        Returns:
            The updates.

        Raises:
            ValueError: if as many images are pinned as can be.
        """
        if sampled is None:
            return {}
        index = inputs.integer("image", event_value(event), 0, len(sampled.images) - 1)
        others = [endpoint for endpoint in endpoints if endpoint.image is not sampled.images[index]]
        if len(others) == len(endpoints) == inputs.MAX_LATENTS:
            raise ValueError(f"at most {inputs.MAX_LATENTS} images can be pinned; click a pinned one to unpin it")
        endpoints = others if len(others) < len(endpoints) else [*endpoints, sampled.endpoint(index)]
        return {
            self.shared.endpoints: endpoints,
            self.shared.endpoint_list: show_endpoints(endpoints),
            self.images: show_images(sampled, endpoints),
        }
