"""`UNet2DModel`, the denoiser epsilon_theta(x_t, t): constructor, configuration, parameter names and numbers of the
class of that name in `diffusers`.

The network (DDPM, arXiv 2006.11239, appendix B) goes down through feature maps of shrinking size, through a middle
block, and up again; every map on the way down is handed across to the way up. A block type is a name for two choices,
attention or not and how to resample (`DOWN_BLOCKS`, `UP_BLOCKS`), so that one class serves for all blocks of a
direction.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddim.io.config import ConfigMixin, register_to_config
from ddim.io.hub import ModelFiles
from ddim.nn.layers import (
    ACTIVATIONS,
    Attention,
    Downsample2D,
    GaussianFourierProjection,
    ResnetBlock2D,
    TimestepEmbedding,
    Timesteps,
    Upsample2D,
)
from ddim.nn.ops import norm_silu
from ddim.outputs import UNet2DOutput
from ddim.validation import integer

FOURIER_SCALE = 16.0


class BlockType(NamedTuple):
    """What a block's name stands for. `resample` is `conv`, `resnet`, or `None` where the model's `downsample_type` /
    `upsample_type` decides.
    """

    attention: bool
    resample: str | None


DOWN_BLOCKS = {
    "DownBlock2D": BlockType(attention=False, resample="conv"),
    "AttnDownBlock2D": BlockType(attention=True, resample=None),
    "ResnetDownsampleBlock2D": BlockType(attention=False, resample="resnet"),
}
UP_BLOCKS = {
    "UpBlock2D": BlockType(attention=False, resample="conv"),
    "AttnUpBlock2D": BlockType(attention=True, resample=None),
    "ResnetUpsampleBlock2D": BlockType(attention=False, resample="resnet"),
}


class UNet2DModel(ConfigMixin, ModelFiles, nn.Module):
    """A U-Net that takes noisy samples and timesteps and returns predictions of the samples' shape.

    Args:
        sample_size: height and width of the samples, an int for squares; what a pipeline draws noise for. The network
            itself takes every size whose sides are multiples of 2 ** (len(block_out_channels) - 1).
        in_channels: of the samples.
        out_channels: of the predictions.
        center_input_sample: map samples from [0, 1] to [-1, 1] first.
        time_embedding_type: `positional` (DDPM's), `fourier` (score-SDE's; needs t > 0) or `learned` (an embedding of
            `num_train_timesteps` rows).
        time_embedding_dim: D of the time embedding; 4 block_out_channels[0] unless given.
        freq_shift: of the positional embedding; 1 in DDPM.
        flip_sin_to_cos: of the positional embedding; False in DDPM.
        down_block_types: keys of `DOWN_BLOCKS`, one a level.
        mid_block_type: `UNetMidBlock2D`, or `None` for no middle block.
        up_block_types: keys of `UP_BLOCKS`, one a level, from the smallest feature map upwards.
        block_out_channels: channels of each level.
        layers_per_block: residual blocks of each level on the way down; one more on the way up.
        mid_block_scale_factor: the middle block divides each of its sums by this.
        downsample_padding: 0 pads at the bottom and right only, as DDPM does.
        downsample_type: how blocks with attention shrink: `conv` or `resnet`.
        upsample_type: how blocks with attention grow: `conv` or `resnet`.
        dropout: in residual blocks, while training.
        act_fn: `silu` (`swish`), `mish`, `gelu` or `relu`.
        attention_head_dim: channels a head; `None` for a single head.
        norm_num_groups: groups of the group norms; divides all channel counts.
        attn_norm_num_groups: groups of the middle attention's norm; unless given, `norm_num_groups`, or no norm with
            `scale_shift`.
        norm_eps: of all group norms.
        resnet_time_scale_shift: how time enters residual blocks: `default` (added) or `scale_shift`.
        add_attention: whether the middle block has attention.
        class_embed_type: `None`, `timestep` (labels are embedded as timesteps are) or `identity` (labels are embeddings
            already).
        num_class_embeds: number of classes, for `class_embed_type=None`; `None` for an unconditional model.
        num_train_timesteps: rows of the `learned` time embedding.

    Raises:
        ValueError: for names that do not exist or numbers that do not fit together, saying which and what is allowed.
    """

    config_name = "config.json"

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
    ) -> None:
        super().__init__()
        down_types, up_types = _check(self.config)
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
            self.time_proj = nn.Embedding(num_train_timesteps or 0, channels[0])
        else:
            self.time_proj = Timesteps(channels[0], flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(embedding_channels, temb_channels)

        self.class_embedding: nn.Module | None = None
        if class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(embedding_channels, temb_channels)
        elif class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, temb_channels)

        resnet: dict[str, Any] = {
            "temb_channels": temb_channels,
            "groups": norm_num_groups,
            "eps": norm_eps,
            "act_fn": act_fn,
            "dropout": dropout,
            "time_embedding_norm": resnet_time_scale_shift,
        }

        self.down_blocks = nn.ModuleList()
        for level, kind in enumerate(down_types):
            self.down_blocks.append(
                DownBlock2D(
                    in_channels=channels[max(level - 1, 0)],
                    out_channels=channels[level],
                    num_layers=layers_per_block,
                    head_dim=(attention_head_dim or channels[level]) if kind.attention else None,
                    downsample=(kind.resample or downsample_type) if level < levels - 1 else None,
                    padding=downsample_padding,
                    resnet=resnet,
                )
            )

        self.mid_block: MidBlock2D | None = None
        if mid_block_type is not None:
            mid_groups = attn_norm_num_groups
            if mid_groups is None and resnet_time_scale_shift == "default":
                mid_groups = norm_num_groups
            self.mid_block = MidBlock2D(
                channels=channels[-1],
                head_dim=(attention_head_dim or channels[-1]) if add_attention else None,
                attention_groups=mid_groups,
                resnet=resnet | {"output_scale_factor": mid_block_scale_factor},
            )

        self.up_blocks = nn.ModuleList()
        for level, kind in zip(reversed(range(levels)), up_types, strict=True):
            self.up_blocks.append(
                UpBlock2D(
                    in_channels=channels[min(level + 1, levels - 1)],
                    skip_channels=[channels[level]] * layers_per_block + [channels[max(level - 1, 0)]],
                    out_channels=channels[level],
                    head_dim=(attention_head_dim or channels[level]) if kind.attention else None,
                    upsample=(kind.resample or upsample_type) if level > 0 else None,
                    resnet=resnet,
                )
            )

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels[0], eps=norm_eps)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self.conv_in.weight.device

    def enable_gradient_checkpointing(self) -> None:
        """Save memory while training: of the residual blocks of all levels keep only what enters them.

        The backward pass computes the rest again. Attention and resampling are kept whole.
        """
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Undo `enable_gradient_checkpointing`."""
        self.gradient_checkpointing = False

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the parameters hold."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def embed(self, timestep: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """The embedding of timesteps, and of class labels where the model has them: what the residual blocks are told.

        Args:
            timestep: a number, or a tensor () or (N,).
            class_labels: (N,) integers, or what the model's `class_embed_type` asks for.

        Returns:
            (N, D), or (1, D) for a single timestep without labels.

        Raises:
            ValueError: if labels are missing, or given to a model without classes.
        """
        timesteps = torch.as_tensor(timestep, device=self.device).reshape(-1)
        emb = self.time_embedding(self.time_proj(timesteps).to(self.dtype))
        if (self.class_embedding is None) != (class_labels is None):
            raise ValueError(
                "the model is unconditional and takes no class_labels"
                if self.class_embedding is None
                else "the model is class-conditional; give class_labels"
            )
        if self.class_embedding is not None:
            if self.config.class_embed_type == "timestep":
                class_labels = self.time_proj(class_labels).to(self.dtype)
            emb = emb + self.class_embedding(class_labels).to(self.dtype)
        return emb

    def check_sample(self, sample: Tensor) -> None:
        """ValueError if the sample's shape does not fit the model."""
        multiple = 2 ** (len(self.down_blocks) - 1)
        if (
            sample.ndim != 4
            or sample.shape[1] != self.config.in_channels
            or sample.shape[2] % multiple
            or sample.shape[3] % multiple
        ):
            raise ValueError(
                f"the sample has shape {tuple(sample.shape)}; the model takes (N, {self.config.in_channels}, H, W) "
                f"with H and W multiples of {multiple}"
            )

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict.

        Args:
            sample: (N, in_channels, H, W), H and W multiples of 2 ** (len(block_out_channels) - 1), of the model's
                dtype and device.
            timestep: a number, or a tensor () or (N,). A single one is embedded once for the whole batch.
            class_labels: as in `embed`.
            return_dict: `False` for a tuple.

        Returns:
            `UNet2DOutput` with `sample` (N, out_channels, H, W), or `(sample,)`.

        Raises:
            ValueError: if the sample's shape does not fit the model.
        """
        self.check_sample(sample)
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        emb = self.embed(timestep, class_labels)
        check_embeddings(emb, sample)
        save_memory = self.gradient_checkpointing and torch.is_grad_enabled()

        hidden_states = self.conv_in(sample)
        skips = [hidden_states]
        for down_block in self.down_blocks:
            hidden_states, outputs = down_block(hidden_states, emb, save_memory)
            skips += outputs
        if self.mid_block is not None:
            hidden_states = self.mid_block(hidden_states, emb, save_memory)
        for up_block in self.up_blocks:
            hidden_states = up_block(hidden_states, skips, emb, save_memory)
        output = self.conv_out(norm_silu(self.conv_norm_out, hidden_states))

        if self.config.time_embedding_type == "fourier":
            output = output / torch.as_tensor(timestep, device=output.device).to(output.dtype).reshape(-1, 1, 1, 1)
        return UNet2DOutput(output) if return_dict else (output,)


def check_embeddings(emb: Tensor, sample: Tensor) -> None:
    """ValueError unless there is one embedding for all samples, or one for each."""
    if emb.shape[0] not in (1, sample.shape[0]):
        raise ValueError(f"{emb.shape[0]} timesteps or class_labels were given for {sample.shape[0]} samples")


class DownBlock2D(nn.Module):
    """Residual blocks of one level, each followed by attention if `head_dim` is given, then a reduction to half the
    size unless `downsample` is `None`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        head_dim: int | None,
        downsample: str | None,
        padding: int,
        resnet: dict[str, Any],
    ) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (num_layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, out_channels, **resnet) for channels in inputs)
        self.attentions = _attentions(num_layers, out_channels, head_dim, resnet["groups"], resnet["eps"])
        self.downsamplers: nn.ModuleList | None = None
        if downsample == "conv":
            self.downsamplers = nn.ModuleList([Downsample2D(out_channels, padding)])
        elif downsample == "resnet":
            self.downsamplers = nn.ModuleList([ResnetBlock2D(out_channels, out_channels, **resnet, resample="down")])

    def forward(self, hidden_states: Tensor, emb: Tensor, save_memory: bool) -> tuple[Tensor, list[Tensor]]:
        """Returns the last feature map, and all of them in order for the way up."""
        outputs = []
        for index, resnet in enumerate(self.resnets):
            hidden_states = _run(resnet, hidden_states, emb, save_memory)
            if self.attentions is not None:
                hidden_states = self.attentions[index](hidden_states)
            outputs.append(hidden_states)
        if self.downsamplers is not None:
            hidden_states = _resample(self.downsamplers[0], hidden_states, emb)
            outputs.append(hidden_states)
        return hidden_states, outputs


