"""All entries of a training configuration, as commented YAML and as a table; their docstrings are the only source.

Sections are described by the `Attributes` of their classes, `model` and `scheduler` by the `Args` of `UNet2DModel` and
`DDIMScheduler`.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel

from ddim.training.config import CLASS_ARGUMENTS, TrainConfig
from ddim.training.processes import PROCESSES
from ddim.unet import UNet2DModel

COMPONENTS = ("model", "scheduler")
"""Sections whose entries are the arguments of a class."""
DECIDED_BY_DATA = {"pixel_format", *CLASS_ARGUMENTS}
"""Arguments of these classes that are not entries."""
COMMENT_WIDTH = 100
MISSING: Any = object()
"""Stands for a value that a tree does not have."""
HEADER = """\
# A configuration for `ddim train --config FILE`. An entry after a # without a space has the default
# that is shown; to change it, remove the # from it and from the line of its section. Without the
# size, channels and block types of `model`, what is left out is chosen from the images and the
# machine.

"""


class Entry(NamedTuple):
    """An entry, or a section, which has no default.

    Attributes:
        name: dotted name, such as `optim.lr`.
        default: value that it has where it is left out.
        description: what it means.
        is_section: whether it holds further entries.

    Example:
        >>> Entry("seed", 0, "decides the data order", False).name
        'seed'
    """

    name: str
    default: Any
    description: str
    is_section: bool


def list_entries(
    section: type[BaseModel] = TrainConfig, prefix: str = "", process: str = "gaussian"
) -> Iterator[Entry]:
    """Yield all sections and entries, each section before its entries.

    Args:
        section: class of the section.
        prefix: before every name.
        process: whose scheduler's arguments are listed.

    Yields:
        The entries in the order of the classes; those of the top level, which have no section, last.

    Example:
        >>> next(entry for entry in list_entries() if entry.name == "optim.lr").default
        0.0002
    """
    descriptions = parse_descriptions(section.__doc__ or "", "Attributes")
    fields = section.model_fields.items()
    plain = [name for name, field in fields if not _is_section(field.annotation) and name not in COMPONENTS]
    for name, field in fields:
        full, description = prefix + name, descriptions[name]
        if name in plain:
            continue
        yield Entry(full, None, description, True)
        if name in COMPONENTS and not prefix:
            scheduler, defaults = PROCESSES[process].scheduler, PROCESSES[process].scheduler_defaults
            component = {"model": (UNet2DModel, {}), "scheduler": (scheduler, defaults)}[name]
            yield from _list_arguments(component[0], f"{full}.", component[1])
        elif isinstance(field.annotation, type):
            yield from list_entries(field.annotation, f"{full}.")
    for name in plain:
        field = section.model_fields[name]
        default = None if field.is_required() else field.default
        yield Entry(prefix + name, _plain(default), descriptions[name], False)


def commented_yaml(values: Mapping[str, Any]) -> str:
    """Write a configuration as YAML with a comment on each entry.

    Entries without a value are commented out, with their defaults: `#` without a space precedes them.

    Args:
        values: nested mappings, as in a YAML file.

    Returns:
        YAML that has these values, and all entries where each `#` that no space follows is removed.

    Example:
        >>> text = commented_yaml({"optim": {"lr": 0.001}})
        >>> yaml.safe_load(text)
        {'optim': {'lr': 0.001}}
        >>> "  # peak learning rate." in text, "  #weight_decay: 0.0" in text, "#seed: 0" in text
        (True, True, True)
    """
    lines: list[str] = []
    for entry in list_entries(process=str(values.get("process", "gaussian"))):
        *sections, name = entry.name.split(".")
        indent = "  " * len(sections)
        if not sections:
            lines.append("")
        comment = f"{indent}# "
        lines += [comment + line for line in _wrap(entry.description, COMMENT_WIDTH - len(comment))]
        value = _get(values, entry.name.split("."))
        mark = "" if value is not MISSING and (not entry.is_section or value) else "#"
        if entry.is_section:
            lines.append(f"{mark}{name}:")
        else:
            lines.append(f"{indent}{mark}{name}: {_dump(entry.default if value is MISSING else value)}")
    return HEADER + "\n".join(lines).strip() + "\n"


def entries_table() -> str:
    """Format all entries as a Markdown table: name, default, meaning.

    Example:
        >>> entries_table().splitlines()[0]
        '| entry | default | |'
    """
    rows = ["| entry | default | |", "|---|---|---|"]
    for entry in list_entries():
        name = f"**`{entry.name}`**" if entry.is_section else f"`{entry.name}`"
        default = "" if entry.is_section else f"`{_dump(entry.default)}`"
        rows.append(f"| {name} | {default} | {entry.description} |")
    return "\n".join(rows)


def parse_descriptions(docstring: str, heading: str) -> dict[str, str]:
    r"""Read what a docstring says about each name under a heading.

    Args:
        docstring: of a class.
        heading: `Attributes` or `Args`.

    Returns:
        One paragraph per name.

    Example:
        >>> parse_descriptions("Add.\n\nArgs:\n    a: first,\n        in m.\n    b: second.", "Args")
        {'a': 'first, in m.', 'b': 'second.'}
    """
    match = re.search(rf"^{heading}:\n((?:[ ]+.*\n?)+)", inspect.cleandoc(docstring), re.MULTILINE)
    descriptions: dict[str, str] = {}
    name = ""
    for line in (match[1] if match else "").splitlines():
        if start := re.match(r" {4}(\w+): (.*)", line):
            name, descriptions[start[1]] = start[1], start[2]
        else:
            descriptions[name] += f" {line.strip()}"
    return descriptions


def _list_arguments(component: type[Any], prefix: str, defaults: Mapping[str, Any]) -> Iterator[Entry]:
    """Yield the arguments of a class."""
    descriptions = parse_descriptions(component.__doc__ or "", "Args")
    for name, parameter in list(inspect.signature(component.__init__).parameters.items())[1:]:
        if name in descriptions and name not in DECIDED_BY_DATA:
            yield Entry(prefix + name, _plain(defaults.get(name, parameter.default)), descriptions[name], False)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _plain(value: Any) -> Any:
    """Return a value as YAML holds it."""
    return list(value) if isinstance(value, tuple) else value


def _get(tree: Any, names: list[str]) -> Any:
    """Return the value at a path in nested mappings, or `MISSING`."""
    for name in names:
        if not isinstance(tree, Mapping) or name not in tree:
            return MISSING
        tree = tree[name]
    return _plain(tree)


def _dump(value: Any) -> str:
    """Write a value as YAML in one line."""
    text = yaml.safe_dump(value, allow_unicode=True, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _wrap(text: str, width: int) -> list[str]:
    """Break a paragraph into lines, and hyphenated words nowhere."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
