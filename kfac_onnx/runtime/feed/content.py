"""Is this the data that a run began with? Shapes do not tell, so a sample of the entries is hashed."""

from __future__ import annotations

import hashlib
import zipfile
from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

__all__ = ["content_of_arrays", "content_of_files"]

WHOLE: Final = 1 << 26
"""Bytes of an array up to which all of it is hashed; of a larger one, rows at even distances and the last."""


def content_of_arrays(arrays: Mapping[str, np.ndarray]) -> int:
    """Return a number of 48 bits that arrays in memory have in common with no others."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        if array.ndim and array.nbytes > WHOLE:
            stride = -(-array.nbytes // WHOLE)
            array = np.concatenate([array[::stride], array[-1:]])
        digest.update(np.ascontiguousarray(array).tobytes())
    return _number(digest.digest())


def content_of_files(paths: Iterable[Path]) -> int:
    """Return the same for `.npz` files, in order: by the checksums of their members, without reading those.

    Raises UserError where a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with zipfile.ZipFile(path) as file:
                members = sorted((item.filename, item.CRC, item.file_size) for item in file.infolist())
        except (OSError, zipfile.BadZipFile) as e:
            raise UserError(f"'{path}' cannot be read: {first_line(e)}") from e
        digest.update(repr(members).encode())
    return _number(digest.digest())


def _number(digest: bytes) -> int:
    """Return the beginning of a checksum as a number: what a checkpoint says of data are numbers."""
    return int.from_bytes(digest[:6], "big")
