"""Parquet: a piece is a row group, which is decoded page by page.

Source: Apache Parquet file format, https://parquet.apache.org/docs/file-format/
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from kfac_onnx.data.arrow import DAMAGE, block_of, pyarrow
from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from kfac_onnx.data.lists import Block
    from kfac_onnx.data.source import Source, Types

__all__ = ["open_parquet"]

ROWS: Final = 1 << 14
"""Rows of a block."""


class ParquetFile:
    """One file; its footer is read at once, everything else when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with self._opened() as file:
                self.names: tuple[str, ...] = tuple(file.schema_arrow.names)
                groups = file.metadata.num_row_groups
                self.rows: list[int] = [file.metadata.row_group(index).num_rows for index in range(groups)]
        except DAMAGE as e:
            raise UserError(f"'{path}' is not a readable Parquet file: {first_line(e)}") from e

    def _opened(self) -> Any:
        # A buffer of its own for each column instead of whole column chunks in memory at once.
        return pyarrow("pyarrow.parquet").ParquetFile(self._path, buffer_size=1 << 16, pre_buffer=False)

    def read(self, piece: int, columns: Sequence[str]) -> Iterator[Block]:
        """Yield the rows of a row group."""
        try:
            with self._opened() as file:
                batches = file.iter_batches(
                    ROWS, row_groups=[piece], columns=self._paths(columns), use_threads=False
                )
                for batch in batches:
                    yield block_of(batch, columns, f"'{self._path}'")
        except DAMAGE as e:
            raise UserError(f"'{self._path}' is not a readable Parquet file: {first_line(e)}") from e

    @cached_property
    def _leaves(self) -> dict[str, list[str]]:
        leaves: dict[str, list[str]] = {}
        with self._opened() as file:
            for index in range(len(file.schema)):
                path = file.schema.column(index).path
                top = next((name for name in self.names if path == name or path.startswith(f"{name}.")), path)
                leaves.setdefault(top, []).append(path)
        return leaves

    def _paths(self, columns: Sequence[str]) -> list[str]:
        # A name with a dot would be taken for a field of a struct.
        return [path for name in columns for path in self._leaves.get(name, [name])]


def open_parquet(path: Path, types: Types) -> Source:
    """Return the source of a Parquet file; its types are its own."""
    return ParquetFile(path)
