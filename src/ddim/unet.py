"""`UNet2DModel`, the denoiser epsilon_theta(x_t, t).

Its constructor, configuration, modules, parameters and numbers are those of the class of that name in `diffusers`: the
same names in the same order, and under one seed the same initial weights.

The network (DDPM, arXiv 2006.11239, appendix B) passes through feature maps of shrinking size, a middle block, and
feature maps of growing size; every feature map of the down path is a skip connection to the up path. A block type is
a name for two choices, attention or not and how to resample (`DOWN_BLOCKS`, `UP_BLOCKS`), so that one class implements
all blocks of a path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddim.devices import execution_device
from ddim.io.class_labels import check_class_settings
from ddim.io.config import register_to_config
from ddim.io.diffusers_mixins import join_mixins
from ddim.io.pixel_format import PixelFormat
from ddim.io.pretrained import ModelFiles
from ddim.nn.layers import (
    ACTIVATIONS,
    Attention,
    Downsample2D,
    GaussianFourierProjection,
    ResnetBlock2D,
    ResnetConfig,
    TimestepEmbedding,
    Timesteps,
    Upsample2D,
)
from ddim.nn.ops import norm_act
from ddim.outputs import UNet2DOutput
from ddim.untouched import is_unchanged
from ddim.validation import choice, integer, real

MAX_LEVELS = 16
MAX_CHANNELS = 65_536
MAX_SAMPLE_SIZE = 16_384
MAXIMA = {
    "in_channels": MAX_CHANNELS,
    "out_channels": MAX_CHANNELS,
    "time_embedding_dim": MAX_CHANNELS,
    "norm_num_groups": MAX_CHANNELS,
    "attn_norm_num_groups": MAX_CHANNELS,
    "layers_per_block": 128,
    "num_class_embeds": 10_000_000,
    "num_train_timesteps": 1_000_000,
}
"""The largest values of a configuration, far above those of any model: a file must not make a loader build for ever."""
FOURIER_SCALE = 16.0
"""Standard deviation of the frequencies of the `fourier` time embedding."""

CheckpointFn = Callable[..., Any]
"""Calls a module with arguments, `fn(module, *args)`, such that its gradients need less memory."""


def checkpoint_module(module: nn.Module, *args: Any) -> Any:
    """Call a module and store its inputs alone; the rest is computed again in the backward pass.

    Args:
        module: the module.
        args: its inputs.

    Returns:
        What the module returns.

    Example:
        >>> checkpoint_module(nn.Identity(), torch.ones(1))
        tensor([1.])
    """
    return checkpoint(module, *args, use_reentrant=False)


class Block(nn.Module):
    """A block of a path or the middle: residual blocks, each of which gradient checkpointing may compute twice.

    Attributes:
        gradient_checkpointing: whether it does, where gradients are computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: CheckpointFn = checkpoint_module

    def call_resnet(self, resnet: nn.Module, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """Call a residual block.

        Args:
            resnet: the residual block.
            hidden_states: (N, C, H, W).
            temb: (N, D) or (1, D).

        Returns:
            The feature map.
        """
        call = self._gradient_checkpointing_func if self.gradient_checkpointing and torch.is_grad_enabled() else None
        output: Tensor = resnet(hidden_states, temb) if call is None else call(resnet, hidden_states, temb)
        return output


class DownPathBlock(Block):
    """Residual blocks of one level, each perhaps followed by attention, then a halving of the size.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the level.
        num_layers: residual blocks.
        head_dim: channels per attention head; `None` for no attention.
        downsample: how the size is halved: `conv`, `resnet`, or `None` for the last level.
        padding: of the strided convolution (`Downsample2D`).
        resnet: settings of all residual blocks.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        head_dim: int | None,
        downsample: str | None,
        padding: int,
        resnet: ResnetConfig,
    ) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (num_layers - 1)
        _add_layers(self, inputs, out_channels, head_dim, resnet)
        self.downsample_type = downsample
        self.downsamplers: nn.ModuleList | None = None
        if downsample == "conv":
            self.downsamplers = nn.ModuleList([Downsample2D(out_channels, use_conv=True, padding=padding)])
        elif downsample == "resnet":
            self.downsamplers = nn.ModuleList([ResnetBlock2D(out_channels, out_channels, resnet, resample="down")])

    def forward(self, hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Apply the block.

        Args:
            hidden_states: (N, in_channels, H, W).
            temb: time embedding, (N, D) or (1, D).

        Returns:
            The last feature map, and all of them in order, which are the skip connections.
        """
        outputs: tuple[Tensor, ...] = ()
        for resnet, attention in _layers(self):
            hidden_states = self.call_resnet(resnet, hidden_states, temb)
            if attention is not None:
                hidden_states = attention(hidden_states)
            outputs += (hidden_states,)
        if self.downsamplers is not None:
            for downsampler in self.downsamplers:
                needs_temb = self.downsample_type == "resnet"
                hidden_states = downsampler(hidden_states, temb) if needs_temb else downsampler(hidden_states)
            outputs += (hidden_states,)
        return hidden_states, outputs


class DownBlock2D(DownPathBlock):
    """A block of the down path without attention, which halves the size by a convolution."""


class AttnDownBlock2D(DownPathBlock):
    """A `DownBlock2D` with attention."""


class ResnetDownsampleBlock2D(DownPathBlock):
    """A `DownBlock2D` that halves the size in a residual block."""


class UNetMidBlock2D(Block):
    """Two residual blocks with attention between them.

    Args:
        channels: of the feature map.
        head_dim: channels per attention head; `None` for no attention.
        attention_groups: groups of the attention's norm; `None` for no norm.
        resnet: settings of both residual blocks.
    """

    def __init__(self, channels: int, head_dim: int | None, attention_groups: int | None, resnet: ResnetConfig) -> None:
        super().__init__()
        first = ResnetBlock2D(channels, channels, resnet)
        attention = None
        if head_dim is not None:
            attention = Attention(channels, head_dim, attention_groups, resnet.eps, resnet.output_scale_factor)
        # Without attention the list holds `None`, in `diffusers` as well.
        self.attentions = nn.ModuleList([attention])  # type: ignore[list-item]
        self.resnets = nn.ModuleList([first, ResnetBlock2D(channels, channels, resnet)])

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """Apply the block.

        Args:
            hidden_states: (N, channels, H, W).
            temb: time embedding, (N, D) or (1, D).

        Returns:
            (N, channels, H, W).
        """
        # The first residual block is computed once even with gradient checkpointing, in `diffusers` as well.
        hidden_states = self.resnets[0](hidden_states, temb)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            if attention is not None:
                hidden_states = attention(hidden_states, temb=temb)
            hidden_states = self.call_resnet(resnet, hidden_states, temb)
        return hidden_states


class UpPathBlock(Block):
    """Residual blocks of one level, each with a skip connection and perhaps attention, then a doubling of the size.

    Args:
        in_channels: channels of the input.
        skip_channels: channels of each block's skip connection, in the order in which they are taken.
        out_channels: channels of the level.
        head_dim: channels per attention head; `None` for no attention.
        upsample: how the size is doubled: `conv`, `resnet`, or `None` for the last level.
        resnet: settings of all residual blocks.
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: list[int],
        out_channels: int,
        head_dim: int | None,
        upsample: str | None,
        resnet: ResnetConfig,
    ) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        inputs = [channels + skip for channels, skip in zip(inputs, skip_channels, strict=True)]
        _add_layers(self, inputs, out_channels, head_dim, resnet)
        self.upsample_type = upsample
        self.upsamplers: nn.ModuleList | None = None
        if upsample == "conv":
            self.upsamplers = nn.ModuleList([Upsample2D(out_channels, use_conv=True)])
        elif upsample == "resnet":
            self.upsamplers = nn.ModuleList([ResnetBlock2D(out_channels, out_channels, resnet, resample="up")])

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor,
        upsample_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Apply the block.

        Args:
            hidden_states: (N, in_channels, H, W).
            res_hidden_states_tuple: the block's skip connections, one per residual block, taken from the last to the
                first.
            temb: time embedding, (N, D) or (1, D).
            upsample_size: height and width of the result, for blocks whose size a convolution doubles; defaults to
                (2H, 2W).

        Returns:
            The last feature map, (N, out_channels, 2H, 2W), or (N, out_channels, H, W) without upsampling.

        Raises:
            ValueError: for an `upsample_size` where the size is not doubled by a convolution.
        """
        if upsample_size is not None and self.upsample_type != "conv":
            raise ValueError(
                f"upsample_size must be None for upsample_type={self.upsample_type!r}, got {upsample_size}"
            )
        for (resnet, attention), skip in zip(_layers(self), reversed(res_hidden_states_tuple), strict=True):
            hidden_states = self.call_resnet(resnet, torch.cat([hidden_states, skip], dim=1), temb)
            if attention is not None:
                hidden_states = attention(hidden_states)
        if self.upsamplers is not None:
            for upsampler in self.upsamplers:
                if self.upsample_type == "resnet":
                    hidden_states = upsampler(hidden_states, temb)
                else:
                    size = () if upsample_size is None else (upsample_size,)
                    hidden_states = upsampler(hidden_states, *size)
        return hidden_states


class UpBlock2D(UpPathBlock):
    """A block of the up path without attention, which doubles the size by a convolution."""


class AttnUpBlock2D(UpPathBlock):
    """An `UpBlock2D` with attention."""


class ResnetUpsampleBlock2D(UpPathBlock):
    """An `UpBlock2D` that doubles the size in a residual block."""


def _add_layers(
    block: nn.Module, inputs: list[int], out_channels: int, head_dim: int | None, resnet: ResnetConfig
) -> None:
    """Add the residual blocks of these input channels and their attention, drawn and named in the order of diffusers.

    A block without attention has no attribute `attentions`.
    """
    resnets, attentions = [], []
    for channels in inputs:
        resnets.append(ResnetBlock2D(channels, out_channels, resnet))
        if head_dim is not None:
            attentions.append(Attention(out_channels, head_dim, resnet.groups, resnet.eps))
    if head_dim is not None:
        block.attentions = nn.ModuleList(attentions)
    block.resnets = nn.ModuleList(resnets)


def _layers(block: Any) -> list[tuple[nn.Module, nn.Module | None]]:
    """Return a block's residual blocks, each with the attention after it or `None`."""
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return list(zip(block.resnets, attentions, strict=True))


class BlockType(NamedTuple):
    """What a block's name stands for.

    Attributes:
        block: the class.
        attention: whether each residual block is followed by self-attention.
        resample: `conv`, `resnet`, or `None` where the model's `downsample_type` or `upsample_type` decides.
    """

    block: type[Any]
    attention: bool
    resample: str | None


DOWN_BLOCKS = {
    "DownBlock2D": BlockType(DownBlock2D, attention=False, resample="conv"),
    "AttnDownBlock2D": BlockType(AttnDownBlock2D, attention=True, resample=None),
    "ResnetDownsampleBlock2D": BlockType(ResnetDownsampleBlock2D, attention=False, resample="resnet"),
}
UP_BLOCKS = {
    "UpBlock2D": BlockType(UpBlock2D, attention=False, resample="conv"),
    "AttnUpBlock2D": BlockType(AttnUpBlock2D, attention=True, resample=None),
    "ResnetUpsampleBlock2D": BlockType(ResnetUpsampleBlock2D, attention=False, resample="resnet"),
}


class UNet2DModel(ModelFiles, nn.Module):
    """A U-Net that takes noisy samples and timesteps and returns predictions of the samples' shape.

    Args:
        sample_size: height and width of the samples, an int for squares: the size of a pipeline's noise. The network
            itself takes every size whose sides are multiples of 2 ** (len(block_out_channels) - 1).
        in_channels: channels of the samples.
        out_channels: channels of the predictions.
        center_input_sample: map samples from [0, 1] to [-1, 1] first.
        time_embedding_type: `positional` (DDPM's), `fourier` (score-SDE's; needs t > 0) or `learned` (an embedding of
            `num_train_timesteps` rows).
        time_embedding_dim: D of the time embedding; defaults to 4 block_out_channels[0].
        freq_shift: of the positional embedding; 1 in DDPM.
        flip_sin_to_cos: of the positional embedding; False in DDPM.
        down_block_types: keys of `DOWN_BLOCKS`, one per level.
        mid_block_type: `UNetMidBlock2D`, or `None` for no middle block.
        up_block_types: keys of `UP_BLOCKS`, one per level, from the smallest feature map upwards.
        block_out_channels: channels of each level.
        layers_per_block: residual blocks of each level of the down path; one more in the up path.
        mid_block_scale_factor: the middle block divides each of its sums by this.
        downsample_padding: 0 pads at the bottom and right only, as DDPM does.
        downsample_type: how blocks with attention shrink: `conv` or `resnet`.
        upsample_type: how blocks with attention grow: `conv` or `resnet`.
        dropout: in residual blocks, while training.
        act_fn: `silu` (`swish`), `mish`, `gelu` or `relu`.
        attention_head_dim: channels per head; `None` for a single head.
        norm_num_groups: groups of the group norms; divides all channel counts.
        attn_norm_num_groups: groups of the middle attention's norm; defaults to `norm_num_groups`, or no norm with
            `scale_shift`.
        norm_eps: of all group norms.
        resnet_time_scale_shift: how time enters residual blocks: `default` (added) or `scale_shift`.
        add_attention: whether the middle block has attention.
        class_embed_type: `None`, `timestep` (labels are embedded as timesteps are) or `identity` (labels are embeddings
            already).
        num_class_embeds: number of classes, for `class_embed_type=None`; `None` for an unconditional model.
        num_train_timesteps: rows of the `learned` time embedding.
        class_names: of the classes, without the null class (`ddim.io.class_labels`); only this library has it.
        has_null_class: whether the last class stands for none of them; only this library has it.
        pixel_format: the type and the ranges of the values that samples stand for (`ddim.io.pixel_format`); `None` for
            8-bit images. Recorded where `diffusers` passes over it.

    Raises:
        ValueError: for names that do not exist or numbers that do not fit together, naming them and what is allowed.

    References:
        Appendix B of DDPM, arXiv 2006.11239.

    Example:
        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4,
        ...     down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ... )
        >>> unet(torch.zeros(2, 1, 8, 8), 10).sample.shape
        torch.Size([2, 1, 8, 8])
    """

    config_name = "config.json"
    own_settings: ClassVar = {"pixel_format": None, "class_names": None, "has_null_class": False}
    # ModelMixin of diffusers, a base once that is imported, logs a warning about its own classes on every cast.
    to = nn.Module.to
    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns: ClassVar[Sequence[str]] = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        pixel_format: Mapping[str, Any] | None = None,
        class_names: tuple[str, ...] | None = None,
        has_null_class: bool = False,
    ) -> None:
        super().__init__()
        PixelFormat.parse(pixel_format, in_channels)
        check_class_settings(num_class_embeds, class_embed_type, class_names, has_null_class)
        down_types, up_types = _check_config(self.config)
        channels = tuple(block_out_channels)
        levels = len(channels)
        self.sample_size = sample_size
        self.gradient_checkpointing = False
        temb_channels = time_embedding_dim or channels[0] * 4

        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)

        embedding_channels = channels[0]
        self.time_proj: nn.Module
        if time_embedding_type == "fourier":
            self.time_proj = GaussianFourierProjection(channels[0], FOURIER_SCALE)
            embedding_channels = 2 * channels[0]
        elif time_embedding_type == "learned":
            self.time_proj = _make_embedding(num_train_timesteps or 0, channels[0])
        else:
            self.time_proj = Timesteps(channels[0], flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(embedding_channels, temb_channels)

        self.class_embedding: nn.Module | None = None
        if class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(embedding_channels, temb_channels)
        elif class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif num_class_embeds is not None:
            self.class_embedding = _make_embedding(num_class_embeds, temb_channels)

        resnet = ResnetConfig(
            temb_channels=temb_channels,
            groups=norm_num_groups,
            eps=norm_eps,
            act_fn=act_fn,
            dropout=dropout,
            time_embedding_norm=resnet_time_scale_shift,
        )

        # Named before the middle block, whose weights are drawn before those of the up path, as in `diffusers`.
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for level, kind in enumerate(down_types):
            self.down_blocks.append(
                kind.block(
                    in_channels=channels[max(level - 1, 0)],
                    out_channels=channels[level],
                    num_layers=layers_per_block,
                    head_dim=(attention_head_dim or channels[level]) if kind.attention else None,
                    downsample=(kind.resample or downsample_type) if level < levels - 1 else None,
                    padding=downsample_padding,
                    resnet=resnet,
                )
            )

        self.mid_block: nn.Module | None = None
        if mid_block_type is not None:
            mid_groups = attn_norm_num_groups
            if mid_groups is None and resnet_time_scale_shift == "default":
                mid_groups = norm_num_groups
            self.mid_block = UNetMidBlock2D(
                channels=channels[-1],
                head_dim=(attention_head_dim or channels[-1]) if add_attention else None,
                attention_groups=mid_groups,
                resnet=replace(resnet, output_scale_factor=mid_block_scale_factor),
            )

        for level, kind in zip(reversed(range(levels)), up_types, strict=True):
            self.up_blocks.append(
                kind.block(
                    in_channels=channels[min(level + 1, levels - 1)],
                    skip_channels=[channels[level]] * layers_per_block + [channels[max(level - 1, 0)]],
                    out_channels=channels[level],
                    head_dim=(attention_head_dim or channels[level]) if kind.attention else None,
                    upsample=(kind.resample or upsample_type) if level > 0 else None,
                    resnet=resnet,
                )
            )

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels[0], eps=norm_eps)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the network computes in.

        It is that of the first floating-point parameter, or buffer where there is none; or the dtype that hooks of
        `enable_layerwise_casting` of `diffusers` cast that parameter to.
        """
        # The first layer alone: this is asked at every call, and a look at all modules takes half a millisecond.
        first_layer = next((module for module in self.modules() if module._parameters), self)
        hooks = first_layer.__dict__.get("_diffusers_hook")
        casting = None if hooks is None else hooks.get_hook("layerwise_casting")
        if casting is not None:
            return cast(torch.dtype, casting.compute_dtype)
        return next((t.dtype for t in self._tensors() if t.is_floating_point()), torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        """The device of the first parameter, or buffer where there is none."""
        return next(self._tensors()).device

    def _tensors(self) -> Iterator[Tensor]:
        """Yield parameters, then buffers, then other tensors: the replicas of `nn.DataParallel` have only those."""
        yield from self.parameters()
        yield from self.buffers()
        for module in self.modules():
            yield from (value for value in vars(module).values() if isinstance(value, Tensor))

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any module computes something again in the backward pass."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: CheckpointFn | None = None) -> None:
        """Save memory in training: store the inputs of residual blocks alone and compute the rest again backward.

        Attention, resampling and the first residual block of the middle are stored completely.

        Args:
            gradient_checkpointing_func: calls a residual block, `fn(module, *args)`; defaults to `checkpoint_module`.
        """
        self._set_gradient_checkpointing(True, gradient_checkpointing_func or checkpoint_module)

    def disable_gradient_checkpointing(self) -> None:
        """Undo `enable_gradient_checkpointing`."""
        self._set_gradient_checkpointing(False, checkpoint_module)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: CheckpointFn = checkpoint_module
    ) -> None:
        block: Any
        for block in self.modules():
            if hasattr(block, "gradient_checkpointing"):
                block.gradient_checkpointing = enable
                block._gradient_checkpointing_func = gradient_checkpointing_func

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of values in all parameters.

        Args:
            only_trainable: count only parameters that require a gradient.
            exclude_embeddings: leave out the tables of `nn.Embedding` modules.
        """
        tables = {module.weight for module in self.modules() if isinstance(module, nn.Embedding)}
        counted = [p for p in self.parameters() if not (exclude_embeddings and p in tables)]
        return sum(p.numel() for p in counted if p.requires_grad or not only_trainable)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes of all parameters.

        Args:
            return_buffers: count buffers too.
        """
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def embed(self, timestep: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Embed timesteps, and class labels where the model has classes, as the residual blocks take them.

        Args:
            timestep: a number, or a tensor () or (N,) on the model's device.
            class_labels: (N,) integers; or (N, D) floating, rows of the classes' embedding or what lies between them;
                or what the model's `class_embed_type` requires: for `identity` embeddings (N, D) or (D,).

        Returns:
            (N, D), or (1, D) for a single timestep without labels.

        Raises:
            ValueError: if labels are missing, or given to a model without classes.
        """
        timesteps = timestep if isinstance(timestep, Tensor) else as_timesteps(timestep, execution_device(self))
        return embed_conditions(self, timesteps, class_labels, self.dtype)

    def check_sample(self, sample: Tensor) -> None:
        """Check that a sample's shape fits the model.

        Args:
            sample: (N, C, H, W), H and W multiples of 2 ** (len(block_out_channels) - 1). C is the number of input
                channels of `conv_in`; anything is accepted where client code wrapped it or hooked into it.

        Raises:
            ValueError: for another shape.
        """
        if not is_unchanged(self.conv_in, nn.Conv2d):
            return
        C, multiple = self.conv_in.in_channels, 2 ** (len(self.down_blocks) - 1)
        if sample.ndim != 4 or sample.shape[1] != C or sample.shape[2] % multiple or sample.shape[3] % multiple:
            raise ValueError(
                f"sample: expected shape (N, {C}, H, W), H and W multiples of {multiple}, got {tuple(sample.shape)}"
            )

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict from noisy samples.

        Args:
            sample: (N, in_channels, H, W), H and W multiples of 2 ** (len(block_out_channels) - 1), of the model's
                dtype and device.
            timestep: a number, or a tensor () or (N,). A single one holds for the whole batch. A number is truncated
                to an integer; a tensor may have floats.
            class_labels: (N,) integers for a model with classes, or what its `class_embed_type` requires.
            return_dict: `False` for a tuple.

        Returns:
            `UNet2DOutput` with `sample` (N, out_channels, H, W), or `(sample,)`.

        Raises:
            ValueError: if the sample's shape does not fit the model, or labels are missing or too many.
        """
        self.check_sample(sample)
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        N = sample.shape[0]
        timesteps = as_timesteps(timestep, sample.device).reshape(-1)
        check_conditions(self, sample, timesteps, class_labels)
        emb = self.embed(timesteps.expand(N), class_labels)

        hidden_states = self.conv_in(sample)
        skips: tuple[Tensor, ...] = (hidden_states,)
        for down_block in self.down_blocks:
            hidden_states, outputs = down_block(hidden_states=hidden_states, temb=emb)
            skips += tuple(outputs)
        if self.mid_block is not None:
            hidden_states = self.mid_block(hidden_states, emb)
        up_block: Any
        for up_block in self.up_blocks:
            number = len(up_block.resnets)
            hidden_states = up_block(hidden_states, skips[-number:], emb)
            skips = skips[:-number]
        output = self.conv_out(norm_act(self.conv_norm_out, self.conv_act, hidden_states, conv=self.conv_out))

        if self.config.time_embedding_type == "fourier":
            output = output / timesteps.to(output.dtype).reshape(-1, 1, 1, 1)
        return UNet2DOutput(output) if return_dict else (output,)


join_mixins(UNet2DModel, "models.modeling_utils.ModelMixin", "configuration_utils.ConfigMixin")


def _make_embedding(count: int, channels: int) -> nn.Embedding:
    """Return an embedding with the weights of `nn.Embedding`, which are not drawn on the meta device.

    There PyTorch imports `torch._dynamo` to draw normal numbers: seconds, for weights that are then read from a file.
    """
    weight = torch.empty(count, channels)
    if not weight.is_meta:
        nn.init.normal_(weight)
    return nn.Embedding(count, channels, _weight=weight)


def as_timesteps(timestep: Tensor | float, device: torch.device) -> Tensor:
    """Return timesteps as a tensor on a device; a number becomes an integer, as in `diffusers`.

    Args:
        timestep: a number, or a tensor of any dtype, which is kept.
        device: of the result.

    Example:
        >>> as_timesteps(5.5, torch.device("cpu")), as_timesteps(torch.tensor(5.5), torch.device("cpu"))
        (tensor(5), tensor(5.5000))
    """
    if isinstance(timestep, Tensor):
        return timestep.to(device)
    return torch.as_tensor(timestep, dtype=torch.long, device=device)


def embed_conditions(network: Any, timesteps: Tensor, class_labels: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Embed timesteps and classes by the modules of a network; see `UNet2DModel.embed`.

    Args:
        network: has the modules `time_proj`, `time_embedding` and `class_embedding` of `UNet2DModel`, and its `config`.
        timesteps: () or (N,).
        class_labels: as `UNet2DModel.embed` takes them.
        dtype: of the modules.

    Returns:
        (N, D), or (1, D).

    Raises:
        ValueError: if labels are missing, or given to a network without classes.

    Example:
        >>> unet = UNet2DModel(sample_size=8, block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
        >>> embed_conditions(unet, torch.tensor([3, 999]), None, torch.float32).shape
        torch.Size([2, 32])
    """
    embedding = network.class_embedding
    emb: Tensor = network.time_embedding(network.time_proj(timesteps.reshape(-1)).to(dtype))
    if (embedding is None) != (class_labels is None):
        raise ValueError(
            "class_labels must be None: the model is unconditional"
            if embedding is None
            else "class_labels must be given: the model is class-conditional"
        )
    if embedding is not None and class_labels is not None:
        if network.config.class_embed_type == "timestep":
            class_labels = cast(Tensor, network.time_proj(class_labels)).to(dtype)
        is_embedded = isinstance(embedding, nn.Embedding) and class_labels.is_floating_point()
        emb = emb + (class_labels if is_embedded else embedding(class_labels)).to(dtype)
    return emb


