"""Latent space: pictures to codes, codes to pictures, and what lies between and along the way.

With eta = 0 sampling is a map from x at the largest timestep to a picture, and it can be walked backwards (sections 4.3
and 5.4 of arXiv 2010.02502): a picture has a code, decoding the code gives the picture back, and the codes between two
codes are pictures too (section 5.3).

`encode` and `decode` are inverses of each other, which plain sampling is not, for two reasons. It clips the predicted
x_0, so that different x_t lead to one x_prev. And its last step jumps to alpha = 1, where for a good denoiser it is a
projection onto the pictures it knows. So both walk between the largest timestep and the schedule's first alpha
(`set_alpha_to_one=False`; with the usual schedule the noise left there is 0.01, which cannot be seen), and do not clip.

Networks round a little differently for batches of different sizes, and near the pictures inversion makes much of
little. Codes and their pictures are therefore computed in batches of exactly `batch_size`, filled up where they are
short: an image's code depends, to the bit, neither on how many others there are nor on which. A larger `batch_size` is
faster on a GPU.

Codes are those of order 1, whatever the scheduler's `solver_order`; what samples follows the scheduler.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddim.diffusion.equations import Step
from ddim.diffusion.interpolation import slerp_grid, slerp_path
from ddim.diffusion.inversion import Inversion
from ddim.diffusion.loop import StepSettings, sample, walk
from ddim.diffusion.noise import check_seeds, noise_from_seeds
from ddim.io.images import check_output_type, to_output, to_samples
from ddim.outputs import EncodeOutput, ImagePipelineOutput, ReconstructOutput, TrajectoryOutput
from ddim.sampler import Sampler
from ddim.scheduler import NO_INVERSE, DDIMScheduler, check_order
from ddim.validation import as_integer, integer, real

logger = logging.getLogger(__name__)

TOLERANCE, MAX_ITERATIONS, BATCH_SIZE = 1e-5, 50, 8
"""Defaults of the arguments of these names."""

GREY_LEVEL = 1 / 255
"""A root mean square error of more than this is told."""

GROUP = 8
"""Batches whose images are inverted together: as images converge, the others are gathered into full batches."""


class LatentSpace(Sampler):
    """What a pipeline does with latent codes."""

    def encode(
        self,
        images: Any,
        num_inference_steps: int = 50,
        exact: bool = True,
        tolerance: float = TOLERANCE,
        *,
        max_iterations: int = MAX_ITERATIONS,
        timesteps: Sequence[int] | None = None,
        order: int = 1,
        resize: bool = False,
        verify: bool = True,
        batch_size: int = BATCH_SIZE,
    ) -> EncodeOutput:
        """The latent codes of pictures.

        Where a step's equation cannot be solved to the tolerance, which happens in the step next to the picture and for
        very few steps, a warning says so, the result tells for which pictures and steps, and the best code found is
        returned. Pictures unlike any that the model knows may not come back although every step was solved, because
        decoding magnifies what float32 leaves; so the codes are decoded once and the errors told, with a warning if one
        is more than a grey level.

        Args:
            images: as for `ddim.io.images.to_samples`: PIL, a list of them, NumPy (N, H, W, C), torch (N, C, H, W).
            num_inference_steps: S, from 1 to the number of timesteps the model was trained with.
            exact: solve each step's equation, so that decoding gives the picture back; `False` is the paper's Euler
                encoding (equation 13), one network evaluation a step.
            tolerance: a step is solved when the step of decoding lands so near to where encoding came from, in every
                value, on the scale of samples in [-1, 1]; above 0, below 1.
            max_iterations: network evaluations a step and image, at most; from 1 to 1000.
            timesteps: a subsequence of one's own in place of S: strictly decreasing whole numbers.
            order: of the steps; 2 is refused, because none of its steps has an inverse of its own.
            resize: fit PIL images of other sizes and modes; otherwise they are refused.
            verify: decode the codes and tell each picture's error, for S more evaluations an image.
            batch_size: images the network sees at once; the codes depend on it in their last digits, and on no other
                image.

        Returns:
            The codes, with the residuals reached and the evaluations spent.

        Raises:
            ValueError: for an argument out of range or an image that the model does not take, before the network runs.
            TypeError: for one of a wrong type.
        """
        if check_order(order) != 1:
            raise ValueError(f"order is {order}; {NO_INVERSE}")
        samples = to_samples(images, *self.sample_shape, resize=resize).to(self.device)
        steps = self._deterministic_steps(num_inference_steps, timesteps)
        codes, _ = self._encode(samples, steps, exact, tolerance, max_iterations, batch_size, verify)
        return codes

    def decode(
        self,
        latents: Tensor | EncodeOutput,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        *,
        timesteps: Sequence[int] | None = None,
        order: int = 1,
        batch_size: int = BATCH_SIZE,
    ) -> ImagePipelineOutput:
        """The pictures of latent codes: the inverse of `encode` with the same timesteps.

        Args:
            latents: (N, C, H, W), or what `encode` returned.
            num_inference_steps: S, as for `encode`.
            output_type: `pil`, `np` or `pt`, as for a call of the pipeline.
            timesteps: in place of S.
            order: of the steps; 2 comes nearer to the limit of many steps, and is no inverse of `encode`.
            batch_size: as for `encode`.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: for an argument out of range, codes that hold NaN or have another shape, or codes from `encode`
                that were made along other timesteps or shall be decoded at order 2 (pass their `.latents` if that is
                meant).
            TypeError: for one of a wrong type.
        """
        check_output_type(output_type)
        steps = self._deterministic_steps(num_inference_steps, timesteps, order)
        if isinstance(latents, EncodeOutput):
            if order != 1:
                raise ValueError(f"the codes were made at order 1 and shall be decoded at order {order}; pass .latents")
            walked = [step.timestep for step in steps]
            if latents.timesteps != walked:
                raise ValueError(
                    f"the codes were made in {len(latents.timesteps)} steps from timestep {latents.timesteps[0]} and "
                    f"shall be decoded in {len(walked)} from {walked[0]}; use the same steps, or pass .latents"
                )
            latents = latents.latents
        return ImagePipelineOutput(to_output(self._decode(latents, steps, batch_size), output_type))

    def reconstruct(
        self,
        images: Any,
        num_inference_steps: int = 50,
        exact: bool = True,
        tolerance: float = TOLERANCE,
        output_type: str = "pil",
        *,
        max_iterations: int = MAX_ITERATIONS,
        timesteps: Sequence[int] | None = None,
        resize: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> ReconstructOutput:
        """Encode pictures, decode their codes, and compare (Table 2 of the paper).

        Args:
            images: as for `encode`, like all that is not named here.
            output_type: of the pictures that come back: `pil`, `np` or `pt`.

        Returns:
            The pictures, each one's mean squared error, and the codes, as of `encode`.

        Raises:
            ValueError: as `encode`.
            TypeError: as `encode`.
        """
        check_output_type(output_type)
        samples = to_samples(images, *self.sample_shape, resize=resize).to(self.device)
        steps = self._deterministic_steps(num_inference_steps, timesteps)
        codes, decoded = self._encode(samples, steps, exact, tolerance, max_iterations, batch_size, verify=True)
        return ReconstructOutput(to_output(decoded, output_type), codes)

    def interpolate(
        self,
        z0: Tensor | EncodeOutput | Sequence[Tensor],
        z1: Tensor | None = None,
        frames: int | tuple[int, int] = 11,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        *,
        closed: bool = False,
        timesteps: Sequence[int] | None = None,
        order: int = 1,
        batch_size: int = BATCH_SIZE,
    ) -> ImagePipelineOutput:
        """Decode what lies between codes, by spherical interpolation (section 5.3, appendix D.5).

        The codes given are among the frames as they are, so that those frames are the pictures `decode` makes of them.

        Args:
            z0: a code, (C, H, W) or (1, C, H, W). Without `z1`: a path of at least two, as a list of such, a tensor
                (K, C, H, W) or what `encode` returned.
            z1: the code to go to.
            frames: of each leg from code to code, both ends included; or `(rows, columns)` for a grid between four
                codes: upper left, upper right, lower left, lower right.
            num_inference_steps: S, as for `decode`.
            output_type: `pil`, `np` or `pt`.
            closed: come back to the first code; see `ddim.diffusion.interpolation.slerp_path`.
            timesteps: in place of S.
            order: as for `decode`.
            batch_size: as for `encode`.

        Returns:
            `ImagePipelineOutput` with `images`: the frames in order, grids row by row.

        Raises:
            ValueError: for fewer codes than two, fewer frames than two, or as `decode`.
            TypeError: for an argument of a wrong type.
        """
        check_output_type(output_type)
        steps = self._deterministic_steps(num_inference_steps, timesteps, order)
        codes = list_codes(z0, z1)
        if isinstance(frames, tuple):
            if len(frames) != 2 or closed:
                raise ValueError("frames is a tuple; a grid has (rows, columns), and is not closed")
            path = slerp_grid(codes, *frames)
        else:
            path = slerp_path(codes, frames, closed)
        return ImagePipelineOutput(to_output(self._decode(path, steps, batch_size), output_type))

    def trajectory(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        frames: int | None = 10,
        output_type: str = "pil",
        *,
        seeds: Iterable[int] | None = None,
        latents: Tensor | None = None,
        eta: float = 0.0,
        timesteps: Sequence[int] | None = None,
        order: int | None = None,
        at: Sequence[int] | None = None,
    ) -> TrajectoryOutput:
        """Watch pictures appear: x_t and the x_0 predicted from it along plain sampling (`--sequence` of the original
        code). The pictures at the end are those of a call of the pipeline with the same arguments.

        Args:
            batch_size: N; left at 1, it follows the number of `seeds` or `latents`.
            num_inference_steps: S.
            frames: how many of the steps to show, evenly spread, the first and the last among them; `None` for all.
            output_type: `pil`, `np` or `pt`.
            seeds: one whole number an image.
            latents: x at the first timestep, (N, C, H, W).
            eta: 0 for DDIM, 1 for DDPM.
            timesteps: in place of S.
            order: as for a call of the pipeline.
            at: the timesteps to show, in place of `frames`; each must be among those of the process.

        Returns:
            The timesteps shown and the pictures there.

        Raises:
            ValueError: for an argument out of range.
            TypeError: for one of a wrong type.
        """
        check_output_type(output_type)
        steps = self._plan(num_inference_steps, timesteps, eta, use_sigma_hat=False, order=order)
        shown = set(shown_timesteps([step.timestep for step in steps], frames, at))
        batch_size, noise = self._noise(batch_size, None, seeds, latents)
        x = self._check_latents(latents, batch_size) if latents is not None else noise().to(self._sample_dtype)
        result = TrajectoryOutput([], [], [], [])
        with self._running(len(steps)) as bar:
            for state in self._sample(x, steps, noise=noise if eta > 0 else None):
                bar.update()
                if state.step.timestep in shown:
                    result.timesteps.append(state.step.timestep)
                    result.samples.append(to_output(x, output_type))
                    result.pred_original_samples.append(to_output(state.pred_original_sample, output_type))
                x = state.sample
        result.images = to_output(x, output_type)
        return result

    def consistency(
        self,
        latents: Tensor,
        num_inference_steps: Sequence[int] = (10, 20, 50, 100),
        output_type: str = "pil",
        *,
        order: int | None = None,
    ) -> list[Any]:
        """The same codes painted with different numbers of steps, by plain sampling (section 5.2, figure 5): the
        pictures agree in what matters, because the code decides it.

        Args:
            latents: (N, C, H, W).
            num_inference_steps: the numbers of steps.
            output_type: `pil`, `np` or `pt`.
            order: as for a call of the pipeline.

        Returns:
            For each number of steps the N pictures.

        Raises:
            ValueError: for no numbers, or one out of range.
            TypeError: for latents that are no tensor.
        """
        check_output_type(output_type)
        if not isinstance(num_inference_steps, Iterable):
            raise TypeError(f"num_inference_steps is {num_inference_steps!r}; give a list of numbers of steps")
        plans = [self._plan(count, None, 0.0, use_sigma_hat=False, order=order) for count in num_inference_steps]
        if not plans:
            raise ValueError("num_inference_steps is empty; give at least one number of steps")
        start = self._check_latents(latents, len(latents) if isinstance(latents, Tensor) and latents.ndim else 1)
        results = []
        with self._running(sum(map(len, plans))) as bar:
            for steps in plans:
                x = start
                for state in self._sample(start, steps):
                    bar.update()
                    x = state.sample
                results.append(to_output(x, output_type))
        return results

    def edit(
        self,
        images: Any,
        strength: float = 0.5,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        *,
        seeds: Iterable[int] | None = None,
        eta: float = 0.0,
        timesteps: Sequence[int] | None = None,
        order: int | None = None,
        resize: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> ImagePipelineOutput:
        """Take pictures part of the way to noise and sample from there (SDEdit, arXiv 2108.01073): the coarse shape
        stays, what the noise covered is painted anew.

        With `seeds` the noise is drawn. Without, a picture is encoded to the intermediate timestep, which covers
        nothing: what changes is what plain sampling, with its clipping and its last jump to a clean picture, corrects.

        Args:
            images: as for `encode`.
            strength: the share of the steps that is walked, from 0 (the pictures as they are) to 1 (all of them).
            num_inference_steps: S of a whole process; round(strength S) of them are walked.
            output_type: `pil`, `np` or `pt`.
            seeds: one whole number an image, for the noise.
            eta: of the steps back; above 0 it wants `seeds`.
            timesteps: in place of S.
            order: of the steps back, as for a call of the pipeline.
            resize: as for `encode`.
            batch_size: as for `encode`.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: for an argument out of range, or as `encode`.
            TypeError: for one of a wrong type.
        """
        check_output_type(output_type)
        if not 0 <= real("strength", strength) <= 1:
            raise ValueError(f"strength is {strength}; it must be a number from 0 to 1")
        batch_size = integer("batch_size", batch_size, 1)
        x = to_samples(images, *self.sample_shape, resize=resize).to(self.device)
        plan = self._plan(num_inference_steps, timesteps, eta, use_sigma_hat=False, order=order)
        if eta > 0 and seeds is None:
            raise ValueError(f"eta is {eta}, which draws noise; give seeds, one an image")
        checked = None if seeds is None else check_seeds(seeds, len(x))
        walked = round(strength * len(plan))
        steps = plan[len(plan) - walked :]
        noise = None if checked is None else noise_from_seeds(x.shape, checked, self.device)
        if steps and noise is not None:
            x = self.scheduler.add_noise(x, noise().to(x.dtype), torch.tensor(steps[0].timestep))
        elif steps and steps[0].timestep > 0:
            tail = [step.timestep for step in steps]
            there = self._deterministic_steps(len(tail), tail)
            x = self._encode(x, there, True, TOLERANCE, MAX_ITERATIONS, batch_size, verify=False)[0].latents
        with self._running(len(steps)) as bar:
            for state in self._sample(x, steps, noise=noise if eta > 0 else None):
                bar.update()
                x = state.sample
        return ImagePipelineOutput(to_output(x, output_type))

    def latent_timesteps(self, num_inference_steps: int = 50, timesteps: Sequence[int] | None = None) -> list[int]:
        """The timesteps that encoding and decoding walk, decreasing; arguments and errors as for `encode`."""
        return [step.timestep for step in self._deterministic_steps(num_inference_steps, timesteps)]

    def _deterministic_steps(
        self, num_inference_steps: int, timesteps: Sequence[int] | None, order: int = 1
    ) -> list[Step]:
        """The steps of decoding, from the largest timestep to the schedule's first alpha; see the module's text."""
        twin = DDIMScheduler.from_config(self.scheduler.config, set_alpha_to_one=False)
        chosen = twin.make_timesteps(num_inference_steps, order=order) if timesteps is None else timesteps
        steps = twin.make_steps(chosen, order=order)
        if not drop_identity_steps(steps):
            raise ValueError("the only timestep is 0, where pictures are; a latent code needs a larger one")
        return steps

    def _encode(
        self,
        samples: Tensor,
        steps: Sequence[Step],
        exact: bool,
        tolerance: float,
        max_iterations: int,
        batch_size: int,
        verify: bool,
    ) -> tuple[EncodeOutput, Tensor]:
        """The codes, and what they decode to (without `verify`, the samples themselves)."""
        if not 0 < real("tolerance", tolerance) < 1:
            raise ValueError(f"tolerance is {tolerance}; it must lie above 0 and below 1")
        if integer("max_iterations", max_iterations, 1) > 1000:
            raise ValueError(f"max_iterations is {max_iterations}; more than 1000 a step is not allowed")
        denoiser = self._denoiser(steps, integer("batch_size", batch_size, 1))
        samples = samples.to(torch.promote_types(samples.dtype, self._sample_dtype))
        back = drop_identity_steps(steps)[::-1]
        latents = samples.clone()
        residuals = samples.new_zeros(len(samples), len(steps))
        evaluations = torch.zeros(len(samples), len(steps), dtype=torch.int64, device=samples.device)
        groups = range(0, len(samples), GROUP * batch_size)
        with self._running(len(groups) * len(back)) as bar:
            for first in groups:
                group = slice(first, first + GROUP * batch_size)
                move = Inversion(denoiser, self.scheduler.config.prediction_type, exact, tolerance, max_iterations)
                for state in walk(samples[group], back, move):
                    bar.update()
                    latents[group] = state.sample
                residuals[group, : len(back)] = torch.stack(move.residuals[::-1], 1)
                evaluations[group, : len(back)] = torch.stack(move.evaluations[::-1], 1)
        timesteps = [step.timestep for step in steps]
        decoded = self._generate(latents, steps, batch_size) if verify else samples
        # In [0, 1] differences are half of those in [-1, 1].
        mse = ((decoded - samples) / 2).double().square().flatten(1).mean(1)
        if not verify:
            mse = torch.full_like(mse, math.nan)
        result = EncodeOutput(latents, timesteps, residuals, evaluations, tolerance, mse)
        if exact and not bool(result.converged.all()):
            logger.warning(not_converged(result))
        if exact and verify and bool((lost := ~(mse <= GREY_LEVEL**2)).any()):
            logger.warning(
                "%d of %d images do not come back from their codes: mean squared error up to %.1e; another number of "
                "steps may serve them better",
                int(lost.sum()),
                len(mse),
                float(mse.max()),
            )
        return result, decoded

    def _decode(self, latents: Tensor, steps: Sequence[Step], batch_size: int) -> Tensor:
        """Samples at the schedule's first alpha, (N, C, H, W), from latents that a caller gave."""
        x = self._check_latents(latents, len(latents) if isinstance(latents, Tensor) and latents.ndim else 1)
        return self._generate(x, steps, integer("batch_size", batch_size, 1))

    def _generate(self, x: Tensor, steps: Sequence[Step], batch_size: int) -> Tensor:
        denoiser = self._denoiser(steps, batch_size)
        settings = StepSettings(self.scheduler.config.prediction_type)
        with self._running(len(drop_identity_steps(steps))) as bar:
            for state in sample(denoiser, x, drop_identity_steps(steps), settings):
                bar.update()
                x = state.sample
        return x


