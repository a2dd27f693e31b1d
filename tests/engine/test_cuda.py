"""The CUDA engine against the network and the loop that it replaces.

On a CPU a step is either run anew each time or recorded by `Tape`, which like a CUDA graph records operations and their
tensors, and nothing of the Python around them. What only a GPU can show is skipped without one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ddim import DDIMPipeline, DDIMScheduler
from ddim.diffusion.equations import Coefficients, ddim_step, dynamic_threshold, make_steps
from ddim.diffusion.loop import State, StepSettings, run_steps, sample
from ddim.diffusion.noise import noise_from_seeds
from ddim.engine import cuda
from ddim.engine.base import unsupported_reason
from ddim.engine.cuda import CUDAEngine, StepOptions, check_compiler, clip_identity, compile_network
from ddim.sampler import Sampler
from ddim.unet import UNet2DModel
from helpers import error, randn

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CPU = torch.device("cpu")
ALPHAS = torch.linspace(0.999, 0.001, 1000, dtype=torch.float64).numpy()
TIMESTEPS = [999, 800, 500, 200, 1]


class Tape(TorchDispatchMode):
    """A graph on the CPU."""

    def __init__(self, run: Callable[[], None]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.waits = 0
        with self:
            run()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.waits += func is torch.ops.aten._local_scalar_dense.default
        if not func.is_view and torch.Tag.inplace_view not in func.tags:
            # Addresses and shapes as they are now, whatever becomes of these objects.
            self.calls.append(tree_map_only(Tensor, torch.Tensor.detach, (func, args, kwargs or {}, result)))
        return result

    def replay(self) -> None:
        # As a graph does, whatever is cast where it is replayed.
        with torch.autocast("cpu", enabled=False):
            for func, args, kwargs, result in self.calls:
                for place, values in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(place, Tensor) and place.data_ptr() != values.data_ptr():
                        place.copy_(values)

    def pool(self) -> None:
        return None


@pytest.fixture(params=["rerun", "recorded"])
def recording(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both kinds of graph, one after the other; whether it records."""
    if request.param == "recorded":
        monkeypatch.setattr(CUDAEngine, "record", lambda engine, run: Tape(run))
    return request.param == "recorded"


HALF_PRECISION = 0.03
"""Largest difference in [0, 1] after some steps in bfloat16: eight of its roundings at 1. Processors with AMX sum
products in another order in each memory format."""


class FastPipeline(DDIMPipeline):
    """A pipeline that runs on the CUDA engine, on whatever device it is."""

    def __init__(self, unet: UNet2DModel, scheduler: DDIMScheduler) -> None:
        super().__init__(unet, scheduler)
        self.fast = CUDAEngine(unet)

    @property
    def sampler(self) -> Sampler:
        sampler = super().sampler
        sampler.get_engine = lambda: self.fast
        return sampler


def pair(unet: UNet2DModel, **settings: Any) -> tuple[DDIMPipeline, FastPipeline]:
    """The network's pipeline, and one of its engine."""
    scheduler = DDIMScheduler(**settings)
    pipes = DDIMPipeline(unet, scheduler, engine="eager"), FastPipeline(unet, scheduler)
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def assert_same(pipes: tuple[DDIMPipeline, DDIMPipeline], tolerance: float = 1e-5, **arguments: Any) -> None:
    images = []
    for pipe in pipes:
        if generator := arguments.get("generator"):
            generator.manual_seed(1)
        images.append(pipe(output_type="pt", **arguments).images)
    expected, actual = images
    assert error(actual, expected) < tolerance


