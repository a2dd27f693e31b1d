"""The server and the browser that all tests of the page share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cli_batch
from app_server import AppServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    """`ddim app mnist`."""
    with AppServer(tmp_path_factory.mktemp("app")) as server:
        yield server


@pytest.fixture(scope="session")
def run_commands() -> Callable[..., None]:
    """`run_commands(folder, arguments, ...)`: `ddim` commands in one process, which all succeed."""

    def run(folder: Path, *commands: list[str]) -> None:
        done = subprocess.run(
            [sys.executable, cli_batch.__file__],
            input=json.dumps(commands),
            capture_output=True,
            text=True,
            cwd=folder,
            check=True,
        )
        for result in json.loads(done.stdout):
            assert result["code"] == 0, result["stderr"]

    return run
