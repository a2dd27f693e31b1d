"""What the processor has: its vector registers, and how LLVM is to compile for it.

Nearly all x86-64 processors have one of two sets of instructions, the levels of `LEVELS`. Kernels are compiled for a
level instead of for a processor: code for both comes with the package (`ddim.kernels.shipped`), and equal code runs on
all machines of a level. Other processors get code of their own, compiled on first use.

LLVM takes 40 MiB of a process, and is loaded only where something has to be compiled.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

LEVELS = {
    "x86-64-v4": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    "x86-64-v3": ("avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"),
}
"""Levels of the x86-64 psABI, the highest first, and what each requires beside the next, as Linux names it."""
LEVEL_VARIABLE = "DDIM_KERNEL_LEVEL"
"""Names a level lower than the processor's, to run its kernels, or any, to compile for it."""
# LLVM uses registers of 512 bits for code that was written for them, whatever it prefers for its own loops.
LEVEL_FEATURES = {"x86-64-v4": "-prefer-256-bit", "x86-64-v3": ""}


def read_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return what the processor has, as Linux names it; nothing on other systems.

    Args:
        cpuinfo: the file that tells.
    """
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def choose_level(system: str, flags: Collection[str], given: str | None = None) -> str | None:
    """Return the level that kernels are compiled for.

    Args:
        system: as `sys.platform`; code that comes with the package is for Linux.
        flags: of the processor, as `read_flags` returns them.
        given: the level that a user chose, if any.

    Returns:
        A name of `LEVELS`; `None` where the processor or the system has none.

    Raises:
        ValueError: if `given` is something else.

    Example:
        >>> choose_level("linux", {"avx2", "fma"})  # incomplete
        >>> choose_level("linux", {}, "x86-64-v3")
        'x86-64-v3'
    """
    if given is not None and given not in LEVELS:
        raise ValueError(f"{LEVEL_VARIABLE} must be one of {', '.join(LEVELS)}, got {given!r}")
    if system != "linux":
        return None
    has = [all(name in flags for name in required) for required in LEVELS.values()]
    # A level includes those below it.
    complete = [all(has[index:]) for index in range(len(has))]
    return given or next((level for level, found in zip(LEVELS, complete, strict=True) if found), None)


def _host_features() -> Any:
    """Return the processor's features as LLVM knows them, a dictionary of booleans."""
    import llvmlite.binding as llvm

    return llvm.get_host_cpu_features()


LEVEL = choose_level(sys.platform, read_flags(), os.environ.get(LEVEL_VARIABLE) or None)
"""The level that this process's kernels are compiled for."""

HAS_AVX512 = LEVEL == "x86-64-v4" if LEVEL else bool(_host_features().get("avx512f"))
"""Whether there are 32 vector registers of 16 float32 numbers each, not 16 of 8."""

# Output channels that a product of matrices computes side by side: two registers of them. Weights are stored in
# panels of so many output channels.
OUTPUT_LANES = 32 if HAS_AVX512 else 16

# Rows (tiles or pixels) whose sums over a panel of output channels stay in registers.
#
# The budget: 9 rows of 2 registers are 18 accumulators, with 2 for the weights 20 of 32; 6 rows are 12 accumulators,
# with 2 for the weights and 1 for the number they are multiplied by 15 of 16. At least 8 accumulators are needed: two
# units start one fused multiply-add per cycle each, and its result takes four cycles.
REGISTER_ROWS = 9 if HAS_AVX512 else 6

CACHE_LINE_BYTES = 64
CACHE_LINE_FLOATS = CACHE_LINE_BYTES // 4

THREAD_SYMBOL, THREAD_COUNT_SYMBOL = "omp_get_thread_num", "omp_get_num_threads"
"""What kernels call for the number of the thread that runs them, and for the number of threads."""


def target_machine() -> Any:
    """Return LLVM's target machine for `LEVEL`, or else for this processor with all of its features.

    Code for a level can be linked to a shared library, other code only be loaded by LLVM.

    Returns:
        An `llvmlite.binding.TargetMachine`.

    Example:
        >>> bool(target_machine().triple)
        True
    """
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    if LEVEL:
        features = LEVEL_FEATURES[LEVEL]
        return target.create_target_machine(cpu=LEVEL, features=features, opt=3, reloc="pic", codemodel="small")
    features = _host_features().flatten()
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3, codemodel="jitdefault", jit=True
    )


def describe_machine() -> str:
    """Return a text that changes with LLVM's version and the target machine, on which object code depends.

    Example:
        >>> describe_machine() == describe_machine()
        True
    """
    import llvmlite.binding as llvm

    return f"{llvm.llvm_version_info} {LEVEL or f'{llvm.get_host_cpu_name()} {_host_features().flatten()}'}"
