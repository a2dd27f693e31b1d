"""Checks of a command's options before it runs: none that would be ignored, none that is empty.

What a single option may be is checked where it is used; here are the options that exclude each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from typer.core import TyperCommand

from ddim.cli.overwriting import check_inputs_stay
from ddim.validation import integer, real, shown

MAX_COUNT = 10**8
"""Images of one command; a larger number is a slip."""
MAX_FRAMES = 10_000
MAX_EDITS = 10_000
"""Edits of one image, all of them in memory."""
MAX_COLUMNS = 1024
"""Images that `trajectory` and `consistency` sample side by side, all of them in memory."""
MAX_SCALE = 64
MIN_TOLERANCE = 1e-8
"""Below the rounding of float32 to images in [-1, 1]: it would never be met, after all possible work."""
NOT_EMPTY = (
    "out",
    "plot",
    "model",
    "model_option",
    "weights",
    "models",
    "images",
    "points",
    "sources",
    "samples",
    "reference",
    "curve",
    "metric",
    "run",
    "file_format",
    "sigma_rel",
    "tracker",
    "held_out",
    "pairs",
    "direction",
    "mask",
    "box",
    "operator",
    "method",
    "resampling",
    "where",
    "data",
    "checkpoint",
    "codes",
    "config",
    "init",
    "layout",
    "host",
    "resume",
    "features",
)
"""Options and arguments that must have a value; of those with several values, each."""
MAXIMA = {"count": MAX_COUNT, "reference_count": MAX_COUNT, "frames": MAX_FRAMES}
COMMAND_MAXIMA = {
    "trajectory": {"count": MAX_COLUMNS},
    "consistency": {"count": MAX_COLUMNS},
    **{command: {"count": MAX_EDITS} for command in ("edit", "inpaint", "super-resolve", "restore")},
}

MARKUP = re.compile(r"\[(?=[a-z#/@][^[]*?\])")
"""A bracket that rich takes for the start of a tag, such as that of `ddim[inception]`."""

Values = Mapping[str, Any]


class Conflict(NamedTuple):
    """Options that would be ignored.

    Attributes:
        options: their parameters.
        when: whether the values of a command make them useless.
        reason: when that is, in words that follow "has no effect".
    """

    options: Sequence[str]
    when: Callable[[Values], bool]
    reason: str


def _is_animation(values: Values) -> bool:
    return Path(values["out"]).suffix.lower() in (".gif", ".webp")


def _is_not_shown(values: Values) -> bool:
    """Return whether what is written is not one image or animation, but files or arrays that keep their pixels."""
    from ddim.io.image_files import is_folder_path

    out = values["out"]
    return is_folder_path(out) or Path(out).suffix.lower() in (".npz", ".tar")


def _is_table(values: Values) -> bool:
    return values["table"] is not None or values["figure"] is not None


SAMPLING = ("steps", "eta", "spacing", "timesteps", "order", "sigma_hat", "clipped_model_output", "seed")
CONFLICTS = (
    Conflict(("steps", "spacing"), lambda values: values.get("timesteps") is not None, "beside --timesteps"),
    Conflict(("scale",), _is_not_shown, "on a folder, x.npz and x.tar, which keep their pixels"),
)
"""Of all commands that have such options."""
_EULER = Conflict(("tolerance", "max_iterations"), lambda values: not values["exact"], "beside --euler")
_FPS = Conflict(("fps",), lambda values: not _is_animation(values), "unless --out is x.gif or x.webp")
COMMAND_CONFLICTS: Mapping[str, Sequence[Conflict]] = {
    "sample": (
        Conflict(("shard_size",), lambda values: not values["out"].lower().endswith(".tar"), "unless --out is x.tar"),
    ),
    "encode": (_EULER,),
    "decode": (Conflict(("strength",), lambda values: values["direction"] is None, "without --direction"),),
    "reconstruct": (_EULER,),
    "interpolate": (_FPS, Conflict(("frames",), lambda values: values["grid"] is not None, "beside --grid")),
    "trajectory": (_FPS, Conflict(("frames",), lambda values: values["at"] is not None, "beside --at")),
    "evaluate": (
        Conflict(
            (
                *("metrics", "attributes", "memorization", "held_out", "pairs", "every_checkpoint"),
                *("steps", "eta", "timesteps", "order", "sigma_hat", "clipped_model_output"),
            ),
            _is_table,
            "beside --table and --figure, which choose them",
        ),
        Conflict(
            ("features", "reference_count", "seed"),
            lambda values: values["table"] == 2,
            "beside --table 2, which compares images with themselves",
        ),
        Conflict(("reference_count",), lambda values: values["reference"] is None, "without --reference"),
        Conflict(("metrics", "attributes"), lambda values: values["memorization"], "beside --memorization"),
        Conflict(("held_out", "pairs"), lambda values: not values["memorization"], "without --memorization"),
        Conflict(
            ("attributes", "memorization"), lambda values: values["every_checkpoint"], "beside --every-checkpoint"
        ),
    ),
    "tune": (
        Conflict(
            ("order", "eta", "plot"),
            lambda values: values["coefficients"],
            "beside --coefficients, which are of no order, and of eta 0",
        ),
    ),
    "convert": (
        Conflict(("head_channels",), lambda values: values["heads"] is not None, "beside --heads"),
        Conflict(("ema",), lambda values: Path(values["checkpoint"]).is_dir(), "for a diffusers folder"),
    ),
    "export": (
        Conflict(
            ("steps", "spacing", "timesteps", "order", "clipped_model_output", "guidance", "negative_label"),
            lambda values: not values["loop"],
            "without --loop",
        ),
    ),
    "ema": (
        Conflict(
            (
                *("reference", "reference_count", "features", "count", "curve", "split", "device", "engine"),
                *("steps", "eta", "spacing", "order", "seed"),
            ),
            lambda values: values["metric"] is None,
            "without --metric",
        ),
    ),
    "train": (
        Conflict(("push_to_hub", "resume"), lambda values: values["dry_run"], "beside --dry-run"),
        # A plan is as long as fits into the limit.
        Conflict(
            ("max_minutes",), lambda values: values["dry_run"] and values["preset"] is not None, "beside --dry-run"
        ),
        Conflict(("epochs",), lambda values: values["max_steps"] is not None, "beside --max-steps"),
    ),
}


class Command(TyperCommand):
    """A command whose options are checked before it runs, and whose help is plain text: brackets are not markup."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.rich_markup_mode == "rich":
            for owner in (self, *self.params):
                help_text = getattr(owner, "help", None)
                if help_text:
                    setattr(owner, "help", MARKUP.sub(r"\[", help_text))  # noqa: B010 - click's classes lack it

    def invoke(self, ctx: Any) -> Any:
        """Check the options, then run the command.

        Raises:
            ValueError: for an option that would be ignored, is empty, exceeds every purpose, or would replace an input.
        """
        check_options(self, ctx)
        return super().invoke(ctx)


