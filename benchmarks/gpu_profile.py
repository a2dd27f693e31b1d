"""Where the time of ddim's engine on a GPU goes: the CIFAR-10 architecture with random weights.

    python -m benchmarks.gpu_profile [--batches 1 16 256] [--dtype bf16] [--layers 256] [--alternatives 256]

For each batch size, whole steps, as recorded and launched by the engine, are timed without a profiler, then profiled:
the time on the device by kind of kernel, and the slowest kernels. For the batch size `--layers` each operation of one
evaluation is then timed on its own, once per distinct shape: rates in TFLOP/s of convolutions and products, in GB/s of
what only moves memory. What a kind takes, and how far its rate is from the machine's, says what bounds the whole. For
the batch size `--alternatives` operations are timed beside other ways to compute the same: other tiles, two kernels
instead of one, PyTorch's operators, upsampling before the convolution, 1x1 convolutions by cuDNN.

`--cpu-try` runs all that does not need CUDA on a CPU with a small network, to test this script.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import DTYPES, describe_machine, use_tf32
from benchmarks.networks import make_unet
from ddim import DDIMScheduler
from ddim.diffusion.loop import StepSettings
from ddim.engine.cuda import CUDAEngine, record_graph, tried_algorithms
from ddim.engine.fused import operations, reference
from ddim.engine.fused.reference import Norm
from ddim.info import count_flop

KINDS = {
    "norm": r"_normalize_tile|_compute_moments|_apply_moments|group_?norm|RowwiseMoments",
    "residual": r"_add_residual",
    "upsample": r"_interleave|upsample",
    "attention": r"flash|fmha|attention|softmax",
    "conv": r"conv|fprop|implicit|nchwToNhwc|nhwcToNchw|cudnn|wgrad|dgrad",
    "gemm": r"gemm|gemv|cublas|nvjet|cutlass|splitK|xmma|sm\d\d_",
    "copy": r"memcpy|memset|copy|fill|CatArray",
    "elementwise": r"elementwise|vectorized|reduce",
}
"""Kinds of kernels and the patterns of their names, of which the first that matches counts."""

REPEATS = 20


def kind_of(name: str) -> str:
    """Return the kind of a kernel."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def timed(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Return the seconds of one call, the mean of many after some warm-up."""
    for _ in range(3):
        run()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile_steps(engine: CUDAEngine, batch: int, flop: float, kernels: int) -> None:
    """Time and profile whole steps, and print what they consist of."""
    device, config = engine.device, engine.network.unet.config
    scheduler = DDIMScheduler()
    steps = scheduler.make_steps([900, 800])
    x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, device=device)
    step_fn: Any = engine.step_fn(x, steps, StepSettings(clip=scheduler.clip))
    timestep = torch.tensor(900, device=device)

    def run() -> None:
        step_fn(x, timestep, steps[0])

    repeats = REPEATS if device.type == "cuda" else 1
    seconds = timed(run, repeats, device)
    print(
        f"\nbatch {batch}: {1000 * seconds:.3f} ms per step, {batch / seconds:,.0f} evaluations/s, "
        f"{flop * batch / seconds / 1e12:.1f} TFLOP/s",
        flush=True,
    )
    if device.type != "cuda":
        return
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            run()
        synchronize(device)
    events = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        kinds[kind_of(event.key)][0] += event.self_device_time_total / repeats
        kinds[kind_of(event.key)][1] += event.count / repeats
    total = sum(microseconds for microseconds, _ in kinds.values())
    print(f"on the device {total / 1000:.3f} ms, idle or overlapped {1000 * seconds - total / 1000:.3f} ms")
    for kind, (microseconds, count) in sorted(kinds.items(), key=lambda item: -item[1][0]):
        print(f"  {kind:12} {microseconds / 1000:8.3f} ms {microseconds / total:5.0%} {count:6.0f} kernels")
    for event in sorted(events, key=lambda e: -e.self_device_time_total)[:kernels]:
        print(
            f"    {event.self_device_time_total / repeats:9.1f} us {event.count / repeats:5.0f} x "
            f"[{kind_of(event.key)}] {event.key[:110]}"
        )


