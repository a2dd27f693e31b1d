"""Steps with learned coefficients: rows of formulas are their steps, and wrong rows are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ddim import DDIMScheduler
from ddim.diffusion.equations import make_steps
from ddim.diffusion.learned import check_coefficients_by_steps, learned_steps
from ddim.diffusion.loop import sample
from ddim.diffusion.solvers import multistep
from helpers import randn

ALPHAS = DDIMScheduler().alphas_cumprod_float64
TIMESTEPS = [900, 700, 450, 200, 10]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_rows_of_a_formula_are_its_steps(order: int) -> None:
    steps = multistep(make_steps(TIMESTEPS, ALPHAS), order)
    rows = [[step.timestep, step.timestep, 0.0, *step.corrections] for step in steps]
    assert learned_steps(rows, ALPHAS) == steps


def test_weights_are_those_of_the_last_predictions() -> None:
    """x_prev = a x + sum of b_j epsilon_j, with the b_j of the rows, of a network that knows its timestep alone."""
    rows = [[900, 880, 0.1], [500, 520, -0.2, 0.3], [100, 90, 0.05, 0.1, -0.4]]
    epsilons = {880: 0.3, 520: -0.7, 90: 1.1}
    x = torch.full((1, 1, 1, 1), 0.4, dtype=torch.float64)
    *_, last = sample(lambda x, t: torch.full_like(x, epsilons[int(t)]), x, learned_steps(rows, ALPHAS))
    expected, history = 0.4, list[float]()
    alphas = [float(ALPHAS[int(row[0])]) for row in rows] + [1.0]
    for row, alpha, alpha_prev in zip(rows, alphas, alphas[1:], strict=False):
        epsilon = epsilons[int(row[1])]
        x0 = (expected - (1 - alpha) ** 0.5 * epsilon) / alpha**0.5
        expected = alpha_prev**0.5 * x0 + ((1 - alpha_prev) ** 0.5 + row[2]) * epsilon
        expected += sum(k * (epsilon - earlier) for k, earlier in zip(row[3:], history, strict=False))
        history.insert(0, epsilon)
    assert float(last.sample) == pytest.approx(expected)


def test_alpha_is_interpolated() -> None:
    low, middle, high = (learned_steps([[t, 5, 0.0]], ALPHAS)[0].alpha for t in (500, 500.5, 501))
    assert middle**2 == pytest.approx(low * high)
    assert learned_steps([[999, 999, 0.0]], ALPHAS)[0].alpha == ALPHAS[999]


def test_scheduler_takes_the_steps() -> None:
    rows = [[900, 880, 0.1], [500, 520, -0.2, 0.3], [100, 90, 0.05, 0.1, -0.4]]
    scheduler = DDIMScheduler(clip_sample=False, coefficients_by_steps={"3": rows})
    network = lambda x, t: (x * 0.1 + float(t) / 1000).sin()  # noqa: E731
    x = randn(2, 1, 4, 4)
    *_, last = sample(network, x, scheduler.make_learned_steps(3) or [])
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == [880, 520, 90]
    for _ in range(2):
        result = x
        for t in scheduler.timesteps:
            result = scheduler.step(network(result, t), t, result).prev_sample
        torch.testing.assert_close(result, last.sample, rtol=0, atol=1e-6)
        scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=r"timestep must be one of those that were set \(\[880, 520, 90\]\), got 500"):
        scheduler.step(x, 500, x)
    with pytest.raises(ValueError, match=r"learned coefficients require eta=0, got eta=0.5"):
        scheduler.step(x, 880, x, eta=0.5)
    # Other numbers of steps, and custom timesteps, are those of formulas.
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [750, 500, 250, 0]
    scheduler.set_timesteps(timesteps=[880, 520, 90])
    plain = DDIMScheduler(clip_sample=False)
    plain.set_timesteps(timesteps=[880, 520, 90])
    assert torch.equal(scheduler.step(x, 880, x).prev_sample, plain.step(x, 880, x).prev_sample)


def test_configuration_keeps_them() -> None:
    rows = [[900, 880, 0.1], [300, 310, 0.0, -0.2]]
    scheduler = DDIMScheduler(coefficients_by_steps={"2": rows})
    again = DDIMScheduler.from_config(scheduler.config)
    assert again.make_learned_steps(2) == scheduler.make_learned_steps(2)
    assert again.make_learned_steps(3) is None
    assert DDIMScheduler.from_config(scheduler.config, coefficients_by_steps=None).make_learned_steps(2) is None


@pytest.mark.parametrize(
    ("by_steps", "message"),
    [
        ({"2": [[900, 880, 0.1]]}, r"coefficients_by_steps\['2'\] must list 2 rows"),
        ({"x": []}, r"coefficients_by_steps\['x'\] must list x rows"),
        ({"1": "x"}, r"must list 1 rows, got 'x'"),
        ({"1": [[900, 880]]}, r"row 0 must have 3 to 3 numbers, got \[900, 880\]"),
        ({"1": [[900, 880, 0.1, 0.2]]}, "row 0 must have 3 to 3 numbers"),
        ({"2": [[900, 880, 0], [300, 310, 0, 0, 0]]}, "row 1 must have 3 to 4 numbers"),
        ({"1": [[900, 880, float("nan")]]}, "row 0 must have weights between -1000 and 1000"),
        ({"1": [[900, 880, True]]}, "row 0 must have weights"),
        ({"1": [[1000, 880, 0.0]]}, "column 0: "),
        ({"2": [[900, 300, 0.0], [300, 300, 0.0]]}, "column 1: "),
        ({"1": [[900.5, 880, 0.0]]}, "column 0: "),
    ],
)
def test_wrong_rows_raise(by_steps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_coefficients_by_steps(by_steps, 1000)
    with pytest.raises(ValueError, match=message):
        DDIMScheduler(coefficients_by_steps=by_steps)


def test_other_types_raise() -> None:
    with pytest.raises(TypeError, match="coefficients_by_steps must be a mapping of numbers of steps to rows, got 3"):
        check_coefficients_by_steps(3, 1000)  # type: ignore[arg-type]
