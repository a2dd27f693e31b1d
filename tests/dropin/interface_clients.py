"""Scripts that look at objects: classes, configurations as dictionaries, texts, signatures, and pickles."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from diffusers.models.unets import unet_2d_blocks as blocks
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils import BaseOutput

from dropin.library import DIFFUSERS, Library, Observed, client, make_pipeline, make_unet, outcome, sample
from helpers import rand, randn

LAYERS = (
    *(Attention, ResnetBlock2D, Upsample2D, Downsample2D, Timesteps, TimestepEmbedding, blocks.UNetMidBlock2D),
    *(blocks.DownBlock2D, blocks.AttnDownBlock2D, blocks.UpBlock2D, blocks.AttnUpBlock2D),
)


@client()
def layers_found_by_class(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib).requires_grad_(False)
    for module in unet.modules():
        if isinstance(module, Attention):
            module.requires_grad_(True)
    before = unet(randn(2, 3, 8, 8), 5).sample
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv1.weight.data *= 0.5
    copies = [copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))]
    return {
        "found": {kind.__name__: sum(isinstance(m, kind) for m in unet.modules()) for kind in LAYERS},
        "trainable": unet.num_parameters(only_trainable=True),
        "outputs": [before, unet(randn(2, 3, 8, 8), 5).sample],
        "copies": [other(randn(2, 3, 8, 8), 5).sample for other in copies],
        "built anew": sum(isinstance(m, Attention) for m in make_unet(lib).modules()),
        "backend": outcome(lambda: unet.set_attention_backend("native")),
    }


@client()
def results_and_configurations_by_class(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib)
    pipe.scheduler.set_timesteps(4)
    predicted = pipe.unet(randn(2, 3, 8, 8), 5)
    step = pipe.scheduler.step(predicted.sample, 500, randn(2, 3, 8, 8))
    images = pipe(num_inference_steps=1)
    predicted["sample"] = predicted.sample * 2
    return {
        "classes": [isinstance(predicted, UNet2DOutput), isinstance(step, DDIMSchedulerOutput)],
        "images": isinstance(images, diffusers.ImagePipelineOutput),
        "bases": [isinstance(out, BaseOutput) for out in (predicted, step, images)],
        "configurations": [isinstance(c, FrozenDict) for c in (pipe.config, pipe.unet.config, pipe.scheduler.config)],
        "assigned": [predicted.sample, predicted[0]],
        "pickled": pickle.loads(pickle.dumps(step)).prev_sample,
    }


@client()
def configurations_assigned_in_place(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib)
    pipe.scheduler.config.clip_sample_range = 0.1
    pipe.unet.config.sample_size = 16
    images = [sample(pipe)]
    pipe.scheduler.config["clip_sample_range"] = 0.2
    images.append(sample(pipe))
    copies = [
        copy.deepcopy(pipe.scheduler),
        copy.copy(pipe.scheduler.config),
        pickle.loads(pickle.dumps(pipe.scheduler)),
    ]
    saved = json.loads(pipe.scheduler.to_json_string())["clip_sample_range"]
    pipe.scheduler.register_to_config(note=1)
    images.append(sample(pipe))
    pipe.config.note, pipe.config["another"] = 2, 3
    return {
        "images": images,
        "copies": [copies[0].config.clip_sample_range, copies[1].clip_sample_range, copies[2].config.clip_sample_range],
        "entries": [copies[1]["clip_sample_range"], pipe.scheduler.config["clip_sample_range"], saved],
        "pipeline": [pipe.config.note, pipe.config["another"]],
        "from config": lib.DDIMScheduler.from_config(pipe.scheduler.config).config.clip_sample_range,
    }


@client()
def configurations_are_ordered_dictionaries(lib: Library, folder: Path) -> Observed:
    config = lib.DDIMScheduler(beta_end=0.01).config
    joined = config | {"a": 1}
    changed = copy.copy(config)
    changed.move_to_end("beta_end")
    changed |= {"b": 2}
    del changed.beta_start
    calls = {
        "del": lambda: config.__delitem__("beta_end"),
        "pop": lambda: config.pop("beta_end"),
        "update": lambda: config.update(a=1),
        "setdefault": lambda: config.setdefault("a", 1),
    }
    return {
        "ordered": isinstance(config, OrderedDict),
        "attributes": sorted(name for name in vars(config) if not name.startswith("_")),
        "joined": [joined["a"], type(joined) is type(config)],
        "changed": [*changed][-2:],
        "without": outcome(lambda: changed.beta_start, AttributeError),
        "refused": {name: outcome(call, Exception) for name, call in calls.items()},
        "last": outcome(lambda: copy.copy(config).popitem()),
        "cleared": outcome(lambda: copy.copy(config).clear()),
    }


@client()
def texts_and_signatures(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib)
    text = repr(pipe)
    pipe.save_pretrained(folder)
    loaded = lib.DDIMPipeline.from_pretrained(folder)
    push = inspect.signature(lib.UNet2DModel.push_to_hub).parameters
    described = json.loads(text.removeprefix("DDIMPipeline "))
    return {
        "pipeline": {k: v for k, v in sorted(described.items()) if k != "_ddim_version"},
        "str": str(pipe).startswith("DDIMPipeline {"),
        "scheduler": repr(pipe.scheduler).startswith("DDIMScheduler {"),
        "class": [o.config["_class_name"] for o in (pipe, pipe.scheduler, pipe.unet, loaded.unet, loaded.scheduler)],
        "version": [o.config["_diffusers_version"] for o in (pipe, loaded.unet)],
        "constructor": list(inspect.signature(lib.DDIMPipeline.__init__).parameters),
        "push": [(name, push[name].default) for name in ("safe_serialization", "variant", "subfolder")],
        "ignored": [lib.DDIMScheduler.ignore_for_config, lib.DDIMPipeline._optional_components],
        "compatibles": [kind.has_compatibles for kind in (lib.UNet2DModel, lib.DDIMScheduler, lib.DDIMPipeline)],
        "xformers": [outcome(p.enable_xformers_memory_efficient_attention, ImportError) for p in (pipe.unet, pipe)],
    }


@client()
def components_with_defaults(lib: Library, folder: Path) -> Observed:
    class Guided(lib.DiffusionPipeline):  # type: ignore[name-defined,misc]
        _optional_components = ("guide",)

        def __init__(self, unet: Any, scheduler: Any, guide: Any = None, other: Any = None, scale: float = 2.0) -> None:
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler, guide=guide, other=other)
            self.register_to_config(scale=scale)

    pipe = Guided(make_unet(lib), lib.DDIMScheduler())
    pipe.save_pretrained(folder)
    plain = lib.DDIMPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    return {"components": sorted(pipe.components), "plain": sample(plain), "its": sorted(plain.components)}


@client()
def scheduler_subclass_with_keywords(lib: Library, folder: Path) -> Observed:
    class Shifted(lib.DDIMScheduler):  # type: ignore[name-defined,misc]
        @register_to_config
        def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0, **kwargs: Any) -> None:
            super().__init__(num_train_timesteps, **kwargs)

    scheduler = Shifted(shift=0.5, clip_sample=False)
    scheduler.save_pretrained(folder)
    stored = json.loads((folder / "scheduler_config.json").read_text())
    return {
        "names": sorted(name for name in scheduler.config if not name.startswith("_")),
        "stored": sorted(name for name in stored if not name.startswith("_")),
        "again": [Shifted.from_pretrained(folder).config.shift, Shifted.from_config(scheduler.config).config.shift],
    }


class Unpickler(pickle.Unpickler):
    """Finds the classes of one library where the other's have been pickled, as `ddim.compat.install` does."""

    lib: Library

    def find_class(self, module: str, name: str) -> Any:
        return getattr(self.lib, name, None) or super().find_class(module, name)


