"""Compile loops and keep them: `python -m ddim.kernels.source norm.normalise winograd.convolve`."""

import importlib
import sys

for name in sys.argv[1:]:
    module = importlib.import_module(f"ddim.kernels.{name.partition('.')[0]}")
    loop = next(loop for loop in module.LOOPS if f"{loop.source}.{loop.name}" == name)
    loop.address  # noqa: B018 - compiles
