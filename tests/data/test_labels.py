"""The classes of images: where they are found, that they stay those of their images, and balanced visits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from ddim.data.config import DataConfig
from ddim.data.dataset import CachedImageDataset, open_dataset
from ddim.data.labels import ImageLabels, read_labels
from ddim.data.loader import Batches, balanced_order, split_holdout
from ddim.data.sources import open_source
from ddim.distributed import ProcessGroup
from image_data import CACHES, encode, write_table

NAMES = ("apple", "bird", "car")


def shade(label: int, number: int) -> np.ndarray:
    """An image whose class is in its pixels: 80 for each, and the number of the image below."""
    return np.full((4, 4), 80 * label + number, np.uint8)


@pytest.fixture
def classes() -> list[int]:
    """The classes of 24 images."""
    return np.random.default_rng(0).integers(0, 3, 24).tolist()


@pytest.fixture
def class_folders(folder: Path, classes: list[int]) -> Path:
    """24 images in a folder for each class."""
    for number, label in enumerate(classes):
        (folder / NAMES[label]).mkdir(exist_ok=True)
        Image.fromarray(shade(label, number)).save(folder / NAMES[label] / f"{number:02}.png")
    return folder


def class_in(pixels: torch.Tensor) -> list[int]:
    return (pixels[:, 0, 0, 0].int() // 80).tolist()


# --- where they are found


def test_class_folders(class_folders: Path) -> None:
    labels = read_labels(open_source(str(class_folders)), "auto")
    assert labels is not None
    assert (labels.names, labels.column) == (NAMES, "folder")
    assert read_labels(open_source(str(class_folders)), "none") is None


def test_metadata(folder: Path) -> None:
    (folder / "sub").mkdir()
    for number in range(4):
        Image.fromarray(shade(0, number)).save(folder / ("sub" if number % 2 else "") / f"{number}.png")
    lines = [
        {
            "file_name": f"{'sub/' if number % 2 else ''}{number}.png",
            "label": number // 2,
            "box": [1],
            "wet": number < 1,
        }
        for number in reversed(range(4))
    ]
    (folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    source = open_source(str(folder))
    assert source.labels == "2 folders and metadata.jsonl"
    assert source.label_columns() == ("label", "wet", "folder")
    # Sorted by path: 0, 2, sub/1, sub/3.
    labels = read_labels(source, "auto")
    assert labels is not None
    assert (labels.names, labels.indices.tolist(), labels.column) == (("0", "1"), [0, 1, 0, 1], "label")
    assert source.read_column("wet") == ["true", "false", "false", "false"]
    assert source.read_column("folder") == [folder.name, folder.name, "sub", "sub"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file_name": "0.png", "label": 1}', "must have a line for each image, and has none for 1 of 2 images"),
        ('{"label": 1}', "line 1, must be an object with a text file_name"),
        ("[1]", "line 1, must be an object"),
        ("\n{", "line 2, is not valid JSON"),
        ("\udcff", "is not UTF-8 text"),
    ],
)
def test_metadata_is_checked_where_labels_are_used(folder: Path, text: str, message: str) -> None:
    for number in range(2):
        Image.fromarray(shade(0, number)).save(folder / f"{number}.png")
    (folder / "metadata.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    source = open_source(str(folder))
    with pytest.raises(ValueError, match=message):
        read_labels(source, "auto")
    assert open_dataset(DataConfig(source=str(folder)), 4, 1).shape[0] == 2


def test_tables_and_declared_order(folder: Path) -> None:
    encoded = [{"bytes": encode(shade(0, number))} for number in range(4)]
    path = write_table(
        folder / "a.parquet", image=pa.array(encoded), hair=pa.array(list("xyxy")), label=pa.array([10.0, 2, 2, 10])
    )
    labels = read_labels(open_source(path), "auto")
    assert labels is not None
    assert (labels.names, labels.indices.tolist()) == (("2", "10"), [1, 0, 0, 1])
    hair = read_labels(open_source(path), "hair")
    assert hair is not None
    assert hair.names == ("x", "y")
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["z", "unused", "a"])})
    images = [Image.fromarray(shade(0, number)) for number in range(3)]
    datasets.Dataset.from_dict({"image": images, "kind": [2, 0, 2]}, features=features).to_parquet(
        f"{folder}/b.parquet"
    )
    kinds = read_labels(open_source(f"{folder}/b.parquet"), "auto")
    assert kinds is not None
    assert (kinds.names, kinds.indices.tolist()) == (("z", "a"), [1, 0, 1])


def test_arrays(folder: Path) -> None:
    np.savez(folder / "a.npz", arr_0=np.zeros((4, 8, 8), np.uint8), arr_1=np.array([7, 7, 3, 3]))
    labels = read_labels(open_source(f"{folder}/a.npz"), "auto")
    assert labels is not None
    assert (labels.names, labels.indices.tolist(), labels.column) == (("3", "7"), [1, 1, 0, 0], "arr_1")


def test_given_classes(folder: Path) -> None:
    """By name or number, in the given order, with images or without, and however few images there are."""
    images = np.zeros((2, 4, 4), np.uint8)
    for values, expected in ((np.array([3, 0]), [3, 0]), (np.array(["car", "bird"]), [2, 1])):
        np.savez(folder / "a.npz", images=images, label=values)
        labels = read_labels(open_source(str(folder / "a.npz")), "auto", class_names=(*NAMES, "dog"))
        assert labels is not None
        assert (labels.names, labels.indices.tolist()) == ((*NAMES, "dog"), expected)
    np.savez(folder / "a.npz", images=images, label=np.array(["car", "cow"]))
    with pytest.raises(ValueError, match="must be from 0 to 2 or one of apple, bird, car, got 'cow'"):
        read_labels(open_source(str(folder / "a.npz")), "auto", class_names=NAMES)


def test_digits() -> None:
    from sklearn.datasets import load_digits

    labels = read_labels(open_source("digits"), "auto")
    assert labels is not None
    assert labels.indices.tolist() == load_digits().target.tolist()
    assert labels.names == tuple("0123456789")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("kolor", r"data\.labels: .* has no kolor; use color, size, id, same or none \(did you mean 'color'\?\)$"),
        ("auto", r"data\.labels: .* has several columns; name one of color, size, id, same, or none$"),
        ("id", r"data\.labels: id of .* is another value for each of its 4 images, which are not classes$"),
        ("same", r"data\.labels: same of .* must hold at least 2 classes, got 1$"),
    ],
)
def test_wrong_labels_raise_before_images_are_read(folder: Path, labels: str, message: str) -> None:
    # The images are damaged: nothing looks at them.
    columns = {"color": list("abab"), "size": [1, 1, 2, 2], "id": [1, 2, 3, 4], "same": [1] * 4}
    images = pa.array([{"bytes": b"x"}] * 4)
    path = write_table(folder / "a.parquet", image=images, **{name: pa.array(v) for name, v in columns.items()})
    with pytest.raises(ValueError, match=message):
        open_dataset(DataConfig(source=path, labels=labels, max_unreadable=0), 4, 1)


def test_images_without_labels_raise(image_folder: Path) -> None:
    for labels in ("auto", "label"):
        with pytest.raises(ValueError, match=r"^data\.labels: .* use none$"):
            read_labels(open_source(str(image_folder)), labels)


# --- they stay those of their images


@pytest.mark.parametrize("cache", CACHES)
def test_labels_follow_images(class_folders: Path, classes: list[int], cache: str) -> None:
    for number in (3, 10, 23):
        (class_folders / NAMES[classes[number]] / f"{number:02}.png").write_bytes(b"damaged")
    config = DataConfig(source=str(class_folders), labels="auto", cache=cache)
    # The second time from the disk, where they are cached.
    for _ in range(2):
        dataset = open_dataset(config, 4, 1)
        N = dataset.shape[0]
        assert (24 if cache == "none" else 21) == N
        assert dataset.labels is not None
        images, labels = dataset.read_labeled(torch.arange(N))
        assert labels is not None
        assert class_in(images) == labels.tolist()
        training, held_out = split_holdout(N, 5, 0)
        batches = Batches(dataset, training, 6, 1, 4)
        for step in range(9):
            images, labels = batches.read_labeled(step)
            assert labels is not None
            assert class_in(images) == labels.tolist()
            assert torch.equal(images, batches[step])
        images, labels = dataset.read_labeled(held_out)
        assert labels is not None
        assert class_in(images) == labels.tolist()


def test_unused_labels_are_named(class_folders: Path) -> None:
    dataset = open_dataset(DataConfig(source=str(class_folders)), 4, 1)
    assert dataset.labels is None
    assert dataset.unused_labels == "3 folders"
    assert dataset.read_labeled(torch.tensor([0]))[1] is None


def test_sha256_changes_with_names_and_classes() -> None:
    labels = ImageLabels(("a", "b"), torch.tensor([0, 1, 1]), "label")
    others = (
        ImageLabels(("a", "c"), labels.indices, "label"),
        ImageLabels(labels.names, torch.tensor([0, 1, 0]), "label"),
    )
    assert labels.sha256() == ImageLabels(("a", "b"), torch.tensor([0, 1, 1]), "other").sha256()
    assert labels.sha256() not in {other.sha256() for other in others}


# --- balanced visits


def numbered(classes: torch.Tensor) -> CachedImageDataset:
    """Images that hold their numbers."""
    pixels = torch.arange(len(classes), dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return CachedImageDataset(pixels, labels=ImageLabels(NAMES, classes, "label"))


def test_balanced_epochs_visit_classes_equally() -> None:
    classes = torch.tensor([0] * 50 + [1] * 8 + [2] * 3)
    order = balanced_order(classes, torch.Generator().manual_seed(0))
    assert len(order) == 61
    assert sorted(Counter(classes[order].tolist()).values()) == [20, 20, 21]
    visits = Counter(order.tolist())
    for label in range(3):
        of_class = [visits[position] for position in (classes == label).nonzero()[:, 0].tolist()]
        assert max(of_class) - min(of_class) <= 1
    # Shuffled: no part of the epoch has one class alone.
    assert all(len(set(part.tolist())) > 1 for part in classes[order][:60].split(12))


def test_balanced_batches_divide_among_processes() -> None:
    classes = torch.tensor([0] * 50 + [1] * 8 + [2] * 3)
    training, _ = split_holdout(61, 10, 0)
    whole = Batches(numbered(classes), training, 12, 3, 1, balanced=True)
    parts = [
        Batches(numbered(classes), training, 12, 3, 1, processes=ProcessGroup(r, 2), balanced=True) for r in (0, 1)
    ]
    for step in (0, 7, 3):
        images, labels = whole.read_labeled(step)
        assert labels is not None
        assert torch.equal(classes[images.flatten().long()], labels)
        assert set(images.flatten().tolist()) <= set(training.tolist())
        assert torch.equal(images, torch.cat([part[step] for part in parts]))
    drawn = torch.cat([labels for step in range(51) if (labels := whole.read_labeled(step)[1]) is not None])
    assert drawn.bincount().tolist() == [204] * 3


def test_balanced_requires_labels() -> None:
    dataset = CachedImageDataset(torch.zeros(3, 1, 1, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"data\.balanced requires data\.labels"):
        Batches(dataset, torch.arange(3), 2, 0, 1, balanced=True)
