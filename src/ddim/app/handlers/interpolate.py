"""The tab Interpolate: a path through the latents of seeds and images, its frames as HTML and as an animation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ddim.app import inputs, page
from ddim.app.class_inputs import ClassInputs
from ddim.app.conditions import NO_CONDITION, ConditionSettings, guidance_of
from ddim.app.events import (
    Endpoint,
    Shared,
    Task,
    Updates,
    event_value,
    make_download_folder,
    show_endpoints,
)
from ddim.app.pictures import Picture, fit, pictures_of, show_output
from ddim.app.rendering import Cell, data_url, grid
from ddim.app.runs import Run, RunResult
from ddim.diffusion.noise import noise_from_seeds
from ddim.io.class_labels import take_labels
from ddim.io.image_files import save_animation
from ddim.pipeline import DDIMPipeline
from ddim.validation import pluralize, shown

ENDPOINT_STEPS = 20
"""Number of steps in which the images of seeds are sampled for the list of endpoints; a model of fewer timesteps takes
all of them."""

MAX_SEED_DIGITS = 19

READY = "A path needs at least two endpoints."


@dataclass(frozen=True)
class PathFrames:
    """The frames of a path.

    Attributes:
        frames: the images, in order.
        endpoint_indices: which of them are endpoints.
    """

    frames: list[Image.Image]
    endpoint_indices: list[int]


@dataclass(frozen=True)
class PathSettings:
    """How a path is made.

    Attributes:
        frames: per leg, both ends included.
        num_inference_steps: of encoding and decoding.
        closed: whether it returns to the first endpoint.
    """

    frames: int
    num_inference_steps: int
    closed: bool

    @classmethod
    def checked(cls, frames: Any, steps: Any, closed: Any) -> PathSettings:
        """Check what a client sent.

        Args:
            frames: an integer from 2 to `inputs.MAX_FRAMES`.
            steps: an integer from 2 to `inputs.MAX_STEPS`.
            closed: a boolean.

        Returns:
            The settings.

        Raises:
            ValueError: naming the first argument that is not allowed.

        Example:
            >>> PathSettings.checked(11, 20, False)
            PathSettings(frames=11, num_inference_steps=20, closed=False)
        """
        return cls(
            inputs.integer("frames", frames, 2, inputs.MAX_FRAMES),
            inputs.integer("steps", steps, 2, inputs.MAX_STEPS),
            inputs.flag("closed", closed),
        )


def interpolate(
    run: Run,
    base: DDIMPipeline,
    endpoints: Sequence[Endpoint],
    settings: PathSettings,
    condition: ConditionSettings = NO_CONDITION,
) -> PathFrames:
    """Encode the endpoints that are images, and decode the path through all.

    Args:
        run: the run.
        base: the model.
        endpoints: at least two.
        settings: how the path is made.
        condition: classes, one for all endpoints or one each, between which frames go; and guidance.

    Returns:
        The frames.
    """
    pipe = run.pipeline(base)
    images = {
        index: endpoint.picture.values
        for index, endpoint in enumerate(endpoints)
        if endpoint.seed is None and endpoint.picture
    }
    S = settings.num_inference_steps
    arguments = condition.arguments(len(endpoints))
    of_images = take_labels(arguments, list(images), len(endpoints))
    encoded = iter(pipe.encode(list(images.values()), S, verify=False, **of_images).latents if images else ())
    latents = [
        next(encoded)
        if endpoint.seed is None
        else noise_from_seeds((1, *pipe.sample_shape), [endpoint.seed], pipe.device)()[0]
        for endpoint in endpoints
    ]
    are_seeds = all(endpoint.seed is not None for endpoint in endpoints)
    frames = pipe.interpolate(
        latents, None, settings.frames, S, "np", closed=settings.closed, as_samples=are_seeds, **arguments
    ).images
    return PathFrames(show_output(pipe, frames), list(range(0, len(frames), settings.frames - 1)))


def make_endpoints(
    run: Run,
    base: DDIMPipeline,
    seeds: Sequence[int],
    images: Sequence[Picture],
    condition: ConditionSettings = NO_CONDITION,
) -> list[Endpoint]:
    """Make endpoints of seeds, whose images are sampled, and of images.

    Args:
        run: the run.
        base: the model.
        seeds: of latents.
        images: of the model's size.
        condition: class and guidance of the images of seeds; of several classes, the first.

    Returns:
        The endpoints, those of seeds first.
    """
    pictures: list[Picture] = []
    if seeds:
        pipe = run.pipeline(base)
        condition = replace(condition, labels=condition.labels[:1])
        output: Any = pipe(
            len(seeds),
            num_inference_steps=min(ENDPOINT_STEPS, len(pipe.scheduler)),
            seeds=seeds,
            output_type="np",
            **condition.arguments(len(seeds)),
        )
        pictures = pictures_of(pipe, output.images)
    sampled = [Endpoint(picture, seed) for picture, seed in zip(pictures, seeds, strict=True)]
    return [*sampled, *map(Endpoint, images)]


def check_room(endpoints: Sequence[Endpoint], num_added: int) -> None:
    """Check that endpoints can be added.

    Args:
        endpoints: those of the session.
        num_added: how many are added.

    Raises:
        ValueError: for none, or more than there is room for.
    """
    if not num_added:
        raise ValueError("nothing was given to add; give seeds such as 3, 14, 15, or images")
    if (total := len(endpoints) + num_added) > inputs.MAX_LATENTS:
        raise ValueError(f"a path must have at most {inputs.MAX_LATENTS} endpoints, got {total}")


def check_endpoints(endpoints: Sequence[Any]) -> None:
    """Check the number of endpoints of a path.

    Args:
        endpoints: of any kind.

    Raises:
        ValueError: for fewer than two, or too many.

    Example:
        >>> check_endpoints([1])
        Traceback (most recent call last):
        ValueError: a path must have 2 to 8 endpoints, got 1
    """
    if not 2 <= len(endpoints) <= inputs.MAX_LATENTS:
        raise ValueError(f"a path must have 2 to {inputs.MAX_LATENTS} endpoints, got {len(endpoints)}")


def parse_seeds(text: Any) -> list[int]:
    """Parse seeds separated by commas or spaces.

    Args:
        text: what a user wrote.

    Returns:
        The seeds.

    Raises:
        ValueError: for anything else.

    Example:
        >>> parse_seeds("3, 14 15")
        [3, 14, 15]
    """
    words = str(text or "").replace(",", " ").split()
    if not all(word.isdecimal() and len(word) <= MAX_SEED_DIGITS for word in words):
        raise ValueError(f"seeds must be integers such as 3, 14, 15, got {shown(text)}")
    return [inputs.seed(int(word)) for word in words]


def show_frames(path: PathFrames) -> str:
    """Return a path as HTML: one frame with a slider, and the strip of all frames.

    Args:
        path: the frames.
    """
    frames, last = path.frames, len(path.frames) - 1
    cells = [
        Cell(image, "end" if index in path.endpoint_indices else " ", f"frame {index + 1} of {len(frames)}")
        for index, image in enumerate(frames)
    ]
    width, height = frames[0].size
    return f"""
