"""Finding, loading and saving models: folders, the built-in ones, and the Hugging Face hub.

A pipeline is a folder,

    model_index.json                                  which classes
    scheduler/scheduler_config.json
    unet/config.json
    unet/diffusion_pytorch_model.safetensors          or as `ddim.io.weights` tells

and this is what is written. The first models on the hub keep all of it at the root ("flat"); they are read too.

This module knows files and names; which classes are allowed is the pipeline's business.
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import import_module, resources
from pathlib import Path, PurePosixPath
from typing import Any, Self, cast

import torch

from ddim.io.atomic import write_folder
from ddim.io.config import read_json
from ddim.io.weights import (
    MAX_SHARD_SIZE,
    WEIGHTS,
    choose_weights,
    fill_model,
    read_weights,
    remove_stale_weights,
    write_weights,
)

logger = logging.getLogger(__name__)

MODEL_INDEX = "model_index.json"
CONFIGS = (MODEL_INDEX, "config.json", "scheduler_config.json")
# The hub's rules for names; there, an owner is optional for some old models, none of them a pipeline.
HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]*\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
HUB_TIMEOUT = 10.0
OFFLINE = "downloads are turned off"


def builtin_models() -> dict[str, Path]:
    """The models that ship with the package: name -> folder."""
    root = Path(str(resources.files("ddim") / "models"))
    return {index.parent.name: index.parent for index in sorted(root.glob(f"*/{MODEL_INDEX}"))}


def find_model(
    model: str | Path,
    variant: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    weights_in: Sequence[str] = ("unet", ""),
    use_safetensors: bool | None = None,
) -> Path:
    """The folder of a model.

    Args:
        model: the name of a built-in model, a folder, or a hub id such as `google/ddpm-cifar10-32`; tried in this
            order, so that a folder called `mnist` is reached as `./mnist`.
        variant: of the weights, for the choice of what to download.
        cache_dir: where downloads are kept; the hub client's own cache unless given.
        local_files_only: look into the cache only.
        revision: a branch, tag or commit of the hub repository.
        token: for private repositories; `True` for the one that is stored on this machine.
        weights_in: folders of the repository; the weights in the first of them that has a `config.json` are downloaded.
            All configurations are.
        use_safetensors: as for `ddim.io.weights.choose_weights`.

    Raises:
        FileNotFoundError: if it is none of the three, lacks such weights, or cannot be reached and is not in the cache.
    """
    name = str(model)
    if name in (builtin := builtin_models()):
        return builtin[name]
    if Path(name).is_dir():
        return Path(name)
    if isinstance(model, Path) or Path(name).exists() or not HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"there is no model {name!r}: it is not built in ({', '.join(builtin)}), not a folder, and not a hub id "
            "such as google/ddpm-cifar10-32"
        )
    needs = partial(_needed, variant=variant, weights_in=weights_in, use_safetensors=use_safetensors)
    return _download(name, needs, cache_dir, local_files_only, revision, token)


def _download(
    repo_id: str,
    needs: Callable[..., list[str]],
    cache_dir: str | Path | None,
    local_files_only: bool,
    revision: str | None,
    token: str | bool | None,
) -> Path:
    """A snapshot of just the files that are needed, from the hub or, if it cannot be reached, from the cache.

    `needs(names, source=...)` tells which of a repository's files those are, as `_needed` does.
    """
    from huggingface_hub import HfApi, snapshot_download

    trouble = OFFLINE
    if not local_files_only:
        try:
            with _hub_errors(repo_id, revision):
                # Not list_repo_files, which asks for 20 s before it gives up where there is no network.
                info = HfApi().model_info(repo_id, revision=revision, token=token, timeout=HUB_TIMEOUT)
            names = [file.rfilename for file in info.siblings or ()]
            needed = needs(names, source=f"the hub model {repo_id}")
            with _hub_errors(repo_id, revision):
                return Path(
                    snapshot_download(
                        repo_id, revision=revision, token=token, cache_dir=cache_dir, allow_patterns=needed
                    )
                )
        except _HubUnreachableError as error:
            trouble = str(error)
    try:
        # No patterns match nothing: a snapshot without the files that were never asked for is no incomplete one.
        folder = Path(
            snapshot_download(repo_id, revision=revision, cache_dir=cache_dir, allow_patterns=[], local_files_only=True)
        )
    except FileNotFoundError:
        raise FileNotFoundError(f"the model {repo_id} is neither a folder nor in the cache, and {trouble}") from None
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    needs(names, source=f"{trouble}, and the copy of {repo_id} in the cache")
    if trouble != OFFLINE:
        logger.warning("%s; the copy of %s in the cache is used", trouble, repo_id)
    return folder


class _HubUnreachableError(Exception):
    """The hub gave no answer, or one that says nothing about the model; the message tells the trouble."""


@contextlib.contextmanager
def _hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Sort the hub client's exceptions: a refusal is a `FileNotFoundError`, trouble on the way `_HubUnreachableError`.

    Those of the local disk (no space, no permission) pass.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    unreachable: tuple[type[Exception], ...] = (OSError, *_transport_errors())
    try:
        yield
    except GatedRepoError:
        raise FileNotFoundError(
            f"the model {repo_id} asks for permission on the hub; request it there and pass token="
        ) from None
    except RevisionNotFoundError:
        raise FileNotFoundError(f"the hub model {repo_id} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"the hub has no model {repo_id}, or it is private and the token does not open it"
        ) from None
    except unreachable as error:
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError):
            raise
        raise _HubUnreachableError(_trouble(error)) from None


def _trouble(error: Exception) -> str:
    """What stands between here and the hub, in one line."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return OFFLINE
    if isinstance(error, LocalTokenNotFoundError):
        return "no token is stored on this machine, which token=True asks for"
    if isinstance(error, HfHubHTTPError):
        said = (error.server_message or "no reason given").splitlines()[0]
        return f"the hub answers with status {error.response.status_code}: {said}"
    return f"the hub cannot be reached ({': '.join([type(error).__name__, *str(error).splitlines()[:1]])})"


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the HTTP library below the hub client raises without a network; which it is depends on the version."""
    errors: list[type[Exception]] = []
    for name, base in (("httpx", "HTTPError"), ("httpx2", "HTTPError"), ("requests", "RequestException")):
        with contextlib.suppress(ImportError):
            errors.append(getattr(import_module(name), base))
    return tuple(errors)


def _needed(
    names: Iterable[str], variant: str | None, weights_in: Sequence[str], use_safetensors: bool | None, source: str
) -> list[str]:
    """Of a repository's files: the configurations, and one format of the weights.

    Args:
        names: of the files, with folders.
        variant: as for `choose_weights`.
        weights_in: as for `find_model`.
        use_safetensors: as for `choose_weights`.
        source: where they come from, for messages.

    Raises:
        FileNotFoundError: if there are no such weights beside the configuration that they belong to.
    """
    paths = [PurePosixPath(name) for name in names]
    needed = [path for path in paths if path.name in CONFIGS]
    for folder in map(PurePosixPath, weights_in):
        if folder / "config.json" in needed:
            here = [path.name for path in paths if path.parent == folder]
            chosen = choose_weights(here, variant, source, use_safetensors)
            needed.append(folder / chosen)
            if ".index." in chosen:
                # An index does not tell its shards before it is read; their names follow a pattern.
                infix, suffix = re.escape(f".{variant}" if variant else ""), chosen.split(".")[1]
                shard = re.compile(rf"{WEIGHTS}({infix}-\d+-of-\d+|-\d+-of-\d+{infix})\.{suffix}")
                needed += [folder / name for name in here if shard.fullmatch(name)]
            break
    return [str(path) for path in needed]


def _build(cls: Any, path: Path, **overrides: Any) -> Any:
    """An instance of a class with `from_config` from a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else.
        TypeError: for an override that the class does not have.
    """
    content = read_json(path)
    try:
        return cls.from_config(content, **overrides)
    except Exception as error:  # constructors expect arguments of the right type and fail with a wrong one somehow
        if overrides:
            raise
        raise ValueError(f"{path} describes no {cls.__name__}: {error}") from error


def check_hub_id(repo_id: str) -> None:
    """ValueError for what cannot be the id of a repository on the hub."""
    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"{repo_id!r} is no id of a repository on the hub, which looks like owner/name")


def push_folder(
    save: Callable[[Path], Any], repo_id: str, private: bool | None, token: str | bool | None, commit_message: str
) -> str:
    """Upload what `save` writes into a folder to a hub repository, which is made where it is missing.

    Returns:
        The address of the commit.

    Raises:
        RuntimeError: if the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        failures: tuple[type[Exception], ...] = (OSError, *_transport_errors())
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message).commit_url)
        except failures as error:
            raise RuntimeError(f"the upload to {repo_id} failed: {_trouble(error)}") from error


