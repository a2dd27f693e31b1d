"""Fine-tuning: the weights of a trained network in one that may have other channels or another size.

A U-Net is convolutional, so that its weights fit every size. The number of channels of the images shows in two layers
alone, `conv_in` and `conv_out`: where it differs, these two are new and all other weights are kept. A network that
predicts a variance, in as many channels again, is taken without it: it is not trained here.

Classes show in one layer alone, the rows of the class embedding, which are added to the embedding of the timestep.
Classes are the same where their names are; the null class is one of them. New classes of a network that had none are
zero, so that it starts as it was trained; those of a network with classes start as its null class, or as the mean of
its classes.

A student of distillation (`ddim.diffusion.distillation`) has few timesteps of its own. Their embedding is a table of
features, which starts as those that its teacher has for the same noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ddim.io.class_labels import ClassLabels
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel

CHANNEL_LAYERS = ("conv_in", "conv_out")
"""The layers whose shapes depend on the channels of the images."""
TINY = 1e-12
"""Added to alpha, which may be 0."""

CLASS_WEIGHT = "class_embedding.weight"


def fit_classes(
    weights: Mapping[str, Tensor], trained: ClassLabels | None, model: UNet2DModel
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights of a trained network with an embedding of the classes of another one.

    Args:
        weights: of the trained network.
        trained: its classes; `None` for none.
        model: the other network.

    Returns:
        Weights, and the names of the classes that are new.

    Raises:
        ValueError: if the trained network has classes and the other one has none.

    Example:
        >>> shape = {"block_out_channels": (4,), "down_block_types": ("DownBlock2D",), "norm_num_groups": 2,
        ...          "up_block_types": ("UpBlock2D",), "attention_head_dim": 4}
        >>> plain = UNet2DModel(8, 1, 1, **shape)
        >>> pets = UNet2DModel(8, 1, 1, **shape, num_class_embeds=2, class_names=("cat", "dog"))
        >>> fit_classes(plain.state_dict(), None, pets)[1]
        ['cat', 'dog']
    """
    result = dict(weights)
    classes = ClassLabels.of(model.config)
    if classes is None:
        if trained is not None:
            raise ValueError(f"it has {trained.count} classes, and data.labels is none; use auto or a column")
        return result, []
    own = model.state_dict()[CLASS_WEIGHT]
    rows, new = torch.zeros_like(own), []
    table = result.get(CLASS_WEIGHT)
    if trained is not None and table is not None:
        rows[:] = table[trained.count] if trained.has_null else table.mean(0)
    known = {} if trained is None else {name: index for index, name in enumerate(trained.names)}
    for index, name in enumerate(classes.names):
        if table is not None and name in known:
            rows[index] = table[known[name]]
        else:
            new.append(name)
    return result | {CLASS_WEIGHT: rows}, new


def without_variance(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a network without the outputs of a learned variance: the second half of them.

    Args:
        weights: the state dict of a network. One that has not twice as many outputs as inputs is left as it is.

    Returns:
        The weights.

    Example:
        >>> weights = {"conv_in.weight": torch.zeros(8, 3, 3, 3), "conv_out.bias": torch.zeros(6)}
        >>> without_variance(weights)["conv_out.bias"].shape
        torch.Size([3])
    """
    channels = weights["conv_in.weight"].shape[1]
    return {
        name: tensor[:channels] if name.startswith("conv_out.") and len(tensor) == 2 * channels else tensor
        for name, tensor in weights.items()
    }


def fit_timesteps(weights: Mapping[str, Tensor], network: UNet2DModel, timesteps: Sequence[int]) -> dict[str, Tensor]:
    """Return the weights of a trained network with a table of features of some of its timesteps.

    Args:
        weights: of the trained network.
        network: the trained network.
        timesteps: those of its timesteps that a network with `time_embedding_type: learned` has as 0, 1, ...

    Returns:
        Weights.

    Raises:
        ValueError: if there are more features of a timestep than a table has, as with `fourier`.

    Example:
        >>> shape = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "norm_num_groups": 2,
        ...          "up_block_types": ("UpBlock2D",), "attention_head_dim": 4}
        >>> teacher = UNet2DModel(8, 1, 1, **shape)
        >>> student = UNet2DModel(8, 1, 1, **shape, time_embedding_type="learned", num_train_timesteps=2)
        >>> weights = fit_timesteps(teacher.state_dict(), teacher, [300, 999])
        >>> load_weights(student, weights)
        []
        >>> x = torch.ones(1, 1, 8, 8)
        >>> bool(torch.equal(student(x, 0).sample, teacher(x, 300).sample))
        True
    """
    with torch.no_grad():
        features: Tensor = network.time_proj(torch.tensor(timesteps))
    channels = network.config.block_out_channels[0]
    if features.shape[1] != channels:
        raise ValueError(
            f"time_embedding_type must be positional or learned, with {channels} features of a timestep, got "
            f"{network.config.time_embedding_type} with {features.shape[1]}"
        )
    return {**weights, "time_proj.weight": features.to(weights["conv_in.weight"].dtype)}


def nearest_timesteps(trained: DDIMScheduler, scheduler: DDIMScheduler) -> list[int]:
    """Return the timesteps that have the noise of those of another schedule, as nearly as possible.

    Args:
        trained: whose timesteps are returned.
        scheduler: the other one, of S timesteps.

    Returns:
        S timesteps, for 0, ..., S - 1 of the other schedule.

    Example:
        >>> nearest_timesteps(DDIMScheduler(), DDIMScheduler(num_train_timesteps=2, trained_betas=[0.5, 0.9999]))
        [258, 988]
    """
    alphas, others = (np.log(s.alphas_cumprod_float64 + TINY) for s in (trained, scheduler))
    return [int(np.abs(alphas - other).argmin()) for other in others]


def load_weights(model: UNet2DModel, weights: Mapping[str, Tensor]) -> list[str]:
    """Load weights into a network that may have other channels.

    A new `conv_in` keeps its random initial weights, a new `conv_out` is zero, as at the start of a new network.

    Args:
        model: changed in place.
        weights: the state dict of a network of the same architecture.

    Returns:
        Names of the layers that are new.

    Raises:
        ValueError: if other layers differ.

    Example:
        >>> shape = {"block_out_channels": (4,), "down_block_types": ("DownBlock2D",), "norm_num_groups": 2,
        ...          "up_block_types": ("UpBlock2D",), "attention_head_dim": 4}
        >>> gray, color = UNet2DModel(8, 1, 1, **shape), UNet2DModel(8, 3, 3, **shape)
        >>> load_weights(color, gray.state_dict())
        ['conv_in', 'conv_out']
    """
    own = model.state_dict()
    weights = without_variance(weights)
    new = [
        layer
        for layer in CHANNEL_LAYERS
        if f"{layer}.weight" in weights and weights[f"{layer}.weight"].shape != own[f"{layer}.weight"].shape
    ]
    kept = {name: tensor for name, tensor in weights.items() if name.rpartition(".")[0] not in new}
    fresh = {name: tensor for name, tensor in own.items() if name.rpartition(".")[0] in new}
    try:
        model.load_state_dict({**kept, **fresh})
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[-1].strip()) from None
    if "conv_out" in new:
        for parameter in model.conv_out.parameters():
            nn.init.zeros_(parameter)
    return new
