"""Restoration of images from measurements: inpainting, super-resolution, and any other operator.

An unconditional model knows what images look like; a measurement says what this one is. Sampling brings the two
together (`ddim.diffusion.restoration`):

    pipe.inpaint(images, masks).images
    pipe.super_resolve(images, factor=4).images
    pipe.restore(measurement, operator, noise_std=0.1, samples=8).mean

There are many images for a measurement. Each sample is one of them; their mean is the best guess in the mean square,
and their standard deviation shows what the measurement leaves open.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor

from ddim.diffusion.guidance import Conditions
from ddim.diffusion.noise import check_seeds, list_seeds, noise_from_generator, noise_from_seeds
from ddim.diffusion.operators import BicubicDownsample, BoxDownsample, LinearOperator, Mask
from ddim.diffusion.restoration import METHODS, Method, Operator, Problem, project, resampled, restoration_step
from ddim.diffusion.sampling_config import SamplingConfig
from ddim.engine import get_engine
from ddim.io.images import to_samples
from ddim.latents import Condition, SamplerMethods
from ddim.outputs import RestoreOutput
from ddim.sampler import ProgressBar, Sampler, evaluating
from ddim.validation import choice, integer, real

KERNELS = {"box": BoxDownsample, "bicubic": BicubicDownsample}
"""Operators of super-resolution by name."""


@dataclass(frozen=True)
class RestorationConfig:
    """How a measurement is turned into images. What is `None` is the method's own.

    Attributes:
        method: one of `ddim.diffusion.restoration.METHODS`.
        num_inference_steps: S.
        eta: the noise of the process.
        order: of the solver.
        resampling: length and repeats of `ddim.diffusion.restoration.resampled`.

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> RestorationConfig("ddrm").resolved().num_inference_steps
        20
    """

    method: str
    num_inference_steps: int | None = None
    eta: float | None = None
    order: int | None = None
    resampling: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        choice("method", self.method, tuple(METHODS))
        if self.resampling is not None:
            if not isinstance(self.resampling, Sequence) or len(self.resampling) != 2:
                raise ValueError(f"resampling must be (length, repeats), got {self.resampling!r}")
            for name, value in zip(("length", "repeats"), self.resampling, strict=True):
                integer(f"the {name} of resampling", value, 1, 1000)

    def resolved(self, num_train_timesteps: int = 1000) -> RestorationConfig:
        """Return the configuration with the defaults of its method.

        Args:
            num_train_timesteps: of the model; a default number of steps is at most that.
        """
        method = METHODS[self.method]
        default_steps = min(method.default_steps, num_train_timesteps)
        return RestorationConfig(
            self.method,
            default_steps if self.num_inference_steps is None else self.num_inference_steps,
            method.default_eta if self.eta is None else self.eta,
            method.default_order if self.order is None else self.order,
            method.default_resampling if self.resampling is None else self.resampling,
        )


class Restoration(SamplerMethods):
    """The methods of a pipeline that restore images."""

    def restore(
        self,
        measurement: Tensor,
        operator: Operator,
        noise_std: float = 0.0,
        method: str | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        *,
        samples: int = 1,
        seeds: Iterable[int] | None = None,
        eta: float | None = None,
        order: int | None = None,
        resampling: tuple[int, int] | None = None,
        **condition: Unpack[Condition],
    ) -> RestoreOutput:
        """Sample images whose measurements are those given.

        Args:
            measurement: y, floating (N, ...), of images in [-1, 1]; a row per image.
            operator: A: a `ddim.diffusion.operators.LinearOperator`; or any differentiable function of images
                (N, C, H, W) in [-1, 1], for the methods `pigdm`, `mmps` and `dps`.
            noise_std: the standard deviation of the Gaussian noise in the measurement, on the same scale.
            method: one of `ddim.diffusion.restoration.METHODS`; defaults to `ddnm` without noise, to `mmps` with noise,
                and to `mmps` for operators that are not linear.
            num_inference_steps: S; defaults to the method's own.
            output_type: `pil`, `np` (float32 (N, H, W, C) in [0, 1]) or `pt` ((N, C, H, W) in [0, 1]).
            samples: images per measurement.
            seeds: one integer per image of the result, which decides all its noise; `None` for PyTorch's global
                generator.
            eta: the noise of the process; defaults to the method's own.
            order: of the solver, for `pigdm` and `mmps`; defaults to the method's own.
            resampling: `(length, repeats)`: at every multiple of `length` steps before the end the run goes back as
                many, `repeats` - 1 times; defaults to the method's own, `(1, 1)` for none.
            condition: classes and guidance, as for a call of the pipeline.

        Returns:
            `RestoreOutput`: N times `samples` images, those of a measurement one after the other; their mean and their
            standard deviation per measurement; and the function evaluations per image. Without noise the measurements
            of the images are those given, as far as images in [-1, 1] can have them.

        Raises:
            ValueError: for an argument out of range, or a measurement that does not fit the operator.
            TypeError: for an argument of a wrong type.

        Example:
            >>> import torch
            >>> from ddim import DDIMPipeline
            >>> from ddim.diffusion.operators import BoxDownsample
            >>> pipe = DDIMPipeline.from_pretrained("mnist")
            >>> pipe.set_progress_bar_config(disable=True)
            >>> operator = BoxDownsample(pipe.sample_shape, 4)
            >>> small = torch.full((1, 1, 7, 7), -1.0)
            >>> len(pipe.restore(small, operator, num_inference_steps=2, samples=3, seeds=range(3)).images)
            3
        """
        sampler = self.sampler
        sampler.check_output(output_type)
        noise_std = real("noise_std", noise_std, 0, below=1e3)
        if method is None:
            method = "ddnm" if isinstance(operator, LinearOperator) and not noise_std else "mmps"
        config = RestorationConfig(method, num_inference_steps, eta, order, resampling).resolved(len(sampler.scheduler))
        chosen = METHODS[method]
        _check_method(chosen, operator, noise_std, config)
        measurement = _check_measurement(measurement, operator, sampler)
        count = len(measurement) * integer("samples", samples, 1)
        checked = None if seeds is None else check_seeds(list_seeds(seeds), count)
        conditions = self.conditions(count, **condition)
        shape = (count, *sampler.sample_shape)
        noise = (
            noise_from_generator(shape, None, sampler.device, sampler.sample_dtype)
            if checked is None
            else noise_from_seeds(shape, checked, sampler.device)
        )
        problem = _repeat(Problem(measurement, operator, noise_std), samples)
        x, nfe = _run(sampler, config, chosen, problem, noise, conditions, self.progress_bar)
        if isinstance(operator, LinearOperator) and not noise_std:
            x = project(x, problem)
        grouped = x.clamp(-1, 1).view(len(measurement), samples, *x.shape[1:])
        std = grouped.std(1, correction=1) / 2 if samples > 1 else torch.zeros_like(grouped[:, 0])
        return RestoreOutput(
            sampler.to_output(x, output_type), sampler.to_output(grouped.mean(1), output_type), std, nfe
        )

    def inpaint(
        self,
        images: Any,
        masks: Any,
        method: str | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        *,
        resize: bool = False,
        **arguments: Any,
    ) -> RestoreOutput:
        """Fill in the missing parts of images.

        Args:
            images: PIL images, one or a list; a NumPy array (N, H, W, C); or a tensor (N, C, H, W) in [-1, 1]. What is
                in their missing parts does not matter.
            masks: what is missing, white: PIL images, one or one per image; or boolean arrays or tensors (H, W) or
                (N, H, W), true where pixels are missing.
            method: as for `restore`; `repaint` as well.
            num_inference_steps: S; defaults to the method's own.
            output_type: as for `restore`.
            resize: fit PIL images of other sizes and modes; otherwise they are refused.
            arguments: further ones of `restore`.

        Returns:
            As for `restore`. Known pixels are those of the images.

        Raises:
            ValueError: for images or masks that do not fit the model, or a mask that leaves nothing or everything.
            TypeError: for an argument of a wrong type.

        Example:
            >>> import torch
            >>> from ddim import DDIMPipeline
            >>> pipe = DDIMPipeline.from_pretrained("mnist")
            >>> pipe.set_progress_bar_config(disable=True)
            >>> mask = torch.zeros(28, 28, dtype=torch.bool)
            >>> mask[7:21, 7:21] = True
            >>> image = pipe(seeds=[3], num_inference_steps=4).images[0]
            >>> pipe.inpaint(image, mask, num_inference_steps=4, seeds=[0]).images[0].size
            (28, 28)
        """
        sampler = self.sampler
        x = to_samples(images, *sampler.sample_shape, resize, pixel_format=sampler.pixel_format).to(sampler.device)
        missing = read_masks(masks, len(x), sampler.sample_shape[1:], resize)
        operator = Mask(sampler.sample_shape, ~missing[:, None].expand(len(x), *sampler.sample_shape))
        return self.restore(operator(x), operator, 0.0, method, num_inference_steps, output_type, **arguments)

    def super_resolve(
        self,
        images: Any,
        factor: int = 4,
        kernel: str = "box",
        noise_std: float = 0.0,
        method: str | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        **arguments: Any,
    ) -> RestoreOutput:
        """Sample images of the model's size from small ones.

        Args:
            images: of the model's size divided by `factor`: PIL images, one or a list; a NumPy array (N, H, W, C); or a
                tensor (N, C, H, W) in [-1, 1].
            factor: how many times smaller they are.
            kernel: how they were made small: `box`, the means of squares, or `bicubic`, as PIL does.
            noise_std: the standard deviation of the Gaussian noise in them, on the scale of [-1, 1].
            method: as for `restore`.
            num_inference_steps: S; defaults to the method's own.
            output_type: as for `restore`.
            arguments: further ones of `restore`.

        Returns:
            As for `restore`.

        Raises:
            ValueError: for a factor that does not divide the model's size, or images of another size.
            TypeError: for an argument of a wrong type.

        Example:
            >>> from ddim import DDIMPipeline
            >>> pipe = DDIMPipeline.from_pretrained("mnist")
            >>> pipe.set_progress_bar_config(disable=True)
            >>> small = pipe(seeds=[3], num_inference_steps=4).images[0].resize((7, 7))
            >>> pipe.super_resolve(small, 4, num_inference_steps=2, seeds=[0]).images[0].size
            (28, 28)
        """
        sampler = self.sampler
        operator = KERNELS[choice("kernel", kernel, tuple(KERNELS))](sampler.sample_shape, factor)
        channels, height, width = operator.measurement_shape
        y = to_samples(images, channels, height, width, None, pixel_format=sampler.pixel_format)
        y = y.to(sampler.device)
        return self.restore(y, operator, noise_std, method, num_inference_steps, output_type, **arguments)


def _check_method(method: type[Method], operator: Operator, noise_std: float, config: RestorationConfig) -> None:
    """Check that a method takes an operator, noise and an order."""
    if not callable(operator):
        raise TypeError(f"operator must be a function of images, got {type(operator).__name__}")
    if method.requires_linear and not isinstance(operator, LinearOperator):
        raise ValueError(f"method={method.name!r} requires a LinearOperator; pigdm, mmps and dps take any function")
    if method.name == "repaint" and (noise_std or not isinstance(operator, Mask)):
        raise ValueError("method='repaint' requires a Mask and noise_std=0")
    if method.default_order == 1 and config.order != 1:
        raise ValueError(f"method={method.name!r} requires order=1, got {config.order}")


def _check_measurement(measurement: Tensor, operator: Operator, sampler: Sampler) -> Tensor:
    """Return measurements on the sampler's device, checked against the operator."""
    if not isinstance(measurement, Tensor) or not measurement.is_floating_point() or not measurement.ndim:
        raise TypeError(f"measurement must be a floating tensor (N, ...), got {type(measurement).__name__}")
    if isinstance(operator, LinearOperator):
        if operator.shape != sampler.sample_shape:
            raise ValueError(
                f"operator: expected the model's shape {sampler.sample_shape} of images, got {operator.shape}"
            )
        expected = operator.measurement_shape
    else:
        expected = _measure_blank(operator, sampler)
    if tuple(measurement.shape[1:]) != expected or not len(measurement):
        shape = ", ".join(["N", *map(str, expected)]) if expected else "N,"
        raise ValueError(f"measurement: expected shape ({shape}), got {tuple(measurement.shape)}")
    if not bool(torch.isfinite(measurement).all()):
        raise ValueError("measurement must be finite, got NaN or infinity")
    return measurement.to(sampler.device, sampler.sample_dtype)


