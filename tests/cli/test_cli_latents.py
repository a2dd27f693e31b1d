"""The commands of latent space, on real digits and the built-in model: the files they write are opened, and their
pixels compared with the input images, with the Python API, and with a second implementation of DDIM below.

Commands run in one process (`cli_batch`), each when a test first needs it; one of each kind also runs as a separate
program, and must write the same bytes.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image, ImageSequence
from safetensors import safe_open
from torch import Tensor

from cli_batch import Commands, Result, environment, output_path
from ddim.cli import app
from ddim.io.fingerprint import model_sha256
from ddim.io.image_files import save_images
from ddim.outputs import ReconstructOutput
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel
from digits import TINY_MODEL, digits
from helpers import ALPHAS
from programs import run_cli

COMMANDS = ("encode", "decode", "reconstruct", "interpolate", "trajectory", "consistency", "edit")
DIGITS = (1, 2, 9)
"""Their number in scikit-learn's list and what they show; ten quadratic steps can be inverted for these."""
TIMESTEPS = [int(root * root) for root in np.linspace(math.sqrt(800), 0, 10)]
"""Of ten quadratic steps: c i^2 up to 800 (appendix D.2 of the paper)."""
PALETTE = 4
"""Gray levels that a GIF may be off: PIL gives up some of a frame's 256 for pixels that stay as they were."""
TEN = ["--steps", "10", "--spacing", "quad"]
ALONE, THREE = ["--batch-size", "1"], ["--batch-size", "3"]

GOOD = {
    **{f"help {name}": [name, "--help"] for name in COMMANDS},
    # images to latents
    "encode": ["encode", "digits", *TEN, *THREE, "--out", "three.npz"],
    "encode one": ["encode", "digits/2.png", *TEN, *ALONE, "-o", "two.safetensors"],
    "encode euler": [
        "encode", "digits/9.png", "mnist", "digits/1.png", *TEN, *THREE, "--euler", "-o", "euler.safetensors",
    ],
    "encode any": ["encode", "any", "--resize", "--timesteps", "500", "--euler", *THREE, "--out", "any.npz"],
    "encode with few iterations": [
        "encode", "digits/9.png", *TEN, *ALONE, "--max-iterations", "2", "--out", "hasty.npz",
    ],
    "encode with large tolerance": ["encode", "digits/9.png", *TEN, *ALONE, "--tolerance", "0.5", "--out", "loose.npz"],
    "encode again": ["encode", "digits/9.png", "--timesteps", "700,300,0", "--euler", *ALONE, "--out", "along.npz"],
    # latents to images
    "decode": ["decode", "three.npz", "--out", "decoded.png"],
    "decode npz": ["decode", "three.npz", *THREE, "--out", "decoded.npz"],
    "decode folder": ["decode", "three.npz", "--batch-size", "2", "--out", "decoded digits/"],
    "decode one": ["decode", "two.safetensors", *ALONE, "--out", "two.npz"],
    "decode same": ["decode", "three.npz", *TEN, *THREE, "--out", "same.npz"],
    "decode steps": ["decode", "three.npz", "--steps", "4", "--force", *THREE, "--out", "steps.npz"],
    "decode timesteps": ["decode", "three.npz", "--timesteps", "800,9", "--force", *THREE, "--out", "timesteps.npz"],
    "decode other": ["decode", "three.npz", "other", "--force", *THREE, "--out", "other.npz"],
    "decode half": ["decode", "three.npz", "--dtype", "bfloat16", "--force", *THREE, "--out", "half.npz"],
    # reconstruction
    "reconstruct": ["reconstruct", "digits", *TEN, *THREE, "--out", "sides.png"],
    "reconstruct euler": ["reconstruct", "mnist", "digits", *TEN, *THREE, "--euler", "-o", "euler.png"],
    "reconstruct pair": ["reconstruct", "mnist", "digits", *TEN, *THREE, "--method", "pair", "-o", "pair.png"],
    # interpolation
    "strip": ["interpolate", "mnist", "3", "14", "--frames", "4", *TEN, "--batch-size", "4", "--out", "strip.png"],
    "path": ["interpolate", "3", "14", "7", "--frames", "3", *TEN, "--batch-size", "5", "--out", "path.png"],
    "closed": ["interpolate", "3", "14", "7", "--frames", "3", "--closed", *TEN, *THREE, "--out", "closed.png"],
    "mixed": [
        "interpolate", "digits/1.png", "three.npz", "5", "two.safetensors", "--frames", "2", *ALONE, "--out", "mixed",
    ],
    "resized": [
        "interpolate", "any/large.png", "3", "--resize", "--frames", "2", "--steps", "2", *ALONE, "-o", "resized.npz",
    ],
    "forced": ["interpolate", "three.npz", "along.npz", "--frames", "2", "--force", *THREE, "--out", "forced.npz"],
    "gif": [
        "interpolate", "3", "14", "--frames", "4", "--closed", "--fps", "20", *TEN, *THREE, "--out", "walk.gif",
    ],
    "webp": ["interpolate", "two.safetensors", "3", "--frames", "3", *THREE, "--out", "walk.webp"],
    "grid": ["interpolate", "1", "2", "3", "4", "--grid", "2x3", *TEN, *THREE, "--out", "grid.png"],
    "grid npz": ["interpolate", "three.npz", "4", "--grid", "3X2", *THREE, "--out", "grid.npz"],
    "existing folder": ["interpolate", "3", "14", "--frames", "2", *TEN, *THREE, "--out", "folder.png"],
    "new folder": ["interpolate", "3", "14", "--frames", "2", *TEN, *THREE, "--out", "new.gif/"],
    # trajectories
    "trajectory": ["trajectory", "--count", "2", "--seed", "5", "--frames", "4", *TEN, "--out", "way.png"],
    "trajectory at": ["trajectory", "-n", "1", "--at", "9,632", *TEN, "-o", "at.png"],
    "trajectory gif": ["trajectory", "-n", "3", "--frames", "50", "--fps", "5", *TEN, "--out", "appear.gif"],
    "trajectory eta": [
        "trajectory", "-n", "2", "--eta", "1", "--frames", "1", "--timesteps", "900,500,200,50,0", "-o", "eta.webp",
    ],
    "consistency": [
        "consistency", "mnist", "-n", "3", "--seed", "4", "--steps", "3,10", "--spacing", "quad", "--out", "rows.png",
    ],
    "consistency of many": ["consistency", "--count", "18", "--steps", "2,3", "--out", "many.png"],
    # edits
    "edit": ["edit", "digits", "--seed", "7", "--strength", "0.4", *TEN, "--out", "edited.png"],
    "edit folder": ["edit", "digits", "mnist", "--seed", "7", "--strength", "0.4", *TEN, "--out", "edited"],
    "edit eta": ["edit", "digits", "--seed", "7", "--strength", "0.4", "--eta", "1", *TEN, "-o", "edited eta.npz"],
    "edit several": ["edit", "digits/2.png", "-n", "3", "--seed", "7", "--strength", "0.4", *TEN, "-o", "several.png"],
    "edit nothing": ["edit", "digits", "--strength", "0", *TEN, "--out", "unedited.npz"],
    "edit everything": ["edit", "digits", "--seed", "7", "--strength", "1", *TEN, "--out", "repainted.npz"],
    "edit by default": ["edit", "digits/2.png", "--strength", "0.3", *TEN, *ALONE, "--out", "edit-default.png"],
    "edit by seed 0": ["edit", "digits/2.png", "--strength", "0.3", *TEN, *ALONE, "--seed", "0", "--out", "edit-0.png"],
    "edit any": ["edit", "any", "--strength", "0", "--resize", *TEN, "--out", "any.png"],
    "edit existing folder": ["edit", "digits", "--strength", "0", *TEN, "--out", "second folder.png"],
}  # fmt: skip
WORK = {name: arguments for name, arguments in GOOD.items() if "--help" not in arguments}
OUT = {name: str(output_path(arguments)) for name, arguments in WORK.items()}
PROGRAMS = ("encode again", "decode npz", "reconstruct euler", "strip", "trajectory at", "consistency", "edit")
"""One of each command, which also runs as a separate program."""
REPLACED = {
    "along.npz": "encode again", "decoded.npz": "decode npz", "sides.png": "reconstruct", "strip.png": "strip",
    "walk.gif": "gif", "way.png": "trajectory", "rows.png": "consistency", "edited.png": "edit",
    "edited/00001.png": "edit folder", "folder.png/00000.png": "existing folder",
}  # fmt: skip
"""Files that exist before, and the commands that replace them."""