def drop_identity_steps(steps: Sequence[Step]) -> list[Step]:
    """Without the step from timestep 0 to the alpha of timestep 0, which leads nowhere."""
    return [step for step in steps if step.alpha != step.alpha_prev]


def not_converged(codes: EncodeOutput) -> str:
    """One sentence on the images and steps that did not reach the tolerance."""
    missed = codes.residuals > codes.tolerance
    where = [t for t, some in zip(codes.timesteps, missed.any(0).tolist(), strict=True) if some]
    steps = (
        f"step from timestep {where[0]}"
        if len(where) == 1
        else f"{len(where)} steps from timesteps {where[-1]} to {where[0]}"
    )
    return (
        f"{int(missed.any(1).sum())} of {len(missed)} images did not reach the tolerance {codes.tolerance:g} in the "
        f"{steps}; the largest residual is {float(codes.residual.max()):.1e}"
    )


def shown_timesteps(timesteps: Sequence[int], frames: int | None, at: Sequence[int] | None) -> list[int]:
    """Which timesteps of a process to show; arguments as for `LatentSpace.trajectory`."""
    if at is not None:
        if not isinstance(at, Iterable):
            raise TypeError(f"at is {at!r}; it must be a list of timesteps")
        chosen = set()
        for entry in at:
            t = as_integer(entry)
            if t not in timesteps:
                raise ValueError(f"at holds {entry}; the process visits {', '.join(map(str, timesteps))}")
            chosen.add(t)
        return [t for t in timesteps if t in chosen]
    count = len(timesteps) if frames is None else min(integer("frames", frames, 1), len(timesteps))
    last = len(timesteps) - 1
    return [timesteps[round(i * last / max(1, count - 1))] for i in range(count)]


def list_codes(z0: Tensor | EncodeOutput | Sequence[Tensor], z1: Tensor | None) -> list[Tensor]:
    """The codes of a path, each (C, H, W)."""
    if isinstance(z0, EncodeOutput):
        z0 = z0.latents
    given: Any = [z0, z1] if z1 is not None else z0
    if (isinstance(given, Tensor) and given.ndim < 4) or not isinstance(given, Iterable):
        given = [given]
    codes = []
    for code in given:
        if not isinstance(code, Tensor):
            raise TypeError(f"a code is a {type(code).__name__}; it must be a tensor (C, H, W)")
        codes.append(code[0] if code.ndim == 4 and len(code) == 1 else code)
        if codes[-1].ndim != 3:
            raise ValueError(f"a code has shape {tuple(code.shape)}; it must be (C, H, W) or (1, C, H, W)")
    return codes
