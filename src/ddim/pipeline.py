"""`DDIMPipeline`: a network and a scheduler put together, from noise to pictures.

    noise -> sampling.sample(denoiser, steps) -> images

Arguments, defaults and results are those of the class of that name in `diffusers`; what is new here follows as
keywords.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from PIL import Image
from torch import Tensor

from ddim.diffusion.loop import State
from ddim.engine import check_engine
from ddim.io import hub
from ddim.io.atomic import write_folder
from ddim.io.images import check_output_type, to_output
from ddim.io.json_files import read_json, to_json
from ddim.io.weights import MAX_SHARD_SIZE, remove_stale_weights
from ddim.latents import LatentSpace
from ddim.outputs import ImagePipelineOutput
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel
from ddim.validation import integer
from ddim.version import __version__

# What a model_index.json may name. Nothing is ever imported by a name from a file.
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
    """Samples pictures; and, as `ddim.latents.LatentSpace`, turns pictures into latent codes and back.

    Args:
        unet: a `UNet2DModel`, this library's or `diffusers`', or any object with `unet(sample, timestep).sample` and a
            `.config` that has `sample_size` and `in_channels`.
        scheduler: anything with a `.config` of a diffusion scheduler (a `DDPMScheduler`, say); its twin is used.
        engine: how the network is run, as `ddim.engine` tells: `auto`, `eager` or `compile`.

    Attributes:
        unet: the network.
        scheduler: a `DDIMScheduler`.
        engine: may be changed.
    """

    def __repr__(self) -> str:
        unet = f"{type(self.unet).__name__} on {self.device}, {self.dtype}"
        return f"{type(self).__name__}(unet={unet}, scheduler={type(self.scheduler).__name__})"

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
        """Sample pictures. The network runs without gradients and in evaluation mode, and keeps the mode it was in.

        Args:
            batch_size: N. Left at 1, it follows the number of `seeds` or `latents`.
            generator: of all noise; one, or a list of N. The pictures are those that `diffusers` paints with it.
            eta: 0 for DDIM, 1 for DDPM; above 1 is allowed, with a warning.
            num_inference_steps: S, from 1 to the number of timesteps the model was trained with.
            use_clipped_model_output: recompute epsilon from the clipped x_0 in each step.
            output_type: `pil`, `np` (float32 (N, H, W, C) in [0, 1]) or `pt` ((N, C, H, W) in [0, 1], on the model's
                device).
            return_dict: `False` for `(images,)`.
            seeds: one whole number an image, in place of a generator: picture i then depends on `seeds[i]` and on
                nothing else, to within rounding.
            latents: x at the first timestep, (N, C, H, W), in place of noise that is drawn.
            timesteps: a subsequence of one's own in place of S: strictly decreasing whole numbers.
            order: of the method: 1 for DDIM, 2 for the two-step method of `ddim.diffusion.solvers.second_order`, which costs the
                same and wants eta = 0; the scheduler's `solver_order` unless given. The timesteps of each are those of
                `DDIMScheduler.make_timesteps`.
            use_sigma_hat: add noise with DDPM's larger variance (the paper's sigma-hat); wants `eta=1`.
            callback_on_step_end: called as `callback(pipe, step_index, timestep, {"latents": x, "pred_original_sample":
                x0})` after each step, all tensors (N, C, H, W) in about [-1, 1]; it may return a dictionary whose
                `latents` replace x.

        Returns:
            `ImagePipelineOutput` with `images`, or `(images,)`.

        Raises:
            ValueError: for an argument out of range, before the network runs.
            TypeError: for one of a wrong type.
        """
        check_output_type(output_type)
        steps = self._plan(num_inference_steps, timesteps, eta, use_sigma_hat, order)
        batch_size, noise = self._noise(batch_size, generator, seeds, latents)
        start = self._check_latents(latents, batch_size) if latents is not None else noise().to(self._sample_dtype)

        x = start
        with self._running(len(steps)) as bar:
            for state in self._sample(start, steps, bool(use_clipped_model_output), noise if eta > 0 else None):
                bar.update()
                if callback_on_step_end is not None:
                    self._call_back(callback_on_step_end, state)
                x = state.sample
        images = to_output(x, output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def paint(self, count: int, seed: int = 0, batch_size: int = 64, **settings: Any) -> list[Image.Image]:
        """Many pictures, picture i from seed `seed + i`.

        Batches are all of one size, the last one filled up with further seeds: networks round a little differently for
        batches of different sizes, and a picture shall not depend on whether it came last.

        Args:
            count: how many.
            seed: of the first.
            batch_size: pictures painted at once; no more than `count` are.
            settings: `eta`, `num_inference_steps`, `use_clipped_model_output`, `timesteps`, `order` and `use_sigma_hat`
                of `__call__`.

        Returns:
            `count` PIL images.

        Raises:
            ValueError: as `__call__`.
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

    def _call_back(self, callback: Callable[..., dict[str, Tensor] | None], state: State) -> None:
        changed = callback(
            self,
            state.index,
            state.step.timestep,
            {"latents": state.sample, "pred_original_sample": state.pred_original_sample},
        )
        if changed and "latents" in changed:
            if changed["latents"].shape != state.sample.shape:
                raise ValueError(
                    f"the callback returned latents of shape {tuple(changed['latents'].shape)} instead of "
                    f"{tuple(state.sample.shape)}"
                )
            state.sample = changed["latents"]

    def save_pretrained(
        self, folder: str | Path, variant: str | None = None, max_shard_size: int | str = MAX_SHARD_SIZE
    ) -> None:
        """Write a folder that `from_pretrained` and `diffusers` load: `model_index.json`, `scheduler/`, `unet/` with
        safetensors.

        Args:
            folder: made where it is missing; files of the same names in it are replaced, each whole.
            variant: put into the weights' name, such as `fp16`.
            max_shard_size: larger weights are split.

        Raises:
            OSError: if it cannot be written.
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
        """Publish the pipeline on the Hugging Face hub, in a repository that is made where it is missing.

        Args:
            repo_id: `owner/name`.
            private: of a new repository.
            token: with the right to write; the one stored on this machine unless given.
            commit_message: of the commit.
            variant: as for `save_pretrained`.

        Returns:
            The address of the commit.

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
            torch_dtype: of the network; float32 unless given.
            variant: of the weights, such as `fp16`.
            cache_dir: where downloads are kept.
            local_files_only: use what has been downloaded, ask no hub.
            revision: a branch, tag or commit of the hub repository.
            token: for private repositories.
            use_safetensors: `True` refuses pickled weights, `False` reads no others; by default safetensors come first.
            engine: `auto`, `eager` or `compile`: how the network is run.
            components: `unet=` or `scheduler=`, in place of what the folder holds.

        Raises:
            FileNotFoundError: if there is no such model, or files are missing in it; says what was looked for.
            ValueError: if a file is damaged, does not fit, or names a class that is not in this module's tables.
            TypeError: for another component.
        """
        for name in components:
            if name not in ("unet", "scheduler"):
                raise TypeError(
                    f"from_pretrained has no argument {name!r}; a DDIMPipeline's components are unet and scheduler"
                )
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
        # Both are looked for before the weights, the long part, are read.
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
    """Compare `model_index.json`, where there is one, with the tables above.

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
            raise ValueError(f"{path} names a component {name!r}; a DDIM pipeline has unet and scheduler only")
        class_name = entry[-1] if isinstance(entry, list) and entry else entry
        if class_name not in allowed[name]:
            raise ValueError(
                f"{path} names the class {class_name!r} for {name}; allowed are {', '.join(allowed[name])}"
            )


def check_class(path: Path, allowed: Sequence[str]) -> None:
    """ValueError if a configuration file says that it belongs to another class."""
    name = read_json(path).get("_class_name", allowed[0])
    if name not in allowed:
        raise ValueError(f"{path} describes a {name}; allowed are {', '.join(allowed)}")


def component_folder(folder: Path, name: str, config_name: str) -> Path:
    """Where a component's configuration is: in its own folder, or at the root in the flat layout.

    Raises:
        FileNotFoundError: saying where was looked.
    """
    for candidate in (folder / name, folder):
        if (candidate / config_name).is_file():
            return candidate
    raise FileNotFoundError(f"{folder} holds no model: looked for {name}/{config_name} and {config_name} in it")