STILL = r"; --resize crops"
BETWEEN = ["interpolate", "digits/1.png", "3"]
BAD: dict[str, tuple[list[str], int, str]] = {
    # images
    "no image": (["encode"], 2, "Missing argument .*images"),
    "missing image": (["encode", "nobody.png"], 1, r"the file nobody\.png does not exist"),
    "one missing image": (["reconstruct", "digits", "nobody.png"], 1, r"the file nobody\.png does not exist"),
    "empty folder": (["encode", "empty"], 1, r"empty contains no images; looked for \.bmp, "),
    "empty folder to edit": (["edit", "empty", "--seed", "1"], 1, "empty contains no images; looked for"),
    "empty folder to reconstruct": (["reconstruct", "empty"], 1, "empty contains no images; looked for"),
    "text": (["encode", "text.png"], 1, r"text\.png cannot be read: not an image of a known format"),
    "truncated": (["encode", "cut.png"], 1, r"cut\.png cannot be read: \w+"),
    "animation": (
        ["encode", "moving.gif", "--resize"],
        1,
        r"moving\.gif must be a still image, got an animation of 2 frames",
    ),
    "transparent": (["encode", "any/clear.png"], 1, r"any/clear\.png must be 28x28 L, got 28x28 RGBA" + STILL),
    "color": (["reconstruct", "any/color.png"], 1, r"any/color\.png must be 28x28 L, got 28x28 RGB" + STILL),
    "16 bits": (["edit", "any/deep.png"], 1, r"any/deep\.png must be 28x28 L, got 28x28 I;16" + STILL),
    "size": (["encode", "digits", "any/large.png"], 1, r"any/large\.png must be 28x28 L, got 40x30 L" + STILL),
    "size between": (["interpolate", "any/large.png", "3"], 1, r"any/large\.png must be 28x28 L, got 40x30 L" + STILL),
    # how to encode
    "tolerance 0": (
        ["encode", "digits", "--tolerance", "0"],
        1,
        r"--tolerance must be a number above 0 and below 1, got 0\.0",
    ),
    "tolerance nan": (["encode", "digits", "--tolerance", "nan"], 1, "--tolerance must be a .*number.*, got nan"),
    "tolerance 2": (
        ["reconstruct", "digits", "--tolerance", "2"],
        1,
        r"--tolerance must be a number above 0 and below 1, got 2\.0",
    ),
    "tolerance of words": (["encode", "digits", "--tolerance", "low"], 2, "Invalid value for '--tolerance'"),
    "no iterations": (
        ["encode", "digits", "--max-iterations", "0"],
        1,
        "--max-iterations must be an integer .*1.*, got 0",
    ),
    "many iterations": (["reconstruct", "digits", "--max-iterations", "1001"], 1, "--max-iterations .*1001"),
    "no steps": (["encode", "digits", "--steps", "0"], 1, "^ddim: --steps must be an integer .*1.*, got 0"),
    "many steps": (
        ["encode", "digits", "--steps", "1001"],
        1,
        "^ddim: --steps .*1001.* 1000|^ddim: --steps .*1000.*1001",
    ),
    "one step": (
        ["reconstruct", "digits", "--steps", "1"],
        1,
        "--timesteps must hold one above 0, where the images themselves are",
    ),
    "rising timesteps": (
        ["encode", "digits", "--timesteps", "5,9"],
        1,
        "--timesteps must be strictly decreasing, got 9 after 5",
    ),
    "words as timesteps": (
        ["reconstruct", "digits", "--timesteps", "x"],
        1,
        "^ddim: --timesteps must be integers separated by commas, .*, got 'x'",
    ),
    "spacing": (["encode", "digits", "--spacing", "even"], 1, "^ddim: --spacing .*must be one of"),
    "no batch": (
        ["encode", "digits", "--batch-size", "0"],
        1,
        "^ddim: --batch-size must be an integer of at least 1, got 0",
    ),
    "model": (["encode", "digits", "-m", "monalisa"], 1, "the model 'monalisa' does not exist"),
    "device": (["encode", "digits", "--device", "abacus"], 1, "^ddim: --device must be .*, got 'abacus'"),
    "dtype": (
        ["encode", "digits", "--dtype", "float99"],
        1,
        "^ddim: --dtype must be one of float32, .*, got 'float99'",
    ),
    # latents
    "missing latents": (["decode", "nobody.npz"], 1, r"the file nobody\.npz does not exist"),
    "image as latents": (["decode", "digits/1.png"], 1, r"digits/1\.png is not a latent file; those end in \.npz or"),
    "two files": (
        ["decode", "three.npz", "along.npz"],
        1,
        r"give one file of latents, got 'three\.npz' and 'along\.npz'",
    ),
    "two models to decode": (
        ["decode", "mnist", "three.npz", "--model", "other"],
        1,
        "give one model, got 'mnist' and --model 'other'",
    ),
    "two models between": (["interpolate", "mnist", "3", "other", "5"], 1, "give one model, got 'mnist' and 'other'"),
    "two models to encode": (
        ["encode", "digits", "other", "-m", "mnist"],
        1,
        "give one model, got 'other' and --model 'mnist'",
    ),
    "model without images": (["reconstruct", "other"], 1, "other contains no images"),
    "truncated latents": (["decode", "cut.npz"], 1, r"cut\.npz is damaged or not a latent file: \w+"),
    "truncated safetensors": (
        ["decode", "cut.safetensors"],
        1,
        r"cut\.safetensors is damaged or not a latent file: \w+",
    ),
    "words as latents": (["decode", "words.npz"], 1, r"words\.npz is damaged or not a latent file: \w+"),
    "images as latents": (["decode", "images.npz"], 1, r"images\.npz is damaged or not a latent file: .*latents"),
    "nan latents": (["decode", "nan.npz"], 1, r"nan\.npz must hold finite latents, got NaN or infinity"),
    "flat latents": (
        ["decode", "flat.npz"],
        1,
        r"flat\.npz must hold floating latents .*, got float32 of shape \(28, 28\)",
    ),
    "other shape": (["decode", "small.npz"], 1, r"expected shape \(1, 1, 28, 28\), got \(1, 1, 14, 14\)"),
    "forced shape": (["decode", "small.npz", "--force"], 1, r"expected shape \(1, 1, 28, 28\), got \(1, 1, 14, 14\)"),
    "late timesteps": (["decode", "late.npz", "--force"], 1, "timesteps must be integers from 0 to 999, got 1000"),
    "other steps": (
        ["decode", "three.npz", "--steps", "4"],
        1,
        r"three\.npz was encoded in 10 steps from timestep 800, got 4 steps from 750; --force decodes",
    ),
    "other timesteps": (["decode", "three.npz", "--timesteps", "800,9"], 1, "got 2 steps from 800; --force"),
    "other model": (
        ["decode", "three.npz", "--model", "other"],
        1,
        r"three\.npz was encoded with the model 'mnist', which differs .*; --force decodes it anyway",
    ),
    "other dtype": (["decode", "three.npz", "--dtype", "bfloat16"], 1, "which differs from this one .*dtype"),
    # points
    "no point": (["interpolate"], 2, "Missing argument .*points"),
    "one point": (["interpolate", "3"], 1, "an interpolation requires at least two points, got 1"),
    "one image": (["interpolate", "digits/1.png"], 1, "an interpolation requires at least two points, got 1"),
    "missing point": (["interpolate", "3", "nobody.png"], 1, r"the file nobody\.png does not exist"),
    "missing latents between": (["interpolate", "3", "nobody.npz"], 1, r"the file nobody\.npz does not exist"),
    "empty folder between": (["interpolate", "3", "empty"], 1, "empty contains no images"),
    "negative seed between": (
        ["interpolate", "--", "digits/1.png", "-1"],
        1,
        "a seed must be an integer of at least 0, got -1",
    ),
    "dashes": (["interpolate", "--", "3", "--5"], 1, "the file --5 does not exist"),
    "large seed between": (
        ["interpolate", "3", str(2**63)],
        1,
        r"--seed must be integers from 0 to 2\^63 - 1, got 9223372036854775808",
    ),
    "no frames": ([*BETWEEN, "--frames", "0"], 1, "--frames must be an integer of at least 2, got 0"),
    "one frame": ([*BETWEEN, "--frames", "1"], 1, "--frames must be an integer of at least 2, got 1"),
    "fps 0": ([*BETWEEN, "--fps", "0", "--out", "x.gif"], 1, r"--fps must be a number from 0\.1 to 50, got 0\.0"),
    "fps nan": ([*BETWEEN, "--fps", "nan", "--out", "x.gif"], 1, r"--fps must be a number from 0\.1 to 50, got nan"),
    "fps 51": ([*BETWEEN, "--fps", "51", "--out", "x.webp"], 1, r"--fps must be a number from 0\.1 to 50, got 51\.0"),
    "grid of words": (
        [*BETWEEN, "4", "5", "--grid", "wide"],
        1,
        "--grid must be ROWSxCOLUMNS, such as 8x8, each at least 2, got 'wide'",
    ),
    "grid without columns": ([*BETWEEN, "4", "5", "--grid", "8x"], 1, "--grid must be ROWSxCOLUMNS, .*, got '8x'"),
    "deep grid": ([*BETWEEN, "4", "5", "--grid", "2x2x2"], 1, "--grid must be ROWSxCOLUMNS, .*, got '2x2x2'"),
    "negative grid": ([*BETWEEN, "4", "5", "--grid", "-2x2"], 1, "--grid must be ROWSxCOLUMNS, .*, got '-2x2'"),
    "flat grid": ([*BETWEEN, "4", "5", "--grid", "1x5"], 1, "--grid must be ROWSxCOLUMNS, .* at least 2, got '1x5'"),
    "three corners": ([*BETWEEN, "4", "--grid", "3x3"], 1, "a grid requires four points, its corners, got 3"),
    "five corners": (
        [*BETWEEN, "three.npz", "--grid", "3x3", *TEN],
        1,
        "a grid requires four points, its corners, got 5",
    ),
    "closed grid": ([*BETWEEN, "4", "5", "--grid", "3x3", "--closed"], 1, "--closed requires a path, got --grid"),
    "nan latents between": ([*BETWEEN, "nan.npz"], 1, r"nan\.npz must hold finite latents, got NaN or infinity"),
    "other shape between": (
        [*BETWEEN, "small.npz", "--force"],
        1,
        r"small\.npz must hold latents of shape \(1, 28, 28\), got \(1, 14, 14\)",
    ),
    "other steps between": (
        ["interpolate", "three.npz", "3", "--steps", "10"],
        1,
        r"three\.npz .* got 10 steps from 900",
    ),
    "other latents between": (
        ["interpolate", "three.npz", "along.npz"],
        1,
        r"along\.npz was encoded in 3 steps from .* 700",
    ),
    "other model between": (
        ["interpolate", "three.npz", "3", "-m", "other"],
        1,
        r"three\.npz was encoded with the model",
    ),
    # trajectories
    "frame timestep that is not visited": (
        ["trajectory", "--at", "5"],
        1,
        r"--at must be timesteps that the process visits \(980, 960, .*, 20, 0\), got 5$",
    ),
    "words as frame timesteps": (
        ["trajectory", "--at", "noon"],
        1,
        "--at must be integers separated by commas, .*, got 'noon'",
    ),
    "trajectory without frames": (["trajectory", "--frames", "0"], 1, "frames must be an integer of at least 1, got 0"),
    "trajectory of fps 0": (
        ["trajectory", "--fps", "0", "--out", "x.gif"],
        1,
        r"--fps must be a number from 0\.1 to 50, got 0\.0",
    ),
    "trajectory without steps": (["trajectory", "--steps", "0"], 1, "^ddim: --steps must be an integer .*1.*, got 0"),
    "trajectory without images": (["trajectory", "--count", "0"], 1, "--count must be an integer of at least 1, got 0"),
    "trajectory of a negative seed": (
        ["trajectory", "--seed", "-1"],
        1,
        r"--seed must be an integer of at least 0, got -1",
    ),
    "trajectory of eta nan": (["trajectory", "--eta", "nan"], 1, "--eta must be a number of at least 0, got nan"),
    "consistency of 0 steps": (["consistency", "--steps", "10,0"], 1, "^ddim: --steps must be an integer .*1.*, got 0"),
    "consistency of too many steps": (["consistency", "--steps", "10,1001"], 1, "^ddim: --steps .*1001"),
    "consistency without steps": (
        ["consistency", "--steps", ""],
        1,
        "--steps must be integers separated by commas, .*, got ''",
    ),
    "consistency of words as steps": (
        ["consistency", "--steps", "10;20"],
        1,
        "--steps must be integers separated by commas, .*, got '10;20'",
    ),
    "consistency without images": (
        ["consistency", "--count", "0"],
        1,
        "--count must be an integer of at least 1, got 0",
    ),
    "consistency of a negative seed": (
        ["consistency", "--seed", "-1"],
        1,
        r"--seed must be an integer of at least 0, got -1",
    ),
    # edits
    "strength 2": (["edit", "digits", "--strength", "2"], 1, r"--strength must be a number from 0 to 1, got 2\.0"),
    "strength -0.1": (
        ["edit", "digits", "--strength", "-0.1"],
        1,
        r"--strength must be a number from 0 to 1, got -0\.1",
    ),
    "strength nan": (
        ["edit", "digits", "--strength", "nan", "--seed", "1"],
        1,
        "--strength must be a number from 0 to 1, got nan",
    ),
    "eta of edit": (
        ["edit", "digits", "--eta", "-1", "--seed", "1"],
        1,
        r"--eta must be a number of at least 0, got -1\.0",
    ),
    "count of edits": (["edit", "digits", "--count", "3"], 1, "--count requires a single image, got 3"),
    "negative seed of edit": (
        ["edit", "digits", "--seed", "-1"],
        1,
        r"--seed must be an integer of at least 0, got -1",
    ),
    "steps of edit": (["edit", "digits", "--steps", "1001", "--seed", "1"], 1, "^ddim: --steps .*1001"),
    # outputs
    "latents as image": (
        ["encode", "digits", "-o", "x.png"],
        1,
        r"--out must end in \.npz or \.safetensors, got 'x\.png'",
    ),
    "latents without suffix": (
        ["encode", "digits", "-o", "x"],
        1,
        r"--out must end in \.npz or \.safetensors, got 'x'",
    ),
    "latents as folder": (
        ["encode", "digits", "-o", "empty"],
        1,
        r"--out must end in \.npz or \.safetensors, got 'empty'",
    ),
    "latents in a missing folder": (
        ["encode", "digits", "-o", "no/x.npz"],
        1,
        "the folder no does not exist; create it",
    ),
    "images as jpg": (["decode", "three.npz", "-o", "x.jpg"], 1, r"--out must end in \.png .*, got 'x\.jpg'"),
    "images in a missing folder": (["decode", "three.npz", "-o", "no/x.png"], 1, "the folder no does not exist"),
    "reconstruction as npz": (["reconstruct", "digits", "-o", "x.npz"], 1, r"--out must end in \.png, got 'x\.npz'"),
    "reconstruction as folder": (
        ["reconstruct", "digits", "-o", "empty/"],
        1,
        r"--out must end in \.png, got 'empty/'",
    ),
    "reconstruction in a missing folder": (
        ["reconstruct", "digits", "-o", "no/x.png"],
        1,
        "the folder no does not exist",
    ),
    "interpolation as mp4": (
        [*BETWEEN, "-o", "x.mp4"],
        1,
        r"--out must end in .*\.gif \(an animation\).* or be a folder, got 'x\.mp4'",
    ),
    "interpolation in a missing folder": ([*BETWEEN, "-o", "no/x.gif"], 1, "the folder no does not exist"),
    "interpolation in a file": ([*BETWEEN, "-o", "text.png/x.gif"], 1, r"text\.png is a file, not a folder"),
    "trajectory as npz": (["trajectory", "-o", "x.npz"], 1, r"--out must end in \.png, \.gif .*, got 'x\.npz'"),
    "trajectory as folder": (["trajectory", "-o", "empty"], 1, r"--out must end in \.png, .*, got 'empty'"),
    "consistency as gif": (["consistency", "-o", "x.gif"], 1, r"--out must end in \.png.*, got 'x\.gif'"),
    "consistency as folder": (["consistency", "-o", "empty"], 1, r"--out must end in \.png, got 'empty'"),
    "edits as gif": (["edit", "digits", "-o", "x.gif"], 1, r"--out must end in \.png.*, got 'x\.gif'"),
    "edits in a missing folder": (["edit", "digits", "-o", "no/x.png"], 1, "the folder no does not exist"),
}


