"""Write the public interface as text: every public name with its arguments, a line each.

    python scripts/public_api.py            # write tests/public_api.txt anew
    python scripts/public_api.py --check    # end with status 1 where it differs from the code

Public is what `docs/reference.md` lists: of a module all names that it defines, of a class its methods and attributes.
A change of the interface is a change of this file, which a reader of the change sees (`docs/versions.md`).
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs/reference.md"
API = ROOT / "tests/public_api.txt"
OWN = "ddim"


def listed_names(text: str) -> list[str]:
    """Return the dotted names that the page of the Python API lists."""
    return sorted(set(re.findall(rf"`({OWN}(?:\.\w+)+)`", text)))


def resolve(name: str) -> Any:
    """Return the module, class or function of a dotted name.

    Raises:
        ImportError: if there is no such module.
        AttributeError: if the module has no such name.

    Example:
        >>> resolve("ddim.pipeline.DDIMPipeline").__name__
        'DDIMPipeline'
    """
    try:
        return import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(import_module(module), attribute)


def describe(name: str, value: Any) -> Iterator[str]:
    """Yield the lines of a name: its own, and those of what a module or a class has."""
    if isinstance(value, ModuleType):
        defined = [key for key, item in vars(value).items() if getattr(item, "__module__", None) == name]
        for member in sorted(getattr(value, "__all__", filter(is_public, defined))):
            yield from describe(f"{name}.{member}", getattr(value, member))
    elif inspect.isclass(value):
        yield f"{name}{signature(value)}"
        for member, item in class_members(value):
            yield from describe(f"{name}.{member}", item)
    elif isinstance(value, property):
        yield f"{name}: property"
    elif callable(value):
        yield f"{name}{signature(value)}"


def class_members(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties that a class of this package has, inherited ones of the package too."""
    members: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.split(".")[0] == OWN:
            members |= {name: item for name, item in vars(base).items() if is_public(name)}
    for name, item in sorted(members.items()):
        function = item.__func__ if isinstance(item, classmethod | staticmethod) else item
        if isinstance(function, property) or inspect.isfunction(function):
            yield name, function


def signature(function: Any) -> str:
    """Return the arguments of a function or class with their defaults; annotations are the type checker's concern."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return "(...)"
    shown = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.Signature(shown)))


def is_public(name: str) -> bool:
    """Return whether a name is without a leading underscore."""
    return not name.startswith("_")


def public_api() -> str:
    """Return the whole interface, a line per name, sorted."""
    names = [OWN, *listed_names(REFERENCE.read_text())]
    lines = {line for name in names for line in describe(name, resolve(name))}
    return "".join(f"{line}\n" for line in sorted(lines))


def main(arguments: list[str]) -> int:
    """Write or compare the list; return the exit status."""
    api = public_api()
    if arguments != ["--check"]:
        API.write_text(api)
        return 0
    listed = API.read_text()
    sys.stdout.writelines(difflib.unified_diff(listed.splitlines(True), api.splitlines(True), "listed", "code"))
    return int(api != listed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
