"""`DiscreteDDIMPipeline`: seeds, settings, folders, and what other pipelines make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddim import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim.bulk import sample_many
from ddim.discrete import DiscreteDDIMPipeline, DiscreteDDIMScheduler
from ddim.discrete.pipeline import open_pipeline
from ddim.evaluation.image_sets import sample_image_set
from ddim.info import describe
from ddim.io.fingerprint import model_sha256
from digits import TINY_MODEL
from helpers import same_tensors, seeded


def make_pipe(num_values: int = 3, **arguments: Any) -> DiscreteDDIMPipeline:
    torch.manual_seed(0)
    channels = {"in_channels": num_values, "out_channels": num_values}
    unet = UNet2DModel(**TINY_MODEL | channels | arguments).eval()
    pipe = DiscreteDDIMPipeline(unet, DiscreteDDIMScheduler(num_values=num_values))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> DiscreteDDIMPipeline:
    return make_pipe()


@pytest.fixture(scope="module")
def folder(pipe: DiscreteDDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("discrete")
    pipe.save_pretrained(path)
    return path


def sample(pipe: DiscreteDDIMPipeline, **settings: Any) -> np.ndarray:
    images = pipe(output_type="np", **{"num_inference_steps": 4} | settings)
    array: np.ndarray = images.images
    return array


def test_image_depends_on_its_seed_alone(pipe: DiscreteDDIMPipeline) -> None:
    batch = sample(pipe, seeds=[5, 7, 9], eta=0.5)
    assert np.array_equal(sample(pipe, seeds=[7], eta=0.5), batch[1:2])
    assert np.array_equal(sample(pipe, seeds=[9, 5], eta=0.5), batch[[2, 0]])
    assert not np.array_equal(batch[0], batch[1])
    images = pipe.sample_images(5, seed=5, batch_size=2, output_type="np", num_inference_steps=4, eta=0.5)
    assert np.array_equal(np.stack(images)[[0, 2, 4]], batch)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 7, 9)]
    assert np.array_equal(sample(pipe, batch_size=3, generator=generators, eta=0.5), batch)


def test_seeds_do_not_depend_on_the_dtype_of_the_network() -> None:
    half = make_pipe().to(torch.bfloat16)
    first, _ = half.sampler.initial_noise(seeds=[3])
    assert torch.equal(first, make_pipe().sampler.initial_noise(seeds=[3])[0])


def test_pipeline_takes_the_steps_of_the_scheduler(pipe: DiscreteDDIMPipeline) -> None:
    scheduler = DiscreteDDIMScheduler(num_values=3)
    timesteps, generator = [999, 400, 30], seeded(4)
    scheduler.set_timesteps(timesteps=timesteps)
    x = (torch.rand(1, 1, 8, 8, generator=generator) * 3).long()
    with torch.no_grad():
        for t in scheduler.timesteps:
            logits = pipe.unet(scheduler.scale_model_input(x), t).sample
            x = scheduler.step(logits, t, x, eta=0.2, generator=generator).prev_sample
    assert np.array_equal(sample(pipe, seeds=[4], timesteps=timesteps, eta=0.2)[..., 0] * 2, x[:, 0].numpy())


def test_images_are_of_the_values(pipe: DiscreteDDIMPipeline) -> None:
    images = sample(pipe, seeds=range(4))
    assert images.shape == (4, 8, 8, 1)
    assert np.unique(images).tolist() == [0, 0.5, 1]
    assert pipe(seeds=[0], num_inference_steps=1).images[0].getextrema() == (0, 255)
    assert pipe.sample_shape == (1, 8, 8)


def test_color_images_have_channels_of_their_own() -> None:
    pipe = make_pipe(2, in_channels=6, out_channels=6)
    assert sample(pipe, seeds=[0, 1]).shape == (2, 8, 8, 3)


def test_classes_and_guidance() -> None:
    pipe = make_pipe(num_class_embeds=3, has_null_class=True)
    two = sample(pipe, seeds=[1, 1], class_labels=[0, 1], guidance_scale=3.0)
    assert not np.array_equal(two[0], two[1])
    assert np.array_equal(sample(pipe, seeds=[1], class_labels=1, guidance_scale=3.0)[0], two[1])
    with pytest.raises(ValueError, match="guide must be None for a discrete process"):
        sample(pipe, class_labels=1, guide="mnist")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": 1.5}, "eta of a discrete process must be a number from 0 to 1, got 1.5"),
        ({"order": 2}, "order must be 1 for a discrete process, got 2"),
        ({"use_clipped_model_output": True}, "use_clipped_model_output must be False for a discrete process"),
        ({"eta": 1, "use_sigma_hat": True}, "use_sigma_hat must be False for a discrete process"),
        ({"num_inference_steps": 1001}, "num_inference_steps must be an integer from 1 to 1000"),
        ({"timesteps": [3, 5]}, "timesteps must be strictly decreasing"),
        ({"seeds": [-1]}, "seeds must be integers from 0"),
        ({"seeds": [1], "generator": seeded()}, "seeds and generator exclude each other"),
        ({"class_labels": 1}, "the model has no classes"),
    ],
)
def test_invalid_settings_are_refused(pipe: DiscreteDDIMPipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(pipe, **settings)


def test_invalid_components_are_refused() -> None:
    unet, scheduler = UNet2DModel(**TINY_MODEL), DiscreteDDIMScheduler()
    with pytest.raises(ValueError, match="a multiple of num_values=2, got 1 and 1"):
        DiscreteDDIMPipeline(unet, scheduler)
    with pytest.raises(TypeError, match="scheduler must be a DiscreteDDIMScheduler, got DDIMScheduler"):
        DiscreteDDIMPipeline(unet, DDIMScheduler())
    with pytest.raises(TypeError, match="unet must be a network"):
        DiscreteDDIMPipeline(3, scheduler)


def test_folder_round_trip(pipe: DiscreteDDIMPipeline, folder: Path) -> None:
    for loaded in (DiscreteDDIMPipeline.from_pretrained(folder), open_pipeline(folder)):
        assert type(loaded) is DiscreteDDIMPipeline
        assert same_tensors(loaded.unet.state_dict(), pipe.unet.state_dict())
        loaded.set_progress_bar_config(disable=True)
        assert np.array_equal(sample(loaded, seeds=[2]), sample(pipe, seeds=[2]))
        assert model_sha256(loaded) == model_sha256(pipe)


def test_other_pipelines_refuse_the_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"is a discrete model: ddim\.discrete\.DiscreteDDIMPipeline loads it"):
        DDIMPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="must be of a DiscreteDDIMPipeline, got 'DDIMPipeline'"):
        DiscreteDDIMPipeline.from_pretrained("mnist")


def test_damaged_folders_are_refused(pipe: DiscreteDDIMPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "scheduler/scheduler_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"_class_name": "DDIMScheduler"}))
    with pytest.raises(ValueError, match="the class must be one of DiscreteDDIMScheduler, got 'DDIMScheduler'"):
        DiscreteDDIMPipeline.from_pretrained(tmp_path)
    path.write_text(json.dumps(content | {"num_values": 2}))
    with pytest.raises(ValueError, match="a multiple of num_values=2, got 3 and 3"):
        DiscreteDDIMPipeline.from_pretrained(tmp_path)


def test_facts(folder: Path) -> None:
    facts = describe(folder)
    assert facts["images"] == {"height": 8, "width": 8, "channels": 1, "dtype": "uint8", "num_values": 3}
    assert facts["scheduler"]["num_values"] == 3


def test_bulk_sampling_and_evaluation_take_the_pipeline(pipe: DiscreteDDIMPipeline, tmp_path: Path) -> None:
    expected = np.stack(pipe.sample_images(5, seed=3, batch_size=2, output_type="np", num_inference_steps=3))
    sample_many(pipe, tmp_path / "x.npz", 5, 3, 2, num_inference_steps=3)
    found = np.load(tmp_path / "x.npz")["arr_0"]
    assert np.array_equal(found, np.round(expected * 255).astype(np.uint8))
    (batch,) = sample_image_set(pipe, 5, seed=3, num_inference_steps=3).batches()
    assert np.array_equal(batch[:, 0].numpy(), found[..., 0])
