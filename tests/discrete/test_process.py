"""The discrete process by enumeration in float64: all values of x_0, x_t and x_prev, and all paths of a short chain."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddim.discrete.process import (
    binary_sigma,
    draw,
    marginal,
    max_sigma,
    mixture_weights,
    multinomial_posterior,
    posterior,
    posterior_kl,
    sigma_of_eta,
)

ALPHAS = [0.9, 0.55, 0.2, 0.03]
"""Of t = 0 .. 3; the step from 0 leads to 1."""
STEPS = [*zip(ALPHAS, [1.0, *ALPHAS[:-1]], strict=True), (0.03, 0.9)]
"""alpha and alpha_prev of neighboring steps, and of one that skips timesteps."""
TOLERANCE = 1e-12


def rows(num_values: int) -> Tensor:
    """All one-hot vectors."""
    return torch.eye(num_values, dtype=torch.float64)


def posterior_table(num_values: int, alpha: float, alpha_prev: float, sigma: float) -> Tensor:
    """q(x_prev | x_t, x_0) as a table [x_0, x_t, x_prev]."""
    eye = rows(num_values)
    return torch.stack([posterior(eye, x0.expand(num_values, -1), alpha, alpha_prev, sigma) for x0 in eye])


def bayes_table(num_values: int, alpha: float, alpha_prev: float) -> NDArray[np.float64]:
    """The same of the Markov chain, by Bayes' rule from its transition matrix: [x_0, x_t, x_prev]."""
    stay = alpha / alpha_prev
    kernel = stay * np.eye(num_values) + (1 - stay) / num_values
    before = alpha_prev * np.eye(num_values) + (1 - alpha_prev) / num_values
    joint = np.einsum("xz,zy->xyz", before, kernel)
    return joint / joint.sum(-1, keepdims=True)


@pytest.mark.parametrize("fraction", [0.0, 0.37, 1.0])
@pytest.mark.parametrize(("alpha", "alpha_prev"), STEPS)
def test_marginals_do_not_depend_on_sigma(alpha: float, alpha_prev: float, fraction: float) -> None:
    table = posterior_table(3, alpha, alpha_prev, fraction * max_sigma(alpha, alpha_prev))
    assert float((table.sum(-1) - 1).abs().max()) < TOLERANCE
    averaged = torch.einsum("xy,xyz->xz", marginal(rows(3), alpha), table)
    assert float((averaged - marginal(rows(3), alpha_prev)).abs().max()) < TOLERANCE


@pytest.mark.parametrize("sigmas", [(0.0, 0.3, 0.6, 0.9), (1.0, 0.5, 0.0, 0.2), (1.0, 1.0, 1.0, 1.0)])
def test_marginals_of_a_whole_chain(sigmas: tuple[float, ...]) -> None:
    """All 3^5 paths from timestep 3 to the clean image, given x_0, with a fraction of the largest sigma per step."""
    tables = [
        posterior_table(3, alpha, alpha_prev, fraction * max_sigma(alpha, alpha_prev)).numpy()
        for (alpha, alpha_prev), fraction in zip(STEPS[:4], sigmas, strict=True)
    ]
    for x0 in range(3):
        found = np.zeros((5, 3))
        for path in itertools.product(range(3), repeat=5):  # path[t + 1] is x at timestep t, path[0] the clean one
            probability = float(marginal(rows(3)[x0], ALPHAS[-1])[path[4]])
            for t in (3, 2, 1, 0):
                probability *= tables[t][x0, path[t + 1], path[t]]
            for position, value in enumerate(path):
                found[position, value] += probability
        expected = torch.stack([marginal(rows(3)[x0], alpha) for alpha in (1.0, *ALPHAS)])
        assert np.abs(found - expected.numpy()).max() < TOLERANCE


@pytest.mark.parametrize(("alpha", "alpha_prev"), STEPS)
def test_bounds_of_sigma(alpha: float, alpha_prev: float) -> None:
    largest = max_sigma(alpha, alpha_prev)
    assert largest == min(alpha_prev / alpha, (1 - alpha_prev) / (1 - alpha)) <= 1 <= alpha_prev / alpha
    for fraction in np.linspace(0, 1, 11):
        weights = mixture_weights(alpha, alpha_prev, fraction * largest)
        assert min(weights) >= -1e-16
        assert sum(weights) == pytest.approx(1, abs=TOLERANCE)
    assert mixture_weights(alpha, alpha_prev, largest).uniform == pytest.approx(0, abs=1e-16)
    assert mixture_weights(alpha, alpha_prev, largest + 1e-6).uniform < 0
    assert posterior_table(3, alpha, alpha_prev, largest + 1e-6).min() < 0


def test_eta_is_how_random_a_step_is() -> None:
    assert sigma_of_eta(0.2, 0.6, 0.0) == max_sigma(0.2, 0.6)
    assert sigma_of_eta(0.2, 0.6, 1.0) == 0
    entropies = [
        float(torch.special.entr(posterior_table(3, 0.2, 0.6, sigma_of_eta(0.2, 0.6, eta))).sum())
        for eta in (0.0, 0.5, 1.0)
    ]
    assert entropies[0] < entropies[1] < entropies[2]
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="eta must be a number from 0 to 1"):
            sigma_of_eta(0.2, 0.6, eta)


