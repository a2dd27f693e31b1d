"""What an engine is: the `Engine` protocol, and `EagerEngine`, which runs a network as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ddim.diffusion.equations import Step
from ddim.diffusion.loop import StepFn, StepSettings
from ddim.nn.layers import (
    ACTIVATIONS,
    Attention,
    Downsample2D,
    GaussianFourierProjection,
    ResnetBlock2D,
    TimestepEmbedding,
    Timesteps,
    Upsample2D,
)
from ddim.unet import DownBlock2D, MidBlock2D, UNet2DModel, UpBlock2D

SUPPORTED_MODULES = {
    *(UNet2DModel, DownBlock2D, MidBlock2D, UpBlock2D, ResnetBlock2D, Attention, Downsample2D, Upsample2D),
    *(Timesteps, GaussianFourierProjection, TimestepEmbedding, *ACTIVATIONS.values()),
    *(nn.Conv2d, nn.Linear, nn.GroupNorm, nn.Embedding, nn.Identity, nn.Dropout, nn.ModuleList),
}
"""The classes of modules, exactly, that the CPU and the CUDA engine implement."""

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Engine(Protocol):
    """Runs a network without gradients. Threads may share an engine."""

    @property
    def name(self) -> str:
        """The name under which manifests record the engine."""

    def predict(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Evaluate the network.

        Args:
            sample: x_t, (N, C, H, W), in the network's dtype and on its device.
            timestep: t, in 0..T-1; one number, a tensor (), or one per sample (N,).
            class_labels: int64 (N,), for class-conditional networks.

        Returns:
            The prediction, (N, C, H, W) in the default (contiguous) memory format.
        """

    def prepare(self, timesteps: Sequence[int]) -> None:
        """Embed all timesteps of a run before its first step. Other timesteps can still be predicted at.

        Args:
            timesteps: those of the run, in any order.
        """

    def step_fn(self, latents: Tensor, steps: Sequence[Step], settings: StepSettings) -> StepFn | None:
        """Return a function that takes a whole step of a run, network and update together, in one launch.

        Args:
            latents: x at the first timestep, (N, C, H, W) float32 or float64 on the network's device.
            steps: all steps of the run, in order.
            settings: of the run.

        Returns:
            A function for one pass over `steps`, or `None` where steps have to be run from Python.
        """


class EagerEngine:
    """Runs a network by calling it.

    Args:
        unet: any object that is called as `unet(sample, timestep).sample`.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> engine = EagerEngine(lambda sample, timestep: SimpleNamespace(sample=sample * timestep))
        >>> engine.predict(torch.ones(1, 1, 1, 1), 3).item()
        3.0
    """

    def __init__(self, unet: Any) -> None:
        self.unet = unet

    @property
    def name(self) -> str:
        """The class name of the network, under which manifests record it."""
        return type(self.unet).__name__

    def predict(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Evaluate the network; see `Engine.predict`.

        Args:
            sample: x_t, (N, C, H, W).
            timestep: t; one number, a tensor (), or one per sample (N,).
            class_labels: int64 (N,), for class-conditional networks; not passed on if `None`.

        Returns:
            The prediction, (N, C, H, W).
        """
        labels = () if class_labels is None else (class_labels,)
        prediction: Tensor = self.unet(sample, timestep, *labels).sample
        return prediction

    def prepare(self, timesteps: Sequence[int]) -> None:
        """Do nothing: the network embeds timesteps when it is called.

        Args:
            timesteps: ignored.
        """

    def step_fn(self, latents: Tensor, steps: Sequence[Step], settings: StepSettings) -> StepFn | None:
        """Return `None`: steps are run from Python.

        Args:
            latents: ignored.
            steps: ignored.
            settings: ignored.

        Returns:
            `None`.
        """
        return None


def unsupported_reason(unet: Any, device_type: str | None = None) -> str | None:
    """Return why the engine of a device type cannot run a network.

    Args:
        unet: any object.
        device_type: `cpu` or `cuda`; the type of the network's own device if `None`.

    Returns:
        The reason, to follow "the network runs as it is: "; `None` for a `UNet2DModel` as it was built, in a supported
        dtype and on one device of that type.

    Example:
        >>> unsupported_reason(nn.Identity())
        'Identity is not a UNet2DModel'
    """
    if type(unet) is not UNet2DModel:
        return f"{type(unet).__name__} is not a UNet2DModel"
    for name, module in unet.named_modules():
        if type(module) not in SUPPORTED_MODULES or "forward" in vars(module):
            return f"{name} has been replaced"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has hooks"
    parameters = list(unet.parameters())
    if (device_type or unet.device.type) != "cuda":
        supported = all(p.dtype == torch.float32 and p.device.type == "cpu" for p in parameters)
        return None if supported else "its parameters are not all float32 on the CPU, or on one CUDA device"
    if any(p.dtype != unet.dtype for p in parameters):
        return "its parameters have several dtypes"
    if unet.dtype not in CUDA_DTYPES:
        return f"its dtype is {unet.dtype}"
    if any(p.device.type != "cuda" or p.device != unet.device for p in parameters):
        return "its parameters are not all on one CUDA device"
    return None
