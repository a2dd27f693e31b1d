"""Compiled loops against PyTorch in float64, and when they stand in for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numba import carray
from torch import Tensor, nn

import ddim.kernels
import ddim.nn.ops
from ddim.kernels.source import compile_loop
from ddim.nn.ops import convolve, loops, norm_silu
from ddim.unet import UNet2DModel

Gradients = tuple[Tensor, ...]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def innermost(x: Tensor) -> Tensor:
    """The same map with channels innermost."""
    return x.contiguous(memory_format=torch.channels_last)


def make_norm(C: int, groups: int) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, C)
    with torch.no_grad():
        norm.weight.copy_(drawn(C, seed=1))
        norm.bias.copy_(drawn(C, seed=2))
    return norm


def make_conv(C: int, K: int, size: int, stride: int, padding: int) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(C, K, size, stride, padding).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def gradients(run: Callable[[], Tensor], *inputs: Tensor) -> Gradients:
    """What `run` gives, and the gradients of a fixed linear function of it."""
    y = run()
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    return y.detach(), *torch.autograd.grad((y * slope).sum(), inputs)


def apart(found: Gradients, expected: Gradients) -> float:
    """The largest relative distance."""
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def apart_together(found: Gradients, expected: Gradients) -> float:
    """The relative distance of all numbers as one vector: some gradients of a network are nothing but rounding."""
    return apart((torch.cat([t.flatten() for t in found]),), (torch.cat([t.flatten() for t in expected]).double(),))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """`threads(n)` sets how many there are, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """`plain()` takes the compiled loops away."""

    def take_away() -> None:
        for module in (ddim.nn.ops, ddim.nn.ops):
            monkeypatch.setattr(module, "loops", lambda name: None)

    return take_away


class TestNorm:
    @pytest.mark.parametrize("silu", [True, False])
    @pytest.mark.parametrize("shifted", [True, False])
    @pytest.mark.parametrize(
        ("N", "C", "H", "W", "groups"), [(3, 32, 28, 28, 8), (1, 6, 5, 3, 2), (4, 40, 1, 2, 1), (2, 33, 9, 8, 11)]
    )
    def test_equals_float64(self, N: int, C: int, H: int, W: int, groups: int, shifted: bool, silu: bool) -> None:
        norm = make_norm(C, groups)
        x = innermost(2 * drawn(N, C, H, W) + 5).requires_grad_()
        shift = drawn(N, C, seed=3).requires_grad_() if shifted else None
        inputs = [x, norm.weight, norm.bias] + ([shift] if shift is not None else [])
        found = gradients(lambda: norm_silu(norm, x, shift, silu), *inputs)

        doubled = [t.detach().double().requires_grad_() for t in inputs]

        def expected() -> Tensor:
            u = doubled[0] if shift is None else doubled[0] + doubled[3][:, :, None, None]
            z = F.group_norm(u, groups, doubled[1], doubled[2], norm.eps)
            return F.silu(z) if silu else z

        assert "_NormSiLU" in str(norm_silu(norm, x, shift, silu).grad_fn)
        assert apart(found, gradients(expected, *doubled)) < 1e-6

    def test_one_shift_for_all_samples(self) -> None:
        norm, x, shift = make_norm(8, 2), innermost(drawn(3, 8, 4, 4)), drawn(1, 8, seed=3).requires_grad_()
        found = gradients(lambda: norm_silu(norm, x, shift), shift)
        assert apart(found, gradients(lambda: F.silu(norm((x + shift[:, :, None, None]).contiguous())), shift)) < 1e-6

    def test_large_maps_keep_their_precision(self) -> None:
        norm, x = make_norm(4, 2), innermost(drawn(1, 4, 400, 300) + 100)
        y = norm_silu(norm, x).detach()
        expected = F.silu(F.group_norm(x.double(), 2, norm.weight.double(), norm.bias.double())).detach()
        assert float((y - expected).abs().max()) < 2e-5

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_no_number_stays_visible(self, value: float) -> None:
        norm, x = make_norm(8, 2), innermost(drawn(2, 8, 4, 4))
        x[1, 0, 2, 2] = value
        x.requires_grad_()
        y = norm_silu(norm, x)
        assert not y[1, :4].isfinite().any()
        assert y[0].isfinite().all()
        assert y[1, 4:].isfinite().all()
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert not gradient[1, :4].isfinite().any()
        assert gradient[0].isfinite().all()

    def test_sigmoid_of_anything(self) -> None:
        """Values far out on both sides, by way of the bias."""
        norm = make_norm(8, 8)
        with torch.no_grad():
            norm.bias.copy_(torch.tensor([-1e30, -1000, -100, -88, 88, 100, 1000, 1e30]))
        x = innermost(drawn(1, 8, 4, 4)).requires_grad_()
        found = gradients(lambda: norm_silu(norm, x), norm.bias)
        expected = gradients(lambda: F.silu(norm(x.contiguous())), norm.bias)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-34)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-30)

    def test_gradients_of_gradients(self) -> None:
        norm, x = make_norm(8, 2), innermost(drawn(2, 8, 3, 3)).requires_grad_()

        def second(run: Callable[[], Tensor]) -> Gradients:
            (first,) = torch.autograd.grad(run().square().sum(), x, create_graph=True)
            return torch.autograd.grad(first.square().sum(), (x, norm.weight))

        assert apart(second(lambda: norm_silu(norm, x)), second(lambda: F.silu(norm(x.contiguous())))) < 1e-5


