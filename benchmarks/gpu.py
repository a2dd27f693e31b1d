"""Sampling on a GPU, compared and timed beside `diffusers`: the CIFAR-10 architecture with random weights.

    python -m benchmarks.gpu [--batches 256 1 16 1024] [--dtypes bf16 float32 TF32] [--compile] [--out FOLDER]
    python -m benchmarks.gpu --minutes 2.5 --batches 256 1 --dtypes bf16 float32 --repeats 3 --training

First, in float32 without TF32, ddim's engine and `diffusers` are compared with the network as it is: predictions at
several timesteps, and images after 50 steps. A difference ends the run with status 1. Then whole sampling runs:

- ddim: `DDIMPipeline(unet, scheduler)`, on a GPU the engine of CUDA graphs; ddim eager: with `engine="eager"`;
  ddim compile, with `--compile`: with `engine="compile"`.
- diffusers as documented: its `DDIMPipeline`, with the network moved to the device and the dtype.
- diffusers tuned: channels_last, `torch.compile(mode="max-autotune", fullgraph=True)` for each batch size, and
  timesteps moved to the device first, because an input on the CPU prevents CUDA graphs.

Batches and dtypes are measured in the order in which they are given, and written to `--out` after each. Repeats of the
rows are interleaved. Rows that are not compiled come first, then those that are, each interleaved with `ddim`. With
`--training`, the rate of `ddim train` follows the former, and that with `compile=true` the first of the latter.
Launches are counted last: a profiler may slow what is launched after it. After `--minutes` (default 8) nothing more is
measured; another run can measure the rest.

`--cpu-try` runs everything that does not need CUDA on a CPU with a small network, to test this script.
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
import tempfile
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
from benchmarks.report import markdown_table, write_files
from ddim.data.dataset import CachedImageDataset
from ddim.engine import get_engine
from ddim.engine.base import EagerEngine
from ddim.info import count_flop
from ddim.io.json_files import to_json
from ddim.training.config import load_config
from ddim.training.progress import Progress
from ddim.training.run import start_processes
from ddim.training.trainer import Trainer

DTYPES = {"float32": (torch.float32, False), "TF32": (torch.float32, True), "bf16": (torch.bfloat16, False)}
"""The dtype of the weights, and whether convolutions and products of float32 may round to TF32."""

DDIM, EAGER, COMPILED = "ddim", "ddim eager", "ddim compile"
DIFFUSERS, TUNED = "diffusers as documented", "diffusers tuned"
ENGINES = {DDIM: "auto", EAGER: "eager", COMPILED: "compile"}

TIMESTEPS = (999, 700, 400, 100, 0)
TOLERANCE, MIN_EQUAL_PIXELS = 1e-4, 0.999
"""Largest difference of predictions, relative to the largest value; share of pixels that must be within 1/255."""

WARM_UP_STEPS = 4
"""The third evaluation is the first that only replays what `max-autotune` has recorded."""

MAX_RUN_SECONDS, MIN_STEPS = 1.0, 3
"""Longer runs are cut to this time, but not to fewer steps."""

TRAINING_BATCH, TRAINING_WARM_UP, TRAINING_STEPS = 512, 12, 40
"""Images per training step, the steps before the clock starts, and the steps that are timed."""

MARGIN_SECONDS = 30
"""Time for what comes before and after the measurements."""

LAUNCH = re.compile("(cuda|cu)(LaunchKernel|LaunchCooperativeKernel|GraphLaunch)")
"""Calls that start work on the device, as the profiler names them, without copies."""


class OutOfTime(BaseException):
    """Raised at the time limit; not an `Exception`, because those end only their row."""


class Measured(Exception):
    """Raised to end a training run that has been timed, before it writes a checkpoint."""


@dataclass
class Row:
    """A method, a batch size and a dtype, and their measurements."""

    name: str
    batch: int
    dtype: str
    skip_reason: str = "no time left"
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
        self.diffusers_unet = diffusers.UNet2DModel(**self.unet.config).eval()
        self.diffusers_unet.load_state_dict(self.unet.state_dict())
        self.machine, self.flop, self.check, self.matmul = describe_machine(self.cuda), count_flop(self.unet), "", {}
        self.training: dict[str, float | str] = {}
        names = [DDIM, EAGER, *([COMPILED] if options.compile else []), DIFFUSERS, TUNED]
        settings = [(batch, dtype) for batch in options.batches for dtype in options.dtypes]
        self.groups = {setting: {name: Row(name, *setting) for name in names} for setting in settings}

    def timed(self, run: Callable[[], Any]) -> float:
        """Return the seconds that `run` takes."""
        self.synchronize()
        started = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - started

    def pipeline(self, name: str, dtype: torch.dtype) -> Any:
        """Build the pipeline of a row."""
        if name in ENGINES:
            unet = copy.deepcopy(self.unet).to(self.device, dtype)
            pipe: Any = ddim.DDIMPipeline(unet, ddim.DDIMScheduler(), engine=ENGINES[name])
        else:
            theirs: Any = copy.deepcopy(self.diffusers_unet).to(self.device, dtype)
            if name == TUNED:
                theirs.to(memory_format=torch.channels_last)
                network = torch.compile(theirs.forward, mode="max-autotune", fullgraph=True, dynamic=False)
                theirs.forward = lambda sample, timestep: network(sample, timestep.to(sample.device))
            pipe = diffusers.DDIMPipeline(theirs, diffusers.DDIMScheduler())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sample_fn(self, name: str, batch: int, dtype: torch.dtype, output_type: str = "pt") -> Callable[[int], Any]:
        """Return a function that samples in a given number of steps.

        Images stay on the device: `diffusers` does not convert bf16 images to NumPy.
        """
        pipe = self.pipeline(name, dtype)

        def run(steps: int) -> Any:
            generator = torch.Generator(self.device).manual_seed(0)
            return pipe(batch, generator, num_inference_steps=steps, output_type=output_type).images

        return run

    def compare(self) -> None:
        """Compare the engine and `diffusers` with the network as it is.

        Raises:
            SystemExit: if one of them differs.
        """
        use_tf32(False)
        ours, eager, theirs = (self.pipeline(name, torch.float32).unet for name in (DDIM, EAGER, DIFFUSERS))
        engine = get_engine(ours)
        if isinstance(engine, EagerEngine):
            raise SystemExit("no engine supports this network on this machine")
        config = self.unet.config
        torch.manual_seed(0)
        x = torch.randn(4, config.in_channels, config.sample_size, config.sample_size, device=self.device)
        batch, steps = (16, 50) if self.cuda else (2, 2)
        expected_images = self.sample_fn(EAGER, batch, torch.float32, "np")(steps)
        summaries = []
        for name, predict in {DDIM: engine.predict, DIFFUSERS: EagerEngine(theirs).predict}.items():
            errors = []
            for timestep in torch.tensor(TIMESTEPS, device=self.device):
                expected = eager(x, timestep).sample
                errors.append((predict(x, timestep) - expected).abs().max() / expected.abs().max())
            worst = float(torch.stack(errors).max())  # PyTorch's max() propagates NaN.
            if not worst <= TOLERANCE:
                raise SystemExit(f"{name}: predictions are off by {worst:.1e}; {TOLERANCE:g} is allowed")
            difference = abs(self.sample_fn(name, batch, torch.float32, "np")(steps) - expected_images)
            share = float((difference <= 1 / 255).mean())
            if not share >= MIN_EQUAL_PIXELS:
                raise SystemExit(f"{name}: after {steps} steps only {share:.2%} of the pixels are within 1/255")
            summaries.append(f"{name} by {worst:.1e} and {difference.max() * 255:.2g}/255, {share:.2%} within 1/255")
        self.check = (
            f"Beside ddim eager in float32, predictions, relative to the largest value, and {batch} images after "
            f"{steps} steps are off at most: {'; '.join(summaries)}."
        )

    def measure_matmul(self) -> None:
        """Measure the rate of large matrix products in each dtype."""
        n = 8192 if self.cuda else 256
        for name in self.options.dtypes:
            dtype, tf32 = DTYPES[name]
            use_tf32(tf32)
            a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
            times = [self.timed(lambda a=a, b=b: [a @ b for _ in range(5)]) / 5 for _ in range(5)]
            self.matmul[name] = 2 * n**3 / min(times)

    def prepare(self, row: Row) -> Callable[[int], Any] | None:
        """Build a row and warm it up; return its function, or `None` with the reason in the row."""
        print(f"batch {row.batch}, {row.dtype}: {row.name}", file=sys.stderr, flush=True)
        gc.collect()
        initial_bytes = 0
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            initial_bytes = torch.cuda.memory_allocated()
        started = time.perf_counter()
        try:
            run = self.sample_fn(row.name, row.batch, DTYPES[row.dtype][0])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Compilers give advice, for example on TF32.
                run(WARM_UP_STEPS)
            self.synchronize()
        except Exception as error:
            row.skip_reason = next(iter(str(error).splitlines()), type(error).__name__).replace("|", "/")
            return None
        if not row.seconds:
            row.preparation = time.perf_counter() - started
            row.peak_mib = (torch.cuda.max_memory_allocated() - initial_bytes) / 2**20 if self.cuda else None
        return run

    def measure(self, group: list[Row]) -> dict[str, Callable[[int], Any]]:
        """Set the rows' seconds per step, one value per repeat."""
        use_tf32(DTYPES[group[0].dtype][1])
        runs = [(row, run) for row in group if (run := self.prepare(row))]
        if not runs:
            return {}
        slowest = max(self.timed(lambda run=run: run(2)) / 2 for _, run in runs)
        steps = min(self.options.steps, max(MIN_STEPS, math.ceil(MAX_RUN_SECONDS / slowest)))
        steps = next((row.steps for row in group if row.steps), steps)  # As in the first pass.
        for number in range(self.options.repeats):
            for row, run in runs[:: -1 if number % 2 else 1]:
                row.steps = steps
                row.seconds.append(self.timed(lambda run=run: run(steps)) / steps)
        return {row.name: run for row, run in runs}

    def count_launches(self, row: Row, run: Callable[[int], Any] | None) -> None:
        """Set the row's launches per step: the difference of runs of 3 steps and of 1, without what a run does once."""
        if run is None or not self.cuda:
            return
        counts = []
        for steps in (1, 3):
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                run(steps)
                self.synchronize()
            counts.append(sum(event.count for event in profiler.key_averages() if LAUNCH.match(event.key)))
        row.launches = (counts[1] - counts[0]) / 2 if counts[1] else None

    def run(self) -> None:
        """Compare, then measure all rows, writing the report after each group."""
        self.compare()
        print(self.check, file=sys.stderr, flush=True)
        self.measure_matmul()
        plain = [[group[name] for name in (DDIM, EAGER, DIFFUSERS)] for group in self.groups.values()]
        for rows in plain:
            self.measure(rows)
            self.write()
        if self.options.training:
            self.measure_training(compiles=False)
        for number, group in enumerate(self.groups.values()):
            for row in [group[name] for name in (TUNED, COMPILED) if name in group]:
                runs = self.measure([group[DDIM], row])
                self.count_launches(row, runs.pop(row.name, None))
                del runs
                torch._dynamo.reset()  # Also frees the memory of recorded graphs.
                self.write()
            if self.options.training and number == 0:
                self.measure_training(compiles=True)
        for row in [row for rows in plain for row in rows if row.seconds and self.cuda]:
            use_tf32(DTYPES[row.dtype][1])
            self.count_launches(row, self.prepare(row))

    def measure_training(self, compiles: bool) -> None:
        """Measure the images per second of `ddim train` in bf16, with all that it does but writing files."""
        name = "ddim train, compile=true" if compiles else "ddim train"
        print(name, file=sys.stderr, flush=True)
        batch, warm_up, steps = (TRAINING_BATCH, TRAINING_WARM_UP, TRAINING_STEPS) if self.cuda else (8, 1, 1)
        overrides = {"data.source": "random", "batch_size": batch, "precision": "bf16", "compile": compiles}
        config = load_config("cifar10" if self.cuda else "mnist", overrides=overrides)
        size, channels = config.model["sample_size"], config.model["in_channels"]
        pixels = torch.randint(256, (4 * batch, channels, size, size), dtype=torch.uint8)
        dataset = CachedImageDataset(pixels)
        dataset.pixels = pixels.to(self.device)  # As with `data.on_device`.
        started = 0.0

        def after_step(progress: Progress) -> None:
            nonlocal started
            if progress.step in (warm_up, warm_up + steps):
                self.synchronize()
                if progress.step > warm_up:
                    self.training[name] = steps * batch / (time.perf_counter() - started)
                    raise Measured
                started = time.perf_counter()

        benchmark = torch.backends.cudnn.benchmark
        try:
            with tempfile.TemporaryDirectory() as folder, torch.enable_grad(), suppress(Measured):
                accelerator, device = start_processes(self.device)
                Trainer(config, dataset, Path(folder), device, accelerator).train(after_step)
        except Exception as error:
            self.training[name] = f"not measured: {next(iter(str(error).splitlines()), type(error).__name__)}"
        finally:
            torch.backends.cudnn.benchmark = benchmark
        torch._dynamo.reset()
        self.write()

    def numbers(self) -> list[dict[str, Any]]:
        """Return the rows with what follows from their medians."""
        rows = [row for group in self.groups.values() for row in group.values()]
        medians = {(r.name, r.batch, r.dtype): statistics.median(r.seconds) for r in rows if r.seconds}
        results = []
        for row in rows:
            values = dict(vars(row))
            if row.seconds:
                median = medians[row.name, row.batch, row.dtype]
                rate = self.flop * row.batch / median
                values |= {"ms": 1000 * median, "images_per_second": row.batch / median / self.options.steps}
                values |= {"evaluations_per_second": row.batch / median}
                values |= {"tflops": rate / 1e12, "of_matmul": rate / self.matmul[row.dtype], "skip_reason": ""}
                baselines = {
                    "float32": (DIFFUSERS, "float32"),
                    "documented": (DIFFUSERS, row.dtype),
                    "tuned": (TUNED, row.dtype),
                }
                others = {key: medians.get((name, row.batch, dtype)) for key, (name, dtype) in baselines.items()}
                values |= {f"times_{key}": other and other / median for key, other in others.items()}
            results.append(values)
        return results

    def report(self) -> str:
        """Return the report as Markdown."""
        rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in self.matmul.items())
        title = "Sampling on a GPU" if self.cuda else "Sampling on a CPU, to try the script"
        text = (
            f"# {title}\n\n{self.machine}\n\n{self.unet.num_parameters() / 1e6:.1f} million parameters, "
            f"{self.flop / 1e9:.1f} GFLOP per image and step. Matrix products, TFLOP/s: {rates}.\n\n{self.check}\n\n"
            f"{LEGEND.format(steps=self.options.steps)}\n"
        )
        columns = {head: column for head, column in COLUMNS.items() if self.cuda or head not in CUDA_ONLY}
        for batch in self.options.batches:
            rows = [row for row in self.numbers() if row["batch"] == batch]
            text += f"\n## Batch {batch}\n\n{markdown_table(rows, {'dtype': 'dtype', 'row': 'name'}, columns)}\n"
        if self.training:
            text += "\n## Training\n\nImages/s of the same network in bf16, random images on the device.\n\n"
            for name, rate in self.training.items():
                text += f"- {name}: {rate if isinstance(rate, str) else format(rate, ',.0f')}\n"
        return text

    def write(self) -> None:
        """Write the report to the folder `--out`, if given."""
        if self.options.out is not None:
            summary = {"machine": self.machine, "check": self.check, "matmul": self.matmul, "flop": self.flop}
            results: dict[str, Any] = {"training": self.training, "rows": self.numbers()}
            contents = {"gpu.md": self.report(), "gpu.json": to_json(summary | results)}
            write_files(self.options.out, contents)


