"""Conversion of checkpoints: the converted U-Net computes what the original network does.

The originals are implemented a second time in this module, each as one function of its weights. A `Weights` is filled
while the function runs for the first time: a layer without tensors draws them, under the original's names.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ddim.cli import main
from ddim.convert import CheckpointSettings, OpenAIFlags, convert, ddpm, make_pipeline
from ddim.convert.placement import place_tensors
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel
from programs import run_cli

TIMESTEPS = (0, 17, 999)
TOLERANCE = 1e-5


class Weights(dict[str, Tensor]):
    """Layers by name. All values are random, so that no error is hidden by a zero or a one."""

    def __init__(self, eps: float) -> None:
        self.eps, self.generator = eps, torch.Generator().manual_seed(0)

    def draw(self, name: str, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        if name not in self:
            self[name] = torch.randn(shape, generator=self.generator) * scale + mean
        return self[name]

    def layer(self, name: str, inputs: int, outputs: int, *kernel: int) -> tuple[Tensor, Tensor]:
        scale = 1 / math.sqrt(inputs * math.prod(kernel))
        weight = self.draw(f"{name}.weight", outputs, inputs, *kernel, scale=scale)
        return weight, self.draw(f"{name}.bias", outputs, scale=0.1)

    def linear(self, name: str, x: Tensor, outputs: int) -> Tensor:
        return F.linear(x, *self.layer(name, x.shape[1], outputs))

    def conv(self, name: str, x: Tensor, outputs: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> Tensor:
        return F.conv2d(x, *self.layer(name, x.shape[1], outputs, kernel, kernel), stride=stride, padding=padding)

    def conv1d(self, name: str, x: Tensor, outputs: int) -> Tensor:
        return F.conv1d(x, *self.layer(name, x.shape[1], outputs, 1))

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.draw(f"{name}.weight", x.shape[1], scale=0.2, mean=1.0)
        return F.group_norm(x, 32, weight, self.draw(f"{name}.bias", x.shape[1], scale=0.2), self.eps)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def upsample(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


# --- ermongroup/ddim, pesser/pytorch_diffusion


def ermon(w: Weights, x: Tensor, t: Tensor, ch: int, mult: Sequence[int], blocks: int, attend: Sequence[int]) -> Tensor:
    """Compute the denoiser of models/diffusion.py; `attend` are the levels with attention."""

    def resnet(name: str, x: Tensor, outputs: int) -> Tensor:
        h = w.conv(f"{name}.conv1", swish(w.norm(f"{name}.norm1", x)), outputs)
        h = h + w.linear(f"{name}.temb_proj", swish(temb), outputs)[:, :, None, None]
        h = w.conv(f"{name}.conv2", swish(w.norm(f"{name}.norm2", h)), outputs)
        return h + (x if x.shape[1] == outputs else w.conv(f"{name}.nin_shortcut", x, outputs, 1, padding=0))

    def attention(name: str, x: Tensor) -> Tensor:
        N, C, H, W = x.shape
        h = w.norm(f"{name}.norm", x)
        q, k, v = (w.conv(f"{name}.{part}", h, C, 1, padding=0).reshape(N, C, H * W) for part in "qkv")
        attended = torch.softmax(torch.einsum("nci,ncj->nij", q, k) / math.sqrt(C), dim=2)
        mixed = torch.einsum("nij,ncj->nci", attended, v).reshape(N, C, H, W)
        return x + w.conv(f"{name}.proj_out", mixed, C, 1, padding=0)

    frequencies = torch.tensor([10_000 ** (-i / (ch // 2 - 1)) for i in range(ch // 2)])
    angles = t[:, None].float() * frequencies
    temb = w.linear("temb.dense.0", torch.cat([angles.sin(), angles.cos()], 1), 4 * ch)
    temb = w.linear("temb.dense.1", swish(temb), 4 * ch)

    levels = len(mult)
    skips = [w.conv("conv_in", x, ch)]
    for level in range(levels):
        for i in range(blocks):
            h = resnet(f"down.{level}.block.{i}", skips[-1], ch * mult[level])
            skips.append(attention(f"down.{level}.attn.{i}", h) if level in attend else h)
        if level < levels - 1:
            shifted = F.pad(skips[-1], (0, 1, 0, 1))
            skips.append(w.conv(f"down.{level}.downsample.conv", shifted, ch * mult[level], stride=2, padding=0))
    h = resnet("mid.block_1", skips[-1], ch * mult[-1])
    h = resnet("mid.block_2", attention("mid.attn_1", h), ch * mult[-1])
    for level in reversed(range(levels)):
        for i in range(blocks + 1):
            h = resnet(f"up.{level}.block.{i}", torch.cat([h, skips.pop()], 1), ch * mult[level])
            h = attention(f"up.{level}.attn.{i}", h) if level in attend else h
        if level > 0:
            h = w.conv(f"up.{level}.upsample.conv", upsample(h), ch * mult[level])
    return w.conv("conv_out", swish(w.norm("norm_out", h)), x.shape[1])


# Configurations of the repository: multipliers, level with attention, size, parameters.
ERMON = {
    "cifar10": ((1, 2, 2, 2), 1, 32, 35_746_307),
    "celeba": ((1, 2, 2, 2, 4), 2, 64, 78_700_803),
    "lsun": ((1, 1, 2, 2, 4, 4), 4, 256, 113_673_219),
}


def sample(size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(1))


def ermon_weights(mult: Sequence[int] = (1, 2), attend: Sequence[int] = (1,), blocks: int = 1) -> Weights:
    w = Weights(1e-6)
    ermon(w, sample(2 ** len(mult)), torch.zeros(1), 32, mult, blocks, attend)
    return w


@torch.no_grad()
def test_ermongroup_network_matches() -> None:
    for mult, level, size, _ in ERMON.values():
        w = ermon_weights(mult, (level,), 2)
        pipe = make_pipeline(w, "x")
        assert pipe.unet.config.sample_size == size
        assert not pipe.unet.training
        # Feature maps down to 2x2 pixels, where padding and upsampling matter most.
        x = sample(2 ** len(mult))
        for t in TIMESTEPS:
            expected = ermon(w, x, torch.tensor([t]), 32, mult, 2, (level,))
            assert (pipe.unet(x, t).sample - expected).abs().max() < TOLERANCE * expected.abs().max()


@torch.no_grad()
def test_other_levels_blocks_and_gray_images() -> None:
    for mult, attend, blocks in (((1, 3), (), 3), ((1, 2, 1), (0, 2), 1), ((1,), (0,), 2)):
        w, x = Weights(1e-6), sample(8, 1)
        expected = ermon(w, x, torch.tensor([300]), 32, mult, blocks, attend)
        unet = make_pipeline(w, "x", settings=CheckpointSettings(image_size=8)).unet
        assert (unet(x, 300).sample - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_published_ermongroup_networks_by_shape() -> None:
    for mult, level, _, parameters in ERMON.values():
        # The published networks have four times the channels of those in this module.
        shapes = {
            name: [4 * n if n >= 32 else n for n in t.shape] for name, t in ermon_weights(mult, (level,), 2).items()
        }
        w = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        plan = ddpm.plan_conversion(w)
        with torch.device("meta"):
            unet = UNet2DModel(**plan.config)
        placed = place_tensors(plan, unet, w)
        assert unet.num_parameters() == sum(tensor.numel() for tensor in placed.values()) == parameters


# --- openai/improved-diffusion, openai/guided-diffusion

OPENAI: dict[str, Any] = {
    "mult": (1, 2),
    "blocks": 1,
    "attend": (1,),
    "heads": 1,
    "head_channels": None,
    "scale_shift": False,
    "updown": False,
    "new_order": False,
    "classes": None,
    "sigma": False,
}


def guided(w: Weights, x: Tensor, t: Tensor, labels: Tensor | None = None, ch: int = 32, **changes: Any) -> Tensor:
    """Compute the denoiser of unet.py; `t` is the network's input, `attend` are the levels with attention."""
    o = OPENAI | changes

    def residual(name: str, x: Tensor, outputs: int, resample: Any = lambda x: x) -> Tensor:
        h = resample(F.silu(w.norm(f"{name}.in_layers.0", x)))
        h = w.conv(f"{name}.in_layers.2", h, outputs)
        x = resample(x)
        e = w.linear(f"{name}.emb_layers.1", F.silu(emb), outputs * (1 + o["scale_shift"]))[:, :, None, None]
        if o["scale_shift"]:
            h = w.norm(f"{name}.out_layers.0", h) * (1 + e[:, :outputs]) + e[:, outputs:]
        else:
            h = w.norm(f"{name}.out_layers.0", h + e)
        h = w.conv(f"{name}.out_layers.3", F.silu(h), outputs)
        return h + (x if x.shape[1] == outputs else w.conv(f"{name}.skip_connection", x, outputs, 1, padding=0))

    def attention(name: str, x: Tensor) -> Tensor:
        N, C, H, W = x.shape
        d = o["head_channels"] or C // o["heads"]
        qkv = w.conv1d(f"{name}.qkv", w.norm(f"{name}.norm", x.flatten(2)), 3 * C)
        mixed = []
        for head in range(C // d):
            if o["new_order"]:
                q, k, v = (qkv[:, part * C + head * d : part * C + (head + 1) * d] for part in range(3))
            else:
                q, k, v = qkv[:, 3 * d * head : 3 * d * (head + 1)].split(d, dim=1)
            attended = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(d), dim=-1)
            mixed.append(v @ attended.transpose(1, 2))
        return x + w.conv1d(f"{name}.proj_out", torch.cat(mixed, 1), C).reshape(N, C, H, W)

    angles = t[:, None].float() * torch.tensor([10_000 ** (-i / (ch // 2)) for i in range(ch // 2)])
    emb = w.linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], 1), 4 * ch)
    emb = w.linear("time_embed.2", F.silu(emb), 4 * ch)
    if labels is not None:
        emb = emb + w.draw("label_emb.weight", o["classes"], 4 * ch)[labels]

    levels = len(o["mult"])
    skips = [w.conv("input_blocks.0.0", x, ch)]
    for level, mult in enumerate(o["mult"]):
        for _ in range(o["blocks"]):
            name = f"input_blocks.{len(skips)}"
            h = residual(f"{name}.0", skips[-1], ch * mult)
            skips.append(attention(f"{name}.1", h) if level in o["attend"] else h)
        if level < levels - 1:
            name = f"input_blocks.{len(skips)}.0"
            if o["updown"]:
                skips.append(residual(name, skips[-1], ch * mult, lambda x: F.avg_pool2d(x, 2)))
            else:
                skips.append(w.conv(f"{name}.op", skips[-1], ch * mult, stride=2))
    h = residual("middle_block.0", skips[-1], ch * o["mult"][-1])
    h = residual("middle_block.2", attention("middle_block.1", h), ch * o["mult"][-1])
    index = 0
    for level, mult in reversed(list(enumerate(o["mult"]))):
        for i in range(o["blocks"] + 1):
            h, position = residual(f"output_blocks.{index}.0", torch.cat([h, skips.pop()], 1), ch * mult), 1
            if level in o["attend"]:
                h, position = attention(f"output_blocks.{index}.1", h), 2
            if level > 0 and i == o["blocks"]:
                name = f"output_blocks.{index}.{position}"
                h = (
                    residual(name, h, ch * mult, upsample)
                    if o["updown"]
                    else w.conv(f"{name}.conv", upsample(h), ch * mult)
                )
            index += 1
    return w.conv("out.2", F.silu(w.norm("out.0", h)), x.shape[1] * (1 + o["sigma"]))


VARIANTS: dict[str, tuple[dict[str, Any], OpenAIFlags]] = {
    "one head": ({}, OpenAIFlags(heads=1)),
    "four heads": ({"heads": 4}, OpenAIFlags(heads=4)),
    "new order": ({"heads": 4, "new_order": True}, OpenAIFlags(heads=4, new_attention_order=True)),
    "heads of 16": (
        {"mult": (1, 2, 3), "attend": (1, 2), "head_channels": 16, "blocks": 2},
        OpenAIFlags(head_channels=16),
    ),
    "scale and shift": ({"scale_shift": True, "heads": 2}, OpenAIFlags(heads=2)),
    "resampling blocks": (
        {"mult": (1, 2, 2), "attend": (1,), "updown": True, "scale_shift": True, "heads": 4, "blocks": 2},
        OpenAIFlags(heads=4),
    ),
    "attention everywhere": (
        {"mult": (1, 2), "attend": (0, 1), "updown": True, "head_channels": 32},
        OpenAIFlags(head_channels=32),
    ),
    "a variance": ({"sigma": True}, OpenAIFlags(heads=1)),
    "one level": ({"mult": (1,), "attend": (), "blocks": 2}, OpenAIFlags(heads=1)),
}


def guided_weights(**changes: Any) -> Weights:
    w = Weights(1e-5)
    guided(w, sample(8), torch.zeros(1), **changes)
    return w


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_openai_networks_match(name: str, caplog: pytest.LogCaptureFixture) -> None:
    changes, flags = VARIANTS[name]
    w = guided_weights(**changes)
    unet = make_pipeline(w, "x", settings=CheckpointSettings(8, flags)).unet
    x = sample(8)
    for t in TIMESTEPS:
        expected = guided(w, x, torch.tensor([t]), **changes)[:, :3]
        assert (unet(x, t).sample - expected).abs().max() < TOLERANCE * expected.abs().max()
    assert ("predicts a variance" in caplog.text) == (name == "a variance")


@torch.no_grad()
def test_class_conditional_network(caplog: pytest.LogCaptureFixture) -> None:
    w, x, labels = Weights(1e-5), sample(8), torch.tensor([3])
    expected = guided(w, x, torch.tensor([17]), labels, classes=5)
    unet = make_pipeline(w, "x", settings=CheckpointSettings(flags=OpenAIFlags(heads=1))).unet
    assert unet.config.num_class_embeds == 5
    assert (unet(x, 17, class_labels=labels).sample - expected).abs().max() < TOLERANCE * expected.abs().max()
    assert "class-conditional: give class_labels, from 0 to 4" in caplog.text


@torch.no_grad()
def test_class_conditional_sampling() -> None:
    """As guided-diffusion's own loop samples: the network with its labels, equation (12) with its betas."""
    w, x, labels = Weights(1e-5), sample(32), torch.tensor([3])
    guided(w, x, torch.tensor([17]), labels, classes=5)
    pipe = make_pipeline(w, "x", settings=CheckpointSettings(flags=OpenAIFlags(heads=1)))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    alphas = torch.cat(
        [torch.ones(1), torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0).float()]
    )
    expected = x
    for t, t_prev in ((500, 250), (250, 0), (0, -1)):
        epsilon = guided(w, expected, torch.tensor([t]), labels, classes=5)[:, :3]
        x0 = (expected - (1 - alphas[t + 1]).sqrt() * epsilon) / alphas[t + 1].sqrt()
        expected = alphas[t_prev + 1].sqrt() * x0 + (1 - alphas[t_prev + 1]).sqrt() * epsilon
    scale = expected.abs().max()
    images = pipe(latents=x, timesteps=[500, 250, 0], class_labels=labels, output_type="pt").images
    expected = (expected / 2 + 0.5).clamp(0, 1)
    assert (images - expected).abs().max() < 1e-5 * scale


