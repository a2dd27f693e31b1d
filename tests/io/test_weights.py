"""Saved models: round trips, damaged, foreign and malicious files, and saves that fail half-way.

Every bad file must end in the documented exception with a message that names the file, never in code that runs, in
other weights than those saved, or in a folder that lost its content.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from ddim.io import weights
from ddim.io.config import register_to_config
from ddim.io.pretrained import ModelFiles, parameters_on_meta
from ddim.io.weights import ALIGNMENT, DTYPES, choose_weights, read_weights, write_weights
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel
from helpers import public

NAME = "diffusion_pytorch_model"
SAFETENSORS = f"{NAME}.safetensors"
PICKLE = f"{NAME}.bin"
INDEX = f"{NAME}.safetensors.index.json"


@pytest.fixture
def folder(saved_pipeline: Path, tmp_path: Path) -> Path:
    """A saved pipeline."""
    return shutil.copytree(saved_pipeline, tmp_path / "model")


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return the bytes of all files by relative path, `None` for folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position, os.SEEK_END if position < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << bit]))


# --- round trips


def test_pipeline_round_trip(tiny_pipeline: DDIMPipeline, folder: Path) -> None:
    loaded = DDIMPipeline.from_pretrained(folder)
    assert same(loaded.unet.state_dict(), tiny_pipeline.unet.state_dict())
    assert json.dumps(public(loaded.unet.config)) == json.dumps(public(tiny_pipeline.unet.config))
    assert public(loaded.scheduler.config) == public(tiny_pipeline.scheduler.config)
    assert sorted(name for name, content in contents(folder).items() if content is not None) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        f"unet/{SAFETENSORS}",
    ]


def test_scheduler_round_trip_of_every_argument(tmp_path: Path) -> None:
    changed: dict[str, Any] = {
        "num_train_timesteps": 40,
        "beta_start": 0.001,
        "beta_end": 0.03,
        "beta_schedule": "squaredcos_cap_v2",
        "trained_betas": np.linspace(1e-3, 0.3, 40) ** 1.5,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "v_prediction",
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.9,
        "clip_sample_range": 1.5,
        "sample_max_value": 2.5,
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "solver_order": 2,
        "timesteps_by_steps": {"2": [30, 4]},
        "coefficients_by_steps": {"2": [[30, 29, 0.1], [4, 4, 0.0, -0.2]]},
    }
    defaults = inspect.signature(DDIMScheduler).parameters
    assert list(changed) == list(defaults)
    assert all(not np.array_equal(value, defaults[name].default) for name, value in changed.items())

    scheduler = DDIMScheduler(**changed)
    scheduler.save_pretrained(tmp_path)
    loaded = DDIMScheduler.from_pretrained(tmp_path)
    for name, value in changed.items():
        actual = getattr(loaded, name) if name in DDIMScheduler.own_settings else loaded.config[name]
        np.testing.assert_array_equal(actual, value, err_msg=name)
    assert torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)
    assert DDIMScheduler.from_pretrained(tmp_path, steps_offset=3).config.steps_offset == 3


def test_loaded_network_is_in_evaluation_mode_and_trainable(folder: Path) -> None:
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
    assert not any(module.training for module in unet.modules())
    assert all(parameter.requires_grad for parameter in unet.parameters())


def test_loading_does_not_change_the_random_state(make_unet: Callable[..., UNet2DModel], tmp_path: Path) -> None:
    make_unet(time_embedding_type="fourier").save_pretrained(tmp_path)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    UNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_initial_weights_are_not_drawn_and_other_threads_are_left_alone() -> None:
    with parameters_on_meta(), ThreadPoolExecutor(1) as threads:
        here, there = nn.BatchNorm2d(2), threads.submit(nn.Conv2d, 1, 1, 1).result()
        shared = nn.Linear(1, 1)
        shared.alias = shared.weight
    assert (here.weight.is_meta, here.running_mean.is_meta, there.weight.is_meta) == (True, False, False)
    assert shared.alias is shared.weight
    assert not nn.Linear(1, 1).weight.is_meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(tiny_unet: UNet2DModel, folder: Path, dtype: torch.dtype) -> None:
    loaded = DDIMPipeline.from_pretrained(folder, torch_dtype=dtype)
    assert loaded.dtype == dtype
    assert same(loaded.unet.state_dict(), tiny_unet.to(dtype).state_dict())
    # A file in half precision is read as float32 by default, and holds half the bytes.
    tiny_unet.save_pretrained(folder / "half")
    assert UNet2DModel.from_pretrained(folder / "half").dtype == torch.float32
    assert (folder / f"half/{SAFETENSORS}").stat().st_size < 0.7 * (folder / f"unet/{SAFETENSORS}").stat().st_size


@pytest.mark.parametrize("dtype", [torch.int8, "float16"])
def test_invalid_dtype_raises(folder: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"torch_dtype must be a floating dtype .*, got "):
        DDIMPipeline.from_pretrained(folder, torch_dtype=dtype)


# --- folders with other content


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("", r"is not a model: neither scheduler/scheduler_config\.json nor scheduler_config\.json exists"),
        ("scheduler", r"is not a model: neither scheduler/scheduler_config\.json nor scheduler_config\.json exists"),
        ("unet", r"is not a model: neither unet/config\.json nor config\.json exists"),
        (f"unet/{SAFETENSORS}", rf"unet has no such weights: looked for {SAFETENSORS}, .*; found none"),
    ],
)
def test_missing_part_raises(folder: Path, lost: str, message: str) -> None:
    path = folder / lost
    path.unlink() if path.is_file() else shutil.rmtree(path)
    folder.mkdir(exist_ok=True)
    with pytest.raises(FileNotFoundError, match=message):
        DDIMPipeline.from_pretrained(folder)


def test_folder_without_index_loads(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    DDIMPipeline.from_pretrained(folder)


def test_missing_subfolder_raises(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"other/config\.json does not exist"):
        UNet2DModel.from_pretrained(folder, subfolder="other")
    with pytest.raises(FileNotFoundError, match=r"other/scheduler_config\.json does not exist"):
        DDIMScheduler.from_pretrained(folder, subfolder="other")


def test_missing_variant_raises(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"looked for {NAME}\.fp16\.safetensors.*found {SAFETENSORS}"):
        DDIMPipeline.from_pretrained(folder, variant="fp16")


def test_choose_weights_prefers_safetensors_and_single_files() -> None:
    names = [SAFETENSORS, INDEX, PICKLE, f"{NAME}.bin.index.json"]
    for position in range(4):
        assert choose_weights(reversed(names[position:])) == names[position]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet": ["diffusers", "UNet2DConditionModel"]}, "the class of unet must be .*, got 'UNet2DConditionModel'"),
        ({"scheduler": ["os", "system"]}, "the class of scheduler must be one of .*, got 'system'"),
        (
            {"vae": ["diffusers", "AutoencoderKL"]},
            "a component .* must be unet or scheduler, got 'vae'",
        ),
        ({"unet": [None, None]}, "the class of unet must be .*, got None"),
        ({"unet": []}, r"the class of unet must be .*, got \[\]"),
    ],
)
def test_model_index_with_other_classes_raises(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder / "model_index.json", **changes)
    with pytest.raises(ValueError, match=rf"model_index\.json: {message}"):
        DDIMPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not valid JSON"),
        (b'{"sample_size": 16', "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1, 2]", "must hold a JSON object, got list"),
        (b"null", "must hold a JSON object, got NoneType"),
    ],
    ids=["empty", "cut", "binary", "deep", "list", "null"],
)
def test_invalid_json_raises(folder: Path, name: str, text: bytes, message: str) -> None:
    (folder / name).write_bytes(text)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} {message}"):
        DDIMPipeline.from_pretrained(folder)


def test_configuration_of_another_class_raises(folder: Path) -> None:
    edit(folder / "unet/config.json", _class_name="UNet2DConditionModel")
    with pytest.raises(
        ValueError, match=r"unet/config\.json: the class must be one of UNet2DModel or .*, got 'UNet2DConditionModel'"
    ):
        DDIMPipeline.from_pretrained(folder)


@pytest.mark.parametrize("value", [None, "abc", -1, [], {}, [None, None], 1.5, 10**12])
@pytest.mark.parametrize(
    "name",
    ["block_out_channels", "down_block_types", "in_channels", "norm_num_groups", "act_fn"],
)
def test_invalid_network_configuration_raises(folder: Path, name: str, value: Any) -> None:
    edit(folder / "unet/config.json", **{name: value})
    with pytest.raises(ValueError, match="unet"):
        DDIMPipeline.from_pretrained(folder)


@pytest.mark.parametrize("value", ["abc", [], {}, -1])
@pytest.mark.parametrize("name", ["num_train_timesteps", "beta_end", "trained_betas", "clip_sample_range"])
def test_invalid_scheduler_configuration_raises(folder: Path, name: str, value: Any) -> None:
    edit(folder / "scheduler/scheduler_config.json", **{name: value})
    with pytest.raises(ValueError, match=r"scheduler_config\.json does not describe a DDIMScheduler"):
        DDIMPipeline.from_pretrained(folder)


def test_unknown_override_raises(folder: Path) -> None:
    with pytest.raises(TypeError, match="beta_stop"):
        DDIMScheduler.from_pretrained(folder, subfolder="scheduler", beta_stop=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'vae'"):
        DDIMPipeline.from_pretrained(folder, vae=object())
    assert DDIMPipeline.from_pretrained(folder, safety_checker=None).name_or_path == str(folder)


# --- damaged, foreign and malicious weights


class Small(ModelFiles, nn.Module):
    """A network whose file is so small that every bit of it can be flipped."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(size, 2)
        self.scale = nn.Parameter(torch.tensor(2.0))


