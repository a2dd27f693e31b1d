"""The manifest of a collection of images: a JSON file with the settings that the images were sampled with.

    {"settings": {"model_sha256": ..., "seed": 0, "count": 50000, "batch_size": 64, "eta": 0.0, ...},
     "versions": {"ddim": ..., "torch": ..., ...},
     "done": 12800,
     "complete": false}

`settings` decide the images; `done` is their number when the file was last written.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ddim.io.atomic import atomic_write
from ddim.io.json_files import read_json, to_json
from ddim.version import __version__

logger = logging.getLogger(__name__)

MAX_VALUE_LENGTH = 40
"""Characters of a setting that a message repeats in full."""


def versions() -> dict[str, str]:
    """Return the versions of the libraries on which the images' bytes may depend.

    Example:
        >>> sorted(versions())
        ['ddim', 'numpy', 'pillow', 'python', 'torch']
    """
    libraries = {name: version(name) for name in ("torch", "numpy", "pillow")}
    return {"ddim": __version__, "python": platform.python_version()} | libraries


def check_manifest(path: Path, settings: Mapping[str, Any]) -> None:
    """Check that an existing manifest has the same settings; log a warning if versions of libraries have changed.

    Args:
        path: the manifest.
        settings: the settings of this run, as JSON would return them.

    Raises:
        ValueError: if settings differ, which it lists, or the file is not a manifest.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "manifest.json"
        ...     write_manifest(path, {"count": 8, "seed": 0}, 2)
        ...     check_manifest(path, {"count": 8, "seed": 0})
    """
    manifest = read_json(path)
    recorded = manifest.get("settings")
    if not isinstance(recorded, dict):
        raise ValueError(f"{path} is not a manifest of images")
    differing = [key for key in sorted({*recorded, *settings}) if recorded.get(key) != settings.get(key)]
    if differing:
        changes = ", ".join(
            f"{key}={_shortened(settings.get(key))} instead of {_shortened(recorded.get(key))}" for key in differing
        )
        raise ValueError(
            f"{path} belongs to images with other settings ({changes}); pass overwrite=True to start over, or "
            "write elsewhere"
        )
    current, earlier = versions(), manifest.get("versions")
    if isinstance(earlier, dict) and earlier != current:
        changed = [key for key in current if earlier.get(key) != current[key]]
        logger.warning(
            "versions have changed since the first of these images (%s): the remaining ones may round differently",
            ", ".join(f"{key} {earlier.get(key)} to {current[key]}" for key in changed),
        )


def write_manifest(path: Path, settings: Mapping[str, Any], done: int) -> None:
    """Write a manifest atomically, replacing an earlier one.

    Args:
        path: the file.
        settings: the settings that decide the images, with their `count`.
        done: the number of images present.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "manifest.json"
        ...     write_manifest(path, {"count": 8}, 8)
        ...     read_json(path)["complete"]
        True
    """
    content = {"settings": dict(settings), "versions": versions(), "done": done, "complete": done == settings["count"]}
    with atomic_write(path) as temporary:
        temporary.write_text(to_json(content), encoding="utf-8")


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[:12]}..."
