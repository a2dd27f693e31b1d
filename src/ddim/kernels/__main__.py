"""Compile kernels into the cache: `python -m ddim.kernels norm.normalize winograd.convolve`."""

import importlib
import sys

for name in sys.argv[1:]:
    module = importlib.import_module(f"ddim.kernels.{name.partition('.')[0]}")
    kernel = next(kernel for kernel in module.KERNELS if kernel.name == name)
    # The first look at the address compiles, and keeps the object code.
    kernel.address  # noqa: B018 - compiles
