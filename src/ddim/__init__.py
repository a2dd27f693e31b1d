"""Denoising Diffusion Implicit Models (Song, Meng, Ermon, arXiv 2010.02502): train, sample, save and load.

    from ddim import DDIMPipeline

    pipe = DDIMPipeline.from_pretrained("mnist")
    pipe(seeds=range(16), num_inference_steps=20).images[0].save("digit.png")

Names are imported when they are first used, so that the command line can print its help without loading PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ddim.version import __version__

if TYPE_CHECKING:
    from ddim.diffusion.interpolation import slerp
    from ddim.pipeline import DDIMPipeline
    from ddim.scheduler import DDIMInverseScheduler, DDIMScheduler
    from ddim.unet import UNet2DModel

_HOMES = {
    "DDIMInverseScheduler": "ddim.scheduler",
    "DDIMPipeline": "ddim.pipeline",
    "DDIMScheduler": "ddim.scheduler",
    "UNet2DModel": "ddim.unet",
    "slerp": "ddim.diffusion.interpolation",
}

__all__ = ["DDIMInverseScheduler", "DDIMPipeline", "DDIMScheduler", "UNet2DModel", "__version__", "slerp"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ddim' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
