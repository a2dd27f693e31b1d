"""Options that several commands share: one name and one meaning each."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A built-in model (mnist), a folder, or a hub id such as google/ddpm-cifar10-32."
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]
