"""What the processor has: its vector registers, and how LLVM is to compile for it."""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm

HAS_AVX512 = bool(llvm.get_host_cpu_features().get("avx512f"))
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
    """Return LLVM's target machine for this processor, with all of its features.

    Returns:
        An `llvmlite.binding.TargetMachine`.

    Example:
        >>> bool(target_machine().triple)
        True
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        codemodel="jitdefault",
        jit=True,
    )


def describe_machine() -> str:
    """Return a text that changes with LLVM's version and the processor, on which object code depends.

    Example:
        >>> describe_machine() == describe_machine()
        True
    """
    features = llvm.get_host_cpu_features().flatten()
    return f"{llvm.llvm_version_info} {llvm.get_host_cpu_name()} {features}"
