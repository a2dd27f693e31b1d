"""Checks of arguments that several modules share. Each says in one sentence what was given and what is allowed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any


def positive_int(name: str, value: Any) -> int:
    """`value` as an `int` of at least 1.

    Args:
        name: how the caller calls it, for the message.
        value: an integer of any kind (NumPy's and zero-dimensional tensors included); booleans and fractions are
            refused.

    Raises:
        ValueError: if it is anything else.
    """
    return bounded_int(name, value, 1)


def non_negative_int(name: str, value: Any) -> int:
    """`value` as an `int` of at least 0; otherwise as `positive_int`."""
    return bounded_int(name, value, 0)


def whole_number(value: Any) -> int | None:
    """`value` as an `int` if it is an integer of any kind, `None` for booleans, fractions and everything else."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def real_number(name: str, value: Any) -> float:
    """`value` as a `float`.

    Raises:
        TypeError: if it is a boolean or no real number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be a number")
    return float(value)


def one_of(choices: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b, or c`."""
    *others, last = choices
    return f"{', '.join(others)}{',' * (len(others) > 1)} or {last}" if others else last


def bounded_int(name: str, value: Any, least: int) -> int:
    """`value` as an `int` of at least `least`; otherwise as `positive_int`."""
    number = whole_number(value)
    if number is None or number < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return number
