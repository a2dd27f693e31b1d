"""Write results as Markdown tables and as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddim.io.atomic import atomic_write


def markdown_table(
    rows: Sequence[Mapping[str, Any]], text_columns: Mapping[str, str], columns: Mapping[str, tuple[str, str]]
) -> str:
    """Format rows as a Markdown table.

    Args:
        rows: values by key. A row with a non-empty `skip_reason` shows it instead of its first number.
        text_columns: heading -> key, of the columns with text, which come first.
        columns: heading -> key and format, of the columns with numbers; `None` leaves a cell empty.

    Returns:
        The lines of the table, without a newline at the end.
    """
    lines = [f"| {' | '.join([*text_columns, *columns])} |", "|---" * (len(text_columns) + len(columns)) + "|"]
    for row in rows:
        cells = ["" if row.get(key) is None else format(row[key], form) for key, form in columns.values()]
        if row["skip_reason"]:
            cells[0] = f"not measured: {row['skip_reason']}"
        lines.append(f"| {' | '.join([*(str(row[key]) for key in text_columns.values()), *cells])} |")
    return "\n".join(lines)


def write_files(folder: Path, contents: Mapping[str, str]) -> None:
    """Write files atomically into `folder`, which is created if it is missing: name -> content."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(content)
