"""The U-Net on a GPU: the same weights and, to rounding, the same numbers, with one launch a step.

A step of the loop is the network and equation (12) of the paper,

    x_0, epsilon = predict(network(x, t), x, c)
    x_prev       = c.signal_prev clip(x_0) + c.direction epsilon + c.noise_std noise

some hundreds of small kernels, and launching one from Python takes longer than many of them run. `StepRunner` has CUDA
record them once, as a graph, and launches them all at once ever after. A graph reads and writes the same addresses each
time: so x, t, the coefficients c and the noise are copied to where it looks for them, and what it leaves there is
copied for the caller. All copies are on the device or from pinned memory, and nothing waits for them.

`CUDAEngine` has such a step for each shape and setting. It keeps weights with channels innermost, as tensor cores want
them, and a block's queries, keys and values are one product. It switches nothing of PyTorch's: by PyTorch's defaults
convolutions in float32 may round to TF32, here as in the network itself, and the two then agree to about 1e-3 only
(`torch.backends.cudnn.allow_tf32`).

Everything but the recording works on a CPU as well, where a step is run anew each time. `compiled` is the other way to
a faster network: by PyTorch's compiler.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.diffusion.equations import Coefficients, Step, ddim_step, dynamic_threshold
from ddim.diffusion.loop import StepFn
from ddim.diffusion.noise import NoiseSource
from ddim.engine import altered
from ddim.nn.layers import Attention
from ddim.nn.ops import norm_silu
from ddim.outputs import UNet2DOutput
from ddim.unet import UNet2DModel

Clip = Callable[[Tensor], Tensor]

MAX_STEPS = 8
"""Recorded steps that an engine keeps, those used last; at least 2, see `CUDAEngine._runner`."""

WARM_UP = 3
"""Runs before the recording, in which libraries choose their algorithms and take the memory that they keep."""

_turn = threading.RLock()
"""Held while a step is recorded, of which a process may do one at a time, and while one is run, from the first copy to
the last: the steps of an engine share their memory."""


def unfit(unet: Any) -> str | None:
    """Why the engine cannot stand in for a network; `None` if it can."""
    if reason := altered(unet):
        return reason
    parameters = list(unet.parameters())
    if any(p.dtype != unet.dtype for p in parameters):
        return "its parameters are of several dtypes"
    if unet.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it is in {unet.dtype}"
    if unet.device.type != "cuda" or any(p.device != unet.device for p in parameters):
        return "not all of it is on one CUDA device"
    return None


class CUDAEngine:
    """A network prepared for sampling.

    It holds a copy of the weights as they were when it was built: after they have changed, build another. Threads may
    share it if they work on one CUDA stream, which they do unless told otherwise.

    Args:
        unet: one that `unfit` has nothing to say about. On a CPU an engine works too, and is not faster.
    """

    def __init__(self, unet: UNet2DModel) -> None:
        self.device = unet.device
        # Tensors made in inference mode could not be written to outside.
        with torch.inference_mode(False):
            self._network = copy.deepcopy(unet).requires_grad_(False).eval()
            self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            for block in list(self._network.modules()):
                attentions: Any = getattr(block, "attentions", None)
                if attentions is not None:
                    block.attentions = nn.ModuleList(map(FusedAttention, attentions))
        self._runners: dict[Hashable, StepRunner] = {}
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def __call__(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None) -> UNet2DOutput:
        """Predict; arguments, result and errors are those of `UNet2DModel.forward`, without gradients."""
        return UNet2DOutput(predict(self._network, sample, timestep, class_labels))

    def mover(
        self,
        latents: Tensor,
        steps: Sequence[Step],
        prediction_type: str = "epsilon",
        clip: Clip | None = None,
        use_clipped_model_output: bool = False,
        noise: NoiseSource | None = None,
    ) -> StepFn:
        """How `ddim.diffusion.loop.walk` takes the steps that `ddim.diffusion.loop.sample` takes, with one launch each:

            walk(latents, steps, engine.mover(latents, steps, ...))

        It takes what `sample` takes. A shape and setting that is new to the engine is recorded here, which needs about
        the time of some steps. The network then runs in its own dtype, autocast or not, and switches of PyTorch's such
        as `torch.backends.cudnn.allow_tf32` stay as they were.

        Args:
            latents: x at the first timestep, (N, C, H, W) float32 or float64 on the engine's device. Every later x is
                of this shape, and is brought to this dtype.
            steps: all that will be taken.
            prediction_type: `epsilon`, `sample` or `v_prediction`.
            clip: applied to each predicted x_0. What `DDIMScheduler.clip` gives is recorded; with any other function
                steps are run from Python.
            use_clipped_model_output: recompute epsilon from the clipped x_0.
            noise: drawn from once a step. Noise that CPU generators draw is best left on the CPU: it is copied from
                here without waiting.

        Returns:
            A move, whose results are the caller's to keep.

        Raises:
            ValueError: for an unknown prediction type, latents that do not fit the network, or, in a move, an x of
                another shape.
        """
        settings = (prediction_type, clip, use_clipped_model_output, noise is not None)
        runner = self._runner(latents, settings)
        # On the device once, before the loop, like the timesteps.
        table = torch.tensor([step.coefficients() for step in steps], dtype=latents.dtype, device=latents.device)
        rows = dict(zip(steps, table, strict=True))

        def move(x: Tensor, timestep: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            return runner(x, timestep, rows[step], None if noise is None else noise())

        return move

    def _runner(self, latents: Tensor, settings: tuple[str, Clip | None, bool, bool]) -> StepRunner:
        prediction_type, clip, *switches = settings
        identity = clip_identity(clip)
        if identity is None:
            return StepRunner(self._network, latents, *settings, Rerun)
        key = (latents.shape, latents.dtype, prediction_type, identity, *switches)
        with _turn:
            runner = self._runners.pop(key, None)
            if runner is None:
                if len(self._runners) >= MAX_STEPS:
                    self._forget_oldest()
                runner = StepRunner(self._network, latents, *settings, self._record)
            self._runners[key] = runner
        return runner

    def _forget_oldest(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # it may be running
        del self._runners[next(iter(self._runners))]

    def _record(self, run: Callable[[], None]) -> Graph:
        if self._stream is None:
            return Rerun(run)
        # A graph's memory can be shared by others as long as it has one graph, which is why some are always kept. The
        # steps of an engine run one after the other and what they leave is not in it, so that they may share it.
        pool = next((runner.graph.pool() for runner in self._runners.values()), None)
        return recorded(run, self._stream, pool)


class Graph(Protocol):
    """What `torch.cuda.CUDAGraph` and `Rerun` have in common."""

    def replay(self) -> None:
        """Do what was recorded."""

    def pool(self) -> Any:
        """The memory that it works in."""


class Rerun:
    """A graph that records nothing: a function, run anew each time."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run

    def pool(self) -> None:
        return None


