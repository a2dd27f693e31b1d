"""The record that a kernel takes: one pointer to counts, flags, numbers and addresses of arrays, each of 8 bytes.

    Kernel("norm", "forward", (Count("N"), Flag("silu"), Pointer("x"), Real("eps")))

The kind of a field is part of its declaration. Python fills a record by `Record.pack`; a kernel reads its fields as
attributes (`args.N`), the pointers among them as integers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Field:
    """A field of a record.

    Attributes:
        name: of the keyword argument that fills it, and of the attribute that a kernel reads.
    """

    name: str
    dtype: ClassVar[type[np.generic]] = np.int64


class Pointer(Field):
    """The address of the first number of a contiguous array; filled from a tensor."""


class Count(Field):
    """A size, or a number of things; filled from an `int`."""


class Flag(Field):
    """0 or 1; filled from a `bool`."""


class Real(Field):
    """A float64 number; filled from a `float`."""

    dtype = np.float64


class Record:
    """The layout of a kernel's arguments.

    Args:
        fields: in the order in which they lie in memory.

    Example:
        >>> Record([Count("N"), Real("eps")]).pack({"eps": 0.5, "N": 1}).hex()
        '0100000000000000000000000000e03f'
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        # What `pack` needs, computed once: a step calls kernels a hundred times.
        self._layout = [(field.name, isinstance(field, Pointer)) for field in fields]
        # The same layout twice: for numba, which compiles the kernel, and for Python, which fills the record.
        self.dtype: np.dtype[Any] = np.dtype([(field.name, field.dtype) for field in fields])
        self._struct = struct.Struct("".join(np.dtype(field.dtype).char for field in fields))

    def pack(self, values: dict[str, Any]) -> bytes:
        """Return the record's bytes.

        Args:
            values: one per field, by name: tensors for pointers, numbers for the others.

        Returns:
            8 bytes per field.

        Raises:
            KeyError: if a field has no value.
            TypeError, AttributeError, struct.error: if a value is not of its field's kind.
        """
        return self._struct.pack(*[_address(values[name]) if p else values[name] for name, p in self._layout])


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()
