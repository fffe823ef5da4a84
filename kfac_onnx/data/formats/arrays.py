"""NumPy's files: a folder with one `.npy` per column, and `.npz` files of arrays by column.

Source: numpy.lib.format, NEP 1, https://numpy.org/neps/nep-0001-npy-format.html
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.disk.npz import npz_headers, read_npz
from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from kfac_onnx.data.lists import Block
    from kfac_onnx.data.source import Source, Types

__all__ = ["open_npy_folder", "open_npz", "refuse_single_npy"]

ROWS: Final = 1 << 16
"""Rows of a piece."""


def _common_rows(sizes: dict[str, int], place: Path) -> int:
    if not sizes:
        raise UserError(f"'{place}' holds no rows: no array has a dimension")
    first, size = next(iter(sizes.items()))
    for name, other in sizes.items():
        if other != size:
            raise UserError(
                f"'{place}' holds {size} rows of '{first}' and {other} of '{name}'",
                help="the first dimension of every array is the row",
            )
    return size


class NpyFolder:
    """A folder of arrays, of each of which a range of rows can be read."""

    def __init__(self, path: Path) -> None:
        self._files = {file.stem: file for file in sorted(path.glob("*.npy"))}
        sizes: dict[str, int] = {}
        for name in self._files:
            array = self._array(name)
            if array.ndim == 0:
                raise UserError(f"'{self._files[name]}' holds no rows: its array has no dimension")
            sizes[name] = len(array)
        self._rows = _common_rows(sizes, path)
        self.names = tuple(self._files)
        self.rows = [min(ROWS, self._rows - start) for start in range(0, self._rows, ROWS)]

    def _array(self, name: str) -> np.ndarray:
        try:
            # Mapped, and for a short time: pages that were read count as memory while they are.
            return np.load(self._files[name], mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise UserError(f"'{self._files[name]}' is not a readable .npy file: {first_line(e)}") from e

    def read(self, piece: int, columns: Sequence[str]) -> Iterator[Block]:
        """Yield the rows of a piece."""
        rows = slice(piece * ROWS, piece * ROWS + self.rows[piece])
        yield {name: np.array(self._array(name)[rows]) for name in columns}


class Npz:
    """A file of arrays, which is read as a whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        sizes = {header.name: header.shape[0] for header in npz_headers(path) if header.shape}
        self.rows = [_common_rows(sizes, path)]
        self.names = tuple(sizes)

    def read(self, piece: int, columns: Sequence[str]) -> Iterator[Block]:
        """Yield all rows."""
        arrays = read_npz(self._path)
        yield {name: arrays[name] for name in columns}


def open_npy_folder(path: Path, types: Types) -> Source:
    """Return the source of a folder of `.npy` files, each a column by its name."""
    return NpyFolder(path)


def open_npz(path: Path, types: Types) -> Source:
    """Return the source of an `.npz` file."""
    return Npz(path)


def refuse_single_npy(path: Path, types: Types) -> Source:
    """Raise UserError about an `.npy` file that was named alone: which input it fills is not said."""
    raise UserError(
        f"'{path}' is a single array, which does not say whose it is",
        help=f"name the folder, whose files are named after their inputs: --data {path.parent}",
    )
