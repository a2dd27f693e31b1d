"""The two libraries as clients see them, the registry of clients, and what clients share.

A client is a function `client(lib, folder)` written as user code is: it takes its classes from `lib`, writes below
`folder` only, and returns what it observes: tensors, arrays, images, numbers, names, in dictionaries and lists.
`test_clients.py` runs each one with `diffusers` and with `ddim` and compares the two results.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import ddim
from helpers import relative_error, seeded


@dataclass(frozen=True)
class Library:
    """The names that a client imports; `DiffusionPipeline` is what its own pipelines inherit from."""

    name: str
    DDIMPipeline: Any
    DDIMScheduler: Any
    DDIMInverseScheduler: Any
    UNet2DModel: Any
    DiffusionPipeline: Any


DIFFUSERS = Library(
    "diffusers",
    diffusers.DDIMPipeline,
    diffusers.DDIMScheduler,
    diffusers.DDIMInverseScheduler,
    diffusers.UNet2DModel,
    diffusers.DiffusionPipeline,
)
DDIM = Library(
    "ddim", ddim.DDIMPipeline, ddim.DDIMScheduler, ddim.DDIMInverseScheduler, ddim.UNet2DModel, ddim.DDIMPipeline
)

Observed = dict[str, Any]


@dataclass(frozen=True)
class Client:
    """A client and the largest difference of its numbers that is not an error, relative to the largest one above 1."""

    run: Callable[[Library, Path], Observed]
    tolerance: float


CLIENTS: dict[str, Client] = {}


def client(tolerance: float = 1e-5) -> Callable[[Callable[[Library, Path], Observed]], Callable[..., Observed]]:
    """Register a client under its name."""

    def register(run: Callable[[Library, Path], Observed]) -> Callable[[Library, Path], Observed]:
        CLIENTS[run.__name__] = Client(run, tolerance)
        return run

    return register


TINY: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def fill(module: nn.Module) -> None:
    """Draw the parameters one by one in the order of their names, so that they do not depend on who built them."""
    generator = seeded(0)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + ("norm" in name and name.endswith("weight")))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def make_unet(lib: Library, **changes: Any) -> Any:
    """Build a network of 8x8 images in evaluation mode, of the same weights in both libraries.

    Its predictions are small: x hardly changes per step, so that sampling does not amplify float32 rounding.
    """
    unet = lib.UNet2DModel(**TINY | changes).eval()
    fill(unet)
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.1)
    return unet


def make_pipeline(lib: Library, unet: Any = None, **settings: Any) -> Any:
    """Build a pipeline without a progress bar; `settings` are those of its scheduler."""
    pipe = lib.DDIMPipeline(make_unet(lib) if unet is None else unet, lib.DDIMScheduler(**settings))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, **settings: Any) -> np.ndarray:
    """Sample two images as an array, from seed 0."""
    settings = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np", "generator": seeded(0)} | settings
    return pipe(**settings).images


def file_names(folder: Path) -> list[str]:
    """Return the sorted relative paths of all files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without the entries that name a library and its version."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def outcome(call: Callable[[], Any], *expected: type[BaseException]) -> str:
    """Return the first of the expected exceptions that an `except` around the call catches."""
    try:
        call()
    except expected as error:
        return next(kind.__name__ for kind in expected if isinstance(error, kind))
    except Exception as error:
        return f"another exception: {type(error).__name__}: {error}"
    return "no exception"


def warned(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return the result of a call, and the categories of its warnings."""
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        result = call()
    return result, sorted({record.category.__name__ for record in records})


@contextmanager
def diffusers_log() -> Iterator[list[str]]:
    """Collect what `diffusers` logs at warning level or above."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler, level = logging.getLogger("diffusers"), Collect(), diffusers.utils.logging.get_verbosity()
    logger.addHandler(handler)
    diffusers.utils.logging.set_verbosity_warning()
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        diffusers.utils.logging.set_verbosity(level)


def assert_same(actual: Any, expected: Any, tolerance: float, at: str = "result") -> None:
    """Compare what a client observed with both libraries, entry by entry."""
    if isinstance(expected, Mapping):
        assert list(actual) == list(expected), at
        for name in expected:
            assert_same(actual[name], expected[name], tolerance, f"{at}[{name!r}]")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), f"{at}: {actual} != {expected}"
        for index, entries in enumerate(zip(actual, expected, strict=True)):
            assert_same(*entries, tolerance, f"{at}[{index}]")
    elif isinstance(expected, Tensor):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), at
        difference = relative_error(actual.detach(), expected.detach()) if expected.numel() else 0.0
        assert difference <= tolerance, f"{at}: {difference} apart"
    elif isinstance(expected, np.ndarray):
        assert actual.dtype == expected.dtype, at
        assert_same(torch.from_numpy(actual), torch.from_numpy(expected), tolerance, at)
    elif isinstance(expected, Image.Image):
        assert (actual.mode, actual.size) == (expected.mode, expected.size), at
        difference = np.abs(np.asarray(actual, int) - np.asarray(expected, int)).max()
        assert difference <= 1, f"{at}: {difference} of 255 apart"
    elif isinstance(expected, float):
        assert abs(actual - expected) <= tolerance, f"{at}: {actual} != {expected}"
    else:
        assert type(actual) is type(expected), f"{at}: {actual!r} != {expected!r}"
        assert actual == expected, f"{at}: {actual!r} != {expected!r}"
