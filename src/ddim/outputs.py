"""Results with names: dataclasses that can also be indexed and unpacked as the tuples of `diffusers` can."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


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
    """Images: a list of N PIL images, a float32 array (N, H, W, C) in [0, 1], or a tensor (N, C, H, W) in [0, 1]."""

    images: Any


@dataclass
class EncodeOutput(Output):
    """Latent codes of N pictures, and how well they were found.

    Attributes:
        latents: the codes, float32 (N, C, H, W) on the model's device: x at `timesteps[0]`. Float64 images, or a
            float64 model, give float64 codes.
        timesteps: the S timesteps, from the largest to the smallest; `decode` wants the same.
        residuals: (N, S): how far the step of decoding lands from where encoding came from, the largest difference
            among the values of a picture, on the scale of [-1, 1]. Column j belongs to the step from `timesteps[j]`;
            that from timestep 0 leads nowhere and has no residual and no cost.
        evaluations: int64 (N, S): network evaluations spent.
        tolerance: what each residual was to reach.
        mse: float64 (N,): the mean squared error per value in [0, 1] of what decoding gives back, before it is clipped
            or rounded; NaN where that was not looked at (`verify=False`).
    """

    latents: torch.Tensor
    timesteps: list[int]
    residuals: torch.Tensor
    evaluations: torch.Tensor
    tolerance: float
    mse: torch.Tensor

    @property
    def residual(self) -> torch.Tensor:
        """The largest residual of each picture, (N,)."""
        return self.residuals.amax(1)

    @property
    def converged(self) -> torch.Tensor:
        """Whether each picture's code reached the tolerance in every step, bool (N,)."""
        return self.residual <= self.tolerance


@dataclass
class ReconstructOutput(Output):
    """Pictures that went through latent space and back.

    Attributes:
        images: what came back: a list of N PIL images, an array (N, H, W, C) or a tensor (N, C, H, W) in [0, 1].
        codes: the latent codes on the way.
    """

    images: Any
    codes: EncodeOutput

    @property
    def mse(self) -> torch.Tensor:
        """Each picture's mean squared error per value in [0, 1], float64 (N,); that of the codes."""
        return self.codes.mse

    @property
    def psnr(self) -> torch.Tensor:
        """The peak signal-to-noise ratio in dB, (N,): -10 log10(mse)."""
        return -10 * self.mse.log10()


@dataclass
class TrajectoryOutput(Output):
    """How pictures appear. Lists have an entry for each timestep shown, the noisiest first; each entry holds N pictures
    of the `output_type` asked for.

    Attributes:
        timesteps: t of each entry.
        samples: x_t.
        pred_original_samples: the x_0 that the network predicts from x_t.
        images: where the process ends.
    """

    timesteps: list[int]
    samples: list[Any]
    pred_original_samples: list[Any]
    images: Any
