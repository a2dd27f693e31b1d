"""The checks of what clients send, without a server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddim import validation
from ddim.app import inputs

ANYTHING = st.one_of(st.integers(), st.floats(), st.text(), st.booleans(), st.none(), st.lists(st.integers()))


def result_and_message(check: Callable[[], Any]) -> tuple[Any, str]:
    """What a check returns, and its message if it refuses."""
    try:
        return check(), ""
    except (ValueError, TypeError) as error:
        return None, str(error)


@given(ANYTHING)
def test_only_integers_are_accepted(value: Any) -> None:
    number, message = result_and_message(lambda: inputs.integer("steps", value, 1, 1000))
    if message:
        assert message.startswith("steps must be an integer from 1 to 1000, got ")
        assert len(message) < 120
    else:
        assert number == value
        assert type(number) is int
        assert 1 <= number <= 1000


@given(ANYTHING)
def test_only_numbers_are_accepted(value: Any) -> None:
    number, message = result_and_message(lambda: validation.real("eta", value, 0, 2))
    if message:
        assert message.startswith(("eta must be a number from 0 to 2, got ", "eta must be a number, got "))
        assert len(message) < 120
    else:
        assert number == value
        assert type(number) is float
        assert 0 <= number <= 2


@given(ANYTHING)
def test_refusals_name_the_argument(value: Any) -> None:
    for check in (
        lambda: validation.choice("spacing", value, ["leading", "quad"]),
        lambda: inputs.flag("closed", value),
        lambda: inputs.sequence("seeds", value, 1, 2),
        lambda: inputs.seed(value),
    ):
        checked, message = result_and_message(check)
        assert checked is not None or " must be " in message


@pytest.mark.parametrize("digits", [400, 5000])
def test_huge_integers_are_refused(digits: int) -> None:
    value = 10**digits
    for check in (lambda: inputs.integer("steps", value, 1, 1000), lambda: validation.real("eta", value, 0, 2)):
        _, message = result_and_message(check)
        assert " must be " in message
        assert len(message) < 140


def test_only_the_folder_of_uploads_is_read(tmp_path: Path) -> None:
    uploads, elsewhere = tmp_path / "uploads", tmp_path / "elsewhere"
    for folder in (uploads, elsewhere):
        folder.mkdir()
        Image.new("L", (3, 2)).save(folder / "x.png")
    assert inputs.upload(str(uploads / "x.png"), uploads).size == (3, 2)
    assert inputs.upload({"path": str(uploads / "x.png")}, uploads).size == (3, 2)
    (uploads / "link.png").symlink_to(elsewhere / "x.png")
    for path in (elsewhere / "x.png", uploads / ".." / "elsewhere" / "x.png", uploads / "link.png", uploads / "none"):
        with pytest.raises(ValueError, match="picture must be a file that was uploaded here"):
            inputs.upload(str(path), uploads)
