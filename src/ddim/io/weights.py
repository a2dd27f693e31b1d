"""Weight files: which one to read, its tensors, and whether they fit a model. Nothing that is read can run code.

    diffusion_pytorch_model.safetensors                    the format written, with a SHA-256 of the tensors in it
    diffusion_pytorch_model.fp16.safetensors               a variant
    diffusion_pytorch_model-00001-of-00002.safetensors     shards, with an index (.safetensors.index.json)
    diffusion_pytorch_model.bin                            a pickle, read without running code

The first models on the hub call their attention weights query, key, value and proj_attn; they are renamed
when read.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import pickle
import re
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddim.io.json_files import read_json, to_json
from ddim.io.reading import reader_reason

WEIGHTS = "diffusion_pytorch_model"
MAX_SHARD_SIZE = "10GB"
"""Weights larger than this are split into shards."""
ALIGNMENT = 64
"""Bytes to which PyTorch aligns tensors in memory, and this module those in the files it writes."""
MADV_PAGEOUT = 21
"""Linux's advice to reclaim pages now."""
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
"""PyTorch's dtypes under the names of the safetensors format."""
MAX_SHARED = 4
"""Bytes of tensors per byte of a pickle, at most: weights that share a storage are stored once."""
ZIP_MAGIC = b"PK\x03\x04"
"""The first bytes of a file of `torch.save`, which is an archive."""
COPY_CHUNK_BYTES = 16 << 20
"""Bytes of a mapped file that are copied before it is opened anew, which bounds the memory beside the copies."""

OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def choose_weights(
    names: Iterable[str],
    variant: str | None = None,
    source: str = "the folder",
    use_safetensors: bool | None = None,
) -> str:
    """Choose the weights file of a folder: safetensors before pickles, a single file before shards.

    Args:
        names: names of the files in the folder.
        variant: part of the file's name, such as `fp16` for `diffusion_pytorch_model.fp16.safetensors`.
        source: the folder's name in messages.
        use_safetensors: `True` to consider safetensors only, `False` for pickles only, `None` for both.

    Returns:
        The name of the file, or of the index of its shards.

    Raises:
        FileNotFoundError: if there is none; it lists the names looked for and the weights present.

    Example:
        >>> choose_weights(["config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
        'diffusion_pytorch_model.safetensors'
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
    """Read all tensors of the weights in a folder.

    Aligned tensors of a safetensors file share memory with the mapped file where the system allows it: the file may be
    replaced afterwards, but must not be written to in place.

    Args:
        folder: holds the weights, under a name that `choose_weights` looks for.
        variant: part of the file's name, such as `fp16`.
        use_safetensors: `True` to read safetensors only, `False` for pickles only, `None` for either.

    Returns:
        Tensors on the CPU by their names in `UNet2DModel`.

    Raises:
        FileNotFoundError: if the weights do not exist, or a shard is missing.
        ValueError: if a file is truncated, holds anything but tensors, or does not match the SHA-256 in its metadata.

    Example:
        >>> from ddim.io.hub import builtin_models
        >>> weights = read_weights(builtin_models()["mnist"] / "unet")
        >>> weights["conv_in.weight"].shape
        torch.Size([32, 1, 3, 3])
    """
    chosen = choose_weights((path.name for path in folder.iterdir()), variant, str(folder), use_safetensors)
    if ".index." in chosen:
        tensors = {}
        for name in _shards(folder / chosen):
            tensors.update(read_tensors(folder / name))
    else:
        tensors = read_tensors(folder / chosen)
    return {_modern_name(name): tensor for name, tensor in tensors.items()}


def _shards(index: Path) -> list[str]:
    """Return the files that an index names; plain names only, so that an index cannot reach outside its folder."""
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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of one file.

    Args:
        path: a `.safetensors` file, or a pickle.

    Returns:
        Tensors on the CPU by name; those of a safetensors file may share memory with the mapped file.

    Raises:
        ValueError: if it is not a regular file, is truncated, holds anything but tensors, or does not match the SHA-256
            in its metadata.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_safetensors({"bias": torch.zeros(2)}, Path(folder, "x.safetensors"))
        ...     read_tensors(Path(folder, "x.safetensors"))
        {'bias': tensor([0., 0.])}
    """
    if not path.is_file():
        # Opening a pipe would wait for a writer.
        raise ValueError(f"{path} is not a regular file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        tensors: dict[str, Tensor] = {}
        names: list[str] | None = None
        try:
            # The file is reopened after every chunk, because the mapped pages of copied tensors stay resident until
            # it is closed.
            while names is None or names:
                with safe_open(path, framework="pt") as file:
                    names = list(file.keys()) if names is None else names
                    expected, size = (file.metadata() or {}).get("sha256"), 0
                    while names and size < COPY_CHUNK_BYTES:
                        name = names.pop()
                        mapped = file.get_tensor(name)
                        # Matrix kernels round differently by alignment, so that tensors that are not aligned as in
                        # memory are copied.
                        in_place = sys.platform == "linux" and mapped.data_ptr() % ALIGNMENT == 0
                        tensors[name] = mapped if in_place else mapped.clone()
                        size += 0 if in_place else mapped.nbytes
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is truncated or damaged: {reader_reason(error)}") from None
        if expected is not None and expected != digest(tensors):
            raise ValueError(f"{path} is damaged: its tensors are not those it was written with (SHA-256 differs)")
        for tensor in tensors.values():
            drop_pages(tensor)
        return tensors
    content = read_pickle(path)
    if not is_state_dict(content):
        raise ValueError(f"{path} does not hold a dictionary of tensors, all of them dense and named")
    # A tensor may repeat the values of a small storage: copied, it would take memory that the file does not justify.
    claimed, size = sum(tensor.nbytes for tensor in content.values()), path.stat().st_size
    if claimed > MAX_SHARED * size:
        raise ValueError(f"{path} is damaged: its tensors take {claimed} bytes, the file {size}")
    return {name: tensor.clone() for name, tensor in content.items()}


def read_pickle(path: Path) -> Any:
    """Read a file of `torch.save` onto the CPU, without running code.

    Args:
        path: the file.

    Returns:
        Its content: tensors and plain containers.

    Raises:
        ValueError: if it is damaged, or holds anything whose loading could run code.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     torch.save({"bias": torch.zeros(2)}, Path(folder) / "weights.bin")
        ...     read_pickle(Path(folder) / "weights.bin")
        {'bias': tensor([0., 0.])}
    """
    _verify_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is refused: it is damaged or holds more than tensors, and loading it could run code"
        ) from None
    except MemoryError:
        raise
    except Exception:  # damaged files raise errors of many kinds, whose texts are about the reader
        raise ValueError(f"{path} is truncated or damaged, or not a file of torch.save") from None