class MidBlock2D(nn.Module):
    """Two residual blocks with attention between them if `head_dim` is given."""

    def __init__(
        self, channels: int, head_dim: int | None, attention_groups: int | None, resnet: dict[str, Any]
    ) -> None:
        super().__init__()
        self.attentions = _attentions(
            1, channels, head_dim, attention_groups, resnet["eps"], resnet["output_scale_factor"]
        )
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, channels, **resnet) for _ in range(2))

    def forward(self, hidden_states: Tensor, emb: Tensor, save_memory: bool) -> Tensor:
        hidden_states = _run(self.resnets[0], hidden_states, emb, save_memory)
        if self.attentions is not None:
            hidden_states = self.attentions[0](hidden_states)
        return _run(self.resnets[1], hidden_states, emb, save_memory)


class UpBlock2D(nn.Module):
    """Residual blocks of one level, each fed with a feature map from the way down, with attention as in `DownBlock2D`,
    then a doubling unless `upsample` is `None`.
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: list[int],
        out_channels: int,
        head_dim: int | None,
        upsample: str | None,
        resnet: dict[str, Any],
    ) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList(
            ResnetBlock2D(channels + skip, out_channels, **resnet)
            for channels, skip in zip(inputs, skip_channels, strict=True)
        )
        self.attentions = _attentions(len(inputs), out_channels, head_dim, resnet["groups"], resnet["eps"])
        self.upsamplers: nn.ModuleList | None = None
        if upsample == "conv":
            self.upsamplers = nn.ModuleList([Upsample2D(out_channels)])
        elif upsample == "resnet":
            self.upsamplers = nn.ModuleList([ResnetBlock2D(out_channels, out_channels, **resnet, resample="up")])

    def forward(self, hidden_states: Tensor, skips: list[Tensor], emb: Tensor, save_memory: bool) -> Tensor:
        """Takes its feature maps off the end of `skips`."""
        for index, resnet in enumerate(self.resnets):
            hidden_states = _run(resnet, torch.cat([hidden_states, skips.pop()], dim=1), emb, save_memory)
            if self.attentions is not None:
                hidden_states = self.attentions[index](hidden_states)
        return hidden_states if self.upsamplers is None else _resample(self.upsamplers[0], hidden_states, emb)


def _attentions(
    number: int, channels: int, head_dim: int | None, groups: int | None, eps: float, output_scale_factor: float = 1.0
) -> nn.ModuleList | None:
    if head_dim is None:
        return None
    return nn.ModuleList(Attention(channels, head_dim, groups, eps, output_scale_factor) for _ in range(number))


def _run(resnet: nn.Module, hidden_states: Tensor, emb: Tensor, save_memory: bool) -> Tensor:
    return checkpoint(resnet, hidden_states, emb, use_reentrant=False) if save_memory else resnet(hidden_states, emb)


def _resample(module: nn.Module, hidden_states: Tensor, emb: Tensor) -> Tensor:
    """Resampling residual blocks are told the time, plain ones are not."""
    return module(hidden_states, emb) if isinstance(module, ResnetBlock2D) else module(hidden_states)


def _check(config: Any) -> tuple[list[BlockType], list[BlockType]]:
    """The block types behind the names, after checking that names exist and numbers fit."""

    def choice(name: str, value: Any, allowed: Any) -> None:
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(str(a) for a in allowed)}")

    levels = len(config.block_out_channels)
    if not 0 < levels == len(config.down_block_types) == len(config.up_block_types):
        raise ValueError(
            f"block_out_channels, down_block_types and up_block_types must be of one length, not {levels}, "
            f"{len(config.down_block_types)} and {len(config.up_block_types)}"
        )
    # The first hub models write UNetResDownBlock2D for DownBlock2D.
    down_names = [name.removeprefix("UNetRes") for name in config.down_block_types]
    up_names = [name.removeprefix("UNetRes") for name in config.up_block_types]
    for name in down_names:
        choice("a down block type", name, DOWN_BLOCKS)
    for name in up_names:
        choice("an up block type", name, UP_BLOCKS)
    choice("mid_block_type", config.mid_block_type, ("UNetMidBlock2D", None))
    choice("time_embedding_type", config.time_embedding_type, ("positional", "fourier", "learned"))
    choice("resnet_time_scale_shift", config.resnet_time_scale_shift, ("default", "scale_shift"))
    choice("act_fn", str(config.act_fn).lower(), ACTIVATIONS)
    choice("downsample_type", config.downsample_type, ("conv", "resnet"))
    choice("upsample_type", config.upsample_type, ("conv", "resnet"))
    choice("class_embed_type", config.class_embed_type, (None, "timestep", "identity"))
    if config.time_embedding_type == "learned" and not config.num_train_timesteps:
        raise ValueError("time_embedding_type 'learned' needs num_train_timesteps, the number of rows of the embedding")
    integer("layers_per_block", config.layers_per_block, 1)
    integer("norm_num_groups", config.norm_num_groups, 1)
    if config.attn_norm_num_groups is not None and config.block_out_channels[-1] % config.attn_norm_num_groups:
        raise ValueError(
            f"attn_norm_num_groups is {config.attn_norm_num_groups}, which does not divide "
            f"{config.block_out_channels[-1]}, "
            "the channels of the middle block"
        )
    for channels in config.block_out_channels:
        if channels % config.norm_num_groups:
            raise ValueError(
                f"block_out_channels holds {channels}, which norm_num_groups ({config.norm_num_groups}) does not divide"
            )
    down_types, up_types = [DOWN_BLOCKS[name] for name in down_names], [UP_BLOCKS[name] for name in up_names]
    attended = [c for c, kind in zip(config.block_out_channels, down_types, strict=True) if kind.attention]
    attended += [c for c, kind in zip(reversed(config.block_out_channels), up_types, strict=True) if kind.attention]
    attended += [config.block_out_channels[-1]] if config.mid_block_type and config.add_attention else []
    if config.attention_head_dim is not None and attended and not 1 <= config.attention_head_dim <= min(attended):
        raise ValueError(
            f"attention_head_dim is {config.attention_head_dim}; it must lie between 1 and {min(attended)}, "
            "the channels of the narrowest level with attention"
        )
    return down_types, up_types
