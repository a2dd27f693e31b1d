"""The optimizer, the learning rate and the averaged weights, each against its definition in plain Python; and the
initialization of the network.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ddim.nn.layers import Attention, ResnetBlock2D
from ddim.training.config import EmaConfig, OptimConfig
from ddim.training.optim import ema_update, learning_rate, make_optimizer, zero_last_layers
from ddim.unet import UNet2DModel
from digits import TINY_MODEL

# --- the learning rate

LR = 0.3
RUNS = [
    # warmup_steps, decay_steps, max_steps
    (0, None, 1),
    (0, None, 10),
    (0, 4, 10),
    (0, 10, 10),
    (0, 25, 10),
    (1, None, 10),
    (4, None, 20),
    (4, 5, 20),
    (4, 16, 20),
    (4, 18, 20),
    (4, 100, 20),
    (20, None, 20),
    (30, None, 20),
    (30, 5, 20),
]


def expected_rate(warmup: int, decay: str, decay_steps: int | None, max_steps: int, step: int) -> float:
    """The learning rate of the step after `step` steps."""
    rising = LR if step + 1 >= warmup else LR * (step + 1) / warmup
    if decay == "constant":
        return rising
    if decay_steps is None:
        decay_steps = max_steps - warmup if max_steps > warmup else 1
    done = step - (max_steps - decay_steps)
    if done <= 0:
        return rising
    fraction = done / decay_steps
    falling = LR * (1 - fraction) if decay == "linear" else LR * (math.cos(math.pi * fraction) + 1) / 2
    return min(rising, falling)


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "decay_steps", "max_steps"), RUNS)
def test_learning_rate_matches_its_definition(decay: str, warmup: int, decay_steps: int | None, max_steps: int) -> None:
    config = OptimConfig(lr=LR, warmup_steps=warmup, decay=decay, decay_steps=decay_steps)
    for step in range(max_steps):
        rate = learning_rate(config, step, max_steps)
        assert rate == pytest.approx(expected_rate(warmup, decay, decay_steps, max_steps, step), rel=1e-12)
        assert 0 < rate <= LR


@pytest.mark.parametrize(("decay", "at_half", "at_last"), [("linear", 0.5, 0.1), ("cosine", 0.5, 0.0244717418524232)])
def test_learning_rate_matches_hand_computed_values(decay: str, at_half: float, at_last: float) -> None:
    config = OptimConfig(lr=LR, warmup_steps=4, decay=decay, decay_steps=10)
    rates = [learning_rate(config, step, 100) / LR for step in range(101)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert rates[4:91] == pytest.approx([1] * 87)
    assert rates[95] == pytest.approx(at_half)
    # (1 - cos(pi / 10)) / 2
    assert rates[99] == pytest.approx(at_last)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[91:100] == sorted(rates[91:100], reverse=True)


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "decay_steps"), [(0, None), (50, None), (50, 100), (50, 400), (150, 400)])
def test_learning_rate_is_continuous(decay: str, warmup: int, decay_steps: int | None) -> None:
    max_steps = 300
    config = OptimConfig(lr=LR, warmup_steps=warmup, decay=decay, decay_steps=decay_steps)
    rates = [learning_rate(config, step, max_steps) for step in range(max_steps)]
    steepest = max(1 / max(warmup, max_steps), 1 / warmup if warmup else 0)
    if decay != "constant":
        steepest = max(steepest, math.pi / 2 / (decay_steps or max_steps - warmup))
        # And it decays to zero.
        assert rates[-1] <= 1.0001 * LR * steepest
    differences = [abs(after - before) for before, after in itertools.pairwise(rates)]
    assert max(differences) <= 1.0001 * LR * steepest


# --- the averaged weights


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))


def follow(config: EmaConfig, steps: int) -> tuple[list[list[float]], list[list[float]]]:
    """The weights after each step, and their average; both flat."""
    model = Tiny()
    average = AveragedModel(model, multi_avg_fn=ema_update(config))
    generator = torch.Generator().manual_seed(1)

    def flat(module: nn.Module) -> list[float]:
        return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).tolist()

    averages, history = [], []
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        average.update_parameters(model)
        history.append(flat(model))
        averages.append(flat(average.module))
    return history, averages


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.9999])
def test_average_follows_its_recursion(decay: float, warmup: bool) -> None:
    history, averages = follow(EmaConfig(decay=decay, warmup=warmup), 120)
    # The first weights are taken over as they are.
    average = history[0]
    for n, (weights, actual) in enumerate(zip(history, averages, strict=True)):
        if n > 0:
            d = decay
            if warmup and (1 + n) / (10 + n) < decay:
                d = (1 + n) / (10 + n)
            average = [d * a + (1 - d) * w for a, w in zip(average, weights, strict=True)]
        assert actual == pytest.approx(average, rel=1e-10, abs=1e-12)


def test_average_without_warmup_matches_closed_form() -> None:
    decay, steps = 0.9, 30
    history, averages = follow(EmaConfig(decay=decay, warmup=False), steps)
    weights = torch.tensor(history, dtype=torch.float64)
    share = torch.tensor([(1 - decay) * decay ** (steps - 1 - k) for k in range(steps)], dtype=torch.float64)
    share[0] = decay ** (steps - 1)
    assert float(share.sum()) == pytest.approx(1)
    assert averages[-1] == pytest.approx((share[:, None] * weights).sum(0).tolist(), rel=1e-10, abs=1e-12)


def test_ema_warmup_forgets_the_first_weights() -> None:
    """Their weight after 100 steps is the product of (1 + n) / (10 + n), about 1e-9, instead of 0.99."""
    shares = {}
    for warmup in (True, False):
        model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        average = AveragedModel(model, multi_avg_fn=ema_update(EmaConfig(decay=0.9999, warmup=warmup)))
        for step in range(101):
            nn.init.constant_(model.weight, 1.0 if step == 0 else 0.0)
            average.update_parameters(model)
        shares[warmup] = float(average.module.weight.detach())
    assert shares[True] == pytest.approx(math.prod((1 + n) / (10 + n) for n in range(1, 101)), rel=1e-9)
    assert shares[False] == pytest.approx(0.9999**100, rel=1e-9)
    assert shares[True] < 1e-8


# --- initialization

MODELS: dict[str, dict[str, Any]] = {
    "as the presets": {},
    "resampling by residual blocks": {
        "block_out_channels": [8, 16, 16],
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        "layers_per_block": 2,
        "attention_head_dim": 4,
    },
}


def make_model(name: str) -> UNet2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**TINY_MODEL | MODELS[name]).eval()


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 500, 999])


@pytest.mark.parametrize("name", MODELS)
def test_new_network_predicts_zero(name: str) -> None:
    model = make_model(name)
    with torch.no_grad():
        assert float(model(*inputs()).sample.abs().max()) > 0
        zero_last_layers(model)
        assert torch.equal(model(*inputs()).sample, torch.zeros(3, 1, 8, 8))


@pytest.mark.parametrize("name", MODELS)
def test_residual_branches_of_a_new_network_are_zero(name: str) -> None:
    model = make_model(name)
    zero_last_layers(model)
    seen = {ResnetBlock2D: 0, Attention: 0}

    def check(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        x = arguments[0]
        if output.shape[2] < x.shape[2]:
            x = nn.functional.avg_pool2d(x, 2)
        elif output.shape[2] > x.shape[2]:
            x = nn.functional.interpolate(x, scale_factor=2)
        shortcut = getattr(module, "conv_shortcut", None)
        torch.testing.assert_close(output, x if shortcut is None else shortcut(x))
        seen[type(module)] += 1

    blocks = [module for module in model.modules() if isinstance(module, ResnetBlock2D | Attention)]
    for block in blocks:
        block.register_forward_hook(check)
    with torch.no_grad():
        model(*inputs())
    assert seen[ResnetBlock2D] + seen[Attention] == len(blocks)
    assert min(seen.values()) > 2


@pytest.mark.parametrize("name", MODELS)
def test_only_last_layers_are_zeroed_and_gradients_flow(name: str) -> None:
    model, untouched = make_model(name), make_model(name).state_dict()
    zero_last_layers(model)
    for key, value in model.state_dict().items():
        if key.rpartition(".")[0].endswith((".conv2", ".to_out.0")) or key.startswith("conv_out."):
            assert not value.any(), key
        else:
            assert torch.equal(value, untouched[key]), key
    (model(*inputs()).sample - 1).square().mean().backward()
    assert float(model.conv_out.weight.grad.abs().max()) > 0


# --- the optimizer


def test_optimizer_uses_the_configuration() -> None:
    model = make_model("as the presets")
    config = OptimConfig(lr=3e-3, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.02)
    optimizer = make_optimizer(model, config)
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-3, (0.8, 0.95), 1e-5, 0.02)
    assert not group["amsgrad"]
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in model.parameters()]


def test_steps_match_adamw_written_out() -> None:
    model = Tiny()
    config = OptimConfig(lr=3e-3, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.02)
    optimizer = make_optimizer(model, config)
    generator = torch.Generator().manual_seed(3)
    expected = model.second.detach().tolist()
    m, v = [0.0] * 5, [0.0] * 5
    for step in range(1, 8):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for i, g in enumerate(model.second.grad.tolist()):
            m[i] = 0.8 * m[i] + 0.2 * g
            v[i] = 0.95 * v[i] + 0.05 * g * g
            expected[i] -= 3e-3 * 0.02 * expected[i]
            expected[i] -= 3e-3 * (m[i] / (1 - 0.8**step)) / (math.sqrt(v[i] / (1 - 0.95**step)) + 1e-5)
        optimizer.step()
        assert model.second.detach().tolist() == pytest.approx(expected, rel=1e-10)
