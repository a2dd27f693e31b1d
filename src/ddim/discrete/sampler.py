"""`DiscreteSampler`: a network, a `DiscreteDDIMScheduler` and an engine, ready to run.

It is the `Sampler` of values: int64 (N, C, H, W), which a network of C K channels is given as one-hot vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddim.diffusion.equations import Step
from ddim.diffusion.guidance import Conditions
from ddim.diffusion.loop import StepFn
from ddim.diffusion.noise import NoiseSource, check_seeds, noise_from_generator, noise_from_seeds
from ddim.diffusion.sampling_config import SamplingConfig
from ddim.discrete.values import to_samples
from ddim.io.images import check_output_type
from ddim.sampler import Sampler, SamplingPlan
from ddim.validation import real


class DiscreteSampler(Sampler):
    """A network and a scheduler of values, run by an engine; see `Sampler`.

    Guidance is linear in the logits: probabilities are those of the class, times a power of their ratio to those of the
    null class.

    Example:
        >>> from ddim.discrete.scheduler import DiscreteDDIMScheduler
        >>> from ddim.unet import UNet2DModel
        >>> unet = UNet2DModel(8, 3, 3, block_out_channels=(32,), down_block_types=("DownBlock2D",),
        ...                    up_block_types=("UpBlock2D",))
        >>> DiscreteSampler(unet, DiscreteDDIMScheduler(num_values=3)).sample_shape
        (1, 8, 8)
    """

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of the images: the network has K channels for each of theirs.

        Raises:
            ValueError: if the network's configuration has no `sample_size`.
        """
        channels, height, width = super().sample_shape
        return channels // self.scheduler.num_values, height, width

    def plan(self, config: SamplingConfig, takes_learned: bool = True) -> SamplingPlan:
        """Return the steps of a run; the scheduler's own timesteps are set to match.

        Args:
            config: the settings; `eta` from 0 to 1, and none of those of Gaussian noise alone.
            takes_learned: has no effect: nothing is learned for numbers of steps.

        Raises:
            ValueError: if the schedule does not allow them, or a setting has no meaning for values.
        """
        if config.order not in (None, 1):
            raise ValueError(f"order must be 1 for a discrete process, got {config.order}")
        for name in ("use_sigma_hat", "use_clipped_model_output"):
            if getattr(config, name):
                raise ValueError(f"{name} must be False for a discrete process, got True")
        real("eta of a discrete process", config.eta, 0, 1)
        timesteps = config.timesteps
        if timesteps is None:
            timesteps = self.scheduler.make_timesteps(config.num_inference_steps)
        steps = self.scheduler.make_steps(timesteps, config.eta)
        visited = [step.timestep for step in steps]
        self.scheduler.set_timesteps(timesteps=visited)
        return SamplingPlan(replace(config, timesteps=visited, order=1), steps)

    def check_output(self, output_type: str) -> None:
        """Check that images can be given out as an output type; see `Sampler.check_output`."""
        check_output_type(output_type, self.sample_shape[0], self.pixel_format)

    def to_output(self, samples: Tensor, output_type: str) -> Any:
        """Convert values to images; see `Sampler.to_output`.

        Args:
            samples: int64 (N, C, H, W), on any device.
            output_type: one of `ddim.io.images.OUTPUT_TYPES`.
        """
        return super().to_output(to_samples(samples, self.scheduler.num_values), output_type)

    def noise_source(
        self,
        shape: Sequence[int],
        generator: torch.Generator | Sequence[torch.Generator] | None,
        seeds: Sequence[int] | None,
    ) -> NoiseSource:
        """Return a source of numbers uniform in [0, 1), float32 whatever the network's dtype; see the base class."""
        if seeds is not None:
            return noise_from_seeds(shape, check_seeds(seeds, shape[0]), self.device, torch.rand)
        return noise_from_generator(shape, generator, self.device, torch.float32, torch.rand)

    def initial_noise(
        self,
        batch_size: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seeds: Iterable[int] | None = None,
        latents: Tensor | None = None,
    ) -> tuple[Tensor, NoiseSource]:
        """Return values at the first timestep, each as probable as the others, and the source of what draws the rest.

        Args:
            batch_size: N; left at 1, it follows the number of `seeds`.
            generator: of all noise: one, or a list of N; `None` for PyTorch's global one.
            seeds: one integer per image instead of a generator.
            latents: must be `None`.

        Returns:
            x, int64 (N, C, H, W) on the network's device; and a function that draws uniform numbers of its shape.

        Raises:
            ValueError: for both seeds and a generator, or another number of seeds than N.
        """
        if latents is not None:
            raise ValueError("latents must be None for a discrete process")
        uniform, source = super().initial_noise(batch_size, generator, seeds)
        return (uniform * self.scheduler.num_values).long(), source

    def step_fn(
        self,
        x: Tensor,
        plan: SamplingPlan,
        noise: NoiseSource | None = None,
        batch_size: int | None = None,
        conditions: Conditions | None = None,
    ) -> StepFn:
        """Return the step function of sampling.

        Args:
            x: the initial values, int64 (N, C, H, W).
            plan: the steps that will be taken.
            noise: draws uniform numbers of the shape of `x`.
            batch_size: evaluate the network on exactly so many samples at a time; `None` for all at once.
            conditions: of the samples, as `conditions` returns them.

        Raises:
            ValueError: without a source of noise.
        """
        if noise is None:
            raise ValueError("noise must be the source that initial_noise returns, got None")
        scheduler, denoiser = self.scheduler, self.denoiser(plan.steps, batch_size, conditions=conditions)

        def take_step(values: Tensor, timestep: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            logits = denoiser(scheduler.scale_model_input(values), timestep)
            result: tuple[Tensor, Tensor] = scheduler.update(logits, values, step, noise())
            return result

        return take_step