def test_truncated_safetensors_raises(folder: Path) -> None:
    path = folder / f"unet/{SAFETENSORS}"
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{SAFETENSORS} is truncated or damaged"):
            DDIMPipeline.from_pretrained(folder)


def test_flipped_bit_in_tensor_data_raises(folder: Path) -> None:
    path = folder / f"unet/{SAFETENSORS}"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    chosen = random.Random(0)
    for position in [start, start + 3, len(whole) - 1, *(chosen.randrange(start, len(whole)) for _ in range(20))]:
        path.write_bytes(whole)
        flip(path, position, chosen.randrange(8))
        with pytest.raises(ValueError, match=rf"{SAFETENSORS} is damaged: .*SHA-256"):
            DDIMPipeline.from_pretrained(folder)


def test_any_flipped_bit_raises_or_has_no_effect(tmp_path: Path) -> None:
    """The file is refused, or the bit has no meaning (in the name of the checksum's entry, or white space)."""
    small = Small()
    small.save_pretrained(tmp_path)
    expected = dict(small.state_dict())
    path = tmp_path / SAFETENSORS
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    read = []
    for position in range(8 * len(whole)):
        flip(path, position // 8, position % 8)
        with contextlib.suppress(ValueError):
            assert same(read_weights(tmp_path), expected)
            read.append(position // 8)
        flip(path, position // 8, position % 8)
    assert max(read) < start


class Evil:
    """An object whose unpickling runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("disguise", ["alone", "among tensors", "as a shard", "as safetensors", "in the flat layout"])
def test_malicious_pickle_is_refused(
    tiny_unet: UNet2DModel, folder: Path, tmp_path: Path, disguise: str, legacy: bool
) -> None:
    evil = Evil(tmp_path / "touched")
    content = evil if disguise == "alone" else dict(tiny_unet.state_dict()) | {"conv_in.bias": evil}
    path = folder / "unet" / (f"{NAME}-00001-of-00001.bin" if disguise == "as a shard" else PICKLE)
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    raw = path.read_bytes()
    (folder / f"unet/{SAFETENSORS}").unlink()
    if disguise == "as a shard":
        index = {"weight_map": dict.fromkeys(tiny_unet.state_dict(), path.name)}
        (folder / f"unet/{NAME}.bin.index.json").write_text(json.dumps(index))
    elif disguise == "as safetensors":
        path.rename(folder / f"unet/{SAFETENSORS}")
    elif disguise == "in the flat layout":
        shutil.move(path, folder)
        shutil.move(folder / "unet/config.json", folder)

    with pytest.raises(ValueError, match=r"is truncated or damaged" if "safe" in disguise else r"\.bin is refused: "):
        DDIMPipeline.from_pretrained(folder)
    assert not evil.path.exists()
    # Loaded without the restriction, the file does run its command.
    torch.load(io.BytesIO(raw), weights_only=False)
    assert evil.path.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_damaged_pickle_raises(tmp_path: Path, legacy: bool) -> None:
    """Neither another exception nor a part of the tensors; flips in the data of a legacy file go undetected."""
    small = Small()
    path = tmp_path / PICKLE
    torch.save(small.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for length in range(0, len(whole), 29):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{NAME}\.bin is (refused|truncated)"):
            read_weights(tmp_path)
    path.write_bytes(whole)
    for position in range(0, len(whole), 3):
        flip(path, position, position % 8)
        with contextlib.suppress(ValueError):
            assert len(read_weights(tmp_path)) == 3
        flip(path, position, position % 8)
    assert same(read_weights(tmp_path), dict(small.state_dict()))


@pytest.mark.parametrize("content", [torch.zeros(2), [torch.zeros(2)], {"state_dict": {"a": torch.zeros(2)}}, {"a": 1}])
def test_pickle_without_tensors_raises(folder: Path, content: Any) -> None:
    (folder / f"unet/{SAFETENSORS}").unlink()
    torch.save(content, folder / f"unet/{PICKLE}")
    with pytest.raises(ValueError, match=rf"{NAME}\.bin does not hold a dictionary of tensors"):
        DDIMPipeline.from_pretrained(folder)


def test_mismatched_weights_raise(tiny_unet: UNet2DModel, folder: Path) -> None:
    path = folder / f"unet/{SAFETENSORS}"
    tensors = dict(tiny_unet.state_dict())
    tensors["conv_in.kernel"] = tensors.pop("conv_in.weight")
    tensors["conv_in.bias"] = torch.zeros(9)
    safetensors.torch.save_file(tensors, path)
    fragments = "conv_in.weight is missing; conv_in.kernel is unexpected; conv_in.bias: expected shape (8,), got (9,)"
    with pytest.raises(ValueError, match=rf"unet do not fit its configuration: {re.escape(fragments)}$"):
        DDIMPipeline.from_pretrained(folder)
    safetensors.torch.save_file({"other": torch.zeros(1)}, path)
    fragment = r"conv_in\.weight is missing; conv_in\.bias is missing; [\w.]+ is missing \(and \d+ more\)$"
    with pytest.raises(ValueError, match=fragment):
        DDIMPipeline.from_pretrained(folder)


@pytest.fixture
def sharded(tiny_unet: UNet2DModel, folder: Path) -> Path:
    """The network's folder, with its weights in shards."""
    tiny_unet.save_pretrained(folder / "unet", max_shard_size="50KB")
    return folder / "unet"


@pytest.mark.parametrize("name", ["../evil.safetensors", "/evil.safetensors", "sub/evil.safetensors", "evil.txt", ".."])
def test_shard_outside_the_folder_raises(folder: Path, sharded: Path, name: str) -> None:
    index = json.loads((sharded / INDEX).read_text())
    for target in (folder, sharded / "sub"):
        target.mkdir(exist_ok=True)
        shutil.copy(next(sharded.glob("*-00001-of-*")), target / "evil.safetensors")
    index["weight_map"]["conv_in.weight"] = str(folder / "evil.safetensors") if name.startswith("/") else name
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{INDEX} names '.*'; shards are .* files beside it"):
        DDIMPipeline.from_pretrained(folder)


@pytest.mark.parametrize("weight_map", [None, [], {"conv_in.weight": 3}, {"conv_in.weight": None}])
def test_invalid_shard_index_raises(folder: Path, sharded: Path, weight_map: Any) -> None:
    edit(sharded / INDEX, weight_map=weight_map)
    with pytest.raises(ValueError, match=f"{INDEX} has no weight_map"):
        DDIMPipeline.from_pretrained(folder)


def test_missing_or_damaged_shard_raises(folder: Path, sharded: Path) -> None:
    shard = sorted(sharded.glob("*-of-*"))[1]
    flip(shard, -1, 0)
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        DDIMPipeline.from_pretrained(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{INDEX} names {shard.name}, which is not there"):
        DDIMPipeline.from_pretrained(folder)


# --- saving over an earlier save, and failing saves


@pytest.mark.parametrize("sizes", [("50KB", "10GB"), ("10GB", "50KB"), ("50KB", "30KB"), ("30KB", 50_000)])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_saving_removes_stale_weights(
    make_unet: Callable[..., UNet2DModel], tmp_path: Path, sizes: tuple[int | str, int | str], variant: str | None
) -> None:
    unrelated = {"README.md": b"mine", "sub/notes.txt": b"mine", f"{NAME}.ema.safetensors": b"mine", PICKLE: b"mine"}
    (tmp_path / "sub").mkdir()
    for name, content in unrelated.items():
        (tmp_path / name).write_bytes(content)
    make_unet(layers_per_block=2).save_pretrained(tmp_path, variant=variant, max_shard_size=sizes[0])
    new = make_unet()
    new.save_pretrained(tmp_path, variant=variant, max_shard_size=sizes[1])
    assert same(UNet2DModel.from_pretrained(tmp_path, variant=variant).state_dict(), new.state_dict())

    new.save_pretrained(tmp_path / "fresh", variant=variant, max_shard_size=sizes[1])
    assert {path.name for path in (tmp_path / "fresh").iterdir()} | {"README.md", "sub", "fresh"} == {
        path.name for path in tmp_path.iterdir()
    } - {f"{NAME}.ema.safetensors", PICKLE}
    assert {name: (tmp_path / name).read_bytes() for name in unrelated} == unrelated


def test_variants_coexist(tiny_unet: UNet2DModel, make_unet: Callable[..., UNet2DModel], tmp_path: Path) -> None:
    tiny_unet.save_pretrained(tmp_path, variant="fp16", max_shard_size="50KB")
    make_unet().save_pretrained(tmp_path)
    make_unet().save_pretrained(tmp_path, max_shard_size="50KB")
    assert same(UNet2DModel.from_pretrained(tmp_path, variant="fp16").state_dict(), tiny_unet.state_dict())


@pytest.mark.parametrize("calls", [0, 1], ids=["the first shard", "the second shard"])
def test_failed_save_changes_nothing(
    make_unet: Callable[..., UNet2DModel], folder: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    before = contents(folder)
    write, written = weights.write_safetensors, []

    def fail(tensors: dict[str, Tensor], path: Path) -> None:
        write(tensors, path)
        written.append(path)
        if len(written) > calls:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "write_safetensors", fail)
    pipe = DDIMPipeline(make_unet(layers_per_block=2), DDIMScheduler(beta_end=0.01))
    with pytest.raises(OSError, match="No space left on device"):
        pipe.save_pretrained(folder, max_shard_size="50KB")
    assert contents(folder) == before
    DDIMPipeline.from_pretrained(folder)


@pytest.fixture
def small_disk(folder: Path, tmp_path: Path) -> Iterator[Path]:
    """A disk that holds the saved pipeline, with too little space for a second one."""
    size = sum(path.stat().st_size for path in folder.rglob("*.*"))
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", str(disk)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("requires the permission to mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_changes_nothing(make_unet: Callable[..., UNet2DModel], folder: Path, small_disk: Path) -> None:
    shutil.copytree(folder, small_disk / "model")
    before = contents(small_disk)
    for size in ("10GB", "50KB"):
        with pytest.raises(OSError, match="No space left on device"):
            DDIMPipeline(make_unet(layers_per_block=2), DDIMScheduler()).save_pretrained(
                small_disk / "model", max_shard_size=size
            )
        assert contents(small_disk) == before


def test_saving_into_a_file_raises(tiny_pipeline: DDIMPipeline, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    for part in (tiny_pipeline, tiny_pipeline.unet, tiny_pipeline.scheduler):
        with pytest.raises(NotADirectoryError, match="file"):
            part.save_pretrained(path)
    assert path.read_text() == "mine"


# --- formats


def test_use_safetensors_selects_the_format(folder: Path) -> None:
    unet = folder / "unet"
    doubled = {name: 2 * tensor for name, tensor in read_weights(unet).items()}
    torch.save(doubled, unet / PICKLE)
    plain = read_weights(unet)
    assert same(read_weights(unet, use_safetensors=True), plain)
    assert same(read_weights(unet, use_safetensors=False), doubled)
    assert same(DDIMPipeline.from_pretrained(folder, use_safetensors=False).unet.state_dict(), doubled)
    (unet / SAFETENSORS).unlink()
    assert same(UNet2DModel.from_pretrained(folder, subfolder="unet").state_dict(), doubled)
    for load in (
        DDIMPipeline.from_pretrained,
        lambda path, **options: UNet2DModel.from_pretrained(path / "unet", **options),
    ):
        with pytest.raises(FileNotFoundError, match=rf"looked for {NAME}\.safetensors.*found {NAME}\.bin"):
            load(folder, use_safetensors=True)


def test_mapped_weights_are_independent_of_the_file(tmp_path: Path, make_unet: Callable[..., UNet2DModel]) -> None:
    """Changing mapped weights leaves the file alone, and replacing the file leaves them alone."""
    unet = make_unet()
    unet.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert same(dict(loaded.state_dict()), dict(unet.state_dict()))
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.mul_(2)
    assert same(read_weights(tmp_path), dict(unet.state_dict()))
    other = read_weights(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert same(other, dict(unet.state_dict()))
    assert same(read_weights(tmp_path), dict(loaded.state_dict()))
    if sys.platform == "linux":
        assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in other.values())


def test_safetensors_library_reads_written_files(tmp_path: Path) -> None:
    """The safetensors library reads all dtypes, odd sizes and empty tensors."""
    tensors = {f"{dtype}": torch.arange(7).to(dtype) for dtype in DTYPES}
    tensors |= {"empty": torch.zeros(0, 3), "number": torch.tensor(3.0), "large": torch.randn(64, 64)}
    write_weights(tensors, tmp_path)
    loaded = safetensors.torch.load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
