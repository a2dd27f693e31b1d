"""`Sampler`: a network, a scheduler and an engine, ready to run.

It knows where the network is and in which dtype, the shape of its samples and where noise comes from, and hands the
three to the loop of `ddim.diffusion.loop`:

    sampler = Sampler(unet, DDIMScheduler())
    plan = sampler.plan(SamplingConfig(num_inference_steps=20))
    x, noise = sampler.initial_noise(seeds=[0, 1])
    images = sampler.run(x, plan, noise)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddim.devices import execution_device
from ddim.diffusion.equations import Step
from ddim.diffusion.guidance import ConditionalDenoiser, Conditions, Guidance, Predictor
from ddim.diffusion.loop import Denoiser, State, StepFn, StepSettings, generative_step, in_batches, run_steps
from ddim.diffusion.noise import NoiseSource, check_seeds, list_seeds, noise_from_generator, noise_from_seeds
from ddim.diffusion.sampling_config import SamplingConfig
from ddim.engine import check_engine, get_engine
from ddim.engine.base import Engine
from ddim.io.class_labels import ClassLabels, Labels
from ddim.io.images import check_output_type, height_and_width, to_output
from ddim.io.pixel_format import PixelFormat, format_of
from ddim.scheduler import check_own_steps
from ddim.validation import integer, pluralize

logger = logging.getLogger(__name__)

ProgressBar = Callable[..., Iterable[Any]]
"""Wraps an iterable in a progress bar; what a pipeline that overrides `progress_bar` passes on."""


@dataclass(frozen=True)
class SamplingPlan:
    """The steps of a run, known before the network is evaluated.

    Attributes:
        config: the settings, `timesteps` and `order` filled in.
        steps: the coefficients of all steps, in the order in which they are taken.
    """

    config: SamplingConfig
    steps: list[Step]

    @property
    def timesteps(self) -> list[int]:
        """The timesteps at which the network is evaluated, decreasing."""
        return [step.timestep for step in self.steps]


class Sampler:
    """A network and a scheduler, run by an engine.

    Args:
        unet: a `UNet2DModel`, or any object with `unet(sample, timestep).sample` and a `.config` that has `sample_size`
            and `in_channels`.
        scheduler: the noise schedule and the network's prediction type.
        engine: how the network is run: `auto`, `eager` or `compile` (`ddim.engine`).

    Attributes:
        unet: the network; may be replaced.
        scheduler: the scheduler; may be replaced.
        engine: the engine's name; may be changed.
        progress_bar_config: arguments of the `tqdm` bar.

    Raises:
        ValueError: for an unknown engine.

    Example:
        >>> from ddim import DDIMPipeline
        >>> sampler = DDIMPipeline.from_pretrained("mnist").sampler
        >>> sampler.progress_bar_config = {"disable": True}
        >>> plan = sampler.plan(SamplingConfig(num_inference_steps=2))
        >>> x, noise = sampler.initial_noise(seeds=[0, 1])
        >>> sampler.run(x, plan, noise).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(self, unet: Any, scheduler: Any, engine: str = "auto") -> None:
        self.unet, self.scheduler = unet, scheduler
        self.engine = check_engine(engine)
        self.progress_bar_config: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        """The device that the network runs on."""
        return execution_device(self.unet)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's parameters."""
        dtype = getattr(self.unet, "dtype", torch.float32)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    @property
    def sample_dtype(self) -> torch.dtype:
        """The dtype of samples: at least float32, because half precision would lose the small late steps."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of the network's samples.

        Raises:
            ValueError: if the network's configuration has no `sample_size`.
        """
        config = self.unet.config
        size = config.sample_size
        if size is None:
            raise ValueError("the model's configuration has no sample_size, so noise has no shape; give latents")
        return config.in_channels, *height_and_width(size)

    @property
    def pixel_format(self) -> PixelFormat:
        """The type and the ranges of the values that samples stand for."""
        return format_of(self.unet.config)

    def plan(self, config: SamplingConfig, takes_learned: bool = True) -> SamplingPlan:
        """Return the steps of a run; the scheduler's own timesteps are set to match.

        Args:
            config: the settings.
            takes_learned: take learned coefficients where the scheduler has some for the settings.

        Raises:
            ValueError: if the schedule does not allow them: more steps than it has timesteps, a timestep outside it.
            TypeError: if the scheduler does not take the steps of `DDIMScheduler`.
        """
        scheduler = check_own_steps(self.scheduler)
        learned = None
        if takes_learned and config.timesteps is None and config.order is None and not config.eta:
            learned = scheduler.make_learned_steps(config.num_inference_steps)
        if learned is not None:
            scheduler.set_timesteps(config.num_inference_steps)
            return SamplingPlan(replace(config, timesteps=[step.timestep for step in learned]), learned)
        order = config.resolve_order(scheduler.solver_order)
        timesteps = config.timesteps
        if timesteps is None:
            timesteps = scheduler.make_timesteps(config.num_inference_steps, order=order)
        distilled = scheduler.distilled_steps
        if distilled is not None and (
            list(timesteps) != scheduler.make_timesteps(distilled) or order != 1 or config.eta
        ):
            logger.warning(
                "this model was distilled to %s of order 1 and eta 0 at its own timesteps; at others its images are "
                "worse",
                pluralize(distilled, "step"),
            )
        steps = scheduler.make_steps(timesteps, config.eta, config.use_sigma_hat, order)
        if config.eta > 1:
            logger.warning(
                "eta is %g; above 1 the process adds more noise than DDPM, and its marginals are not those of training",
                config.eta,
            )
        visited = [step.timestep for step in steps]
        scheduler.set_timesteps(timesteps=visited)
        return SamplingPlan(replace(config, timesteps=visited, order=order), steps)

    def check_output(self, output_type: str) -> None:
        """Check that samples of the network can be given out as an output type.

        Args:
            output_type: one of `ddim.io.images.OUTPUT_TYPES`.

        Raises:
            ValueError: for another name, or PIL images where PIL has no mode for them.
        """
        check_output_type(output_type, getattr(self.unet.config, "in_channels", None), self.pixel_format)

    def to_output(self, samples: Tensor, output_type: str) -> Any:
        """Convert samples to images, in the type and the units of the model's data; see `ddim.io.images.to_output`.

        Args:
            samples: (N, C, H, W) in [-1, 1], on any device.
            output_type: one of `ddim.io.images.OUTPUT_TYPES`.
        """
        return to_output(samples, output_type, self.pixel_format)

    def initial_noise(
        self,
        batch_size: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seeds: Iterable[int] | None = None,
        latents: Tensor | None = None,
    ) -> tuple[Tensor, NoiseSource]:
        """Return x at the first timestep and the source of all further noise.

        Args:
            batch_size: N; left at 1, it follows the number of `seeds` or `latents`.
            generator: of all noise: one, or a list of N; `None` for PyTorch's global one.
            seeds: one integer per image instead of a generator.
            latents: x itself, (N, C, H, W), instead of noise that is drawn.

        Returns:
            x, (N, C, H, W) in `sample_dtype` (or the wider dtype of `latents`) on the network's device; and a function
            that draws noise of its shape.

        Raises:
            ValueError: for both seeds and a generator, another number of seeds than N, or latents that do not fit.
            TypeError: for latents that are not a tensor, or a generator that is not one.
        """
        batch_size = integer("batch_size", batch_size, 1)
        if generator is not None and seeds is not None:
            raise ValueError("seeds and generator exclude each other; give one of them")
        seeds = None if seeds is None else list_seeds(seeds)
        if batch_size == 1:
            batch_size = len(seeds or ()) or (len(latents) if isinstance(latents, Tensor) and latents.ndim else 1) or 1
        shape = (batch_size, *(latents.shape[1:] if isinstance(latents, Tensor) else self.sample_shape))
        noise = self.noise_source(shape, generator, seeds)
        if latents is not None:
            return self.check_latents(latents, batch_size), noise
        return noise().to(self.sample_dtype), noise

    def noise_source(
        self,
        shape: Sequence[int],
        generator: torch.Generator | Sequence[torch.Generator] | None,
        seeds: Sequence[int] | None,
    ) -> NoiseSource:
        """Return the source of all noise of a run.

        Args:
            shape: (N, C, H, W).
            generator: one, or a list of N; `None` for PyTorch's global one.
            seeds: N integers instead of a generator; `None` for none.

        Returns:
            A function that draws noise of this shape, on the network's device.

        Raises:
            ValueError: for another number of generators or seeds than N.
            TypeError: for a generator that is not one.
        """
        if seeds is not None:
            return noise_from_seeds(shape, check_seeds(seeds, shape[0]), self.device)
        return noise_from_generator(shape, generator, self.device, self.dtype)

    def check_latents(self, latents: Tensor, batch_size: int | None = None) -> Tensor:
        """Return latents on the network's device, in `sample_dtype` or their own wider dtype.

        Args:
            latents: (N, C, H, W), floating.
            batch_size: N, where it is known.

        Raises:
            ValueError: for another shape, or numbers that are not finite.
            TypeError: if it is not a tensor.
        """
        if not isinstance(latents, Tensor):
            raise TypeError(f"latents must be a tensor (N, C, H, W), got {type(latents).__name__}")
        if batch_size is None:
            batch_size = len(latents) if latents.ndim else 1
        has_size = self.unet.config.sample_size is not None
        C, *size = self.sample_shape if has_size else (self.unet.config.in_channels, *latents.shape[2:])
        expected = (max(1, batch_size), C, *size)
        if tuple(latents.shape) != expected or len(expected) != 4:
            raise ValueError(f"latents: expected shape {expected}, got {tuple(latents.shape)}")
        if not latents.is_floating_point() or not bool(torch.isfinite(latents).all()):
            raise ValueError("latents must be finite floating-point numbers, got NaN, infinity or integers")
        return latents.to(self.device, torch.promote_types(latents.dtype, self.sample_dtype))

    @property
    def _learns_variance(self) -> bool:
        config = self.unet.config
        return bool(getattr(config, "out_channels", config.in_channels) != config.in_channels)

    def get_engine(self) -> Engine:
        """Return the engine that runs the network, made anew where weights have changed."""
        return get_engine(self.unet, self.engine)

    @property
    def is_batch_invariant(self) -> bool:
        """Whether the engine is (`ddim.engine.base.Engine`): samples need no batches of one size."""
        return self.get_engine().is_batch_invariant

    def denoiser(
        self,
        steps: Sequence[Step],
        batch_size: int | None = None,
        engine: Engine | None = None,
        conditions: Conditions | None = None,
    ) -> Denoiser:
        """Return the network as the loop calls it, run by the engine.

        Args:
            steps: the steps of the run, whose timesteps the engine prepares.
            batch_size: evaluate the network on so many samples at a time (`divide_batches`); `None` for all at once.
            engine: the engine; `None` for `get_engine()`.
            conditions: of the run's samples, as `conditions` returns them; `None` for the null class of a network with
                classes.

        Raises:
            ValueError: if the network predicts another number of channels than it takes, or twice as many, or was
                trained without a null class where that is needed.
        """
        check_output_channels(self.unet.config)
        timesteps = [step.timestep for step in steps]
        if conditions is None and self.classes is not None:
            conditions = self.conditions(1)
        classes = None if conditions is None else conditions.classes()
        engine = self.get_engine() if engine is None else engine
        fill = not engine.is_batch_invariant
        predict = self.predictor(timesteps, classes, engine)
        if conditions is not None:
            guide = None
            if conditions.guide is not None:
                guide = conditions.guide.predictor(timesteps, classes)
                fill |= not conditions.guide.is_batch_invariant
            return ConditionalDenoiser(predict, conditions, batch_size, guide, fill)

        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            return predict(x, t, None)

        return denoiser if batch_size is None else in_batches(denoiser, batch_size, fill)

    def predictor(
        self, timesteps: Sequence[int], classes: Tensor | None = None, engine: Engine | None = None
    ) -> Predictor:
        """Return the network as a function of x_t, t and class labels, run by the engine.

        Args:
            timesteps: of the run, which the engine prepares.
            classes: distinct class labels of the run, int64 (L,); `None` for a network without classes.
            engine: the engine; `None` for `get_engine()`.
        """
        chosen = self.get_engine() if engine is None else engine
        dtype = chosen.dtype or self.dtype
        chosen.prepare(timesteps, classes)

        def predict(x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
            # A learned variance follows in as many channels again; DDIM does not use it.
            return chosen.predict(x.to(dtype), t, class_labels)[:, : x.shape[1]].to(x.dtype)

        return predict

    @property
    def classes(self) -> ClassLabels | None:
        """The classes that the network knows; `None` for an unconditional one."""
        return ClassLabels.of(self.unet.config)

    def conditions(
        self,
        count: int,
        class_labels: Labels | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[int, int] | None = None,
        negative_labels: Labels | None = None,
        guide: Sampler | None = None,
    ) -> Conditions | None:
        """Return what the samples of a run are conditioned on, checked before the network is evaluated.

        Args:
            count: N, the number of samples.
            class_labels: one for all samples or one per sample; `None` for the null class of a model with classes.
            guidance_scale: w of `ddim.diffusion.guidance`, at least 0; 1 for no guidance.
            guidance_interval: the smallest and the largest timestep at which guidance acts; `None` for all.
            negative_labels: classes to guide away from, instead of the null class.
            guide: a weaker model to guide away from, instead of the null class.

        Returns:
            The conditions; `None` for an unconditional model without a guide.

        Raises:
            ValueError: for a class that does not exist, labels or guidance that the model does not take, or a guide
                that does not fit it.
            TypeError: for an argument of a wrong type.
        """
        classes, guidance = self.classes, Guidance(guidance_scale, guidance_interval)
        if guidance_interval is not None and not guidance.is_active:
            raise ValueError("guidance_interval requires a guidance_scale other than 1")
        if negative_labels is not None and (guide is not None or not guidance.is_active):
            reason = "excludes guide" if guide is not None else "requires a guidance_scale other than 1"
            raise ValueError(f"negative_labels {reason}")
        if guide is not None:
            _check_guide(self, guide)
        if classes is None:
            if class_labels is not None or negative_labels is not None:
                raise ValueError("class_labels and negative_labels must be None: the model has no classes")
            if guidance.is_active and guide is None:
                raise ValueError("guidance requires a model with classes, or a guide")
            return None if guide is None else Conditions(None, None, guidance, guide)
        device = self.device
        if class_labels is None:
            if guidance.is_active and guide is None and negative_labels is None:
                raise ValueError("guidance requires class_labels, negative_labels, or a guide")
            labels = classes.null(count)
        else:
            labels = classes.resolve(class_labels, count)
        if guide is not None:
            return Conditions(labels.to(device), None, guidance, guide)
        if not guidance.is_active:
            return Conditions(labels.to(device))
        if negative_labels is not None:
            baseline = classes.resolve(negative_labels, count, "negative_labels")
        elif classes.has_null:
            baseline = classes.null(count)
        else:
            raise ValueError("guidance requires negative_labels or a guide: the model was trained without a null class")
        return Conditions(labels.to(device), baseline.to(device), guidance)

    def blend_conditions(self, conditions: Conditions | None, weights: Tensor) -> Conditions | None:
        """Return the conditions of frames between samples: embeddings of classes, linearly interpolated.

        Args:
            conditions: of K samples.
            weights: of each sample in each frame, (F, K); each row sums to 1.

        Returns:
            The conditions of F frames: labels where all samples share one, else embeddings (F, D).
        """
        if conditions is None:
            return None
        count, embedding = len(weights), getattr(self.unet, "class_embedding", None)

        def blend(labels: Tensor | None) -> Tensor | None:
            if labels is None or bool((labels == labels[0]).all()):
                return None if labels is None else labels[:1].expand(count)
            if not isinstance(embedding, nn.Embedding):
                raise ValueError("interpolation between classes requires a network with an embedding of its classes")
            return weights.to(labels.device, embedding.weight.dtype) @ embedding(labels).detach()

        with torch.no_grad():
            labels, baseline = blend(conditions.labels), blend(conditions.baseline_labels)
            if labels is not None and baseline is not None and labels.ndim != baseline.ndim:
                # Both halves of guidance are one batch.
                rows: Any = embedding
                labels, baseline = (t if t.is_floating_point() else rows(t) for t in (labels, baseline))
        return replace(conditions, labels=labels, baseline_labels=baseline)

    def step_fn(
        self,
        x: Tensor,
        plan: SamplingPlan,
        noise: NoiseSource | None = None,
        batch_size: int | None = None,
        conditions: Conditions | None = None,
    ) -> StepFn:
        """Return the step function of plain sampling: the engine's own where it has one.

        Args:
            x: the initial sample, (N, C, H, W).
            plan: the steps that will be taken.
            noise: draws noise of the shape of `x`; used where `eta` is above 0.
            batch_size: evaluate the network on so many samples at a time (`divide_batches`); `None` for all at once.
            conditions: of the samples, as `conditions` returns them.
        """
        scheduler, config = self.scheduler, plan.config
        settings = StepSettings(
            scheduler.config.prediction_type,
            scheduler.clip,
            config.use_clipped_model_output,
            noise if config.eta > 0 else None,
        )
        engine = self.get_engine()
        is_conditional = conditions is not None or self.classes is not None
        is_plain = batch_size is None and not is_conditional and not self._learns_variance
        captured = engine.step_fn(x, plan.steps, settings) if is_plain else None
        denoiser = partial(self.denoiser, plan.steps, batch_size, engine, conditions)
        return captured or generative_step(denoiser(), plan.steps, settings)

    def run(
        self,
        x: Tensor,
        plan: SamplingPlan,
        noise: NoiseSource | None = None,
        on_step_end: Callable[[State], None] | None = None,
        progress_bar: ProgressBar | None = None,
        batch_size: int | None = None,
        conditions: Conditions | None = None,
    ) -> Tensor:
        """Sample: take all steps of a plan, without gradients.

        Args:
            x: the initial sample, (N, C, H, W).
            plan: the steps, as `plan` returns them.
            noise: draws noise of the shape of `x`; used where `eta` is above 0.
            on_step_end: called with the `State` after each step; it may replace `state.sample`.
            progress_bar: opens the bar; `None` for the sampler's own.
            batch_size: evaluate the network on so many samples at a time (`divide_batches`); `None` for all at once.
            conditions: of the samples, as `conditions` returns them.

        Returns:
            x after the last step, (N, C, H, W).
        """
        step_fn = self.step_fn(x, plan, noise, batch_size, conditions)
        with self.running(len(plan.steps), progress_bar) as bar:
            return self.take_steps(x, plan.steps, step_fn, bar, on_step_end)

    def take_steps(
        self,
        x: Tensor,
        steps: Sequence[Step],
        step_fn: StepFn,
        bar: Progress,
        on_step_end: Callable[[State], None] | None = None,
    ) -> Tensor:
        """Take steps by any step function inside `running`, advance the bar, and return the last sample.

        Args:
            x: the initial sample, (N, C, H, W).
            steps: the steps, in the order in which they are taken.
            step_fn: takes one step.
            bar: advanced by 1 per step.
            on_step_end: called with the `State` after each step; it may replace `state.sample`.

        Returns:
            x after the last step, (N, C, H, W).
        """
        for state in run_steps(x, steps, step_fn):
            bar.update()
            if on_step_end is not None:
                on_step_end(state)
            x = state.sample
        return x

    @contextmanager
    def running(self, total: int, progress_bar: ProgressBar | None = None) -> Iterator[Progress]:
        """Run a `with` block with a progress bar and without gradients.

        Args:
            total: steps of the bar.
            progress_bar: opens the bar; `None` for the sampler's own.

        Yields:
            The progress, to be updated after each step.
        """
        bar = iter((progress_bar or self.progress_bar)(range(total)))
        try:
            with torch.no_grad():
                yield Progress(bar)
        finally:
            if isinstance(bar, Generator):
                bar.close()

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> tqdm[Any]:
        """Return a `tqdm` bar with the settings of `progress_bar_config`.

        Args:
            iterable: what the bar iterates over; `None` for one that is advanced by hand.
            total: its length.
        """
        if iterable is None and total is None:
            raise ValueError("progress_bar requires an iterable or a total")
        return tqdm(iterable, **({"total": total} | self.progress_bar_config))


def _check_guide(sampler: Sampler, guide: Sampler) -> None:
    """Check that the predictions of a weaker model can be combined with those of a model."""
    for what, mine, its in (
        ("sample shape", sampler.sample_shape, guide.sample_shape),
        ("prediction_type", sampler.scheduler.config.prediction_type, guide.scheduler.config.prediction_type),
        ("device", sampler.device, guide.device),
    ):
        if mine != its:
            raise ValueError(f"guide must have the model's {what}, {mine}, got {its}")
    if not torch.equal(sampler.scheduler.alphas_cumprod.cpu(), guide.scheduler.alphas_cumprod.cpu()):
        raise ValueError("guide must have the model's noise schedule, got another one")
    counts = [None if classes is None else classes.count for classes in (sampler.classes, guide.classes)]
    if counts[0] != counts[1]:
        raise ValueError(f"guide must have the model's number of classes, {counts[0]}, got {counts[1]}")


def check_output_channels(config: Any) -> None:
    """Check that a network predicts as many channels as it takes, or twice as many.

    Args:
        config: of the network; one without channels is not checked.

    Raises:
        ValueError: for another number.

    Example:
        >>> from types import SimpleNamespace
        >>> check_output_channels(SimpleNamespace(in_channels=3, out_channels=4))
        Traceback (most recent call last):
        ValueError: the network's out_channels must be 3, or 6 with a learned variance, for in_channels=3, got 4
    """
    taken, predicted = getattr(config, "in_channels", None), getattr(config, "out_channels", None)
    if isinstance(taken, int) and isinstance(predicted, int) and predicted not in (taken, 2 * taken):
        raise ValueError(
            f"the network's out_channels must be {taken}, or {2 * taken} with a learned variance, for "
            f"in_channels={taken}, got {predicted}"
        )


class Progress:
    """Advances an iterator, such as a `tqdm` bar, from outside: it is in its first item from the beginning.

    Args:
        bar: the iterator.

    Example:
        >>> bar = iter(range(2))
        >>> progress = Progress(bar)
        >>> progress.update()
        >>> list(bar)
        []
    """

    def __init__(self, bar: Iterator[Any]) -> None:
        self._bar = bar
        next(bar, None)

    def update(self) -> None:
        """Go to the next item; after the last one the iterator ends."""
        next(self._bar, None)


@contextmanager
def evaluating(network: Any) -> Iterator[None]:
    """Put a network into evaluation mode for the duration of a `with` block, then each part back into its mode.

    Args:
        network: any object; only an `nn.Module` has modes.

    Example:
        >>> network = nn.Dropout()
        >>> with evaluating(network):
        ...     network.training
        False
        >>> network.training
        True
    """
    training = [module for module in network.modules() if module.training] if isinstance(network, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
