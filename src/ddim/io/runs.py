"""Training runs as models: a run stands for its result or its newest checkpoint, and a checkpoint is a pipeline folder.

    RUN/final/                                          the result
    RUN/checkpoints/step-00001000/                      a pipeline folder, with files of its own:
        unet/diffusion_pytorch_model.safetensors            the averaged weights
        unet/diffusion_pytorch_model.raw.safetensors        the weights being trained: the variant `raw`
        SHA256SUMS                                          of all files, as `sha256sum --check` reads it

A model may be named with a variant of its weights: `RUN@raw`, `RUN/checkpoints/step-00001000@raw`, `folder@fp16`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path

from ddim.io.atomic import is_vacant
from ddim.validation import shown

logger = logging.getLogger(__name__)

RAW = "raw"
"""The variant of a checkpoint's weights that are being trained; those without a variant are averaged."""
CHECKPOINTS, FINAL = "checkpoints", "final"
SUMS_FILE = "SHA256SUMS"
STEP_FOLDER = re.compile(r"step-(\d{8,})")
VARIANT = re.compile(r"[A-Za-z0-9_-]+")


def as_model(model: str | os.PathLike[str]) -> str | Path:
    """Return a model's name, or the `Path` of its folder.

    Args:
        model: a name or a path.

    Raises:
        TypeError: for anything else.

    Example:
        >>> as_model("mnist")
        'mnist'
    """
    if isinstance(model, str):
        return model
    if isinstance(model, os.PathLike):
        return Path(model)
    raise TypeError(f"a model must be given by its name or folder, got {shown(model)}")


def split_variant(model: str | os.PathLike[str], variant: str | None = None) -> tuple[str | Path, str | None]:
    """Split a model's name from the variant that it may end in.

    Args:
        model: a name such as `RUN@raw`; one that is a folder as it stands is not split.
        variant: given beside it.

    Returns:
        The model's name, a `Path` unless `model` is a string, and the variant, `None` for the weights without one.

    Raises:
        ValueError: if both name a variant.
        TypeError: if the model is neither a string nor a path.

    Example:
        >>> split_variant("runs/faces@raw")
        ('runs/faces', 'raw')
        >>> split_variant("mnist")
        ('mnist', None)
    """
    model = as_model(model)
    name, _, suffix = os.fspath(model).rpartition("@")
    # Not Path.exists, which raises for names that no file can have.
    if not name or not VARIANT.fullmatch(suffix) or os.path.exists(model):  # noqa: PTH110
        return model, variant
    if variant is not None:
        raise ValueError(
            f"give the variant in the model's name or as an argument, not both, got {shown(str(model))} and {variant}"
        )
    return type(model)(name), suffix


def is_run(folder: Path) -> bool:
    """Return whether a folder is a training run that can be loaded as a model.

    Args:
        folder: any path.

    Example:
        >>> is_run(Path("missing"))
        False
    """
    return os.path.isdir(folder / CHECKPOINTS) and os.path.isfile(folder / "config.yaml")  # noqa: PTH112, PTH113


def refuse_run(folder: Path) -> None:
    """Raise if a folder belongs to a training run, of which a model written into it would take the place.

    Args:
        folder: where something is about to be written.

    Raises:
        ValueError: if it is a run or one of its checkpoints.

    Example:
        >>> refuse_run(Path("missing"))
    """
    if is_run(folder) or _is_checkpoint(folder):
        raise ValueError(f"{folder} is a training run or one of its checkpoints; write to another folder")


