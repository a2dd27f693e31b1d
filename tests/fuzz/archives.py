"""Collections of images: `.npz`, parquet, tar and folders, damaged or with other content.

Every image of an accepted collection must be one that was put there; a damaged archive is refused, or gives what a
second reader finds in it.
"""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from PIL import Image

from ddim.evaluation.image_sets import open_files
from fuzz.harness import Fault, attempt, empty, expect
from fuzz.mutations import MUTATIONS, Mutation, make_zip, mutate, zip_bomb

COUNT = 5
KINDS = ("npz", "packed npz", "parquet", "plain parquet", "tar", "folder")
ARRAYS = {
    **{dtype: np.zeros((3, 4, 4), dtype) for dtype in ("u1", "i1", ">u2", "f4", "?", "c8", "U3", "M8[s]", "V8")},
    **{
        str(shape): np.zeros(shape, np.uint8)
        for shape in ((), (4,), (2, 2), (0, 4, 4), (2, 0, 4), (2, 4, 4, 2), (1,) * 5)
    },
    "fortran": np.asfortranarray(np.arange(48, dtype=np.uint8).reshape(3, 4, 4)),
    "objects": np.array([{"x": 1}], object),
    "structured": np.zeros(3, [("x", "u1"), ("y", "u1")]),
}
CONTENTS = (
    *(
        "nothing",
        "one member that is not an array",
        "huge shape",
        "negative shape",
        "long header",
        "zip bomb",
        "encrypted",
    ),
    *(
        "names",
        "duplicates",
        "not images",
        "animation",
        "missing",
        "paths",
        "nulls",
        "texts",
        "no rows",
        "links",
        "device",
    ),
    *("sparse", "hidden", "odd names", "large", "fifo", "empty files", "subfolders", "other sizes", *ARRAYS),
)


class Archive(NamedTuple):
    """A collection of images.

    Attributes:
        kind: one of `KINDS`.
        content: one of `CONTENTS`, or empty for plain images.
        mutations: damage to the bytes.
        count: images to read, `None` for all.
    """

    kind: str
    content: str = ""
    mutations: list[Mutation] = []  # noqa: RUF012 - a default of a named tuple, never changed
    count: int | None = None


KIND = st.sampled_from(KINDS)
EXAMPLES = st.one_of(
    st.builds(lambda kind, mutations: Archive(kind, "", mutations), KIND, MUTATIONS),
    st.builds(lambda kind, mutations: Archive(kind, "", mutations), KIND, MUTATIONS),
    st.builds(Archive, KIND, st.sampled_from(CONTENTS), st.just([]), st.sampled_from([None, 1, 3, 5, 6])),
)


def make_check(folder: Path) -> Callable[[Archive], None]:
    """Return the check of a collection."""
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 6, 6), np.uint8)
    originals = {image.tobytes() for image in pixels}

    def check(example: Archive) -> None:
        target = empty(folder / "archives")
        path = write(target, example, pixels)
        if path is None:
            return
        if example.mutations:
            file = next(iter(sorted(path.iterdir()))) if path.is_dir() else path
            file.write_bytes(mutate(file.read_bytes(), example.mutations))
        images = attempt(open_files, str(path), example.count, naming=(str(target), "count"))
        batches = attempt(lambda: list(images.batches()), naming=(str(target), "image"))
        read = np.concatenate([batch.numpy() for batch in batches])
        expect(
            len(read) == images.count == (images.count if example.count is None else example.count),
            f"{len(read)} images",
        )
        expect(read.shape[1:] == images.shape, f"shape {read.shape} instead of {images.shape}")
        if example.content in ("", "names", "hidden", "odd names", "nulls", "duplicates", "subfolders", "links"):
            known = originals if not example.mutations else originals | plain_images(path)
            expect(all(image.tobytes() in known for image in read), "an image that was not put there")
        if example.content == "" and not example.mutations:
            expect([image.tobytes() for image in read] == [image.tobytes() for image in pixels], "another order")

    return check


