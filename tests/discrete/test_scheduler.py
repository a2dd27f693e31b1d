"""`DiscreteDDIMScheduler`: steps against exact distributions, configurations in files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddim.discrete import DiscreteDDIMScheduler
from ddim.discrete.process import marginal, max_sigma
from ddim.discrete.values import from_channels, quantize, to_channels, to_samples
from helpers import seeded

DATA = torch.tensor([0.6, 0.1, 0.3])
"""A distribution of images of one entry."""


def exact_logits(values: Tensor, alpha: float) -> Tensor:
    """log p(x_0 | x_t) of `DATA`, by Bayes' rule, as a network's channels."""
    likelihood = marginal(torch.eye(3), alpha)  # [x_0, x_t]
    joint = (DATA[:, None] * likelihood)[:, values.flatten()]
    return joint.log().T[..., None, None]


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("timesteps", [[999, 300, 40, 0], [900, 899, 500]])
def test_the_exact_predictor_samples_the_data(timesteps: list[int], eta: float) -> None:
    """Steps are linear in x_0, so that few of them are exact where entries are independent."""
    scheduler = DiscreteDDIMScheduler(num_values=3)
    scheduler.set_timesteps(timesteps=timesteps)
    generator, count = seeded(1), 20_000
    start = marginal(DATA, float(scheduler.alphas_cumprod[timesteps[0]]))
    x = torch.multinomial(start, count, replacement=True, generator=generator).view(-1, 1, 1, 1)
    for t in scheduler.timesteps:
        logits = exact_logits(x, float(scheduler.alphas_cumprod[t]))
        x = scheduler.step(logits, t, x, eta, generator=generator).prev_sample
    frequencies = torch.bincount(x.flatten(), minlength=3) / count
    torch.testing.assert_close(frequencies, DATA, atol=4 * (0.25 / count) ** 0.5, rtol=0)


def test_noised_values_have_their_marginals() -> None:
    scheduler = DiscreteDDIMScheduler(num_values=4)
    uniform = ((torch.arange(4000) + 0.5) / 4000).view(1, 1, 1, -1).expand(2, -1, -1, -1)
    x0, t = torch.full((2, 1, 1, 4000), 2), torch.tensor([100, 900])
    noisy = scheduler.add_noise(x0, uniform, t)
    for row, timestep in zip(noisy, t, strict=True):
        expected = marginal(torch.eye(4)[2], scheduler.alphas_cumprod[timestep])
        torch.testing.assert_close(torch.bincount(row.flatten(), minlength=4) / 4000, expected, atol=1e-3, rtol=0)


def test_step_leads_to_the_next_timestep() -> None:
    scheduler = DiscreteDDIMScheduler(trained_betas=[0.5, 0.5, 0.5], num_train_timesteps=3)
    steps = scheduler.make_steps([2, 0])
    assert [(step.prev_timestep, step.alpha, step.alpha_prev) for step in steps] == [(0, 0.125, 0.5), (-1, 0.5, 1.0)]
    assert [step.sigma for step in steps] == [max_sigma(0.125, 0.5), 0.0]
    alpha, alpha_prev, sigma = scheduler.training_step(torch.tensor([0, 2]), torch.zeros(2, 1))
    assert alpha.flatten().tolist() == [0.5, 0.125]
    assert alpha_prev.flatten().tolist() == [1.0, 0.25]
    torch.testing.assert_close(sigma.flatten(), torch.tensor([0.0, 0.75 / 0.875]))


def test_configuration_round_trip(tmp_path: Path) -> None:
    scheduler = DiscreteDDIMScheduler(num_values=5, beta_schedule="linear", timestep_spacing="linspace")
    scheduler.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert (content["_class_name"], content["num_values"]) == ("DiscreteDDIMScheduler", 5)
    loaded = DiscreteDDIMScheduler.from_pretrained(tmp_path)
    assert torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)
    assert loaded.make_timesteps(7) == scheduler.make_timesteps(7)
    assert DiscreteDDIMScheduler.from_config(scheduler.config).num_values == 5
    (tmp_path / "scheduler_config.json").write_text(json.dumps(content | {"num_values": 1}))
    with pytest.raises(ValueError, match="num_values must be an integer from 2 to 256, got 1"):
        DiscreteDDIMScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_values": 257}, "num_values must be an integer from 2 to 256, got 257"),
        ({"num_values": 2.5}, "num_values must be an integer"),
        ({"beta_schedule": "cosine"}, "beta_schedule must be one of"),
        ({"timestep_spacing": "even"}, "timestep_spacing must be"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be an integer"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas must hold 1000 numbers, got 2"),
    ],
)
def test_invalid_configurations_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        DiscreteDDIMScheduler(**arguments)


def test_invalid_steps_are_refused() -> None:
    scheduler, x = DiscreteDDIMScheduler(), torch.zeros(1, 1, 2, 2, dtype=torch.int64)
    logits, uniform = torch.zeros(1, 2, 2, 2), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"set_timesteps\(num_inference_steps\) must be called before step"):
        scheduler.step(logits, 999, x)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep must be one of those that were set"):
        scheduler.step(logits, 998, x)
    with pytest.raises(ValueError, match="generator and uniform exclude each other"):
        scheduler.step(logits, 999, x, generator=seeded(), uniform=uniform)
    with pytest.raises(ValueError, match="eta must be a number from 0 to 1"):
        scheduler.step(logits, 999, x, eta=2)
    with pytest.raises(ValueError, match="give either num_inference_steps or timesteps"):
        scheduler.set_timesteps()
    with pytest.raises(ValueError, match="timesteps must be strictly decreasing"):
        scheduler.set_timesteps(timesteps=[10, 20])


@pytest.mark.parametrize("num_values", [2, 3, 16, 256])
def test_values_survive_gray_and_channels(num_values: int) -> None:
    values = torch.arange(num_values).repeat(2)[: 2 * (num_values // 2)].view(1, 2, 1, -1)
    assert torch.equal(quantize(to_samples(values, num_values), num_values), values)
    channels = to_channels(values, num_values)
    assert channels.shape == (1, 2 * num_values, 1, values.shape[-1])
    assert torch.equal(from_channels(channels, num_values).argmax(-1), values)


def test_no_byte_is_between_two_values() -> None:
    """However the 256 bytes are rounded on their way: they are not halfway between neighboring values."""
    unit = torch.arange(256, dtype=torch.float64) / 255
    for num_values in range(2, 257):
        fraction = (unit * (num_values - 1)) % 1
        assert float((fraction - 0.5).abs().min()) > 1e-3


@pytest.mark.parametrize("num_inference_steps", [1, 2, 20, 333, 1000])
def test_steps_are_equal_in_alpha(num_inference_steps: int) -> None:
    scheduler = DiscreteDDIMScheduler()
    timesteps = scheduler.make_timesteps(num_inference_steps)
    assert len(timesteps) == num_inference_steps == len(set(timesteps))
    assert timesteps[0] == 999
    assert timesteps == sorted(timesteps, reverse=True)
    if num_inference_steps <= 20:
        alphas = torch.tensor([*scheduler.alphas_cumprod[timesteps], 1.0])
        torch.testing.assert_close(
            alphas.diff(), torch.full_like(alphas[1:], 1 / num_inference_steps), atol=2e-3, rtol=0
        )
