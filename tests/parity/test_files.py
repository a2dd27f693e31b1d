"""Models saved by `diffusers` load in `ddim` and the reverse, with equal predictions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel
from helpers import public, seeded

WEIGHTS = "diffusion_pytorch_model"
OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

SHARDS = {"max_shard_size": "50KB"}
PICKLE = {"safe_serialization": False}
HALF = {"variant": "fp16"}

# Changes to the tiny U-Net, one per option that adds parameters.
NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fourier": {"time_embedding_type": "fourier"},
    "learned": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift"},
    "resnet": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "not-square": {"sample_size": (16, 32), "in_channels": 1, "out_channels": 1},
}

SCHEDULERS: dict[str, dict[str, Any]] = {
    "default": {},
    "ddpm-cifar10": {"beta_schedule": "linear", "steps_offset": 1, "set_alpha_to_one": False},
    "stable": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False},
    "betas": {"trained_betas": np.linspace(1e-4, 0.02, 500), "num_train_timesteps": 500},
    "v": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "thresholding": {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0},
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    diffusers.utils.logging.disable_progress_bar()
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity(level)


@pytest.fixture
def diffusers_unet(tiny_unet: UNet2DModel) -> diffusers.UNet2DModel:
    """The network of `diffusers` with the weights of `tiny_unet`."""
    unet = diffusers.UNet2DModel(**tiny_unet.config)
    unet.load_state_dict(tiny_unet.state_dict())
    return unet.eval()


def predict(unet: nn.Module) -> Tensor:
    """Return predictions for two samples, in float32."""
    height, width = (16, 16) if isinstance(unet.config.sample_size, int) else unet.config.sample_size
    noise = seeded(1)
    x = torch.randn(2, unet.config.in_channels, height, width, generator=noise)
    with torch.no_grad():
        return unet(x.to(unet.dtype), torch.tensor([7, 901])).sample.float()


def assert_same_network(ours: Any, theirs: Any, tolerance: float = 1e-6) -> None:
    assert type(ours) is UNet2DModel
    assert not ours.training
    assert ours.dtype == theirs.dtype
    for name, value in public(ours.config).items():
        assert json.dumps(theirs.config[name]) == json.dumps(value), name
    torch.testing.assert_close(predict(ours), predict(theirs), rtol=0, atol=tolerance)


def assert_same_scheduler(ours: Any, theirs: Any) -> None:
    # A file of another scheduler also holds its arguments, which are kept.
    for name, value in public(theirs.config).items():
        np.testing.assert_equal(np.asarray(ours.config[name]), np.asarray(value), err_msg=name)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5, atol=1e-7)


def make_flat(folder: Path, pickle: bool) -> None:
    """Convert a saved pipeline to the layout of the first models on the hub: files at the root, old attention names."""
    tensors = load_file(folder / f"unet/{WEIGHTS}.safetensors")
    for new, old in OLD_NAMES.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    if pickle:
        torch.save(tensors, folder / f"{WEIGHTS}.bin")
    else:
        save_file(tensors, folder / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
    (folder / "unet/config.json").rename(folder / "config.json")
    (folder / "scheduler/scheduler_config.json").rename(folder / "scheduler_config.json")
    shutil.rmtree(folder / "unet")
    shutil.rmtree(folder / "scheduler")


@pytest.mark.parametrize("kind", ["DDIM", "DDPM"])
@pytest.mark.parametrize(
    "options",
    [{}, PICKLE, SHARDS, PICKLE | SHARDS, HALF, HALF | PICKLE, HALF | SHARDS, HALF | PICKLE | SHARDS],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_loads_folders_of_diffusers(
    diffusers_unet: diffusers.UNet2DModel, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    scheduler = getattr(diffusers, f"{kind}Scheduler")(beta_schedule="squaredcos_cap_v2", clip_sample_range=2.0)
    pipeline = getattr(diffusers, f"{kind}Pipeline")(diffusers_unet, scheduler)
    if "variant" in options:
        pipeline.to(torch.float16)
    pipeline.save_pretrained(tmp_path, **options)

    loaded = DDIMPipeline.from_pretrained(tmp_path, variant=options.get("variant"))
    assert_same_network(loaded.unet, diffusers_unet.float())
    assert_same_scheduler(loaded.scheduler, diffusers.DDIMScheduler.from_config(scheduler.config))


@pytest.mark.parametrize(
    "options",
    [{}, SHARDS, HALF, HALF | SHARDS],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_diffusers_loads_folders(tiny_pipeline: DDIMPipeline, tmp_path: Path, options: dict[str, Any]) -> None:
    tiny_pipeline.save_pretrained(tmp_path, **options)
    for kind in (diffusers.DDIMPipeline, diffusers.DDPMPipeline):
        loaded = kind.from_pretrained(tmp_path, variant=options.get("variant"))
        assert type(loaded.scheduler) is diffusers.DDIMScheduler
        assert_same_network(tiny_pipeline.unet, loaded.unet)
        assert_same_scheduler(tiny_pipeline.scheduler, loaded.scheduler)


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_load_in_both_libraries(make_unet: Callable[..., UNet2DModel], tmp_path: Path, network: str) -> None:
    ours = make_unet(**NETWORKS[network])
    theirs = diffusers.UNet2DModel(**ours.config).eval()
    theirs.load_state_dict(ours.state_dict())
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_network(ours, diffusers.UNet2DModel.from_pretrained(tmp_path / "ours"))
    assert_same_network(UNet2DModel.from_pretrained(tmp_path / "theirs"), theirs)


@pytest.mark.parametrize("arguments", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_load_in_both_libraries(tmp_path: Path, arguments: dict[str, Any]) -> None:
    ours, theirs = DDIMScheduler(**arguments), diffusers.DDIMScheduler(**arguments)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_scheduler(ours, diffusers.DDIMScheduler.from_pretrained(tmp_path / "ours"))
    assert_same_scheduler(DDIMScheduler.from_pretrained(tmp_path / "theirs"), theirs)


@pytest.mark.parametrize("pickle", [True, False], ids=["pickle", "safetensors"])
def test_flat_layout(diffusers_unet: diffusers.UNet2DModel, tmp_path: Path, pickle: bool) -> None:
    diffusers.DDPMPipeline(diffusers_unet, diffusers.DDPMScheduler(beta_end=0.01)).save_pretrained(tmp_path)
    make_flat(tmp_path, pickle)
    loaded = DDIMPipeline.from_pretrained(tmp_path)
    theirs = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert_same_network(loaded.unet, theirs.unet)
    assert_same_network(loaded.unet, diffusers_unet)
    assert_same_scheduler(loaded.scheduler, diffusers.DDIMScheduler.from_config(theirs.scheduler.config))
    assert_same_network(UNet2DModel.from_pretrained(tmp_path), diffusers_unet)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(diffusers_unet: diffusers.UNet2DModel, tmp_path: Path, dtype: torch.dtype) -> None:
    diffusers.DDIMPipeline(diffusers_unet, diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    loaded = DDIMPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
    theirs = diffusers.DDIMPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
    assert loaded.dtype == dtype
    for name, value in theirs.unet.state_dict().items():
        torch.testing.assert_close(loaded.unet.state_dict()[name], value, rtol=0, atol=0)


def test_components_override_files(diffusers_unet: diffusers.UNet2DModel, tmp_path: Path) -> None:
    diffusers.DDIMPipeline(diffusers_unet, diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    unet = diffusers.UNet2DModel(**diffusers_unet.config)
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear")
    for kind in (DDIMPipeline, diffusers.DDIMPipeline):
        assert kind.from_pretrained(tmp_path, unet=unet).unet is unet
        assert kind.from_pretrained(tmp_path, scheduler=scheduler).scheduler.config.beta_schedule == "scaled_linear"
    shutil.rmtree(tmp_path / "unet")
    assert DDIMPipeline.from_pretrained(tmp_path, unet=diffusers_unet).unet is diffusers_unet


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_images_of_a_loaded_pipeline_match(diffusers_unet: diffusers.UNet2DModel, tmp_path: Path, eta: float) -> None:
    diffusers.DDPMPipeline(diffusers_unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    images = []
    for pipe in (DDIMPipeline.from_pretrained(tmp_path), diffusers.DDIMPipeline.from_pretrained(tmp_path)):
        pipe.set_progress_bar_config(disable=True)
        generator = seeded(3)
        arguments = {"batch_size": 2, "generator": generator, "eta": eta, "num_inference_steps": 20}
        images.append(np.asarray([np.asarray(image) for image in pipe(**arguments).images], dtype=np.int64))
    ours, theirs = images
    assert ours.std() > 10
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1)
