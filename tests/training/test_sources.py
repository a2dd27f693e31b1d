"""Sources of images: what was written is what is read, whatever holds it (folders, parquet, arrays, the hub), and
everything that is no image, or not there, is told in one sentence. Nothing that is read is run or followed.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ddim.data.sources import Source, open_source
from digits import digits
from hub_client import load_images
from hub_server import Hub

Client = Callable[..., Any]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf/datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf/hub"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    return path


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def read_all(source: Source) -> list[np.ndarray]:
    return [np.asarray(read()) for read in source.fetch(range(source.count))]


def write_table(path: Path, **columns: pa.Array) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


def write_hugging_face(path: Path, pixels: np.ndarray, column: str = "image") -> str:
    """A parquet file as `datasets` writes it, with a column of labels first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"label": datasets.Value("int64"), column: datasets.Image()})
    columns = {"label": list(range(len(pixels))), column: [Image.fromarray(one) for one in pixels]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return str(path)


def assert_digits(source: Source, expected: np.ndarray) -> None:
    assert source.count == len(expected)
    assert np.array_equal(np.stack(read_all(source)), expected)


# --- digits


def test_the_digits_of_scikit_learn() -> None:
    source = open_source("digits")
    assert source.count == 1797
    assert_digits(source, digits())
    assert source.identity == open_source("digits").identity


# --- folders


def test_a_nested_folder_of_all_sorts(folder: Path) -> None:
    random = np.random.default_rng(0)
    colour = random.integers(0, 256, (5, 7, 3), np.uint8)
    # In the order of their paths.
    expected = {
        "a/1.png": Image.fromarray(colour),
        "a/b/2.BMP": Image.fromarray(colour[:, ::-1].copy()),
        "a/b/c/3.gif": Image.fromarray(digits(1)[0]),
        "a/b/c/4.png": Image.fromarray(random.integers(0, 2**16, (4, 4), np.uint16)),
        "d e/5.png": Image.fromarray(random.integers(0, 256, (30, 8, 4), np.uint8)),
        "d e/ü.tiff": Image.new("CMYK", (16, 16), (0, 255, 0, 0)),
        "w.webp": Image.new("RGB", (9, 9), (1, 2, 3)),
        "x.png": Image.fromarray(digits(1)[0]).convert("P"),
        "y.png": Image.new("1", (3, 5), 1),
        "z.pgm": Image.fromarray(digits(2)[1]),
    }
    for name, image in expected.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name, **({"lossless": True} if name.endswith("webp") else {}))
    (folder / "notes.txt").write_text("no picture")
    (folder / "folder.png").mkdir()
    source = open_source(str(folder))
    assert source.count == len(expected)
    for read, (name, image) in zip(source.fetch(range(source.count)), expected.items(), strict=True):
        found = read()
        assert found.size == image.size, name
        assert np.array_equal(np.asarray(found.convert("RGBA")), np.asarray(image.convert("RGBA"))), name
    # What the conversions above would not tell: 16 bits stay.
    (deep,) = source.fetch([3])
    assert np.array_equal(np.asarray(deep()), np.asarray(expected["a/b/c/4.png"]))


def test_images_are_fetched_in_any_order(pictures: Path) -> None:
    wanted = [7, 3, 3, 39, 0]
    fetched = [np.asarray(read()) for read in open_source(str(pictures)).fetch(wanted)]
    assert np.array_equal(np.stack(fetched), digits(40)[wanted])


