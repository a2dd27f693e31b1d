"""Weights in files: which file, what is in it, and whether it fits. Nothing that is read here can run code.

    diffusion_pytorch_model.safetensors                    what is written, a SHA-256 of the tensors in its metadata
    diffusion_pytorch_model.fp16.safetensors               a variant
    diffusion_pytorch_model-00001-of-00002.safetensors     shards, and diffusion_pytorch_model.safetensors.index.json
    diffusion_pytorch_model-00001-of-00002.safetensors     shards, with an index (.safetensors.index.json)

The first models on the hub call their attention weights query, key, value and proj_attn; they are renamed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import pickle
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddim.io.config import read_json, to_json

WEIGHTS = "diffusion_pytorch_model"
MAX_SHARD_SIZE = "10GB"
ALIGNMENT = 64
"""Of tensors in memory, in bytes, and of those in files that are written here."""
MADV_PAGEOUT = 21
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As safetensors writes them."""
COPY_CHUNK_BYTES = 16 << 20
"""Bytes of a file that are in memory beside the tensors that are made of it."""

OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def choose_weights(
    names: Iterable[str],
    variant: str | None = None,
    source: str = "the folder",
    use_safetensors: bool | None = None,
) -> str:
    """The weights file among the names of a folder's files: safetensors before pickles, one file before shards.

    Args:
        names: of files, without folders.
        variant: `fp16`, say, for `diffusion_pytorch_model.fp16.safetensors`.
        source: where they come from, for messages.
        use_safetensors: `True` for safetensors only, `False` for pickles only.

    Raises:
        FileNotFoundError: saying what was looked for and what weights there are.
    """
    present = set(names)
    infix = f".{variant}" if variant else ""
    candidates = [
        f"{WEIGHTS}{infix}.safetensors",
        f"{WEIGHTS}.safetensors.index{infix}.json",
        f"{WEIGHTS}{infix}.bin",
        f"{WEIGHTS}.bin.index{infix}.json",
    ]
    if use_safetensors is not None:
        candidates = candidates[:2] if use_safetensors else candidates[2:]
    for candidate in candidates:
        if candidate in present:
            return candidate
    others = sorted(name for name in present if name.startswith(WEIGHTS))
    raise FileNotFoundError(
        f"{source} has no such weights: looked for {', '.join(candidates)}; found {', '.join(others) or 'none'}"
    )


def read_weights(folder: Path, variant: str | None = None, use_safetensors: bool | None = None) -> dict[str, Tensor]:
    """All tensors of the weights in a folder, on the CPU, under today's names, as far as possible where they lie in a
    mapped file, which may be replaced but not written to.

    Args:
        folder: holds a file that `choose_weights` finds.
        variant: as there.
        use_safetensors: as there.

    Raises:
        FileNotFoundError: if there are no such weights, or a shard is missing.
        ValueError: if a file is truncated or holds something else than tensors, or if it was saved here, with a SHA-256
            of its tensors, and has been altered.
    """
    chosen = choose_weights((path.name for path in folder.iterdir()), variant, str(folder), use_safetensors)
    if ".index." in chosen:
        tensors = {}
        for name in _shards(folder / chosen):
            tensors.update(_read_tensors(folder / name))
    else:
        tensors = _read_tensors(folder / chosen)
    return {_modern_name(name): tensor for name, tensor in tensors.items()}


def _shards(index: Path) -> list[str]:
    """The files that an index names; plain names only, so that an index cannot reach outside its folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith((".safetensors", ".bin")):
            raise ValueError(f"{index} names {name!r}; shards are .safetensors or .bin files beside it")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not there")
    return names


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        tensors: dict[str, Tensor] = {}
        names: list[str] | None = None
        try:
            # Opened anew now and then, so that what has been copied does not stay in memory.
            while names is None or names:
                with safe_open(path, framework="pt") as file:
                    names = list(file.keys()) if names is None else names
                    expected, size = (file.metadata() or {}).get("sha256"), 0
                    while names and size < COPY_CHUNK_BYTES:
                        name = names.pop()
                        mapped = file.get_tensor(name)
                        # Matrix kernels differ in the last bit with alignment: what lies as memory does is used where
                        # it is, the rest is copied.
                        in_place = sys.platform == "linux" and mapped.data_ptr() % ALIGNMENT == 0
                        tensors[name] = mapped if in_place else mapped.clone()
                        size += 0 if in_place else mapped.nbytes
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from None
        if expected is not None and expected != digest(tensors):
            raise ValueError(f"{path} is damaged: its tensors are not those it was written with (SHA-256 differs)")
        for tensor in tensors.values():
            drop_pages(tensor)
        return tensors
    content = read_pickle(path)
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ValueError(f"{path} does not hold a dictionary of tensors")
    return {name: tensor.clone() for name, tensor in content.items()}


def read_pickle(path: Path) -> Any:
    """What a file of `torch.save` holds, on the CPU; ValueError if it is damaged or could run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is refused: it is damaged or no plain file of tensors, and loading it could run code"
        ) from None
    except Exception as error:  # a damaged file fails in whatever it is taken for
        raise ValueError(f"{path} is truncated or damaged: {type(error).__name__}") from None


