"""What parquet files say of themselves: structures in Thrift's compact protocol, read without trust.

A parquet file ends in its footer, a structure `FileMetaData`, the footer's length in 4 bytes, and `PAR1`. `pyarrow`
reads it too, but ends the process on some damaged ones; here every damage raises `ValueError`.

A field of a structure is a byte (d << 4 | type), where d is the distance of its number to that of the field before it,
or the byte (0 << 4 | type) and its number; a structure ends in a byte 0. Integers are varints, 7 bits per byte with the
lowest first, and with their sign in bit 0 (zigzag). A list is a byte (size << 4 | type), or (15 << 4 | type) and its
size, and its elements.

References:
    https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
    https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

Structure = dict[int, Any]
"""Values by the numbers of their fields."""

MAGIC = b"PAR1"

MAX_DEPTH = 16
"""Structures within structures; those of parquet files are 7 deep."""

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)

PAGE_HEADER_BYTES = 256
"""More than the first two fields of a page's header can take."""

# Numbers of fields in parquet.thrift.
ROW_GROUPS = 4
COLUMNS, TOTAL_BYTE_SIZE = 1, 2
META_DATA = 3
PHYSICAL_TYPE, PATH_IN_SCHEMA, NUM_VALUES, DICTIONARY_PAGE_OFFSET = 1, 3, 5, 11
UNCOMPRESSED_PAGE_SIZE = 2


class ColumnChunk(NamedTuple):
    """The values of one column in one group of rows.

    Attributes:
        physical_type: number of the type, 6 for byte arrays.
        path: name of the column, with dots between the names of nested ones.
        num_values: number of values, missing ones included.
        dictionary_page_offset: where its dictionary begins in the file; `None` if it has none.
    """

    physical_type: int
    path: str
    num_values: int
    dictionary_page_offset: int | None


class Footer(NamedTuple):
    """The part of a footer that tells how much a file holds.

    Attributes:
        total_byte_size: bytes of all encoded columns, uncompressed.
        chunks: all column chunks.
    """

    total_byte_size: int
    chunks: list[ColumnChunk]


def read_footer(path: Path) -> Footer:
    """Read the footer of a parquet file.

    Args:
        path: the file.

    Returns:
        What it says of the columns.

    Raises:
        ValueError: if the file is not a parquet file, or its footer is damaged.
    """
    with path.open("rb") as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - 8))
        tail = file.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != MAGIC or not 0 < length <= end - 8:
            raise ValueError("it does not end in a parquet footer")
        file.seek(end - 8 - length)
        footer = dict(Reader(file.read(length)).fields())
    try:
        groups = footer[ROW_GROUPS]
        chunks = [column[META_DATA] for group in groups for column in group[COLUMNS]]
        return Footer(
            sum(integer(group, TOTAL_BYTE_SIZE) for group in groups),
            [
                ColumnChunk(
                    integer(chunk, PHYSICAL_TYPE),
                    b".".join(chunk[PATH_IN_SCHEMA]).decode(),
                    integer(chunk, NUM_VALUES),
                    integer(chunk, DICTIONARY_PAGE_OFFSET) if DICTIONARY_PAGE_OFFSET in chunk else None,
                )
                for chunk in chunks
            ],
        )
    except (LookupError, TypeError, AttributeError):
        raise ValueError("its footer is damaged") from None


def read_page_size(file: BinaryIO, offset: int) -> int:
    """Return the uncompressed size of a page.

    Args:
        file: a parquet file.
        offset: where the page's header begins.

    Returns:
        Bytes.

    Raises:
        ValueError: if the header is missing or damaged.
    """
    file.seek(offset)
    for number, value in Reader(file.read(PAGE_HEADER_BYTES)).fields():
        if number == UNCOMPRESSED_PAGE_SIZE:
            return integer({number: value}, number)
    raise ValueError("the header of a page is damaged")


def integer(structure: Structure, number: int) -> int:
    """Return a field that must be an integer of 0 or more.

    Args:
        structure: has the field.
        number: of the field.

    Returns:
        Its value.

    Raises:
        KeyError: if it is missing.
        TypeError: if it is of another type, or negative.

    Example:
        >>> integer({2: 7}, 2)
        7
    """
    value = structure[number]
    if type(value) is not int or value < 0:
        raise TypeError(f"field {number} must be an integer of 0 or more, got {value!r}")
    return value


@dataclass
class Reader:
    r"""Reads values one after the other.

    Args:
        data: bytes of a structure, and possibly more.
        position: of the next byte.

    Example:
        >>> dict(Reader(b"\x15\x02\x15\x08\x00").fields())
        {1: 1, 2: 4}
    """

    data: bytes
    position: int = 0

    def fields(self, depth: int = 0) -> Iterator[tuple[int, Any]]:
        """Yield number and value of the fields of a structure, up to its end.

        Args:
            depth: number of structures that it is in.

        Yields:
            Number and value: a bool, an int, bytes (also for doubles), a list, or a dictionary.

        Raises:
            ValueError: if the data are damaged.
        """
        if depth > MAX_DEPTH:
            raise ValueError("its footer is nested too deeply")
        number = 0
        while header := self._take(1)[0]:
            distance, kind = header >> 4, header & 0xF
            number = number + distance if distance else self._signed()
            yield number, kind == TRUE if kind in (TRUE, FALSE) else self._value(kind, depth)

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (TRUE, FALSE):  # as an element, a byte of its own
            return self._take(1)[0] == TRUE
        if kind == BYTE:
            return self._take(1)[0]
        if kind in (I16, I32, I64):
            return self._signed()
        if kind == DOUBLE:
            return self._take(8)
        if kind == BINARY:
            return self._take(self._varint())
        if kind in (LIST, SET):
            header = self._take(1)[0]
            size = self._size(self._varint() if header >> 4 == 15 else header >> 4)
            return [self._value(header & 0xF, depth + 1) for _ in range(size)]
        if kind == MAP:
            size = self._size(self._varint())
            kinds = self._take(1)[0] if size else 0
            return [[self._value(k, depth + 1) for k in (kinds >> 4, kinds & 0xF)] for _ in range(size)]
        if kind == STRUCT:
            return dict(self.fields(depth + 1))
        raise ValueError(f"its footer holds a value of an unknown type {kind}")

    def _take(self, count: int) -> bytes:
        taken = self.data[self.position : self.position + count]
        if len(taken) < count:
            raise ValueError("its footer is cut off")
        self.position += count
        return taken

    def _size(self, count: int) -> int:
        # Each element takes a byte or more.
        if count > len(self.data) - self.position:
            raise ValueError("its footer is cut off")
        return count

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            (byte,) = self._take(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("its footer holds a number of more than 64 bits")

    def _signed(self) -> int:
        value = self._varint()
        return value >> 1 if value % 2 == 0 else -(value >> 1) - 1
