"""Differences that no message would show, one section per kind; and networks that `diffusers` cannot sample.

The clients beside this file meet them on their way. Here each has its own name, and is compared with what `diffusers`
does with its own classes, or with arithmetic.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations

from ddim import DDIMPipeline, DDIMScheduler, UNet2DModel
from dropin.library import (
    DDIM,
    DIFFUSERS,
    TINY,
    Library,
    diffusers_log,
    file_names,
    fill,
    make_pipeline,
    make_unet,
    public,
    sample,
)
from helpers import ALPHAS, error, rand, randn, relative_error

LIBRARIES = (DIFFUSERS, DDIM)
T = torch.tensor([3, 700])

SOLVERS = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "SASolverScheduler")
COMPATIBLE = sorted(
    # Without their requirements, classes are dummies that raise.
    kind.__name__
    for kind in diffusers.DDIMScheduler().compatibles
    if "dummy" not in kind.__module__
)


def assert_same_images(images: list[np.ndarray]) -> None:
    expected, actual = images
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def with_scheduler(lib: Library, scheduler: Any) -> Any:
    """Return a pipeline whose scheduler is this very object."""
    pipe = make_pipeline(lib)
    pipe.scheduler = scheduler
    return pipe


# 1. Own settings among the keys of a configuration that is shared


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", SOLVERS)
def test_solver_order_of_another_scheduler_does_not_change_the_method(name: str, order: int) -> None:
    argument = "predictor_order" if name == "SASolverScheduler" else "solver_order"
    kind = getattr(diffusers, name)
    spacing = {"timestep_spacing": "leading"} if "timestep_spacing" in inspect.signature(kind).parameters else {}
    config = kind(**{argument: order} | spacing).config
    assert_same_images(
        [
            sample(with_scheduler(lib, lib.DDIMScheduler.from_config(config)), num_inference_steps=10)
            for lib in LIBRARIES
        ]
    )


@pytest.mark.parametrize("name", SOLVERS)
def test_solver_order_of_another_scheduler_is_its_own_default(name: str) -> None:
    kind = getattr(diffusers, name)
    ours, theirs = (kind.from_config(lib.DDIMScheduler(clip_sample=False).config) for lib in (DDIM, DIFFUSERS))
    assert public(ours.config) == public(theirs.config)


def test_configuration_has_the_keys_of_diffusers_only(tmp_path: Path) -> None:
    DDIMScheduler().save_pretrained(tmp_path)
    accepted = set(inspect.signature(diffusers.DDIMScheduler.__init__).parameters)
    assert set(public(DDIMScheduler().config)) <= accepted
    assert set(public(DDIMScheduler.load_config(tmp_path))) <= accepted


@pytest.mark.parametrize("settings", [{}, {"beta_schedule": "scaled_linear", "clip_sample": False}])
def test_diffusers_loads_a_saved_folder_without_a_warning(tmp_path: Path, settings: dict[str, Any]) -> None:
    make_pipeline(DDIM, **settings).save_pretrained(tmp_path)
    with diffusers_log() as messages:
        for kind in (diffusers.DiffusionPipeline, diffusers.DDIMPipeline, diffusers.DDPMPipeline):
            kind.from_pretrained(tmp_path)
    assert messages == []


# 2. A public attribute is what is used


ASSIGNMENTS: dict[str, Callable[[Any], None]] = {
    "timesteps": lambda s: setattr(s, "timesteps", torch.arange(900, -1, -100)),
    "timesteps shifted": lambda s: setattr(s, "timesteps", s.timesteps + 7),
    "timesteps shifted in place": lambda s: s.timesteps.add_(7),
    "num_inference_steps": lambda s: setattr(s, "num_inference_steps", 20),
    "alphas_cumprod": lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod**1.5),
    "alphas_cumprod in place": lambda s: s.alphas_cumprod.mul_(0.9),
    "alphas_cumprod of float64": lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod.double() ** 1.5),
    "final_alpha_cumprod": lambda s: setattr(s, "final_alpha_cumprod", torch.tensor(0.99995)),
}


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_assigned_attribute_is_used_by_step(name: str, eta: float) -> None:
    steps = []
    for lib in LIBRARIES:
        scheduler = lib.DDIMScheduler()
        scheduler.set_timesteps(10)
        ASSIGNMENTS[name](scheduler)
        arguments = {"eta": eta, "variance_noise": randn(2, 3, 4, 4, seed=2) if eta else None}
        last = scheduler.timesteps[-3:]
        steps.append([scheduler.step(randn(2, 3, 4, 4), t, rand(2, 3, 4, 4), **arguments).prev_sample for t in last])
    for expected, actual in zip(*steps, strict=True):
        assert not expected.isnan().any()
        assert error(actual, expected) <= 1e-5


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("name", ["alphas_cumprod", "alphas_cumprod in place", "final_alpha_cumprod"])
def test_assigned_attribute_is_used_by_the_pipeline(name: str, eta: float) -> None:
    plain, images = sample(make_pipeline(DDIM), eta=eta), []
    for lib in LIBRARIES:
        pipe = make_pipeline(lib)
        ASSIGNMENTS[name](pipe.scheduler)
        images.append(sample(pipe, eta=eta))
    assert np.abs(images[0] - plain).max() > 1e-4
    assert_same_images(images)


# 3. The pipeline calls the scheduler that it is given


class Proxy:
    """A scheduler that is no subclass of one: it forwards what it does not change."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def step(self, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._scheduler.step(model_output * 0.5, *args, **kwargs)


