"""What all workers do first: they are forked from the process of `programs.py`, which has imported what most need.

One thread: networks this small are slower with more, and equal inputs must give equal bytes.
"""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Kernels are compiled once, by whichever process needs them first.
os.environ.setdefault("DDIM_KERNEL_CACHE", str(Path(__file__).parents[2] / ".pytest_cache" / "kernels"))

import torch

torch.set_num_threads(1)
