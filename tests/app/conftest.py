"""The server, the browser and the process of `ddim` commands that all tests of the page share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app_server import AppServer
from cli_batch import Commands, Result
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel


def save_color_model(folder: Path) -> None:
    """A model of 64x64 color images and 100 timesteps with random weights."""
    unet = UNet2DModel(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    )
    DDIMPipeline(unet, DDIMScheduler(num_train_timesteps=100)).save_pretrained(folder)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    """`ddim app mnist color`."""
    folder = tmp_path_factory.mktemp("app")
    save_color_model(folder / "color")
    with AppServer(folder, "mnist", "color") as server:
        yield server


@pytest.fixture(scope="session")
def mnist() -> DDIMPipeline:
    """The built-in model in this process."""
    pipe = DDIMPipeline.from_pretrained("mnist")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def run_command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[list[str]], Path]]:
    """`run_command(arguments)`: runs `ddim` in one process, and returns the path after `--out`."""
    folder = tmp_path_factory.mktemp("commands")
    table: dict[str, list[str]] = {}
    with Commands(folder, table) as commands:

        def run(arguments: list[str]) -> Path:
            name = f"{len(table)}"
            table[name] = arguments
            result: Result = commands[name]
            assert result.code == 0, result.stderr
            return folder / arguments[arguments.index("--out") + 1]

        yield run
