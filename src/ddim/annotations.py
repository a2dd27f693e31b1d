"""Checks of arguments by the annotations of the function that takes them.

Values in files are of any type: every argument of a configuration is checked once, here, before a constructor uses it.

    norm_eps must be a finite number, got None
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from ddim.validation import as_integer, shown

SIMPLE = {bool: "True or False", int: "an integer", float: "a finite number", str: "a text"}
"""The types that are checked, as messages name them; values of all other types are left to the function."""


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Check arguments against a function's annotations.

    `bool`, `int`, `float`, `str`, `None`, tuples of these and their unions are checked; lists pass for tuples, and
    NumPy's numbers for Python's. Names among a few (`Literal`) are left to the function, whose message lists them.

    Args:
        function: the function.
        arguments: its arguments by name; those without an annotation are not checked.

    Raises:
        TypeError: for the first value of another type.
        ValueError: for a number that is not finite.

    Example:
        >>> def scale(factor: float, sizes: tuple[int, ...] | None = None) -> None: ...
        >>> check_arguments(scale, {"factor": 2, "sizes": [1, 2]})
        >>> check_arguments(scale, {"factor": float("nan")})
        Traceback (most recent call last):
        ValueError: factor must be a finite number, got nan
        >>> check_arguments(scale, {"sizes": 3})
        Traceback (most recent call last):
        TypeError: sizes must be a list of integers, or None, got 3
    """
    for name, hint in _hints(function).items():
        if name in arguments and not _matches(arguments[name], hint):
            value = arguments[name]
            kind = ValueError if isinstance(value, Real) and not _is_finite(value) else TypeError
            raise kind(f"{name} must be {_describe(hint)}, got {shown(value)}")


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function)


def _matches(value: Any, hint: Any) -> bool:
    """Return whether a value is of the type that an annotation says."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_matches(value, part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and _match_entries(value, get_args(hint))
    if hint is bool:
        return isinstance(value, bool | np.bool_)
    if hint is int:
        return as_integer(value) is not None
    if hint is float:
        return not isinstance(value, bool) and isinstance(value, Real) and _is_finite(value)
    if hint in (str, type(None)):
        return isinstance(value, hint)
    return True


def _match_entries(value: list[Any] | tuple[Any, ...], hints: tuple[Any, ...]) -> bool:
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = (hints[0],) * len(value)
    return len(hints) == len(value) and all(map(_matches, value, hints))


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def _describe(hint: Any) -> str:
    """Return what an annotation requires, as it stands in a message."""
    if get_origin(hint) in (Union, types.UnionType):
        return ", or ".join(_describe(part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        first, *others = get_args(hint)
        number = "a list" if others[-1:] == [Ellipsis] else f"a list of {1 + len(others)}"
        kind = {int: "integers", float: "numbers", str: "texts"}.get(first, "values")
        return f"{number} of {kind}" if number == "a list" else f"{number} {kind}"
    if get_origin(hint) is Literal:
        return ", ".join(map(repr, get_args(hint)))
    return "None" if hint is type(None) else SIMPLE.get(hint, str(getattr(hint, "__name__", hint)))
