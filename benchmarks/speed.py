"""Time and memory of a network evaluation, which is what a step of sampling costs, beside `diffusers` and OpenVINO.

    python -m benchmarks.speed [--networks cifar10 mnist lsun] [--batches 1 8] [--compile] [--out benchmarks/results]

- ddim: the engine, `ddim.engine.get_engine(unet)`; ddim eager: `UNet2DModel` itself.
- diffusers eager: its `UNet2DModel` with the same weights, in either memory format.
- diffusers compiled, with `--compile`: `torch.compile`, the weights frozen into it, anew for each batch size.
- OpenVINO, where it can be imported: the network of `diffusers`, converted for each batch size, float32.

Before timing, every row is compared with ddim eager, at single timesteps and at a different one for each image; a row
that is off by more than 1e-3 of the largest number ends the run with status 1.

A round times every row once, forwards and backwards in turn, so that a machine whose speed drifts treats all alike; the
first one is dropped. Short evaluations are repeated, after one that is not timed: the threads of the row before may
still be spinning. Set OMP_NUM_THREADS for another number of threads.

Memory is the largest resident size of a process that loads the saved pipeline and paints a batch in 2 steps, the median
of three: allocators waste more at some times than at others. It is read from /proc, since `ru_maxrss` begins with the
size of the process that started it.
"""

from __future__ import annotations

import argparse
import copy
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
from benchmarks.tables import table, write_files
from ddim.engine import get_engine
from ddim.engine.base import EagerEngine
from ddim.io.atomic import atomic_write
from ddim.io.config import to_json

BATCHES = {"cifar10": (1, 8, 32), "mnist": (1, 16, 32), "lsun": (1,)}
MOST_ROUNDS = {"lsun": 3}
"""Of networks that take seconds an evaluation."""

PROCESSES = 3
"""Whose memory is looked at."""
LEAST = 0.25
"""Seconds that a row is timed for in a round."""

TOLERANCE = 1e-3
OURS, EAGER, PEER, PEER_NHWC = "ddim", "ddim eager", "diffusers eager", "diffusers eager, channels_last"
COMPILED, OPENVINO = "diffusers compiled", "OpenVINO"

Run = Callable[[Tensor, Tensor], Tensor]
"""A sample (N, C, H, W) and a timestep () or (N,) -> the prediction."""

PAINT = """
import sys
from {library} import DDIMPipeline
pipe = DDIMPipeline.from_pretrained(sys.argv[1]{arguments})
{change}
pipe.set_progress_bar_config(disable=True)
pipe(batch_size=int(sys.argv[2]), num_inference_steps=2)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
NHWC = "import torch\npipe.unet.to(memory_format=torch.channels_last)"
PAINTERS = {
    OURS: PAINT.format(library="ddim", arguments="", change=""),
    EAGER: PAINT.format(library="ddim", arguments=', engine="eager"', change=""),
    PEER: PAINT.format(library="diffusers", arguments="", change=""),
    PEER_NHWC: PAINT.format(library="diffusers", arguments="", change=NHWC),
}

PREPARE = """
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
    """A way to evaluate a network, and what was found."""

    name: str
    run: Run | None = None
    preparation: float | None = None
    why_not: str = ""
    error: float | None = None
    seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None


def child(script: str, *arguments: Any) -> list[float]:
    """The numbers that a process of its own prints."""
    process = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(process.stderr)
    return [float(word) for word in process.stdout.split()]


def compiled_run(peer: Any, x: Tensor, t: Tensor) -> Run:
    torch._dynamo.reset()
    network = torch.compile(peer, dynamic=False, options={"freezing": True})
    network(x, t)
    return lambda x, t: network(x, t.expand(len(x))).sample


