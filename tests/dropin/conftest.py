"""What all tests of client code share."""

from __future__ import annotations

from collections.abc import Iterator

import diffusers
import pytest


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    yield
    diffusers.utils.logging.set_verbosity(level)
