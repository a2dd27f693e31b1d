"""Scripts that change what a network computes: mode, weights in place, PyTorch's functions, attributes of layers."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dropin.library import TINY, Library, Observed, client, fill, make_pipeline, make_unet, outcome, sample
from helpers import randn


def sample_once(lib: Library, unet: Any, **settings: Any) -> np.ndarray:
    """Sample in one step, which is enough to see whether the engine follows a change."""
    return sample(make_pipeline(lib, unet), num_inference_steps=1, **settings)


@client()
def dropout_while_sampling(lib: Library, folder: Path) -> Observed:
    modes: list[bool] = []
    unet = make_unet(lib, dropout=0.5).train()
    unet.mid_block.register_forward_hook(lambda module, *_: modes.append(module.training))
    observed: Observed = {}
    for seed in (5, 6):
        torch.manual_seed(seed)
        observed[f"training, seed {seed}"] = sample_once(lib, unet)
    unet.eval()
    for module in unet.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    torch.manual_seed(5)
    observed["Monte Carlo dropout"] = sample_once(lib, unet)
    unet.conv_norm_out = nn.BatchNorm2d(8).train()
    observed["batch statistics"] = sample_once(lib, unet)
    return observed | {"running mean": unet.conv_norm_out.running_mean, "modes": modes}


@client()
def weights_changed_behind_the_version_counter(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib)
    pipe = make_pipeline(lib, unet)
    query = unet.mid_block.attentions[0].to_q.weight
    changes: dict[str, Callable[[], Any]] = {
        "none": lambda: None,
        "flipped": lambda: unet.conv_out.weight.data.copy_(unet.conv_out.weight.data.flip(0)),
        "rows swapped": lambda: query.data.copy_(query.data[[1, 0, *range(2, len(query))]]),
        "negated": lambda: unet.conv_in.weight.data.neg_(),
        "one value": lambda: unet.conv_out.bias.detach().numpy().__setitem__(0, 0.5),
    }
    observed = {}
    for name, change in changes.items():
        change()
        observed[name] = sample(pipe, num_inference_steps=1)
    return observed


@contextmanager
def patched(namespace: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(namespace, name)
    setattr(namespace, name, value)
    try:
        yield
    finally:
        setattr(namespace, name, original)


@client()
def functions_of_pytorch_patched(lib: Library, folder: Path) -> Observed:
    unet, x, observed = make_unet(lib), randn(2, 3, 8, 8), {}
    for name in ("silu", "group_norm", "linear", "conv2d", "interpolate", "scaled_dot_product_attention"):
        original = getattr(F, name)
        with patched(F, name, lambda *a, original=original, **k: 0.9 * original(*a, **k)):
            observed[name] = sample_once(lib, unet)
            with torch.no_grad():
                observed[f"{name}, network alone"] = unet(x, 5).sample
    with patched(F, "silu", F.mish):
        observed["one function for another"] = sample_once(lib, unet)
    for training in (True, False):
        unet.train(training).to(memory_format=torch.channels_last)
        calls: list[int] = []
        counted = lambda *a, original=F.conv2d, calls=calls, **k: calls.append(1) or original(*a, **k)  # noqa: E731
        with patched(F, "conv2d", counted):
            out = unet(x, 5).sample
        observed[f"convolutions, training {training}"] = [len(calls), out]
    return observed


class Counting(TorchFunctionMode):
    """Scales group norms and counts convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.convolutions += func is F.conv2d
        out = func(*args, **(kwargs or {}))
        return 0.9 * out if func is F.group_norm else out


@client()
def torch_function_mode(lib: Library, folder: Path) -> Observed:
    unet, mode = make_unet(lib), Counting()
    with mode:
        images = sample_once(lib, unet)
    with mode, torch.no_grad():
        out = unet(randn(2, 3, 8, 8), 5).sample
    with torch.device("cpu"):
        plain = sample_once(lib, unet)
    return {"images": images, "out": out, "plain": plain, "convolutions": mode.convolutions}


ATTRIBUTES: dict[str, Any] = {
    "mid_block.attentions.0.residual_connection": False,
    "mid_block.attentions.0.rescale_output_factor": 2.0,
    "mid_block.attentions.0.heads": 4,
    "mid_block.attentions.0.norm_q": nn.LayerNorm(8),
    "mid_block.attentions.0.norm_k": nn.LayerNorm(8),
    "mid_block.resnets.0.output_scale_factor": 2.0,
    "mid_block.resnets.0.skip_time_act": True,
    "mid_block.resnets.0.time_embedding_norm": None,
    "up_blocks.0.upsamplers.0.use_conv": False,
    "up_blocks.0.upsamplers.0.interpolate": False,
    "down_blocks.0.downsamplers.0.padding": 0,
    "time_proj.downscale_freq_shift": 1,
    "time_proj.flip_sin_to_cos": False,
    "time_proj.scale": 10,
    "time_embedding.act": None,
    "time_embedding.post_act": nn.ReLU(),
}


