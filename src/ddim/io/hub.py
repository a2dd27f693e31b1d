"""Finding, loading and saving models: folders, the built-in ones, and the Hugging Face hub.

A pipeline is a folder,

    model_index.json                                  which classes
    scheduler/scheduler_config.json
    unet/config.json
    unet/diffusion_pytorch_model.safetensors          or another file that `ddim.io.weights` reads

which is the layout written. The first models on the hub keep all files at the root ("flat"); they are read too.

This module deals in files and names; the pipeline decides which classes are allowed.
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module, resources
from pathlib import Path, PurePosixPath
from typing import Any, Self, cast

import torch

from ddim.io.atomic import write_folder
from ddim.io.json_files import read_json
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
HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]*\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
"""The hub's rules for repository names. A few old models have no owner; none of them is a pipeline."""
HUB_TIMEOUT_SECONDS = 10.0
OFFLINE = "downloads are turned off"


@dataclass(frozen=True)
class HubOptions:
    """Where and how models are looked up on the hub.

    Attributes:
        cache_dir: the folder of downloads; `None` for the hub client's own cache.
        local_files_only: use the cache only, without the network.
        revision: a branch, tag or commit of the repository; `None` for its main branch.
        token: a token for private repositories, or `True` for the one stored on this machine.

    Example:
        >>> HubOptions(revision="v1.0").local_files_only
        False
    """

    cache_dir: str | Path | None = None
    local_files_only: bool = False
    revision: str | None = None
    token: str | bool | None = None


DEFAULT_HUB_OPTIONS = HubOptions()


def builtin_models() -> dict[str, Path]:
    """Return the folders of the models that ship with the package, by name.

    Example:
        >>> list(builtin_models())
        ['mnist']
    """
    root = Path(str(resources.files("ddim") / "models"))
    return {index.parent.name: index.parent for index in sorted(root.glob(f"*/{MODEL_INDEX}"))}


def find_model(
    model: str | Path,
    options: HubOptions = DEFAULT_HUB_OPTIONS,
    *,
    variant: str | None = None,
    weights_in: Sequence[str] = ("unet", ""),
    use_safetensors: bool | None = None,
) -> Path:
    """Find the folder of a model, downloading it from the hub if necessary.

    Args:
        model: the name of a built-in model, a folder, or a hub id such as `google/ddpm-cifar10-32`; tried in this
            order, so that a folder called `mnist` is reached as `./mnist`.
        options: the cache, revision and token for the hub.
        variant: the variant of the weights to download, such as `fp16`.
        weights_in: folders of the repository; the weights in the first of them that has a `config.json` are downloaded.
            All configurations are.
        use_safetensors: `True` to download safetensors only, `False` for pickles only, `None` for either.

    Returns:
        The folder on this machine.

    Raises:
        FileNotFoundError: if the model is none of the three, lacks such weights, or cannot be reached and is not in the
            cache.

    Example:
        >>> find_model("mnist").name
        'mnist'
    """
    name = str(model)
    if name in (builtin := builtin_models()):
        return builtin[name]
    if Path(name).is_dir():
        return Path(name)
    if isinstance(model, Path) or Path(name).exists() or not HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"the model {name!r} does not exist: it is not built in ({', '.join(builtin)}), not a folder, and not a "
            "hub id such as google/ddpm-cifar10-32"
        )
    select = partial(_required_files, variant=variant, weights_in=weights_in, use_safetensors=use_safetensors)
    return _download(name, select, options)


def _download(repo_id: str, select: Callable[..., list[str]], options: HubOptions) -> Path:
    """Return a snapshot of the required files, from the hub or, if it cannot be reached, from the cache.

    `select(names, source=...)` chooses them among the repository's files, as `_required_files` does.
    """
    from huggingface_hub import HfApi, snapshot_download

    revision, cache_dir = options.revision, options.cache_dir
    trouble = OFFLINE
    if not options.local_files_only:
        try:
            with _hub_errors(repo_id, revision):
                # list_repo_files would take 20 s to fail without a network.
                info = HfApi().model_info(repo_id, revision=revision, token=options.token, timeout=HUB_TIMEOUT_SECONDS)
            names = [file.rfilename for file in info.siblings or ()]
            required = select(names, source=f"the hub model {repo_id}")
            with _hub_errors(repo_id, revision):
                return Path(
                    snapshot_download(
                        repo_id, revision=revision, token=options.token, cache_dir=cache_dir, allow_patterns=required
                    )
                )
        except _HubUnreachableError as error:
            trouble = str(error)
    try:
        # Without patterns, the client would report a snapshot of the required files alone as incomplete.
        folder = Path(
            snapshot_download(repo_id, revision=revision, cache_dir=cache_dir, allow_patterns=[], local_files_only=True)
        )
    except FileNotFoundError:
        raise FileNotFoundError(f"the model {repo_id} is neither a folder nor in the cache, and {trouble}") from None
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    select(names, source=f"{trouble}, and the copy of {repo_id} in the cache")
    if trouble != OFFLINE:
        logger.warning("%s; the copy of %s in the cache is used", trouble, repo_id)
    return folder


