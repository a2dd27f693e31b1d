"""Weight files and original checkpoints: damaged bytes, and whole files with other content.

What is loaded from a damaged file that has checksums must be what was saved; from any other file, what a second reader
finds in it. What is converted must hold the values of the checkpoint, all of them and no others.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import Tensor

from ddim.convert import CheckpointSettings, OpenAIFlags, convert
from ddim.io.weights import write_weights
from ddim.unet import UNet2DModel
from fuzz.harness import CRASH, Fault, attempt, empty, expect
from fuzz.models import original, tiny_unet
from fuzz.mutations import MUTATIONS, VALUES, Mutation, make_zip, mutate, zip_bomb

WEIGHTS = "diffusion_pytorch_model"
FORMATS = ("safetensors", "foreign", "bin", "old bin", "shards", "bin shards", "half")
LAYOUTS = ("ddpm.pt", "ddpm.ckpt", "ddpm.safetensors", "openai.pt", "openai.safetensors")
WITHOUT_CHECKSUM = ("foreign", "old bin", "ddpm.safetensors", "openai.safetensors")
FILES = (
    "fifo",
    "folder",
    "nothing",
    "loop",
    "missing",
    "zip bomb",
    "empty zip",
    "text",
    "long header",
    "tensor",
    "number",
)
MARK = "/tmp/ddim-fuzz-code-was-run"


class Runs:
    """An object whose loading runs code."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARK}",)


REPLACEMENTS: dict[str, Callable[[Tensor], Any]] = {
    "reshape": lambda tensor: tensor.reshape(1, *tensor.shape),
    "transpose": lambda tensor: tensor.mT if tensor.ndim > 1 else tensor.flip(0),
    "nan": lambda tensor: tensor.flatten().index_fill(0, torch.tensor([0]), torch.nan).view(tensor.shape),
    "inf": lambda tensor: tensor / 0,
    "integer": lambda tensor: tensor.long(),
    "double": lambda tensor: tensor.double() * (1 + 1e-12),
    "half": lambda tensor: tensor.half(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "bool": lambda tensor: tensor > 0,
    "empty": lambda tensor: tensor[:0],
    "scalar": lambda tensor: tensor.flatten()[0],
    "expand": lambda tensor: tensor.flatten()[0].expand(2**31),
    "view": lambda tensor: tensor.flatten()[0].expand(tensor.shape),
    "object": lambda tensor: {"x": tensor},
    "nested": lambda tensor: [[[tensor]]],
    "list": lambda tensor: tensor.tolist(),
    "text": lambda tensor: "x",
    "code": lambda tensor: Runs(),
    "sparse": lambda tensor: tensor.to_sparse(),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
}
CHANGES = ("drop", "rename", "extra", "swap", *REPLACEMENTS)


class Damage(NamedTuple):
    """A weight file or an original checkpoint, and what is wrong with it.

    Attributes:
        format: one of `FORMATS`, or of `LAYOUTS` for conversion.
        mutations: damage to the bytes.
        changes: of `CHANGES`, each with the number of a tensor.
        file: one of `FILES`, which replaces the file.
        index: entries of the index of shards, or of the header of safetensors.
    """

    format: str
    mutations: list[Mutation] = []  # noqa: RUF012 - a default of a named tuple, never changed
    changes: list[tuple[str, int]] = []  # noqa: RUF012
    file: str = ""
    index: dict[str, Any] = {}  # noqa: RUF012


FORMAT = st.sampled_from((*FORMATS, *LAYOUTS))
ENTRY = st.sampled_from(["dtype", "shape", "data_offsets", "weight_map", "__metadata__", "file"])
HEADER_VALUES = (
    VALUES | st.lists(st.integers(-2, 2**40), max_size=4) | st.sampled_from(["F32", "F16", "I64", "F8_E5M2"])
)
CHANGED = st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, 60)), min_size=1, max_size=2)
EXAMPLES = st.one_of(
    st.builds(lambda kind, mutations: Damage(kind, mutations=mutations), FORMAT, MUTATIONS),
    st.builds(lambda kind, mutations: Damage(kind, mutations=mutations), FORMAT, MUTATIONS),
    st.builds(lambda kind, changes: Damage(kind, changes=changes), FORMAT, CHANGED),
    st.builds(lambda kind, file: Damage(kind, file=file), FORMAT, st.sampled_from(FILES)),
    st.builds(
        lambda kind, index: Damage(kind, index=index),
        FORMAT,
        st.dictionaries(ENTRY, HEADER_VALUES, min_size=1, max_size=2),
    ),
)


