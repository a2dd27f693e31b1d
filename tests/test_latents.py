"""Latents: encoding, decoding, interpolation, trajectories, edits, and invalid input."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ddim import DDIMPipeline, DDIMScheduler
from ddim.diffusion.noise import noise_from_seeds
from ddim.inversion import BATCHES_PER_GROUP, generate, invertible_steps
from ddim.outputs import EncodeOutput, UNet2DOutput
from digits import digits
from helpers import ALPHAS, matches, rand, randn

# Timesteps at which a network with random weights is invertible.
INVERTIBLE_TIMESTEPS = [300, 200, 100, 0]


class Network(nn.Module):
    """Nearly the exact network for pixels of N(mean, 0.5^2), with a small term of the neighboring pixel. It records its
    calls, and its steps are invertible.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mean = 0.1
        self.config = SimpleNamespace(sample_size=8, in_channels=1)
        self.timesteps: list[int] = []
        self.sizes: list[int] = []
        self.modes: set[tuple[bool, bool]] = set()

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        self.timesteps.append(int(timestep))
        self.sizes.append(len(sample))
        self.modes.add((self.training, torch.is_grad_enabled()))
        a = float(ALPHAS[int(timestep)])
        epsilon = math.sqrt(1 - a) * (sample - math.sqrt(a) * self.mean) / (a * 0.25 + 1 - a)
        return UNet2DOutput(epsilon + 0.03 * math.sqrt(1 - a) * torch.tanh(sample.roll(1, -1)))


@pytest.fixture
def pipe() -> DDIMPipeline:
    pipe = DDIMPipeline(Network(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def mnist() -> DDIMPipeline:
    pipe = DDIMPipeline.from_pretrained("mnist")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unit(samples: Tensor) -> Tensor:
    """Map [-1, 1] to [0, 1], the range of returned images."""
    return (samples / 2 + 0.5).clamp(0, 1)


def handwritten(count: int) -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in digits(count)]


# --- encode, decode, reconstruct


def test_images_are_reconstructed(tiny_pipeline: DDIMPipeline) -> None:
    x = rand(5, 3, 16, 16)
    encoding = tiny_pipeline.encode(x, timesteps=INVERTIBLE_TIMESTEPS, batch_size=4)
    assert encoding.converged.all()
    images = tiny_pipeline.decode(encoding, timesteps=INVERTIBLE_TIMESTEPS, output_type="pt", batch_size=4).images
    assert (images - unit(x)).abs().max() <= 1e-3
    assert (encoding.latents - x).square().mean() > 0.01
    result = tiny_pipeline.reconstruct(x, timesteps=INVERTIBLE_TIMESTEPS, output_type="pt", batch_size=4)
    assert torch.equal(result.images, images)
    assert torch.equal(result.codes.latents, encoding.latents)
    assert result.mse.max() <= 1e-9


def test_exact_inversion_beats_euler_on_generated_images(mnist: DDIMPipeline) -> None:
    images = mnist(seeds=[1, 3], num_inference_steps=20).images
    exact, euler = (mnist.reconstruct(images, 20, exact, batch_size=2) for exact in (True, False))
    assert (euler.mse / exact.mse).min() >= 1000
    assert exact.psnr.min() > 60
    # Every pixel, not only their mean, after rounding to bytes.
    for original, reconstructed in zip(images, exact.images, strict=True):
        assert np.abs(np.asarray(original, int) - np.asarray(reconstructed, int)).max() <= 2


def test_exact_inversion_beats_euler_on_unseen_images(mnist: DDIMPipeline) -> None:
    """Enlarged from 8x8, they differ from the training images, and decoding magnifies the residuals of encoding."""
    exact, euler = (mnist.reconstruct(handwritten(3), 20, exact, resize=True, batch_size=3) for exact in (True, False))
    ratio = euler.mse / exact.mse
    assert ratio.median() >= 1000
    assert ratio.min() >= 10


@pytest.mark.parametrize("exact", [True, False])
def test_latents_are_independent_of_batch(mnist: DDIMPipeline, exact: bool) -> None:
    images, timesteps = handwritten(3), [700, 400, 150]
    settings: dict[str, Any] = {"timesteps": timesteps, "batch_size": 2}
    limits = {"exact": exact, "max_iterations": 25, "resize": True}
    encoding = mnist.encode(images, **settings, **limits)
    assert not exact or len(set(encoding.evaluations.sum(1).tolist())) > 1
    decoded = mnist.decode(encoding, output_type="pt", **settings).images
    for order in ([0], [1], [2], [2, 0]):
        subset = mnist.encode([images[i] for i in order], **settings, **limits)
        for name in ("latents", "residuals", "evaluations"):
            assert torch.equal(getattr(subset, name), getattr(encoding, name)[order]), (order, name)
        assert torch.equal(mnist.decode(subset, output_type="pt", **settings).images, decoded[order])
    # Nor on the batch size, as the engine computes each sample alone.
    for batch_size in (1, 3):
        other = mnist.encode(images, **settings | {"batch_size": batch_size}, **limits)
        assert torch.equal(other.latents, encoding.latents)


def test_latents_are_independent_of_group(tiny_pipeline: DDIMPipeline) -> None:
    x = rand(2 * BATCHES_PER_GROUP + 1, 3, 16, 16)
    settings: dict[str, Any] = {"timesteps": [200, 100], "batch_size": 2}
    encoding = tiny_pipeline.encode(x, **settings)
    images = tiny_pipeline.decode(encoding, output_type="np", **settings).images
    for index in (0, 5, 2 * BATCHES_PER_GROUP):
        single = tiny_pipeline.encode(x[index : index + 1], **settings)
        assert torch.equal(single.latents, encoding.latents[index : index + 1])
        assert torch.equal(single.evaluations, encoding.evaluations[index : index + 1])
        assert np.array_equal(tiny_pipeline.decode(single, output_type="np", **settings).images[0], images[index])


def test_network_receives_only_full_batches(pipe: DDIMPipeline) -> None:
    for batch_size in (1, 3):
        pipe.unet.sizes.clear()
        encoding = pipe.encode(rand(4, 1, 8, 8), 5, batch_size=batch_size)
        pipe.decode(encoding, 5, batch_size=batch_size)
        assert set(pipe.unet.sizes) == {batch_size}


def test_encode_output_fields(pipe: DDIMPipeline) -> None:
    encoding = pipe.encode(rand(3, 1, 8, 8), 10, verify=False, batch_size=1)
    assert encoding.mse.isnan().all()
    assert encoding.latents.shape == (3, 1, 8, 8)
    assert encoding.latents.dtype == torch.float32
    assert encoding.timesteps == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0] == pipe.latent_timesteps(10)
    assert encoding.residuals.shape == encoding.evaluations.shape == (3, 10)
    assert encoding.evaluations.dtype == torch.int64
    assert encoding.tolerance == 1e-5
    # With a batch size of 1 each evaluation is a call; the step from timestep 0 takes none.
    assert int(encoding.evaluations.sum()) == len(pipe.unet.timesteps)
    calls = [pipe.unet.timesteps.count(t) for t in encoding.timesteps]
    # The evaluation at timestep 0 is for the first guess of the step to timestep 100.
    calls[-2:] = [calls[-2] + calls[-1], 0]
    assert encoding.evaluations.sum(0).tolist() == calls
    assert (encoding.residuals[:, :-1] > 0).all()
    assert (encoding.residuals[:, -1] == 0).all()
    assert torch.equal(encoding.residual, encoding.residuals.max(1).values)
    assert encoding.converged.tolist() == [True] * 3
    assert encoding.residuals.max() <= 1e-5