def own_step(lib: Library) -> Any:
    class Scheduler(lib.DDIMScheduler):  # type: ignore[misc]
        def step(self, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().step(model_output * 0.5, *args, **kwargs)

    return Scheduler()


def own_timesteps(lib: Library) -> Any:
    class Scheduler(lib.DDIMScheduler):  # type: ignore[misc]
        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
            super().set_timesteps(num_inference_steps, device)
            self.timesteps = self.timesteps[1:]

    return Scheduler()


def own_scaling(lib: Library) -> Any:
    class Scheduler(lib.DDIMScheduler):  # type: ignore[misc]
        def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
            return sample * 0.5  # which DDIMPipeline never calls

    return Scheduler()


def patched_step(lib: Library) -> Any:
    scheduler = lib.DDIMScheduler()
    step = scheduler.step
    scheduler.step = MethodType(lambda self, out, *args, **kwargs: step(out * 0.5, *args, **kwargs), scheduler)
    return scheduler


SCHEDULERS: dict[str, Callable[[Library], Any]] = {
    "own step": own_step,
    "own set_timesteps": own_timesteps,
    "own scale_model_input": own_scaling,
    "patched step": patched_step,
    "proxy": lambda lib: Proxy(lib.DDIMScheduler()),
    "of diffusers": lambda lib: diffusers.DDIMScheduler(beta_end=0.01),
    "parallel, of diffusers": lambda lib: diffusers.DDIMParallelScheduler(beta_end=0.01),
}


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_pipeline_calls_the_scheduler(name: str, eta: float) -> None:
    assert_same_images([sample(with_scheduler(lib, SCHEDULERS[name](lib)), eta=eta) for lib in LIBRARIES])


def test_pipeline_calls_a_step_patched_on_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    images = []
    for lib in LIBRARIES:
        step = lib.DDIMScheduler.step

        def half(self: Any, model_output: Tensor, *args: Any, step: Any = step, **kwargs: Any) -> Any:
            return step(self, model_output * 0.5, *args, **kwargs)

        monkeypatch.setattr(lib.DDIMScheduler, "step", half)
        images.append(sample(make_pipeline(lib)))
    assert_same_images(images)


# 4. Every module is called


def layer_names(unet: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    return [name for name, module in unet.named_modules() if type(module) in kinds]


MIXED = TINY | {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "block_out_channels": (8, 8, 16),
}


@pytest.mark.parametrize("config", [TINY, MIXED], ids=["tiny", "mixed"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("mode", ["training", "evaluation", "pipeline", "eager pipeline"])
def test_hooks_of_every_module_fire_once_per_call(
    config: dict[str, Any], memory_format: torch.memory_format, mode: str
) -> None:
    unet = make_unet(DDIM, **config).train(mode == "training").to(memory_format=memory_format)
    names = {name for name, module in unet.named_modules() if not isinstance(module, nn.ModuleList)}
    calls = dict.fromkeys(names, 0)
    for name in names:
        unet.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: calls.__setitem__(name, calls[name] + 1)
        )
    if mode in ("pipeline", "eager pipeline"):
        pipe = make_pipeline(DDIM, unet)
        if mode == "eager pipeline":
            pipe.engine = "eager"
        sample(pipe, num_inference_steps=1)
    else:
        with torch.set_grad_enabled(mode == "training"):
            unet(randn(2, 3, 8, 8), T)
    assert calls == reference_calls(config)


def reference_calls(config: dict[str, Any]) -> dict[str, int]:
    """Count the calls of every module of the network of `diffusers`."""
    unet = make_unet(DIFFUSERS, **config)
    calls = {name: 0 for name, module in unet.named_modules() if not isinstance(module, nn.ModuleList)}
    for name in calls:
        unet.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: calls.__setitem__(name, calls[name] + 1)
        )
    with torch.no_grad():
        unet(randn(2, 3, 8, 8), T)
    return calls


@pytest.mark.parametrize("training", [True, False])
def test_global_hooks_fire_as_often(training: bool) -> None:
    counts = []
    for lib in LIBRARIES:
        unet, calls = make_unet(lib).train(training), []
        handle = register_module_forward_hook(lambda module, *args, calls=calls: calls.append(type(module).__name__))
        try:
            with torch.set_grad_enabled(training):
                unet(randn(2, 3, 8, 8), T)
        finally:
            handle.remove()
        counts.append(sorted(calls))
    assert counts[0] == counts[1]


class Wrapper(nn.Module):
    """A layer in another one, without attributes of its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Any:
        return self.layer(*args) * 0.5


def wrap(unet: nn.Module, name: str) -> None:
    parent, _, child = name.rpartition(".")
    setattr(unet.get_submodule(parent), child, Wrapper(unet.get_submodule(name)))


def subclass(unet: nn.Module, name: str) -> None:
    module = unet.get_submodule(name)

    class Half(type(module)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0.5

    module.__class__ = Half


def patch(unet: nn.Module, name: str) -> None:
    module = unet.get_submodule(name)
    forward = module.forward
    module.forward = lambda x: forward(x) * 0.5  # type: ignore[method-assign]


def hook(unet: nn.Module, name: str) -> None:
    unet.get_submodule(name).register_forward_hook(lambda module, inputs, output: output * 0.5)


def pre_hook(unet: nn.Module, name: str) -> None:
    unet.get_submodule(name).register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))


def parametrize(unet: nn.Module, name: str) -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 0.5

    nn.utils.parametrize.register_parametrization(unet.get_submodule(name), "weight", Half())


@pytest.mark.parametrize("change", [wrap, subclass, patch, hook, pre_hook, parametrize], ids=lambda f: f.__name__)
def test_changed_layer_changes_the_output_as_in_diffusers(change: Callable[[nn.Module, str], None]) -> None:
    names = layer_names(make_unet(DDIM), nn.Conv2d, nn.GroupNorm, nn.Linear)
    x = randn(2, 3, 8, 8)
    # Layers of one name together: a layer without its change would leave the output of all of them different.
    for child in sorted({name.rpartition(".")[2] for name in names}):
        outputs: list[list[Tensor]] = []
        for lib in LIBRARIES:
            unet = make_unet(lib)
            for name in names:
                if name.rpartition(".")[2] == child:
                    change(unet, name)
            with torch.no_grad():
                evaluated = unet(x, T).sample
            unet.train().to(memory_format=torch.channels_last)
            outputs.append([evaluated, unet(x.to(memory_format=torch.channels_last), T).sample.detach()])
        for expected, actual in zip(*outputs, strict=True):
            assert error(actual, expected) <= 1e-5, child


class LowRank(nn.Module):
    """A layer with a low-rank addition of rank 2."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        if isinstance(layer, nn.Linear):
            self.down: nn.Module = nn.Linear(layer.in_features, 2, bias=False)
            self.up: nn.Module = nn.Linear(2, layer.out_features, bias=False)
        else:
            self.down = nn.Conv2d(layer.in_channels, 2, layer.kernel_size, layer.stride, layer.padding, bias=False)
            self.up = nn.Conv2d(2, layer.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_low_rank_addition_to_every_layer_has_an_effect_and_a_gradient(memory_format: torch.memory_format) -> None:
    x = randn(2, 3, 8, 8).to(memory_format=memory_format)
    results = []
    for lib in LIBRARIES:
        unet = make_unet(lib, **MIXED).requires_grad_(False)
        layers = {}
        for name in layer_names(unet, nn.Conv2d, nn.Linear):
            parent, _, child = name.rpartition(".")
            layers[name] = LowRank(unet.get_submodule(name))
            setattr(unet.get_submodule(parent), child, layers[name])
        for layer in layers.values():
            fill(layer.down)
            fill(layer.up)
        unet.to(memory_format=memory_format)
        with torch.no_grad():
            outputs = [unet(x, T).sample]
        outputs.append(unet.train()(x, T).sample)
        outputs[-1].square().mean().backward()
        gradients = {name: [layer.down.weight.grad, layer.up.weight.grad] for name, layer in layers.items()}
        results.append((outputs, gradients))
    (expected_outputs, theirs), (outputs, ours) = results
    for actual, expected in zip(outputs, expected_outputs, strict=True):
        assert relative_error(actual.detach(), expected.detach()) <= 1e-5
    assert list(ours) == list(theirs)
    for name in theirs:
        for actual, expected in zip(ours[name], theirs[name], strict=True):
            assert actual is not None, name
            assert actual.any(), name
            assert relative_error(actual, expected) <= 1e-5, name


def test_weight_norm_of_every_convolution_is_trained() -> None:
    gradients = []
    for lib in LIBRARIES:
        unet = make_unet(lib, **MIXED).train()
        for name in layer_names(unet, nn.Conv2d):
            parametrizations.weight_norm(unet.get_submodule(name))
        unet(randn(2, 3, 8, 8), T).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in unet.named_parameters()})
    theirs, ours = gradients
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        assert relative_error(ours[name], expected) <= 1e-5, name


# 5. Saved by diffusers


@pytest.mark.parametrize("name", ["DDPMPipeline", "DDIMPipeline", "PNDMPipeline"])
def test_diffusers_saves_our_weights(tmp_path: Path, name: str) -> None:
    unet = make_unet(DDIM)
    getattr(diffusers, name)(unet=unet, scheduler=diffusers.PNDMScheduler()).save_pretrained(tmp_path)
    assert "unet/diffusion_pytorch_model.safetensors" in file_names(tmp_path)
    x = randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = unet(x, 7).sample
        for kind in (diffusers.DiffusionPipeline, DDIMPipeline):
            assert error(kind.from_pretrained(tmp_path).unet(x, 7).sample, expected) <= 1e-5


# 6. Values that are only defaults


@pytest.mark.parametrize("settings", [{}, {"timestep_spacing": "leading", "beta_schedule": "scaled_linear"}])
@pytest.mark.parametrize("name", COMPATIBLE)
def test_defaults_give_way_to_those_of_another_scheduler(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    kind = getattr(diffusers, name)
    theirs, ours = (lib.DDIMScheduler(**settings) for lib in LIBRARIES)
    expected = public(kind.from_config(theirs.config).config)
    assert public(kind.from_config(ours.config).config) == expected
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    expected = public(kind.from_pretrained(tmp_path / "theirs").config)
    assert public(kind.from_pretrained(tmp_path / "ours").config) == expected


@pytest.mark.parametrize("name", COMPATIBLE)
def test_defaults_of_another_scheduler_give_way_to_ours(name: str, tmp_path: Path) -> None:
    other = getattr(diffusers, name)()
    theirs, ours = (lib.DDIMScheduler.from_config(other.config) for lib in LIBRARIES)
    assert public(ours.config) == public(theirs.config)
    other.save_pretrained(tmp_path)
    theirs, ours = (lib.DDIMScheduler.from_pretrained(tmp_path) for lib in LIBRARIES)
    assert public(ours.config) == public(theirs.config)


# 7. The order of construction


@pytest.mark.parametrize(
    "changes",
    [
        {},
        MIXED,
        {"mid_block_type": None},
        {"add_attention": False},
        {"num_class_embeds": 4, "time_embedding_type": "fourier"},
        {"class_embed_type": "timestep", "resnet_time_scale_shift": "scale_shift"},
        {"downsample_type": "resnet", "upsample_type": "resnet", "layers_per_block": 2},
        {"time_embedding_type": "learned", "num_train_timesteps": 10},
    ],
    ids=str,
)
def test_initial_weights_of_one_seed(changes: dict[str, Any]) -> None:
    states = []
    for lib in LIBRARIES:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = lib.UNet2DModel(**TINY | changes)
            states.append((dict(unet.named_parameters()), dict(unet.state_dict()), torch.rand(1)))
    for theirs, ours in zip(states[0][:2], states[1][:2], strict=True):
        assert list(ours) == list(theirs)
        for name, expected in theirs.items():
            assert torch.equal(ours[name], expected), name
    assert torch.equal(states[0][2], states[1][2])


def test_optimizer_state_and_ema_of_a_diffusers_run_load() -> None:
    theirs = make_unet(DIFFUSERS)
    optimizer, ema = torch.optim.AdamW(theirs.parameters()), EMAModel(theirs.parameters(), decay=0.5)
    theirs(randn(2, 3, 8, 8), T).sample.square().mean().backward()
    optimizer.step()
    ema.step(theirs.parameters())

    ours = UNet2DModel(**TINY)
    taken_over = torch.optim.AdamW(ours.parameters())
    taken_over.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, state in taken_over.state.items():
        assert state["exp_avg"].shape == parameter.shape
    ours_ema = EMAModel(ours.parameters())
    ours_ema.load_state_dict(ema.state_dict())
    ours_ema.copy_to(ours.parameters())
    ema.copy_to(theirs.parameters())
    for name, expected in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], expected), name


