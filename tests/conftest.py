"""What several test files share: one thread, small models, a client of a hub."""

from __future__ import annotations

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


# Networks this small lose more than they gain by threads, a hundredfold on a busy machine; and sums in one order are
# equal in every process. It is the tests that run side by side.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Kernels are compiled once, not by each process with a cache folder of its own.
os.environ.setdefault("DDIM_KERNEL_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / "kernels"))


SLOW = ("processes", "interruption", "bulk", "learning", "run", "checkpoint", "evaluation", "convert", "cli_latents")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes first: nobody then waits at the end for one that was begun last."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in SLOW)


@pytest.fixture(scope="session")
def make_unet() -> Callable[..., UNet2DModel]:
    """`make_unet(**changes)`: a U-Net of about 30 000 parameters, with weights that depend on its configuration only.

    Its predictions are small: x then hardly changes from step to step, and float32 rounding is not amplified over a
    whole sampling process, as other random networks do.
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
    """A new network in each test, with the same weights in all of them."""
    return make_unet()


@pytest.fixture
def tiny_pipeline(tiny_unet: UNet2DModel) -> DDIMPipeline:
    """That network with the scheduler's defaults, and no progress bar."""
    pipe = DDIMPipeline(tiny_unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def saved_pipeline(make_unet: Callable[..., UNet2DModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `tiny_pipeline` is saved as; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    DDIMPipeline(make_unet(), DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the client keeps its cache and looks for a token."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub: Hub, home: Path) -> Iterator[Callable[..., Any]]:
    """`client(f, ...)` is `f(...)` in a process whose hub is the `hub` of the test's file."""
    with start_client(hub.url, home) as call:
        yield call