LEGEND = (
    "Medians of whole sampling runs, with fixed costs spread over the steps; long runs are cut to `steps run`. "
    "`evaluations/s`: of the network, per image. `images/s`: in {steps} steps. `/ float32`, `/ documented`, `/ tuned`: "
    "speed relative to `diffusers as documented` in float32, to the same in the row's dtype, to `diffusers tuned` in "
    "the row's dtype. float32 is without TF32; PyTorch's default, TF32 in convolutions only, is near TF32. "
    "`launches`: of kernels and graphs, per step. `of matmul`: of the rate of large matrix products in that dtype. "
    "`peak MiB`: the most allocated from building a row to the end of its first run, a compiler's trials included. "
    "`preparation`: the time between the two."
)
COLUMNS = {
    "ms per step": ("ms", ",.3f"),
    "evaluations/s": ("evaluations_per_second", ",.0f"),
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
    """Allow or forbid TF32 in products and convolutions of float32."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def describe_machine(cuda: bool) -> str:
    """Return a line on the device and the versions."""
    versions = f"ddim {ddim.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    if not cuda:
        return f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}"
    failed, output = subprocess.getstatusoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    driver = "unknown" if failed else output.partition("\n")[0]
    libraries = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return f"{torch.cuda.get_device_name()}, driver {driver}, {libraries}, {versions}"


def main() -> None:
    """Run until all rows are measured or time is over; print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", help="batch sizes (default 256 1 16 1024)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "float32", "TF32"], help="in order")
    parser.add_argument("--steps", type=int, help="steps of a whole run (default 50); long runs are cut")
    parser.add_argument("--repeats", type=int, default=5, help="runs per row")
    parser.add_argument("--minutes", type=float, default=8, help="time limit")
    parser.add_argument("--compile", action="store_true", help='also measure engine="compile", which takes minutes')
    parser.add_argument("--training", action="store_true", help="also measure `ddim train`")
    parser.add_argument("--cpu-try", action="store_true", help="run on a CPU, with a small network, to test the script")
    parser.add_argument("--out", type=Path, help="a folder for gpu.md and gpu.json")
    options = parser.parse_args()
    if not options.cpu_try and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --cpu-try tests the script on a CPU")
    options.batches = options.batches or ([1, 2] if options.cpu_try else [256, 1, 16, 1024])
    options.steps = options.steps or (2 if options.cpu_try else 50)

    def stop(*_: Any) -> None:
        raise OutOfTime

    diffusers.logging.set_verbosity_error()  # It warns about networks that are moved to a dtype.
    bench = Bench(options)
    signal.signal(signal.SIGALRM, stop)
    # Repeated each second: an exception raised in a destructor is lost.
    signal.setitimer(signal.ITIMER_REAL, max(1, 60 * options.minutes - MARGIN_SECONDS), 1)
    with suppress(OutOfTime), torch.no_grad():
        bench.run()
    signal.setitimer(signal.ITIMER_REAL, 0)
    if not bench.check:
        raise SystemExit("no time left to compare the engine with the network")
    bench.write()
    print(bench.report())


if __name__ == "__main__":
    main()
