"""Check, before a command works, that what it writes does not replace what it reads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ddim.validation import shown

INPUTS = ("images", "mask", "points", "sources", "codes", "direction", "samples", "reference", "held_out", "features")
"""Parameters that name files and folders of images or latents, alone or in a list."""
OUTPUTS = ("out", "plot", "pairs", "curve")
"""Parameters that name what is written."""


def check_inputs_stay(values: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Check that no output of a command would replace one of its inputs.

    Files are compared by what they are, not by their names: links to an input are refused as well. A folder of models
    is not an input.

    Args:
        values: the parameters of a command, by name; others than `INPUTS` and `OUTPUTS` are ignored.
        names: how a user gives each parameter, for the message.

    Raises:
        ValueError: naming the input that would be replaced.
        FileExistsError: for a folder of `ddim sample`.

    Example:
        >>> import contextlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        ...     Path("x.png").touch()
        ...     check_inputs_stay({"images": ["x.png"], "out": "./x.png"}, {"out": "--out"})
        Traceback (most recent call last):
        ValueError: --out must not overwrite the input 'x.png', got './x.png'
    """
    from ddim.io.image_files import earlier_files

    sources = [word for name in INPUTS for word in _words(values.get(name))]
    if not sources:
        return
    replaced = {
        identity: (name, word)
        for name in OUTPUTS
        for word in _words(values.get(name))
        for identity in _identities(earlier_files(word))
    }
    for file in (file for source in sources if replaced for file in _files(source)):
        for identity in _identities([file]):
            if identity in replaced:
                name, word = replaced[identity]
                raise ValueError(f"{names[name]} must not overwrite the input {shown(str(file))}, got {shown(word)}")


def _words(value: Any) -> list[str]:
    """Return the words of a parameter, which may hold one, several, or something else, such as a number."""
    words = value if isinstance(value, (list, tuple)) else [value]
    return [str(word) for word in words if isinstance(word, (str, Path))]


def _files(source: str) -> Iterable[Path]:
    """Yield the files that are read of an input."""
    from ddim.io.hub import is_model

    # Not Path.is_dir, which raises for names that no file can have.
    if not os.path.isdir(source):  # noqa: PTH112
        yield Path(source)
    elif not is_model(source):
        for folder, _, names in os.walk(source):
            yield from (Path(folder, name) for name in names)


def _identities(files: Iterable[Path]) -> Iterable[tuple[int, int]]:
    """Yield what tells each existing file from all others, by whatever name it is reached."""
    for file in files:
        try:
            status = os.stat(file)  # noqa: PTH116
        except (OSError, ValueError):
            continue
        yield status.st_dev, status.st_ino