class TestConvolution:
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
        conv, x = make_conv(C, K, size, stride, padding), innermost(drawn(N, C, H, W)).requires_grad_()
        inputs = (x, conv.weight, conv.bias)
        found = gradients(lambda: convolve(conv, x), *inputs)
        doubled = [t.detach().double().requires_grad_() for t in inputs]
        expected = gradients(lambda: F.conv2d(*doubled, stride, padding), *doubled)
        assert "_Conv2d" in str(convolve(conv, x).grad_fn)
        assert found[2].is_contiguous(memory_format=torch.channels_last)
        assert apart(found, expected) < 2e-6

    def test_threads_change_nothing(self, threads: Callable[[int], None]) -> None:
        conv, x = make_conv(32, 64, 3, 1, 1), innermost(drawn(3, 32, 16, 16)).requires_grad_()
        found = []
        for number in (1, 2, 5):
            threads(number)
            found.append(gradients(lambda: convolve(conv, x), x, conv.weight))
        assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))

    @pytest.mark.parametrize(("C", "K", "size"), [(1, 32, 3), (32, 1, 3), (24, 32, 3), (32, 40, 3), (32, 32, 1)])
    def test_other_shapes_are_pytorchs(self, C: int, K: int, size: int) -> None:
        conv, x = make_conv(C, K, size, 1, size // 2), innermost(drawn(2, C, 6, 6)).requires_grad_()
        found = gradients(lambda: convolve(conv, x), x, conv.weight, conv.bias)
        assert apart(found, gradients(lambda: conv(x), x, conv.weight, conv.bias)) == 0

    def test_only_what_is_wanted(self) -> None:
        conv, x = make_conv(16, 16, 3, 1, 1), innermost(drawn(2, 16, 6, 6))
        convolve(conv, x).sum().backward()
        assert conv.weight.grad is not None
        conv.weight.requires_grad_(False)
        x.requires_grad_()
        expected = gradients(lambda: conv(x), x)
        assert apart(gradients(lambda: convolve(conv, x), x), expected) < 1e-6

    def test_gradients_of_gradients(self) -> None:
        conv, x = make_conv(16, 16, 3, 1, 1), innermost(drawn(2, 16, 6, 6)).requires_grad_()

        def second(run: Callable[[], Tensor]) -> Gradients:
            (first,) = torch.autograd.grad(run().square().sum(), x, create_graph=True)
            return torch.autograd.grad(first.square().sum(), (x, conv.weight))

        assert apart(second(lambda: convolve(conv, x)), second(lambda: conv(x))) < 1e-5


SETTINGS: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}


