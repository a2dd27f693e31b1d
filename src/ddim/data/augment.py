"""Augmentations: images changed at random at each visit, in ways that keep them images of the same set.

    crop             a random window, where images are stored larger than the model takes
    flips            mirrored left to right, or top to bottom, with probability 1/2 each
    quarter turns    0, 90, 180 or 270 degrees with the same probability: square images
    color            8-bit RGB, values v in [0, 1], in this order: brightness v b; contrast m + c (v - m), m the mean
                     luma of the image; saturation l + s (v - l), l the luma of the pixel; and hue, turned in HSV. The
                     factors b, c, s are uniform in [1 - a, 1 + a] for an amount a, the turn in [-a, a] of a circle.

The numbers of a step are drawn for the whole batch from (seed, step), so that neither the number of processes nor what
has been before changes them. Each kind draws from its own generator (crop and horizontal flip share one): switching one
on leaves the others as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ddim.data.config import DataConfig
from ddim.data.seeding import generator_for

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luma (ITU-R BT.601)."""


@dataclass(frozen=True)
class Augmentation:
    """Which augmentations are on; see `ddim.data.config.DataConfig`.

    Example:
        >>> Augmentation(horizontal_flip=True).changes_color
        False
    """

    horizontal_flip: bool = False
    vertical_flip: bool = False
    rotate: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    @classmethod
    def of(cls, config: DataConfig) -> Self:
        """Return the augmentations of a configuration.

        Args:
            config: the `data` section.

        Example:
            >>> Augmentation.of(DataConfig(source="digits", rotate=True)).rotate
            True
        """
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})

    @property
    def changes_color(self) -> bool:
        """Whether colors are changed, which requires 8-bit RGB images."""
        return any((self.brightness, self.contrast, self.saturation, self.hue))

    def apply(
        self, images: Tensor, seed: int, step: int, size: tuple[int, int], batch_size: int, local: slice
    ) -> Tensor:
        """Augment the images of a step.

        Args:
            images: this process's part of the batch, (n, C, H, W), uint8 or float32.
            seed: of the run.
            step: number of the step.
            size: height and width of the result, at most those of the images.
            batch_size: images of the step, over all processes.
            local: this process's part of the batch.

        Returns:
            (n, C, *size) of the same type; float32 where colors are changed.
        """

        def draw(purpose: str) -> torch.Generator:
            return generator_for(seed, purpose, step)

        generator, device = draw("augment"), images.device
        margins = images.shape[2] - size[0], images.shape[3] - size[1]
        if any(margins):
            corners = _draw_corners(margins, batch_size, generator)[local]
            images = crop_windows(images, corners.to(device), size)
        if self.horizontal_flip:
            images = _choose(_coins(batch_size, generator)[local].to(device), images.flip(3), images)
        if self.vertical_flip:
            chosen = _coins(batch_size, draw("augment vertical flip"))[local]
            images = _choose(chosen.to(device), images.flip(2), images)
        if self.rotate:
            turns = torch.randint(4, (batch_size,), generator=draw("augment rotation"))[local]
            images = rotate_quarters(images, turns.to(device))
        if self.changes_color:
            numbers = torch.rand(batch_size, 4, generator=draw("augment color"))[local]
            images = self._change_colors(images, numbers.to(device))
        return images

    def _change_colors(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Change the colors of images by numbers in [0, 1), (n, 4)."""
        # The amounts are at most 1, so that no lower end is below 0.
        brightness, contrast, saturation, turns = (
            (2 * numbers[:, index] - 1) * amount
            for index, amount in enumerate((self.brightness, self.contrast, self.saturation, self.hue))
        )
        changed = change_colors(images.float() / 255, 1 + brightness, 1 + contrast, 1 + saturation)
        return (turn_hue(changed, turns) if self.hue else changed) * 255


def crop_windows(images: Tensor, corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut a window out of each image.

    Args:
        images: (n, C, H, W).
        corners: top and left of each window, int64 (n, 2), on the images' device.
        size: height and width of the windows, in pixels.

    Returns:
        (n, C, *size).

    Example:
        >>> crop_windows(torch.arange(9).reshape(1, 1, 3, 3), torch.tensor([[1, 0]]), (2, 2))
        tensor([[[[3, 4],
                  [6, 7]]]])
    """
    n, C = images.shape[:2]
    spans = [torch.arange(side, device=images.device) for side in size]
    rows = (corners[:, 0, None] + spans[0])[:, None, :, None]
    columns = (corners[:, 1, None] + spans[1])[:, None, None, :]
    batch = torch.arange(n, device=images.device)[:, None, None, None]
    channels = torch.arange(C, device=images.device)[None, :, None, None]
    return images[batch, channels, rows, columns]


def rotate_quarters(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate square images by quarter turns, counterclockwise.

    Args:
        images: (n, C, H, H).
        turns: number of quarter turns of each image, int64 (n,), from 0 to 3.

    Returns:
        (n, C, H, H).

    Example:
        >>> rotate_quarters(torch.tensor([[[[1, 2], [3, 4]]]]), torch.tensor([1]))
        tensor([[[[2, 4],
                  [1, 3]]]])
    """
    result = images
    for count in (1, 2, 3):
        result = _choose(turns == count, torch.rot90(images, count, (2, 3)), result)
    return result


def change_colors(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Change the brightness, the contrast and the saturation of images, in this order.

    Args:
        images: floating (n, 3, H, W), RGB in [0, 1].
        brightness: factors (n,), at least 0.
        contrast: factors (n,), at least 0.
        saturation: factors (n,), at least 0.

    Returns:
        (n, 3, H, W) in [0, 1].

    Example:
        >>> red, one = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1), torch.ones(1)
        >>> change_colors(red, one / 2, one, one).flatten()
        tensor([0.5000, 0.0000, 0.0000])
    """
    b, c, s = (factor[:, None, None, None] for factor in (brightness, contrast, saturation))
    images = (images * b).clamp(0, 1)
    mean = _luma(images).mean((2, 3), keepdim=True)
    images = (mean + c * (images - mean)).clamp(0, 1)
    luma = _luma(images)
    return (luma + s * (images - luma)).clamp(0, 1)


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of images, with their value and saturation in HSV unchanged.

    Args:
        images: floating (n, 3, H, W), RGB in [0, 1].
        turns: (n,), as fractions of a circle.

    Returns:
        (n, 3, H, W) in [0, 1].

    Example:
        >>> turn_hue(torch.tensor([1.0, 1.0, 0.0]).reshape(1, 3, 1, 1), torch.tensor([-1 / 6])).flatten().round()
        tensor([1., 0., 0.])
    """
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    span = value - low
    divisor = torch.where(span > 0, span, 1)
    # The sector of the largest channel, and the place in it.
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = hue + 6 * turns[:, None, None]
    # The inverse in one formula: each channel falls from the value by the span, with its distance from its own hue.
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device)[None, :, None, None]
    place = (offsets + hue[:, None]) % 6
    fall = torch.minimum(place, 4 - place).clamp(0, 1)
    return value[:, None] - span[:, None] * fall


def _luma(images: Tensor) -> Tensor:
    return (images * torch.tensor(LUMA, device=images.device)[None, :, None, None]).sum(1, keepdim=True)


def _choose(chosen: Tensor, changed: Tensor, images: Tensor) -> Tensor:
    return torch.where(chosen[:, None, None, None], changed, images)


def _coins(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) < 0.5


def _draw_corners(margins: tuple[int, int], count: int, generator: torch.Generator) -> Tensor:
    """Draw the top and left of windows, uniform over all that fit, int64 (count, 2)."""
    if margins[0] == margins[1]:
        return torch.randint(margins[0] + 1, (count, 2), generator=generator)
    return torch.cat([torch.randint(margin + 1, (count, 1), generator=generator) for margin in margins], 1)
