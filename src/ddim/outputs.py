"""Results with names: dataclasses that can also be indexed and unpacked as the tuples of `diffusers` can."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image


class Output:
    """Base of the results below: `out.name`, `out["name"]`, `out[0]` and `out.to_tuple()` (without the `None`s)."""

    def to_tuple(self) -> tuple[Any, ...]:
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


@dataclass
class UNet2DOutput(Output):
    """What a U-Net predicts: `sample`, (N, out_channels, H, W), in the network's dtype."""

    sample: torch.Tensor


@dataclass
class DDIMSchedulerOutput(Output):
    """A step's result: `prev_sample` is x at the next timestep of the subsequence, `pred_original_sample` the predicted
    x0 after clipping; both (N, C, H, W).
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


@dataclass
class ImagePipelineOutput(Output):
    """Pictures: a list of N PIL images, a float32 array (N, H, W, C) in [0, 1], or a tensor (N, C, H, W) in [0, 1]."""

    images: list[Image.Image] | np.ndarray | torch.Tensor
