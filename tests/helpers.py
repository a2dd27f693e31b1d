"""Shared test helpers: seeded tensors, error measures, a reference schedule, comparisons, environments.

Run tests with OMP_NUM_THREADS=1: on a loaded machine, more threads make encoding and reconstruction many times slower.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALPHAS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
"""Cumulative alphas of the default linear schedule, float64 (1000,), computed independently of the package."""

BIN = Path(sys.executable).parent
"""The folder of installed commands, such as `ddim` and `torchrun`."""


def seeded(seed: int = 0) -> torch.Generator:
    """Return a CPU generator with a seed."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw standard Gaussian noise on the CPU."""
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw uniform samples in [-1, 1] on the CPU, the range of images."""
    return torch.rand(shape, generator=seeded(seed), dtype=dtype) * 2 - 1


def error(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference of two tensors, in float64."""
    return float((a.double() - b.double()).abs().max())


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return `error` relative to the largest absolute entry of `b`, or to 1 where that is smaller."""
    return error(a, b) / max(1.0, float(b.double().abs().max()))


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Return whether two mappings, such as state dicts, hold bitwise equal tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a configuration that are arguments, not notes about the file."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def file_names(folder: Path) -> list[str]:
    """Return the sorted names in a folder."""
    return sorted(path.name for path in folder.iterdir())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Parse the lines of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def environment(home: Path, **variables: str) -> dict[str, str]:
    """Return a subprocess environment with one thread, and with caches below `home` instead of the user's."""
    caches = {"HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home / "cache")}
    return os.environ | {"OMP_NUM_THREADS": "1"} | caches | variables


def messages(stderr: str) -> list[str]:
    """Return the lines of stderr that are messages of `ddim` rather than progress bars."""
    return [line for line in stderr.replace("\r", "\n").splitlines() if line.startswith("ddim: ")]


def matches(text: str, expected: str) -> bool:
    """Return whether a message contains an expectation, in which " ... " stands for any text."""
    return re.search(".*".join(map(re.escape, expected.split(" ... "))), text) is not None