def _measure_blank(operator: Operator, sampler: Sampler) -> tuple[int, ...]:
    """Return the shape of a function's measurement of one image, after checking what it returns for a blank one."""
    blank = torch.zeros(1, *sampler.sample_shape, device=sampler.device, dtype=sampler.sample_dtype)
    with torch.enable_grad():
        measured = operator(blank.requires_grad_())
    if not isinstance(measured, Tensor) or not measured.ndim or len(measured) != 1:
        got = f"shape {tuple(measured.shape)}" if isinstance(measured, Tensor) else type(measured).__name__
        raise ValueError(f"operator must return a tensor (N, ...) for images (N, C, H, W), got {got} for one image")
    if not measured.requires_grad:
        raise ValueError("operator must be differentiable: what it returns has no gradient with respect to the images")
    return tuple(measured.shape[1:])


def _repeat(problem: Problem, samples: int) -> Problem:
    """Return the problem with each measurement as often as there are samples of it."""
    operator = problem.operator
    if isinstance(operator, Mask) and operator.singular_values.ndim == 4:
        values = operator.singular_values
        if len(values) not in (1, len(problem.measurement)):
            raise ValueError(f"mask: expected one, or one per image ({len(problem.measurement)}), got {len(values)}")
        operator = Mask(operator.shape, values.bool().repeat_interleave(samples if len(values) > 1 else 1, 0))
    return Problem(problem.measurement.repeat_interleave(samples, 0), operator, problem.noise_std)


