"""What the page takes and what it refuses, without a server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddim.app import inputs

ANYTHING = st.one_of(st.integers(), st.floats(), st.text(), st.booleans(), st.none(), st.lists(st.integers()))


def answer(check: Callable[[], Any]) -> tuple[Any, str]:
    """What a check returns, and what it says where it refuses."""
    try:
        return check(), ""
    except ValueError as error:
        return None, str(error)


@given(ANYTHING)
def test_whole_numbers_are_taken_and_nothing_else_is(value: Any) -> None:
    number, sentence = answer(lambda: inputs.whole("steps", value, 1, 1000))
    if sentence:
        assert sentence.startswith("steps is ")
        assert sentence.endswith("; it must be a whole number from 1 to 1000")
        assert len(sentence) < 120
    else:
        assert number == value
        assert type(number) is int
        assert 1 <= number <= 1000


@given(ANYTHING)
def test_numbers_are_taken_and_nothing_else_is(value: Any) -> None:
    number, sentence = answer(lambda: inputs.real("eta", value, 0, 2))
    if sentence:
        assert sentence.endswith("; it must be a number from 0 to 2")
    else:
        assert number == value
        assert type(number) is float
        assert 0 <= number <= 2


@given(ANYTHING)
def test_words_and_lists(value: Any) -> None:
    for check in (
        lambda: inputs.choice("spacing", value, ["leading", "quad"]),
        lambda: inputs.flag("closed", value),
        lambda: inputs.several("seeds", value, 1, 2),
        lambda: inputs.seed(value),
    ):
        taken, sentence = answer(check)
        assert taken is not None or "; it must be " in sentence


def test_uploads_come_from_the_folder_of_uploads_only(tmp_path: Path) -> None:
    uploads, elsewhere = tmp_path / "uploads", tmp_path / "elsewhere"
    for folder in (uploads, elsewhere):
        folder.mkdir()
        Image.new("L", (3, 2)).save(folder / "x.png")
    assert inputs.upload(str(uploads / "x.png"), uploads).size == (3, 2)
    assert inputs.upload({"path": str(uploads / "x.png")}, uploads).size == (3, 2)
    (uploads / "link.png").symlink_to(elsewhere / "x.png")
    for path in (elsewhere / "x.png", uploads / ".." / "elsewhere" / "x.png", uploads / "link.png", uploads / "none"):
        with pytest.raises(ValueError, match="the picture is no file that was uploaded here"):
            inputs.upload(str(path), uploads)
