"""Tables of comma- or tab-separated values, with names in their first line (RFC 4180).

The types of the columns are those of the inputs that they fill; of others they are told by their text.

Source: https://www.rfc-editor.org/rfc/rfc4180
"""

from __future__ import annotations

import csv
import io
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final

from kfac_onnx.data.arrow import DAMAGE, block_of, pyarrow
from kfac_onnx.data.formats.chunks import chunks_of, read_chunk
from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from kfac_onnx.data.formats.chunks import Chunk
    from kfac_onnx.data.lists import Block
    from kfac_onnx.data.source import Source, Types

__all__ = ["open_csv", "open_tsv"]

LONGEST: Final = 1 << 20
"""Bytes that the line of names may have."""


class Delimited:
    """A file of lines, cells of which are parted by `mark`."""

    def __init__(self, path: Path, types: Types, mark: str) -> None:
        self._path, self._types, self._mark = path, types, mark
        try:
            with path.open("rb") as file:
                line = file.readline(LONGEST)
        except OSError as e:
            raise UserError(f"'{path}' cannot be read: {first_line(e)}") from e
        cells: list[str] = []
        try:
            cells = next(csv.reader([line.decode("utf-8-sig")], delimiter=mark), cells)
        except (UnicodeDecodeError, csv.Error) as e:
            raise UserError(f"the first line of '{path}' is no line of names: {first_line(e)}") from e
        self.names = tuple(cell.strip() for cell in cells)
        self._check_names()
        self._begin = len(line)

    @cached_property
    def _chunks(self) -> list[Chunk]:
        return chunks_of(self._path, quoted=True, begin=self._begin, first_line=2)

    @cached_property
    def _rows(self) -> list[int]:
        return [chunk.rows for chunk in self._chunks]

    @property
    def rows(self) -> list[int]:
        """How many rows each piece has."""
        return self._rows

    def _check_names(self) -> None:
        for name in self.names:
            try:
                float(name)
            except ValueError:
                continue
            raise UserError(
                f"the first line of '{self._path}' holds the number {name}, not the name of a column",
                help="write a first line with the columns' names",
            )
        if "" in self.names or len(set(self.names)) < len(self.names):
            raise UserError(f"the first line of '{self._path}' does not name each column once")

    def read(self, piece: int, columns: Sequence[str]) -> Iterator[Block]:
        """Yield the records of a piece."""
        arrow, library = pyarrow(), pyarrow("pyarrow.csv")
        chunk = self._chunks[piece]
        data = read_chunk(self._path, chunk)
        types: dict[str, Any] = {}
        for name in columns:
            if name in self._types:
                dtype = self._types[name]
                types[name] = arrow.string() if dtype is None else arrow.from_numpy_dtype(dtype)
        place = f"'{self._path}', lines from {chunk.line} on"
        try:
            table = library.read_csv(
                io.BytesIO(data),
                read_options=library.ReadOptions(
                    column_names=list(self.names), block_size=max(len(data), 1), use_threads=False
                ),
                parse_options=library.ParseOptions(delimiter=self._mark, newlines_in_values=True),
                convert_options=library.ConvertOptions(column_types=types, include_columns=list(columns)),
            )
        except DAMAGE as e:
            raise UserError(f"{place} cannot be read: {first_line(e)}") from e
        if table.num_rows != chunk.rows:
            raise UserError(f"{place} hold {table.num_rows} rows instead of {chunk.rows}")
        yield block_of(table, columns, place)


def _open(path: Path, types: Types, *, mark: str) -> Source:
    pyarrow("pyarrow.csv")
    return Delimited(path, types, mark)


open_csv = partial(_open, mark=",")
"""Return the source of a file of comma-separated values."""
open_tsv = partial(_open, mark="\t")
"""Return the source of a file of tab-separated values."""
