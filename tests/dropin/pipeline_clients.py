"""Custom pipelines: own calls on the helpers of a pipeline, extra components, and pipelines made of pipelines."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dropin.library import Library, Observed, client, file_names, make_pipeline, make_unet, outcome, sample
from helpers import rand, randn, seeded


def make_vae() -> Any:
    """Build an autoencoder of `diffusers`, a component that neither library's DDIM knows."""
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=3, sample_size=8).eval()


@client()
def subclass_with_its_own_call(lib: Library, folder: Path) -> Observed:
    class Guided(lib.DDIMPipeline):  # type: ignore[misc]
        @torch.no_grad()
        def __call__(self, count: int, generator: Any, steps: int = 4, brightness: float = 0.0) -> Any:
            config = self.unet.config
            shape = (count, config.in_channels, config.sample_size, config.sample_size)
            x = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
            self.scheduler.set_timesteps(steps)
            with self.progress_bar(total=steps) as bar:
                for t in self.scheduler.timesteps:
                    noise = self.unet(x, t).sample
                    with torch.enable_grad():
                        y = x.detach().requires_grad_()
                        loss = (self.scheduler.step(noise, t, y).pred_original_sample.mean() - brightness) ** 2
                        gradient = torch.autograd.grad(loss, y)[0]
                    x = self.scheduler.step(noise - 10 * gradient, t, x).prev_sample
                    bar.update()
            images = (x / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
            self.maybe_free_model_hooks()
            return self.numpy_to_pil(images), x

    pipe = Guided(unet=make_unet(lib), scheduler=lib.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    images, x = pipe(2, seeded(0), brightness=0.9)
    pipe.save_pretrained(folder)
    again = Guided.from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    index = json.loads((folder / "model_index.json").read_text())
    return {
        "images": images,
        "x": x,
        "again": again(2, seeded(0), brightness=0.9)[1],
        "class": [type(again).__name__, index["_class_name"]],
        "files": file_names(folder),
        "components": sorted(pipe.components),
    }


def latent_pipeline(lib: Library) -> Any:
    """Return a pipeline class with a VAE and an optional classifier, as community pipelines write it."""

    class LatentDDIM(lib.DiffusionPipeline):  # type: ignore[misc]
        model_cpu_offload_seq = "unet->vae"
        _optional_components = ["classifier"]  # noqa: RUF012

        def __init__(self, unet: Any, scheduler: Any, vae: Any, classifier: Any = None) -> None:
            super().__init__()
            scheduler = lib.DDIMScheduler.from_config(scheduler.config)
            self.register_modules(unet=unet, scheduler=scheduler, vae=vae, classifier=classifier)
            self.scale = 2 ** (len(self.vae.config.block_out_channels) - 1)

        @torch.no_grad()
        def __call__(self, generator: Any = None, num_inference_steps: int = 3, eta: float = 0.0) -> Any:
            shape = (2, self.unet.config.in_channels, 8, 8)
            x = torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.progress_bar(self.scheduler.timesteps):
                x = self.scheduler.step(self.unet(x, t).sample, t, x, eta=eta, generator=generator).prev_sample
            image = self.vae.decode(x).sample
            if self.classifier is not None:
                image = image + self.classifier(image, 0).sample
            return self.numpy_to_pil((image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()), image

    return LatentDDIM


@client()
def subclass_with_more_components(lib: Library, folder: Path) -> Observed:
    kind, vae = latent_pipeline(lib), make_vae()
    pipe = kind(make_unet(lib), lib.DDIMScheduler(beta_end=0.01), vae)
    pipe.set_progress_bar_config(disable=True)
    images, x = pipe(seeded(0), eta=0.2)
    pipe.save_pretrained(folder / "two")
    again = kind.from_pretrained(folder / "two")
    again.set_progress_bar_config(disable=True)
    with_classifier = kind.from_pretrained(folder / "two", classifier=make_unet(lib))
    with_classifier.set_progress_bar_config(disable=True)
    with_classifier.save_pretrained(folder / "three")
    three = kind.from_pretrained(folder / "three")
    three.set_progress_bar_config(disable=True)
    index = json.loads((folder / "two" / "model_index.json").read_text())
    return {
        "images": images,
        "x": x,
        "again": again(seeded(0), eta=0.2)[1],
        "classified": with_classifier(seeded(0))[1],
        "three": three(seeded(0))[1],
        "files": [file_names(folder / "two"), file_names(folder / "three")],
        "index": sorted((name, entry[1]) for name, entry in index.items() if isinstance(entry, list)),
        "optional": again.classifier,
        "beta_end": again.scheduler.config.beta_end,
        "components": [sorted(pipe.components), sorted(three.components)],
        "classes": [type(getattr(three, name)).__name__ for name in ("unet", "vae", "scheduler", "classifier")],
        "without it": outcome(lambda: kind(make_unet(lib), lib.DDIMScheduler()), TypeError),
        "replaced": kind.from_pretrained(folder / "two", vae=vae).vae is vae,
        "moved": [str(pipe.to(torch.float64).unet.dtype), str(pipe.vae.dtype), str(pipe.dtype)],
    }


@client()
def subclass_that_overrides_helpers(lib: Library, folder: Path) -> Observed:
    bars: list[int] = []

    class Inverted(lib.DDIMPipeline):  # type: ignore[misc]
        def __init__(self, unet: Any, scheduler: Any, strength: float = 0.5) -> None:
            super().__init__(unet, scheduler)
            self.register_to_config(strength=strength)

        def progress_bar(self, iterable: Any = None, total: Any = None) -> Any:
            bars.append(len(iterable) if total is None else total)
            return iterable

        @staticmethod
        def numpy_to_pil(images: np.ndarray) -> Any:
            return diffusers.DDIMPipeline.numpy_to_pil(1 - images)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            out = super().__call__(*args, **kwargs)
            return out.images

    pipe = Inverted(make_unet(lib), lib.DDIMScheduler(), strength=0.7)
    images = pipe(batch_size=2, generator=seeded(0), num_inference_steps=4)
    pipe.save_pretrained(folder)
    loaded = Inverted.from_pretrained(folder)
    overridden = Inverted.from_pretrained(folder, strength=0.1)
    return {
        "images": images,
        "bars": bars,
        "config": [pipe.config.strength, loaded.config.strength, overridden.config.strength],
    }


@client()
def pipelines_made_of_pipelines(lib: Library, folder: Path) -> Observed:
    class Other(lib.DDIMPipeline):  # type: ignore[misc]
        pass

    pipe = make_pipeline(lib, beta_end=0.01)
    pipe.save_pretrained(folder)
    pipe = lib.DDIMPipeline.from_pretrained(folder)
    pipes = {
        "components": lib.DDIMPipeline(**pipe.components),
        "from_pipe": lib.DDIMPipeline.from_pipe(pipe),
        "other": Other.from_pipe(pipe),
        "replaced": Other.from_pipe(pipe, scheduler=lib.DDIMScheduler(beta_end=0.05)),
        "copied": copy.deepcopy(pipe),
    }
    for other in pipes.values():
        other.set_progress_bar_config(disable=True)
    return {
        "images": {name: sample(other) for name, other in pipes.items()},
        "shared": {name: other.unet is pipe.unet for name, other in pipes.items()},
        "classes": {name: type(other).__name__ for name, other in pipes.items()},
    }


@client()
def properties_of_a_pipeline(lib: Library, folder: Path) -> Observed:
    make_pipeline(lib).save_pretrained(folder / "model")
    pipe = lib.DDIMPipeline.from_pretrained(folder / "model")
    images = rand(2, 8, 8, 3).numpy() / 2 + 0.5
    config = pipe.config
    return {
        "device": [str(pipe.device), str(pipe._execution_device), str(pipe.dtype)],
        "components": sorted(pipe.components),
        "config": {name: config[name][1] for name in ("scheduler", "unet")},
        "config attribute": config.unet[1],
        "name_or_path": [Path(str(name)).name for name in (pipe.name_or_path, config["_name_or_path"])],
        "unet's": Path(str(pipe.unet.config["_name_or_path"])).name,
        "numpy_to_pil": pipe.numpy_to_pil(images),
        "one": pipe.numpy_to_pil(images[0]),
        "gray": pipe.numpy_to_pil(images[..., :1]),
        "of the class": lib.DDIMPipeline.numpy_to_pil(images),
        "returned": [
            pipe.to("cpu") is pipe,
            pipe.to(dtype=torch.float32) is pipe,
            pipe.to("cpu", torch.float32) is pipe,
        ],
        "bar": outcome(lambda: pipe.progress_bar(), ValueError),
        "evaluation": pipe.unet.training,
        "iterated": sorted(name for name, _ in pipe.components.items()),
        "repr": "DDIMPipeline" in str(pipe),
        "offload order": lib.DDIMPipeline.model_cpu_offload_seq,
        "unknown component": outcome(lambda: pipe.nothing, AttributeError),
    }


@client()
def components_assigned(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib)
    pipe.unet = make_unet(lib, block_out_channels=(4, 8), norm_num_groups=2)
    pipe.note = "mine"
    pipe.scheduler = lib.DDIMScheduler.from_config(pipe.scheduler.config, beta_end=0.03)
    pipe.register_modules(unet=pipe.unet)
    pipe.save_pretrained(folder)
    loaded = lib.DDIMPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return {
        "images": sample(pipe),
        "loaded": sample(loaded),
        "channels": loaded.unet.config.block_out_channels,
        "beta_end": loaded.scheduler.config.beta_end,
        "note": pipe.note,
    }


@client()
def latents_handed_from_pipeline_to_pipeline(lib: Library, folder: Path) -> Observed:
    class FromLatents(lib.DDIMPipeline):  # type: ignore[misc]
        @torch.no_grad()
        def __call__(self, latents: Tensor, start: int = 0, **kwargs: Any) -> Tensor:
            self.scheduler.set_timesteps(8)
            for t in self.progress_bar(self.scheduler.timesteps[start:]):
                latents = self.scheduler.step(self.unet(latents, t)[0], t, latents, **kwargs)[0]
            return latents

    pipe = FromLatents(make_unet(lib), lib.DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    z0, z1 = randn(1, 3, 8, 8), randn(1, 3, 8, 8, seed=1)
    between = [pipe(z0 * np.cos(a) + z1 * np.sin(a)) for a in (0.0, 0.5, 1.0)]
    return {"between": between, "late": pipe(z0, start=5), "noisy": pipe(z0, eta=1.0, variance_noise=z1)}
