"""Arrays that lie in a file and are read piece by piece into memory that is already there.

A table may be most of a machine's memory. Reading it whole and then copying it into its buffer would take it
twice; mapping the file would count it twice too. So readers of weights and checkpoints hand out
`StoredArray`s, and a buffer fills itself from one.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import ml_dtypes
import numpy as np

from kfac_onnx.disk.memory import array_problem
from kfac_onnx.disk.npz import ARCHIVE_ERRORS, npz_headers
from kfac_onnx.disk.records import parse
from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import BinaryIO

__all__ = ["Array", "StoredArray", "bytes_of", "npz_arrays", "safetensors_arrays", "write_safetensors"]

PIECE: Final = 1 << 24
"""Bytes that are read or written at once."""

_NO_COPY: Final = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors that say that the system cannot copy from this file to that one."""

_LARGEST_HEADER: Final = 100_000_000
"""Bytes: the limit that the safetensors format itself sets."""

_SAFETENSORS: Final[dict[str, Any]] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
}


@dataclass(frozen=True)
class StoredArray:
    """An array of `shape` and `dtype` at byte `offset` of a file, in C order and little-endian.

    `member` names the entry of a zip archive that it lies in (it may be compressed); None for a plain file.
    `np.asarray` of one reads it whole.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    member: str | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def read_into(self, target: np.ndarray) -> None:
        """Fill an array of this shape and dtype (C order).

        Raises UserError when the file has become shorter, or can no longer be read.
        """
        view = bytes_of(target)
        try:
            if self.member is None:
                with self.path.open("rb") as file:
                    file.seek(self.offset)
                    self._fill(file, view)
            else:
                with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as entry:
                    entry.read(self.offset)
                    self._fill(entry, view)
        except ARCHIVE_ERRORS as e:
            raise UserError(f"'{self.path}' cannot be read: {first_line(e)}") from e

    def pieces(self) -> Iterator[memoryview]:
        """Yield the bytes of the array in pieces, each in the place of the one before.

        Raises UserError as `read_into`.
        """
        piece = np.empty(min(PIECE, self.nbytes), np.uint8)
        for start in range(0, self.nbytes, PIECE):
            size = min(PIECE, self.nbytes - start)
            part = StoredArray(self.path, self.offset + start, (size,), piece.dtype, self.member)
            part.read_into(piece[:size])
            yield bytes_of(piece[:size])

    def _fill(self, file: Any, view: memoryview) -> None:
        for start in range(0, len(view), PIECE):
            piece = view[start : start + PIECE]
            done = 0
            while done < len(piece):
                count = file.readinto(piece[done:])
                if not count:
                    raise UserError(f"'{self.path}' is cut short: it ends within an array")
                done += count

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read the array whole."""
        result = np.empty(self.shape, self.dtype)
        self.read_into(result)
        return result if dtype is None else result.astype(dtype, copy=False)


Array: TypeAlias = np.ndarray | StoredArray
"""Values of a parameter: in memory, or in a file."""


def bytes_of(array: np.ndarray) -> memoryview:
    """Return the bytes of a contiguous array as they lie in memory; no copy is made."""
    return array.reshape(-1).view(np.uint8).data


def safetensors_arrays(path: str | Path) -> tuple[dict[str, StoredArray], dict[str, str]]:
    """Return the arrays of a safetensors file, and its metadata.

    The format: 8 bytes with the length of a JSON header, the header, the data; each entry of the header
    gives dtype, shape and its first and last byte within the data (https://github.com/safetensors).

    Raises ValueError when the file is not one, OSError when it cannot be read.
    """
    place = Path(path)
    about = place.stat()
    size = about.st_size
    if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):  # a folder says so when it is opened
        raise ValueError("it is no regular file")  # a pipe would be waited for
    with place.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _LARGEST_HEADER):
            raise ValueError("its header is longer than the file")
        header = parse(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    entries: dict[str, Any] = header  # pyright: ignore[reportUnknownVariableType]  JSON
    notes: Any = entries.pop("__metadata__", {})
    if not isinstance(notes, dict):
        raise ValueError("its notes are no JSON object")
    arrays = {
        name: _safetensors_entry(place, name, entry, 8 + length, size) for name, entry in entries.items()
    }
    return arrays, {str(key): str(value) for key, value in notes.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]  JSON


def _safetensors_entry(path: Path, name: str, entry: Any, start: int, size: int) -> StoredArray:
    try:
        dtype = np.dtype(_SAFETENSORS[entry["dtype"]])
        shape = tuple(entry["shape"])
        first, last = (int(place) for place in entry["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise ValueError(f"the entry of tensor '{name}' is not readable") from e
    if (problem := array_problem(shape, dtype)) is not None:
        raise ValueError(f"tensor '{name}' is of no shape that an array can have: {problem}")
    array = StoredArray(path, start + first, shape, dtype)
    if first < 0 or last - first != array.nbytes or start + last > size:
        raise ValueError(f"tensor '{name}' does not lie within the file")
    return array


def npz_arrays(path: str | Path) -> dict[str, Array]:
    """Return the arrays of an `.npz` file; those stored by columns are read, objects (pickles) refused.

    Raises UserError when it is missing, damaged or not such a file.
    """
    return dict(_npz_entries(Path(path)))


def _npz_entries(path: Path) -> Iterator[tuple[str, Array]]:
    for item in npz_headers(path):
        if item.fortran:
            by_columns = StoredArray(path, item.offset, item.shape[::-1], item.dtype, item.member)
            yield item.name, np.ascontiguousarray(np.asarray(by_columns).T)
        else:
            yield item.name, StoredArray(path, item.offset, item.shape, item.dtype, item.member)


def write_safetensors(path: Path, tensors: Mapping[str, Array], notes: Mapping[str, str]) -> None:
    """Write arrays, some of which lie in files, as a safetensors file; those of files first, at a page.

    A stretch of a file is copied by the system, which shares its blocks where the file system can (reflink).
    Raises OSError when the disk is full.
    """
    names = sorted(tensors, key=lambda name: not isinstance(tensors[name], StoredArray))
    place = 0
    entries: dict[str, Any] = {"__metadata__": dict(notes)}
    codes = {np.dtype(dtype): code for code, dtype in _SAFETENSORS.items()}
    for name in names:
        array = tensors[name]
        size = array.nbytes
        entries[name] = {
            "dtype": codes[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [place, place + size],
        }
        place += size
    header = json.dumps(entries).encode()
    header += b" " * (-(8 + len(header)) % 4096)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name in names:
            array = tensors[name]
            if not isinstance(array, StoredArray):
                file.write(bytes_of(np.ascontiguousarray(array)))
            elif not _copied(array, file):
                for piece in array.pieces():
                    file.write(piece)


def _copied(array: StoredArray, file: BinaryIO) -> bool:
    """Let the system append an array's bytes to a file; False where it cannot, with nothing appended."""
    if array.member is not None or not hasattr(os, "copy_file_range"):
        return False
    file.flush()
    done = 0
    with array.path.open("rb") as source:
        while done < array.nbytes:
            try:
                count = os.copy_file_range(
                    source.fileno(), file.fileno(), array.nbytes - done, array.offset + done
                )
            except OSError as e:
                if done == 0 and e.errno in _NO_COPY:
                    return False
                raise
            if count == 0:
                raise OSError(errno.EIO, f"'{array.path}' ends within an array")
            done += count
    return True
