"""Columns of rows: arrays, or lists of different lengths as their values and lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Block", "Column", "Lists", "column_of_values", "concatenated", "rows_of", "taken_rows"]


@dataclass(frozen=True)
class Lists:
    """Lists of different lengths, one per row: their values one after another, and `lengths` int64[rows]."""

    values: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> np.ndarray:
        """Where each list begins among the values: int64[rows]."""
        return np.cumsum(self.lengths) - self.lengths

    def rows(self, index: np.ndarray | slice) -> Lists:
        """Return the lists of these rows, in their order."""
        lengths = self.lengths[index]
        if isinstance(index, slice):
            starts = self.starts
            first = int(starts[index][0]) if len(lengths) else 0
            return Lists(self.values[first : first + int(lengths.sum())], lengths)
        ends = np.cumsum(lengths)
        within = np.arange(int(lengths.sum())) - np.repeat(ends - lengths, lengths)
        return Lists(self.values[np.repeat(self.starts[index], lengths) + within], lengths)


Column = np.ndarray | Lists
Block = dict[str, Column]
"""Columns of the same rows, by name."""


def rows_of(block: Block) -> int:
    """Return how many rows a block has."""
    return len(next(iter(block.values()))) if block else 0


def taken_rows(block: Block, index: np.ndarray | slice) -> Block:
    """Return these rows of a block."""
    return {
        name: column.rows(index) if isinstance(column, Lists) else column[index]
        for name, column in block.items()
    }


def concatenated(blocks: Sequence[Block]) -> Block:
    """Return the rows of several blocks as one; raises UserError where their columns do not fit together."""
    if len(blocks) == 1:
        return blocks[0]
    return {name: _joined(name, [block[name] for block in blocks]) for name in blocks[0]}


def _joined(name: str, columns: list[Column]) -> Column:
    arrays = [column for column in columns if isinstance(column, np.ndarray)]
    if len(arrays) < len(columns):
        lists = [column if isinstance(column, Lists) else _as_lists(name, column) for column in columns]
        return Lists(
            np.concatenate([part.values for part in lists]), np.concatenate([part.lengths for part in lists])
        )
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) > 1:
        sizes = " and ".join(str(list(shape)) for shape in sorted(shapes, key=str))
        raise UserError(f"the rows of column '{name}' have different shapes: {sizes}")
    return np.concatenate(arrays)


def _as_lists(name: str, column: np.ndarray) -> Lists:
    if column.ndim != 2:
        raise UserError(f"column '{name}' holds lists in some rows, and in others none")
    return Lists(column.reshape(-1), np.full(len(column), column.shape[1], np.int64))


def column_of_values(name: str, values: Sequence[Any], place: str) -> Column:
    """Return Python's values, one per row, as a column: numbers, texts, arrays of one shape, or lists.

    `place` says where they come from, such as `'data.jsonl'`. Raises UserError for what is missing or is of
    no kind that an input takes.
    """
    missing = next((row for row, value in enumerate(values) if value is None), None)
    if missing is not None:
        raise UserError(
            f"column '{name}' of {place} has no value in one of its rows: it is null",
            help="leave such rows out, or write the value that is meant",
        )
    if any(isinstance(value, (list, tuple)) or np.ndim(value) == 1 for value in values):
        return _lists_of(name, values, place)
    try:
        array = np.array(values) if not any(isinstance(value, str) for value in values) else None
    except (ValueError, OverflowError) as e:
        raise UserError(f"column '{name}' of {place} is no array: {first_line(e)}") from e
    if array is None:
        if not all(isinstance(value, str) for value in values):
            raise UserError(f"column '{name}' of {place} holds texts and other values")
        array = np.empty(len(values), object)
        array[:] = values
        return array
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        kind = type(values[0]).__name__
        raise UserError(f"column '{name}' of {place} holds values of type {kind}, which no input takes")
    return array


def _lists_of(name: str, values: Sequence[Any], place: str) -> Column:
    try:
        parts = [np.asarray(value) for value in values]
    except ValueError as e:
        raise UserError(f"column '{name}' of {place} holds lists of lists of different lengths") from e
    ranks = {part.ndim for part in parts}
    if ranks != {1}:
        if len({part.shape for part in parts}) == 1 and 0 not in ranks:
            return np.stack(parts)
        raise UserError(f"column '{name}' of {place} holds lists of different ranks")
    filled = [part for part in parts if part.size] or parts[:1]
    kinds = {part.dtype.kind for part in filled}
    if not (kinds <= set("biuf") or kinds == {"U"}):
        raise UserError(f"column '{name}' of {place} holds lists of values that no input takes")
    joined = np.concatenate(filled)
    if joined.dtype.kind == "U":
        joined = joined.astype(object)
    return Lists(joined, np.array([len(part) for part in parts], np.int64))
