"""The U-Net on a CPU: the same weights and, to rounding, the same numbers, in less time.

- 3x3 convolutions by Winograd's F(4x4, 3x3) where a quarter of the multiplications pays (`ddim.kernels.winograd`), by
  all multiplications where reading four times as many weights would cost more (`ddim.kernels.direct`). The choice
  follows from the sizes of layer and map alone, and so do the bits of the result; weights are arranged for it when a
  layer first sees a map of such a size.
- Group normalisation, the shift by the time embedding and SiLU in one loop, which writes straight into the map that the
  convolution after it reads, zero rim and all, and takes the two maps of a skip connection side by side, so that they
  are never concatenated (`ddim.kernels.norm`).
- Residuals are added where a convolution finishes its tiles.
- 1x1 convolutions and attention's linear layers by the loop of `ddim.kernels.direct` too; a block's queries, keys and
  values are one product.
- The projections of the time embedding are taken for all timesteps of a run before the first (`prepare`).
- Large batches go through the network a few samples at a time.

Feature maps are (N, H, W, C) float32, contiguous. What has no loop (an activation, attention itself) is done by
PyTorch in the same layout.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.diffusion.equations import Step
from ddim.diffusion.loop import StepFn, StepSettings
from ddim.io.weights import drop_pages
from ddim.kernels import direct, winograd
from ddim.kernels import norm as norms
from ddim.kernels.runtime import LANES, ready
from ddim.nn.layers import Attention, ResnetBlock2D, Upsample2D
from ddim.unet import UNet2DModel, check_embeddings

Map = Tensor
"""(N, H, W, C)."""

NEAR = 4 << 20
"""Bytes of transformed weights that stay in a processor's caches from one step to the next."""
KEPT = 8 << 20
"""Bytes of a map that is kept for the next step rather than made anew."""
TOGETHER = 4 << 20
"""Bytes of a map of the first convolution's: of a larger batch a few samples at a time are taken through the network,
one for each thread at least.
"""
A_PIXEL = 150 << 10
"""Bytes of transformed weights for each pixel of a map, at most, where they do not stay in the caches: what they gain
grows with the pixels, and what they cost, in memory and in reading it, does not.
"""
LARGE = 32 << 20
"""Bytes of transformed weights of a layer beyond which it takes more pixels for each of them: networks with such layers
are near the end of a machine's memory.
"""


class CPUEngine:
    """A network prepared for evaluation.

    It holds what it made of the weights when it was built: after they have changed, build another. It does not keep the
    network alive.

    Args:
        unet: float32 on the CPU.

    Raises:
        ImportError: without llvmlite, or if the loops have to be compiled and there is no numba.
    """

    name = "CPUEngine"

    def __init__(self, unet: UNet2DModel) -> None:
        ready(norms.NORMALISE, winograd.NORMALISE_AND_CONVOLVE, winograd.CONVOLVE, direct.CONVOLVE)
        self._unet = weakref.ref(unet)
        rims = _Rims()
        projections: list[nn.Linear] = []
        self._conv_in = _Conv3x3(unet.conv_in, rims)
        self._down = [_Block(block, rims, projections) for block in unet.down_blocks]
        self._middle = None if unet.mid_block is None else _Block(unet.mid_block, rims, projections)
        self._up = [_Block(block, rims, projections) for block in unet.up_blocks]
        self._norm_out = _Norm(unet.conv_norm_out, "silu")
        self._conv_out = _Conv3x3(unet.conv_out, rims)
        self._projections = projections
        self._act: Any = next(m for m in unet.modules() if isinstance(m, ResnetBlock2D)).nonlinearity
        self._expected: dict[float, list[Tensor]] = {}

    @torch.no_grad()
    def prepare(self, timesteps: Sequence[int]) -> None:
        """Project the embeddings of all timesteps of a run at once; it is not wrong to be asked about others."""
        unet = self._network()
        if unet.class_embedding is None and set(timesteps) - self._expected.keys():
            rows = self._project(unet.embed(torch.tensor(timesteps), None))
            self._expected = {timestep: [time[i : i + 1] for time in rows] for i, timestep in enumerate(timesteps)}

    @torch.no_grad()
    def predict(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Predict; arguments, result and errors are those of `UNet2DModel.forward`, without gradients."""
        unet = self._network()
        unet.check_sample(sample)
        if unet.config.center_input_sample:
            sample = 2 * sample - 1
        times = None
        if self._expected and class_labels is None and torch.as_tensor(timestep).ndim == 0:
            times = self._expected.get(float(timestep))
        if times is None:
            emb = unet.embed(timestep, class_labels)
            check_embeddings(emb, sample)
            times = self._project(emb)
        # Rows of several samples go with them; one for all goes with each.
        together = max(torch.get_num_threads(), TOGETHER // (4 * self._conv_in.K * sample[0, 0].numel()))
        outputs = []
        for first in range(0, max(len(sample), 1), together):
            part = slice(first, first + together)
            outputs.append(self._walk(sample[part], [row if len(row) == 1 else row[part] for row in times]))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if unet.config.time_embedding_type == "fourier":
            output = output / torch.as_tensor(timestep).to(output.dtype).reshape(-1, 1, 1, 1)
        return output

    def step_fn(self, latents: Tensor, steps: Sequence[Step], settings: StepSettings) -> StepFn | None:
        """Return `None`: steps are run from Python."""
        return None

    def _walk(self, sample: Tensor, times: list[Tensor]) -> Tensor:
        """The prediction for some samples and their projections."""
        remaining = iter(times)
        x = self._conv_in.of(sample.permute(0, 2, 3, 1))
        skips = [x]
        for block in self._down:
            x = block.down(x, skips, remaining)
        if self._middle is not None:
            x = self._middle.through(x, remaining)
        for block in self._up:
            x = block.up(x, skips, remaining)
        return self._norm_out.then(self._conv_out, x).permute(0, 3, 1, 2).contiguous()

    def _network(self) -> UNet2DModel:
        unet = self._unet()
        if unet is None:
            raise RuntimeError("the network that this engine was made of is gone")
        return unet

    def _project(self, emb: Tensor) -> list[Tensor]:
        """Of embeddings (N, E), each block's projection (N, F)."""
        emb = self._act(emb)
        return [F.linear(emb, linear.weight, linear.bias) for linear in self._projections]


def _filled(x: Tensor) -> Tensor:
    """Weights or a bias, with zeros for more output channels where these are not whole lanes."""
    x = x.detach()
    missing = -x.shape[0] % LANES
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing)) if missing else x.contiguous()