@torch.no_grad()
def test_rescaled_timesteps() -> None:
    w, x = guided_weights(), sample(8)
    schedule = {"num_train_timesteps": 4000}
    rescaled = OpenAIFlags(heads=1, rescale_timesteps=True)
    pipe = make_pipeline(w, "x", settings=CheckpointSettings(flags=rescaled, schedule=schedule))
    for t in (0, 3, 2001, 3999):
        expected = guided(w, x, torch.tensor([t * 0.25]))
        assert (pipe.unet(x, t).sample - expected).abs().max() < TOLERANCE * expected.abs().max()
    # Linear betas are scaled by 1000 / T, as in the original code.
    assert (pipe.scheduler.config.beta_start, pipe.scheduler.config.beta_end) == (0.0001 / 4, 0.02 / 4)
    plain_flags = OpenAIFlags(heads=1, rescale_timesteps=False)
    plain = make_pipeline(w, "x", settings=CheckpointSettings(flags=plain_flags, schedule=schedule))
    expected = guided(w, x, torch.tensor([2001]))
    assert (plain.unet(x, 2001).sample - expected).abs().max() < TOLERANCE * expected.abs().max()


CONV_RESAMPLE = {"input_blocks.2.0.op": "", "output_blocks.1.2.conv": ""}


def without(w: Weights, *prefixes: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in w.items() if not name.startswith(prefixes)}


