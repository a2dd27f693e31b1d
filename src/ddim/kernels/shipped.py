"""The kernels' compiled code that comes with the package, as `scripts/ship_kernels.py` makes it.

    libraries/x86-64-v3.so    all kernels for a level of `ddim.kernels.machine`, a shared library
    libraries/x86-64-v4.so
    libraries/versions.json   of what: the sources as a hash, the compiler's versions, the object code as hashes

The libraries call the C library, and OpenMP's functions for the number of the thread, which PyTorch has loaded. Where
they cannot be loaded, and where the sources have changed since, kernels are compiled on first use. A test compiles them
again and compares the hashes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
from pathlib import Path

from ddim.kernels.machine import LEVEL

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "libraries"
VERSIONS = FOLDER / "versions.json"


@functools.cache
def sources_sha256() -> str:
    """Return a hash of the sources that compiled code depends on: all of `ddim.kernels`, since kernels share code."""
    root, digest = FOLDER.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def are_current() -> bool:
    """Return whether the libraries are those of the sources."""
    try:
        return bool(json.loads(VERSIONS.read_text())["sources_sha256"] == sources_sha256())
    except (OSError, ValueError, KeyError):
        return False


def path_of(level: str) -> Path:
    """Return where the library of a level is.

    Args:
        level: a name of `ddim.kernels.machine.LEVELS`.

    Example:
        >>> path_of("x86-64-v3").name
        'x86-64-v3.so'
    """
    return FOLDER / f"{level}.so"


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Load the library of this machine; `None` if there is none, or none that can be loaded."""
    if LEVEL is None or not are_current():
        return None
    try:
        return ctypes.CDLL(str(path_of(LEVEL)))
    except OSError as error:
        # From a folder that nothing may be run from, or without OpenMP's functions.
        logger.debug("%s", error)
        return None


def find(symbol: str) -> int | None:
    """Return the address of a function in this machine's library; `None` if it has to be compiled.

    Args:
        symbol: its name, as of `ddim.kernels.runtime.Kernel`.

    Example:
        >>> find("ddim_norm_sideways")  # no kernel
    """
    try:
        return ctypes.cast(getattr(_library(), symbol), ctypes.c_void_p).value
    except AttributeError:
        return None
