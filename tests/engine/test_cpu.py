"""The CPU engine against the network that it runs."""

from __future__ import annotations

import copy
import gc
import random
import re
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ddim.engine.cpu
from ddim import DDIMPipeline, DDIMScheduler
from ddim.diffusion.loop import StepSettings, sample
from ddim.diffusion.noise import noise_from_seeds
from ddim.engine import get_engine
from ddim.engine.base import EagerEngine, unsupported_reason
from ddim.engine.cpu import CPUEngine
from ddim.kernels import direct, norm, shipped, winograd
from ddim.training.config import read_preset
from ddim.unet import UNet2DModel
from helpers import randn


def build(**settings: Any) -> UNet2DModel:
    """A network all of whose weights matter."""
    torch.manual_seed(0)
    unet = UNet2DModel(**settings).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.3)
    return unet


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@torch.no_grad()
def compare(unet: UNet2DModel, number: int, size: tuple[int, int], timestep: Any, **labels: Any) -> float:
    sample = randn(number, unet.config.in_channels, *size)
    return distance(CPUEngine(unet).predict(sample, timestep, **labels), unet(sample, timestep, **labels).sample)


SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
RESNET = {
    "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
}


def draw_configuration(draw: random.Random, activations: list[str]) -> tuple[dict[str, Any], tuple[int, int]]:
    """Return arguments of a network, and the size of its samples."""
    levels = draw.choice([1, 2, 3])
    groups = draw.choice([1, 2, 4])
    channels = tuple(groups * draw.choice([4, 8, 12, 16, 5]) for _ in range(levels))
    changes = {
        "block_out_channels": channels,
        "norm_num_groups": groups,
        "down_block_types": draw.choices(["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"], k=levels),
        "up_block_types": draw.choices(["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"], k=levels),
        "layers_per_block": draw.choice([1, 2]),
        "in_channels": draw.choice([1, 3, 4]),
        "out_channels": draw.choice([1, 3, 16]),
        "act_fn": draw.choice(activations),
        "resnet_time_scale_shift": draw.choice(["default", "scale_shift"]),
        "attention_head_dim": draw.choice([None, 4]),
    }
    multiple = 2 ** (levels - 1)
    return changes, (multiple * draw.choice([1, 2, 3, 5]), multiple * draw.choice([1, 2, 4]))


