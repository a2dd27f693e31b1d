"""Scripts about schedulers: configurations, conversions between classes, and their arithmetic."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import diffusers
import torch

from dropin.library import Library, Observed, client, make_pipeline, make_unet, outcome, public, sample, warned
from helpers import rand, randn

OTHERS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {"variance_type": "fixed_large", "clip_sample_range": 1.5},
    "PNDMScheduler": {"skip_prk_steps": True, "steps_offset": 1},
    "DPMSolverMultistepScheduler": {"solver_order": 3, "algorithm_type": "dpmsolver++", "timestep_spacing": "trailing"},
    "DPMSolverSinglestepScheduler": {"solver_order": 2, "lower_order_final": True},
    "DEISMultistepScheduler": {"solver_order": 3},
    "UniPCMultistepScheduler": {"solver_order": 3, "solver_type": "bh1"},
    "EulerDiscreteScheduler": {"beta_schedule": "scaled_linear", "timestep_spacing": "leading"},
    "EulerAncestralDiscreteScheduler": {"timestep_spacing": "trailing"},
    "HeunDiscreteScheduler": {"beta_start": 0.0002},
    "LMSDiscreteScheduler": {"beta_end": 0.01},
    "LCMScheduler": {"original_inference_steps": 40},
}


def flat(config: Any) -> list[tuple[str, str]]:
    """Return the public entries of a configuration, sorted, as text."""
    return sorted((name, json.dumps(value)) for name, value in public(config).items())


@client()
def other_schedulers_from_our_configuration(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib)
    pipe = make_pipeline(lib, unet, beta_schedule="scaled_linear", clip_sample=False)
    pipe.save_pretrained(folder)
    observed: Observed = {}
    for name in OTHERS:
        for source in (pipe.scheduler, lib.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")):
            scheduler = getattr(diffusers, name).from_config(source.config)
            scheduler.set_timesteps(5)
            x = randn(1, 3, 8, 8) * scheduler.init_noise_sigma
            for index, t in enumerate(scheduler.timesteps):
                with torch.no_grad():
                    noise = unet(scheduler.scale_model_input(x, t), t).sample
                torch.manual_seed(index)
                x = scheduler.step(noise, t, x).prev_sample
            observed.setdefault(name, []).append([flat(scheduler.config), scheduler.timesteps, x])
    return observed


@client()
def our_scheduler_from_other_configurations(lib: Library, folder: Path) -> Observed:
    observed: Observed = {}
    for name, settings in OTHERS.items():
        kind = getattr(diffusers, name)
        other = kind(**settings)
        scheduler = lib.DDIMScheduler.from_config(other.config)
        scheduler.set_timesteps(7)
        back = kind.from_config(scheduler.config)
        third = diffusers.EulerDiscreteScheduler.from_config(lib.DDIMScheduler.from_config(kind().config).config)
        observed[name] = {
            "config": flat(scheduler.config),
            # linspace and trailing steps differ on purpose; the timesteps do not.
            "timesteps": scheduler.timesteps if other.config.get("timestep_spacing") == "leading" else None,
            "alphas": scheduler.alphas_cumprod,
            "back": flat(back.config),
            "third": flat(third.config),
            "overridden": flat(lib.DDIMScheduler.from_config(other.config, clip_sample=False).config),
        }
    return observed


@client()
def defaults_are_not_settings(lib: Library, folder: Path) -> Observed:
    default = diffusers.EulerDiscreteScheduler.from_config(lib.DDIMScheduler().config)
    given = diffusers.EulerDiscreteScheduler.from_config(lib.DDIMScheduler(timestep_spacing="leading").config)
    there = lib.DDIMScheduler.from_config(diffusers.DDPMScheduler().config)
    lcm = diffusers.LCMScheduler.from_config(lib.DDIMScheduler(beta_start=0.001).config)
    return {
        "spacing": [default.config.timestep_spacing, given.config.timestep_spacing, lcm.config.timestep_spacing],
        "offset": [default.config.steps_offset, there.config.steps_offset],
        "beta_start": [default.config.beta_start, lcm.config.beta_start],
        "defaults": sorted(lib.DDIMScheduler(clip_sample=False).config["_use_default_values"]),
    }


@client()
def keys_of_others_are_kept(lib: Library, folder: Path) -> Observed:
    config = diffusers.DPMSolverMultistepScheduler(solver_order=3, algorithm_type="sde-dpmsolver++").config
    scheduler = lib.DDIMScheduler.from_config(config)
    scheduler.save_pretrained(folder)
    loaded = lib.DDIMScheduler.from_pretrained(folder)
    names = ("solver_order", "algorithm_type", "euler_at_final")
    dpm = diffusers.DPMSolverMultistepScheduler.from_config(loaded.config)
    scheduler.set_timesteps(4)
    return {
        "config": [scheduler.config.get(name) for name in names],
        "file": [json.loads((folder / "scheduler_config.json").read_text()).get(name) for name in names],
        "loaded": [loaded.config.get(name) for name in names],
        "again": [dpm.config.get(name) for name in names],
        "order": scheduler.order,
        "timesteps": scheduler.timesteps,
    }


@client()
def configuration_interface(lib: Library, folder: Path) -> Observed:
    scheduler = lib.DDIMScheduler(beta_end=0.01)
    config = scheduler.config
    scheduler.register_to_config(my_note="hello", clip_sample=False)
    text = json.loads(scheduler.to_json_string())
    kind, unused = lib.DDIMScheduler.from_config(dict(config) | {"extra": 1}, return_unused_kwargs=True, another=2)
    return {
        "items": [config["beta_end"], config.beta_end, config.get("nothing"), "beta_end" in config],
        "is a dict": isinstance(config, dict),
        "keys": sorted(public(config)),
        "unpacked": lib.DDIMScheduler(**public(config)).config.beta_end,
        "registered": [scheduler.config.my_note, scheduler.config["clip_sample"], config["clip_sample"]],
        "class": text.pop("_class_name"),
        "json": {name: json.dumps(value) for name, value in sorted(public(text).items())},
        "unused": {name: unused[name] for name in ("extra", "another")},
        "built": kind.config.beta_end,
        "name": [lib.DDIMScheduler.config_name, lib.UNet2DModel.config_name, lib.DDIMPipeline.config_name],
        "compatible": diffusers.DDPMScheduler in scheduler.compatibles,
        "repr": "DDIMScheduler" in repr(scheduler),
        "no config": outcome(lambda: lib.DDIMScheduler.from_config(None), ValueError),
    }


@client()
def configuration_entries_as_attributes(lib: Library, folder: Path) -> Observed:
    scheduler, unet = lib.DDIMScheduler(num_train_timesteps=100), make_unet(lib)
    calls = {
        "num_train_timesteps": lambda: scheduler.num_train_timesteps,
        "beta_schedule": lambda: scheduler.beta_schedule,
        "clip_sample": lambda: scheduler.clip_sample,
        "in_channels": lambda: unet.in_channels,
        "block_out_channels": lambda: unet.block_out_channels,
        "sample_size": lambda: unet.sample_size,
        "getattr": lambda: getattr(unet, "layers_per_block", None),
        "hasattr": lambda: [hasattr(unet, "act_fn"), hasattr(scheduler, "steps_offset"), hasattr(unet, "nothing")],
    }
    return {name: list(warned(call)) for name, call in calls.items()}


@client()
def configuration_files(lib: Library, folder: Path) -> Observed:
    scheduler, unet = lib.DDIMScheduler(beta_start=0.0002), make_unet(lib)
    scheduler.save_config(folder / "a")
    scheduler.save_pretrained(save_directory=folder / "b" / "scheduler")
    unet.save_config(folder / "c")
    loaded = lib.DDIMScheduler.load_config(folder / "a")
    nested = lib.DDIMScheduler.load_config(str(folder / "b"), subfolder="scheduler")
    with_unused = lib.DDIMScheduler.load_config(folder / "a", return_unused_kwargs=True, note=3)
    by_path, categories = warned(lambda: lib.DDIMScheduler.from_config(str(folder / "a")))
    in_subfolder = warned(lambda: lib.DDIMScheduler.from_config(str(folder / "b"), subfolder="scheduler"))
    network, network_categories = warned(lambda: lib.UNet2DModel.from_config(str(folder / "c")))
    pretrained, unused = lib.DDIMScheduler.from_pretrained(folder / "a", return_unused_kwargs=True, another=5)
    return {
        "type": type(loaded) is dict,
        "loaded": flat(loaded),
        "nested": flat(nested),
        "unused": [flat(with_unused[0]), with_unused[1]],
        "by path": [by_path.config.beta_start, categories],
        "in a subfolder": [in_subfolder[0].config.beta_start, in_subfolder[1]],
        "network": [network.config.block_out_channels, network_categories],
        "network's file": flat(lib.UNet2DModel.load_config(folder / "c")),
        "from_pretrained": [pretrained.config.beta_start, unused["another"]],
        "overridden": lib.DDIMScheduler.from_pretrained(folder / "a", beta_start=0.5).config.beta_start,
        "subfolder": lib.DDIMScheduler.from_pretrained(folder / "b", subfolder="scheduler").config.beta_start,
        "missing": outcome(lambda: lib.DDIMScheduler.from_pretrained(folder / "none"), OSError),
        "missing config": outcome(lambda: lib.DDIMScheduler.load_config(folder / "b"), OSError),
        "a file": outcome(
            lambda: scheduler.save_config(folder / "a" / "scheduler_config.json"), AssertionError, OSError
        )
        in ("AssertionError", "OSError"),
    }


@client()
def schedulers_copied_and_pickled(lib: Library, folder: Path) -> Observed:
    scheduler = lib.DDIMScheduler(clip_sample=False, thresholding=True)
    scheduler.set_timesteps(5)
    copies = [copy.deepcopy(scheduler), copy.copy(scheduler), pickle.loads(pickle.dumps(scheduler))]
    x, noise = rand(1, 3, 8, 8), randn(1, 3, 8, 8)
    return {
        "steps": [other.step(noise, other.timesteps[1], x).prev_sample for other in copies],
        "configs": [flat(other.config) for other in copies],
        "frozen": [outcome(lambda c=other.config: c.pop("clip_sample"), Exception) for other in copies],
    }


@client()
def noise_and_velocity(lib: Library, folder: Path) -> Observed:
    scheduler = lib.DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    x, noise = rand(4, 3, 8, 8), randn(4, 3, 8, 8)
    t = torch.tensor([0, 5, 400, 998])
    return {
        "float32": scheduler.add_noise(x, noise, t),
        "float64": str(scheduler.add_noise(x.double(), noise.double(), t).dtype),
        "velocity": scheduler.get_velocity(x, noise, t),
        "keywords": scheduler.add_noise(original_samples=x, noise=noise, timesteps=t[:1]),
        "vectors": scheduler.add_noise(torch.ones(2, 5), torch.ones(2, 5), t[:2]),
        "int32": scheduler.add_noise(x, noise, t.to(torch.int32)),
        "schedule": [scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod, scheduler.final_alpha_cumprod],
        "on the way": scheduler.timesteps[:5],
    }


@client()
def timesteps_of_every_count(lib: Library, folder: Path) -> Observed:
    observed = {}
    for settings in ({}, {"steps_offset": 1}, {"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}):
        scheduler = lib.DDIMScheduler(**settings)
        for count in (1, 3, 10, 50, 250, 1000):
            if not (settings.get("steps_offset") and count == 1000):  # a timestep of 1000, which no schedule has
                scheduler.set_timesteps(count)
                observed[f"{settings}, {count}"] = [scheduler.timesteps, scheduler.num_inference_steps]
    return observed


@client()
def scheduler_replaced_in_a_pipeline(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib, beta_schedule="scaled_linear")
    images = [sample(pipe)]
    pipe.scheduler = lib.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    images.append(sample(pipe))
    pipe.scheduler = lib.DDIMScheduler.from_config(diffusers.PNDMScheduler.from_config(pipe.scheduler.config).config)
    images.append(sample(pipe))
    pipe.save_pretrained(folder)
    loaded = lib.DDIMPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    built = lib.DDIMPipeline(pipe.unet, diffusers.DDPMScheduler(beta_schedule="scaled_linear", clip_sample_range=0.8))
    built.set_progress_bar_config(disable=True)
    return {
        "images": images,
        "loaded": sample(loaded),
        "of another class": sample(built),
        "class": type(built.scheduler) is lib.DDIMScheduler,
        "config": flat(loaded.scheduler.config),
    }
