"""What the kernels' tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import ddim.nn.ops


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """`threads(n)` sets the number of threads, for one test."""
    previous = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(previous)


@pytest.fixture
def disable_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """`disable_kernels()` leaves PyTorch's operators alone."""

    def disable() -> None:
        monkeypatch.setattr(ddim.nn.ops, "load_kernels", lambda name: None)

    return disable