def test_the_identity_of_a_folder_changes_with_its_files(folder: Path) -> None:
    for name, one in zip("ab", digits(2), strict=True):
        (folder / f"{name}.png").write_bytes(encode(one))
    before = open_source(str(folder)).identity
    assert open_source(str(folder)).identity == before
    assert open_source(os.path.relpath(folder)).identity == before
    seen = [before]

    (folder / "a.png").write_bytes(encode(digits(3)[2]))
    seen.append(open_source(str(folder)).identity)
    (folder / "b.png").rename(folder / "c.png")
    seen.append(open_source(str(folder)).identity)
    status = (folder / "c.png").stat()
    os.utime(folder / "c.png", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    seen.append(open_source(str(folder)).identity)
    (folder / "d.png").write_bytes(encode(digits(1)[0]))
    seen.append(open_source(str(folder)).identity)
    assert len(set(seen)) == 5
    (folder / "d.png").unlink()
    assert open_source(str(folder)).identity == seen[-2]


def test_missing_and_empty(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for name in ("missing", "missing.npz", "missing.parquet", "sub/missing.npz", "sub/missing.parquet", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=rf"^there is no {name}; give a folder .*, or digits$") as caught:
            open_source(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"^there is no image in .*; looked for \.bmp, "):
        open_source(str(folder))
    (folder / "words.txt").write_text("words")
    with pytest.raises(FileNotFoundError, match=r"^there is no image in "):
        open_source(str(folder))
    with pytest.raises(ValueError, match=r"words\.txt is neither a folder of images nor a \.parquet or \.npz file$"):
        open_source(str(folder / "words.txt"))


def reason(source: Source, index: int = 0) -> str:
    """What is said when an image is decoded that cannot be."""
    (read,) = source.fetch([index])
    with pytest.raises(ValueError, match="cannot be read") as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_images_are_named(folder: Path, kind: str) -> None:
    content = encode(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8), kind)
    for length in (0, 1, 10, 20, 30, 60, len(content) // 2):
        (folder / "half.png").write_bytes(content[:length])
        assert str(folder / "half.png") in reason(open_source(str(folder)))


def test_what_is_no_image_is_named(folder: Path) -> None:
    (folder / "a.png").write_text("words")
    header = struct.pack("<2sIHHI", b"BM", 58, 0, 0, 54)
    header += struct.pack("<IiiHHIIiiII", 40, 10**5, 10**5, 1, 24, *[0] * 6)
    (folder / "b.bmp").write_bytes(header + b"\0" * 4)
    frames = [Image.fromarray(one) for one in digits(2)]
    frames[0].save(folder / "c.gif", save_all=True, append_images=frames[1:])
    source = open_source(str(folder))
    assert reason(source, 0) == f"{folder / 'a.png'} cannot be read: not an image of a known format"
    assert "exceeds limit" in reason(source, 1)
    with pytest.raises(ValueError, match=r"c\.gif must be a still image, got an animation of 2 frames"):
        source.fetch([2])[0]()


# --- parquet


def test_parquet_of_the_hugging_face_layout(folder: Path) -> None:
    source = open_source(write_hugging_face(folder / "train.parquet", digits(40)))
    assert_digits(source, digits(40))
    wanted = [7, 3, 3, 39, 0]
    assert np.array_equal(np.stack([np.asarray(read()) for read in source.fetch(wanted)]), digits(40)[wanted])


def test_a_folder_of_parquet_files(folder: Path) -> None:
    write_hugging_face(folder / "data/train-00000-of-00002.parquet", digits(40)[:25])
    write_hugging_face(folder / "data/train-00001-of-00002.parquet", digits(40)[25:])
    (folder / "README.md").write_text("words")
    source = open_source(str(folder))
    assert_digits(source, digits(40))
    assert open_source(str(folder)).identity == source.identity
    write_hugging_face(folder / "data/train-00002-of-00002.parquet", digits(3))
    assert open_source(str(folder)).count == 43
    assert open_source(str(folder)).identity != source.identity


def test_images_beside_parquet_files_come_first(folder: Path) -> None:
    write_hugging_face(folder / "train.parquet", digits(5))
    (folder / "a.png").write_bytes(encode(digits(1)[0]))
    assert open_source(str(folder)).count == 1


@pytest.mark.parametrize("layout", ["struct", "bytes"])
def test_parquet_written_by_others(folder: Path, layout: str) -> None:
    encoded = [encode(pixels) for pixels in digits(40)]
    if layout == "struct":
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        column = pa.array([{"bytes": content, "path": None} for content in encoded], kind)
    else:
        column = pa.array(encoded)
    assert_digits(open_source(write_table(folder / "train.parquet", image=column)), digits(40))


def test_the_column_of_images_is_found_or_given(folder: Path) -> None:
    found = open_source(write_hugging_face(folder / "found.parquet", digits(3), column="img"))
    assert_digits(found, digits(3))
    image, picture = (pa.array([encode(one) for one in part]) for part in (digits(3), digits(6)[3:]))
    path = write_table(folder / "given.parquet", label=pa.array([0, 1, 2]), picture=picture, image=image)
    assert_digits(open_source(path), digits(3))
    assert_digits(open_source(path, column="image"), digits(3))
    assert_digits(open_source(path, column="picture"), digits(6)[3:])
    assert open_source(path, column="picture").identity != open_source(path).identity
    with pytest.raises(ValueError, match=r"given\.parquet has no column img; its columns are label, picture, image$"):
        open_source(path, column="img")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": pa.array([1, 2])}, r"train\.parquet has no column of images; its columns are label$"),
        ({"picture": pa.array([encode(digits(1)[0])])}, "has no column of images; its columns are picture$"),
        ({"image": pa.array([1, 2])}, r"^the column image of .*train\.parquet holds no images: "),
        ({"image": pa.array([], pa.binary())}, "cannot be read as parquet: |has no rows"),
    ],
)
def test_parquet_without_images(folder: Path, columns: dict[str, pa.Array], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        open_source(write_table(folder / "train.parquet", **columns))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array([b"words"]), "not an image of a known format"),
        (pa.array([None], pa.binary()), "it is missing"),
        (pa.array([{"bytes": None, "path": None}]), "it is missing"),
        (pa.array([{"bytes": b"", "path": ""}]), "it is missing"),
        (pa.array([{"bytes": b"words", "path": "x.png"}]), "not an image of a known format"),
    ],
)
def test_rows_that_are_no_images_are_named(folder: Path, values: pa.Array, message: str) -> None:
    path = write_table(folder / "train.parquet", image=values)
    assert reason(open_source(path)) == f"image 0 of {path} cannot be read: {message}"