def make_check(folder: Path) -> Callable[[Damage], None]:
    """Return the check of a checkpoint."""
    state = {name: tensor.clone() for name, tensor in tiny_unet().state_dict().items()}
    originals = {layout: original(layout) for layout in ("ddpm", "openai")}
    template = folder / "template"
    tiny_unet().save_pretrained(template)

    def check(damage: Damage) -> None:
        target = empty(folder / "checkpoints")
        is_original = damage.format in LAYOUTS
        tensors = change(originals[damage.format.partition(".")[0]] if is_original else state, damage.changes)
        if is_original:
            path = target / damage.format
            write_original(tensors, path)
        else:
            shutil.copy(template / "config.json", target)
            path = write_weight_files(tensors, damage.format, target)
        whole = path.read_bytes()
        path.write_bytes(mutate(whole, damage.mutations))
        if damage.index:
            edit_header(path, damage.index)
        if damage.file:
            replace(path, damage.file)
        try:
            if is_original:
                check_conversion(path, tensors, whole, damage, target)
            else:
                check_weights(target, path, state, whole, damage)
        finally:
            if Path(MARK).exists():
                Path(MARK).unlink()
                raise Fault(CRASH, "code in the file was run")

    return check


def check_weights(target: Path, path: Path, state: Mapping[str, Tensor], whole: bytes, damage: Damage) -> None:
    """Load a network and compare its parameters."""
    network = attempt(UNet2DModel.from_pretrained, target, naming=(str(target),))
    loaded = network.state_dict()
    data = path.read_bytes()
    if damage.mutations and not damage.index and data != whole and damage.format not in WITHOUT_CHECKSUM:
        expected: Mapping[str, Tensor] = {name: tensor.clone() for name, tensor in state.items()}
        if damage.format == "half":
            expected = {name: tensor.half() for name, tensor in expected.items()}
    else:
        expected = second_reader(target)
    expect(loaded.keys() == expected.keys(), f"other tensors: {loaded.keys() ^ expected.keys()}")
    for name, tensor in expected.items():
        expect(tuple(loaded[name].shape) == tuple(tensor.shape), f"{name} has another shape")
        expect(not tensor.is_complex(), f"{name} is complex, and only its real part is used")
        expect(bool(loaded[name].isfinite().all()), f"{name} is not finite")
        expect(torch.equal(loaded[name], tensor.to(torch.float32)), f"{name} has other values")


def check_conversion(path: Path, tensors: Mapping[str, Any], whole: bytes, damage: Damage, target: Path) -> None:
    """Convert an original checkpoint and compare the values of all its tensors."""
    flags = OpenAIFlags(heads=1) if damage.format.startswith("openai") else None
    settings = CheckpointSettings(image_size=8, flags=flags)
    pipe = attempt(convert, path, target / "out", settings=settings, naming=(str(path),))
    data = path.read_bytes()
    if damage.format in WITHOUT_CHECKSUM and data != whole:
        tensors = read_safetensors(data)
    actual = torch.cat([tensor.double().flatten() for tensor in pipe.unet.state_dict().values()]).sort().values
    expected = torch.cat([tensor.float().double().flatten() for tensor in tensors.values()]).sort().values
    expect(torch.equal(actual, expected), "the network has other values than the checkpoint")
    again = attempt(UNet2DModel.from_pretrained, target / "out" / "unet").state_dict()
    expect(all(torch.equal(again[name], tensor) for name, tensor in pipe.unet.state_dict().items()), "saved otherwise")


