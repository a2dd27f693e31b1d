"""What all workers import, once: they are forked from a process that has imported this module.

One thread: networks this small are slower with more, and equal inputs must give equal bytes.
"""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Kernels are compiled once, by whichever process needs them first.
os.environ.setdefault("DDIM_KERNEL_CACHE", str(Path(__file__).parents[2] / ".pytest_cache" / "kernels"))

import datasets  # noqa: F401
import diffusers
import pydantic  # noqa: F401
import torch

import ddim
import ddim.cli
import ddim.convert
import ddim.pipeline  # noqa: F401

torch.set_num_threads(1)
# Imported lazily; workers would each do so.
_ = diffusers.UNet2DModel, diffusers.DDIMScheduler
