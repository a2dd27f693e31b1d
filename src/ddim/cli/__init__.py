"""The command line: one file per command; a command reads options, calls the library and prints the result.

Results go to stdout, everything else to stderr. Exit status: 0; 1 for a failure, reported in one line; 2 for bad usage;
130 after Ctrl-C.
Heavy modules are imported inside the commands, so that help and usage errors appear at once.
"""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from ddim.cli.app import app as page
from ddim.cli.checks import Command
from ddim.cli.convert import convert
from ddim.cli.direction import direction
from ddim.cli.distill import distill
from ddim.cli.edit import edit
from ddim.cli.ema import ema
from ddim.cli.encode import decode, encode
from ddim.cli.evaluate import evaluate
from ddim.cli.export import export
from ddim.cli.failures import Commands, exit_with
from ddim.cli.info import info
from ddim.cli.interpolate import interpolate
from ddim.cli.reconstruct import reconstruct
from ddim.cli.restore import inpaint, restore, super_resolve
from ddim.cli.sample import sample
from ddim.cli.train import train
from ddim.cli.trajectory import consistency, trajectory
from ddim.cli.tune import tune
from ddim.version import __version__

app = typer.Typer(
    name="ddim",
    cls=Commands,
    help="Denoising Diffusion Implicit Models: sample, invert, interpolate, edit, train, tune, evaluate.",
    epilog="Example: ddim sample --model mnist --steps 20 --count 16 --out digits.png",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    *(sample, encode, decode, reconstruct, interpolate, trajectory, consistency, edit, direction),
    *(inpaint, super_resolve, restore),
    *(train, ema, export, tune, distill, evaluate, convert, info, page),
)
for command in COMMANDS:
    app.command(cls=Command)(command)


def _print_version(is_given: bool) -> None:
    if is_given:
        print(f"ddim {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; a failure ends in one line on stderr."""
    logging.basicConfig(format="ddim: %(message)s", level=logging.WARNING)
    try:
        app()
    except Exception as error:  # what goes wrong before a command runs
        exit_with(error)
