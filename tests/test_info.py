"""`ddim.info`: operations against those that PyTorch counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ddim.info import count_flop
from ddim.training.config import preset_names, read_preset
from ddim.unet import UNet2DModel

SMALL: dict[str, Any] = {
    "sample_size": (16, 8),
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
NETWORKS = {
    "small": SMALL,
    "resampling": SMALL
    | {
        "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
    },
    "attention resampled": SMALL | {"downsample_type": "resnet", "upsample_type": "resnet"},
    "classes": SMALL | {"num_class_embeds": 5},
    "embedded classes": SMALL | {"class_embed_type": "timestep"},
    "no middle": SMALL | {"mid_block_type": None},
    "no attention in the middle": SMALL | {"add_attention": False},
    **{name: read_preset(name)["model"] for name in preset_names()},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_operations_are_those_that_pytorch_counts(name: str) -> None:
    with torch.device("meta"):
        unet = UNet2DModel(**NETWORKS[name]).eval()
        size = unet.config.sample_size
        sample = torch.empty(1, unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        labels = None if unet.class_embedding is None else torch.zeros(1, dtype=torch.int64)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            unet(sample, torch.zeros((), dtype=torch.int64), labels)
    assert count_flop(unet) == counter.get_total_flops()
