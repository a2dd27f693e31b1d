"""What was measured, as Markdown and as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddim.io.atomic import atomic_write


def table(rows: Sequence[Mapping[str, Any]], heads: Mapping[str, str], columns: Mapping[str, tuple[str, str]]) -> str:
    """A Markdown table.

    Args:
        rows: values by keys. One with a `why_not` says so in place of its first number.
        heads: of the columns with names -> key.
        columns: of those with numbers -> key, and the format of numbers that are not `None`.
    """
    lines = [f"| {' | '.join([*heads, *columns])} |", "|---" * (len(heads) + len(columns)) + "|"]
    for row in rows:
        cells = ["" if row.get(key) is None else format(row[key], form) for key, form in columns.values()]
        if row["why_not"]:
            cells[0] = f"not measured: {row['why_not']}"
        lines.append(f"| {' | '.join([*(str(row[key]) for key in heads.values()), *cells])} |")
    return "\n".join(lines)


def write_files(folder: Path, contents: Mapping[str, str]) -> None:
    """Files by their names, each written whole, in a folder that is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(content)
