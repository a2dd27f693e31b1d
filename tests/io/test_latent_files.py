"""Latent files: bitwise round trips, reading by NumPy and by hand, damaged and malicious files, other models."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ddim.io.fingerprint import model_sha256
from ddim.io.latent_files import LatentSettings, check_latent_settings, load_latents, save_latents
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel

SUFFIXES = [".npz", ".safetensors"]
SETTINGS = LatentSettings("mnist", "0f" * 32, [999, 600, 20, 0], True, 1e-5, [3.25e-6, 1e-3])


def make_latents(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape or (2, 1, 3, 4), generator=generator, dtype=torch.float64).to(dtype)


def bits(values: Tensor) -> Tensor:
    """Return the bits of float32 values, which distinguish -0.0 from 0.0."""
    return values.contiguous().view(torch.int32)


def write(path: Path, latents: Any, text: Any) -> Path:
    """Write a latent file by NumPy or safetensors alone; entries that are `None` are left out."""
    if path.suffix == ".npz":
        latents = latents.numpy() if isinstance(latents, Tensor) else latents
        entries = {"latents": latents, "settings": None if text is None else np.asarray(text)}
        np.savez(path, **{name: entry for name, entry in entries.items() if entry is not None})
    else:
        tensors = {} if latents is None else {"latents": torch.as_tensor(latents)}
        save_file(tensors, path, None if text is None else {"settings": text})
    return path


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(*unnamed: np.ndarray, **arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, *unnamed, **arrays)
    return buffer.getvalue()


# --- round trips


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".NPZ", ".SafeTensors"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 3, 4), (3, 3, 32, 32)])
def test_round_trip(tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
    latents, path = make_latents(*shape), tmp_path / f"latents{suffix}"
    assert save_latents(path, latents, SETTINGS) == path
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    loaded, settings = load_latents(str(path))
    assert loaded.dtype == torch.float32
    assert loaded.shape == latents.shape
    assert torch.equal(bits(loaded), bits(latents))
    assert settings == SETTINGS


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip_of_every_finite_float(tmp_path: Path, suffix: str) -> None:
    """Zeros of both signs, the smallest, subnormal and largest values, and random bits."""
    tiny, large = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, tiny, tiny / 3, large, -large, 1 / 3])
    anything = torch.from_numpy(np.random.default_rng(0).integers(0, 2**32, 10_000, np.uint32).view(np.float32).copy())
    latents = torch.cat([special, anything[torch.isfinite(anything)]])[None, None, None]
    loaded, _ = load_latents(save_latents(tmp_path / f"latents{suffix}", latents, SETTINGS))
    assert torch.equal(bits(loaded), bits(latents))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "settings",
    [
        LatentSettings('/models/Zürich 数字 "x"\n', "", [0], False, 0.1, [0.0]),
        LatentSettings("a", "b", list(range(999, -1, -1)), True, 5e-324, [1 / 3] * 100),
        LatentSettings("a", "b", [5, 1], True, 1e-5, []),
    ],
    ids=["text", "long", "short"],
)
def test_round_trip_of_settings(tmp_path: Path, suffix: str, settings: LatentSettings) -> None:
    loaded = load_latents(save_latents(tmp_path / f"latents{suffix}", make_latents(), settings))[1]
    assert loaded == settings
    assert type(loaded.exact) is bool


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_converted_to_float32(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    latents = make_latents(dtype=dtype)
    path = save_latents(tmp_path / f"latents{suffix}", latents, SETTINGS)
    assert b"F32" in path.read_bytes() or b"<f4" in path.read_bytes()
    expected = latents.double().numpy().astype(np.float32)
    np.testing.assert_array_equal(load_latents(path)[0].numpy(), expected)
    # Files of other writers may hold other dtypes.
    if (suffix, dtype) != (".npz", torch.bfloat16):
        loaded = load_latents(write(path, latents, json.dumps(asdict(SETTINGS))))[0]
        assert loaded.dtype == torch.float32
        np.testing.assert_array_equal(loaded.numpy(), expected)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_strided_latents_with_gradients(tmp_path: Path, suffix: str) -> None:
    latents = make_latents(5, 4, 3, 2).permute(3, 2, 0, 1)[:, :, ::2].requires_grad_()
    loaded = load_latents(save_latents(tmp_path / f"latents{suffix}", latents, SETTINGS))[0]
    assert not loaded.requires_grad
    assert torch.equal(loaded, latents.detach())


def test_numpy_reads_npz(tmp_path: Path) -> None:
    save_latents(tmp_path / "latents.npz", make_latents(), SETTINGS)
    with np.load(tmp_path / "latents.npz") as file:
        assert set(file.files) == {"latents", "settings"}
        assert file["latents"].dtype == np.dtype("<f4")
        np.testing.assert_array_equal(file["latents"], make_latents().numpy())
        settings = json.loads(str(file["settings"]))
    assert settings.items() >= asdict(SETTINGS).items()
    assert settings.keys() - asdict(SETTINGS) == {"format_version", "sha256"}


def test_safetensors_layout(tmp_path: Path) -> None:
    """The format is eight bytes of length, JSON, and the values."""
    content = save_latents(tmp_path / "latents.safetensors", make_latents(), SETTINGS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header["latents"] == {"dtype": "F32", "shape": [2, 1, 3, 4], "data_offsets": [0, 96]}
    assert json.loads(header["__metadata__"]["settings"]).items() >= asdict(SETTINGS).items()
    assert header.keys() == {"latents", "__metadata__"}
    np.testing.assert_array_equal(np.frombuffer(content[8 + length :], "<f4"), make_latents().numpy().ravel())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_latents_give_equal_bytes(tmp_path: Path, suffix: str) -> None:
    first, second = (save_latents(tmp_path / f"{name}{suffix}", make_latents(), SETTINGS) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


# --- writing


@pytest.mark.parametrize("name", ["latents.pt", "latents.npy", "latents", "latents.npz.gz"])
def test_other_suffixes_raise(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"is not a latent file; those end in \.npz or \.safetensors"):
        save_latents(tmp_path / name, make_latents(), SETTINGS)
    assert not list(tmp_path.iterdir())
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is not a latent file; those end in \.npz or"):
        load_latents(tmp_path / name)


UNFIT: dict[str, tuple[Tensor, str]] = {
    "nan": (make_latents().index_fill(3, torch.tensor(2), float("nan")), "got NaN or infinity"),
    "infinity": (make_latents().index_fill(1, torch.tensor(0), -float("inf")), "got NaN or infinity"),
    "too large for float32": (make_latents(dtype=torch.float64) * 1e200, "got NaN or infinity"),
    "three dimensions": (make_latents(1, 28, 28), r"float32 of shape \(1, 28, 28\)"),
    "five dimensions": (make_latents(1, 1, 1, 28, 28), r"float32 of shape \(1, 1, 1, 28, 28\)"),
    "no dimensions": (torch.tensor(1.0), r"float32 of shape \(\)"),
    "no image": (make_latents(0, 1, 28, 28), r"float32 of shape \(0, 1, 28, 28\)"),
    "no pixel": (make_latents(2, 1, 0, 28), r"float32 of shape \(2, 1, 0, 28\)"),
    "integers": (torch.arange(12).view(1, 1, 3, 4), "int64 of shape"),
    "bytes": (torch.zeros(1, 1, 3, 4, dtype=torch.uint8), "uint8 of shape"),
    "booleans": (torch.ones(1, 1, 3, 4, dtype=torch.bool), "bool of shape"),
    "complex": (make_latents(dtype=torch.complex64), "complex64 of shape"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", UNFIT)
def test_invalid_latents_raise(tmp_path: Path, suffix: str, name: str) -> None:
    """Neither written nor read."""
    latents, message = UNFIT[name]
    path = tmp_path / f"latents{suffix}"
    with pytest.raises(ValueError, match=f"^latents must hold .*{message}"):
        save_latents(path, latents, SETTINGS)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=rf"latents\{suffix} must hold .*{message}"):
        load_latents(write(path, latents, json.dumps(asdict(SETTINGS))))


def test_float8_safetensors(tmp_path: Path) -> None:
    """8-bit floats of safetensors are accepted, and refused where they are NaN."""
    values = torch.tensor([0.5, -1.0, 1.75, 0.0]).view(1, 1, 2, 2)
    path = tmp_path / "latents.safetensors"
    text = json.dumps(asdict(SETTINGS))
    assert torch.equal(load_latents(write(path, values.to(torch.float8_e4m3fn), text))[0], values)
    values[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="got NaN"):
        load_latents(write(path, values.to(torch.float8_e4m3fn), text))


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Limit files to `size` bytes, as a full disk does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("size", [0, 1000, 200_000])
def test_full_disk_keeps_the_earlier_file(tmp_path: Path, suffix: str, size: int) -> None:
    path = save_latents(tmp_path / f"latents{suffix}", make_latents(), SETTINGS)
    before = path.read_bytes()
    with small_files(size), pytest.raises(OSError, match="too large"):
        save_latents(path, make_latents(64, 1, 28, 28), SETTINGS)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_interrupt_keeps_the_earlier_file(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt arrives between the last byte and the rename."""
    path = save_latents(tmp_path / f"latents{suffix}", make_latents(), SETTINGS)
    before = path.read_bytes()
    seen = []

    def interrupt(descriptor: int) -> None:
        seen.append(os.fstat(descriptor).st_size)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_latents(path, make_latents(3, 1, 28, 28), SETTINGS)
    assert seen[0] > 3 * 28 * 28 * 4
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_earlier_file_is_replaced(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"latents{suffix}"
    path.write_bytes(b"old" * 100_000)
    save_latents(path, make_latents(), SETTINGS)
    assert torch.equal(load_latents(path)[0], make_latents())
    with pytest.raises(FileNotFoundError):
        save_latents(tmp_path / "missing" / path.name, make_latents(), SETTINGS)


# --- damaged files


def test_missing_file_raises(tmp_path: Path) -> None:
    (tmp_path / "folder.npz").mkdir()
    for name in ("latents.npz", "latents.safetensors", "latents.txt", "folder.npz"):
        with pytest.raises(FileNotFoundError, match=f"the file .*{name} does not exist"):
            load_latents(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_file_raises(tmp_path: Path, suffix: str) -> None:
    path = save_latents(tmp_path / f"latents{suffix}", make_latents(3, 1, 28, 28), SETTINGS)
    whole = path.read_bytes()
    lengths = {0, 1, 7, 8, 9, 100, 4096, len(whole) // 2, len(whole) - 22, len(whole) - 1}
    for length in sorted(lengths | set(range(0, len(whole), 97))):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"latents\{suffix} is damaged or not a latent file: ."):
            load_latents(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_flipped_bits_raise_or_have_no_effect(tmp_path: Path, suffix: str) -> None:
    """One bit of each byte is flipped.

    Both formats hold a checksum of the latents and the settings: whatever is read equals what was written.
    """
    latents = make_latents()
    path = save_latents(tmp_path / f"latents{suffix}", latents, SETTINGS)
    whole = path.read_bytes()
    refused = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            loaded, settings = load_latents(path)
        except ValueError as error:
            assert str(error).startswith(str(path))  # noqa: PT017 - not each flip is refused
            refused += 1
            continue
        assert torch.equal(bits(loaded), bits(latents))
        assert settings == SETTINGS
    assert refused > 0.8 * len(whole)


@pytest.mark.parametrize(("old", "new"), [(b"(9, 1, 28,", b"(8, 1, 28,"), (b"28, 28)", b"28, 20)"), (b"<f4", b"<f2")])
def test_reduced_shape_raises(tmp_path: Path, old: bytes, new: bytes) -> None:
    """Such an array would not be read to its end, where the checksum of the archive is compared."""
    path = save_latents(tmp_path / "latents.npz", make_latents(9, 1, 28, 28), SETTINGS)
    whole = path.read_bytes()
    assert whole.count(old) == 1
    path.write_bytes(whole.replace(old, new))
    with pytest.raises(ValueError, match=r"is damaged or not a latent file: its array 'latents' of .* size"):
        load_latents(path)


OTHER_FILES: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("1 2 3\n" * 100),
    "image": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "array": lambda path: path.write_bytes(npy(make_latents().numpy())),
    "archive": lambda path: path.write_bytes(npz(make_latents().numpy())),
    "checkpoint": lambda path: torch.save({"latents": make_latents()}, path),
    "weights": lambda path: save_file({"weight": make_latents()}, path),
    "latents without settings": lambda path: save_file({"latents": make_latents()}, path),
    "arrays without settings": lambda path: path.write_bytes(npz(latents=make_latents().numpy())),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_raise(tmp_path: Path, suffix: str, name: str) -> None:
    path = tmp_path / f"latents{suffix}"
    OTHER_FILES[name](path)
    with pytest.raises(ValueError, match=rf"latents\{suffix} is damaged or not a latent file: ."):
        load_latents(path)


# --- malicious files


class Payload:
    """An object whose unpickling creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def objects(*entries: Any) -> np.ndarray:
    array = np.empty(len(entries), object)
    array[:] = entries
    return array


def torch_file(payload: Payload) -> bytes:
    buffer = io.BytesIO()
    torch.save({"latents": payload, "settings": payload}, buffer)
    return buffer.getvalue()


TEXT = json.dumps(asdict(SETTINGS))
ATTACKS: dict[str, Callable[[Payload], bytes]] = {
    "pickle": lambda payload: pickle.dumps({"latents": payload, "settings": TEXT}),
    "old pickle": lambda payload: pickle.dumps(payload, protocol=0),
    "checkpoint": torch_file,
    "array of objects": lambda payload: npy(objects(payload)),
    "latents": lambda payload: npz(latents=objects(payload), settings=np.array(TEXT)),
    "settings": lambda payload: npz(latents=make_latents().numpy(), settings=objects(payload)),
    "beside": lambda payload: npz(latents=make_latents().numpy(), settings=np.array(TEXT), more=objects(payload)),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ATTACKS)
def test_malicious_file_is_refused(tmp_path: Path, suffix: str, name: str) -> None:
    path, trace = tmp_path / f"latents{suffix}", tmp_path / "trace"
    path.write_bytes(ATTACKS[name](Payload(trace)))
    try:
        latents, settings = load_latents(path)
    except ValueError as error:
        assert str(error).startswith(f"{path} is damaged or not a latent file: ")  # noqa: PT017 - one file is read
    else:
        # Other arrays of the file are not read.
        assert (name, suffix) == ("beside", ".npz")
        assert torch.equal(latents, make_latents())
        assert settings == SETTINGS
    assert not trace.exists()


def test_malicious_payload_is_live(tmp_path: Path) -> None:
    """The payload does run without the restriction."""
    trace = tmp_path / "trace"
    with np.load(io.BytesIO(ATTACKS["latents"](Payload(trace))), allow_pickle=True) as file:
        assert not trace.exists()
        assert len(file["latents"]) == 1
    assert trace.exists()


NO_SETTINGS = {
    "empty": "",
    "words": "made by hand",
    "half": TEXT[: len(TEXT) // 2],
    "number": "3",
    "nothing": "null",
    "list": json.dumps([asdict(SETTINGS)]),
    "string": json.dumps(TEXT),
    "no entries": "{}",
    "depth": "[" * 100_000,
    **{
        f"without {key}": json.dumps({name: entry for name, entry in asdict(SETTINGS).items() if name != key})
        for key in asdict(SETTINGS)
        if key not in ("kind", "condition")
    },
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", NO_SETTINGS)
def test_missing_settings_raise(tmp_path: Path, suffix: str, name: str) -> None:
    path = write(tmp_path / f"latents{suffix}", make_latents(), NO_SETTINGS[name])
    with pytest.raises(ValueError, match=rf"latents\{suffix} is damaged or not a latent file: .") as caught:
        load_latents(path)
    if name.startswith("without"):
        assert "its settings must be a JSON object with model, model_sha256, timesteps" in str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_kinds_are_told_apart(tmp_path: Path, suffix: str) -> None:
    path, settings = tmp_path / f"latents{suffix}", replace(SETTINGS, kind="direction")
    save_latents(path, make_latents(1, 1, 3, 4), settings)
    assert load_latents(path, "direction")[1] == settings
    with pytest.raises(ValueError, match="must hold latents of images, got a direction in latent space"):
        load_latents(path)
    with pytest.raises(ValueError, match="latents must hold one direction, got 2"):
        save_latents(path, make_latents(), settings)
    entries = asdict(SETTINGS)
    del entries["kind"]
    write(path, make_latents(), json.dumps(entries))
    assert load_latents(path)[1] == SETTINGS
    with pytest.raises(ValueError, match="must hold a direction in latent space, got latents of images"):
        load_latents(path, "direction")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": 3}, "its settings do not name a model"),
    ({"model": None}, "its settings do not name a model"),
    ({"model_sha256": ["0f" * 32]}, "its settings do not name a model"),
    ({"timesteps": "900"}, "timesteps must be a list of at least one integer, got '900'"),
    ({"timesteps": None}, "timesteps must be a list of at least one integer, got None"),
    ({"timesteps": 900}, "timesteps must be a list of at least one integer, got 900"),
    ({"timesteps": []}, r"timesteps must be a list of at least one integer, got \[\]"),
    ({"timesteps": {"900": 1}}, r"timesteps must be a list of at least one integer, got \{'900': 1\}"),
    ({"timesteps": ["900", "0"]}, "every timestep must be an integer of at least 0, got '900'"),
    ({"timesteps": [900.0, 0]}, r"every timestep must be an integer of at least 0, got 900\.0"),
    ({"timesteps": [True]}, "every timestep must be an integer of at least 0, got True"),
    ({"timesteps": [900, [0]]}, r"every timestep must be an integer of at least 0, got \[0\]"),
    ({"timesteps": [0, 900]}, "timesteps must be strictly decreasing, got 900 after 0"),
    ({"timesteps": [900, 900]}, "timesteps must be strictly decreasing, got 900 after 900"),
    ({"timesteps": [900, -1]}, "every timestep must be an integer of at least 0, got -1"),
    ({"exact": "yes"}, "its settings do not describe an encoding"),
    ({"exact": 1}, "its settings do not describe an encoding"),
    ({"residual": 1e-6}, "its settings do not describe an encoding"),
    ({"residual": ["small"]}, "a tolerance or residual must be a number, got 'small'"),
    ({"residual": [None]}, "a tolerance or residual must be a number, got None"),
    ({"tolerance": "1e-5"}, "a tolerance or residual must be a number, got '1e-5'"),
    ({"kind": "image"}, "its kind must be latents or direction, got 'image'"),
    ({"kind": []}, r"its kind must be latents or direction, got \[\]"),
    ({"tolerance": True}, "a tolerance or residual must be a number, got True"),
]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(changes)[1:-1] for changes, _ in WRONG])
def test_invalid_settings_raise(tmp_path: Path, suffix: str, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / f"latents{suffix}", make_latents(), json.dumps(asdict(SETTINGS) | changes))
    with pytest.raises(ValueError, match=rf"latents\{suffix} is damaged or not a latent file: {message}"):
        load_latents(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_unknown_settings_are_ignored(tmp_path: Path, suffix: str) -> None:
    path = write(
        tmp_path / f"latents{suffix}", make_latents(), json.dumps(asdict(SETTINGS) | {"spacing": "quad", "eta": 0})
    )
    assert load_latents(path)[1] == SETTINGS


# --- model and timesteps


def test_settings_of_this_model_pass(tiny_pipeline: DDIMPipeline) -> None:
    settings = replace(SETTINGS, model_sha256=model_sha256(tiny_pipeline))
    check_latent_settings("latents.npz", settings, tiny_pipeline, [999, 600, 20, 0])
    # The name of the model is not compared.
    check_latent_settings(
        "latents.npz", replace(settings, model="other", exact=False), tiny_pipeline, [999, 600, 20, 0]
    )


def test_settings_of_another_model_raise(tiny_pipeline: DDIMPipeline, make_unet: Callable[..., UNet2DModel]) -> None:
    settings = replace(SETTINGS, model="runs/one", model_sha256=model_sha256(tiny_pipeline))
    message = r"^a b\.npz was encoded with the model 'runs/one', which differs .*; force=True decodes it anyway$"
    for unet, scheduler in (
        (make_unet(), DDIMScheduler(beta_end=0.03)),
        (make_unet(norm_eps=1e-6), DDIMScheduler()),
        (make_unet().to(torch.bfloat16), DDIMScheduler()),
    ):
        with pytest.raises(ValueError, match=message):
            check_latent_settings("a b.npz", settings, DDIMPipeline(unet, scheduler), SETTINGS.timesteps)


@pytest.mark.parametrize("timesteps", [[999, 600, 20], [999, 600, 21, 0], [980, 0], [999, 600, 20, 10, 0]])
def test_settings_of_other_timesteps_raise(tiny_pipeline: DDIMPipeline, timesteps: list[int]) -> None:
    settings = replace(SETTINGS, model_sha256=model_sha256(tiny_pipeline))
    message = (
        rf"^latents\.npz was encoded in 4 steps from timestep 999, got {len(timesteps)} steps from {timesteps[0]}; "
        "force=True decodes it anyway$"
    )
    with pytest.raises(ValueError, match=message):
        check_latent_settings("latents.npz", settings, tiny_pipeline, timesteps)
    check_latent_settings("latents.npz", settings, tiny_pipeline, timesteps, force=True)
