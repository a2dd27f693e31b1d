"""Convolutions by compiled kernels, and their gradients, against PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddim.kernels import direct, winograd
from ddim.kernels.norm import NormTerms, normalize
from ddim.nn.ops import convolve
from helpers import randn
from kernel_helpers import channels_last, distance, gradients, make_conv, second_gradients


class TestGradients:
    @pytest.mark.parametrize(
        ("N", "C", "K", "H", "W", "size", "stride", "padding"),
        [
            (3, 32, 16, 28, 28, 3, 1, 1),
            (5, 16, 48, 7, 7, 3, 1, 1),
            (70, 16, 16, 2, 3, 3, 1, 1),
            (2, 48, 32, 15, 13, 2, 1, 0),
            (4, 32, 32, 14, 14, 3, 2, 1),
            (1, 16, 16, 17, 17, 3, 2, 0),
            (1, 16, 16, 3, 300, 3, 1, 1),
            (1, 256, 128, 4, 4, 3, 1, 1),
            (2, 32, 64, 16, 16, 3, 1, 1),
            (1, 96, 32, 31, 30, 3, 1, 1),
        ],
    )
    def test_equals_float64(self, N: int, C: int, K: int, H: int, W: int, size: int, stride: int, padding: int) -> None:
        conv, x = make_conv(C, K, size, stride, padding), channels_last(randn(N, C, H, W)).requires_grad_()
        inputs = (x, conv.weight, conv.bias)
        actual = gradients(lambda: convolve(conv, x), *inputs)
        doubles = [t.detach().double().requires_grad_() for t in inputs]
        expected = gradients(lambda: F.conv2d(*doubles, stride, padding), *doubles)
        assert "_Conv2d" in str(convolve(conv, x).grad_fn)
        assert actual[2].is_contiguous(memory_format=torch.channels_last)
        assert distance(actual, expected) < 2e-6

    def test_results_do_not_depend_on_threads(self, threads: Callable[[int], None]) -> None:
        conv, x = make_conv(32, 64, 3, 1, 1), channels_last(randn(3, 32, 16, 16)).requires_grad_()
        actual = []
        for number in (1, 2, 5):
            threads(number)
            actual.append(gradients(lambda: convolve(conv, x), x, conv.weight))
        assert all(torch.equal(a, b) for others in actual[1:] for a, b in zip(actual[0], others, strict=True))

    @pytest.mark.parametrize(("C", "K", "size"), [(1, 32, 3), (32, 1, 3), (24, 32, 3), (32, 40, 3), (32, 32, 1)])
    def test_unsupported_shapes_fall_back(self, C: int, K: int, size: int) -> None:
        conv, x = make_conv(C, K, size, 1, size // 2), channels_last(randn(2, C, 6, 6)).requires_grad_()
        actual = gradients(lambda: convolve(conv, x), x, conv.weight, conv.bias)
        assert distance(actual, gradients(lambda: conv(x), x, conv.weight, conv.bias)) == 0

    def test_only_needed_gradients_are_computed(self) -> None:
        conv, x = make_conv(16, 16, 3, 1, 1), channels_last(randn(2, 16, 6, 6))
        convolve(conv, x).sum().backward()
        assert conv.weight.grad is not None
        conv.weight.requires_grad_(False)
        x.requires_grad_()
        expected = gradients(lambda: conv(x), x)
        assert distance(gradients(lambda: convolve(conv, x), x), expected) < 1e-6

    def test_gradients_of_gradients(self) -> None:
        conv, x = make_conv(16, 16, 3, 1, 1), channels_last(randn(2, 16, 6, 6)).requires_grad_()
        actual = second_gradients(lambda: convolve(conv, x), x, conv.weight)
        assert distance(actual, second_gradients(lambda: conv(x), x, conv.weight)) < 1e-5


class TestWinograd:
    @pytest.mark.parametrize(
        ("N", "C", "K", "H", "W"),
        [
            (1, 8, 32, 4, 4),
            (3, 32, 32, 28, 28),
            (2, 40, 96, 7, 5),
            (1, 96, 32, 1, 9),
            (5, 16, 32, 2, 2),
            (1, 8, 32, 3, 70),
        ],
    )
    @pytest.mark.parametrize("has_residual", [False, True])
    def test_equals_float64(self, N: int, C: int, K: int, H: int, W: int, has_residual: bool) -> None:
        x, weight, bias = randn(N, H, W, C), randn(K, C, 3, 3, seed=1) / (9 * C) ** 0.5, randn(K, seed=2)
        residual = randn(N, H, W, K, seed=3)
        y = torch.full((N, H, W, K), torch.nan)
        weights = winograd.transform_weights(weight)
        winograd.convolve(winograd.padded(x), weights, bias, residual if has_residual else None, y)
        expected = F.conv2d(x.permute(0, 3, 1, 2).double(), weight.double(), bias.double(), padding=1)
        expected = expected.permute(0, 2, 3, 1) + (residual if has_residual else 0)
        assert float((y - expected).abs().max()) < 1e-4
        assert distance((y,), (expected,)) < 1e-5

    def test_bits_depend_on_nothing_but_the_sample(self, threads: Callable[[int], None]) -> None:
        """Not on the batch around it, nor on the number of threads; alone, or with the norm before it."""
        N, C, K, size = 7, 24, 32, 10
        x, weight, bias = randn(N, size, size, C), randn(K, C, 3, 3, seed=1), randn(K, seed=2)
        weights, one, zero = winograd.transform_weights(weight), torch.ones(1, C), torch.zeros(1, C)
        terms = NormTerms(zero, one, zero, groups=3, eps=1e-5, silu=True)

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            ys = torch.empty(2, len(x), size, size, K)
            padded = torch.zeros(winograd.padded_shape(len(x), C, size, size))
            normalize(x, None, terms, padded, has_halo=True)
            winograd.convolve(padded, weights, bias, None, ys[0])
            winograd.normalize_and_convolve(x, None, terms, weights, bias, None, ys[1])
            return ys[0], ys[1]

        expected, _ = run(x)
        for number in (1, 2, 3, 9):
            threads(number)
            for y in (*run(x), *(torch.cat(parts) for parts in zip(*map(run, x.split(2)), strict=True))):
                assert torch.equal(y, expected)


class TestDirect:
    @pytest.mark.parametrize(
        ("N", "C", "K", "H", "W", "size", "stride"),
        [
            (1, 3, 32, 5, 7, 3, 1),
            (3, 32, 96, 8, 8, 3, 2),
            (2, 128, 32, 4, 4, 3, 1),
            (45, 16, 32, 9, 5, 3, 1),
            (1, 1, 32, 1, 1, 3, 2),
            (1, 33, 64, 7, 3, 1, 1),
            (3, 16, 32, 20, 20, 1, 1),
        ],
    )
    @pytest.mark.parametrize("has_residual", [False, True])
    def test_equals_float64(
        self,
        threads: Callable[[int], None],
        N: int,
        C: int,
        K: int,
        H: int,
        W: int,
        size: int,
        stride: int,
        has_residual: bool,
    ) -> None:
        """With the same bits for any number of threads."""
        x, weight, bias = randn(N, H, W, C), randn(K, C, size, size, seed=1) / (9 * C) ** 0.5, randn(K, seed=2)
        padding = size // 2
        expected = F.conv2d(x.permute(0, 3, 1, 2).double(), weight.double(), bias.double(), stride, padding)
        expected = expected.permute(0, 2, 3, 1)
        residual, results = randn(*expected.shape, seed=3), []
        for number in (1, 2, 3):
            threads(number)
            y = torch.full(expected.shape, torch.nan)
            weights = direct.arrange_weights(weight)
            padded = F.pad(x, (0, 0, padding, padding, padding, padding))
            direct.convolve(padded, weights, bias, stride, residual if has_residual else None, y)
            assert distance((y,), (expected + (residual if has_residual else 0),)) < 1e-5
            results.append(y)
            assert torch.equal(y, results[0])
