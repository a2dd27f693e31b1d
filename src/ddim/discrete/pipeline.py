"""`DiscreteDDIMPipeline`: a network and a `DiscreteDDIMScheduler`, from random values to images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import torch

from ddim.components import settings_of
from ddim.diffusion.guidance import Conditions
from ddim.diffusion.noise import list_seeds
from ddim.diffusion.sampling_config import SamplingConfig
from ddim.discrete.sampler import DiscreteSampler
from ddim.discrete.scheduler import DiscreteDDIMScheduler
from ddim.engine import check_engine
from ddim.io import hub
from ddim.io.class_labels import count_labels
from ddim.latents import Condition
from ddim.outputs import ImagePipelineOutput
from ddim.pipeline import UNET_CLASSES, DDIMPipeline, DiscreteModelError, ImagePipeline, check_class, component_folder
from ddim.unet import UNet2DModel
from ddim.validation import shown

SAMPLING_SETTINGS = ("timesteps", "order", "use_sigma_hat", "use_clipped_model_output")
"""Further settings of `SamplingConfig`."""


class DiscreteDDIMPipeline(ImagePipeline):
    """A diffusion model of values: samples images whose entries are one of K gray values.

    Args:
        unet: a `UNet2DModel` of C K channels, for images of C.
        scheduler: a `DiscreteDDIMScheduler`.
        engine: how the network is run: `auto`, `eager` or `compile` (`ddim.engine`).

    Attributes:
        unet: the network; may be replaced.
        scheduler: the scheduler; may be replaced.
        engine: the name of the engine that runs the network; may be changed.

    Raises:
        TypeError: for a scheduler of another class, or a network without `.config`.
        ValueError: for an unknown engine, or a network whose channels are not a multiple of K.

    References:
        Appendix A of arXiv 2010.02502.

    Example:
        >>> unet = UNet2DModel(8, 2, 2, block_out_channels=(32,), down_block_types=("DownBlock2D",),
        ...                    up_block_types=("UpBlock2D",))
        >>> pipe = DiscreteDDIMPipeline(unet, DiscreteDDIMScheduler(num_values=2))
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe(seeds=[0, 1], num_inference_steps=4).images[1].size
        (8, 8)
    """

    def __init__(self, unet: Any, scheduler: Any, *, engine: str = "auto") -> None:
        self.engine = check_engine(engine)
        if not isinstance(scheduler, DiscreteDDIMScheduler):
            raise TypeError(f"scheduler must be a DiscreteDDIMScheduler, got {type(scheduler).__name__}")
        if not callable(unet) or not hasattr(unet, "config"):
            raise TypeError(f"unet must be a network with a .config, got {type(unet).__name__}")
        channels, predicted, K = unet.config.in_channels, unet.config.out_channels, scheduler.num_values
        if channels % K or channels != predicted:
            raise ValueError(
                f"the network's in_channels and out_channels must be equal, and a multiple of num_values={K}, got "
                f"{channels} and {predicted}"
            )
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def sampler(self) -> DiscreteSampler:
        """The network, the scheduler and the engine as they are now, ready to run."""
        return self.with_progress_bar(DiscreteSampler(self.unet, self.scheduler, self.engine))

    @overload
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: Literal[True] = True,
        *,
        seeds: Iterable[int] | None = None,
        **settings: Any,
    ) -> ImagePipelineOutput: ...

    @overload
    def __call__(self, *args: Any, return_dict: Literal[False], **kwargs: Any) -> tuple[Any]: ...

    def __call__(  # type: ignore[misc]  # the second signature stands for all arguments
        self,
        batch_size: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        seeds: Iterable[int] | None = None,
        **settings: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            batch_size: N. Left at 1, it follows the number of `seeds` or `class_labels`.
            generator: of all noise; one, or a list of N.
            eta: from 0, the least random, to 1, where each step forgets x_t.
            num_inference_steps: S, from 1 to the number of timesteps the model was trained with.
            output_type: `pil`; `np` or `numpy`: float32 (N, H, W, C) in [0, 1]; `pt`: (N, C, H, W) in [0, 1].
            return_dict: `False` for `(images,)`.
            seeds: one integer per image instead of a generator: image i then depends on `seeds[i]`, and on the batch
                only where rounding changes a value that is drawn.
            settings: `timesteps`, `class_labels`, `guidance_scale`, `guidance_interval` and `negative_labels` of
                `DDIMPipeline.__call__`; and, for callers of either pipeline, `order`, `use_sigma_hat` and
                `use_clipped_model_output` as they are by default.

        Returns:
            `ImagePipelineOutput` with `images`, or `(images,)`.

        Raises:
            ValueError: for an argument out of range, before the network runs.
            TypeError: for one of a wrong type.

        References:
            Equation (20) of arXiv 2010.02502.
        """
        sampler = self.sampler
        sampler.check_output(output_type)
        chosen = {name: settings.pop(name) for name in SAMPLING_SETTINGS if name in settings}
        plan = sampler.plan(SamplingConfig(num_inference_steps, eta, **chosen))
        seeds = None if seeds is None else list_seeds(seeds)
        if batch_size == 1 and seeds is None:
            batch_size = count_labels(settings.get("class_labels"))
        x, noise = sampler.initial_noise(batch_size, generator, seeds)
        conditions = self.conditions(len(x), **settings)
        images = sampler.to_output(sampler.run(x, plan, noise, conditions=conditions), output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def conditions(self, count: int, **condition: Unpack[Condition]) -> Conditions | None:
        """Return what the samples of a run are conditioned on, checked; see `Sampler.conditions`.

        Args:
            count: N, the number of samples.
            condition: classes and guidance; `guide` must be `None`.

        Raises:
            ValueError: for a class that does not exist, labels or guidance that the model does not take, or a guide.
            TypeError: for an argument of a wrong type.
        """
        if condition.get("guide") is not None:
            raise ValueError("guide must be None for a discrete process; use negative_labels or the null class")
        return super().conditions(count, **condition)

    @classmethod
    def _check_index(cls, folder: Path) -> dict[str, Any]:
        index = super()._check_index(folder)
        if index.get("_class_name") != cls.__name__:
            raise ValueError(
                f"{folder / hub.MODEL_INDEX} must be of a {cls.__name__}, got {shown(index.get('_class_name'))}"
            )
        return index

    @classmethod
    def _load_component(cls, folder: Path, name: str, entry: Any, settings: Mapping[str, Any]) -> Any:
        # Whatever classes the file names: these two are all there are.
        if name == "scheduler":
            path = component_folder(folder, name, DiscreteDDIMScheduler.config_name)
            check_class(path / DiscreteDDIMScheduler.config_name, [DiscreteDDIMScheduler.__name__])
            return DiscreteDDIMScheduler.from_pretrained(path)
        path = component_folder(folder, name, UNet2DModel.config_name)
        check_class(path / UNet2DModel.config_name, UNET_CLASSES)
        return UNet2DModel.from_pretrained(path, **settings_of(name, settings))


def open_pipeline(model: str | os.PathLike[str], **options: Any) -> DDIMPipeline | DiscreteDDIMPipeline:
    """Load a model of either process.

    Args:
        model: as for `DDIMPipeline.from_pretrained`.
        options: as there.

    Returns:
        A `DDIMPipeline`, or a `DiscreteDDIMPipeline` for a discrete model.

    Raises:
        FileNotFoundError: if no such model exists, or files are missing in it.
        ValueError: if a file is damaged.

    Example:
        >>> type(open_pipeline("mnist")).__name__
        'DDIMPipeline'
    """
    try:
        return DDIMPipeline.from_pretrained(model, **options)
    except DiscreteModelError:
        return DiscreteDDIMPipeline.from_pretrained(model, **options)
