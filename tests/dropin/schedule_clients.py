"""Scripts that change a schedule, differentiate it, and transform or compile what computes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from dropin.library import Library, Observed, client, make_pipeline, sample
from helpers import rand, randn, seeded

T = torch.tensor([3, 900])


def scheduler_of(lib: Library, **settings: Any) -> Any:
    scheduler = lib.DDIMScheduler(**settings)
    scheduler.set_timesteps(4)
    return scheduler


@client()
def variance_of_a_subclass(lib: Library, folder: Path) -> Observed:
    class Calm(lib.DDIMScheduler):  # type: ignore[name-defined,misc]
        def _get_variance(self, timestep: int, prev_timestep: int) -> Any:
            return 0.25 * super()._get_variance(timestep, prev_timestep)

    scheduler, x = Calm(), rand(2, 3, 8, 8)
    scheduler.set_timesteps(4)
    steps = [scheduler.step(0.3 * x, t, x, eta=1.0, generator=seeded(3)).prev_sample for t in scheduler.timesteps]
    pipe = make_pipeline(lib)
    pipe.scheduler = Calm()
    patched = scheduler_of(lib)
    patched._get_variance = lambda timestep, prev_timestep: torch.tensor(0.01)
    return {
        "steps": steps,
        "images": sample(pipe, eta=1.0),
        "patched": patched.step(0.3 * x, 500, x, eta=0.5, generator=seeded(3)).prev_sample,
    }


@client()
def learned_schedule(lib: Library, folder: Path) -> Observed:
    x, noise = rand(2, 3, 8, 8), randn(2, 3, 8, 8)
    observed: Observed = {}
    for kind in (lib.DDIMScheduler, lib.DDIMInverseScheduler):
        scheduler = kind(clip_sample=False)
        scheduler.set_timesteps(4)
        alphas = scheduler.alphas_cumprod = scheduler.alphas_cumprod.clone().requires_grad_()
        noisy = {"eta": 0.5, "variance_noise": noise} if kind is lib.DDIMScheduler else {}
        calls: dict[str, Callable[[], Tensor]] = {
            "add_noise": lambda s=scheduler: s.add_noise(x, noise, T),
            "velocity": lambda s=scheduler: s.get_velocity(x, noise, T),
            "step": lambda s=scheduler: s.step(noise, 500, x).prev_sample,
            "noisy step": lambda s=scheduler, noisy=noisy: s.step(noise, 500, x, **noisy).prev_sample,
        }
        if kind is lib.DDIMInverseScheduler:
            calls = {"step": calls["step"]}
        for name, call in calls.items():
            result = call()
            (gradient,) = torch.autograd.grad(result.square().mean(), alphas)
            observed[f"{kind.__name__}, {name}"] = [result, gradient / gradient.abs().max()]
    return observed


@client()
def transformed_by_functorch(lib: Library, folder: Path) -> Observed:
    scheduler, x, noise = scheduler_of(lib, clip_sample=False), rand(2, 3, 8, 8), randn(2, 3, 8, 8)
    alphas = scheduler.alphas_cumprod

    def loss(schedule: Tensor) -> Tensor:
        scheduler.alphas_cumprod = schedule
        return scheduler.add_noise(x, noise, T).square().mean()

    results = {
        "noise": grad(lambda a: scheduler.add_noise(a, a * a, T).sum())(x),
        "step": grad(lambda a: scheduler.step(a * a, 500, a).prev_sample.sum())(x),
        "velocity": jvp(lambda a: scheduler.get_velocity(a, a * a, T), (x,), (noise,))[1],
        "batched": vmap(lambda a, t: scheduler.add_noise(a[None], a[None], t[None]))(x, T),
        "schedule": grad(loss)(alphas)[T],
    }
    scheduler.alphas_cumprod = alphas
    return results | {"afterwards": scheduler.add_noise(x, noise, T)}


@client()
def compiled_without_graph_breaks(lib: Library, folder: Path) -> Observed:
    scheduler, x, noise = scheduler_of(lib), rand(2, 3, 8, 8), randn(2, 3, 8, 8)
    torch.compiler.reset()

    def run(x: Tensor, noise: Tensor, timesteps: Tensor) -> list[Tensor]:
        return [
            scheduler.add_noise(x, noise, timesteps),
            scheduler.get_velocity(x, noise, timesteps),
            scheduler.step(noise, 500, x).prev_sample,
            scheduler.step(noise, 0, x, eta=0.5, variance_noise=noise).prev_sample,
        ]

    return {"results": torch.compile(run, fullgraph=True, backend="eager")(x, noise, T)}


@client()
def steps_between_the_timesteps(lib: Library, folder: Path) -> Observed:
    scheduler, x = lib.DDIMScheduler(), rand(2, 3, 8, 8)
    observed: Observed = {}
    for count, timesteps in ((50, (501, 519, 981, 7)), (1, (500, 0)), (3, (400,))):
        scheduler.set_timesteps(count)
        observed[str(count)] = [scheduler.step(0.1 * x, t, x).prev_sample for t in timesteps]
    return observed


@contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@client()
def float64_as_default_dtype(lib: Library, folder: Path) -> Observed:
    with float64_by_default():
        scheduler = lib.DDIMScheduler()
        other = lib.DDIMScheduler(set_alpha_to_one=False)
        pipe = make_pipeline(lib)
        pipe.save_pretrained(folder)
        loaded = lib.UNet2DModel.from_pretrained(folder / "unet")
        return {
            "schedule": [str(scheduler.betas.dtype), str(scheduler.alphas_cumprod.dtype)],
            "final": [str(s.final_alpha_cumprod.dtype) for s in (scheduler, other)],
            "loaded": str(loaded.dtype),
            "prediction": loaded(rand(2, 3, 8, 8).double(), 5).sample,
        }
