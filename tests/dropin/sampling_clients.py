"""Sampling scripts: the pipeline's call, loops by hand, guidance, inversion, and schedulers put into a pipeline."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import MethodType
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from dropin.library import Library, Observed, client, make_pipeline, make_unet, outcome, sample
from helpers import rand, randn, seeded


@client()
def calls_of_the_pipeline(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib)
    tensors = pipe(2, seeded(1), 0.0, 4, None, "pt").images
    return {
        "pil": pipe(batch_size=2, generator=seeded(1), num_inference_steps=4).images,
        "np": sample(pipe),
        "numpy": sample(pipe, output_type="numpy"),
        "pt": tensors,
        "tuple": pipe(generator=seeded(1), num_inference_steps=4, output_type="np", return_dict=False),
        "noise": [sample(pipe, eta=eta) for eta in (0.3, 1.0)],
        "clipped": sample(pipe, eta=0.5, use_clipped_model_output=True),
        "generators": sample(pipe, generator=[seeded(4), seeded(5)], eta=0.5),
        "training mode": pipe.unet.training,
    }


@client()
def global_seed_without_a_generator(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib)
    torch.manual_seed(11)
    images = pipe(batch_size=2, num_inference_steps=4, eta=1.0, output_type="np").images
    return {"images": images, "next": torch.rand(2)}


@client()
def schedules_and_prediction_types(lib: Library, folder: Path) -> Observed:
    configs: list[dict[str, Any]] = [
        {"beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "clip_sample_range": 0.5},
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
        {"trained_betas": np.linspace(1e-4, 0.03, 200).tolist(), "num_train_timesteps": 200},
    ]
    return {str(config): sample(make_pipeline(lib, **config)) for config in configs}


@client()
def other_floating_types(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib).to(torch.float64)
    images = sample(pipe)
    dtypes = [str(pipe.dtype), str(pipe.unet.dtype), str(images.dtype)]
    # Images of bfloat16 differ by its rounding; that they are sampled, and their type, does not.
    half = pipe.to(torch.bfloat16)(generator=seeded(0), num_inference_steps=2, output_type="pt").images
    return {"images": images, "dtypes": dtypes, "half": str(half.dtype), "shape": tuple(half.shape)}


@client()
def not_square_and_gray(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib, make_unet(lib, sample_size=(8, 16), in_channels=1, out_channels=1))
    return {"np": sample(pipe), "pil": pipe(generator=seeded(0), num_inference_steps=2).images}


@client(tolerance=1e-4)  # x_0 at the first step is the rounding of float32 schedules, divided by sqrt(alpha)
def sampling_loop_by_hand(lib: Library, folder: Path) -> Observed:
    unet, scheduler = make_unet(lib), lib.DDIMScheduler()
    scheduler.set_timesteps(num_inference_steps=5)
    x = randn(2, 3, 8, 8) * scheduler.init_noise_sigma
    seen = []
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, t)
        with torch.no_grad():
            noise = unet(model_input, t).sample
        out = scheduler.step(noise, t, x, eta=0.2, generator=seeded(int(t)))
        pair = scheduler.step(model_output=noise, timestep=int(t), sample=x, return_dict=False)
        x = out.prev_sample
        seen += [x, out.pred_original_sample, pair[0], pair[1]]
    given = scheduler.step(noise, t, x, 1.0, variance_noise=randn(2, 3, 8, 8, seed=3)).prev_sample
    return {
        "samples": seen,
        "given noise": given,
        "timesteps": scheduler.timesteps,
        "steps": scheduler.num_inference_steps,
        "order": scheduler.order,
        "len": len(scheduler),
    }


@client(tolerance=1e-4)  # of gradients of the order of 10
def guidance_by_the_gradient_of_a_loss(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib)
    pipe.scheduler.set_timesteps(num_inference_steps=6)
    target = torch.tensor([0.1, 0.9, 0.5])[None, :, None, None]
    x, losses = randn(2, 3, 8, 8), []
    for t in pipe.scheduler.timesteps:
        x = x.detach().requires_grad_()
        noise = pipe.unet(pipe.scheduler.scale_model_input(x, t), t)["sample"]
        x0 = pipe.scheduler.step(noise, t, x).pred_original_sample
        loss = (x0 - target * 2 + 1).abs().mean() * 40
        gradient = -torch.autograd.grad(loss, x)[0]
        x = pipe.scheduler.step(noise, t, x.detach() + gradient).prev_sample
        losses.append(loss.item())
    return {"losses": losses, "x": x.detach()}


@client()
def inversion_by_hand(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib, clip_sample=False, set_alpha_to_one=False)
    unet, scheduler = pipe.unet, pipe.scheduler
    scheduler.set_timesteps(10)
    x, path = rand(1, 3, 8, 8), []
    timesteps = scheduler.timesteps.flip(0)
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    with torch.no_grad():
        for t in timesteps:
            current = max(0, t.item() - stride)
            noise = unet(x, t).sample
            alpha, alpha_next = scheduler.alphas_cumprod[current], scheduler.alphas_cumprod[t]
            x0 = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
            x = x0 * alpha_next.sqrt() + (1 - alpha_next).sqrt() * noise
            path.append(x)
        for t in scheduler.timesteps:
            previous = t - stride
            alpha = scheduler.alphas_cumprod[t]
            before = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
            noise = unet(x, t).sample
            x0 = (x - (1 - alpha) ** 0.5 * noise) / alpha**0.5
            x = before**0.5 * x0 + (1 - before) ** 0.5 * noise
    return {"path": path, "decoded": x}


@client()
def inversion_by_the_inverse_scheduler(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib, clip_sample=False, set_alpha_to_one=False)
    inverse = lib.DDIMInverseScheduler.from_config(pipe.scheduler.config)
    forward = lib.DDIMScheduler.from_config(inverse.config)
    inverse.set_timesteps(10)
    forward.set_timesteps(10)
    x = rand(1, 3, 8, 8)
    with torch.no_grad():
        for t in inverse.timesteps:
            x = inverse.step(pipe.unet(x, t).sample, t, x).prev_sample
        latents = x
        for t in forward.timesteps:
            x = forward.step(pipe.unet(x, t).sample, t, x).prev_sample
    kept = {name: forward.config[name] for name in ("clip_sample", "set_alpha_to_one", "num_train_timesteps")}
    return {"latents": latents, "decoded": x, "timesteps": inverse.timesteps, "config": kept}


@client()
def inpainting_and_image_to_image(lib: Library, folder: Path) -> Observed:
    unet, scheduler = make_unet(lib), lib.DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(10, device="cpu")
    start = int(10 * 0.6) * scheduler.order
    timesteps = scheduler.timesteps[start:]
    image, noise, mask = rand(2, 3, 8, 8), randn(2, 3, 8, 8, seed=1), rand(1, 1, 8, 8, seed=2) > 0
    x = scheduler.add_noise(image, noise, timesteps[:1].repeat(2))
    for index, t in enumerate(timesteps):
        with torch.no_grad():
            x = scheduler.step(unet(x, t).sample, t, x, eta=0.3, generator=seeded(index)).prev_sample
        known = image
        if index < len(timesteps) - 1:
            known = scheduler.add_noise(image, noise, timesteps[index + 1])
        x = torch.where(mask, x, known)
    return {"image": x, "timesteps": timesteps}


@client()
def classifier_free_guidance(lib: Library, folder: Path) -> Observed:
    unet, scheduler = make_unet(lib, num_class_embeds=4), lib.DDIMScheduler()
    scheduler.set_timesteps(4)
    x, labels = randn(2, 3, 8, 8), torch.tensor([1, 2, 3, 3])
    with torch.no_grad():
        for t in scheduler.timesteps:
            conditional, unconditional = unet(torch.cat([x] * 2), t, labels).sample.chunk(2)
            x = scheduler.step(unconditional + 2.0 * (conditional - unconditional), t, x).prev_sample
    missing = outcome(lambda: unet(x, 3), ValueError)
    superfluous = outcome(lambda: make_unet(lib)(x, 3, class_labels=labels[:2]), ValueError)
    return {"x": x, "missing labels": missing, "superfluous labels": superfluous}


@client()
def sampling_by_sigmas(lib: Library, folder: Path) -> Observed:
    unet, scheduler = make_unet(lib), lib.DDIMScheduler()
    sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5
    steps = torch.linspace(8, sigmas[0], 5)
    x = randn(2, 3, 8, 8) * steps[0]
    for sigma, following in itertools.pairwise(steps):
        # A fractional timestep between the two whose sigmas enclose this one.
        low = int((sigmas < sigma).sum()) - 1
        t = low + (sigma.log() - sigmas[low].log()) / (sigmas[low + 1].log() - sigmas[low].log())
        with torch.no_grad():
            noise = unet(x / (sigma**2 + 1) ** 0.5, t.expand(2)).sample
        x = x + noise * (following - sigma)
    return {"x": x, "sigmas": sigmas}


@client()
def posterior_sampling(lib: Library, folder: Path) -> Observed:
    unet, scheduler = make_unet(lib), lib.DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(6)
    measured, x, distances = rand(2, 3, 4, 4), randn(2, 3, 8, 8, seed=1), []
    for index, t in enumerate(scheduler.timesteps):
        x = x.detach().requires_grad_()
        out = scheduler.step(unet(x, t).sample, t, x, eta=1.0, generator=seeded(index))
        distance = torch.linalg.norm(measured - nn.functional.avg_pool2d(out.pred_original_sample, 2))
        x = out.prev_sample - 0.5 * torch.autograd.grad(distance, x)[0]
        distances.append(distance.item())
    return {"x": x.detach(), "distances": distances}


def step_with_log_probability(
    scheduler: Any, output: Tensor, t: Tensor, x: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """Take a step as reinforcement learning does: on the attributes of the scheduler, private ones among them."""
    previous = torch.clamp(t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps, 0)
    alpha = scheduler.alphas_cumprod.gather(0, t).view(-1, 1, 1, 1)
    alpha_previous = torch.where(
        previous >= 0, scheduler.alphas_cumprod.gather(0, previous), scheduler.final_alpha_cumprod
    )
    alpha_previous = alpha_previous.view(-1, 1, 1, 1)
    x0 = (x - (1 - alpha) ** 0.5 * output) / alpha**0.5
    if scheduler.config.thresholding:
        x0 = scheduler._threshold_sample(x0)
    elif scheduler.config.clip_sample:
        x0 = x0.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
    deviation = eta * scheduler._get_variance(int(t[0]), int(previous[0])) ** 0.5
    mean = alpha_previous**0.5 * x0 + (1 - alpha_previous - deviation**2) ** 0.5 * output
    sample = mean + deviation * randn(*x.shape, seed=int(t[0]))
    log_probability = -((sample.detach() - mean) ** 2) / (2 * deviation**2) - torch.log(deviation)
    return sample, log_probability.mean(dim=(1, 2, 3))


@client()
def policy_gradient(lib: Library, folder: Path) -> Observed:
    observed: Observed = {}
    for settings in ({}, {"thresholding": True}):
        unet, scheduler = make_unet(lib), lib.DDIMScheduler(**settings)
        scheduler.set_timesteps(5)
        x, total = randn(2, 3, 8, 8), torch.zeros(2)
        for t in scheduler.timesteps[:-1]:
            output = unet(x, t).sample
            x, log_probability = step_with_log_probability(scheduler, output, t.repeat(2), x.detach(), 1.0)
            total = total + log_probability
        total.mean().backward()
        observed[str(settings)] = [x.detach(), total.detach(), unet.conv_out.weight.grad]
    return observed


def recording_step(scheduler_class: Any) -> Any:
    """Return a subclass of a scheduler with its own `step` and `set_timesteps`."""

    class Scheduler(scheduler_class):  # type: ignore[misc]
        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
            super().set_timesteps(num_inference_steps, device)
            self.timesteps = self.timesteps[1:]

        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
            out = super().step(model_output, timestep, sample, **kwargs)
            out.prev_sample = out.prev_sample * 0.5
            return out

    return Scheduler


@client()
def scheduler_subclass_in_a_pipeline(lib: Library, folder: Path) -> Observed:
    pipe, kind = make_pipeline(lib), recording_step(lib.DDIMScheduler)
    before = sample(pipe)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    assigned = sample(pipe)
    pipe.register_modules(scheduler=kind())
    return {"before": before, "assigned": assigned, "registered": sample(pipe), "eta": sample(pipe, eta=0.7)}


@client()
def scheduler_methods_patched(lib: Library, folder: Path) -> Observed:
    pipe, timesteps = make_pipeline(lib), []
    step, set_timesteps = pipe.scheduler.step, pipe.scheduler.set_timesteps

    def patched(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        timesteps.append(int(timestep))
        return step(model_output * 0.8, timestep, sample, *args, **kwargs)

    pipe.scheduler.step = MethodType(patched, pipe.scheduler)
    images = sample(pipe)
    pipe.scheduler.step = step
    pipe.scheduler.set_timesteps = lambda count, *args, **kwargs: set_timesteps(count // 2, *args, **kwargs)
    halved = sample(pipe)
    del pipe.scheduler.step, pipe.scheduler.set_timesteps
    return {"images": images, "timesteps": timesteps, "halved": halved, "unpatched": sample(pipe)}


@client()
def schedulers_of_diffusers_in_a_pipeline(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib)
    config = pipe.scheduler.config
    observed: Observed = {}
    for kind in (diffusers.DDIMScheduler, diffusers.DDIMParallelScheduler, diffusers.TCDScheduler):
        pipe.scheduler = kind.from_config(config, clip_sample_range=0.7)
        if kind is diffusers.TCDScheduler:
            # Its step has no use_clipped_model_output, which the pipeline of diffusers passes all the same.
            observed[kind.__name__] = outcome(lambda: sample(pipe), TypeError) in ("TypeError", "no exception")
        else:
            observed[kind.__name__] = sample(pipe, eta=0.5)
        observed[f"{kind.__name__} stays"] = type(pipe.scheduler) is kind
    pipe.scheduler = diffusers.DDPMScheduler()
    # Nor has this one an eta.
    observed["DDPMScheduler"] = outcome(lambda: sample(pipe), TypeError) in ("TypeError", "no exception")
    return observed


@client()
def assigned_scheduler_attributes(lib: Library, folder: Path) -> Observed:
    def prepared() -> Any:
        scheduler = lib.DDIMScheduler()
        scheduler.set_timesteps(10)
        return scheduler

    x, noise, observed = rand(2, 3, 8, 8), randn(2, 3, 8, 8, seed=1), {}

    scheduler = prepared()
    scheduler.num_inference_steps, scheduler.timesteps = 20, torch.arange(950, -1, -50)
    observed["timesteps"] = [scheduler.step(noise, t, x).prev_sample for t in scheduler.timesteps[-3:]]
    scheduler = prepared()
    scheduler.timesteps += 1
    observed["shifted"] = [scheduler.step(noise, t, x).prev_sample for t in scheduler.timesteps[:3]]
    scheduler = prepared()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    observed["alphas_cumprod"] = [scheduler.step(noise, t, x).prev_sample for t in scheduler.timesteps]
    observed["add_noise"] = scheduler.add_noise(x, noise, torch.tensor([3, 700]))
    scheduler = prepared()
    scheduler.alphas_cumprod.mul_(0.9)
    observed["in place"] = [scheduler.step(noise, t, x).prev_sample for t in scheduler.timesteps]
    scheduler = prepared()
    scheduler.final_alpha_cumprod = torch.tensor(0.99995)
    observed["final_alpha_cumprod"] = scheduler.step(noise, 0, x).prev_sample
    scheduler = prepared()
    scheduler.register_to_config(clip_sample=False, prediction_type="v_prediction")
    observed["config"] = [scheduler.step(noise, t, x).prev_sample for t in scheduler.timesteps]
    scheduler = prepared()
    scheduler.init_noise_sigma = 2.0
    observed["init_noise_sigma"] = scheduler.init_noise_sigma
    return observed


@client()
def attributes_assigned_in_a_pipeline(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib)
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod**1.5
    stronger = sample(pipe)
    pipe.scheduler.final_alpha_cumprod = torch.tensor(0.99995)
    unfinished = sample(pipe)
    pipe.scheduler.timesteps = pipe.scheduler.timesteps * 2  # set_timesteps of the call replaces it
    return {"stronger": stronger, "unfinished": unfinished, "again": sample(pipe)}


class Scaled(nn.Module):
    """A wrapper of a network that scales its prediction."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.inner = unet
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        out.sample = out.sample * 0.5
        return out