def _modern_name(name: str) -> str:
    """`attentions.0.query.weight` as `attentions.0.to_q.weight`; every other name as it is."""
    match = re.fullmatch(r"(.*attentions\.\d+\.)(query|key|value|proj_attn)(\.\w+)", name)
    return f"{match[1]}{OLD_ATTENTION_NAMES[match[2]]}{match[3]}" if match else name


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors on the CPU, in hexadecimal."""
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        sha256.update(_bytes(tensor))
    return sha256.hexdigest()


def fill_model(model: nn.Module, tensors: Mapping[str, Tensor], source: str, dtype: torch.dtype) -> None:
    """Make the tensors the parameters of a model that was built on the meta device.

    Args:
        model: whose names and shapes decide.
        tensors: as from `read_weights`; taken over where the dtype is right, not copied.
        source: where they come from, for messages.
        dtype: of the filled model.

    Raises:
        ValueError: naming the first three that are missing, not known, or of another shape.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    problems = [f"{name} is missing" for name in shapes if name not in tensors]
    problems += [f"{name} is not known" for name in tensors if name not in shapes]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"the weights in {source} do not fit its configuration: {'; '.join(problems[:3])}{more}")
    model.load_state_dict({name: tensors[name].to(dtype) for name in shapes}, assign=True)


def write_weights(
    tensors: Mapping[str, Tensor], folder: Path, variant: str | None = None, max_shard_size: int | str = MAX_SHARD_SIZE
) -> None:
    """Write safetensors, with an index where they take more than one file.

    Args:
        tensors: name -> tensor, on any device.
        folder: must exist.
        variant: put into the files' names.
        max_shard_size: of a file: bytes, or `"500MB"`.

    Raises:
        OSError: if it cannot be written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    infix = f".{variant}" if variant else ""
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern=f"{WEIGHTS}{infix}{{suffix}}.safetensors", max_shard_size=max_shard_size
    )
    for name, keys in plan.filename_to_tensors.items():
        shard = {key: tensors[key] for key in keys}
        _write_safetensors(shard, folder / name, {"format": "pt", "sha256": digest(shard)})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{WEIGHTS}.safetensors.index{infix}.json").write_text(to_json(index), encoding="utf-8")


def _write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """The format of safetensors, its header filled up with spaces and tensors of whole cache lines first, so that these
    can be used where they lie in a mapped file; the library packs them at any multiple of 8 bytes.
    """
    names = sorted(tensors, key=lambda name: (tensors[name].nbytes % ALIGNMENT != 0, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        dtype, shape = DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(_bytes(tensors[name]))


def _bytes(tensor: Tensor) -> Any:
    return tensor.flatten().view(torch.uint8).numpy()


def drop_pages(tensor: Tensor) -> None:
    """Tell the system that a tensor will not be looked at for a while: the memory of one in a mapped file is free until
    it is. Nothing changes for any other, nor in what it holds.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), MADV_PAGEOUT)


def remove_stale_weights(folder: Path, variant: str | None, written: Iterable[str]) -> None:
    """Delete the weights of this variant from an earlier save in another number of files: a loader would take them.

    Args:
        folder: where they are.
        variant: of the weights.
        written: names of the files that stay.
    """
    mark = re.escape(f".{variant}" if variant else "")
    kept = set(written)
    pattern = re.compile(rf"{WEIGHTS}({mark}(-\d+-of-\d+)?\.safetensors|\.safetensors\.index{mark}\.json)")
    for path in folder.iterdir():
        if pattern.fullmatch(path.name) and path.name not in kept:
            path.unlink()
