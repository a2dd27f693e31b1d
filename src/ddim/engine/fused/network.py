"""A `UNet2DModel` in terms of fused operations.

- A convolution computes no bias. The operation that reads its result adds it: `normalize`, together with the projected
  time embedding, or `add_residual`. A feature map that several operations read, such as a skip connection, carries its
  bias along (`Source`), through 1x1 convolutions too, which are linear.
- Skip connections are not concatenated: norms read two feature maps, and a 1x1 convolution of both is the sum of two.
- All projections of the time embedding are one product, made for all timesteps of a run before its first step.
- Upsampling and the 3x3 convolution after it are one convolution of the small feature map with 2x2 filters, four per
  output channel, which has half of the multiplications (`ddim.nn.layers.sub_pixel_filters`).
- Attention's queries, keys and values are one product.
- The first and the last convolution have channels of zeros up to a multiple of 8, which tensor cores require.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.engine.fused import operations
from ddim.engine.fused.reference import Norm
from ddim.nn.layers import Attention, ResnetBlock2D, Upsample2D, sub_pixel_filters
from ddim.unet import UNet2DModel, as_timesteps, check_conditions

TENSOR_CORE_CHANNELS = 8
"""Channels of convolutions on tensor cores are multiples of it."""


class Source(NamedTuple):
    """What is known of a feature map before the network runs.

    Attributes:
        channels: C.
        bias: what is still to be added, (C,); `None` for nothing.
    """

    channels: int
    bias: Tensor | None


class FusedNetwork:
    """Evaluates a network. It reads the network's weights where they are, or from copies made when it was built.

    Args:
        unet: one that `ddim.engine.base.unsupported_reason` supports, with weights in channels_last.

    Attributes:
        unet: the same.
        divides_by_timestep: whether predictions are divided by their timesteps, as with Fourier embeddings.
        embedding_size: F, the channels of the projected embeddings of all residual blocks together.

    Example:
        >>> unet = UNet2DModel(sample_size=8, block_out_channels=(8, 8, 8, 8), norm_num_groups=4).eval()
        >>> with torch.no_grad():
        ...     FusedNetwork(unet)(torch.zeros(1, 3, 8, 8), 10).shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(self, unet: UNet2DModel) -> None:
        self.unet = unet
        self.divides_by_timestep = unet.config.time_embedding_type == "fourier"
        # Compiles kernels, where there are any, outside of what is recorded.
        operations.load_kernels(unet.device, unet.dtype)
        projections: list[_Projection] = []
        self._conv_in = pad_channels(_weight(unet.conv_in), dim=1)
        source = Source(unet.conv_in.out_channels, _bias(unet.conv_in))
        skips = [source]
        self._down_blocks = []
        for module in unet.down_blocks:
            block = _Block(module, projections)
            source = block.connect_down(source, skips)
            self._down_blocks.append(block)
        self._mid_block = None
        if unet.mid_block is not None:
            self._mid_block = _Block(unet.mid_block, projections)
            source = self._mid_block.connect_mid(source)
        self._up_blocks = []
        for module in unet.up_blocks:
            block = _Block(module, projections)
            source = block.connect_up(source, skips)
            self._up_blocks.append(block)
        self._norm_out = _Norm(unet.conv_norm_out, unet.conv_act, source.bias)
        self._conv_out = pad_channels(_weight(unet.conv_out), dim=0)
        self._bias_out = _bias(unet.conv_out)[:, None, None]
        self._act: Any = next(m for m in unet.modules() if isinstance(m, ResnetBlock2D)).nonlinearity
        # One layer for all residual blocks.
        self._projection_weight = torch.cat([projection.weight for projection in projections])
        self._projection_bias = torch.cat([projection.bias for projection in projections])
        self._widths = [len(projection.bias) for projection in projections]
        self.embedding_size = sum(self._widths)

    def project(self, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Embed timesteps and class labels, and project the embeddings for all residual blocks.

        Args:
            timesteps: (), (1,) or (N,), on the network's device.
            class_labels: as `UNet2DModel.forward` takes them.

        Returns:
            (N, F) or (1, F), F of `embedding_size`.
        """
        emb = self._act(self.unet.embed(timesteps, class_labels))
        return F.linear(emb, self._projection_weight, self._projection_bias)

    def __call__(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Evaluate the network, in its own dtype, autocast or not.

        Args:
            sample: x_t, (N, C, H, W), in the network's dtype and on its device.
            timestep: t; one number, a tensor (), or one per sample (N,).
            class_labels: int64 (N,), or embeddings (N, D), for class-conditional networks.

        Returns:
            The prediction, (N, C, H, W), contiguous.

        Raises:
            ValueError: as `UNet2DModel.forward`.
        """
        self.unet.check_sample(sample)
        timesteps = as_timesteps(timestep, sample.device)
        check_conditions(self.unet, sample, timesteps, class_labels)
        on_device: Any = torch.cuda.device_of
        with torch.autocast(sample.device.type, enabled=False), on_device(sample):
            projected = self.project(timesteps, class_labels)
            return self.evaluate(sample, timesteps, projected)

    def evaluate(self, sample: Tensor, timesteps: Tensor, projected: Tensor) -> Tensor:
        """Evaluate the network, given the projections of its embeddings.

        Args:
            sample: x_t, (N, C, H, W), in the network's dtype and on its device.
            timesteps: (), (1,) or (N,), which networks with Fourier embeddings divide by.
            projected: of `project`, (N, F) or (1, F).

        Returns:
            The prediction, (N, C, H, W), contiguous.

        Raises:
            ValueError: if the sample does not fit the network.
        """
        self.unet.check_sample(sample)
        if self.unet.config.center_input_sample:
            sample = 2 * sample - 1
        embeddings = iter(torch.split(projected, self._widths, dim=1))
        x = F.conv2d(pad_channels(sample, dim=1), self._conv_in, padding=1)
        skips = [x]
        for block in self._down_blocks:
            x = block.apply_down(x, skips, embeddings)
        if self._mid_block is not None:
            x = self._mid_block.apply_mid(x, embeddings)
        for block in self._up_blocks:
            x = block.apply_up(x, skips, embeddings)
        y = F.conv2d(self._norm_out(x), self._conv_out, padding=1)
        # Bias and memory format at once.
        output = torch.empty(y.shape[0], len(self._bias_out), *y.shape[2:], dtype=y.dtype, device=y.device)
        torch.add(y[:, : len(self._bias_out)], self._bias_out, out=output)
        if self.divides_by_timestep:
            output = output / timesteps.to(output.dtype).reshape(-1, 1, 1, 1)
        return output


def pad_channels(x: Tensor, dim: int) -> Tensor:
    """Pad a dimension of channels with zeros to a multiple of `TENSOR_CORE_CHANNELS`.

    Args:
        x: (N, C, H, W), or weights (K, C, size, size).
        dim: the dimension, 0 or 1.

    Returns:
        The padded tensor, in channels_last.

    Example:
        >>> pad_channels(torch.ones(1, 3, 2, 2), dim=1).shape
        torch.Size([1, 8, 2, 2])
    """
    missing = -x.shape[dim] % TENSOR_CORE_CHANNELS
    if not missing:
        return x.contiguous(memory_format=torch.channels_last)
    N, C, H, W = (size + missing * (index == dim) for index, size in enumerate(x.shape))
    padded = torch.zeros((N, H, W, C), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
    padded.narrow(dim, 0, x.shape[dim]).copy_(x)
    return padded


def _weight(module: Any) -> Tensor:
    return cast(Tensor, module.weight).detach()


def _bias(module: Any) -> Tensor:
    return cast(Tensor, module.bias).detach()


def _sum(*biases: Tensor | None) -> Tensor | None:
    """Add biases in float32, of which some may be missing."""
    terms = [bias.float() for bias in biases if bias is not None]
    return sum(terms[1:], terms[0]) if terms else None


def _side_by_side(a: Source, b: Source | None) -> Tensor | None:
    """Return the bias of two feature maps side by side, float32; `None` for none."""
    sources = [source for source in (a, b) if source is not None]
    present = [source.bias for source in sources if source.bias is not None]
    if not present:
        return None
    zeros = present[0].new_zeros
    return torch.cat([(zeros(s.channels) if s.bias is None else s.bias).float() for s in sources])


class _Norm:
    """A group norm and the activation after it, of a feature map whose bias is still to be added."""

    def __init__(self, norm: nn.GroupNorm, act: nn.Module | None, bias: Tensor | None) -> None:
        silu = isinstance(act, nn.SiLU)
        self._norm = Norm(_weight(norm), _bias(norm), norm.num_groups, float(norm.eps), silu)
        self._act: Any = None if silu else act
        self._shift = None if bias is None else bias[None]

    def __call__(
        self,
        a: Tensor,
        b: Tensor | None = None,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        shift_after: Tensor | None = None,
    ) -> Tensor:
        """Normalize and activate; a shift comes instead of the bias."""
        shift = self._shift if shift is None else shift
        y = operations.normalize(a, b, self._norm, shift, scale, shift_after)
        return y if self._act is None else cast(Tensor, self._act(y))


class _Projection(NamedTuple):
    """A residual block's part of the product with the time embedding."""

    weight: Tensor
    bias: Tensor


def apply_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply the channels at each position by a matrix.

    Args:
        x: (N, C, H, W) in channels_last.
        weight: (K, C).

    Returns:
        (N, K, H, W) in channels_last.

    Example:
        >>> apply_linear(torch.ones(1, 2, 1, 1), torch.ones(1, 2)).item()
        2.0
    """
    if x.dtype == torch.float32:
        # By a convolution, so that the setting of TF32 is that of convolutions.
        return F.conv2d(x, weight[:, :, None, None])
    return F.linear(x.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)


class _Resnet:
    """A residual block. Its first bias is part of the projected time embedding where that is added."""

    def __init__(self, block: ResnetBlock2D, projections: list[_Projection]) -> None:
        self._block = block
        self._conv1, self._conv2 = _weight(block.conv1), _weight(block.conv2)
        self._norm2 = _Norm(block.norm2, block.nonlinearity, None)
        self._is_scale_shift = block.time_embedding_norm == "scale_shift"
        self._resample: Any = block.upsample or block.downsample
        self._divisor = block.output_scale_factor
        linear: Any = block.time_emb_proj
        bias = _bias(linear)
        if self._is_scale_shift:
            self._norm2 = _Norm(block.norm2, block.nonlinearity, _bias(block.conv1))
        else:
            bias = cast(Tensor, _sum(bias, _bias(block.conv1))).to(bias.dtype)
        projections.append(_Projection(_weight(linear), bias))

    def connect(self, a: Source, b: Source | None = None) -> Source:
        """Prepare for one or two feature maps side by side; return the result's description."""
        bias = _side_by_side(a, b)
        self._norm1 = _Norm(self._block.norm1, self._block.nonlinearity, bias)
        self._shortcuts: list[Tensor] = []
        shortcut = self._block.conv_shortcut
        if shortcut is not None:
            weight = _weight(shortcut).flatten(1)
            widths = [source.channels for source in (a, b) if source is not None]
            self._shortcuts = [part.contiguous() for part in torch.split(weight, widths, dim=1)]
            bias = _sum(_bias(shortcut), None if bias is None else weight.float() @ bias.float())
        self._bias = cast(Tensor, _sum(_bias(self._block.conv2), bias))
        return Source(self._block.out_channels, None)

    def __call__(self, a: Tensor, b: Tensor | None, embedding: Tensor) -> Tensor:
        # The first convolution.
        x = self._norm1(a, b)
        if self._resample is not None:
            # Blocks that resample have one input.
            a, x = self._resample(a), self._resample(x)
        x = F.conv2d(x, self._conv1, padding=1)
        # The second.
        if self._is_scale_shift:
            scale, shift_after = embedding.chunk(2, dim=1)
            x = self._norm2(x, None, None, scale, shift_after)
        else:
            x = self._norm2(x, None, embedding)
        x = F.conv2d(x, self._conv2, padding=1)
        # The shortcut.
        skips = [a] if b is None else [a, b]
        if self._shortcuts:
            skips = [apply_linear(skip, weight) for skip, weight in zip(skips, self._shortcuts, strict=True)]
        return operations.add_residual(x, self._bias, skips, self._divisor)


class _Attention:
    """Self-attention over the positions of a feature map, with a residual connection."""

    def __init__(self, attention: Attention, source: Source) -> None:
        self._heads, self._divisor = attention.heads, attention.rescale_output_factor
        self._norm = None if attention.group_norm is None else _Norm(attention.group_norm, None, source.bias)
        linears = (attention.to_q, attention.to_k, attention.to_v)
        self._weight = torch.cat([_weight(linear) for linear in linears])
        self._bias = torch.cat([_bias(linear) for linear in linears])
        self._weight_out = _weight(attention.to_out[0])
        self._bias_out = cast(Tensor, _sum(_bias(attention.to_out[0]), source.bias))

    def __call__(self, x: Tensor) -> Tensor:
        N, _, H, W = x.shape
        normed = x if self._norm is None else self._norm(x)
        tokens = normed.permute(0, 2, 3, 1).reshape(N, H * W, -1)
        qkv = F.linear(tokens, self._weight, self._bias)
        q, k, v = qkv.view(N, H * W, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, H, W, -1)
        output = F.linear(attended, self._weight_out).permute(0, 3, 1, 2)
        return operations.add_residual(output, self._bias_out, [x], self._divisor)


class _Downsample:
    """A strided convolution."""

    def __init__(self, downsample: Any) -> None:
        self._weight, self._padding = _weight(downsample.conv), downsample.padding
        self.bias = _bias(downsample.conv)

    def __call__(self, x: Tensor) -> Tensor:
        if self._padding == 0:
            x = F.pad(x, (0, 1, 0, 1))
        return F.conv2d(x, self._weight, stride=2, padding=self._padding)


class _Upsample:
    """Nearest-neighbor upsampling by 2 and a 3x3 convolution."""

    def __init__(self, upsample: Upsample2D) -> None:
        conv: Any = upsample.conv
        filters = sub_pixel_filters(_weight(conv).float())
        stacked = torch.cat([filters[i][j] for i in (0, 1) for j in (0, 1)]).to(conv.weight.dtype)
        self._filters = stacked.contiguous(memory_format=torch.channels_last)
        self.bias = _bias(conv)

    def __call__(self, x: Tensor) -> Tensor:
        return operations.interleave(F.conv2d(x, self._filters, padding=1))


class _Block:
    """A down, mid or up block.

    `connect_*` prepares it for the feature maps that `apply_*` will take, in the same order. Projected embeddings are
    consumed in the order of the residual blocks.
    """

    def __init__(self, block: Any, projections: list[_Projection]) -> None:
        self._block = block
        self.resnets = [_Resnet(resnet, projections) for resnet in block.resnets]
        self.attentions: list[_Attention] = []
        # A convolution, with nearest-neighbor upsampling before it in up blocks, or a residual block that resamples.
        samplers = getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None)
        self.resnet_sampler: _Resnet | None = None
        self.conv_sampler: _Downsample | _Upsample | None = None
        if samplers is not None and isinstance(samplers[0], ResnetBlock2D):
            self.resnet_sampler = _Resnet(samplers[0], projections)
        elif samplers is not None:
            sampler = samplers[0]
            self.conv_sampler = _Upsample(sampler) if isinstance(sampler, Upsample2D) else _Downsample(sampler)

    def _connect_attention(self, source: Source) -> Source:
        """Prepare the next attention, if the block has any; return its result's description."""
        # A block without attention has no list of them, or one of `None`.
        attentions = [a for a in getattr(self._block, "attentions", ()) if a is not None]
        if not attentions:
            return source
        self.attentions.append(_Attention(attentions[len(self.attentions)], source))
        return Source(source.channels, None)

    def _connect_sampler(self, source: Source) -> Source:
        if self.resnet_sampler is not None:
            return self.resnet_sampler.connect(source)
        return source if self.conv_sampler is None else Source(source.channels, self.conv_sampler.bias)

    def connect_down(self, source: Source, skips: list[Source]) -> Source:
        """Prepare a down block; its feature maps are appended to `skips`."""
        for resnet in self.resnets:
            source = self._connect_attention(resnet.connect(source))
            skips.append(source)
        if self.resnet_sampler is not None or self.conv_sampler is not None:
            source = self._connect_sampler(source)
            skips.append(source)
        return source

    def connect_mid(self, source: Source) -> Source:
        """Prepare the mid block."""
        source = self._connect_attention(self.resnets[0].connect(source))
        return self.resnets[1].connect(source)

    def connect_up(self, source: Source, skips: list[Source]) -> Source:
        """Prepare an up block; its skip connections are taken off the end of `skips`."""
        for resnet in self.resnets:
            source = self._connect_attention(resnet.connect(source, skips.pop()))
        return self._connect_sampler(source)

    def apply_down(self, x: Tensor, skips: list[Tensor], embeddings: Iterator[Tensor]) -> Tensor:
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

    def apply_mid(self, x: Tensor, embeddings: Iterator[Tensor]) -> Tensor:
        """Apply the mid block."""
        x = self.resnets[0](x, None, next(embeddings))
        if self.attentions:
            x = self.attentions[0](x)
        return self.resnets[1](x, None, next(embeddings))

    def apply_up(self, x: Tensor, skips: list[Tensor], embeddings: Iterator[Tensor]) -> Tensor:
        """Apply an up block; its skip connections are taken off the end of `skips`."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, skips.pop(), next(embeddings))
            if self.attentions:
                x = self.attentions[index](x)
        return self._resample(x, embeddings)

    def _resample(self, x: Tensor, embeddings: Iterator[Tensor]) -> Tensor:
        """Halve or double height and width, if the block does."""
        if self.resnet_sampler is not None:
            return self.resnet_sampler(x, None, next(embeddings))
        return x if self.conv_sampler is None else self.conv_sampler(x)
