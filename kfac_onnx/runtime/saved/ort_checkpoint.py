"""Read the parameters in ONNX Runtime's training checkpoint, a flatbuffer.

The layout (ONNX Runtime's schema `ort_training_checkpoint.fbs`, identifier `ODTC`), as far as it is needed
here; numbers are field positions in each table:

    Checkpoint   0 version   1 module_state   2 optimizer groups   3 property bag
    ModuleState  0 requires_grad_params   1 frozen_params   (vectors of Tensor)
    Tensor       0 name   1 doc   2 dims (int64)   3 data_type (int32, ONNX's)   4 raw_data (bytes)
                 6 external_data_offset (int64), then the data lies in `<file>.data`

A flatbuffer table starts with the distance back to its list of field offsets; offsets inside a table lead
forward, to a string or vector that starts with its length.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.disk.memory import array_problem
from kfac_onnx.errors import UserError
from kfac_onnx.runtime.step.tensors import numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["read_ort_checkpoint"]

IDENTIFIER: Final = b"ODTC"


@dataclass(frozen=True)
class _Table:
    """A table at a byte position; every read outside the data raises struct.error."""

    data: bytes
    place: int

    def number(self, kind: str, place: int) -> int:
        value: int = struct.unpack_from(f"<{kind}", self.data, place)[0]
        return value

    def field(self, position: int) -> int:
        """Return where a field lies, 0 where the table leaves it out."""
        names = self.place - self.number("i", self.place)
        entry = 4 + 2 * position
        if entry >= self.number("H", names):
            return 0
        offset = self.number("H", names + entry)
        return self.place + offset if offset else 0

    def vector(self, position: int) -> tuple[int, int]:
        """Return where a vector's first element lies and how many there are."""
        place = self.field(position)
        if not place:
            return 0, 0
        start = place + self.number("I", place)
        return start + 4, self.number("I", start)

    def raw(self, position: int) -> bytes:
        """Return a vector of bytes or a string."""
        first, count = self.vector(position)
        return self.data[first : first + count]

    def table(self, place: int) -> _Table:
        """Return the table that the offset at `place` leads to."""
        return _Table(self.data, place + self.number("I", place))

    def tables(self, position: int) -> Iterator[_Table]:
        """Yield the tables of a vector of tables."""
        first, count = self.vector(position)
        for index in range(count):
            yield self.table(first + 4 * index)


def _array(table: _Table, data_file: Path) -> tuple[str, np.ndarray]:
    name = table.raw(0).decode()
    first, count = table.vector(2)
    dims = struct.unpack_from(f"<{count}q", table.data, first)
    dtype = numpy_dtype(table.number("i", table.field(3)))
    if (problem := array_problem(dims, dtype)) is not None:
        raise ValueError(f"tensor '{name}' is of no shape that an array can have: {problem}")
    size = math.prod(dims) * dtype.itemsize
    external = table.field(6)
    if external:
        with data_file.open("rb") as file:
            file.seek(table.number("q", external))
            raw = file.read(min(size, data_file.stat().st_size))
    else:
        raw = table.raw(4)
    if len(raw) != size:
        raise ValueError(f"tensor '{name}' holds {len(raw)} bytes instead of {size}")
    return name, np.frombuffer(raw, dtype).reshape(dims).copy()


def read_ort_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """Return trained and frozen parameters of a `.checkpoint` file by name.

    Raises UserError when the file is no such checkpoint, or damaged.
    """
    data = Path(path).read_bytes()
    if data[4:8] != IDENTIFIER:
        raise UserError(f"'{path}' is not an ONNX Runtime training checkpoint")
    try:
        file = _Table(data, 0)
        root = file.table(0)
        module = root.table(root.field(1))
        tensors = [*module.tables(0), *module.tables(1)]
        return dict(_array(tensor, Path(f"{path}.data")) for tensor in tensors)
    except (struct.error, ValueError, TypeError, OSError, KeyError) as e:
        raise UserError(f"'{path}' is a damaged ONNX Runtime training checkpoint: {e}") from e
