"""Latent files: the latents of images, or a direction in latent space, with the settings of the encoding.

    latents.npz            arrays `latents`, float32 (N, C, H, W), and `settings`, JSON in a string
    latents.safetensors    a tensor `latents`, and `settings` in the file's metadata

A latent stands for an image only together with the model and the timesteps that encoded it. The settings therefore hold
the SHA-256 of the model's weights, configuration and noise schedule, and one of the latents and all other settings: a
changed bit would decode to another image. Files of other writers may lack the latter.

The settings name the kind of the content, because a direction decodes to an image as well, of nothing. Files without a
kind hold latents.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ddim.io.atomic import atomic_write
from ddim.io.fingerprint import HasModel, model_sha256
from ddim.io.npz import open_npz
from ddim.io.reading import reader_reason
from ddim.validation import integer, real, shown

LatentKind = Literal["latents", "direction"]
DESCRIPTIONS: dict[LatentKind, str] = {"latents": "latents of images", "direction": "a direction in latent space"}
LATENT_SUFFIXES = {".npz": "", ".safetensors": ""}
FORMAT_KEY, FORMAT_VERSION = "format_version", 2
"""Entry of the settings in a file that has a checksum."""
CHECKSUM_KEY = "sha256"
"""Entry of the settings in a file: SHA-256 of the latents and all other entries."""


@dataclass(frozen=True)
class LatentSettings:
    """The settings of an encoding.

    Attributes:
        model: the model's name, as the user gave it.
        model_sha256: SHA-256 of its weights, configuration and noise schedule.
        timesteps: the timesteps of the encoding, strictly decreasing.
        exact: whether each step was solved to the tolerance; if false, by one Euler step.
        tolerance: the residual required of each step.
        residual: the largest residual of each image.
        kind: what was encoded: `latents` of images, or a `direction`, a difference of latents.
        condition: classes and guidance, as arguments of `decode`: `class_labels` and `negative_labels` as lists of
            indices, `guidance_scale`, `guidance_interval`; `None` for a model without classes.

    Example:
        >>> LatentSettings("mnist", "0" * 64, [900, 450, 0], True, 1e-5, [2e-6]).exact
        True
    """

    model: str
    model_sha256: str
    timesteps: list[int]
    exact: bool
    tolerance: float
    residual: list[float]
    kind: LatentKind = "latents"
    condition: dict[str, Any] | None = None


def save_latents(path: str | Path, latents: Tensor, settings: LatentSettings) -> Path:
    """Write latents atomically.

    Args:
        path: a `.npz` or `.safetensors` file.
        latents: finite floating (N, C, H, W), N at least 1, for a direction N = 1; written as float32.
        settings: the settings of the encoding.

    Returns:
        The path.

    Raises:
        ValueError: for another suffix, or latents that `load_latents` would refuse.
        OSError: if it cannot be written; an earlier file stays.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> settings = LatentSettings("mnist", "0" * 64, [900, 450, 0], True, 1e-5, [2e-6])
        >>> with TemporaryDirectory() as folder:
        ...     path = save_latents(f"{folder}/digit.npz", torch.zeros(1, 1, 28, 28), settings)
        ...     latents, loaded = load_latents(path)
        >>> latents.shape, loaded == settings
        (torch.Size([1, 1, 28, 28]), True)
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = _check_suffix(path)
    values = _check_latents(latents.detach(), "latents", settings.kind).cpu().contiguous()
    entries = asdict(settings) | {FORMAT_KEY: FORMAT_VERSION}
    text = json.dumps(entries | {CHECKSUM_KEY: _checksum(values, entries)}, sort_keys=True)
    with atomic_write(target) as temporary:
        if target.suffix.lower() == ".npz":
            # To an open file, because NumPy would append its suffix to a name in .NPZ.
            with temporary.open("wb") as file:
                np.savez(file, latents=values.numpy(), settings=np.array(text))
        else:
            try:
                # A single entry of metadata: safetensors writes several in random order.
                save_file({"latents": values}, temporary, metadata={"settings": text})
            except SafetensorError as error:
                raise OSError(f"cannot write {target}: {error}") from error
    return target


