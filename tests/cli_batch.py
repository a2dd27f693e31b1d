"""Run as a program: many `ddim` commands in one process, which imports PyTorch once.

Reads `[[argument, ...], ...]` as JSON from stdin and writes a list of `{"code", "stdout", "stderr", "evaluations"}` to
stdout. Both streams are caught at the file descriptors, so that nothing escapes; `evaluations` has an entry for each
time a network was asked: the timestep (-1 for a whole tensor of them), the batch size and the network's dtype.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ddim.cli import main
from ddim.engine.cpu import CPUEngine
from ddim.unet import UNet2DModel


def exit_code() -> int:
    """Call `main` as the interpreter would call a program."""
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


def run(arguments: list[str], evaluations: list[tuple[int, int, str]]) -> dict[str, Any]:
    sys.argv = ["ddim", *arguments]
    evaluations.clear()
    with caught(1) as stdout, caught(2) as stderr:
        code = exit_code()
    return {"code": code, "stdout": stdout[0], "stderr": stderr[0], "evaluations": list(evaluations)}


@contextmanager
def caught(stream: int) -> Iterator[list[str]]:
    """A list that holds, after the block, what went to a file descriptor inside it."""
    text: list[str] = []
    kept = os.dup(stream)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), stream)
        try:
            yield text
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(kept, stream)
            os.close(kept)
        file.seek(0)
        text.append(file.read().decode())


def record_evaluations() -> list[tuple[int, int, str]]:
    """A list that grows whenever a U-Net is asked, itself or through its engine, outside the meta device."""
    evaluations: list[tuple[int, int, str]] = []

    def recorded(ask: Any) -> Any:
        @functools.wraps(ask)
        def asked(self: Any, sample: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
            if sample.device.type != "meta":
                single = getattr(timestep, "numel", lambda: 1)() == 1
                evaluations.append((int(timestep) if single else -1, len(sample), str(sample.dtype)))
            return ask(self, sample, timestep, *args, **kwargs)

        return asked

    UNet2DModel.forward = recorded(UNet2DModel.forward)  # type: ignore[method-assign]
    CPUEngine.predict = recorded(CPUEngine.predict)  # type: ignore[method-assign]
    return evaluations


if __name__ == "__main__":
    asked = record_evaluations()
    results = [run(arguments, asked) for arguments in json.load(sys.stdin)]
    json.dump(results, sys.stdout)
