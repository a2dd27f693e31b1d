"""Sources that are tables, in parquet files and on the hub: what was written is read, and paths are not followed."""

from __future__ import annotations

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

from ddim.data.sources import open_source
from digits import digits
from hub_client import load_images
from hub_server import Hub
from image_data import assert_images, decode_error, encode, write_hugging_face, write_table

Client = Callable[..., Any]


# --- files


def test_parquet_in_hugging_face_layout(folder: Path) -> None:
    source = open_source(write_hugging_face(folder / "train.parquet", digits(40)))
    assert_images(source, digits(40))
    indices = [7, 3, 3, 39, 0]
    images = [np.asarray(decode()) for decode in source.fetch(indices)]
    assert np.array_equal(np.stack(images), digits(40)[indices])


def test_other_columns_are_read_as_text(folder: Path) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
            "beard": datasets.Value("string"),
        }
    )
    images = [Image.fromarray(pixels) for pixels in digits(3)]
    columns = {"image": images, "kind": [1, 0, None], "beard": ["full", "", None]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(folder / "a.parquet"))
    source = open_source(str(folder / "a.parquet"))
    assert source.read_column("kind") == ["dog", "cat", "none"]
    assert source.read_column("beard") == ["full", "none", "none"]
    assert source.read_column("label") is None
    assert open_source(write_hugging_face(folder / "b.parquet", digits(3))).read_column("label") == ["0", "1", "2"]


def test_folder_of_parquet_files(folder: Path) -> None:
    write_hugging_face(folder / "data/train-00000-of-00002.parquet", digits(40)[:25])
    write_hugging_face(folder / "data/train-00001-of-00002.parquet", digits(40)[25:])
    (folder / "README.md").write_text("words")
    source = open_source(str(folder))
    assert_images(source, digits(40))
    assert open_source(str(folder)).identity == source.identity
    write_hugging_face(folder / "data/train-00002-of-00002.parquet", digits(3))
    assert open_source(str(folder)).count == 43
    assert open_source(str(folder)).identity != source.identity


def test_bomb_raises_before_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddim.data.parquet.SMALL_ARRAY_BYTES", 2**20)
    monkeypatch.setattr(datasets.Dataset, "from_parquet", lambda *_: pytest.fail("read"))
    table = pa.table({"image": [bytes(2**16)] * 2**8})
    pq.write_table(table, folder / "bomb.parquet", compression="gzip", use_dictionary=False)
    with pytest.raises(ValueError, match=r"bomb\.parquet cannot be read as parquet: it claims 16,\d+,\d+ bytes in"):
        open_source(str(folder / "bomb.parquet"))


@pytest.mark.parametrize("keeps_schema", [True, False])
@pytest.mark.parametrize("layout", ["bytes", "struct"])
def test_rows_that_are_one_entry_of_a_dictionary_raise_in_bounded_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, layout: str, keeps_schema: bool
) -> None:
    monkeypatch.setattr("ddim.data.parquet.SMALL_ARRAY_BYTES", 2**22)
    monkeypatch.setattr(datasets.Dataset, "from_parquet", lambda *_: pytest.fail("read"))
    entry = pa.array([np.random.default_rng(0).bytes(2**16)])
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2**13, np.int32)), entry)
    if layout == "struct":
        column = pa.StructArray.from_arrays([column], ["bytes"])
    pq.write_table(pa.table({"image": column}), folder / "bomb.parquet", store_schema=keeps_schema)
    before = pa.default_memory_pool().bytes_allocated()
    with pytest.raises(ValueError, match=r"bomb\.parquet cannot be read as parquet: it claims \d\d,\d+,\d+ bytes in"):
        open_source(str(folder / "bomb.parquet"))
    # The rows are 512 MiB.
    assert pa.default_memory_pool().bytes_allocated() - before < 2**25
    assert (folder / "bomb.parquet").stat().st_size < 2**18


def test_repeated_images_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddim.data.parquet.SMALL_ARRAY_BYTES", 2**12)
    pixels = np.concatenate([digits(2)] * 20)
    assert_images(open_source(write_hugging_face(folder / "train.parquet", pixels)), pixels)


def test_images_take_precedence_over_parquet_files(folder: Path) -> None:
    write_hugging_face(folder / "train.parquet", digits(5))
    (folder / "a.png").write_bytes(encode(digits(1)[0]))
    assert open_source(str(folder)).count == 1


@pytest.mark.parametrize("layout", ["struct", "bytes"])
def test_parquet_without_hugging_face_metadata(folder: Path, layout: str) -> None:
    encoded = [encode(pixels) for pixels in digits(40)]
    if layout == "struct":
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        column = pa.array([{"bytes": content, "path": None} for content in encoded], kind)
    else:
        column = pa.array(encoded)
    assert_images(open_source(write_table(folder / "train.parquet", image=column)), digits(40))


