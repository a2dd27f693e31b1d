"""What several commands do: load a model, read images, say what was written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from ddim.pipeline import DDIMPipeline


def load_pipeline(model: str, device: str, dtype: str = "float32", engine: str = "auto") -> DDIMPipeline:
    """A pipeline where and as the options want it."""
    from ddim.devices import choose_device, choose_dtype
    from ddim.pipeline import DDIMPipeline

    where = choose_device(device), choose_dtype(dtype)
    return DDIMPipeline.from_pretrained(model, engine=engine).to(*where)


def with_spacing(pipe: DDIMPipeline, spacing: str | None) -> DDIMPipeline:
    """The pipeline with this spacing for all numbers of steps, in place of the model's and of what was learned."""
    if spacing is not None:
        config = pipe.scheduler.config
        pipe.scheduler = pipe.scheduler.from_config(config, timestep_spacing=spacing, timesteps_by_steps=None)
    return pipe


def choose_timesteps(
    pipe: DDIMPipeline, steps: int, spacing: str | None, timesteps: Sequence[int] | None
) -> Sequence[int] | None:
    """The timesteps that the options name: those listed, or of this spacing; `None` for the model's own."""
    return timesteps if timesteps is not None or spacing is None else pipe.scheduler.make_timesteps(steps, spacing)


def read_images(paths: Sequence[str]) -> list[Image.Image]:
    """The images of files and folders, in order; errors name the file."""
    from ddim.io.image_files import find_images, read_image

    files = [file for path in paths for file in (find_images(path) if Path(path).is_dir() else [Path(path)])]
    return [read_image(file) for file in files]


def fit_images(pipe: DDIMPipeline, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Images as the model sees them, to be shown beside what it makes of them."""
    from ddim.io.images import fit_image

    channels, height, width = pipe.sample_shape
    return [fit_image(image, height, width, channels) for image in images]


def check_fps(fps: float) -> None:
    """ValueError for a rate that animations cannot have."""
    if not 0.1 <= fps <= 50:
        raise ValueError(f"--fps {fps} is out of range; it must lie from 0.1 to 50")


def finish(path: Path, replaced: int, summary: str) -> None:
    """The last lines of a command that writes: a summary on stderr, where the result is on stdout."""
    note = f"; {number(replaced, 'earlier file')} replaced" if replaced else ""
    print(f"{summary}{note}", file=sys.stderr)
    print(path)


def number(n: int, noun: str) -> str:
    """`1 picture`, `2 pictures`."""
    return f"{n} {noun}{'s' * (n != 1)}"


def parse_timesteps(text: str | None, option: str = "--timesteps") -> list[int] | None:
    """`900,600,300,0` as a list; ValueError for anything that is no whole number."""
    try:
        return None if text is None else [int(entry) for entry in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r} is no list of whole numbers such as 900,600,300,0") from None