def test_inexpressible_openai_networks_raise() -> None:
    w = guided_weights()
    table: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
        (w, {}, "do not determine the heads of attention; pass heads or head_channels, one of them"),
        (w, {"flags": OpenAIFlags(heads=1, head_channels=8)}, "one of them"),
        (w, {"flags": OpenAIFlags(heads=3)}, r"heads must divide 64, .*, got 3"),
        (w, {"flags": OpenAIFlags(heads=0)}, "heads must be an integer of at least 1, got 0"),
        (
            guided_weights(mult=(1, 2, 3), attend=(1, 2), heads=4),
            {"flags": OpenAIFlags(heads=4)},
            "4 heads have 16, 24",
        ),
        (w, {"flags": OpenAIFlags(heads=1), "schedule": {"num_train_timesteps": 50}}, "pass rescale_timesteps=True"),
        (without(w, *CONV_RESAMPLE), {"flags": OpenAIFlags(heads=1)}, "conv_resample=False"),
        (without(w, "output_blocks"), {"flags": OpenAIFlags(heads=1)}, "the upward path is required"),
        (without(w, "middle_block.1.qkv"), {"flags": OpenAIFlags(heads=1)}, r"middle_block\.1\.qkv\.weight is missing"),
        (without(w, "output_blocks.3"), {"flags": OpenAIFlags(heads=1)}, "do not make levels of equal depth"),
        (guided_weights(mult=(2, 2)), {"flags": OpenAIFlags(heads=1)}, "time embedding has 32 channels"),
        (w | {"out.2.weight": torch.zeros(5, 32, 3, 3)}, {"flags": OpenAIFlags(heads=1)}, "makes 5 channels of 3"),
        (
            w | {"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)},
            {"flags": OpenAIFlags(heads=1)},
            "super-resolution",
        ),
    ]
    for tensors, settings, message in table:
        with pytest.raises(ValueError, match=message):
            make_pipeline(tensors, "x", settings=CheckpointSettings(**settings))