def test_euler_evaluates_once_per_step_and_once_more(pipe: DDIMPipeline) -> None:
    encoding = pipe.encode(rand(2, 1, 8, 8), 10, exact=False, verify=False, batch_size=2)
    assert encoding.evaluations.tolist() == [[1] * 8 + [2, 0]] * 2
    assert pipe.unet.timesteps == encoding.timesteps[::-1]
    pipe.unet.timesteps.clear()
    pipe.decode(encoding, 10, batch_size=2)
    assert pipe.unet.timesteps == encoding.timesteps[:-1]


def test_encode_reports_reconstruction_mse(pipe: DDIMPipeline, caplog: pytest.LogCaptureFixture) -> None:
    x = rand(2, 1, 8, 8)
    with caplog.at_level(logging.WARNING):
        encoding = pipe.encode(x, 10)
        assert caplog.records == []
        samples = generate(pipe.sampler, encoding.latents, invertible_steps(pipe.scheduler, 10), 8)
        assert torch.equal(encoding.mse, ((samples - x) / 2).double().square().mean((1, 2, 3)))
        assert encoding.mse.max() < 1e-9
        inexact = pipe.encode(x, timesteps=[900, 0], max_iterations=1)
    assert inexact.mse.max() > 1 / 255**2
    assert f"mean squared error up to {float(inexact.mse.max()):.1e}" in caplog.text


@pytest.mark.parametrize("exact", [True, False])
def test_residual_matches_scheduler_step(pipe: DDIMPipeline, exact: bool) -> None:
    x = rand(3, 1, 8, 8, dtype=torch.float64)
    pipe.unet.dtype = torch.float64
    encoding = pipe.encode(x, timesteps=[400], exact=exact)
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(timesteps=[400])
    difference = (
        x - scheduler.step(pipe.unet(encoding.latents, torch.tensor(400)).sample, 400, encoding.latents).prev_sample
    )
    assert encoding.residuals[:, 0].tolist() == pytest.approx(difference.abs().flatten(1).amax(1).tolist(), rel=1e-6)
    assert encoding.converged.tolist() == [exact] * 3
    # With several steps it is the last column, the step closest to the image.
    two_steps = pipe.encode(x, timesteps=[700, 400], exact=exact)
    assert torch.equal(two_steps.residuals[:, 1:], encoding.residuals)


def test_converged_requires_every_step_within_tolerance() -> None:
    residuals = torch.tensor([[0.25, 0.0], [0.0, 0.26], [math.inf, 0.0], [0.1, 0.2], [math.nan, 0.0]])
    encoding = EncodeOutput(
        torch.zeros(5, 1, 8, 8), [900, 400], residuals, torch.ones(5, 2, dtype=torch.int64), 0.25, torch.zeros(5)
    )
    assert encoding.converged.tolist() == [True, False, False, True, False]
    assert encoding.residual[:4].tolist() == residuals[:4].max(1).values.tolist()


def test_tighter_tolerance_takes_more_evaluations(pipe: DDIMPipeline) -> None:
    x = rand(2, 1, 8, 8)
    loose, tight = (pipe.encode(x, 10, tolerance=tolerance) for tolerance in (1e-2, 1e-6))
    assert tight.residuals.max() <= 1e-6 < loose.residuals.max() <= 1e-2
    assert (tight.evaluations.sum(1) > loose.evaluations.sum(1)).all()
    assert tight.evaluations.max() <= 50
    limited = pipe.encode(x, 10, tolerance=1e-6, max_iterations=2)
    assert limited.evaluations.max() == 3
    assert not limited.converged.any()


