"""The modules of the U-Net: time embeddings, residual blocks, self-attention, resampling.

Parameter names are those of `diffusers`, so that checkpoints load both ways unchanged. Feature maps are (N, C, H, W) in
either memory layout; time embeddings are (N, D), or (1, D) when one timestep holds for the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.nn.ops import (
    conv2d,
    convolve,
    has_channels_last_weights,
    is_plain_convolution,
    norm_act,
    use_compiled_convolution,
)
from ddim.untouched import INTERPOLATE, are_original, is_untouched

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "mish": nn.Mish,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}
"""The values of `act_fn`."""

MAX_PERIOD = 10_000
"""Ratio of the highest frequency to the lowest in sinusoidal embeddings."""


class Timesteps(nn.Module):
    """Sinusoidal embedding of timesteps, with frequencies from 1 to 1/10000 in geometric progression.

    Args:
        num_channels: the embedding's size; an odd one is padded with a zero.
        flip_sin_to_cos: whether cosines come first.
        downscale_freq_shift: 1 divides the exponents by one less, so that the last frequency is exactly 1/10000.
        scale: multiplies the timesteps.

    References:
        DDPM, arXiv 2006.11239, appendix B.

    Example:
        >>> Timesteps(num_channels=2, flip_sin_to_cos=False, downscale_freq_shift=0)(torch.tensor([0]))
        tensor([[0., 1.]])
    """

    def __init__(self, num_channels: int, flip_sin_to_cos: bool, downscale_freq_shift: float, scale: float = 1) -> None:
        super().__init__()
        self.num_channels, self.flip_sin_to_cos = num_channels, flip_sin_to_cos
        self.downscale_freq_shift, self.scale = downscale_freq_shift, scale

    def forward(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps.

        Args:
            timesteps: (N,), integers or floats.

        Returns:
            (N, num_channels) float32.
        """
        half = self.num_channels // 2
        exponents = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = self.scale * (timesteps[:, None].float() * torch.exp(exponents / (half - self.downscale_freq_shift)))
        parts = [angles.cos(), angles.sin()] if self.flip_sin_to_cos else [angles.sin(), angles.cos()]
        return F.pad(torch.cat(parts, dim=1), (0, self.num_channels % 2))


class GaussianFourierProjection(nn.Module):
    """Random Fourier features of log t, with fixed frequencies that are saved among the weights.

    Args:
        embedding_size: number of frequencies; the embedding has twice as many numbers.
        scale: standard deviation of the frequencies.

    References:
        arXiv 2006.10739.

    Example:
        >>> GaussianFourierProjection(embedding_size=4, scale=16.0)(torch.ones(3)).shape
        torch.Size([3, 8])
    """

    def __init__(self, embedding_size: int, scale: float) -> None:
        super().__init__()
        # `diffusers` draws the frequencies twice and keeps the second: so that later draws agree, as they do.
        torch.randn(embedding_size)
        self.weight = nn.Parameter(torch.randn(embedding_size) * scale, requires_grad=False)
        self.log, self.flip_sin_to_cos = True, False

    def forward(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps.

        Args:
            timesteps: (N,), positive floats.

        Returns:
            (N, 2 embedding_size), sines first.
        """
        times = timesteps.log() if self.log else timesteps
        angles = times[:, None] * self.weight[None, :] * (2 * math.pi)
        parts = [angles.cos(), angles.sin()] if self.flip_sin_to_cos else [angles.sin(), angles.cos()]
        return torch.cat(parts, dim=1)


class TimestepEmbedding(nn.Module):
    """Two linear layers with a SiLU between them.

    Args:
        in_channels: size of the sinusoidal embedding.
        time_embed_dim: D, the size of the time embedding.

    Example:
        >>> TimestepEmbedding(in_channels=8, time_embed_dim=32)(torch.zeros(2, 8)).shape
        torch.Size([2, 32])
    """

    def __init__(self, in_channels: int, time_embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.act: nn.Module | None = nn.SiLU()
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)
        self.post_act: nn.Module | None = None

    def forward(self, sample: Tensor) -> Tensor:
        """Project an embedding.

        Args:
            sample: (N, in_channels).

        Returns:
            (N, time_embed_dim).
        """
        sample = self.linear_1(sample)
        sample = self.linear_2(sample if self.act is None else self.act(sample))
        return sample if self.post_act is None else self.post_act(sample)


class Downsample2D(nn.Module):
    """Halve height and width, by a strided 3x3 convolution or by averages of 2x2 pixels.

    Args:
        channels: of input and output.
        use_conv: whether there is a convolution.
        padding: of the convolution, rows and columns of zeros on every side; 0 pads one row and column at the bottom
            and right instead, as the original TensorFlow models do.

    Example:
        >>> Downsample2D(channels=8, use_conv=True)(torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 8, 2, 2])
        >>> Downsample2D(channels=1, use_conv=False)(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])).item()
        2.5
    """

    def __init__(self, channels: int, use_conv: bool, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.use_conv = use_conv
        self.conv: nn.Module = (
            nn.Conv2d(channels, channels, 3, stride=2, padding=padding) if use_conv else nn.AvgPool2d(2)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Downsample a feature map.

        Args:
            hidden_states: (N, C, H, W).

        Returns:
            (N, C, H / 2, W / 2), rounded up for a convolution with padding 1.
        """
        if self.use_conv and self.padding == 0:
            hidden_states = F.pad(hidden_states, (0, 1, 0, 1))
        return convolve(self.conv, hidden_states)


