"""Command lines: every command and option, with values of every kind, over a folder of files good and bad.

A refusal is one line on stderr and status 1, or a usage error and status 2. An accepted command has written what it
prints, and images of samples are those of the library.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import typer
from hypothesis import strategies as st
from PIL import Image

from ddim.cli import app, main
from ddim.io.latent_files import load_latents
from ddim.pipeline import DDIMPipeline
from fuzz.harness import CRASH, DIFFERENCE, INTERNAL, MAX_BYTES, MEMORY, MEMORY_WORDS, TRACEBACK, Fault, Refused, empty
from fuzz.models import TINY, save_pipeline
from fuzz.mutations import TEXTS

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
MODELS = ("tiny", "./tiny/", "mnist", "tiny/unet", "conditional", "broken", "x.png", "nothing", "owner/name", "fifo")
IMAGES = ("x.png", "images", "large.png", "x.txt", "tiny", "nothing.png", "broken.png", "fifo.png", "images/0.png", ".")
LATENTS = ("x.npz", "x.safetensors", "broken.npz", "images.npz", "x.png", "nothing.npz", "fifo.npz")
SETS = (
    "images",
    "images.npz",
    "digits",
    "tiny",
    "x.tar",
    "x.parquet",
    "broken.npz",
    "x.npz",
    "nothing",
    "x.txt",
    "mnist",
)
OUTS = (
    "out.png",
    "out.npz",
    "out.tar",
    "out/",
    "out",
    "out.gif",
    "out.webp",
    "out.safetensors",
    "tiny",
    "nothing/out.png",
)
OUTS += (
    "x.txt",
    "x.txt/out.png",
    "out.jpg",
    "/proc/out.png",
    "",
    ".",
    "images",
    "/dev/null",
    "out" * 100 + ".png",
    "é\n.png",
)
NUMBERS = (
    "0",
    "1",
    "2",
    "3",
    "4",
    "5",
    "7",
    "10",
    "-1",
    "1000",
    "1001",
    "1e3",
    "0.5",
    "1.5",
    "nan",
    "inf",
    "1e-9",
    "9" * 30,
)
NUMBERS += ("9" * 5000, "", "x", "0x10", "1,000", " 3", "３", "1_0", "2147483648", "-0", "1e999", "True")
LISTS = ("900,500,0", "0", "5,3", "3,5", "", ",", "999", "1000", "5,5", "-1", "5,x", "1e2,0", "9" * 5000, "5, 3,0")
CHOICES = (
    "leading",
    "trailing",
    "linspace",
    "quad",
    "logsnr",
    "blend",
    "auto",
    "cpu",
    "cuda",
    "cuda:9",
    "meta",
    "eager",
)
CHOICES += (
    "compile",
    "float32",
    "float16",
    "bfloat16",
    "float64",
    "fid",
    "kid",
    "pixels",
    "mnist",
    "inception",
    "ddpm",
)
CHOICES += ("openai", "diffusers", "linear", "squaredcos_cap_v2", "train", "x", "")
CONFIGS = ("config.yaml", "broken.yaml", "x.txt", "x.png", "nothing.yaml", "fifo", "tiny", "bomb.yaml")
SETTINGS = (
    "max_steps=1",
    "max_steps=2",
    "optim.lr=1",
    "optim.lr=nan",
    "x=1",
    "x",
    "=",
    "seed=[",
    "model.x=1",
    "data=3",
)
SETTINGS += ("model.sample_size=1000000", "batch_size=0", "precision=bf16", "scheduler.beta_start=nan", "model=null")
SETTINGS += ("seed=2001-99-99", "seed=" + "9" * 5000, "ema.decay=1.5", "data.cache=x", "samples.count=1000000000")

KINDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("model", "model_option", "models", "run"), MODELS),
    **dict.fromkeys(("images", "checkpoint", "mask"), IMAGES),
    "box": ("2,2,3,3", "0,0,1,1", "0,0,8,8", "7,7,2,2", "-1,0,2,2", "2,2,3", "x", "", "1,1,1," + "9" * 5000),
    "operator": ("blur:1", "box:2", "bicubic:2", "gray", "box:3", "blur:0", "blur:nan", "blur:1e9", "box:1e9", "x", ""),
    "method": ("ddnm", "ddrm", "mmps", "pigdm", "dps", "repaint", "x", ""),
    "resampling": ("2,2", "1,1", "1,3", "0,1", "2", "x", "1000,1000", "2,2,2", ""),
    "kernel": ("box", "bicubic", "x", ""),
    "noise_std": ("0", "0.1", "1", "-1", "nan", "inf", "1e-30", "1e9", "x"),
    "points": (*IMAGES, *LATENTS, *NUMBERS[:8], "1", "2", "3"),
    **dict.fromkeys(("samples", "reference", "held_out", "data", "sources"), SETS),
    "direction": LATENTS,
    "where": ("label=3", "label", "=", "label=", "x=1", "label=3=3"),
    **dict.fromkeys(("timesteps", "at", "table_steps"), LISTS),
    **dict.fromkeys(
        ("spacing", "device", "dtype", "engine", "metrics", "metric", "features", "split", "layout"), CHOICES
    ),
    **dict.fromkeys(("out", "pairs", "plot", "curve", "resume"), OUTS),
    "file_format": ("onnx", "openvino", "folder", "x", ""),
    "sigma_rel": ("0.08", "0.05..0.2", "0.05,0.1", "0.05..", "nan", "0.1..inf", "..", ",", "1e400", "x", ""),
    "weights": ("raw", "ema", "x", ""),
    "tracker": ("none", "tensorboard", "wandb", "tensorboard,x", ",", ""),
    "beta_schedule": CHOICES,
    "config": CONFIGS,
    "settings": SETTINGS,
    "preset": ("digits", "mnist", "x", ""),
    "grid": ("2x2", "1x1", "0x5", "x", "2x", "99999x99999", "2x2x2", ""),
    "push_to_hub": ("owner/name", "x", ""),
    "host": ("127.0.0.1", "0.0.0.0", "x", "", "::1"),
    "allow_host": ("x", ""),
}
LIKELY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("model", "model_option", "models"), ("tiny",)),
    "images": ("x.png", "images"),
    "checkpoint": ("tiny", "original.pt"),
    "points": ("1", "2", "x.png", "x.npz"),
    "codes": ("x.npz", "x.safetensors"),
    "samples": ("images", "images.npz", "tiny", "x.tar"),
    **dict.fromkeys(("reference", "held_out", "sources"), ("images", "images.npz")),
    "data": ("images", "images.npz", "digits"),
    "steps": ("1", "2", "3", "5"),
    "count": ("1", "2", "3"),
    "config": ("config.yaml",),
    "settings": ("max_steps=1", "max_steps=2"),
    "out": ("out.png", "out.npz", "out", "out.tar", "out.gif", "out.safetensors"),
    "batch_size": ("1", "2", "64"),
    "seed": ("0", "7"),
    "timesteps": ("900,500,0", "5,3"),
    "spacing": ("trailing", "quad"),
    "device": ("cpu",),
    "frames": ("2", "3"),
    "codes_count": ("2",),
    "image_size": ("8",),
    "table_steps": ("2,3",),
}
DEFAULTS = {
    "sample": ["--steps", "3"],
    "encode": ["--steps", "3", "--tolerance", "1e-3"],
    "reconstruct": ["--steps", "3", "--tolerance", "1e-3"],
    "tune": ["--codes", "4"],
    "distill": ["--steps", "1", "-n", "4", "--max-steps", "1", "--batch-size", "4"],
    "evaluate": ["-n", "4", "--steps", "2"],
    "direction": ["-n", "2", "--steps", "3"],
    "inpaint": ["--steps", "3", "--box", "2,2,3,3"],
    "super-resolve": ["--steps", "3", "--factor", "2"],
    "restore": ["--steps", "3", "--operator", "blur:1"],
    "train": ["--config", "config.yaml"],
}
"""Options that keep a command short, unless the same are drawn."""
NEEDED = ("run", "sigma_rel", "images", "codes", "points", "checkpoint", "samples", "sources")
WRITING = ("convert", "tune", "distill", "train", "ema", "export")
"""Commands that require `--out`."""
SLOW = ("train", "tune", "distill", "evaluate")


SLOW_OPTIONS = ("compile_network", "coefficients")
OF_THE_LIBRARY = re.compile(
    r"class_labels|num_inference_steps=|\b(force|overwrite|resize|use_ema)=|\bbatch_size (must|=)"
)
"""Arguments of the library, which a user of the command line cannot give."""


class CommandLine(NamedTuple):
    """Arguments after `ddim`."""

    arguments: list[str]


@st.composite
def command_lines(draw: Callable[[Any], Any]) -> CommandLine:
    """Draw a command, some of its options, and a value for each: mostly likely ones, and one of any kind."""
    name = draw(st.sampled_from([command for command in COMMANDS for _ in range(1 if command in SLOW else 4)]))
    # torch.compile takes minutes, as its help says, and so does learning coefficients of a large network.
    parameters = {p.name: p for p in COMMANDS[name].params if p.name not in SLOW_OPTIONS}
    chosen = draw(st.lists(st.sampled_from(sorted(parameters)), max_size=5, unique=True))
    chosen += [parameter for parameter in NEEDED if parameter in parameters and parameter not in chosen]
    chosen += (
        ["out"] if name in ("convert", "tune", "distill", "train", "ema", "export") and "out" not in chosen else []
    )
    hostile = set(draw(st.sampled_from([[], [], chosen[:1], chosen[:1], chosen[:2]])))
    chosen += ["model"] if name == "export" and "model" not in chosen else []
    options, values = [], []
    for key in chosen:
        parameter = parameters[key]
        is_path = key == "codes" and name == "decode"
        anything = LATENTS if is_path else KINDS.get(key, NUMBERS)
        if key == "codes" and not is_path:
            likely: tuple[str, ...] = ("2", "4")
        else:
            likely = LIKELY.get(key, anything[:4])
        source = st.sampled_from(likely) if key not in hostile else st.sampled_from(anything) | st.sampled_from(TEXTS)
        if not any(option.startswith("-") for option in parameter.opts):
            values += draw(st.lists(source, min_size=1, max_size=3 if parameter.nargs < 0 else 1))
        elif parameter.is_flag:
            options.append(draw(st.sampled_from([*parameter.opts, *parameter.secondary_opts])))
        else:
            options += [draw(st.sampled_from(parameter.opts)), draw(source)]
    for option, value in zip(DEFAULTS.get(name, [])[::2], DEFAULTS.get(name, [])[1::2], strict=True):
        names = next((p.opts for p in parameters.values() if option in p.opts), [])
        if not set(names) & set(options) and not (option == "--steps" and "--timesteps" in options):
            options += [option, value]
    if draw(st.integers(0, 15)) == 0:
        options.append(draw(st.sampled_from(["--help", "--x", "-", "--", "--steps", "extra", "-n"])))
    separator = ["--"] if any(value.startswith("-") for value in values) and draw(st.booleans()) else []
    texts = [name, *options, *separator, *values]
    # The system passes bytes without zeros, and decodes others as it does file names.
    return CommandLine(
        [text.replace("\0", "").encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape") for text in texts]
    )


EXAMPLES = command_lines()


IMPORTED = (
    "ddim.bulk",
    "ddim.convert",
    "ddim.distillation",
    "ddim.evaluation.report",
    "ddim.training.run",
    "ddim.tuning",
    "torch._dynamo",
)
"""What commands import, once for all children."""


class Check:
    """Runs a command line in a forked child, in a copy of a folder of files."""

    def __init__(self, folder: Path) -> None:
        for module in IMPORTED:
            importlib.import_module(module)
        self.template = folder / "template"
        self.folder = folder / "commands"
        make_files(self.template)
        for model in (self.template / "tiny", "mnist"):
            # Kernels are compiled before the first command, not by it.
            DDIMPipeline.from_pretrained(model).sample_images(2, num_inference_steps=1)
        os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "200"}

    def __call__(self, example: CommandLine) -> None:
        """Run the command line and judge its status and output."""
        empty(self.folder)
        for path in self.template.iterdir():
            (self.folder / path.name).symlink_to(path)
        before = fingerprint(self.template)
        status, stdout, stderr = self.run(example.arguments)
        if fingerprint(self.template) != before:
            empty(self.template)
            make_files(self.template)
            writable = any(
                argument in ("--out", "-o", "--pairs", "--plot", "--resume") for argument in example.arguments
            )
            if not writable:
                raise Fault(DIFFERENCE, f"a file that is not its output was changed; {stdout} {stderr}")
        judge_output(status, stdout, stderr)
        check_result(self.folder, example.arguments, stdout)

    def run(self, arguments: list[str]) -> tuple[int, str, str]:
        """Return the status, the output and the messages of a command line."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                run_child(arguments, self.folder, out.fileno(), err.fileno())
            _, status, usage = os.wait4(child, 0)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        if os.WIFSIGNALED(status):
            raise Fault(CRASH, f"{signal.Signals(os.WTERMSIG(status)).name}; {texts[1][-2000:]}")
        if usage.ru_maxrss * 1024 > MAX_BYTES:
            raise Fault(MEMORY, f"{usage.ru_maxrss >> 10} MB; {texts[1][-2000:]}")
        return os.waitstatus_to_exitcode(status), *texts