# 8. Rounding before a cancellation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_noise_is_rounded_last(dtype: torch.dtype) -> None:
    timesteps = torch.tensor([0, 1, 2, 5, 10, 100, 500, 999])
    x, noise = rand(8, 3, 4, 4).to(dtype), randn(8, 3, 4, 4, seed=1).to(dtype)
    alpha = torch.from_numpy(ALPHAS)[timesteps].reshape(-1, 1, 1, 1)
    signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    scheduler, unit = DDIMScheduler(), torch.finfo(dtype).eps
    zero = torch.zeros_like(x)
    noisy, velocity = scheduler.add_noise(x, noise, timesteps), scheduler.get_velocity(x, noise, timesteps)
    assert noisy.dtype == velocity.dtype == dtype
    # The terms one by one: each is right to its own rounding, however small it is beside the other.
    for actual, expected in (
        (scheduler.add_noise(zero, noise, timesteps), sigma * noise.double()),
        (scheduler.add_noise(x, zero, timesteps), signal * x.double()),
        (scheduler.get_velocity(x, zero, timesteps), -sigma * x.double()),
        (scheduler.get_velocity(zero, noise, timesteps), signal * noise.double()),
    ):
        assert ((actual.double() - expected).abs() <= 2 * unit * expected.abs() + 1e-7).all()
    assert error(noisy, signal * x.double() + sigma * noise.double()) <= 4 * unit
    assert error(velocity, signal * noise.double() - sigma * x.double()) <= 8 * unit


