"""Shared configuration and fixtures: one thread, small models, a hub client."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel
from hub_client import client as start_client
from hub_server import Hub

TINY: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


# Threads slow networks this small down, a hundredfold on a loaded machine; encoding and reconstruction suffer most.
# A single thread also fixes the order of sums, so that every process computes equal results. Parallelism is per test.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Kernels are compiled once, instead of by each process with a separate cache folder.
os.environ.setdefault("DDIM_KERNEL_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / "kernels"))


SLOW = (
    *("endpoints", "page", "bulk", "cli", "cli_latents", "convert", "clients", "differences", "paper_tables", "report"),
    *("modules", "checkpoint", "interruption", "learning", "processes", "run", "trainer", "compat", "docs"),
    "notebooks",
)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile all kernels before workers start, of which each would compile them for itself."""
    if session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput"):
        # Without numba, networks run on PyTorch's operators.
        with contextlib.suppress(ImportError):
            from ddim.kernels import conv_grad, direct, norm, winograd
            from ddim.kernels.runtime import ensure_compiled

            packages = (norm, conv_grad, winograd, direct)
            ensure_compiled(*(kernel for package in packages for kernel in package.KERNELS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files that take minutes first, so that none of them is left running alone at the end."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in SLOW)


@pytest.fixture(scope="session")
def make_unet() -> Callable[..., UNet2DModel]:
    """Return `make_unet(**changes)`: a U-Net of 30 000 parameters, whose weights depend only on its configuration.

    Its predictions are small: x hardly changes per step, so that sampling does not amplify float32 rounding, as other
    random networks do.
    """

    def make(**changes: Any) -> UNet2DModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = UNet2DModel(**TINY | changes).eval()
        with torch.no_grad():
            unet.conv_out.weight.mul_(0.1)
        return unet

    return make


@pytest.fixture
def tiny_unet(make_unet: Callable[..., UNet2DModel]) -> UNet2DModel:
    """Build a new network per test, with the same weights in all of them."""
    return make_unet()


@pytest.fixture
def tiny_pipeline(tiny_unet: UNet2DModel) -> DDIMPipeline:
    """Build a pipeline of `tiny_unet` and the default scheduler, without a progress bar."""
    pipe = DDIMPipeline(tiny_unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def saved_pipeline(make_unet: Callable[..., UNet2DModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save `tiny_pipeline` once and return its folder; tests copy it and must not change it."""
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    DDIMPipeline(make_unet(), DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the client's cache and token."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub: Hub, home: Path) -> Iterator[Callable[..., Any]]:
    """Start `client(f, ...)`, which calls `f(...)` in a process whose hub is the `hub` fixture."""
    with start_client(hub.url, home) as call:
        yield call