def test_column_is_detected_or_given(folder: Path) -> None:
    detected = open_source(write_hugging_face(folder / "detected.parquet", digits(3), column="img"))
    assert_images(detected, digits(3))
    image, photo = (pa.array([encode(pixels) for pixels in part]) for part in (digits(3), digits(6)[3:]))
    path = write_table(folder / "given.parquet", label=pa.array([0, 1, 2]), photo=photo, image=image)
    assert_images(open_source(path), digits(3))
    assert_images(open_source(path, column="image"), digits(3))
    assert_images(open_source(path, column="photo"), digits(6)[3:])
    assert open_source(path, column="photo").identity != open_source(path).identity
    with pytest.raises(
        ValueError, match=r"given\.parquet has no column img; its columns are label, photo, image \(did"
    ):
        open_source(path, column="img")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": pa.array([1, 2])}, r"train\.parquet has no column of images; its columns are label$"),
        ({"photo": pa.array([encode(digits(1)[0])])}, "has no column of images; its columns are photo$"),
        ({"image": pa.array([1, 2])}, r"^the column image of .*train\.parquet must hold encoded images, got int64$"),
        ({"image": pa.array([], pa.binary())}, "cannot be read as parquet: |has no rows"),
    ],
)
def test_parquet_without_images_raises(folder: Path, columns: dict[str, pa.Array], message: str) -> None:
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
def test_non_image_row_is_named(folder: Path, values: pa.Array, message: str) -> None:
    path = write_table(folder / "train.parquet", image=values)
    assert decode_error(open_source(path)) == f"image 0 of {path} cannot be read: {message}"


def test_path_in_a_table_is_not_followed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
            assert decode_error(source, index) == f"image {index} of {path} cannot be read: it is missing"


@pytest.mark.parametrize("cache", ["hf/hub", "hf/datasets"])
def test_path_into_the_download_cache_is_followed(folder: Path, tmp_path: Path, cache: str) -> None:
    stored = tmp_path / cache / "datasets--owner--name/blobs/0123"
    stored.parent.mkdir(parents=True)
    stored.write_bytes(encode(digits(1)[0]))
    # The hub's cache links from readable names to content.
    link = tmp_path / cache / "datasets--owner--name/snapshots/main/a.png"
    link.parent.mkdir(parents=True)
    link.symlink_to(stored)
    path = write_table(folder / "train.parquet", image=pa.array([{"bytes": None, "path": str(link)}]))
    assert_images(open_source(path), digits(1))
    stored.unlink()
    assert f"image 0 of {path} cannot be read: " in decode_error(open_source(path))


@pytest.mark.parametrize("content", [b"", b"words", b"PAR1 and more PAR1"])
def test_invalid_parquet_raises(folder: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "train.parquet").write_bytes(content)
    for source in (folder / "train.parquet", folder):
        with pytest.raises(ValueError, match=rf"^{source} cannot be read as parquet: ") as caught:
            open_source(str(source))
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


# --- the hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with datasets of parquet files, of image files, and of text, and a model."""
    folder = tmp_path_factory.mktemp("tables")
    tables = {}
    for split, part in (("train", digits(40)), ("test", digits(50)[40:])):
        path = write_hugging_face(folder / f"{split}.parquet", part, column="img")
        tables[f"data/{split}-00000-of-00001.parquet"] = Path(path).read_bytes()
    with Hub() as hub:
        hub.add("datasets/owner/digits", tables | {"README.md": b"# Digits\n"})
        hub.add(
            "datasets/owner/files", {f"train/{index}.png": encode(pixels) for index, pixels in enumerate(digits(5))}
        )
        hub.add("datasets/owner/words", {"README.md": b"# Words\n"})
        hub.add("datasets/owner/private", tables, private=True)
        hub.add("owner/model", {"config.json": b"{}"})
        yield hub


def test_hub_dataset(hub: Hub, client: Client) -> None:
    name, identity, images = client(load_images, "owner/digits")
    assert name == "owner/digits (train)"
    assert np.array_equal(np.stack(images), digits(40))
    downloads = hub.downloaded("datasets/owner/digits")
    assert "data/train-00000-of-00001.parquet" in downloads

    again = client(load_images, "owner/digits")
    assert again[1] == identity
    assert np.array_equal(np.stack(again[2]), digits(40))
    tables = [path for path in hub.downloaded("datasets/owner/digits") if path.endswith(".parquet")]
    assert tables == [path for path in downloads if path.endswith(".parquet")]


def test_hub_dataset_split_and_column(client: Client) -> None:
    name, identity, images = client(load_images, "owner/digits", split="test", column="img")
    assert name == "owner/digits (test)"
    assert np.array_equal(np.stack(images), digits(50)[40:])
    assert identity != client(load_images, "owner/digits")[1]
    with pytest.raises(ValueError, match=r"the dataset owner/digits cannot be used: .*nothing") as caught:
        client(load_images, "owner/digits", split="nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(
        ValueError,
        match=r"^owner/digits \(train\) has no column image; its columns are label, img \(did you mean 'img'\?\)$",
    ):
        client(load_images, "owner/digits", column="image")


def test_hub_dataset_of_image_files(client: Client) -> None:
    _, _, images = client(load_images, "owner/files")
    assert np.array_equal(np.stack(images), digits(5))


@pytest.mark.parametrize("name", ["owner/nothing", "owner/private", "owner/words", "owner/model"])
def test_missing_hub_dataset_raises(client: Client, name: str) -> None:
    message = f"^{name} is neither a local path nor a dataset on the hub: "
    with pytest.raises(FileNotFoundError, match=message) as caught:
        client(load_images, name)
    assert "\n" not in str(caught.value)


def test_dataset_script_does_not_run(hub: Hub, client: Client, tmp_path: Path) -> None:
    executed = tmp_path / "executed"
    hub.add("datasets/owner/script", {"script.py": f"open({str(executed)!r}, 'w').close()\n".encode()})
    with pytest.raises(RuntimeError, match=r"^the dataset owner/script cannot be loaded: .*scripts are no longer"):
        client(load_images, "owner/script")
    assert not executed.exists()


def test_offline_uses_the_cache(client: Client, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, identity, _ = client(load_images, "owner/digits")
    for constants in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"^the dataset owner/far cannot be loaded: ") as caught:
        open_source("owner/far")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    cached = open_source("owner/digits")
    assert_images(cached, digits(40))
    assert cached.identity == identity
