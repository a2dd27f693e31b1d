"""Samples as the metrics take them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ddim.pipeline import DDIMPipeline


def paint_pixels(pipe: DDIMPipeline, count: int, num_inference_steps: int, batch_size: int = 256) -> Tensor:
    """Pictures from seeds 0 to count - 1 as bytes, as they would be in files.

    Returns:
        uint8 (count, C, H, W) on the CPU.
    """
    images = pipe.paint(count, batch_size=batch_size, num_inference_steps=num_inference_steps)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