def test_warning_is_logged_only_if_tolerance_is_missed(pipe: DDIMPipeline, caplog: pytest.LogCaptureFixture) -> None:
    x = rand(3, 1, 8, 8)
    with caplog.at_level(logging.WARNING):
        assert pipe.encode(x, 10).converged.all()
        # Residuals of Euler steps are not a failure.
        assert not pipe.encode(x, 10, exact=False).converged.any()
        assert caplog.records == []
        encoding = pipe.encode(x, timesteps=[600, 100, 0], tolerance=1e-6, max_iterations=2, verify=False)
        assert not encoding.converged.any()
        assert len(caplog.records) == 1
        assert "3 of 3 images did not reach the tolerance 1e-06 in the 2 steps from timesteps 100 to 600" in caplog.text
        assert f"the largest residual is {float(encoding.residuals.max()):.1e}" in caplog.text
        caplog.clear()
        encoding = pipe.encode(x, 10, tolerance=1e-6, max_iterations=2, verify=False)
        assert "in the 9 steps from timesteps 100 to 900; the" in caplog.text


def test_nan_on_one_image_does_not_affect_others(pipe: DDIMPipeline, caplog: pytest.LogCaptureFixture) -> None:
    x = rand(3, 1, 8, 8)
    encoding = pipe.encode(x, 6)
    forward = pipe.unet.forward

    def broken(sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        bright = sample.mean((1, 2, 3), keepdim=True) > 0.8
        return UNet2DOutput(torch.where(bright, math.nan, forward(sample, timestep).sample))

    pipe.unet.forward = broken
    with caplog.at_level(logging.WARNING):
        with_nan = pipe.encode(torch.cat([x[:1], torch.ones(1, 1, 8, 8), x[1:]]), 6)
    assert with_nan.converged.tolist() == [True, False, True, True]
    assert "1 of 4 images do not come back from their latents" in caplog.text
    assert with_nan.mse.isfinite().tolist() == [True, False, True, True]
    assert "1 of 4 images did not reach" in caplog.text
    for name in ("latents", "residuals", "evaluations"):
        assert torch.equal(getattr(with_nan, name)[[0, 2, 3]], getattr(encoding, name))


def test_mse_and_psnr(pipe: DDIMPipeline) -> None:
    # Within the range of images, so that the result is not clipped.
    x = rand(3, 1, 8, 8) * 0.5
    result = pipe.reconstruct(x, 5, exact=False, output_type="pt")
    expected = (result.images.double() - (x.double() + 1) / 2).square().mean((1, 2, 3))
    assert result.mse.dtype == torch.float64
    assert result.mse.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert result.mse.min() > 1e-6
    assert result.psnr.tolist() == pytest.approx([10 * math.log10(1 / mse) for mse in expected.tolist()], rel=1e-4)


def test_mse_is_computed_before_clipping(pipe: DDIMPipeline) -> None:
    x = torch.ones(1, 1, 8, 8)
    # Encoding by Euler steps and decoding move samples toward the mean.
    pipe.unet.mean = 3
    result = pipe.reconstruct(x, 5, exact=False, output_type="pt")
    assert result.images.max() == 1
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(5)
    y = result.codes.latents
    for t in scheduler.timesteps:
        y = scheduler.step(pipe.unet(y, t).sample, t, y).prev_sample
    assert y.max() > 1
    assert float(result.mse) == pytest.approx(float(((y - x) / 2).square().mean()), rel=1e-3)


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "quad", "logsnr"])
def test_spacings_are_invertible(spacing: str) -> None:
    pipe = DDIMPipeline(Network(), DDIMScheduler(timestep_spacing=spacing))
    pipe.set_progress_bar_config(disable=True)
    result = pipe.reconstruct(rand(2, 1, 8, 8), 7)
    assert result.codes.timesteps == pipe.scheduler.make_timesteps(7)
    assert result.mse.max() <= 1e-8


def test_output_types(pipe: DDIMPipeline) -> None:
    z = randn(2, 1, 8, 8)
    pil, array, tensor = (pipe.decode(z, 4, kind).images for kind in ("pil", "np", "pt"))
    assert [image.size for image in pil] == [(8, 8)] * 2
    assert array.shape == (2, 8, 8, 1)
    assert np.array_equal(array[:, :, :, 0], tensor[:, 0].numpy())
    assert np.array_equal(np.stack([np.asarray(image) for image in pil]), (array[:, :, :, 0] * 255).round())


def test_image_types_encode_to_same_latents(pipe: DDIMPipeline) -> None:
    pixels = digits(2)
    samples = torch.from_numpy(pixels)[:, None] / 127.5 - 1
    latents = pipe.encode(samples, 5).latents
    for images in ([Image.fromarray(p) for p in pixels], pixels[..., None], (pixels / 255)[..., None]):
        assert (pipe.encode(images, 5).latents - latents).abs().max() <= 1e-4


def test_decode_requires_timesteps_of_encode(pipe: DDIMPipeline) -> None:
    encoding = pipe.encode(rand(1, 1, 8, 8), 5)
    pipe.unet.timesteps.clear()
    for arguments in ({"num_inference_steps": 10}, {"timesteps": [800, 600, 400, 200, 1]}, {"timesteps": [800, 600]}):
        with pytest.raises(ValueError, match="the latents were encoded in 5 steps from timestep 800, got "):
            pipe.decode(encoding, **arguments)
    assert pipe.unet.timesteps == []
    pipe.decode(encoding.latents, 10)
    pipe.decode(encoding, timesteps=[800, 600, 400, 200, 0])


def test_float64_is_kept(pipe: DDIMPipeline) -> None:
    encoding = pipe.encode(rand(1, 1, 8, 8, dtype=torch.float64), 4)
    assert encoding.latents.dtype == torch.float64
    assert pipe.decode(encoding, 4, "pt").images.dtype == torch.float64


