"""The training loop against the equations in float64, computed from the inputs that the network received; options that
must not change the result; initialization, and stopping.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import signal
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddim.data.dataset import CachedImageDataset
from ddim.outputs import UNet2DOutput
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.training import trainer as trainer_module
from ddim.training.checkpoint import load_checkpoint, load_newest
from ddim.training.config import TrainConfig
from ddim.training.progress import Progress, StepMetrics, TrainingStopped
from ddim.training.repeats import RepeatedBatches
from ddim.training.trainer import Trainer
from ddim.unet import UNet2DModel
from digits import TINY_MODEL
from helpers import ALPHAS, same_tensors
from programs import run_python

MakeConfig = Callable[..., TrainConfig]
CPU = torch.device("cpu")
DROPOUT = {"dropout": 0.3}


def as_samples(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def start(config: TrainConfig, images: Tensor, out: Path) -> Trainer:
    return Trainer(config, CachedImageDataset(images), out, CPU)


@dataclass
class Trace:
    """Inputs and outputs of the network in a run, and its weights."""

    noisy: list[Tensor] = field(default_factory=list)
    timesteps: list[Tensor] = field(default_factory=list)
    predicted: list[Tensor] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    averages: list[dict[str, Tensor]] = field(default_factory=list)
    moments: list[dict[str, Tensor]] = field(default_factory=list)
    metrics: list[StepMetrics] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)


def run(
    config: TrainConfig, images: Tensor, out: Path, prepare: Callable[[Trainer], None] | None = None
) -> tuple[Trainer, Trace]:
    """Train to the end; `weights` starts with those before the first step."""
    trainer, trace = start(config, images, out), Trace()

    def record(module: nn.Module, arguments: tuple[Any, ...], output: UNet2DOutput) -> None:
        if module.training and torch.is_grad_enabled():
            trace.noisy.append(arguments[0].detach().clone())
            trace.timesteps.append(arguments[1].clone())
            trace.predicted.append(output.sample.detach().clone())

    def after_step(progress: Progress) -> None:
        assert progress.step == len(trace.metrics) + 1 == trainer.step
        trace.metrics.append(progress.pending_metrics[-1])
        trace.weights.append(copy.deepcopy(trainer.model.state_dict()))
        trace.gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
        trace.averages.append(copy.deepcopy(trainer.ema.state_dict()))
        state = trainer.optimizer.state_dict()["state"]
        trace.moments.append({f"{i}.{key}": value.clone() for i, of in state.items() for key, value in of.items()})
        trace.scales.append(trainer.grad_scaler.get_scale())

    trainer.model.register_forward_hook(record)
    trace.weights.append(copy.deepcopy(trainer.model.state_dict()))
    if prepare is not None:
        prepare(trainer)
    assert trainer.train(after_step)
    return trainer, trace


def alpha_in(trace: Trace, step: int) -> Tensor:
    return torch.from_numpy(ALPHAS)[trace.timesteps[step]].reshape(-1, 1, 1, 1)


def noise_in(trace: Trace, step: int, x0: Tensor) -> Tensor:
    """The epsilon of equation (4) that leads from x_0 to the network's input; float64."""
    alpha = alpha_in(trace, step)
    return (trace.noisy[step].double() - alpha.sqrt() * x0) / (1 - alpha).sqrt()


def target_in(trace: Trace, step: int, x0: Tensor, prediction_type: str) -> Tensor:
    alpha, epsilon = alpha_in(trace, step), noise_in(trace, step, x0)
    return {
        "epsilon": epsilon,
        "sample": x0.expand_as(epsilon),
        "v_prediction": alpha.sqrt() * epsilon - (1 - alpha).sqrt() * x0,
    }[prediction_type]


# --- a step


