"""Calls of this library in a process whose hub is a `hub_server.Hub`.

    with client(hub.url, home) as call:
        weights = call(load, "owner/name")

`huggingface_hub` reads its settings from the environment when it is imported: another hub needs another process. What
is called there must be a function of a module that can be imported, hence this one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel
from programs import FORKSERVER

Weights = dict[str, NDArray[np.float32]]

SETTINGS = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


@contextmanager
def client(url: str, home: Path, **environment: str) -> Iterator[Callable[..., Any]]:
    """A function that calls functions in the process, and returns or raises what they do.

    Args:
        url: of the hub.
        home: where the process keeps its cache and looks for a token.
        environment: more of it.
    """
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home)} | SETTINGS | environment
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with ProcessPoolExecutor(1, FORKSERVER, _set_environment, (own | settings,)) as executor:
        yield lambda function, *arguments, **named: executor.submit(function, *arguments, **named).result(timeout=60)


def _set_environment(variables: dict[str, str]) -> None:
    """Prepare the process, before it imports `huggingface_hub`."""
    os.environ.clear()
    os.environ.update(variables)


def numbers(unet: UNet2DModel) -> Weights:
    """The weights of a network."""
    return {name: tensor.float().numpy().copy() for name, tensor in unet.state_dict().items()}


def load(model: str, **arguments: Any) -> Weights:
    """The weights of a pipeline."""
    return numbers(DDIMPipeline.from_pretrained(model, **arguments).unet)


def load_unet(model: str, **arguments: Any) -> Weights:
    """The weights of a network without a pipeline."""
    return numbers(UNet2DModel.from_pretrained(model, **arguments))


def load_scheduler(model: str, **arguments: Any) -> dict[str, Any]:
    """The configuration of a scheduler without a pipeline."""
    return dict(DDIMScheduler.from_pretrained(model, **arguments).config)


def load_with_scheduler(model: str, **config: Any) -> dict[str, Any]:
    """The configuration of a pipeline's scheduler, where one of this configuration is given."""
    return dict(DDIMPipeline.from_pretrained(model, scheduler=DDIMScheduler(**config)).scheduler.config)


def load_images(source: str, **arguments: Any) -> tuple[str, str, list[NDArray[np.uint8]]]:
    """The name and identity of a collection of images, and all of them."""
    # `datasets` is slow to import, and no other function requires it.
    from ddim.data.sources import open_source

    images = open_source(source, **arguments)
    return images.name, images.identity, [np.asarray(decode()) for decode in images.fetch(range(images.count))]


def push(folder: Path, repo_id: str, **arguments: Any) -> str:
    """Upload the pipeline in a folder."""
    return DDIMPipeline.from_pretrained(folder).push_to_hub(repo_id, **arguments)
