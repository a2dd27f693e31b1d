"""Latent space: images to latents, latents to images, and what lies between them and along the way.

With eta = 0 sampling is a map from x at the largest timestep to an image, and it can be run backwards (sections 4.3 and
5.4 of arXiv 2010.02502): an image has a latent, decoding the latent gives the image back, and the latents between two
latents are images too (section 5.3).

`ddim.inversion` has what makes `encode` and `decode` inverses of each other, which plain sampling is not.

Encoding and decoding run in evaluation mode, as dropout would make another function of the network each time. All else
samples, as calls of the pipeline do, in the mode that the network is in.

Latents are those of order 1, whatever the scheduler's `solver_order`; what samples follows the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from ddim.diffusion.guidance import Conditions
from ddim.diffusion.interpolation import grid_weights, path_weights, slerp_grid, slerp_path
from ddim.diffusion.loop import State
from ddim.diffusion.noise import check_seeds, list_seeds, noise_from_seeds
from ddim.diffusion.sampling_config import SamplingConfig, check_order
from ddim.inversion import InversionConfig, generate, invert, invertible_steps
from ddim.io.class_labels import Labels
from ddim.io.images import to_samples
from ddim.outputs import EncodeOutput, ImagePipelineOutput, ReconstructOutput, TrajectoryOutput
from ddim.sampler import ProgressBar, Sampler, SamplingPlan
from ddim.scheduler import NO_INVERSE
from ddim.validation import as_integer, integer, real, shown


class Condition(TypedDict, total=False):
    """The keyword arguments of classes and guidance: those of a call of the pipeline, with the same defaults.

    Attributes:
        class_labels: one for all images or one per image, indices or names.
        guidance_scale: w, at least 0.
        guidance_interval: the smallest and the largest timestep at which guidance acts.
        negative_labels: classes to guide away from.
        guide: a weaker model to guide away from: a pipeline or its name.

    Example:
        >>> Condition(class_labels=3, guidance_scale=2.0)["guidance_scale"]
        2.0
    """

    class_labels: Labels | None
    guidance_scale: float
    guidance_interval: tuple[int, int] | None
    negative_labels: Labels | None
    guide: Any


class SamplerMethods:
    """Methods of a pipeline that are written against the public methods of `Sampler` alone: what they require of it.

    Attributes:
        progress_bar: opens the progress bar of each run.
    """

    progress_bar: ProgressBar

    @property
    def sampler(self) -> Sampler:
        """The network and the scheduler, ready to run."""
        raise NotImplementedError

    def conditions(self, count: int, **condition: Unpack[Condition]) -> Conditions | None:
        """Return what the samples of a run are conditioned on; see `Sampler.conditions`.

        Args:
            count: the number of samples.
            condition: classes and guidance.
        """
        raise NotImplementedError


class LatentSpace(SamplerMethods):
    """The latent space of a model: the methods of a pipeline that encode, decode, interpolate and edit."""

    def encode(
        self,
        images: Any,
        num_inference_steps: int = 50,
        exact: bool = True,
        tolerance: float = InversionConfig.tolerance,
        *,
        max_iterations: int = InversionConfig.max_iterations,
        timesteps: Sequence[int] | None = None,
        order: int = 1,
        resize: bool = False,
        verify: bool = True,
        batch_size: int = InversionConfig.batch_size,
        method: str = InversionConfig.method,
        **condition: Unpack[Condition],
    ) -> EncodeOutput:
        """Encode images into latents from which `decode` gives them back.

        Where a step's equation cannot be solved to the tolerance, which happens in the step next to the image and for
        very few steps, a warning is logged, the result reports the images and steps, and the best latent found is
        returned. Images unlike any that the model knows may not come back although every step was solved, because
        decoding magnifies rounding; so the latents are decoded once and the errors reported, with a warning if one is
        larger than a gray level.

        Args:
            images: PIL images, one or a list; a NumPy array (N, H, W, C) of uint8 or floats in [0, 1], or of values in
                the units of the model's `pixel_format`; or a tensor (N, C, H, W) in [-1, 1].
            num_inference_steps: S, from 1 to the number of timesteps the model was trained with.
            exact: solve each step's equation, so that decoding gives the image back; `False` is the paper's Euler
                encoding, with one function evaluation per step.
            tolerance: a step is solved when the step of decoding lands this close to where encoding came from, in
                every value, on the scale of samples in [-1, 1]; above 0, below 1.
            max_iterations: function evaluations per step and image, at most; from 1 to 1000.
            timesteps: a custom subsequence instead of S: strictly decreasing integers.
            order: of the solver; 2 is refused, because none of its steps has an inverse of its own.
            resize: fit PIL images of other sizes and modes; otherwise they are refused.
            verify: decode the latents and report each image's error, for S more function evaluations per image.
            batch_size: images per network evaluation. The latents depend on no other image; on a GPU, and where the
                network runs as it is, they depend on the batch size in their last digits.
            method: of exact encoding: `solve` solves the equation of each step of DDIM, so that any decoding of
                `.latents` gives the image back; `pair` keeps two states, `.latents` and `.second_latents`, for one
                evaluation per step and no equation, and `decode` of the whole result gives the image back.
            condition: classes and guidance, as for a call of the pipeline.

        Returns:
            `EncodeOutput`: the latents, the residuals reached, the function evaluations spent, and the errors.

        Raises:
            ValueError: for an argument out of range or an image that the model does not take, before the network runs.
            TypeError: for one of a wrong type.

        References:
            Equation (13) and section 4.3 of arXiv 2010.02502; the exact inverse: `ddim.diffusion.inversion`; pairs of
            states: O-BELM of arXiv 2410.07273, `ddim.diffusion.pairs`.

        Example:
            >>> from ddim import DDIMPipeline
            >>> pipe = DDIMPipeline.from_pretrained("mnist")
            >>> pipe.set_progress_bar_config(disable=True)
            >>> images = pipe(seeds=[3], num_inference_steps=10).images
            >>> encoded = pipe.encode(images, num_inference_steps=10, method="pair")
            >>> encoded.latents.shape, bool(encoded.mse < 1e-20)
            (torch.Size([1, 1, 28, 28]), True)
        """
        if check_order(order) != 1:
            raise ValueError(f"order=2 cannot encode: {NO_INVERSE}")
        settings = InversionConfig(exact, tolerance, max_iterations, batch_size, verify, method)
        samples = self._to_samples(images, resize)
        steps = invertible_steps(self.sampler.scheduler, num_inference_steps, timesteps)
        conditions = self.conditions(len(samples), **condition)
        return invert(self.sampler, samples, steps, settings, self.progress_bar, conditions)[0]

    def decode(
        self,
        latents: Tensor | EncodeOutput,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        *,
        timesteps: Sequence[int] | None = None,
        order: int = 1,
        batch_size: int = InversionConfig.batch_size,
        **condition: Unpack[Condition],
    ) -> ImagePipelineOutput:
        """Decode latents into images: the inverse of `encode` with the same timesteps.

        Args:
            latents: (N, C, H, W), or what `encode` returned.
            num_inference_steps: S, from 1 to the number of timesteps the model was trained with.
            output_type: `pil`, `np` (float32 (N, H, W, C) in [0, 1]) or `pt` ((N, C, H, W) in [0, 1]).
            timesteps: a custom subsequence instead of S: strictly decreasing integers.
            order: of the solver; 2 comes closer to the limit of many steps, and is not an inverse of `encode`.
            batch_size: images per network evaluation.
            condition: classes and guidance, as for a call of the pipeline.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: for an argument out of range, latents that hold NaN or have another shape, or latents from
                `encode` along other timesteps or to be decoded at a higher order (pass their `.latents` if that is
                meant).
            TypeError: for one of a wrong type.

        Example:
            >>> import torch
            >>> from ddim import DDIMPipeline
            >>> pipe = DDIMPipeline.from_pretrained("mnist")
            >>> pipe.set_progress_bar_config(disable=True)
            >>> pipe.decode(torch.zeros(1, 1, 28, 28), num_inference_steps=2).images[0].size
            (28, 28)
        """
        self.sampler.check_output(output_type)
        steps = invertible_steps(self.sampler.scheduler, num_inference_steps, timesteps, order)
        second = None
        if isinstance(latents, EncodeOutput):
            if order != 1:
                raise ValueError(f"the latents were encoded at order 1, got order={order}; pass .latents to force it")
            visited = [step.timestep for step in steps]
            if latents.timesteps != visited:
                raise ValueError(
                    f"the latents were encoded in {len(latents.timesteps)} steps from timestep {latents.timesteps[0]}, "
                    f"got {len(visited)} steps from {visited[0]}; use the same steps, or pass .latents"
                )
            second, latents = latents.second_latents, latents.latents
        x = self.sampler.check_latents(latents)
        second = None if second is None else self.sampler.check_latents(second)
        conditions = self.conditions(len(x), **condition)
        samples = generate(self.sampler, x, steps, batch_size, self.progress_bar, conditions, second)
        return ImagePipelineOutput(self.sampler.to_output(samples, output_type))

    def reconstruct(
        self,
        images: Any,
        num_inference_steps: int = 50,
        exact: bool = True,
        tolerance: float = InversionConfig.tolerance,
        output_type: str = "pil",
        *,
        max_iterations: int = InversionConfig.max_iterations,
        timesteps: Sequence[int] | None = None,
        resize: bool = False,
        batch_size: int = InversionConfig.batch_size,
        method: str = InversionConfig.method,
        **condition: Unpack[Condition],
    ) -> ReconstructOutput:
        """Encode images, decode their latents, and compare.

        Args:
            images: PIL images, one or a list; a NumPy array (N, H, W, C) of uint8 or floats in [0, 1], or of values in
                the units of the model's `pixel_format`; or a tensor (N, C, H, W) in [-1, 1].
            num_inference_steps: S, from 1 to the number of timesteps the model was trained with.
            exact: solve each step's equation; `False` is the paper's Euler encoding.
            tolerance: of a step's residual, on the scale of [-1, 1]; above 0, below 1.
            output_type: of the images that come back: `pil`, `np` (float32 (N, H, W, C) in [0, 1]) or `pt`
                ((N, C, H, W) in [0, 1]).
            max_iterations: function evaluations per step and image, at most; from 1 to 1000.
            timesteps: a custom subsequence instead of S: strictly decreasing integers.
            resize: fit PIL images of other sizes and modes; otherwise they are refused.
            batch_size: images per network evaluation.
            method: of exact encoding: `solve` or `pair`; see `encode`.
            condition: classes and guidance, as for a call of the pipeline.

        Returns:
            `ReconstructOutput`: the images, each one's mean squared error, and the latents.

        Raises:
            ValueError: for an argument out of range or an image that the model does not take, before the network runs.
            TypeError: for one of a wrong type.

        References:
            Table 2 of arXiv 2010.02502.

        Example:
            >>> from ddim import DDIMPipeline
            >>> pipe = DDIMPipeline.from_pretrained("mnist")
            >>> pipe.set_progress_bar_config(disable=True)
            >>> images = pipe(seeds=[3], num_inference_steps=10).images
            >>> bool(pipe.reconstruct(images, num_inference_steps=10).mse < 1e-4)
            True
        """
        self.sampler.check_output(output_type)
        settings = InversionConfig(exact, tolerance, max_iterations, batch_size, method=method)
        samples = self._to_samples(images, resize)
        steps = invertible_steps(self.sampler.scheduler, num_inference_steps, timesteps)
        conditions = self.conditions(len(samples), **condition)
        encoded, decoded = invert(self.sampler, samples, steps, settings, self.progress_bar, conditions)
        return ReconstructOutput(self.sampler.to_output(decoded, output_type), encoded)

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
        order: int | None = None,
        as_samples: bool = False,
        batch_size: int = InversionConfig.batch_size,
        **condition: Unpack[Condition],
    ) -> ImagePipelineOutput:
        """Decode the latents between latents, by spherical interpolation.

        The latents given are among the frames unchanged, so that those frames are the images `decode` makes of them.

        Args:
            z0: a latent, (C, H, W) or (1, C, H, W). Without `z1`: a path of at least two, as a list of such, a tensor
                (K, C, H, W) or what `encode` returned.
            z1: the latent to go to.
            frames: of each leg from latent to latent, both ends included; or `(rows, columns)` for a grid between four
                latents: upper left, upper right, lower left, lower right.
            num_inference_steps: S, from 1 to the number of timesteps the model was trained with.
            output_type: `pil`, `np` (float32 (N, H, W, C) in [0, 1]) or `pt` ((N, C, H, W) in [0, 1]).
            closed: return to the first latent (`ddim.diffusion.interpolation.slerp_path`).
            timesteps: a custom subsequence instead of S: strictly decreasing integers.
            order: of the solver, 1 to 4; defaults to 1, and with `as_samples` to the scheduler's `solver_order`.
            as_samples: decode as a call of the pipeline samples, clipping and the jump to alpha = 1 included: frames of
                latents that are the noise of seeds are then the images of these seeds. Without it, they are those of
                `decode`, and latents of encoded images give these images back.
            batch_size: images per network evaluation.
            condition: classes and guidance, as for a call of the pipeline.

        Returns:
            `ImagePipelineOutput` with `images`: the frames in order, grids row by row.

        Raises:
            ValueError: for fewer latents than two, fewer frames than two, or latents that do not fit the model.
            TypeError: for an argument of a wrong type.

        References:
            Section 5.3 and appendix D.5 of arXiv 2010.02502.

        Example:
            >>> import torch
            >>> from ddim import DDIMPipeline
            >>> pipe = DDIMPipeline.from_pretrained("mnist")
            >>> pipe.set_progress_bar_config(disable=True)
            >>> z = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
            >>> len(pipe.interpolate(z, frames=3, num_inference_steps=2).images)
            3
        """
        self.sampler.check_output(output_type)
        config = SamplingConfig(num_inference_steps, timesteps=timesteps, order=order)
        plan = self.sampler.plan(config) if as_samples else None
        steps = invertible_steps(self.sampler.scheduler, num_inference_steps, timesteps, order or 1)
        latents = list_latents(z0, z1)
        if isinstance(frames, tuple):
            if len(frames) != 2 or closed:
                raise ValueError("frames as a tuple must be (rows, columns) of a grid, which is not closed")
            path, weights = slerp_grid(latents, *frames), grid_weights(*frames)
        else:
            path, weights = slerp_path(latents, frames, closed), path_weights(len(latents), frames, closed)
        x = self.sampler.check_latents(path)
        conditions = self.sampler.blend_conditions(self.conditions(len(latents), **condition), weights)
        if plan is None:
            samples = generate(self.sampler, x, steps, batch_size, self.progress_bar, conditions)
        else:
            batch_size = min(integer("batch_size", batch_size, 1), len(path))
            samples = self.sampler.run(
                x, plan, progress_bar=self.progress_bar, batch_size=batch_size, conditions=conditions
            )
        return ImagePipelineOutput(self.sampler.to_output(samples, output_type))

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
        **condition: Unpack[Condition],
    ) -> TrajectoryOutput:
        """Sample images and keep x_t and the predicted x_0 at some of the timesteps.

        The images at the end are those of a call of the pipeline with the same arguments.

        Args:
            batch_size: N; left at 1, it follows the number of `seeds` or `latents`.
            num_inference_steps: S, from 1 to the number of timesteps the model was trained with.
            frames: the number of steps to keep, evenly spread, the first and the last among them; `None` for all.
            output_type: `pil`, `np` (float32 (N, H, W, C) in [0, 1]) or `pt` ((N, C, H, W) in [0, 1]).
            seeds: one integer per image.
            latents: x at the first timestep, (N, C, H, W).
            eta: 0 for DDIM, 1 for DDPM.
            timesteps: a custom subsequence instead of S: strictly decreasing integers.
            order: of the solver, 1 to 4; `None` for the scheduler's `solver_order`.
            at: the timesteps to keep, instead of `frames`; each must be one that the process visits.
            condition: classes and guidance, as for a call of the pipeline.

        Returns:
            `TrajectoryOutput`: the timesteps kept and the images there.

        Raises:
            ValueError: for an argument out of range.
            TypeError: for one of a wrong type.

        Example:
            >>> from ddim import DDIMPipeline
            >>> pipe = DDIMPipeline.from_pretrained("mnist")
            >>> pipe.set_progress_bar_config(disable=True)
            >>> pipe.trajectory(seeds=[3], num_inference_steps=4, frames=2).timesteps
            [750, 0]
        """
        self.sampler.check_output(output_type)
        plan = self.sampler.plan(SamplingConfig(num_inference_steps, eta, timesteps, order))
        kept = set(select_timesteps(plan.timesteps, frames, at))
        x, noise = self.sampler.initial_noise(batch_size, seeds=seeds, latents=latents)
        conditions = self.conditions(len(x), **condition)
        result = TrajectoryOutput([], [], [], [])

        def keep(state: State) -> None:
            if state.step.timestep in kept:
                result.timesteps.append(state.step.timestep)
                result.samples.append(self.sampler.to_output(state.previous, output_type))
                result.pred_original_samples.append(self.sampler.to_output(state.pred_original_sample, output_type))

        x = self.sampler.run(x, plan, noise, keep, self.progress_bar, conditions=conditions)
        result.images = self.sampler.to_output(x, output_type)
        return result

    def consistency(
        self,
        latents: Tensor,
        num_inference_steps: Sequence[int] = (10, 20, 50, 100),
        output_type: str = "pil",
        *,
        order: int | None = None,
        **condition: Unpack[Condition],
    ) -> list[Any]:
        """Sample the same latents with different numbers of steps: the images agree in their main features.

        Args:
            latents: (N, C, H, W).
            num_inference_steps: the numbers of steps.
            output_type: `pil`, `np` (float32 (N, H, W, C) in [0, 1]) or `pt` ((N, C, H, W) in [0, 1]).
            order: of the solver, 1 to 4; `None` for the scheduler's `solver_order`.
            condition: classes and guidance, as for a call of the pipeline.

        Returns:
            For each number of steps the N images.

        Raises:
            ValueError: for no numbers, or one out of range.
            TypeError: for latents that are not a tensor.

        References:
            Section 5.2 and figure 5 of arXiv 2010.02502.

        Example:
            >>> import torch
            >>> from ddim import DDIMPipeline
            >>> pipe = DDIMPipeline.from_pretrained("mnist")
            >>> pipe.set_progress_bar_config(disable=True)
            >>> rows = pipe.consistency(torch.zeros(1, 1, 28, 28), num_inference_steps=[1, 2])
            >>> len(rows), len(rows[0])
            (2, 1)
        """
        self.sampler.check_output(output_type)
        if not isinstance(num_inference_steps, Iterable):
            raise TypeError(f"num_inference_steps must be a list of numbers of steps, got {shown(num_inference_steps)}")
        plans = [self.sampler.plan(SamplingConfig(count, order=order)) for count in num_inference_steps]
        if not plans:
            raise ValueError("num_inference_steps must hold at least one number of steps, got none")
        x = self.sampler.check_latents(latents)
        sampler, conditions = self.sampler, self.conditions(len(x), **condition)
        with sampler.running(sum(len(plan.steps) for plan in plans), self.progress_bar) as bar:
            samples = [
                sampler.take_steps(x, plan.steps, sampler.step_fn(x, plan, conditions=conditions), bar)
                for plan in plans
            ]
        return [sampler.to_output(sample, output_type) for sample in samples]

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
        batch_size: int = InversionConfig.batch_size,
        **condition: Unpack[Condition],
    ) -> ImagePipelineOutput:
        """Take images part of the way to noise and sample from there: the coarse shape stays, details are sampled anew.

        With `seeds` noise is added. Without, an image is encoded to the intermediate timestep, which covers nothing:
        only what plain sampling, with its clipping and its last jump to a clean image, corrects is changed.

        Args:
            images: PIL images, one or a list; a NumPy array (N, H, W, C) of uint8 or floats in [0, 1], or of values in
                the units of the model's `pixel_format`; or a tensor (N, C, H, W) in [-1, 1].
            strength: the share of the steps that is taken, from 0 (the images unchanged) to 1 (all of them).
            num_inference_steps: S of a whole process; round(strength S) of them are taken.
            output_type: `pil`, `np` (float32 (N, H, W, C) in [0, 1]) or `pt` ((N, C, H, W) in [0, 1]).
            seeds: integers, for the noise: one per image, one for all images, or several for a single image, which then
                has as many edits.
            eta: of the steps back, 0 for DDIM, 1 for DDPM; above 0 it requires `seeds`.
            timesteps: a custom subsequence instead of S: strictly decreasing integers.
            order: of the steps back, 1 to 4; `None` for the scheduler's `solver_order`.
            resize: fit PIL images of other sizes and modes; otherwise they are refused.
            batch_size: images per network evaluation of the encoding.
            condition: classes and guidance, as for a call of the pipeline.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: for an argument out of range or an image that the model does not take, before the network runs.
            TypeError: for one of a wrong type.

        References:
            SDEdit, arXiv 2108.01073.

        Example:
            >>> from ddim import DDIMPipeline
            >>> pipe = DDIMPipeline.from_pretrained("mnist")
            >>> pipe.set_progress_bar_config(disable=True)
            >>> images = pipe(seeds=[3], num_inference_steps=4).images
            >>> len(pipe.edit(images, strength=0.5, num_inference_steps=4, seeds=[7]).images)
            1
        """
        self.sampler.check_output(output_type)
        strength = real("strength", strength, 0, 1)
        inversion = InversionConfig(batch_size=batch_size, verify=False)
        x = self._to_samples(images, resize)
        # Learned coefficients are of whole runs.
        plan = self.sampler.plan(SamplingConfig(num_inference_steps, eta, timesteps, order), takes_learned=False)
        if eta > 0 and seeds is None:
            raise ValueError(f"eta above 0 draws noise and requires seeds, one per image, got eta={eta:g}")
        checked = None
        if seeds is not None:
            x, checked = pair_with_seeds(x, seeds)
        conditions = self.conditions(len(x), **condition)
        steps = plan.steps[len(plan.steps) - round(strength * len(plan.steps)) :]
        noise = None if checked is None else noise_from_seeds(x.shape, checked, self.sampler.device)
        if steps and noise is not None:
            x = self.sampler.scheduler.add_noise(x, noise().to(x.dtype), torch.tensor(steps[0].timestep))
        elif steps and steps[0].timestep > 0:
            timesteps = [step.timestep for step in steps]
            forward = invertible_steps(self.sampler.scheduler, len(timesteps), timesteps)
            x = invert(self.sampler, x, forward, inversion, self.progress_bar, conditions)[0].latents
        remaining = SamplingPlan(plan.config, steps)
        x = self.sampler.run(x, remaining, noise, progress_bar=self.progress_bar, conditions=conditions)
        return ImagePipelineOutput(self.sampler.to_output(x, output_type))

    def direction(
        self,
        positive: Any,
        negative: Any,
        num_inference_steps: int = 50,
        tolerance: float = InversionConfig.tolerance,
        *,
        max_iterations: int = InversionConfig.max_iterations,
        timesteps: Sequence[int] | None = None,
        resize: bool = False,
        batch_size: int = InversionConfig.batch_size,
        **condition: Unpack[Condition],
    ) -> Tensor:
        """Compute the direction of an attribute in latent space: experimental.

        It is the mean latent of images with the attribute minus that of images without it. Some multiple of it, added
        by `ddim.diffusion.interpolation.add_direction` to the latents of other images, adds the attribute, as far as
        the model has such a direction; the multiple is found by trying. The mean of few images is mostly noise.

        Args:
            positive: images with the attribute, as for `encode`.
            negative: images without it.
            num_inference_steps: S, from 1 to the number of timesteps the model was trained with.
            tolerance: of a step's residual, on the scale of [-1, 1]; above 0, below 1.
            max_iterations: function evaluations per step and image, at most; from 1 to 1000.
            timesteps: a custom subsequence instead of S: strictly decreasing integers.
            resize: fit PIL images of other sizes and modes; otherwise they are refused.
            batch_size: images per network evaluation.
            condition: classes and guidance, as for a call of the pipeline.

        Returns:
            The direction, (C, H, W), for latents of the same timesteps.

        Raises:
            ValueError: for an argument out of range, an image that the model does not take, or the same images on both
                sides, before the network runs.
            TypeError: for one of a wrong type.

        Example:
            >>> import torch
            >>> from ddim import DDIMPipeline
            >>> from ddim.diffusion.interpolation import add_direction
            >>> pipe = DDIMPipeline.from_pretrained("mnist")
            >>> pipe.set_progress_bar_config(disable=True)
            >>> images = pipe(seeds=[0, 1], num_inference_steps=2).images
            >>> direction = pipe.direction(images[:1], images[1:], num_inference_steps=2)
            >>> latents = torch.zeros(1, 1, 28, 28)
            >>> len(pipe.decode(add_direction(latents, direction, 0.5), num_inference_steps=2).images)
            1
        """
        settings = InversionConfig(True, tolerance, max_iterations, batch_size, verify=False)
        sides = [self._to_samples(images, resize) for images in (positive, negative)]
        first, second = (sorted(sample.cpu().numpy().tobytes() for sample in side) for side in sides)
        if first == second:
            raise ValueError("the images with the attribute must differ from those without it, got the same ones")
        steps = invertible_steps(self.sampler.scheduler, num_inference_steps, timesteps)
        conditions = self.conditions(sum(map(len, sides)), **condition)
        latents = invert(self.sampler, torch.cat(sides), steps, settings, self.progress_bar, conditions)[0].latents
        with_attribute, without = latents.double().split_with_sizes([len(side) for side in sides])
        return (with_attribute.mean(0) - without.mean(0)).to(latents.dtype)

    def latent_timesteps(self, num_inference_steps: int = 50, timesteps: Sequence[int] | None = None) -> list[int]:
        """Return the timesteps that encoding and decoding visit, decreasing.

        Args:
            num_inference_steps: S, from 1 to the number of timesteps the model was trained with.
            timesteps: a custom subsequence instead of S: strictly decreasing integers.

        Raises:
            ValueError: for an argument out of range.

        Example:
            >>> from ddim import DDIMPipeline
            >>> DDIMPipeline.from_pretrained("mnist").latent_timesteps(4)
            [750, 500, 250, 0]
        """
        steps = invertible_steps(self.sampler.scheduler, num_inference_steps, timesteps)
        return [step.timestep for step in steps]

    def _to_samples(self, images: Any, resize: bool) -> Tensor:
        sampler = self.sampler
        return to_samples(images, *sampler.sample_shape, resize, pixel_format=sampler.pixel_format).to(sampler.device)


def select_timesteps(timesteps: Sequence[int], frames: int | None, at: Sequence[int] | None) -> list[int]:
    """Return the timesteps of a process to keep.

    Args:
        timesteps: that the process visits, decreasing.
        frames: the number to keep, evenly spread, the first and the last among them; `None` for all.
        at: the timesteps themselves, instead of `frames`.

    Raises:
        ValueError: for a timestep that the process does not visit, or a number below 1.
        TypeError: if `at` is not a list.

    Example:
        >>> select_timesteps([900, 600, 300, 0], 2, None)
        [900, 0]
    """
    if at is not None:
        if not isinstance(at, Iterable):
            raise TypeError(f"at must be a list of timesteps, got {shown(at)}")
        chosen = set()
        for entry in at:
            t = as_integer(entry)
            if t not in timesteps:
                visited = ", ".join(map(str, timesteps))
                raise ValueError(f"at must be timesteps that the process visits ({visited}), got {entry}")
            chosen.add(t)
        return [t for t in timesteps if t in chosen]
    count = len(timesteps) if frames is None else min(integer("frames", frames, 1), len(timesteps))
    last = len(timesteps) - 1
    return [timesteps[round(i * last / max(1, count - 1))] for i in range(count)]


def pair_with_seeds(samples: Tensor, seeds: Iterable[int]) -> tuple[Tensor, list[int]]:
    """Repeat a single image for all seeds, or a single seed for all images.

    Args:
        samples: (N, C, H, W).
        seeds: N integers; or one; or, if N is 1, any number.

    Returns:
        As many samples as seeds.

    Raises:
        ValueError: for other numbers, or an entry that is not a seed.

    Example:
        >>> pair_with_seeds(torch.zeros(1, 1, 8, 8), range(3))[0].shape
        torch.Size([3, 1, 8, 8])
    """
    entries = list_seeds(seeds)
    if entries and len(samples) == 1:
        samples = samples.repeat(len(entries), 1, 1, 1)
    elif len(entries) == 1:
        entries *= len(samples)
    return samples, check_seeds(entries, len(samples))


def list_latents(z0: Tensor | EncodeOutput | Sequence[Tensor], z1: Tensor | None) -> list[Tensor]:
    """Return the latents of a path, each (C, H, W).

    Args:
        z0: a latent, (C, H, W) or (1, C, H, W); or several: a list of such, a tensor (K, C, H, W) or what
            `LatentSpace.encode` returned.
        z1: one more latent, or `None`.

    Raises:
        ValueError: for another shape.
        TypeError: for an entry that is not a tensor.

    Example:
        >>> len(list_latents(torch.zeros(3, 1, 8, 8), None))
        3
    """
    if isinstance(z0, EncodeOutput):
        z0 = z0.latents
    given: Any = [z0, z1] if z1 is not None else z0
    if (isinstance(given, Tensor) and given.ndim < 4) or not isinstance(given, Iterable):
        given = [given]
    latents = []
    for latent in given:
        if not isinstance(latent, Tensor):
            raise TypeError(f"a latent must be a tensor (C, H, W), got {type(latent).__name__}")
        latents.append(latent[0] if latent.ndim == 4 and len(latent) == 1 else latent)
        if latents[-1].ndim != 3:
            raise ValueError(f"a latent: expected shape (C, H, W) or (1, C, H, W), got {tuple(latent.shape)}")
    return latents