# Gradients are clipped alike whatever is predicted.
@pytest.mark.parametrize(
    ("prediction_type", "grad_clip"), [("epsilon", 0.02), ("epsilon", 1e3), ("sample", 1e3), ("v_prediction", 0.02)]
)
def test_loss_and_gradient_match_ddpm(
    make_config: MakeConfig, images: Tensor, tmp_path: Path, prediction_type: str, grad_clip: float
) -> None:
    # With a single image x_0 is known, and epsilon follows from the network's input.
    config = make_config(
        max_steps=4,
        model=TINY_MODEL,
        scheduler={"prediction_type": prediction_type},
        optim={"warmup_steps": 0, "grad_clip": grad_clip},
    )
    x0 = as_samples(images[:1]).double()
    _, trace = run(config, images[:1], tmp_path)
    for step in (0, 3):
        target = target_in(trace, step, x0, prediction_type)
        network = UNet2DModel(**TINY_MODEL).double()
        network.load_state_dict({name: tensor.double() for name, tensor in trace.weights[step].items()})
        loss = (target - network(trace.noisy[step].double(), trace.timesteps[step]).sample).square().mean()
        loss.backward()
        gradient = {name: p.grad for name, p in network.named_parameters()}
        norm = float(torch.cat([g.flatten() for g in gradient.values()]).norm())

        assert trace.metrics[step].loss == pytest.approx(float(loss.detach()), rel=1e-4)
        assert trace.metrics[step].grad_norm == pytest.approx(norm, rel=1e-3)
        assert (norm > grad_clip) == (grad_clip < 1)
        scale = min(1.0, grad_clip / norm)
        for name, got in trace.gradients[step].items():
            torch.testing.assert_close(got.double(), gradient[name] * scale, rtol=1e-2, atol=1e-4 * norm * scale)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("weighting", ["simple", "min_snr", "truncated_snr"])
def test_loss_is_weighted_and_quartiles_are_not(
    make_config: MakeConfig, images: Tensor, tmp_path: Path, prediction_type: str, weighting: str
) -> None:
    config = make_config(
        max_steps=3,
        batch_size=16,
        scheduler={"prediction_type": prediction_type},
        objective={"weighting": weighting, "gamma": 2.0},
        optim={"accumulate": 2},
    )
    x0 = as_samples(images[:1]).double()
    _, trace = run(config, images[:1], tmp_path)
    snr = ALPHAS / (1 - ALPHAS)
    # Of the error of x_0; an error of epsilon is SNR times, one of v SNR + 1 times that.
    weights = {"simple": None, "min_snr": np.minimum(snr, 2.0), "truncated_snr": np.maximum(snr, 1.0)}[weighting]
    if weights is not None:
        weights = weights / {"epsilon": snr, "sample": 1, "v_prediction": snr + 1}[prediction_type]
    for step, metrics in enumerate(trace.metrics):
        # Two passes per step, each over a part of the batch.
        timesteps = torch.cat(trace.timesteps[2 * step : 2 * step + 2]).numpy()
        errors = [
            (trace.predicted[i].double() - target_in(trace, i, x0, prediction_type)).square().mean((1, 2, 3)).numpy()
            for i in (2 * step, 2 * step + 1)
        ]
        error = np.concatenate(errors)
        weighted = error if weights is None else weights[timesteps] * error
        assert metrics.loss == pytest.approx(weighted.mean(), rel=1e-4)
        for quarter in range(4):
            member = (timesteps >= 250 * quarter) & (timesteps < 250 * (quarter + 1))
            assert metrics.quartile_counts[quarter] == member.sum()
            assert metrics.quartile_sums[quarter] == pytest.approx(error[member].sum(), rel=1e-4)
        assert sum(metrics.quartile_counts) == 16


