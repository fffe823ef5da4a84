"""Read the parameters in ONNX Runtime's training checkpoint, a flatbuffer.

The layout (ONNX Runtime's schema `ort_training_checkpoint.fbs`, identifier `ODTC`), as far as it is needed
here; numbers are field positions in each table:

    Checkpoint   0 version   1 module_state   2 optimizer groups   3 property bag
    ModuleState  0 requires_grad_params   1 frozen_params   (vectors of Tensor)
    Tensor       0 name   1 doc   2 dims (int64)   3 data_type (int32, ONNX's)   4 raw_data (bytes)
                 6 external_data_offset (int64), then the data lies in `<file>.data`
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.errors import UserError
from kfac_onnx.runtime.tensors import numpy_dtype

if TYPE_CHECKING:
    from flatbuffers.table import Table

__all__ = ["read_ort_checkpoint"]

IDENTIFIER: Final = b"ODTC"


def _field(table: Table, position: int) -> int:
    """Return the absolute place of a field, 0 where the table leaves it out."""
    offset = table.Offset(4 + 2 * position)
    return 0 if offset == 0 else offset + table.Pos


def _array(table: Table, data_file: Path) -> tuple[str, np.ndarray]:
    from flatbuffers import number_types

    name = bytes(table.String(_field(table, 0))).decode()
    dims_at, type_at, raw_at, external_at = (_field(table, position) for position in (2, 3, 4, 6))
    start = table.Vector(dims_at - table.Pos) if dims_at else 0
    count = table.VectorLen(dims_at - table.Pos) if dims_at else 0
    dims = struct.unpack_from(f"<{count}q", table.Bytes, start)
    dtype = numpy_dtype(int(table.Get(number_types.Int32Flags, type_at)))
    size = int(np.prod(dims, dtype=np.int64)) * dtype.itemsize
    if external_at:
        place = int(table.Get(number_types.Int64Flags, external_at))
        with data_file.open("rb") as file:
            file.seek(place)
            raw = file.read(size)
    else:
        first = table.Vector(raw_at - table.Pos)
        raw = bytes(table.Bytes[first : first + table.VectorLen(raw_at - table.Pos)])
    if len(raw) != size:
        raise ValueError(f"tensor '{name}' holds {len(raw)} bytes instead of {size}")
    return name, np.frombuffer(raw, dtype).reshape(dims).copy()


def read_ort_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """Return trained and frozen parameters of a `.checkpoint` file by name.

    Raises UserError when the file is no such checkpoint, or damaged.
    """
    from flatbuffers.table import Table

    data = Path(path).read_bytes()
    if data[4:8] != IDENTIFIER:
        raise UserError(f"'{path}' is not an ONNX Runtime training checkpoint")
    result: dict[str, np.ndarray] = {}
    try:
        root = Table(data, struct.unpack_from("<I", data, 0)[0])
        module = Table(data, root.Indirect(_field(root, 1)))
        for position in (0, 1):
            place = _field(module, position)
            if not place:
                continue
            first = module.Vector(place - module.Pos)
            for index in range(module.VectorLen(place - module.Pos)):
                tensor = Table(data, module.Indirect(first + 4 * index))
                name, array = _array(tensor, Path(f"{path}.data"))
                result[name] = array
    except (struct.error, IndexError, ValueError, TypeError, OSError, KeyError) as e:
        raise UserError(f"'{path}' is a damaged ONNX Runtime training checkpoint: {e}") from e
    return result