def plain_images(path: Path) -> set[bytes]:
    """Return the images that a second reader finds in files without checksums, as bytes of 6x6 pixels."""
    found: set[bytes] = set()
    if path.suffix == ".parquet":
        try:
            rows = pq.read_table(path).column("image").to_pylist()
        except Exception as error:
            raise Fault("difference", f"read, although pyarrow alone does not: {error}") from None
        found |= {decode(row["bytes"]) for row in rows if row}
    elif path.suffix == ".tar":
        with tarfile.open(path, "r:", errorlevel=0) as archive:
            for member in archive:
                if member.isfile() and (stream := archive.extractfile(member)):
                    found.add(decode(stream.read()))
    return found


def decode(data: bytes) -> bytes:
    """Return the gray pixels of an encoded image, empty where PIL alone does not decode it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("L").resize((6, 6)).tobytes() if image.size == (6, 6) else b""
    except Exception:
        return b""


def encode(pixels: np.ndarray) -> bytes:
    """Return an encoded image."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write(folder: Path, example: Archive, pixels: np.ndarray) -> Path | None:
    """Write a collection; `None` where its kind has no such content."""
    encoded = [encode(image) for image in pixels]
    if example.content == "not images":
        encoded = [b"GIF89a nothing"] * COUNT
    if example.content == "animation":
        stream = io.BytesIO()
        frames = [Image.fromarray(image) for image in pixels]
        frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
        encoded = [stream.getvalue()] * COUNT
    if example.content == "empty files":
        encoded = [b""] * COUNT
    if example.content == "large":
        encoded = [encode(np.zeros((9000, 9000), np.uint8))]
    if example.content == "other sizes":
        encoded = [encode(np.zeros((index + 1, 9), np.uint8)) for index in range(COUNT)]
    writer: Callable[[Path, str, list[bytes], np.ndarray], Path | None] = {
        "npz": write_npz,
        "packed npz": write_packed_npz,
        "parquet": write_parquet,
        "plain parquet": write_plain_parquet,
        "tar": write_tar,
        "folder": write_folder,
    }[example.kind]
    return writer(folder, example.content, encoded, pixels)


def write_packed_npz(folder: Path, content: str, encoded: Sequence[bytes], pixels: np.ndarray) -> Path | None:
    """Write a compressed `.npz`."""
    return write_npz(folder, content, encoded, pixels, np.savez_compressed)