def check_model_folder(folder: Path, overwrite: bool = False) -> None:
    """Check, before any work, that a model can be written into a folder.

    Args:
        folder: where it is about to be written; may be missing.
        overwrite: allow a folder that is not empty.

    Raises:
        NotADirectoryError: if it is a file.
        ValueError: if it is a training run or one of its checkpoints.
        FileExistsError: if it is not empty and `overwrite` is false.

    Example:
        >>> check_model_folder(Path("missing"))
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, not a folder")
    refuse_run(folder)
    if not is_vacant(folder) and not overwrite:
        raise FileExistsError(
            f"{folder} is not empty; pass overwrite=True to replace a model in it, or write elsewhere"
        )


def resolve_run(folder: Path, index_name: str, variant: str | None = None) -> Path:
    """Return the pipeline folder that a training run stands for: its result, else its newest complete checkpoint.

    Args:
        folder: of a run, a checkpoint or anything else.
        index_name: of the file that every pipeline folder has.
        variant: of the weights; the result lacks those that were being trained, which the last checkpoint has.

    Returns:
        The pipeline folder; `folder` itself if it is not a run.

    Raises:
        FileNotFoundError: if a run has no checkpoint that is a pipeline folder yet.
        ValueError: if `folder` is a checkpoint and damaged.

    Example:
        >>> resolve_run(Path("images"), "model_index.json")
        PosixPath('images')
    """
    if _is_checkpoint(folder):
        verify_checksums(folder)
        return folder
    if (folder / index_name).exists() or not is_run(folder):
        return folder
    final = folder / FINAL
    if (final / index_name).is_file() and (variant is None or any(final.rglob(f"*.{variant}.*"))):
        return final
    for checkpoint in list_checkpoints(folder / CHECKPOINTS):
        try:
            verify_checksums(checkpoint)
        except ValueError as error:
            logger.warning("%s; it is skipped", error)
            continue
        if (checkpoint / index_name).is_file():
            return checkpoint
    raise FileNotFoundError(f"the training run {folder} has no checkpoint that can be loaded as a model yet")


def _is_checkpoint(folder: Path) -> bool:
    return STEP_FOLDER.fullmatch(folder.name) is not None and (folder / SUMS_FILE).is_file()


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, the newest first, complete or not.

    Args:
        folder: folder of all checkpoints; may be missing.

    Returns:
        Folders, in descending order of their steps.

    Example:
        >>> list_checkpoints(Path("missing"))
        []
    """
    if not os.path.isdir(folder):  # noqa: PTH112 - Path.glob raises for names that no file can have
        return []
    folders = [path for path in folder.glob("step-*") if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=checkpoint_step, reverse=True)


def checkpoint_step(path: Path) -> int:
    """Return the step in a checkpoint's name.

    Args:
        path: folder of the checkpoint, `step-...`.

    Example:
        >>> checkpoint_step(Path("checkpoints/step-00001000"))
        1000
    """
    return int(path.name.removeprefix("step-"))


def checksums(path: Path) -> str:
    """Compute the content of a folder's `SHA256SUMS`: per file, SHA-256, two spaces, name.

    Args:
        path: the folder.

    Returns:
        One line per file in it and below it, except `SHA256SUMS`, sorted by name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "empty").write_text("")
        ...     checksums(Path(folder))[:8]
        'e3b0c442'
    """
    lines = []
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p != path / SUMS_FILE):
        with file.open("rb") as content:
            name = file.relative_to(path).as_posix()
            lines.append(f"{hashlib.file_digest(content, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines)


def verify_checksums(path: Path) -> None:
    """Check that a checkpoint's files are, to the byte, what was written.

    Args:
        path: folder of the checkpoint.

    Raises:
        ValueError: if they are not, or a file is missing.

    Example:
        >>> verify_checksums(Path("step-00000001"))
        Traceback (most recent call last):
        ValueError: the checkpoint step-00000001 is damaged or incomplete: it has no SHA256SUMS
    """
    sums = path / SUMS_FILE
    if not sums.is_file():
        raise ValueError(f"the checkpoint {path} is damaged or incomplete: it has no {SUMS_FILE}")
    try:
        is_complete = sums.read_bytes() == checksums(path).encode()
    except OSError as error:
        raise ValueError(f"the checkpoint {path} is damaged or incomplete: {error}") from None
    if not is_complete:
        raise ValueError(f"the checkpoint {path} is damaged or incomplete: its files do not match {SUMS_FILE}")
