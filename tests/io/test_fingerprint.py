"""SHA-256 of models: which changes it detects, and which it ignores."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ddim.io.fingerprint import model_sha256
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel


def sha256(unet: UNet2DModel, **scheduler: Any) -> str:
    return model_sha256(DDIMPipeline(unet, DDIMScheduler(**scheduler)))


def test_copies_have_equal_hashes(saved_pipeline: Path, tiny_pipeline: DDIMPipeline, tmp_path: Path) -> None:
    expected = model_sha256(tiny_pipeline)
    assert re.fullmatch(r"[0-9a-f]{64}", expected)
    reloaded = DDIMPipeline.from_pretrained(saved_pipeline)
    assert model_sha256(reloaded) == expected
    reloaded.save_pretrained(tmp_path / "elsewhere")
    assert model_sha256(DDIMPipeline.from_pretrained(tmp_path / "elsewhere")) == expected
    assert model_sha256(DDIMPipeline.from_pretrained("mnist")) == model_sha256(DDIMPipeline.from_pretrained("mnist"))


def test_sampling_settings_do_not_change_the_hash(tiny_unet: UNet2DModel) -> None:
    """Settings of sampling alone, and where and how the network has been run, do not change what a latent means."""
    expected = sha256(tiny_unet)
    for settings in (
        {"timestep_spacing": "trailing"},
        {"clip_sample": False},
        {"set_alpha_to_one": False},
        {"steps_offset": 1},
    ):
        assert sha256(tiny_unet, **settings) == expected
    assert sha256(tiny_unet.train().requires_grad_(False)) == expected
    assert sha256(tiny_unet.to(memory_format=torch.channels_last)) == expected


def test_every_weight_changes_the_hash(make_unet: Callable[..., UNet2DModel]) -> None:
    """One value of each tensor changes by one unit in the last place."""
    unet = make_unet()
    hashes = {sha256(unet)}
    state = unet.state_dict()
    for position, tensor in enumerate(state.values()):
        flat = tensor.view(-1)
        index = position * 7 % len(flat)
        old = flat[index].clone()
        flat[index] = torch.nextafter(old, torch.tensor(torch.inf))
        hashes.add(sha256(unet))
        flat[index] = old
    assert len(hashes) == 1 + len(state) > 50
    assert sha256(unet) in hashes


def test_swapped_weights_change_the_hash(make_unet: Callable[..., UNet2DModel]) -> None:
    unet = make_unet()
    original = sha256(unet)
    state = unet.state_dict()
    name, other = (f"down_blocks.0.resnets.0.conv{i}.weight" for i in (1, 2))
    unet.load_state_dict(state | {name: state[other].clone(), other: state[name].clone()})
    assert sha256(unet) != original


CONFIGS: list[dict[str, Any]] = [
    {"sample_size": 32},
    {"norm_eps": 1e-6},
    {"norm_num_groups": 2},
    {"flip_sin_to_cos": False},
    {"act_fn": "gelu"},
    {"attention_head_dim": 4},
]
SCHEDULERS: list[dict[str, Any]] = [
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_end": 0.0201},
    {"beta_start": 1.0001e-4},
    {"num_train_timesteps": 999},
    {"rescale_betas_zero_snr": True},
]


def test_configurations_change_the_hash(make_unet: Callable[..., UNet2DModel]) -> None:
    """These changes leave the weights as they are."""
    expected = make_unet().state_dict()
    hashes = {sha256(make_unet())}
    for changes in CONFIGS:
        unet = make_unet(**changes)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in unet.state_dict().items())
        hashes.add(sha256(unet))
    for changes in SCHEDULERS:
        hashes.add(sha256(make_unet(), **changes))
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        hashes.add(sha256(make_unet().to(dtype)))
    assert len(hashes) == 1 + len(CONFIGS) + len(SCHEDULERS) + 3