def second_reader(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a folder by other code than the library's."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            tensors |= read_safetensors(path.read_bytes())
        elif path.suffix == ".bin":
            tensors |= torch.load(path, weights_only=True)
    return tensors


def read_safetensors(data: bytes) -> dict[str, Tensor]:
    """Read safetensors by the format's description."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    types = {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": np.int16,
        "I64": np.int64,
        "BOOL": np.bool_,
    }
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            array = np.frombuffer(body[start:end], types[entry["dtype"]]).reshape(entry["shape"])
            tensor = torch.from_numpy(array.copy())
            tensors[name] = tensor.view(torch.bfloat16) if entry["dtype"] == "BF16" else tensor
    return tensors


def write_weight_files(tensors: Mapping[str, Any], kind: str, folder: Path) -> Path:
    """Write the weights of a network, and return the file to damage."""
    if kind == "foreign":
        path = folder / f"{WEIGHTS}.safetensors"
        safetensors.torch.save_file(storable(tensors), path)
    elif kind in ("bin", "old bin"):
        path = folder / f"{WEIGHTS}.bin"
        save_pickle(tensors, path, _use_new_zipfile_serialization=kind == "bin")
    elif kind in ("shards", "bin shards"):
        write_weights(storable(tensors), folder, None, 9000, kind == "shards")
        path = sorted(file for file in folder.iterdir() if "-of-" in file.name)[1]
    else:
        write_weights(storable(tensors, torch.float16 if kind == "half" else None), folder)
        path = folder / f"{WEIGHTS}.safetensors"
    return path


def write_original(tensors: Mapping[str, Any], path: Path) -> None:
    """Write an original checkpoint: a dictionary, or the list of a training run."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(storable(tensors), path)
    else:
        save_pickle([{}, {}, 0, 0, tensors] if path.suffix == ".ckpt" else tensors, path)


def save_pickle(content: Any, path: Path, **options: Any) -> None:
    """Write a pickle, of tensors that the older format takes where it does not take these."""
    try:
        torch.save(content, path, **options)
    except (RuntimeError, NotImplementedError):
        torch.save({}, path)


def storable(tensors: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the tensors that safetensors can hold, each with its own memory."""
    kinds = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)
    dense = {
        n: t for n, t in tensors.items() if isinstance(t, Tensor) and t.layout == torch.strided and t.dtype in kinds
    }
    return {
        str(name): tensor.to(dtype or tensor.dtype).clone(memory_format=torch.contiguous_format)
        for name, tensor in dense.items()
        if tensor.nbytes < 2**30
    }


def change(tensors: Mapping[str, Tensor], changes: list[tuple[str, int]]) -> dict[Any, Any]:
    """Return tensors after changes to single ones."""
    result: dict[Any, Any] = dict(tensors)
    names = list(tensors)
    for kind, number in changes:
        name, other = names[number % len(names)], names[(number + 1) % len(names)]
        if kind == "drop":
            result.pop(name, None)
        elif kind == "rename":
            result[number] = result.pop(name, tensors[name])
        elif kind == "extra":
            result[f"{name}.x"] = tensors[name]
        elif kind == "swap":
            result[name] = tensors[other]
        else:
            result[name] = REPLACEMENTS[kind](tensors[name])
    return result


def edit_header(path: Path, entries: dict[str, Any]) -> None:
    """Change entries of an index beside a file, and of its header if it is safetensors."""
    for index in path.parent.glob("*.index.json"):
        content = json.loads(index.read_text())
        if "weight_map" in entries:
            content["weight_map"] = entries["weight_map"]
        if "file" in entries and isinstance(content["weight_map"], dict) and content["weight_map"]:
            content["weight_map"][next(iter(content["weight_map"]))] = entries["file"]
        index.write_text(json.dumps(content))
    if path.suffix == ".safetensors":
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        first = next(name for name in header if name != "__metadata__")
        for key, value in entries.items():
            if key == "__metadata__":
                header[key] = value
            elif key in header[first]:
                header[first][key] = value
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def replace(path: Path, kind: str) -> None:
    """Put something else where a file was."""
    data = path.read_bytes()
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "nothing":
        path.touch()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif kind == "long header":
        path.write_bytes(struct.pack("<Q", 2**62) + data[8:])
    elif kind == "empty zip":
        path.write_bytes(b"PK\x05\x06" + bytes(18))
    elif kind in ("tensor", "number"):
        torch.save(torch.zeros(3) if kind == "tensor" else 3, path)
    elif kind == "zip bomb":
        write_zip_bomb(path)


def write_zip_bomb(path: Path) -> None:
    """Write a file of `torch.save` whose storage is compressed: 3 GB in 3 MB."""
    stream = io.BytesIO()
    torch.save({"x": torch.zeros(4)}, stream)
    with zipfile.ZipFile(stream) as source:
        members = [
            (name, *zip_bomb()) if name.endswith("data/0") else (name, source.read(name), None)
            for name in source.namelist()
        ]
    path.write_bytes(make_zip(members))
