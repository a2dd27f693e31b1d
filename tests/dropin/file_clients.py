"""Scripts that save and load: folders, keywords, formats, and folders that cross from one library to the other."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file

from dropin.library import (
    DIFFUSERS,
    TINY,
    Library,
    Observed,
    client,
    diffusers_log,
    file_names,
    make_pipeline,
    make_unet,
    outcome,
    public,
    sample,
)
from dropin.scheduler_clients import OTHERS, flat
from helpers import randn


def predict(unet: Any) -> torch.Tensor:
    with torch.no_grad():
        return unet(randn(2, 3, 8, 8).to(unet.dtype), 7).sample


@client()
def folder_of_a_pipeline(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib, clip_sample=False)
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    weights = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    configs = {
        name: json.loads((folder / name).read_text()) for name in file_names(folder) if name.endswith("fig.json")
    }
    return {
        "files": file_names(folder),
        "index": {name: index[name] for name in sorted(index) if not name.endswith("_version")},
        "configs": {name: flat(config) for name, config in configs.items()},
        "classes": {name: config["_class_name"] for name, config in configs.items()},
        "weights": dict(sorted(weights.items())),
    }


@client()
def keywords_of_saving(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib)
    unet = pipe.unet
    unet.save_pretrained(save_directory=folder / "plain")
    unet.save_pretrained(str(folder / "pickle"), safe_serialization=False)
    unet.save_pretrained(folder / "variant", variant="ema")
    unet.save_pretrained(folder / "shards", max_shard_size="40KB")
    unet.save_pretrained(folder / "main process", is_main_process=True)
    unet.save_pretrained(folder / "function", save_function=torch.save, safe_serialization=False)
    pipe.save_pretrained(save_directory=folder / "pipeline", safe_serialization=False, variant="fp16")
    pipe.save_pretrained(folder / "pipeline shards", max_shard_size="40KB", safe_serialization=True, push_to_hub=False)
    kind = lib.UNet2DModel
    names = [name for name in file_names(folder) if "-of-" not in name]
    return {
        "files": names,
        "loaded": {
            "plain": predict(kind.from_pretrained(folder / "plain")),
            "pickle": predict(kind.from_pretrained(folder / "pickle", use_safetensors=False)),
            "variant": predict(kind.from_pretrained(folder / "variant", variant="ema")),
            "shards": predict(kind.from_pretrained(folder / "shards")),
            "pipeline": predict(lib.DDIMPipeline.from_pretrained(folder / "pipeline", variant="fp16").unet),
            "pipeline shards": predict(lib.DDIMPipeline.from_pretrained(folder / "pipeline shards").unet),
        },
        "missing variant": outcome(lambda: kind.from_pretrained(folder / "plain", variant="fp16"), OSError, ValueError)
        in ("OSError", "ValueError"),
        "only pickled": outcome(lambda: kind.from_pretrained(folder / "pickle", use_safetensors=True), OSError),
    }


@client()
def keywords_of_loading_a_network(lib: Library, folder: Path) -> Observed:
    make_pipeline(lib).save_pretrained(folder)
    make_unet(lib).to(torch.bfloat16).save_pretrained(folder / "half")
    kind, place = lib.UNet2DModel, folder / "unet"
    info: dict[str, Any]
    unet, info = kind.from_pretrained(place, output_loading_info=True)
    wider, wider_info = kind.from_pretrained(
        place, in_channels=5, ignore_mismatched_sizes=True, low_cpu_mem_usage=False, output_loading_info=True
    )
    loads = {
        "subfolder": kind.from_pretrained(folder, subfolder="unet"),
        "keyword": kind.from_pretrained(pretrained_model_name_or_path=str(place)),
        "memory": kind.from_pretrained(place, low_cpu_mem_usage=False),
        "low memory": kind.from_pretrained(place, low_cpu_mem_usage=True),
        "dtype": kind.from_pretrained(place, torch_dtype=torch.float64),
        "auto": kind.from_pretrained(folder / "half", torch_dtype="auto"),
        "half read as float": kind.from_pretrained(folder / "half"),
        "device_map": kind.from_pretrained(place, device_map=None),
        "local": kind.from_pretrained(place, local_files_only=True, force_download=False, revision="main"),
        "safetensors": kind.from_pretrained(place, use_safetensors=True),
        "overridden": kind.from_pretrained(place, sample_size=16, act_fn="silu"),
    }
    return {
        "dtypes": {name: str(other.dtype) for name, other in loads.items()},
        "loaded": {name: predict(other.float()) for name, other in loads.items()},
        "training": [other.training for other in loads.values()],
        "sample_size": [loads["overridden"].config.sample_size, loads["subfolder"].config.sample_size],
        "info": {name: list(info[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")},
        "wider": [tuple(wider.conv_in.weight.shape), wider.config.in_channels],
        "wider info": [tuple(map(str, entry)) for entry in wider_info["mismatched_keys"]],
        "kept": torch.equal(wider.conv_out.weight, unet.conv_out.weight),
        "mismatched": outcome(
            lambda: kind.from_pretrained(place, in_channels=5, low_cpu_mem_usage=False), RuntimeError, ValueError
        )
        in ("RuntimeError", "ValueError"),
    }


@client()
def keywords_of_loading_a_pipeline(lib: Library, folder: Path) -> Observed:
    make_pipeline(lib, beta_end=0.01).save_pretrained(folder)
    kind = lib.DDIMPipeline
    unet, scheduler = make_unet(lib), diffusers.DDPMScheduler(beta_end=0.03)
    loads = {
        "keyword": kind.from_pretrained(pretrained_model_name_or_path=folder),
        "text": kind.from_pretrained(str(folder)),
        "safety checker": kind.from_pretrained(folder, safety_checker=None, requires_safety_checker=False),
        "dtype": kind.from_pretrained(folder, torch_dtype=torch.float64),
        "memory": kind.from_pretrained(folder, low_cpu_mem_usage=False, device_map=None, max_memory=None),
        "local": kind.from_pretrained(folder, local_files_only=True, force_download=False, token=None, cache_dir=None),
        "network": kind.from_pretrained(folder, unet=unet),
        "scheduler": kind.from_pretrained(folder, scheduler=scheduler),
        "safetensors": kind.from_pretrained(folder, use_safetensors=True),
    }
    for pipe in loads.values():
        pipe.set_progress_bar_config(disable=True)
    return {
        "images": {name: sample(pipe) for name, pipe in loads.items()},
        "dtypes": {name: str(pipe.dtype) for name, pipe in loads.items()},
        "network": loads["network"].unet is unet,
        "beta_end": [pipe.scheduler.config.beta_end for pipe in loads.values()],
    }


@client()
def mistakes_in_loading(lib: Library, folder: Path) -> Observed:
    make_pipeline(lib).save_pretrained(folder / "ok")
    make_pipeline(lib).save_pretrained(folder / "no weights")
    (folder / "no weights/unet/diffusion_pytorch_model.safetensors").unlink()
    make_pipeline(lib).save_pretrained(folder / "broken")
    (folder / "broken/unet/config.json").write_text("{")
    make_pipeline(lib).save_pretrained(folder / "no config")
    (folder / "no config/unet/config.json").unlink()
    (folder / "empty").mkdir()
    load, network = lib.DDIMPipeline.from_pretrained, lib.UNet2DModel.from_pretrained
    return {
        "no folder": outcome(lambda: load(str(folder / "none")), OSError, ValueError) in ("OSError", "ValueError"),
        "empty": outcome(lambda: load(folder / "empty"), OSError),
        "no weights": outcome(lambda: load(folder / "no weights"), OSError),
        "network without weights": outcome(lambda: network(folder / "no weights/unet"), OSError),
        "no config": outcome(lambda: network(folder / "no config/unet"), OSError),
        "wrong subfolder": outcome(lambda: network(folder / "ok", subfolder="vae"), OSError),
        "broken": outcome(lambda: network(folder / "broken/unet"), OSError, ValueError) in ("OSError", "ValueError"),
    }


@client()
def folders_read_by_diffusers(lib: Library, folder: Path) -> Observed:
    make_pipeline(lib, beta_schedule="scaled_linear", clip_sample=False).save_pretrained(folder)
    with diffusers_log() as messages:
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
        ddpm = diffusers.DDPMPipeline.from_pretrained(folder)
        unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
        automatic = diffusers.AutoModel.from_pretrained(str(folder), subfolder="unet")
        scheduler = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        euler = diffusers.EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    pipe.set_progress_bar_config(disable=True)
    return {
        "messages": messages,
        "classes": [type(o).__module__ + type(o).__name__ for o in (pipe, pipe.unet, pipe.scheduler, ddpm, automatic)],
        "images": sample(pipe),
        "predictions": [predict(unet), predict(automatic), predict(ddpm.unet)],
        "configs": [flat(scheduler.config), flat(euler.config), flat(unet.config)],
    }


@client()
def folders_of_other_schedulers_sampled_as_ddim(lib: Library, folder: Path) -> Observed:
    theirs = make_unet(DIFFUSERS)
    images: Observed = {}
    for name, settings in OTHERS.items():
        kind = getattr(diffusers, name)
        # linspace differs on purpose, and so does trailing where S does not divide T.
        has_spacing = "timestep_spacing" in inspect.signature(kind).parameters
        scheduler = kind(**({"timestep_spacing": "leading"} if has_spacing else {}) | settings)
        diffusers.DDPMPipeline(theirs, scheduler).save_pretrained(folder / name)
        pipe = lib.DDIMPipeline.from_pretrained(folder / name)
        pipe.set_progress_bar_config(disable=True)
        images[name] = sample(pipe, num_inference_steps=5, output_type="pil")
        images[f"{name}, config"] = flat(pipe.scheduler.config)
    return images


@client()
def saved_by_pipelines_of_diffusers(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib)
    diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()).save_pretrained(folder / "ddpm")
    diffusers.DDIMPipeline(unet=unet, scheduler=lib.DDIMScheduler(beta_end=0.01)).save_pretrained(folder / "ddim")
    diffusers.PNDMPipeline(unet=unet, scheduler=diffusers.PNDMScheduler()).save_pretrained(folder / "pndm")
    observed: Observed = {}
    for name in ("ddpm", "ddim", "pndm"):
        index = json.loads((folder / name / "model_index.json").read_text())
        theirs = diffusers.DiffusionPipeline.from_pretrained(folder / name)
        ours = lib.DDIMPipeline.from_pretrained(folder / name)
        observed[name] = {
            "files": file_names(folder / name),
            "classes": [index["unet"][1], index["scheduler"][1]],
            "theirs": predict(theirs.unet),
            "ours": predict(ours.unet),
            "config": flat(ours.scheduler.config),
        }
    return observed


@client()
def run_by_pipelines_of_diffusers(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib)
    observed: Observed = {}
    for kind, scheduler in (
        (diffusers.DDPMPipeline, diffusers.DDPMScheduler()),
        (diffusers.DDIMPipeline, lib.DDIMScheduler()),
        (diffusers.DDIMPipeline, diffusers.DDIMScheduler()),
    ):
        pipe = kind(unet=unet, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        observed[f"{kind.__name__} of {type(scheduler).__name__} {len(observed)}"] = sample(pipe)
        observed[f"dtype {len(observed)}"] = str(pipe.to(torch.float64).dtype)
        pipe.to(torch.float32)
    return observed


@client()
def configurations_of_networks(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib)
    again = lib.UNet2DModel.from_config(unet.config)
    changed = lib.UNet2DModel.from_config(unet.config, sample_size=16)
    text = lib.UNet2DModel.from_config(json.loads(unet.to_json_string()))
    theirs = diffusers.UNet2DModel.from_config(unet.config)
    built = lib.UNet2DModel(**public(theirs.config))
    return {
        "configs": [flat(o.config) for o in (unet, again, changed, text, theirs, built)],
        "types": [type(unet.config.block_out_channels).__name__, type(unet.config.down_block_types).__name__],
        "defaults": sorted(set(lib.UNet2DModel(**TINY).config["_use_default_values"]) - set(TINY))[:3],
        "unused": lib.UNet2DModel.from_config(dict(unet.config) | {"extra": 1}, return_unused_kwargs=True)[1]["extra"],
    }
