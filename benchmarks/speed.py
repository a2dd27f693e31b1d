"""Time and memory of a network evaluation, which is what a step of sampling costs, beside the peers.

    python -m benchmarks.speed [--networks cifar10 mnist lsun] [--batches 1 8] [--compile] [--out benchmarks/results]

- ddim: the engine, `ddim.engine.get_engine(unet)`; ddim eager: `UNet2DModel` itself.
- diffusers eager: its `UNet2DModel` with the same weights, in either memory format.
- diffusers compiled, with `--compile`: `torch.compile` with frozen weights, for each batch size.
- OpenVINO, if it can be imported: the network of `diffusers`, converted for each batch size, in float32 and in what
  OpenVINO chooses by default, which is bfloat16 where the processor has instructions for it.
- ONNX Runtime, if it can be imported: the file that `ddim export` writes.
- with `--bf16`, both libraries with `torch_dtype=torch.bfloat16`, in channels_last.

Before timing, every row is compared with ddim eager, at single timesteps and at a different one for each image; a row
that is off by more than 1e-3 of the largest value, 5e-2 where it may be in bfloat16, ends the run with status 1.

A round times every row once, in alternating order, so that drifts of the machine's speed affect all alike; the
first is dropped. Short evaluations are repeated, after one that is not timed, because threads of the previous row may
still busy-wait. Set OMP_NUM_THREADS for another number of threads.

Memory is the peak resident size of a process that loads the saved pipeline and samples a batch in 2 steps, the median
of three, because fragmentation varies. It is read from /proc, because `ru_maxrss` starts with the size of the parent
process.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

import ddim
from benchmarks.networks import NETWORKS, make_unet, save_pipeline
from benchmarks.report import markdown_table, write_files
from ddim.engine import get_engine
from ddim.engine.base import EagerEngine
from ddim.export import export_onnx
from ddim.io.atomic import atomic_write
from ddim.io.json_files import to_json

BATCHES = {"cifar10": (1, 8, 32), "mnist": (1, 16, 32), "lsun": (1,)}
MAX_ROUNDS = {"lsun": 3}
"""Of networks that take seconds per evaluation."""

MEMORY_PROCESSES = 3
"""Processes per row whose memory is measured."""
MIN_ROUND_SECONDS = 0.25
"""A row is repeated in a round for at least this time."""

TOLERANCE, BF16_TOLERANCE = 1e-3, 5e-2
DDIM, EAGER, DIFFUSERS, DIFFUSERS_NHWC = "ddim", "ddim eager", "diffusers eager", "diffusers eager, channels_last"
COMPILED, OPENVINO, OPENVINO_DEFAULT = "diffusers compiled", "OpenVINO, float32", "OpenVINO, default"
ONNX, DDIM_BF16, DIFFUSERS_BF16 = "ONNX Runtime", "ddim, bfloat16", "diffusers eager, bfloat16, channels_last"
ROUNDED = (OPENVINO_DEFAULT, DDIM_BF16, DIFFUSERS_BF16)
"""Rows that are, or may be, in bfloat16."""

Run = Callable[[Tensor, Tensor], Tensor]
"""A sample (N, C, H, W) and a timestep () or (N,) -> the prediction."""

SAMPLE_SCRIPT = """
import sys
from {library} import DDIMPipeline
pipe = DDIMPipeline.from_pretrained(sys.argv[1]{arguments})
{change}
pipe.set_progress_bar_config(disable=True)
pipe(batch_size=int(sys.argv[2]), num_inference_steps=2)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
NHWC = "import torch\npipe.unet.to(memory_format=torch.channels_last)"
SAMPLE_SCRIPTS = {
    DDIM: SAMPLE_SCRIPT.format(library="ddim", arguments="", change=""),
    EAGER: SAMPLE_SCRIPT.format(library="ddim", arguments=', engine="eager"', change=""),
    DIFFUSERS: SAMPLE_SCRIPT.format(library="diffusers", arguments="", change=""),
    DIFFUSERS_NHWC: SAMPLE_SCRIPT.format(library="diffusers", arguments="", change=NHWC),
}

