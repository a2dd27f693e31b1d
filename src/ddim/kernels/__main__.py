"""Compile kernels into the cache: `python -m ddim.kernels norm.normalize winograd.convolve`."""

import importlib
import sys

from ddim.kernels.runtime import compile_code, kernel_cache

for name in sys.argv[1:]:
    module = importlib.import_module(f"ddim.kernels.{name.partition('.')[0]}")
    kernel = next(kernel for kernel in module.KERNELS if kernel.name == name)
    if not kernel_cache().exists(kernel.entry):
        compile_code(kernel)
