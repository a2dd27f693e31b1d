"""A network that trains on compiled kernels against the same on PyTorch's operators."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from ddim.nn.ops import load_kernels
from ddim.unet import UNet2DModel
from helpers import randn
from kernel_helpers import Gradients, channels_last, gradients, total_error

SETTINGS: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}


def make_network(**changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**SETTINGS | changes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def train_step(model: UNet2DModel, number: int = 5) -> Gradients:
    x = channels_last(randn(number, 3, 8, 8))
    return gradients(lambda: model(x, torch.arange(number) * 100).sample, *model.parameters())


class TestNetwork:
    @pytest.mark.parametrize(
        "changes", [{}, {"act_fn": "gelu"}, {"resnet_time_scale_shift": "scale_shift"}, {"downsample_padding": 0}]
    )
    def test_gradients_equal_those_of_pytorch(
        self, changes: dict[str, Any], disable_kernels: Callable[[], None]
    ) -> None:
        model = make_network(**changes)
        actual = train_step(model)
        disable_kernels()
        assert 0 < total_error(actual, train_step(model)) < 1e-5

    def test_results_do_not_depend_on_threads(self, threads: Callable[[int], None]) -> None:
        """Kernels divide results among threads, not the terms of a sum."""
        norm, conv = load_kernels("norm"), load_kernels("conv_grad")
        assert norm is not None
        assert conv is not None
        x, dy = channels_last(randn(7, 48, 9, 9)), channels_last(randn(7, 48, 9, 9, seed=1))
        shift, weight, bias = randn(7, 48), randn(48), randn(48)

        def run_all() -> Gradients:
            y, mean, rstd = norm.forward(x, shift, weight, bias, 8, 1e-5, True)
            gradients = norm.backward(dy, x, shift, weight, bias, mean, rstd, True)
            return y, mean, rstd, *gradients, conv.weight_gradient(x, dy, 3, 1, 1)

        threads(1)
        expected = run_all()
        for number in (2, 3, 11):
            threads(number)
            assert all(torch.equal(a, b) for a, b in zip(run_all(), expected, strict=True))

    def test_callers_in_parallel(self) -> None:
        model = make_network()
        expected = train_step(model)
        with ThreadPoolExecutor(4) as pool:
            for actual in pool.map(lambda _: train_step(model), range(8)):
                assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    def test_captured_graphs_hold_no_kernels(self) -> None:
        model = make_network().train()
        x = channels_last(randn(2, 3, 8, 8))
        exported = torch.export.export(model, (x, torch.tensor([3, 4])), {"return_dict": False}, strict=False)
        assert not [node for node in exported.graph.nodes if "NormSiLU" in str(node.target)]
        (actual,) = exported.module()(x, torch.tensor([3, 4]), return_dict=False)
        torch.testing.assert_close(actual, model(x, torch.tensor([3, 4])).sample, rtol=1e-4, atol=1e-5)