<div class="stage">
  <figure><img src="{data_url(frames[0])}" alt="the frame that the slider shows" style="aspect-ratio:{width}/{height}">
  <figcaption>frame 1 of {len(frames)}</figcaption></figure>
  <div class="controls"><button type="button" data-play>Play</button>
  <input type="range" min="0" max="{last}" value="0" aria-label="Frame"></div>
</div>
<div class="strip">{grid(cells, (height, width), "All frames")}</div>"""


def save(path: PathFrames, downloads: str | Path) -> str:
    """Write a path as an animation.

    Args:
        path: the frames.
        downloads: the folder of all downloads.

    Returns:
        The animation's path.
    """
    return str(save_animation(path.frames, make_download_folder(downloads) / "walk.webp"))


@dataclass(frozen=True, eq=False)
class InterpolateHandlers:
    """The event handlers of the tab, and the components that they update."""

    shared: Shared
    status: gr.HTML
    strip: gr.HTML
    animation: gr.DownloadButton
    class_inputs: ClassInputs

    def add_seeds(
        self, model: str, endpoints: list[Endpoint], text: Any, label: Any, guidance: Any
    ) -> Task[list[Endpoint]]:
        """Return the task of adding endpoints of seeds.

        Args:
            model: the model's name.
            endpoints: those of the session.
            text: the seeds, as a user wrote them.
            label: the class of their images, or `any`; of several, the first.
            guidance: of a class.

        Raises:
            ValueError: if an input is not allowed, or the list of endpoints is full.
        """
        seeds = parse_seeds(text)
        first = self._condition(model, label, guidance, None)
        return self._add(model, endpoints, seeds, (), first)

    def add_files(self, model: str, endpoints: list[Endpoint], paths: Any) -> Task[list[Endpoint]]:
        """Return the task of adding endpoints of uploaded images.

        Args:
            model: the model's name.
            endpoints: those of the session.
            paths: of the uploads.

        Raises:
            ValueError: if an input is not allowed, or the list of endpoints is full.
        """
        return self._add(model, endpoints, (), paths or ())

    def _add(
        self,
        model: str,
        endpoints: list[Endpoint],
        seeds: Sequence[int],
        paths: Sequence[str],
        condition: ConditionSettings = NO_CONDITION,
    ) -> Task[list[Endpoint]]:
        paths = inputs.sequence("images", paths, 0, inputs.MAX_LATENTS)
        check_room(endpoints, len(seeds) + len(paths))
        open_model = self.shared.models.open
        images = [
            inputs.upload(path, self.shared.uploads, lambda image: fit(open_model(model), image)) for path in paths
        ]

        def show_result(result: RunResult[list[Endpoint]]) -> Updates:
            text = f"{pluralize(len(result.value), 'endpoint')} added."
            return {self.status: page.status(text), **self._set_endpoints([*endpoints, *result.value])}

        return Task(
            "Adding",
            lambda run: make_endpoints(run, self.shared.models.open(model), seeds, images, condition),
            lambda _: {},
            show_result,
        )

    def remove(self, endpoints: list[Endpoint], event: gr.EventData) -> Updates:
        """Remove the endpoint that was clicked.

        Args:
            endpoints: those of the session.
            event: the click; its value is the endpoint's index.

        Returns:
            The updates.

        Raises:
            ValueError: if no such endpoint exists.
        """
        index = inputs.integer("endpoint", event_value(event), 0, len(endpoints) - 1)
        return self._set_endpoints([endpoint for i, endpoint in enumerate(endpoints) if i != index])

    def _set_endpoints(self, endpoints: list[Endpoint]) -> Updates:
        return {self.shared.endpoints: endpoints, self.shared.endpoint_list: show_endpoints(endpoints)}

    def _condition(self, model: str, label: Any, guidance: Any, count: int | None) -> ConditionSettings:
        classes = self.shared.models.open(model).classes
        return ConditionSettings.checked(label, guidance_of(label, guidance), classes, count, "the number of endpoints")

    def reset(self, model: str) -> Updates:
        """Remove the path, which is that of another model.

        Args:
            model: the model's name.

        Returns:
            The updates.
        """
        return {
            **self.class_inputs.follow(self.shared.models.open(model).classes),
            self.status: page.status(READY),
            self.strip: "",
            self.animation: gr.DownloadButton(value=None, interactive=False),
        }

    def interpolate(
        self,
        model: str,
        endpoints: list[Endpoint],
        text: Any,
        frames: Any,
        steps: Any,
        closed: Any,
        label: Any,
        guidance: Any,
    ) -> Task[PathFrames]:
        """Return the task of the interpolation.

        Args:
            model: the model's name.
            endpoints: those of the session.
            text: further seeds, as a user wrote them, which become endpoints.
            frames: per leg, both ends included.
            steps: of encoding and decoding.
            closed: whether the path returns to the first endpoint.
            label: a class for all endpoints, or several, which share them equally; or `any`.
            guidance: of a class.

        Raises:
            ValueError: if an input is not allowed, or there are too few endpoints.
        """
        settings, seeds = PathSettings.checked(frames, steps, closed), parse_seeds(text)
        check_endpoints([*endpoints, *seeds])
        condition = self._condition(model, label, guidance, len(endpoints) + len(seeds))
        base = self.shared.models.open(model)

        def work(run: Run) -> PathFrames:
            every = [*endpoints, *make_endpoints(run, base, seeds, (), condition)]
            run.show(every)
            return interpolate(run, base, every, settings, condition)

        def show_result(result: RunResult[PathFrames]) -> Updates:
            text = f"{pluralize(len(result.value.frames), 'frame')} in {result.seconds:.2f} s."
            file = gr.DownloadButton(value=save(result.value, self.shared.downloads), interactive=True)
            return {self.status: page.status(text, 1), self.strip: show_frames(result.value), self.animation: file}

        return Task("Interpolating", work, self._set_endpoints, show_result)