@pytest.mark.parametrize("antithetic", [True, False])
def test_noise_is_gaussian_and_timesteps_are_antithetic(
    make_config: MakeConfig, images: Tensor, tmp_path: Path, antithetic: bool
) -> None:
    _, trace = run(make_config(objective={"antithetic": antithetic}), images[:1], tmp_path)
    x0 = as_samples(images[:1]).double()
    noise = torch.stack([noise_in(trace, step, x0) for step in range(12)])
    # 6144 numbers: four standard deviations of their mean and variance.
    assert abs(float(noise.mean())) < 0.051
    assert abs(float(noise.var()) - 1) < 0.072
    assert len(torch.unique(noise.flatten(2)[..., 0])) == noise.shape[0] * noise.shape[1]
    for timesteps in trace.timesteps:
        assert timesteps.dtype == torch.int64
        assert bool(((timesteps >= 0) & (timesteps < 1000)).all())
        assert torch.equal(timesteps[5:], 999 - timesteps[:3]) == antithetic
    assert len({tuple(timesteps.tolist()) for timesteps in trace.timesteps}) == 12
    # Of 96 draws, or 60, from 1000, few are equal.
    assert len(torch.unique(torch.cat(trace.timesteps))) > 80


@pytest.mark.parametrize("flip", [False, True])
def test_horizontal_flip(make_config: MakeConfig, images: Tensor, tmp_path: Path, flip: bool) -> None:
    # With almost no noise, the network's input is the image.
    config = make_config(data={"horizontal_flip": flip}, scheduler={"beta_start": 1e-9, "beta_end": 1e-9})
    _, trace = run(config, images[:1], tmp_path)
    x0, noisy = as_samples(images[:1]), torch.cat(trace.noisy)
    as_it_is, mirrored = ((noisy - x).abs().amax((1, 2, 3)) < 0.02 for x in (x0, x0.flip(3)))
    assert bool((as_it_is ^ mirrored).all())
    # Of 96, half: four standard deviations are 20.
    assert abs(int(mirrored.sum()) - 48) < 20 if flip else not mirrored.any()


def test_held_out_images_are_not_trained_on(make_config: MakeConfig, images: Tensor, tmp_path: Path) -> None:
    config = make_config(data={"holdout": 30}, scheduler={"beta_start": 1e-9, "beta_end": 1e-9}, max_steps=5)
    trainer, trace = run(config, images, tmp_path)
    distances = torch.cdist(torch.cat(trace.noisy).flatten(1), as_samples(images).flatten(1))
    shown = set(distances.argmin(1).tolist())
    assert bool((distances.min(1).values < 0.1).all())
    assert len(trainer.held_out) == 30
    assert shown == set(range(40)) - set(trainer.held_out.tolist())


@pytest.mark.parametrize(
    ("optim", "shape"),
    [
        ({"decay": "constant"}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
        ({"decay": "linear", "decay_steps": 3}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 2 / 3, 1 / 3]),
        ({"decay": "linear", "weight_decay": 0.1}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ({"decay": "cosine", "decay_steps": 3}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 3 / 4, 1 / 4]),
    ],
)
def test_weights_follow_adamw_with_warmup_and_decay(
    make_config: MakeConfig, images: Tensor, tmp_path: Path, optim: dict[str, Any], shape: list[float]
) -> None:
    config = make_config(max_steps=8, optim={"betas": [0.8, 0.99], **optim})
    _, trace = run(config, images, tmp_path)
    weight_decay = optim.get("weight_decay", 0)
    for name, first in trace.weights[0].items():
        weight, m, v = first.double(), torch.zeros(()), torch.zeros(())
        for n, (gradients, part) in enumerate(zip(trace.gradients, shape, strict=True), start=1):
            gradient, rate = gradients[name].double(), 2e-3 * part
            m, v = 0.8 * m + 0.2 * gradient, 0.99 * v + 0.01 * gradient**2
            weight = weight * (1 - rate * weight_decay)
            weight = weight - rate * (m / (1 - 0.8**n)) / ((v / (1 - 0.99**n)).sqrt() + 1e-8)
            torch.testing.assert_close(trace.weights[n][name].double(), weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("decay", "warmup"), [(0.0, True), (0.5, True), (0.9999, True), (0.9, False)])
