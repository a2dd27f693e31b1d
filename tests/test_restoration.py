"""`restore`, `inpaint` and `super_resolve` of a pipeline: what comes back agrees with what was measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ddim import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim.diffusion.operators import BoxDownsample, GaussianBlur, Grayscale, Mask, Matrix
from ddim.diffusion.restoration import METHODS
from ddim.restoration import RestorationConfig, read_masks
from digits import TINY_MODEL
from helpers import randn

GRADIENT_FREE = ("ddnm", "ddrm", "repaint")


def make_pipe(**changes: Any) -> DDIMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY_MODEL | changes).eval()
    # Predicted images are small whatever the noise, as those of a trained network are.
    pipe = DDIMPipeline(unet, DDIMScheduler(clip_sample=False, prediction_type="sample"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> DDIMPipeline:
    return make_pipe()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return randn(2, 1, 8, 8).clamp(-1, 1)


def missing_square() -> Tensor:
    missing = torch.zeros(8, 8, dtype=torch.bool)
    missing[2:6, 2:6] = True
    return missing


@pytest.mark.parametrize("method", METHODS)
def test_known_pixels_are_kept(pipe: DDIMPipeline, images: Tensor, method: str) -> None:
    missing = missing_square()
    result = pipe.inpaint(images, missing, method, 6, "pt", samples=3, seeds=range(6))
    assert result.images.shape == (6, 1, 8, 8)
    restored = result.images * 2 - 1
    expected = images.repeat_interleave(3, 0)
    torch.testing.assert_close(restored[..., ~missing], expected[..., ~missing], rtol=0, atol=1e-5)
    assert float(restored[..., missing].std()) > 0.01
    grouped = result.images.unflatten(0, (2, 3))
    torch.testing.assert_close(result.mean, grouped.mean(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(result.std, grouped.std(1), rtol=0, atol=1e-5)
    assert float(result.std[..., ~missing].max()) < 1e-5
    assert float(result.std[..., missing].min()) > 0


@pytest.mark.parametrize("method", ["ddnm", "ddrm", "mmps", "pigdm", "dps"])
@pytest.mark.parametrize("kernel", ["box", "bicubic"])
def test_small_images_come_back(pipe: DDIMPipeline, images: Tensor, method: str, kernel: str) -> None:
    small = BoxDownsample((1, 8, 8), 2)(images)
    result = pipe.super_resolve(small, 2, kernel, 0.0, method, 5, "pt", seeds=[0, 1])
    if kernel == "box":
        again = BoxDownsample((1, 8, 8), 2)(result.images * 2 - 1)
        torch.testing.assert_close(again, small, rtol=0, atol=1e-5)


def test_evaluations_are_counted(pipe: DDIMPipeline, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    eager = make_pipe()
    eager.engine = "eager"
    eager.unet.register_forward_hook(lambda *_: calls.append(1))
    for method, settings in (("ddnm", {}), ("ddnm", {"resampling": (1, 1)}), ("repaint", {"resampling": (3, 4)})):
        calls.clear()
        result = eager.inpaint(images[:1], missing_square(), method, 12, "pt", seeds=[0], **settings)
        assert result.nfe == len(calls)


def test_seeds_decide(pipe: DDIMPipeline, images: Tensor) -> None:
    """An image of the result depends on its measurement and its seed alone."""
    arguments: dict[str, Any] = {"num_inference_steps": 6, "output_type": "pt"}
    together = pipe.inpaint(images, missing_square(), samples=2, seeds=[7, 8, 9, 7], **arguments).images
    alone = pipe.inpaint(images[1:], missing_square(), seeds=[9], **arguments).images
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-5)
    assert float((together[0] - together[1]).abs().max()) > 1e-3


def test_noisy_measurements_are_not_copied(pipe: DDIMPipeline, images: Tensor) -> None:
    operator = GaussianBlur((1, 8, 8), 0.8)
    for method in ("ddnm", "ddrm", "mmps"):
        result = pipe.restore(operator(images), operator, 0.3, method, 10, "pt", seeds=[0, 1])
        assert float((operator(result.images * 2 - 1) - operator(images)).abs().max()) > 1e-3


def test_any_function_is_an_operator(pipe: DDIMPipeline, images: Tensor) -> None:
    def darken(x: Tensor) -> Tensor:
        return (x + 1).square()

    for method in ("pigdm", "mmps", "dps"):
        result = pipe.restore(darken(images), darken, 0.05, method, 5, "pt", seeds=[0, 1])
        assert result.images.shape == (2, 1, 8, 8)
        assert bool(torch.isfinite(result.images).all())
    with pytest.raises(ValueError, match="method='ddnm' requires a LinearOperator; pigdm, mmps and dps take any"):
        pipe.restore(darken(images), darken, method="ddnm")


def test_matrices_are_operators(pipe: DDIMPipeline, images: Tensor) -> None:
    operator = Matrix((1, 8, 8), randn(10, 64))
    result = pipe.restore(operator(images) / 8, operator, num_inference_steps=5, output_type="pt", seeds=[0, 1])
    assert result.images.shape == (2, 1, 8, 8)


def test_classes_and_guidance() -> None:
    pipe = make_pipe(num_class_embeds=3, has_null_class=True)
    image = randn(1, 1, 8, 8).clamp(-1, 1)
    arguments: dict[str, Any] = {"num_inference_steps": 6, "output_type": "pt", "seeds": [0]}
    results = [
        pipe.inpaint(image, missing_square(), **arguments, **condition).images
        for condition in ({}, {"class_labels": 0}, {"class_labels": 1}, {"class_labels": 1, "guidance_scale": 3.0})
    ]
    for index, result in enumerate(results):
        assert all(not torch.equal(result, other) for other in results[:index])


def test_colors_come_back() -> None:
    pipe = make_pipe(in_channels=3, out_channels=3)
    operator = Grayscale((3, 8, 8))
    gray = operator(randn(2, 3, 8, 8).clamp(-1, 1))
    result = pipe.restore(gray, operator, num_inference_steps=5, output_type="pt", seeds=[0, 1])
    torch.testing.assert_close(operator(result.images * 2 - 1), gray, rtol=0, atol=1e-5)


def test_images_and_masks_of_pil(pipe: DDIMPipeline) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    mask = Image.fromarray((missing_square().numpy() * 255).astype(np.uint8))
    (restored,) = pipe.inpaint(Image.fromarray(pixels), mask, num_inference_steps=4, seeds=[0]).images
    known = ~missing_square().numpy()
    assert np.array_equal(np.asarray(restored)[known], pixels[known])
    with pytest.raises(ValueError, match="size"):
        pipe.inpaint(Image.fromarray(pixels), mask.resize((9, 9)))


def test_masks_per_image(pipe: DDIMPipeline, images: Tensor) -> None:
    masks = torch.stack([missing_square(), missing_square().roll(1, 0)])
    result = pipe.inpaint(images, masks, num_inference_steps=4, output_type="pt", samples=2, seeds=range(4)).images
    for index in range(4):
        known = ~masks[index // 2]
        torch.testing.assert_close(result[index, 0, known] * 2 - 1, images[index // 2, 0, known], rtol=0, atol=1e-5)


def test_network_keeps_its_mode_and_gradients(pipe: DDIMPipeline, images: Tensor) -> None:
    own = make_pipe()
    own.unet.train()
    own.inpaint(images, missing_square(), "mmps", 3, "pt", seeds=[0, 1])
    assert own.unet.training
    assert all(parameter.grad is None for parameter in own.unet.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "magic"}, "method must be one of ddnm, ddrm, .*, got 'magic'"),
        ({"method": "repaint"}, "method='repaint' requires a Mask and noise_std=0"),
        ({"method": "ddnm", "order": 2}, "method='ddnm' requires order=1, got 2"),
        ({"noise_std": -1}, "noise_std must be a number of at least 0"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer of at least 1, got 0"),
        ({"samples": 0}, "samples must be an integer of at least 1, got 0"),
        ({"seeds": [1]}, "seeds"),
        ({"resampling": (1,)}, r"resampling must be \(length, repeats\), got \(1,\)"),
        ({"resampling": (0, 2)}, "the length of resampling must be an integer from 1 to 1000, got 0"),
        ({"output_type": "jpeg"}, "output_type must be"),
        ({"class_labels": 1}, "the model has no classes"),
        ({"eta": -1.0}, "eta must be"),
    ],
)
def test_invalid_arguments_raise(pipe: DDIMPipeline, images: Tensor, arguments: dict[str, Any], message: str) -> None:
    operator = BoxDownsample((1, 8, 8), 2)
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network was evaluated"))
    try:
        with pytest.raises(ValueError, match=message):
            pipe.restore(operator(images), operator, **arguments)
    finally:
        pipe.unet._forward_pre_hooks.clear()


@pytest.mark.parametrize(
    ("measurement", "operator", "error", "message"),
    [
        (torch.zeros(1, 1, 5, 4), BoxDownsample((1, 8, 8), 2), ValueError, r"expected shape \(N, 1, 4, 4\), got"),
        (torch.zeros(0, 1, 4, 4), BoxDownsample((1, 8, 8), 2), ValueError, r"expected shape \(N, 1, 4, 4\), got"),
        (torch.zeros(1, 1, 8, 8), BoxDownsample((1, 16, 16), 2), ValueError, r"expected the model's shape \(1, 8, 8\)"),
        (torch.full((1, 1, 4, 4), torch.nan), BoxDownsample((1, 8, 8), 2), ValueError, "measurement must be finite"),
        (torch.zeros(1, 1, 4, 4).int(), BoxDownsample((1, 8, 8), 2), TypeError, "measurement must be a floating"),
        ([1.0], BoxDownsample((1, 8, 8), 2), TypeError, "measurement must be a floating tensor"),
        (torch.zeros(1, 1, 8, 8), "blur", TypeError, "operator must be a function of images, got str"),
        (torch.zeros(1, 1, 8, 8), Mask((1, 8, 8), torch.ones(3, 1, 8, 8).bool()), ValueError, "mask: expected one, or"),
        (torch.zeros(2, 3), lambda x: x.mean((1, 2, 3)), ValueError, r"expected shape \(N,\), got \(2, 3\)"),
        (torch.zeros(2, 1), lambda x: (x > 0).float(), ValueError, "operator must be differentiable: what it returns"),
        (
            torch.zeros(2, 1),
            lambda x: x.mean(),
            ValueError,
            r"operator must return a tensor \(N, ...\).*got shape \(\)",
        ),
        (
            torch.zeros(2, 1),
            lambda x: 3,
            ValueError,
            r"operator must return a tensor \(N, ...\).*got int for one image",
        ),
    ],
)
def test_invalid_measurements_raise(
    pipe: DDIMPipeline, measurement: Any, operator: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pipe.restore(measurement, operator)


@pytest.mark.parametrize("method", ["pigdm", "mmps", "dps"])
def test_measurements_of_a_number_per_image(pipe: DDIMPipeline, method: str) -> None:
    result = pipe.restore(torch.zeros(2), lambda x: x.mean((1, 2, 3)), 0.1, method, 2, output_type="pt", seeds=[0, 1])
    assert torch.as_tensor(result.images).shape == (2, 1, 8, 8)


def test_arguments_of_other_calls_are_refused(pipe: DDIMPipeline, images: Tensor) -> None:
    with pytest.raises(
        TypeError, match="generator is not an argument of this method; methods that draw noise take seeds"
    ):
        pipe.inpaint(images, torch.eye(8).bool(), generator=torch.Generator())  # type: ignore[call-arg]


def test_hints_are_of_arguments_that_there_are(pipe: DDIMPipeline) -> None:
    with pytest.raises(ValueError, match=r"^images\[0\] must be 4x4 L, got 5x4 L$"):
        pipe.super_resolve(Image.new("L", (5, 4)), 2)
    with pytest.raises(ValueError, match=r"^masks\[0\] must be 8x8 L, got 5x4 L; resize=True"):
        read_masks(Image.new("L", (5, 4)), 1, (8, 8))


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        (torch.ones(8, 8), TypeError, "masks must be boolean or PIL images, got torch.float32"),
        (torch.ones(8, 8).bool(), ValueError, "masks must leave some pixels and miss others"),
        (torch.zeros(8, 8).bool(), ValueError, "masks must leave some pixels and miss others"),
        (torch.ones(7, 8).bool(), ValueError, r"masks: expected shape \(8, 8\) or \(2, 8, 8\), got \(1, 7, 8\)"),
        (torch.ones(3, 8, 8).bool(), ValueError, r"masks: expected shape \(8, 8\) or \(2, 8, 8\), got \(3, 8, 8\)"),
    ],
)
def test_invalid_masks_raise(masks: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_masks(masks, 2, (8, 8))


def test_defaults_are_those_of_the_method() -> None:
    assert RestorationConfig("repaint").resolved() == RestorationConfig("repaint", 250, 1.0, 1, (10, 10))
    assert RestorationConfig("ddnm").resolved(8).num_inference_steps == 8
    assert RestorationConfig("mmps", 20).resolved() == RestorationConfig("mmps", 20, 0.0, 2, None)
