"""Sources that are tables: parquet files, and data sets on the hub, through `datasets`.

A table is read, never run. A path that stands in one is followed only into the cache of this machine's own downloads.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
from PIL import Image

from ddim.data.sources import Source, first_line
from ddim.io.images import decode_image


def read_parquet(files: list[str], name: str, column: str | None, identity: str) -> Source:
    """A source of parquet files; ValueError if they are damaged or have no such column.

    Args:
        files: their paths.
        name: how messages call them.
        column: of encoded images; found by itself unless given.
        identity: changes when they do.
    """
    _be_quiet()
    try:
        rows = datasets.Dataset.from_parquet(files)
    except Exception as error:  # every reader underneath has errors of its own
        raise ValueError(f"{name} cannot be read as parquet: {first_line(error.__cause__ or error)}") from None
    return _from_rows(rows, name, column, identity)


def download(name: str, split: str, column: str | None) -> Source:
    """A source of a data set on the hub.

    Raises:
        FileNotFoundError: if there is no such data set.
        ValueError: if it has no such split or column.
        RuntimeError: if the hub cannot be reached or refuses.
    """
    _be_quiet()
    try:
        rows = datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"there is no file {name} here and no such data set on the hub: {first_line(error)}"
        ) from None
    except ValueError as error:
        raise ValueError(f"the data set {name} cannot be used: {first_line(error)}") from None
    except Exception as error:  # the network, the hub, the disk
        raise RuntimeError(f"the data set {name} cannot be loaded: {first_line(error)}") from None
    return _from_rows(rows, f"{name} ({split})", column, str(rows._fingerprint))


def _be_quiet() -> None:
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # errors come as exceptions as well


def _from_rows(rows: datasets.Dataset, name: str, column: str | None, identity: str) -> Source:
    columns = [key for key, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    chosen = column or next(iter(columns), "image")
    if not len(rows):
        raise ValueError(f"{name} has no rows")
    if chosen not in rows.column_names:
        missing = f"column {column}" if column else "column of images"
        raise ValueError(f"{name} has no {missing}; its columns are {', '.join(rows.column_names)}")
    try:
        encoded = rows.select_columns(chosen).cast_column(chosen, datasets.Image(decode=False))
        encoded[0]
    except Exception as error:  # every reader underneath has errors of its own
        raise ValueError(f"the column {chosen} of {name} holds no images: {first_line(error)}") from None

    def fetch(indices: Sequence[int]) -> list[Callable[[], Image.Image]]:
        content = encoded[list(indices)][chosen]
        return [partial(_decode_row, row, f"image {i} of {name}") for row, i in zip(content, indices, strict=True)]

    return Source(name, len(encoded), fetch, f"{identity} {chosen}")


def _decode_row(row: dict[str, Any] | None, name: str) -> Image.Image:
    content, path = (row.get("bytes"), row.get("path")) if row else (None, None)
    if content:
        return decode_image(io.BytesIO(content), name)
    if path and _is_download(Path(path)):
        return decode_image(path, name)
    raise ValueError(f"{name} cannot be read: it is missing")


def _is_download(path: Path) -> bool:
    """Whether a file is in a cache of the hub's clients; a path in a table could lead anywhere."""
    caches = (huggingface_hub.constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
    # The hub's cache links from readable names to content, so that the name itself is what counts.
    return any(path.is_relative_to(cache) for cache in caches) and ".." not in path.parts