# --- tensors


def test_unplaceable_tensors_raise() -> None:
    w = ermon_weights()
    mid = "mid.block_1.conv1.weight"
    table: list[tuple[dict[str, Tensor], str]] = [
        (without(w, "up.1.block.0.conv2.bias"), r"up\.1\.block\.0\.conv2\.bias is missing"),
        (without(w, "conv_in.weight"), r"conv_in\.weight is missing"),
        (without(w, "down.0.block.0.conv1"), r"down\.0\.block\.0\.conv1\.weight is missing"),
        (without(w, "down.0.downsample"), r"down\.0\.downsample\.conv\.weight is missing"),
        (w | {"logvar": torch.zeros(1000)}, "logvar is unexpected"),
        (
            w | {mid: torch.zeros(64, 64, 1, 1)},
            r"mid\.block_1\.conv1\.weight: expected shape \(64, 64, 3, 3\), got \(64, 64, 1, 1\)",
        ),
        (
            w | {"conv_in.weight": torch.zeros(32)},
            r"conv_in\.weight must be a matrix or a convolution kernel, got shape \(32,\)",
        ),
        (w | {mid: w[mid].to(torch.int64)}, r"conv1\.weight must be floating, got torch\.int64"),
        (w | {mid: w[mid] * math.nan}, "must be finite in torch.float32"),
        (w | {"a": w[mid], "b": w[mid], "c": w[mid], "d": w[mid]}, r"\(and 1 more\)"),
        (w | {"conv_out.weight": torch.zeros(6, 32, 3, 3)}, "makes 6 channels of 3"),
        (w | {"conv_in.weight": torch.zeros(64, 3, 3, 3)}, "conv_in makes 64 channels and the first level has 32"),
        (ermon_weights(mult=(1, 2), attend=()), r"0 levels with attention\); pass image_size"),
        ({"fc.weight": torch.zeros(2, 2)}, r"unrecognized checkpoint layout: .*, got fc\.weight"),
    ]
    for tensors, message in table:
        with pytest.raises(ValueError, match=message):
            make_pipeline(tensors, "x")
    with pytest.raises(ValueError, match="image_size must be a multiple of 2 for 2 levels, got 33"):
        make_pipeline(w, "x", settings=CheckpointSettings(image_size=33))
    with pytest.raises(ValueError, match=r"must be finite in torch\.float16, got NaN, infinity or values that are"):
        make_pipeline(w | {mid: w[mid] * 1e6}, "x", dtype=torch.float16)
    with pytest.raises(ValueError, match="require layout='openai', got 'ddpm'"):
        make_pipeline(w, "x", settings=CheckpointSettings(flags=OpenAIFlags(heads=1)))