def write_npz(
    folder: Path, content: str, encoded: Sequence[bytes], pixels: np.ndarray, save: Callable[..., None] = np.savez
) -> Path | None:
    """Write an `.npz`."""
    path = folder / "x.npz"
    if content in ARRAYS:
        save(path, ARRAYS[content])
        return path
    save(path, pixels)
    if content in ("huge shape", "negative shape", "long header"):
        shape = {"huge shape": "(999999999999, 6, 6)", "negative shape": "(-5, -6, 6)"}.get(
            content, "(5, 6, 6" + " " * 70_000 + ")"
        )
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
        with zipfile.ZipFile(path, "w") as archive:
            version, size = (b"\x01\x00", "<H") if len(header) < 65536 else (b"\x02\x00", "<I")
            member = b"\x93NUMPY" + version + struct.pack(size, len(header)) + header + pixels.tobytes()
            archive.writestr("arr_0.npy", member)
    elif content == "zip bomb":
        header_stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header_stream, {"descr": "|u1", "fortran_order": False, "shape": (3, 1 << 15, 1 << 15)}
        )
        path.write_bytes(make_zip([("arr_0.npy", *zip_bomb(header_stream.getvalue()))]))
    elif content == "encrypted":
        data = bytearray(path.read_bytes())
        data[6] |= 1
        data[data.index(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(data)
    elif content in ("nothing", "one member that is not an array", "names", "duplicates"):
        array = io.BytesIO()
        np.save(array, pixels)
        with zipfile.ZipFile(path, "w") as archive:
            if content == "one member that is not an array":
                archive.writestr("arr_0.npy", b"hello")
                archive.writestr("x.txt", b"hello")
            elif content == "names":
                archive.writestr("../../x.npy", array.getvalue())
            elif content == "duplicates":
                archive.writestr("arr_0.npy", array.getvalue())
                archive.writestr("arr_0.npy", array.getvalue())
    elif content:
        return None
    return path


def write_parquet(folder: Path, content: str, encoded: Sequence[bytes], pixels: np.ndarray) -> Path | None:
    """Write a parquet file as `datasets` does, with its features in the metadata."""
    features = b'{"info": {"features": {"image": {"_type": "Image"}}}}'
    return write_plain_parquet(folder, content, encoded, pixels, {b"huggingface": features})


def write_plain_parquet(
    folder: Path,
    content: str,
    encoded: Sequence[bytes],
    pixels: np.ndarray,
    metadata: dict[bytes, bytes] | None = None,
) -> Path | None:
    """Write a parquet file of structures with bytes and a path."""
    path = folder / "x.parquet"
    rows: list[Any] = [{"bytes": data, "path": None} for data in encoded]
    kind: pa.DataType = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    if content in ("nothing", "no rows"):
        rows = []
    elif content in ("missing", "paths", "nulls"):
        rows[2] = {"missing": {"bytes": None, "path": "x.png"}, "paths": {"bytes": None, "path": "/etc/passwd"}}.get(
            content
        )
    elif content == "texts":
        rows, kind = ["a", "b"], pa.string()
    elif content == "zip bomb":
        rows, kind = [bytes(1 << 22)] * 64, pa.binary()
    elif content not in ("", "not images", "animation", "large", "empty files", "other sizes"):
        return None
    table = pa.table({"image": pa.array(rows, kind), "label": pa.array(list(range(len(rows))))})
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=2, compression="zstd")
    return path


def write_tar(folder: Path, content: str, encoded: Sequence[bytes], pixels: np.ndarray) -> Path | None:
    """Write a tar file."""
    path = folder / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(data), kind, link
            archive.addfile(member, io.BytesIO(data))

        for index, data in enumerate(encoded if content != "nothing" else ()):
            names = {
                "names": f"../../{index}.png",
                "odd names": f"{index}\udcff\n.png",
                "subfolders": f"a/b/{index}.png",
            }
            add(names.get(content, f"{index}.png"), data)
        if content == "hidden":
            add("._0.png", b"\0\5\x16\7")
        elif content == "links":
            add("9.png", kind=tarfile.SYMTYPE, link="/etc/passwd")
            add("8.png", kind=tarfile.LNKTYPE, link="0.png")
        elif content == "device":
            add("9.png", kind=tarfile.CHRTYPE)
        elif content == "duplicates":
            add("0.png", encoded[0])
        elif content == "sparse":
            add("9.png", kind=tarfile.GNUTYPE_SPARSE)
        elif content in ("missing", "paths", "nulls", "no rows", "texts", "fifo") or content in ARRAYS:
            return None
    if content in ("huge shape", "negative shape"):
        # The second member's.
        start = 512 + len(encoded[0]) + -len(encoded[0]) % 512
        data = bytearray(path.read_bytes())
        size = (2**60).to_bytes(11, "big") if content == "huge shape" else (-512).to_bytes(11, "big", signed=True)
        data[start + 124 : start + 136] = (b"\x80" if content == "huge shape" else b"\xff") + size
        checksum = sum(data[start : start + 148]) + sum(data[start + 156 : start + 512]) + 8 * ord(" ")
        data[start + 148 : start + 156] = f"{checksum:06o}\0 ".encode()
        path.write_bytes(data)
    return path


def write_folder(folder: Path, content: str, encoded: Sequence[bytes], pixels: np.ndarray) -> Path | None:
    """Write a folder of images."""
    path = folder / "images"
    path.mkdir()
    for index, data in enumerate(encoded if content not in ("nothing", "no rows") else ()):
        (path / f"{index}.png").write_bytes(data)
    if content == "hidden":
        (path / "._0.png").write_bytes(b"\0\5\x16\7")
    elif content == "odd names":
        (path / "\udcff\n9.png").write_bytes(encoded[0])
    elif content == "links":
        (path / "9.png").symlink_to("9.png")
        (path / "8").symlink_to(".")
    elif content == "fifo":
        os.mkfifo(path / "9.png")
    elif content == "subfolders":
        (path / "a.png").mkdir()
        (path / "a.png" / "b.png").write_bytes(encoded[0])
    return path
