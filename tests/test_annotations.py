"""Arguments are checked against annotations, and configurations against bounds, before anything is built."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddim import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim.annotations import check_arguments
from ddim.io.hub import builtin_models
from programs import run_python

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}


def function(
    flag: bool, count: int, size: float, name: str | None = None, sides: int | tuple[int, int] | None = None
) -> None:
    """Take one argument of each kind."""


@pytest.mark.parametrize(
    "arguments",
    [
        {"flag": True, "count": 3, "size": 2},
        {"flag": np.bool_(False), "count": np.int64(3), "size": np.float32(0.5), "name": None},
        {"count": torch.tensor(3), "size": 1e300, "name": "x", "sides": [1, 2]},
        {"sides": (1, np.int32(2))},
        {"sides": None},
    ],
)
def test_values_of_the_annotated_types_pass(arguments: dict[str, Any]) -> None:
    check_arguments(function, arguments)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("flag", 1, "flag must be True or False, got 1"),
        ("flag", "false", "flag must be True or False, got 'false'"),
        ("count", 2.0, "count must be an integer, got 2.0"),
        ("count", True, "count must be an integer, got True"),
        ("size", None, "size must be a finite number, got None"),
        ("size", float("inf"), "size must be a finite number, got inf"),
        ("size", 10**400, "size must be a finite number, got 1000"),
        ("name", 3, "name must be a text, or None, got 3"),
        ("sides", (1, 2, 3), "sides must be an integer, or a list of 2 integers, or None, got (1, 2, 3)"),
        ("sides", "12", "sides must be an integer, or a list of 2 integers, or None, got '12'"),
    ],
)
def test_values_of_other_types_raise(name: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        check_arguments(function, {name: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_eps": None},
        {"norm_eps": 0},
        {"center_input_sample": "x"},
        {"freq_shift": float("nan")},
        {"freq_shift": 4},
        {"block_out_channels": 32},
        {"block_out_channels": (8, -8)},
        {"layers_per_block": 10**9},
        {"sample_size": 65_536},
        {"sample_size": [8, 8, 8]},
        {"down_block_types": "DownBlock2D"},
        {"num_class_embeds": 10**9},
        {"mid_block_scale_factor": 0},
        {"dropout": 2},
        {"downsample_padding": -1},
    ],
    ids=str,
)
def test_network_configurations(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises((TypeError, ValueError), match=name):
        UNet2DModel(**SMALL | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_sample_range": 1e30},
        {"sample_max_value": 0},
        {"set_alpha_to_one": []},
        {"clip_sample": 1},
        {"num_train_timesteps": 10**8},
        {"beta_start": "0.1"},
        {"steps_offset": 1.5},
    ],
    ids=str,
)
def test_scheduler_configurations(changes: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(changes))):
        DDIMScheduler(**changes)


@pytest.mark.parametrize("given", [{}, {"num_train_timesteps": 1000}], ids=str)
def test_trained_betas_give_the_number_of_timesteps(given: dict[str, int], caplog: pytest.LogCaptureFixture) -> None:
    scheduler = DDIMScheduler(trained_betas=[0.1] * 100, **given)
    assert ("num_train_timesteps is 100" in caplog.text) == bool(given)
    assert scheduler.config.num_train_timesteps == len(scheduler) == 100
    assert DDIMScheduler.from_config(scheduler.config).config.num_train_timesteps == 100


def copy_of_mnist(folder: Path) -> Path:
    for path in builtin_models()["mnist"].rglob("*"):
        if path.suffix in (".json", ".safetensors"):
            target = folder / path.relative_to(builtin_models()["mnist"])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("unet", {"layers_per_block": 10**9}),
        ("unet", {"sample_size": 65_536}),
        ("unet", {"norm_eps": None}),
        ("scheduler", {"num_train_timesteps": 10**8}),
        ("scheduler", {"clip_sample_range": 1e30}),
    ],
    ids=str,
)
def test_files_are_refused_at_once(part: str, changes: dict[str, Any], tmp_path: Path) -> None:
    path = copy_of_mnist(tmp_path) / part / ("config.json" if part == "unet" else "scheduler_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    started = time.process_time()
    with pytest.raises(ValueError, match=f"{path.name} does not describe .*{next(iter(changes))}"):
        DDIMPipeline.from_pretrained(tmp_path)
    assert time.process_time() - started < 5


def test_small_pickle_of_a_large_tensor_takes_no_memory(tmp_path: Path) -> None:
    weights = copy_of_mnist(tmp_path) / "unet/diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({"conv_in.weight": torch.zeros(1).expand(2**31)}, weights.with_suffix(".bin"))
    script = """
import resource, sys
from ddim import DDIMPipeline
try:
    DDIMPipeline.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    result = run_python(script, tmp_path)
    assert result.returncode == 0, result.stderr
    message, mebibytes = result.stdout.splitlines()
    assert re.search(r"\.bin is damaged: its tensors take 8589934592 bytes, the file \d+$", message)
    assert int(mebibytes) < 3000
