"""The fused operations of the CUDA engine against float64, as PyTorch's operators and as kernels in Triton.

The kernels run on a GPU; without one, where Triton is installed, in its interpreter, in a process that knows from the
start that it interprets.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddim.engine.fused import operations, reference
from ddim.engine.fused.network import FusedNetwork, apply_linear, pad_channels
from ddim.engine.fused.reference import Norm
from ddim.unet import UNet2DModel
from helpers import environment, randn

HAS_TRITON = find_spec("triton") is not None
IS_INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu")
needs_kernels = pytest.mark.skipif(
    not (IS_INTERPRETED or (DEVICE.type == "cuda" and HAS_TRITON)), reason="needs a GPU, or Triton as an interpreter"
)
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest difference, relative to expected values above 1: that of rounding the result to the dtype."""


def feature_map(*shape: int, seed: int, dtype: torch.dtype, offset: float = 0.0) -> Tensor:
    """Noise around an offset, in channels_last, rounded to a dtype."""
    x = randn(*shape, seed=seed) + offset
    return x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def make_norm(C: int, groups: int, dtype: torch.dtype, silu: bool = True) -> Norm:
    weight, bias = (1 + 0.3 * randn(C, seed=11), 0.3 * randn(C, seed=12))
    return Norm(weight.to(DEVICE, dtype), bias.to(DEVICE, dtype), groups, 1e-5, silu)


def exact_norm(
    a: Tensor, b: Tensor | None, norm: Norm, shift: Tensor | None, scale: Tensor | None, shift_after: Tensor | None
) -> Tensor:
    """`operations.normalize` in float64."""
    x = (a if b is None else torch.cat([a, b], 1)).double()
    if shift is not None:
        x = x + shift.double()[:, :, None, None]
    y = F.group_norm(x, norm.groups, norm.weight.double(), norm.bias.double(), norm.eps)
    if scale is not None and shift_after is not None:
        y = y * (1 + scale.double()[:, :, None, None]) + shift_after.double()[:, :, None, None]
    return F.silu(y) if norm.silu else y


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    allowed = TOLERANCES[actual.dtype] if tolerance is None else tolerance
    difference = (actual.double() - expected).abs()
    # Comparisons with NaN are false.
    assert bool((difference <= allowed * expected.abs().clamp_min(1)).all())


def load_kernels() -> ModuleType:
    from ddim.engine.fused import triton_kernels

    return triton_kernels


IMPLEMENTATIONS = ["reference", pytest.param("triton", marks=needs_kernels)]


@pytest.fixture(params=IMPLEMENTATIONS)
def ops(request: pytest.FixtureRequest) -> ModuleType:
    return reference if request.param == "reference" else load_kernels()


