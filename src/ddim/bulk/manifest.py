"""The manifest of a collection of pictures: a JSON file that says what they are pictures of.

    {"settings": {"model_sha256": ..., "seed": 0, "count": 50000, "batch_size": 64, "eta": 0.0, ...},
     "versions": {"ddim": ..., "torch": ..., ...},
     "done": 12800,
     "complete": false}

`settings` decide the pictures; `done` counts them, as they were when the file was last written.
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


def versions() -> dict[str, str]:
    """Of what the bytes may depend on."""
    libraries = {name: version(name) for name in ("torch", "numpy", "pillow")}
    return {"ddim": __version__, "python": platform.python_version()} | libraries


def check_manifest(path: Path, settings: Mapping[str, Any]) -> None:
    """See that a manifest that is there is of these settings.

    Raises:
        ValueError: if it is of others, saying which differ, or is no manifest.
    """
    there = read_json(path)
    old = there.get("settings")
    if not isinstance(old, dict):
        raise ValueError(f"{path} is no manifest of pictures")
    differing = [key for key in sorted({*old, *settings}) if old.get(key) != settings.get(key)]
    if differing:
        changes = ", ".join(f"{key} is {_short(settings.get(key))}, was {_short(old.get(key))}" for key in differing)
        raise ValueError(
            f"{path} is of pictures with other settings ({changes}); give --overwrite to start afresh, or another --out"
        )
    now, before = versions(), there.get("versions")
    if isinstance(before, dict) and before != now:
        changed = ", ".join(f"{key} {before.get(key)} to {now[key]}" for key in now if before.get(key) != now[key])
        logger.warning(
            "versions have changed since these pictures were begun (%s): the rest may round otherwise", changed
        )


NAME = "manifest.json"
"""Of a manifest in a folder of pictures."""


def write_manifest(path: Path, settings: Mapping[str, Any], done: int) -> None:
    """Write the manifest, in place of the one that is there."""
    content = {"settings": dict(settings), "versions": versions(), "done": done, "complete": done == settings["count"]}
    with atomic_write(path) as temporary:
        temporary.write_text(to_json(content), encoding="utf-8")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
