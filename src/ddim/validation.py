"""Checks of arguments: one primitive per kind of value.

Messages are made from the check, so that every one reads alike:

    num_inference_steps must be an integer from 1 to 1000, got 0

Each returns the checked value in Python's own type. Messages name the argument that the caller gave; the command line
replaces names of arguments by those of its options (`ddim.cli.messages`).
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any, TypeVar

T = TypeVar("T")

MAX_SHOWN = 60
"""Characters of a value that a message repeats."""
MAX_NAME_SHOWN = 300
"""Characters of a name, such as a path, whose end is as important as its start; a longer one is cut as a value is."""


def integer(name: str, value: Any, minimum: int | None = None, maximum: int | None = None) -> int:
    """Check that a value is an integer within bounds.

    Args:
        name: the argument's name, for the message.
        value: an integer of any type, including NumPy's and zero-dimensional tensors; booleans and floats are refused.
        minimum: the smallest value allowed; `None` for no bound.
        maximum: the largest value allowed; `None` for no bound.

    Returns:
        The value as an `int`.

    Raises:
        ValueError: if it is anything else.

    Example:
        >>> integer("count", 3, 1)
        3
        >>> integer("count", 0, 1)
        Traceback (most recent call last):
        ValueError: count must be an integer of at least 1, got 0
    """
    number = as_integer(value)
    if number is None or (minimum is not None and number < minimum) or (maximum is not None and number > maximum):
        raise ValueError(f"{name} must be an integer{_bounds(minimum, maximum)}, got {shown(value)}")
    return number


def real(
    name: str,
    value: Any,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """Check that a value is a finite number within bounds.

    Args:
        name: the argument's name, for the message.
        value: a real number of any type; booleans are refused.
        minimum: the smallest value allowed.
        maximum: the largest value allowed.
        above: an exclusive lower bound.
        below: an exclusive upper bound.

    Returns:
        The value as a `float`.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is NaN, infinite or out of bounds.

    Example:
        >>> real("eta", 0, minimum=0)
        0.0
        >>> real("tolerance", 1.0, above=0, below=1)
        Traceback (most recent call last):
        ValueError: tolerance must be a number above 0 and below 1, got 1.0
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and minimum <= number <= maximum and above < number < below):
        low = f" above {above:g}" if above > -math.inf else f" of at least {minimum:g}" if minimum > -math.inf else ""
        high = f" below {below:g}" if below < math.inf else f" of at most {maximum:g}" if maximum < math.inf else ""
        both = f"{low} and{high.removeprefix(' of')}" if low and high else low or high
        if math.isfinite(minimum) and math.isfinite(maximum):
            both = f" from {minimum:g} to {maximum:g}"
        raise ValueError(f"{name} must be a{'' if both else ' finite'} number{both}, got {shown(value)}")
    return number


def choice(name: str, value: T, allowed: Iterable[Any]) -> T:
    """Check that a value is one of those allowed.

    Args:
        name: the argument's name, for the message.
        value: what the caller gave.
        allowed: the values that are allowed, in the order in which the message lists them.

    Returns:
        The value.

    Raises:
        ValueError: if it is not among them.

    Example:
        >>> choice("output_type", "gif", ("pil", "np", "pt"))
        Traceback (most recent call last):
        ValueError: output_type must be one of pil, np, or pt, got 'gif'
        >>> choice("spacing", "trialing", ("leading", "trailing"))
        Traceback (most recent call last):
        ValueError: spacing must be one of leading or trailing, got 'trialing' (did you mean 'trailing'?)
    """
    options = list(allowed)
    if not any(type(value) is type(option) and value == option for option in options):
        near = nearest(value, [option for option in options if isinstance(option, str)])
        raise ValueError(f"{name} must be one of {join_choices(map(str, options))}, got {shown(value)}{near}")
    return value


def nearest(name: Any, names: Iterable[str]) -> str:
    """Return a question about the name that someone who mistyped one may have meant, for the end of a message.

    Args:
        name: what was given.
        names: those that exist.

    Returns:
        The question, after a space; empty if none is near.

    Example:
        >>> nearest("block_out_channel", ["in_channels", "block_out_channels"])
        " (did you mean 'block_out_channels'?)"
        >>> nearest("hue", ["act_fn"])
        ''
    """
    match = find_nearest(name, names)
    return "" if match is None else f" (did you mean {match!r}?)"


def find_nearest(name: Any, names: Iterable[str]) -> str | None:
    """Return the name that someone who mistyped one may have meant; `None` if none is near.

    Args:
        name: what was given.
        names: those that exist.

    Example:
        >>> find_nearest("Preset", ["seed", "preset"])
        'preset'
    """
    if not isinstance(name, str) or len(name) > MAX_SHOWN:
        return None
    by_lower = {other.lower(): other for other in names}
    matches = difflib.get_close_matches(name.lower(), by_lower, 1)
    return by_lower[matches[0]] if matches else None


def list_unknown(unknown: Iterable[str], names: Iterable[str]) -> str:
    """Return names that do not exist as they are written in a message, each with the nearest that does.

    Args:
        unknown: what was given.
        names: those that exist.

    Example:
        >>> list_unknown(["sead", "x"], ["seed", "count"])
        "'sead' (did you mean 'seed'?), 'x'"
    """
    known = list(names)
    return ", ".join(f"{shown(name)}{nearest(name, known)}" for name in unknown)


def as_integer(value: Any) -> int | None:
    """Return an integer of any type as an `int`; `None` for booleans, fractions and everything else.

    Example:
        >>> as_integer(3), as_integer(True), as_integer(2.0)
        (3, None, None)
    """
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def join_choices(choices: Iterable[str]) -> str:
    """Return alternatives as they are written in a sentence.

    Example:
        >>> join_choices(["a", "b", "c"])
        'a, b, or c'
        >>> join_choices(["a", "b"])
        'a or b'
    """
    *others, last = choices
    return f"{', '.join(others)}{',' * (len(others) > 1)} or {last}" if others else last


def shown(value: Any) -> str:
    """Return a value as messages show it: its `repr`, cut where it is long.

    Example:
        >>> shown("x" * 1000)[-5:]
        'xx...'
    """
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def shorten(text: str) -> str:
    """Cut a name, such as a path, that is longer than any real one.

    Example:
        >>> shorten("samples.png"), len(shorten("x" * 10_000))
        ('samples.png', 63)
    """
    return text if len(text) <= MAX_NAME_SHOWN else f"{text[:MAX_SHOWN]}..."


def pluralize(count: int, noun: str) -> str:
    """Return a count with its noun.

    Args:
        count: how many.
        noun: in the singular.

    Returns:
        Both, the noun in the plural where the count is not 1.

    Example:
        >>> pluralize(1, "image"), pluralize(2, "image")
        ('1 image', '2 images')
    """
    return f"{count} {noun}{'s' * (count != 1)}"


def _bounds(minimum: int | None, maximum: int | None) -> str:
    if minimum is not None and maximum is not None:
        return f" from {minimum} to {maximum}"
    if minimum is not None:
        return f" of at least {minimum}"
    return "" if maximum is None else f" of at most {maximum}"
