"""What the processor has: its vector registers, and how LLVM is to compile for it.

Nearly all x86-64 processors have one of two sets of instructions, the levels of `LEVELS`. Kernels are compiled for a
level instead of for a processor: object code for both comes with the package (`ddim.kernels.objects`), and equal code
runs on all machines of a level. Other processors get code of their own, compiled on first use.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import llvmlite.binding as llvm

LEVELS = {
    "x86-64-v4": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    "x86-64-v3": ("avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"),
}
"""Levels of the x86-64 psABI, the highest first, and the features that each requires beside those of the next."""
LEVEL_VARIABLE = "DDIM_KERNEL_LEVEL"
"""Names a level lower than the processor's, to run its kernels, or any, to compile for it."""
# LLVM uses registers of 512 bits for code that was written for them, whatever it prefers for its own loops.
LEVEL_FEATURES = {"x86-64-v4": "-prefer-256-bit", "x86-64-v3": ""}


def choose_level(system: str, features: Mapping[str, bool], given: str | None = None) -> str | None:
    """Return the level that kernels are compiled for.

    Args:
        system: as `sys.platform`; object code for Linux is ELF.
        features: of the processor, as LLVM names them.
        given: the level that a user chose, if any.

    Returns:
        A name of `LEVELS`; `None` where the processor or the system has none.

    Raises:
        ValueError: if `given` is something else.

    Example:
        >>> choose_level("linux", {"avx2": True, "fma": True})  # incomplete
        >>> choose_level("linux", {}, "x86-64-v3")
        'x86-64-v3'
    """
    if given is not None and given not in LEVELS:
        raise ValueError(f"{LEVEL_VARIABLE} must be one of {', '.join(LEVELS)}, got {given!r}")
    if system != "linux":
        return None
    has = [all(features.get(name) for name in required) for required in LEVELS.values()]
    # A level includes those below it.
    complete = [all(has[index:]) for index in range(len(has))]
    return given or next((level for level, found in zip(LEVELS, complete, strict=True) if found), None)


_FEATURES = llvm.get_host_cpu_features()
LEVEL = choose_level(sys.platform, _FEATURES, os.environ.get(LEVEL_VARIABLE) or None)
"""The level that this process's kernels are compiled for."""

HAS_AVX512 = LEVEL == "x86-64-v4" if LEVEL else bool(_FEATURES.get("avx512f"))
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

THREAD_SYMBOL, THREAD_COUNT_SYMBOL = "ddim_thread", "ddim_threads"
"""The names under which kernels call for the number of the thread that runs them, and for the number of threads."""


def target_machine() -> Any:
    """Return LLVM's target machine for `LEVEL`, or else for this processor with all of its features.

    Returns:
        An `llvmlite.binding.TargetMachine`.

    Example:
        >>> bool(target_machine().triple)
        True
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=LEVEL or llvm.get_host_cpu_name(),
        features=LEVEL_FEATURES[LEVEL] if LEVEL else _FEATURES.flatten(),
        opt=3,
        codemodel="jitdefault",
        jit=True,
    )


def describe_machine() -> str:
    """Return a text that changes with LLVM's version and the target machine, on which object code depends.

    Example:
        >>> describe_machine() == describe_machine()
        True
    """
    return f"{llvm.llvm_version_info} {LEVEL or f'{llvm.get_host_cpu_name()} {_FEATURES.flatten()}'}"