def run_child(arguments: list[str], folder: Path, out: int, err: int) -> None:
    """Run a command line as the program would, and end this process."""
    status = 70
    try:
        os.chdir(folder)
        os.dup2(out, 1)
        os.dup2(err, 2)
        logging.disable(logging.NOTSET)
        sys.argv = ["ddim", *arguments]
        sys.stdout = os.fdopen(1, "w", errors="surrogateescape", closefd=False)
        sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False)
        if arguments[0] == "app":
            import ddim.app

            # An accepted server would run forever.
            ddim.app.serve = lambda *_: print("http://127.0.0.1")
        try:
            main()
            status = 0
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            status = 1 if isinstance(stop.code, str) else int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def judge_output(status: int, stdout: str, stderr: str) -> None:
    """Raise a refusal or a fault where a command did not succeed, or printed what it must not."""
    messages = [line for line in stderr.replace("\r", "\n").splitlines() if line.startswith("ddim: ")]
    if status not in (0, 1, 2) or "Traceback" in stderr + stdout:
        raise Fault(TRACEBACK, f"status {status}; {stderr[-3000:]}")
    if status == 0:
        return
    last = stderr.rstrip("\n").splitlines()[-1] if stderr.strip() else ""
    if status == 1:
        if not messages or last != messages[-1]:
            raise Fault(TRACEBACK, f"status 1 without a last line 'ddim: ...'; {stderr[-3000:]}")
        if any(words in last for words in MEMORY_WORDS):
            raise Fault(MEMORY, last)
        sentence = last.removeprefix("ddim: ")
        if (match := INTERNAL.search(sentence) or OF_THE_LIBRARY.search(sentence)) or len(sentence) > 1500:
            raise Fault(TRACEBACK, f"not a sentence ({match and match[0]!r}): {sentence}")
        raise Refused(sentence)
    if "Usage:" not in stderr and "Error" not in stderr:
        raise Fault(TRACEBACK, f"status 2 without a usage error: {stderr[-3000:]}")
    raise Refused("usage: " + " ".join(stderr.split())[-200:])


