"""Files of codes: round trips to the bit, read by NumPy and by hand, refusals of all that is damaged or hostile, and
which changes of a model its SHA-256 tells.
"""

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
from ddim.io.latent_files import CodeSettings, check_settings, load_codes, save_codes
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel

SUFFIXES = [".npz", ".safetensors"]
SETTINGS = CodeSettings("mnist", "0f" * 32, [999, 600, 20, 0], True, 1e-5, [3.25e-6, 1e-3])


def codes(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape or (2, 1, 3, 4), generator=generator, dtype=torch.float64).to(dtype)


def bits(values: Tensor) -> Tensor:
    """Tells -0.0 from 0.0."""
    return values.contiguous().view(torch.int32)


def write(path: Path, latents: Any, text: Any) -> Path:
    """A file of codes made by NumPy or safetensors alone; what is `None` is left out."""
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
    latents, path = codes(*shape), tmp_path / f"codes{suffix}"
    assert save_codes(path, latents, SETTINGS) == path
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    loaded, settings = load_codes(str(path))
    assert loaded.dtype == torch.float32
    assert loaded.shape == latents.shape
    assert torch.equal(bits(loaded), bits(latents))
    assert settings == SETTINGS


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_finite_float_comes_back(tmp_path: Path, suffix: str) -> None:
    """Zeros of both signs, the smallest, subnormal and largest numbers, and bits at random."""
    tiny, large = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, tiny, tiny / 3, large, -large, 1 / 3])
    anything = torch.from_numpy(np.random.default_rng(0).integers(0, 2**32, 10_000, np.uint32).view(np.float32).copy())
    latents = torch.cat([special, anything[torch.isfinite(anything)]])[None, None, None]
    loaded, _ = load_codes(save_codes(tmp_path / f"codes{suffix}", latents, SETTINGS))
    assert torch.equal(bits(loaded), bits(latents))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "settings",
    [
        CodeSettings('/models/Zürich 数字 "x"\n', "", [0], False, 0.1, [0.0]),
        CodeSettings("a", "b", list(range(999, -1, -1)), True, 5e-324, [1 / 3] * 100),
        CodeSettings("a", "b", [5, 1], True, 1e-5, []),
    ],
    ids=["text", "long", "short"],
)
def test_settings_come_back(tmp_path: Path, suffix: str, settings: CodeSettings) -> None:
    loaded = load_codes(save_codes(tmp_path / f"codes{suffix}", codes(), settings))[1]
    assert loaded == settings
    assert type(loaded.exact) is bool


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_become_float32(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    latents = codes(dtype=dtype)
    path = save_codes(tmp_path / f"codes{suffix}", latents, SETTINGS)
    assert b"F32" in path.read_bytes() or b"<f4" in path.read_bytes()
    expected = latents.double().numpy().astype(np.float32)
    np.testing.assert_array_equal(load_codes(path)[0].numpy(), expected)
    # As others may have written them.
    if (suffix, dtype) != (".npz", torch.bfloat16):
        loaded = load_codes(write(path, latents, json.dumps(asdict(SETTINGS))))[0]
        assert loaded.dtype == torch.float32
        np.testing.assert_array_equal(loaded.numpy(), expected)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_any_layout_and_gradients(tmp_path: Path, suffix: str) -> None:
    latents = codes(5, 4, 3, 2).permute(3, 2, 0, 1)[:, :, ::2].requires_grad_()
    loaded = load_codes(save_codes(tmp_path / f"codes{suffix}", latents, SETTINGS))[0]
    assert not loaded.requires_grad
    assert torch.equal(loaded, latents.detach())


def test_numpy_reads_it(tmp_path: Path) -> None:
    save_codes(tmp_path / "codes.npz", codes(), SETTINGS)
    with np.load(tmp_path / "codes.npz") as file:
        assert set(file.files) == {"latents", "settings"}
        assert file["latents"].dtype == np.dtype("<f4")
        np.testing.assert_array_equal(file["latents"], codes().numpy())
        assert json.loads(str(file["settings"])) == asdict(SETTINGS)


def test_safetensors_by_hand(tmp_path: Path) -> None:
    """Eight bytes of length, JSON, and the numbers."""
    content = save_codes(tmp_path / "codes.safetensors", codes(), SETTINGS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header["latents"] == {"dtype": "F32", "shape": [2, 1, 3, 4], "data_offsets": [0, 96]}
    assert json.loads(header["__metadata__"]["settings"]) == asdict(SETTINGS)
    assert header.keys() == {"latents", "__metadata__"}
    np.testing.assert_array_equal(np.frombuffer(content[8 + length :], "<f4"), codes().numpy().ravel())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_codes_make_the_same_file(tmp_path: Path, suffix: str) -> None:
    first, second = (save_codes(tmp_path / f"{name}{suffix}", codes(), SETTINGS) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


# --- writing


@pytest.mark.parametrize("name", ["codes.pt", "codes.npy", "codes", "codes.npz.gz"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"is no file of codes; those end in \.npz or \.safetensors"):
        save_codes(tmp_path / name, codes(), SETTINGS)
    assert not list(tmp_path.iterdir())
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is no file of codes; those end in \.npz or"):
        load_codes(tmp_path / name)


UNFIT: dict[str, tuple[Tensor, str]] = {
    "nan": (codes().index_fill(3, torch.tensor(2), float("nan")), "NaN or infinity"),
    "infinity": (codes().index_fill(1, torch.tensor(0), -float("inf")), "NaN or infinity"),
    "too large for float32": (codes(dtype=torch.float64) * 1e200, "NaN or infinity"),
    "three dimensions": (codes(1, 28, 28), r"float32 of shape \(1, 28, 28\)"),
    "five dimensions": (codes(1, 1, 1, 28, 28), r"float32 of shape \(1, 1, 1, 28, 28\)"),
    "no dimensions": (torch.tensor(1.0), r"float32 of shape \(\)"),
    "no image": (codes(0, 1, 28, 28), r"float32 of shape \(0, 1, 28, 28\)"),
    "no pixel": (codes(2, 1, 0, 28), r"float32 of shape \(2, 1, 0, 28\)"),
    "integers": (torch.arange(12).view(1, 1, 3, 4), "int64 of shape"),
    "bytes": (torch.zeros(1, 1, 3, 4, dtype=torch.uint8), "uint8 of shape"),
    "booleans": (torch.ones(1, 1, 3, 4, dtype=torch.bool), "bool of shape"),
    "complex": (codes(dtype=torch.complex64), "complex64 of shape"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", UNFIT)
def test_what_are_no_codes(tmp_path: Path, suffix: str, name: str) -> None:
    """Neither written nor read."""
    latents, message = UNFIT[name]
    path = tmp_path / f"codes{suffix}"
    with pytest.raises(ValueError, match=f"^latents holds {message}"):
        save_codes(path, latents, SETTINGS)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=rf"codes\{suffix} holds {message}"):
        load_codes(write(path, latents, json.dumps(asdict(SETTINGS))))


def test_half_of_half_precision(tmp_path: Path) -> None:
    """8-bit floats of safetensors are floats, and hold NaN too."""
    values = torch.tensor([0.5, -1.0, 1.75, 0.0]).view(1, 1, 2, 2)
    path = tmp_path / "codes.safetensors"
    text = json.dumps(asdict(SETTINGS))
    assert torch.equal(load_codes(write(path, values.to(torch.float8_e4m3fn), text))[0], values)
    values[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="holds NaN"):
        load_codes(write(path, values.to(torch.float8_e4m3fn), text))


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("size", [0, 1000, 200_000])
def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path, suffix: str, size: int) -> None:
    path = save_codes(tmp_path / f"codes{suffix}", codes(), SETTINGS)
    before = path.read_bytes()
    with small_files(size), pytest.raises(OSError, match="too large"):
        save_codes(path, codes(64, 1, 28, 28), SETTINGS)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_interruption_leaves_the_earlier_file(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last byte and the new name."""
    path = save_codes(tmp_path / f"codes{suffix}", codes(), SETTINGS)
    before = path.read_bytes()
    seen = []

    def interrupt(descriptor: int) -> None:
        seen.append(os.fstat(descriptor).st_size)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_codes(path, codes(3, 1, 28, 28), SETTINGS)
    assert seen[0] > 3 * 28 * 28 * 4
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_earlier_file_is_replaced_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"codes{suffix}"
    path.write_bytes(b"old" * 100_000)
    save_codes(path, codes(), SETTINGS)
    assert torch.equal(load_codes(path)[0], codes())
    with pytest.raises(FileNotFoundError):
        save_codes(tmp_path / "missing" / path.name, codes(), SETTINGS)


# --- damaged files


def test_no_such_file(tmp_path: Path) -> None:
    (tmp_path / "folder.npz").mkdir()
    for name in ("codes.npz", "codes.safetensors", "codes.txt", "folder.npz"):
        with pytest.raises(FileNotFoundError, match=f"there is no file .*{name}"):
            load_codes(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_files(tmp_path: Path, suffix: str) -> None:
    path = save_codes(tmp_path / f"codes{suffix}", codes(3, 1, 28, 28), SETTINGS)
    whole = path.read_bytes()
    lengths = {0, 1, 7, 8, 9, 100, 4096, len(whole) // 2, len(whole) - 22, len(whole) - 1}
    for length in sorted(lengths | set(range(0, len(whole), 97))):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"codes\{suffix} is damaged or no file of codes: ."):
            load_codes(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_flipped_bits(tmp_path: Path, suffix: str) -> None:
    """A bit in each byte. ZIP has checksums: what is read is what was written. Safetensors has none, so that damaged
    numbers are only seen where they are not finite, and damaged settings where they are no settings.
    """
    latents = codes()
    path = save_codes(tmp_path / f"codes{suffix}", latents, SETTINGS)
    whole = path.read_bytes()
    refused = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            loaded, settings = load_codes(path)
        except ValueError as error:
            assert str(error).startswith(str(path))  # noqa: PT017 - not each flip is refused
            refused += 1
            continue
        if suffix == ".npz":
            assert torch.equal(bits(loaded), bits(latents))
            assert settings == SETTINGS
        assert loaded.dtype == torch.float32
        assert loaded.ndim == 4
        assert bool(torch.isfinite(loaded).all())
        assert sorted(settings.timesteps, reverse=True) == settings.timesteps
        assert {type(t) for t in settings.timesteps} == {int}
    assert refused > (0.8 if suffix == ".npz" else 0.4) * len(whole)


@pytest.mark.parametrize(("old", "new"), [(b"(9, 1, 28,", b"(8, 1, 28,"), (b"28, 28)", b"28, 20)"), (b"<f4", b"<f2")])
def test_a_shape_that_shrank(tmp_path: Path, old: bytes, new: bytes) -> None:
    """Nobody reads to the end of such an array, where the checksum is compared."""
    path = save_codes(tmp_path / "codes.npz", codes(9, 1, 28, 28), SETTINGS)
    whole = path.read_bytes()
    assert whole.count(old) == 1
    path.write_bytes(whole.replace(old, new))
    with pytest.raises(ValueError, match=r"is damaged or no file of codes: the checksum of latents\.npy is wrong"):
        load_codes(path)


STRANGERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("1 2 3\n" * 100),
    "picture": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "array": lambda path: path.write_bytes(npy(codes().numpy())),
    "archive": lambda path: path.write_bytes(npz(codes().numpy())),
    "checkpoint": lambda path: torch.save({"latents": codes()}, path),
    "weights": lambda path: save_file({"weight": codes()}, path),
    "codes without settings": lambda path: save_file({"latents": codes()}, path),
    "arrays without settings": lambda path: path.write_bytes(npz(latents=codes().numpy())),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", STRANGERS)
def test_files_of_other_kinds(tmp_path: Path, suffix: str, name: str) -> None:
    path = tmp_path / f"codes{suffix}"
    STRANGERS[name](path)
    with pytest.raises(ValueError, match=rf"codes\{suffix} is damaged or no file of codes: ."):
        load_codes(path)


# --- hostile files


class Payload:
    """Makes a file when it is unpickled."""

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
    "settings": lambda payload: npz(latents=codes().numpy(), settings=objects(payload)),
    "beside": lambda payload: npz(latents=codes().numpy(), settings=np.array(TEXT), more=objects(payload)),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_is_run(tmp_path: Path, suffix: str, name: str) -> None:
    path, trace = tmp_path / f"codes{suffix}", tmp_path / "trace"
    path.write_bytes(ATTACKS[name](Payload(trace)))
    try:
        latents, settings = load_codes(path)
    except ValueError as error:
        assert str(error).startswith(f"{path} is damaged or no file of codes: ")  # noqa: PT017 - one of them is read
    else:
        # What nobody asks for is not looked at.
        assert (name, suffix) == ("beside", ".npz")
        assert torch.equal(latents, codes())
        assert settings == SETTINGS
    assert not trace.exists()


def test_the_payload_is_live(tmp_path: Path) -> None:
    """The test above would see it."""
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
    },
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", NO_SETTINGS)
def test_no_settings(tmp_path: Path, suffix: str, name: str) -> None:
    path = write(tmp_path / f"codes{suffix}", codes(), NO_SETTINGS[name])
    with pytest.raises(ValueError, match=rf"codes\{suffix} is damaged or no file of codes: .") as caught:
        load_codes(path)
    if name.startswith("without"):
        assert "its settings are no JSON object with model, model_sha256, timesteps" in str(caught.value)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": 3}, "its settings do not name a model"),
    ({"model": None}, "its settings do not name a model"),
    ({"model_sha256": ["0f" * 32]}, "its settings do not name a model"),
    ({"timesteps": "900"}, "timesteps is '900'; it must be a list"),
    ({"timesteps": None}, "timesteps is None; it must be a list"),
    ({"timesteps": 900}, "timesteps is 900; it must be a list"),
    ({"timesteps": []}, "timesteps is empty"),
    ({"timesteps": {"900": 1}}, "timesteps holds '900'; every entry must be a whole number"),
    ({"timesteps": ["900", "0"]}, "timesteps holds '900'; every entry must be a whole number"),
    ({"timesteps": [900.0, 0]}, r"timesteps holds 900\.0; every entry must be a whole number"),
    ({"timesteps": [True]}, "timesteps holds True; every entry must be a whole number"),
    ({"timesteps": [900, [0]]}, r"timesteps holds \[0\]; every entry must be a whole number"),
    ({"timesteps": [0, 900]}, "timesteps holds 900 after 0; they must be strictly decreasing"),
    ({"timesteps": [900, 900]}, "timesteps holds 900 after 900"),
    ({"timesteps": [900, -1]}, "timesteps holds -1"),
    ({"exact": "yes"}, "its settings do not tell how the codes were made"),
    ({"exact": 1}, "its settings do not tell how the codes were made"),
    ({"residual": 1e-6}, "its settings do not tell how the codes were made"),
    ({"residual": ["small"]}, "a tolerance or residual must be a number, got 'small'"),
    ({"residual": [None]}, "a tolerance or residual must be a number, got None"),
    ({"tolerance": "1e-5"}, "a tolerance or residual must be a number, got '1e-5'"),
    ({"tolerance": True}, "a tolerance or residual must be a number, got True"),
]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(changes)[1:-1] for changes, _ in WRONG])
def test_wrong_settings(tmp_path: Path, suffix: str, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / f"codes{suffix}", codes(), json.dumps(asdict(SETTINGS) | changes))
    with pytest.raises(ValueError, match=rf"codes\{suffix} is damaged or no file of codes: {message}"):
        load_codes(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_later_versions_may_say_more(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"codes{suffix}", codes(), json.dumps(asdict(SETTINGS) | {"spacing": "quad", "eta": 0}))
    assert load_codes(path)[1] == SETTINGS


# --- whose codes


def sha256(unet: UNet2DModel, **scheduler: Any) -> str:
    return model_sha256(DDIMPipeline(unet, DDIMScheduler(**scheduler)))


def test_sha256_is_that_of_a_copy(saved_pipeline: Path, tiny_pipeline: DDIMPipeline, tmp_path: Path) -> None:
    expected = model_sha256(tiny_pipeline)
    assert re.fullmatch(r"[0-9a-f]{64}", expected)
    reloaded = DDIMPipeline.from_pretrained(saved_pipeline)
    assert model_sha256(reloaded) == expected
    reloaded.save_pretrained(tmp_path / "elsewhere")
    assert model_sha256(DDIMPipeline.from_pretrained(tmp_path / "elsewhere")) == expected
    assert model_sha256(DDIMPipeline.from_pretrained("mnist")) == model_sha256(DDIMPipeline.from_pretrained("mnist"))


def test_sha256_of_what_makes_no_difference(tiny_unet: UNet2DModel) -> None:
    """To a code: neither what only plain sampling does, nor where and how the network has been run."""
    expected = sha256(tiny_unet)
    for settings in (
        {"timestep_spacing": "trailing"},
        {"clip_sample": False},
        {"set_alpha_to_one": False},
        {"steps_offset": 1},
    ):
        assert sha256(tiny_unet, **settings) == expected
    assert sha256(tiny_unet.train().requires_grad_(False)) == expected
    assert sha256(tiny_unet.to(memory_format=torch.channels_last)) == expected


def test_sha256_tells_every_weight(make_unet: Callable[..., UNet2DModel]) -> None:
    """One number in each tensor, by the smallest change there is."""
    unet = make_unet()
    seen = {sha256(unet)}
    state = unet.state_dict()
    for position, tensor in enumerate(state.values()):
        flat = tensor.view(-1)
        index = position * 7 % len(flat)
        old = flat[index].clone()
        flat[index] = torch.nextafter(old, torch.tensor(torch.inf))
        seen.add(sha256(unet))
        flat[index] = old
    assert len(seen) == 1 + len(state) > 50
    assert sha256(unet) in seen


def test_sha256_tells_weights_that_changed_places(make_unet: Callable[..., UNet2DModel]) -> None:
    unet = make_unet()
    before = sha256(unet)
    state = unet.state_dict()
    name, other = (f"down_blocks.0.resnets.0.conv{i}.weight" for i in (1, 2))
    unet.load_state_dict(state | {name: state[other].clone(), other: state[name].clone()})
    assert sha256(unet) != before


CONFIGS: list[dict[str, Any]] = [
    {"sample_size": 32},
    {"norm_eps": 1e-6},
    {"norm_num_groups": 2},
    {"flip_sin_to_cos": False},
    {"act_fn": "gelu"},
    {"attention_head_dim": 4},
]
SCHEDULERS: list[dict[str, Any]] = [
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_end": 0.0201},
    {"beta_start": 1.0001e-4},
    {"num_train_timesteps": 999},
    {"rescale_betas_zero_snr": True},
]


def test_sha256_tells_configurations(make_unet: Callable[..., UNet2DModel]) -> None:
    """These leave the weights as they are."""
    expected = make_unet().state_dict()
    seen = {sha256(make_unet())}
    for changes in CONFIGS:
        unet = make_unet(**changes)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in unet.state_dict().items())
        seen.add(sha256(unet))
    for changes in SCHEDULERS:
        seen.add(sha256(make_unet(), **changes))
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        seen.add(sha256(make_unet().to(dtype)))
    assert len(seen) == 1 + len(CONFIGS) + len(SCHEDULERS) + 3


def test_codes_of_this_model(tiny_pipeline: DDIMPipeline) -> None:
    settings = replace(SETTINGS, model_sha256=model_sha256(tiny_pipeline))
    check_settings("codes.npz", settings, tiny_pipeline, [999, 600, 20, 0])
    # The name is only what the user called it.
    check_settings("codes.npz", replace(settings, model="other", exact=False), tiny_pipeline, [999, 600, 20, 0])


def test_codes_of_another_model(tiny_pipeline: DDIMPipeline, make_unet: Callable[..., UNet2DModel]) -> None:
    settings = replace(SETTINGS, model="runs/one", model_sha256=model_sha256(tiny_pipeline))
    message = (
        r"^a b\.npz was made with the model 'runs/one', which is not the one given .*; --force decodes all the same$"
    )
    for unet, scheduler in (
        (make_unet(), DDIMScheduler(beta_end=0.03)),
        (make_unet(norm_eps=1e-6), DDIMScheduler()),
        (make_unet().to(torch.bfloat16), DDIMScheduler()),
    ):
        with pytest.raises(ValueError, match=message):
            check_settings("a b.npz", settings, DDIMPipeline(unet, scheduler), SETTINGS.timesteps)


@pytest.mark.parametrize("timesteps", [[999, 600, 20], [999, 600, 21, 0], [980, 0], [999, 600, 20, 10, 0]])
def test_codes_along_other_timesteps(tiny_pipeline: DDIMPipeline, timesteps: list[int]) -> None:
    settings = replace(SETTINGS, model_sha256=model_sha256(tiny_pipeline))
    message = (
        rf"^codes\.npz was made in 4 steps from timestep 999, which are not the {len(timesteps)} from {timesteps[0]} "
        "asked for; --force decodes all the same$"
    )
    with pytest.raises(ValueError, match=message):
        check_settings("codes.npz", settings, tiny_pipeline, timesteps)
