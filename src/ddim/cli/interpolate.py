"""`ddim interpolate`: images between images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from ddim.cli import options
from ddim.cli.checks import MAX_FRAMES
from ddim.cli.common import (
    DEFAULT_MODEL,
    SamplingOptions,
    check_fps,
    count_replaced,
    load_latents_pipeline,
    load_pipeline,
    read_images,
    report_result,
    save_results,
    show_images,
    split_model,
)
from ddim.cli.conditions import NO_CONDITIONS, ConditionOptions, takes_conditions
from ddim.validation import integer, pluralize, shown

MAX_SEED_DIGITS = 19

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from ddim.io.latent_files import LatentSettings
    from ddim.latents import Condition
    from ddim.pipeline import DDIMPipeline


@takes_conditions
def interpolate(
    points: Annotated[
        list[str],
        typer.Argument(help="Two or more of: an image, a file of latents, a seed.", show_default=False),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            help="x.png is a strip with one row per leg; x.gif and x.webp are animations; a folder gets one PNG per "
            "frame.",
        ),
    ] = "interpolation.png",
    frames: Annotated[int, typer.Option(help="Frames per leg from point to point, both ends included.")] = 11,
    closed: Annotated[bool, typer.Option("--closed", help="Return to the first point.")] = False,
    grid: Annotated[
        str | None, typer.Option(help="ROWSxCOLUMNS between four points, the corners, instead of a path.")
    ] = None,
    fps: options.Fps = 10.0,
    scale: options.Scale = None,
    model: options.ModelOption = None,
    weights: options.Weights = None,
    steps: options.LatentSteps = None,
    spacing: options.Spacing = None,
    resize: options.Resize = False,
    force: options.Force = False,
    batch_size: options.LatentBatchSize = 8,
    conditions: ConditionOptions = NO_CONDITIONS,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    engine: options.Engine = "auto",
) -> None:
    """Interpolate spherically from point to point in latent space, and decode the latents between.

    Images are encoded exactly, so that the path passes through them. The model defaults to that of the first file of
    latents, or mnist. The path of the result is printed.

    Between seeds alone the frames at the points are the images of `ddim sample --seed`. With an image or latents among
    the points all are decoded as `ddim decode` does, without clipping and without the last step's jump, and the image
    of a seed differs from that of `ddim sample`.

    Of a model with classes, --label 3,8 gives each point its label, and the frames go from class to class; a single one
    holds for all. Without it, latents keep the classes and the guidance of their encoding.

    Examples:
      ddim interpolate 3 14 --out strip.png

      ddim interpolate one.png seven.png 3 --frames 25 --closed --out walk.gif

      ddim interpolate 1 2 3 4 --grid 8x8 --out grid.png

      ddim interpolate 5 5 -m runs/digits --label 3,8 --guidance 1.5   # one class turns into another
    """
    from ddim.io.image_files import (
        ANIMATION_SUFFIXES,
        OUTPUT_SUFFIXES,
        check_output_path,
        enlarge,
        is_folder_path,
        save_animation,
        save_image,
        stack_rows,
    )

    target = check_output_path(out, OUTPUT_SUFFIXES | ANIMATION_SUFFIXES)
    check_fps(fps)
    integer("--frames", frames, 2)
    grid_shape = None if grid is None else parse_grid(grid)
    if grid_shape is not None and closed:
        raise ValueError("--closed requires a path, got --grid")
    name, others = split_model(points, model, weights)
    given = Points.read(others)
    if given.latents:
        source, (_, settings) = next(iter(given.latents.items()))
        pipe = load_latents_pipeline(source, settings, name, device, dtype, engine)
    else:
        pipe = load_pipeline(name or DEFAULT_MODEL, device, dtype, engine)
    path_timesteps = given.choose_timesteps(pipe, SamplingOptions(steps, spacing))
    given.check(pipe, path_timesteps, grid_shape is not None, force)
    condition = given.condition(pipe, conditions)
    num_segments = given.count if closed else given.count - 1
    num_images = num_segments * (frames - 1) + (not closed) if grid_shape is None else math.prod(grid_shape)
    num_replaced = count_replaced(pipe, out, num_images)
    images = pipe.interpolate(
        given.encode(pipe, path_timesteps, resize, batch_size, condition),
        frames=frames if grid_shape is None else grid_shape,
        closed=closed,
        timesteps=path_timesteps,
        as_samples=given.are_seeds,
        batch_size=batch_size,
        output_type="np",
        **condition,
    ).images
    note, frames_shown = "", show_images(pipe, images)
    suffix = "" if is_folder_path(out) else target.suffix.lower()
    if suffix in ANIMATION_SUFFIXES:
        save_animation([enlarge(image, image, scale) for image in frames_shown], out, fps)
    elif suffix == ".png" and grid_shape is None:
        starts = range(0, len(frames_shown) if closed else len(frames_shown) - 1, frames - 1)
        cycle = [*frames_shown, frames_shown[0]]
        strip = stack_rows([cycle[start : start + frames] for start in starts], frames)
        save_image(enlarge(strip, frames_shown[0], scale), target)
    else:
        note = save_results(pipe, images, out, grid_shape and grid_shape[1], scale)
    summary = pluralize(len(images), "frame") + note
    if given.latents and name is None:
        summary += (
            f", {pluralize(len(path_timesteps), 'step')} of the model {shown(settings.model)}, which {source} names"
        )
    report_result(target, num_replaced, summary)


def parse_grid(text: str) -> tuple[int, int]:
    """Parse the value of `--grid`.

    Args:
        text: rows and columns, such as `8x6`.

    Returns:
        (rows, columns), each at least 2.

    Raises:
        ValueError: for anything else.

    Example:
        >>> parse_grid("8x6")
        (8, 6)
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and len(part) < 10 and int(part) >= 2 for part in parts):
        raise ValueError(f"--grid must be ROWSxCOLUMNS, such as 8x8, each at least 2, got {shown(text)}")
    rows, columns = int(parts[0]), int(parts[1])
    if rows * columns > MAX_FRAMES:
        raise ValueError(f"--grid must have at most {MAX_FRAMES} images, got {shown(text)}")
    return rows, columns


