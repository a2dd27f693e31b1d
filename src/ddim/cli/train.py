"""`ddim train`: train a model from images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ddim.cli import options


def train(
    data: Annotated[str, typer.Option(help="A folder of images, or a parquet file with a column of them.")],
    out: Annotated[Path, typer.Option(help="The run's folder; the result is its subfolder final.")],
    preset: Annotated[
        str | None, typer.Option(help="Start from settings that ship with the package, such as mnist.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file with settings.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, such as optim.lr=2e-4; may be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, data order, timesteps and noise.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Where the run ends.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a step.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    resume: Annotated[
        Literal["auto", "never"], typer.Option(help="auto goes on with the run in --out; never wants an empty folder.")
    ] = "auto",
    device: options.Device = "auto",
) -> None:
    """Train a model with the DDPM objective. Stopped and started again, it goes on from its last checkpoint.

    The path of the finished pipeline is printed.

    Examples:

      ddim train --preset mnist --data mnist/train.parquet --out runs/mnist

      ddim train --config mine.yaml --data pictures/ --out runs/mine --set optim.lr=1e-4
    """
    try:
        from ddim.training.config import load_config
        from ddim.training.run import train as run
    except ModuleNotFoundError as error:
        raise RuntimeError(f"training needs {error.name}; install it with: pip install 'ddim[train]'") from None
    from ddim.devices import choose_device

    overrides = {
        "data": data,
        "seed": seed,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "checkpoint_every": checkpoint_every,
    }
    print(run(load_config(preset, config, settings or (), overrides), out, choose_device(device), resume == "auto"))
