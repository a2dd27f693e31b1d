"""Inversion of a model: images to latents along the steps of decoding, and back.

`encode` and `decode` are inverses of each other, which plain sampling is not, for two reasons. Its last step jumps to
alpha = 1, where a good denoiser is a projection onto the images it knows. And many schedulers clip the predicted x_0,
so that different x_t lead to one x_prev. Therefore both run between the largest timestep and the schedule's first alpha
(`set_alpha_to_one=False`; with the usual schedule the noise left there is 0.01, which cannot be seen), and do not clip.

Most networks round a little differently for batches of different sizes, and near the images inversion magnifies small
differences. An image's latent depends, to the bit, neither on the number of other images nor on which they are: the
CPU engine computes each image alone, and elsewhere batches have exactly `batch_size` images, filled up where they are
short. A larger `batch_size` is faster on a GPU.

Encoding and decoding run in evaluation mode, as dropout would make another function of the network each time.
`ddim.diffusion.inversion` and `ddim.diffusion.pairs` have the mathematics of a step, `ddim.latents` what users call.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.diffusion.equations import Step
from ddim.diffusion.guidance import Conditions, take_rows
from ddim.diffusion.inversion import Inversion
from ddim.diffusion.loop import StepFn, StepSettings, generative_step
from ddim.diffusion.pairs import Leapfrog, reversed_step
from ddim.outputs import EncodeOutput
from ddim.sampler import ProgressBar, Sampler, evaluating
from ddim.scheduler import DDIMScheduler, check_own_steps
from ddim.validation import choice, integer, real

logger = logging.getLogger(__name__)

CLEAN_ALPHA = 0.9999
"""Alpha of an image of a model that was distilled to few steps: the first of DDPM's schedule."""
GRAY_LEVEL = 1 / 255
"""A root mean square error above this is logged as a warning."""

METHODS = ("solve", "pair")
"""Of exact inversion: solve the equation of each step of DDIM (`ddim.diffusion.inversion`), or go from two states to
the next (`ddim.diffusion.pairs`)."""

PAIR_ITERATIONS = 8
"""Function evaluations for the first step of pairs, at most. It need not be solved: more of them hardly change the
latents."""

BATCHES_PER_GROUP = 8
"""Batches whose images are inverted together: as images converge, the others are gathered into full batches."""


@dataclass(frozen=True)
class InversionConfig:
    """How images are inverted.

    Attributes:
        exact: the latents decode to the image again; `False` takes the paper's Euler steps (equation 13).
        tolerance: a step is solved when the step of decoding lands this close to where encoding came from, in every
            value, on the scale of [-1, 1]; above 0, below 1.
        max_iterations: function evaluations per step and image, at most; from 1 to 1000.
        batch_size: images per network evaluation.
        verify: decode the latents and report each image's error, for S more function evaluations per image.
        method: of exact inversion, one of `METHODS`.

    Raises:
        ValueError: for a value out of range.
        TypeError: for a tolerance that is not a number.

    Example:
        >>> InversionConfig(tolerance=2)
        Traceback (most recent call last):
        ValueError: tolerance must be a number above 0 and below 1, got 2
    """

    exact: bool = True
    tolerance: float = 1e-5
    max_iterations: int = 50
    batch_size: int = 8
    verify: bool = True
    method: str = "solve"

    def __post_init__(self) -> None:
        choice("method", self.method, METHODS)
        if self.method == "pair" and not self.exact:
            raise ValueError("method='pair' requires exact=True, got exact=False")
        real("tolerance", self.tolerance, above=0, below=1)
        integer("max_iterations", self.max_iterations, 1, 1000)
        integer("batch_size", self.batch_size, 1)


def invertible_steps(
    scheduler: DDIMScheduler, num_inference_steps: int, timesteps: Sequence[int] | None = None, order: int = 1
) -> list[Step]:
    """Return the steps of decoding, from the largest timestep to the schedule's first alpha, or that of an image.

    Args:
        scheduler: the noise schedule.
        num_inference_steps: S, from 1 to T.
        timesteps: a custom subsequence instead of S: strictly decreasing integers.
        order: of the solver, 1 to 4.

    Raises:
        ValueError: for an argument out of range, or timesteps among which 0 is the only one.
        TypeError: if the scheduler does not take the steps of `DDIMScheduler`.

    Example:
        >>> [step.timestep for step in invertible_steps(DDIMScheduler(), 2)]
        [500, 0]
    """
    without_jump = DDIMScheduler.from_config(check_own_steps(scheduler).config, set_alpha_to_one=False)
    # A schedule that was assigned to the scheduler is not in its configuration.
    without_jump.alphas_cumprod = scheduler.alphas_cumprod
    final_alpha = scheduler.alphas_cumprod[0]
    # The last timestep of a student is far from the image.
    if scheduler.distilled_steps is not None:
        final_alpha = final_alpha.clamp_min(CLEAN_ALPHA)
    without_jump.final_alpha_cumprod = final_alpha
    chosen = without_jump.make_timesteps(num_inference_steps, order=order) if timesteps is None else timesteps
    steps = without_jump.make_steps(chosen, order=order)
    if not drop_identity_steps(steps):
        raise ValueError("timesteps must hold one above 0, where the images themselves are")
    return steps