class SchedulerFiles:
    """`from_pretrained` and `save_pretrained` of a scheduler: a folder with `scheduler_config.json`."""

    @classmethod
    def from_pretrained(cls, model: str | Path, subfolder: str | None = None, **where: Any) -> Self:
        """Read a scheduler's configuration; any diffusion scheduler's will do.

        Args:
            model: as for `find_model`.
            subfolder: the folder inside it, usually `scheduler`.
            where: `cache_dir`, `local_files_only`, `revision` and `token` of `find_model`; anything else overrides a
                constructor argument.

        Raises:
            FileNotFoundError: if there is no model or no configuration in it.
            ValueError: if the configuration is not valid.
        """
        options = {
            key: where.pop(key) for key in ("cache_dir", "local_files_only", "revision", "token") if key in where
        }
        folder = find_model(model, **options, weights_in=()) / (subfolder or "")
        return cast(Self, _build(cls, folder / cast(Any, cls).config_name, **where))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `scheduler_config.json` into a folder, which is made where it is missing."""
        configurable = cast(Any, self)
        with write_folder(Path(folder)) as temporary:
            (temporary / configurable.config_name).write_text(configurable.config_json(), encoding="utf-8")


class ModelFiles:
    """`from_pretrained` and `save_pretrained` of a network: a folder with `config.json` and weights."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        use_safetensors: bool | None = None,
    ) -> Self:
        """Build a network in evaluation mode from its configuration and weights.

        Args:
            model: as for `find_model`, and so are the arguments from `cache_dir` on.
            subfolder: the folder inside it, usually `unet`.
            torch_dtype: of the parameters; float32 unless given, whatever the file holds.
            variant: of the weights, such as `fp16`.

        Raises:
            FileNotFoundError: if there is no model, configuration or weights.
            ValueError: if one of them is damaged or they do not fit each other, or the dtype is no floating one.
        """
        dtype = torch_dtype or torch.float32
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"torch_dtype is {dtype!r}; it must be a floating dtype such as torch.bfloat16")
        subfolder = subfolder or ""
        folder = find_model(model, variant, cache_dir, local_files_only, revision, token, (subfolder,), use_safetensors)
        folder = folder / subfolder
        # Built without memory: initial weights would only be overwritten.
        with torch.device("meta"):
            network = _build(cls, folder / cast(Any, cls).config_name)
        fill_model(network, read_weights(folder, variant, use_safetensors), str(folder), dtype)
        return cast(Self, network.eval())

    def save_pretrained(
        self, folder: str | Path, variant: str | None = None, max_shard_size: int | str = MAX_SHARD_SIZE
    ) -> None:
        """Write `config.json` and safetensors, replacing weights of the same variant that are there.

        Args:
            folder: made where it is missing.
            variant: put into the file's name, such as `fp16`.
            max_shard_size: larger weights are split into files of at most this size, with an index: bytes, or
                `"500MB"`.

        Raises:
            OSError: if it cannot be written; what was there stays.
        """
        module = cast(Any, self)
        with write_folder(Path(folder)) as temporary:
            (temporary / module.config_name).write_text(module.config_json(), encoding="utf-8")
            write_weights(module.state_dict(), temporary, variant, max_shard_size)
            written = [path.name for path in temporary.iterdir()]
        remove_stale_weights(Path(folder), variant, written)
