"""What is published from either library is the same on the hub, and downloads the same."""

from __future__ import annotations

import json

import pytest

from dropin.hub_clients import LIBRARIES, published
from dropin.library import Observed, assert_same
from dropin.scheduler_clients import flat
from hub_client import client
from hub_server import Hub


def stored(hub: Hub, owner: str) -> dict[str, Observed]:
    """Return the names of the files of an owner's repositories, and their configurations."""
    contents: dict[str, Observed] = {}
    for repo_id, repository in sorted(hub.repositories.items()):
        if repo_id.startswith(f"{owner}/"):
            files = repository.commits[repository.branches["main"]]
            configs = {name: json.loads(content) for name, content in files.items() if name.endswith("config.json")}
            contents[repo_id.removeprefix(owner)] = {
                "files": sorted(files),
                "configs": {name: flat(config) for name, config in sorted(configs.items())},
            }
    return contents


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Observed]:
    """Run the scripts of both libraries in one process, and return what they observed and what the hub holds."""
    folder = tmp_path_factory.mktemp("hub")
    with Hub() as hub, client(hub.url, folder / "home") as call:
        observed = {name: call(published, name, folder / name) for name in LIBRARIES}
        return {name: {"observed": observed[name], "stored": stored(hub, f"{name}-user")} for name in LIBRARIES}


@pytest.mark.parametrize("part", ["observed", "stored"])
def test_published_alike(results: dict[str, Observed], part: str) -> None:
    assert len(results["diffusers"]["stored"]) == 5
    assert_same(results["ddim"][part], results["diffusers"][part], 1e-5)