def openvino_run(peer: Any, x: Tensor, t: Tensor) -> Run:
    import openvino as ov

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = peer

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.network(x, t, return_dict=False)[0]

    shapes = [ov.PartialShape(list(tensor.shape)) for tensor in (x, t)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Each check of a shape is one, and shapes are fixed.
        model = ov.convert_model(Network().eval(), example_input=(x, t), input=shapes)
    threads = torch.get_num_threads()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    network = ov.Core().compile_model(model, "CPU", settings)
    return lambda x, t: torch.from_numpy(network([x.numpy(), t.expand(len(x)).contiguous().numpy()])[0])


def batch_row(name: str, make: Callable[[Any, Tensor, Tensor], Run], peer: Any, x: Tensor) -> Row:
    """A row that is made for one batch size; what keeps it from being made is told in the table."""
    started = time.perf_counter()
    try:
        run = make(peer, x, torch.full((len(x),), 999))
    except Exception as error:
        return Row(name, why_not=next(iter(str(error).splitlines()), type(error).__name__))
    return Row(name, run, time.perf_counter() - started)


def make_rows(unet: ddim.UNet2DModel, engine: Any, prepared: float, x: Tensor, compiled: bool) -> list[Row]:
    peer = diffusers.UNet2DModel(**unet.config).eval()
    peer.load_state_dict(unet.state_dict())
    peer_nhwc: Any = copy.deepcopy(peer).to(memory_format=torch.channels_last)
    ours = Row(OURS, lambda x, t: engine.predict(x, t), prepared)
    rows = [
        ours if not isinstance(engine, EagerEngine) else Row(OURS, why_not="there is no engine here"),
        Row(EAGER, lambda x, t: unet(x, t).sample),
        Row(PEER, lambda x, t: peer(x, t).sample),
        Row(PEER_NHWC, lambda x, t: peer_nhwc(x.to(memory_format=torch.channels_last), t).sample),
    ]
    rows += [batch_row(COMPILED, compiled_run, peer, x)] if compiled else []
    return [*rows, batch_row(OPENVINO, openvino_run, peer, x)]


def compare(rows: list[Row], x: Tensor) -> None:
    """Set the rows' errors, relative to the largest number of the prediction.

    Raises:
        SystemExit: naming a row that is off.
    """
    runs = {row.name: row.run for row in rows if row.run}
    errors: dict[str, list[Tensor]] = {name: [] for name in runs}
    for t in (torch.tensor(999), torch.tensor(500), torch.tensor(0), torch.linspace(0, 999, len(x)).long()):
        right = runs[EAGER](x, t).clone()
        for name, run in runs.items():
            errors[name].append((run(x, t) - right).abs().max() / right.abs().max())
    for row in rows:
        if row.run and row.name != EAGER:
            row.error = float(torch.stack(errors[row.name]).max())  # max() of PyTorch keeps NaN.
            if not row.error <= TOLERANCE:
                raise SystemExit(f"{row.name}, batch {len(x)}: off by {row.error:.1e}; {TOLERANCE:g} is allowed")


def measure(rows: list[Row], x: Tensor, rounds: int) -> None:
    """Set the rows' seconds an evaluation, one number a round."""
    timesteps = torch.linspace(999, 0, 20).long()

    def timed(run: Run, first: int, count: int) -> float:
        started = time.perf_counter()
        for index in range(first, first + count):
            run(x, timesteps[index % len(timesteps)])
        return (time.perf_counter() - started) / count

    # The round that is dropped: it tells how many evaluations are to be timed in the others.
    counts = {row.name: math.ceil(LEAST / min(timed(row.run, i, 1) for i in (0, 1))) for row in rows if row.run}
    for number in range(rounds):
        for row in rows[:: 1 if number % 2 else -1]:
            if row.run:
                if counts[row.name] > 1:
                    timed(row.run, number, 1)
                row.seconds.append(timed(row.run, number + 1, counts[row.name]))


def numbers(name: str, batch: int, rows: list[Row]) -> list[dict[str, Any]]:
    """The rows with what follows from their medians."""
    medians = {row.name: statistics.median(row.seconds) for row in rows if row.seconds}
    peers = {"diffusers": min(medians[PEER], medians[PEER_NHWC]), "openvino": medians.get(OPENVINO)}
    found = []
    for row in rows:
        values = {"network": name, "batch": batch} | {key: value for key, value in vars(row).items() if key != "run"}
        if row.seconds:
            times = {"median": medians[row.name], "fastest": min(row.seconds), "slowest": max(row.seconds)}
            values |= {f"{key}_ms": 1000 * value for key, value in times.items()}
            values["images_per_second"] = batch / medians[row.name]
            values |= {f"times_{peer}": other and other / medians[row.name] for peer, other in peers.items()}
        found.append(values)
    return found


LEGEND = (
    "Medians. `/ diffusers eager`: how many times as fast as the better of its two rows. `error`: largest difference "
    "from `ddim eager`, relative to the largest number. `preparation`: `get_engine` as above the table; conversion; "
    "compilation by the first call."
)
COLUMNS = {
    "ms an evaluation": ("median_ms", ",.1f"),
    "fastest": ("fastest_ms", ",.1f"),
    "slowest": ("slowest_ms", ",.1f"),
    "images/s": ("images_per_second", ",.2f"),
    "/ diffusers eager": ("times_diffusers", ".2f"),
    "/ OpenVINO": ("times_openvino", ".2f"),
    "error": ("error", ".0e"),
    "preparation, s": ("preparation", ".1f"),
    "peak MiB": ("peak_mib", ",.0f"),
}


def machine() -> str:
    info = Path("/proc/cpuinfo")
    models = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")]
    versions = [f"ddim {ddim.__version__}", f"torch {torch.__version__}", f"diffusers {diffusers.__version__}"]
    versions += [f"openvino {metadata.version('openvino')}"] if importlib.util.find_spec("openvino") else []
    return (
        f"{next(iter(models), platform.machine())}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} "
        f"threads, load before the run {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, "
        f"{', '.join(versions)}"
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of images/s relative to the better eager row of `diffusers`, a group for each network and batch."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["seconds"]]
    names = list(dict.fromkeys(row["name"] for row in rows))
    # A bar is 1 high, and 1 lies between groups.
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(f"{row['network']}, batch {row['batch']}", []).append(index + len(groups))
    places = [place for group in groups.values() for place in group]
    figure = Figure(figsize=(6.4, 1 + 0.16 * places[-1]), layout="constrained")
    axes = figure.subplots()
    for name in names:
        found = {p: row["times_diffusers"] for p, row in zip(places, rows, strict=True) if row["name"] == name}
        bars = axes.barh(list(found), list(found.values()), height=0.9, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.set_yticks([statistics.mean(group) for group in groups.values()], list(groups), fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("images/s relative to diffusers eager, the better of its rows", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, fontsize=7, frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)


@torch.no_grad()
def measure_network(name: str, folder: Path, options: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """A network's part of the report, and its rows."""
    unet, saved = make_unet(name), save_pipeline(name, folder)
    # The first of the two processes may have to compile.
    prepared, first = [child(PREPARE, saved / "unet") for _ in range(2)][-1]
    engine = get_engine(unet)
    size, channels = unet.config.sample_size, unet.config.in_channels
    found: list[dict[str, Any]] = []
    for batch in options.batches or BATCHES[name]:
        print(f"{name}, batch {batch}", file=sys.stderr)
        x = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))
        rows = make_rows(unet, engine, prepared, x, options.compile)
        compare(rows, x)
        measure(rows, x, min(options.rounds, MOST_ROUNDS.get(name, options.rounds)))
        for row in rows:
            if options.memory and row.name in PAINTERS:
                peaks = [child(PAINTERS[row.name], saved, batch)[0] for _ in range(PROCESSES)]
                row.peak_mib = statistics.median(peaks) / 1024
        found += numbers(name, batch, rows)
    parameters = sum(p.numel() for p in unet.parameters()) / 1e6
    text = (
        f"## {name}: {parameters:.1f} million parameters, {channels}x{size}x{size}\n\n`get_engine` in a new process "
        f"whose compiled kernels are cached: {prepared:.2f} s, with the first evaluation {first:.2f} s."
    )
    return f"{text}\n\n{table(found, {'batch': 'batch', 'row': 'name'}, COLUMNS)}", found


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of a network evaluation.")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batches", type=int, nargs="+", help="for all networks, in place of their own")
    parser.add_argument("--rounds", type=int, default=9, help="that count; lsun gets 3 at most")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile, which takes minutes")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="measure no memory")
    parser.add_argument("--out", type=Path, help="a folder for speed.md, speed.json and speed.png")
    options = parser.parse_args()
    host = machine()
    report, rows = f"# A network evaluation\n\n{host}\n\n{LEGEND}\n", []
    print(report)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.networks:
            text, found = measure_network(name, Path(folder), options)
            print(f"{text}\n", flush=True)
            report += f"\n{text}\n"
            rows += found
    if options.out is not None:
        write_files(options.out, {"speed.md": report, "speed.json": to_json({"machine": host, "rows": rows})})
        plot(rows, options.out / "speed.png")


if __name__ == "__main__":
    main()
