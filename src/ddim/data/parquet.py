"""Sources that are tables: parquet files, and datasets on the hub, through `datasets`.

A table is read, never run. A path in a table is followed only into this machine's cache of downloads.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow as pa
from PIL import Image

from ddim.data.base import Decoded, Source, first_line
from ddim.data.thrift import read_footer, read_page_size
from ddim.io.images import decode_image
from ddim.io.npz import MAX_COMPRESSION_RATIO, SMALL_ARRAY_BYTES
from ddim.validation import nearest, shorten

BYTE_ARRAY_TYPES = (6, 7)
"""Numbers of the types of byte arrays, of any length and of a fixed length, in parquet's definition."""


def read_parquet(files: list[str], name: str, column: str | None, identity: str) -> Source:
    """Open parquet files as one source.

    Args:
        files: paths of the files, in order.
        name: how messages refer to them.
        column: name of the column of encoded images; defaults to the first column of images.
        identity: a string that changes whenever the files do.

    Returns:
        The source, with nothing decoded yet.

    Raises:
        ValueError: if the files are damaged, have no rows or no such column.
    """
    _silence_datasets()
    try:
        for file in files:
            check_size(Path(file))
        rows = datasets.Dataset.from_parquet(files)
    except Exception as error:  # every reader underneath has its own error types
        cause = error.__cause__ or error
        reason = "its names are not UTF-8 text" if isinstance(cause, UnicodeDecodeError) else first_line(cause)
        raise ValueError(f"{name} cannot be read as parquet: {reason}") from None
    return _from_rows(rows, name, column, identity)


def read_hub_dataset(name: str, split: str, column: str | None) -> Source:
    """Open a dataset on the hub, downloading what the cache lacks.

    Args:
        name: id of the dataset, `owner/name`.
        split: name of the split.
        column: name of the column of encoded images; defaults to the first column of images.

    Returns:
        The source, with nothing decoded yet.

    Raises:
        FileNotFoundError: if no such dataset exists.
        ValueError: if it has no such split or column.
        RuntimeError: if the hub cannot be reached or refuses.
    """
    _silence_datasets()
    try:
        rows = datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"{name} is neither a local path nor a dataset on the hub: {first_line(error)}"
        ) from None
    except ValueError as error:
        raise ValueError(f"the dataset {name} cannot be used: {first_line(error)}") from None
    except Exception as error:  # the network, the hub, the disk
        raise RuntimeError(f"the dataset {name} cannot be loaded: {first_line(error)}") from None
    return _from_rows(rows, f"{name} ({split})", column, str(rows._fingerprint))


def check_size(path: Path) -> None:
    """Check, in bounded memory, that a parquet file does not hold far more than its compressed bytes can.

    Its metadata say how large the encoded columns are. A column with a dictionary, where many rows may be one entry,
    can be larger: by how much is bounded by the size of the dictionary, or else counted, few rows at a time.

    Args:
        path: the file.

    Raises:
        ValueError: if it does.
    """
    from pyarrow.parquet import ParquetFile

    compressed = path.stat().st_size
    limit = max(SMALL_ARRAY_BYTES, MAX_COMPRESSION_RATIO * compressed)

    def check(size: int) -> None:
        if size > limit:
            raise ValueError(f"it claims {size:,} bytes in {compressed:,} compressed ones")

    footer = read_footer(path)
    check(footer.total_byte_size)
    bounds: dict[str, int] = {}  # of columns of byte arrays that have dictionaries
    largest_page = 0
    with path.open("rb") as content:
        for chunk in footer.chunks:
            if chunk.dictionary_page_offset is not None and chunk.physical_type in BYTE_ARRAY_TYPES:
                page = read_page_size(content, chunk.dictionary_page_offset)
                bounds[chunk.path] = bounds.get(chunk.path, 0) + chunk.num_values * page
                largest_page = max(largest_page, page)
    if sum(bounds.values()) <= limit:
        return
    size, rows = 0, max(1, SMALL_ARRAY_BYTES // largest_page)
    with ParquetFile(path) as file:
        for batch in file.iter_batches(rows, columns=sorted(bounds)):
            size += sum(map(_plain_bytes, batch.columns))
            check(size)


def _plain_bytes(array: pa.Array) -> int:
    """Return the size of an array without dictionaries."""
    if pa.types.is_dictionary(array.type):
        return int(array.dictionary_decode().nbytes)
    return sum(map(_plain_bytes, array.flatten())) if pa.types.is_struct(array.type) else int(array.nbytes)


def _silence_datasets() -> None:
    datasets.disable_progress_bars()
    # Whatever it logs as an error it raises as well.
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)


def _from_rows(rows: datasets.Dataset, name: str, column: str | None, identity: str) -> Source:
    image_columns = [key for key, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    chosen = column or next(iter(image_columns), "image")
    if not len(rows):
        raise ValueError(f"{name} has no rows")
    if chosen not in rows.column_names:
        missing = f"column {shorten(column)}" if column else "column of images"
        near = nearest(column, rows.column_names)
        raise ValueError(f"{name} has no {missing}; its columns are {', '.join(rows.column_names)}{near}")
    try:
        encoded = rows.select_columns(chosen).cast_column(chosen, datasets.Image(decode=False))
        encoded[0]
    except Exception:  # every reader underneath has its own error types
        kind = getattr(rows.features[chosen], "dtype", "nested values")
        raise ValueError(f"the column {chosen} of {name} must hold encoded images, got {kind}") from None

    def fetch(indices: Sequence[int]) -> list[Callable[[], Decoded]]:
        content = encoded[list(indices)][chosen]
        return [partial(_decode_row, row, f"image {i} of {name}") for row, i in zip(content, indices, strict=True)]

    others = [
        key for key, feature in rows.features.items() if key != chosen and not isinstance(feature, datasets.Image)
    ]
    labels = f"the {'column' if len(others) == 1 else 'columns'} {', '.join(others)}" if others else None
    return Source(
        name,
        len(encoded),
        fetch,
        f"{identity} {chosen}",
        partial(_read_column, rows),
        labels=labels,
        label_columns=lambda: tuple(others),
        class_names=lambda column: tuple(getattr(rows.features.get(column), "names", None) or ()),
    )


def _read_column(rows: datasets.Dataset, name: str) -> list[str] | None:
    """Return a column as text: classes by their names, what is empty or missing as "none"."""
    if name not in rows.column_names:
        return None
    feature, values = rows.features[name], rows.select_columns(name)[name]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    return ["none" if value in (None, "") else names[value] if names else str(value) for value in values]


def _decode_row(row: dict[str, Any] | None, name: str) -> Image.Image:
    content, path = (row.get("bytes"), row.get("path")) if row else (None, None)
    if content:
        return decode_image(io.BytesIO(content), name)
    if path and _is_download(Path(path)):
        return decode_image(path, name)
    raise ValueError(f"{name} cannot be read: it is missing")


def _is_download(path: Path) -> bool:
    """Return whether a file is in a cache of the hub's clients; a path in a table could lead anywhere."""
    caches = (huggingface_hub.constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
    # The hub's cache links readable names to content, so the name itself is compared, not what it resolves to.
    return any(path.is_relative_to(cache) for cache in caches) and ".." not in path.parts
