"""`ddim distill`: students of a model that sample in one to four steps."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ddim.cli import options
from ddim.cli.common import choose_model, parse_integers
from ddim.cli.train import REQUIRED_MODULES
from ddim.extras import require


def distill(
    model: options.ModelArgument = None,
    *,
    out: Annotated[
        str,
        typer.Option(
            "--out", "-o", help="Folder for the students, OUT/4 and so on, and their runs.", show_default=False
        ),
    ],
    model_option: options.ModelOption = None,
    weights: options.Weights = None,
    steps: Annotated[
        str, typer.Option(help="Numbers of steps, such as 4 or 4,2,1; each divides the one before.")
    ] = "4",
    data: Annotated[
        str | None,
        typer.Option(
            help="Images of the kind that the model generates, as for ddim train; defaults to the model's own samples."
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            "--count",
            "-n",
            help="Number of the model's own samples, where no --data is given; defaults to 4096, and with "
            "--max-minutes to as many as a fifth of the time allows.",
        ),
    ] = None,
    teacher_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of the model that the first student does at once; defaults to 32, or the multiple of its steps "
            "below."
        ),
    ] = None,
    starts: Annotated[
        str | None,
        typer.Option(
            help="Timesteps of the model where the steps of the first student start, such as 999,749,499,249.",
        ),
    ] = None,
    guidance: Annotated[
        float,
        typer.Option(
            help="Guidance of a model with classes, which the students then have without any: they cost half as much "
            "per step."
        ),
    ] = 1.0,
    direct: Annotated[
        bool,
        typer.Option("--direct", help="Distill every student from the model itself, not from the student before it."),
    ] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, such as optim.lr=2e-4; can be repeated.")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Training steps per student; defaults to 8000, and 4000 for further ones.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per training step.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16 of the networks' operations.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of data order and noise.")] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            help="Stop after this time; the same command resumes. Without --max-steps all students are planned to fit "
            "into it."
        ),
    ] = None,
    device: options.Device = "auto",
) -> None:
    """Distill a model into students that sample in few steps. The same command resumes.

    A student of S steps learns to take several steps of the model in one; each further one does as many steps of the
    student before it at once. The folders of the students are printed; ddim and diffusers sample from them in S steps.

    Examples:
      ddim distill mnist --steps 4 --out mnist-fast

      ddim distill runs/faces --steps 4,2,1 --data faces/ --out faces-fast --max-minutes 60

      ddim distill mnist-labels --guidance 1.2 --steps 4 --out labels-fast

      ddim sample --model mnist-fast/4 --steps 4
    """
    name = choose_model(model, model_option, weights=weights)
    counts = parse_integers(steps, "--steps", "4,2,1")
    if max_minutes is not None and not max_minutes > 0:
        raise typer.BadParameter(f"must be positive, got {max_minutes:g}", param_hint="--max-minutes")
    if Path(out).exists() and not Path(out).is_dir():
        raise NotADirectoryError(f"{out} is a file, not a folder")
    require("distillation", *REQUIRED_MODULES)
    from ddim.distillation import distill as run

    logging.getLogger("ddim.training").setLevel(logging.INFO)
    overrides: dict[str, Any] = {
        "max_steps": max_steps,
        "batch_size": batch_size,
        "precision": precision,
        "seed": seed,
    }
    folders = run(
        name,
        out,
        counts,
        data,
        count=count,
        teacher_steps=teacher_steps,
        starts=None if starts is None else parse_integers(starts, "--starts", "999,749,499,249"),
        guidance_scale=guidance,
        direct=direct,
        settings=settings or (),
        overrides=overrides,
        max_minutes=max_minutes,
        device=device,
    )
    if len(folders) < len(counts):
        print(f"{len(folders)} of {len(counts)} students are complete; run again to resume", file=sys.stderr)
    for folder in folders:
        print(folder)
