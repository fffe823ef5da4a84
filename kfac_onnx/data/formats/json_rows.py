"""JSON lines: an object per line, the same keys in each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from kfac_onnx.data.formats.chunks import chunks_of, read_chunk
from kfac_onnx.data.lists import column_of_values
from kfac_onnx.disk.records import parse
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from kfac_onnx.data.lists import Block
    from kfac_onnx.data.source import Source, Types

__all__ = ["open_json_lines"]


class JsonLines:
    """A file of JSON lines; the first one tells the columns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._chunks = chunks_of(path, quoted=False)
        self.rows = [chunk.rows for chunk in self._chunks]
        if not self._chunks:
            raise UserError(f"'{path}' holds no rows")
        self.names = tuple(next(self._objects(0))[1])

    def _objects(self, piece: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the objects of a piece, and the line of each."""
        chunk = self._chunks[piece]
        for number, line in enumerate(read_chunk(self._path, chunk).split(b"\n"), chunk.line):
            if not line.strip(b"\r"):
                continue
            try:
                row = parse(line)
            except ValueError as e:
                raise UserError(f"line {number} of '{self._path}' cannot be read: {e}") from e
            if not isinstance(row, dict):
                raise UserError(f"line {number} of '{self._path}' holds no object with a value per column")
            yield number, cast("dict[str, Any]", row)

    def read(self, piece: int, columns: Sequence[str]) -> Iterator[Block]:
        """Yield the rows of a piece."""
        values: dict[str, list[Any]] = {name: [] for name in columns}
        for number, row in self._objects(piece):
            for name, column in values.items():
                if row.get(name) is None:
                    raise UserError(
                        f"line {number} of '{self._path}' has no value of '{name}'",
                        help="leave such rows out, or write the value that is meant",
                    )
                column.append(row[name])
        place = f"'{self._path}'"
        yield {name: column_of_values(name, column, place) for name, column in values.items()}


def open_json_lines(path: Path, types: Types) -> Source:
    """Return the source of a file of JSON lines."""
    return JsonLines(path)
