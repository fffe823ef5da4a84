"""Arrow's arrays as columns; pyarrow is loaded where it is used (extra `data`).

Source: Apache Arrow columnar format, https://arrow.apache.org/docs/format/Columnar.html
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kfac_onnx.data.lists import Lists
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kfac_onnx.data.lists import Block, Column

__all__ = ["DAMAGE", "block_of", "column_of", "pyarrow"]

DAMAGE: Final = (OSError, ValueError, TypeError, LookupError, MemoryError, NotImplementedError, RuntimeError)
"""What pyarrow raises for damaged files: its own errors are of these kinds, but others come through too."""


def pyarrow(module: str = "pyarrow", what: str = "Parquet, Arrow and CSV files") -> Any:
    """Return a module of pyarrow; raises UserError with the line that installs it where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(
            f"{what} are read by pyarrow, which is not installed", help="pip install 'kfac-onnx[data]'"
        ) from e


def block_of(batch: Any, columns: Sequence[str], place: str) -> Block:
    """Return these columns of a record batch, or of a table, as a block."""
    return {name: column_of(batch.column(name), name, place) for name in columns}


def column_of(array: Any, name: str, place: str) -> Column:
    """Return an Arrow array (chunked or not) as a column; `place` is the file's name in quotes.

    Raises UserError for missing values and for types that no input takes.
    """
    if hasattr(array, "combine_chunks"):
        array = array.combine_chunks()
    types = pyarrow("pyarrow.types")
    kind = array.type
    if array.null_count:
        raise UserError(
            f"column '{name}' of {place} has no value in {array.null_count} rows: they are null",
            help="leave such rows out, or write the value that is meant",
        )
    if types.is_dictionary(kind):
        return column_of(array.dictionary_decode(), name, place)
    if isinstance(kind, pyarrow().BaseExtensionType):
        return column_of(array.storage, name, place)
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
        return np.asarray(array.to_numpy(zero_copy_only=False))
    if types.is_string(kind) or types.is_large_string(kind) or kind == pyarrow().string_view():
        try:
            return np.asarray(array.to_numpy(zero_copy_only=False), object)
        except UnicodeDecodeError as e:
            raise UserError(f"column '{name}' of {place} holds texts that are no UTF-8") from e
    if types.is_fixed_size_list(kind):
        inner = column_of(array.flatten(), name, place)
        if isinstance(inner, np.ndarray):
            return inner.reshape(len(array), kind.list_size, *inner.shape[1:])
    if types.is_list(kind) or types.is_large_list(kind):
        inner = column_of(array.flatten(), name, place)
        lengths = np.asarray(array.value_lengths().to_numpy(zero_copy_only=False), np.int64)
        if isinstance(inner, np.ndarray):
            return Lists(inner, lengths)
    raise UserError(
        f"column '{name}' of {place} holds {kind}, which no input takes",
        help="inputs take numbers, texts and lists of them: convert the column, or leave it out by --columns",
    )
