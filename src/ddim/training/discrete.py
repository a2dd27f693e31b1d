"""The objective of the discrete process: what `ddim.training.objective` is for Gaussian noise.

The network predicts the logits of f_theta(x_t), a distribution of x_0. Two losses lead to the same optimum:

    simple    L = E_t,x0,xt  -log f_theta(x_t)[x_0]                                       the cross-entropy of x_0
    kl        L = E_t,x0,xt  T KL(q_sigma(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t))  (21)

`kl` is at the largest sigma, which sampling has at eta = 0, and is the variational bound on -log p_theta(x_0), in nats
per value, up to the divergence of q(x_T | x_0) from uniform values. Divergences are convex, so that each of its terms
is at most T (alpha_{t-1} - sigma_t alpha_t) times that of `simple`: the two differ in the weights of timesteps, as do
those of any other sigma. At t = 0, the first timestep, the two are equal but for T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddim.discrete import DiscreteDDIMScheduler
from ddim.discrete.process import posterior_kl
from ddim.discrete.values import from_channels, one_hot, quantize
from ddim.training.config import ObjectiveConfig
from ddim.training.objective import DenoisingObjective


class DiscreteObjective(DenoisingObjective):
    """The distribution of x_0 given values of which some were drawn anew, at all timesteps.

    Args:
        scheduler: the noise schedule and the number of values.
        antithetic: draw timesteps in pairs, as `draw_timesteps` does.
        weighting: `simple`, the cross-entropy of x_0, or `kl`, the divergence of the posteriors.

    References:
        Equation (21) of arXiv 2010.02502 and the bound after it.

    Example:
        >>> objective = DiscreteObjective(DiscreteDDIMScheduler())
        >>> x0, noise, t = torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), torch.tensor([0])
        >>> noisy = objective.noised(x0, noise, t)
        >>> objective.losses(torch.zeros(1, 2, 8, 8), objective.target(x0, noise, t, noisy), noisy, t)
        tensor([0.6931])
    """

    def __init__(self, scheduler: DiscreteDDIMScheduler, antithetic: bool = True, weighting: str = "simple") -> None:
        self.scheduler, self.antithetic, self.weighting = scheduler, antithetic, weighting

    def draw_noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw numbers uniform in [0, 1); see `Objective.draw_noise`."""
        return torch.rand(tuple(shape), generator=generator, device=generator.device)

    def noised(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the channels of x_t, (n, C K, H, W); see `Objective.noised`."""
        values = self.scheduler.add_noise(quantize(x0, self.scheduler.num_values), noise, timesteps)
        return self.scheduler.scale_model_input(values)

    def target(
        self, x0: Tensor, noise: Tensor, timesteps: Tensor, noisy: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Return the values of x_0, int64 (n, C, H, W); see `Objective.target`."""
        return quantize(x0, self.scheduler.num_values)

    def losses(self, predicted: Tensor, target: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Return the cross-entropies, or the divergences, in nats per value; see `Objective.losses`."""
        K = self.scheduler.num_values
        log_predicted = from_channels(predicted.float(), K).log_softmax(-1)
        if self.weighting == "simple":
            losses = -log_predicted.gather(-1, target[..., None]).squeeze(-1)
        else:
            sample = (from_channels(noisy.float(), K) + 1) / 2
            factors = self.scheduler.training_step(timesteps, target)
            losses = posterior_kl(sample, one_hot(target, K), log_predicted, *factors)
        return losses.flatten(1).mean(1)

    def loss_weights(self, config: ObjectiveConfig) -> Tensor:
        """Return 1 for `simple` and T for `kl`; see `Objective.loss_weights`."""
        T = len(self.scheduler)
        return torch.full((T,), 1.0 if config.weighting == "simple" else float(T))