@client()
def attributes_assigned(lib: Library, folder: Path) -> Observed:
    observed: Observed = {}
    for path, value in ATTRIBUTES.items():
        unet = make_unet(lib)
        parent, _, name = path.rpartition(".")
        setattr(unet.get_submodule(parent), name, value)
        try:
            observed[path] = [unet(randn(2, 3, 8, 8), 200).sample, sample_once(lib, unet)]
        except RuntimeError:
            observed[path] = "the shapes do not fit"
    unet = make_unet(lib, time_embedding_type="fourier")
    unet.time_proj.log, unet.time_proj.flip_sin_to_cos = False, True
    observed["fourier"] = unet(randn(2, 3, 8, 8), 7).sample
    unet = make_unet(lib)
    resnet = unet.up_blocks[0].resnets[0]
    resnet.time_emb_proj, resnet.time_embedding_norm = None, None
    return observed | {"without time": [unet(randn(2, 3, 8, 8), 200).sample, sample_once(lib, unet)]}


class TimeShift(nn.Module):
    """Attention replaced by a shift that depends on the time embedding."""

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        return hidden_states if temb is None else hidden_states + temb.mean()


@client()
def attention_replaced(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib)
    unet.mid_block.attentions[0] = TimeShift()
    unet.down_blocks[1].attentions[0] = TimeShift()
    return {"out": unet(randn(2, 3, 8, 8), 5).sample, "images": sample_once(lib, unet)}


@client()
def timesteps_of_every_kind(lib: Library, folder: Path) -> Observed:
    x, observed = randn(2, 3, 8, 8), {}
    networks = {"positional": make_unet(lib), "fourier": make_unet(lib, time_embedding_type="fourier")}
    for kind, unet in networks.items():
        for t in (5, 5.5, True, np.int64(5), torch.tensor(5.5), torch.tensor([5.0, 7.5])):
            observed[f"{kind}, {t!r}"] = unet(x, t).sample
    return observed


@client()
def one_class_embedding_for_the_batch(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib, class_embed_type="identity")
    x, labels = randn(2, 3, 8, 8), randn(2, 32)
    return {
        "one": unet(x, 5, labels[0]).sample,
        "one row": unet(x, 5, labels[:1]).sample,
        "each": unet(x, 5, labels).sample,
    }


@client()
def weights_stored_in_bfloat16(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib)
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    return {
        "dtypes": [(name, str(parameter.dtype)) for name, parameter in unet.named_parameters()],
        "dtype": str(unet.dtype),
        "out": unet(randn(2, 3, 8, 8), 5).sample,
        "images": sample_once(lib, unet),
    }


@client()
def networks_offloaded(lib: Library, folder: Path) -> Observed:
    offloaded = make_unet(lib)
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    pipe = make_pipeline(lib)
    pipe.enable_model_cpu_offload(device="cpu")
    return {
        "weights": str(offloaded.device),
        "runs on": str(make_pipeline(lib, offloaded)._execution_device),
        "out": offloaded(randn(2, 3, 8, 8), 5).sample,
        "images": sample_once(lib, offloaded),
        "model offload": sample(pipe, num_inference_steps=1),
        "two indices": outcome(lambda: pipe.enable_model_cpu_offload(1, "cuda:0"), ValueError),
    }


@client()
def pipelines_copied(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib)
    other = copy.copy(pipe)
    other.scheduler = lib.DDIMScheduler(clip_sample=False)
    other.unet = make_unet(lib, layers_per_block=2)
    other.set_progress_bar_config(desc="other")
    return {
        "clip": [pipe.scheduler.config.clip_sample, other.scheduler.config.clip_sample],
        "layers": [pipe.unet.config.layers_per_block, other.unet.config.layers_per_block],
        "disabled": [pipe.progress_bar(range(0)).disable, other.progress_bar(range(0)).disable],
        "images": [sample(pipe, num_inference_steps=1), sample(other, num_inference_steps=1)],
        "attributes": [name in vars(pipe) for name in ("unet", "scheduler")],
    }


@client()
def subclass_with_buffers(lib: Library, folder: Path) -> Observed:
    class Scaled(lib.UNet2DModel):
        def __init__(
            self,
            sample_size: int = 8,
            down_block_types: tuple[str, ...] = TINY["down_block_types"],
            up_block_types: tuple[str, ...] = TINY["up_block_types"],
            block_out_channels: tuple[int, ...] = (8, 16),
            layers_per_block: int = 1,
            norm_num_groups: int = 4,
        ) -> None:
            super().__init__(
                sample_size=sample_size,
                down_block_types=down_block_types,
                up_block_types=up_block_types,
                block_out_channels=block_out_channels,
                layers_per_block=layers_per_block,
                norm_num_groups=norm_num_groups,
            )
            self.register_buffer("scale", torch.linspace(0.5, 1.5, 3).view(1, 3, 1, 1), persistent=False)
            self.norm = nn.BatchNorm2d(3)
            self.shift = torch.full((1, 3, 1, 1), 0.25)
            self.total = int(torch.arange(5).sum().item())

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            return types.SimpleNamespace(sample=self.norm(out.sample) * self.scale + self.shift)

    unet = Scaled().eval()
    fill(unet)
    unet.save_pretrained(folder / "unet")
    loaded = Scaled.from_pretrained(folder / "unet")
    double = Scaled.from_pretrained(folder / "unet", torch_dtype=torch.float64)
    return {
        "out": loaded(randn(2, 3, 8, 8), 10).sample,
        "total": loaded.total,
        "scale": loaded.scale,
        "buffers": {name: str(buffer.dtype) for name, buffer in double.named_buffers()},
        "images": sample_once(lib, loaded),
    }
