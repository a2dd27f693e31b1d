"""A client's program, checked by `mypy --strict`: the public names have types that a user can rely on.

It is part of what `mypy` checks here, and is checked against the built wheel by `scripts/check_release.py`. It is not
run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import assert_type

import torch
from PIL.Image import Image
from torch import Tensor

from ddim import DDIMInverseScheduler, DDIMPipeline, DDIMScheduler, UNet2DModel, slerp
from ddim.bulk import BulkResult, sample_many
from ddim.diffusion.operators import BoxDownsample, LinearOperator, Mask
from ddim.export import export_onnx
from ddim.outputs import DDIMSchedulerOutput, EncodeOutput, ImagePipelineOutput, ReconstructOutput


def sample(folder: Path) -> list[Image]:
    """Load a pipeline, sample from it and save it."""
    pipe = DDIMPipeline.from_pretrained("mnist", torch_dtype=torch.float32).to("cpu")
    assert_type(pipe, DDIMPipeline)
    pipe.save_pretrained(folder)
    assert_type(pipe(4, seeds=range(4), guidance_scale=1.5), ImagePipelineOutput)
    (images,) = pipe(4, return_dict=False)
    pipe(latents=pipe.encode(images).latents).images[0].save(folder / "first.png")
    return list(pipe.sample_images(4, seed=0, num_inference_steps=20))


def invert(pipe: DDIMPipeline, images: Sequence[Image]) -> tuple[Tensor, Tensor]:
    """Encode and decode images."""
    encoded = pipe.encode(images, num_inference_steps=20)
    assert_type(encoded, EncodeOutput)
    again = pipe.reconstruct(images, num_inference_steps=20)
    assert_type(again, ReconstructOutput)
    return encoded.latents, again.mse


def interpolate(pipe: DDIMPipeline, z0: Tensor, z1: Tensor) -> Tensor:
    """Interpolate between two latents."""
    pipe.interpolate(z0, z1, frames=5, num_inference_steps=10)
    return slerp(z0, z1, 0.5)


def step_by_step(unet: UNet2DModel, scheduler: DDIMScheduler, x: Tensor) -> Tensor:
    """Sample in a loop of one's own."""
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps:
        output = scheduler.step(unet(x, t).sample, int(t), x)
        assert_type(output, DDIMSchedulerOutput)
        x = output.prev_sample
    inverse = DDIMInverseScheduler.from_config(scheduler.config)
    assert_type(inverse, DDIMInverseScheduler)
    return x


def restore(pipe: DDIMPipeline, image: Image, mask: Tensor) -> LinearOperator:
    """Inpaint, and restore what an operator leaves of an image."""
    pipe.inpaint([image], mask, samples=4)
    operator = BoxDownsample((1, 28, 28), 4)
    pipe.restore(torch.zeros(1, 1, 7, 7), operator)
    return Mask((1, 28, 28), mask)


def write_files(pipe: DDIMPipeline, folder: Path) -> BulkResult:
    """Sample into files, and export."""
    export_onnx(pipe, folder / "model.onnx")
    return sample_many(pipe, folder / "images", 1000)
