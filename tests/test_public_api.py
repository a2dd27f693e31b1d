"""The public interface: `tests/public_api.txt` is what the code has, and every name in it has a docstring."""

from __future__ import annotations

import inspect
from pathlib import Path

import public_api

API = Path(__file__).with_name("public_api.txt")
HOW_TO_CHANGE = "python scripts/public_api.py writes it anew; CHANGELOG.md says what changed, docs/versions.md what may"


def test_list_is_that_of_the_code() -> None:
    listed, found = API.read_text().splitlines(), public_api.public_api().splitlines()
    changes = [f"- {line}" for line in listed if line not in found] + [
        f"+ {line}" for line in found if line not in listed
    ]
    assert not changes, "\n".join([*changes, HOW_TO_CHANGE])


def test_root_names_and_members_are_listed() -> None:
    listed = API.read_text()
    for name in (
        "ddim.DDIMPipeline(",
        "ddim.DDIMPipeline.encode(",
        "ddim.DDIMScheduler(",
        "ddim.slerp(",
        "ddim.UNet2DModel(",
    ):
        assert f"\n{name}" in f"\n{listed}"


def test_added_argument_is_seen() -> None:
    class Before:
        def run(self, steps: int = 5) -> None: ...

    class After:
        def run(self, steps: int = 5, *, eta: float = 0.0) -> None: ...

    for cls in (Before, After):
        cls.__module__ = "ddim.example"
    assert list(public_api.describe("x", Before)) == ["x()", "x.run(self, steps=5)"]
    assert list(public_api.describe("x", After)) == ["x()", "x.run(self, steps=5, *, eta=0.0)"]


def test_every_listed_function_is_documented() -> None:
    for name in public_api.listed_names(public_api.REFERENCE.read_text()):
        assert inspect.getdoc(public_api.resolve(name)), name
