"""Arguments of the library become options of the command line in messages, and nothing else does."""

from __future__ import annotations

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from ddim.cli import app
from ddim.cli.checks import Command
from ddim.cli.messages import BY_COMMAND, FLAGS, IDENTIFIERS, WORDS, to_options

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("message", "command", "expected"),
    [
        ("batch_size must be positive", "sample", "--batch-size must be positive"),
        ("batch_size must be positive", "trajectory", "--count must be positive"),
        ("order=2 requires eta=0, got eta=0.5", "sample", "--order 2 requires --eta 0, got --eta 0.5"),
        (
            "the model's solver_order=2 requires eta=0, got eta=1; give order=1",
            "sample",
            "the model's solver_order=2 requires --eta 0, got --eta 1; give --order 1",
        ),
        ("use_sigma_hat=True requires eta=1", "sample", "--sigma-hat requires --eta 1"),
        ("x.npz exists; pass overwrite=True to replace it.", "sample", "x.npz exists; pass --overwrite to replace it."),
        ("x.npz has other timesteps; force=True decodes it", "decode", "x.npz has other timesteps; --force decodes it"),
        ('run is not empty; pass resume="never"', "train", "run is not empty; pass --resume never"),
        ("plot must end in .png or .svg, got 'out.jpg'", "tune", "--plot must end in .png or .svg, got 'out.jpg'"),
        ("eta=1 requires seeds, one per image", "edit", "--eta 1 requires --seed, one per image"),
        ("num_heads must divide 64", "convert", "--heads must divide 64"),
        ("settings must be of the form key=value, got 'lr'", "train", "--set must be of the form key=value, got 'lr'"),
        ("run is not empty; use resume='auto' to resume", "train", "run is not empty; use --resume auto to resume"),
        ("exact=False requires order=1", "encode", "--euler requires --order 1"),
        ("use resume=/run/step-1 and a lower optim.lr", "train", "use --resume /run/step-1 and a lower optim.lr"),
    ],
)  # fmt: skip
def test_arguments_become_options(message: str, command: str, expected: str) -> None:
    assert to_options(message, command) == expected


@pytest.mark.parametrize(
    "message",
    [
        "'batch_size' is not a folder",
        "there is no file 'overwrite=True'",
        'there is no model "num_inference_steps"',
        "batch_size/num_inference_steps.npz is damaged",
        "the folder batch_size.old does not exist",
        "scheduler_config.json: timestep_spacing must be one of leading or trailing, got 'even'",
        "batch_size: must be a valid integer",
        "training configuration, batch_sise: is not an entry (did you mean batch_size?)",
        "training configuration, train.samples: is not an entry; train has batch_size, max_steps",
        "optim.batch_size must be positive",
        "out of memory",
        "an interpolation requires at least two points, got 1",
        "the order of the images does not matter",
        "--batch-size must be an integer",
        "pass --overwrite to replace it",
    ],
)
def test_other_text_is_left_alone(message: str) -> None:
    assert to_options(message, "sample") == message


def test_every_option_exists() -> None:
    options = {
        name: {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        for name, command in COMMANDS.items()
    }
    everywhere = set().union(*options.values())
    assert {*IDENTIFIERS.values(), *WORDS.values(), *FLAGS.values()} <= everywhere
    for command, names in BY_COMMAND.items():
        assert {name for name in names.values() if name.startswith("-")} <= options[command]


def test_help_prints_brackets() -> None:
    program = typer.Typer(rich_markup_mode="rich")

    @program.command(cls=Command)
    def command(
        extra: Annotated[str, typer.Option(help="Requires 'ddim[train]'; a number in [0, 1].")] = "",
    ) -> None:
        """Install ddim[app]."""

    output = " ".join(CliRunner().invoke(program, ["--help"]).stdout.replace("│", " ").split())
    assert "Requires 'ddim[train]'; a number in [0, 1]." in output
    assert "Install ddim[app]." in output
