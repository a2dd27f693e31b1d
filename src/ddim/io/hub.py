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
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module, resources
from inspect import signature
from pathlib import Path, PurePosixPath
from typing import Any

from ddim.io.atomic import write_folder
from ddim.io.json_files import read_json
from ddim.io.runs import as_model, is_run, refuse_run, resolve_run, split_variant
from ddim.io.weights import WEIGHTS, choose_weights, remove_stale_weights
from ddim.validation import nearest, shorten, shown

logger = logging.getLogger(__name__)

MODEL_INDEX = "model_index.json"
MODEL_FILES = (MODEL_INDEX, "scheduler_config.json", "scheduler/scheduler_config.json")
"""A folder with one of them is a model."""
CONFIGS = (MODEL_INDEX, "config.json", "scheduler_config.json")
HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]*\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
"""The hub's rules for repository names. A few old models have no owner; none of them is a pipeline."""
HUB_TIMEOUT_SECONDS = 10.0
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
OFFLINE = "downloads are turned off"


@dataclass(frozen=True)
class HubOptions:
    """Where and how models are looked up on the hub.

    Attributes:
        cache_dir: the folder of downloads; `None` for the hub client's own cache.
        local_files_only: use the cache only, without the network.
        revision: a branch, tag or commit of the repository; `None` for its main branch.
        token: a token for private repositories, or `True` for the one stored on this machine.
        force_download: download files again that are in the cache.

    Example:
        >>> HubOptions(revision="v1.0").local_files_only
        False
    """

    cache_dir: str | Path | None = None
    local_files_only: bool = False
    revision: str | None = None
    token: str | bool | None = None
    force_download: bool = False


DEFAULT_HUB_OPTIONS = HubOptions()
HUB_OPTION_NAMES = tuple(field.name for field in fields(HubOptions))


def pop_hub_options(options: dict[str, Any]) -> HubOptions:
    """Take the attributes of `HubOptions` out of a call's keyword arguments.

    Args:
        options: keyword arguments; those that are taken are removed.

    Example:
        >>> options = {"revision": "main", "subfolder": "unet"}
        >>> pop_hub_options(options).revision, options
        ('main', {'subfolder': 'unet'})
    """
    taken = {name: options.pop(name) for name in HUB_OPTION_NAMES if name in options}
    # Scripts pass None for options that they leave to the library.
    return HubOptions(**{name: value for name, value in taken.items() if value is not None})


def builtin_models() -> dict[str, Path]:
    """Return the folders of the models that ship with the package, by name.

    Example:
        >>> list(builtin_models())
        ['faces', 'mnist', 'mnist-labels']
    """
    root = Path(str(resources.files("ddim") / "models"))
    return {index.parent.name: index.parent for index in sorted(root.glob(f"*/{MODEL_INDEX}"))}


def is_model(source: str) -> bool:
    """Return whether a name means a model rather than images: a built-in one, a folder with a pipeline, a training run.

    A hub id alone does not show what it is the id of.

    Args:
        source: what a user gave.

    Example:
        >>> is_model("mnist"), is_model("images/")
        (True, False)
    """
    # Not Path.is_file, which raises for names that no file can have.
    name = str(split_variant(source)[0])
    folder = Path(name)
    is_folder = any(os.path.isfile(folder / file) for file in MODEL_FILES)  # noqa: PTH113
    return name in builtin_models() or is_folder or is_run(folder)


