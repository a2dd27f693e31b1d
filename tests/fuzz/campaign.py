"""Running targets, counting outcomes, and printing both."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, nan
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from fuzz.harness import ACCEPTED, FAULTS, REFUSED, VERDICTS, Outcome, Worker, judge, prepared

TARGETS = ("checkpoints", "configurations", "commands", "images", "archives", "latents", "requests")
ROUND = 100
"""Inputs of a target before the next one has its turn."""


@dataclass
class Tally:
    """Outcomes of a target.

    Attributes:
        counts: by verdict.
        faults: the seed, the input and the outcome of each.
    """

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[int, Any, Outcome]] = field(default_factory=list)

    def report(self, target: str) -> str:
        """Return the first fault of each kind, with what reproduces it."""
        kinds: dict[str, list[tuple[int, Any, Outcome]]] = {}
        for fault in self.faults:
            kinds.setdefault(fault_kind(fault[2]), []).append(fault)
        return "\n\n".join(
            f"{target}, seed {faults[0][0]}: {faults[0][2].verdict}, {len(faults)} times\n"
            f"{faults[0][2].detail.strip()}\n"
            f"python -m tests.fuzz --targets {target} --example {shlex.quote(repr(faults[0][1]))}"
            for faults in kinds.values()
        )


def fault_kind(outcome: Outcome) -> str:
    """Return what faults have in common that differ in values alone."""
    text = re.sub(r"\S*/\S+|'[^']*'|0x\w+|\d+|got .*", "", outcome.detail.strip().split("\n")[0])
    return f"{outcome.verdict} {text}"


def run(target: str, worker: Worker, seed: int, count: int, tally: Tally, deadline: float = inf) -> None:
    """Check inputs of a target.

    Args:
        target: one of `TARGETS`.
        worker: of this target.
        seed: decides the inputs.
        count: how many.
        tally: is added to.
        deadline: by `time.monotonic`, after which no input is checked.
    """
    examples = importlib.import_module(f"fuzz.{target}").EXAMPLES

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(examples)
    def check(example: Any) -> None:
        if time.monotonic() > deadline:
            return
        outcome = worker.check(example)
        tally.counts[outcome.verdict] += 1
        if outcome.verdict in FAULTS:
            tally.faults.append((seed, example, outcome))

    check()


def table(tallies: dict[str, Tally]) -> str:
    """Return the counts of all targets as a table."""
    columns = ("inputs", *VERDICTS)
    rows = [("", *columns)]
    for target, tally in tallies.items():
        rows.append((target, str(tally.counts.total()), *(str(tally.counts[verdict]) for verdict in VERDICTS)))
    total = sum((tally.counts for tally in tallies.values()), Counter())
    rows.append(("all", str(total.total()), *(str(total[verdict]) for verdict in VERDICTS)))
    return "\n".join(f"{row[0]:15}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows)


def campaign(targets: Sequence[str], seed: int, minutes: float, folder: Path) -> dict[str, Tally]:
    """Run targets in turns until the time is up; each fault is printed when it is found."""
    tallies = {target: Tally() for target in targets}
    deadline = time.monotonic() + 60 * minutes
    seconds = dict.fromkeys(targets, 0.0)
    workers = {target: Worker(target, folder / target) for target in targets}
    turns = dict.fromkeys(targets, 0)
    while time.monotonic() < deadline:
        # Each target gets the same time, not the same number of inputs.
        target = min(targets, key=seconds.__getitem__)
        tally, started = tallies[target], time.monotonic()
        known = len(tally.faults)
        run(target, workers[target], seed + turns[target], ROUND, tally, deadline)
        turns[target] += 1
        seconds[target] += time.monotonic() - started
        if tally.faults[known:]:
            print(Tally(faults=tally.faults[known:]).report(target), flush=True)
    for worker in workers.values():
        worker.close()
    return tallies


def check_one(target: str, text: str, folder: Path) -> Outcome:
    """Check one input in this process, as it was printed."""
    module = importlib.import_module(f"fuzz.{target}")
    example = eval(text, {**vars(module), "inf": inf, "nan": nan})
    with prepared(target, folder / target) as check:
        return judge(check, example)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign from the command line.

    Returns:
        The exit status: 1 if there was a fault.
    """
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5, help="for all targets together")
    parser.add_argument("--seed", type=int, default=0, help="of the first turn of each target")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--example", help="check this one input of a target, as a report printed it")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if options.example is not None:
            outcome = check_one(options.targets[0], options.example, Path(folder))
            print(f"{outcome.verdict}: {outcome.detail}")
            return int(outcome.verdict not in (ACCEPTED, REFUSED))
        tallies = campaign(options.targets, options.seed, options.minutes, Path(folder))
    print(table(tallies))
    return int(any(tally.faults for tally in tallies.values()))