def test_shortcuts_under_their_second_name() -> None:
    w = ermon_weights()
    renamed = {name.replace("nin_shortcut", "conv_shortcut"): tensor for name, tensor in w.items()}
    assert_same(make_pipeline(renamed, "x"), make_pipeline(w, "x"))
    wide = {name: F.pad(t, (1, 1, 1, 1)) if name.endswith("conv_shortcut.weight") else t for name, t in renamed.items()}
    with pytest.raises(ValueError, match=r"conv_shortcut\.weight: expected shape .*, got .*3, 3\)"):
        make_pipeline(wide, "x")


# --- files


def assert_same(a: DDIMPipeline, b: DDIMPipeline) -> None:
    assert a.unet.to_json_string() == b.unet.to_json_string()
    assert a.scheduler.to_json_string() == b.scheduler.to_json_string()
    first, second = a.unet.state_dict(), b.unet.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])


def wrapped(w: Weights) -> dict[str, Tensor]:
    return {f"module.{name}": tensor for name, tensor in w.items()}


def test_checkpoint_files_of_every_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    w, out = ermon_weights(), tmp_path / "out"
    expected = make_pipeline(w, "x")
    averaged = {name: tensor / 2 for name, tensor in w.items()}
    halved = make_pipeline(averaged, "x")
    optimizer = torch.optim.Adam([torch.zeros(2, requires_grad=True)]).state_dict()
    contents: dict[str, tuple[Any, bool, DDIMPipeline]] = {
        "plain": (dict(w), True, expected),
        "raw": (dict(w), False, expected),
        "module": (wrapped(w), True, expected),
        "list": ([wrapped(w), optimizer, 3, 1000], True, expected),
        "averaged": ([wrapped(w), optimizer, 3, 1000, averaged], True, halved),
        "not averaged": ([wrapped(w), optimizer, 3, 1000, averaged], False, expected),
    }
    for name, (content, ema, pipe) in contents.items():
        torch.save(content, tmp_path / "x.ckpt")
        caplog.clear()
        convert(tmp_path / "x.ckpt", out, ema=ema, overwrite=True)
        assert_same(DDIMPipeline.from_pretrained(out), pipe)
        assert ("no averaged weights" in caplog.text) == (name == "list")
    torch.save(dict(w), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(dict(w), tmp_path / "x.safetensors")
    for name in ("old.pth", "x.safetensors"):
        written = convert(tmp_path / name, tmp_path / f"{name} converted")
        assert_same(written, expected)
        assert_same(DDIMPipeline.from_pretrained(tmp_path / f"{name} converted"), expected)


def test_schedule_and_dtype(tmp_path: Path) -> None:
    w = ermon_weights()
    torch.save(dict(w), tmp_path / "x.pt")
    schedule = {"num_train_timesteps": 200, "beta_start": 0.001, "beta_schedule": "scaled_linear"}
    convert(tmp_path / "x.pt", tmp_path / "out", settings=CheckpointSettings(40, schedule=schedule), dtype="float16")
    pipe = DDIMPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float16)
    assert {name: pipe.scheduler.config[name] for name in schedule} == schedule
    assert pipe.scheduler.config.beta_end == 0.02
    assert pipe.sample_shape == (3, 40, 40)
    assert torch.equal(pipe.unet.conv_in.weight, w["conv_in.weight"].half())
    weights = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 2.2 * sum(tensor.numel() for tensor in w.values())