@pytest.mark.parametrize("num_values", [2, 3, 5])
@pytest.mark.parametrize(("alpha", "alpha_prev"), STEPS)
def test_multinomial_posterior_is_that_of_bayes(alpha: float, alpha_prev: float, num_values: int) -> None:
    eye = rows(num_values)
    table = torch.stack([multinomial_posterior(eye, x0.expand_as(eye), alpha, alpha_prev) for x0 in eye])
    assert np.abs(table.numpy() - bayes_table(num_values, alpha, alpha_prev)).max() < TOLERANCE


@pytest.mark.parametrize(("alpha", "alpha_prev"), STEPS)
def test_two_values_have_the_multinomial_posterior(alpha: float, alpha_prev: float) -> None:
    sigma, ratio = binary_sigma(alpha, alpha_prev), alpha / alpha_prev
    table = posterior_table(2, alpha, alpha_prev, sigma).numpy()
    assert np.abs(table - bayes_table(2, alpha, alpha_prev)).max() < TOLERANCE
    # It lies below the maximum, unless the step leads to a clean image, where both are 0.
    largest = max_sigma(alpha, alpha_prev)
    assert sigma == pytest.approx(largest * ratio * (1 + alpha_prev) / (1 + alpha), abs=TOLERANCE)
    assert sigma < largest or sigma == largest == 0


@pytest.mark.parametrize(("alpha", "alpha_prev"), STEPS[1:])
def test_three_values_have_no_sigma_of_the_multinomial_posterior(alpha: float, alpha_prev: float) -> None:
    expected = bayes_table(3, alpha, alpha_prev)
    # Where x_t is not x_0, the probabilities of x_t and of the third value differ by sigma, which leaves one ...
    sigma = expected[0, 1, 1] - expected[0, 1, 2]
    assert sigma == pytest.approx(alpha / alpha_prev * max_sigma(alpha, alpha_prev), abs=TOLERANCE)
    # ... with which other probabilities are not those of the posterior.
    distances = [
        np.abs(posterior_table(3, alpha, alpha_prev, s).numpy() - expected).max()
        for s in (sigma, *np.linspace(0, max_sigma(alpha, alpha_prev), 101))
    ]
    assert min(distances) > 1e-3


@pytest.mark.parametrize(("alpha", "alpha_prev", "sigma"), [(0.3, 1.0, 0.0), (0.3, 0.3, 1.0), (0.0, 0.4, 0.0)])
def test_degenerate_steps_have_the_multinomial_posterior(alpha: float, alpha_prev: float, sigma: float) -> None:
    table = posterior_table(3, alpha, alpha_prev, sigma).numpy()
    assert np.abs(table - bayes_table(3, alpha, alpha_prev)).max() < TOLERANCE


def test_largest_sigma_is_one_random_value_and_the_time_of_a_change() -> None:
    """Each path has the probability of: x_0 up to a random timestep, one uniform value from there."""
    tables = [posterior_table(3, a, b, max_sigma(a, b)).numpy() for a, b in STEPS[:4]]
    alphas = [1.0, *ALPHAS, 0.0]
    for path in itertools.product(range(3), repeat=4):
        probability = float(marginal(rows(3)[1], ALPHAS[-1])[path[3]])
        for t in (3, 2, 1):
            probability *= tables[t][1, path[t], path[t - 1]]
        expected = 0.0
        for value, change in itertools.product(range(3), range(5)):  # x_t is the value from t = change on
            if path == (1,) * change + (value,) * (4 - change):
                expected += (alphas[change] - alphas[change + 1]) / 3
        assert probability == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("alpha", "alpha_prev"), STEPS)
def test_divergence_and_its_bound(alpha: float, alpha_prev: float, fraction: float) -> None:
    sigma, eye = fraction * max_sigma(alpha, alpha_prev), rows(3)
    predicted = torch.tensor([0.7, 0.05, 0.25], dtype=torch.float64)
    for x0, sample in itertools.product(eye, eye):
        q = posterior(sample, x0, alpha, alpha_prev, sigma)
        p = posterior(sample, predicted, alpha, alpha_prev, sigma)
        expected = sum(float(a * (a / b).log()) for a, b in zip(q, p, strict=True) if a > 1e-15)
        found = float(posterior_kl(sample, x0, predicted.log(), alpha, alpha_prev, sigma))
        cross_entropy = -float((x0 * predicted.log()).sum())
        assert found == pytest.approx(expected, abs=TOLERANCE)
        assert found <= (alpha_prev - sigma * alpha) * cross_entropy + TOLERANCE
        if alpha_prev == 1:
            assert found == pytest.approx(cross_entropy, abs=TOLERANCE)


def test_divergence_of_a_confident_error_is_finite() -> None:
    logits = torch.tensor([0.0, 2000.0], requires_grad=True)
    x0, sample = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for alpha_prev, sigma in ((1.0, 0.0), (0.7, 0.6)):
        loss = posterior_kl(sample, x0, logits.log_softmax(-1), 0.5, alpha_prev, sigma)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert bool(loss.isfinite())
        assert bool(gradient.isfinite().all())


def test_draws_have_their_probabilities() -> None:
    probabilities = torch.tensor([0.2, 0.0, 0.5, 0.3])
    uniform = (torch.arange(1000) + 0.5) / 1000
    counts = torch.bincount(draw(probabilities.expand(1000, 4), uniform), minlength=4)
    assert counts.tolist() == [200, 0, 500, 300]
    # The largest number below 1 draws nothing of probability 0, whatever the sum.
    largest = torch.tensor([1 - 2**-24])
    for total in (1 - 2**-23, 1.0, 1 + 2**-23):
        assert draw(torch.tensor([[0.0, total, 0.0]]), largest).item() == 1