def check_conditions(network: Any, sample: Tensor, timesteps: Tensor, class_labels: Tensor | None) -> None:
    """Check that there is one timestep and one class for all samples, or one for each.

    Args:
        network: has the `config` of `UNet2DModel`.
        sample: (N, C, H, W).
        timesteps: () or (N,).
        class_labels: as `UNet2DModel.forward` takes them.

    Raises:
        ValueError: for another number of them.

    Example:
        >>> unet = UNet2DModel(sample_size=8, block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
        >>> check_conditions(unet, torch.zeros(3, 3, 8, 8), torch.zeros(2), None)
        Traceback (most recent call last):
        ValueError: timestep and class_labels must be one for all samples or one per sample, got 2 for 3 samples
    """
    if timesteps.ndim > 0:
        _check_count(timesteps.shape[0], sample.shape[0])
    if class_labels is not None and class_labels.ndim > label_ndim(network):
        _check_count(class_labels.shape[0], sample.shape[0])


def label_ndim(network: Any) -> int:
    """Return the number of dimensions of what holds for the whole batch: a label (), or an embedding (D,).

    Args:
        network: has the `config` of `UNet2DModel`.

    Example:
        >>> label_ndim(UNet2DModel(sample_size=8, block_out_channels=(8, 8, 8, 8), norm_num_groups=4))
        0
    """
    return 1 if network.config.class_embed_type == "identity" else 0


