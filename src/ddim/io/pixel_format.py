"""What the samples of a model mean outside of it: the type of its images' values, and the range of each channel.

Inside the model values are in [-1, 1]. Outside they are what the data holds. The map is linear, per channel c:

    x = 2 (v - low_c) / (high_c - low_c) - 1
    v = low_c + (x + 1) / 2 (high_c - low_c)

For 8-bit images low is 0, high is 255, and nothing is recorded. A model of other images (16 bits, floats) has its
format in its configuration, as the setting `pixel_format` of `UNet2DModel`, which other libraries pass over:

    {"dtype": "uint16", "low": [12, 0], "high": [4095, 900]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddim.validation import choice, join_choices, real, shown

DTYPES = ("uint8", "uint16", "int16", "float32")
"""The types of values, as NumPy names them."""
LIMITS = {"uint8": (0, 255), "uint16": (0, 65535), "int16": (-32768, 32767)}
"""The smallest and the largest integer of a type."""
MIN_SPAN, MAX_SPAN = 1e-30, 1e38
"""Between these a range and its inverse are numbers in float32."""


class NonFiniteError(ValueError):
    """Images that hold NaN or infinity."""


@dataclass(frozen=True)
class PixelFormat:
    """The type and the ranges of the values of images.

    Args:
        dtype: one of `DTYPES`.
        low: the value that -1 stands for, of each channel, or one for all channels.
        high: the value that 1 stands for, as many.

    Raises:
        ValueError: for another type, other numbers of bounds, or a bound that is not above its lower one.
        TypeError: for a bound that is not a number.

    Example:
        >>> PixelFormat("uint16", (0, 100), (4095, 100))
        Traceback (most recent call last):
        ValueError: pixel_format.high must be above low in each channel, got 100 and 100
    """

    dtype: str = "uint8"
    low: tuple[float, ...] = (0.0,)
    high: tuple[float, ...] = (255.0,)

    def __post_init__(self) -> None:
        choice("pixel_format.dtype", self.dtype, DTYPES)
        if len(self.low) != len(self.high) or not self.low:
            raise ValueError(
                f"pixel_format.low and .high must have one bound per channel, got {len(self.low)} and {len(self.high)}"
            )
        if self.dtype == "uint8" and (set(self.low), set(self.high)) != ({0}, {255}):
            raise ValueError("pixel_format of uint8 must be from 0 to 255 in all channels")
        for low, high in zip(self.low, self.high, strict=True):
            if real("pixel_format.low", low) >= real("pixel_format.high", high):
                raise ValueError(f"pixel_format.high must be above low in each channel, got {low:g} and {high:g}")
            if not MIN_SPAN <= high - low <= MAX_SPAN:
                raise ValueError(
                    f"pixel_format must span {MIN_SPAN:g} to {MAX_SPAN:g} in each channel, got {high - low:g}"
                )
            smallest, largest = LIMITS.get(self.dtype, (-np.inf, np.inf))
            if low < smallest or high > largest:
                raise ValueError(
                    f"pixel_format of {self.dtype} must be within {smallest} and {largest}, got {low:g} and {high:g}"
                )

    @classmethod
    def parse(cls, record: Any, channels: int | None = None) -> PixelFormat:
        """Read a format from its record in a configuration.

        Args:
            record: a mapping with `dtype`, `low` and `high`; `None` for 8-bit images.
            channels: of the model, where they are known.

        Raises:
            ValueError: if it is not a format, or of another number of channels.
            TypeError: if a bound is not a number.

        Example:
            >>> PixelFormat.parse({"dtype": "float32", "low": [-1.5], "high": [3]}, 1).high
            (3.0,)
            >>> PixelFormat.parse(None).is_eight_bit
            True
        """
        if record is None:
            return EIGHT_BIT
        entries = ("dtype", "low", "high")
        if not isinstance(record, Mapping) or set(record) != set(entries):
            raise ValueError(f"pixel_format must have the entries {', '.join(entries)}, got {shown(record)}")
        bounds = [record["low"], record["high"]]
        if not all(isinstance(bound, list | tuple) for bound in bounds):
            raise ValueError(f"pixel_format.low and .high must be lists of numbers, got {shown(bounds)}")
        low, high = (tuple(real(f"pixel_format.{name}", value) for value in record[name]) for name in ("low", "high"))
        if channels is not None and len(low) not in (1, channels):
            raise ValueError(f"pixel_format must have bounds of {channels} channels, got {len(low)}")
        return cls(record["dtype"], low, high)

    def record(self) -> dict[str, Any] | None:
        """Return the format as a configuration holds it; `None` for 8-bit images, which need no record.

        Example:
            >>> PixelFormat("float32", (0.0,), (1.0,)).record()
            {'dtype': 'float32', 'low': [0.0], 'high': [1.0]}
        """
        return None if self.is_eight_bit else {"dtype": self.dtype, "low": list(self.low), "high": list(self.high)}

    @property
    def is_eight_bit(self) -> bool:
        """Whether values are those of usual images: 8 bits, from 0 to 255 in all channels."""
        return self.dtype == "uint8"

    def fits_pil(self, channels: int) -> bool:
        """Return whether PIL has a mode for such images.

        Args:
            channels: of each image.

        Example:
            >>> EIGHT_BIT.fits_pil(4), PixelFormat("uint16", (0,), (9,)).fits_pil(1), EIGHT_BIT.fits_pil(5)
            (True, True, False)
        """
        return channels <= 4 if self.dtype == "uint8" else channels == 1 and self.dtype in ("uint16", "float32")

    def describe(self, channels: int) -> str:
        """Return the format as messages name it.

        Args:
            channels: of each image.

        Example:
            >>> PixelFormat("uint16", (0,), (9,)).describe(5)
            '5 channels of uint16'
        """
        return f"{channels} channel{'s' * (channels != 1)} of {self.dtype}"

    def to_samples(self, values: Tensor) -> Tensor:
        """Map values to samples.

        Args:
            values: (N, C, H, W), in the data's own units, of any type.

        Returns:
            float32 (N, C, H, W), or float64 for float64 values; in [-1, 1] for values within the range.

        Example:
            >>> values = torch.tensor([100, 200, 400]).reshape(3, 1, 1, 1)
            >>> PixelFormat("uint16", (100,), (300,)).to_samples(values).ravel()
            tensor([-1.,  0.,  2.])
        """
        values = values if values.dtype == torch.float64 else values.float()
        if self.is_eight_bit:
            return values / 127.5 - 1
        low, span = self._bounds(values)
        return (values - low) * (2 / span) - 1

    def to_unit(self, values: Tensor) -> Tensor:
        """Map values to [0, 1], clipped; see `to_samples`.

        Args:
            values: (N, C, H, W), in the data's own units.

        Returns:
            float32 (N, C, H, W), or float64 for float64 values.
        """
        return (self.to_samples(values) / 2 + 0.5).clamp(0, 1)

    def scale(self, unit: Tensor) -> Tensor:
        """Map [0, 1] to the data's own units, without rounding.

        Args:
            unit: floating (N, C, H, W).

        Returns:
            Of the same shape and type.

        Example:
            >>> PixelFormat("uint16", (100,), (300,)).scale(torch.full((1, 1, 1, 1), 0.25)).item()
            150.0
        """
        low, span = self._bounds(unit)
        return low + unit * span

    def to_array(self, unit: Tensor) -> np.ndarray:
        """Map [0, 1] to an array of the data's own type and units.

        Args:
            unit: floating (N, C, H, W), on any device.

        Returns:
            (N, H, W, C) of `dtype`; integers are rounded.

        Raises:
            NonFiniteError: if a value is NaN or infinite.

        Example:
            >>> PixelFormat("uint16", (100,), (300,)).to_array(torch.full((1, 1, 1, 1), 0.25)).tolist()
            [[[[150]]]]
        """
        if not bool(torch.isfinite(unit).all()):
            raise NonFiniteError("images must be finite, got NaN or infinity: the network's predictions overflow")
        values = self.scale(unit.cpu().double()).permute(0, 2, 3, 1).contiguous().numpy()
        return (values if self.dtype == "float32" else values.round()).astype(self.dtype)

    def _bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return low and high - low, each (1, C, 1, 1)."""
        low, high = (torch.tensor(bound, dtype=torch.float64).reshape(1, -1, 1, 1) for bound in (self.low, self.high))
        return low.to(like), (high - low).to(like)


