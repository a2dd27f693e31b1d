"""`ddim train`: train a model on images."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddim.cli import options
from ddim.extras import require

if TYPE_CHECKING:
    from ddim.training.costs import RunCosts

REQUIRED_MODULES = (
    "accelerate",
    "datasets",
    "matplotlib",
    "psutil",
    "pydantic",
    "sklearn",
    "torchmetrics",
    "yaml",
)
"""Modules that come with `ddim[train]`; some are imported only when the run ends."""


def train(
    out: Annotated[str | None, typer.Option(help="Folder of the run; the result is its subfolder final.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder of images or parquet files, a .parquet or .npz file, the id of a data set on the hub, or "
            "digits; defaults to the preset's."
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Start from settings that come with the package.")] = None,
    config: Annotated[str | None, typer.Option(help="A YAML file with settings.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, such as optim.lr=2e-4; can be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, data order, timesteps and noise.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Number of steps after which the run ends.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step, over all processes.")] = None,
    tracker: Annotated[
        str | None,
        typer.Option(
            help="Where metrics and samples are logged as well: tensorboard, wandb and mlflow, separated by commas, or "
            "none; defaults to tensorboard."
        ),
    ] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    resume: Annotated[
        str,
        typer.Option(
            help="auto resumes the run in --out; never requires an empty folder; or the folder of a checkpoint."
        ),
    ] = "auto",
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop after this time; the same command resumes from there.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Publish the result on the Hugging Face hub under this id, owner/name.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Take a few steps, report what the run would cost, write nothing.")
    ] = False,
    list_presets: Annotated[bool, typer.Option("--list-presets", help="List the presets and exit.")] = False,
    device: options.Device = "auto",
) -> None:
    """Train a model with the DDPM objective. The same command resumes from the last checkpoint.

    The path of the trained pipeline is printed. Several processes and machines train together when the command is
    started by `accelerate launch -m ddim train ...` or `torchrun --nproc-per-node 8 -m ddim train ...`.

    Examples:
      ddim train --preset digits --out runs/digits

      ddim train --preset mnist --data mnist/train.parquet --out runs/mnist

      ddim train --config mine.yaml --data images/ --out runs/mine --set optim.lr=1e-4
    """
    if out is None and not dry_run and not list_presets:
        raise typer.BadParameter("give a folder for the run, such as --out runs/mine", param_hint="--out")
    if max_minutes is not None and not max_minutes > 0:
        raise typer.BadParameter(f"must be positive, got {max_minutes:g}", param_hint="--max-minutes")
    require("training", *REQUIRED_MODULES)
    from accelerate import PartialState

    from ddim.io.hub import check_hub_id, push_folder
    from ddim.training.config import load_config
    from ddim.training.costs import estimate_costs, preset_table
    from ddim.training.run import train as run

    if list_presets:
        print(preset_table())
        return
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise NotADirectoryError(f"{out} is a file, not a folder")
    overrides: dict[str, Any] = {
        "data.source": data,
        "seed": seed,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "checkpoints.every": checkpoint_every,
        "trackers": None if tracker is None else parse_trackers(tracker),
    }
    resolved = load_config(preset, None if config is None else Path(config), settings or (), overrides)
    if any(resolved.model.get(name) is not None for name in ("class_embed_type", "num_class_embeds")):
        raise ValueError("model.class_embed_type and model.num_class_embeds must be null: training is unconditional")
    if out is None or dry_run:
        print(_cost_table(estimate_costs(resolved, device)))
        return
    if push_to_hub is not None:
        check_hub_id(push_to_hub)
    logging.getLogger("ddim.training").setLevel(logging.INFO)
    resume_from: Any = resume if resume in ("auto", "never") else Path(resume)
    final = run(resolved, Path(out), device, resume_from, max_minutes)
    if not PartialState().is_main_process:
        return
    if push_to_hub is not None:
        address = push_folder(
            lambda folder: shutil.copytree(final, folder, dirs_exist_ok=True),
            push_to_hub,
            None,
            None,
            "Upload the result of a training run",
        )
        print(f"published: {address}", file=sys.stderr)
    print(final)


def parse_trackers(text: str) -> list[str]:
    """Parse the value of `--tracker`.

    Args:
        text: names separated by commas, or `none`.

    Example:
        >>> parse_trackers("wandb, mlflow"), parse_trackers("none")
        (['wandb', 'mlflow'], [])
    """
    return [] if text == "none" else [name.strip() for name in text.split(",")]


def _cost_table(costs: RunCosts) -> str:
    """Format the costs, one line each."""
    rows = {
        "images": f"{costs.images:,}",
        "parameters": f"{costs.parameters:,}",
        "GFLOP per step": f"{costs.gflop_per_step:,.1f}",
        "weights, averages, gradients, moments": f"{costs.state_mib:,.0f} MiB",
        "memory in use": f"{costs.peak_mib:,.0f} MiB",
        "loader": f"{costs.loader_images_per_second:,.0f} images/s",
        "time per step": f"{costs.seconds_per_step:.3f} s",
        "time of all steps": f"{costs.hours:,.1f} h",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
