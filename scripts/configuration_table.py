"""Write the table of all entries of a training configuration into its page of the documentation.

python scripts/configuration_table.py
"""

from __future__ import annotations

from pathlib import Path

from ddim.training.reference import entries_table

PAGE = Path(__file__).parents[1] / "docs" / "training-configuration.md"
MARK = "<!-- entries: scripts/configuration_table.py -->\n"
"""What stands below it is replaced."""

if __name__ == "__main__":
    text, _, _ = PAGE.read_text().partition(MARK)
    PAGE.write_text(f"{text}{MARK}\n{entries_table()}\n")
