"""`DDIMPipeline`: seeds, latents, callbacks, modes, devices, and invalid input."""

from __future__ import annotations

import io
import logging
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddim import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim.outputs import UNet2DOutput
from helpers import matches, randn, seeded


@pytest.fixture(scope="module")
def pipe() -> DDIMPipeline:
    pipe = DDIMPipeline.from_pretrained("mnist")
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Zero(nn.Module):
    """A denoiser that predicts zero and records its timesteps and modes."""

    def __init__(self) -> None:
        super().__init__()
        self.config = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=2,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
        ).config  # fmt: skip
        self.timesteps: list[int] = []
        self.modes: set[tuple[bool, bool]] = set()

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        self.timesteps.append(int(timestep))
        self.modes.add((self.training, torch.is_grad_enabled()))
        return UNet2DOutput(torch.zeros_like(sample))


@pytest.fixture
def zero() -> DDIMPipeline:
    pipe = DDIMPipeline(Zero(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_seed_is_independent_of_batch_and_order(pipe) -> None:
    single = pipe(seeds=[7], num_inference_steps=20).images[0]
    batches = [[1, 2, 3, 7, 4, 5, 6, 8], [8, 7, 6, 5, 4, 3, 2, 1]]
    batched = [pipe(seeds=seeds, num_inference_steps=20).images[seeds.index(7)] for seeds in batches]
    assert (
        png(batched[0])
        == png(batched[1])
        == png(pipe(batch_size=8, seeds=batches[0], num_inference_steps=20).images[3])
    )
    assert np.abs(np.asarray(single, int) - np.asarray(batched[0], int)).max() <= 1
    assert png(single) == png(pipe(batch_size=1, seeds=[7], num_inference_steps=20).images[0])


def test_seed_determines_stochastic_noise(pipe) -> None:
    single = pipe(seeds=[7], eta=1.0, num_inference_steps=10).images[0]
    batched = pipe(seeds=[3, 7, 5], eta=1.0, num_inference_steps=10).images[1]
    assert np.abs(np.asarray(single, int) - np.asarray(batched, int)).max() <= 1


def test_seeds_match_seeded_generators(pipe) -> None:
    a = pipe(seeds=[7, 9], num_inference_steps=4, output_type="pt").images
    generators = [seeded(7), seeded(9)]
    b = pipe(batch_size=2, generator=generators, num_inference_steps=4, output_type="pt").images
    assert torch.equal(a, b)


def test_sample_images_is_independent_of_batch_size(pipe) -> None:
    images = pipe.sample_images(5, seed=10, batch_size=2, num_inference_steps=4)
    assert len(images) == 5
    expected = pipe.sample_images(3, seed=12, batch_size=2, num_inference_steps=4)
    assert [png(image) for image in images[2:]] == [png(image) for image in expected]


def test_paint_is_deprecated_alias(pipe) -> None:
    expected = pipe.sample_images(2, seed=10, num_inference_steps=2)
    with pytest.warns(DeprecationWarning, match="use sample_images"):
        images = pipe.paint(2, seed=10, num_inference_steps=2)
    assert [png(image) for image in images] == [png(image) for image in expected]


def test_latents_are_initial_samples(pipe) -> None:
    noise = randn(1, 1, 28, 28, seed=7)
    a = pipe(latents=noise, num_inference_steps=4, output_type="pt").images
    assert torch.equal(a, pipe(seeds=[7], num_inference_steps=4, output_type="pt").images)
    assert pipe(latents=noise.repeat(3, 1, 1, 1), num_inference_steps=1, output_type="np").images.shape == (
        3,
        28,
        28,
        1,
    )


def test_output_types(pipe) -> None:
    pil, array, tensor = (
        pipe(seeds=[1], num_inference_steps=2, output_type=kind).images for kind in ("pil", "np", "pt")
    )
    assert pil[0].size == (28, 28)
    assert array.shape == (1, 28, 28, 1)
    assert tensor.shape == (1, 1, 28, 28)
    assert 0 <= array.min() <= array.max() <= 1
    assert np.array_equal(array[0, :, :, 0], tensor[0, 0].numpy())
    assert np.array_equal(np.asarray(pil[0]), (array[0, :, :, 0] * 255).round())
    assert pipe(seeds=[1], num_inference_steps=2, return_dict=False)[0][0].tobytes() == pil[0].tobytes()


def test_network_is_evaluated_once_per_timestep(zero) -> None:
    zero(num_inference_steps=4)
    assert zero.unet.timesteps == [750, 500, 250, 0]
    zero.unet.timesteps.clear()
    zero(timesteps=[900, 5, 1])
    assert zero.unet.timesteps == [900, 5, 1] == zero.scheduler.timesteps.tolist()


def test_network_runs_in_its_own_mode_without_gradients(zero) -> None:
    zero.unet.train()
    zero(num_inference_steps=2)
    assert zero.unet.modes == {(True, False)}
    assert zero.unet.training

    def fail(*_):
        raise KeyError("stop")

    with pytest.raises(KeyError):
        zero(num_inference_steps=2, callback_on_step_end=fail)
    assert zero.unet.training
    assert torch.is_grad_enabled()


def test_callback_receives_each_step_and_may_replace_latents(zero) -> None:
    calls = []

    def record(pipe, index, timestep, tensors):
        calls.append((index, timestep, sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 2 else None

    images = zero(num_inference_steps=3, seeds=[1], callback_on_step_end=record, output_type="pt").images
    assert calls == [(i, t, ["latents", "pred_original_sample"]) for i, t in enumerate([666, 333, 0])]
    assert torch.equal(images, torch.full((1, 1, 8, 8), 0.5))
    with pytest.raises(ValueError, match=r"latents of the callback: expected shape \(1, 1, 8, 8\), got \(1,\)"):
        zero(num_inference_steps=3, callback_on_step_end=lambda *_: {"latents": torch.zeros(1)})


def test_progress_bar_settings(zero, capsys) -> None:
    zero.set_progress_bar_config(desc="custom")
    zero(num_inference_steps=2)
    assert "custom: 100%" in capsys.readouterr().err
    zero.set_progress_bar_config(disable=True)
    zero(num_inference_steps=2)
    assert capsys.readouterr().err == ""


def test_half_precision_keeps_samples_in_float32(pipe) -> None:
    reference = pipe(seeds=[1], num_inference_steps=5, output_type="pt").images
    half = DDIMPipeline.from_pretrained("mnist", torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    images = half(seeds=[1], num_inference_steps=5, output_type="pt").images
    assert half.dtype == torch.bfloat16
    assert images.dtype == torch.float32
    assert (images - reference).abs().mean() < 0.02


def test_to_moves_and_returns_the_pipeline() -> None:
    pipe = DDIMPipeline.from_pretrained("mnist")
    assert pipe.to("cpu") is pipe
    assert pipe.to(torch.float64).dtype == torch.float64
    assert pipe.to("cpu", torch.float32).dtype == torch.float32
    assert pipe.to(dtype=torch.bfloat16).unet.conv_in.weight.dtype == torch.bfloat16
    assert pipe.device == torch.device("cpu")
    for target in ("nowhere", 3.5, torch.int64):
        with pytest.raises((ValueError, TypeError), match=r"^d(evice|type) must be"):
            pipe.to(target)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device must be .*, got 'cuda'"):
            pipe.to("cuda")


def test_components_and_register_modules(pipe, zero) -> None:
    assert pipe.components == {"unet": pipe.unet, "scheduler": pipe.scheduler}
    twin = DDIMPipeline(**pipe.components)
    assert twin.unet is pipe.unet
    twin.register_modules(scheduler=DDIMScheduler(timestep_spacing="trailing"), unet=zero.unet)
    assert twin.scheduler.config.timestep_spacing == "trailing"
    assert twin.unet is zero.unet
    with pytest.raises(TypeError, match=r"must have a \.config"):
        DDIMPipeline(object(), DDIMScheduler())


def test_non_square_samples() -> None:
    unet = UNet2DModel(
        sample_size=(8, 12), in_channels=1, out_channels=1, block_out_channels=(4, 4), norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    pipe = DDIMPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=1).images[0].size == (12, 8)


def test_sigma_hat_adds_larger_ddpm_noise(zero) -> None:
    """The network predicts zero, so that a step adds only its noise to sqrt(alpha_prev / alpha) x."""
    zero.scheduler = DDIMScheduler(clip_sample=False)
    a, a_prev = zero.scheduler.alphas_cumprod[[900, 880]].double().tolist()
    latents = torch.zeros(256, 1, 8, 8)
    stds = []
    for use_sigma_hat in (False, True):

        def record_first(pipe, index, timestep, tensors):
            if index == 0:
                stds.append(float(tensors["latents"].std()))

        zero(
            latents=latents,
            seeds=range(256),
            eta=1.0,
            timesteps=[900, 880],
            use_sigma_hat=use_sigma_hat,
            callback_on_step_end=record_first,
        )
    expected = [math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev)), math.sqrt(1 - a / a_prev)]
    assert stds == pytest.approx(expected, rel=0.02)


INVALID = [
    ({"num_inference_steps": 0}, "num_inference_steps must ... got 0"),
    ({"num_inference_steps": -5}, "num_inference_steps must ... got -5"),
    ({"num_inference_steps": 2.5}, "num_inference_steps must ... got 2.5"),
    ({"num_inference_steps": 1001}, "num_inference_steps must be at most 1000 ... got 1001"),
    ({"eta": -0.1}, "eta must ... got -0.1"),
    ({"eta": float("nan")}, "eta must ... got nan"),
    ({"eta": float("inf")}, "eta must ... got inf"),
    ({"eta": "1"}, "eta must ... got '1'"),
    ({"batch_size": 0}, "batch_size must ... got 0"),
    ({"batch_size": -1}, "batch_size must ... got -1"),
    ({"batch_size": 1.5}, "batch_size must ... got 1.5"),
    ({"batch_size": 2, "seeds": [1, 2, 3]}, "seeds must hold one integer per image, got 3 for a batch_size of 2"),
    ({"seeds": []}, "seeds must hold one integer per image, got 0"),
    ({"seeds": [-1]}, "seeds must be integers from 0 to 2^63 - 1, got -1"),
    ({"seeds": [1.5]}, "seeds must be integers from 0 to 2^63 - 1, got 1.5"),
    ({"batch_size": 3, "generator": [torch.Generator()] * 2}, "generator ... got 2 for a batch_size of 3"),
    ({"generator": 7}, "generator must be a torch.Generator or a list of them, got int"),
    ({"seeds": 3}, "seeds must be a list of integers, one per image, got 3"),
    ({"seeds": [1], "generator": torch.Generator()}, "seeds and generator exclude each other"),
    ({"latents": torch.zeros(1, 3, 8, 8)}, "latents: expected shape"),
    ({"latents": torch.zeros(1, 1, 8, 9)}, "latents: expected shape"),
    ({"latents": torch.zeros(8, 8)}, "latents: expected shape"),
    ({"batch_size": 2, "latents": torch.zeros(3, 1, 8, 8)}, "latents: expected shape"),
    ({"latents": torch.full((1, 1, 8, 8), float("nan"))}, "finite"),
    ({"latents": torch.zeros(1, 1, 8, 8, dtype=torch.int64)}, "finite floating-point"),
    ({"latents": [[0.0]]}, "latents must be a tensor (N, C, H, W), got list"),
    ({"output_type": "jpg"}, "output_type must ... got 'jpg'"),
    ({"order": 5}, "order must ... got 5"),
    ({"order": 2, "eta": 1.0}, "order=2 requires eta=0 (deterministic sampling), got eta=1"),
    ({"timesteps": []}, "timesteps must hold at least one timestep, got none"),
    ({"timesteps": [1, 2]}, "strictly decreasing"),
    ({"timesteps": [1000, 2]}, "1000"),
    ({"timesteps": [5.5]}, "timesteps must be integers from 0 to 999, got 5.5"),
    ({"use_sigma_hat": True}, "requires eta=1, got eta=0"),
]


@pytest.mark.parametrize(("arguments", "message"), INVALID, ids=lambda value: value if isinstance(value, str) else "")
def test_invalid_input_raises_before_network_runs(zero, arguments, message) -> None:
    with pytest.raises((ValueError, TypeError), match=r".*") as caught:
        zero(**arguments)
    assert matches(str(caught.value), message)
    assert "\n" not in str(caught.value)
    assert zero.unet.timesteps == []


def test_epsilon_prediction_without_signal_raises(zero) -> None:
    zero.scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="no signal"):
        zero(num_inference_steps=4)


def test_eta_above_1_warns(zero, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        zero(eta=1.5, num_inference_steps=2)
    assert "eta is 1.5" in caplog.text


def test_from_pretrained_rejects_unknown_arguments() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'eta'"):
        DDIMPipeline.from_pretrained("mnist", eta=0.5)
    with pytest.raises(ValueError, match="device_map must be a device"):
        DDIMPipeline.from_pretrained("mnist", device_map=0.5)
    with pytest.raises(FileNotFoundError, match="the model 'mnits' does not exist"):
        DDIMPipeline.from_pretrained("mnits")


def test_component_override(zero) -> None:
    pipe = DDIMPipeline.from_pretrained("mnist", scheduler=DDIMScheduler(timestep_spacing="trailing"), unet=zero.unet)
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    assert pipe.unet is zero.unet


def test_subclass_may_replace_progress_bar(zero) -> None:
    totals = []

    class Counted(DDIMPipeline):
        def progress_bar(self, iterable=None, total=None):
            totals.append(len(iterable))
            return super().progress_bar(iterable, total)

    pipe = Counted(zero.unet, zero.scheduler)
    pipe(num_inference_steps=3)
    pipe.encode(torch.zeros(1, 1, 8, 8), 4, exact=False, verify=False)
    pipe.consistency(torch.zeros(1, 1, 8, 8), [2, 5])
    assert totals == [3, 3, 7]


@pytest.mark.parametrize("model", [None, 3])
@pytest.mark.parametrize(
    "load",
    [
        DDIMPipeline.from_pretrained,
        DDIMPipeline.download,
        UNet2DModel.from_pretrained,
        UNet2DModel.load_config,
        DDIMScheduler.from_pretrained,
    ],
)
def test_model_that_is_not_a_name_raises(load, model) -> None:
    with pytest.raises(TypeError, match=f"a model must be given by its name or folder, got {model}"):
        load(model)


def test_edit_refuses_a_seed_that_is_not_in_a_list(zero) -> None:
    with pytest.raises(TypeError, match="seeds must be a list of integers, one per image, got 3"):
        zero.edit(torch.zeros(1, 1, 8, 8), seeds=3)
