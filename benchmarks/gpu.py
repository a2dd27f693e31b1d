"""Sampling on a GPU, checked and timed beside `diffusers`: the architecture for CIFAR-10 with random weights.

    python -m benchmarks.gpu [--batches 1 16 256 1024] [--dtypes float32 TF32 bf16] [--compile] [--out FOLDER]

First, in float32 without TF32, ddim's engine and `diffusers` are compared with the network as it is: predictions at
several timesteps, and pictures after 50 steps. A difference ends the run with status 1. Then whole sampling runs:

- ddim: `DDIMPipeline(unet, scheduler)`, on a GPU the engine of CUDA graphs; ddim eager: with `engine="eager"`;
  ddim compile, with `--compile`: with `engine="compile"`.
- diffusers as documented: its `DDIMPipeline`, the network moved to the device and the dtype.
- diffusers tuned: channels_last, `torch.compile(mode="reduce-overhead", fullgraph=True)`, for each batch size anew, and
  timesteps moved to the device before they enter it, since an input on the CPU would keep it from using CUDA graphs.

Repeats of the rows are interleaved. What is not compiled comes first. Then launches are counted: not before, because a
profiler may slow what is launched after it. Compiled rows come last, each interleaved with `ddim`. When `--minutes` are
over, 8 unless given, what is missing is not measured; with `--dtypes` another run can measure it.

`--cpu-try` runs all but what needs CUDA on a CPU with a small network, to find out whether this script works.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.profiler import ProfilerActivity, profile

import ddim
from benchmarks.networks import make_unet
from benchmarks.tables import table, write_files
from ddim.engine import get_engine
from ddim.engine.base import EagerEngine
from ddim.info import count_flop
from ddim.io.config import to_json

DTYPES = {"float32": (torch.float32, False), "TF32": (torch.float32, True), "bf16": (torch.bfloat16, False)}
"""The dtype of the weights, and whether convolutions and products of float32 may round to TF32."""

OURS, EAGER, COMPILED = "ddim", "ddim eager", "ddim compile"
PEER, TUNED = "diffusers as documented", "diffusers tuned"
ENGINES = {OURS: "auto", EAGER: "eager", COMPILED: "compile"}

TIMESTEPS = (999, 700, 400, 100, 0)
TOLERANCE, PIXELS = 1e-4, 0.999
"""Largest difference of predictions, relative to the largest number; share of pixels that are within 1/255."""

WARM_UP = 4
"""Steps: the third evaluation is the first that only replays what `reduce-overhead` has recorded."""

LONGEST, LEAST_STEPS = 1.0, 3
"""Seconds to which a run is cut, as long as so many steps are left."""

MARGIN = 30
"""Seconds for what comes before and after the measurements."""

LAUNCH = re.compile("(cuda|cu)(LaunchKernel|LaunchCooperativeKernel|GraphLaunch)")
"""The calls that start work on the device, as the profiler names them; copies are not among them."""


class OutOfTime(BaseException):
    """Not an `Exception`: those are caught where one row shall not end the others."""


@dataclass
class Row:
    """A way to sample, a batch size and a dtype, and what was found."""

    name: str
    batch: int
    dtype: str
    why_not: str = "no time left"
    preparation: float | None = None
    peak_mib: float | None = None
    launches: float | None = None
    steps: int | None = None
    seconds: list[float] = field(default_factory=list)


class Bench:
    """The networks, and the rows by batch size and dtype."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.cuda = options, not options.cpu_try
        self.device = "cuda" if self.cuda else "cpu"
        self.synchronize: Any = torch.cuda.synchronize if self.cuda else lambda: None
        self.unet = make_unet("cifar10" if self.cuda else "mnist")
        self.peer = diffusers.UNet2DModel(**self.unet.config).eval()
        self.peer.load_state_dict(self.unet.state_dict())
        self.machine, self.flop, self.check, self.matmul = machine(self.cuda), count_flop(self.unet), "", {}
        names = [OURS, EAGER, *([COMPILED] if options.compile else []), PEER, TUNED]
        settings = [(batch, dtype) for batch in options.batches for dtype in options.dtypes]
        self.groups = {setting: {name: Row(name, *setting) for name in names} for setting in settings}

    def timed(self, run: Callable[[], Any]) -> float:
        self.synchronize()
        started = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - started

    def pipeline(self, name: str, dtype: torch.dtype) -> Any:
        if name in ENGINES:
            unet = copy.deepcopy(self.unet).to(self.device, dtype)
            pipe: Any = ddim.DDIMPipeline(unet, ddim.DDIMScheduler(), engine=ENGINES[name])
        else:
            peer: Any = copy.deepcopy(self.peer).to(self.device, dtype)
            if name == TUNED:
                peer.to(memory_format=torch.channels_last)
                network = torch.compile(peer.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
                peer.forward = lambda sample, timestep: network(sample, timestep.to(sample.device))
            pipe = diffusers.DDIMPipeline(peer, diffusers.DDIMScheduler())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def painter(self, name: str, batch: int, dtype: torch.dtype, output_type: str = "pt") -> Callable[[int], Any]:
        """What samples in so many steps; pictures stay on the device: `diffusers` makes no NumPy of those in bf16."""
        pipe = self.pipeline(name, dtype)

        def paint(steps: int) -> Any:
            generator = torch.Generator(self.device).manual_seed(0)
            return pipe(batch, generator, num_inference_steps=steps, output_type=output_type).images

        return paint

    def compare(self) -> None:
        """SystemExit unless the engine and `diffusers` agree with the network as it is."""
        use_tf32(False)
        ours, eager, peer = (self.pipeline(name, torch.float32).unet for name in (OURS, EAGER, PEER))
        engine = get_engine(ours)
        if isinstance(engine, EagerEngine):
            raise SystemExit("there is no engine for this network on this machine")
        config = self.unet.config
        torch.manual_seed(0)
        x = torch.randn(4, config.in_channels, config.sample_size, config.sample_size, device=self.device)
        batch, steps = (16, 50) if self.cuda else (2, 2)
        right = self.painter(EAGER, batch, torch.float32, "np")(steps)
        said = []
        for name, predict in {OURS: engine.predict, PEER: EagerEngine(peer).predict}.items():
            errors = []
            for timestep in torch.tensor(TIMESTEPS, device=self.device):
                expected = eager(x, timestep).sample
                errors.append((predict(x, timestep) - expected).abs().max() / expected.abs().max())
            worst = float(torch.stack(errors).max())  # max() of PyTorch keeps NaN.
            if not worst <= TOLERANCE:
                raise SystemExit(f"{name}: predictions are off by {worst:.1e}; {TOLERANCE:g} is allowed")
            apart = abs(self.painter(name, batch, torch.float32, "np")(steps) - right)
            share = float((apart <= 1 / 255).mean())
            if not share >= PIXELS:
                raise SystemExit(f"{name}: after {steps} steps only {share:.2%} of the pixels are within 1/255")
            said.append(f"{name} by {worst:.1e} and {apart.max() * 255:.2g}/255, {share:.2%} within 1/255")
        self.check = (
            f"Beside ddim eager in float32, predictions, relative to the largest number, and {batch} pictures after "
            f"{steps} steps are off at most: {'; '.join(said)}."
        )

    def measure_matmul(self) -> None:
        n = 8192 if self.cuda else 256
        for name in self.options.dtypes:
            dtype, tf32 = DTYPES[name]
            use_tf32(tf32)
            a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
            times = [self.timed(lambda a=a, b=b: [a @ b for _ in range(5)]) / 5 for _ in range(5)]
            self.matmul[name] = 2 * n**3 / min(times)

    def prepare(self, row: Row) -> Callable[[int], Any] | None:
        """Build and warm up; what keeps a row from running is told in the table."""
        print(f"batch {row.batch}, {row.dtype}: {row.name}", file=sys.stderr, flush=True)
        gc.collect()
        before = 0
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        try:
            paint = self.painter(row.name, row.batch, DTYPES[row.dtype][0])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Compilers give advice, on TF32, say.
                paint(WARM_UP)
            self.synchronize()
        except Exception as error:
            row.why_not = next(iter(str(error).splitlines()), type(error).__name__).replace("|", "/")
            return None
        if not row.seconds:
            row.preparation = time.perf_counter() - started
            row.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20 if self.cuda else None
        return paint

    def measure(self, group: list[Row]) -> dict[str, Callable[[int], Any]]:
        """Set the rows' seconds a step, one number a repeat."""
        use_tf32(DTYPES[group[0].dtype][1])
        paints = [(row, paint) for row in group if (paint := self.prepare(row))]
        if not paints:
            return {}
        slowest = max(self.timed(lambda paint=paint: paint(2)) / 2 for _, paint in paints)
        steps = min(self.options.steps, max(LEAST_STEPS, math.ceil(LONGEST / slowest)))
        steps = next((row.steps for row in group if row.steps), steps)  # As in the first pass.
        for number in range(self.options.repeats):
            for row, paint in paints[:: -1 if number % 2 else 1]:
                row.steps = steps
                row.seconds.append(self.timed(lambda paint=paint: paint(steps)) / steps)
        return {row.name: paint for row, paint in paints}

    def count_launches(self, row: Row, paint: Callable[[int], Any] | None) -> None:
        """Between runs of 3 steps and of 1, so that what a run does once is not counted."""
        if paint is None or not self.cuda:
            return
        counts = []
        for steps in (1, 3):
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                paint(steps)
                self.synchronize()
            counts.append(sum(event.count for event in profiler.key_averages() if LAUNCH.match(event.key)))
        row.launches = (counts[1] - counts[0]) / 2 if counts[1] else None

    def run(self) -> None:
        self.compare()
        print(self.check, file=sys.stderr, flush=True)
        self.measure_matmul()
        plain = [[group[name] for name in (OURS, EAGER, PEER)] for group in self.groups.values()]
        for rows in plain:
            self.measure(rows)
            self.write()
        for row in [row for rows in plain for row in rows if row.seconds and self.cuda]:
            use_tf32(DTYPES[row.dtype][1])
            self.count_launches(row, self.prepare(row))
        for dtype in reversed(self.options.dtypes):  # The fastest first: time may not last for all.
            for batch in self.options.batches:
                group = self.groups[batch, dtype]
                for row in [group[name] for name in (TUNED, COMPILED) if name in group]:
                    paints = self.measure([group[OURS], row])
                    self.count_launches(row, paints.pop(row.name, None))
                    del paints
                    torch._dynamo.reset()  # Gives back the recorded graphs' memory too.
                    self.write()

    def numbers(self) -> list[dict[str, Any]]:
        """The rows with what follows from their medians."""
        rows = [row for group in self.groups.values() for row in group.values()]
        medians = {(r.name, r.batch, r.dtype): statistics.median(r.seconds) for r in rows if r.seconds}
        found = []
        for row in rows:
            values = dict(vars(row))
            if row.seconds:
                median = medians[row.name, row.batch, row.dtype]
                rate = self.flop * row.batch / median
                values |= {"ms": 1000 * median, "images_per_second": row.batch / median / self.options.steps}
                values |= {"tflops": rate / 1e12, "of_matmul": rate / self.matmul[row.dtype], "why_not": ""}
                peers = {"float32": (PEER, "float32"), "documented": (PEER, row.dtype), "tuned": (TUNED, row.dtype)}
                others = {key: medians.get((name, row.batch, dtype)) for key, (name, dtype) in peers.items()}
                values |= {f"times_{key}": other and other / median for key, other in others.items()}
            found.append(values)
        return found

    def report(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in self.matmul.items())
        title = "Sampling on a GPU" if self.cuda else "Sampling on a CPU, to try the script"
        text = (
            f"# {title}\n\n{self.machine}\n\n{self.unet.num_parameters() / 1e6:.1f} million parameters, "
            f"{self.flop / 1e9:.1f} GFLOP an image and step. Matrix products, TFLOP/s: {rates}.\n\n{self.check}\n\n"
            f"{LEGEND.format(steps=self.options.steps)}\n"
        )
        columns = {head: column for head, column in COLUMNS.items() if self.cuda or head not in CUDA_ONLY}
        for batch in self.options.batches:
            rows = [row for row in self.numbers() if row["batch"] == batch]
            text += f"\n## Batch {batch}\n\n{table(rows, {'dtype': 'dtype', 'row': 'name'}, columns)}\n"
        return text

    def write(self) -> None:
        if self.options.out is not None:
            found = {"machine": self.machine, "check": self.check, "matmul": self.matmul, "flop": self.flop}
            contents = {"gpu.md": self.report(), "gpu.json": to_json(found | {"rows": self.numbers()})}
            write_files(self.options.out, contents)


LEGEND = (
    "Medians of whole sampling runs, whose fixed costs are shared out among the steps; long runs are cut, to what "
    "`steps run` says. `images/s`: in {steps} steps. `/ float32`, `/ documented`, `/ tuned`: how many times as fast "
    "as `diffusers as documented` in float32, as the same in the row's dtype, as `diffusers tuned` in the row's dtype. "
    "float32 is without TF32; PyTorch's default, TF32 in convolutions only, is near TF32. `launches`: of kernels and "
    "graphs, a step. `of matmul`: of the rate of large matrix products in that dtype. `peak MiB`: allocated at most "
    "from building a row to the end of its first run, a compiler's trials included. `preparation`: the time of that."
)
COLUMNS = {
    "ms a step": ("ms", ",.3f"),
    "images/s": ("images_per_second", ",.2f"),
    "/ float32": ("times_float32", ".2f"),
    "/ documented": ("times_documented", ".2f"),
    "/ tuned": ("times_tuned", ".2f"),
    "launches": ("launches", ",.0f"),
    "TFLOP/s": ("tflops", ",.2f"),
    "of matmul": ("of_matmul", ".0%"),
    "peak MiB": ("peak_mib", ",.0f"),
    "preparation, s": ("preparation", ".1f"),
    "steps run": ("steps", "d"),
}
CUDA_ONLY = ("launches", "peak MiB")


def use_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def machine(cuda: bool) -> str:
    versions = f"ddim {ddim.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    if not cuda:
        return f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}"
    failed, output = subprocess.getstatusoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    driver = "unknown" if failed else output.partition("\n")[0]
    libraries = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return f"{torch.cuda.get_device_name()}, driver {driver}, {libraries}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Sampling on a GPU, beside diffusers.")
    parser.add_argument("--batches", type=int, nargs="+", help="1 16 256 1024 unless given")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--steps", type=int, help="of a whole run, 50 unless given; long runs are cut")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=8, help="after which nothing is measured any more")
    parser.add_argument("--compile", action="store_true", help='measure engine="compile" too, which takes minutes')
    parser.add_argument("--cpu-try", action="store_true", help="on a CPU, with a small network, to try the script")
    parser.add_argument("--out", type=Path, help="a folder for gpu.md and gpu.json")
    options = parser.parse_args()
    if not options.cpu_try and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --cpu-try tries the script on a CPU")
    options.batches = options.batches or ([1, 2] if options.cpu_try else [1, 16, 256, 1024])
    options.steps = options.steps or (2 if options.cpu_try else 50)

    def stop(*_: Any) -> None:
        raise OutOfTime

    diffusers.logging.set_verbosity_error()  # It warns of networks that are moved to a dtype.
    bench = Bench(options)
    signal.signal(signal.SIGALRM, stop)
    # Again each second: what is raised while an object is deleted is lost.
    signal.setitimer(signal.ITIMER_REAL, max(1, 60 * options.minutes - MARGIN), 1)
    with suppress(OutOfTime), torch.no_grad():
        bench.run()
    signal.setitimer(signal.ITIMER_REAL, 0)
    if not bench.check:
        raise SystemExit("there was no time left to compare the engine with the network")
    bench.write()
    print(bench.report())


if __name__ == "__main__":
    main()