def check_options(command: TyperCommand, context: Any) -> None:
    """Check the options of a command.

    Args:
        command: the command.
        context: its click context, with the values and where they come from.

    Raises:
        ValueError: for an option that would be ignored, is empty, exceeds every purpose, or would replace an input.
    """
    names = {parameter.name: _option(parameter) for parameter in command.params}
    given = {name for name in names if str(getattr(context.get_parameter_source(name), "name", "")) == "COMMANDLINE"}
    values: Values = context.params
    for name in NOT_EMPTY:
        value = values[name] if name in given else None
        if value in ("", [], ()) or (isinstance(value, (list, tuple)) and "" in value):
            raise ValueError(f"{names[name]} must not be empty, got {shown('' if value else value)}")
    maxima = MAXIMA | COMMAND_MAXIMA.get(str(command.name), {})
    for name in given & maxima.keys():
        if isinstance(values[name], int):
            integer(names[name], values[name], maximum=maxima[name])
    for name in given & {"count", "reference_count"}:
        if values[name] is not None and values[name] < 1:
            integer(names[name], values[name], 1)
    if "scale" in given:
        integer(names["scale"], values["scale"], 1, MAX_SCALE)
    if "seed" in given:
        integer(names["seed"], values["seed"], 0)
    if "tolerance" in given and 0 < values["tolerance"] < MIN_TOLERANCE:
        real(names["tolerance"], values["tolerance"], MIN_TOLERANCE)
    for conflict in (*CONFLICTS, *COMMAND_CONFLICTS.get(str(command.name), ())):
        useless = [name for name in conflict.options if name in given]
        if useless and conflict.when(values):
            raise ValueError(f"{names[useless[0]]} has no effect {conflict.reason}; leave it out")
    check_inputs_stay(values, names)


def refuse_sampling_options(context: Any, reason: str) -> None:
    """Check that no option of sampling was given to a command that does not sample.

    Args:
        context: the click context of the command.
        reason: why it does not sample, in words that follow "has no effect".

    Raises:
        ValueError: if one was given.
    """
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name)
        if parameter.name in SAMPLING and str(getattr(source, "name", "")) == "COMMANDLINE":
            raise ValueError(f"{_option(parameter)} has no effect {reason}; leave it out")


def _option(parameter: Any) -> str:
    """Return how a user gives a parameter: its longest option, or its name in capitals."""
    options = [option for option in parameter.opts if option.startswith("-")]
    return max(options, key=len) if options else str(parameter.name).upper()