def test_average_follows_its_recursion(
    make_config: MakeConfig, images: Tensor, tmp_path: Path, decay: float, warmup: bool
) -> None:
    config = make_config(optim={"warmup_steps": 0}, ema={"decay": decay, "warmup": warmup})
    trainer, trace = run(config, images, tmp_path)
    assert isinstance(trainer.ema, UNet2DModel)
    assert not trainer.ema.training
    assert not any(p.requires_grad for p in trainer.ema.parameters())
    for name, first in trace.weights[1].items():
        average = first.double()
        for n in range(1, 12):
            d = min(decay, (1 + n) / (10 + n)) if warmup else decay
            average = d * average + (1 - d) * trace.weights[n + 1][name].double()
            torch.testing.assert_close(trace.averages[n][name].double(), average, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def default_run(
    make_config: MakeConfig, images: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trainer, Trace]:
    """The default configuration, trained to its end; read-only."""
    return run(make_config(), images, tmp_path_factory.mktemp("default"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_keeps_weights_in_float32(
    make_config: MakeConfig, images: Tensor, tmp_path: Path, default_run: tuple[Trainer, Trace], precision: str
) -> None:
    _, exact = default_run
    trainer, rough = run(make_config(precision=precision), images, tmp_path / precision)
    for network in (trainer.model, trainer.ema):
        assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}
    assert {tensor.dtype for tensor in rough.predicted} == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    for step, (a, b) in enumerate(zip(exact.metrics, rough.metrics, strict=True)):
        assert a.loss != b.loss or step == 0
        assert a.loss == pytest.approx(b.loss, rel=0.05)
        assert not math.isfinite(b.grad_norm) or a.grad_norm == pytest.approx(b.grad_norm, rel=0.2)


def test_network_starts_at_zero(make_config: MakeConfig, images: Tensor, tmp_path: Path) -> None:
    trainer = start(make_config(), images, tmp_path)
    for network in (trainer.model, trainer.ema):
        assert not network(torch.randn(2, 1, 8, 8), torch.tensor([3, 900])).sample.any()
    assert not list(tmp_path.iterdir())


def test_seed_decides_everything(make_config: MakeConfig, images: Tensor, tmp_path: Path) -> None:
    def metrics(name: str, **entries: Any) -> list[StepMetrics]:
        torch.seed()  # whatever state the program is in
        config = make_config(max_steps=3, model=DROPOUT, **entries)
        return run(config, images, tmp_path / name)[1].metrics

    assert metrics("a") == metrics("b") != metrics("c", seed=1)


def test_take_step_matches_train(make_config: MakeConfig, images: Tensor, tmp_path: Path) -> None:
    config = make_config(max_steps=3, model=DROPOUT)
    whole, trace = run(config, images, tmp_path / "whole")
    trainer = start(config, images, tmp_path / "steps")
    assert [trainer.take_step() for _ in range(3)] == trace.metrics
    assert trainer.step == 3
    assert trainer.pending_metrics == []
    assert same_tensors(trainer.model.state_dict(), whole.model.state_dict())
    assert same_tensors(trainer.ema.state_dict(), whole.ema.state_dict())
    assert not (tmp_path / "steps").exists()
    break_loss(trainer, 3)
    with pytest.raises(TrainingStopped, match=r"in step 4 at learning rate .*; last checkpoint: none; "):
        trainer.take_step()


# --- ways to compute the same


def restored(make_config: MakeConfig, images: Tensor, out: Path, **entries: Any) -> Trainer:
    """A trainer restored after five steps of the default configuration."""
    if not out.exists():
        run(make_config(max_steps=5, model=entries.get("model", {})), images, out)
    trainer = start(make_config(**entries), images, out)
    checkpoint = load_newest(out / "checkpoints")
    assert checkpoint is not None
    trainer.restore(checkpoint)
    return trainer


@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
def test_accumulated_gradients_match_one_pass(
    make_config: MakeConfig, images: Tensor, tmp_path: Path, weighting: str
) -> None:
    entries = {"objective": {"weighting": weighting}}
    whole = restored(make_config, images, tmp_path / "run", **entries)
    calls: list[int] = []
    for passes in (2, 4, 8):
        parts = restored(make_config, images, tmp_path / "run", optim={"accumulate": passes}, **entries)
        parts.model.register_forward_pre_hook(lambda module, arguments: calls.append(len(arguments[0])))
        if passes == 2:
            expected = whole.take_step()
        metrics = parts.take_step()
        assert metrics.loss == pytest.approx(expected.loss, rel=1e-6)
        assert metrics.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert metrics.quartile_counts == expected.quartile_counts
        for expected_weight, weight in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
            torch.testing.assert_close(weight.grad, expected_weight.grad, rtol=1e-5, atol=1e-6)
    assert calls == [4] * 2 + [2] * 4 + [1] * 8


@pytest.mark.parametrize(
    ("entries", "dropout", "rounding"),
    # Dropout draws its mask in the order of memory: layouts are compared without.
    [({"gradient_checkpointing": True}, 0.3, 0.0), ({"channels_last": False}, 0.0, 1e-5)],
)
def test_memory_layout_and_gradient_checkpointing_match(
    make_config: MakeConfig,
    images: Tensor,
    tmp_path: Path,
    entries: dict[str, bool],
    dropout: float,
    rounding: float,
) -> None:
    # AdamW with a small eps makes large steps of small gradients, rounding and all.
    common = {"model": {"dropout": dropout}, "optim": {"eps": 0.1, "lr": 0.02}, "max_steps": 8}
    _, plain = run(make_config(**common), images, tmp_path / "plain")
    calls: list[nn.Module] = []

    def metrics(trainer: Trainer) -> None:
        block = trainer.model.down_blocks[0].resnets[0]
        block.register_forward_pre_hook(lambda module, arguments: calls.append(module))
        last = block.conv1.weight.is_contiguous(memory_format=torch.channels_last)
        assert last == trainer.config.channels_last
        assert not trainer.ema.gradient_checkpointing

    trainer, other = run(make_config(**common, **entries), images, tmp_path / "other", metrics)
    # The backward pass computes residual blocks a second time.
    assert len(calls) == (16 if trainer.config.gradient_checkpointing else 8)
    for a, b in zip(plain.metrics, other.metrics, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=rounding)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=10 * rounding)


# --- loss scaling


def test_infinite_fp16_gradients_skip_a_step_and_halve_the_scale(
    make_config: MakeConfig, images: Tensor, tmp_path: Path
) -> None:
    config = make_config(precision="fp16", checkpoints={"every": 7}, ema={"decay": 0.0})
    trainer, trace = run(config, images, tmp_path, lambda trainer: break_gradient(trainer, 5))
    skipped = [not math.isfinite(metrics.grad_norm) for metrics in trace.metrics]
    assert skipped[5]
    assert not all(skipped)
    scale = 65536.0
    for step, skip in enumerate(skipped):
        scale = scale / 2 if skip else scale
        assert trace.scales[step] == scale
        assert same_tensors(trace.weights[step], trace.weights[step + 1]) == skip
        if skip and step:
            assert same_tensors(trace.moments[step - 1], trace.moments[step])
        assert math.isfinite(trace.metrics[step].loss)
    assert all(bool(tensor.isfinite().all()) for tensor in trainer.ema.state_dict().values())

    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "step-00000007")
    resumed = start(config, images, tmp_path / "other")
    resumed.restore(checkpoint)
    assert resumed.grad_scaler.get_scale() == trace.scales[6] != 65536.0
    assert resumed.grad_scaler.state_dict()["_growth_tracker"] == 1
    resumed.train(lambda progress: None)
    assert same_tensors(resumed.model.state_dict(), trainer.model.state_dict())
    assert resumed.grad_scaler.state_dict() == trainer.grad_scaler.state_dict()