PREPARE_SCRIPT = """
import sys, time, torch
from ddim import UNet2DModel
from ddim.engine import get_engine
unet = UNet2DModel.from_pretrained(sys.argv[1])
size, channels = unet.config.sample_size, unet.config.in_channels
started = time.perf_counter()
engine = get_engine(unet)
print(time.perf_counter() - started)
engine.predict(torch.zeros(1, channels, size, size), torch.tensor(999))
print(time.perf_counter() - started)
"""


@dataclass
class Row:
    """A method to evaluate a network, and its measurements."""

    name: str
    run: Run | None = None
    preparation: float | None = None
    skip_reason: str = ""
    error: float | None = None
    seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None


def run_script(script: str, *arguments: Any) -> list[float]:
    """Run a script in a fresh process; return the numbers that it prints."""
    process = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(process.stderr)
    return [float(word) for word in process.stdout.split()]


def compiled_run(unet: Any, x: Tensor, t: Tensor) -> Run:
    """Compile a U-Net of `diffusers` for the shapes of `x` and `t`."""
    torch._dynamo.reset()
    network = torch.compile(unet, dynamic=False, options={"freezing": True})
    network(x, t)
    return lambda x, t: network(x, t.expand(len(x))).sample


def openvino_run(unet: Any, x: Tensor, t: Tensor, precision: str | None = "f32") -> Run:
    """Convert a U-Net of `diffusers` for the shapes of `x` and `t`; `None` for OpenVINO's choice of the precision."""
    import openvino as ov

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = unet

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.network(x, t, return_dict=False)[0]

    shapes = [ov.PartialShape(list(tensor.shape)) for tensor in (x, t)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Checks of shapes warn, and shapes are fixed.
        model = ov.convert_model(Network().eval(), example_input=(x, t), input=shapes)
    threads = torch.get_num_threads()
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    settings |= {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
    network = ov.Core().compile_model(model, "CPU", settings)
    return lambda x, t: torch.from_numpy(network([x.numpy(), t.expand(len(x)).contiguous().numpy()])[0])


def onnx_run(unet: ddim.UNet2DModel, x: Tensor, t: Tensor) -> Run:
    """Load the file that `ddim export` writes of our U-Net; it takes any batch."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        export_onnx(ddim.DDIMPipeline(unet, ddim.DDIMScheduler()), path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(x: Tensor, t: Tensor) -> Tensor:
        values = (x.numpy(), t.expand(len(x)).contiguous().numpy())
        return torch.from_numpy(session.run(None, dict(zip(names, values, strict=True)))[0])

    return run


def bf16_rows(unet: ddim.UNet2DModel, theirs: Any) -> list[Row]:
    """Build the rows in bfloat16; predictions are compared in float32."""
    ours: Any = copy.deepcopy(unet).to(torch.bfloat16)
    engine = get_engine(ours)
    rounded: Any = copy.deepcopy(theirs).to(torch.bfloat16, memory_format=torch.channels_last)
    return [
        Row(DDIM_BF16, lambda x, t: engine.predict(x.bfloat16(), t).float()),
        Row(
            DIFFUSERS_BF16,
            lambda x, t: rounded(x.to(torch.bfloat16, memory_format=torch.channels_last), t).sample.float(),
        ),
    ]


def batch_row(name: str, make: Callable[[Any, Tensor, Tensor], Run], unet: Any, x: Tensor) -> Row:
    """Build a row for one batch size; a failure becomes its `skip_reason`."""
    started = time.perf_counter()
    try:
        run = make(unet, x, torch.full((len(x),), 999))
    except Exception as error:
        return Row(name, skip_reason=next(iter(str(error).splitlines()), type(error).__name__))
    return Row(name, run, time.perf_counter() - started)


def make_rows(unet: ddim.UNet2DModel, engine: Any, prepared: float, x: Tensor, compiled: bool, bf16: bool) -> list[Row]:
    """Build all rows for the batch size of `x`; `prepared` is the engine's preparation in seconds."""
    theirs = diffusers.UNet2DModel(**unet.config).eval()
    theirs.load_state_dict(unet.state_dict())
    theirs_nhwc: Any = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    ours = Row(DDIM, lambda x, t: engine.predict(x, t), prepared)
    rows = [
        ours
        if not isinstance(engine, EagerEngine)
        else Row(DDIM, skip_reason="no engine supports this network on this machine"),
        Row(EAGER, lambda x, t: unet(x, t).sample),
        Row(DIFFUSERS, lambda x, t: theirs(x, t).sample),
        Row(DIFFUSERS_NHWC, lambda x, t: theirs_nhwc(x.to(memory_format=torch.channels_last), t).sample),
    ]
    rows += [batch_row(COMPILED, compiled_run, theirs, x)] if compiled else []
    rows += bf16_rows(unet, theirs) if bf16 else []
    return [
        *rows,
        batch_row(OPENVINO, openvino_run, theirs, x),
        batch_row(OPENVINO_DEFAULT, functools.partial(openvino_run, precision=None), theirs, x),
        batch_row(ONNX, onnx_run, unet, x),
    ]


def compare(rows: list[Row], x: Tensor) -> None:
    """Set the rows' errors, relative to the largest value of the prediction.

    Raises:
        SystemExit: if the error of a row is above `TOLERANCE`, or `BF16_TOLERANCE`.
    """
    runs = {row.name: row.run for row in rows if row.run}
    errors: dict[str, list[Tensor]] = {name: [] for name in runs}
    for t in (torch.tensor(999), torch.tensor(500), torch.tensor(0), torch.linspace(0, 999, len(x)).long()):
        expected = runs[EAGER](x, t).clone()
        for name, run in runs.items():
            errors[name].append((run(x, t) - expected).abs().max() / expected.abs().max())
    for row in rows:
        if row.run and row.name != EAGER:
            row.error = float(torch.stack(errors[row.name]).max())  # PyTorch's max() propagates NaN.
            allowed = BF16_TOLERANCE if row.name in ROUNDED else TOLERANCE
            if not row.error <= allowed:
                raise SystemExit(f"{row.name}, batch {len(x)}: off by {row.error:.1e}; {allowed:g} is allowed")


def measure(rows: list[Row], x: Tensor, rounds: int) -> None:
    """Set the rows' seconds per evaluation, one value per round."""
    timesteps = torch.linspace(999, 0, 20).long()

    def timed(run: Run, first: int, count: int) -> float:
        started = time.perf_counter()
        for index in range(first, first + count):
            run(x, timesteps[index % len(timesteps)])
        return (time.perf_counter() - started) / count

    # The round that is dropped sets how many evaluations the others time.
    counts = {
        row.name: math.ceil(MIN_ROUND_SECONDS / min(timed(row.run, i, 1) for i in (0, 1))) for row in rows if row.run
    }
    for number in range(rounds):
        for row in rows[:: 1 if number % 2 else -1]:
            if row.run:
                if counts[row.name] > 1:
                    timed(row.run, number, 1)
                row.seconds.append(timed(row.run, number + 1, counts[row.name]))


def numbers(name: str, batch: int, rows: list[Row]) -> list[dict[str, Any]]:
    """Return the rows with what follows from their medians."""
    medians = {row.name: statistics.median(row.seconds) for row in rows if row.seconds}
    openvino = [medians[name] for name in (OPENVINO, OPENVINO_DEFAULT) if name in medians]
    baselines = {
        "diffusers": min(medians[DIFFUSERS], medians[DIFFUSERS_NHWC]),
        "openvino": min(openvino, default=None),
    }
    results = []
    for row in rows:
        values = {"network": name, "batch": batch} | {key: value for key, value in vars(row).items() if key != "run"}
        if row.seconds:
            times = {"median": medians[row.name], "fastest": min(row.seconds), "slowest": max(row.seconds)}
            values |= {f"{key}_ms": 1000 * value for key, value in times.items()}
            values["images_per_second"] = batch / medians[row.name]
            values |= {f"times_{key}": other and other / medians[row.name] for key, other in baselines.items()}
        results.append(values)
    return results


LEGEND = (
    "Medians. `/ diffusers eager`: speed relative to the better of its two rows in float32. `/ OpenVINO`: to the "
    "better of its two. `error`: largest difference from `ddim eager`, relative to the largest value. `preparation`: "
    "of the engine, as above the table; conversion; compilation by the first call."
)
COLUMNS = {
    "ms per evaluation": ("median_ms", ",.1f"),
    "fastest": ("fastest_ms", ",.1f"),
    "slowest": ("slowest_ms", ",.1f"),
    "images/s": ("images_per_second", ",.2f"),
    "/ diffusers eager": ("times_diffusers", ".2f"),
    "/ OpenVINO": ("times_openvino", ".2f"),
    "error": ("error", ".0e"),
    "preparation, s": ("preparation", ".1f"),
    "peak MiB": ("peak_mib", ",.0f"),
}


def describe_machine() -> str:
    """Return a line on the processor, its load and the versions."""
    info = Path("/proc/cpuinfo")
    models = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")]
    versions = [f"ddim {ddim.__version__}", f"torch {torch.__version__}", f"diffusers {diffusers.__version__}"]
    peers = [name for name in ("openvino", "onnxruntime") if importlib.util.find_spec(name)]
    versions += [f"{name} {metadata.version(name)}" for name in peers]
    return (
        f"{next(iter(models), platform.machine())}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} "
        f"threads, load before the run {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, "
        f"{', '.join(versions)}"
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot images/s relative to the better eager row of `diffusers`, a group of bars per network and batch."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["seconds"]]
    names = list(dict.fromkeys(row["name"] for row in rows))
    # A bar has height 1, as the gap between groups.
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(f"{row['network']}, batch {row['batch']}", []).append(index + len(groups))
    positions = [position for group in groups.values() for position in group]
    figure = Figure(figsize=(6.4, 1 + 0.16 * positions[-1]), layout="constrained")
    axes = figure.subplots()
    for name in names:
        lengths = {p: row["times_diffusers"] for p, row in zip(positions, rows, strict=True) if row["name"] == name}
        bars = axes.barh(list(lengths), list(lengths.values()), height=0.9, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.set_yticks([statistics.mean(group) for group in groups.values()], list(groups), fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.set_xlabel("images/s relative to diffusers eager, the better of its rows", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, fontsize=7, frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)


@torch.no_grad()
def measure_network(name: str, folder: Path, options: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """Measure a network; return its section of the report, and its rows."""
    unet, saved = make_unet(name), save_pipeline(name, folder)
    # The first of the two processes may compile.
    prepared, first = [run_script(PREPARE_SCRIPT, saved / "unet") for _ in range(2)][-1]
    engine = get_engine(unet)
    size, channels = unet.config.sample_size, unet.config.in_channels
    results: list[dict[str, Any]] = []
    for batch in options.batches or BATCHES[name]:
        print(f"{name}, batch {batch}", file=sys.stderr)
        x = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))
        rows = make_rows(unet, engine, prepared, x, options.compile, options.bf16)
        compare(rows, x)
        measure(rows, x, min(options.rounds, MAX_ROUNDS.get(name, options.rounds)))
        for row in rows:
            if options.memory and row.name in SAMPLE_SCRIPTS:
                peaks = [run_script(SAMPLE_SCRIPTS[row.name], saved, batch)[0] for _ in range(MEMORY_PROCESSES)]
                row.peak_mib = statistics.median(peaks) / 1024
        results += numbers(name, batch, rows)
    parameters = sum(p.numel() for p in unet.parameters()) / 1e6
    text = (
        f"## {name}: {parameters:.1f} million parameters, {channels}x{size}x{size}\n\nPreparation in a new process "
        f"whose kernels are cached: {prepared:.2f} s, with the first evaluation {first:.2f} s."
    )
    return f"{text}\n\n{markdown_table(results, {'batch': 'batch', 'row': 'name'}, COLUMNS)}", results


def main() -> None:
    """Measure the networks; print the report and write it to the folder `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="networks to measure")
    parser.add_argument("--batches", type=int, nargs="+", help="batch sizes of all networks")
    parser.add_argument("--rounds", type=int, default=9, help="rounds after a warm-up (at most 3 for lsun)")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile, which takes minutes")
    parser.add_argument("--bf16", action="store_true", help="also measure both libraries in bfloat16")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure memory")
    parser.add_argument("--out", type=Path, help="a folder for speed.md, speed.json and speed.png")
    options = parser.parse_args()
    host = describe_machine()
    report, rows = f"# Network evaluation\n\n{host}\n\n{LEGEND}\n", []
    print(report)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.networks:
            text, results = measure_network(name, Path(folder), options)
            print(f"{text}\n", flush=True)
            report += f"\n{text}\n"
            rows += results
    if options.out is not None:
        write_files(options.out, {"speed.md": report, "speed.json": to_json({"machine": host, "rows": rows})})
        plot(rows, options.out / "speed.png")


if __name__ == "__main__":
    main()
