"""Downloads from and uploads to a hub: the real `huggingface_hub` client against the server in `hub_server`.

The client runs in separate processes, see `hub_client`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddim.io.hub import find_model
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel
from hub_client import Weights, load, load_scheduler, load_unet, load_with_scheduler, numbers, push
from hub_client import client as start_client
from hub_server import READER, WRITER, Hub

Client = Callable[..., Any]

WEIGHTS = "diffusion_pytorch_model"
CONFIGS = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]
OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def offline_client(hub: Hub, home: Path) -> Iterator[Client]:
    """A client with HF_HUB_OFFLINE and the same cache."""
    with start_client(hub.url, home, HF_HUB_OFFLINE="1") as call:
        yield call


@pytest.fixture
def folder(saved_pipeline: Path, tmp_path: Path) -> Path:
    """A saved pipeline."""
    return shutil.copytree(saved_pipeline, tmp_path / "saved")


@pytest.fixture
def weights(tiny_unet: UNet2DModel) -> Weights:
    return numbers(tiny_unet)


def add_clutter(folder: Path) -> None:
    """Add what else repositories hold: other formats and variants of the weights, a card, images."""
    (folder / "images").mkdir()
    for name in ("README.md", ".gitattributes", "images/sample.png"):
        (folder / name).write_bytes(b"not to be downloaded")
    weights_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    for name in (".msgpack", ".ema.safetensors", ".ema.bin", "-00001-of-00002.ema.bin"):
        (weights_folder / f"{WEIGHTS}{name}").write_bytes(b"not to be downloaded")


def make_flat(folder: Path) -> None:
    """Turn a saved pipeline into the layout of the first models on the hub: all at the root, old names, a pickle."""
    tensors = load_file(folder / f"unet/{WEIGHTS}.safetensors")
    for new, old in OLD_NAMES.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    torch.save(tensors, folder / f"{WEIGHTS}.bin")
    (folder / "unet/config.json").rename(folder / "config.json")
    (folder / "scheduler/scheduler_config.json").rename(folder / "scheduler_config.json")
    shutil.rmtree(folder / "unet")
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": "0.1.1",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def assert_equal(loaded: Weights, expected: Weights) -> None:
    assert list(loaded) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(loaded[name], value, err_msg=name)


def error_message(client: Client, *call: Any, **arguments: Any) -> str:
    """Return the message of a call that finds no model: a `FileNotFoundError` of one line."""
    with pytest.raises(FileNotFoundError) as caught:
        client(*call, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_only_required_files_are_downloaded(hub: Hub, client: Client, folder: Path, weights: Weights) -> None:
    (folder / f"unet/{WEIGHTS}.bin").write_bytes(b"not to be downloaded")
    add_clutter(folder)
    hub.add("org/today", folder)
    assert_equal(client(load, "org/today"), weights)
    assert hub.downloaded("org/today") == [*CONFIGS, f"unet/{WEIGHTS}.safetensors"]
    client(load, "org/today")
    assert len(hub.downloaded("org/today")) == 4


def test_use_safetensors_selects_the_download(hub: Hub, client: Client, folder: Path, weights: Weights) -> None:
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    torch.save(tensors, folder / f"unet/{WEIGHTS}.bin")
    hub.add("org/both", folder)
    assert_equal(client(load, "org/both", use_safetensors=False), weights)
    assert hub.downloaded("org/both") == [*CONFIGS, f"unet/{WEIGHTS}.bin"]
    (folder / f"unet/{WEIGHTS}.safetensors").unlink()
    hub.add("org/pickled", folder)
    message = error_message(client, load, "org/pickled", use_safetensors=True)
    assert f"looked for {WEIGHTS}.safetensors" in message
    assert f"found {WEIGHTS}.bin" in message


def test_flat_layout(hub: Hub, client: Client, folder: Path, weights: Weights) -> None:
    make_flat(folder)
    add_clutter(folder)
    hub.add("org/flat", folder)
    assert_equal(client(load, "org/flat"), weights)
    expected = ["config.json", f"{WEIGHTS}.bin", "model_index.json", "scheduler_config.json"]
    assert hub.downloaded("org/flat") == expected


def test_weights_at_the_root_beside_a_unet_folder_are_not_downloaded(
    hub: Hub, client: Client, folder: Path, weights: Weights, make_unet: Callable[..., UNet2DModel]
) -> None:
    other = make_unet(layers_per_block=2)
    other.save_pretrained(folder)
    hub.add("org/both", folder)
    assert_equal(client(load, "org/both"), weights)
    assert f"{WEIGHTS}.safetensors" not in hub.downloaded("org/both")
    assert_equal(client(load_unet, "org/both"), numbers(other))


def test_variant(hub: Hub, client: Client, tiny_pipeline: DDIMPipeline, folder: Path, weights: Weights) -> None:
    tiny_pipeline.unet.half().save_pretrained(folder / "unet", variant="fp16")
    hub.add("org/variant", folder)
    halves = {name: value.astype(np.float16).astype(np.float32) for name, value in weights.items()}
    assert_equal(client(load, "org/variant", variant="fp16"), halves)
    assert hub.downloaded("org/variant") == [*CONFIGS, f"unet/{WEIGHTS}.fp16.safetensors"]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(
    hub: Hub, client: Client, tiny_pipeline: DDIMPipeline, tmp_path: Path, weights: Weights, variant: str | None
) -> None:
    for saved in (None, "fp16"):
        tiny_pipeline.save_pretrained(tmp_path, variant=saved, max_shard_size="50KB")
        for path in list((tmp_path / "unet").glob("*-of-*.safetensors")):
            path.with_suffix(".bin").write_bytes(b"not to be downloaded")
    hub.add(f"org/shards-{variant}", tmp_path)
    assert_equal(client(load, f"org/shards-{variant}", variant=variant), weights)

    infix = f".{variant}" if variant else ""
    downloaded = hub.downloaded(f"org/shards-{variant}")
    shards = [name for name in downloaded if re.fullmatch(rf"unet/{WEIGHTS}{infix}-\d+-of-\d+\.safetensors", name)]
    assert len(shards) > 1
    assert downloaded == sorted([*CONFIGS, f"unet/{WEIGHTS}.safetensors.index{infix}.json", *shards])


@pytest.mark.parametrize("branch", ["main", "refs/pr/1", "v1.0"])
def test_revisions(hub: Hub, client: Client, folder: Path, tiny_unet: UNet2DModel, branch: str) -> None:
    repo_id = f"org/revisions-{branch.replace('/', '-')}"
    commit = hub.add(repo_id, folder, branch)
    expected = numbers(tiny_unet)
    with torch.no_grad():
        tiny_unet.conv_in.weight.add_(1)
    tiny_unet.save_pretrained(folder / "unet")
    hub.add(repo_id, folder, "newer")

    assert_equal(client(load, repo_id, revision=branch), expected)
    assert_equal(client(load, repo_id, revision=commit), expected)
    assert_equal(client(load, repo_id, revision="newer"), numbers(tiny_unet))
    assert_equal(client(load, repo_id, revision=commit, local_files_only=True), expected)


def test_private_repository_requires_a_token(hub: Hub, client: Client, folder: Path, weights: Weights) -> None:
    hub.add("org/private", folder, private=True)
    assert "private and the token does not open it" in error_message(client, load, "org/private")
    assert "status 401: Invalid credentials" in error_message(client, load, "org/private", token="hf_forged")
    assert not hub.downloaded("org/private")
    assert_equal(client(load, "org/private", token=READER), weights)


def test_stored_token_is_used_and_its_absence_reported(
    hub: Hub, client: Client, home: Path, folder: Path, weights: Weights
) -> None:
    hub.add("org/stored", folder, private=True)
    assert "no token is stored on this machine" in error_message(client, load, "org/stored", token=True)
    (home / "token").write_text(READER)
    assert_equal(client(load, "org/stored", token=True), weights)
    (home / "token").unlink()


def test_gated_repository_raises_without_permission(hub: Hub, client: Client, folder: Path) -> None:
    hub.add("org/gated", folder, gated=True)
    for token in (None, READER):
        assert "asks for permission on the hub" in error_message(client, load, "org/gated", token=token)
    client(load, "org/gated", token=WRITER)


def test_missing_models_and_revisions_raise(hub: Hub, client: Client, folder: Path) -> None:
    hub.add("org/plain", folder)
    assert "the hub has no model org/nothing" in error_message(client, load, "org/nothing")
    assert "the hub has no model org/nothing" in error_message(client, load, "org/nothing", token=READER)
    assert "org/plain has no revision 'v2'" in error_message(client, load, "org/plain", revision="v2")
    message = error_message(client, load, "org/plain", variant="fp16")
    assert f"{WEIGHTS}.fp16.safetensors" in message
    assert f"found {WEIGHTS}.safetensors" in message
    assert not hub.downloaded("org/plain")


def test_repository_without_a_pipeline_raises(hub: Hub, client: Client) -> None:
    hub.add("org/text", {"config.json": b"{}", "model.safetensors": b"x", f"{WEIGHTS}.safetensors": b"x"})
    assert "neither scheduler/scheduler_config.json" in error_message(client, load, "org/text")
    hub.add("org/empty", {"README.md": b"x"})
    assert "neither scheduler/scheduler_config.json" in error_message(client, load, "org/empty")


def test_cache_works_offline(hub: Hub, client: Client, offline_client: Client, folder: Path, weights: Weights) -> None:
    add_clutter(folder)
    hub.add("org/cached", folder)
    client(load, "org/cached")
    hub.requests.clear()
    assert_equal(client(load, "org/cached", local_files_only=True), weights)
    assert_equal(offline_client(load, "org/cached"), weights)
    assert hub.requests == []
    with hub.stopped():
        assert_equal(client(load, "org/cached"), weights)
        assert_equal(client(load, "org/cached", local_files_only=True), weights)


def test_cache_works_while_the_hub_fails(
    hub: Hub, client: Client, folder: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/failing", folder)
    client(load, "org/failing")
    monkeypatch.setattr(hub, "failing", True)
    assert_equal(client(load, "org/failing"), weights)
    assert "status 503" in error_message(client, load, "org/not-cached")


def test_unreachable_and_not_cached_raises(hub: Hub, client: Client, offline_client: Client, folder: Path) -> None:
    hub.add("org/far", folder)
    with hub.stopped():
        message = error_message(client, load, "org/far")
    assert "the model org/far is neither a folder nor in the cache, and the hub cannot be reached" in message
    assert "downloads are turned off" in error_message(client, load, "org/far", local_files_only=True)
    assert "downloads are turned off" in error_message(offline_client, load, "org/far")


def test_files_missing_in_the_cache_are_reported(hub: Hub, client: Client, folder: Path, tmp_path: Path) -> None:
    hub.add("org/partly", folder)
    client(load, "org/partly", cache_dir=tmp_path / "cache")
    offline = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    message = error_message(client, load, "org/partly", variant="fp16", **offline)
    assert "downloads are turned off, and the copy of org/partly in the cache has no such weights" in message
    assert f"found {WEIGHTS}.safetensors" in message
    (weights,) = (tmp_path / "cache").glob(f"*/snapshots/*/unet/{WEIGHTS}.safetensors")
    weights.unlink()
    assert "the cache has no such weights" in error_message(client, load, "org/partly", **offline)


def test_lost_file_is_downloaded_again(
    hub: Hub, client: Client, folder: Path, tmp_path: Path, weights: Weights
) -> None:
    hub.add("org/lost", folder)
    client(load, "org/lost", cache_dir=tmp_path / "cache")
    (lost,) = (tmp_path / "cache").glob(f"*/snapshots/*/unet/{WEIGHTS}.safetensors")
    lost.resolve().unlink()
    assert_equal(client(load, "org/lost", cache_dir=tmp_path / "cache"), weights)


def test_cache_dir(hub: Hub, client: Client, folder: Path, home: Path, tmp_path: Path) -> None:
    hub.add("org/elsewhere", folder)
    client(load, "org/elsewhere", cache_dir=tmp_path / "cache")
    assert (tmp_path / "cache/models--org--elsewhere").is_dir()
    assert not list(home.rglob("*elsewhere*"))


def test_disk_errors_are_not_reported_as_network_errors(hub: Hub, client: Client, folder: Path, tmp_path: Path) -> None:
    hub.add("org/no-room", folder)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        client(load, "org/no-room", cache_dir=tmp_path / "file")
    assert "cannot be reached" not in str(caught.value)


def test_subfolders(
    hub: Hub, client: Client, folder: Path, weights: Weights, make_unet: Callable[..., UNet2DModel]
) -> None:
    DDIMScheduler(beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    average = make_unet(layers_per_block=2)
    average.save_pretrained(folder / "nested/unet_ema")
    hub.add("org/parts", folder)
    config = client(load_scheduler, "org/parts", subfolder="scheduler", clip_sample=False)
    assert (config["beta_schedule"], config["clip_sample"]) == ("scaled_linear", False)
    assert hub.downloaded("org/parts") == sorted([*CONFIGS, "nested/unet_ema/config.json"])
    assert_equal(client(load_unet, "org/parts", subfolder="unet"), weights)
    assert_equal(client(load_unet, "org/parts", subfolder="nested/unet_ema"), numbers(average))
    assert client(load_with_scheduler, "org/parts", beta_schedule="jsd")["beta_schedule"] == "jsd"


def test_push_and_load(hub: Hub, client: Client, folder: Path, weights: Weights) -> None:
    address = client(push, folder, "org/pushed", token=WRITER, private=True)
    assert re.fullmatch(rf"{re.escape(hub.url)}/org/pushed/commit/[0-9a-f]{{40}}", address)
    assert hub.repositories["org/pushed"].private
    assert_equal(client(load, "org/pushed", token=READER), weights)
    client(push, folder, "org/pushed", token=WRITER, variant="fp16")
    pushed = hub.repositories["org/pushed"]
    assert set(pushed.commits[pushed.branches["main"]]) == {
        ".gitattributes",
        *CONFIGS,
        f"unet/{WEIGHTS}.safetensors",
        f"unet/{WEIGHTS}.fp16.safetensors",
    }


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "status 401: Invalid username or password"),
        ("hf_forged", "status 401: Invalid credentials"),
        (READER, "status 403: you need a write token"),
        (True, "no token is stored"),
    ],
)
def test_refused_push_raises(hub: Hub, client: Client, folder: Path, token: str | bool | None, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"the upload to org/refused failed: .*{message}") as caught:
        client(push, folder, "org/refused", token=token)
    assert "\n" not in str(caught.value)
    assert "org/refused" not in hub.repositories


def test_push_without_a_network_raises(hub: Hub, client: Client, offline_client: Client, folder: Path) -> None:
    with hub.stopped(), pytest.raises(RuntimeError, match="the upload to org/far failed: the hub cannot be reached"):
        client(push, folder, "org/far", token=WRITER)
    with pytest.raises(RuntimeError, match="the upload to org/far failed: downloads are turned off"):
        offline_client(push, folder, "org/far", token=WRITER)


@pytest.mark.parametrize(
    "name",
    [
        "nothing",
        "a/b/c",
        "a--b/c",
        "a/b..c",
        "a/b.git",
        "-a/b",
        "a/b-",
        "./a/b",
        "../a",
        "/a/b",
        "a b/c",
        "ä/b",
        "a/" + 97 * "b",
    ],
)
def test_invalid_hub_ids_raise(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="not a folder, and not a hub id"):
        find_model(name)


def test_paths_are_not_requested_from_the_hub() -> None:
    with pytest.raises(FileNotFoundError, match="not a folder, and not a hub id"):
        find_model(Path("org/name"))


def test_file_is_not_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/model.ckpt").touch()
    with pytest.raises(FileNotFoundError, match=r"the model 'runs/model.ckpt' does not exist: .*not a folder"):
        find_model("runs/model.ckpt")
