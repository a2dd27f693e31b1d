"""Fingerprints: SHA-256 of what decides a result, by which files and caches recognize the model they belong to."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

from ddim.io.json_files import to_json
from ddim.io.pixel_format import format_of
from ddim.io.weights import digest


class HasModel(Protocol):
    """A pipeline or sampler: whatever holds a network and a noise schedule.

    Attributes:
        unet: a `UNet2DModel`.
        scheduler: a `DDIMScheduler`.
    """

    unet: Any
    scheduler: Any


def model_sha256(pipe: HasModel) -> str:
    """Return a SHA-256 of everything that decides which image a latent stands for.

    That is the weights with their dtype, the network's configuration, the format of its images' values, the noise
    schedule, and what the network predicts (`prediction_type`). The sampler's settings, which vary from call to call,
    are not part of it.

    Args:
        pipe: holds the model.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> from ddim import DDIMPipeline
        >>> pipe = DDIMPipeline.from_pretrained("mnist")
        >>> len(model_sha256(pipe))
        64
    """
    sha256 = hashlib.sha256()
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in pipe.unet.state_dict().items()}
    sha256.update(digest(weights).encode())
    config = {name: value for name, value in pipe.unet.config.items() if not name.startswith("_")}
    sha256.update(to_json(config).encode())
    if (pixel_format := format_of(pipe.unet.config).record()) is not None:
        sha256.update(to_json(pixel_format).encode())
    # A discrete process has a number of values instead.
    scheduler = pipe.scheduler.config
    sha256.update(str(getattr(scheduler, "prediction_type", None) or f"{scheduler.num_values} values").encode())
    sha256.update(pipe.scheduler.alphas_cumprod.cpu().numpy().tobytes())
    return sha256.hexdigest()
