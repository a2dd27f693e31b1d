"""The U-Net on a GPU: the same weights and, to rounding, the same results, with one launch per step.

A step of the loop is the network and equation (12) of the paper,

    x_0, epsilon = predict(network(x, t), x, c)
    x_prev       = c.signal_prev clip(x_0) + c.direction epsilon + c.noise_std noise

and, for multistep methods, multiples of the changes of epsilon since earlier steps: hundreds of small kernels, and
launching one from Python takes longer than many of them run. `StepRunner` has CUDA record them once, as a graph, and
launches them together from then on. A graph reads and writes the same addresses each time: x, t, the coefficients c,
the noise and earlier epsilons are copied into its input buffers, and its results are copied for the caller. All copies
are on the device or from pinned memory, and nothing waits for them.

`CUDAEngine` has such a step for each shape and setting, and evaluates the network by fused operations in channels_last,
the layout of tensor cores (`ddim.engine.fused`). The projections of the time embedding are computed for all steps of a
run at once, before the first. cuDNN chooses the algorithm of each convolution by trying what it has before a step is
recorded. No switch of PyTorch stays changed: by PyTorch's defaults convolutions in float32 may round to TF32, here as
in the network itself, and the two then agree to about 1e-3 only (`torch.backends.cudnn.allow_tf32`).

Everything but the recording works on a CPU as well, where a step is run anew each time. `compile_network` is the other
way to a faster network: PyTorch's compiler.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ddim.diffusion.equations import Coefficients, Step, ddim_step, dynamic_threshold
from ddim.diffusion.loop import StepFn, StepSettings
from ddim.diffusion.solvers import add_corrections, history_length
from ddim.engine.fused.network import FusedNetwork
from ddim.unet import UNet2DModel

Clip = Callable[[Tensor], Tensor]

MAX_RECORDED_STEPS = 8
"""Recorded steps that an engine keeps, the most recently used ones; at least 2, see `CUDAEngine.record`."""

WARM_UP_RUNS = 3
"""Runs before the recording, in which libraries choose their algorithms and allocate their workspaces."""

_graph_lock = threading.RLock()
"""Held while a step is recorded, since a process may record one at a time, and while one runs, from the first copy to
the last, since the steps of an engine share their memory."""


class CUDAEngine:
    """Runs a network for sampling, with whole steps recorded as CUDA graphs.

    It holds a copy of the weights as they were when it was built: after they have changed, build another. Threads may
    share it if they work on one CUDA stream, the default one unless they choose another.

    Args:
        unet: one that `ddim.engine.base.unsupported_reason` supports. On a CPU an engine works too, and is not faster.

    Example:
        >>> unet = UNet2DModel(sample_size=8, block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
        >>> CUDAEngine(unet).predict(torch.zeros(1, 3, 8, 8), 10).shape
        torch.Size([1, 3, 8, 8])
    """

    name = "CUDAEngine"
    dtype: torch.dtype | None = None
    is_batch_invariant = False

    def __init__(self, unet: UNet2DModel) -> None:
        self.device = unet.device
        # Tensors made in inference mode could not be written to outside.
        with torch.inference_mode(False):
            weights = copy.deepcopy(unet).requires_grad_(False).eval()
            weights.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self.network = FusedNetwork(weights)
        self.runners: dict[Hashable, StepRunner] = {}
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def predict(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Evaluate the network; see `Engine.predict`.

        Args:
            sample: x_t, (N, C, H, W), in the network's dtype and on its device.
            timestep: t, in 0..T-1; one number, a tensor (), or one per sample (N,).
            class_labels: int64 (N,), or embeddings (N, D), for class-conditional networks.

        Returns:
            The prediction, (N, C, H, W), contiguous.

        Raises:
            ValueError: as `UNet2DModel.forward`.
        """
        return self.network(sample, timestep, class_labels)

    def prepare(self, timesteps: Sequence[int], classes: Tensor | None = None) -> None:
        """Do nothing: `step_fn` embeds the timesteps of a run.

        Args:
            timesteps: ignored.
            classes: ignored.
        """

    def step_fn(self, latents: Tensor, steps: Sequence[Step], settings: StepSettings) -> StepFn | None:
        """Return a function that takes a whole step of a run in one launch.

        A shape and setting that is new to the engine is recorded here, which takes about as long as a few steps. The
        network then runs in its own dtype, autocast or not, and switches such as `torch.backends.cudnn.allow_tf32` stay
        as they were.

        Args:
            latents: x at the first timestep, (N, C, H, W) float32 or float64 on the engine's device. Every later x is
                of this shape, and is brought to this dtype.
            steps: all steps that will be taken, in order.
            settings: of the run. Noise that CPU generators draw is best left on the CPU: it is copied from there
                without waiting.

        Returns:
            A function for one pass over `steps`, whose results are the caller's to keep; `None` if `settings.clip` is
            a function of which it is not known whether it can be recorded (`DDIMScheduler.clip` can).

        Raises:
            ValueError: for an unknown prediction type, latents that do not fit the network, or, in a step, an x of
                another shape.

        Example:
            >>> unet = UNet2DModel(sample_size=8, block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
            >>> step = Step(timestep=500, prev_timestep=-1, alpha=0.5, alpha_prev=1.0)
            >>> step_fn = CUDAEngine(unet).step_fn(torch.zeros(1, 3, 8, 8), [step], StepSettings())
            >>> x_prev, x0 = step_fn(torch.zeros(1, 3, 8, 8), torch.tensor(500), step)
            >>> torch.equal(x_prev, x0)
            True
        """
        runner = self._get_runner(latents, settings, history_length(steps))
        if runner is None:
            return None
        # On the device once, before the loop, like the timesteps.
        table = torch.tensor([step.coefficients() for step in steps], dtype=latents.dtype, device=latents.device)
        rows = dict(zip(steps, table, strict=True))
        projected = self._project(steps)
        noise = settings.noise
        history: list[Tensor] = []

        def take_step(x: Tensor, timestep: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            nonlocal history
            drawn = None if noise is None else noise()
            embedding = projected[step.timestep]
            x_prev, x0, epsilon = runner(x, timestep, embedding, rows[step], drawn, history)
            if epsilon is not None:
                history = [epsilon, *history][: runner.history_length]
            return x_prev, x0

        return take_step

    @torch.no_grad()
    def _project(self, steps: Sequence[Step]) -> dict[int, Tensor]:
        """Return the projected embedding (1, F) of each timestep."""
        timesteps = sorted({step.timestep for step in steps})
        with torch.autocast(self.device.type, enabled=False):
            projected = self.network.project(torch.tensor(timesteps, device=self.device))
        return dict(zip(timesteps, torch.split(projected, 1), strict=True))

    def _get_runner(self, latents: Tensor, settings: StepSettings, history_length: int) -> StepRunner | None:
        """Return the runner of a shape and setting, recorded if there is none yet; `None` if it cannot be recorded."""
        clip_key = clip_identity(settings.clip)
        if clip_key is None:
            return None
        options = StepOptions(
            settings.prediction_type,
            settings.clip,
            settings.use_clipped_model_output,
            has_noise=settings.noise is not None,
            history_length=history_length,
        )
        key = (latents.shape, latents.dtype, clip_key, *options.key())
        with _graph_lock:
            runner = self.runners.pop(key, None)
            if runner is None:
                if len(self.runners) >= MAX_RECORDED_STEPS:
                    self._forget_oldest()
                runner = StepRunner(self.network, latents, options, self.record)
            self.runners[key] = runner
        return runner

    def _forget_oldest(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # it may be running
        del self.runners[next(iter(self.runners))]

    def record(self, run: Callable[[], None]) -> Graph:
        """Record what a function launches; on a CPU, return a graph that runs it anew each time.

        Args:
            run: reads and writes tensors that stay where they are.

        Returns:
            The graph.
        """
        if self._stream is None:
            return Rerun(run)
        # A graph's memory can be shared by others as long as it has one graph, which is why some are always kept. The
        # steps of an engine run one after the other and no result stays in their memory, so that they may share it.
        pool = next((runner.graph.pool() for runner in self.runners.values()), None)
        return record_graph(run, self._stream, pool)


class Graph(Protocol):
    """What `torch.cuda.CUDAGraph` and `Rerun` have in common."""

    def replay(self) -> None:
        """Run what was recorded."""

    def pool(self) -> Any:
        """Return the memory pool that the graph works in."""


class Rerun:
    """A graph that records nothing: a function, run anew each time.

    Args:
        run: the function.

    Example:
        >>> Rerun(lambda: print("replayed")).replay()
        replayed
    """

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run

    def pool(self) -> None:
        """Return `None`: no memory is shared."""
        return


def record_graph(run: Callable[[], None], stream: torch.cuda.Stream, pool: Any = None) -> torch.cuda.CUDAGraph:
    """Record what a function launches on a CUDA device.

    Args:
        run: reads and writes tensors that stay where they are, and does not wait for the device.
        stream: to record on; one for all graphs that share memory. Its device is the function's.
        pool: of a graph to share memory with.

    Returns:
        The graph.
    """
    with torch.cuda.device(stream.device):
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), tried_algorithms():
            for _ in range(WARM_UP_RUNS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # The outer context restores the current stream even where the inner one fails to. Other threads, such as those
        # that load data, may use the device meanwhile.
        with torch.cuda.stream(stream), torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            run()
    return graph


@contextlib.contextmanager
def tried_algorithms() -> Iterator[None]:
    """Let cuDNN try its algorithms for convolutions of new shapes in a `with` block.

    PyTorch remembers the fastest for as long as the process runs, in the block and after it.

    Example:
        >>> with tried_algorithms():
        ...     torch.backends.cudnn.benchmark
        True
    """
    previous = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = previous


@dataclass(frozen=True)
class StepOptions:
    """What a recorded step does.

    Attributes:
        prediction_type: what the network predicts: `epsilon`, `sample` or `v_prediction`.
        clip: applied to each predicted x_0; `None` leaves it.
        use_clipped_model_output: recompute epsilon from the clipped x_0.
        has_noise: whether noise is added.
        history_length: how many earlier predictions the corrections of a multistep method use.
    """

    prediction_type: str
    clip: Clip | None
    use_clipped_model_output: bool
    has_noise: bool
    history_length: int

    def key(self) -> tuple[Hashable, ...]:
        """Return all options but `clip`, for a dictionary of recorded steps.

        Example:
            >>> StepOptions("epsilon", None, False, has_noise=True, history_length=0).key()
            ('epsilon', False, True, 0)
        """
        return self.prediction_type, self.use_clipped_model_output, self.has_noise, self.history_length


class StepRunner:
    """A step of one shape and setting, and the buffers that it reads and writes.

    Args:
        network: of any floating dtype.
        like: an x, (N, C, H, W), of the buffers' shape, dtype and device.
        options: what the step does.
        record: makes a graph of a function.
    """

    def __init__(
        self,
        network: FusedNetwork,
        like: Tensor,
        options: StepOptions,
        record: Callable[[Callable[[], None]], Graph],
    ) -> None:
        self._network, self._options = network, options
        with torch.inference_mode(False), torch.no_grad():
            new = functools.partial(torch.zeros, dtype=like.dtype, device=like.device)
            self.x, self.x_prev, self.x0 = new(like.shape), new(like.shape), new(like.shape)
            self.noise = new(like.shape) if options.has_noise else None
            self.history = [new(like.shape) for _ in range(options.history_length)]
            self.epsilon = new(like.shape) if self.history else None
            # Ones, so that the runs of the recording divide by no zero.
            self.coefficients = new(len(Coefficients._fields)) + 1
            self.timestep = torch.ones((), dtype=torch.int64, device=like.device)
            self.embedding = torch.zeros(1, network.embedding_size, dtype=network.unet.dtype, device=like.device)
            self.graph = record(self._run)

    def _run(self) -> None:
        # Read the input buffers, evaluate the network.
        options, coefficients = self._options, Coefficients(*self.coefficients)
        with torch.autocast(self.x.device.type, enabled=False):
            sample = self.x.to(self.embedding.dtype)
            output = self._network.evaluate(sample, self.timestep, self.embedding).to(self.x.dtype)
        # Update x by equation (12), and by the corrections of a multistep method.
        x_prev, x0 = ddim_step(
            output,
            self.x,
            coefficients,
            options.prediction_type,
            options.clip,
            options.use_clipped_model_output,
            self.noise,
        )
        if self.epsilon is not None:
            x_prev, epsilon = add_corrections(x_prev, x0, self.x, coefficients, self.history)
            self.epsilon.copy_(epsilon)
        # Write the output buffers.
        self.x_prev.copy_(x_prev)
        self.x0.copy_(x0)

    @property
    def history_length(self) -> int:
        """How many earlier predictions it uses."""
        return len(self.history)

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        timestep: Tensor,
        embedding: Tensor,
        coefficients: Tensor,
        noise: Tensor | None = None,
        history: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take the step.

        Args:
            x: of the shape that the step was made for.
            timestep: int64 ().
            embedding: of the timestep, `FusedNetwork.project`, (1, F).
            coefficients: those of `ddim.diffusion.equations.Coefficients`, (8,).
            noise: of the shape of `x`, for a step that adds noise.
            history: the epsilons that the steps before returned, the last one first, as far as there are any.

        Returns:
            x_prev, the predicted x_0 after clipping, and the epsilon for the next steps (`None` for first order):
            copies that no later call touches.

        Raises:
            ValueError: if x has another shape.
        """
        if x.shape != self.x.shape:
            raise ValueError(
                f"x must keep the shape {tuple(self.x.shape)} that the loop started with, got {tuple(x.shape)}"
            )
        with _graph_lock:
            # Fill the input buffers.
            fill(self.x, x)
            if self._network.divides_by_timestep:
                fill(self.timestep, timestep)
            fill(self.embedding, embedding)
            fill(self.coefficients, coefficients)
            if self.noise is not None and noise is not None:
                fill(self.noise, noise)
            for index, buffer in enumerate(self.history):
                # The corrections of what does not exist yet are 0: any finite epsilon will do.
                if index < len(history):
                    fill(buffer, history[index])
                else:
                    buffer.zero_()
            # Launch, and copy the results before the next launch overwrites them.
            self.graph.replay()
            epsilon = None if self.epsilon is None else self.epsilon.clone()
            return self.x_prev.clone(), self.x0.clone(), epsilon


def fill(buffer: Tensor, values: Tensor) -> None:
    """Copy values into a buffer without waiting for the device.

    From pageable memory a copy begins only when the device has done all before it; so it is made from pinned memory.

    Args:
        buffer: on any device.
        values: of its shape, on any device.

    Example:
        >>> buffer = torch.zeros(2)
        >>> fill(buffer, torch.ones(2))
        >>> buffer
        tensor([1., 1.])
    """
    if buffer.is_cuda and not values.is_cuda:
        values = values.to(buffer.dtype).pin_memory()
    buffer.copy_(values, non_blocking=True)


def clip_identity(clip: Clip | None) -> Hashable | None:
    """Return a value that is equal for functions that clip alike.

    Args:
        clip: a function of x_0, or `None`.

    Returns:
        The value; `None` for a function of which it is not known whether it can be recorded.

    Example:
        >>> clip_identity(functools.partial(torch.clamp, min=-1, max=1))[1:]
        (('max', 1), ('min', -1))
    """
    if clip is None:
        return ()
    if isinstance(clip, functools.partial) and not clip.args and clip.func in (torch.clamp, dynamic_threshold):
        return (clip.func, *sorted(clip.keywords.items()))
    return None


def compile_network(unet: Any) -> Any:
    """Compile a network by `torch.compile`. The result shares the network's weights.

    The first call with a new shape, dtype or mode takes from seconds to minutes.

    Args:
        unet: a network in PyTorch, on any device.

    Returns:
        The compiled network, called as the network is.

    Raises:
        RuntimeError: if `torch.compile` does not work on this machine.
    """
    device = next(unet.parameters()).device
    check_compiler(device.type)
    return torch.compile(unet, dynamic=False, mode="max-autotune-no-cudagraphs" if device.type == "cuda" else "default")


@functools.cache
def check_compiler(device: str) -> None:
    """Compile a small function, to see whether `torch.compile` works on this machine.

    Args:
        device: the type of the devices to compile for, such as `cpu`.

    Raises:
        RuntimeError: if it fails, with its reason.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise RuntimeError(f"torch.compile does not work on this machine for {device}: {reason}") from error