@contextmanager
def recorded_calls(calls: dict[tuple[Any, ...], list[Any]]) -> Iterator[None]:
    """Collect the operations of the network, their arguments and how often each shape occurs."""

    def record(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            result = function(*args, **settings)
            tensors = [a for a in args if isinstance(a, Tensor)]
            tensors += [t for a in args if isinstance(a, list | tuple) for t in a if isinstance(t, Tensor)]
            key = (name, *(tuple(t.shape) for t in tensors), *sorted(settings.items()))
            if key in calls:
                calls[key][-1] += 1
            else:
                calls[key] = [lambda: function(*args, **settings), tensors, result, 1]
            return result

        return call

    targets = {
        "conv": (F, "conv2d"),
        "linear": (F, "linear"),
        "attention": (F, "scaled_dot_product_attention"),
        "norm": (operations, "normalize"),
        "residual": (operations, "add_residual"),
        "upsample": (operations, "interleave"),
    }
    patches = [
        mock.patch.object(owner, name, record(kind, getattr(owner, name))) for kind, (owner, name) in targets.items()
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def multiplications(kind: str, tensors: Sequence[Tensor], result: Tensor) -> float:
    """Return the FLOP of an operation; 0 for those that only move memory."""
    if kind == "conv":
        return 2.0 * result.numel() * tensors[1][0].numel()
    if kind == "linear":
        return 2.0 * result.numel() * tensors[1].shape[1]
    if kind == "attention":
        return 4.0 * result.numel() * tensors[1].shape[-2]
    return 0.0


def time_operation(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of an operation, launched many times together by a graph on a GPU."""
    if device.type != "cuda":
        return timed(run, 1, device)

    def run_many() -> None:
        for _ in range(REPEATS):
            run()

    graph = record_graph(run_many, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    return timed(graph.replay, 3, device) / REPEATS


def time_layers(engine: CUDAEngine, batch: int) -> None:
    """Time each distinct operation of an evaluation on its own, and print rates."""
    device, unet = engine.device, engine.network.unet
    x = torch.randn(batch, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size, device=device)
    calls: dict[tuple[Any, ...], list[Any]] = {}
    with tried_algorithms(), recorded_calls(calls):
        engine.predict(x.to(unet.dtype), 500)
    rows = []
    for (kind, *signature), (run, tensors, result, count) in calls.items():
        seconds = time_operation(run, device)
        flop = multiplications(kind, tensors, result)
        moved = sum(t.nbytes for t in [*tensors, result])
        rate = f"{flop / seconds / 1e12:7.1f} TFLOP/s" if flop else " " * 15
        shapes = " ".join("x".join(map(str, s)) if isinstance(s, tuple) else str(s) for s in signature)
        rows.append((seconds * count, f"{rate} {moved / seconds / 1e9:7.0f} GB/s  {count} x {kind} {shapes}"))
    print(f"\noperations at batch {batch}, one at a time: {1000 * sum(s for s, _ in rows):.3f} ms in all")
    for seconds, line in sorted(rows, reverse=True):
        print(f"  {1000 * seconds:8.3f} ms {line}")


NORM_SHAPES = (((128,), 32), ((128, 128), 32), ((256, 128), 32), ((256,), 16), ((256, 256), 16))
"""Channels of the inputs and height of the feature maps of the network's largest group norms."""

NORM_VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "8 warps": {"_launch_options": lambda elements: {"num_warps": max(1, min(8, elements // 512))}},
    "8 warps, 128 registers": {"_launch_options": lambda _: {"num_warps": 8, "maxnreg": 128}},
    "16 warps, any registers": {"_launch_options": lambda _: {"num_warps": 16}},
    "half of a tile": {"TILE_ELEMENTS": 8192},
    "two kernels": {"MAX_TILE_ELEMENTS": 0},
    "two kernels, small tiles": {"MAX_TILE_ELEMENTS": 0, "TILE_ELEMENTS": 4096},
}


def time_alternatives(device: torch.device, dtype: torch.dtype, batch: int) -> None:
    """Time operations of the network beside other ways to compute the same."""
    kernels: Any = operations.load_kernels(device, dtype)

    def feature_map(channels: int, size: int) -> Tensor:
        x = torch.randn(batch, channels, size, size, device=device, dtype=dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def show(name: str, variant: str, run: Callable[[], Any], moved: int = 0) -> None:
        try:
            seconds = time_operation(run, device)
        except Exception as error:
            print(f"  {name:34} {variant:28} failed: {str(error).splitlines()[0][:60]}")
            return
        rate = f"{moved / seconds / 1e9:7.0f} GB/s" if moved else ""
        print(f"  {name:34} {variant:28} {1e6 * seconds:9.1f} us {rate}", flush=True)

    print(f"\nalternatives at batch {batch}")
    x = feature_map(128, 32)
    show("copy 128 channels 32x32", "clone", x.clone, 2 * x.nbytes)
    for channels, size in NORM_SHAPES:
        maps = [feature_map(c, size) for c in channels]
        weight = torch.ones(sum(channels), device=device, dtype=dtype)
        norm = Norm(weight, torch.zeros_like(weight), 32, 1e-6, silu=True)
        a, b = maps[0], maps[1] if len(maps) > 1 else None
        shift = torch.randn(1, len(weight), device=device, dtype=dtype)
        name, moved = f"norm {channels} {size}x{size}", 2 * sum(m.nbytes for m in maps)
        for variant, changes in NORM_VARIANTS.items():
            if kernels is not None:
                with mock.patch.multiple(kernels, **changes) if changes else nullcontext():
                    show(name, variant, partial(kernels.normalize, a, b, norm, shift), moved)
        show(name, "PyTorch's operators", partial(reference.normalize, a, b, norm, shift), moved)
    for channels, size in ((128, 32), (256, 16)):
        x, skip, bias = feature_map(channels, size), feature_map(channels, size), torch.ones(channels, device=device)
        for elements in (2048, 4096, 8192, 16384):
            if kernels is not None:
                with mock.patch.object(kernels, "STREAM_ELEMENTS", elements):
                    run = partial(kernels.add_residual, x, bias, [skip])
                    show(f"residual {channels} {size}x{size}", f"{elements} elements", run, 3 * x.nbytes)
    for channels, size in ((256, 16), (256, 8), (256, 4)):
        x, name = feature_map(channels, size), f"upsample {channels} {size}x{size}"
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        conv.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        filters = torch.randn(4 * channels, channels, 2, 2, device=device, dtype=dtype)
        filters = filters.contiguous(memory_format=torch.channels_last)
        show(name, "small map", lambda x=x, w=filters: operations.interleave(F.conv2d(x, w, padding=1)))
        show(name, "large map", lambda x=x, conv=conv: conv(F.interpolate(x, scale_factor=2, mode="nearest")))
    for inputs, outputs, size in ((256, 128, 32), (128, 128, 32), (256, 256, 16)):
        x, weight = feature_map(inputs, size), torch.randn(outputs, inputs, device=device, dtype=dtype)
        name = f"1x1 {inputs} to {outputs} {size}x{size}"
        show(name, "product", lambda x=x, w=weight: F.linear(x.permute(0, 2, 3, 1), w))
        show(name, "convolution", lambda x=x, w=weight: F.conv2d(x, w[:, :, None, None]))


def main() -> None:
    """Profile all batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 256], help="batch sizes")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights")
    parser.add_argument("--layers", type=int, help="also time each operation at this batch size")
    parser.add_argument("--alternatives", type=int, help="also time alternatives at this batch size")
    parser.add_argument("--kernels", type=int, default=15, help="slowest kernels to list")
    parser.add_argument("--cpu-try", action="store_true", help="run on a CPU, with a small network, to test the script")
    options = parser.parse_args()
    device = torch.device("cpu" if options.cpu_try else "cuda")
    unet = make_unet("mnist" if options.cpu_try else "cifar10")
    dtype, tf32 = DTYPES[options.dtype]
    use_tf32(tf32)
    flop = count_flop(unet)
    engine = CUDAEngine(unet.to(device, dtype))
    kernels = operations.load_kernels(engine.device, dtype)
    print(f"{describe_machine(device.type == 'cuda')}, {options.dtype}, {flop / 1e9:.1f} GFLOP per evaluation")
    print("operations run on", "PyTorch's operators" if kernels is None else "kernels in Triton")
    with torch.no_grad():
        for batch in options.batches:
            profile_steps(engine, batch, flop, options.kernels)
        if options.layers is not None:
            time_layers(engine, options.layers)
        if options.alternatives is not None:
            time_alternatives(engine.device, dtype, options.alternatives)


if __name__ == "__main__":
    main()
