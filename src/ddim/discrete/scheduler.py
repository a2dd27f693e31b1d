"""`DiscreteDDIMScheduler`: the interface of `DDIMScheduler` over the discrete process of `ddim.discrete.process`.

    scheduler.set_timesteps(20)
    for t in scheduler.timesteps:
        logits = unet(scheduler.scale_model_input(x), t).sample
        x = scheduler.step(logits, t, x, generator=generator).prev_sample

x are values: int64 (N, C, H, W) in 0..K-1. What the network is given and predicts: `ddim.discrete.values`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ddim.diffusion import schedule
from ddim.diffusion.equations import Step, make_steps
from ddim.diffusion.noise import noise_from_generator
from ddim.discrete.process import draw, marginal, max_sigma, posterior, sigma_of_eta
from ddim.discrete.values import MAX_VALUES, from_channels, one_hot, to_channels
from ddim.io.config import register_to_config
from ddim.io.pretrained import SchedulerFiles
from ddim.outputs import DDIMSchedulerOutput
from ddim.validation import choice, integer, shown

SPACINGS = ("alpha", *schedule.SPACINGS)


class DiscreteDDIMScheduler(SchedulerFiles):
    """The noise schedule of values, the timesteps at which the network is evaluated, and the step between them.

    Args:
        num_train_timesteps: T, the number of timesteps.
        beta_start: beta at t = 0, in (0, 1).
        beta_end: beta at t = T - 1, in (0, 1).
        beta_schedule: one of `ddim.diffusion.schedule.BETA_SCHEDULES`. A beta is the probability that a value is drawn
            anew between two timesteps.
        trained_betas: betas that replace the schedule, as many as `num_train_timesteps`.
        timestep_spacing: `alpha`, equal steps in alpha from x_T to a clean image: each step decides about as many
            values. Or one of `ddim.diffusion.schedule.SPACINGS`.
        num_values: K, from 2 to 256.

    Attributes:
        alphas_cumprod: float32 (T,); the paper's alpha_t.
        alphas_cumprod_float64: the same before rounding, float64 (T,).
        timesteps: int64 tensor, decreasing: all T of them until `set_timesteps` is called.
        num_inference_steps: how many there are, `None` until then.

    Raises:
        ValueError: for names that do not exist and numbers out of range.

    References:
        Appendix A of arXiv 2010.02502.

    Example:
        >>> scheduler = DiscreteDDIMScheduler(num_values=3)
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps
        tensor([999, 663, 495, 327])
    """

    config_name = "scheduler_config.json"
    solver_order = 1
    clip = None

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "squaredcos_cap_v2",
        trained_betas: ArrayLike | None = None,
        timestep_spacing: str = "alpha",
        num_values: int = 2,
    ) -> None:
        self.num_values = integer("num_values", num_values, 2, MAX_VALUES)
        choice("timestep_spacing", timestep_spacing, SPACINGS)
        betas = schedule.make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
        if trained_betas is not None:
            betas = schedule.check_betas(trained_betas)
        if len(betas) != num_train_timesteps:
            raise ValueError(f"trained_betas must hold {num_train_timesteps} numbers, got {len(betas)}")
        self.alphas_cumprod_float64: NDArray[np.float64] = schedule.make_alphas_cumprod(betas)
        self.alphas_cumprod = torch.tensor(self.alphas_cumprod_float64, dtype=torch.float32)
        alphas = self.alphas_cumprod_float64
        self._neighbors = alphas, np.concatenate([np.ones(1), alphas[:-1]])
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(len(betas)).flip(0)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string().rstrip()}"

    def make_timesteps(self, num_inference_steps: int, spacing: str | None = None) -> list[int]:
        """Return the subsequence of timesteps for a number of steps.

        Args:
            num_inference_steps: S, from 1 to T.
            spacing: one of `SPACINGS`; `None` for the configured one.

        Returns:
            At most S integers in [0, T - 1], strictly decreasing.

        Raises:
            ValueError: for an unknown spacing, or a number of steps that is not an integer from 1 to T.

        Example:
            >>> DiscreteDDIMScheduler().make_timesteps(2), DiscreteDDIMScheduler().make_timesteps(2, "trailing")
            ([999, 495], [999, 499])
        """
        chosen = choice("spacing", self.config.timestep_spacing if spacing is None else spacing, SPACINGS)
        if chosen == "alpha":
            S = integer("num_inference_steps", num_inference_steps, 1, len(self))
            # The alphas from which steps start, largest first; the last timestep, of least alpha, is always among them.
            starts = np.arange(S)[::-1] / S
            nearest = np.abs(self.alphas_cumprod_float64 - starts[:, None]).argmin(1)
            nearest[-1] = len(self) - 1
            return schedule.make_distinct(nearest, len(self) - 1)[::-1].tolist()
        return schedule.make_timesteps(chosen, num_inference_steps, self.alphas_cumprod_float64)

    def make_steps(self, timesteps: Sequence[int], eta: float = 0.0) -> list[Step]:
        """Return the steps along a subsequence of timesteps; the last one leads to alpha = 1.

        Args:
            timesteps: strictly decreasing integers in [0, T - 1].
            eta: from 0, the least random, to 1: sigma is (1 - eta) times its maximum.

        Raises:
            ValueError: for a list or an eta that is not allowed.
            TypeError: if `eta` is not a number.

        Example:
            >>> [step.sigma for step in DiscreteDDIMScheduler().make_steps([900, 300, 0], eta=1.0)]
            [0.0, 0.0, 0.0]
        """
        steps = make_steps(schedule.check_timesteps(timesteps, len(self)), self.alphas_cumprod_float64)
        return [replace(step, sigma=sigma_of_eta(step.alpha, step.alpha_prev, eta)) for step in steps]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the subsequence of timesteps that `step` follows.

        Args:
            num_inference_steps: S, from 1 to T.
            device: where the tensor `timesteps` is kept.
            timesteps: a custom list instead of S: strictly decreasing integers in [0, T - 1].

        Raises:
            ValueError: for both or neither, or values that the schedule does not allow.

        Example:
            >>> scheduler = DiscreteDDIMScheduler()
            >>> scheduler.set_timesteps(timesteps=[900, 300, 0])
            >>> scheduler.num_inference_steps
            3
        """
        if num_inference_steps is not None and timesteps is None:
            chosen = self.make_timesteps(num_inference_steps)
        elif num_inference_steps is None and timesteps is not None:
            chosen = schedule.check_timesteps(timesteps, len(self))
        else:
            raise ValueError("give either num_inference_steps or timesteps, not both or neither")
        self.num_inference_steps = len(chosen)
        self.timesteps = torch.tensor(chosen, dtype=torch.int64, device=device)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """Return values as the network is given them: K channels for each.

        Args:
            sample: x_t, int64 (N, C, H, W).
            timestep: not used; schedulers are interchangeable.

        Returns:
            float32 (N, C K, H, W).

        Example:
            >>> DiscreteDDIMScheduler().scale_model_input(torch.ones(1, 1, 8, 8, dtype=torch.int64)).shape
            torch.Size([1, 2, 8, 8])
        """
        return to_channels(sample, self.num_values)

    @overload
    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        uniform: Tensor | None = None,
        return_dict: Literal[True] = True,
    ) -> DDIMSchedulerOutput: ...

    @overload
    def step(self, *args: Any, return_dict: Literal[False], **kwargs: Any) -> tuple[Tensor, Tensor]: ...

    def step(  # type: ignore[misc]  # the second signature stands for all arguments
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        uniform: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step of the generative process.

        Args:
            model_output: the logits that the network predicts from `scale_model_input(sample)`, (N, C K, H, W).
            timestep: t, an entry of `timesteps`; the step leads to the next one, and from the last to a clean image.
            sample: x_t, int64 (N, C, H, W).
            eta: from 0, the least random, to 1.
            generator: draws the values; one, or one per image.
            uniform: what they are drawn with, uniform in [0, 1), (N, C, H, W), instead of a generator.
            return_dict: `False` for a tuple.

        Returns:
            `DDIMSchedulerOutput` with `prev_sample` and the most probable x_0, `pred_original_sample`, both int64
            (N, C, H, W); or the two as a tuple.

        Raises:
            ValueError: if `set_timesteps` has not been called, the timestep is not an entry of `timesteps`, eta is out
                of range, or both a generator and `uniform` are given.

        References:
            Equation (20) of arXiv 2010.02502.

        Example:
            >>> scheduler = DiscreteDDIMScheduler()
            >>> scheduler.set_timesteps(1)
            >>> logits = torch.tensor([-9.0, 9.0]).view(1, 2, 1, 1)
            >>> scheduler.step(logits, 999, torch.zeros(1, 1, 1, 1, dtype=torch.int64)).prev_sample.item()
            1
        """
        if self.num_inference_steps is None:
            raise ValueError("set_timesteps(num_inference_steps) must be called before step")
        if generator is not None and uniform is not None:
            raise ValueError("generator and uniform exclude each other; give one of them")
        entries = self.timesteps.tolist()
        if int(timestep) not in entries:
            raise ValueError(f"timestep must be one of those that were set ({shown(entries)}), got {int(timestep)}")
        index = entries.index(int(timestep))
        step = self.make_steps(entries[index : index + 2], eta)[0]
        if uniform is None:
            uniform = noise_from_generator(sample.shape, generator, sample.device, torch.float32, torch.rand)()
        result = self.update(model_output, sample, step, uniform)
        return DDIMSchedulerOutput(*result) if return_dict else result

    def update(self, model_output: Tensor, sample: Tensor, step: Step, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step whose coefficients are known; see `step`.

        Args:
            model_output: logits, (N, C K, H, W).
            sample: x_t, int64 (N, C, H, W).
            step: one of `make_steps`.
            uniform: uniform in [0, 1), (N, C, H, W).

        Returns:
            x after the step and the most probable x_0, int64 (N, C, H, W).
        """
        predicted = from_channels(model_output.float(), self.num_values).softmax(-1)
        given = one_hot(sample, self.num_values)
        probabilities = posterior(given, predicted, step.alpha, step.alpha_prev, step.sigma)
        return draw(probabilities, uniform), predicted.argmax(-1)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return a sample of q(x_t | x_0).

        Args:
            original_samples: x_0, int64 (N, C, H, W).
            noise: uniform in [0, 1), (N, C, H, W).
            timesteps: (N,) or () integers.

        Returns:
            x_t, int64 (N, C, H, W).

        References:
            Equation (17) of arXiv 2010.02502.

        Example:
            >>> x0, uniform = torch.ones(1, 1, 1, 3, dtype=torch.int64), torch.tensor([[[[0.0, 0.4, 0.9]]]])
            >>> DiscreteDDIMScheduler().add_noise(x0, uniform, torch.tensor([999]))
            tensor([[[[0, 0, 1]]]])
        """
        alpha = self._gather(self.alphas_cumprod, timesteps, noise)
        return draw(marginal(one_hot(original_samples, self.num_values), alpha), noise)

    def training_step(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return alpha, alpha_prev and the largest sigma of the steps between neighboring timesteps.

        Args:
            timesteps: t, (N,) integers; a step leads to t - 1, and from 0 to alpha = 1.
            like: a tensor (N, ...) on the device where they are used.

        Returns:
            Three tensors float32 (N, 1, ...) that broadcast against probabilities (N, ..., K).

        Example:
            >>> scheduler = DiscreteDDIMScheduler(trained_betas=[0.5, 0.5], num_train_timesteps=2)
            >>> [float(factor) for factor in scheduler.training_step(torch.tensor([1]), torch.zeros(1))]
            [0.25, 0.5, 0.6666666865348816]
        """
        alpha, alpha_prev = (torch.from_numpy(alphas) for alphas in self._neighbors)
        factors = alpha, alpha_prev, max_sigma(alpha, alpha_prev)
        first, second, third = (self._gather(factor.float(), timesteps, like) for factor in factors)
        return first, second, third

    def _gather(self, values: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
        """Return values at timesteps, on the device of a tensor (N, ...), broadcastable against (N, ..., K)."""
        return values.to(like.device)[timesteps.to(like.device)].reshape(-1, *[1] * like.ndim)
