"""The server and the `ddim` commands that all tests of the page share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from app_server import AppServer
from cli_batch import exit_code
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel
from digits import TINY_MODEL


def save_color_model(folder: Path) -> None:
    """A model of 32x32 color images and 50 timesteps with random weights."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    )
    DDIMPipeline(unet, DDIMScheduler(num_train_timesteps=50)).save_pretrained(folder)


def save_tiny_model(folder: Path) -> None:
    """A model of 8x8 gray images of two classes and 200 timesteps, whose images are inverted in few evaluations."""
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY_MODEL, num_class_embeds=3, class_names=("cat", "dog"), has_null_class=True)
    unet.conv_out.weight.data.mul_(0.1)
    DDIMPipeline(unet, DDIMScheduler(num_train_timesteps=200)).save_pretrained(folder)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    """`ddim app mnist color tiny`."""
    folder = tmp_path_factory.mktemp("app")
    save_color_model(folder / "color")
    save_tiny_model(folder / "tiny")
    with AppServer(folder, "mnist", "color", "tiny") as server:
        yield server


@pytest.fixture(scope="session")
def mnist() -> DDIMPipeline:
    """The built-in model in this process."""
    pipe = DDIMPipeline.from_pretrained("mnist")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny(server: AppServer) -> DDIMPipeline:
    """The model `tiny` in this process."""
    pipe = DDIMPipeline.from_pretrained(server.folder / "tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def run_command(server: AppServer) -> Callable[[list[str]], Path]:
    """`run_command(arguments)`: runs `ddim` in this process and the server's folder; returns the path after `--out`."""

    def run(arguments: list[str]) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            # On the device of the server, which sees no other.
            patch.setattr(sys, "argv", ["ddim", *arguments, "--device", "cpu"])
            patch.chdir(server.folder)
            assert exit_code() == 0
        return server.folder / arguments[arguments.index("--out") + 1]

    return run