def _run(
    sampler: Sampler,
    config: RestorationConfig,
    method: type[Method],
    problem: Problem,
    noise: Any,
    conditions: Conditions | None,
    progress_bar: ProgressBar,
) -> tuple[Tensor, int]:
    """Return samples of a problem, (N, C, H, W), and the function evaluations per sample."""
    assert config.num_inference_steps is not None
    assert config.eta is not None
    plan = sampler.plan(SamplingConfig(config.num_inference_steps, config.eta, order=config.order))
    engine = get_engine(sampler.unet, "eager") if method.requires_gradient else None
    denoiser = sampler.denoiser(plan.steps, engine=engine, conditions=conditions)
    steps = plan.steps if config.resampling is None else resampled(plan.steps, *config.resampling)
    run = method.of(config.eta)
    step_fn = restoration_step(denoiser, sampler.scheduler.config.prediction_type, run, problem, noise)
    x = run.start(noise().to(sampler.sample_dtype), problem, plan.steps[0])
    with evaluating(sampler.unet), sampler.running(len(steps), progress_bar) as bar:
        x = sampler.take_steps(x, steps, step_fn, bar)
    return x, sum(step.alpha_prev > step.alpha for step in steps)


def read_masks(masks: Any, count: int, size: tuple[int, int], resize: bool = False) -> Tensor:
    """Return what is missing, boolean (1 or `count`, H, W).

    Args:
        masks: PIL images, white where pixels are missing, one or several; or boolean arrays or tensors (H, W) or
            (N, H, W).
        count: the number of images.
        size: (H, W).
        resize: fit PIL images of other sizes; otherwise they are refused.

    Raises:
        ValueError: for another size or number, or a mask in which nothing or everything is missing.
        TypeError: for anything else.

    Example:
        >>> read_masks(torch.tensor([[True, False]]), 1, (1, 2)).tolist()
        [[[True, False]]]
    """
    if isinstance(masks, Image.Image):
        masks = [masks]
    if isinstance(masks, list | tuple) and all(isinstance(mask, Image.Image) for mask in masks):
        masks = to_samples([mask.convert("L") for mask in masks], 1, *size, resize, "masks")[:, 0] > 0
    missing = torch.as_tensor(masks)
    if missing.dtype != torch.bool:
        raise TypeError(f"masks must be boolean or PIL images, got {missing.dtype}")
    missing = missing[None] if missing.ndim == 2 else missing
    if missing.ndim != 3 or tuple(missing.shape[1:]) != size or len(missing) not in (1, count):
        raise ValueError(f"masks: expected shape {size} or {(count, *size)}, got {tuple(missing.shape)}")
    shares = missing.flatten(1).float().mean(1)
    if bool(((shares == 0) | (shares == 1)).any()):
        raise ValueError("masks must leave some pixels and miss others: white is what is missing")
    return missing
