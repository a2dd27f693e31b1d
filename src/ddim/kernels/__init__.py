"""Compiled kernels over float32 feature maps in channels_last, on PyTorch's own CPU threads.

    machine     what the processor has: vector registers, lanes, LLVM's target
    record      the fields of the record that a kernel takes
    runtime     `Kernel`: compile once per machine, load, run on PyTorch's OpenMP pool
    compiler    from a Python function to object code, by numba and LLVM
    codegen     what kernels are written with: vector code, memory, threads
    norm, winograd, direct, conv_grad
                one folder per kernel: what Python calls in `__init__`, what numba compiles in `source`
    shipped     compiled code that comes with the package

Only `runtime`, by name, imports `compiler` and the sources, and only where something has to be compiled: what comes
with the package runs without numba and llvmlite.
"""