@pytest.fixture(scope="module")
def pipe() -> DDIMPipeline:
    """The built-in model, with quadratic timesteps."""
    pipe = DDIMPipeline.from_pretrained("mnist")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="quad")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def originals() -> np.ndarray:
    """The digits at the model's size, (3, 28, 28)."""
    chosen = digits()[list(DIGITS)]
    return np.stack([Image.fromarray(digit).resize((28, 28), Image.Resampling.LANCZOS) for digit in chosen])


@pytest.fixture(scope="module")
def folder(pipe: DDIMPipeline, originals: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: digits, images of other sizes and modes, damaged files, files to be replaced."""
    folder = tmp_path_factory.mktemp("latents")
    for name in ("digits", "any", "empty", "edited", "folder.png", "second folder.png"):
        (folder / name).mkdir()
    for index, digit in zip(DIGITS, originals, strict=True):
        Image.fromarray(digit).save(folder / f"digits/{index}.png")
    write_unfit_images(folder)
    write_unfit_codes(folder, model_sha256(pipe))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        DDIMPipeline(UNet2DModel(**TINY_MODEL | {"sample_size": 28}), DDIMScheduler()).save_pretrained(folder / "other")
    for name in REPLACED:
        (folder / name).write_text("old")
    return folder


def write_unfit_images(folder: Path) -> None:
    (folder / "text.png").write_text("not an image\n")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (28, 28, 3), np.uint8)).save(folder / "any/color.png")
    clear = rng.integers(0, 256, (28, 28, 4), np.uint8)
    clear[..., 1] = clear[..., 2] = clear[..., 0]
    Image.fromarray(clear).save(folder / "any/clear.png")
    Image.fromarray(rng.integers(0, 2**16, (28, 28), np.uint16)).save(folder / "any/deep.png")
    Image.fromarray(rng.integers(0, 256, (30, 40), np.uint8)).save(folder / "any/large.png")
    whole = (folder / "any/large.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    frames = [Image.new("L", (28, 28), color) for color in (0, 255)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])


def write_unfit_codes(folder: Path, sha256: str) -> None:
    settings: dict[str, Any] = {
        "model": "mnist", "model_sha256": sha256, "timesteps": TIMESTEPS,
        "exact": True, "tolerance": 1e-5, "residual": [0.0],
    }  # fmt: skip
    good = np.random.default_rng(0).standard_normal((1, 1, 28, 28)).astype(np.float32)
    nan = np.where(np.arange(28) == 5, np.nan, good).astype(np.float32)
    for name, latents in {"nan": nan, "flat": good[0, 0], "small": good[:, :, ::2, ::2], "late": good}.items():
        text = json.dumps(settings | ({"timesteps": [1000, 500]} if name == "late" else {}))
        np.savez(folder / f"{name}.npz", latents=latents, settings=np.array(text))
    np.savez(folder / "images.npz", good)
    whole = (folder / "late.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.safetensors").write_bytes(b"\x40" + bytes(7) + b'{"latents":')
    (folder / "words.npz").write_text("1 2 3")


@pytest.fixture(scope="module")
def results(folder: Path) -> Iterator[Commands]:
    """Of all commands above; each runs when a test first needs it."""
    mistakes = {f"bad {name}": arguments for name, (arguments, _, _) in BAD.items()}
    with Commands(folder, GOOD | mistakes) as commands:
        yield commands


@pytest.fixture(scope="module")
def reference(pipe: DDIMPipeline, originals: np.ndarray) -> ReconstructOutput:
    """What the Python API makes of the digits."""
    return pipe.reconstruct([Image.fromarray(digit) for digit in originals], 10, batch_size=3)


# --- images, taken apart


def max_difference(a: Any, b: Any) -> int:
    """The largest difference, in gray levels."""
    a, b = (np.asarray(pixels).astype(int) for pixels in (a, b))
    assert a.shape == b.shape
    return int(np.abs(a - b).max())


def cells(image: Image.Image | Path, rows: int, columns: int) -> np.ndarray:
    """(rows, columns, 28, 28) of a grid with black gaps of two pixels, each pixel of which is shown as nine."""
    if isinstance(image, Path):
        with Image.open(image) as opened:
            assert (opened.format, opened.mode) == ("PNG", "L")
            image = opened.copy()
    pixels = shrink(image)
    assert pixels.shape == (rows * 30 + 2, columns * 30 + 2)
    tiles = pixels[2:, 2:].reshape(rows, 30, columns, 30)
    assert not pixels[:2].any()
    assert not pixels[:, :2].any()
    assert not tiles[:, 28:].any()
    assert not tiles[..., 28:].any()
    return tiles[:, :28, :, :28].swapaxes(1, 2)


def shrink(image: Image.Image) -> np.ndarray:
    """The pixels of an image that was enlarged three times."""
    shown = np.asarray(image)
    pixels = shown[::3, ::3]
    assert np.array_equal(shown, pixels.repeat(3, 0).repeat(3, 1))
    return pixels


def arrays(path: Path) -> np.ndarray:
    """(N, 28, 28) of `arr_0`."""
    with np.load(path) as file:
        assert file.files == ["arr_0"]
        pixels = file["arr_0"]
    assert pixels.dtype == np.uint8
    assert pixels.shape[1:] == (28, 28, 1)
    return pixels[..., 0]


def files(folder: Path) -> np.ndarray:
    """(N, 28, 28) of 00000.png and so on."""
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"{index:05d}.png" for index in range(len(names))]
    return np.stack([np.asarray(Image.open(folder / name)) for name in names])


def animation_frames(path: Path, milliseconds: int) -> list[Image.Image]:
    """The frames of an animation that repeats for ever, each shown so long."""
    frames = []
    with Image.open(path) as animation:
        assert animation.info["loop"] == 0
        for frame in ImageSequence.Iterator(animation):
            frame.load()
            assert frame.info["duration"] == milliseconds
            frames.append(frame.convert("L"))
    return frames


def gray(samples: Tensor) -> np.ndarray:
    """(N, 28, 28) bytes of samples in [-1, 1]."""
    return np.rint((samples[:, 0].numpy().astype(np.float64) + 1).clip(0, 2) * 127.5).astype(np.uint8)


def stack(images: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def noise(*seeds: int) -> Tensor:
    return torch.cat([torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def ddim(
    pipe: DDIMPipeline, x: Tensor, timesteps: list[int], last: float = 1.0
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Equation (12) of the paper with eta = 0: x_t and the predicted x_0 of each step, and the end at alpha = last."""
    samples, predicted = [], []
    for t, a, a_prev in zip(timesteps, ALPHAS[timesteps], [*ALPHAS[timesteps[1:]], last], strict=True):
        epsilon = pipe.unet(x, t).sample
        x0 = (x - math.sqrt(1 - a) * epsilon) / math.sqrt(a)
        samples.append(x)
        predicted.append(x0)
        x = math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev) * epsilon
    return samples, predicted, x