@client()
def pickles_of_a_diffusers_run(lib: Library, folder: Path) -> Observed:
    theirs = make_pipeline(DIFFUSERS, clip_sample_range=0.5)
    theirs.scheduler.set_timesteps(4)

    def load(obj: Any) -> Any:
        unpickler = Unpickler(io.BytesIO(pickle.dumps(obj)))
        unpickler.lib = lib
        return unpickler.load()

    pipe, scheduler, unet = load(theirs), load(theirs.scheduler), load(theirs.unet)
    x, noise = rand(2, 3, 8, 8), randn(2, 3, 8, 8)
    return {
        "classes": [type(o).__name__ for o in (pipe, scheduler, unet, pipe.unet)],
        "ours": type(pipe) is lib.DDIMPipeline and type(scheduler) is lib.DDIMScheduler,
        "images": sample(pipe),
        "noisy": scheduler.add_noise(x, noise, torch.tensor([3, 500])),
        "step": scheduler.step(noise, 500, x).prev_sample,
        "prediction": unet(x, 5).sample,
    }


@client()
def pipeline_placed_by_a_device_map(lib: Library, folder: Path) -> Observed:
    make_pipeline(lib).save_pretrained(folder)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, device_map="balanced")
    pipe.set_progress_bar_config(disable=True)
    return {"images": sample(pipe)}
