"""Tensors that stay in their file: a graph is read, changed and written without its weights in memory.

`numpy` of a `MappedTensor` is a mapping of the file that is made anew at each call and goes with the array,
so that a model never holds pages. Pages that were read count as the process's own until they are given
back: `windows` walks an array in pieces and gives each back before the next.
"""

from __future__ import annotations

import hashlib
import mmap
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx_ir as ir

from kfac_onnx.disk.stored import StoredArray

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = [
    "LEAST",
    "MappedTensor",
    "all_same",
    "digest",
    "equal",
    "greatest",
    "is_mappable",
    "map_initializers",
    "pieces_of",
    "windows",
]

LEAST: Final = 1 << 20
"""Bytes from which on a tensor stays in its file: below, opening the file costs more than reading it."""

_WINDOW: Final = 1 << 24
"""Bytes that are looked at at once."""


def is_mappable(element: int, size: int) -> bool:
    """Say whether a tensor of an ONNX element type and so many bytes is worth a mapping, and can have one.

    Types of less than a byte are unpacked when they are read, so that the file is no array of theirs.
    """
    dtype = ir.DataType(element)
    return size >= LEAST and dtype != ir.DataType.STRING and dtype.bitwidth >= 8


class MappedTensor(ir.LazyTensor):
    """A tensor of `shape` and `dtype` at a place in a file, little-endian and in C order."""

    def __init__(self, stored: StoredArray, dtype: ir.DataType, name: str | None) -> None:
        super().__init__(self._array, dtype, ir.Shape(stored.shape), name=name)
        self.stored = stored

    def _array(self) -> ir.TensorProtocol:
        return ir.Tensor(self.numpy(), self.dtype, shape=self.shape, name=self.name)

    def numpy(self) -> np.ndarray:
        """Return a read-only mapping of the data."""
        stored = self.stored
        return np.memmap(stored.path, stored.dtype, "r", stored.offset, stored.shape)

    def tobytes(self) -> bytes:
        """Return the data, read whole."""
        return np.asarray(self.stored).tobytes()

    def tofile(self, file: Any) -> None:
        """Write the data to a file, piece by piece."""
        for piece in self.stored.pieces():
            file.write(piece)

    def __repr__(self) -> str:
        return f"MappedTensor({self.stored!r}, name={self.name!r})"


def map_initializers(model: ir.Model, folder: Path) -> None:
    """Let the initializers whose data lie in other files below `folder` be mappings of them."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            stored = StoredArray(
                folder / str(tensor.location),  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]  its PathLike has no parameter
                tensor.offset or 0,
                tuple(tensor.shape.numpy()),
                np.dtype(tensor.dtype.numpy()),
            )
            value.const_value = MappedTensor(stored, tensor.dtype, tensor.name)


def pieces_of(tensor: ir.TensorProtocol) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a tensor as ONNX stores them, those of a mapped one in pieces."""
    if isinstance(tensor, MappedTensor):
        yield from tensor.stored.pieces()
    else:
        yield tensor.tobytes()


def digest(tensor: ir.TensorProtocol) -> bytes:
    """Return the SHA-256 of a tensor's bytes."""
    state = hashlib.sha256()
    for piece in pieces_of(tensor):
        state.update(piece)
    return state.digest()


def windows(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield pieces of arrays of one length along their first axis; pages of a mapping are given back."""
    first = arrays[0]
    if first.ndim == 0:
        yield arrays
        return
    count = max(1, _WINDOW // max(1, max(array[:1].nbytes for array in arrays)))
    mappings = [mapping for array in arrays if (mapping := _mapping_of(array)) is not None]
    for start in range(0, len(first), count):
        yield tuple(array[start : start + count] for array in arrays)
        for mapping in mappings:
            mapping.madvise(mmap.MADV_DONTNEED)  # of a mapping that is never written: it is read again


def _mapping_of(array: np.ndarray) -> mmap.mmap | None:
    """Return the read-only mapping that an array lies in; None for one in memory."""
    base: Any = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap) and base.mode != "r":
            return None
        base = base.base
    return base if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") else None


def all_same(array: np.ndarray) -> bool:
    """Say whether all entries of an array equal its first one; True without entries."""
    if not array.size:
        return True
    first = array.reshape(-1)[0]
    return all(bool(np.all(piece == first)) for (piece,) in windows(array))


def equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Say what `numpy.array_equal` says."""
    if one.shape != other.shape:
        return False
    return all(np.array_equal(first, second) for first, second in windows(one, other))


def greatest(array: np.ndarray) -> float:
    """Return the largest magnitude in an array; 0 without entries, NaN where one is NaN."""
    return float(np.max([np.max(np.abs(piece), initial=0.0) for (piece,) in windows(array)], initial=0.0))
