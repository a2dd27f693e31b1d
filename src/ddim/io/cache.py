"""The user's cache folder: compiled kernels, features, tables, tuning results."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where this user's caches of `ddim` are: `$XDG_CACHE_HOME/ddim`, or `~/.cache/ddim`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddim"
