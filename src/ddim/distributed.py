"""The processes of one job, as `torchrun` and `accelerate launch` start them; only this module reads their environment.

Work is divided by number: of n processes, process r does pieces r, r + n, r + 2 n, ... (`shard`). Results are gathered
by every process in the order of the pieces (`all_gather`), so that no number depends on n. What one process has to
decide, such as whether a result is cached, process 0 decides for all (`broadcast`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that work together.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.

    Example:
        >>> group = ProcessGroup(rank=1, size=3)
        >>> list(group.shard(8))
        [1, 4, 7]
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is process 0, which prints and writes for all."""
        return self.rank == 0

    def shard(self, pieces: int) -> range:
        """Return the numbers of the pieces of work that belong to this process."""
        return range(self.rank, pieces, self.size)

    def all_gather(self, mine: list[T]) -> list[T]:
        """Return the results of all pieces in order, given those of this process's shard."""
        if self.size == 1:
            return mine
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, mine)
        return [gathered[piece % self.size][piece // self.size] for piece in range(sum(map(len, gathered)))]

    def broadcast(self, value: T) -> T:
        """Return the value that process 0 passes, in every process."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        result: T = box[0]
        return result


SINGLE_PROCESS = ProcessGroup()


def rank_and_world_size() -> tuple[int, int]:
    """Return (rank, world size) from the launcher's environment; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def local_device(device: str) -> str:
    """Return the device of this process: with `auto` or `cuda` under a launcher, GPU number `LOCAL_RANK`.

    Args:
        device: a device's name; names other than `auto` and `cuda`, and machines without a GPU, leave it as it is.
    """
    if device not in ("auto", "cuda") or rank_and_world_size()[1] == 1:
        return device
    gpus = torch.cuda.device_count()
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % gpus}" if gpus else device


@contextmanager
def init() -> Iterator[ProcessGroup]:
    """Join the launcher's processes for the duration of a `with` block; `SINGLE_PROCESS` without a launcher."""
    rank, size = rank_and_world_size()
    if size == 1:
        yield SINGLE_PROCESS
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield ProcessGroup(rank, size)
    finally:
        torch.distributed.destroy_process_group()