class Payload:
    """An object whose unpickling creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_invalid_checkpoint_files_raise(tmp_path: Path) -> None:
    w, mark, path = ermon_weights(), tmp_path / "ran", tmp_path / "x.pt"
    torch.save(dict(w), path)
    whole = path.read_bytes()
    save_file(dict(w), tmp_path / "x.safetensors")
    safe = (tmp_path / "x.safetensors").read_bytes()

    def refused(match: str, content: Any, name: str = "x.pt") -> None:
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=match) as caught:
            convert(tmp_path / name, tmp_path / "out")
        assert "\n" not in str(caught.value)

    refused("is refused: .* could run code", dict(w) | {"x": Payload(mark)})
    refused("is refused: .* could run code", [Payload(mark), {}, 0, 0])
    assert not mark.exists()
    refused("truncated or damaged", whole[: len(whole) // 2])
    refused("truncated or damaged", safe[: len(safe) // 2], "x.safetensors")
    refused("truncated or damaged", b"")
    refused("is refused|damaged", b"this is a letter")
    for content in ({}, [], [1, 2], {"state": dict(w)}, torch.zeros(3), [dict(w), {}, 0, 0, 7], {1: torch.zeros(2)}):
        refused("is not a checkpoint of a network", content)
    refused(r"conv_in\.weight is missing", without(w, "conv_in"))
    assert not (tmp_path / "out").exists()


def test_invalid_arguments_raise(tmp_path: Path, saved_pipeline: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the checkpoint .*missing\.pt does not exist"):
        convert(tmp_path / "missing.pt", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="is a folder, not a file"):
        convert(saved_pipeline, tmp_path / "out", layout="ddpm")
    with pytest.raises(ValueError, match="layout must be one of auto, ddpm, openai, or diffusers, got 'ldm'"):
        convert(saved_pipeline, tmp_path / "out", layout="ldm")
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, or float16, got 'int8'"):
        convert(saved_pipeline, tmp_path / "out", dtype="int8")
    with pytest.raises(ValueError, match="records its own image size, heads and schedule"):
        convert(saved_pipeline, tmp_path / "out", settings=CheckpointSettings(image_size=32))
    with pytest.raises(FileNotFoundError, match="is not a model"):
        convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_that_is_not_empty_requires_overwrite(tmp_path: Path) -> None:
    torch.save(dict(ermon_weights()), tmp_path / "x.pt")
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out is not empty; pass overwrite=True"):
        convert(tmp_path / "x.pt", out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    convert(tmp_path / "x.pt", out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    DDIMPipeline.from_pretrained(out)
    with pytest.raises(NotADirectoryError, match="is a file, not a folder"):
        convert(tmp_path / "x.pt", tmp_path / "x.pt", overwrite=True)


def test_old_diffusers_folder(tmp_path: Path, saved_pipeline: Path) -> None:
    pipe = DDIMPipeline.from_pretrained(saved_pipeline)
    flat = tmp_path / "flat"
    flat.mkdir()
    config = json.loads((saved_pipeline / "unet" / "config.json").read_text())
    (flat / "config.json").write_text(json.dumps(config | {"_class_name": "UNetUnconditionalModel"}))
    scheduler = saved_pipeline / "scheduler" / "scheduler_config.json"
    (flat / "scheduler_config.json").write_text(scheduler.read_text())
    old = {
        name.replace("to_q", "query").replace("to_out.0", "proj_attn"): t for name, t in pipe.unet.state_dict().items()
    }
    torch.save(old, flat / "diffusion_pytorch_model.bin")
    assert_same(convert(flat, tmp_path / "out"), pipe)
    assert_same(DDIMPipeline.from_pretrained(tmp_path / "out", use_safetensors=True), pipe)
    assert (tmp_path / "out" / "model_index.json").is_file()


# --- the command


def test_command(tmp_path: Path) -> None:
    torch.save(dict(guided_weights(heads=2)), tmp_path / "x.pt")
    options = ["--out", "out", "--heads", "2", "--steps-trained", "500", "--plain-timesteps"]
    completed = run_cli("convert", "x.pt", *options, env=os.environ, cwd=tmp_path)
    pipe = DDIMPipeline.from_pretrained(tmp_path / "out")
    summary = f"{pipe.unet.num_parameters():,} parameters, sample_size 32\n"
    assert (completed.returncode, completed.stdout) == (0, "out\n")
    *assumed, last = completed.stderr.splitlines(keepends=True)
    assert last == summary
    # Neither --heads nor --steps-trained, which were given.
    assert assumed == [
        "assumed: linear betas from 0.0002 to 0.04 (--beta-schedule, --beta-start, --beta-end)\n",
        "assumed: images of 32 pixels (--image-size)\n",
        "assumed: heads split before queries, keys and values (--new-attention-order)\n",
        "assumed: the predicted x_0 is clipped, and epsilon not recomputed from it "
        "(ddim sample --use-clipped-model-output)\n",
    ]
    assert (len(pipe.scheduler), pipe.unet.config.attention_head_dim) == (500, 32)


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(dict(ermon_weights()), "x.pt")
    command = ["convert", "x.pt", "--out", "out"]

    def run(*arguments: str) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["ddim", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code

    assert run(*command) == 0
    assert re.fullmatch(
        "ddim: out is not empty; pass --overwrite to replace a model in it, or write elsewhere", str(run(*command))
    )
    capsys.readouterr()
    assert run(*command, "--overwrite") == 0
    assert capsys.readouterr().err.endswith(" parameters, sample_size 32; 4 earlier files replaced\n")
    assert run("convert", "x.pt") == 2
    message = str(run(*command, "--dtype", "int8"))
    assert re.fullmatch("ddim: --dtype must be one of float32, bfloat16, or float16, got 'int8'", message)
