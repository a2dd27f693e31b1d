"""What every target shares: worker processes with limits, and what counts as a refusal or a fault.

A target is a module of this package with two names: `EXAMPLES`, a hypothesis strategy of inputs whose `repr` is Python,
and `make_check(folder)`, which returns `check(example)`. A check calls what is under test through `attempt`, and
compares whatever is accepted with something independent through `expect`.

Checks run in a worker process, one after the other: a crash, a hang or exhausted memory ends the worker, not the
campaign, and the next input gets a new one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import logging
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from programs import FORKSERVER

ACCEPTED, REFUSED = "accepted", "refused"
TRACEBACK, CRASH, DIFFERENCE, HANG, MEMORY = "traceback", "crash", "difference", "hang", "memory"
VERDICTS = (ACCEPTED, REFUSED, TRACEBACK, CRASH, DIFFERENCE, HANG, MEMORY)
FAULTS = VERDICTS[2:]

HANG_SECONDS = 20
MAX_SECONDS = 300
START_SECONDS = 600
MAX_BYTES = 2 << 30
"""Resident memory of a process, at its peak."""
MAX_ADDRESS_BYTES = 8 << 30
"""Addresses beyond those of an idle worker: an allocation beyond it fails, instead of the machine."""
MAX_SENTENCE = 1000
"""Characters of a refusal: longer ones repeat the input."""
REFUSALS = (ValueError, TypeError, OSError, RuntimeError)

INTERNAL = re.compile(
    r"""
      Traceback | unexpected\ error | \[Errno | ^$
    | object\ (has\ no\ attribute|is\ not\ (subscriptable|iterable|callable)|of\ type\ .*\ has\ no)
    | (un)?supported\ operand | not\ supported\ between | (index|list)\ .*out\ of\ range | indices\ must\ be
    | invalid\ literal | could\ not\ convert | cannot\ be\ interpreted | unhashable\ type | unpack | NoneType | ufunc
    | positional\ argument | unexpected\ keyword | multiple\ values | missing\ \d+\ required
    | division\ by\ zero | too\ large\ to\ convert | math\ domain | codec\ can't | embedded\ null
    | a\ bytes-like\ object | broadcast | mat1\ and\ mat2 | is\ invalid\ for\ input\ of\ size | struct\. | buffer\ size
    | maximum\ recursion | <class\ | object\ at\ 0x | argument\ of\ type | must\ be\ str,
    """,
    re.VERBOSE,
)
"""What messages of Python and its libraries look like when nobody checked a value before."""
MEMORY_WORDS = ("memory does not suffice", "can't allocate memory", "out of memory", "Unable to allocate", "bad_alloc")

T = TypeVar("T")


class Outcome(NamedTuple):
    """What became of an input.

    Attributes:
        verdict: one of `VERDICTS`.
        detail: the sentence of a refusal, or what is wrong.
    """

    verdict: str
    detail: str = ""


class Refused(Exception):
    """The input was refused by a proper sentence."""


class Fault(Exception):
    """Something must not be so.

    Args:
        kind: one of `FAULTS`.
        detail: what it is.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def attempt(function: Callable[..., T], *arguments: Any, naming: tuple[str, ...] = (), **options: Any) -> T:
    """Call what is under test.

    Args:
        function: what is called.
        arguments: its arguments.
        naming: of which a refusal must contain one: it says what is wrong.
        options: its keyword arguments.

    Returns:
        What the function returns.

    Raises:
        Refused: if it raised one of `REFUSALS` with one sentence.
        Fault: if it raised anything else.
    """
    try:
        return function(*arguments, **options)
    except MemoryError:
        raise Fault(MEMORY, traceback.format_exc()) from None
    except REFUSALS as error:
        refuse(str(error), naming, traceback.format_exc(-3, False))
    except Exception:
        raise Fault(TRACEBACK, traceback.format_exc()) from None


def refuse(sentence: str, naming: tuple[str, ...] = (), origin: str = "") -> NoReturn:
    """Raise `Refused`, or a fault if a message is not one sentence about what was given.

    Args:
        sentence: the message.
        naming: of which it must contain one.
        origin: where it comes from, for the report.
    """
    if any(words in sentence for words in MEMORY_WORDS):
        raise Fault(MEMORY, f"{sentence}\n{origin}")
    if match := INTERNAL.search(sentence):
        raise Fault(TRACEBACK, f"not a sentence ({match[0]!r}): {sentence}\n{origin}")
    if "\n" in sentence or len(sentence) > MAX_SENTENCE:
        raise Fault(TRACEBACK, f"not one short sentence: {sentence[:2000]!r}\n{origin}")
    if naming and not any(name in sentence for name in naming):
        raise Fault(TRACEBACK, f"names none of {', '.join(naming)}: {sentence}\n{origin}")
    raise Refused(sentence)


def expect(condition: bool, detail: str) -> None:
    """Raise a fault if an accepted input did not give what it must give."""
    if not condition:
        raise Fault(DIFFERENCE, detail)


def judge(check: Callable[[Any], None], example: Any) -> Outcome:
    """Return what becomes of an input, in this process.

    Args:
        check: of the target.
        example: the input.
    """
    try:
        check(example)
    except Refused as refused:
        return Outcome(REFUSED, str(refused))
    except Fault as fault:
        return Outcome(fault.kind, str(fault))
    except MemoryError:
        return Outcome(MEMORY, traceback.format_exc())
    except Exception:  # of the check itself, too: what it cannot compare is not right
        return Outcome(TRACEBACK, traceback.format_exc(-4, False))
    return Outcome(ACCEPTED)


def empty(folder: Path) -> Path:
    """Return a folder after deleting what is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def peak_bytes() -> int:
    """Return the largest resident memory of this process since `reset_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Let `peak_bytes` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def limit_addresses() -> None:
    """Let allocations fail that no input justifies."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MAX_ADDRESS_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Worker:
    """A process that checks the inputs of a target, started again when one of them ends it.

    Args:
        target: the module's name in this package.
        folder: where it works.
    """

    def __init__(self, target: str, folder: Path) -> None:
        self._target, self._folder = target, folder
        self._process: Any = None
        self._connection: Any = None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._connection.close()
            self._process.join(10)
            self._stop()

    def check(self, example: Any) -> Outcome:
        """Return what becomes of an input."""
        if self._process is None:
            self._start()
        try:
            self._connection.send(example)
            if not self._answers():
                log = self._log()
                self._stop()
                return Outcome(HANG, f"more than {HANG_SECONDS} s; {log}")
            outcome: Outcome = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(10)
            code, log = self._process.exitcode, self._log()
            self._stop()
            return Outcome(CRASH, f"the process ended with {code}; {log}")
        if outcome.verdict == MEMORY:
            # What it holds would count for the next input.
            self._stop()
        return outcome

    def _answers(self) -> bool:
        """Return whether an answer comes in time.

        The time is that of processors: other processes may leave none to this one. A process that uses none for as long
        waits for something that does not come.
        """
        started = progress = time.monotonic()
        first = last = self._processor_seconds()
        while not self._connection.poll(1):
            now, seconds = time.monotonic(), self._processor_seconds()
            if seconds > last:
                last, progress = seconds, now
            if seconds - first > HANG_SECONDS or now - progress > HANG_SECONDS or now - started > MAX_SECONDS:
                return bool(self._connection.poll())
        return True

    def _processor_seconds(self) -> float:
        """Return the processor time of a worker and its children, those that have ended among them."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                if int(fields[2]) == self._process.pid:
                    ticks += sum(map(int, fields[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def _start(self) -> None:
        self._connection, other = FORKSERVER.Pipe()
        self._process = FORKSERVER.Process(target=_serve, args=(other, self._target, self._folder), daemon=False)
        self._process.start()
        other.close()
        if not self._connection.poll(START_SECONDS):
            raise TimeoutError(f"the worker of {self._target} does not start: {self._log()}")
        try:
            self._connection.recv()
        except EOFError:
            raise RuntimeError(f"the worker of {self._target} does not start: {self._log()}") from None

    def _stop(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()
        self._connection.close()
        self._process = None

    def _log(self) -> str:
        path = self._folder / "log"
        return path.read_text(errors="replace")[-3000:] if path.exists() else "no log"


def _serve(connection: Connection, target: str, folder: Path) -> None:
    """Check inputs as they come: the main function of a worker."""
    os.setsid()
    importlib.import_module("fuzz.preload")
    log = (empty(folder) / "log").open("w")
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    faulthandler.enable(sys.stderr)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with contextlib.closing(connection), prepared(target, folder) as check:
        limit_addresses()
        connection.send("ready")
        with contextlib.suppress(EOFError):
            while True:
                example = connection.recv()
                reset_peak()
                outcome = judge(check, example)
                if outcome.verdict in (ACCEPTED, REFUSED) and peak_bytes() > MAX_BYTES:
                    outcome = Outcome(MEMORY, f"{peak_bytes() >> 20} MB; {outcome.verdict}: {outcome.detail}")
                connection.send(outcome)


@contextlib.contextmanager
def prepared(target: str, folder: Path) -> Iterator[Callable[[Any], None]]:
    """Yield the check of a target, and end what it started."""
    module = importlib.import_module(f"fuzz.{target}")
    with contextlib.ExitStack() as stack:
        check = module.make_check(folder)
        if hasattr(check, "close"):
            stack.callback(check.close)
        yield check
