"""What was measured of an image on the page: an image of which pixels are missing (`Hole`), or a small one (`Reduced`).

A measurement consists of pixels as a file stores them: the command that is given the file samples the same images.

    Hole.of(pipe, picture, missing)
    Reduced.of(pipe, Source.of(pipe, image), factor=4, kernel="box")
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from ddim.app import inputs
from ddim.app.pictures import Picture, fit, pictures_of
from ddim.io.images import fit_image, to_output, to_samples
from ddim.outputs import RestoreOutput
from ddim.pipeline import DDIMPipeline
from ddim.restoration import KERNELS, read_masks
from ddim.validation import choice


def factors(base: DDIMPipeline) -> list[int]:
    """Return by how much images may be smaller than those of a model.

    Args:
        base: the model.

    Example:
        >>> factors(DDIMPipeline.from_pretrained("mnist"))
        [2, 4, 7, 14, 28]
    """
    _, height, width = base.sample_shape
    common = math.gcd(height, width)
    return [factor for factor in range(2, common + 1) if common % factor == 0]


def check_factor(value: Any, base: DDIMPipeline) -> int:
    """Check a factor of super-resolution.

    Args:
        value: what a client sent.
        base: the model.

    Returns:
        The factor.

    Raises:
        ValueError: if it is not one of `factors`.

    Example:
        >>> check_factor(5, DDIMPipeline.from_pretrained("mnist"))
        Traceback (most recent call last):
        ValueError: factor must be one of 2, 4, 7, 14, or 28, got 5
    """
    allowed, (_, height, width) = factors(base), base.sample_shape
    number = inputs.integer("factor", value, 1, max(height, width))
    if not allowed:
        raise ValueError(f"the model's {width} x {height} pixels have no common factor, got {number}")
    return choice("factor", number, allowed)


@dataclass(frozen=True, eq=False)  # as `Picture`
class Source:
    """An image that a measurement is made of.

    Attributes:
        picture: the image at the model's size.
        small: the image itself, where its size is the model's divided by one of `factors`; else `None`.
    """

    picture: Picture
    small: Picture | None = None

    @classmethod
    def of(cls, base: DDIMPipeline, image: Image.Image) -> Source:
        """Return the source of an image.

        Args:
            base: the model.
            image: as for `ddim.app.pictures.fit`.

        Raises:
            ValueError: if the model takes no such image.
        """
        _, height, width = base.sample_shape
        small = [factor for factor in factors(base) if image.size == (width // factor, height // factor)]
        return cls(fit(base, image), fit(base, image, small[0]) if small else None)


class Measurement(Protocol):
    """What was measured of an image."""

    @property
    def picture(self) -> Picture:
        """The measurement as an image, which the command reads from a file."""

    def restore(self, pipe: DDIMPipeline, **arguments: Any) -> RestoreOutput:
        """Sample images of it, with arguments of `ddim.restoration.Restoration.restore`."""

    def as_command(self, file: str) -> str:
        """Return the beginning of the command that restores it from a file."""


@dataclass(frozen=True, eq=False)
class Hole:
    """An image of which pixels are missing.

    Attributes:
        picture: the image; missing pixels have the mean of the others.
        missing: boolean (1, H, W).
    """

    picture: Picture
    missing: Tensor

    @classmethod
    def of(cls, base: DDIMPipeline, picture: Picture, missing: Tensor) -> Hole:
        """Take pixels out of an image.

        Args:
            base: the model.
            picture: of the model's size.
            missing: boolean (1, H, W), as `read_mask` returns it.
        """
        x = to_samples([picture.values], *base.sample_shape, pixel_format=base.pixel_format)
        filled = x.masked_fill(missing[:, None], float(x.movedim(1, -1)[~missing].double().mean()))
        return cls(pictures_of(base, to_output(filled, "np", base.pixel_format))[0], missing)

    @property
    def mask(self) -> Image.Image:
        """The mask as an image: white is missing."""
        return Image.fromarray(self.missing[0].numpy()).convert("L")

    def restore(self, pipe: DDIMPipeline, **arguments: Any) -> RestoreOutput:
        """Fill in the missing pixels.

        Args:
            pipe: the model.
            arguments: of `ddim.restoration.Restoration.restore`.
        """
        return pipe.inpaint([self.picture.values], self.missing, **arguments)

    def as_command(self, file: str) -> str:
        """Return the beginning of the command that does the same.

        Args:
            file: the name of the measurement.
        """
        return f"ddim inpaint {file} --mask mask.png"


@dataclass(frozen=True, eq=False)
class Reduced:
    """A small image.

    Attributes:
        picture: the image.
        factor: how many times smaller it is than the model's.
        kernel: how it was made small, one of `ddim.restoration.KERNELS`.
    """

    picture: Picture
    factor: int
    kernel: str

    @classmethod
    def of(cls, base: DDIMPipeline, source: Source, factor: Any, kernel: Any) -> Reduced:
        """Take an image of the size asked for as it is, or make one of that size.

        Args:
            base: the model.
            source: the image.
            factor: one of `factors`.
            kernel: one of `ddim.restoration.KERNELS`.

        Raises:
            ValueError: naming the first argument that is not allowed.
        """
        checked, shape = check_factor(factor, base), base.sample_shape
        operator = KERNELS[choice("kernel", kernel, tuple(KERNELS))](shape, checked)
        if source.small and source.small.shown.size == (shape[2] // checked, shape[1] // checked):
            return cls(source.small, checked, kernel)
        x = to_samples([source.picture.values], *shape, pixel_format=base.pixel_format)
        return cls(pictures_of(base, to_output(operator(x), "np", base.pixel_format))[0], checked, kernel)

    def restore(self, pipe: DDIMPipeline, **arguments: Any) -> RestoreOutput:
        """Sample images of the model's size.

        Args:
            pipe: the model.
            arguments: of `ddim.restoration.Restoration.restore`.
        """
        return pipe.super_resolve([self.picture.values], self.factor, self.kernel, **arguments)

    def as_command(self, file: str) -> str:
        """Return the beginning of the command that does the same.

        Args:
            file: the name of the measurement.
        """
        return f"ddim super-resolve {file} --factor {self.factor} --kernel {self.kernel}"


def read_mask(base: DDIMPipeline, image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Return what is missing of an image, which is fitted to the model as the image itself is.

    Args:
        base: the model.
        image: white where pixels are missing.
        size: (W, H) of the image itself.

    Returns:
        Boolean (1, H, W), of the model's size.

    Raises:
        ValueError: for another size, or a mask in which nothing or everything is missing.
    """
    if image.size != size:
        expected, given = (" x ".join(map(str, pair)) for pair in (size, image.size))
        raise ValueError(f"mask must have the {expected} pixels of the image, got {given}")
    _, height, width = base.sample_shape
    return read_masks([fit_image(image.convert("L"), height, width, 1)], 1, (height, width))
