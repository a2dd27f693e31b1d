"""The objective: equation (5) of the paper,

    L = E_t,x0,epsilon  w(t) || target - f_theta(sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) epsilon, t) ||^2

with t uniform over 0 .. T-1. The target is epsilon, x_0 or v, by the scheduler's prediction type. `simple` is DDPM's
L_simple, w = 1 on whatever is predicted. The other weightings are stated for the error of x_0, and SNR = alpha / (1 -
alpha) carries them over: an error of epsilon is SNR times that of x_0, an error of v is SNR + 1 times (arXiv
2202.00512, appendix D), so that

    weight on the error of x_0         epsilon         x_0           v
    min(SNR, gamma)     min_snr        min(1, g/SNR)   min(SNR, g)   min(SNR, g) / (SNR + 1)    arXiv 2303.09556
    max(SNR, 1)         truncated_snr  max(1, 1/SNR)   max(SNR, 1)   max(SNR, 1) / (SNR + 1)    arXiv 2202.00512
"""

from __future__ import annotations

import torch
from torch import Tensor

QUARTILES = 4


def draw_timesteps(count: int, num_train_timesteps: int, antithetic: bool, generator: torch.Generator) -> Tensor:
    """Timesteps of a batch, int64 (count,), uniform over 0 .. T-1.

    Args:
        count: how many.
        num_train_timesteps: T.
        antithetic: draw count // 2 + 1 of them and take T - 1 - t of the first ones for the others, as the original
            code does: a batch then has about as many early as late timesteps, which lowers the variance of the loss.
        generator: decides them, and the device they are on.
    """
    drawn = count // 2 + 1 if antithetic else count
    t = torch.randint(num_train_timesteps, (drawn,), generator=generator, device=generator.device)
    return torch.cat([t, num_train_timesteps - 1 - t])[:count] if antithetic else t


def loss_weights(alphas_cumprod: Tensor, prediction_type: str, weighting: str, gamma: float) -> Tensor:
    """w(t) for every timestep, on the error of what is predicted.

    Args:
        alphas_cumprod: (T,) float64.
        prediction_type: `epsilon`, `sample` or `v_prediction`.
        weighting: `simple`, `min_snr` or `truncated_snr`.
        gamma: of `min_snr`.

    Returns:
        (T,) float32.

    Raises:
        ValueError: if a weight would be infinite: `truncated_snr` of epsilon where alpha is 0.
    """
    if weighting == "simple":
        return torch.ones(len(alphas_cumprod))
    snr = alphas_cumprod.double() / (1 - alphas_cumprod.double())
    limited = snr.clamp_max(gamma) if weighting == "min_snr" else snr.clamp_min(1.0)
    if prediction_type == "sample":
        weights = limited
    elif prediction_type == "v_prediction":
        weights = limited / (snr + 1)
    else:
        weights = (gamma / snr).clamp_max(1.0) if weighting == "min_snr" else (1 / snr).clamp_min(1.0)
    if not bool(weights.isfinite().all()):
        raise ValueError(
            f"the weighting {weighting} of {prediction_type} is infinite where alphas_cumprod is 0 or 1, as this "
            "schedule is; predict v, or take the weighting min_snr or simple"
        )
    return weights.float()


def by_quartile(losses: Tensor, timesteps: Tensor, num_train_timesteps: int) -> tuple[Tensor, Tensor]:
    """Sums of losses, and how many there are, by quartile of the timestep, the least noisy first.

    Args:
        losses: (N,) a sample.
        timesteps: (N,).
        num_train_timesteps: T.

    Returns:
        Two float32 tensors (4,).
    """
    quartile = timesteps * QUARTILES // num_train_timesteps
    member = torch.nn.functional.one_hot(quartile, QUARTILES).float()
    return losses.float() @ member, member.sum(0)
