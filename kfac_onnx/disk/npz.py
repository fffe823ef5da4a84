"""What an `.npz` file holds, from the headers of its arrays alone.

An `.npz` file is a zip archive of `.npy` files; each begins with a header that gives dtype, shape and
order. The header is held against the size that the archive gives for the entry, and that against the
machine's memory, before anything of that size is made. Python objects (pickles) are never read.

Source: numpy.lib.format; NEP 1.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kfac_onnx.disk.conversions import refuse_other_format
from kfac_onnx.disk.memory import array_problem, require_memory
from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from pathlib import Path
    from typing import IO

    import numpy as np

__all__ = ["ARCHIVE_ERRORS", "Header", "npz_headers", "read_npz"]

ARCHIVE_ERRORS: Final = (
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,  # a compression that Python lacks
    RuntimeError,  # an encrypted entry
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading a damaged zip archive raises."""


@dataclass(frozen=True)
class Header:
    """An array in an archive: its entry, and where in the unpacked entry its data begins."""

    member: str
    name: str
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def npz_headers(path: str | Path) -> list[Header]:
    """Return the headers of the arrays in a file, in its order.

    Raises UserError when the file is missing, damaged, no such file, holds Python objects, or promises more
    than it holds or than fits into memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [_header(archive, info) for info in archive.infolist()]
    except FileNotFoundError as e:
        raise UserError(f"there is no file '{path}'") from e
    except ARCHIVE_ERRORS as e:
        refuse_other_format(path, "arrays")
        objects = "holds Python objects" in str(e)
        raise UserError(
            f"'{path}' is not a readable .npz file: {first_line(e)}",
            help="save numbers or texts: array.astype(str) of strings" if objects else None,
        ) from e


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Header:
    member = info.filename
    with archive.open(info) as entry:
        shape, fortran, dtype = _read(member, entry)
        offset = entry.tell()
    if dtype.hasobject:
        raise ValueError(f"array '{member}' holds Python objects")
    if (problem := array_problem(shape, dtype)) is not None:
        raise ValueError(f"array '{member}' is of no shape that an array can have: {problem}")
    found = Header(member, member.removesuffix(".npy"), shape, fortran, dtype, offset)
    if offset + found.nbytes > info.file_size:
        held = max(info.file_size - offset, 0)
        raise ValueError(
            f"array '{member}' of shape {list(shape)} holds {held} bytes instead of {found.nbytes}"
        )
    require_memory(found.nbytes, f"array '{member}' of '{archive.filename}'")
    return found


def _read(member: str, entry: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    import numpy as np

    try:
        version = np.lib.format.read_magic(entry)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        return read(entry)
    except (SyntaxError, TypeError, KeyError, IndexError, OverflowError, RecursionError, MemoryError) as e:
        raise ValueError(
            f"the header of array '{member}' is not readable"
        ) from e  # NumPy parses it as Python
    except tokenize.TokenError as e:
        raise ValueError(f"the header of array '{member}' is not readable") from e


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Return the arrays of an `.npz` file by name; objects are refused.

    Raises UserError when the file is missing, damaged or something else.
    """
    import numpy as np

    headers = npz_headers(path)
    require_memory(sum(header.nbytes for header in headers), f"'{path}'")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {header.name: archive[header.member] for header in headers}
    except (*ARCHIVE_ERRORS, KeyError) as e:
        raise UserError(f"'{path}' is not a readable .npz file: {first_line(e)}") from e
