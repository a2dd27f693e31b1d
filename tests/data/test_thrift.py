"""The reader of footers against pyarrow's own, and against damage."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddim.data.thrift import Reader, read_footer, read_page_size

ROWS = 12


def table() -> pa.Table:
    return pa.table(
        {
            "image": [{"bytes": bytes([i]) * 50, "path": None} for i in range(ROWS)],
            "number": pa.array(range(ROWS), pa.int64()),
            "fixed": pa.array([b"ab"] * ROWS, pa.binary(2)),
            "numbers": [[1.5] * (i % 3) for i in range(ROWS)],
            "flag": [True, False, None] * (ROWS // 3),
        }
    )


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    path = tmp_path / "a.parquet"
    pq.write_table(table(), path, row_group_size=5)
    return path


@pytest.mark.parametrize("settings", [{}, {"use_dictionary": False}, {"version": "1.0", "write_page_index": True}])
def test_equals_pyarrow(tmp_path: Path, settings: dict[str, object]) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table(), path, row_group_size=5, **settings)
    metadata = pq.ParquetFile(path).metadata
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    expected = [group.column(index) for group in groups for index in range(group.num_columns)]
    footer = read_footer(path)
    assert footer.total_byte_size == sum(group.total_byte_size for group in groups)
    assert len(footer.chunks) == len(expected) == 3 * 6
    for chunk, other in zip(footer.chunks, expected, strict=True):
        assert (chunk.path, chunk.num_values) == (other.path_in_schema, other.num_values)
        assert chunk.dictionary_page_offset == other.dictionary_page_offset
        assert (chunk.physical_type in (6, 7)) == ("BYTE_ARRAY" in other.physical_type)


def test_size_of_a_page(parquet: Path) -> None:
    chunk = read_footer(parquet).chunks[0]
    with parquet.open("rb") as file:
        # A dictionary of byte arrays holds each value after its length in 4 bytes.
        assert read_page_size(file, chunk.dictionary_page_offset or 0) == 5 * (50 + 4)
        with pytest.raises(ValueError, match=r"^its footer is cut off$"):
            read_page_size(file, 10**6)


DAMAGED = {
    "empty": lambda content: b"",
    "other file": lambda content: b"\x89PNG" * 50,
    "encrypted": lambda content: content[:-4] + b"PARE",
    "long footer": lambda content: content[:-8] + struct.pack("<I", 2**32 - 1) + b"PAR1",
    "no footer": lambda content: content[:-8] + struct.pack("<I", 0) + b"PAR1",
    "no fields": lambda content: content + b"\0" + struct.pack("<I", 1) + b"PAR1",
    "nested": lambda content: content + b"\x1c" * 100 + struct.pack("<I", 100) + b"PAR1",
    "huge list": lambda content: content + b"\x19\xf5\xff\xff\xff\xff\x0f" + struct.pack("<I", 7) + b"PAR1",
    "row groups of numbers": lambda content: content + b"\x49\x15\x02\0" + struct.pack("<I", 4) + b"PAR1",
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_damage_is_refused(parquet: Path, damage: Callable[[bytes], bytes]) -> None:
    parquet.write_bytes(damage(parquet.read_bytes()))
    with pytest.raises(ValueError, match=r"^it(s footer)? [a-z ]+$"):
        read_footer(parquet)


def test_changed_bytes_raise_nothing_else(parquet: Path) -> None:
    content = parquet.read_bytes()
    (length,) = struct.unpack("<I", content[-8:-4])
    rng = random.Random(0)
    refused = 0
    for _ in range(3000):
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 3])):
            changed[-9 - rng.randrange(length)] = rng.randrange(256)
        parquet.write_bytes(changed)
        try:
            read_footer(parquet)
        except ValueError:
            refused += 1
    assert refused > 100


def test_values_of_all_types() -> None:
    data = bytes.fromhex(
        "11 12 13 7f 14 03 15 05 16 07 17 00 00 00 00 00 00 f0 3f 18 01 61 19 25 02 04 1b 01 58 01 01 62 1c 15 02 00 00"
    )
    integers = {3: 127, 4: -2, 5: -3, 6: -4}
    others = {7: struct.pack("<d", 1.0), 8: b"a", 9: [1, 2], 10: [[-1, b"b"]], 11: {1: 1}}
    assert dict(Reader(data).fields()) == {1: True, 2: False} | integers | others