def test_half_precision_network_keeps_samples_in_float32(make_unet: Callable[..., Any]) -> None:
    single, half = (DDIMPipeline(make_unet(), DDIMScheduler()) for _ in range(2))
    half.to(torch.bfloat16)
    for pipe in (single, half):
        pipe.set_progress_bar_config(disable=True)
    x = rand(2, 3, 16, 16)
    encoding, half_encoding = (
        pipe.encode(x, timesteps=INVERTIBLE_TIMESTEPS, max_iterations=10) for pipe in (single, half)
    )
    assert half.dtype == torch.bfloat16
    assert half_encoding.latents.dtype == half_encoding.residuals.dtype == torch.float32
    # The latents hold values that bfloat16 cannot represent.
    assert not torch.equal(half_encoding.latents, half_encoding.latents.bfloat16().float())
    assert (half_encoding.latents - encoding.latents).abs().mean() < 0.02
    images = half.decode(half_encoding, timesteps=INVERTIBLE_TIMESTEPS, output_type="pt").images
    assert images.dtype == torch.float32
    assert (images - unit(x)).abs().mean() < 0.02
    edited = half.edit(x, 0.5, 4, "pt", seeds=[1, 2]).images
    assert edited.dtype == half.trajectory(2, 2, seeds=[1, 2], output_type="pt").images.dtype == torch.float32
    assert (edited - single.edit(x, 0.5, 4, "pt", seeds=[1, 2]).images).abs().mean() < 0.02


METHODS: dict[str, Callable[[DDIMPipeline], Any]] = {
    "encode": lambda pipe: pipe.encode(rand(1, 1, 8, 8), 3),
    "decode": lambda pipe: pipe.decode(randn(1, 1, 8, 8), 3),
    "reconstruct": lambda pipe: pipe.reconstruct(rand(1, 1, 8, 8), 3),
    "interpolate": lambda pipe: pipe.interpolate(randn(2, 1, 8, 8), frames=3, num_inference_steps=3),
    "trajectory": lambda pipe: pipe.trajectory(num_inference_steps=3),
    "consistency": lambda pipe: pipe.consistency(randn(1, 1, 8, 8), [2, 3]),
    "edit": lambda pipe: pipe.edit(rand(1, 1, 8, 8), 0.7, 3),
    "direction": lambda pipe: pipe.direction(rand(1, 1, 8, 8), rand(1, 1, 8, 8, seed=1), 3),
}


@pytest.mark.parametrize("name", METHODS)
def test_inversion_runs_in_evaluation_mode_and_sampling_in_the_networks(pipe: DDIMPipeline, name: str) -> None:
    pipe.unet.frozen = nn.Dropout().eval()
    pipe.unet.train()
    pipe.unet.frozen.eval()
    METHODS[name](pipe)
    evaluation, own_mode = (False, False), (True, False)
    sampled = {"trajectory": {own_mode}, "consistency": {own_mode}, "edit": {evaluation, own_mode}}
    assert pipe.unet.modes == sampled.get(name, {evaluation})
    assert pipe.unet.training
    assert not pipe.unet.frozen.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", METHODS)
