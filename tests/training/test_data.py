"""Training images from folders and parquet files: the pixels that were written, and a sentence for everything else; the
order of batches.
"""

from __future__ import annotations

import io
import struct
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ddim.images import fit_image
from ddim.training.data import Batches, fingerprint, generator_for, load_images
from digits import digits


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


# --- folders


def test_a_folder_of_png_keeps_every_pixel(pictures: Path) -> None:
    images = load_images(pictures, 8, 1)
    assert images.dtype == torch.uint8
    assert np.array_equal(images.numpy(), digits(40)[:, None])
    colour = load_images(pictures, 8, 3)
    assert np.array_equal(colour.numpy(), np.repeat(digits(40)[:, None], 3, 1))


def test_a_nested_folder_of_all_sorts(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 20, 3), np.uint8))
    # In the order of their paths.
    expected = {
        "a/1.png": Image.fromarray(noise[0]),
        "a/b/2.BMP": Image.fromarray(noise[1]),
        "a/b/c/3.gif": Image.fromarray(digits(1)[0]),
        "d e/4.png": wide,
        "d e/ü.tiff": Image.new("CMYK", (16, 16), (0, 255, 0, 0)),
        "x.webp": Image.new("RGBA", (8, 9), (0, 0, 0, 0)),
        "y.png": Image.new("P", (3, 3), 0),
        "z.pgm": Image.fromarray(digits(2)[1]),
    }
    for name, image in expected.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    images = load_images(tmp_path, 8, 3)
    assert images.shape == (len(expected), 3, 8, 8)
    for loaded, image in zip(images, expected.values(), strict=True):
        assert np.array_equal(loaded.permute(1, 2, 0).numpy(), np.asarray(fit_image(image, 8, 8, 3)))
    assert load_images(tmp_path, 8, 1).shape == (len(expected), 1, 8, 8)


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*missing; give a folder of images or a parquet file"):
        load_images(tmp_path / "missing", 8, 1)
    (tmp_path / "words.txt").write_text("words")
    with pytest.raises(FileNotFoundError, match=r"there is no image in .*; looked for \.bmp, "):
        load_images(tmp_path, 8, 1)
    with pytest.raises(ValueError, match=r"words\.txt is neither a folder of images nor a \.parquet file"):
        load_images(tmp_path / "words.txt", 8, 1)


def test_a_text_file_called_png_is_named(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes((pictures / "0000.png").read_bytes())
    (tmp_path / "words.png").write_text("words")
    with pytest.raises(ValueError, match=r"image .*words\.png of .* cannot be read"):
        load_images(tmp_path, 8, 1)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_images_are_named(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(buffer, kind)
    content = buffer.getvalue()
    for length in (0, 1, 10, 20, 30, 60, len(content) // 2):
        (tmp_path / "half.png").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"image .*half\.png of .* cannot be read: "):
            load_images(tmp_path, 16, 3)


def test_an_image_that_claims_to_be_huge_is_named(tmp_path: Path) -> None:
    header = struct.pack("<2sIHHI", b"BM", 58, 0, 0, 54) + struct.pack(
        "<IiiHHIIiiII", 40, 10**5, 10**5, 1, 24, *[0] * 6
    )
    (tmp_path / "huge.bmp").write_bytes(header + b"\0" * 4)
    with pytest.raises(ValueError, match=r"image .*huge\.bmp of .* cannot be read: .*exceeds limit"):
        load_images(tmp_path, 16, 3)


# --- parquet


def test_parquet_of_the_hugging_face_layout(tmp_path: Path, images: torch.Tensor) -> None:
    columns = {"label": list(range(40)), "image": [Image.fromarray(pixels) for pixels in digits(40)]}
    features = datasets.Features({"label": datasets.Value("int64"), "image": datasets.Image()})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "train.parquet"))
    loaded = load_images(tmp_path / "train.parquet", 8, 1)
    assert torch.equal(loaded, images)
    assert fingerprint(loaded) == fingerprint(images)


