"""What several test files share: seeded noise, errors, a reference schedule, comparisons, and the `ddim` command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALPHAS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
"""Cumulative products of the default linear schedule, float64 (1000,), computed here independently of the package."""

BIN = Path(sys.executable).parent
"""The folder of installed commands, such as `ddim` and `torchrun`."""


def seeded(seed: int = 0) -> torch.Generator:
    """A CPU generator."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard Gaussian noise on the CPU."""
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def error(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference of two tensors, in float64."""
    return float((a.double() - b.double()).abs().max())


def relative_error(a: Tensor, b: Tensor) -> float:
    """`error`, relative to the largest entry of `b`, or to 1 where that is smaller."""
    return error(a, b) / max(1.0, float(b.double().abs().max()))


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two mappings, such as state dicts, hold the same tensors to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def file_names(folder: Path) -> list[str]:
    """The names in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def environment(home: Path, **variables: str) -> dict[str, str]:
    """The environment of a subprocess: one thread, and caches below `home` instead of the user's."""
    caches = {"HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home / "cache")}
    return os.environ | {"OMP_NUM_THREADS": "1"} | caches | variables


def run_cli(
    *arguments: str | Path, env: Mapping[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `ddim` with arguments, and capture its output."""
    command = [str(BIN / "ddim"), *map(str, arguments)]
    return subprocess.run(command, env=dict(env), cwd=cwd, capture_output=True, text=True, timeout=180)


def messages(stderr: str) -> list[str]:
    """The lines on stderr that are messages of `ddim` rather than progress bars."""
    return [line for line in stderr.replace("\r", "\n").splitlines() if line.startswith("ddim: ")]
