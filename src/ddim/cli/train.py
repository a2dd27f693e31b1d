"""`ddim train`: train a model on images."""

from __future__ import annotations

import logging
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ddim.cli import options
from ddim.extras import require
from ddim.validation import shown

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
    labels: Annotated[
        str | None,
        typer.Option(
            help="Classes to train with: auto uses the column label or class folders; a column or array, or an entry "
            "of metadata.jsonl; defaults to none, which trains without."
        ),
    ] = None,
    process: Annotated[
        str | None,
        typer.Option(
            help="gaussian noise, or discrete values, 2 of them or --set scheduler.num_values=K; defaults to gaussian."
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Start from settings that come with the package.")] = None,
    config: Annotated[str | None, typer.Option(help="A YAML file with settings, or RUN/config.yaml.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, such as optim.lr=2e-4; can be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, data order, timesteps and noise.")] = None,
    init: Annotated[
        str | None,
        typer.Option(help="Start from the weights of a model: built in, a run, a folder or a hub id."),
    ] = None,
    resolution: Annotated[
        str | None,
        typer.Option(help="Height and width that images are fitted to, in pixels: 64, or 48x64 for 48 rows of 64."),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Number of steps after which the run ends.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Visits of every image after which the run ends, instead of --max-steps.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step, over all processes.")] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Passes that each batch is divided into, to save memory.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16 of the network's operations.")] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Save memory by computing residual blocks twice.",
        ),
    ] = None,
    compile_network: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="Compile the network by torch.compile, which takes minutes; for GPUs."
        ),
    ] = None,
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
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all settings as YAML for --config, with comments, and exit.")
    ] = False,
    list_presets: Annotated[bool, typer.Option("--list-presets", help="List the presets and exit.")] = False,
    device: options.Device = "auto",
) -> None:
    """Train a model on your images. The same command resumes from the last checkpoint, and so does --out RUN alone.

    Without a preset or a network in --config, everything is chosen from the images and the machine and shown first;
    each option and --set overrides it.

    The path of the trained pipeline is printed. Several processes and machines train together when the command is
    started by `accelerate launch -m ddim train ...` or `torchrun --nproc-per-node 8 -m ddim train ...`.

    Examples:
      ddim train --data pics/ --out runs/pics

      ddim train --preset mnist --data mnist/train.parquet --out runs/mnist

      ddim train --init mnist --data pics/ --out runs/fine-tuned

      ddim train --data pets/ --labels auto --out runs/pets

      ddim train --config mine.yaml --data images/ --out runs/mine --set optim.lr=1e-4
    """
    if out is None and not (dry_run or print_config or list_presets):
        raise typer.BadParameter("give a folder for the run, such as --out runs/mine", param_hint="--out")
    if max_minutes is not None and not max_minutes > 0:
        raise typer.BadParameter(f"must be positive, got {max_minutes:g}", param_hint="--max-minutes")
    require("training", *REQUIRED_MODULES)
    from ddim.cli.train_tables import cost_table, plan_table
    from ddim.distributed import rank_and_world_size
    from ddim.io.hub import check_hub_id, push_folder
    from ddim.training.config import check_incomplete, merge_config, validate
    from ddim.training.costs import estimate_costs, preset_table
    from ddim.training.plan import configure
    from ddim.training.reference import commented_yaml
    from ddim.training.run import BatchSizeError
    from ddim.training.run import train as run

    if list_presets:
        print(preset_table())
        return
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise NotADirectoryError(f"{out} is a file, not a folder")
    overrides: dict[str, Any] = {
        "data.source": data,
        "data.labels": labels,
        "process": process,
        "init": init,
        "model.sample_size": None if resolution is None else parse_resolution(resolution),
        "seed": seed,
        "max_steps": max_steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "optim.accumulate": accumulate,
        "precision": precision,
        "gradient_checkpointing": gradient_checkpointing,
        "compile": compile_network,
        "checkpoints.every": checkpoint_every,
        "trackers": None if tracker is None else parse_trackers(tracker),
    }
    parts: Any = (None if config is None else Path(config), settings or (), overrides)
    tree = merge_config(preset, *parts)
    if print_config:
        check_incomplete(tree)
        print(commented_yaml(tree), end="")
        return
    if push_to_hub is not None:
        check_hub_id(push_to_hub)
    logging.getLogger("ddim.training").setLevel(logging.INFO)
    resume_from: Any = resume if resume in ("auto", "never") else Path(resume)
    plan = None
    if preset is None:
        run_folder = None if out is None else Path(out)
        resolved, plan = configure(tree, run_folder, device, resume_from, max_minutes)
    else:
        resolved = validate(tree)
    # Not by accelerate, whose first state decides the device of all later ones.
    is_main = rank_and_world_size()[0] == 0
    if plan is not None and is_main:
        print(plan_table(plan), file=sys.stderr)
    try:
        if out is None or dry_run:
            costs = estimate_costs(resolved, device) if plan is None else plan.costs
            if is_main:
                print(cost_table(costs))
            return
        final = run(resolved, Path(out), device, resume_from, max_minutes)
    except BatchSizeError as error:
        if "batch_size" in merge_config(None, *parts):
            raise
        origin = f"the preset {preset}" if preset is not None else "the default"
        raise ValueError(f"{error} of {origin}; give batch_size={error.largest} or less") from None
    if not is_main:
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


def parse_resolution(text: str) -> int | list[int]:
    """Parse the value of `--resolution`.

    Args:
        text: one number for squares, or height and width.

    Returns:
        The number, or [height, width].

    Raises:
        ValueError: for anything else.

    Example:
        >>> parse_resolution("64"), parse_resolution("48x64")
        (64, [48, 64])
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text, re.ASCII)
    if match is None:
        raise ValueError(f"--resolution must be a number of pixels, or HEIGHTxWIDTH such as 48x64, got {shown(text)}")
    height, width = match.groups()
    return int(height) if width is None else [int(height), int(width)]


def parse_trackers(text: str) -> list[str]:
    """Parse the value of `--tracker`.

    Args:
        text: names separated by commas, or `none`.

    Example:
        >>> parse_trackers("wandb, mlflow"), parse_trackers("none")
        (['wandb', 'mlflow'], [])
    """
    return [] if text == "none" else [name.strip() for name in text.split(",")]