class TestNetwork:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            RESNET,
            RESNET | {"resnet_time_scale_shift": "scale_shift"},
            {"act_fn": "gelu", "downsample_padding": 0},
            {"time_embedding_type": "fourier", "center_input_sample": True},
            {"time_embedding_type": "learned", "num_train_timesteps": 1000},
            {"mid_block_type": None, "layers_per_block": 2},
            {"mid_block_scale_factor": 1.4, "attention_head_dim": 8},
            {"add_attention": False, "downsample_type": "resnet", "upsample_type": "resnet"},
            {"block_out_channels": (12, 20), "norm_num_groups": 4},
        ],
        ids=str,
    )
    def test_equals_eager(self, changes: dict[str, Any]) -> None:
        unet = build(**SMALL | changes)
        assert compare(unet, 3, (8, 8), torch.tensor([7, 400, 999])) < 1e-5
        assert compare(unet, 1, (8, 8), 20) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            RESNET,
            {"time_embedding_type": "fourier"},
            {"time_embedding_type": "learned", "num_train_timesteps": 1000},
            {"num_class_embeds": 5},
            {"class_embed_type": "timestep"},
        ],
        ids=str,
    )
    @torch.no_grad()
    def test_half_precision_weights_compute_in_float32(self, changes: dict[str, Any], dtype: torch.dtype) -> None:
        """As the network of the same weights in float32, at a single timestep, prepared or not, and at several."""
        unet = build(**SMALL | changes).to(dtype)
        wide = copy.deepcopy(unet).float()
        engine = get_engine(unet)
        assert isinstance(engine, CPUEngine)
        labels = (torch.tensor([4, 0, 1]),) if "class" in str(changes) else ()
        if "class_embed_type" not in changes:
            engine.prepare([400], torch.tensor([0, 1, 4]) if labels else None)
        sample = randn(3, 3, 8, 8)
        for timesteps in (torch.tensor([7, 400, 999]), torch.tensor(400), torch.tensor(20)):
            expected = wide(sample, timesteps, *labels).sample
            assert distance(engine.predict(sample, timesteps, *labels), expected) < 1e-5
            rounded = engine.predict(sample.to(dtype), timesteps, *labels)
            assert rounded.dtype == dtype
            assert distance(rounded.float(), expected) < 4 * torch.finfo(dtype).eps

    def test_classes(self) -> None:
        assert (
            compare(build(**SMALL, num_class_embeds=5), 4, (8, 8), 20, class_labels=torch.tensor([0, 4, 2, 1])) < 1e-5
        )

    def test_micro_batches_do_not_change_bits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With each sample's own timestep and label."""
        unet = build(**SMALL, num_class_embeds=5)
        x, t, labels = randn(7, unet.config.in_channels, 8, 8), torch.arange(7) * 100, torch.arange(7) % 5
        engine, threads = CPUEngine(unet), torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            expected = [engine.predict(x, t, labels), engine.predict(x, 20, labels)]
            for size in (1, 3):
                monkeypatch.setattr(ddim.engine.cpu, "MICRO_BATCH_BYTES", size * 4 * unet.conv_in.out_channels * 64)
                assert torch.equal(engine.predict(x, t, labels), expected[0])
                assert torch.equal(engine.predict(x, 20, labels), expected[1])
        finally:
            torch.set_num_threads(threads)
        with torch.no_grad():
            assert distance(expected[0], unet(x, t, labels).sample) < 1e-5

    def test_random_configurations(self) -> None:
        draw = random.Random(0)
        for _ in range(40):
            changes, size = draw_configuration(draw, ["silu", "relu", "mish"])
            unet = build(**changes)
            if replaced := draw.random() < 0.1:
                unet.conv_in.register_forward_hook(lambda *_: None)
            assert (unsupported_reason(unet) is not None) == replaced
            sample, timestep = randn(draw.choice([1, 2, 5]), unet.config.in_channels, *size), draw.randrange(1, 1000)
            with torch.no_grad():
                difference = distance(get_engine(unet).predict(sample, timestep), unet(sample, timestep).sample)
            assert difference < 1e-3, (changes, size)

    @pytest.mark.parametrize(("name", "num_steps"), [("mnist", 20), ("cifar10", 4)])
    def test_full_run(self, name: str, num_steps: int) -> None:
        """To 1e-3 in every prediction, to a gray level in 99.9% of the pixels after the last step: the built-in model,
        and the architecture of the CIFAR-10 one with random weights.
        """
        if name == "mnist":
            pipe = DDIMPipeline.from_pretrained("mnist", engine="eager")
        else:
            torch.manual_seed(0)
            unet = UNet2DModel(**read_preset("cifar10")["model"]).eval()
            with torch.no_grad():
                unet.conv_out.weight.mul_(0.1)  # or x grows, and every rounding with it
            pipe = DDIMPipeline(unet, DDIMScheduler(), engine="eager")
        fast = DDIMPipeline(pipe.unet, pipe.scheduler)
        for one in (pipe, fast):
            one.set_progress_bar_config(disable=True)
        engine = get_engine(pipe.unet)
        steps, seen = pipe.scheduler.make_steps(pipe.scheduler.make_timesteps(num_steps)), []
        number = 4 if name == "mnist" else 1

        def compare_predictions(x: Tensor, t: Tensor) -> Tensor:
            expected = pipe.unet(x, t).sample
            seen.append(distance(engine.predict(x, t), expected))
            return expected

        with torch.no_grad():
            start = noise_from_seeds((number, *pipe.sample_shape), range(number), torch.device("cpu"))()
            *_, last = sample(compare_predictions, start, steps, StepSettings(clip=pipe.scheduler.clip))
        assert len(seen) == num_steps
        assert max(seen) < 1e-3
        images = (last.sample / 2 + 0.5).clamp(0, 1)
        actual = fast(seeds=range(number), num_inference_steps=num_steps, output_type="pt").images
        assert ((actual - images).abs() <= 1 / 255).double().mean() > 0.999

    def test_raises_as_the_network(self) -> None:
        unet = build(**SMALL)
        engine = CPUEngine(unet)
        with pytest.raises(ValueError, match="sample: expected shape"):
            engine.predict(randn(1, 4, 8, 8), 3)
        with pytest.raises(ValueError, match="got 2 for 3 samples"):
            engine.predict(randn(3, 3, 8, 8), torch.tensor([3, 4]))

    def test_callers_in_parallel(self) -> None:
        unet = build(**SMALL)
        engine = CPUEngine(unet)
        samples = [randn(2, 3, 8, 8, seed=seed) for seed in range(12)]
        expected = [engine.predict(sample, 5) for sample in samples]
        with ThreadPoolExecutor(4) as pool:
            for actual, alone in zip(
                pool.map(lambda sample: engine.predict(sample, 5), samples), expected, strict=True
            ):
                assert torch.equal(actual, alone)