def is_state_dict(content: Any) -> bool:
    """Return whether an object is a dictionary of dense tensors by name.

    Args:
        content: what a pickle held.

    Example:
        >>> is_state_dict({"bias": torch.zeros(2)}), is_state_dict({0: torch.zeros(2)})
        (True, False)
    """
    return isinstance(content, dict) and all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and tensor.device.type == "cpu"
        for name, tensor in content.items()
    )


def _verify_archive(path: Path) -> None:
    """Verify the checksums of a file of `torch.save`, which `torch.load` does not; files of before 1.6 have none."""
    try:
        with path.open("rb") as file:
            if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
                return
            with zipfile.ZipFile(file) as archive:
                claimed, size = sum(member.file_size for member in archive.infolist()), path.stat().st_size
                # Members are stored, not compressed.
                for member in archive.infolist() if claimed <= size else ():
                    with archive.open(member) as stream:
                        while stream.read(COPY_CHUNK_BYTES):
                            pass
    except Exception:  # a damaged archive raises errors of many types
        raise ValueError(f"{path} is truncated or damaged: it does not match the checksums in it") from None
    if claimed > size:
        raise ValueError(f"{path} is truncated or damaged: its members take {claimed} bytes, the file {size}")


def _modern_name(name: str) -> str:
    """Return today's name of a tensor: `attentions.0.query.weight` becomes `attentions.0.to_q.weight`."""
    match = re.fullmatch(r"(.*attentions\.\d+\.)(query|key|value|proj_attn)(\.\w+)", name)
    return f"{match[1]}{OLD_ATTENTION_NAMES[match[2]]}{match[3]}" if match else name


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of the names, dtypes, shapes and bytes of tensors.

    Args:
        tensors: tensors on the CPU by name, in any order.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> digest({"bias": torch.zeros(2)})[:8]
        '52eda023'
    """
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        sha256.update(_bytes(tensor))
    return sha256.hexdigest()


def fill_model(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    dtype: torch.dtype,
    ignore_mismatched_sizes: bool = False,
) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Assign tensors to the parameters and buffers of a model whose parameters may be on the meta device.

    Args:
        model: the model; its parameters' names and shapes must be those of the tensors.
        tensors: tensors by name, as `read_weights` returns them; assigned without a copy where the dtype fits.
        source: the tensors' origin, for messages.
        dtype: floating dtype that parameters and buffers get; buffers of integers keep theirs.
        ignore_mismatched_sizes: leave parameters as they are, on a model built with initial weights, whose tensor has
            another shape.

    Returns:
        The parameters left as they are: name, shape of the tensor, shape of the parameter.

    Raises:
        ValueError: if tensors are missing, unexpected, complex or of another shape; it names three. If a value is NaN
            or infinite.

    Example:
        >>> with torch.device("meta"):
        ...     layer = nn.Linear(2, 1, bias=False)
        >>> fill_model(layer, {"weight": torch.ones(1, 2)}, "a test", torch.float32)
        []
        >>> layer.weight.tolist()
        [[1.0, 1.0]]
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    mismatched = [
        (name, tuple(tensors[name].shape), shape)
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    problems = [f"{name} is missing" for name in shapes if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in shapes]
    problems += [f"{name} must be real, got {tensor.dtype}" for name, tensor in tensors.items() if tensor.is_complex()]
    if not ignore_mismatched_sizes:
        problems += [f"{name}: expected shape {shape}, got {actual}" for name, actual, shape in mismatched]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"the weights in {source} do not fit its configuration: {'; '.join(problems[:3])}{more}")
    kept = {name for name, *_ in mismatched}
    initial = model.state_dict() if kept else {}
    weights = {name: (initial if name in kept else tensors)[name] for name in shapes}
    parameters = dict(model.named_parameters()).keys()
    weights = {
        name: tensor.to(dtype) if name in parameters or tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }
    for name, tensor in weights.items():
        # A sum is not finite where a value is not; the sum of finite values may overflow.
        if tensor.device.type != "meta" and not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise ValueError(f"the weights in {source} are damaged: {name} has values that are NaN or infinite")
    model.load_state_dict(weights, assign=True)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))
    return mismatched


def write_weights(
    tensors: Mapping[str, Tensor],
    folder: Path,
    variant: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    safe_serialization: bool = True,
) -> None:
    """Write tensors as safetensors, or as pickles: one file, or shards with an index.

    Args:
        tensors: tensors by name, on any device.
        folder: an existing folder.
        variant: part of the files' names, such as `fp16`.
        max_shard_size: the size above which weights are split, in bytes or as `"500MB"`.
        safe_serialization: `False` writes `.bin` files with `torch.save`, for programs that read nothing else.

    Raises:
        OSError: if a file cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_weights({"bias": torch.zeros(2)}, Path(folder))
        ...     list(read_weights(Path(folder)))
        ['bias']
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    infix, suffix = f".{variant}" if variant else "", "safetensors" if safe_serialization else "bin"
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern=f"{WEIGHTS}{infix}{{suffix}}.{suffix}", max_shard_size=max_shard_size
    )
    for name, keys in plan.filename_to_tensors.items():
        shard = {key: tensors[key] for key in keys}
        if safe_serialization:
            write_safetensors(shard, folder / name)
        else:
            torch.save(shard, folder / name)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{WEIGHTS}.{suffix}.index{infix}.json").write_text(to_json(index), encoding="utf-8")


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, with a SHA-256 of its tensors, that can be used where they lie in the mapped file.

    The header is padded with spaces, and tensors whose sizes are multiples of `ALIGNMENT` come first, so that they are
    aligned. The safetensors library itself aligns to 8 bytes.

    Args:
        tensors: contiguous tensors on the CPU by name.
        path: the file to write, in place.

    Raises:
        OSError: if it cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_safetensors({"bias": torch.zeros(2)}, Path(folder, "x.safetensors"))
        ...     [path.name for path in Path(folder).iterdir()]
        ['x.safetensors']
    """
    names = sorted(tensors, key=lambda name: (tensors[name].nbytes % ALIGNMENT != 0, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "sha256": digest(tensors)}}
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
    """Return a contiguous tensor's bytes as a NumPy array."""
    return tensor.flatten().view(torch.uint8).numpy()


