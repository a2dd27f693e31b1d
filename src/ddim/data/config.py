"""The `data` section of a configuration, and the base class of all sections."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt


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
        source: a folder of images or of parquet files, a parquet or `.npz` file, the id of a dataset on the hub, or
            `digits`.
        split: split of a dataset on the hub.
        column: name of the column of images in a dataset; defaults to the first column of images.
        crop: how images become square: `center` cuts the largest centered square, `none` squeezes, `random` cuts a
            random window at each visit, from a centered square that is an eighth larger than the model's size.
        horizontal_flip: mirror each image with probability 1/2.
        cache: where decoded images are kept: `memory`, `disk` (a memory map), `none` (decode at each visit), or `auto`
            to choose by their size.
        on_device: keep the decoded images on the training device.
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
    crop: Literal["center", "random", "none"] = "center"
    horizontal_flip: bool = False
    cache: Literal["auto", "memory", "disk", "none"] = "auto"
    on_device: bool = False
    holdout: NonNegativeInt = 0
    max_unreadable: NonNegativeInt = 10