class TestGetEngine:
    @staticmethod
    def check(unet: UNet2DModel) -> None:
        sample = randn(2, 3, 8, 8)
        with torch.no_grad():
            assert distance(get_engine(unet).predict(sample, 9), unet(sample, 9).sample) < 1e-5

    def test_engine_is_built_once(self) -> None:
        unet = build(**SMALL)
        engine = get_engine(unet)
        assert isinstance(engine, CPUEngine)
        assert engine.name == "CPUEngine"
        assert get_engine(unet) is engine
        eager = get_engine(unet, "eager")
        assert isinstance(eager, EagerEngine)
        assert eager.unet is unet
        assert eager.name == "UNet2DModel"
        with pytest.raises(ValueError, match="engine must be one of auto, eager, or compile, got 'fast'"):
            get_engine(unet, "fast")

    @pytest.mark.parametrize(
        "change",
        [
            lambda unet: unet.load_state_dict({k: v * 1.1 for k, v in unet.state_dict().items()}),
            lambda unet: unet.conv_out.weight.data.mul_(-1),
            lambda unet: unet.mid_block.resnets[0].conv1.bias.data[3:4].add_(1e-3),
            lambda unet: setattr(unet.conv_in, "weight", nn.Parameter(unet.conv_in.weight.flip(0))),
            lambda unet: torch.optim.SGD(unet.parameters(), 0.1).step(),
            lambda unet: unet.to(memory_format=torch.channels_last),
        ],
    )
    def test_changed_weights_rebuild_the_engine(self, change: Callable[[UNet2DModel], Any]) -> None:
        unet = build(**SMALL)
        unet(randn(1, 3, 8, 8), 3).sample.sum().backward()
        self.check(unet)
        with torch.no_grad():
            change(unet)
        self.check(unet)

    def test_unsupported_dtype_falls_back(self) -> None:
        unet = build(**SMALL)
        self.check(unet)
        unet.to(torch.float64)
        assert isinstance(get_engine(unet), EagerEngine)
        unet.to(torch.float32)
        self.check(unet)

    def test_training_is_not_affected(self) -> None:
        """Gradients and parameters are as they are without it, also after sampling in between."""
        unet = build(**SMALL).train()
        pipe = DDIMPipeline(unet, DDIMScheduler())
        pipe.set_progress_bar_config(disable=True)
        before = {name: parameter.clone() for name, parameter in unet.named_parameters()}
        pipe(num_inference_steps=2)
        assert unet.training
        unet(randn(1, 3, 8, 8), 3).sample.sum().backward()
        assert all(parameter.grad is not None for parameter in unet.parameters())
        assert all(torch.equal(parameter, before[name]) for name, parameter in unet.named_parameters())

    def test_engine_is_deleted_with_the_network(self) -> None:
        unet = build(**SMALL)
        reference = weakref.ref(get_engine(unet))
        del unet
        gc.collect()
        assert reference() is None

    def test_prepared_timesteps_do_not_change_predictions(self) -> None:
        unet, sample = build(**SMALL), randn(2, 3, 8, 8)
        engine = CPUEngine(unet)
        alone = [engine.predict(sample, t) for t in (9, 500)]
        engine.prepare([500, 250, 9])
        for t, expected in zip((9, 500), alone, strict=True):
            assert distance(engine.predict(sample, torch.tensor(t)), expected) < 1e-5
        assert distance(engine.predict(sample, torch.tensor([9, 500]))[:1], alone[0][:1]) < 1e-5
        assert distance(engine.predict(sample, 7), unet(sample, 7).sample) < 1e-5

    def test_runs_before_do_not_change_predictions(self) -> None:
        unet, sample = build(**SMALL), randn(2, 3, 8, 8)
        expected = CPUEngine(unet).predict(sample, 500)
        engine = CPUEngine(unet)
        for timesteps in ([500, 0], [750, 500, 250, 0], list(range(1000)), [0, 500], [500], [7]):
            engine.prepare(timesteps)
            assert torch.equal(engine.predict(sample, torch.tensor(500)), expected)

    @pytest.mark.parametrize("num_threads", [1, 2])
    def test_other_samples_do_not_change_predictions(self, num_threads: int) -> None:
        """Not a bit, whatever the network; with classes and timesteps in other batches and runs too."""
        draw, threads = random.Random(0), torch.get_num_threads()
        try:
            torch.set_num_threads(num_threads)
            num_invariant = 0
            for _ in range(50):
                changes, size = draw_configuration(draw, ["silu"])
                channels = [draw.choice([16, 32, 48]) for _ in changes["block_out_channels"]]
                changes |= {"block_out_channels": channels, "attention_head_dim": draw.choice([None, 16])}
                classes = draw.choice([{}, {"num_class_embeds": 5}])
                unet = build(**changes, **classes, sample_size=size)
                engine = CPUEngine(unet)
                if not engine.is_batch_invariant:
                    continue
                num_invariant += 1
                sample = randn(9, unet.config.in_channels, *size)
                labels = torch.arange(9) % 5 if classes else None
                alone = engine.predict(sample, 20, labels)
                engine.prepare([700, 20], None if labels is None else torch.arange(5))
                expected = engine.predict(sample, torch.tensor(20), labels)
                assert torch.equal(expected, alone), (changes, size)
                for timesteps in ([20] * 9, [20, 700] * 4 + [20], [20, 3] * 4 + [20]):
                    mixed = engine.predict(sample, torch.tensor(timesteps), labels)
                    assert torch.equal(mixed[::2], expected[::2]), (changes, size)
                for rows in ([0], [8], [4, 2], [7, 1, 5], list(range(8))):
                    some = None if labels is None else labels[rows]
                    engine.prepare([20, 5], None if some is None else some.unique())
                    assert torch.equal(engine.predict(sample[rows], torch.tensor(20), some), expected[rows]), changes
            assert num_invariant >= 5
        finally:
            torch.set_num_threads(threads)

    def test_what_rounds_by_the_batch_is_known(self) -> None:
        """Other activations, attention of blocks that are not aligned, samples of any size."""
        attention = {"attention_head_dim": 16, "block_out_channels": (16, 32), "norm_num_groups": 4}
        assert CPUEngine(build(**SMALL | attention)).is_batch_invariant
        for changes in ({"act_fn": "mish"}, {"attention_head_dim": 8}, {"sample_size": (10, 4)}, {"sample_size": None}):
            assert not CPUEngine(build(**SMALL | attention | changes)).is_batch_invariant

    @pytest.mark.parametrize("name", ["mnist", "mnist-labels", "faces", "cifar10"])
    def test_common_networks_are_batch_invariant(self, name: str) -> None:
        if name == "cifar10":
            torch.manual_seed(0)
            unet = UNet2DModel(**read_preset(name)["model"]).eval()
        else:
            unet = DDIMPipeline.from_pretrained(name).unet
        engine = CPUEngine(unet)
        assert engine.is_batch_invariant
        x = randn(3, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        labels = None if unet.class_embedding is None else torch.tensor([3, 10, 3])
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            expected = engine.predict(x, 500, labels)
            for row in range(3):
                one = slice(row, row + 1)
                assert torch.equal(engine.predict(x[one], 500, None if labels is None else labels[one]), expected[one])
        finally:
            torch.set_num_threads(threads)

    def test_many_classes_are_predicted_as_by_a_new_engine(self) -> None:
        """Of a run with too many pairs of timesteps and classes to prepare, after one that was prepared."""
        unet, sample = build(**SMALL, num_class_embeds=5), randn(2, 3, 8, 8)
        labels = torch.tensor([0, 1])
        expected = CPUEngine(unet).predict(sample, 500, labels)
        engine = CPUEngine(unet)
        engine.prepare([750, 500, 250, 0], torch.arange(5))
        engine.prepare(range(1000), torch.arange(5))
        assert torch.equal(engine.predict(sample, 500, labels), expected)

    def test_without_numba(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        """No compiler and an empty cache: the network runs as it is, which the log reports."""
        monkeypatch.setattr(shipped, "find", lambda symbol: None)
        monkeypatch.setitem(sys.modules, "numba", None)
        monkeypatch.setenv("DDIM_KERNEL_CACHE", str(tmp_path))
        monkeypatch.setattr(sys, "executable", "")  # other processes could compile
        for module in [name for name in sys.modules if re.match(r"ddim\.kernels\.(\w+\.source|compiler)", name)]:
            monkeypatch.delitem(sys.modules, module)
        for kernel in (norm.NORMALIZE, *winograd.KERNELS, direct.CONVOLVE):
            vars(kernel).pop("address", None)
        unet = build(**SMALL)
        with caplog.at_level("DEBUG", "ddim.engine"):
            assert isinstance(get_engine(unet), EagerEngine)
        assert "numba" in caplog.text
