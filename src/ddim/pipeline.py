"""`DDIMPipeline`: a network and a scheduler, from noise to images.

    noise -> Sampler.run(x, plan) -> images

Arguments, defaults and results are those of the class of that name in `diffusers`; additions follow as keywords.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ddim.devices import choose_device
from ddim.diffusion.loop import State
from ddim.diffusion.sampling_config import SamplingConfig
from ddim.engine import check_engine
from ddim.io import hub
from ddim.io.atomic import write_folder
from ddim.io.images import check_output_type, to_output
from ddim.io.json_files import read_json, to_json
from ddim.io.weights import MAX_SHARD_SIZE, remove_stale_weights
from ddim.latents import LatentSpace
from ddim.outputs import ImagePipelineOutput
from ddim.sampler import Sampler
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel
from ddim.validation import integer, join_choices, shown
from ddim.version import __version__

# The classes that a model_index.json may name. Nothing is ever imported by a name from a file.
PIPELINE_CLASSES = ("DDIMPipeline", "DDPMPipeline", "PNDMPipeline")
UNET_CLASSES = ("UNet2DModel", "UNetUnconditionalModel")
SCHEDULER_CLASSES = (
    "DDIMScheduler",
    "DDIMInverseScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)


class DDIMPipeline(LatentSpace):
    """A denoising diffusion model: samples images, and encodes images into latents and back.

    Args:
        unet: a `UNet2DModel`, this library's or `diffusers`', or any object with `unet(sample, timestep).sample` and a
            `.config` that has `sample_size` and `in_channels`.
        scheduler: anything with the `.config` of a diffusion scheduler, such as a `DDPMScheduler`; a `DDIMScheduler` of
            that configuration is used.
        engine: how the network is run: `auto`, `eager` or `compile` (`ddim.engine`).

    Attributes:
        sampler: the network, the scheduler and the engine, ready to run.

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

    def __init__(self, unet: Any, scheduler: Any, engine: str = "auto") -> None:
        for name, component in (("unet", unet), ("scheduler", scheduler)):
            if not hasattr(component, "config"):
                raise TypeError(f"{name} must have a .config to read its settings from, got {type(component).__name__}")
        self.sampler = Sampler(unet, DDIMScheduler.from_config(scheduler.config), engine)

    def __repr__(self) -> str:
        unet = f"{type(self.unet).__name__} on {self.device}, {self.dtype}"
        return f"{type(self).__name__}(unet={unet}, scheduler={type(self.scheduler).__name__})"

    @property
    def unet(self) -> Any:
        """The network; may be replaced."""
        return self.sampler.unet

    @unet.setter
    def unet(self, unet: Any) -> None:
        self.sampler.unet = unet

    @property
    def scheduler(self) -> DDIMScheduler:
        """The scheduler; may be replaced."""
        return self.sampler.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: DDIMScheduler) -> None:
        self.sampler.scheduler = scheduler

    @property
    def engine(self) -> str:
        """The name of the engine that runs the network: `auto`, `eager` or `compile`; may be changed."""
        return self.sampler.engine

    @engine.setter
    def engine(self, engine: str) -> None:
        self.sampler.engine = engine

    @property
    def components(self) -> dict[str, Any]:
        """`{"unet": ..., "scheduler": ...}`, from which another pipeline can be built without copying weights."""
        return {"unet": self.unet, "scheduler": self.scheduler}

    def register_modules(self, **modules: Any) -> None:
        """Replace the `unet`, the `scheduler` or both.

        Args:
            modules: the components by name; of a scheduler a `DDIMScheduler` of its configuration is used.

        Raises:
            TypeError: for another name.

        Example:
            >>> pipe = DDIMPipeline.from_pretrained("mnist")
            >>> pipe.register_modules(scheduler=DDIMScheduler(clip_sample=False))
            >>> pipe.scheduler.config.clip_sample
            False
        """
        for name, module in modules.items():
            if name == "unet":
                self.unet = module
            elif name == "scheduler":
                self.scheduler = DDIMScheduler.from_config(module.config)
            else:
                raise TypeError(f"a component of a DDIMPipeline must be unet or scheduler, got {name!r}")

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.sampler.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's parameters."""
        return self.sampler.dtype

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of the network's samples."""
        return self.sampler.sample_shape

    def to(
        self, *args: str | torch.device | torch.dtype, device: str | torch.device | None = None, dtype: Any = None
    ) -> Self:
        """Move the network to a device, a dtype, or both.

        Args:
            args: a device, a floating dtype, or both, in any order.
            device: the device by name.
            dtype: the dtype by name.

        Returns:
            The pipeline itself.

        Raises:
            ValueError: if the machine has no such device.
            TypeError: for anything else than a device and a floating dtype.

        Example:
            >>> DDIMPipeline.from_pretrained("mnist").to("cpu", torch.bfloat16).dtype
            torch.bfloat16
        """
        for arg in args:
            if isinstance(arg, torch.dtype):
                dtype = arg
            else:
                device = arg
        if not isinstance(device, str | torch.device | None):
            raise TypeError(f"device must be a device such as 'cpu' or 'cuda:0', got {shown(device)}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating dtype such as torch.bfloat16, got {shown(dtype)}")
        self.unet.to(device=None if device is None else choose_device(device), dtype=dtype)
        return self

    def set_progress_bar_config(self, **config: Any) -> None:
        """Set arguments of the `tqdm` progress bar.

        Args:
            config: such as `disable=True` or `desc="sampling"`.
        """
        self.sampler.progress_bar_config = config

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> tqdm[Any]:
        """Return a `tqdm` bar with the settings of `set_progress_bar_config`.

        Args:
            iterable: what the bar iterates over; `None` for one that is advanced by hand.
            total: its length.
        """
        return self.sampler.progress_bar(iterable, total)

    def __call__(
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
        callback_on_step_end: Callable[[DDIMPipeline, int, int, dict[str, Tensor]], dict[str, Tensor] | None]
        | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        The network runs without gradients and in evaluation mode, and keeps the mode it was in.

        Args:
            batch_size: N. Left at 1, it follows the number of `seeds` or `latents`.
            generator: of all noise; one, or a list of N. The images are those that `diffusers` samples with it.
            eta: 0 for DDIM, 1 for DDPM; above 1 is allowed, with a warning.
            num_inference_steps: S, from 1 to the number of timesteps the model was trained with.
            use_clipped_model_output: recompute epsilon from the clipped x_0 in each step.
            output_type: `pil`, `np` (float32 (N, H, W, C) in [0, 1]) or `pt` ((N, C, H, W) in [0, 1], on the model's
                device).
            return_dict: `False` for `(images,)`.
            seeds: one integer per image instead of a generator: image i then depends on `seeds[i]` and on nothing else,
                to within rounding.
            latents: x at the first timestep, (N, C, H, W), instead of noise that is drawn.
            timesteps: a custom subsequence instead of S: strictly decreasing integers.
            order: of the solver: 1 for DDIM, 2 for the two-step method of `ddim.diffusion.solvers.second_order`, which
                costs the same and requires eta = 0; defaults to the scheduler's `solver_order`. The timesteps of each
                are those of `DDIMScheduler.make_timesteps`.
            use_sigma_hat: add noise with DDPM's larger variance (the paper's sigma-hat); requires `eta=1`.
            callback_on_step_end: called as `callback(pipe, step_index, timestep, {"latents": x, "pred_original_sample":
                x0})` after each step, all tensors (N, C, H, W) in about [-1, 1]; it may return a dictionary whose
                `latents` replace x.

        Returns:
            `ImagePipelineOutput` with `images`, or `(images,)`.

        Raises:
            ValueError: for an argument out of range, before the network runs.
            TypeError: for one of a wrong type.

        References:
            Equation (12) of arXiv 2010.02502.

        Example:
            >>> pipe = DDIMPipeline.from_pretrained("mnist")
            >>> pipe.set_progress_bar_config(disable=True)
            >>> pipe(batch_size=2, num_inference_steps=2, output_type="np").images.shape
            (2, 28, 28, 1)
        """
        check_output_type(output_type)
        plan = self.sampler.plan(
            SamplingConfig(num_inference_steps, eta, timesteps, order, use_sigma_hat, bool(use_clipped_model_output))
        )
        x, noise = self.sampler.initial_noise(batch_size, generator, seeds, latents)

        def on_step_end(state: State) -> None:
            if callback_on_step_end is not None:
                _call_back(self, callback_on_step_end, state)

        images = to_output(self.sampler.run(x, plan, noise, on_step_end, self.progress_bar), output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def sample_images(self, count: int, seed: int = 0, batch_size: int = 64, **settings: Any) -> list[Image.Image]:
        """Sample any number of images in batches, image i from seed `seed + i`.

        Batches are all of one size, the last one filled up with further seeds: networks round a little differently for
        batches of different sizes, and an image must not depend on its place in the last batch.

        Args:
            count: the number of images.
            seed: of the first image.
            batch_size: images per network evaluation; at most `count` are taken.
            settings: `eta`, `num_inference_steps`, `use_clipped_model_output`, `timesteps`, `order` and `use_sigma_hat`
                of a call of the pipeline.

        Returns:
            `count` PIL images.

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
        images: list[Image.Image] = []
        for first in range(seed, seed + count, batch_size):
            (batch,) = cast(
                tuple[Any], self(batch_size, return_dict=False, seeds=range(first, first + batch_size), **settings)
            )
            images += batch
        return images[:count]

    def paint(self, *args: Any, **kwargs: Any) -> list[Image.Image]:
        """Call `sample_images`, of which this is a deprecated alias.

        Args:
            args: as for `sample_images`.
            kwargs: as for `sample_images`.
        """
        warnings.warn("paint is deprecated; use sample_images", DeprecationWarning, stacklevel=2)
        return self.sample_images(*args, **kwargs)

    def save_pretrained(
        self, folder: str | Path, variant: str | None = None, max_shard_size: int | str = MAX_SHARD_SIZE
    ) -> None:
        """Write a folder that `from_pretrained` and `diffusers` load.

        It holds `model_index.json`, `scheduler/scheduler_config.json`, `unet/config.json` and weights as safetensors.

        Args:
            folder: created if it does not exist; files of the same names in it are replaced atomically.
            variant: part of the weights' name, such as `fp16`.
            max_shard_size: larger weights are split into files of at most this size: bytes, or `"500MB"`.

        Raises:
            OSError: if it cannot be written.

        Example:
            >>> import tempfile
            >>> folder = tempfile.mkdtemp()
            >>> DDIMPipeline.from_pretrained("mnist").save_pretrained(folder)
            >>> sorted(path.name for path in Path(folder).iterdir())
            ['model_index.json', 'scheduler', 'unet']
        """
        index = {
            "_class_name": "DDIMPipeline",
            "_ddim_version": __version__,
            # Who should build the parts; diffusers reads this too and has both classes.
            "scheduler": ["diffusers", "DDIMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        }
        with write_folder(Path(folder)) as temporary:
            self.unet.save_pretrained(temporary / "unet", variant=variant, max_shard_size=max_shard_size)
            self.scheduler.save_pretrained(temporary / "scheduler")
            (temporary / hub.MODEL_INDEX).write_text(to_json(index), encoding="utf-8")
            written = [path.name for path in (temporary / "unet").iterdir()]
        remove_stale_weights(Path(folder) / "unet", variant, written)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload DDIMPipeline",
        variant: str | None = None,
    ) -> str:
        """Publish the pipeline on the Hugging Face hub, in a repository that is created if it does not exist.

        Args:
            repo_id: `owner/name`.
            private: whether a new repository is private; `None` for the owner's default.
            token: with the right to write; defaults to the one stored on this machine.
            commit_message: the message of the commit.
            variant: part of the weights' name, such as `fp16`.

        Returns:
            The URL of the commit.

        Raises:
            RuntimeError: if the hub cannot be reached or refuses.
        """
        return hub.push_folder(
            lambda folder: self.save_pretrained(folder, variant), repo_id, private, token, commit_message
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        use_safetensors: bool | None = None,
        engine: str = "auto",
        **components: Any,
    ) -> Self:
        """Load a pipeline: a built-in model, a folder, or a hub id.

        Args:
            model: `"mnist"`, a folder of any layout that `ddim.io.hub` describes, or `"google/ddpm-cifar10-32"`.
            torch_dtype: of the network; defaults to float32.
            variant: of the weights, such as `fp16`.
            cache_dir: the folder of downloads; defaults to the hub client's own cache.
            local_files_only: use what has been downloaded, without a request to the hub.
            revision: a branch, tag or commit of the hub repository.
            token: for private repositories.
            use_safetensors: `True` refuses pickled weights, `False` reads no others; by default safetensors come first.
            engine: how the network is run: `auto`, `eager` or `compile`.
            components: `unet=` or `scheduler=` instead of what the folder holds.

        Returns:
            The pipeline, its network in evaluation mode on the CPU.

        Raises:
            FileNotFoundError: if no such model exists, or files are missing in it; names the files looked for.
            ValueError: if a file is damaged, does not fit, or names a class that is not in this module's tables.
            TypeError: for another component.

        Example:
            >>> DDIMPipeline.from_pretrained("mnist", engine="eager").sample_shape
            (1, 28, 28)
        """
        for name in components:
            if name not in ("unet", "scheduler"):
                raise TypeError(f"a component of a DDIMPipeline must be unet or scheduler, got {name!r}")
        check_engine(engine)
        weights_in = ("unet", "") if components.get("unet") is None else ()
        folder = hub.find_model(
            model,
            hub.HubOptions(cache_dir, local_files_only, revision, token),
            variant=variant,
            weights_in=weights_in,
            use_safetensors=use_safetensors,
        )
        check_model_index(folder)
        unet, scheduler = components.get("unet"), components.get("scheduler")
        # Both configurations are checked before the weights, the long part, are read.
        unet_folder = component_folder(folder, "unet", UNet2DModel.config_name) if unet is None else None
        if scheduler is None:
            scheduler = DDIMScheduler.from_pretrained(component_folder(folder, "scheduler", DDIMScheduler.config_name))
        if unet_folder is not None:
            check_class(unet_folder / UNet2DModel.config_name, UNET_CLASSES)
            unet = UNet2DModel.from_pretrained(
                unet_folder, torch_dtype=torch_dtype, variant=variant, use_safetensors=use_safetensors
            )
        return cls(unet, scheduler, engine)


def check_model_index(folder: Path) -> None:
    """Check the classes that a folder's `model_index.json` names against the tables of this module.

    Args:
        folder: of a pipeline; nothing is checked where it has no such file.

    Raises:
        ValueError: naming the first class or component that is not in them.
    """
    path = folder / hub.MODEL_INDEX
    if not path.exists():
        return
    index = read_json(path)
    allowed = {"_class_name": PIPELINE_CLASSES, "unet": UNET_CLASSES, "scheduler": SCHEDULER_CLASSES}
    for name, entry in index.items():
        if name.startswith("_") and name != "_class_name":
            continue
        if name not in allowed:
            raise ValueError(f"{path}: a component of a DDIM pipeline must be unet or scheduler, got {name!r}")
        class_name = entry[-1] if isinstance(entry, list) and entry else entry
        if class_name not in allowed[name]:
            raise ValueError(
                f"{path}: the class of {name} must be one of {join_choices(allowed[name])}, got {shown(class_name)}"
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
        raise ValueError(f"{path}: the class must be one of {join_choices(allowed)}, got {shown(name)}")


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


def _call_back(pipe: DDIMPipeline, callback: Callable[..., dict[str, Tensor] | None], state: State) -> None:
    """Call a `callback_on_step_end`, and take over the latents that it returns."""
    tensors = {"latents": state.sample, "pred_original_sample": state.pred_original_sample}
    changed = callback(pipe, state.index, state.step.timestep, tensors)
    if changed and "latents" in changed:
        shape = tuple(state.sample.shape)
        if changed["latents"].shape != shape:
            raise ValueError(f"latents of the callback: expected shape {shape}, got {tuple(changed['latents'].shape)}")
        state.sample = changed["latents"]