@pytest.mark.parametrize("layout", ["struct", "bytes"])
def test_parquet_written_by_others(tmp_path: Path, images: torch.Tensor, layout: str) -> None:
    encoded = [png(pixels) for pixels in digits(40)]
    if layout == "struct":
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        column = pa.array([{"bytes": content, "path": None} for content in encoded], kind)
    else:
        column = pa.array(encoded)
    pq.write_table(pa.table({"image": column}), tmp_path / "train.parquet")
    assert torch.equal(load_images(tmp_path / "train.parquet", 8, 1), images)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"label": pa.array([1, 2])}, "has no column of images; its columns are label"),
        ({"image": pa.array([1, 2])}, "the column image of .* holds no images"),
        ({"image": pa.array([b"words"])}, "image 0 of .* cannot be read"),
        ({"image": pa.array([png(digits(1)[0]), None])}, "image 1 of .* cannot be read: it is missing"),
        ({"image": pa.array([{"bytes": None, "path": None}])}, "image 0 of .* cannot be read: it is missing"),
        ({"image": pa.array([{"bytes": b"words", "path": "x.png"}])}, r"image x\.png of .* cannot be read"),
        ({"image": pa.array([], pa.binary())}, "cannot be read as parquet"),
    ],
)
def test_parquet_without_images(tmp_path: Path, column: dict[str, pa.Array], message: str) -> None:
    pq.write_table(pa.table(column), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path / "train.parquet", 8, 1)


def test_a_path_in_a_parquet_file_is_not_followed(tmp_path: Path) -> None:
    picture = tmp_path / "secret.png"
    picture.write_bytes(png(digits(1)[0]))
    column = pa.array([{"bytes": None, "path": str(picture)}])
    pq.write_table(pa.table({"image": column}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"secret\.png of .* cannot be read: it is missing"):
        load_images(tmp_path / "train.parquet", 8, 1)


@pytest.mark.parametrize("content", [b"", b"words", b"PAR1 and more PAR1"])
def test_a_file_that_is_no_parquet(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read as parquet: "):
        load_images(tmp_path / "train.parquet", 8, 1)
    assert capfd.readouterr() == ("", "")


# --- batches


def numbered(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.uint8).reshape(count, 1, 1, 1)


def sequence(batches: Batches, steps: int) -> list[int]:
    return torch.cat([batches[step] for step in range(steps)]).flatten().tolist()


@pytest.mark.parametrize("batch_size", [1, 4, 5, 20, 33, 50])
def test_every_image_comes_once_an_epoch(batch_size: int) -> None:
    batches = Batches(numbered(20), batch_size, seed=3)
    assert batches[0].shape == (batch_size, 1, 1, 1)
    seen = sequence(batches, 200 // batch_size + 1)
    for epoch in range(10):
        assert sorted(seen[20 * epoch : 20 * epoch + 20]) == list(range(20))


def test_order_is_a_function_of_the_seed_and_the_step() -> None:
    batches, again, other = (Batches(numbered(20), 6, seed) for seed in (3, 3, 4))
    first = sequence(batches, 20)
    # Backwards, as no run asks for them: what a step gets does not depend on the steps before.
    assert [again[step].flatten().tolist() for step in reversed(range(20))] == [
        first[6 * step : 6 * step + 6] for step in reversed(range(20))
    ]
    assert sequence(other, 20) != first
    epochs = [tuple(first[20 * epoch : 20 * epoch + 20]) for epoch in range(6)]
    assert len(set(epochs)) == 6
    # The batch size cuts the same sequence differently.
    assert sequence(Batches(numbered(20), 7, 3), 10) == first[:70]


def test_orders_are_uniform() -> None:
    firsts = Counter(int(Batches(numbered(4), 1, seed)[0]) for seed in range(400))
    # 100 each are expected, with a standard deviation of 9.
    assert all(60 < firsts[image] < 140 for image in range(4))


def test_generators_depend_on_seed_purpose_and_index_alone() -> None:
    numbers = {
        key: torch.randn(4, generator=generator_for(*key))
        for key in [(0, "step", 1), (0, "step", 2), (0, "order", 1), (1, "step", 1), (12, "step", 3), (1, "step", 23)]
    }
    torch.manual_seed(5)
    for key, expected in numbers.items():
        assert torch.equal(torch.randn(4, generator=generator_for(*key)), expected)
    assert len({tuple(draw.tolist()) for draw in numbers.values()}) == len(numbers)
    before = torch.random.get_rng_state()
    generator_for(0, "step", 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    generator_for(2**63 - 1, "step", 10**9)