def test_progress_bar_completes(pipe: DDIMPipeline, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pipe.set_progress_bar_config(desc=name)
    METHODS[name](pipe)
    bars = [line.split("\r")[-1] for line in capsys.readouterr().err.strip().split("\n")]
    assert len(bars) == (2 if name in ("encode", "reconstruct", "edit") else 1)
    assert all(f"{name}: 100%" in bar for bar in bars)


@pytest.mark.parametrize("name", METHODS)
def test_calls_are_deterministic(pipe: DDIMPipeline, name: str) -> None:
    def numbers(result: Any) -> list[Any]:
        if isinstance(result, Image.Image):
            return [result.tobytes()]
        if isinstance(result, Tensor):
            return result.tolist()
        if isinstance(result, list):
            return [numbers(entry) for entry in result]
        return [numbers(entry) for entry in result.to_tuple()] if hasattr(result, "to_tuple") else [result]

    first, second = [], []
    for results in (first, second):
        torch.manual_seed(5)
        results += numbers(METHODS[name](pipe))
    assert first == second


# --- interpolate


def equation_67(z0: np.ndarray, z1: np.ndarray, t: float) -> np.ndarray:
    theta = np.arccos((z0 * z1).sum() / np.linalg.norm(z0) / np.linalg.norm(z1))
    return np.sin((1 - t) * theta) / np.sin(theta) * z0 + np.sin(t * theta) / np.sin(theta) * z1


def sample_array(pipe: DDIMPipeline, method: str, *args: Any, **kwargs: Any) -> np.ndarray:
    return getattr(pipe, method)(*args, output_type="np", **kwargs).images


def test_interpolation_end_points_are_decoded_latents(tiny_pipeline: DDIMPipeline) -> None:
    a, b, c, d = latents = randn(4, 3, 16, 16)
    settings: dict[str, Any] = {"timesteps": INVERTIBLE_TIMESTEPS, "batch_size": 3}
    ends = sample_array(tiny_pipeline, "decode", latents, **settings)
    line = sample_array(tiny_pipeline, "interpolate", a, b, 4, **settings)
    assert line.shape == (4, 16, 16, 3)
    assert np.array_equal(line[[0, 3]], ends[:2])
    assert np.abs(line[1] - ends[0]).max() > 0.01
    path = sample_array(tiny_pipeline, "interpolate", [a, b[None], c], frames=4, **settings)
    assert path.shape == (7, 16, 16, 3)
    assert np.array_equal(path[[0, 3, 6]], ends[:3])
    assert np.array_equal(path[:4], line)
    closed = sample_array(tiny_pipeline, "interpolate", latents[:3], frames=4, closed=True, **settings)
    assert closed.shape == (9, 16, 16, 3)
    assert np.array_equal(closed[:7], path)
    grid = sample_array(tiny_pipeline, "interpolate", [a, b, c, d], frames=(3, 4), **settings)
    assert grid.shape == (12, 16, 16, 3)
    assert np.array_equal(grid[[0, 3, 8, 11]], ends)
    assert np.array_equal(grid[:4], line)


def test_interpolated_digits_change_gradually(mnist: DDIMPipeline) -> None:
    """The end points are bitwise the decoded latents, and neighboring frames differ less than the end points."""
    latents = randn(8, 1, 28, 28)
    ends = sample_array(mnist, "decode", latents, 10)
    for i in range(0, 8, 2):
        frames = sample_array(mnist, "interpolate", latents[i], latents[i + 1], 11, num_inference_steps=10)
        assert np.array_equal(frames[[0, -1]], ends[i : i + 2])
        neighbors = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
        assert neighbors.max() < np.abs(frames[-1] - frames[0]).mean()


def test_interpolation_matches_equation_67(pipe: DDIMPipeline) -> None:
    latents = randn(4, 1, 8, 8)
    z = latents.double().numpy()

    def decoded(*points: np.ndarray) -> np.ndarray:
        return sample_array(pipe, "decode", torch.from_numpy(np.stack(points)).float(), 6)

    settings = {"num_inference_steps": 6}
    line = sample_array(pipe, "interpolate", latents[0], latents[1], 5, **settings)
    expected = [equation_67(z[0], z[1], t) for t in (0, 0.25, 0.5, 0.75, 1)]
    assert np.abs(line - decoded(*expected)).max() <= 1e-5
    closed = sample_array(pipe, "interpolate", latents[:3], frames=3, closed=True, **settings)
    expected = [
        z[0],
        equation_67(z[0], z[1], 0.5),
        z[1],
        equation_67(z[1], z[2], 0.5),
        z[2],
        equation_67(z[2], z[0], 0.5),
    ]
    assert np.abs(closed - decoded(*expected)).max() <= 1e-5
    grid = sample_array(pipe, "interpolate", latents, frames=(3, 2), **settings)
    expected = [z[0], z[1], equation_67(z[0], z[2], 0.5), equation_67(z[1], z[3], 0.5), z[2], z[3]]
    assert np.abs(grid - decoded(*expected)).max() <= 1e-5


def test_interpolation_accepts_encode_output(pipe: DDIMPipeline) -> None:
    encoding = pipe.encode(rand(3, 1, 8, 8), 5)
    path = sample_array(pipe, "interpolate", encoding, frames=2, num_inference_steps=5)
    assert np.array_equal(path, sample_array(pipe, "decode", encoding, 5))


# --- trajectory and consistency


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_trajectory_matches_sampling(tiny_pipeline: DDIMPipeline, eta: float) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 6, "seeds": [7, 9], "eta": eta, "output_type": "pt"}
    steps = []
    images = tiny_pipeline(
        **arguments, callback_on_step_end=lambda _, index, t, tensors: steps.append((t, dict(tensors)))
    ).images
    result = tiny_pipeline.trajectory(**arguments, frames=None)
    assert torch.equal(result.images, images)
    assert result.timesteps == [t for t, _ in steps] == [830, 664, 498, 332, 166, 0]
    starts = [torch.cat([randn(1, 3, 16, 16, seed=seed) for seed in (7, 9)]), *(x["latents"] for _, x in steps)]
    for index, (_, tensors) in enumerate(steps):
        assert torch.equal(result.samples[index], unit(starts[index]))
        assert torch.equal(result.pred_original_samples[index], unit(tensors["pred_original_sample"]))


def test_trajectory_from_custom_latents_and_timesteps(pipe: DDIMPipeline) -> None:
    arguments: dict[str, Any] = {"latents": randn(3, 1, 8, 8), "timesteps": [900, 400, 30], "output_type": "np"}
    result = pipe.trajectory(**arguments)
    assert result.timesteps == [900, 400, 30]
    assert np.array_equal(result.images, pipe(**arguments).images)
    assert [entry.shape for entry in (*result.samples, *result.pred_original_samples)] == [(3, 8, 8, 1)] * 6


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]),
        ({"frames": 4}, [900, 600, 300, 0]),
        ({"frames": 3}, [900, 500, 0]),
        ({"frames": 2}, [900, 0]),
        ({"frames": 1}, [900]),
        ({"frames": 99}, [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]),
        ({"frames": None}, [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]),
        ({"at": [0, 700, 300]}, [700, 300, 0]),
        ({"at": np.array([700, 0])}, [700, 0]),
        ({"at": torch.tensor([700, 0])}, [700, 0]),
        ({"at": range(900, 0, -400)}, [900, 500, 100]),
    ],
)
def test_trajectory_selects_timesteps(pipe: DDIMPipeline, arguments: dict[str, Any], expected: list[int]) -> None:
    result = pipe.trajectory(seeds=[1], num_inference_steps=10, output_type="pt", **arguments)
    assert result.timesteps == expected
    assert len(result.samples) == len(result.pred_original_samples) == len(expected)
    complete = pipe.trajectory(seeds=[1], num_inference_steps=10, output_type="pt", frames=None)
    for t, x, x0 in zip(result.timesteps, result.samples, result.pred_original_samples, strict=True):
        index = complete.timesteps.index(t)
        assert torch.equal(x, complete.samples[index])
        assert torch.equal(x0, complete.pred_original_samples[index])
    assert torch.equal(result.images, complete.images)


def test_consistency_matches_sampling(tiny_pipeline: DDIMPipeline) -> None:
    z = randn(2, 3, 16, 16)
    results = tiny_pipeline.consistency(z, (5, 2, 3), "pt")
    for images, S in zip(results, (5, 2, 3), strict=True):
        assert torch.equal(images, tiny_pipeline(latents=z, num_inference_steps=S, output_type="pt").images)


# --- edit, direction