# --- initialization and restoring


def saved_model(config: TrainConfig, folder: Path, **changes: Any) -> UNet2DModel:
    torch.manual_seed(3)
    network = UNet2DModel(**config.model | changes)
    DDIMPipeline(network, DDIMScheduler()).save_pretrained(folder)
    return network


def test_init_weights_are_loaded(make_config: MakeConfig, images: Tensor, tmp_path: Path) -> None:
    network = saved_model(make_config(), tmp_path / "saved")
    trainer = start(make_config(init=str(tmp_path / "saved")), images, tmp_path / "run")
    assert same_tensors(trainer.model.state_dict(), network.state_dict())
    assert same_tensors(trainer.ema.state_dict(), network.state_dict())
    assert trainer.step == 0


@pytest.mark.parametrize("changes", [TINY_MODEL, {"layers_per_block": 2}])
def test_init_of_another_model_raises(
    make_config: MakeConfig, images: Tensor, tmp_path: Path, changes: dict[str, Any]
) -> None:
    saved_model(make_config(), tmp_path / "saved", **changes)
    with pytest.raises(ValueError, match=r"^init: the weights of .*saved do not fit the model: \S.*$") as caught:
        start(make_config(init=str(tmp_path / "saved")), images, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_missing_init_raises(make_config: MakeConfig, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the model '.*/missing' does not exist"):
        start(make_config(init=str(tmp_path / "missing")), images, tmp_path / "run")


def test_restored_run_equals_uninterrupted_run(make_config: MakeConfig, images: Tensor, tmp_path: Path) -> None:
    config = make_config(model=DROPOUT, data={"horizontal_flip": True}, checkpoints={"every": 5, "keep": 3})
    whole, trace = run(config, images, tmp_path / "whole")
    resumed = start(config, images, tmp_path / "resumed")
    resumed.restore(load_checkpoint(tmp_path / "whole" / "checkpoints" / "step-00000005"))
    assert (resumed.step, resumed.pending_metrics) == (5, trace.metrics[:5])
    assert resumed.seconds > 0
    assert resumed.train(lambda progress: None)
    assert resumed.pending_metrics == trace.metrics
    assert same_tensors(resumed.model.state_dict(), whole.model.state_dict())
    assert same_tensors(resumed.ema.state_dict(), whole.ema.state_dict())
    a, b = (trainer.optimizer.state_dict()["state"] for trainer in (resumed, whole))
    assert a.keys() == b.keys()
    assert all(same_tensors(a[index], b[index]) for index in a)


def test_repeated_batches_are_visited_again_and_their_targets_computed_once(
    make_config: MakeConfig, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "RepeatedBatches", functools.partial(RepeatedBatches, window=3))
    config = make_config(max_steps=12, distill={"repeats": 2}, checkpoints={"every": 4, "keep": 3})
    computed: list[Tensor] = []

    def count(trainer: Trainer) -> None:
        compute = trainer.objective.target

        def target(x0: Tensor, noise: Tensor, timesteps: Tensor, *rest: Any) -> Tensor:
            computed.append(noise)
            return compute(x0, noise, timesteps, *rest)

        monkeypatch.setattr(trainer.objective, "target", target)

    whole, trace = run(config, images, tmp_path / "whole", count)
    # Steps with the same input, and no others.
    groups = {step: [k for k in range(12) if torch.equal(trace.noisy[k], trace.noisy[step])] for step in range(12)}
    assert groups == {step: [step // 6 * 6 + step % 3 + visit for visit in (0, 3)] for step in range(12)}
    assert len(computed) == 6
    assert not whole._repeated._targets

    # In the middle of a window, without what was kept.
    resumed = start(config, images, tmp_path / "resumed")
    resumed.restore(load_checkpoint(tmp_path / "whole" / "checkpoints" / "step-00000004"))
    assert resumed.train(lambda progress: None)
    assert same_tensors(resumed.model.state_dict(), whole.model.state_dict())


def test_checkpoint_of_another_model_raises(make_config: MakeConfig, images: Tensor, tmp_path: Path) -> None:
    run(make_config(max_steps=1), images, tmp_path)
    checkpoint = load_newest(tmp_path / "checkpoints")
    assert checkpoint is not None
    other = start(make_config(model={"layers_per_block": 2}), images, tmp_path)
    with pytest.raises(ValueError, match=r"^the checkpoint is of another model: \S.*$"):
        other.restore(checkpoint)


def test_run_beyond_max_steps_is_complete(make_config: MakeConfig, images: Tensor, tmp_path: Path) -> None:
    trainer = restored(make_config, images, tmp_path / "run", max_steps=3)
    before = copy.deepcopy(trainer.model.state_dict())
    assert trainer.train(lambda progress: pytest.fail("no step is left"))
    assert trainer.step == 5
    assert same_tensors(trainer.model.state_dict(), before)


# --- invalid configurations


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model": TINY_MODEL | {"sample_size": 9}}, r"multiples of 2, got \(1, 1, 9, 9\)"),
        (
            {"model": TINY_MODEL | {"block_out_channels": [8, 18]}},
            r"block_out_channels must be multiples of .*, got 18",
        ),
    ],
)
def test_unsuitable_configuration_raises_before_writing(
    make_config: MakeConfig, images: Tensor, tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    config = make_config(**entries)
    size = config.model["sample_size"]
    with pytest.raises((ValueError, TypeError), match=message):
        start(config, images.new_zeros(4, 1, size, size), tmp_path)
    assert not list(tmp_path.iterdir())


def test_indivisible_batch_raises(make_config: MakeConfig, images: Tensor, tmp_path: Path) -> None:
    processes = types.SimpleNamespace(num_processes=3, process_index=0)
    message = r"batch_size must be a multiple of 12 \(processes: 3, optim\.accumulate: 4\), got 8"
    with pytest.raises(ValueError, match=message):
        Trainer(make_config(optim={"accumulate": 4}), CachedImageDataset(images), tmp_path, CPU, processes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model": {"hue": 3}}, r"model\.hue: is not an entry"),
        ({"scheduler": {"beta_schedule": "steep"}}, "beta_schedule must be one of .*, got 'steep'"),
        ({"scheduler": {"prediction_type": "noise"}}, "prediction_type must be one of .*, got 'noise'"),
        ({"scheduler": {"betas": 3}}, r"scheduler\.betas: is not an entry"),
    ],
)
def test_entries_of_networks_and_schedulers_are_checked_with_the_others(
    make_config: MakeConfig, entries: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**entries)


# --- non-finite losses


def break_loss(trainer: Trainer, step: int) -> None:
    def make_nan(module: nn.Module, arguments: tuple[Any, ...], output: UNet2DOutput) -> UNet2DOutput | None:
        return UNet2DOutput(output.sample * float("nan")) if trainer.step == step else None

    trainer.model.register_forward_hook(make_nan)


def break_gradient(trainer: Trainer, step: int) -> None:
    trainer.model.conv_in.bias.register_hook(lambda g: g * float("inf") if trainer.step == step else g)


@pytest.mark.parametrize(
    ("break_step", "precision", "named"),
    [
        (break_loss, "fp32", "loss nan or "),
        (break_gradient, "fp32", "gradient norm (nan|inf)"),
        (break_loss, "fp16", "loss nan or "),
    ],
)
def test_non_finite_loss_stops_before_saving(
    make_config: MakeConfig,
    images: Tensor,
    tmp_path: Path,
    break_step: Callable[[Trainer, int], None],
    precision: str,
    named: str,
) -> None:
    config = make_config(max_steps=7, checkpoints={"every": 1, "keep": 1}, precision=precision)
    trainer = start(config, images, tmp_path)
    break_step(trainer, 5)
    steps: list[int] = []
    message = (
        rf"{named}.* is not finite in step 6 at learning rate 0\.002; "
        r"last checkpoint: \S*/checkpoints/step-00000005; "
        r"delete \S*/checkpoints and start the run again with a lower optim\.lr$"
    )
    with pytest.raises(TrainingStopped, match=message):
        trainer.train(lambda progress: steps.append(progress.step))
    assert steps == [1, 2, 3, 4, 5]
    assert all(bool(tensor.isfinite().all()) for tensor in trainer.ema.state_dict().values())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]

    resumed = start(config, images, tmp_path)
    resumed.restore(load_checkpoint(tmp_path / "checkpoints" / "step-00000005"))
    resumed.train(lambda progress: None)
    whole, _ = run(make_config(max_steps=7, precision=precision), images, tmp_path / "whole")
    assert same_tensors(whole.ema.state_dict(), resumed.ema.state_dict())


def test_excessive_learning_rate_stops(make_config: MakeConfig, images: Tensor, tmp_path: Path) -> None:
    trainer = start(make_config(optim={"lr": 1e30, "warmup_steps": 0}), images, tmp_path)
    with pytest.raises(TrainingStopped, match=r"in step \d+ at learning rate 1e\+30; last checkpoint: none; "):
        trainer.train(lambda progress: None)
    assert load_newest(tmp_path / "checkpoints") is None


# --- time and signals


def test_time_limit_stops_with_a_checkpoint(
    make_config: MakeConfig, images: Tensor, tmp_path: Path, default_run: tuple[Trainer, Trace]
) -> None:
    whole, trace = default_run
    steps: list[int] = []
    trainer = start(make_config(), images, tmp_path / "run")
    assert not trainer.train(lambda progress: steps.append(progress.step), max_minutes=1e-9)
    assert steps == [1]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    resumed = start(make_config(), images, tmp_path / "run")
    resumed.restore(load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000001"))
    assert resumed.train(lambda progress: None, max_minutes=100)
    assert resumed.pending_metrics == trace.metrics
    assert same_tensors(resumed.ema.state_dict(), whole.ema.state_dict())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_after_the_step(
    make_config: MakeConfig, images: Tensor, tmp_path: Path, number: signal.Signals
) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    trainer = start(make_config(), images, tmp_path)

    def interrupt(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if trainer.step == 4 and module.training:
            signal.raise_signal(number)

    trainer.model.register_forward_pre_hook(interrupt)
    steps: list[int] = []
    message = rf"^stopped by {number.name} after step 5; saved \S*/checkpoints/step-00000005; run again to resume$"
    with pytest.raises(TrainingStopped, match=message):
        trainer.train(lambda progress: steps.append(progress.step))
    assert steps == [1, 2, 3, 4, 5]
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert load_checkpoint(tmp_path / "checkpoints" / "step-00000005").step == 5


def test_signal_handlers_are_restored(make_config: MakeConfig, images: Tensor, tmp_path: Path) -> None:
    def mine(*arguments: Any) -> None:
        pass

    before = {number: signal.signal(number, mine) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        trainer = start(make_config(max_steps=2), images, tmp_path)
        trainer.train(lambda progress: None)
        assert [signal.getsignal(number) for number in before] == [mine, mine]
        trainer = start(make_config(), images, tmp_path)
        with pytest.raises(ZeroDivisionError):
            trainer.train(lambda progress: print(1 // 0))
        assert [signal.getsignal(number) for number in before] == [mine, mine]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


TWO_SIGNALS = """
import json, signal, sys
from pathlib import Path
import torch
from ddim.training.config import validate
from ddim.data.dataset import CachedImageDataset
from ddim.training.repeats import RepeatedBatches
from ddim.training.trainer import Trainer

def interrupt(module, arguments):
    if trainer.step == 3 and module.training:
        for number in (signal.SIGINT, signal.SIGTERM):
            print(number.name, flush=True)
            signal.raise_signal(number)
        print("alive", flush=True)

trainer = Trainer(validate(json.loads(sys.argv[1])), CachedImageDataset(torch.zeros(9, 1, 8, 8, dtype=torch.uint8)),
                  Path(sys.argv[2]), torch.device("cpu"))
trainer.model.register_forward_pre_hook(interrupt)
trainer.train(lambda progress: None)
"""


def test_second_signal_ends_the_program(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(checkpoints={"every": 2}).model_dump(mode="json")
    done = run_python(TWO_SIGNALS, json.dumps(config), tmp_path / "run")
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "SIGINT\nSIGTERM\n"), done.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
