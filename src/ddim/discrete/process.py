"""The discrete process as pure functions of tensors: appendix A of arXiv 2010.02502.

x_0 is a one-hot vector of K values, for each entry of an image. With alpha = `alphas_cumprod[t]` (the paper's alpha_t)
and the vector 1/K of all entries 1/K

    q(x_t | x_0) = Cat(alpha x_0 + (1 - alpha) 1/K)                                                        (17)

The step from x_t to x_prev, at alpha_prev >= alpha, is a mixture of three: keep x_t, take x_0, or draw a value anew:

    q(x_prev | x_t, x_0) = Cat(sigma x_t + (alpha_prev - sigma alpha) x_0
                               + ((1 - alpha_prev) - (1 - alpha) sigma) 1/K)                               (19)

Averaged over (17) this is Cat(alpha_prev x_0 + (1 - alpha_prev) 1/K): the marginals are those of (17) for every sigma.
The weights are nonnegative for

    0 <= sigma <= min(alpha_prev / alpha, (1 - alpha_prev) / (1 - alpha)) = (1 - alpha_prev) / (1 - alpha)

the first bound being at least 1 and the second at most 1. At the maximum nothing is drawn anew: x_prev is x_t or x_0.
All noise of a chain is then in x_T and in when each entry changes from it to x_0. At sigma = 0 a step forgets x_t. Here
sigma = (1 - eta) times the maximum, so that eta = 0 is the least random, as it is for Gaussian noise.

The posterior of the Markov chain with these marginals (arXiv 2102.05379, section 4) is

    q(x_prev | x_t, x_0) = Cat(theta / sum theta),  theta = (a x_t + (1 - a) 1/K) * (alpha_prev x_0 + (1 - alpha_prev)
                                                             1/K),  a = alpha / alpha_prev

For K = 2 it is (19) with `binary_sigma`, a (1 - alpha_prev^2) / (1 - alpha^2): the maximum times a (1 + alpha_prev) /
(1 + alpha), below the maximum unless a or alpha_prev is 1. It is what DDPM is to DDIM: with alpha for the square root
of the Gaussian alphas_cumprod, this is the weight of x_t there. For K > 2 no sigma gives it, but for a = 0, a = 1 or
alpha_prev = 1: given x_t, it is a mixture of the same three, but its weights depend on whether x_t is x_0, and those
of (19) do not.

Probabilities have K as the last dimension. Alphas and sigmas are numbers, or tensors that broadcast against them.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ddim.validation import real

Alpha = TypeVar("Alpha", float, Tensor)


class Weights(NamedTuple):
    """The weights of a step's mixture, which sum to 1.

    Attributes:
        sample: of x_t.
        original: of x_0.
        uniform: of a value that is drawn anew.
    """

    sample: float | Tensor
    original: float | Tensor
    uniform: float | Tensor


def mixture_weights(alpha: float | Tensor, alpha_prev: float | Tensor, sigma: float | Tensor) -> Weights:
    """Return the weights of a step's mixture.

    Args:
        alpha: alphas_cumprod at t, in [0, 1).
        alpha_prev: alphas_cumprod where the step leads, in [alpha, 1].
        sigma: from 0 to `max_sigma`.

    References:
        Equation (18) of arXiv 2010.02502.

    Example:
        >>> mixture_weights(0.25, 0.5, 0.5)
        Weights(sample=0.5, original=0.375, uniform=0.125)
    """
    return Weights(sigma, alpha_prev - sigma * alpha, (1 - alpha_prev) - (1 - alpha) * sigma)


def max_sigma(alpha: Alpha, alpha_prev: Alpha) -> Alpha:
    """Return the largest sigma of a step, at which no value is drawn anew: (1 - alpha_prev) / (1 - alpha).

    Args:
        alpha: alphas_cumprod at t, in [0, 1).
        alpha_prev: alphas_cumprod where the step leads, in [alpha, 1].

    Example:
        >>> max_sigma(0.2, 0.6)
        0.5
    """
    return (1 - alpha_prev) / (1 - alpha)


def sigma_of_eta(alpha: float, alpha_prev: float, eta: float) -> float:
    """Return (1 - eta) times the largest sigma.

    Args:
        alpha: alphas_cumprod at t, in [0, 1).
        alpha_prev: alphas_cumprod where the step leads, in [alpha, 1].
        eta: from 0, the least random, to 1, where a step forgets x_t.

    Raises:
        ValueError: for another eta.
        TypeError: if `eta` is not a number.

    Example:
        >>> sigma_of_eta(0.2, 0.6, eta=0.5)
        0.25
    """
    return (1 - real("eta", eta, 0, 1)) * max_sigma(alpha, alpha_prev)


def binary_sigma(alpha: float, alpha_prev: float) -> float:
    """Return the sigma at which a step of K = 2 values is the posterior of multinomial diffusion.

    Args:
        alpha: alphas_cumprod at t, in [0, 1).
        alpha_prev: alphas_cumprod where the step leads, in [alpha, 1], above 0.

    Example:
        >>> binary_sigma(0.5, 1.0)
        0.0
    """
    return alpha / alpha_prev * (1 - alpha_prev**2) / (1 - alpha**2)


def marginal(x0: Tensor, alpha: float | Tensor) -> Tensor:
    """Return the probabilities of q(x_t | x_0).

    Args:
        x0: one-hot, or probabilities of x_0, (..., K).
        alpha: alphas_cumprod at t, in [0, 1].

    Returns:
        (..., K).

    References:
        Equation (17) of arXiv 2010.02502.

    Example:
        >>> marginal(torch.tensor([1.0, 0.0]), 0.5)
        tensor([0.7500, 0.2500])
    """
    return alpha * x0 + (1 - alpha) / x0.shape[-1]


def posterior(
    sample: Tensor, x0: Tensor, alpha: float | Tensor, alpha_prev: float | Tensor, sigma: float | Tensor
) -> Tensor:
    """Return the probabilities of q_sigma(x_prev | x_t, x_0), and with a predicted x_0 those of p_theta(x_prev | x_t).

    They are linear in x_0: those for predicted probabilities are the average over an x_0 that is drawn from them.

    Args:
        sample: x_t, one-hot, (..., K).
        x0: x_0, one-hot; or the predicted probabilities f_theta(x_t), (..., K).
        alpha: alphas_cumprod at t, in [0, 1).
        alpha_prev: alphas_cumprod where the step leads, in [alpha, 1].
        sigma: from 0 to `max_sigma`.

    Returns:
        (..., K).

    References:
        Equations (19) and (20) of arXiv 2010.02502.

    Example:
        >>> posterior(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.2, 0.6, 0.5)
        tensor([0.5000, 0.5000])
    """
    weights = mixture_weights(alpha, alpha_prev, sigma)
    return weights.sample * sample + weights.original * x0 + weights.uniform / x0.shape[-1]


def multinomial_posterior(sample: Tensor, x0: Tensor, alpha: float | Tensor, alpha_prev: float | Tensor) -> Tensor:
    """Return the probabilities of the posterior of multinomial diffusion, a Markov chain with the same marginals.

    Args:
        sample: x_t, one-hot, (..., K).
        x0: x_0, one-hot, or probabilities of it, (..., K).
        alpha: alphas_cumprod at t, in [0, 1).
        alpha_prev: alphas_cumprod where the step leads, in [alpha, 1], above 0.

    Returns:
        (..., K).

    References:
        Hoogeboom et al., arXiv 2102.05379, section 4.

    Example:
        >>> multinomial_posterior(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), 0.25, 0.5)
        tensor([0.9000, 0.1000])
    """
    theta = marginal(sample, alpha / alpha_prev) * marginal(x0, alpha_prev)
    return theta / theta.sum(-1, keepdim=True)


def posterior_kl(
    sample: Tensor,
    x0: Tensor,
    log_predicted: Tensor,
    alpha: float | Tensor,
    alpha_prev: float | Tensor,
    sigma: float | Tensor,
) -> Tensor:
    """Return KL(q_sigma(x_prev | x_t, x_0) || p_theta(x_prev | x_t)), in nats.

    It is at most (alpha_prev - sigma alpha) times the cross-entropy -log f_theta(x_t)[x_0], and equal to it in the step
    to a clean image, where it is -log p_theta(x_0 | x_1): divergences are convex.

    Args:
        sample: x_t, one-hot, (..., K).
        x0: x_0, one-hot, (..., K).
        log_predicted: logarithms of the predicted probabilities f_theta(x_t), (..., K).
        alpha: alphas_cumprod at t, in [0, 1).
        alpha_prev: alphas_cumprod where the step leads, in [alpha, 1].
        sigma: from 0 to `max_sigma`.

    Returns:
        (...), nonnegative up to rounding.

    References:
        Equation (21) of arXiv 2010.02502.

    Example:
        >>> x0, log_predicted = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]).log()
        >>> posterior_kl(torch.tensor([0.0, 1.0]), x0, log_predicted, 0.5, 1.0, 0.0)
        tensor(0.6931)
    """
    weights = mixture_weights(alpha, alpha_prev, sigma)
    # At the largest sigma the weight of uniform values rounds to a little below 0.
    given = (weights.sample * sample + weights.uniform / x0.shape[-1]).clamp_min(0)
    q = given + weights.original * x0
    # In logarithms, because a confident prediction rounds to 0; those of 0 are replaced by one below all that count.
    tiny = torch.finfo(log_predicted.dtype).tiny
    original = torch.as_tensor(weights.original, dtype=log_predicted.dtype, device=log_predicted.device)
    log_p = torch.logaddexp(given.clamp_min(tiny).log(), original.clamp_min(tiny).log() + log_predicted)
    return (torch.xlogy(q, q) - q * log_p).sum(-1)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw values by the inverse of their cumulative distribution.

    Args:
        probabilities: (..., K); they need not sum to 1 exactly.
        uniform: uniform in [0, 1), (...).

    Returns:
        int64 (...), in 0..K-1; never a value of probability 0.

    Example:
        >>> draw(torch.tensor([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]]), torch.tensor([0.6, 0.999]))
        tensor([1, 1])
    """
    cumulative = probabilities.cumsum(-1)
    scaled = uniform.unsqueeze(-1) * cumulative[..., -1:]
    return (scaled >= cumulative[..., :-1]).sum(-1)
