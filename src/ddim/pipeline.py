"""`DDIMPipeline`: a network and a scheduler, from noise to images.

    noise -> Sampler.run(x, plan) -> images

Arguments, defaults and results are those of the class of that name in `diffusers`; additions follow as keywords.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self, TypeVar, Unpack, cast, overload

import torch
from torch import Tensor
from tqdm import tqdm

from ddim.components import ComponentPipeline, names_class, settings_of
from ddim.diffusion.guidance import Conditions
from ddim.diffusion.loop import State
from ddim.diffusion.noise import list_seeds
from ddim.diffusion.sampling_config import SamplingConfig
from ddim.engine import check_engine
from ddim.external_scheduler import StepArguments, run_scheduler
from ddim.io import hub
from ddim.io.class_labels import ClassLabels, Labels, arguments_of_batch, count_labels
from ddim.io.diffusers_mixins import join_mixins
from ddim.io.json_files import read_json
from ddim.io.pixel_format import PixelFormat
from ddim.latents import Condition, LatentSpace
from ddim.outputs import ImagePipelineOutput
from ddim.restoration import Restoration
from ddim.sampler import Sampler, check_output_channels
from ddim.scheduler import DDIMScheduler, has_own_steps
from ddim.unet import UNet2DModel
from ddim.validation import integer, join_choices, nearest, shown

# The classes that a model_index.json may name. Nothing is ever imported by a name from a file.
UNET_CLASSES = ("UNet2DModel", "UNetUnconditionalModel")
SCHEDULER_CLASSES = (
    "DDIMScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "PNDMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "SASolverScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)
DISCRETE_CLASS = "DiscreteDDIMPipeline"
"""The pipeline of `ddim.discrete`, whose folders are refused by name."""


class DiscreteModelError(ValueError):
    """A model of the discrete process, where one of Gaussian noise is required.

    Example:
        >>> raise DiscreteModelError("a discrete model")
        Traceback (most recent call last):
        ddim.pipeline.DiscreteModelError: a discrete model
    """


SamplerType = TypeVar("SamplerType", bound=Sampler)


class ImagePipeline(ComponentPipeline):
    """A pipeline of a network and a scheduler that samples images by its `sampler`: what those of all processes share.

    Attributes:
        unet: the network; may be replaced.
        scheduler: the scheduler; may be replaced.
        engine: the name of the engine that runs the network; may be changed.
    """

    unet: Any = None
    scheduler: Any = None
    engine: str = "auto"
    _progress_bar_config: Mapping[str, Any] = MappingProxyType({})

    @property
    def sampler(self) -> Sampler:
        """The network, the scheduler and the engine as they are now, ready to run."""
        raise NotImplementedError

    def with_progress_bar(self, sampler: SamplerType) -> SamplerType:
        """Return a sampler after giving it the settings of this pipeline's progress bar.

        Args:
            sampler: a new one.
        """
        sampler.progress_bar_config = dict(self._progress_bar_config)
        return sampler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sample images.

        Args:
            args: of the process.
            kwargs: of the process.
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device of the network's weights."""
        return super().device if self.unet is None else torch.device(getattr(self.unet, "device", "cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's parameters."""
        return super().dtype if self.unet is None else self.sampler.dtype

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of the network's samples."""
        return self.sampler.sample_shape

    @property
    def pixel_format(self) -> PixelFormat:
        """The type and the ranges of the values of the model's images."""
        return self.sampler.pixel_format

    def set_progress_bar_config(self, **config: Any) -> None:
        """Set arguments of the `tqdm` progress bar.

        Args:
            config: such as `disable=True` or `desc="sampling"`.
        """
        self._progress_bar_config = config

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> tqdm[Any]:
        """Return a `tqdm` bar with the settings of `set_progress_bar_config`.

        Args:
            iterable: what the bar iterates over; `None` for one that is advanced by hand.
            total: its length.
        """
        return self.sampler.progress_bar(iterable, total)

    def sample_images(self, count: int, seed: int = 0, batch_size: int = 64, **settings: Any) -> list[Any]:
        """Sample any number of images in batches, image i from seed `seed + i`.

        Batches are all of one size, the last one filled up with further seeds: networks round a little differently for
        batches of different sizes, and an image must not depend on its place in the last batch.

        Args:
            count: the number of images.
            seed: of the first image.
            batch_size: images per network evaluation; at most `count` are taken.
            settings: `eta`, `num_inference_steps`, `use_clipped_model_output`, `timesteps`, `order`, `use_sigma_hat`,
                `output_type`, classes and guidance of a call of the pipeline; as many labels as images, or one.

        Returns:
            `count` PIL images, or as many arrays (H, W, C) or tensors (C, H, W), as `output_type` says.

        Raises:
            ValueError: for an argument out of range, before the network runs.
            TypeError: for one of a wrong type.

        Example:
            >>> pipe = DDIMPipeline.from_pretrained("mnist")
            >>> pipe.set_progress_bar_config(disable=True)
            >>> len(pipe.sample_images(3, seed=7, batch_size=2, num_inference_steps=1))
            3
        """
        count, batch_size = integer("count", count, 1), integer("batch_size", batch_size, 1)
        seed = integer("seed", seed, 0)
        batch_size = min(count, batch_size)
        images: list[Any] = []
        for first in range(0, count, batch_size):
            of_batch = arguments_of_batch(settings, first, batch_size, count)
            seeds = range(seed + first, seed + first + batch_size)
            (batch,) = cast(tuple[Any], self(batch_size, return_dict=False, seeds=seeds, **of_batch))
            images.extend(batch)
        return images[:count]

    def quiet_copy(self) -> ImagePipeline:
        """Return a pipeline of the same components, whose progress bar is not shown."""
        quiet = type(self)(self.unet, self.scheduler, engine=self.engine)  # type: ignore[call-arg]
        quiet.set_progress_bar_config(disable=True)
        return quiet

    @property
    def classes(self) -> ClassLabels | None:
        """The classes that the model knows; `None` for an unconditional one."""
        return self.sampler.classes

    def conditions(self, count: int, **condition: Unpack[Condition]) -> Conditions | None:
        """Return what the samples of a run are conditioned on, checked; see `Sampler.conditions`.

        Args:
            count: N, the number of samples.
            condition: classes and guidance.
        """
        return self.sampler.conditions(count, **condition)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, engine: str = "auto", **options: Any
    ) -> Self:
        """Load a pipeline: a built-in model, a folder, or a hub id.

        Args:
            pretrained_model_name_or_path: `"mnist"`, `"mnist-labels"` or `"faces"`, which are built in; a folder of
                any layout that `ddim.io.hub` describes; or a hub id such as `"google/ddpm-cifar10-32"`.
            engine: how the network is run: `auto`, `eager` or `compile`.
            options: those of `ComponentPipeline.from_pretrained`: `torch_dtype`, `variant`, `use_safetensors`,
                `device_map`; `cache_dir`, `local_files_only`, `revision`, `token`, `force_download`; `unet` or
                `scheduler` instead of what the folder holds.

        Returns:
            The pipeline, its network in evaluation mode on the CPU.

        Raises:
            FileNotFoundError: if no such model exists, or files are missing in it; names the files looked for.
            ValueError: if a file is damaged, does not fit, or names a class that is not allowed.
            TypeError: for another option.

        Example:
            >>> DDIMPipeline.from_pretrained("mnist", engine="eager").sample_shape
            (1, 28, 28)
        """
        check_engine(engine)
        pipe = super().from_pretrained(pretrained_model_name_or_path, **options)
        pipe.engine = engine
        return pipe


class DDIMPipeline(ImagePipeline, LatentSpace, Restoration):
    """A denoising diffusion model: samples images, and encodes images into latents and back.

    Args:
        unet: a `UNet2DModel`, this library's or `diffusers`', or any object with `unet(sample, timestep).sample` and a
            `.config` that has `sample_size` and `in_channels`.
        scheduler: anything with the `.config` of a diffusion scheduler, such as a `DDPMScheduler`; a `DDIMScheduler` of
            that configuration is used.
        engine: how the network is run: `auto`, `eager` or `compile` (`ddim.engine`).

    Attributes:
        unet: the network; may be replaced.
        scheduler: the scheduler; may be replaced by any that has `set_timesteps` and `step`.
        engine: the name of the engine that runs the network; may be changed.

    Raises:
        TypeError: for a network or scheduler without `.config`.
        ValueError: for an unknown engine.

    References:
        Denoising Diffusion Implicit Models, arXiv 2010.02502.

    Example:
        >>> pipe = DDIMPipeline.from_pretrained("mnist")
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe(seeds=[0, 1], num_inference_steps=4).images[1].size
        (28, 28)
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: Any = None, scheduler: Any = None, *, engine: str = "auto") -> None:
        self.engine = check_engine(engine)
        if unet is None and scheduler is None and type(self) is not DDIMPipeline:
            return  # a subclass registers its components itself
        for name, component in (("unet", unet), ("scheduler", scheduler)):
            if not hasattr(component, "config"):
                raise TypeError(f"{name} must have a .config to read its settings from, got {type(component).__name__}")
        if not callable(unet):
            raise TypeError(f"unet must be a network, called as unet(sample, timestep), got {type(unet).__name__}")
        self.register_modules(unet=unet, scheduler=DDIMScheduler.from_config(scheduler.config))
        if type(self).__call__ is DDIMPipeline.__call__:
            check_output_channels(unet.config)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if "_registered" not in state:  # pickled with `diffusers`
            names = [name for name, entry in self._internal_dict.items() if isinstance(entry, tuple)]
            self.register_modules(**{name: state[name] for name in names})

    @property
    def sampler(self) -> Sampler:
        """The network, the scheduler and the engine as they are now, ready to run."""
        return self.with_progress_bar(Sampler(self.unet, self.scheduler, self.engine))

    @overload
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str = "pil",
        return_dict: Literal[True] = True,
        *,
        seeds: Iterable[int] | None = None,
        latents: Tensor | None = None,
        timesteps: Sequence[int] | None = None,
        order: int | None = None,
        use_sigma_hat: bool = False,
        class_labels: Labels | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[int, int] | None = None,
        negative_labels: Labels | None = None,
        guide: DDIMPipeline | str | os.PathLike[str] | None = None,
        callback_on_step_end: Callable[[DDIMPipeline, int, int, dict[str, Tensor]], dict[str, Tensor] | None]
        | None = None,
    ) -> ImagePipelineOutput: ...

    @overload
    def __call__(self, *args: Any, return_dict: Literal[False], **kwargs: Any) -> tuple[Any]: ...

    def __call__(  # type: ignore[misc]  # the second signature stands for all arguments
        self,
        batch_size: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        seeds: Iterable[int] | None = None,
        latents: Tensor | None = None,
        timesteps: Sequence[int] | None = None,
        order: int | None = None,
        use_sigma_hat: bool = False,
        class_labels: Labels | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[int, int] | None = None,
        negative_labels: Labels | None = None,
        guide: DDIMPipeline | str | os.PathLike[str] | None = None,
        callback_on_step_end: Callable[[DDIMPipeline, int, int, dict[str, Tensor]], dict[str, Tensor] | None]
        | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        The network runs without gradients and in the mode it is in: dropout takes effect in training mode. Networks
        that are loaded are in evaluation mode.

        A scheduler of another class, or with methods of its own, is run by its `set_timesteps` and `step`
        (`ddim.external_scheduler`); `order` and `use_sigma_hat` are settings of `DDIMScheduler` alone.

        Args:
            batch_size: N. Left at 1, it follows the number of `seeds` or `latents`.
            generator: of all noise; one, or a list of N. The images are those that `diffusers` samples with it.
            eta: 0 for DDIM, 1 for DDPM; above 1 is allowed, with a warning.
            num_inference_steps: S, from 1 to the number of timesteps the model was trained with.
            use_clipped_model_output: recompute epsilon from the clipped x_0 in each step.
            output_type: `pil`; `np` or `numpy`: float32 (N, H, W, C) in [0, 1]; `pt`: (N, C, H, W) in [0, 1], on the
                model's device. Of a model of 16-bit or float images `np` is of that type and `pt` floating, both in the
                data's units (`ddim.io.pixel_format`).
            return_dict: `False` for `(images,)`.
            seeds: one integer per image instead of a generator: image i then depends on `seeds[i]` and on nothing else,
                to within rounding, if the network is deterministic (dropout draws from PyTorch's global generator).
            latents: x at the first timestep, (N, C, H, W), instead of noise that is drawn.
            timesteps: a custom subsequence instead of S: strictly decreasing integers.
            order: of the solver: 1 for DDIM, 2 to 4 for the multistep methods of `ddim.diffusion.solvers.multistep`,
                which cost the same and require eta = 0; defaults to the scheduler's `solver_order`. The timesteps of
                each are those of `DDIMScheduler.make_timesteps`.
            use_sigma_hat: add noise with DDPM's larger variance (the paper's sigma-hat); requires `eta=1`.
            class_labels: of a model with classes, one for all images or one per image: indices, or names of
                `pipe.classes`. Left out, a model that was trained with a null class samples from all classes.
            guidance_scale: w of `ddim.diffusion.guidance`, at least 0: 1 is the conditional model, more makes images
                more typical of their class, 0 is the null class.
            guidance_interval: the smallest and the largest timestep at which guidance acts; `None` for all.
            negative_labels: classes to guide away from, instead of the null class.
            guide: a smaller or less trained model to guide away from, instead of the null class: a pipeline or its
                name.
            callback_on_step_end: called as `callback(pipe, step_index, timestep, {"latents": x, "pred_original_sample":
                x0})` after each step, all tensors (N, C, H, W) in about [-1, 1]; it may return a dictionary whose
                `latents` replace x.

        Returns:
            `ImagePipelineOutput` with `images`, or `(images,)`.

        Raises:
            ValueError: for an argument out of range, before the network runs.
            TypeError: for one of a wrong type.

        References:
            Equation (12) of arXiv 2010.02502; guidance: `ddim.diffusion.guidance`.

        Example:
            >>> pipe = DDIMPipeline.from_pretrained("mnist")
            >>> pipe.set_progress_bar_config(disable=True)
            >>> pipe(batch_size=2, num_inference_steps=2, output_type="np").images.shape
            (2, 28, 28, 1)
        """
        self.sampler.check_output(output_type)
        config = SamplingConfig(
            num_inference_steps, eta, timesteps, order, use_sigma_hat, bool(use_clipped_model_output)
        )
        if self.offload_device is not None:
            self.unet.to(self.offload_device)

        seeds = None if seeds is None else list_seeds(seeds)
        if batch_size == 1 and seeds is None and latents is None:
            batch_size = count_labels(class_labels)

        def call_back(index: int, timestep: int, sample: Tensor, pred_original_sample: Tensor) -> Tensor:
            if callback_on_step_end is None:
                return sample
            tensors = {"latents": sample, "pred_original_sample": pred_original_sample}
            return _returned_latents(callback_on_step_end(self, index, timestep, tensors), sample)

        def on_step_end(state: State) -> None:
            state.sample = call_back(state.index, state.step.timestep, state.sample, state.pred_original_sample)

        condition: Condition = {
            "class_labels": class_labels,
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "negative_labels": negative_labels,
            "guide": guide,
        }
        if has_own_steps(self.scheduler):
            plan = self.sampler.plan(config)
            x, noise = self.sampler.initial_noise(batch_size, generator, seeds, latents)
            conditions = self.conditions(len(x), **condition)
            x = self.sampler.run(x, plan, noise, on_step_end, self.progress_bar, conditions=conditions)
        else:
            x, _ = self.sampler.initial_noise(batch_size, generator, seeds, latents)
            conditions = self.conditions(len(x), **condition)
            generators = None if seeds is None else [torch.Generator(x.device).manual_seed(seed) for seed in seeds]
            arguments = StepArguments(eta, use_clipped_model_output, generators or generator)
            x = run_scheduler(
                self.sampler, x, config, arguments, latents is None, call_back, self.progress_bar, conditions
            )
        to_pil = output_type == "pil" and self.pixel_format.is_eight_bit
        images = self.sampler.to_output(x, "np" if to_pil else output_type)
        # A subclass may replace numpy_to_pil.
        images = self.numpy_to_pil(images) if to_pil else images
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images) if return_dict else (images,)

    def quiet_copy(self) -> DDIMPipeline:
        """Return a `DDIMPipeline` of the same components, whatever the subclass, whose progress bar is not shown."""
        quiet = DDIMPipeline(self.unet, self.scheduler, engine=self.engine)
        quiet.set_progress_bar_config(disable=True)
        return quiet

    def conditions(self, count: int, **condition: Unpack[Condition]) -> Conditions | None:
        """Return what the samples of a run are conditioned on, checked.

        Args:
            count: N, the number of samples.
            condition: classes and guidance, as for a call of the pipeline.

        Returns:
            The conditions; `None` for an unconditional model without a guide.

        Raises:
            ValueError: for a class that does not exist, labels or guidance that the model does not take, or a guide
                that does not fit it.
            TypeError: for an argument of a wrong type, or another one.

        Example:
            >>> DDIMPipeline.from_pretrained("mnist").conditions(4, class_labels=3)
            Traceback (most recent call last):
            ValueError: class_labels and negative_labels must be None: the model has no classes
        """
        if unknown := sorted(condition.keys() - Condition.__annotations__.keys()):
            hint = "; methods that draw noise take seeds" if "generator" in unknown else ""
            raise TypeError(f"{unknown[0]} is not an argument of this method{hint}")
        given: dict[str, Any] = dict(condition)
        guide = given.pop("guide", None)
        if isinstance(guide, str | os.PathLike):
            guide = DDIMPipeline.from_pretrained(guide, engine=self.engine).to(self.device, self.dtype)
        if guide is not None and not isinstance(guide, DDIMPipeline):
            raise TypeError(f"guide must be a pipeline or the name of one, got {type(guide).__name__}")
        return self.sampler.conditions(count, **given, guide=None if guide is None else guide.sampler)

    def paint(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Call `sample_images`, of which this is a deprecated alias.

        Args:
            args: as for `sample_images`.
            kwargs: as for `sample_images`.
        """
        warnings.warn("paint is deprecated; use sample_images", DeprecationWarning, stacklevel=2)
        return self.sample_images(*args, **kwargs)

    @classmethod
    def _check_index(cls, folder: Path) -> dict[str, Any]:
        check_model_index(folder, component_names=tuple(signature(cls.__init__).parameters))
        return super()._check_index(folder)

    @classmethod
    def _load_component(cls, folder: Path, name: str, entry: Any, settings: Mapping[str, Any]) -> Any:
        class_name = entry[1] if entry else None
        # The constructor of this class makes a DDIMScheduler of any; another one may need the class itself.
        takes_any = cls.__init__ is DDIMPipeline.__init__ or not entry or find_spec("diffusers") is None
        if name == "scheduler" and class_name in (None, *SCHEDULER_CLASSES) and takes_any:
            return DDIMScheduler.from_pretrained(component_folder(folder, name, DDIMScheduler.config_name))
        if name == "unet" and class_name in (None, *UNET_CLASSES):
            path = component_folder(folder, name, UNet2DModel.config_name)
            check_class(path / UNet2DModel.config_name, UNET_CLASSES)
            return UNet2DModel.from_pretrained(path, **settings_of(name, settings))
        return super()._load_component(folder, name, entry, settings)


# Loaders, and scripts, read the components from the signature: all of its names are components, as in `diffusers`. Only
# a subclass leaves them out, to register them itself.
vars(DDIMPipeline)["__init__"].__signature__ = Signature(
    [
        Parameter("self", Parameter.POSITIONAL_OR_KEYWORD),
        Parameter("unet", Parameter.POSITIONAL_OR_KEYWORD, annotation=object),
        Parameter("scheduler", Parameter.POSITIONAL_OR_KEYWORD, annotation=object),
    ]
)
join_mixins(DDIMPipeline, "pipelines.pipeline_utils.DiffusionPipeline")


def check_model_index(folder: Path, component_names: Sequence[str] = ("unet", "scheduler")) -> None:
    """Check the components that a folder's `model_index.json` names against the tables of this module.

    Args:
        folder: of a pipeline; nothing is checked where it has no such file.
        component_names: the components that the pipeline takes. Classes of others than `unet` and `scheduler` are not
            checked. Settings of other pipelines, and their optional components where they are missing, are ignored.

    Raises:
        ValueError: naming the first class or component that is not in them.
        DiscreteModelError: for a folder of the discrete process (`ddim.discrete`).

    Example:
        >>> check_model_index(hub.find_model("mnist"))
    """
    path = folder / hub.MODEL_INDEX
    if not path.exists():
        return
    index = read_json(path)
    if index.get("_class_name") == DISCRETE_CLASS:
        raise DiscreteModelError(
            f"{folder} is a discrete model: ddim.discrete.{DISCRETE_CLASS} loads it; ddim sample, evaluate, info, "
            "ema and export take it"
        )
    allowed = {"unet": UNET_CLASSES, "scheduler": SCHEDULER_CLASSES}
    is_custom = set(component_names) - {"self"} != set(allowed)
    for name, entry in index.items():
        if name.startswith("_"):
            continue
        if name not in (component_names if is_custom else allowed):
            if names_class(entry) and entry != [None, None]:
                raise ValueError(f"{path}: a component of a DDIM pipeline must be unet or scheduler, got {shown(name)}")
            continue  # a setting, or a component that was not given, of a subclass
        class_name = entry[-1] if isinstance(entry, list) and entry else entry
        if not is_custom and class_name not in allowed[name]:
            raise ValueError(
                f"{path}: the class of {name} must be one of {join_choices(allowed[name])}, got {shown(class_name)}"
                f"{nearest(class_name, allowed[name])}"
            )


def check_class(path: Path, allowed: Sequence[str]) -> None:
    """Check the class that a configuration file names.

    Args:
        path: of the JSON file; one that names no class is taken for the first.
        allowed: names of classes.

    Raises:
        ValueError: if it is not among them.

    Example:
        >>> check_class(hub.find_model("mnist") / "unet/config.json", UNET_CLASSES)
    """
    name = read_json(path).get("_class_name", allowed[0])
    if name not in allowed:
        near = nearest(name, allowed)
        raise ValueError(f"{path}: the class must be one of {join_choices(allowed)}, got {shown(name)}{near}")


def component_folder(folder: Path, name: str, config_name: str) -> Path:
    """Return the folder of a component's configuration: its own, or the root in the flat layout.

    Args:
        folder: of the pipeline.
        name: of the component, `unet` or `scheduler`.
        config_name: the name of its configuration file.

    Raises:
        FileNotFoundError: if neither holds the file.

    Example:
        >>> component_folder(hub.find_model("mnist"), "unet", "config.json").name
        'unet'
    """
    for candidate in (folder / name, folder):
        if (candidate / config_name).is_file():
            return candidate
    raise FileNotFoundError(f"{folder} is not a model: neither {name}/{config_name} nor {config_name} exists in it")


def _returned_latents(returned: dict[str, Tensor] | None, sample: Tensor) -> Tensor:
    """Return the latents that a `callback_on_step_end` has returned, else the sample it was called with."""
    latents = (returned or {}).get("latents")
    if latents is None:
        return sample
    if latents.shape != sample.shape:
        raise ValueError(f"latents of the callback: expected shape {tuple(sample.shape)}, got {tuple(latents.shape)}")
    return latents
