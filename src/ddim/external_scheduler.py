"""Sampling by the methods of a scheduler that is not this library's, or not as it was written.

    scheduler.set_timesteps(S)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, eta=..., generator=...).prev_sample

which is how pipelines of `diffusers` sample. Of `step`'s arguments those are given that the scheduler has; a setting
that it has no argument for is refused. `DDIMScheduler` itself is sampled by `ddim.sampler`, faster and in float64.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddim.diffusion.guidance import Conditions
from ddim.diffusion.sampling_config import SamplingConfig
from ddim.sampler import ProgressBar, Sampler

OnStepEnd = Callable[[int, int, Tensor, Tensor], Tensor]
"""Called as `on_step_end(step_index, timestep, sample, pred_original_sample)`; returns the sample to continue from."""


@dataclass(frozen=True)
class StepArguments:
    """What is given to a scheduler's `step` besides the sample; see there for the meaning.

    Attributes:
        eta: passed on where `step` takes it.
        use_clipped_model_output: passed on where it is not `None`.
        generator: one, or a list of one per image; passed on where `step` takes it.
    """

    eta: float = 0.0
    use_clipped_model_output: bool | None = None
    generator: torch.Generator | Sequence[torch.Generator] | None = None

    def accepted_by(self, scheduler: Any) -> dict[str, Any]:
        """Return those that the `step` of a scheduler takes.

        Args:
            scheduler: any object with `step`.

        Raises:
            ValueError: for a setting that it does not take.

        Example:
            >>> from ddim import DDIMInverseScheduler
            >>> StepArguments(eta=0.5).accepted_by(DDIMInverseScheduler())
            Traceback (most recent call last):
            ValueError: eta must be left at its default: DDIMInverseScheduler.step does not take it
        """
        accepted = _arguments(scheduler.step)
        settings = {"eta": self.eta, "use_clipped_model_output": self.use_clipped_model_output}
        for name, value in settings.items():
            if value and not {name, "**"} & accepted:
                raise ValueError(
                    f"{name} must be left at its default: {type(scheduler).__name__}.step does not take it"
                )
        given = {name: value for name, value in settings.items() if value is not None}
        return {k: v for k, v in (given | {"generator": self.generator}).items() if {k, "**"} & accepted}


def run_scheduler(
    sampler: Sampler,
    x: Tensor,
    config: SamplingConfig,
    arguments: StepArguments,
    is_noise: bool = True,
    on_step_end: OnStepEnd | None = None,
    progress_bar: ProgressBar | None = None,
    conditions: Conditions | None = None,
) -> Tensor:
    """Sample by `set_timesteps` and `step` of a sampler's scheduler, without gradients.

    Args:
        sampler: the network and the scheduler.
        x: standard Gaussian noise, or the sample at the first timestep, (N, C, H, W).
        config: the timesteps or their number.
        arguments: of `step`.
        is_noise: whether `x` is noise, which is scaled by the scheduler's `init_noise_sigma`.
        on_step_end: called after each step.
        progress_bar: opens the bar; `None` for the sampler's own.
        conditions: of the samples, as `Sampler.conditions` returns them.

    Returns:
        x after the last step, (N, C, H, W).

    Raises:
        ValueError: for a setting that the scheduler does not take, before the network runs.

    Example:
        >>> from ddim import DDIMPipeline, DDIMScheduler
        >>> class Halving(DDIMScheduler):
        ...     def step(self, model_output, timestep, sample, **kwargs):
        ...         out = super().step(model_output, timestep, sample, **kwargs)
        ...         return type(out)(out.prev_sample / 2)
        >>> sampler = DDIMPipeline.from_pretrained("mnist").sampler
        >>> sampler.scheduler, sampler.progress_bar_config = Halving(), {"disable": True}
        >>> x = run_scheduler(sampler, torch.zeros(1, 1, 28, 28), SamplingConfig(1), StepArguments())
        >>> bool(x.abs().max() <= 0.5)
        True
    """
    scheduler = sampler.scheduler
    if config.order not in (None, 1) or config.use_sigma_hat:
        name = "use_sigma_hat" if config.use_sigma_hat else f"order={config.order}"
        raise ValueError(f"{name} requires the methods of DDIMScheduler, got a {type(scheduler).__name__} of its own")
    settings = arguments.accepted_by(scheduler)
    timesteps = _set_timesteps(scheduler, config, sampler.device)
    denoiser = sampler.denoiser([], conditions=conditions)
    scale = _no_scale
    # A scheduler whose step takes eta is of DDIM's kind, and sampled as the DDIMPipeline of diffusers does. That one
    # cannot run others, which may keep samples on another scale.
    if not {"eta", "**"} & _arguments(scheduler.step):
        scale = getattr(scheduler, "scale_model_input", _no_scale)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0) if is_noise else x
    with sampler.running(len(timesteps), progress_bar) as bar:
        for index, t in enumerate(timesteps):
            out = scheduler.step(denoiser(scale(x, t), t), t, x, **settings)
            x = out.prev_sample
            bar.update()
            if on_step_end is not None:
                x = on_step_end(index, int(t), x, getattr(out, "pred_original_sample", x))
    return x


def _no_scale(sample: Tensor, timestep: Tensor) -> Tensor:
    return sample


def _set_timesteps(scheduler: Any, config: SamplingConfig, device: torch.device) -> Tensor:
    """Have a scheduler choose its timesteps, and return them."""
    accepted = _arguments(scheduler.set_timesteps)
    on_device = {"device": device} if "device" in accepted else {}
    if config.timesteps is None:
        scheduler.set_timesteps(config.num_inference_steps, **on_device)
    elif "timesteps" in accepted:
        scheduler.set_timesteps(timesteps=list(config.timesteps), **on_device)
    else:
        raise ValueError(f"timesteps must be None: {type(scheduler).__name__}.set_timesteps takes only their number")
    timesteps: Tensor = scheduler.timesteps
    return timesteps


def _arguments(function: Callable[..., Any]) -> set[str]:
    """Return the names of a function's arguments, and `**` if it takes any."""
    parameters = inspect.signature(function).parameters.values()
    return {"**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters}