def load_latents(path: str | Path, kind: LatentKind = "latents") -> tuple[Tensor, LatentSettings]:
    """Read latents without running code in the file.

    Args:
        path: a file that `save_latents` wrote.
        kind: what it must hold.

    Returns:
        float32 (N, C, H, W), N at least 1, for a direction N = 1, and the settings of the encoding.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is damaged, not a latent file, of the other kind, or holds non-finite values.

    Example:
        >>> load_latents("photo.jpg")
        Traceback (most recent call last):
        FileNotFoundError: the file photo.jpg does not exist
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"the file {source} does not exist")
    _check_suffix(source)
    try:
        latents, text = _read_npz(source) if source.suffix.lower() == ".npz" else _read_safetensors(source)
        entries = json.loads(text)
        settings = _parse_settings(entries)
        checksum = entries.pop(CHECKSUM_KEY, None)
        # Either entry alone, too: the name of the other may be what is damaged.
        if (checksum is not None or FORMAT_KEY in entries) and checksum != _checksum(latents, entries):
            raise ValueError("its SHA-256 does not match")
    except Exception as error:  # readers raise errors of many kinds
        raise ValueError(f"{source} is damaged or not a latent file: {reader_reason(error)}") from None
    if settings.kind != kind:
        raise ValueError(f"{source} must hold {DESCRIPTIONS[kind]}, got {DESCRIPTIONS[settings.kind]}")
    return _check_latents(latents, str(source), kind), settings


def check_latent_settings(
    source: str | Path, settings: LatentSettings, pipe: HasModel, timesteps: list[int], force: bool = False
) -> None:
    """Check that latents were encoded by a model along given timesteps.

    Args:
        source: the file, for the message.
        settings: the settings of its latents.
        pipe: holds the model that is to decode them.
        timesteps: the timesteps of the decoding.
        force: accept the latents all the same.

    Raises:
        ValueError: if the model or the timesteps differ.

    Example:
        >>> from ddim import DDIMPipeline
        >>> settings = LatentSettings("other", "0" * 64, [900, 450, 0], True, 1e-5, [2e-6])
        >>> try:
        ...     check_latent_settings("digit.npz", settings, DDIMPipeline.from_pretrained("mnist"), [900, 450, 0])
        ... except ValueError as error:
        ...     print(str(error)[:44])
        digit.npz was encoded with the model 'other'
    """
    if force:
        return
    if settings.model_sha256 != model_sha256(pipe):
        raise ValueError(
            f"{source} was encoded with the model {shown(settings.model)}, which differs from this one in its weights, "
            "dtype, configuration or schedule; force=True decodes it anyway"
        )
    if settings.timesteps != timesteps:
        raise ValueError(
            f"{source} was encoded in {len(settings.timesteps)} steps from timestep {settings.timesteps[0]}, got "
            f"{len(timesteps)} steps from {timesteps[0]}; force=True decodes it anyway"
        )


def _check_suffix(path: str | Path) -> Path:
    """Return the path if it has the suffix of a latent file."""
    if Path(path).suffix.lower() not in LATENT_SUFFIXES:
        raise ValueError(f"{path} is not a latent file; those end in {' or '.join(LATENT_SUFFIXES)}")
    return Path(path)


def _check_latents(latents: Tensor, name: str, kind: LatentKind) -> Tensor:
    """Return latents in float32, in which they must be finite."""
    if latents.ndim != 4 or not latents.numel() or not latents.is_floating_point():
        actual = f"{latents.dtype} of shape {tuple(latents.shape)}".removeprefix("torch.")
        raise ValueError(f"{name} must hold floating latents (N, C, H, W), N at least 1, got {actual}")
    if kind == "direction" and len(latents) != 1:
        raise ValueError(f"{name} must hold one direction, got {len(latents)}")
    values = latents.float()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} must hold finite latents, got NaN or infinity")
    return values


def _read_npz(path: Path) -> tuple[Tensor, str]:
    with open_npz(path) as file:
        latents = file.read("latents")
        # A copy in the machine's byte order, which can be written.
        return torch.from_numpy(latents.astype(latents.dtype.newbyteorder("="))), str(file.read("settings"))


def _read_safetensors(path: Path) -> tuple[Tensor, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "latents" not in file.keys() or "settings" not in metadata:  # noqa: SIM118 - it is not a mapping
            raise ValueError("it must hold a tensor latents, and settings in its metadata")
        return file.get_tensor("latents"), metadata["settings"]


def _parse_settings(entries: Any) -> LatentSettings:
    """Check and return settings from JSON, which may hold anything."""
    names = [field.name for field in fields(LatentSettings)]
    required = [name for name in names if name not in ("kind", "condition")]
    if not isinstance(entries, dict) or not entries.keys() >= set(required):
        raise ValueError(f"its settings must be a JSON object with {', '.join(required)}")
    settings = LatentSettings(**{name: entries[name] for name in names if name in entries})
    if settings.kind not in get_args(LatentKind):
        raise ValueError(f"its kind must be {' or '.join(get_args(LatentKind))}, got {shown(settings.kind)}")
    _check_timesteps(settings.timesteps)
    if settings.condition is not None:
        _check_condition(settings.condition)
    if not isinstance(settings.model, str) or not isinstance(settings.model_sha256, str):
        raise ValueError("its settings do not name a model")
    if not isinstance(settings.exact, bool) or not isinstance(settings.residual, list):
        raise ValueError("its settings do not describe an encoding")
    for value in (settings.tolerance, *settings.residual):
        real("a tolerance or residual", value)
    return settings


def _check_condition(condition: Any) -> None:
    """Check the types of a condition; its values are checked where it is used."""
    names = ("class_labels", "negative_labels", "guidance_scale", "guidance_interval")
    if not isinstance(condition, dict) or condition.keys() - set(names):
        raise ValueError(f"its condition must be a JSON object with {', '.join(names)}, got {shown(condition)}")
    for name in ("class_labels", "negative_labels", "guidance_interval"):
        values = condition.get(name, [])
        for value in values if isinstance(values, list) else [values]:
            integer(f"each of {name}", value, 0)
    real("guidance_scale", condition.get("guidance_scale", 1.0), minimum=0)


def _check_timesteps(timesteps: Any) -> None:
    if not isinstance(timesteps, list) or not timesteps:
        raise ValueError(f"timesteps must be a list of at least one integer, got {shown(timesteps)}")
    for timestep in timesteps:
        integer("every timestep", timestep, 0)
    for timestep, following in pairwise(timesteps):
        if following >= timestep:
            raise ValueError(f"timesteps must be strictly decreasing, got {following} after {timestep}")


def _checksum(latents: Tensor, entries: dict[str, Any]) -> str:
    """Return the SHA-256 of latents, float32 in little-endian bytes, and of the settings of their encoding."""
    digest = hashlib.sha256(json.dumps([list(latents.shape), entries], sort_keys=True).encode())
    digest.update(latents.contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()
