"""Clients observe the same where `ddim.compat.install` has put our classes under the names of `diffusers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dropin import file_clients, interface_clients, pipeline_clients, scheduler_clients, training_clients  # noqa: F401
from dropin.library import CLIENTS, DIFFUSERS, assert_same
from helpers import environment
from programs import run_python

NAMES = (
    "configuration_interface",
    "folders_read_by_diffusers",
    "layers_found_by_class",
    "pipeline_placed_by_a_device_map",
    "saved_by_pipelines_of_diffusers",
    "scheduler_replaced_in_a_pipeline",
    "subclass_with_more_components",
    "subclass_with_its_own_call",
    "training_notebook",
)

SCRIPT = """
import sys
from pathlib import Path

import ddim.compat

ddim.compat.install()

import diffusers
import torch

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()

from dropin import file_clients, interface_clients, pipeline_clients, scheduler_clients, training_clients
from dropin.library import CLIENTS, DIFFUSERS

assert DIFFUSERS.DDIMPipeline.__module__.startswith("ddim")
results = {}
for name in sys.argv[2:]:
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    torch.manual_seed(0)
    try:
        results[name] = CLIENTS[name].run(DIFFUSERS, folder)
    except Exception as error:
        results[name] = f"{type(error).__name__}: {error}"
torch.save(results, Path(sys.argv[1]) / "results.pt")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the clients in a process where the classes are installed."""
    folder = tmp_path_factory.mktemp("installed")
    run = run_python(SCRIPT, folder, *NAMES, env=environment(folder))
    assert run.returncode == 0, run.stderr[-2000:]
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.mark.parametrize("name", NAMES)
def test_client_with_installed_classes(name: str, installed: dict[str, Any], tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = CLIENTS[name].run(DIFFUSERS, tmp_path)
    assert not isinstance(installed[name], str), installed[name]
    assert_same(installed[name], expected, CLIENTS[name].tolerance)
