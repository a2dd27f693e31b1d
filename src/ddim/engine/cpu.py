"""The U-Net on a CPU: the same weights and, to rounding, the same results, in less time.

- 3x3 convolutions run by Winograd's F(4x4, 3x3) where a quarter of the multiplications pays (`ddim.kernels.winograd`),
  by all multiplications where reading four times as many weights would cost more (`ddim.kernels.direct`). The choice
  follows from the sizes of layer and feature map alone, and so do the bits of the result; weights are arranged for it
  when a layer first meets a feature map of such a size.
- Group normalization, the shift by the time embedding and SiLU are one kernel, which writes straight into the map that
  the convolution after it reads, with its halo, and takes the two feature maps of a skip connection side by side, so
  that they are never concatenated (`ddim.kernels.norm`).
- Residuals are added where a convolution finishes its tiles.
- 1x1 convolutions and attention's linear layers run by `ddim.kernels.direct` too; a block's queries, keys and values
  are one product.
- The projections of the time embedding are computed for all timesteps of a run before the first step (`prepare`),
  row by row: how a product of several rows rounds depends on their number. As the kernels sum each output alone, in one
  order, the prediction of a sample then depends, to the bit, on nothing but that sample, its timestep and its class.
- Large batches pass through the network a few samples at a time.
- Weights in bfloat16 or float16 are widened when they are arranged: everything is computed in float32, in its time.

Feature maps are (N, H, W, C) float32, contiguous. What has no kernel (other activations, attention itself) runs on
PyTorch's operators in the same layout.
"""

from __future__ import annotations

import copy
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.diffusion.equations import Step
from ddim.diffusion.loop import StepFn, StepSettings
from ddim.io.weights import drop_pages
from ddim.kernels import direct, winograd
from ddim.kernels import norm as norm_kernels
from ddim.kernels.machine import OUTPUT_LANES
from ddim.kernels.norm import NormTerms
from ddim.kernels.runtime import ensure_compiled
from ddim.kernels.winograd.constants import POINTS
from ddim.nn.layers import Attention, ResnetBlock2D, Upsample2D
from ddim.unet import UNet2DModel, as_timesteps, check_conditions, embed_conditions, label_ndim

FeatureMap = Tensor
"""(N, H, W, C) float32, contiguous."""

L2_WEIGHT_BYTES = 4 << 20
"""Transformed weights of a layer that stay in a processor's caches from one step to the next."""
WEIGHT_BYTES_PER_PIXEL = 150 << 10
"""Transformed weights per pixel of a feature map, at most, where they do not stay in the caches: what they gain grows
with the pixels, and what they cost, in memory and in reading it, does not."""
LARGE_LAYER_BYTES = 32 << 20
"""Transformed weights of a layer beyond which `WEIGHT_BYTES_PER_PIXEL` shrinks in proportion: networks with such layers
are near the end of a machine's memory."""
CACHED_BUFFER_BYTES = 8 << 20
"""Largest padded buffer that is kept for the next step instead of made anew."""
MAX_CACHED_BUFFERS = 64
"""Padded buffers of one thread, of as many shapes; beyond it all are dropped."""
QUERY_BLOCK, ALIGNED_FLOATS = 32, 16
"""PyTorch's attention: queries that a thread takes at a time, at least, where there are as many; and the numbers in 64
bytes, to which memory is aligned."""
MAX_PREPARED_EMBEDDINGS = 4096
"""Pairs of timesteps and classes whose embeddings are projected before a run; more are projected step by step."""
MICRO_BATCH_BYTES = 4 << 20
"""Output of the first convolution for the samples that pass through the network together: so many fit the caches. There
is one sample per thread at least."""


