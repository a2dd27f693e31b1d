"""A short campaign: the first inputs of every target, and what the harness makes of each kind of fault."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fuzz import harness
from fuzz.campaign import TARGETS, Tally, fault_kind, main, run, table
from fuzz.harness import FAULTS, Fault, Outcome, Refused, Worker, attempt, expect, judge

COUNTS = {
    "checkpoints": 40,
    "configurations": 40,
    "commands": 10,
    "images": 50,
    "archives": 40,
    "latents": 60,
    "requests": 10,
}
"""Inputs per target: half a minute of one processor in all; `python -m tests.fuzz` is the campaign."""


@pytest.mark.parametrize("target", TARGETS)
def test_no_faults(target: str, tmp_path: Path) -> None:
    tally = Tally()
    with closing(Worker(target, tmp_path)) as worker:
        run(target, worker, 0, COUNTS[target], tally)
    assert not tally.faults, tally.report(target)
    assert tally.counts["accepted"]
    assert tally.counts["refused"]


EXAMPLES: Any = None
"""This module is also a target, of functions by name."""


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> None:
    time.sleep(1000)


def allocate() -> None:
    np.ones(2**28)


def exhaust() -> None:
    attempt(np.ones, 2**34)


def make_check(folder: Path) -> Callable[[str], None]:
    return lambda name: globals()[name]()


def test_faults_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other: after each, the next input gets a worker, too."""
    faults = {"crash": "crash", "allocate": "memory", "exhaust": "memory", "list": "traceback"}
    with closing(Worker("test_fuzz", tmp_path)) as worker:
        assert {name: worker.check(name).verdict for name in faults} == faults
        with monkeypatch.context() as patch:
            patch.setattr(harness, "HANG_SECONDS", 2)
            assert worker.check("hang").verdict == "hang"
        assert worker.check("list").verdict == "traceback"


def fail(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (ValueError("eta must be at least 0, got -1"), "refused"),
        (ValueError("eta must be\nat least 0"), "traceback"),
        (ValueError("x" * 5000), "traceback"),
        (ValueError(""), "traceback"),
        (TypeError("'<' not supported between instances of 'str' and 'int'"), "traceback"),
        (OSError(22, "Invalid argument"), "traceback"),
        (KeyError("x"), "traceback"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory"),
        (MemoryError(), "memory"),
    ],
)
def test_refusals_are_sentences(error: Exception, verdict: str) -> None:
    assert judge(lambda _: attempt(fail, error), None).verdict == verdict


def test_refusals_name_what_is_wrong() -> None:
    error = ValueError("x.png is damaged")
    with pytest.raises(Refused):
        attempt(fail, error, naming=("x.png",))
    with pytest.raises(Fault, match=r"names none of y\.png"):
        attempt(fail, error, naming=("y.png",))


def test_wrong_results_are_differences() -> None:
    assert judge(lambda _: expect(False, "other pixels"), None) == Outcome("difference", "other pixels")


def test_report_counts_kinds_and_reproduces_them() -> None:
    faults = [
        (7, example, Outcome("traceback", f"/tmp/x{example}/y.png is wrong, got {example}")) for example in (1, 2)
    ]
    tally = Tally(faults=[*faults, (8, 3, Outcome("hang", "more than 20 s"))])
    report = tally.report("images")
    assert "images, seed 7: traceback, 2 times" in report
    assert "python -m tests.fuzz --targets images --example 1" in report
    assert "images, seed 8: hang, 1 times" in report
    assert len({fault_kind(outcome) for _, _, outcome in tally.faults}) == 2
    tally.counts.update(traceback=2, hang=1, accepted=4)
    header, row, total = (line.split() for line in table({"images": tally}).splitlines())
    assert header == ["inputs", "accepted", "refused", *FAULTS]
    assert row == ["images", "7", "4", "0", "2", "0", "0", "1", "0"]
    assert total[1:] == row[1:]


def test_one_example_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    example = "Latents('.npz', [Mutation('truncate', 100, 0, b'')])"
    assert main(["--targets", "latents", "--example", example]) == 0
    assert capsys.readouterr().out.startswith("refused: ")
