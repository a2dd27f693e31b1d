"""The user's cache folder: compiled kernels, features, tables, tuning results."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of this user's `ddim` caches: `$XDG_CACHE_HOME/ddim`, or `~/.cache/ddim`.

    The folder may not exist yet.

    Example:
        >>> cache_folder().name
        'ddim'
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddim"
