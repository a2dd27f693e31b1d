"""Damage to bytes, and values that nobody expects: what several targets draw from."""

from __future__ import annotations

import struct
import zlib
from typing import Any, NamedTuple

from hypothesis import strategies as st


class Mutation(NamedTuple):
    """One change of a file's bytes.

    Attributes:
        kind: `flip`, `set`, `insert`, `delete`, `truncate`, `repeat` or `zero`.
        position: where, modulo the length; negative from the end.
        amount: the bit to flip, or a number of bytes.
        content: bytes to write or insert.
    """

    kind: str
    position: int
    amount: int
    content: bytes


KINDS = ("flip", "set", "insert", "delete", "truncate", "repeat", "zero")
POSITIONS = st.integers(0, 300) | st.integers(-300, -1) | st.integers(0, 2**22)
MUTATION = st.builds(
    Mutation,
    st.sampled_from((*KINDS, "flip", "flip", "set")),
    POSITIONS,
    st.integers(0, 7) | st.integers(0, 2000),
    st.binary(max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\x7f\xff\xff\xff", b"-1", b"9" * 12]),
)
MUTATIONS = st.lists(MUTATION, min_size=1, max_size=3)


def mutate(data: bytes, mutations: list[Mutation]) -> bytes:
    """Return bytes after one change after the other."""
    for kind, position, amount, content in mutations:
        if not data:
            return data
        at = position % len(data)
        before, after = data[:at], data[at:]
        if kind == "flip":
            data = before + bytes([after[0] ^ 1 << amount % 8]) + after[1:]
        elif kind == "set":
            data = before + content + after[len(content) :]
        elif kind == "insert":
            data = before + content + after
        elif kind == "delete":
            data = before + after[amount:]
        elif kind == "truncate":
            data = before
        elif kind == "repeat":
            data = before + after[:amount] + after
        elif kind == "zero":
            data = before + b"\0" * min(amount, len(after)) + after[amount:]
    return data


def zip_bomb(prefix: bytes = b"") -> tuple[bytes, int]:
    """Return a raw deflate stream of a prefix and 3 GB of zeros, and the size of what it holds."""
    first = zlib.compressobj(1, zlib.DEFLATED, -15)
    block = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = bytes(1 << 24)
    start = first.compress(prefix) + first.flush(zlib.Z_FULL_FLUSH)
    # After a full flush the next bytes refer to nothing before.
    middle = block.compress(zeros) + block.flush(zlib.Z_FULL_FLUSH)
    return start + middle * 192 + block.flush(), len(prefix) + 192 * len(zeros)


def make_zip(members: list[tuple[str, bytes, int | None]]) -> bytes:
    """Return an archive of members: name, content, and for a deflate stream the size of what it holds."""
    body, directory = b"", b""
    for name, data, size in members:
        common = struct.pack(
            "<HHHHHIIIHH", 20, 0, 0 if size is None else 8, 0, 33, zlib.crc32(data) if size is None else 0, len(data),
            len(data) if size is None else size, len(name), 0,
        )  # fmt: skip
        directory += b"PK\1\2\x14\0" + common + struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + name.encode()
        body += b"PK\3\4" + common + name.encode() + data
    end = struct.pack("<HHHHIIH", 0, 0, len(members), len(members), len(directory), len(body), 0)
    return body + directory + b"PK\5\6" + end


HUGE_INTEGERS = (2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 10**18, 10**30, -1, -(2**31), -(2**63), 65536, 10**8, 10**9)
FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-30, 1e30, 1e308, -1e308, float("nan"), float("inf"), -float("inf"), 5e-324)
TEXTS = (
    *("", " ", "x", "0", "1e999", "nan", "None", "true", "linear", "\0", "a\nb", "../..", "/etc/passwd", "é\u202e"),
    *("\ud800", "%s%n", "{0}", "{x.__class__}", "x" * 2000, "os.system", "__class__", "$HOME", "~", "-1", "1_000"),
)


def nested(depth: int) -> Any:
    """Return lists within lists."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.sampled_from(HUGE_INTEGERS)
    | st.sampled_from(FLOATS)
    | st.floats(width=32)
    | st.sampled_from(TEXTS)
    | st.text(max_size=6)
)
VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=4)
    | st.dictionaries(st.sampled_from(["x", "10", "1", "", "_", "default"]), SCALARS, max_size=2)
    | st.lists(st.lists(SCALARS, max_size=2), max_size=2)
    | st.integers(2, 60).map(nested)
)
"""Anything that JSON and YAML can hold."""