class TestCoefficients:
    """A step whose coefficients are tensors is the step whose coefficients are numbers."""

    @pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
    @pytest.mark.parametrize("clip", [None, partial(torch.clamp, min=-1, max=1), dynamic_threshold])
    @pytest.mark.parametrize("use_clipped_model_output", [False, True])
    @pytest.mark.parametrize(("eta", "hat"), [(0.0, False), (0.5, False), (1.0, True), (3.0, False)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equal(
        self,
        prediction_type: str,
        clip: Callable[[Tensor], Tensor] | None,
        use_clipped_model_output: bool,
        eta: float,
        hat: bool,
        dtype: torch.dtype,
    ) -> None:
        shape = (2, 3, 4, 4)
        output, x, noise = (randn(*shape, seed=seed, dtype=dtype) for seed in range(3))
        settings = (prediction_type, clip, use_clipped_model_output, noise if eta else None)
        for step in make_steps(TIMESTEPS, ALPHAS, eta=eta, use_sigma_hat=hat):
            coefficients = Coefficients(*torch.tensor(step.coefficients(), dtype=dtype))
            for actual, expected in zip(
                ddim_step(output, x, coefficients, *settings), ddim_step(output, x, step, *settings), strict=True
            ):
                assert actual.dtype == dtype
                assert error(actual, expected) <= 1e-6 * max(1.0, float(expected.abs().max()))

    def test_last_step_ends_in_a_clean_image(self) -> None:
        step = make_steps(TIMESTEPS, ALPHAS, eta=1.0)[-1]
        assert step.coefficients()[2:] == (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)


RESNET = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}


class TestNetwork:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            RESNET | {"resnet_time_scale_shift": "scale_shift"},
            {"attention_head_dim": 4, "mid_block_scale_factor": 1.4},
            {"attention_head_dim": 3, "act_fn": "gelu", "downsample_padding": 0},
            {"time_embedding_type": "fourier", "center_input_sample": True},
            {"mid_block_type": None},
        ],
        ids=str,
    )
    def test_equals_the_network(self, make_unet: Callable[..., UNet2DModel], changes: dict[str, Any]) -> None:
        unet = make_unet(**changes)
        engine = CUDAEngine(unet)
        with torch.no_grad():
            for x, t in [(randn(3, 3, 16, 16), torch.tensor([7, 400, 999])), (randn(1, 3, 8, 24), 20)]:
                actual = engine.predict(x, t)
                assert error(actual, unet(x, t).sample) < 1e-5
                assert actual.is_contiguous()

    def test_classes(self, make_unet: Callable[..., UNet2DModel]) -> None:
        unet = make_unet(num_class_embeds=5)
        x, labels = randn(2, 3, 16, 16), torch.tensor([4, 1])
        with torch.no_grad():
            assert error(CUDAEngine(unet).predict(x, 3, labels), unet(x, 3, labels).sample) < 1e-5

    def test_network_is_not_changed(self, tiny_unet: UNet2DModel) -> None:
        tiny_unet.train()
        before = {name: (p.data_ptr(), p.stride(), p.requires_grad) for name, p in tiny_unet.named_parameters()}
        engine = CUDAEngine(tiny_unet)
        assert not engine.predict(randn(1, 3, 16, 16), 3).requires_grad
        after = {name: (p.data_ptr(), p.stride(), p.requires_grad) for name, p in tiny_unet.named_parameters()}
        assert after == before
        assert all(module.training for module in tiny_unet.modules())
        weights = [p for p in engine.network.unet.parameters() if p.ndim == 4]
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)

    def test_raises_as_the_network(self, tiny_unet: UNet2DModel) -> None:
        engine = CUDAEngine(tiny_unet)
        with pytest.raises(ValueError, match="sample: expected shape"):
            engine.predict(randn(1, 4, 16, 16), 3)
        with pytest.raises(ValueError, match="got 2 for 3 samples"):
            engine.predict(randn(3, 3, 16, 16), torch.tensor([3, 4]))

    def test_wrong_number_of_labels(self, make_unet: Callable[..., UNet2DModel]) -> None:
        engine = CUDAEngine(make_unet(num_class_embeds=5))
        with pytest.raises(ValueError, match="got 2 for 3 samples"):
            engine.predict(randn(3, 3, 16, 16), torch.tensor([3, 4, 5]), torch.tensor([1, 2]))
        with pytest.raises(ValueError, match="class_labels must be given"):
            engine.predict(randn(3, 3, 16, 16), 3)

    @pytest.mark.parametrize("kind", ["timestep", "identity"])
    def test_embedded_classes(self, make_unet: Callable[..., UNet2DModel], kind: str) -> None:
        unet = make_unet(class_embed_type=kind)
        x, labels = randn(2, 3, 16, 16), randn(2, 32) if kind == "identity" else torch.tensor([4, 1])
        with torch.no_grad():
            assert error(CUDAEngine(unet).predict(x, 3, labels), unet(x, 3, labels).sample) < 1e-5

    def test_learned_embeddings(self, make_unet: Callable[..., UNet2DModel]) -> None:
        unet = make_unet(time_embedding_type="learned", num_train_timesteps=1000)
        x, t = randn(2, 3, 16, 16), torch.tensor([999, 0])
        with torch.no_grad():
            assert error(CUDAEngine(unet).predict(x, t), unet(x, t).sample) < 1e-5


