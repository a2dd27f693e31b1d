"""The objective: timesteps that are uniform, weights that mean the same whatever the network predicts, and sums by
quartile as a plain loop counts them.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import helpers
from ddim.scheduler import DDIMScheduler
from ddim.training.objective import QUARTILES, by_quartile, draw_timesteps, loss_weights
from helpers import seeded

ALPHAS = torch.from_numpy(helpers.ALPHAS)
PREDICTIONS = ["epsilon", "sample", "v_prediction"]


# --- timesteps


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("T", [1, 2, 7, 1000])
def test_timesteps_are_in_range(T: int, antithetic: bool) -> None:
    for count in (1, 2, 3, 8, 129):
        timesteps = draw_timesteps(count, T, antithetic, seeded())
        assert timesteps.dtype == torch.int64
        assert timesteps.shape == (count,)
        assert 0 <= int(timesteps.min()) <= int(timesteps.max()) < T


@pytest.mark.parametrize("antithetic", [True, False])
def test_timesteps_are_uniform(antithetic: bool) -> None:
    T, count, draws = 10, 50, 400
    generator = seeded()
    drawn = torch.stack([draw_timesteps(count, T, antithetic, generator) for _ in range(draws)])
    expected = count * draws / T
    statistic = float(((torch.bincount(drawn.flatten(), minlength=T) - expected) ** 2 / expected).sum())
    # 99.9% of chi-square with 9 degrees of freedom; pairs count twice.
    assert statistic < 27.9 * (2 if antithetic else 1)
    # At each place of a batch: 40 each are expected, with a standard deviation of 6.
    places = torch.stack([torch.bincount(place, minlength=T) for place in drawn.T])
    assert int(places.min()) >= 10
    assert int(places.max()) <= 70


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 9, 64, 129])
def test_antithetic_timesteps_come_in_pairs(count: int) -> None:
    T, half = 1000, count // 2 + 1
    for seed in range(5):
        timesteps = draw_timesteps(count, T, True, seeded(seed))
        assert torch.equal(timesteps[half:], T - 1 - timesteps[: count - half])
        early = int((timesteps < T // 2).sum())
        assert abs(early - (count - early)) <= (2 if count % 2 == 0 else 1)


def test_antithetic_timesteps_lower_the_variance() -> None:
    """Of the mean of anything that is monotonous in t, as the loss is."""
    variance = {}
    for antithetic in (True, False):
        generator = seeded()
        means = [draw_timesteps(64, 1000, antithetic, generator).double().mean() for _ in range(200)]
        variance[antithetic] = float(torch.stack(means).var())
    assert variance[True] < variance[False] / 5


def test_independent_timesteps_are_independent() -> None:
    drawn = torch.stack([draw_timesteps(2, 1000, False, seeded(seed)) for seed in range(400)]).double()
    correlation = float(torch.corrcoef(drawn.T)[0, 1])
    # Its standard deviation is 1 / 20.
    assert abs(correlation) < 0.15


@pytest.mark.parametrize("antithetic", [True, False])
def test_generator_decides_the_timesteps(antithetic: bool) -> None:
    first = draw_timesteps(64, 1000, antithetic, seeded(3))
    torch.manual_seed(9)
    assert torch.equal(draw_timesteps(64, 1000, antithetic, seeded(3)), first)
    assert not torch.equal(draw_timesteps(64, 1000, antithetic, seeded(4)), first)


# --- weights


def convert(x0: Tensor, noisy: Tensor, alpha: Tensor) -> dict[str, Tensor]:
    """What a network that believes in this x_0 predicts from x_t, in each way to say it."""
    epsilon = (noisy - alpha.sqrt() * x0) / (1 - alpha).sqrt()
    return {"sample": x0, "epsilon": epsilon, "v_prediction": alpha.sqrt() * epsilon - (1 - alpha).sqrt() * x0}


@pytest.mark.parametrize(("weighting", "gamma"), [("min_snr", 5.0), ("min_snr", 0.3), ("truncated_snr", 5.0)])
def test_weighted_error_does_not_depend_on_prediction_type(weighting: str, gamma: float) -> None:
    x0, noise, wrong = torch.randn(3, len(ALPHAS), 12, generator=seeded(), dtype=torch.float64)
    alpha = ALPHAS[:, None]
    noisy = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
    truth, predicted = convert(x0, noisy, alpha), convert(x0 + wrong, noisy, alpha)
    torch.testing.assert_close(truth["epsilon"], noise)

    weights = []
    for value in ALPHAS.tolist():
        snr = value / (1 - value)
        weights.append(min(snr, gamma) if weighting == "min_snr" else max(snr, 1.0))
    expected = torch.tensor(weights, dtype=torch.float64) * wrong.square().sum(1)
    for prediction_type in PREDICTIONS:
        weight = loss_weights(ALPHAS, prediction_type, weighting, gamma)
        assert weight.dtype == torch.float32
        assert weight.shape == ALPHAS.shape
        error = (predicted[prediction_type] - truth[prediction_type]).square().sum(1)
        torch.testing.assert_close(weight.double() * error, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_simple_weighting_is_constant(prediction_type: str) -> None:
    assert torch.equal(loss_weights(ALPHAS, prediction_type, "simple", 5.0), torch.ones(1000))


@pytest.mark.parametrize(
    ("prediction_type", "weighting", "expected"),
    [
        # SNR is 1/3, 1 and 3.
        ("epsilon", "min_snr", [1, 1, 2 / 3]),
        ("sample", "min_snr", [1 / 3, 1, 2]),
        ("v_prediction", "min_snr", [1 / 4, 1 / 2, 2 / 4]),
        ("epsilon", "truncated_snr", [3, 1, 1]),
        ("sample", "truncated_snr", [1, 1, 3]),
        ("v_prediction", "truncated_snr", [3 / 4, 1 / 2, 3 / 4]),
    ],
)
def test_weights_match_hand_computed_values(prediction_type: str, weighting: str, expected: list[float]) -> None:
    alphas = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    torch.testing.assert_close(loss_weights(alphas, prediction_type, weighting, 2.0), torch.tensor(expected).float())


@pytest.mark.parametrize(
    ("prediction_type", "weighting", "at_0", "at_1"),
    [
        ("epsilon", "min_snr", 1, 0),
        ("sample", "min_snr", 0, 5),
        ("v_prediction", "min_snr", 0, 0),
        ("epsilon", "truncated_snr", None, 1),
        ("sample", "truncated_snr", 1, None),
        ("v_prediction", "truncated_snr", 1, None),
        ("epsilon", "simple", 1, 1),
        ("sample", "simple", 1, 1),
        ("v_prediction", "simple", 1, 1),
    ],
)
def test_infinite_weights_raise(prediction_type: str, weighting: str, at_0: float | None, at_1: float | None) -> None:
    for alpha, expected in ((0.0, at_0), (1.0, at_1)):
        alphas = torch.tensor([0.5, alpha], dtype=torch.float64)
        if expected is None:
            message = rf"^objective\.weighting={weighting} is infinite for prediction_type={prediction_type} where "
            with pytest.raises(ValueError, match=message) as caught:
                loss_weights(alphas, prediction_type, weighting, 5.0)
            assert "\n" not in str(caught.value)
        else:
            assert float(loss_weights(alphas, prediction_type, weighting, 5.0)[1]) == expected


def test_weights_with_zero_terminal_snr() -> None:
    alphas = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction").alphas_cumprod
    assert float(alphas[-1]) == 0
    for weighting in ("simple", "min_snr", "truncated_snr"):
        assert bool(loss_weights(alphas, "v_prediction", weighting, 5.0).isfinite().all())
    with pytest.raises(ValueError, match="weighting=truncated_snr is infinite for prediction_type=epsilon"):
        loss_weights(alphas, "epsilon", "truncated_snr", 5.0)


# --- quartiles


@pytest.mark.parametrize("T", [4, 7, 10, 1000])
def test_quartile_sums_match_a_plain_loop(T: int) -> None:
    losses = torch.rand(200, generator=seeded())
    timesteps = torch.randint(T, (200,), generator=seeded(1))
    expected_sums, expected_counts = [0.0] * QUARTILES, [0] * QUARTILES
    for loss, t in zip(losses.tolist(), timesteps.tolist(), strict=True):
        quartile = next(q for q in range(QUARTILES) if t < (q + 1) * T / QUARTILES)
        expected_sums[quartile] += loss
        expected_counts[quartile] += 1
    sums, counts = by_quartile(losses, timesteps, T)
    assert (sums.dtype, counts.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(sums, torch.tensor(expected_sums), rtol=1e-5, atol=1e-6)
    assert counts.tolist() == expected_counts
    assert math.isclose(float(sums.sum()), float(losses.sum()), rel_tol=1e-5)


def test_quartile_boundaries() -> None:
    timesteps = torch.tensor([0, 249, 250, 499, 500, 749, 750, 999])
    losses = 2.0 ** torch.arange(8)
    sums, counts = by_quartile(losses, timesteps, 1000)
    assert sums.tolist() == [1 + 2, 4 + 8, 16 + 32, 64 + 128]
    assert counts.tolist() == [2, 2, 2, 2]
    sums, counts = by_quartile(losses[:1].bfloat16(), timesteps[-1:], 1000)
    assert (sums.tolist(), counts.tolist()) == ([0, 0, 0, 1], [0, 0, 0, 1])
