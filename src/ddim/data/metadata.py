"""`metadata.jsonl`, which says something about each image of a folder, as `imagefolder` of `datasets` reads it.

A line is a JSON object; its entry `file_name` is the path of an image, relative to the folder of the file. The other
entries are columns. Such a file may be in the folder itself or in subfolders.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ddim.validation import pluralize

METADATA_FILE = "metadata.jsonl"
FILE_NAME = "file_name"


def find_metadata(folders: Iterable[Path], root: Path) -> list[Path]:
    """Find the files that say something about images.

    Args:
        folders: of the images, below the root.
        root: the topmost folder.

    Returns:
        The files, sorted.

    Example:
        >>> find_metadata([Path("missing/cats")], Path("missing"))
        []
    """
    candidates = {root}
    for folder in folders:
        candidates.update(parent for parent in (folder, *folder.parents) if parent.is_relative_to(root))
    return sorted(path for folder in candidates if (path := folder / METADATA_FILE).is_file())


def read_metadata(metadata: Sequence[Path], files: Sequence[Path]) -> dict[str, list[str]]:
    """Read the columns that have a value for every image.

    Args:
        metadata: the files, as `find_metadata` returns them.
        files: the images.

    Returns:
        For each column one text per image; numbers and truth values as JSON writes them, `none` for null.

    Raises:
        ValueError: if a file cannot be read, a line is not such an object, or an image has none.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "metadata.jsonl")
        ...     _ = path.write_text('{"file_name": "a.png", "label": "cat"}')
        ...     read_metadata([path], [Path(folder, "a.png")])
        {'label': ['cat']}
    """
    rows: dict[Path, dict[str, str]] = {}
    for path in metadata:
        rows |= _read_rows(path)
    missing = [file for file in files if file not in rows]
    if missing:
        raise ValueError(
            f"{metadata[0]} must have a line for each image, and has none for {len(missing)} of "
            f"{pluralize(len(files), 'image')}; the first: {missing[0]}"
        )
    first, *others = (rows[file] for file in files)
    columns = [name for name in first if all(name in row for row in others)]
    return {name: [rows[file][name] for file in files] for name in columns}


def _read_rows(path: Path) -> dict[Path, dict[str, str]]:
    rows = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {(error.strerror or 'unknown error').lower()}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{path}, line {number}, is not valid JSON") from None
        if not isinstance(row, dict) or not isinstance(row.get(FILE_NAME), str):
            raise ValueError(f"{path}, line {number}, must be an object with a text {FILE_NAME}")
        values = {name: _as_text(value) for name, value in row.items() if name != FILE_NAME}
        rows[path.parent / row[FILE_NAME]] = {name: value for name, value in values.items() if value is not None}
    return rows


def _as_text(value: Any) -> str | None:
    """Return a value as text; `None` for lists and objects, which are not classes."""
    if isinstance(value, str):
        return value
    return None if isinstance(value, list | dict) else "none" if value is None else json.dumps(value)