def decoded(pipe: DDIMPipeline, latents: Tensor, timesteps: list[int] = TIMESTEPS) -> np.ndarray:
    """Return images of the first alpha, where decoding ends; so that no step is left at timestep 0."""
    return gray(ddim(pipe, latents, [t for t in timesteps if t], float(ALPHAS[0]))[2])


def sampled(pipe: DDIMPipeline, latents: Tensor) -> np.ndarray:
    """Return the images of latents as `ddim sample` makes them, which frames between seeds alone are."""
    return stack(pipe(latents=latents, num_inference_steps=10).images)


def slerp(z0: Tensor, z1: Tensor, t: float) -> Tensor:
    """Equation (67)."""
    a, b = z0.double().numpy(), z1.double().numpy()
    theta = np.arccos((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
    return torch.from_numpy((np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)).float()


def path_between(latents: Tensor, frames: int, closed: bool = False) -> Tensor:
    """(legs, frames, 1, 28, 28)."""
    ends = [*latents, *latents[:1]] if closed else list(latents)
    return torch.stack([torch.stack([slerp(a, b, i / (frames - 1)) for i in range(frames)]) for a, b in pairwise(ends)])


def npz_latents(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    with np.load(path) as file:
        return file["latents"], json.loads(str(file["settings"]))


# --- help


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_option(results: Commands, name: str) -> None:
    code, stdout, stderr, evaluations = results[f"help {name}"]
    assert (code, stderr, evaluations) == (0, "", [])
    assert f"Usage: ddim {name} [OPTIONS]" in stdout
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    for parameter in command.params:
        for option in parameter.opts:
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", stdout, re.IGNORECASE)
        assert parameter.help.split(";")[0] in " ".join(stdout.replace("│", " ").split())
    examples = re.findall(rf"^ *ddim {name} (.*\S)\s*$", stdout, re.MULTILINE)
    assert len(examples) == {"consistency": 1, "interpolate": 4, "decode": 3, "reconstruct": 3}.get(name, 2)
    for example in examples:
        # The options exist and their values are of the right kind.
        command.make_context(name, shlex.split(example))


# --- what goes where


@pytest.mark.parametrize("name", WORK)
def test_only_results_go_to_stdout(results: Commands, name: str) -> None:
    _, stdout, stderr, _ = results[name]
    assert results.output(name).exists()
    assert stdout.splitlines()[-1] == OUT[name].rstrip("/")
    assert len(stdout.splitlines()) == (6 if WORK[name][0] == "reconstruct" else 1)
    assert "Traceback" not in stderr
    assert "Warning" not in stderr


@pytest.mark.parametrize("name", WORK)
def test_replaced_files_are_reported(results: Commands, folder: Path, name: str) -> None:
    reports = re.findall(r"^.*; (\d+ earlier files?) replaced$", results[name].stderr, re.MULTILINE)
    assert reports == (["1 earlier file"] if name in REPLACED.values() else [])
    for path, writer in REPLACED.items():
        if writer == name:
            assert (folder / path).read_bytes() != b"old"


@pytest.mark.parametrize(
    ("name", "summary"),
    [
        ("encode", r"3 latents in \d+\.\d s, \d+ function evaluations per image, mean squared error \S+"),
        ("encode one", r"1 latent in \d+\.\d s, \d+ function evaluations per image, mean squared error \S+"),
        ("decode", r"3 images in \d+\.\d s, 10 steps of the model 'mnist', which three\.npz names"),
        ("decode other", r"3 images in \d+\.\d s, 10 steps"),
        ("mixed", r"6 frames, 10 steps of the model 'mnist', which three\.npz names"),
        ("reconstruct", "3 images"),
        ("strip", "4 frames"),
        ("closed", "6 frames"),
        ("trajectory", "timesteps 800, 355, 88, 0, then the result"),
        ("trajectory at", "timesteps 632, 9, then the result"),
        ("consistency", "3 latents, rows of 3, 10 steps"),
        ("edit", "3 images"),
    ],
)
def test_summaries(results: Commands, name: str, summary: str) -> None:
    assert re.search(rf"^{summary}(; 1 earlier file replaced)?$", results[name].stderr, re.MULTILINE)


def test_every_command_runs_as_a_separate_program() -> None:
    assert {WORK[name][0] for name in PROGRAMS} == set(COMMANDS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_separate_programs_write_the_same_bytes(results: Commands, folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(folder / "digits", tmp_path / "digits")
    for other in results.prerequisites(name):
        shutil.copy(results.output(other), tmp_path)
    program = run_cli(*WORK[name], env=environment(tmp_path / "home"), cwd=tmp_path)
    assert (program.returncode, program.stdout) == (0, results[name].stdout), program.stderr
    assert (tmp_path / OUT[name]).read_bytes() == results.output(name).read_bytes()


# --- images to latents and back


def test_latents_match_the_api(
    results: Commands, folder: Path, pipe: DDIMPipeline, reference: ReconstructOutput
) -> None:
    latents, settings = npz_latents(results.output("encode"))
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents, reference.codes.latents.numpy(), rtol=0, atol=1e-3)
    # Latents of real images are not unit Gaussians, but of that scale.
    assert np.abs(latents.std((1, 2, 3)) - 1).max() < 0.3
    np.testing.assert_allclose(settings.pop("residual"), reference.codes.residual, rtol=0.1)
    assert settings.pop("format_version") == 2
    assert len(settings.pop("sha256")) == 64
    assert settings == {
        "kind": "latents",
        "condition": None,
        "model": "mnist",
        "model_sha256": model_sha256(pipe),
        "timesteps": TIMESTEPS,
        "exact": True,
        "tolerance": 1e-5,
    }
    nfe = float(reference.codes.evaluations.sum(1).double().mean())
    assert f", {nfe:.0f} function evaluations per image" in results["encode"].stderr


def test_latents_in_safetensors(results: Commands, folder: Path) -> None:
    for name, exact, count in (("encode one", True, 1), ("encode euler", False, 2)):
        with safe_open(results.output(name), "numpy") as file:
            assert list(file.keys()) == ["latents"]
            latents, settings = file.get_tensor("latents"), json.loads(file.metadata()["settings"])
        assert (latents.dtype, latents.shape) == (np.float32, (count, 1, 28, 28))
        assert (settings["timesteps"], settings["exact"], len(settings["residual"])) == (TIMESTEPS, exact, count)
        if exact:
            # Alone or among others: the engine computes each image alone.
            assert np.array_equal(latents[0], npz_latents(results.output("encode"))[0][1])


def test_euler_calls_the_network_once_per_step_and_once_to_verify(
    results: Commands, folder: Path, pipe: DDIMPipeline, originals: np.ndarray
) -> None:
    assert results["encode euler"].evaluations == [(t, 2, "torch.float32") for t in (*TIMESTEPS[::-1], *TIMESTEPS[:-1])]
    assert "10 function evaluations per image" in results["encode euler"].stderr
    # The images in the order in which they were named.
    expected = pipe.encode([Image.fromarray(originals[i]) for i in (2, 0)], 10, exact=False, batch_size=3).latents
    with safe_open(results.output("encode euler"), "pt") as file:
        assert float((file.get_tensor("latents") - expected).abs().max()) < 1e-4
    assert [t for t, _, _ in results["encode again"].evaluations] == [0, 300, 700, 700, 300]


def test_iterations_stop_at_the_limit_or_the_tolerance(results: Commands, folder: Path) -> None:
    """A limit that is reached is reported."""
    assert len(results["encode with few iterations"].evaluations) == 1 + 9 * 2 + 9
    _, settings = npz_latents(results.output("encode with few iterations"))
    assert settings["residual"][0] > settings["tolerance"] == 1e-5
    warning = (
        r"^ddim: 1 of 1 images did not reach the tolerance 1e-05 in the .* from timesteps? .*; the largest residual is "
    )
    assert re.search(
        warning + re.escape(f"{settings['residual'][0]:.1e}"),
        results["encode with few iterations"].stderr,
        re.MULTILINE,
    )
    assert len(results["encode with large tolerance"].evaluations) < 1 + 9 * 2 + 9
    _, settings = npz_latents(results.output("encode with large tolerance"))
    assert settings["residual"][0] <= settings["tolerance"] == 0.5
    for name in ("encode", "encode one", "encode euler", "encode with large tolerance"):
        assert "did not reach" not in results[name].stderr


def fitted(folder: Path) -> np.ndarray:
    """The images of `any` as the model takes them, in the order of their names."""
    clear, color, deep, large = (Image.open(folder / f"any/{name}.png") for name in ("clear", "color", "deep", "large"))
    values, alpha = (np.asarray(clear)[..., channel] / 255 for channel in (0, 3))
    weighted = np.asarray(color) @ [0.299, 0.587, 0.114]
    middle = large.crop((5, 0, 35, 30)).resize((28, 28), Image.Resampling.LANCZOS)
    return np.stack([255 * (values * alpha + 1 - alpha), weighted, np.asarray(deep) / 257, np.asarray(middle)])


def test_resize_fits_images_to_the_model(results: Commands, folder: Path, pipe: DDIMPipeline) -> None:
    expected = fitted(folder)
    originals, edits = cells(results.output("edit any"), 2, 4)
    assert np.abs(originals - expected).max() <= 1
    assert np.array_equal(originals, edits)
    # Equation (13), in one step from timestep 0 to 500.
    x = torch.from_numpy(originals / 127.5 - 1).float()[:, None]
    with torch.no_grad():
        epsilon = pipe.unet(x, 0).sample
    a, a0 = ALPHAS[500], ALPHAS[0]
    expected_latents = math.sqrt(a / a0) * (x - math.sqrt(1 - a0) * epsilon) + math.sqrt(1 - a) * epsilon
    latents, settings = npz_latents(results.output("encode any"))
    np.testing.assert_allclose(latents, expected_latents.numpy(), rtol=0, atol=1e-4)
    assert settings["timesteps"] == [500]


def test_decoding_restores_the_images(
    results: Commands, folder: Path, pipe: DDIMPipeline, originals: np.ndarray
) -> None:
    expected = arrays(results.output("decode npz"))
    assert max_difference(expected, originals) <= 2
    tiles = cells(results.output("decode"), 2, 2).reshape(4, 28, 28)
    assert not tiles[3].any()
    for got in (tiles[:3], files(results.output("decode folder")), arrays(results.output("decode same"))):
        assert max_difference(got, originals) <= 2
        assert max_difference(got, expected) <= 1
    assert max_difference(arrays(results.output("decode one")), originals[1:2]) <= 2
    latents = torch.from_numpy(npz_latents(results.output("encode"))[0])
    assert max_difference(expected, decoded(pipe, latents)) <= 1


def test_decoding_divides_latents_into_batches(results: Commands) -> None:
    """Of the requested size at most; timestep 0 costs nothing."""
    for name, sizes in (("decode", [3]), ("decode npz", [3]), ("decode folder", [2, 1]), ("decode one", [1])):
        asked = [(t, n) for t, n, _ in results[name].evaluations]
        assert asked == [(t, size) for t in TIMESTEPS[:-1] for size in sizes]


def test_force_decodes_with_other_settings(
    results: Commands, folder: Path, pipe: DDIMPipeline, originals: np.ndarray
) -> None:
    """Other steps or another model give other images than the digits."""
    latents = torch.from_numpy(npz_latents(results.output("encode"))[0])
    for name, timesteps in {"decode steps": [750, 500, 250, 0], "decode timesteps": [800, 9]}.items():
        got = arrays(results.output(name))
        assert max_difference(got, decoded(pipe, latents, timesteps)) <= 1
        assert max_difference(got, originals) > 20
    other = DDIMPipeline.from_pretrained(folder / "other")
    assert max_difference(arrays(results.output("decode other")), decoded(other, latents)) <= 1
    assert {dtype for _, _, dtype in results["decode half"].evaluations} == {"torch.float32"}
    assert 0 < np.abs(arrays(results.output("decode half")).astype(int) - originals).mean() < 10


def test_suffix_in_capitals_is_kept(tmp_path: Path) -> None:
    """`ddim decode codes.npz --out X.NPZ` writes that name, and no other file."""
    save_images([Image.new("L", (28, 28), 7)] * 2, tmp_path / "X.NPZ")
    assert [path.name for path in tmp_path.iterdir()] == ["X.NPZ"]
    assert (arrays(tmp_path / "X.NPZ") == 7).all()


# --- reconstruction


def table(result: Result) -> np.ndarray:
    """(rows, 4) of numbers, the last row the mean."""
    header, *rows = [line.split() for line in result.stdout.splitlines()[:-1]]
    assert header == ["image", "mse", "psnr", "evaluations", "residual"]
    assert [row[0] for row in rows] == [*map(str, range(len(rows) - 1)), "mean"]
    return np.array([[float(entry) for entry in row[1:]] for row in rows])


def test_table_matches_the_api(
    results: Commands, reference: ReconstructOutput, pipe: DDIMPipeline, originals: np.ndarray
) -> None:
    euler = pipe.reconstruct([Image.fromarray(digit) for digit in originals], 10, exact=False, batch_size=3)
    for name, expected in {"reconstruct": reference, "reconstruct euler": euler}.items():
        rows = table(results[name])
        np.testing.assert_allclose(rows[:-1, 0], expected.mse, rtol=0.1)
        np.testing.assert_allclose(rows[:-1, 2], expected.codes.evaluations.sum(1), atol=3)
        np.testing.assert_allclose(rows[:-1, 3], expected.codes.residual, rtol=0.1)
        # What is printed fits together, to within its rounding.
        np.testing.assert_allclose(rows[:-1, 1], -10 * np.log10(rows[:-1, 0]), atol=0.08)
        np.testing.assert_allclose(rows[-1], rows[:-1].mean(0), rtol=1e-2, atol=0)
    # Euler's error is another order of magnitude.
    assert (table(results["reconstruct euler"])[:, 0] >= 100 * table(results["reconstruct"])[:, 0]).all()
    assert (table(results["reconstruct euler"])[:, 2] == 10).all()
    assert table(results["reconstruct"])[:, 0].max() < 1e-5


def test_pairs_cost_less_and_are_exact(results: Commands) -> None:
    pair = table(results["reconstruct pair"])
    assert pair[:, 0].max() < 1e-14
    assert pair[:, 2].max() <= 17
    assert (pair[:, 3] == 0).all()


def test_originals_are_above_their_reconstructions(
    results: Commands, folder: Path, originals: np.ndarray, reference: ReconstructOutput
) -> None:
    above, below = cells(results.output("reconstruct"), 2, 3)
    assert np.array_equal(above, originals)
    assert max_difference(below, originals) <= 2
    assert max_difference(below, stack(reference.images)) <= 1
    above, below = cells(results.output("reconstruct euler"), 2, 3)
    assert np.array_equal(above, originals)
    # The image and the table show the same error; the table's is of values that are not clipped.
    mse = ((below.astype(float) - originals) / 255).reshape(3, -1).__pow__(2).mean(1)
    assert (mse > 0.01).all()
    assert (mse < table(results["reconstruct euler"])[:3, 0] * 1.01).all()


# --- interpolation


def test_strip_interpolates_between_two_seeds(results: Commands, folder: Path, pipe: DDIMPipeline) -> None:
    (got,) = cells(results.output("strip"), 1, 4)
    latents = noise(3, 14)
    assert max_difference(got[[0, 3]], stack(pipe(seeds=[3, 14], num_inference_steps=10).images)) <= 1
    assert max_difference(got, sampled(pipe, path_between(latents, 4)[0])) <= 1
    # They are all different images.
    assert min(max_difference(a, b) for a, b in pairwise(got)) > 30


def test_path_has_one_row_per_leg(results: Commands, folder: Path, pipe: DDIMPipeline) -> None:
    """Each row begins where the one above ends, and the last of a closed path ends where the first begins."""
    latents = noise(3, 14, 7)
    ends = sampled(pipe, latents)
    rows = cells(results.output("path"), 2, 3)
    assert max_difference(rows[:, 0], ends[:2]) <= 1
    assert max_difference(rows[:, 2], ends[1:]) <= 1
    assert np.array_equal(rows[1, 0], rows[0, 2])
    closed = cells(results.output("closed"), 3, 3)
    assert max_difference(closed[:2], rows) <= 1
    assert np.array_equal(closed[2, 0], closed[1, 2])
    assert np.array_equal(closed[2, 2], closed[0, 0])
    assert max_difference(closed[:, 1], sampled(pipe, path_between(latents, 3, closed=True)[:, 1])) <= 1


def test_points_of_all_kinds_can_be_mixed(
    results: Commands, folder: Path, pipe: DDIMPipeline, originals: np.ndarray
) -> None:
    """An image, a file of three latents, a seed, another file: all legs of two frames, that is, the points."""
    got = files(results.output("mixed"))
    assert max_difference(got[[0, 1, 2, 3, 5]], originals[[0, 0, 1, 2, 1]]) <= 2
    assert max_difference(got[4:5], decoded(pipe, noise(5))) <= 1


def test_resize_and_force_accept_other_points(results: Commands, folder: Path, pipe: DDIMPipeline) -> None:
    got = arrays(results.output("resized"))
    assert len(got) == 2
    assert max_difference(got[1:], decoded(pipe, noise(3), [500, 0])) <= 1
    # Along the timesteps of the first file.
    latents = torch.from_numpy(
        np.concatenate([npz_latents(results.output(name))[0] for name in ("encode", "encode again")])
    )
    assert max_difference(arrays(results.output("forced")), decoded(pipe, latents)) <= 1


def test_gif_holds_the_frames(results: Commands, folder: Path, pipe: DDIMPipeline) -> None:
    frames = animation_frames(results.output("gif"), 50)
    assert {frame.size for frame in frames} == {(84, 84)}
    # There and back, without the first frame at the end.
    path = path_between(noise(3, 14), 4)[0]
    expected = sampled(pipe, path)[[0, 1, 2, 3, 2, 1]]
    assert max_difference(np.stack([shrink(frame) for frame in frames]), expected) <= PALETTE


def test_webp_holds_the_frames(results: Commands, folder: Path, pipe: DDIMPipeline, originals: np.ndarray) -> None:
    frames = np.stack([shrink(frame) for frame in animation_frames(results.output("webp"), 100)])
    with safe_open(results.output("encode one"), "pt") as file:
        latent = file.get_tensor("latents")
    assert max_difference(frames, decoded(pipe, path_between(torch.cat([latent, noise(3)]), 3)[0])) <= 1
    assert max_difference(frames[0], originals[1]) <= 2


def test_grid_lies_between_four_corners(
    results: Commands, folder: Path, pipe: DDIMPipeline, originals: np.ndarray
) -> None:
    """Corners, and between them first along the upper and lower edges."""
    grid = cells(results.output("grid"), 2, 3)
    corners = noise(1, 2, 3, 4)
    expected = sampled(pipe, torch.cat([path_between(corners[:2], 3)[0], path_between(corners[2:], 3)[0]]))
    assert max_difference(grid.reshape(6, 28, 28), expected) <= 1
    got = arrays(results.output("grid npz")).reshape(3, 2, 28, 28)
    assert max_difference(got[[0, 0, 2], [0, 1, 0]], originals) <= 2
    assert max_difference(got[2, 1], decoded(pipe, noise(4))[0]) <= 1
    three = torch.from_numpy(npz_latents(results.output("encode"))[0])
    middle = torch.stack([slerp(three[0], three[2], 0.5), slerp(three[1], noise(4)[0], 0.5)])
    assert max_difference(got[1], decoded(pipe, middle)) <= 1


def test_folder_names_may_have_suffixes(results: Commands, folder: Path, pipe: DDIMPipeline) -> None:
    """One that exists, and one named with a separator at its end, are filled with images."""
    expected = sampled(pipe, noise(3, 14))
    for name in ("existing folder", "new folder"):
        assert results.output(name).is_dir()
        assert max_difference(files(results.output(name)), expected) <= 1


# --- trajectories


def test_trajectory_shows_samples_and_predictions(results: Commands, folder: Path, pipe: DDIMPipeline) -> None:
    """Two rows per seed: x_t and the predicted x_0, each with the image that sampling ends with."""
    rows = cells(results.output("trajectory"), 4, 5)
    end = stack(pipe(seeds=[5, 6], num_inference_steps=10).images)
    for index in range(2):
        assert max_difference(rows[2 * index, -1], end[index]) <= 1
        assert max_difference(rows[2 * index + 1, -1], end[index]) <= 1
    assert max_difference(rows[[0, 2], 0], gray(noise(5, 6))) == 0
    samples, predicted, _ = ddim(pipe, noise(5, 6), TIMESTEPS)
    for column, step in enumerate((0, 3, 6, 9)):
        assert max_difference(rows[[0, 2], column], gray(samples[step])) <= 1
        assert max_difference(rows[[1, 3], column], gray(predicted[step])) <= 1


def test_trajectory_at_custom_timesteps(results: Commands, folder: Path, pipe: DDIMPipeline) -> None:
    rows = cells(results.output("trajectory at"), 2, 3)
    samples, predicted, end = ddim(pipe, noise(0), TIMESTEPS)
    for column, step in enumerate((1, 8)):
        assert max_difference(rows[:, column], [gray(samples[step])[0], gray(predicted[step])[0]]) <= 1
    assert max_difference(rows[:, 2], [gray(end)[0]] * 2) <= 1


def test_trajectory_as_animation(results: Commands, folder: Path, pipe: DDIMPipeline) -> None:
    """More frames than steps are all of them; and one for the end."""
    frames = animation_frames(results.output("trajectory gif"), 200)
    samples, predicted, _ = ddim(pipe, noise(0, 1, 2), TIMESTEPS)
    end = stack(pipe(seeds=range(3), num_inference_steps=10).images)
    expected = [(gray(x), gray(x0)) for x, x0 in zip(samples, predicted, strict=True)]
    for frame, pair in zip(frames, [*expected, (end, end)], strict=True):
        assert max_difference(cells(frame, 2, 3), np.stack(pair)) <= PALETTE


def test_trajectory_with_eta(results: Commands, folder: Path, pipe: DDIMPipeline) -> None:
    first, end = (cells(frame, 2, 2) for frame in animation_frames(results.output("trajectory eta"), 100))
    assert np.array_equal(first[0], gray(noise(0, 1)))
    expected = stack(pipe(seeds=[0, 1], timesteps=[900, 500, 200, 50, 0], eta=1.0).images)
    assert max_difference(end, np.stack([expected, expected])) <= 1


def test_consistency_has_one_row_per_number_of_steps(results: Commands, folder: Path, pipe: DDIMPipeline) -> None:
    """One column per seed."""
    rows = cells(results.output("consistency"), 2, 3)
    for row, steps in zip(rows, (3, 10), strict=True):
        assert max_difference(row, stack(pipe(latents=noise(4, 5, 6), num_inference_steps=steps).images)) <= 1
    assert max_difference(rows[1], gray(ddim(pipe, noise(4, 5, 6), TIMESTEPS)[2])) <= 1


def test_long_rows_wrap_after_sixteen_columns(results: Commands, folder: Path, pipe: DDIMPipeline) -> None:
    rows = cells(results.output("consistency of many"), 4, 16)
    latents = noise(*range(18))
    for index, timesteps in enumerate(([500, 0], [666, 333, 0])):
        expected = gray(ddim(pipe, latents, timesteps)[2])
        assert max_difference(np.concatenate([rows[index], rows[2 + index, :2]]), expected) <= 1
    assert not rows[2:, 2:].any()


# --- edits


def test_edit_adds_noise_and_denoises(
    results: Commands, folder: Path, pipe: DDIMPipeline, originals: np.ndarray
) -> None:
    """Four of ten steps: noise of the level of the fourth last timestep, and sampling from there."""
    above, below = cells(results.output("edit"), 2, 3)
    assert np.array_equal(above, originals)
    images = [Image.fromarray(digit) for digit in originals]
    assert max_difference(below, stack(pipe.edit(images, 0.4, 10, seeds=[7, 8, 9]).images)) <= 1
    a = ALPHAS[TIMESTEPS[6]]
    clean = torch.from_numpy(originals / 127.5 - 1).float()[:, None]
    noisy = math.sqrt(a) * clean + math.sqrt(1 - a) * noise(7, 8, 9)
    assert max_difference(below, gray(ddim(pipe, noisy, TIMESTEPS[6:])[2])) <= 1
    assert max_difference(files(results.output("edit folder")), below) <= 1
    assert [t for t, _, _ in results["edit"].evaluations] == TIMESTEPS[6:]
    # They are other images, yet of the same digits.
    difference = np.abs(below.astype(int) - originals)
    assert difference.max() > 50
    assert difference.mean() < 20


def test_single_image_has_several_edits(results: Commands, pipe: DDIMPipeline, originals: np.ndarray) -> None:
    above, below = cells(results.output("edit several"), 2, 3)
    assert np.array_equal(above[0], originals[1])
    assert not above[1:].any()
    image = Image.fromarray(originals[1])
    expected = [pipe.edit(image, 0.4, 10, seeds=[seed]).images[0] for seed in (7, 8, 9)]
    assert max_difference(below, stack(expected)) <= 1


def test_edit_with_eta(results: Commands, folder: Path, pipe: DDIMPipeline, originals: np.ndarray) -> None:
    images = [Image.fromarray(digit) for digit in originals]
    got = arrays(results.output("edit eta"))
    assert max_difference(got, stack(pipe.edit(images, 0.4, 10, seeds=[7, 8, 9], eta=1.0).images)) <= 1
    assert max_difference(got, files(results.output("edit folder"))) > 20


def test_strength_0_keeps_the_image_and_1_nothing(
    results: Commands, folder: Path, pipe: DDIMPipeline, originals: np.ndarray
) -> None:
    """1 is sampling, from noise with next to nothing of the image."""
    assert not results["edit nothing"].evaluations
    assert np.array_equal(arrays(results.output("edit nothing")), originals)
    assert np.array_equal(files(results.output("edit existing folder")), originals)
    assert [t for t, _, _ in results["edit everything"].evaluations] == TIMESTEPS
    a = ALPHAS[800]
    clean = torch.from_numpy(originals / 127.5 - 1).float()[:, None]
    noisy = math.sqrt(a) * clean + math.sqrt(1 - a) * noise(7, 8, 9)
    assert max_difference(arrays(results.output("edit everything")), gray(ddim(pipe, noisy, TIMESTEPS)[2])) <= 1


def test_edit_defaults_to_seed_0(results: Commands) -> None:
    assert results.output("edit by default").read_bytes() == results.output("edit by seed 0").read_bytes()


# --- mistakes


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_reported_in_one_line(results: Commands, name: str) -> None:
    _, code, message = BAD[name]
    got = results[f"bad {name}"]
    assert (got.code, got.stdout) == (code, ""), got.stderr
    assert "Traceback" not in got.stderr
    assert re.search(message, got.stderr.replace("│", " "))
    # The network has not run.
    assert not got.evaluations
    if code == 1:
        assert len(got.stderr.splitlines()) == 1
        assert got.stderr.startswith("ddim: ")
    else:
        assert "Usage: ddim" in got.stderr


def test_mistakes_leave_nothing_behind(results: Commands, folder: Path) -> None:
    for name in results:
        assert results[name].code == (BAD[name.removeprefix("bad ")][1] if name.startswith("bad ") else 0)
    assert not list((folder / "empty").iterdir())
    names = {path.name for path in folder.iterdir()}
    written = {Path(name).parts[0] for name in OUT.values()}
    inputs = {
        "digits",
        "any",
        "empty",
        "other",
        "text.png",
        "cut.png",
        "moving.gif",
        "images.npz",
        "words.npz",
    }
    latents = {"nan.npz", "flat.npz", "small.npz", "late.npz", "cut.npz", "cut.safetensors"}
    assert names - {"home"} == written | inputs | latents