def find_model(
    model: str | Path,
    options: HubOptions = DEFAULT_HUB_OPTIONS,
    *,
    variant: str | None = None,
    weights_in: Sequence[str] = ("unet", ""),
    use_safetensors: bool | None = None,
    folders: Sequence[str] = (),
) -> Path:
    """Find the folder of a model, downloading it from the hub if necessary.

    Args:
        model: the name of a built-in model, a folder, or a hub id such as `google/ddpm-cifar10-32`; tried in this
            order, so that a folder called `mnist` is reached as `./mnist`. The folder of a training run stands for its
            result or its newest checkpoint (`ddim.io.runs`).
        options: the cache, revision and token for the hub.
        variant: the variant of the weights to download, such as `fp16`; `model` may end in it instead (`NAME@fp16`).
        weights_in: folders of the repository; the weights in the first of them that has a `config.json` are downloaded.
            All configurations are.
        use_safetensors: `True` to download safetensors only, `False` for pickles only, `None` for either.
        folders: further folders of the repository to download, all files but pickles.

    Returns:
        The folder on this machine.

    Raises:
        FileNotFoundError: if the model is none of the three, lacks such weights, or cannot be reached and is not in the
            cache.

    Example:
        >>> find_model("mnist").name
        'mnist'
    """
    model, variant = split_variant(model, variant)
    name = str(model)
    if name in (builtin := builtin_models()):
        return builtin[name]
    if os.path.isdir(name):  # noqa: PTH112
        return resolve_run(Path(name), MODEL_INDEX, variant)
    if isinstance(model, Path) or os.path.exists(name) or not HUB_ID.fullmatch(name):  # noqa: PTH110
        raise FileNotFoundError(
            f"the model {shorten(repr(name))} does not exist: it is not built in ({', '.join(builtin)}), not a folder, "
            f"and not a hub id such as google/ddpm-cifar10-32{nearest(name, builtin)}"
        )
    select = partial(
        _required_files, variant=variant, weights_in=weights_in, use_safetensors=use_safetensors, folders=folders
    )
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
                        repo_id,
                        revision=revision,
                        token=options.token,
                        cache_dir=cache_dir,
                        allow_patterns=required,
                        force_download=options.force_download,
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
        raise FileNotFoundError(f"the hub model {repo_id} has no revision {shown(revision)}") from None
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
    names: Iterable[str],
    variant: str | None,
    weights_in: Sequence[str],
    use_safetensors: bool | None,
    folders: Sequence[str],
    source: str,
) -> list[str]:
    """Choose from a repository's files all configurations and one format of the weights.

    Args:
        names: paths of the files in the repository.
        variant: the variant of the weights, such as `fp16`.
        weights_in: folders; the weights are those of the first that has a `config.json`.
        use_safetensors: `True` for safetensors only, `False` for pickles only, `None` for either.
        folders: further folders, of which all files but pickles are required.
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
    required += [path for path in paths if path.parts[0] in folders and path.suffix not in PICKLES]
    return [str(path) for path in dict.fromkeys(required)]


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
        raise ValueError(f"repo_id must be a hub id such as owner/name, got {shown(repo_id)}")


def read_config(
    model: str | os.PathLike[str], config_name: str, subfolder: str | None, options: HubOptions
) -> tuple[dict[str, Any], str | None]:
    """Read a configuration file of a model.

    Args:
        model: the name of a built-in model, a folder, a hub id, or the file itself.
        config_name: the file's name.
        subfolder: its folder inside the model; without the file in it, that of the model itself is read.
        options: the cache, revision and token for the hub.

    Returns:
        The content, and the hub's commit; `None` where the model is not from the hub.

    Raises:
        FileNotFoundError: if the model does not exist or has no such file.
        ValueError: if the file does not hold a JSON object.

    Example:
        >>> read_config("mnist", "config.json", "unet", DEFAULT_HUB_OPTIONS)[0]["in_channels"]
        1
    """
    model = as_model(model)
    if Path(model).is_file():
        return read_json(Path(model)), None
    folder = find_model(model, options, weights_in=())
    commit = folder.name if folder.parent.name == "snapshots" else None
    nested = folder / (subfolder or "") / config_name
    return read_json(nested if nested.is_file() else folder / config_name), commit


def save_and_push(
    write: Callable[[Path], Any],
    folder: Path,
    push_to_hub: bool,
    title: str,
    options: dict[str, Any],
    variant: str | None = None,
    weights_in: tuple[str, ...] = (),
) -> None:
    """Write files into a folder, delete weights that an earlier save left there, and upload the files if required.

    Args:
        write: writes the files into an empty folder that it is given.
        folder: where they end up; it is created if missing.
        push_to_hub: whether to upload them.
        title: the class's name, for the commit's message.
        options: of the upload, as `push_saved` takes them.
        variant: the variant of the weights.
        weights_in: folders inside it that hold weights.

    Raises:
        TypeError: for options without `push_to_hub`, or that the upload does not know.
        ValueError: if the folder is a training run or one of its checkpoints.
        OSError: if the files cannot be written.
        RuntimeError: if the hub cannot be reached or refuses.
    """
    if options and not push_to_hub:
        raise TypeError(f"save_pretrained() takes {', '.join(sorted(options))} only with push_to_hub=True")
    refuse_run(folder)
    with write_folder(folder) as temporary:
        write(temporary)
        written = {name: [path.name for path in (temporary / name).iterdir()] for name in weights_in}
    for name, names in written.items():
        remove_stale_weights(folder / name, variant, names)
    if push_to_hub:
        push_saved(write, folder, title, **options)


def push_saved(
    save: Callable[[Path], Any],
    folder: Path,
    title: str,
    *,
    repo_id: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload what `save_pretrained(folder, push_to_hub=True, ...)` has written.

    Args:
        save: writes the files into an empty folder that it is given.
        folder: where they were written.
        title: the class's name, for the commit's message.
        repo_id: the repository; defaults to one of the folder's name.
        private: whether a new repository is private; `None` for the account's default.
        token: a token that may write, or `True` for the one stored on this machine.
        commit_message: the first line of the commit.
        create_pr: propose the commit instead of adding it.

    Returns:
        The URL of the commit.

    Raises:
        RuntimeError: if the hub cannot be reached or refuses.
    """
    message = commit_message or f"Upload {title}"
    return push_folder(save, repo_id or folder.resolve().name, private, token, message, create_pr)