def _check_count(number: int, samples: int) -> None:
    if number not in (1, samples):
        raise ValueError(
            f"timestep and class_labels must be one for all samples or one per sample, got {number} for {samples} "
            "samples"
        )


def _check_config(config: Any) -> tuple[list[BlockType], list[BlockType]]:
    """Check that names exist and numbers fit together, and return the block types behind the names."""
    levels = len(config.block_out_channels)
    for name, most in MAXIMA.items():
        if config[name] is not None:
            integer(name, config[name], 1, most)
    for size in (config.sample_size,) if isinstance(config.sample_size, int | None) else config.sample_size:
        integer("sample_size", size or 1, 1, MAX_SAMPLE_SIZE)
    if levels > MAX_LEVELS:
        raise ValueError(f"block_out_channels must have at most {MAX_LEVELS} entries, got {levels}")
    for channels in config.block_out_channels:
        integer("each of block_out_channels", channels, 1, MAX_CHANNELS)
    real("norm_eps", config.norm_eps, above=0)
    real("dropout", config.dropout, 0, 1)
    real("mid_block_scale_factor", config.mid_block_scale_factor, above=0)
    integer("downsample_padding", config.downsample_padding, 0, 1)
    if not 0 < levels == len(config.down_block_types) == len(config.up_block_types):
        raise ValueError(
            f"block_out_channels, down_block_types and up_block_types must have the same length, got {levels}, "
            f"{len(config.down_block_types)} and {len(config.up_block_types)}"
        )
    integer("freq_shift", config.freq_shift, 0, max(0, config.block_out_channels[0] // 2 - 1))
    # The first hub models write UNetResDownBlock2D for DownBlock2D.
    down_names = [name.removeprefix("UNetRes") for name in config.down_block_types]
    up_names = [name.removeprefix("UNetRes") for name in config.up_block_types]
    for name in down_names:
        choice("each of down_block_types", name, DOWN_BLOCKS)
    for name in up_names:
        choice("each of up_block_types", name, UP_BLOCKS)
    choice("mid_block_type", config.mid_block_type, ("UNetMidBlock2D", None))
    choice("time_embedding_type", config.time_embedding_type, ("positional", "fourier", "learned"))
    choice("resnet_time_scale_shift", config.resnet_time_scale_shift, ("default", "scale_shift"))
    choice("act_fn", str(config.act_fn).lower(), ACTIVATIONS)
    choice("downsample_type", config.downsample_type, ("conv", "resnet"))
    choice("upsample_type", config.upsample_type, ("conv", "resnet"))
    choice("class_embed_type", config.class_embed_type, (None, "timestep", "identity"))
    if config.time_embedding_type == "learned" and not config.num_train_timesteps:
        raise ValueError("time_embedding_type='learned' requires num_train_timesteps, the rows of the embedding")
    if config.attn_norm_num_groups is not None and config.block_out_channels[-1] % config.attn_norm_num_groups:
        raise ValueError(
            f"attn_norm_num_groups must divide {config.block_out_channels[-1]}, the channels of the middle block, got "
            f"{config.attn_norm_num_groups}"
        )
    for channels in config.block_out_channels:
        if channels % config.norm_num_groups:
            raise ValueError(
                f"block_out_channels must be multiples of norm_num_groups ({config.norm_num_groups}), got {channels}"
            )
    down_types, up_types = [DOWN_BLOCKS[name] for name in down_names], [UP_BLOCKS[name] for name in up_names]
    attended = [c for c, kind in zip(config.block_out_channels, down_types, strict=True) if kind.attention]
    attended += [c for c, kind in zip(reversed(config.block_out_channels), up_types, strict=True) if kind.attention]
    attended += [config.block_out_channels[-1]] if config.mid_block_type and config.add_attention else []
    if config.attention_head_dim is not None and attended and not 1 <= config.attention_head_dim <= min(attended):
        raise ValueError(
            f"attention_head_dim must be from 1 to {min(attended)}, the channels of the narrowest attention level, "
            f"got {config.attention_head_dim}"
        )
    return down_types, up_types
