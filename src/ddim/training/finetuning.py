"""Fine-tuning: the weights of a trained network in one that may have other channels or another size.

A U-Net is convolutional, so that its weights fit every size. The number of channels of the images shows in two layers
alone, `conv_in` and `conv_out`: where it differs, these two are new and all other weights are kept.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ddim.unet import UNet2DModel

CHANNEL_LAYERS = ("conv_in", "conv_out")
"""The layers whose shapes depend on the channels of the images."""


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