def drop_pages(tensor: Tensor) -> None:
    """Release the resident pages of a tensor in a mapped file; the next access reads them from the file again.

    The tensor's values do not change. Tensors elsewhere are left alone, as is every tensor on systems other than Linux.

    Args:
        tensor: any tensor.

    Example:
        >>> weight = torch.ones(3)
        >>> drop_pages(weight)
        >>> weight.tolist()
        [1.0, 1.0, 1.0]
    """
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), MADV_PAGEOUT)


def remove_stale_weights(folder: Path, variant: str | None, written: Iterable[str]) -> None:
    """Delete the weights that an earlier save left in a folder, which a loader might prefer to the new ones.

    Args:
        folder: holds the weights.
        variant: the variant whose files are deleted; those of other variants stay.
        written: names of the files of the latest save, which stay; pickles, which are read last, stay as well.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("config.json", f"{WEIGHTS}.safetensors", f"{WEIGHTS}-00001-of-00001.safetensors"):
        ...         (Path(folder) / name).touch()
        ...     remove_stale_weights(Path(folder), None, [f"{WEIGHTS}.safetensors"])
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['config.json', 'diffusion_pytorch_model.safetensors']
    """
    infix = re.escape(f".{variant}" if variant else "")
    current = set(written)
    pattern = re.compile(rf"{WEIGHTS}({infix}(-\d+-of-\d+)?\.safetensors|\.safetensors\.index{infix}\.json)")
    for path in folder.iterdir():
        if pattern.fullmatch(path.name) and path.name not in current:
            path.unlink()