def test_direction_is_the_difference_of_mean_latents(pipe: DDIMPipeline) -> None:
    dark, bright = rand(5, 1, 8, 8) * 0.2 - 0.3, rand(4, 1, 8, 8, seed=1) * 0.2 + 0.3
    timesteps = [800, 400, 0]
    direction = pipe.direction(bright, dark, timesteps=timesteps)
    sides = [pipe.encode(images, timesteps=timesteps).latents for images in (bright, dark)]
    torch.testing.assert_close(direction, sides[0].mean(0) - sides[1].mean(0))
    # Added to a dark image, it makes it as bright as the others.
    latents = sides[1] + direction
    images = pipe.decode(latents, timesteps=timesteps, output_type="pt").images
    assert abs(float(images.mean()) - float(unit(bright).mean())) < 0.02


def test_direction_between_the_same_images_raises(pipe: DDIMPipeline) -> None:
    images = handwritten(2)
    with pytest.raises(ValueError, match="must differ from those without it, got the same ones"):
        pipe.direction(images, images[::-1])


def test_zero_strength_returns_images(pipe: DDIMPipeline) -> None:
    images = handwritten(2)
    for seeds in (None, [1, 2]):
        assert [i.tobytes() for i in pipe.edit(images, 0, 10, seeds=seeds).images] == [i.tobytes() for i in images]
    assert pipe.unet.timesteps == []


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("strength", "num_steps"), [(1, 10), (0.5, 5), (0.32, 3), (0.38, 4)])
def test_edit_with_seeds_samples_from_noised_image(
    tiny_pipeline: DDIMPipeline, strength: float, num_steps: int, eta: float
) -> None:
    x = rand(2, 3, 16, 16)
    edited = tiny_pipeline.edit(x, strength, 10, "pt", seeds=[3, 4], eta=eta).images
    # Equation (4) with the first noise of each image's generator; the steps draw the following noise.
    timesteps = list(range(900, -1, -100))[-num_steps:]
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    noise = torch.cat([torch.randn(1, 3, 16, 16, generator=g) for g in generators])
    a = float(ALPHAS[timesteps[0]])
    start = math.sqrt(a) * x + math.sqrt(1 - a) * noise
    sampled = tiny_pipeline(2, generators, eta, latents=start, timesteps=timesteps, output_type="pt").images
    assert (edited - sampled).abs().max() <= 1e-5
    assert (edited - unit(x)).abs().mean() > 0.01


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_edit_depends_only_on_its_seed(pipe: DDIMPipeline, eta: float) -> None:
    x = rand(3, 1, 8, 8)
    edited = pipe.edit(x, 0.6, 10, "pt", seeds=[3, 4, 5], eta=eta).images
    assert torch.equal(edited, pipe.edit(x, 0.6, 10, "pt", seeds=iter([3, 4, 5]), eta=eta).images)
    for order in ([1], [2, 0]):
        subset = pipe.edit(x[order], 0.6, 10, "pt", seeds=[3 + i for i in order], eta=eta).images
        assert (subset - edited[order]).abs().max() <= 1e-5
    other = pipe.edit(x, 0.6, 10, "pt", seeds=[3, 6, 5], eta=eta).images
    assert (other - edited).abs().flatten(1).amax(1).gt(1e-3).tolist() == [False, True, False]


@pytest.mark.parametrize(("strength", "timesteps"), [(0.5, [400, 300, 200, 100, 0]), (0.1, [0]), (1, None)])
def test_edit_without_seeds_samples_from_latents(
    pipe: DDIMPipeline, strength: float, timesteps: list[int] | None
) -> None:
    x = rand(2, 1, 8, 8)
    edited = pipe.edit(x, strength, 10, "pt").images
    timesteps = timesteps or list(range(900, -1, -100))
    start = x if timesteps == [0] else pipe.encode(x, timesteps=timesteps).latents
    assert torch.equal(edited, pipe(latents=start, timesteps=timesteps, output_type="pt").images)
    torch.manual_seed(99)
    assert torch.equal(edited, pipe.edit(x, strength, 10, "pt").images)


def test_edit_repeats_a_single_image_or_seed(pipe: DDIMPipeline) -> None:
    x = rand(2, 1, 8, 8)
    several = pipe.edit(x[:1], 0.6, 10, "pt", seeds=range(3)).images
    assert torch.equal(several, pipe.edit(x[:1].repeat(3, 1, 1, 1), 0.6, 10, "pt", seeds=range(3)).images)
    for strength in (0, 0.6):
        both = pipe.edit(x, strength, 10, "pt", seeds=[5]).images
        assert torch.equal(both, pipe.edit(x, strength, 10, "pt", seeds=[5, 5]).images)


def test_stronger_edit_changes_more(pipe: DDIMPipeline) -> None:
    x = rand(4, 1, 8, 8)
    errors = [
        float((pipe.edit(x, strength, 20, "pt", seeds=range(4)).images - unit(x)).square().mean())
        for strength in (0, 0.2, 0.5, 1)
    ]
    assert errors == sorted(errors)
    assert errors[0] < 1e-12
    assert errors[-1] > 0.05


# --- invalid input


