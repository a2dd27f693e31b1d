"""Files of latent codes, with the settings they were made with.

    codes.npz            arrays `latents`, float32 (N, C, H, W), and `settings`, JSON in a string
    codes.safetensors    a tensor `latents`, and `settings` in the file's metadata

A code means a picture only to the model and along the timesteps that made it. The settings therefore hold the SHA-256
of the model's weights, configuration and noise schedule.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddim.diffusion.schedule import check_timesteps
from ddim.io.atomic import atomic_write
from ddim.io.fingerprint import model_sha256
from ddim.validation import real

CODES = {".npz": "", ".safetensors": ""}


@dataclass(frozen=True)
class CodeSettings:
    """How codes were made.

    Attributes:
        model: as the user called it.
        model_sha256: of its weights, configuration and noise schedule.
        timesteps: that were walked, decreasing.
        exact: solved, or Euler.
        tolerance: that a step's residual was to reach.
        residual: the largest residual of each image.
    """

    model: str
    model_sha256: str
    timesteps: list[int]
    exact: bool
    tolerance: float
    residual: list[float]


def save_codes(path: str | Path, latents: Tensor, settings: CodeSettings) -> Path:
    """Write codes, whole or not at all.

    Args:
        path: in `.npz` or `.safetensors`.
        latents: (N, C, H, W), N at least 1; written as float32.
        settings: how they were made.

    Raises:
        ValueError: for another suffix, or latents that `load_codes` would refuse.
        OSError: if it cannot be written; what was there stays.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = _check_suffix(path)
    values = _check_latents(latents.detach(), "latents").cpu().contiguous()
    text = json.dumps(asdict(settings), sort_keys=True)
    with atomic_write(target) as temporary:
        if target.suffix.lower() == ".npz":
            # Given a name, NumPy would add its suffix to one in capitals.
            with temporary.open("wb") as file:
                np.savez(file, latents=values.numpy(), settings=np.array(text))
        else:
            try:
                # One entry: several would come in another order each time.
                save_file({"latents": values}, temporary, metadata={"settings": text})
            except SafetensorError as error:
                raise OSError(f"cannot write {target}: {error}") from error
    return target


def load_codes(path: str | Path) -> tuple[Tensor, CodeSettings]:
    """Read codes. Nothing in the file can run code.

    Returns:
        float32 (N, C, H, W), N at least 1, and how they were made.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or no file of codes, or holds NaN.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"there is no file {source}")
    _check_suffix(source)
    try:
        latents, text = _read_npz(source) if source.suffix.lower() == ".npz" else _read_safetensors(source)
        settings = _parse_settings(json.loads(text))
    except Exception as error:  # every reader fails in its own way
        raise ValueError(f"{source} is damaged or no file of codes: {error}") from None
    return _check_latents(latents, str(source)), settings


def check_settings(source: str | Path, settings: CodeSettings, pipe: Any, timesteps: list[int]) -> None:
    """Refuse codes of another model or other timesteps.

    Args:
        source: the file, for the message.
        settings: of the codes in it.
        pipe: shall decode them,
        timesteps: along these.

    Raises:
        ValueError: saying what differs, and that `--force` decodes all the same.
    """
    if settings.model_sha256 != model_sha256(pipe):
        raise ValueError(
            f"{source} was made with the model {settings.model!r}, which is not the one given (its weights, dtype, "
            "configuration or schedule differ); --force decodes all the same"
        )
    if settings.timesteps != timesteps:
        raise ValueError(
            f"{source} was made in {len(settings.timesteps)} steps from timestep {settings.timesteps[0]}, which are "
            f"not the {len(timesteps)} from {timesteps[0]} asked for; --force decodes all the same"
        )


def _check_suffix(path: str | Path) -> Path:
    if Path(path).suffix.lower() not in CODES:
        raise ValueError(f"{path} is no file of codes; those end in {' or '.join(CODES)}")
    return Path(path)


def _check_latents(latents: Tensor, name: str) -> Tensor:
    """In float32, where float64 can overflow."""
    if latents.ndim != 4 or not latents.numel() or not latents.is_floating_point():
        kind = f"{latents.dtype} of shape {tuple(latents.shape)}".removeprefix("torch.")
        raise ValueError(f"{name} holds {kind}; codes are floating (N, C, H, W), N at least 1")
    values = latents.float()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} holds NaN or infinity; codes are finite")
    return values


def _read_npz(path: Path) -> tuple[Tensor, str]:
    with np.load(path, allow_pickle=False) as file:
        # Reading stops where an array's shape says; only the end of a member tells whether its checksum is right.
        if (damaged := file.zip.testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.from_numpy(file["latents"]), str(file["settings"])


def _read_safetensors(path: Path) -> tuple[Tensor, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor("latents"), (file.metadata() or {})["settings"]


def _parse_settings(entries: Any) -> CodeSettings:
    """The settings from JSON, which may hold anything."""
    names = [field.name for field in fields(CodeSettings)]
    if not isinstance(entries, dict) or not entries.keys() >= set(names):
        raise ValueError(f"its settings are no JSON object with {', '.join(names)}")
    settings = CodeSettings(**{name: entries[name] for name in names})
    check_timesteps(settings.timesteps, sys.maxsize)
    if not isinstance(settings.model, str) or not isinstance(settings.model_sha256, str):
        raise ValueError("its settings do not name a model")
    if not isinstance(settings.exact, bool) or not isinstance(settings.residual, list):
        raise ValueError("its settings do not tell how the codes were made")
    for value in (settings.tolerance, *settings.residual):
        real("a tolerance or residual", value)
    return settings