def check_result(folder: Path, arguments: list[str], stdout: str) -> None:
    """Compare what an accepted command has written with what it printed, and samples with the library's."""
    command = arguments[0]
    if command in ("info", "app", "train") or "--help" in arguments or not stdout.strip():
        return
    printed = stdout.rstrip("\n").split("\n")[-1]
    path = folder / printed
    if (
        command not in ("evaluate",)
        and "\n" not in "".join(arguments)
        and not path.exists()
        and not printed.endswith(".tar")
    ):
        raise Fault(DIFFERENCE, f"it printed {printed!r}, which is not there")
    if path.suffix in (".npz", ".safetensors") and command == "encode":
        load_latents(path)
    elif command == "sample" and path.suffix in (".npz", ".png"):
        check_samples(path, arguments)


def check_samples(path: Path, arguments: list[str]) -> None:
    """Compare the first image of samples with that of the library, where the options are simple."""
    options = dict(zip(arguments[1::2], arguments[2::2], strict=False))
    known = {
        "--out": "",
        "-o": "",
        "--steps": "50",
        "--seed": "0",
        "--count": "16",
        "-n": "16",
        "--device": "",
        "--batch-size": "64",
    }
    known |= {"--model": "tiny", "-m": "tiny"}
    if not options.keys() <= known.keys() or {"auto", "--"} & set(arguments):
        return
    count = int(options.get("--count", options.get("-n", "16")))
    model = options.get("--model", options.get("-m", arguments[-1] if len(arguments) % 2 == 0 else "mnist"))
    pipe = DDIMPipeline.from_pretrained(path.parent / model if model != "mnist" else model)
    pipe.set_progress_bar_config(disable=True)
    seeds = [int(options.get("--seed", "0"))]
    expected = np.asarray(pipe(seeds=seeds, num_inference_steps=int(options.get("--steps", "50"))).images[0])
    if path.suffix == ".npz":
        images = np.load(path)["arr_0"]
        if len(images) != count:
            raise Fault(DIFFERENCE, f"{len(images)} images instead of {count}")
        first = images[0, :, :, 0]
    elif count == 1:
        first = np.asarray(Image.open(path))
    else:
        # A grid, with gaps of two pixels, enlarged until images have 64.
        scale = -(-64 // min(expected.shape))
        first = np.asarray(Image.open(path))[::scale, ::scale][2 : 2 + expected.shape[0], 2 : 2 + expected.shape[1]]
    # Networks round differently for batches of different sizes.
    if int(np.abs(first.astype(int) - expected.astype(int)).max()) > 1:
        raise Fault(DIFFERENCE, "the first image is not that of the library")


def fingerprint(folder: Path) -> list[tuple[str, int, int]]:
    """Return the names, sizes and times of files."""
    return sorted(
        (str(path), status.st_size, status.st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and (status := path.stat())
    )


def make_files(folder: Path) -> None:
    """Write the files that command lines name."""
    import tarfile

    import torch
    import yaml

    from ddim.io.fingerprint import model_sha256
    from ddim.io.latent_files import LatentSettings, save_latents
    from ddim.scheduler import DDIMScheduler
    from ddim.unet import UNet2DModel
    from fuzz.configurations import BOMB
    from fuzz.models import original

    folder.mkdir(parents=True, exist_ok=True)
    save_pipeline(folder / "tiny")
    torch.manual_seed(0)
    DDIMPipeline(UNet2DModel(**TINY, num_class_embeds=3), DDIMScheduler()).save_pretrained(folder / "conditional")
    save_pipeline(folder / "broken")
    weights = folder / "broken/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8), np.uint8)
    (folder / "images").mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"images/{index}.png")
    Image.fromarray(pixels[0]).save(folder / "x.png")
    Image.new("RGB", (40, 30)).save(folder / "large.png")
    (folder / "broken.png").write_bytes((folder / "x.png").read_bytes()[:40])
    np.savez(folder / "images.npz", pixels)
    (folder / "broken.npz").write_bytes((folder / "images.npz").read_bytes()[:-30])
    with tarfile.open(folder / "x.tar", "w") as archive:
        for index in range(8):
            archive.add(folder / f"images/{index}.png", f"{index}.png")
    pipe = DDIMPipeline.from_pretrained(folder / "tiny")
    settings = LatentSettings("tiny", model_sha256(pipe), pipe.latent_timesteps(3), True, 1e-3, [1e-4, 1e-4])
    for suffix in (".npz", ".safetensors"):
        save_latents(folder / f"x{suffix}", torch.randn(2, 1, 8, 8), settings)
    torch.save(original("ddpm"), folder / "original.pt")
    config = {"data": {"source": "images.npz"}, "model": TINY, "batch_size": 4, "max_steps": 2}
    config |= {"samples": {"every": 0}, "checkpoints": {"every": 1}, "optim": {"warmup_steps": 1}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "broken.yaml").write_text("a: [")
    (folder / "bomb.yaml").write_text(BOMB)
    (folder / "x.txt").write_text("hello\n")
    (folder / "x.parquet").write_bytes(b"PAR1")
    for name in ("fifo", "fifo.png", "fifo.npz"):
        os.mkfifo(folder / name)


def make_check(folder: Path) -> Callable[[CommandLine], None]:
    """Return the check of a command line."""
    return Check(folder)