class _HubUnreachableError(Exception):
    """The hub did not answer, or failed in a way that is unrelated to the model; the message gives the reason."""


@contextlib.contextmanager
def _hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Translate the hub client's exceptions: refusals into `FileNotFoundError`, failures into `_HubUnreachableError`.

    Errors of the local disk (no space, no permission) pass unchanged.
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
        raise _HubUnreachableError(_reason(error)) from None


def _reason(error: Exception) -> str:
    """Return in one line why the hub did not serve a request."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return OFFLINE
    if isinstance(error, LocalTokenNotFoundError):
        return "no token is stored on this machine, which token=True asks for"
    if isinstance(error, HfHubHTTPError):
        answer = (error.server_message or "no reason given").splitlines()[0]
        return f"the hub answers with status {error.response.status_code}: {answer}"
    return f"the hub cannot be reached ({': '.join([type(error).__name__, *str(error).splitlines()[:1]])})"


def _transport_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of the HTTP libraries that versions of the hub client use."""
    errors: list[type[Exception]] = []
    for name, base in (("httpx", "HTTPError"), ("httpx2", "HTTPError"), ("requests", "RequestException")):
        with contextlib.suppress(ImportError):
            errors.append(getattr(import_module(name), base))
    return tuple(errors)


def _required_files(
    names: Iterable[str], variant: str | None, weights_in: Sequence[str], use_safetensors: bool | None, source: str
) -> list[str]:
    """Choose from a repository's files all configurations and one format of the weights.

    Args:
        names: paths of the files in the repository.
        variant: the variant of the weights, such as `fp16`.
        weights_in: folders; the weights are those of the first that has a `config.json`.
        use_safetensors: `True` for safetensors only, `False` for pickles only, `None` for either.
        source: the repository's name in messages.

    Raises:
        FileNotFoundError: if that folder has no such weights.
    """
    paths = [PurePosixPath(name) for name in names]
    required = [path for path in paths if path.name in CONFIGS]
    for folder in map(PurePosixPath, weights_in):
        if folder / "config.json" in required:
            siblings = [path.name for path in paths if path.parent == folder]
            chosen = choose_weights(siblings, variant, source, use_safetensors)
            required.append(folder / chosen)
            if ".index." in chosen:
                # The shards' names are in the index, which is not downloaded yet; they follow a pattern.
                infix, suffix = re.escape(f".{variant}" if variant else ""), chosen.split(".")[1]
                shard = re.compile(rf"{WEIGHTS}({infix}-\d+-of-\d+|-\d+-of-\d+{infix})\.{suffix}")
                required += [folder / name for name in siblings if shard.fullmatch(name)]
            break
    return [str(path) for path in required]


def _build(cls: Any, path: Path, **overrides: Any) -> Any:
    """Build an instance of a class with `from_config` from a configuration file.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it does not describe an instance of the class.
        TypeError: for an override that the constructor does not accept.
    """
    content = read_json(path)
    try:
        return cls.from_config(content, **overrides)
    except Exception as error:  # given values of the wrong type, constructors raise errors of many kinds
        if overrides:
            raise
        raise ValueError(f"{path} does not describe a {cls.__name__}: {error}") from error


def check_hub_id(repo_id: str) -> None:
    """Check that a text has the form of a repository's id on the hub.

    Args:
        repo_id: `owner/name`.

    Raises:
        ValueError: if it does not have that form.

    Example:
        >>> check_hub_id("mine")
        Traceback (most recent call last):
        ValueError: repo_id must be a hub id such as owner/name, got 'mine'
    """
    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id must be a hub id such as owner/name, got {repo_id!r}")