# Networks that diffusers cannot sample


def test_learned_variance_is_split_off() -> None:
    wide = make_unet(DDIM, out_channels=6)
    narrow = make_unet(DDIM)
    narrow.load_state_dict(
        {name: value[:3] if name.startswith("conv_out") else value for name, value in wide.state_dict().items()}
    )
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    pipes = [DDIMPipeline(unet, scheduler) for unet in (narrow, wide)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    assert_same_images([sample(pipe, eta=0.5) for pipe in pipes])
    assert_same_images([sample(with_own_step(pipe)) for pipe in pipes])


def with_own_step(pipe: Any) -> Any:
    pipe.scheduler = own_step(DDIM)
    return pipe


def test_network_replaced_later_is_checked_before_it_runs() -> None:
    pipe = make_pipeline(DDIM)
    pipe.unet = make_unet(DDIM, out_channels=1)
    for run in (lambda: pipe(num_inference_steps=1), lambda: pipe.decode(torch.zeros(1, 3, 8, 8), 2)):
        with pytest.raises(ValueError, match="out_channels must be 3, or 6"):
            run()


def test_overridden_thresholding_is_used() -> None:
    images = []
    for lib in (DIFFUSERS, DDIM):

        class Halved(lib.DDIMScheduler):  # type: ignore[misc,name-defined]
            def _threshold_sample(self, sample: Tensor) -> Tensor:
                return sample.clamp(-1, 1) / 2

        pipe = make_pipeline(lib)
        pipe.scheduler = Halved(thresholding=True)
        images.append(sample(pipe))
    assert_same_images(images)


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 7, 9])
def test_other_numbers_of_output_channels_are_refused(channels: int) -> None:
    with pytest.raises(ValueError, match="channels"):
        DDIMPipeline(make_unet(DDIM, out_channels=channels), DDIMScheduler())


def test_more_than_four_channels_are_refused_for_pil_before_the_network_runs() -> None:
    unet = make_unet(DDIM, in_channels=5, out_channels=5)
    pipe = make_pipeline(DDIM, unet)
    calls: list[int] = []
    handle = unet.register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(ValueError, match="channels"):
        pipe(num_inference_steps=2)
    assert calls == []
    handle.remove()
    assert sample(pipe).shape == (2, 8, 8, 5)
