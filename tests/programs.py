"""Programs in processes that are forked from one which has imported PyTorch and this package.

    done = run_cli("info", "mnist", env=environment(tmp_path))
    done.returncode, done.stdout, done.stderr

    with start_cli("train", "--out", out, env=env) as program:
        program.send_signal(signal.SIGTERM)
        stdout, stderr = program.communicate()

Each has its own environment, working folder, streams, signals and exit status, as a command that a shell starts; only
the imports, up to ten seconds of work each, are shared. Where starting is what is tested, tests start the installed
command or the interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

FORKSERVER = multiprocessing.get_context("forkserver")
# Neither numba nor huggingface_hub: tests look whether numba was imported, and the hub's client reads its environment
# when it is. Optimizers import torch._dynamo, evaluations torchmetrics, each of which takes three seconds.
FORKSERVER.set_forkserver_preload(
    [
        *("ddim.cli", "ddim.pipeline", "ddim.latents", "ddim.engine.cpu", "ddim.bulk", "ddim.tuning"),
        *("torch._dynamo", "torchmetrics.image"),
    ]
)

STREAMS = ("stdout", "stderr")


class Program:
    """A running program, with the interface of `subprocess.Popen`.

    Args:
        code: Python code, which finds the arguments in `sys.argv[1:]`.
        arguments: of the program.
        env: its whole environment.
        cwd: where it runs; the current folder by default.
    """

    def __init__(self, code: str, *arguments: str | Path, env: Mapping[str, str], cwd: Path | None = None) -> None:
        self._streams = tempfile.TemporaryDirectory()
        self.args = [*map(str, arguments)]
        folder = str(cwd or Path.cwd())
        for name in STREAMS:
            Path(self._streams.name, name).touch()
        self._process = FORKSERVER.Process(
            target=_execute, args=(code, self.args, dict(env), folder, self._streams.name)
        )
        self._process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.send_signal(signal.SIGKILL)
        self._process.join()
        self._streams.cleanup()

    @property
    def pid(self) -> int:
        """The number of the process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, or minus the signal that ended the process; `None` while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return `returncode`."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float) -> int:
        """Return the exit status of a process that ends in time; kill it otherwise."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.send_signal(signal.SIGKILL)
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end of the process, and return its standard output and standard error."""
        self.wait(timeout)
        stdout, stderr = (Path(self._streams.name, name).read_text() for name in STREAMS)
        return stdout, stderr


def start_torchrun(*arguments: str | Path, env: Mapping[str, str], cwd: Path | None = None) -> Program:
    """Start `torchrun` with arguments; the processes that it starts are not forked."""
    return Program("from torch.distributed.run import main; main()", *arguments, env=env, cwd=cwd)


def start_cli(*arguments: str | Path, env: Mapping[str, str], cwd: Path | None = None) -> Program:
    """Start `ddim` with arguments."""
    return Program("from ddim.cli import main; main()", *arguments, env=env, cwd=cwd)


def run_cli(
    *arguments: str | Path, env: Mapping[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `ddim` with arguments and capture its output."""
    return _finish(start_cli(*arguments, env=env, cwd=cwd))


def run_python(
    code: str, *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python code and capture its output; in this process's environment by default."""
    return _finish(Program(code, *arguments, env=os.environ if env is None else env, cwd=cwd))


def launcher_environment(rank: int, world_size: int, port: int, *, machines: int = 1) -> dict[str, str]:
    """Return the environment that `torchrun` gives to one of several processes, on one machine or on one each."""
    local_rank, local_size = (rank, world_size) if machines == 1 else (0, 1)
    numbers = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
    return {name: str(number) for name, number in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_pair(
    *arguments: str | Path, env: Mapping[str, str], cwd: Path | None = None
) -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
    """Run `ddim` in two processes of one job."""
    port = free_port()
    environments = [{**env, **launcher_environment(rank, 2, port)} for rank in range(2)]
    first, second = [start_cli(*arguments, env=variables, cwd=cwd) for variables in environments]
    return _finish(first), _finish(second)


def free_port() -> int:
    """Return the number of a port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _finish(program: Program) -> subprocess.CompletedProcess[str]:
    with program:
        stdout, stderr = program.communicate()
    assert program.returncode is not None
    return subprocess.CompletedProcess(program.args, program.returncode, stdout, stderr)


def _execute(code: str, arguments: list[str], env: dict[str, str], cwd: str, streams: str) -> None:
    """Execute code as the main module, in the process that was started for it."""
    for descriptor, name in enumerate(STREAMS, 1):
        with Path(streams, name).open("w") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    tempfile.tempdir = None  # as TMPDIR says
    sys.argv = ["ddim", *arguments]
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "<string>", "exec"), scope)
