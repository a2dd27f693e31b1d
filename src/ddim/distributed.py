"""The processes of one job that `torchrun` or `accelerate launch` started; no other module reads their environment.

Work is divided by number: of n processes, process r does pieces r, r + n, r + 2 n, ... (`shard`). Every process gathers
the results in the order of the pieces (`all_gather`), so that no result depends on n. Process 0 decides for all, for
example whether a result is cached (`broadcast`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from ddim.validation import integer

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
        """Return the numbers of the pieces of work that belong to this process.

        Args:
            pieces: the number of pieces.

        Example:
            >>> list(ProcessGroup(rank=0, size=2).shard(5))
            [0, 2, 4]
        """
        return range(self.rank, pieces, self.size)

    def all_gather(self, mine: list[T]) -> list[T]:
        """Return the results of all pieces in order.

        Args:
            mine: the results of this process's shard, in order; any objects that can be pickled.

        Example:
            >>> SINGLE_PROCESS.all_gather(["a", "b"])
            ['a', 'b']
        """
        if self.size == 1:
            return mine
        import torch.distributed

        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, mine)
        return [gathered[piece % self.size][piece // self.size] for piece in range(sum(map(len, gathered)))]

    def broadcast(self, value: T) -> T:
        """Return the value of process 0 in every process.

        Args:
            value: any object that can be pickled; those of other processes are ignored.

        Example:
            >>> SINGLE_PROCESS.broadcast("a")
            'a'
        """
        if self.size == 1:
            return value
        import torch.distributed

        box: list[Any] = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        result: T = box[0]
        return result


SINGLE_PROCESS = ProcessGroup()
"""The group of a process without a launcher."""


LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What every launcher sets for each process that it starts."""


def rank_and_world_size() -> tuple[int, int]:
    """Return (rank, world size) from the launcher's environment; (0, 1) without a launcher.

    Raises:
        ValueError: if the environment is incomplete or contradicts itself, so that work would be left out.

    Example:
        >>> rank, world_size = rank_and_world_size()
        >>> 0 <= rank < world_size
        True
    """
    if not os.environ.keys() & {"RANK", "WORLD_SIZE"}:
        return 0, 1
    if missing := [name for name in LAUNCHER_VARIABLES if not os.environ.get(name)]:
        given = [f"{name}={os.environ[name]}" for name in LAUNCHER_VARIABLES[:2] if os.environ.get(name)]
        raise ValueError(
            f"the environment has {' and '.join(given) or 'an empty RANK or WORLD_SIZE'} but not {', '.join(missing)}; "
            "start several processes with torchrun, or unset RANK and WORLD_SIZE"
        )
    world_size = _variable("WORLD_SIZE", 1)
    local_size = _variable("LOCAL_WORLD_SIZE", 1, world_size) if "LOCAL_WORLD_SIZE" in os.environ else world_size
    _variable("LOCAL_RANK", 0, local_size - 1)
    _variable("MASTER_PORT", 0, 65535)
    return _variable("RANK", 0, world_size - 1), world_size


def job_name() -> str:
    """Return a name that the processes of one launcher share, and those of another do not; empty without a launcher.

    Example:
        >>> job_name()
        ''
    """
    _, world_size = rank_and_world_size()
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    return f"{address}:{port} {world_size}" if world_size > 1 else ""


def local_device(device: str) -> str:
    """Return the name of this process's device: with `auto` or `cuda` under a launcher, GPU number `LOCAL_RANK`.

    Args:
        device: a device's name.

    Returns:
        `cuda:0`, `cuda:1`, ...; `device` itself for other names, without a GPU and without a launcher.

    Example:
        >>> local_device("cpu")
        'cpu'
    """
    if device not in ("auto", "cuda") or rank_and_world_size()[1] == 1:
        return device
    import torch

    gpus = torch.cuda.device_count()
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % gpus}" if gpus else device


@contextmanager
def init() -> Iterator[ProcessGroup]:
    """Join the launcher's processes for the duration of a `with` block.

    Yields:
        The group of all processes; `SINGLE_PROCESS` without a launcher.

    Example:
        >>> with init() as group:
        ...     group.broadcast("a")
        'a'
    """
    rank, size = rank_and_world_size()
    if size == 1:
        yield SINGLE_PROCESS
        return
    import torch.distributed

    torch.distributed.init_process_group("gloo")
    try:
        yield ProcessGroup(rank, size)
    finally:
        torch.distributed.destroy_process_group()


def _variable(name: str, minimum: int, maximum: int | None = None) -> int:
    """Return the value of a variable of the environment, which must be an integer within bounds."""
    text = os.environ[name].strip()
    is_number = re.fullmatch(r"-?[0-9]{1,18}", text) is not None
    return integer(f"the environment variable {name}", int(text) if is_number else text, minimum, maximum)