def recorded(run: Callable[[], None], stream: torch.cuda.Stream, pool: Any = None) -> torch.cuda.CUDAGraph:
    """The graph of what a function launches.

    Args:
        run: reads and writes tensors that stay where they are, and does not wait for the device.
        stream: to record on; one for all graphs that share memory. Its device is the function's.
        pool: of a graph to share memory with.
    """
    with torch.cuda.device(stream.device):
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # The outer context gives the current stream back even where the inner one fails to. Other threads, those that
        # load data, say, may go on using the device.
        with torch.cuda.stream(stream), torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            run()
    return graph


class StepRunner:
    """A step of one shape and setting, and the tensors that it reads and writes.

    Args:
        network: in evaluation mode; of any floating dtype.
        like: an x, (N, C, H, W).
        prediction_type: as for `CUDAEngine.mover`.
        clip: as there.
        use_clipped_model_output: as there.
        noisy: whether noise is added.
        record: makes a graph of a function.
    """

    def __init__(
        self,
        network: UNet2DModel,
        like: Tensor,
        prediction_type: str,
        clip: Clip | None,
        use_clipped_model_output: bool,
        noisy: bool,
        record: Callable[[Callable[[], None]], Graph],
    ) -> None:
        self._network, self._settings = network, (prediction_type, clip, use_clipped_model_output)
        with torch.inference_mode(False), torch.no_grad():
            new = functools.partial(torch.zeros, dtype=like.dtype, device=like.device)
            self.x, self.x_prev, self.x0 = new(like.shape), new(like.shape), new(like.shape)
            self.noise = new(like.shape) if noisy else None
            self.coefficients = new(len(Coefficients._fields)) + 1
            self.timestep = torch.ones((), dtype=torch.int64, device=like.device)
            self.graph = record(self._run)

    def _run(self) -> None:
        with torch.autocast(self.x.device.type, enabled=False):
            output = predict(self._network, self.x.to(self._network.dtype), self.timestep).to(self.x.dtype)
        coefficients = Coefficients(*self.coefficients)
        x_prev, x0 = ddim_step(output, self.x, coefficients, *self._settings, self.noise)
        self.x_prev.copy_(x_prev)
        self.x0.copy_(x0)

    @torch.no_grad()
    def __call__(
        self, x: Tensor, timestep: Tensor, coefficients: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Take the step.

        Args:
            x: of the shape that the step was made for.
            timestep: ().
            coefficients: those of `ddim.diffusion.equations.Coefficients`, (5,).
            noise: of the shape of `x`, for a step that adds noise.

        Returns:
            x_prev and the predicted x_0 after clipping, which no later call touches.
        """
        if x.shape != self.x.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}; the loop was begun with {tuple(self.x.shape)}")
        with _turn:
            fill(self.x, x)
            fill(self.timestep, timestep)
            fill(self.coefficients, coefficients)
            if self.noise is not None and noise is not None:
                fill(self.noise, noise)
            self.graph.replay()
            return self.x_prev.clone(), self.x0.clone()


def predict(network: nn.Module, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
    """What a network predicts, in the usual layout whatever that of its weights is."""
    prediction: Tensor = network(sample, timestep, class_labels).sample
    return prediction.contiguous()


def fill(place: Tensor, values: Tensor) -> None:
    """Copy, without waiting: from pageable memory a copy may begin only when the device has done all before it."""
    if place.is_cuda and not values.is_cuda:
        values = values.to(place.dtype).pin_memory()
    place.copy_(values, non_blocking=True)


def clip_identity(clip: Clip | None) -> Hashable | None:
    """Equal for functions that do the same; `None` for one of which is not known whether it can be recorded."""
    if clip is None:
        return ()
    if isinstance(clip, functools.partial) and not clip.args and clip.func in (torch.clamp, dynamic_threshold):
        return (clip.func, *sorted(clip.keywords.items()))
    return None


class FusedAttention(nn.Module):
    """An `Attention` whose queries, keys and values are one product, for channels innermost."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads, self.output_scale_factor = attention.heads, attention.output_scale_factor
        self.group_norm, self.to_out = attention.group_norm, attention.to_out[0]
        parts = (attention.to_q, attention.to_k, attention.to_v)
        self.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
        self.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        N, C, H, W = hidden_states.shape
        normed = hidden_states if self.group_norm is None else norm_silu(self.group_norm, hidden_states, silu=False)
        tokens = normed.permute(0, 2, 3, 1).reshape(N, H * W, C)
        q, k, v = F.linear(tokens, self.weight, self.bias).view(N, H * W, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, H * W, -1)
        output = hidden_states + self.to_out(mixed).view(N, H, W, C).permute(0, 3, 1, 2)
        return output if self.output_scale_factor == 1 else output / self.output_scale_factor


def compiled(unet: Any) -> Any:
    """A network compiled by `torch.compile`: it stands in for the network, whose weights it goes on using.

    The first call with a new shape, dtype or mode takes from seconds to minutes.

    Args:
        unet: a network in PyTorch, on any device.

    Raises:
        RuntimeError: if there is nothing here to compile with.
    """
    device = next(unet.parameters()).device
    check_compiler(device.type)
    return torch.compile(unet, dynamic=False, mode="max-autotune-no-cudagraphs" if device.type == "cuda" else "default")


@functools.cache
def check_compiler(device: str) -> None:
    """RuntimeError unless `torch.compile` can make a kernel for devices of this type, which is tried."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise RuntimeError(f"torch.compile does not work on this machine for {device}: {reason}") from error
