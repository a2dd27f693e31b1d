"""Draw faces into a parquet file, in the Hugging Face image layout.

    cd scripts/faces && npm install
    python scripts/faces/make.py --first 2000 --count 24000 --out faces.parquet
    python scripts/faces/make.py --check faces.parquet        # draws them again and compares every pixel and attribute

Face i depends on i alone: 0 to 1,999 are test images, 2,000 to 25,999 training images, and later ones are in neither.
`draw.mjs` draws at 128x128, here 2x2 pixels are averaged. Columns: `image` (lossless WebP, 64x64 RGB), `label` (the
index of the mouth), and the attributes.

Design: ToonHead by Johan Melin, CC BY 4.0 (figma.com/community/file/1589627891082866389), drawn by
`@dicebear/toon-head` (code: MIT).
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

DRAWN_SIZE, SIZE = 128, 64
MOUTHS = ("agape", "angry", "laugh", "sad", "smile")
"""The classes: `label` is the index."""
ATTRIBUTES = (
    *("mouth", "eyes", "eyebrows", "hair", "hairColor", "rearHair", "beard"),
    *("skinColor", "clothes", "clothesColor", "primaryBackgroundColor"),
)
ROWS_PER_GROUP = 1000


def draw(first: int, count: int) -> Iterator[tuple[Image.Image, dict[str, str]]]:
    """Draw faces, and yield each with its attributes.

    Args:
        first: the index of the first face.
        count: the number of faces.

    Yields:
        A 64x64 RGB image, and its attributes, empty strings where it has none.

    Raises:
        RuntimeError: if node or its packages are missing, or drawing fails.
    """
    command = ["node", str(Path(__file__).with_name("draw.mjs")), str(first), str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        stream: Any = process.stdout
        for _ in range(count):
            line = stream.readline()
            pixels = stream.read(4 * DRAWN_SIZE**2)
            if len(pixels) < 4 * DRAWN_SIZE**2:
                raise RuntimeError("draw.mjs ended early; run `npm install` in scripts/faces with Node.js 20")
            extra = json.loads(line)
            drawn = Image.frombytes("RGBA", (DRAWN_SIZE, DRAWN_SIZE), pixels).convert("RGB")
            yield drawn.resize((SIZE, SIZE), Image.Resampling.BOX), {name: extra.get(name, "") for name in ATTRIBUTES}


def row(index: int, image: Image.Image, attributes: dict[str, str]) -> dict[str, Any]:
    """Make a row of the table.

    Args:
        index: of the face.
        image: 64x64 RGB.
        attributes: by name.
    """
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", lossless=True, quality=100, method=6)
    content = {"bytes": encoded.getvalue(), "path": f"{index}.webp"}
    return {"image": content, "label": MOUTHS.index(attributes["mouth"])} | attributes


def write(first: int, count: int, out: Path) -> None:
    """Draw faces into a parquet file.

    Args:
        first: the index of the first face.
        count: the number of faces.
        out: the file; replaced when all faces have been drawn.
    """
    temporary = out.with_name(f".{out.name}.part")
    writer: pq.ParquetWriter | None = None
    rows: list[dict[str, Any]] = []
    for index, (image, attributes) in enumerate(tqdm(draw(first, count), total=count, unit="face"), first):
        rows.append(row(index, image, attributes))
        if len(rows) == ROWS_PER_GROUP or index == first + count - 1:
            table = pa.Table.from_pylist(rows)
            writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
            writer.write_table(table)
            rows = []
    if writer is not None:
        writer.close()
        temporary.replace(out)


def check(path: Path, count: int | None) -> int:
    """Draw the faces of a parquet file again and compare pixels and attributes.

    Args:
        path: of the file, whose `image.path` names each face by its index.
        count: compare only so many; `None` for all.

    Returns:
        The number of faces that differ.
    """
    rows = pq.read_table(path).slice(0, count).to_pylist()
    first = int(Path(rows[0]["image"]["path"]).stem)
    differing = 0
    for stored, (image, attributes) in zip(tqdm(rows, unit="face"), draw(first, len(rows)), strict=True):
        with Image.open(io.BytesIO(stored["image"]["bytes"])) as opened:
            same_pixels = opened.convert("RGB").tobytes() == image.tobytes()
        same = same_pixels and all(stored[name] == value for name, value in attributes.items())
        differing += not (same and stored["label"] == MOUTHS.index(attributes["mouth"]))
    return differing


def main() -> None:
    """Draw or compare, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=26_000, help="the index of the first face")
    parser.add_argument("--count", type=int, help="the number of faces")
    parser.add_argument("--out", type=Path, default=Path("faces.parquet"), help="the parquet file to write")
    parser.add_argument("--check", type=Path, help="compare this file's faces instead of drawing new ones")
    arguments = parser.parse_args()
    if arguments.check is not None:
        differing = check(arguments.check, arguments.count)
        sys.exit(f"{differing} faces differ" if differing else None)
    write(arguments.first, 1000 if arguments.count is None else arguments.count, arguments.out)


if __name__ == "__main__":
    main()
