"""JSON objects in files, and the text of configuration files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: the file.

    Returns:
        The object's entries.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not valid JSON, or holds something other than an object.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "config.json"
        ...     _ = path.write_text(to_json({"in_channels": 3}))
        ...     read_json(path)
        {'in_channels': 3}
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not valid JSON: it is not UTF-8 text") from None
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def to_json(content: Mapping[str, Any]) -> str:
    """Return the text of a configuration file: indented JSON with sorted keys and a final newline.

    Args:
        content: the object; arrays and tensors (trained betas) become lists, other objects such as paths their text.

    Returns:
        The text.

    Example:
        >>> print(to_json({"b": Path("x"), "a": 1}), end="")
        {
          "a": 1,
          "b": "x"
        }
    """
    return json.dumps(content, indent=2, sort_keys=True, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
