"""What a machine offers a run: its device, cores, memory, and whether it computes in bfloat16 at full speed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Limit and use of a container's memory in bytes, as versions 2 and 1 of control groups report them."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Data types of autocast, by the names of configurations."""
BF16_CPU_FLAGS = ("avx512_bf16", "amx_bf16")
BF16_CAPABILITY = (8, 0)
FP16_CAPABILITY = (7, 0)
"""The first compute capabilities of NVIDIA GPUs with matrix units for these precisions."""


class Machine(NamedTuple):
    """What a run has to work with.

    Attributes:
        device: the type of the device: `cpu`, `cuda`, `mps`, ...
        name: of the GPU; empty for a CPU.
        cores: CPU cores that this process may use.
        free_bytes: memory that is free, of the GPU or of the CPU.
        fast_precisions: the 16-bit precisions that it has instructions for: `bf16`, `fp16`.

    Example:
        >>> Machine("cpu", "", 2, 2**33, ()).cores
        2
    """

    device: str
    name: str
    cores: int
    free_bytes: int
    fast_precisions: tuple[str, ...]

    @property
    def is_cpu(self) -> bool:
        """Whether the network runs on the CPU."""
        return self.device == "cpu"


def inspect_machine(device: torch.device) -> Machine:
    """Look at what a device and its host offer.

    Args:
        device: the device to train on.

    Returns:
        What they offer at this moment.

    Example:
        >>> inspect_machine(torch.device("cpu")).cores >= 1
        True
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        capability = torch.cuda.get_device_capability(device)
        minima = {"bf16": BF16_CAPABILITY, "fp16": FP16_CAPABILITY}
        fast = tuple(name for name, minimum in minima.items() if capability >= minimum)
        return Machine("cuda", torch.cuda.get_device_name(device), cores, free, fast)
    fast = ("bf16",) if device.type == "cpu" and _cpu_flags().intersection(BF16_CPU_FLAGS) else ()
    return Machine(device.type, "", cores, free_memory(), fast)


def is_emulated(precision: str, device: torch.device) -> bool:
    """Return whether a CPU has no instructions for a precision and converts to float32 and back, which takes longer.

    Args:
        precision: `fp32`, `bf16` or `fp16`.
        device: the device to train on.

    Example:
        >>> is_emulated("fp32", torch.device("cpu"))
        False
    """
    return device.type == "cpu" and precision != "fp32" and precision not in inspect_machine(device).fast_precisions


def free_memory() -> int:
    """Return the bytes of memory that this process may still allocate, in a container with a limit as well.

    Example:
        >>> free_memory() > 0
        True
    """
    free = int(psutil.virtual_memory().available)
    for limit_file, use_file in CGROUP_FILES:
        try:
            limit, used = (int(Path(file).read_text()) for file in (limit_file, use_file))
        except (OSError, ValueError):  # no such file, or "max" for no limit
            continue
        free = min(free, max(0, limit - used))
    return free


def _cpu_flags() -> set[str]:
    """Return the names of the processor's extensions, as Linux lists them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())