class TestNormalize:
    @pytest.mark.parametrize(
        ("N", "channels", "groups", "size"),
        [
            (1, (8,), 4, (2, 2)),
            (3, (32,), 32, (4, 4)),
            (1, (48,), 32 // 2, (3, 5)),
            (2, (96,), 32, (8, 8)),
            (1, (144,), 16, (7, 4)),
            (1, (40, 24), 32, (4, 4)),
            (2, (256, 128), 32, (2, 4)),
            (1, (33,), 3, (5, 5)),
            (1, (100,), 1, (2, 3)),
            (1, (1,), 1, (1, 2)),
        ],
    )
    def test_shapes(
        self, ops: ModuleType, N: int, channels: tuple[int, ...], groups: int, size: tuple[int, int]
    ) -> None:
        a, b, *_ = *(feature_map(N, C, *size, seed=i, dtype=torch.float32) for i, C in enumerate(channels)), None
        norm = make_norm(sum(channels), groups, torch.float32)
        actual = ops.normalize(a, b, norm)
        assert_close(actual, exact_norm(a, b, norm, None, None, None))
        assert actual.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("dtype", TOLERANCES)
    @pytest.mark.parametrize("rows", [1, 2])
    @pytest.mark.parametrize("modulated", [False, True])
    @pytest.mark.parametrize("silu", [False, True])
    def test_terms(self, ops: ModuleType, dtype: torch.dtype, rows: int, modulated: bool, silu: bool) -> None:
        """Shift, scale and shift after the norm are one row for all samples or one per sample, with any stride."""
        C = 24
        a = feature_map(2, C, 4, 4, seed=0, dtype=dtype)
        projected = randn(rows, 5 * C, seed=3).to(DEVICE, dtype)
        shift = projected[:, :C]
        scale, shift_after = (0.3 * projected[:, 2 * C : 4 * C]).chunk(2, dim=1) if modulated else (None, None)
        norm = make_norm(C, 8, dtype, silu)
        actual = ops.normalize(a, None, norm, shift, scale, shift_after)
        assert actual.dtype == dtype
        assert_close(actual, exact_norm(a, None, norm, shift, scale, shift_after))

    @needs_kernels
    @pytest.mark.parametrize("size", [(4, 4), (48, 48)])
    def test_large_mean(self, size: tuple[int, int]) -> None:
        """Digits of a variance of 1 are not lost beside a mean of 1000, as they are by PyTorch's operator."""
        a = feature_map(1, 16, *size, seed=0, dtype=torch.float32, offset=1000.0)
        norm = make_norm(16, 2, torch.float32)
        actual = load_kernels().normalize(a, None, norm)
        assert_close(actual, exact_norm(a, None, norm, None, None, None), 1e-3)

    @needs_kernels
    @pytest.mark.parametrize(
        ("channels", "groups", "size", "limit"),
        [((24,), 8, (9, 7), 256), ((16, 8), 4, (8, 10), 512), ((40,), 2, (5, 7), 128), ((6,), 1, (10, 9), 64)],
    )
    def test_chunks(
        self,
        channels: tuple[int, ...],
        groups: int,
        size: tuple[int, int],
        limit: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Maps that do not fit one tile, of which the last tile and chunk are not full."""
        kernels = load_kernels()
        monkeypatch.setattr(kernels, "TILE_ELEMENTS", limit)
        monkeypatch.setattr(kernels, "MAX_TILE_ELEMENTS", limit)
        monkeypatch.setattr(kernels, "MAX_CHUNKS", 4)
        assert not kernels.choose_tiling(size[0] * size[1], sum(channels), groups).is_single
        maps = [feature_map(2, C, *size, seed=i, dtype=torch.float32, offset=5.0) for i, C in enumerate(channels)]
        a, b = maps[0], maps[1] if len(maps) > 1 else None
        norm = make_norm(sum(channels), groups, torch.float32)
        shift, scale, shift_after = (0.3 * randn(2, sum(channels), seed=s).to(DEVICE) for s in (5, 6, 7))
        for terms in [(None, None, None), (shift, None, None), (shift, scale, shift_after)]:
            assert_close(kernels.normalize(a, b, norm, *terms), exact_norm(a, b, norm, *terms))

    @needs_kernels
    def test_non_finite_values_stay_in_their_group(self) -> None:
        a = feature_map(2, 16, 4, 4, seed=0, dtype=torch.float32)
        norm = make_norm(16, 4, torch.float32)
        expected = load_kernels().normalize(a, None, norm)
        a[1, 5, 2, 2] = torch.nan
        actual = load_kernels().normalize(a, None, norm)
        assert actual[1, 4:8].isnan().all()
        actual[1, 4:8] = expected[1, 4:8]
        assert torch.equal(actual, expected)

    @needs_cuda
    @needs_kernels
    @pytest.mark.parametrize("dtype", TOLERANCES)
    @pytest.mark.parametrize("C", [32, 48, 96, 128, 144, 160, 256, 384, 512])
    def test_shapes_of_networks(self, dtype: torch.dtype, C: int) -> None:
        groups = 16 if C % 32 else 32
        norm, kernels = make_norm(C, groups, dtype), load_kernels()
        sizes = (2, 2), (4, 4), (7, 9), (16, 16), (32, 32), (64, 64)
        for N, size, offset in product((1, 3, 16), sizes, (0.0, 100.0)):
            a = feature_map(N, C, *size, seed=0, dtype=dtype, offset=offset)
            shift = randn(N, C, seed=1).to(DEVICE, dtype)
            assert_close(
                kernels.normalize(a, None, norm, shift),
                exact_norm(a, None, norm, shift, None, None),
                1e-4 if dtype == torch.float32 else None,
            )
            first, second = (half.contiguous(memory_format=torch.channels_last) for half in a.split([C - 16, 16], 1))
            assert torch.equal(kernels.normalize(first, second, norm, shift), kernels.normalize(a, None, norm, shift))


class TestResidual:
    @pytest.mark.parametrize("dtype", TOLERANCES)
    @pytest.mark.parametrize(("N", "C", "size"), [(1, 8, (2, 2)), (3, 24, (5, 3)), (1, 1100, (2, 3)), (2, 3, (1, 1))])
    def test_sums(self, ops: ModuleType, dtype: torch.dtype, N: int, C: int, size: tuple[int, int]) -> None:
        x, first, second = (feature_map(N, C, *size, seed=seed, dtype=dtype) for seed in range(3))
        bias = randn(C, seed=4).to(DEVICE)
        for bias_or_none, skips, divisor in [(bias, [first, second], 1.0), (None, [first], 1.5), (bias, [], 1.0)]:
            expected = x.double() + sum(skip.double() for skip in skips)
            if bias_or_none is not None:
                expected = expected + bias.double()[:, None, None]
            actual = ops.add_residual(x, bias_or_none, skips, divisor)
            assert actual.dtype == dtype
            assert_close(actual, expected / divisor)

    @pytest.mark.parametrize("dtype", TOLERANCES)
    @pytest.mark.parametrize(("N", "C", "H", "W"), [(1, 8, 2, 2), (3, 5, 3, 4), (2, 16, 1, 3)])
    def test_interleave(self, ops: ModuleType, dtype: torch.dtype, N: int, C: int, H: int, W: int) -> None:
        x = feature_map(N, 4 * C, H + 1, W + 1, seed=0, dtype=dtype)
        y = ops.interleave(x)
        assert y.shape == (N, C, 2 * H, 2 * W)
        for i, j, h, w in product((0, 1), (0, 1), range(H), range(W)):
            part = (2 * i + j) * C
            assert torch.equal(y[:, :, 2 * h + i, 2 * w + j], x[:, part : part + C, h + i, w + j])


class TestTiling:
    """Tiles hold whole groups, are powers of two, and stay within the limits of registers."""

    @needs_kernels
    @pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 12, 14, 16, 33, 64, 100, 1024, 8192])
    @pytest.mark.parametrize("groups", [1, 3, 16, 32])
    @pytest.mark.parametrize("P", [1, 16, 63, 1024, 4096, 1 << 20])
    def test_limits(self, size: int, groups: int, P: int) -> None:
        kernels = load_kernels()
        tiling = kernels.choose_tiling(P, size * groups, groups)
        assert tiling.block_c & (tiling.block_c - 1) == 0
        assert tiling.block_p & (tiling.block_p - 1) == 0
        assert 1 <= tiling.groups <= groups
        assert tiling.block_c >= tiling.groups * size
        assert tiling.block_p * tiling.block_c <= kernels.MAX_TILE_ELEMENTS
        assert tiling.is_single == (tiling.block_p >= P) or not tiling.is_single
        assert tiling.groups == 1 or tiling.block_c <= kernels.MAX_TILE_CHANNELS

    @needs_kernels
    def test_unsupported_shapes(self) -> None:
        kernels = load_kernels()
        assert kernels.is_supported((256, 128, 32, 32), torch.bfloat16, 32)
        assert not kernels.is_supported((256, 128, 32, 32), torch.float64, 32)
        assert not kernels.is_supported((0, 128, 32, 32), torch.float32, 32)
        assert not kernels.is_supported((1, 1 << 14, 2, 2), torch.float32, 1)
        assert not kernels.is_supported((1 << 20, 128, 32, 32), torch.float32, 32)


class TestChoice:
    def test_cpu_runs_on_operators(self) -> None:
        assert operations.load_kernels(torch.device("cpu"), torch.float32) is None

    def test_broken_compiler_falls_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine without a C compiler, or without Triton, runs on PyTorch's operators."""

        def fail(name: str) -> ModuleType:
            raise RuntimeError("Failed to find C compiler")

        monkeypatch.setattr(operations.importlib, "import_module", fail)
        assert operations.load_kernels.__wrapped__(torch.device("cuda"), torch.float32) is None

    @needs_cuda
    def test_gpu_runs_on_kernels(self) -> None:
        assert all(operations.load_kernels(DEVICE, dtype) is not None for dtype in TOLERANCES)


@needs_kernels
class TestNetwork:
    """The whole network on kernels, with each operation where the network has it."""

    @pytest.mark.parametrize(
        "changes",
        [
            {"downsample_padding": 0},
            {
                "resnet_time_scale_shift": "scale_shift",
                "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
                "mid_block_scale_factor": 1.4,
            },
        ],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equals_the_network(
        self,
        make_unet: Callable[..., UNet2DModel],
        monkeypatch: pytest.MonkeyPatch,
        changes: dict[str, Any],
        dtype: torch.dtype,
    ) -> None:
        monkeypatch.setattr(operations, "load_kernels", lambda device, dtype: load_kernels())
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        unet = make_unet(**changes).to(DEVICE)
        x, t = randn(2, 3, 16, 16).to(DEVICE), torch.tensor([7, 400], device=DEVICE)
        with torch.no_grad():
            expected = unet(x, t).sample
            actual = FusedNetwork(unet.to(dtype=dtype, memory_format=torch.channels_last))(x.to(dtype), t)
        assert actual.is_contiguous()
        assert_close(actual, expected.double(), 1e-5 if dtype == torch.float32 else None)


class TestLayers:
    def test_padding_keeps_values(self) -> None:
        x = randn(2, 3, 4, 4)
        padded = pad_channels(x, dim=1)
        assert torch.equal(padded[:, :3], x)
        assert not padded[:, 3:].any()
        assert padded.is_contiguous(memory_format=torch.channels_last)
        assert pad_channels(randn(5, 8, 3, 3), dim=0).shape == (8, 8, 3, 3)

    @pytest.mark.parametrize("dtype", TOLERANCES)
    def test_linear(self, dtype: torch.dtype) -> None:
        x, weight = feature_map(2, 8, 3, 3, seed=0, dtype=dtype), randn(5, 8).to(DEVICE, dtype)
        y = apply_linear(x, weight)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_close(y, torch.einsum("nchw,kc->nkhw", x.double(), weight.double()), 5 * TOLERANCES[dtype])


@pytest.mark.skipif(
    not HAS_TRITON or IS_INTERPRETED or DEVICE.type == "cuda", reason="needs Triton, and no GPU to run the kernels on"
)
def test_kernels_in_the_interpreter(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    settings = environment(tmp_path, TRITON_INTERPRET="1")
    result = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:]