def join_conditions(parts: Sequence[tuple[Mapping[str, Any], int]]) -> Condition:
    """Return the condition of several groups of latents from those of the groups.

    Args:
        parts: the condition of each group, as a file of latents holds it, and its number of latents.

    Raises:
        ValueError: if they have different guidance, or labels are those of some groups alone.

    Example:
        >>> join_conditions([({"class_labels": [3]}, 2), ({"class_labels": [5, 8]}, 2)])
        {'class_labels': [3, 3, 5, 8]}
    """
    names = ("class_labels", "negative_labels")
    first, *others = ({key: value for key, value in part.items() if key not in names} for part, _ in parts)
    joined: Any = dict(first)
    different = any(other != first for other in others)
    for name in names:
        lists = [part.get(name) for part, _ in parts]
        if not any(lists):
            continue
        joined[name] = []
        for labels, (_, count) in zip(lists, parts, strict=True):
            different = different or not labels
            joined[name] += list(labels or ()) * (count if len(labels or ()) == 1 else 1)
    if different:
        raise ValueError("the points were encoded with different classes or guidance; give --label and --guidance")
    result: Condition = joined
    return result


@dataclass(frozen=True)
class Points:
    """The points of an interpolation, read and not yet encoded.

    Attributes:
        names: the points as they were given, in order.
        latents: of files: their latents (N, C, H, W) and the settings that made them, by name.
        seeds: of seeds, by name.
        images: of image files and folders, by name.
    """

    names: Sequence[str]
    latents: dict[str, tuple[Tensor, LatentSettings]]
    seeds: dict[str, int]
    images: dict[str, list[Image.Image | np.ndarray]]

    @classmethod
    def read(cls, names: Sequence[str]) -> Self:
        """Read the files of the points.

        Args:
            names: files of latents, seeds, images or folders of images.

        Returns:
            The points.

        Raises:
            FileNotFoundError: if no such file exists.
            ValueError: if a file is damaged, or a seed is out of range.
        """
        from ddim.diffusion.noise import check_seeds
        from ddim.io.latent_files import LATENT_SUFFIXES, load_latents

        latents = {name: load_latents(name) for name in names if Path(name).suffix.lower() in LATENT_SUFFIXES}
        numbers = [name for name in names if name.removeprefix("-").isdecimal()]
        if too_long := [name for name in numbers if len(name) > MAX_SEED_DIGITS]:
            raise ValueError(f"a seed must be an integer from 0 to 2^63 - 1, got {shown(too_long[0])}")
        seeds = {name: int(name) for name in numbers}
        check_seeds([integer("a seed", seed, 0) for seed in seeds.values()], len(seeds))
        others = [name for name in names if name not in latents and name not in seeds]
        return cls(names, latents, seeds, {name: read_images([name]) for name in others})

    @property
    def are_seeds(self) -> bool:
        """Whether all points are seeds."""
        return not self.latents and not self.images

    @property
    def count(self) -> int:
        """Number of latents, seeds and images in all points."""
        counts = {name: len(latents) for name, (latents, _) in self.latents.items()}
        counts |= {name: len(images) for name, images in self.images.items()}
        return sum(counts.get(name, 1) for name in self.names)

    def choose_timesteps(self, pipe: DDIMPipeline, sampling: SamplingOptions) -> list[int]:
        """Return the timesteps of encoding and decoding.

        Args:
            pipe: the model.
            sampling: the options; without steps and spacing, the timesteps are those of the first file of latents.

        Returns:
            The timesteps, decreasing.

        Raises:
            ValueError: for an option out of range.
        """
        if self.are_seeds:
            num_steps = 50 if sampling.steps is None else sampling.steps
            chosen = replace(sampling, steps=num_steps).choose_timesteps(pipe)
            return pipe.scheduler.make_timesteps(num_steps) if chosen is None else list(chosen)
        if sampling == SamplingOptions(None) and self.latents:
            _, settings = next(iter(self.latents.values()))
            return settings.timesteps
        num_steps = 50 if sampling.steps is None else sampling.steps
        return pipe.latent_timesteps(num_steps, replace(sampling, steps=num_steps).choose_timesteps(pipe))

    def check(self, pipe: DDIMPipeline, timesteps: list[int], is_grid: bool, force: bool) -> None:
        """Check that the points fit the model, the timesteps and each other.

        Args:
            pipe: the model.
            timesteps: of encoding and decoding.
            is_grid: whether the points are the corners of a grid.
            force: accept latents of another model or other timesteps.

        Raises:
            ValueError: if they do not.
        """
        from ddim.io.latent_files import check_latent_settings

        for name, (latents, settings) in self.latents.items():
            check_latent_settings(name, settings, pipe, timesteps, force)
            if latents.shape[1:] != pipe.sample_shape:
                shape = tuple(latents.shape[1:])
                raise ValueError(f"{name} must hold latents of shape {pipe.sample_shape}, got {shape}")
        if is_grid and self.count != 4:
            raise ValueError(f"a grid requires four points, its corners, got {self.count}")
        if self.count < 2:
            raise ValueError(f"an interpolation requires at least two points, got {self.count}")

    def condition(self, pipe: DDIMPipeline, options: ConditionOptions) -> Condition:
        """Return the classes and the guidance of all points, as arguments of the library.

        Args:
            pipe: the model.
            options: as they were given; where none is, latents keep the condition of their encoding.

        Returns:
            Labels are one for all points, or one per point.

        Raises:
            ValueError: for options that the model does not take, or latents of different guidance.
        """
        recorded: list[tuple[Mapping[str, Any], int]] = []
        for name in self.names:
            if name in self.latents:
                latents, settings = self.latents[name]
                recorded.append((settings.condition or {}, len(latents)))
            else:
                recorded.append(({}, len(self.images.get(name, [name]))))
        if options != NO_CONDITIONS or not any(condition for condition, _ in recorded):
            return options.condition(pipe, self.count)
        condition = join_conditions(recorded)
        pipe.conditions(self.count, **condition)
        return condition

    def encode(
        self, pipe: DDIMPipeline, timesteps: list[int], resize: bool, batch_size: int, condition: Condition
    ) -> list[Tensor]:
        """Return the latents of all points.

        Args:
            pipe: encodes the images.
            timesteps: of encoding.
            resize: fit images of other sizes and modes; otherwise they are refused.
            batch_size: images per network call.
            condition: of all points.

        Returns:
            A latent (C, H, W) per seed and image, and those of each file, in the order of the points.

        Raises:
            ValueError: for an image that the model does not take.
        """
        from ddim.diffusion.noise import noise_from_seeds
        from ddim.io.class_labels import take_labels

        result: list[Tensor | None] = []
        # An image that is several points may have a class in each.
        images: list[Image.Image | np.ndarray] = []
        rows: list[int] = []
        for name in self.names:
            if name in self.images:
                rows += range(len(result), len(result) + len(self.images[name]))
                images += self.images[name]
                result += [None] * len(self.images[name])
            elif name in self.latents:
                result += self.latents[name][0].to(pipe.device)
            else:
                result += noise_from_seeds((1, *pipe.sample_shape), [self.seeds[name]], pipe.device)()
        if images:
            of_images: Any = take_labels(condition, rows, self.count)
            encoded = pipe.encode(images, timesteps=timesteps, resize=resize, batch_size=batch_size, **of_images)
            for row, latent in zip(rows, encoded.latents, strict=True):
                result[row] = latent
        return [latent for latent in result if latent is not None]