X, Z = rand(2, 1, 8, 8), randn(2, 1, 8, 8)
NAN = torch.full((1, 1, 8, 8), math.nan)
SAMPLING_STEPS = [
    ({"num_inference_steps": 0}, "num_inference_steps must ... got 0"),
    ({"num_inference_steps": 1001}, "1001"),
    ({"num_inference_steps": 2.5}, "num_inference_steps must ... got 2.5"),
    ({"num_inference_steps": "ten"}, "num_inference_steps must ... got 'ten'"),
    ({"timesteps": []}, "timesteps must hold at least one timestep, got none"),
    ({"timesteps": [5, 5]}, "strictly decreasing"),
    ({"timesteps": [0, 5]}, "strictly decreasing"),
    ({"timesteps": [1000]}, "timesteps must be integers from 0 to 999, got 1000"),
    ({"timesteps": [-1]}, "timesteps must be integers from 0 to 999, got -1"),
    ({"timesteps": [2.5]}, "timesteps must be integers from 0 to 999, got 2.5"),
    ({"timesteps": 7}, "timesteps must be a list of integers, got 7"),
]
# Timestep 0 alone is valid for sampling, but not for latents.
STEPS = [
    *SAMPLING_STEPS,
    ({"num_inference_steps": 1}, "timesteps must hold one above 0"),
    ({"timesteps": [0]}, "timesteps must hold one above 0"),
]
BATCHES = [({"batch_size": value}, f"batch_size must ... got {value!r}") for value in (0, -1, 2.5, "8", True, None)]
LIMITS = [
    *(({"tolerance": value}, f"tolerance must ... got {value}") for value in (0, 1, -1e-5, 2.0, math.nan, math.inf)),
    *(({"tolerance": value}, f"tolerance must ... got {value!r}") for value in ("x", True, None)),
    *(({"max_iterations": value}, f"max_iterations must ... got {value!r}") for value in (0, -3, 1001, 2.5, "x", True)),
]
OUTPUTS = [({"output_type": value}, f"output_type must ... got {value!r}") for value in ("jpg", None)]
IMAGES = [
    ({"images": None}, "images must ... got NoneType"),
    ({"images": "digit.png"}, "images must ... got str"),
    ({"images": []}, "images: expected shape ... got (0, 8, 8, 1)"),
    ({"images": torch.zeros(0, 1, 8, 8)}, "images: expected shape ... got (0, 1, 8, 8)"),
    ({"images": torch.zeros(2, 3, 8, 8)}, "images: expected shape ... got (2, 3, 8, 8)"),
    ({"images": torch.zeros(8, 8)}, "images: expected shape ... got (8, 8)"),
    ({"images": NAN}, "NaN"),
    ({"images": torch.full((1, 1, 8, 8), 255.0)}, "[255, 255]"),
    ({"images": torch.zeros(1, 1, 8, 8, dtype=torch.int64)}, "torch.int64"),
    ({"images": Image.new("L", (9, 8))}, "9x8 L"),
    ({"images": Image.new("RGB", (8, 8))}, "8x8 RGB"),
]
LATENTS = [
    ({"latents": NAN}, "latents must be finite"),
    ({"latents": -NAN / 0}, "latents must be finite"),
    ({"latents": torch.zeros(1, 1, 8, 8, dtype=torch.int64)}, "latents must be finite floating-point"),
    ({"latents": torch.zeros(1, 8, 8)}, "latents: expected ... got (1, 8, 8)"),
    ({"latents": torch.zeros(1, 3, 8, 8)}, "latents: expected ... got (1, 3, 8, 8)"),
    ({"latents": torch.zeros(1, 1, 8, 9)}, "latents: expected ... got (1, 1, 8, 9)"),
    ({"latents": torch.zeros(0, 1, 8, 8)}, "latents: expected ... got (0, 1, 8, 8)"),
    ({"latents": torch.tensor(0.0)}, "latents: expected ... got ()"),
    ({"latents": [0.0]}, "latents must be a tensor (N, C, H, W), got list"),
    ({"latents": np.zeros((1, 1, 8, 8))}, "latents must ... got ndarray"),
    ({"latents": None}, "latents must ... got NoneType"),
]
INVALID: dict[str, tuple[dict[str, Any], list[tuple[dict[str, Any], str]]]] = {
    "encode": ({"images": X}, [*IMAGES, *STEPS, *BATCHES, *LIMITS]),
    "reconstruct": ({"images": X}, [*IMAGES, *STEPS, *BATCHES, *LIMITS, *OUTPUTS]),
    "decode": (
        {"latents": Z},
        [
            *LATENTS,
            *STEPS,
            *BATCHES,
            *OUTPUTS,
            (
                {"latents": EncodeOutput(Z, [900, 0], Z, Z, 1e-5, torch.zeros(2))},
                "encoded in 2 steps from timestep 900",
            ),
            (
                {"latents": EncodeOutput(NAN, [980 - 20 * i for i in range(50)], Z, Z, 1e-5, torch.zeros(2))},
                "must be finite",
            ),
        ],
    ),
    "interpolate": (
        {"z0": Z},
        [
            *STEPS,
            *BATCHES,
            *OUTPUTS,
            *(({"frames": value}, f"frames must ... got {value!r}") for value in (1, 0, -2, 2.5, "3", None, [2, 3])),
            ({"frames": (2,)}, "(rows, columns)"),
            ({"frames": (2, 2, 2)}, "(rows, columns)"),
            ({"frames": (2, 2)}, "corners must be the four latents of a grid, got 2"),
            ({"z0": randn(4, 1, 8, 8), "frames": (1, 3)}, "rows must ... got 1"),
            ({"z0": randn(4, 1, 8, 8), "frames": (3, 1)}, "columns must ... got 1"),
            ({"z0": randn(4, 1, 8, 8), "frames": (2.5, 3)}, "rows must ... got 2.5"),
            ({"z0": randn(4, 1, 8, 8), "frames": (2, 2), "closed": True}, "not closed"),
            ({"z0": Z[:1]}, "a path requires at least two latents, got 1"),
            ({"z0": Z[0]}, "a path requires at least two latents, got 1"),
            ({"z0": []}, "a path requires at least two latents, got 0"),
            ({"z0": [Z[0], Z[:0]]}, "got (0, 1, 8, 8)"),
            (
                {"z0": EncodeOutput(Z[:1], [900, 0], Z, Z, 1e-5, torch.zeros(2))},
                "a path requires at least two latents, got 1",
            ),
            ({"z0": Z, "z1": Z[0]}, "a latent: expected shape (C, H, W) or (1, C, H, W), got (2, 1, 8, 8)"),
            ({"z0": Z[0], "z1": NAN}, "NaN"),
            ({"z0": Z[0], "z1": Z[0].to(torch.int64)}, "int64"),
            ({"z0": Z[0], "z1": Z[0].double()}, "float64"),
            ({"z0": Z[0], "z1": torch.zeros(3, 8, 8)}, "got (3, 8, 8)"),
            ({"z0": torch.zeros(2, 3, 8, 8)}, "3, 8, 8)"),
            ({"z0": [Z[0], "latent"]}, "a latent must be a tensor (C, H, W), got str"),
            ({"z0": Z[0], "z1": 5}, "a latent must be a tensor (C, H, W), got int"),
            ({"z0": 5}, "a latent must be a tensor (C, H, W), got int"),
            ({"z0": None}, "a latent must be a tensor (C, H, W), got NoneType"),
        ],
    ),
    "trajectory": (
        {"num_inference_steps": 4},
        [
            *SAMPLING_STEPS,
            *OUTPUTS,
            *BATCHES,
            *(case for case in LATENTS if case[0]["latents"] is not None),
            *(({"frames": value}, f"frames must ... got {value!r}") for value in (0, -2, 2.5, "3", (2, 2))),
            ({"at": [750, 123]}, "at must be timesteps that the process visits (750, 500, 250, 0), got 123"),
            ({"at": [2.5]}, "at must be timesteps ... got 2.5"),
            ({"at": ["750"]}, "at must be timesteps"),
            ({"at": 750}, "at must ... got 750"),
            ({"eta": -0.5}, "eta must ... got -0.5"),
            ({"eta": math.nan}, "eta must ... got nan"),
            ({"eta": "1"}, "eta must ... got '1'"),
            ({"seeds": [1, 2], "batch_size": 3}, "seeds must hold one integer per image, got 2 for a batch_size of 3"),
            ({"seeds": [1.5]}, "seeds must be integers from 0 to 2^63 - 1, got 1.5"),
            ({"seeds": []}, "seeds must hold one integer per image, got 0"),
        ],
    ),
    "consistency": (
        {"latents": Z},
        [
            *LATENTS,
            *OUTPUTS,
            ({"num_inference_steps": []}, "num_inference_steps must hold at least one number of steps, got none"),
            ({"num_inference_steps": [5, 0]}, "num_inference_steps must ... got 0"),
            ({"num_inference_steps": [5, 2000]}, "num_inference_steps must ... got 2000"),
            ({"num_inference_steps": [2.5]}, "num_inference_steps must ... got 2.5"),
            ({"num_inference_steps": 10}, "num_inference_steps must ... got 10"),
        ],
    ),
    "edit": (
        {"images": X},
        [
            *IMAGES,
            *SAMPLING_STEPS,
            *BATCHES,
            *OUTPUTS,
            *(({"strength": value}, f"strength must ... got {value}") for value in (-0.1, 1.1, math.nan, math.inf)),
            *(({"strength": value}, f"strength must ... got {value!r}") for value in ("x", True, None)),
            ({"eta": 0.5}, "eta above 0 draws noise and requires seeds, one per image, got eta=0.5"),
            ({"eta": -0.5, "seeds": [1, 2]}, "eta must ... got -0.5"),
            ({"eta": math.nan, "seeds": [1, 2]}, "eta must ... got nan"),
            ({"eta": "1", "seeds": [1, 2]}, "eta must ... got '1'"),
            ({"seeds": [1, 2, 3]}, "seeds must hold one integer per image, got 3"),
            ({"seeds": []}, "seeds must hold one integer per image, got 0"),
            ({"seeds": [1, -2]}, "seeds must be integers from 0 to 2^63 - 1, got -2"),
        ],
    ),
}
CASES = [
    (method, {**valid, **invalid}, message) for method, (valid, cases) in INVALID.items() for invalid, message in cases
]