class CPUEngine:
    """Runs a network on a CPU by compiled kernels.

    It holds what it made of the weights when it was built: after they have changed, build another. It does not keep the
    network alive. Threads may share it.

    Args:
        unet: on the CPU, one that `ddim.engine.base.unsupported_reason` supports.

    Raises:
        ImportError: without llvmlite, or if kernels have to be compiled and numba is not installed.

    Example:
        >>> unet = UNet2DModel(sample_size=8, block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
        >>> CPUEngine(unet).predict(torch.zeros(1, 3, 8, 8), 10).shape
        torch.Size([1, 3, 8, 8])
    """

    name = "CPUEngine"
    dtype: torch.dtype | None = torch.float32

    def __init__(self, unet: UNet2DModel) -> None:
        ensure_compiled(norm_kernels.NORMALIZE, *winograd.KERNELS, direct.CONVOLVE)
        self._unet = weakref.ref(unet)
        buffers = PaddedBuffers()
        projections: list[nn.Linear] = []
        self._embedders = SimpleNamespace(
            time_proj=_widened(unet.time_proj),
            time_embedding=_widened(unet.time_embedding),
            class_embedding=_widened(unet.class_embedding),
            config=unet.config,
        )
        self._conv_in = _Conv3x3(unet.conv_in, buffers)
        self._down_blocks = [_Block(block, buffers, projections) for block in unet.down_blocks]
        self._mid_block = None if unet.mid_block is None else _Block(unet.mid_block, buffers, projections)
        self._up_blocks = [_Block(block, buffers, projections) for block in unet.up_blocks]
        self._norm_out = _Norm(unet.conv_norm_out, "silu")
        self._conv_out = _Conv3x3(unet.conv_out, buffers)
        # Each residual block's projection of the embedding: weights and bias.
        self._projections = [(linear.weight.detach().float(), linear.bias.detach().float()) for linear in projections]
        self._act: Any = next(m for m in unet.modules() if isinstance(m, ResnetBlock2D)).nonlinearity
        self._prepared = PreparedEmbeddings({}, None)
        self.is_batch_invariant = self._is_batch_invariant(unet)

    @torch.no_grad()
    def prepare(self, timesteps: Sequence[int], classes: Tensor | None = None) -> None:
        """Project the embeddings of all timesteps of a run, for each of its classes. Others can still be predicted at.

        Those of earlier runs are kept, as far as they are of the same classes.

        Args:
            timesteps: those of the run, in any order.
            classes: its distinct class labels, int64 (L,), in ascending order; `None` for an unconditional network.
        """
        unet = self._get_network()
        is_conditional = unet.class_embedding is not None
        count = 1 if classes is None else len(classes)
        kept = self._prepared.by_timestep if self._prepared.has_classes(classes) else {}
        missing = [t for t in dict.fromkeys(timesteps) if t not in kept]
        if count * (len(kept) + len(missing)) > MAX_PREPARED_EMBEDDINGS:
            kept, missing = {}, list(dict.fromkeys(timesteps))
        is_possible = is_conditional == (classes is not None) and count * len(missing) <= MAX_PREPARED_EMBEDDINGS
        if not missing or not is_possible:
            return
        labels = None if classes is None else classes.repeat(len(missing))
        projected = self._project(self._embed(torch.tensor(missing).repeat_interleave(count), labels))
        # Not read again before the next run.
        for weight, _ in self._projections:
            drop_pages(weight)
        added = {t: [rows[i * count : (i + 1) * count] for rows in projected] for i, t in enumerate(missing)}
        self._prepared = PreparedEmbeddings(kept | added, classes)

    @torch.no_grad()
    def predict(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Evaluate the network; see `Engine.predict`.

        Args:
            sample: x_t, (N, C, H, W), float32 or in the network's dtype.
            timestep: t, in 0..T-1; one number, a tensor (), or one per sample (N,).
            class_labels: int64 (N,), or embeddings (N, D), for class-conditional networks.

        Returns:
            The prediction, (N, C, H, W), contiguous, in the sample's dtype.

        Raises:
            ValueError: as `UNet2DModel.forward`.
        """
        unet = self._get_network()
        unet.check_sample(sample)
        dtype, sample = sample.dtype, sample.float()
        if unet.config.center_input_sample:
            sample = 2 * sample - 1

        # Each residual block's projection of the time embedding: prepared, or computed here.
        timesteps = as_timesteps(timestep, sample.device)
        check_conditions(unet, sample, timesteps, class_labels)
        embeddings = self._prepared.find(timesteps, class_labels)
        if embeddings is None:
            embeddings = self._project(self._embed(timesteps, class_labels))

        # Micro-batches. Embeddings of several samples are divided with them; one for all goes with each.
        bytes_per_sample = 4 * self._conv_in.K * sample[0, 0].numel()
        size = max(torch.get_num_threads(), MICRO_BATCH_BYTES // bytes_per_sample)
        outputs = []
        for first in range(0, max(len(sample), 1), size):
            batch = slice(first, first + size)
            rows = [embedding if len(embedding) == 1 else embedding[batch] for embedding in embeddings]
            outputs.append(self._evaluate(sample[batch], rows))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if unet.config.time_embedding_type == "fourier":
            output = output / timesteps.to(output.dtype).reshape(-1, 1, 1, 1)
        return output.to(dtype)

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

    def _evaluate(self, sample: Tensor, embeddings: list[Tensor]) -> Tensor:
        """Evaluate the network on a micro-batch (N, C, H, W), given each residual block's projected embedding."""
        remaining = iter(embeddings)
        x = self._conv_in.convolve(sample.permute(0, 2, 3, 1))
        skips = [x]
        for block in self._down_blocks:
            x = block.apply_down(x, skips, remaining)
        if self._mid_block is not None:
            x = self._mid_block.apply_mid(x, remaining)
        for block in self._up_blocks:
            x = block.apply_up(x, skips, remaining)
        return normalize_and_convolve(self._norm_out, self._conv_out, x).permute(0, 3, 1, 2).contiguous()

    def _is_batch_invariant(self, unet: UNet2DModel) -> bool:
        """Whether all that runs on PyTorch's operators rounds alike whatever the batch, for the network's own size."""
        size = unet.config.sample_size
        # Vectorized activations round differently at the end of a tensor.
        if size is None or not isinstance(self._act, nn.SiLU):
            return False
        H, W = (size, size) if isinstance(size, int) else size
        levels = [*range(len(self._down_blocks)), len(self._down_blocks) - 1, *range(len(self._up_blocks))[::-1]]
        blocks = zip([*self._down_blocks, self._mid_block, *self._up_blocks], levels, strict=True)
        return all(
            attention.is_batch_invariant((H >> level) * (W >> level))
            for block, level in blocks
            if block is not None
            for attention in block.attentions
        )

    def _get_network(self) -> UNet2DModel:
        unet = self._unet()
        if unet is None:
            raise RuntimeError("the network that this engine was made from has been deleted")
        return unet

    def _embed(self, timesteps: Tensor, class_labels: Tensor | None) -> list[Tensor]:
        """Embed timesteps () or (N,) and classes (N, ...): N rows (1, E), or one for all samples."""
        timesteps, labels = timesteps.reshape(-1), [class_labels]
        if class_labels is not None and class_labels.ndim > label_ndim(self._embedders):
            labels = list(class_labels.unsqueeze(1).unbind())
        count = max(len(timesteps), len(labels))
        if len(labels) == 1:
            labels *= count
        pairs = zip(timesteps.expand(count).unsqueeze(1).unbind(), labels, strict=True)
        return [embed_conditions(self._embedders, t, label, torch.float32) for t, label in pairs]

    def _project(self, rows: list[Tensor]) -> list[Tensor]:
        """Project N embeddings (1, E) for each residual block: (N, F)."""
        rows = [self._act(row) for row in rows]
        return [torch.cat([F.linear(row, weight, bias) for row in rows]) for weight, bias in self._projections]


def _widened(module: nn.Module | None) -> nn.Module | None:
    """Return a module whose parameters are float32: itself, or a copy."""
    if module is None or all(parameter.dtype == torch.float32 for parameter in module.parameters()):
        return module
    return copy.deepcopy(module).float()


class PreparedEmbeddings(NamedTuple):
    """The projected embeddings of a run's timesteps and classes.

    Attributes:
        by_timestep: per timestep and residual block, a row per class, (L, F); one row without classes.
        classes: the labels of the rows, int64 (L,), in ascending order; `None` without classes.

    Example:
        >>> prepared = PreparedEmbeddings({500: [torch.tensor([[1.0], [2.0]])]}, torch.tensor([3, 8]))
        >>> prepared.find(torch.tensor(500), torch.tensor([8, 8, 3]))[0].ravel()
        tensor([2., 2., 1.])
    """

    by_timestep: dict[float, list[Tensor]]
    classes: Tensor | None

    def has_classes(self, classes: Tensor | None) -> bool:
        """Return whether the rows are those of some classes.

        Args:
            classes: int64 (L,); `None` without classes.
        """
        if self.classes is None or classes is None:
            return self.classes is classes
        return torch.equal(self.classes, classes)

    def find(self, timesteps: Tensor, class_labels: Tensor | None) -> list[Tensor] | None:
        """Return the rows of samples.

        Args:
            timesteps: () or (N,).
            class_labels: int64 (N,), or anything that has no rows here.

        Returns:
            Per residual block (N, F), or (1, F) where they are the same for all; `None` where there are none.
        """
        found = [self.by_timestep.get(t) for t in timesteps.reshape(-1).tolist()]
        samples = [rows for rows in found if rows is not None]
        places = self._find_places(class_labels)
        if not found or len(samples) < len(found) or places is None:
            return None
        if len(samples) == 1:
            return [rows[places] for rows in samples[0]]
        if len(places) == 1:
            places *= len(samples)
        return [
            torch.stack([rows[place] for rows, place in zip(blocks, places, strict=True)])
            for blocks in zip(*samples, strict=True)
        ]

    def _find_places(self, class_labels: Tensor | None) -> list[int] | None:
        """Return the rows of class labels, a single one where all are alike; `None` where there are none."""
        if self.classes is None or class_labels is None:
            return [0] if self.classes is class_labels else None
        if class_labels.is_floating_point() or class_labels.ndim != 1:
            return None
        index = torch.searchsorted(self.classes, class_labels.contiguous()).clamp_max(len(self.classes) - 1)
        if not torch.equal(self.classes[index], class_labels):
            return None
        return [0] if len(self.classes) == 1 else index.tolist()


class PaddedBuffers(threading.local):
    """Feature maps with a border of zeros, for convolutions to read. Each thread has its own.

    Small ones are kept by shape: what is written into one leaves its border as it is.

    Example:
        >>> buffers = PaddedBuffers()
        >>> x, inside = buffers.get((1, 4, 4, 1), border=1, H=2, W=2)
        >>> inside.shape, x is buffers.get((1, 4, 4, 1), border=1, H=2, W=2)[0]
        (torch.Size([1, 2, 2, 1]), True)
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, ...], Tensor] = {}

    def get(self, shape: tuple[int, int, int, int], border: int, H: int, W: int) -> tuple[Tensor, Tensor]:
        """Return a buffer that is zero around the pixels of a feature map.

        Args:
            shape: of the buffer, (N, rows, columns, C).
            border: rows above and columns left of the pixels.
            H: rows of pixels.
            W: columns of pixels.

        Returns:
            The buffer, and the view (N, H, W, C) of it that is to be written.
        """
        if 4 * math.prod(shape) > CACHED_BUFFER_BYTES:
            x = torch.empty(shape)
            for side in (x[:, :border], x[:, border + H :], x[:, :, :border], x[:, :, border + W :]):
                side.zero_()
        else:
            x = self._get_cached(shape)
        return x, x[:, border : border + H, border : border + W]

    def _get_cached(self, shape: tuple[int, int, int, int]) -> Tensor:
        if shape not in self._buffers:
            if len(self._buffers) > MAX_CACHED_BUFFERS:
                self._buffers.clear()
            # Tensors made in inference mode could not be written to outside.
            with torch.inference_mode(False):
                self._buffers[shape] = torch.zeros(shape)
        return self._buffers[shape]


def pad_outputs(x: Tensor) -> Tensor:
    """Pad weights or a bias with zeros to whole panels of output channels.

    Args:
        x: (K, ...), of any floating dtype.

    Returns:
        (K rounded up to a multiple of `OUTPUT_LANES`, ...), float32, contiguous, without gradients.

    Example:
        >>> pad_outputs(torch.ones(1)).shape == (OUTPUT_LANES,)
        True
    """
    x = x.detach().float()
    missing = -x.shape[0] % OUTPUT_LANES
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing)) if missing else x.contiguous()


def _run_convolution(
    shape: tuple[int, int, int],
    K: int,
    residual: FeatureMap | None,
    convolve: Callable[[FeatureMap | None, FeatureMap], None],
) -> FeatureMap:
    """Return the result (*shape, K) of `convolve(residual, y)`, which writes whole panels of output channels."""
    padded_K = -(-K // OUTPUT_LANES) * OUTPUT_LANES
    y = torch.empty(*shape, padded_K)
    if padded_K == K:
        convolve(residual, y)
        return y
    convolve(None, y)
    y = y[..., :K].contiguous()
    return y if residual is None else y.add_(residual)


class _Conv3x3:
    """A 3x3 convolution. Its input is written to a buffer of `make_input`, or copied there by `convolve`."""

    def __init__(self, conv: nn.Conv2d, buffers: PaddedBuffers) -> None:
        self.conv, self.buffers = conv, buffers
        self.C, self.K, self.stride = conv.in_channels, conv.out_channels, conv.stride[0]
        # Without padding there is a row below and a column to the right: `Downsample2D`.
        self.border = int(conv.padding[0])
        self.border_after = self.border or 1
        self._weights: dict[ModuleType, tuple[Tensor, Tensor]] = {}

    def choose_kernels(self, H: int, W: int) -> ModuleType:
        """Return the kernels that convolve a feature map of H x W pixels: `winograd` or `direct`."""
        transformed_bytes = 4 * POINTS * self.C * self.K
        per_pixel = WEIGHT_BYTES_PER_PIXEL * min(1.0, LARGE_LAYER_BYTES / transformed_bytes)
        pays = transformed_bytes <= max(L2_WEIGHT_BYTES, per_pixel * H * W)
        supported = self.stride == 1 and self.border == 1 and winograd.is_supported(self.C)
        return winograd if supported and pays and winograd.reduces_multiplications(H, W) else direct

    def arrange_weights(self, kernels: ModuleType) -> tuple[Tensor, Tensor]:
        """Return weights and bias as these kernels take them, arranged on first use."""
        if kernels not in self._weights:
            weight, bias = pad_outputs(self.conv.weight), pad_outputs(cast(Tensor, self.conv.bias))
            arrange = winograd.transform_weights if kernels is winograd else direct.arrange_weights
            self._weights[kernels] = arrange(weight), bias
            drop_pages(self.conv.weight.detach())
        return self._weights[kernels]

    def make_input(self, N: int, H: int, W: int) -> tuple[Tensor, Tensor]:
        """Return the buffer that `convolve_input` reads, and the view (N, H, W, C) of it to write the input to."""
        if self.choose_kernels(H, W) is winograd:
            shape = winograd.padded_shape(N, self.C, H, W)
        else:
            rows, columns = (size + self.border + self.border_after for size in (H, W))
            shape = N, rows, columns, self.C
        return self.buffers.get(shape, self.border, H, W)

    def convolve(self, x: FeatureMap) -> FeatureMap:
        """Convolve a feature map, which is copied into a buffer."""
        _, H, W, _ = x.shape
        y, inside = self.make_input(*x.shape[:3])
        inside.copy_(x)
        return self.convolve_input(y, H, W)

    def convolve_input(self, x: Tensor, H: int, W: int, residual: FeatureMap | None = None) -> FeatureMap:
        """Convolve the H x W pixels in a buffer of `make_input`, and add the residual."""
        kernels, N = self.choose_kernels(H, W), x.shape[0]
        weights, bias = self.arrange_weights(kernels)
        if kernels is winograd:
            return _run_convolution((N, H, W), self.K, residual, partial(winograd.convolve, x, weights, bias))
        OH, OW = ((size + self.border + self.border_after - 3) // self.stride + 1 for size in (H, W))
        convolve = partial(direct.convolve, x, weights, bias, self.stride)
        return _run_convolution((N, OH, OW), self.K, residual, convolve)


class _Linear:
    """A linear layer, at each position of a feature map."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.K = weight.shape[0]
        self.weights, self.bias = direct.arrange_weights(pad_outputs(weight)[:, :, None, None]), pad_outputs(bias)

    @classmethod
    def stack(cls, linears: Sequence[Any]) -> _Linear:
        """Return one layer whose outputs are those of several, side by side."""
        weights, biases = ([getattr(x, name).detach() for x in linears] for name in ("weight", "bias"))
        stacked = cls(torch.cat(weights), torch.cat(biases))
        for weight in weights:
            drop_pages(weight)
        return stacked

    def __call__(self, x: FeatureMap, residual: FeatureMap | None = None) -> FeatureMap:
        """Apply the layer and add the residual."""
        N, H, W, C = x.shape
        # A 1x1 convolution of one row of N H W pixels.
        convolve = partial(direct.convolve, x.view(1, 1, -1, C), self.weights, self.bias, 1)
        if residual is not None:
            residual = residual.view(1, 1, -1, self.K)
        return _run_convolution((1, 1, N * H * W), self.K, residual, convolve).view(N, H, W, self.K)


class _Norm:
    """A group norm, and the activation after it."""

    def __init__(self, norm: nn.GroupNorm, act: str | nn.Module | None) -> None:
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight.detach().float()[None], norm.bias.detach().float()[None]
        self.no_shift = torch.zeros_like(self.weight)
        self.silu = act == "silu" or isinstance(act, nn.SiLU)
        self.act = act if isinstance(act, nn.Module) and not self.silu else None

    def make_terms(self, shift: Tensor | None, scale: Tensor | None) -> NormTerms:
        """Return the terms of the norm for a shift before it, or, with a scale, a scale and shift after it.

        Args:
            shift: (N, C) or (1, C); `None` for none.
            scale: of the shape of `shift`; `None` for a shift before the norm.
        """
        weight, bias, shift_before = self.weight, self.bias, self.no_shift
        if shift is not None and scale is None:
            shift_before = shift
        elif shift is not None and scale is not None:
            weight, bias = weight * (1 + scale), bias * (1 + scale) + shift
        return NormTerms(shift_before, weight, bias, self.groups, self.eps, self.silu)

    def write(self, y: Tensor, inside: Tensor, a: FeatureMap, b: FeatureMap | None, terms: NormTerms) -> None:
        """Normalize one or two feature maps side by side, into a buffer.

        Args:
            y: the buffer.
            inside: the view of its pixels, (N, H, W, C).
            a: (N, H, W, A).
            b: (N, H, W, B); `None` for none.
            terms: of the norm.
        """
        norm_kernels.normalize(a, b, terms, y, has_halo=y.shape != inside.shape)
        if self.act is not None:
            inside.copy_(self.act(inside))

    def normalize(self, x: FeatureMap) -> FeatureMap:
        """Return the normalized and activated feature map."""
        y = torch.empty_like(x)
        self.write(y, y, x, None, self.make_terms(None, None))
        return y


def normalize_and_convolve(
    norm: _Norm,
    conv: _Conv3x3,
    a: FeatureMap,
    b: FeatureMap | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    residual: FeatureMap | None = None,
) -> FeatureMap:
    """Normalize one or two feature maps side by side, convolve the result, and add the residual.

    Args:
        norm: the norm.
        conv: the convolution.
        a: (N, H, W, A).
        b: (N, H, W, B); `None` for none.
        shift: of the time embedding, as `_Norm.make_terms` takes it.
        scale: likewise.
        residual: (N, H, W, K); `None` for none.

    Returns:
        (N, H, W, K).
    """
    N, H, W, _ = a.shape
    terms = norm.make_terms(shift, scale)
    # As one kernel, whose threads divide samples, if there are enough of them.
    if conv.choose_kernels(H, W) is winograd and norm.act is None and torch.get_num_threads() <= N:
        convolve = partial(winograd.normalize_and_convolve, a, b, terms, *conv.arrange_weights(winograd))
        return _run_convolution((N, H, W), conv.K, residual, convolve)
    y, inside = conv.make_input(N, H, W)
    norm.write(y, inside, a, b, terms)
    return conv.convolve_input(y, H, W, residual)


class _Resnet:
    """A residual block."""

    def __init__(self, block: ResnetBlock2D, buffers: PaddedBuffers) -> None:
        self.norm1, self.norm2 = _Norm(block.norm1, block.nonlinearity), _Norm(block.norm2, block.nonlinearity)
        self.conv1, self.conv2 = _Conv3x3(block.conv1, buffers), _Conv3x3(block.conv2, buffers)
        self.scale_shift = block.time_embedding_norm == "scale_shift"
        self.factor = block.output_scale_factor
        self.resample = block.upsample or block.downsample
        self.shortcut = block.conv_shortcut
        self._shortcuts: tuple[_Linear, ...] = ()

    def __call__(self, a: FeatureMap, b: FeatureMap | None, embedding: Tensor) -> FeatureMap:
        """Apply the block to one or two feature maps side by side, given the projected embedding (N or 1, F)."""
        scale, shift = None, embedding
        if self.scale_shift:
            scale, shift = (half.contiguous() for half in embedding.chunk(2, dim=1))
        # The residual after the first convolution, whose input, the largest feature map, is gone by then.
        if self.resample is None:
            x = normalize_and_convolve(self.norm1, self.conv1, a, b)
            residual = self._apply_shortcut(a, b)
        else:
            normed = self.norm1.normalize(a)
            normed = self.resample(normed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            x = self.conv1.convolve(normed)
            residual = self._apply_shortcut(a, b)
            residual = self.resample(residual.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
        x = normalize_and_convolve(self.norm2, self.conv2, x, None, shift, scale, residual)
        return x if self.factor == 1 else x.div_(self.factor)

    def _apply_shortcut(self, a: FeatureMap, b: FeatureMap | None) -> FeatureMap:
        """Return the block's residual."""
        if self.shortcut is None:
            return a if b is None else torch.cat([a, b], dim=-1)
        if not self._shortcuts:
            # The sum over the channels of both maps is two sums, each with its part of the weights.
            weight, bias = self.shortcut.weight.detach().flatten(1), cast(Tensor, self.shortcut.bias)
            widths = [x.shape[-1] for x in (a, b) if x is not None]
            first, *others = torch.split(weight, widths, dim=1)
            self._shortcuts = _Linear(first, bias), *(_Linear(other, torch.zeros_like(bias)) for other in others)
            drop_pages(weight)
        total = self._shortcuts[0](a)
        return total if b is None else self._shortcuts[1](b, total)


class _Attention:
    """Self-attention over the positions of a feature map, with a residual connection."""

    def __init__(self, attention: Attention) -> None:
        self.norm = None if attention.group_norm is None else _Norm(attention.group_norm, None)
        self.heads, self.factor = attention.heads, attention.rescale_output_factor
        self.head_dim = attention.to_q.out_features // attention.heads
        self.qkv = _Linear.stack([attention.to_q, attention.to_k, attention.to_v])
        self.out = _Linear.stack([attention.to_out[0]])

    def __call__(self, x: FeatureMap) -> FeatureMap:
        N, H, W, _ = x.shape
        normed = x if self.norm is None else self.norm.normalize(x)
        q, k, v = self.qkv(normed).view(N, H * W, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # A single block of queries, which one thread could take, is summed by all threads in another order.
        if N == self.heads == 1 and H * W <= QUERY_BLOCK:
            q, k, v = (x.expand(2, -1, -1, -1) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v)[:N].transpose(1, 2).reshape(N, H, W, -1)
        y = self.out(attended, x)
        return y if self.factor == 1 else y.div_(self.factor)

    def is_batch_invariant(self, num_positions: int) -> bool:
        """Whether a sample's result does not depend on the others: where PyTorch's threads work on aligned memory.

        Each has a buffer for a block of queries: their products with the keys, the largest of them and their sums, and
        the result. Products of matrices round differently where memory is not aligned.
        """
        P, D = num_positions, self.head_dim
        return D % ALIGNED_FLOATS == 0 and (P > QUERY_BLOCK or P * (P + 2 + D) % ALIGNED_FLOATS == 0)


class _Block:
    """A down, mid or up block. Projected embeddings are consumed in the order of the residual blocks."""

    def __init__(self, block: Any, buffers: PaddedBuffers, projections: list[nn.Linear]) -> None:
        self._buffers, self._projections = buffers, projections
        self.resnets = [self._make_resnet(resnet) for resnet in block.resnets]
        # A block without attention has no list of them, or one of `None`.
        self.attentions = [_Attention(a) for a in getattr(block, "attentions", ()) if a is not None]
        # A convolution, with nearest-neighbor upsampling before it in up blocks, or a residual block that resamples.
        samplers = getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None)
        self.resnet_sampler: _Resnet | None = None
        self.conv_sampler: _Conv3x3 | None = None
        self.upsamples = False
        if samplers is not None and isinstance(samplers[0], ResnetBlock2D):
            self.resnet_sampler = self._make_resnet(samplers[0])
        elif samplers is not None:
            self.conv_sampler = _Conv3x3(samplers[0].conv, buffers)
            self.upsamples = isinstance(samplers[0], Upsample2D)

    def _make_resnet(self, resnet: Any) -> _Resnet:
        self._projections.append(resnet.time_emb_proj)
        return _Resnet(resnet, self._buffers)

    def apply_down(self, x: FeatureMap, skips: list[FeatureMap], embeddings: Iterator[Tensor]) -> FeatureMap:
        """Apply a down block; its feature maps are appended to `skips`."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, None, next(embeddings))
            if self.attentions:
                x = self.attentions[index](x)
            skips.append(x)
        if self.resnet_sampler is not None or self.conv_sampler is not None:
            x = self._resample(x, embeddings)
            skips.append(x)
        return x

    def apply_mid(self, x: FeatureMap, embeddings: Iterator[Tensor]) -> FeatureMap:
        """Apply the mid block."""
        x = self.resnets[0](x, None, next(embeddings))
        if self.attentions:
            x = self.attentions[0](x)
        return self.resnets[1](x, None, next(embeddings))

    def apply_up(self, x: FeatureMap, skips: list[FeatureMap], embeddings: Iterator[Tensor]) -> FeatureMap:
        """Apply an up block; its skip connections are taken off the end of `skips`."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, skips.pop(), next(embeddings))
            if self.attentions:
                x = self.attentions[index](x)
        return self._resample(x, embeddings)

    def _resample(self, x: FeatureMap, embeddings: Iterator[Tensor]) -> FeatureMap:
        """Halve or double height and width, if the block does."""
        if self.resnet_sampler is not None:
            return self.resnet_sampler(x, None, next(embeddings))
        if self.conv_sampler is None:
            return x
        if not self.upsamples:
            return self.conv_sampler.convolve(x)
        # Nearest-neighbor upsampling, straight into the convolution's input.
        N, H, W, _ = x.shape
        y, inside = self.conv_sampler.make_input(N, 2 * H, 2 * W)
        for i in (0, 1):
            for j in (0, 1):
                inside[:, i::2, j::2] = x
        return self.conv_sampler.convolve_input(y, 2 * H, 2 * W)