class Upsample2D(nn.Module):
    """Nearest-neighbor upsampling by 2, then a 3x3 convolution or none.

    On a CPU the two are one operation, with four ninths of the multiplications, in inference and where training runs
    on compiled kernels. Of the nine pixels that a filter sees, those that are copies of one another share the sum of
    its weights: each of the four pixels that come of one is a 2x2 convolution of the small map. The result is the same,
    to rounding, and so are the gradients.

    Args:
        channels: of input and output.
        use_conv: whether there is a convolution.

    Example:
        >>> Upsample2D(channels=8, use_conv=True)(torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 8, 8, 8])
    """

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.use_conv, self.use_conv_transpose, self.interpolate = use_conv, False, True
        self.conv: nn.Module | None = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Upsample a feature map.

        Args:
            hidden_states: (N, C, H, W).
            output_size: (height, width); defaults to (2H, 2W).

        Returns:
            (N, C, 2H, 2W), or of `output_size`.
        """
        conv = self.conv if self.use_conv or self.use_conv_transpose else None
        if conv is None:
            return self._interpolate(hidden_states, output_size)
        if self.use_conv_transpose:
            return cast(Tensor, conv(hidden_states))
        is_compiled = use_compiled_convolution(conv, hidden_states)
        if output_size is None and self._fuses(conv, hidden_states, is_compiled):
            return upsample_and_convolve(cast(nn.Conv2d, conv), hidden_states, conv2d if is_compiled else F.conv2d)
        return convolve(conv, self._interpolate(hidden_states, output_size))

    def _interpolate(self, hidden_states: Tensor, output_size: tuple[int, int] | None) -> Tensor:
        if not self.interpolate:
            return hidden_states
        size = output_size or tuple(2 * length for length in hidden_states.shape[2:])
        return F.interpolate(hidden_states, size=size, mode="nearest")

    def _fuses(self, conv: nn.Module, hidden_states: Tensor, is_compiled: bool) -> bool:
        """Return whether upsampling and convolution are one operation."""
        # In training on PyTorch's operators rounding is that of the modules themselves: optimizers amplify it.
        in_training = self.training and torch.is_grad_enabled()
        return (
            self.interpolate
            and (is_compiled or (hidden_states.device.type == "cpu" and not in_training))
            and is_untouched(conv, nn.Conv2d)
            and (torch.compiler.is_compiling() or are_original([INTERPOLATE]))
            and _is_plain_3x3(cast(nn.Conv2d, conv), hidden_states)
        )


def _is_plain_3x3(conv: nn.Conv2d, x: Tensor) -> bool:
    return (
        is_plain_convolution(conv, x)
        and conv.weight.shape[2:] == (3, 3)
        and (conv.stride, conv.padding) == ((1, 1), (1, 1))
    )


def upsample_and_convolve(conv: nn.Conv2d, x: Tensor, convolution: Callable[..., Tensor] = F.conv2d) -> Tensor:
    """Upsample a feature map by 2 and convolve it, as four convolutions of the small map.

    Args:
        conv: a 3x3 convolution with padding 1.
        x: (N, C, H, W).
        convolution: computes each of the four, as `F.conv2d` does.

    Returns:
        (N, K, 2H, 2W) in channels_last.

    Example:
        >>> conv, x = nn.Conv2d(1, 1, 3, padding=1), torch.ones(1, 1, 2, 2)
        >>> torch.allclose(upsample_and_convolve(conv, x), conv(torch.ones(1, 1, 4, 4)))
        True
    """
    filters = sub_pixel_filters(conv.weight)
    rows = []
    for i in (0, 1):
        # Above or below, left or right: the neighbors that this pixel's window reaches.
        padded = [F.pad(x, (1 - j, j, 1 - i, i)) for j in (0, 1)]
        columns = [convolution(y, filters[i][j], conv.bias).permute(0, 2, 3, 1) for j, y in enumerate(padded)]
        rows.append(torch.stack(columns, dim=3))
    N, H, W, _, C = rows[0].shape
    return torch.stack(rows, dim=2).reshape(N, 2 * H, 2 * W, C).permute(0, 3, 1, 2)


def sub_pixel_filters(weight: Tensor) -> list[list[Tensor]]:
    """Return the 2x2 filters that compute the pixels of an upsampled and convolved feature map.

    Args:
        weight: of a 3x3 convolution, (O, C, 3, 3).

    Returns:
        In row i and column j, i and j in (0, 1), the filter (O, C, 2, 2) of pixel (i, j) of each doubled pixel.

    Example:
        >>> sub_pixel_filters(torch.ones(1, 1, 3, 3))[0][0].squeeze()
        tensor([[1., 2.],
                [2., 4.]])
    """

    def sum_pairs(filters: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        a, b, c = filters.unbind(dim)
        return torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)

    layout = torch.channels_last if weight.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return [[part.contiguous(memory_format=layout) for part in sum_pairs(row, 3)] for row in sum_pairs(weight, 2)]


@dataclass(frozen=True)
class ResnetConfig:
    """What the residual blocks of a network have in common.

    Attributes:
        temb_channels: D of the time embedding.
        groups: of both group norms.
        eps: of both group norms.
        act_fn: a key of `ACTIVATIONS`.
        dropout: probability before the second convolution.
        time_embedding_norm: `default` adds the projected time to the features before the second norm; `scale_shift`
            scales and shifts after it.
        output_scale_factor: the sum of block and shortcut is divided by this.
    """

    temb_channels: int
    groups: int
    eps: float = 1e-5
    act_fn: str = "silu"
    dropout: float = 0.0
    time_embedding_norm: str = "default"
    output_scale_factor: float = 1.0


class ResnetBlock2D(nn.Module):
    """A residual block: norm - act - conv - (+ time) - norm - act - dropout - conv, plus a shortcut.

    Args:
        in_channels: of the input; the shortcut is a 1x1 convolution where `out_channels` differs.
        out_channels: of the output.
        config: what it has in common with the network's other blocks.
        resample: `up` or `down` doubles or halves (by averaging) both branches before the first convolution; `None` for
            neither.

    Example:
        >>> block = ResnetBlock2D(8, 16, ResnetConfig(temb_channels=4, groups=2))
        >>> block(torch.zeros(1, 8, 4, 4), torch.zeros(1, 4)).shape
        torch.Size([1, 16, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, config: ResnetConfig, resample: str | None = None) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.time_embedding_norm = config.time_embedding_norm
        self.skip_time_act = False
        self.output_scale_factor = config.output_scale_factor
        projected = out_channels * (2 if config.time_embedding_norm == "scale_shift" else 1)
        self.norm1 = nn.GroupNorm(config.groups, in_channels, eps=config.eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj: nn.Module | None = nn.Linear(config.temb_channels, projected)
        self.norm2 = nn.GroupNorm(config.groups, out_channels, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = ACTIVATIONS[config.act_fn.lower()]()
        self.upsample = Upsample2D(in_channels, use_conv=False) if resample == "up" else None
        self.downsample = Downsample2D(in_channels, use_conv=False) if resample == "down" else None
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        """Apply the block.

        Args:
            input_tensor: (N, in_channels, H, W).
            temb: time embedding, (N, temb_channels) or (1, temb_channels).

        Returns:
            (N, out_channels, H, W), twice or half as high and wide with `resample`.
        """
        hidden_states = norm_act(self.norm1, self.nonlinearity, input_tensor, conv=self.conv1)
        resample = self.downsample if self.upsample is None else self.upsample
        if resample is not None:
            input_tensor, hidden_states = resample(input_tensor), resample(hidden_states)
        hidden_states = convolve(self.conv1, hidden_states)
        time = temb
        if self.time_emb_proj is not None:
            time = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "scale_shift":
            scale, shift = time[:, :, None, None].chunk(2, dim=1)
            hidden_states = self.nonlinearity(self.norm2(hidden_states) * (1 + scale) + shift)
        else:
            # Any other value leaves time out.
            shift_before = time if self.time_embedding_norm == "default" else None
            hidden_states = norm_act(self.norm2, self.nonlinearity, hidden_states, shift_before, conv=self.conv2)
        hidden_states = convolve(self.conv2, self.dropout(hidden_states))
        if self.conv_shortcut is not None:
            if self.training and not has_channels_last_weights(self.conv1):
                # Back from the format that attention leaves, where gradients would otherwise change theirs.
                input_tensor = input_tensor.contiguous()
            input_tensor = convolve(self.conv_shortcut, input_tensor)
        output = input_tensor + hidden_states
        return output if self.output_scale_factor == 1 else output / self.output_scale_factor


class Attention(nn.Module):
    """Self-attention over the H W positions of a feature map, with a residual connection.

    Args:
        channels: C.
        head_dim: channels per head; there are C // head_dim heads.
        groups: of the group norm before it; `None` for no norm.
        eps: of that norm.
        rescale_output_factor: the sum is divided by this.

    Example:
        >>> Attention(channels=8, head_dim=4, groups=2, eps=1e-5)(torch.zeros(1, 8, 2, 2)).shape
        torch.Size([1, 8, 2, 2])
    """

    def __init__(
        self, channels: int, head_dim: int, groups: int | None, eps: float, rescale_output_factor: float = 1.0
    ) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.residual_connection, self.rescale_output_factor = True, rescale_output_factor
        inner = self.heads * head_dim
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps) if groups is not None else None
        self.norm_q: nn.Module | None = None
        self.norm_k: nn.Module | None = None
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels), nn.Dropout(0.0)])

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        """Add attention to a feature map.

        Args:
            hidden_states: (N, C, H, W).
            temb: ignored; callers may pass every layer of a block the time embedding.

        Returns:
            (N, C, H, W).
        """
        N, C, H, W = hidden_states.shape
        tokens = hidden_states.flatten(2)
        if self.group_norm is not None:
            tokens = self.group_norm(tokens)
        tokens = tokens.transpose(1, 2)
        q, k, v = (
            project(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        q = q if self.norm_q is None else self.norm_q(q)
        k = k if self.norm_k is None else self.norm_k(k)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        output_projection, dropout, *_ = self.to_out
        attended = dropout(output_projection(attended))
        # In channels_last, as the other term is, in every network.
        output = attended.transpose(1, 2).reshape(N, C, H, W)
        output = output + hidden_states if self.residual_connection else output
        return output if self.rescale_output_factor == 1 else output / self.rescale_output_factor