def test_a_path_in_a_table_is_not_followed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = folder / "secret.png"
    secret.write_bytes(encode(digits(1)[0]))
    (tmp_path / "hf/hub").mkdir(parents=True)
    (tmp_path / "hf/hub-other").mkdir()
    (tmp_path / "hf/hub-other/secret.png").write_bytes(secret.read_bytes())
    monkeypatch.chdir(folder)
    paths = [
        str(secret),
        "secret.png",
        f"file://{secret}",
        f"{tmp_path}/hf/hub/../../data/secret.png",
        f"{tmp_path}/hf/hub-other/secret.png",
        "http://127.0.0.1:9/secret.png",
    ]
    for values in (pa.array(paths), pa.array([{"bytes": None, "path": path} for path in paths])):
        path = write_table(tmp_path / "train.parquet", image=values)
        source = open_source(path)
        for index in range(len(paths)):
            assert reason(source, index) == f"image {index} of {path} cannot be read: it is missing"


@pytest.mark.parametrize("cache", ["hf/hub", "hf/datasets"])
def test_a_path_into_the_cache_of_downloads_is_followed(folder: Path, tmp_path: Path, cache: str) -> None:
    stored = tmp_path / cache / "datasets--owner--name/blobs/0123"
    stored.parent.mkdir(parents=True)
    stored.write_bytes(encode(digits(1)[0]))
    # The hub's cache links from readable names to content.
    readable = tmp_path / cache / "datasets--owner--name/snapshots/main/a.png"
    readable.parent.mkdir(parents=True)
    readable.symlink_to(stored)
    path = write_table(folder / "train.parquet", image=pa.array([{"bytes": None, "path": str(readable)}]))
    assert_digits(open_source(path), digits(1))
    stored.unlink()
    assert f"image 0 of {path} cannot be read: " in reason(open_source(path))


@pytest.mark.parametrize("content", [b"", b"words", b"PAR1 and more PAR1"])
def test_a_file_that_is_no_parquet(folder: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "train.parquet").write_bytes(content)
    for source in (folder / "train.parquet", folder):
        with pytest.raises(ValueError, match=rf"^{source} cannot be read as parquet: ") as caught:
            open_source(str(source))
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


# --- arrays


def write_npz(path: Path, *arrays: np.ndarray, **named: np.ndarray) -> str:
    np.savez(path, *arrays, **named)
    return str(path)


def test_arrays_of_pixels(folder: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (6, 5, 7, 3), np.uint8)
    assert np.array_equal(np.stack(read_all(open_source(write_npz(folder / "colour.npz", colour)))), colour)
    assert_digits(open_source(write_npz(folder / "grey.npz", digits(40))), digits(40))
    grey = open_source(write_npz(folder / "one-channel.npz", digits(40)[..., None]))
    assert_digits(grey, digits(40))
    assert {read().mode for read in grey.fetch([0, 5])} == {"L"}
    np.savez_compressed(folder / "compressed.npz", labels=np.arange(40), images=digits(40))
    compressed = open_source(str(folder / "compressed.npz"))
    assert_digits(compressed, digits(40))
    assert compressed.identity == open_source(str(folder / "grey.npz")).identity
    assert open_source(write_npz(folder / "other.npz", digits(41)[1:])).identity != compressed.identity