def _result(
    shape: tuple[int, int, int], K: int, residual: Map | None, convolve: Callable[[Map | None, Map], None]
) -> Map:
    """What `convolve(residual, y)`, which writes whole lanes, makes of (*shape, K)."""
    lanes = -(-K // LANES) * LANES
    y = torch.empty(*shape, lanes)
    if lanes == K:
        convolve(residual, y)
        return y
    convolve(None, y)
    y = y[..., :K].contiguous()
    return y if residual is None else y.add_(residual)


def _stacked(linears: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Weight and bias of one linear layer that gives the results of several side by side."""
    return torch.cat([x.weight.detach() for x in linears]), torch.cat([x.bias.detach() for x in linears])


class _Rims(threading.local):
    """Maps with a rim of zeros. Small ones are kept by shape: what is written into them leaves the rim as it is. Each
    thread has its own.
    """

    def __init__(self) -> None:
        self._maps: dict[tuple[int, ...], Tensor] = {}

    def get(self, shape: tuple[int, int, int, int], before: int, H: int, W: int) -> Tensor:
        """A map of this shape, zero around the H x W pixels that begin at (before, before)."""
        if 4 * math.prod(shape) > KEPT:
            x = torch.empty(shape)
            for side in (x[:, :before], x[:, before + H :], x[:, :, :before], x[:, :, before + W :]):
                side.zero_()
            return x
        if shape not in self._maps:
            if len(self._maps) > 64:
                self._maps.clear()
            # What is made in inference mode could not be written to outside.
            with torch.inference_mode(False):
                self._maps[shape] = torch.zeros(shape)
        return self._maps[shape]


class _Conv3x3:
    """A 3x3 convolution. Its input is written to what `input` gives, or is put there by `of`."""

    def __init__(self, conv: nn.Conv2d, rims: _Rims) -> None:
        self.conv, self.rims = conv, rims
        self.C, self.K, self.stride = conv.in_channels, conv.out_channels, conv.stride[0]
        # What is not padded has a row and a column below and on the right: `Downsample2D`.
        self.before = int(conv.padding[0])
        self.after = self.before or 1
        self._weights: dict[Any, tuple[Tensor, Tensor]] = {}

    def method(self, H: int, W: int) -> Any:
        """The module of the loop for a map of that size."""
        transformed = 4 * winograd.POINTS * self.C * self.K
        pays = transformed <= max(NEAR, A_PIXEL * H * W * min(1.0, LARGE / transformed))
        if self.stride == 1 and self.before == 1 and winograd.fits(self.C) and winograd.saves(H, W) and pays:
            return winograd
        return direct

    def weights(self, method: Any) -> tuple[Tensor, Tensor]:
        """As the method takes them, and the bias."""
        if method not in self._weights:
            weight, bias = _filled(self.conv.weight), _filled(cast(Tensor, self.conv.bias))
            arrange = winograd.transform_weights if method is winograd else direct.arrange_weights
            self._weights[method] = arrange(weight), bias
            drop_pages(self.conv.weight.detach())
        return self._weights[method]

    def input(self, N: int, H: int, W: int) -> tuple[Tensor, Tensor]:
        """Where its input is to be written: what `__call__` takes, and the part of it that is the map."""
        if self.method(H, W) is winograd:
            rows, columns = (-(-size // winograd.STEP) * winograd.STEP + 2 for size in (H, W))
        else:
            rows, columns = (size + self.before + self.after for size in (H, W))
        x = self.rims.get((N, rows, columns, self.C), self.before, H, W)
        return x, x[:, self.before : self.before + H, self.before : self.before + W]

    def of(self, x: Map) -> Map:
        """The convolution of a map."""
        y, inside = self.input(*x.shape[:3])
        inside.copy_(x)
        return self(y, *x.shape[1:3])

    def __call__(self, x: Tensor, H: int, W: int, residual: Map | None = None) -> Map:
        """The convolution of H x W pixels in a map from `input`, plus residual."""
        method = self.method(H, W)
        weights, bias = self.weights(method)
        if method is winograd:
            return _result((x.shape[0], H, W), self.K, residual, partial(winograd.convolve, x, weights, bias))
        OH, OW = ((size + self.before + self.after - 3) // self.stride + 1 for size in (H, W))
        convolve = partial(direct.convolve, x, weights, bias, self.stride)
        return _result((x.shape[0], OH, OW), self.K, residual, convolve)


class _Linear:
    """A linear layer, for each pixel."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.K = weight.shape[0]
        self.weights, self.bias = direct.arrange_weights(_filled(weight)[:, :, None, None]), _filled(bias)

    def __call__(self, x: Map, residual: Map | None = None) -> Map:
        """Plus residual."""
        N, H, W, C = x.shape
        convolve = partial(direct.convolve, x.view(1, 1, -1, C), self.weights, self.bias, 1)
        if residual is not None:
            residual = residual.view(1, 1, -1, self.K)
        return _result((1, 1, N * H * W), self.K, residual, convolve).view(N, H, W, self.K)


class _Norm:
    """A group norm, and the activation after it."""

    def __init__(self, norm: nn.GroupNorm, act: str | nn.Module | None) -> None:
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight.detach()[None], norm.bias.detach()[None]
        self.no_shift = torch.zeros_like(self.weight)
        self.silu = act == "silu" or isinstance(act, nn.SiLU)
        self.act = act if isinstance(act, nn.Module) and not self.silu else None

    def write(
        self,
        y: Tensor,
        inside: Tensor,
        a: Map,
        b: Map | None = None,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        """To `y`, whose pixels are `inside`. With a `scale` (N or 1, C) the shift comes after the norm instead."""
        weight, bias, before = self._terms(shift, scale)
        rim = y.shape != inside.shape
        norms.normalise(a, b, before, weight, bias, self.groups, self.eps, self.silu, y, rim)
        if self.act is not None:
            inside.copy_(self.act(inside))

    def _terms(self, shift: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, bias, and the shift before the norm."""
        if shift is None:
            return self.weight, self.bias, self.no_shift
        if scale is None:
            return self.weight, self.bias, shift
        return self.weight * (1 + scale), self.bias * (1 + scale) + shift, self.no_shift

    def then(
        self,
        conv: _Conv3x3,
        a: Map,
        b: Map | None = None,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        residual: Map | None = None,
    ) -> Map:
        """The convolution of it, plus residual."""
        N, H, W, _ = a.shape
        if conv.method(H, W) is winograd and self.act is None and torch.get_num_threads() <= N:
            weight, bias, before = self._terms(shift, scale)
            terms = (before, weight, bias, self.groups, self.eps, self.silu)
            convolve = partial(winograd.normalise_and_convolve, a, b, *terms, *conv.weights(winograd))
            return _result((N, H, W), conv.K, residual, convolve)
        y, inside = conv.input(N, H, W)
        self.write(y, inside, a, b, shift, scale)
        return conv(y, H, W, residual)


class _Resnet:
    def __init__(self, block: ResnetBlock2D, rims: _Rims) -> None:
        self.norm1, self.norm2 = _Norm(block.norm1, block.nonlinearity), _Norm(block.norm2, block.nonlinearity)
        self.conv1, self.conv2 = _Conv3x3(block.conv1, rims), _Conv3x3(block.conv2, rims)
        self.scale_shift, self.factor, self.resample = block.scale_shift, block.output_scale_factor, block.resample
        self.shortcut = block.conv_shortcut
        self._parts: tuple[_Linear, ...] = ()

    def __call__(self, a: Map, b: Map | None, time: Tensor) -> Map:
        scale, shift = None, time
        if self.scale_shift:
            scale, shift = (part.contiguous() for part in time.chunk(2, dim=1))
        residual = self._residual(a, b)
        if self.resample is None:
            x = self.norm1.then(self.conv1, a, b)
        else:
            normed = torch.empty_like(a)
            self.norm1.write(normed, normed, a)
            normed = self.resample(normed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            residual = self.resample(residual.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
            x = self.conv1.of(normed)
        x = self.norm2.then(self.conv2, x, None, shift, scale, residual)
        return x if self.factor == 1 else x.div_(self.factor)

    def _residual(self, a: Map, b: Map | None) -> Map:
        if self.shortcut is None:
            return a if b is None else torch.cat([a, b], dim=-1)
        if not self._parts:
            # The sum over the channels of both maps, each with its part of the weights.
            weight, bias = self.shortcut.weight.detach().flatten(1), cast(Tensor, self.shortcut.bias)
            widths = [x.shape[-1] for x in (a, b) if x is not None]
            first, *others = torch.split(weight, widths, dim=1)
            self._parts = _Linear(first, bias), *(_Linear(other, torch.zeros_like(bias)) for other in others)
            drop_pages(weight)
        total = self._parts[0](a)
        return total if b is None else self._parts[1](b, total)


class _Attention:
    def __init__(self, attention: Attention) -> None:
        self.norm = None if attention.group_norm is None else _Norm(attention.group_norm, None)
        self.heads, self.factor = attention.heads, attention.output_scale_factor
        self.qkv = _Linear(*_stacked([attention.to_q, attention.to_k, attention.to_v]))
        out: Any = attention.to_out[0]
        self.out = _Linear(out.weight, out.bias)

    def __call__(self, x: Map) -> Map:
        N, H, W, _ = x.shape
        normed = x
        if self.norm is not None:
            normed = torch.empty_like(x)
            self.norm.write(normed, normed, x)
        q, k, v = self.qkv(normed).view(N, H * W, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, H, W, -1)
        y = self.out(attended, x)
        return y if self.factor == 1 else y.div_(self.factor)


class _Block:
    """A block of the way down, of the middle or of the way up; times are taken in the order of the blocks."""

    def __init__(self, block: Any, rims: _Rims, projections: list[nn.Linear]) -> None:
        self.resnets = [self._resnet(resnet, rims, projections) for resnet in block.resnets]
        self.attentions = (
            None if block.attentions is None else [_Attention(cast(Attention, a)) for a in block.attentions]
        )
        samplers = getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None)
        self.sampler: Any = None
        if samplers is not None and isinstance(samplers[0], ResnetBlock2D):
            self.sampler = self._resnet(samplers[0], rims, projections)
        elif samplers is not None:
            self.sampler = samplers[0]
            self.conv = _Conv3x3(samplers[0].conv, rims)

    @staticmethod
    def _resnet(resnet: Any, rims: _Rims, projections: list[nn.Linear]) -> _Resnet:
        projections.append(resnet.time_emb_proj)
        return _Resnet(resnet, rims)

    def down(self, x: Map, skips: list[Map], times: Any) -> Map:
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, None, next(times))
            if self.attentions is not None:
                x = self.attentions[index](x)
            skips.append(x)
        if self.sampler is not None:
            x = self._resample(x, times)
            skips.append(x)
        return x

    def through(self, x: Map, times: Any) -> Map:
        x = self.resnets[0](x, None, next(times))
        if self.attentions is not None:
            x = self.attentions[0](x)
        return self.resnets[1](x, None, next(times))

    def up(self, x: Map, skips: list[Map], times: Any) -> Map:
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, skips.pop(), next(times))
            if self.attentions is not None:
                x = self.attentions[index](x)
        return x if self.sampler is None else self._resample(x, times)

    def _resample(self, x: Map, times: Any) -> Map:
        if isinstance(self.sampler, _Resnet):
            return self.sampler(x, None, next(times))
        if not isinstance(self.sampler, Upsample2D):
            return self.conv.of(x)
        N, H, W, _ = x.shape
        y, inside = self.conv.input(N, 2 * H, 2 * W)
        for i in (0, 1):
            for j in (0, 1):
                inside[:, i::2, j::2] = x
        return self.conv(y, 2 * H, 2 * W)
