"""`ddim` commands in one process, for tests that look at results by the names of commands.

    with Commands(folder, {"encode": ["encode", "x.png", "-o", "x.npz"], "decode": ["decode", "x.npz"]}) as commands:
        commands["decode"].stdout      # runs `encode`, whose output it reads, then `decode`; each of them once

The process is forked as those of `programs.py` are. Both streams are captured at the file descriptors, so that nothing
escapes; `evaluations` has an entry for each call of a network: the timestep (-1 for a whole tensor of them), the batch
size and the network's dtype.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

from programs import FORKSERVER


class Result(NamedTuple):
    code: int
    stdout: str
    stderr: str
    evaluations: list[tuple[int, int, str]]


def environment(home: Path) -> dict[str, str]:
    """One thread, no GPU, no hub, and help of one width."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "200",
    }


class Commands(Mapping[str, Result]):
    """The results of commands, each of which runs when it is first asked for, after those whose output it reads.

    Args:
        folder: where they run.
        table: their arguments, by name.
        requires: the names of commands that run before, for what cannot be seen from the arguments.
        variables: their whole environment, instead of that of `environment`.
    """

    def __init__(
        self,
        folder: Path,
        table: Mapping[str, list[str]],
        requires: Mapping[str, Sequence[str]] | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.table, self._requires = folder, table, requires or {}
        self._results: dict[str, Result] = {}
        # Of several commands that write one path, the first makes it.
        self._writers = {path: name for name in reversed(list(table)) if (path := output_path(table[name])) is not None}
        self._variables = environment(folder / "home") if variables is None else dict(variables)
        self._process: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.join()

    def __getitem__(self, name: str) -> Result:
        if name not in self._results:
            for other in self.prerequisites(name):
                self[other]
            self._results[name] = self._run(self.table[name])
        return self._results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    def output(self, name: str) -> Path:
        """The path that a command has written."""
        assert self[name].code == 0, self[name].stderr
        path = output_path(self.table[name])
        assert path is not None
        return self.folder / path

    def prerequisites(self, name: str) -> list[str]:
        """The commands that run before: those required, and those that write what this one reads."""
        own = output_path(self.table[name])
        inputs = [Path(argument) for argument in self.table[name] if argument != own]
        readable = {str(path) for given in inputs for path in (given, *given.parents)} - {own}
        written = [writer for path, writer in self._writers.items() if path.rstrip("/") in readable]
        return [other for other in (*self._requires.get(name, ()), *written) if other != name]

    def _run(self, arguments: list[str]) -> Result:
        if self._process is None:
            self._connection, other = FORKSERVER.Pipe()
            self._process = FORKSERVER.Process(target=_serve, args=(other, self.folder, self._variables))
            self._process.start()
            other.close()
        self._connection.send(arguments)
        result: Result = self._connection.recv()
        return result


def output_path(arguments: Sequence[str]) -> str | None:
    """The value of `--out`."""
    for option in ("--out", "-o"):
        if option in arguments[:-1]:
            return arguments[arguments.index(option) + 1]
    return None


def run(arguments: list[str], evaluations: list[tuple[int, int, str]]) -> Result:
    """Run a command in this process."""
    sys.argv = ["ddim", *arguments]
    evaluations.clear()
    with captured(1) as stdout, captured(2) as stderr:
        status = exit_code()
    return Result(status, stdout[0], stderr[0], list(evaluations))


def exit_code() -> int:
    """Call `main` as the interpreter would call a program."""
    from ddim.cli import main

    try:
        main()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@contextlib.contextmanager
def captured(stream: int) -> Iterator[list[str]]:
    """A list that holds, after the block, what was written to a file descriptor inside it."""
    text: list[str] = []
    original = os.dup(stream)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), stream)
        try:
            yield text
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(original, stream)
            os.close(original)
        file.seek(0)
        text.append(file.read().decode())


def record_evaluations() -> list[tuple[int, int, str]]:
    """A list that grows with each call of a U-Net, itself or through its engine, outside the meta device."""
    from ddim.engine.base import EagerEngine
    from ddim.engine.cpu import CPUEngine

    evaluations: list[tuple[int, int, str]] = []

    def recorded(call: Any) -> Any:
        @functools.wraps(call)
        def record(self: Any, sample: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
            if sample.device.type != "meta":
                single = getattr(timestep, "numel", lambda: 1)() == 1
                evaluations.append((int(timestep) if single else -1, len(sample), str(sample.dtype)))
            return call(self, sample, timestep, *args, **kwargs)

        return record

    EagerEngine.predict = recorded(EagerEngine.predict)  # type: ignore[method-assign]
    CPUEngine.predict = recorded(CPUEngine.predict)  # type: ignore[method-assign]
    return evaluations


def _serve(connection: Connection, folder: Path, variables: Mapping[str, str]) -> None:
    """Run commands as they come: the main function of the process."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    tempfile.tempdir = None  # as TMPDIR says
    evaluations = record_evaluations()
    with contextlib.suppress(EOFError):
        while True:
            connection.send(run(connection.recv(), evaluations))