def invert(
    sampler: Sampler,
    samples: Tensor,
    steps: Sequence[Step],
    config: InversionConfig,
    progress_bar: ProgressBar | None = None,
    conditions: Conditions | None = None,
) -> tuple[EncodeOutput, Tensor]:
    """Encode samples along steps, and decode them again where that is to be verified.

    Args:
        sampler: the network and the scheduler.
        samples: (N, C, H, W) in [-1, 1], on the network's device.
        steps: as `invertible_steps` returns them.
        config: how each step is inverted.
        progress_bar: opens the bar; `None` for the sampler's own.
        conditions: of the samples, as `Sampler.conditions` returns them.

    Returns:
        The latents with their residuals and errors; and what they decode to, (N, C, H, W), or without `verify` the
        samples themselves.

    Example:
        >>> from ddim import DDIMPipeline
        >>> sampler = DDIMPipeline.from_pretrained("mnist").sampler
        >>> sampler.progress_bar_config = {"disable": True}
        >>> steps = invertible_steps(sampler.scheduler, 2)
        >>> config = InversionConfig(exact=False, batch_size=1, verify=False)
        >>> invert(sampler, torch.zeros(1, 1, 28, 28), steps, config)[0].evaluations
        tensor([[2, 0]])
    """
    denoiser = sampler.denoiser(steps, config.batch_size, conditions=conditions)
    samples = samples.to(torch.promote_types(samples.dtype, sampler.sample_dtype))
    to_noise = drop_identity_steps(steps)[::-1]
    is_pair = config.method == "pair"
    if is_pair:
        check_pair_steps(to_noise, samples.device)
    solved, further = (to_noise[:1], to_noise[1:]) if is_pair else (to_noise, [])
    latents, second = (samples.double().clone(), samples.double().clone()) if is_pair else (samples.clone(), None)
    residuals = samples.new_zeros(len(samples), len(steps))
    evaluations = torch.zeros(len(samples), len(steps), dtype=torch.int64, device=samples.device)
    group_size = BATCHES_PER_GROUP * config.batch_size
    groups = [slice(first, first + group_size) for first in range(0, len(samples), group_size)]
    with evaluating(sampler.unet), sampler.running(len(groups) * len(to_noise), progress_bar) as bar:
        for group in groups:
            inversion = Inversion(
                take_rows(denoiser, group),
                sampler.scheduler.config.prediction_type,
                config.exact,
                config.tolerance,
                min(config.max_iterations, PAIR_ITERATIONS) if is_pair else config.max_iterations,
            )
            x = sampler.take_steps(samples[group], solved, inversion, bar)
            evaluations[group, len(further) : len(to_noise)] = torch.stack(inversion.evaluations[::-1], 1)
            if second is None:
                residuals[group, : len(to_noise)] = torch.stack(inversion.residuals[::-1], 1)
            else:
                leapfrog = Leapfrog(
                    inversion.denoiser,
                    inversion.prediction_type,
                    samples[group],
                    to_noise[0].alpha_prev,
                    sampler.sample_dtype,
                )
                away = [reversed_step(step) for step in further]
                x = sampler.take_steps(x, away, leapfrog, bar)
                second[group] = leapfrog.other
                evaluations[group, : len(further)] = 1
            latents[group] = x
    decoded = samples
    if config.verify:
        decoded = generate(sampler, latents, steps, config.batch_size, progress_bar, conditions, second)
    # In [0, 1] differences are half of those in [-1, 1].
    mse = ((decoded - samples) / 2).double().square().flatten(1).mean(1)
    if not config.verify:
        mse = torch.full_like(mse, math.nan)
    timesteps = [step.timestep for step in steps]
    result = EncodeOutput(latents, timesteps, residuals, evaluations, config.tolerance, mse, second)
    if config.exact:
        _log_shortfalls(result, config.verify)
    return result, decoded


