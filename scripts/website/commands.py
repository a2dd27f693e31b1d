"""The page of all commands and their options, from the command line itself."""

from __future__ import annotations

import inspect
import re

import click
import typer

from ddim.cli import app


def commands_text() -> str:
    """Return the Markdown of the page."""
    root = typer.main.get_command(app)
    assert isinstance(root, click.Group | typer.core.TyperGroup)
    context = click.Context(root, info_name="ddim")
    sections = [_section(name, root.get_command(context, name)) for name in root.list_commands(context)]
    head = (
        "# Commands and options\n\n"
        "Made from `ddim COMMAND --help`. [Command line](command-line.md) shows them by example, and says what all of "
        "them have in common.\n"
    )
    return "\n".join([head, *sections])


def _section(name: str, command: click.Command | None) -> str:
    assert command is not None
    usage = " ".join(["ddim", name, *(_placeholder(param) for param in command.params if _is_argument(param))])
    rows = [_row(param) for param in command.params if not getattr(param, "hidden", False)]
    text, _, examples = inspect.cleandoc(command.help or "").replace("\b", "").partition("\nExamples:\n")
    paragraphs = "\n\n".join(_escape(paragraph) for paragraph in text.strip().split("\n\n"))
    lines = re.sub(r"\n\n+", "\n", inspect.cleandoc("\n" + examples))
    code = "\n```sh\n" + re.sub(r"\n(?=--)", r" \\\n    ", lines) + "\n```\n" if examples else ""
    table = "| | | default |\n|---|---|---|\n" + "\n".join(rows)
    return f"## ddim {name}\n\n{paragraphs}\n\n```text\n{usage} [OPTIONS]\n```\n\n{table}\n{code}"


def _is_argument(param: click.Parameter) -> bool:
    return param.param_type_name == "argument"


def _placeholder(param: click.Parameter) -> str:
    name = (param.metavar or param.name or "").upper()
    return (name if param.required else f"[{name}]") + ("..." if param.nargs == -1 else "")


def _row(param: click.Parameter) -> str:
    """Return a row of the table: the names of an option, what it does, and its default."""
    if _is_argument(param):
        names = f"`{_placeholder(param)}`"
    else:
        names = ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))
    default = param.default
    if default is True:
        default = param.opts[0]
    is_hidden = default is None or default is False or default == () or not getattr(param, "show_default", True)
    shown = "" if is_hidden else f"`{default}`"
    return f"| {names} | {_escape(getattr(param, 'help', None) or '')} | {shown} |"


def _escape(text: str) -> str:
    """Return text in which Markdown reads no marks of its own."""
    for mark in "\\`*_{}[]<>|":
        text = text.replace(mark, f"\\{mark}" if mark not in "<>" else {"<": "&lt;", ">": "&gt;"}[mark])
    return " ".join(text.split())
