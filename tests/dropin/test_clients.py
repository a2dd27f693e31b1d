"""Every client observes the same with `ddim` as with `diffusers`: files, numbers, exceptions and warnings.

What differs on purpose is not compared: the steps of linspace and custom timesteps, the rounding of float32 schedules,
and errors for arguments that make no sense (README, "How it differs from diffusers").
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dropin import (  # noqa: F401  # imported for their clients
    change_clients,
    file_clients,
    interface_clients,
    module_clients,
    output_clients,
    pipeline_clients,
    sampling_clients,
    schedule_clients,
    scheduler_clients,
    training_clients,
)
from dropin.library import CLIENTS, DDIM, DIFFUSERS, assert_same


@pytest.mark.parametrize("name", CLIENTS)
def test_client(name: str, tmp_path: Path) -> None:
    client, results = CLIENTS[name], []
    for lib in (DIFFUSERS, DDIM):
        folder = tmp_path / lib.name
        folder.mkdir()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            results.append(client.run(lib, folder))
    expected, actual = results
    assert expected, "a client must observe something"
    assert_same(actual, expected, client.tolerance)


def test_number_of_clients() -> None:
    assert len(CLIENTS) >= 36