def generate(
    sampler: Sampler,
    x: Tensor,
    steps: Sequence[Step],
    batch_size: int,
    progress_bar: ProgressBar | None = None,
    conditions: Conditions | None = None,
    second: Tensor | None = None,
) -> Tensor:
    """Decode latents along steps, without clipping.

    Args:
        sampler: the network and the scheduler.
        x: the latents, (N, C, H, W), on the network's device.
        steps: as `invertible_steps` returns them.
        batch_size: images per network evaluation.
        progress_bar: opens the bar; `None` for the sampler's own.
        conditions: of the samples, as `Sampler.conditions` returns them.
        second: the second states of pairs, x after the first step; `None` for steps of DDIM.

    Returns:
        Samples at the schedule's first alpha, (N, C, H, W).

    Example:
        >>> from ddim import DDIMPipeline
        >>> sampler = DDIMPipeline.from_pretrained("mnist").sampler
        >>> sampler.progress_bar_config = {"disable": True}
        >>> generate(sampler, torch.zeros(1, 1, 28, 28), invertible_steps(sampler.scheduler, 2), batch_size=1).shape
        torch.Size([1, 1, 28, 28])
    """
    moves = drop_identity_steps(steps)
    denoiser = sampler.denoiser(steps, integer("batch_size", batch_size, 1), conditions=conditions)
    prediction_type = sampler.scheduler.config.prediction_type
    step_fn: StepFn = generative_step(denoiser, moves, StepSettings(prediction_type))
    if second is not None:
        check_pair_steps(moves, x.device)
        step_fn = Leapfrog(denoiser, prediction_type, x, moves[0].alpha, sampler.sample_dtype)
        x, moves = second, moves[1:]
    with evaluating(sampler.unet), sampler.running(len(moves), progress_bar) as bar:
        return sampler.take_steps(x, moves, step_fn, bar)


def check_pair_steps(steps: Sequence[Step], device: torch.device) -> None:
    """Check that pairs of states can take steps.

    Args:
        steps: those that change x, in any order.
        device: of the states.

    Raises:
        ValueError: if there is only one step, the schedule ends without any signal, or the device has no float64.

    Example:
        >>> check_pair_steps(drop_identity_steps(invertible_steps(DDIMScheduler(), 3)), torch.device("cpu"))
    """
    if device.type == "mps":
        raise ValueError("method='pair' requires a device with float64, got mps")
    if len(steps) < 2:
        raise ValueError("method='pair' requires at least two timesteps above 0, got one")
    if min(step.alpha for step in steps) == 0:
        raise ValueError("method='pair' requires a schedule that leaves some signal at every timestep")


def drop_identity_steps(steps: Sequence[Step]) -> list[Step]:
    """Return the steps without that from timestep 0 to the alpha of timestep 0, which changes nothing.

    Args:
        steps: as `invertible_steps` returns them.

    Example:
        >>> len(drop_identity_steps(invertible_steps(DDIMScheduler(), 10)))
        9
    """
    return [step for step in steps if step.alpha != step.alpha_prev]


def not_converged(encoded: EncodeOutput) -> str:
    """Return one sentence on the images and steps that did not reach the tolerance.

    Args:
        encoded: the result of encoding, some residual above its tolerance.

    Example:
        >>> z, nfe = torch.zeros(1, 1, 1, 1), torch.ones(1, 2, dtype=torch.int64)
        >>> encoded = EncodeOutput(z, [500, 0], torch.tensor([[0.5, 0.0]]), nfe, 1e-5, torch.zeros(1))
        >>> not_converged(encoded).partition("reach ")[2]
        'the tolerance 1e-05 in the step from timestep 500; the largest residual is 5.0e-01'
    """
    missed = encoded.residuals > encoded.tolerance
    timesteps = [t for t, some in zip(encoded.timesteps, missed.any(0).tolist(), strict=True) if some]
    steps = (
        f"step from timestep {timesteps[0]}"
        if len(timesteps) == 1
        else f"{len(timesteps)} steps from timesteps {timesteps[-1]} to {timesteps[0]}"
    )
    return (
        f"{int(missed.any(1).sum())} of {len(missed)} images did not reach the tolerance {encoded.tolerance:g} in the "
        f"{steps}; the largest residual is {float(encoded.residual.max()):.1e}"
    )


def _log_shortfalls(encoded: EncodeOutput, verified: bool) -> None:
    """Log the images that did not converge, and those that do not come back."""
    if not bool(encoded.converged.all()):
        logger.warning(not_converged(encoded))
    if verified and bool((lost := ~(encoded.mse <= GRAY_LEVEL**2)).any()):
        logger.warning(
            "%d of %d images do not come back from their latents: mean squared error up to %.1e; another number of "
            "steps may serve them better",
            int(lost.sum()),
            len(encoded.mse),
            float(encoded.mse.max()),
        )
