"""Data sets in memory, of the libraries that people have them in: told by what they can do, none is imported.

Arrow's tables, record batches and data sets, pandas' frames, Hugging Face's data sets, and lists of rows.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

from kfac_onnx.data.arrow import block_of, pyarrow
from kfac_onnx.data.lists import Lists, column_of_values
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kfac_onnx.data.lists import Block, Column
    from kfac_onnx.data.source import Source

__all__ = ["host_value", "source_of", "values_of_rows"]

ROWS: Final = 1 << 14
"""Rows of a piece."""


def _pieces(rows: int) -> list[int]:
    return [min(ROWS, rows - start) for start in range(0, rows, ROWS)]


class ArrowTable:
    """A table of Arrow's."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self.names: tuple[str, ...] = tuple(table.column_names)
        self.rows = _pieces(table.num_rows)

    def read(self, piece: int, columns: Sequence[str]) -> Iterator[Block]:
        """Yield a range of rows."""
        yield block_of(self._table.slice(piece * ROWS, self.rows[piece]), columns, "the table")


class ArrowDataset:
    """A data set of Arrow's: a piece is a fragment."""

    def __init__(self, dataset: Any) -> None:
        self._schema = dataset.schema
        self._fragments: list[Any] = list(dataset.get_fragments())
        self.names: tuple[str, ...] = tuple(dataset.schema.names)
        self.rows: list[int] = [fragment.count_rows() for fragment in self._fragments]

    def read(self, piece: int, columns: Sequence[str]) -> Iterator[Block]:
        """Yield the rows of a fragment."""
        batches = self._fragments[piece].to_batches(
            schema=self._schema, columns=list(columns), batch_size=ROWS, use_threads=False, batch_readahead=1
        )
        for batch in batches:
            yield block_of(batch, columns, "the data set")


class HuggingFaceDataset:
    """A data set of Hugging Face's with a length, whatever its indices and its format are."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset.with_format("arrow")
        self.names: tuple[str, ...] = tuple(dataset.column_names)
        self.rows = _pieces(len(dataset))

    def read(self, piece: int, columns: Sequence[str]) -> Iterator[Block]:
        """Yield a range of rows."""
        start = piece * ROWS
        yield block_of(self._dataset[start : start + self.rows[piece]], columns, "the data set")


class Frame:
    """A frame of pandas'."""

    def __init__(self, frame: Any) -> None:
        self._frame = frame
        self.names: tuple[str, ...] = tuple(map(str, frame.columns))
        self.rows = _pieces(len(frame))

    def read(self, piece: int, columns: Sequence[str]) -> Iterator[Block]:
        """Yield a range of rows."""
        part = self._frame.iloc[piece * ROWS : piece * ROWS + self.rows[piece]]
        yield {name: _array_column(name, np.asarray(part[name])) for name in columns}


class Arrays:
    """Arrays, or lists, by the name of their column."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._columns = {name: _array_column(name, host_value(array)) for name, array in arrays.items()}
        self.names = tuple(self._columns)
        sizes = {name: len(column) for name, column in self._columns.items()}
        if len(set(sizes.values())) != 1:
            raise UserError(f"the columns have different numbers of rows: {sizes}")
        self.rows = _pieces(next(iter(sizes.values())))

    def read(self, piece: int, columns: Sequence[str]) -> Iterator[Block]:
        """Yield a range of rows."""
        rows = slice(piece * ROWS, piece * ROWS + self.rows[piece])
        block: Block = {}
        for name in columns:
            column = self._columns[name]
            block[name] = column.rows(rows) if isinstance(column, Lists) else column[rows]
        yield block


class RowList:
    """Rows as mappings, which can be reached by number."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        self.names = tuple(values_of_rows([rows[0]])) if len(rows) else ()
        self.rows = _pieces(len(rows))

    def read(self, piece: int, columns: Sequence[str]) -> Iterator[Block]:
        """Yield a range of rows."""
        start = piece * ROWS
        values = values_of_rows([self._rows[index] for index in range(start, start + self.rows[piece])])
        yield {name: column_of_values(name, values[name], "the rows") for name in columns}


def _array_column(name: str, values: Any) -> Column:
    if isinstance(values, np.ndarray):
        array = cast("np.ndarray", values)
        if array.dtype.kind in "biuf":
            return array
        if array.dtype.kind == "U":
            return array.astype(object)
    return column_of_values(name, list(cast("Sequence[Any]", values)), "the data")


def host_value(value: Any) -> Any:
    """Return a tensor of PyTorch's or TensorFlow's as an array, and anything else as it is."""
    if type(value).__module__ == "numpy":
        return value
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # which NumPy has no type of its own for
            return value.view(sys.modules["torch"].uint16).numpy()
    return value.numpy() if hasattr(value, "numpy") and not hasattr(value, "iloc") else value


def values_of_rows(rows: Sequence[Any]) -> dict[str, list[Any]]:
    """Return the values of rows by column.

    Raises UserError where a row is no mapping, or has other columns than the first.
    """
    for row in rows:
        if not isinstance(row, Mapping):
            raise UserError(
                f"a row is a mapping from columns to values, not of type {type(row).__name__}",
                help="name its parts: ({'users': row[0], 'items': row[1]} for row in rows)",
            )
    mappings = cast("Sequence[Mapping[str, Any]]", rows)
    names = list(mappings[0])
    for row in mappings:
        if missing := set(names) ^ set(row):
            raise UserError(f"column '{min(map(str, missing))}' is in some of the rows only")
    return {str(name): [host_value(row[name]) for row in mappings] for name in names}


def source_of(data: Any) -> Source | None:
    """Return the rows of data with a length as a source; None for what can only be iterated."""
    if hasattr(data, "get_fragments") and hasattr(data, "schema"):
        return ArrowDataset(data)
    if hasattr(data, "with_format") and hasattr(data, "column_names") and hasattr(data, "__len__"):
        return HuggingFaceDataset(data)
    if hasattr(data, "num_rows") and hasattr(data, "slice") and hasattr(data, "schema"):
        if hasattr(data, "column_names"):
            return ArrowTable(data)
        return ArrowTable(pyarrow().Table.from_batches([data]))
    if hasattr(data, "iloc") and hasattr(data, "columns"):
        return Frame(data)
    if isinstance(data, Mapping):
        return Arrays(cast("Mapping[str, Any]", data))
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)):
        return RowList(data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not hasattr(data, "shape"):
        return RowList(data)  # a map-style data set of PyTorch's
    return None