@pytest.mark.usefixtures("recording")
class TestLoop:
    @pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
    @pytest.mark.parametrize("eta", [0.0, 1.0])
    def test_images(self, tiny_unet: UNet2DModel, prediction_type: str, eta: float) -> None:
        assert_same(pair(tiny_unet, prediction_type=prediction_type), seeds=[5, 6, 7], num_inference_steps=10, eta=eta)

    @pytest.mark.parametrize("clip", [{"clip_sample": False}, {"clip_sample_range": 0.4}, {"thresholding": True}])
    def test_clipping(self, tiny_unet: UNet2DModel, clip: dict[str, Any]) -> None:
        pipes = pair(tiny_unet, **clip)
        assert_same(pipes, seeds=[5, 6], num_inference_steps=6)
        assert_same(pipes, seeds=[5, 6], num_inference_steps=6, eta=0.7, use_clipped_model_output=True)

    def test_zero_terminal_snr(self, tiny_unet: UNet2DModel) -> None:
        schedule = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
        assert_same(pair(tiny_unet, **schedule), seeds=[5], num_inference_steps=8, eta=1.0)

    def test_sigma_hat(self, tiny_unet: UNet2DModel) -> None:
        assert_same(pair(tiny_unet), seeds=[5], num_inference_steps=10, eta=1.0, use_sigma_hat=True)

    @pytest.mark.parametrize("clip", [{}, {"clip_sample": False}, {"thresholding": True}], ids=str)
    @pytest.mark.parametrize("order", [2, 4])
    def test_multistep(self, tiny_unet: UNet2DModel, recording: bool, clip: dict[str, Any], order: int) -> None:
        """Corrections are part of the recorded step; the first steps, which have fewer, share the recording."""
        pipes = pair(tiny_unet, **clip)
        for seeds in ([5, 6], [7, 8]):
            # Higher orders magnify rounding.
            assert_same(pipes, 1e-5 if order == 2 else 1e-4, seeds=seeds, num_inference_steps=8, order=order)
        (runner,) = pipes[1].fast.runners.values()
        assert isinstance(runner.graph, Tape) == recording
        assert runner.history_length == order - 1

    def test_multistep_runs_alternate(self, tiny_unet: UNet2DModel) -> None:
        """Runs that share a recorded step do not share the epsilons of the steps before."""
        steps = DDIMScheduler().make_steps(TIMESTEPS, order=3)
        engine = CUDAEngine(tiny_unet)

        def run(seed: int) -> Iterator[State]:
            latents = randn(1, 3, 16, 16, seed=seed)
            return run_steps(latents, steps, engine.step_fn(latents, steps, StepSettings()))

        expected = [list(run(seed))[-1].sample for seed in (0, 1)]
        *_, last = zip(run(0), run(1), strict=True)
        assert all(torch.equal(state.sample, x) for state, x in zip(last, expected, strict=True))

    def test_half_precision(self, tiny_unet: UNet2DModel) -> None:
        pipes = pair(tiny_unet.to(torch.bfloat16))
        assert_same(pipes, HALF_PRECISION, seeds=[5, 6], num_inference_steps=6)
        assert_same(
            pipes, HALF_PRECISION, batch_size=2, generator=torch.Generator().manual_seed(1), num_inference_steps=1
        )

    def test_float64_latents(self, tiny_unet: UNet2DModel) -> None:
        pipes = pair(tiny_unet)
        latents = randn(2, 3, 16, 16, dtype=torch.float64)
        assert_same(pipes, latents=latents, num_inference_steps=6)
        assert pipes[1](latents=latents, num_inference_steps=2, output_type="pt").images.dtype == torch.float64

    def test_autocast_is_ignored(self, tiny_unet: UNet2DModel) -> None:
        engine, steps, latents = CUDAEngine(tiny_unet), make_steps(TIMESTEPS, ALPHAS), randn(2, 3, 16, 16)
        *_, expected = run_steps(latents, steps, engine.step_fn(latents, steps, StepSettings()))
        with torch.autocast("cpu", torch.bfloat16):
            engine = CUDAEngine(tiny_unet)
            *_, actual = run_steps(latents, steps, engine.step_fn(latents, steps, StepSettings()))
            assert engine.predict(latents, 3).dtype == torch.float32
        assert torch.equal(actual.sample, expected.sample)

    def test_callbacks_replace_latents(self, tiny_unet: UNet2DModel) -> None:
        def callback(pipe: Any, index: int, t: int, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
            return {"latents": tensors["latents"].flip(3) * 0.9} if index % 2 else None

        def in_place(pipe: Any, index: int, t: int, tensors: dict[str, Tensor]) -> None:
            tensors["latents"].mul_(0.9)
            tensors["pred_original_sample"].zero_()

        for change in (callback, in_place):
            assert_same(pair(tiny_unet), seeds=[1, 2], num_inference_steps=7, callback_on_step_end=change)

    def test_shapes_and_settings_in_turn(self, tiny_unet: UNet2DModel) -> None:
        pipes = pair(tiny_unet)
        engine = pipes[1].fast
        for seeds in ([1], [1, 2, 3], [4], [5, 6, 7]):
            for arguments in ({}, {"eta": 1.0}, {"use_clipped_model_output": True}, {"num_inference_steps": 3}):
                assert_same(pipes, seeds=seeds, **{"num_inference_steps": 5} | arguments)
        assert len(engine.runners) == 2 * 3

    def test_states_are_copies(self, tiny_unet: UNet2DModel) -> None:
        steps = make_steps(TIMESTEPS, ALPHAS)
        latents = randn(2, 3, 16, 16)
        engine = CUDAEngine(tiny_unet)
        with torch.no_grad():
            states_before = list(run_steps(latents, steps, engine.step_fn(latents, steps, StepSettings())))
            list(run_steps(latents, steps[1:], engine.step_fn(latents, steps[1:], StepSettings())))
            for actual, expected in zip(
                states_before, sample(lambda x, t: tiny_unet(x, t).sample, latents, steps), strict=True
            ):
                assert error(actual.sample, expected.sample) < 1e-4
                assert error(actual.pred_original_sample, expected.pred_original_sample) < 1e-4
        assert torch.equal(latents, randn(2, 3, 16, 16))

    def test_loops_in_parallel(self, tiny_unet: UNet2DModel) -> None:
        """Loops that alternate in one thread, and loops in several."""
        steps = make_steps(TIMESTEPS, ALPHAS, eta=1.0)
        engine = CUDAEngine(tiny_unet)

        def loop(seed: int) -> Iterator[State]:
            noise = noise_from_seeds((2, 3, 16, 16), [seed, seed + 1], CPU)
            latents = noise()
            return run_steps(latents, steps, engine.step_fn(latents, steps, StepSettings(noise=noise)))

        expected = [[state.sample for state in loop(seed)][-1] for seed in range(4)]
        alternating = [(a.sample, b.sample) for a, b in zip(loop(0), loop(1), strict=True)][-1]
        assert all(map(torch.equal, alternating, expected))
        with ThreadPoolExecutor(4) as pool:
            actual = list(pool.map(lambda seed: [state.sample for state in loop(seed)][-1], range(4)))
        assert all(map(torch.equal, actual, expected))

    def test_in_and_out_of_inference_mode(self, tiny_unet: UNet2DModel) -> None:
        with torch.inference_mode():
            pipes = pair(tiny_unet)
            assert_same(pipes, seeds=[1], num_inference_steps=3)
        assert_same(pipes, seeds=[1], num_inference_steps=3)
        with torch.inference_mode():
            assert_same(pipes, seeds=[1], num_inference_steps=3)

    def test_custom_clip_falls_back(self, tiny_unet: UNet2DModel) -> None:
        steps, latents = make_steps(TIMESTEPS, ALPHAS), randn(1, 3, 16, 16)
        engine, seen = CUDAEngine(tiny_unet), []

        def clip(x0: Tensor) -> Tensor:
            seen.append(float(x0.mean()))
            return x0.tanh()

        with torch.no_grad():
            assert engine.step_fn(latents, steps, StepSettings(clip=clip)) is None
            *_, actual = sample(engine.predict, latents, steps, StepSettings(clip=clip))
            *_, expected = sample(lambda x, t: tiny_unet(x, t).sample, latents, steps, StepSettings(clip=torch.tanh))
        assert error(actual.sample, expected.sample) < 1e-5
        assert len(seen) == len(steps)
        assert not engine.runners

    def test_wrong_arguments(self, tiny_unet: UNet2DModel) -> None:
        steps, latents = make_steps(TIMESTEPS, ALPHAS), randn(2, 3, 16, 16)
        engine = CUDAEngine(tiny_unet)
        states = run_steps(latents, steps, engine.step_fn(latents, steps, StepSettings()))
        next(states).sample = latents[:1]
        with pytest.raises(
            ValueError, match=r"x must keep the shape \(2, 3, 16, 16\) that the loop started with, got \(1, 3"
        ):
            next(states)
        with pytest.raises(ValueError, match="prediction_type must be one of"):
            next(run_steps(latents, steps, engine.step_fn(latents, steps, StepSettings("score"))))
        with pytest.raises(ValueError, match="sample: expected shape"):
            next(run_steps(latents[:, :2], steps, engine.step_fn(latents[:, :2], steps, StepSettings())))


class TestRunners:
    def test_least_recently_used_are_dropped(self, tiny_unet: UNet2DModel, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[Tape] = []
        monkeypatch.setattr(CUDAEngine, "record", lambda engine, run: made.append(Tape(run)) or made[-1])
        monkeypatch.setattr(cuda, "MAX_RECORDED_STEPS", 2)
        pipes = pair(tiny_unet)
        for number in (1, 2, 1, 3, 1):
            assert_same(pipes, seeds=range(number), num_inference_steps=2)
        assert len(made) == 3
        assert [key[0][0] for key in pipes[1].fast.runners] == [3, 1]
        assert_same(pipes, seeds=range(2), num_inference_steps=2)
        assert len(made) == 4

    def test_dropped_step_serves_its_loop_to_the_end(
        self, tiny_unet: UNet2DModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cuda, "MAX_RECORDED_STEPS", 2)
        steps, latents = make_steps(TIMESTEPS, ALPHAS), randn(2, 3, 16, 16)
        engine = CUDAEngine(tiny_unet)
        *_, expected = run_steps(latents, steps, engine.step_fn(latents, steps, StepSettings()))
        states = run_steps(latents, steps, engine.step_fn(latents, steps, StepSettings()))
        next(states)
        for number in (3, 4, 5):
            engine.step_fn(randn(number, 3, 16, 16), steps, StepSettings())
        *_, actual = states
        assert torch.equal(actual.sample, expected.sample)

    @pytest.mark.parametrize(("noisy", "history_length"), [(False, 0), (True, 0), (False, 3)])
    def test_step_does_not_wait(self, tiny_unet: UNet2DModel, noisy: bool, history_length: int) -> None:
        """No number is read back from a tensor, which no graph could record."""
        run = cuda.StepRunner(
            CUDAEngine(tiny_unet).network,
            randn(1, 3, 16, 16),
            StepOptions("epsilon", DDIMScheduler().clip, True, noisy, history_length),
            Tape,
        )
        assert run.graph.calls
        assert run.graph.waits == 0

    def test_clip_identity(self) -> None:
        clipping, threshold = DDIMScheduler(), DDIMScheduler(thresholding=True)
        assert clip_identity(clipping.clip) == clip_identity(DDIMScheduler().clip)
        known = [None, clipping.clip, DDIMScheduler(clip_sample_range=2.0).clip, threshold.clip]
        assert len({clip_identity(clip) for clip in known}) == len(known)
        assert all(clip_identity(clip) is not None for clip in known)
        assert clip_identity(torch.tanh) is None
        assert clip_identity(partial(torch.pow, exponent=2)) is None


class TestUnsupportedReason:
    def test_names_what_is_unsupported(self, make_unet: Callable[..., UNet2DModel]) -> None:
        assert unsupported_reason(nn.Identity()) == "Identity is not a UNet2DModel"
        hooked = make_unet()
        hooked.mid_block.resnets[0].register_forward_hook(lambda *_: None)
        assert unsupported_reason(hooked) == "mid_block.resnets.0 has hooks"
        replaced = make_unet()
        replaced.conv_in = nn.Sequential(replaced.conv_in)
        assert unsupported_reason(replaced) == "conv_in has been replaced"
        mixed = make_unet()
        mixed.conv_out.to(torch.bfloat16)
        assert unsupported_reason(mixed, "cuda") == "its parameters have several dtypes"
        assert unsupported_reason(make_unet().double(), "cuda") == "its dtype is torch.float64"
        assert unsupported_reason(make_unet(), "cuda") == "its parameters are not all on one CUDA device"

    @needs_cuda
    def test_on_a_gpu(self, make_unet: Callable[..., UNet2DModel]) -> None:
        unet = make_unet().cuda()
        assert unsupported_reason(unet) is None
        assert unsupported_reason(unet.to(torch.float16)) is None
        unet.conv_in.cpu()
        assert unsupported_reason(unet, "cuda") is not None


class TestCompiled:
    def test_equals_the_network(self, make_unet: Callable[..., UNet2DModel]) -> None:
        unet = make_unet(down_block_types=("DownBlock2D",), up_block_types=("AttnUpBlock2D",), block_out_channels=(8,))
        pipes = [DDIMPipeline(unet, DDIMScheduler(), engine=engine) for engine in ("eager", "compile")]
        for pipe in pipes:
            pipe.set_progress_bar_config(disable=True)
        assert_same((pipes[0], pipes[1]), seeds=[1, 2], num_inference_steps=3)

    def test_missing_compiler_raises(self, tiny_unet: UNet2DModel, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **settings: Any) -> Any:
            raise FileNotFoundError("no g++ here\nand much else")

        check_compiler.cache_clear()
        monkeypatch.setattr(torch, "compile", fail)
        with pytest.raises(RuntimeError, match=r"torch.compile does not work on this machine for cpu: no g\+\+ here$"):
            compile_network(tiny_unet)


@pytest.fixture
def on_gpu(make_unet: Callable[..., UNet2DModel], monkeypatch: pytest.MonkeyPatch) -> UNet2DModel:
    """A network on the GPU, whose products round to float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    return make_unet().cuda()


@needs_cuda
class TestGPU:
    def test_network(self, on_gpu: UNet2DModel) -> None:
        x = randn(4, 3, 16, 16).cuda()
        with torch.no_grad():
            assert error(CUDAEngine(on_gpu).predict(x, 500), on_gpu(x, 500).sample) < 1e-4

    @pytest.mark.parametrize("arguments", [{}, {"eta": 1.0}, {"use_clipped_model_output": True}], ids=str)
    @pytest.mark.parametrize("clip", [{}, {"clip_sample": False}, {"thresholding": True}], ids=str)
    def test_loop(self, on_gpu: UNet2DModel, clip: dict[str, Any], arguments: dict[str, Any]) -> None:
        pipes = pair(on_gpu, **clip)
        for seeds in ([1], [1, 2, 3], [4]):
            assert_same(pipes, 1e-4, seeds=seeds, num_inference_steps=10, **arguments)
        assert_same(pipes, 1e-4, generator=torch.Generator("cuda").manual_seed(3), num_inference_steps=1, **arguments)

    @pytest.mark.parametrize("size", [16, 128])
    def test_thresholding_of_small_and_large_images(self, on_gpu: UNet2DModel, size: int) -> None:
        """PyTorch sorts them in different ways."""
        pipes = pair(on_gpu, thresholding=True)
        for number in (1, 130):
            latents = randn(number, 3, size, size).cuda()
            steps = pipes[0].scheduler.make_steps([500, 20])
            clip = pipes[0].scheduler.clip
            with torch.no_grad():
                *_, actual = run_steps(latents, steps, pipes[1].fast.step_fn(latents, steps, StepSettings(clip=clip)))
                *_, expected = sample(lambda x, t: on_gpu(x, t).sample, latents, steps, StepSettings(clip=clip))
            assert error(actual.sample, expected.sample) < 1e-4

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, on_gpu: UNet2DModel, dtype: torch.dtype) -> None:
        assert_same(pair(on_gpu.to(dtype)), HALF_PRECISION, seeds=[1, 2], num_inference_steps=10)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_as_accurate_as_the_network(self, on_gpu: UNet2DModel, dtype: torch.dtype) -> None:
        x = randn(4, 3, 16, 16).cuda()
        with torch.no_grad():
            expected = on_gpu(x, 500).sample
            on_gpu.to(dtype)
            of_network = (on_gpu(x.to(dtype), 500).sample - expected).square().mean()
            of_engine = (CUDAEngine(on_gpu).predict(x.to(dtype), 500) - expected).square().mean()
        assert of_engine <= 1.5 * of_network

    def test_no_switch_stays_changed(self, on_gpu: UNet2DModel, monkeypatch: pytest.MonkeyPatch) -> None:
        for before in (False, True):
            monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
            assert_same(pair(on_gpu), 1e-4, seeds=[1], num_inference_steps=2)
            assert torch.backends.cudnn.benchmark == before
            assert not torch.backends.cudnn.allow_tf32

    def test_states_are_copies(self, on_gpu: UNet2DModel) -> None:
        steps = make_steps(TIMESTEPS, ALPHAS)
        latents = randn(2, 3, 16, 16).cuda()
        engine = CUDAEngine(on_gpu)
        states_before = list(run_steps(latents, steps, engine.step_fn(latents, steps, StepSettings())))
        other = randn(5, 3, 16, 16).cuda()
        list(run_steps(other, steps, engine.step_fn(other, steps, StepSettings())))
        with torch.no_grad():
            expected = sample(lambda x, t: on_gpu(x, t).sample, latents, steps)
            assert all(error(a.sample, b.sample) < 1e-4 for a, b in zip(states_before, expected, strict=True))

    def test_built_in_model(self, on_gpu: UNet2DModel) -> None:
        """To a gray level in 99.9% of the pixels after 50 steps."""
        pipes = pair(DDIMPipeline.from_pretrained("mnist").to("cuda").unet)
        images = [pipe(seeds=range(8), num_inference_steps=50, output_type="np").images for pipe in pipes]
        assert (abs(images[0] - images[1]) <= 1 / 255).mean() > 0.999

    @pytest.mark.parametrize("noisy", [False, True])
    def test_run_does_not_wait(self, on_gpu: UNet2DModel, noisy: bool) -> None:
        steps, latents = make_steps(TIMESTEPS, ALPHAS, eta=float(noisy)), randn(2, 3, 16, 16).cuda()
        noise = noise_from_seeds(latents.shape, [1, 2], CPU) if noisy else None
        states = run_steps(latents, steps, CUDAEngine(on_gpu).step_fn(latents, steps, StepSettings(noise=noise)))
        next(states)
        try:
            torch.cuda.set_sync_debug_mode("error")
            assert len(list(states)) == len(steps) - 1
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_one_launch_per_step(self, on_gpu: UNet2DModel) -> None:
        steps, latents = make_steps(TIMESTEPS, ALPHAS), randn(2, 3, 16, 16).cuda()
        states = run_steps(latents, steps, CUDAEngine(on_gpu).step_fn(latents, steps, StepSettings()))
        next(states)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            taken = len(list(states))
            torch.cuda.synchronize()
        calls = {event.key: event.count for event in profiler.key_averages()}
        assert calls["cudaGraphLaunch"] == taken
        # Three copies before and two after; PyTorch itself may set its generator's two numbers at each launch.
        others = sum(count for name, count in calls.items() if name.startswith(("cudaLaunchKernel", "cudaMemcpy")))
        assert others <= 7 * taken

    def test_other_threads_can_use_the_device(self, on_gpu: UNet2DModel) -> None:
        done = threading.Event()

        def busy() -> None:
            while not done.is_set():
                torch.zeros(1 << 16).pin_memory().cuda()

        thread = threading.Thread(target=busy)
        thread.start()
        try:
            assert_same(pair(on_gpu), 1e-4, seeds=[1, 2], num_inference_steps=5)
        finally:
            done.set()
            thread.join()

    def test_failure_restores_the_stream(self, on_gpu: UNet2DModel) -> None:
        stream = torch.cuda.current_stream()
        with suppress(RuntimeError):
            cuda.record_graph(lambda: print(float(torch.ones(1, device="cuda"))), torch.cuda.Stream())
        assert torch.cuda.current_stream() == stream
