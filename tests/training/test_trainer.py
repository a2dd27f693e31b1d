"""The training loop against the equations, computed here once more in float64 from what the network was shown; when it
stops; and that it learns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddim.outputs import UNet2DOutput
from ddim.scheduler import DDIMScheduler
from ddim.training.checkpoint import load_newest
from ddim.training.config import TrainConfig
from ddim.training.trainer import Progress, Trainer, TrainingStopped
from ddim.unet import UNet2DModel
from digits import TINY_MODEL, digits

MakeConfig = Callable[..., TrainConfig]
CPU = torch.device("cpu")
ALPHAS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def as_samples(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


@dataclass
class Record:
    """What a run showed its network, and what became of the weights."""

    noisy: list[Tensor] = field(default_factory=list)
    timesteps: list[Tensor] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    averages: list[dict[str, Tensor]] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)


def run(config: TrainConfig, images: Tensor, out: Path) -> tuple[Trainer, Record]:
    """Train to the end; `weights` begins with those before the first step."""
    trainer, record = Trainer(config, images, out, CPU), Record()

    def see(module: nn.Module, arguments: tuple[Any, ...], output: UNet2DOutput) -> None:
        if module.training and torch.is_grad_enabled():
            record.noisy.append(arguments[0].detach().clone())
            record.timesteps.append(arguments[1].clone())

    def after_step(progress: Progress) -> None:
        record.progress.append(progress)
        record.weights.append(copy.deepcopy(trainer.model.state_dict()))
        record.gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
        record.averages.append(copy.deepcopy(trainer.ema.state_dict()))

    trainer.model.register_forward_hook(see)
    record.weights.append(copy.deepcopy(trainer.model.state_dict()))
    trainer.train(after_step)
    return trainer, record


def noise_in(record: Record, step: int, x0: Tensor) -> Tensor:
    """The epsilon of equation (4) that leads from x_0 to what the network was shown; float64."""
    alpha = torch.from_numpy(ALPHAS)[record.timesteps[step]].reshape(-1, 1, 1, 1)
    return (record.noisy[step].double() - alpha.sqrt() * x0) / (1 - alpha).sqrt()


# --- a step


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("grad_clip", [0.02, 1e3])
def test_loss_and_gradient_are_those_of_ddpm(
    make_config: MakeConfig, images: Tensor, tmp_path: Path, prediction_type: str, grad_clip: float
) -> None:
    # With a single picture x_0 is known, and epsilon follows from what the network saw.
    config = make_config(
        max_steps=4,
        scheduler={"prediction_type": prediction_type},
        optim={"lr": 2e-3, "warmup_steps": 0, "grad_clip": grad_clip},
    )
    x0 = as_samples(images[:1]).double()
    _, record = run(config, images[:1], tmp_path)
    for step in (0, 3):
        epsilon = noise_in(record, step, x0)
        alpha = torch.from_numpy(ALPHAS)[record.timesteps[step]].reshape(-1, 1, 1, 1)
        target = {
            "epsilon": epsilon,
            "sample": x0.expand_as(epsilon),
            "v_prediction": alpha.sqrt() * epsilon - (1 - alpha).sqrt() * x0,
        }[prediction_type]
        network = UNet2DModel(**TINY_MODEL).double()
        network.load_state_dict({name: tensor.double() for name, tensor in record.weights[step].items()})
        loss = (target - network(record.noisy[step].double(), record.timesteps[step]).sample).square().mean()
        loss.backward()
        gradient = {name: p.grad for name, p in network.named_parameters()}
        norm = float(torch.cat([g.flatten() for g in gradient.values()]).norm())

        assert record.progress[step].loss == pytest.approx(float(loss.detach()), rel=1e-4)
        assert record.progress[step].grad_norm == pytest.approx(norm, rel=1e-3)
        assert (norm > grad_clip) == (grad_clip < 1)
        scale = min(1.0, grad_clip / norm)
        for name, got in record.gradients[step].items():
            torch.testing.assert_close(got.double(), gradient[name] * scale, rtol=1e-2, atol=1e-4 * norm * scale)


def test_noise_is_gaussian_and_timesteps_come_in_pairs(make_config: MakeConfig, images: Tensor, tmp_path: Path) -> None:
    _, record = run(make_config(), images[:1], tmp_path)
    x0 = as_samples(images[:1]).double()
    noise = torch.stack([noise_in(record, step, x0) for step in range(12)])
    # 6144 numbers: four standard deviations of their mean and variance.
    assert abs(float(noise.mean())) < 0.051
    assert abs(float(noise.var()) - 1) < 0.072
    assert len(torch.unique(noise.flatten(2)[..., 0])) == noise.shape[0] * noise.shape[1]
    for timesteps in record.timesteps:
        assert timesteps.dtype == torch.int64
        assert bool(((timesteps >= 0) & (timesteps < 1000)).all())
        assert torch.equal(timesteps[5:], 999 - timesteps[:3])
    assert len({tuple(timesteps.tolist()) for timesteps in record.timesteps}) == 12


@pytest.mark.parametrize("flip", [False, True])
def test_flips(make_config: MakeConfig, images: Tensor, tmp_path: Path, flip: bool) -> None:
    # Next to no noise: the network sees the pictures themselves.
    config = make_config(horizontal_flip=flip, scheduler={"beta_start": 1e-9, "beta_end": 1e-9})
    _, record = run(config, images[:1], tmp_path)
    x0, seen = as_samples(images[:1]), torch.cat(record.noisy)
    as_it_is, mirrored = ((seen - x).abs().amax((1, 2, 3)) < 0.02 for x in (x0, x0.flip(3)))
    assert bool((as_it_is ^ mirrored).all())
    # Of 96, half: four standard deviations are 20.
    assert abs(int(mirrored.sum()) - 48) < 20 if flip else not mirrored.any()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_weights_follow_adamw_with_a_linear_warm_up_and_decay(
    make_config: MakeConfig, images: Tensor, tmp_path: Path, weight_decay: float
) -> None:
    optim = {"lr": 2e-3, "warmup_steps": 4, "decay_steps": 3, "betas": [0.8, 0.99], "weight_decay": weight_decay}
    config = make_config(max_steps=8, optim=optim)
    _, record = run(config, images, tmp_path)
    rates = [2e-3 * part for part in (1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 2 / 3, 1 / 3)]
    for name, start in record.weights[0].items():
        weight, m, v = start.double(), torch.zeros(()), torch.zeros(())
        for n, (gradients, rate) in enumerate(zip(record.gradients, rates, strict=True), start=1):
            gradient = gradients[name].double()
            m, v = 0.8 * m + 0.2 * gradient, 0.99 * v + 0.01 * gradient**2
            weight = weight * (1 - rate * weight_decay)
            weight = weight - rate * (m / (1 - 0.8**n)) / ((v / (1 - 0.99**n)).sqrt() + 1e-8)
            torch.testing.assert_close(record.weights[n][name].double(), weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
def test_average_follows_its_recursion(make_config: MakeConfig, images: Tensor, tmp_path: Path, decay: float) -> None:
    config = make_config(optim={"lr": 2e-3, "warmup_steps": 0, "ema_decay": decay})
    trainer, record = run(config, images, tmp_path)
    assert isinstance(trainer.ema, UNet2DModel)
    assert not trainer.ema.training
    assert not any(p.requires_grad for p in trainer.ema.parameters())
    for name, first in record.weights[1].items():
        average = first.double()
        for n in range(1, 12):
            d = min(decay, (1 + n) / (10 + n))
            average = d * average + (1 - d) * record.weights[n + 1][name].double()
            torch.testing.assert_close(record.averages[n][name].double(), average, rtol=1e-5, atol=1e-6)


def test_bfloat16_keeps_weights_in_float32(make_config: MakeConfig, images: Tensor, tmp_path: Path) -> None:
    _, exact = run(make_config(), images, tmp_path / "fp32")
    trainer, rough = run(make_config(precision="bf16"), images, tmp_path / "bf16")
    assert {tensor.dtype for tensor in trainer.model.state_dict().values()} == {torch.float32}
    assert {tensor.dtype for tensor in trainer.ema.state_dict().values()} == {torch.float32}
    for a, b in zip(exact.progress, rough.progress, strict=True):
        assert a.loss != b.loss or a.step == 1
        assert a.loss == pytest.approx(b.loss, rel=0.05)


def test_the_network_begins_at_zero(make_config: MakeConfig, images: Tensor, tmp_path: Path) -> None:
    trainer = Trainer(make_config(), images, tmp_path, CPU)
    for network in (trainer.model, trainer.ema):
        assert not network(torch.randn(2, 1, 8, 8), torch.tensor([3, 900])).sample.any()
    assert not list(tmp_path.iterdir())


def test_a_seed_decides_everything(make_config: MakeConfig, images: Tensor, tmp_path: Path) -> None:
    def losses(name: str, **entries: Any) -> list[float]:
        torch.seed()  # whatever state the program is in
        config = make_config(max_steps=3, model=TINY_MODEL | {"dropout": 0.3}, **entries)
        return [progress.loss for progress in run(config, images, tmp_path / name)[1].progress]

    assert losses("a") == losses("b") != losses("c", seed=1)


# --- models that do not fit


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model": TINY_MODEL | {"sample_size": 9}}, r"shape \(1, 1, 9, 9\); the model takes .* multiples of 2"),
        ({"model": TINY_MODEL | {"num_class_embeds": 4}}, "class-conditional"),
        ({"model": TINY_MODEL | {"block_out_channels": [8, 18]}}, "block_out_channels holds 18"),
        ({"model": TINY_MODEL | {"colour": 3}}, "colour"),
        ({"scheduler": {"beta_schedule": "steep"}}, "beta_schedule is 'steep'"),
        ({"scheduler": {"prediction_type": "noise"}}, "prediction_type is 'noise'"),
        ({"scheduler": {"betas": 3}}, "betas"),
    ],
)
def test_settings_that_do_not_fit_are_told_at_once(
    make_config: MakeConfig, images: Tensor, tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    config = make_config(**entries)
    size = config.model["sample_size"]
    with pytest.raises((ValueError, TypeError), match=message):
        Trainer(config, images.new_zeros(4, 1, size, size), tmp_path, CPU)
    assert not list(tmp_path.iterdir())


# --- losses that are no numbers


def break_loss(trainer: Trainer, step: int) -> None:
    def spoil(module: nn.Module, arguments: tuple[Any, ...], output: UNet2DOutput) -> UNet2DOutput | None:
        return UNet2DOutput(output.sample * float("nan")) if trainer.step == step else None

    trainer.model.register_forward_hook(spoil)


def break_gradient(trainer: Trainer, step: int) -> None:
    trainer.model.conv_in.bias.register_hook(lambda g: g * float("inf") if trainer.step == step else g)


@pytest.mark.parametrize(("spoil", "named"), [(break_loss, "loss became nan"), (break_gradient, "norm (nan|inf)")])
def test_a_loss_that_is_no_number_stops_before_it_is_saved(
    make_config: MakeConfig,
    images: Tensor,
    tmp_path: Path,
    spoil: Callable[[Trainer, int], None],
    named: str,
) -> None:
    config = make_config(checkpoint_every=1, keep_checkpoints=1)
    trainer = Trainer(config, images, tmp_path, CPU)
    spoil(trainer, 5)
    steps: list[int] = []
    with pytest.raises(TrainingStopped, match=rf"{named}.* in step 6 at a learning rate of 0\.002.* lower optim\.lr"):
        trainer.train(lambda progress: steps.append(progress.step))
    assert steps == [1, 2, 3, 4, 5]
    assert all(bool(tensor.isfinite().all()) for tensor in trainer.ema.state_dict().values())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005.pt"]

    resumed = Trainer(config, images, tmp_path, CPU)
    assert resumed.resume()
    assert resumed.step == 5
    resumed.train(lambda progress: None)
    whole, _ = run(make_config(), images, tmp_path / "whole")
    for name, tensor in whole.ema.state_dict().items():
        assert torch.equal(resumed.ema.state_dict()[name], tensor)


def test_a_learning_rate_that_is_too_large_ends_in_that_sentence(
    make_config: MakeConfig, images: Tensor, tmp_path: Path
) -> None:
    config = make_config(optim={"lr": 1e30, "warmup_steps": 0})
    with pytest.raises(TrainingStopped, match=r"in step \d+ at a learning rate of 1e\+30"):
        Trainer(config, images, tmp_path, CPU).train(lambda progress: None)
    assert load_newest(tmp_path / "checkpoints") is None


# --- learning


def gaussian_denoiser_loss(train: np.ndarray, x0: np.ndarray, noise: np.ndarray, alpha: np.ndarray) -> float:
    """Mean squared error of E[epsilon | x_t] for Gaussian data with the mean and covariance of `train`: the best that
    any denoiser can do that is linear in x_t.
    """
    noisy = np.sqrt(alpha) * x0 + np.sqrt(1 - alpha) * noise
    variances, axes = np.linalg.eigh(np.cov(train.T))
    centred = (noisy - np.sqrt(alpha) * train.mean(0)) @ axes
    predicted = centred * np.sqrt(1 - alpha) / (alpha * variances.clip(0) + 1 - alpha) @ axes.T
    return float(np.square(predicted - noise).mean())


def test_a_small_network_learns_digits(make_config: MakeConfig, tmp_path: Path) -> None:
    pictures = torch.from_numpy(digits())[:, None]
    training, held_out = pictures[:1500], as_samples(pictures[1500:])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(held_out.shape, generator=generator)
    timesteps = torch.randint(1000, (len(held_out),), generator=generator)
    noisy = DDIMScheduler().add_noise(held_out, noise, timesteps)

    def loss(network: UNet2DModel) -> float:
        with torch.no_grad():
            return float((network(noisy, timesteps).sample - noise).square().mean())

    config = make_config(
        model=TINY_MODEL | {"block_out_channels": [16, 32]},
        batch_size=64,
        max_steps=300,
        optim={"lr": 3e-3, "warmup_steps": 50, "ema_decay": 0.99},
        checkpoint_every=300,
    )
    trainer = Trainer(config, training, tmp_path, CPU)
    assert loss(trainer.ema) == pytest.approx(1, abs=0.03)
    trainer.train(lambda progress: None)
    linear = gaussian_denoiser_loss(
        as_samples(training).flatten(1).double().numpy(),
        held_out.flatten(1).double().numpy(),
        noise.flatten(1).double().numpy(),
        ALPHAS[timesteps.numpy()][:, None],
    )
    assert 0.1 < linear < 0.14
    assert loss(trainer.ema) < linear
    assert loss(trainer.ema) < loss(trainer.model)
