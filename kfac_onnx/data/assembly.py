"""From rows to what a step takes: columns in the dtypes of inputs, lists padded or as bags.

A number is converted where it stays what it is, floats as far as the input's type holds them. A list column
fills an input [batch, length] padded, or two inputs: all values one after another, and where each list
begins among them (the `input` and `offsets` of PyTorch's EmbeddingBag,
https://docs.pytorch.org/docs/stable/generated/torch.nn.EmbeddingBag.html).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kfac_onnx.data.lists import Lists, rows_of
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kfac_onnx.data.batch_input import InputKind
    from kfac_onnx.data.filling import Filling
    from kfac_onnx.data.lists import Block, Column
    from kfac_onnx.data.source import Types
    from kfac_onnx.data.vocabulary import Vocabulary

__all__ = ["Assembly", "RowBatch"]


class RowBatch(dict[str, np.ndarray]):
    """A batch that knows how many examples it is made of: bags do not tell by their shapes."""

    examples: int = 0


class Assembly:
    """Makes batches of rows, by fillings: `encoded` before rows are shuffled, `batch` afterwards.

    Args:
        fillings: which column fills which input.
        inputs: what they take.
        vocabularies: by input, of the ids that are no rows of a table yet.
        place: what the data are called in sentences.

    """

    def __init__(
        self,
        fillings: Sequence[Filling],
        inputs: Sequence[InputKind],
        vocabularies: Mapping[str, Vocabulary],
        place: str,
    ) -> None:
        self._fillings = tuple(fillings)
        self._inputs = {item.name: item for item in inputs}
        self._vocabularies = dict(vocabularies)
        self._place = place
        self.columns = tuple(dict.fromkeys(filling.column for filling in self._fillings))

    def types(self) -> Types:
        """Return the dtypes that columns are read as, where their format has none."""
        types: Types = {}
        for filling in self._fillings:
            vocabulary = self._vocabularies.get(filling.input)
            kind = self._inputs[filling.input]
            texts = kind.texts if vocabulary is None else vocabulary.texts
            dtype = np.dtype(np.int64) if vocabulary is not None else kind.dtype
            if not texts and dtype.name not in ("bfloat16", "float16"):  # which a text is not read as
                types[filling.column] = dtype
            elif texts:
                types[filling.column] = None
        return types

    def encoded(self, block: Block) -> Block:
        """Return the rows with their ids as rows of tables, by input, in the inputs' dtypes."""
        result: Block = {}
        for filling in self._fillings:
            column = block[filling.column]
            kind = self._inputs[filling.input]
            vocabulary = self._vocabularies.get(filling.input)
            what = f"column '{filling.column}' of {self._place}"
            values = column.values if isinstance(column, Lists) else column
            if vocabulary is not None:
                values = vocabulary.rows(values, what)
            typed = self._typed(values, kind, what)
            result[filling.input] = Lists(typed, column.lengths) if isinstance(column, Lists) else typed
        return result

    def _typed(self, values: np.ndarray, kind: InputKind, what: str) -> np.ndarray:
        if kind.texts:
            return values
        if values.dtype.kind == "O":
            raise UserError(
                f"{what} holds texts, and input '{kind.name}' takes {kind.dtype.name}",
                help=_line_of_vocabulary(kind),
            )
        if values.dtype == kind.dtype:
            return values
        if values.dtype == np.uint16 and kind.dtype.name == "bfloat16":
            return values.view(kind.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            typed: np.ndarray[Any, np.dtype[Any]] = values.astype(kind.dtype)
        same: np.ndarray[Any, np.dtype[np.bool_]]
        if kind.dtype.kind in "iub":
            same = typed.astype(values.dtype) == values
            if values.dtype.kind == "f":
                same &= np.isfinite(values)
            elif kind.dtype.kind in "iu":
                same &= np.less(typed, 0) == np.less(values, 0)
        else:  # floats are rounded, but none becomes infinite by that
            same = np.isfinite(typed.astype(np.float64)) | ~np.isfinite(values.astype(np.float64))
        if not same.all():
            wrong = values.reshape(-1)[int(np.argmin(same.reshape(-1)))]
            raise UserError(
                f"{what} holds {wrong}, which is no {kind.dtype.name} of input '{kind.name}'",
                help=_line_of_vocabulary(kind) if kind.dtype.kind in "iu" else None,
            )
        return typed

    def batch(self, rows: Block) -> RowBatch:
        """Return rows that `encoded` gave as a batch."""
        batch = RowBatch()
        batch.examples = rows_of(rows)
        for filling in self._fillings:
            self._fill(batch, filling, rows[filling.input])
        return batch

    def _fill(self, batch: RowBatch, filling: Filling, column: Column) -> None:
        kind = self._inputs[filling.input]
        if filling.offsets is None:
            padded = self._padded(filling, kind, column) if isinstance(column, Lists) else column
            if kind.dims is not None and len(kind.dims) == 2 and kind.dims[1] == 1 and padded.ndim == 1:
                padded = padded.reshape(-1, 1)
            batch[filling.input] = padded
            return
        lists = column if isinstance(column, Lists) else _as_lists(column)
        ends = np.cumsum(lists.lengths)
        offsets = np.concatenate([[0], ends]) if filling.last else ends - lists.lengths
        batch[filling.input] = lists.values
        batch[filling.offsets] = offsets.astype(self._inputs[filling.offsets].dtype)

    def _padded(self, filling: Filling, kind: InputKind, lists: Lists) -> np.ndarray:
        what = f"column '{filling.column}' of {self._place}"
        if kind.dims is not None and len(kind.dims) != 2:
            raise UserError(
                f"{what} holds lists, and input '{filling.input}' has rank {len(kind.dims)}",
                help=f"of bags name both inputs: --columns '{filling.column}={filling.input}+OFFSETS'",
            )
        fixed = kind.dims[1] if kind.dims is not None and isinstance(kind.dims[1], int) else filling.length
        longest = int(lists.lengths.max(initial=0))
        width = longest if fixed is None else fixed
        if longest > width and filling.keep is None:
            raise UserError(
                f"{what} holds a list of {longest} entries, and input '{filling.input}' takes {width}",
                help=f"say which are kept: --columns '{_with(filling, 'keep=last')}', or keep=first",
            )
        if filling.pad is None and int(lists.lengths.min(initial=width)) < width:
            raise UserError(
                f"{what} holds lists of different lengths, and what fills them up is not said",
                help=f"name the row of padding: --columns '{_with(filling, 'pad=0')}'",
            )
        taken = np.minimum(lists.lengths, width)
        first = lists.starts + (lists.lengths - taken if filling.keep == "last" else 0)
        within = np.arange(width)
        valid = within[None, :] < taken[:, None]
        padded = np.full((len(lists), width), 0 if filling.pad is None else filling.pad, lists.values.dtype)
        padded[valid] = lists.values[(first[:, None] + within[None, :])[valid]]
        return padded


def _line_of_vocabulary(kind: InputKind) -> str:
    return (
        f"ids become rows by a vocabulary: kfac-onnx vocabulary build MODEL --data DATA --input {kind.name}"
    )


def _as_lists(column: np.ndarray) -> Lists:
    width = column.shape[1] if column.ndim == 2 else 1
    return Lists(column.reshape(-1), np.full(len(column), width, np.int64))


def _with(filling: Filling, option: str) -> str:
    text = str(filling)
    return f"{text[:-1]},{option}}}" if text.endswith("}") else f"{text}{{{option}}}"
