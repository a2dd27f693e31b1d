"""Reads the snippets of a page of the documentation, and the commands of a shell snippet."""

from __future__ import annotations

import re
import subprocess
from typing import NamedTuple

SNIPPET = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: .+ -->\n\Z")
"""Stands before a snippet that is not run, with the reason."""
PROGRAMS = ("ddim", "pip", "make", "torchrun", "accelerate", "python")


class Snippet(NamedTuple):
    """A block of code, its language, and the line it starts in."""

    language: str
    code: str
    line: int


def snippets(text: str) -> list[Snippet]:
    """Return the Python and shell snippets of a page, without those that a comment excludes."""
    return [
        Snippet(match[1], match[2], text[: match.start()].count("\n") + 2)
        for match in SNIPPET.finditer(text)
        if not NOT_RUN.search(text[: match.start()])
    ]


def excluded(text: str) -> list[str]:
    """Return the reasons of the snippets that are not run."""
    return re.findall(r"<!-- not run: (.+) -->\n```", text)


def parse_shell(code: str) -> list[list[str]]:
    """Return the commands of a shell snippet, as `sh` reads them: comments, quotes and continued lines included."""
    functions = "".join(f"{name}() {{ printf '%s\\0' {name} \"$@\"; printf '\\001'; }}\n" for name in PROGRAMS)
    done = subprocess.run(["sh", "-eu", "-c", functions + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [command.split("\0")[:-1] for command in done.stdout.split("\001")[:-1]]
