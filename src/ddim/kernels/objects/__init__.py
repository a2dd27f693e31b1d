"""Object code of the kernels for the levels of `ddim.kernels.machine`, as `scripts/ship_kernels.py` compiles it.

    objects/versions.json            the sources that it was compiled from, as a hash, and the compiler's versions
    objects/x86-64-v3/norm.forward.o

Where the sources have changed since, none of it is used. A test compiles it again and compares the bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from ddim.kernels.machine import LEVEL

FOLDER = Path(__file__).parent
VERSIONS = FOLDER / "versions.json"


@functools.cache
def sources_sha256() -> str:
    """Return a hash of the sources that object code depends on: all of `ddim.kernels`, since kernels share code."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.parent.rglob("*.py")):
        digest.update(path.relative_to(FOLDER.parent).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def are_current() -> bool:
    """Return whether the object code is that of the sources."""
    try:
        return bool(json.loads(VERSIONS.read_text())["sources_sha256"] == sources_sha256())
    except (OSError, ValueError, KeyError):
        return False


def path_of(kernel: str, level: str) -> Path:
    """Return where a kernel's object code for a level is.

    Args:
        kernel: its name, such as `norm.forward`.
        level: a name of `ddim.kernels.machine.LEVELS`.
    """
    return FOLDER / level / f"{kernel}.o"


def has(kernel: str) -> bool:
    """Return whether a kernel's object code for this machine comes with the package."""
    return LEVEL is not None and are_current() and path_of(kernel, LEVEL).is_file()


def read(kernel: str) -> bytes | None:
    """Return a kernel's object code for this machine; `None` if it has to be compiled.

    Args:
        kernel: its name, such as `norm.forward`.
    """
    return path_of(kernel, str(LEVEL)).read_bytes() if has(kernel) else None