def push_folder(
    save: Callable[[Path], Any],
    repo_id: str,
    private: bool | None,
    token: str | bool | None,
    commit_message: str,
    create_pr: bool = False,
) -> str:
    """Upload a folder to a hub repository, which is created if missing.

    Args:
        save: writes the folder's content into an empty folder that it is given.
        repo_id: `owner/name`.
        private: whether a new repository is private; `None` for the account's default.
        token: a token that may write, or `True` for the one stored on this machine.
        commit_message: the first line of the commit.
        create_pr: propose the commit instead of adding it.

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
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, create_pr=create_pr
            )
            return str(commit.commit_url)
        except failures as error:
            raise RuntimeError(f"the upload to {repo_id} failed: {_reason(error)}") from error


class PushToHub:
    """Mixin with `push_to_hub` for what has `save_pretrained`."""

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        **settings: Any,
    ) -> str:
        """Publish this on the Hugging Face hub, in a repository that is created if it does not exist.

        Args:
            repo_id: `owner/name`.
            commit_message: the first line of the commit; defaults to "Upload" and the class's name.
            private: whether a new repository is private; `None` for the owner's default.
            token: with the right to write; defaults to the one stored on this machine.
            create_pr: propose the commit instead of adding it.
            safe_serialization: `False` uploads weights as pickles (`.bin`) instead of safetensors.
            variant: of the weights, such as `fp16`.
            subfolder: where the files end up in the repository; defaults to its root.
            settings: further ones of `save_pretrained`, such as `max_shard_size="500MB"`.

        Returns:
            The URL of the commit.

        Raises:
            RuntimeError: if the hub cannot be reached or refuses.
        """
        message = commit_message or f"Upload {type(self).__name__}"

        save_pretrained: Callable[..., Any] = self.save_pretrained  # type: ignore[attr-defined]
        weights = {"safe_serialization": safe_serialization, "variant": variant}
        # A scheduler has no weights.
        accepted = {k: v for k, v in weights.items() if k in signature(save_pretrained).parameters}

        def save(folder: Path) -> None:
            save_pretrained(folder / (subfolder or ""), **accepted, **settings)

        return push_folder(save, repo_id, private, token, message, create_pr)
