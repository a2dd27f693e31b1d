"""The `data` section of a configuration, and the base class of all sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

Amount = Annotated[float, Field(ge=0, le=1)]
HueAmount = Annotated[float, Field(ge=0, le=0.5)]
Bounds = tuple[float, float]


class Section(BaseModel):
    """Base class of configuration sections: immutable, and unknown entries are refused.

    Example:
        >>> class Loader(Section):
        ...     workers: int = 2
        >>> Loader().workers
        2
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Which images are used, and how they are fitted and cached; see `ddim.data.dataset`.

    Attributes:
        source: a folder of images, of `.npy` arrays or of parquet files; a parquet, `.npz` or `.npy` file; the id of a
            dataset on the hub; or `digits`.
        split: split of a dataset on the hub.
        column: name of the column of images in a dataset; defaults to the first column of images.
        dtype: `auto` keeps the type of the images' values (8 bits, 16 bits, floats), for which all images must have the
            same; `uint8` scales PNG, TIFF and other image files to 8 bits, of whatever depth each is.
        value_range: the values that -1 and 1 stand for in the model, of 16-bit and float images: `[low, high]`, or such
            a pair for each channel; values beyond are clipped. Defaults to the least and the greatest of each channel.
        crop: how images get the aspect ratio of the model: `center` cuts the largest centered window, `none` squeezes,
            `random` cuts a random window at each visit, from a centered one whose sides are an eighth larger than the
            model's.
        horizontal_flip: mirror each image left to right with probability 1/2.
        vertical_flip: mirror each image top to bottom with probability 1/2.
        rotate: rotate each image by a random number of quarter turns; requires a square `model.sample_size`.
        brightness: amount a by which brightness varies: by a factor from 1 - a to 1 + a. Like the next three entries it
            requires 8-bit images of three channels (`ddim.data.augment`).
        contrast: amount by which contrast varies.
        saturation: amount by which saturation varies.
        hue: amount by which the hue turns either way, as a fraction of the circle of hues, at most 1/2.
        cache: where decoded images are kept: `memory`, `disk` (a memory map), `none` (decode at each visit), or `auto`
            to choose by their size.
        on_device: keep the decoded images on the training device.
        labels: classes of the images: `none` trains without, `auto` uses the column `label`, class folders, or what
            else there is (`ddim.data.labels`); or the name of a column of a table, of an array of an `.npz` file, of an
            entry of `metadata.jsonl`.
        class_names: the classes, in this order, instead of those that have images; requires `labels`. A label is the
            name of one of them, or its number.
        balanced: visit every class equally often, in random order, instead of every image; requires `labels`.
        holdout: number of images, drawn by the seed, that are not trained on; the averaged weights are evaluated on
            them.
        max_unreadable: number of images that may fail to decode; one more stops the run.

    Example:
        >>> DataConfig(source="digits").crop
        'center'
    """

    source: str = Field(min_length=1)
    split: str = "train"
    column: str | None = None
    dtype: Literal["auto", "uint8"] = "auto"
    value_range: Bounds | tuple[Bounds, ...] | None = None
    crop: Literal["center", "random", "none"] = "center"
    horizontal_flip: bool = False
    vertical_flip: bool = False
    rotate: bool = False
    brightness: Amount = 0.0
    contrast: Amount = 0.0
    saturation: Amount = 0.0
    hue: HueAmount = 0.0
    cache: Literal["auto", "memory", "disk", "none"] = "auto"
    on_device: bool = False
    labels: str = Field(default="none", min_length=1)
    class_names: tuple[str, ...] | None = None
    balanced: bool = False
    holdout: NonNegativeInt = 0
    max_unreadable: NonNegativeInt = 10