@pytest.mark.parametrize(
    ("method", "arguments", "message"), CASES, ids=[f"{method}-{message}" for method, _, message in CASES]
)
def test_invalid_input_raises_before_network_runs(
    pipe: DDIMPipeline, method: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=r".*") as caught:
        getattr(pipe, method)(**arguments)
    assert matches(str(caught.value), message)
    assert "\n" not in str(caught.value)
    assert pipe.unet.timesteps == []


def test_epsilon_prediction_without_signal_raises(pipe: DDIMPipeline) -> None:
    pipe.scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    for call in (lambda: pipe.encode(X, 5), lambda: pipe.decode(Z, 5), lambda: pipe.edit(X, 1, 5, seeds=[1, 2])):
        with pytest.raises(ValueError, match="no signal"):
            call()
    assert pipe.unet.timesteps == []


@pytest.mark.parametrize("order", [None, 2])
def test_interpolation_as_samples_ends_at_the_images_of_seeds(order: int | None) -> None:
    pipe = DDIMPipeline.from_pretrained("mnist")
    pipe.set_progress_bar_config(disable=True)
    noise = noise_from_seeds((2, *pipe.sample_shape), [3, 14], pipe.device)()
    settings: dict[str, Any] = {"num_inference_steps": 6, "output_type": "np", "order": order}
    images = pipe(seeds=[3, 14], **settings).images
    frames = pipe.interpolate(noise, frames=3, as_samples=True, **settings).images
    assert np.abs(frames[[0, 2]] - images).max() <= 1e-4
    # Decoding, the inverse of encoding, ends at the first alpha, where noise of 0.01 is left.
    assert np.abs(pipe.interpolate(noise, frames=3, **settings).images[[0, 2]] - images).max() > 0.01