EIGHT_BIT = PixelFormat()
"""The format of models without a record."""


def format_of(config: Any) -> PixelFormat:
    """Return the format of a network's samples.

    Args:
        config: of the network, of any library.

    Example:
        >>> from ddim import DDIMPipeline
        >>> format_of(DDIMPipeline.from_pretrained("mnist").unet.config).is_eight_bit
        True
    """
    own = config.get("_ddim") if isinstance(config, Mapping) else None
    record = own.get("pixel_format") if isinstance(own, Mapping) else None
    return PixelFormat.parse(record)


def cast_exactly(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Convert an array to a format's type, if it holds values of that type in another one.

    Floats of 16 and 64 bits are floats, which become float32. 32-bit integers may be of any integer type whose limits
    they keep, because some files have no 16 bits with a sign.

    Args:
        values: any shape.
        dtype: one of `DTYPES`.
        name: of the image, in messages.

    Returns:
        An array of `dtype`.

    Raises:
        ValueError: for values of another type, or that are not finite.

    Example:
        >>> cast_exactly(np.zeros(2, np.uint8), "uint16", "x.png")
        Traceback (most recent call last):
        ValueError: x.png must hold uint16 values, got uint8
    """
    if dtype == "float32" and np.issubdtype(values.dtype, np.floating):
        result = values.astype(np.float32)
        if not np.isfinite(result).all():
            raise ValueError(f"{name} must hold finite values, got NaN or infinity")
        return result
    low, high = LIMITS.get(dtype, (0, -1))
    fits = values.dtype == np.int32 and (not values.size or (values.min() >= low and values.max() <= high))
    if values.dtype.name != dtype and not fits:
        raise ValueError(f"{name} must hold {dtype} values, got {values.dtype}")
    return values.astype(dtype)


def stored_dtype(dtype: np.dtype[Any], name: str) -> str:
    """Return the type in which the values of an array are kept.

    Args:
        dtype: of the array.
        name: of the images, in messages.

    Returns:
        One of `DTYPES`; floats of all lengths are kept as float32.

    Raises:
        ValueError: for another type.

    Example:
        >>> stored_dtype(np.dtype(np.float64), "x.npy"), stored_dtype(np.dtype(">u2"), "x.npy")
        ('float32', 'uint16')
    """
    if np.issubdtype(dtype, np.floating):
        return "float32"
    if dtype.name not in DTYPES:
        raise ValueError(f"{name} must hold {join_choices(DTYPES)} values, got {dtype}")
    return dtype.name


def measured_format(dtype: str, low: Sequence[float], high: Sequence[float]) -> PixelFormat:
    """Return the format of images whose values have been measured.

    Args:
        dtype: one of `DTYPES`.
        low: the smallest value of each channel.
        high: the largest value of each channel; where it is the smallest as well, a range of 1 (or a millionth of it)
            is assumed.

    Example:
        >>> measured_format("uint16", [3, 7], [900, 7]).high
        (900.0, 8.0)
    """
    if dtype == "uint8":
        return EIGHT_BIT
    limits = LIMITS.get(dtype, (-np.inf, np.inf))
    bounds = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
    # Of large floats 1 is less than the last digit.
    widths = [max(1.0, abs(a) / 2**20) for a, _ in bounds]
    bounds = [
        (a, b) if b - a >= MIN_SPAN else (a, a + width) if a < limits[1] else (a - width, a)
        for (a, b), width in zip(bounds, widths, strict=True)
    ]
    return PixelFormat(dtype, tuple(a for a, _ in bounds), tuple(b for _, b in bounds))