@client()
def networks_wrapped_and_patched(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib)
    forward, calls = pipe.unet.forward, []

    def patched(sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(int(timestep))
        out = forward(sample, timestep, *args, **kwargs)
        out.sample = out.sample * 0.25
        return out

    pipe.unet.forward = patched
    observed: Observed = {"patched": sample(pipe), "calls": calls}
    del pipe.unet.forward
    observed["unpatched"] = sample(pipe)
    pipe.unet = Scaled(pipe.unet)
    observed["wrapped"] = sample(pipe)
    return observed


@client()
def hooks_in_a_pipeline(lib: Library, folder: Path) -> Observed:
    pipe, counts = make_pipeline(lib), {}

    def count(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            counts[name] = counts.get(name, 0) + 1

        return hook

    handles = [module.register_forward_hook(count(name)) for name, module in pipe.unet.named_modules()]
    images = sample(pipe, num_inference_steps=3)
    for handle in handles:
        handle.remove()
    edit = pipe.unet.mid_block.register_forward_hook(lambda module, inputs, output: output * 0.5)
    edited = sample(pipe)
    edit.remove()
    pre = pipe.unet.up_blocks[0].upsamplers[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0,))
    silenced = sample(pipe)
    pre.remove()
    called = dict(sorted(counts.items()))
    return {"counts": called, "images": images, "edited": edited, "silenced": silenced, "after": sample(pipe)}


@client()
def weights_changed_between_calls(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib)
    images = [sample(pipe)]
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(0.5)
        images.append(sample(pipe))
        pipe.unet.mid_block.resnets[0].conv1.weight = nn.Parameter(pipe.unet.mid_block.resnets[0].conv1.weight * 2)
        images.append(sample(pipe))
    pipe.unet.conv_act = nn.ReLU()
    images.append(sample(pipe))
    pipe.unet.mid_block.attentions[0] = nn.Identity()
    pipe.unet.mid_block.attentions[0].forward = lambda x, temb=None, **kwargs: x
    images.append(sample(pipe))
    pipe.unet = make_unet(lib, block_out_channels=(4, 8), norm_num_groups=2)
    images.append(sample(pipe))
    return {"images": images}


@client()
def mistakes_in_a_call(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib)
    unset = lib.DDIMScheduler()
    x = randn(1, 3, 8, 8)
    return {
        "too few generators": outcome(lambda: sample(pipe, generator=[seeded(0)]), ValueError),
        "unknown argument": outcome(lambda: pipe(steps=3), TypeError),
        "too many steps": outcome(lambda: sample(pipe, num_inference_steps=1001), ValueError),
        "step before set_timesteps": outcome(lambda: unset.step(x, 5, x), ValueError),
        "unknown schedule": outcome(lambda: lib.DDIMScheduler(beta_schedule="cosine!"), NotImplementedError, ValueError)
        in ("NotImplementedError", "ValueError"),
        "number of blocks": outcome(lambda: lib.UNet2DModel(block_out_channels=(32,)), ValueError),
        "unknown block": outcome(lambda: make_unet(lib, down_block_types=("DownBlock", "NoBlock2D")), ValueError),
        "wrong channels": outcome(lambda: pipe.unet(randn(1, 2, 8, 8), 3), RuntimeError, ValueError)
        in ("RuntimeError", "ValueError"),
        "missing network": outcome(lambda: lib.DDIMPipeline(scheduler=unset), TypeError),
        "too many positional arguments": outcome(lambda: unset.set_timesteps(), TypeError, ValueError)
        in ("TypeError", "ValueError"),
        "frozen config": outcome(lambda: pipe.unet.config.update(in_channels=4), Exception),
        "unknown attribute": outcome(lambda: pipe.unet.no_such_name, AttributeError),
        "unknown attribute of a scheduler": outcome(lambda: unset.no_such_name, AttributeError),
    }