@pytest.mark.parametrize(
    ("array", "held"),
    [
        (np.zeros((4, 8, 8, 3), np.float32), r"arr_0: float32 \(4, 8, 8, 3\)"),
        (np.zeros((4, 8, 8), np.int64), r"arr_0: int64 \(4, 8, 8\)"),
        (np.zeros((4, 3, 8, 8), np.uint8), r"arr_0: uint8 \(4, 3, 8, 8\)"),
        (np.zeros((4, 8, 8, 4), np.uint8), r"arr_0: uint8 \(4, 8, 8, 4\)"),
        (np.zeros((8, 8), np.uint8), r"arr_0: uint8 \(8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"arr_0: uint8 \(0, 8, 8, 3\)"),
        (None, "nothing"),
    ],
)
def test_other_arrays_are_refused(folder: Path, array: np.ndarray | None, held: str) -> None:
    path = write_npz(folder / "images.npz", *([] if array is None else [array]))
    said = rf"^{path} has no array of images, uint8 \(N, H, W, C\) with C 1 or 3; it holds {held}$"
    with pytest.raises(ValueError, match=said):
        open_source(path)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_not_run(folder: Path) -> None:
    sprung = folder / "sprung"
    trap = np.empty(1, object)
    trap[0] = Trap(sprung)
    np.savez(folder / "objects.npz", trap)
    np.savez(folder / "beside.npz", images=digits(4), extra=trap)
    (folder / "pickle.npz").write_bytes(pickle.dumps(Trap(sprung)))
    for name in ("objects.npz", "beside.npz", "pickle.npz"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read as \.npz: ") as caught:
            open_source(str(folder / name))
        assert "\n" not in str(caught.value)
        assert not sprung.exists()
    # It would have worked.
    pickle.loads((folder / "pickle.npz").read_bytes())
    assert sprung.exists()


def test_damaged_arrays_are_refused(folder: Path) -> None:
    np.savez(folder / "whole.npz", digits(40))
    np.save(folder / "single.npy", digits(40))
    whole = (folder / "whole.npz").read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    for content in (b"", b"words", whole[: len(whole) // 2], bytes(damaged), (folder / "single.npy").read_bytes()):
        (folder / "images.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"images\.npz cannot be read as \.npz: ") as caught:
            open_source(str(folder / "images.npz"))
        assert "\n" not in str(caught.value)


# --- the hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with data sets: of parquet files, of image files, of words, and a model."""
    folder = tmp_path_factory.mktemp("tables")
    tables = {}
    for split, part in (("train", digits(40)), ("test", digits(50)[40:])):
        path = write_hugging_face(folder / f"{split}.parquet", part, column="img")
        tables[f"data/{split}-00000-of-00001.parquet"] = Path(path).read_bytes()
    with Hub() as hub:
        hub.add("datasets/owner/digits", tables | {"README.md": b"# Digits\n"})
        hub.add("datasets/owner/files", {f"train/{index}.png": encode(one) for index, one in enumerate(digits(5))})
        hub.add("datasets/owner/words", {"README.md": b"# Words\n"})
        hub.add("datasets/owner/private", tables, private=True)
        hub.add("owner/model", {"config.json": b"{}"})
        yield hub


def test_a_data_set_on_the_hub(hub: Hub, client: Client) -> None:
    name, identity, images = client(load_images, "owner/digits")
    assert name == "owner/digits (train)"
    assert np.array_equal(np.stack(images), digits(40))
    sent = hub.downloaded("datasets/owner/digits")
    assert "data/train-00000-of-00001.parquet" in sent

    again = client(load_images, "owner/digits")
    assert again[1] == identity
    assert np.array_equal(np.stack(again[2]), digits(40))
    tables = [path for path in hub.downloaded("datasets/owner/digits") if path.endswith(".parquet")]
    assert tables == [path for path in sent if path.endswith(".parquet")]


def test_splits_and_columns_of_a_data_set(client: Client) -> None:
    name, identity, images = client(load_images, "owner/digits", split="test", column="img")
    assert name == "owner/digits (test)"
    assert np.array_equal(np.stack(images), digits(50)[40:])
    assert identity != client(load_images, "owner/digits")[1]
    with pytest.raises(ValueError, match=r"the data set owner/digits cannot be used: .*nothing") as caught:
        client(load_images, "owner/digits", split="nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^owner/digits \(train\) has no column image; its columns are label, img$"):
        client(load_images, "owner/digits", column="image")


def test_a_data_set_of_image_files(client: Client) -> None:
    _, _, images = client(load_images, "owner/files")
    assert np.array_equal(np.stack(images), digits(5))


@pytest.mark.parametrize("name", ["owner/nothing", "owner/private", "owner/words", "owner/model"])
def test_a_data_set_that_is_not_there(client: Client, name: str) -> None:
    said = f"^there is no file {name} here and no such data set on the hub: "
    with pytest.raises(FileNotFoundError, match=said) as caught:
        client(load_images, name)
    assert "\n" not in str(caught.value)


def test_a_script_is_not_run(hub: Hub, client: Client, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    hub.add("datasets/owner/script", {"script.py": f"open({str(sprung)!r}, 'w').close()\n".encode()})
    with pytest.raises(RuntimeError, match=r"^the data set owner/script cannot be loaded: .*scripts are no longer"):
        client(load_images, "owner/script")
    assert not sprung.exists()


def test_without_the_hub(client: Client, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, identity, _ = client(load_images, "owner/digits")
    for constants in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"^the data set owner/far cannot be loaded: ") as caught:
        open_source("owner/far")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    cached = open_source("owner/digits")
    assert_digits(cached, digits(40))
    assert cached.identity == identity