def push_folder(
    save: Callable[[Path], Any], repo_id: str, private: bool | None, token: str | bool | None, commit_message: str
) -> str:
    """Upload a folder to a hub repository, which is created if missing.

    Args:
        save: writes the folder's content into an empty folder that it is given.
        repo_id: `owner/name`.
        private: whether a new repository is private; `None` for the account's default.
        token: a token that may write, or `True` for the one stored on this machine.
        commit_message: the first line of the commit.

    Returns:
        The URL of the commit.

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
            raise RuntimeError(f"the upload to {repo_id} failed: {_reason(error)}") from error


class SchedulerFiles:
    """Mixin with `from_pretrained` and `save_pretrained` of a scheduler: a folder with `scheduler_config.json`."""

    @classmethod
    def from_pretrained(cls, model: str | Path, subfolder: str | None = None, **options: Any) -> Self:
        """Build a scheduler from the configuration of any diffusion scheduler.

        Args:
            model: the name of a built-in model, a folder, or a hub id such as `google/ddpm-cifar10-32`.
            subfolder: the folder inside it, usually `scheduler`.
            options: `cache_dir`, `local_files_only`, `revision` and `token`, as in `HubOptions`; anything else
                overrides an argument of the constructor.

        Returns:
            The scheduler.

        Raises:
            FileNotFoundError: if the model does not exist, or has no configuration.
            ValueError: if the configuration is not valid.
            TypeError: for an override that the constructor does not accept.

        Example:
            >>> from ddim import DDIMScheduler
            >>> DDIMScheduler.from_pretrained("mnist", "scheduler").config.num_train_timesteps
            1000
        """
        hub_options = {field.name: options.pop(field.name) for field in fields(HubOptions) if field.name in options}
        folder = find_model(model, HubOptions(**hub_options), weights_in=()) / (subfolder or "")
        return cast(Self, _build(cls, folder / cast(Any, cls).config_name, **options))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `scheduler_config.json` into a folder.

        Args:
            folder: the folder; it is created if missing.

        Raises:
            OSError: if it cannot be written.

        Example:
            >>> from ddim import DDIMScheduler
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     DDIMScheduler().save_pretrained(folder)
            ...     [path.name for path in Path(folder).iterdir()]
            ['scheduler_config.json']
        """
        configurable = cast(Any, self)
        with write_folder(Path(folder)) as temporary:
            (temporary / configurable.config_name).write_text(configurable.config_json(), encoding="utf-8")


class ModelFiles:
    """Mixin with `from_pretrained` and `save_pretrained` of a network: a folder with `config.json` and weights."""

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
            model: the name of a built-in model, a folder, or a hub id such as `google/ddpm-cifar10-32`.
            subfolder: the folder inside it, usually `unet`.
            torch_dtype: a floating dtype for the parameters; defaults to float32, whatever the file holds.
            variant: the variant of the weights, such as `fp16`.
            cache_dir: the folder of downloads; defaults to the hub client's own cache.
            local_files_only: use the cache only, without the network.
            revision: a branch, tag or commit of the hub repository.
            token: a token for private repositories, or `True` for the one stored on this machine.
            use_safetensors: `True` to read safetensors only, `False` for pickles only, `None` for either.

        Returns:
            The network.

        Raises:
            FileNotFoundError: if the model does not exist, or has no configuration or weights.
            ValueError: if the configuration or the weights are damaged, or do not fit each other, or if `torch_dtype`
                is not a floating dtype.

        Example:
            >>> from ddim import UNet2DModel
            >>> UNet2DModel.from_pretrained("mnist", "unet").config.in_channels
            1
        """
        dtype = torch_dtype or torch.float32
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"torch_dtype must be a floating dtype such as torch.bfloat16, got {dtype!r}")
        subfolder = subfolder or ""
        options = HubOptions(cache_dir, local_files_only, revision, token)
        folder = find_model(model, options, variant=variant, weights_in=(subfolder,), use_safetensors=use_safetensors)
        folder = folder / subfolder
        # Built on the meta device, because initial weights would only be overwritten.
        with torch.device("meta"):
            network = _build(cls, folder / cast(Any, cls).config_name)
        fill_model(network, read_weights(folder, variant, use_safetensors), str(folder), dtype)
        return cast(Self, network.eval())

    def save_pretrained(
        self, folder: str | Path, variant: str | None = None, max_shard_size: int | str = MAX_SHARD_SIZE
    ) -> None:
        """Write `config.json` and the weights as safetensors, replacing weights of the same variant.

        Args:
            folder: the folder; it is created if missing.
            variant: part of the weight file's name, such as `fp16`.
            max_shard_size: the size above which weights are split into several files with an index, in bytes or as
                `"500MB"`.

        Raises:
            OSError: if it cannot be written; the folder is as it was.

        Example:
            >>> from ddim import UNet2DModel
            >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(32,), down_block_types=("DownBlock2D",),
            ...                    up_block_types=("UpBlock2D",))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     unet.save_pretrained(folder)
            ...     sorted(path.name for path in Path(folder).iterdir())
            ['config.json', 'diffusion_pytorch_model.safetensors']
        """
        module = cast(Any, self)
        with write_folder(Path(folder)) as temporary:
            (temporary / module.config_name).write_text(module.config_json(), encoding="utf-8")
            write_weights(module.state_dict(), temporary, variant, max_shard_size)
            written = [path.name for path in temporary.iterdir()]
        remove_stale_weights(Path(folder), variant, written)