def network(**changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**SETTINGS | changes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def trained(model: UNet2DModel, number: int = 5) -> Gradients:
    x = innermost(drawn(number, 3, 8, 8))
    return gradients(lambda: model(x, torch.arange(number) * 100).sample, *model.parameters())


class TestNetwork:
    @pytest.mark.parametrize(
        "changes", [{}, {"act_fn": "gelu"}, {"resnet_time_scale_shift": "scale_shift"}, {"downsample_padding": 0}]
    )
    def test_trains_as_without(self, changes: dict[str, Any], plain: Callable[[], None]) -> None:
        model = network(**changes)
        found = trained(model)
        plain()
        assert 0 < apart_together(found, trained(model)) < 1e-5

    def test_threads_change_nothing(self, threads: Callable[[int], None]) -> None:
        """The loops divide their results among threads, not their sums."""
        norm, conv = loops("norm"), loops("conv_grad")
        assert norm is not None
        assert conv is not None
        x, dy = innermost(drawn(7, 48, 9, 9)), innermost(drawn(7, 48, 9, 9, seed=1))
        shift, weight, bias = drawn(7, 48), drawn(48), drawn(48)

        def everything() -> Gradients:
            y, mean, rstd = norm.forward(x, shift, weight, bias, 8, 1e-5, True)
            back = norm.backward(dy, x, shift, weight, bias, mean, rstd, True)
            return y, mean, rstd, *back, conv.weight_gradient(x, dy, 3, 1, 1)

        threads(1)
        alone = everything()
        for number in (2, 3, 11):
            threads(number)
            assert all(torch.equal(a, b) for a, b in zip(everything(), alone, strict=True))

    def test_callers_in_parallel(self) -> None:
        model = network()
        expected = trained(model)
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(lambda _: trained(model), range(8)):
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_where_they_stand_in(self) -> None:
        """In training, on float32 maps with channels innermost, outside of mixed precision and captured graphs."""
        norm, x = make_norm(8, 2), innermost(drawn(2, 8, 4, 4)).requires_grad_()

        def compiled(x: Tensor) -> bool:
            return "_NormSiLU" in str(norm_silu(norm, x).grad_fn)

        assert compiled(x)
        assert not compiled(drawn(2, 8, 4, 4).requires_grad_())
        assert not compiled(x[:, :, ::2])
        with torch.autocast("cpu", torch.bfloat16):
            assert not compiled(x)
        norm.eval()
        assert not compiled(x)
        norm.train().double()
        assert not compiled(x.double())
        assert norm_silu(norm.to("meta"), x.to("meta").double()).device.type == "meta"

    def test_captured_graphs_have_none(self) -> None:
        model = network().train()
        x = innermost(drawn(2, 3, 8, 8))
        exported = torch.export.export(model, (x, torch.tensor([3, 4])), {"return_dict": False}, strict=False)
        assert not [node for node in exported.graph.nodes if "NormSiLU" in str(node.target)]
        (found,) = exported.module()(x, torch.tensor([3, 4]), return_dict=False)
        torch.testing.assert_close(found, model(x, torch.tensor([3, 4])).sample, rtol=1e-4, atol=1e-5)


class TestWithout:
    def test_without_numba(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("DDIM_KERNEL_CACHE", str(tmp_path))
        monkeypatch.setattr(sys, "executable", "")  # other processes could compile
        for name in [name for name in sys.modules if name.startswith("ddim.kernels.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "numba", None)
        loops.cache_clear()
        try:
            model = network()
            found = trained(model)
            assert loops("norm") is None
        finally:
            loops.cache_clear()
        monkeypatch.undo()
        assert 0 < apart_together(trained(model), found) < 1e-5

    def test_without_pytorchs_team(self) -> None:
        """Where PyTorch's threads cannot be asked, the caller does all of the work."""
        code = (
            "import ctypes, torch; real = ctypes.CDLL\n"
            "ctypes.CDLL = lambda name, *a, **k: real(name or 'libc.so.6', *a, **k)\n"
            "from ddim.kernels import runtime\n"
            "assert runtime._team() is None\n"
            "from ddim.kernels.norm import forward\n"
            "x = torch.randn(3, 8, 4, 4).to(memory_format=torch.channels_last)\n"
            "y, *_ = forward(x, torch.zeros(3, 8), torch.ones(8), torch.zeros(8), 2, 1e-5, False)\n"
            "torch.testing.assert_close(y, torch.nn.functional.group_norm(x, 2))\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"OMP_NUM_THREADS": "2"})

    DOUBLE = (
        "import sys, torch\n"
        "from ddim.kernels.conv_grad import weight_gradient\n"
        "x = torch.ones(1, 16, 4, 4).to(memory_format=torch.channels_last)\n"
        "assert weight_gradient(x, x, 3, 1, 1)[0, 0, 1, 1] == 16\n"
        "print('numba' in sys.modules)\n"
    )

    @classmethod
    def compiles(cls, cache: Path) -> bool:
        environment = os.environ | {"DDIM_KERNEL_CACHE": str(cache)}
        done = subprocess.run([sys.executable, "-c", cls.DOUBLE], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout == "True\n"

    def test_several_are_compiled_by_other_processes(self, tmp_path: Path) -> None:
        code = (
            "import sys; from ddim.nn.ops import loops; assert loops('norm') is not None\n"
            "print('numba' in sys.modules)\n"
        )
        environment = os.environ | {"DDIM_KERNEL_CACHE": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
        expected = {"forward.o", "backward.o", "gradient.o", "normalise_and_convolve.o"}
        assert {file.name for file in tmp_path.rglob("*.o")} == expected

    def test_code_is_kept(self, tmp_path: Path) -> None:
        """Compiled once, loaded without numba afterwards; damaged code is not run."""
        assert self.compiles(tmp_path)
        assert not self.compiles(tmp_path)
        (kept,) = tmp_path.rglob("gradient.o")
        content = bytearray(kept.read_bytes())
        content[len(content) // 2] ^= 1
        kept.write_bytes(content)
        assert self.compiles(tmp_path)
        assert not self.compiles(tmp_path)

    def test_without_a_place_to_keep_code(self, tmp_path: Path) -> None:
        """A cache folder that cannot be made costs the compilation and nothing else."""
        (tmp_path / "file").touch()
        assert self.compiles(tmp_path / "file" / "kernels")

    def test_what_code_may_call(self) -> None:
        """Nothing that is there only with numba: a loop that could raise an error is refused."""

        def divide(data: Any) -> None:
            job = carray(data, 1)[0]
            if job.N == 0:
                raise ZeroDivisionError(str(job.N))

        with pytest.raises(RuntimeError, match="not there without numba"):
            compile_loop(divide, np.dtype([("N", np.int64)]), "ddim_divide")
