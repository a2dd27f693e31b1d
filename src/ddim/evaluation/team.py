"""Processes that measure together, as `torchrun` and `accelerate launch` start them.

Work is dealt out by number: of n processes, the r-th does pieces r, r + n, r + 2 n, ... What comes of it is gathered by
all, in the order of the pieces, so that no number depends on n. What one has to decide, such as whether a result is
kept already, the first decides for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed

from ddim.bulk.run import processes

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """This process among those that work together.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes for all."""
        return self.rank == 0

    def share(self, pieces: int) -> range:
        """The pieces of work that are this process's, of so many."""
        return range(self.rank, pieces, self.size)

    def gather(self, mine: list[T]) -> list[T]:
        """The results of all pieces in their order; `mine` are those of this process's share."""
        if self.size == 1:
            return mine
        every: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(every, mine)
        return [every[piece % self.size][piece // self.size] for piece in range(sum(map(len, every)))]

    def told(self, value: T) -> T:
        """What the first process gives here, for all of them."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        result: T = box[0]
        return result


ALONE = Team()


@contextmanager
def join() -> Iterator[Team]:
    """This process's team, as the launcher's environment tells it; `ALONE` without a launcher."""
    rank, size = processes()
    if size == 1:
        yield ALONE
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield Team(rank, size)
    finally:
        torch.distributed.destroy_process_group()
