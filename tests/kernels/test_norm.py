"""Group normalization and SiLU, by compiled kernels, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.kernels import winograd
from ddim.kernels.norm import NormTerms, normalize
from ddim.nn.ops import norm_act
from helpers import randn
from kernel_helpers import channels_last, distance, gradients, make_norm, second_gradients


class TestNormAct:
    @pytest.mark.parametrize("silu", [True, False])
    @pytest.mark.parametrize("shifted", [True, False])
    @pytest.mark.parametrize(
        ("N", "C", "H", "W", "groups"), [(3, 32, 28, 28, 8), (1, 6, 5, 3, 2), (4, 40, 1, 2, 1), (2, 33, 9, 8, 11)]
    )
    def test_equals_float64(self, N: int, C: int, H: int, W: int, groups: int, shifted: bool, silu: bool) -> None:
        norm = make_norm(C, groups)
        x = channels_last(2 * randn(N, C, H, W) + 5).requires_grad_()
        shift = randn(N, C, seed=3).requires_grad_() if shifted else None
        inputs = [x, norm.weight, norm.bias] + ([shift] if shift is not None else [])
        actual = gradients(lambda: norm_act(norm, nn.SiLU() if silu else None, x, shift), *inputs)

        doubles = [t.detach().double().requires_grad_() for t in inputs]

        def expected() -> Tensor:
            u = doubles[0] if shift is None else doubles[0] + doubles[3][:, :, None, None]
            z = F.group_norm(u, groups, doubles[1], doubles[2], norm.eps)
            return F.silu(z) if silu else z

        assert "_NormSiLU" in str(norm_act(norm, nn.SiLU() if silu else None, x, shift).grad_fn)
        assert distance(actual, gradients(expected, *doubles)) < 1e-6

    def test_one_shift_for_all_samples(self) -> None:
        norm, x, shift = make_norm(8, 2), channels_last(randn(3, 8, 4, 4)), randn(1, 8, seed=3).requires_grad_()
        actual = gradients(lambda: norm_act(norm, nn.SiLU(), x, shift), shift)
        assert (
            distance(actual, gradients(lambda: F.silu(norm((x + shift[:, :, None, None]).contiguous())), shift)) < 1e-6
        )

    def test_large_maps_keep_their_precision(self) -> None:
        norm, x = make_norm(4, 2), channels_last(randn(1, 4, 400, 300) + 100)
        y = norm_act(norm, nn.SiLU(), x).detach()
        expected = F.silu(F.group_norm(x.double(), 2, norm.weight.double(), norm.bias.double())).detach()
        assert float((y - expected).abs().max()) < 2e-5

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_non_finite_values_propagate(self, value: float) -> None:
        norm, x = make_norm(8, 2), channels_last(randn(2, 8, 4, 4))
        x[1, 0, 2, 2] = value
        x.requires_grad_()
        y = norm_act(norm, nn.SiLU(), x)
        assert not y[1, :4].isfinite().any()
        assert y[0].isfinite().all()
        assert y[1, 4:].isfinite().all()
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert not gradient[1, :4].isfinite().any()
        assert gradient[0].isfinite().all()

    def test_sigmoid_of_extreme_values(self) -> None:
        """Large values on both sides, by way of the bias."""
        norm = make_norm(8, 8)
        with torch.no_grad():
            norm.bias.copy_(torch.tensor([-1e30, -1000, -100, -88, 88, 100, 1000, 1e30]))
        x = channels_last(randn(1, 8, 4, 4)).requires_grad_()
        actual = gradients(lambda: norm_act(norm, nn.SiLU(), x), norm.bias)
        expected = gradients(lambda: F.silu(norm(x.contiguous())), norm.bias)
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=1e-34)
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-30)

    def test_gradients_of_gradients(self) -> None:
        norm, x = make_norm(8, 2), channels_last(randn(2, 8, 3, 3)).requires_grad_()
        actual = second_gradients(lambda: norm_act(norm, nn.SiLU(), x), x, norm.weight)
        expected = second_gradients(lambda: F.silu(norm(x.contiguous())), x, norm.weight)
        assert distance(actual, expected) < 1e-5

    def test_kernels_run_in_training_only(self) -> None:
        """In training, on float32 feature maps in channels_last, outside of mixed precision and captured graphs."""
        norm, x = make_norm(8, 2), channels_last(randn(2, 8, 4, 4)).requires_grad_()

        def compiled(x: Tensor) -> bool:
            return "_NormSiLU" in str(norm_act(norm, nn.SiLU(), x).grad_fn)

        assert compiled(x)
        assert not compiled(randn(2, 8, 4, 4).requires_grad_())
        assert not compiled(x[:, :, ::2])
        with torch.autocast("cpu", torch.bfloat16):
            assert not compiled(x)
        norm.eval()
        assert not compiled(x)
        norm.train().double()
        assert not compiled(x.double())
        assert norm_act(norm.to("meta"), nn.SiLU(), x.to("meta").double()).device.type == "meta"


class TestNormalize:
    @pytest.mark.parametrize("silu", [True, False])
    @pytest.mark.parametrize("halo", [True, False])
    @pytest.mark.parametrize(("A", "B"), [(24, 0), (8, 16), (30, 6)])
    @pytest.mark.parametrize("per_sample", [True, False])
    def test_equals_float64(self, A: int, B: int, halo: bool, silu: bool, per_sample: bool) -> None:
        N, H, W, C = 3, 6, 5, A + B
        a, b = randn(N, H, W, A) + 3, randn(N, H, W, B, seed=1) if B else None
        M = N if per_sample else 1
        shift, weight, bias = randn(M, C, seed=2), randn(M, C, seed=3), randn(M, C, seed=4)
        y = torch.zeros(winograd.padded_shape(N, C, H, W)) if halo else torch.empty(N, H, W, C)
        normalize(a, b, NormTerms(shift, weight, bias, 3, 1e-5, silu), y, halo)
        x = a if b is None else torch.cat([a, b], dim=-1)
        u = (x + shift[:, None, None]).double().permute(0, 3, 1, 2)
        z = F.group_norm(u, 3).permute(0, 2, 3, 1) * weight[:, None, None] + bias[:, None, None]
        expected = F.silu(z) if silu else z
        inside = y[:, 1 : H + 1, 1 : W + 1] if halo else y
        assert distance((inside,), (expected,)) < 1e-6
        if halo:
            assert float(y.double().square().sum()) == pytest.approx(float(inside.double().square().sum()))
