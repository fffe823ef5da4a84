"""Batches of rows: of files of any format that is read, of data sets in memory, or of a stream of rows."""

from __future__ import annotations

import hashlib
import itertools
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kfac_onnx.data.assembly import Assembly
from kfac_onnx.data.batch_input import InputKind
from kfac_onnx.data.filling import Filling, fillings, parse_columns
from kfac_onnx.data.lists import column_of_values, concatenated, rows_of, taken_rows
from kfac_onnx.data.objects import source_of, values_of_rows
from kfac_onnx.data.readers import files_of, is_npz, is_typed, open_files
from kfac_onnx.data.source import content_of
from kfac_onnx.data.vocabulary import Vocabulary, read_vocabulary
from kfac_onnx.data.windows import groups_of, shuffled
from kfac_onnx.errors import UserError
from kfac_onnx.errors.arguments import LARGEST_SEED, truth, whole_number
from kfac_onnx.runtime.feed.data import Batches
from kfac_onnx.runtime.feed.file_batches import FileBatches
from kfac_onnx.runtime.step.tensors import numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from kfac_onnx.data.lists import Block
    from kfac_onnx.data.source import Source
    from kfac_onnx.metadata import IdCheck
    from kfac_onnx.runtime.feed.batches import BatchInput

__all__ = ["WINDOW", "RowStream", "TableBatches", "batches_of", "input_kinds", "require_rows"]

WINDOW: Final = 1 << 16
"""Rows of a window of shuffling."""


def input_kinds(inputs: Sequence[BatchInput]) -> tuple[InputKind, ...]:
    """Return what the batch inputs of a session take."""
    return tuple(
        InputKind(item.name, numpy_dtype(item.element), item.dims, texts=bool(item.keys)) for item in inputs
    )


class TableBatches(Batches):
    """Batches of the rows of a source, shuffled within windows by a seed; iterating gives one epoch.

    The order depends on the seed, the epoch and the window alone, so that a run goes on at any row.

    Args:
        source: the rows.
        assembly: makes batches of them.
        batch_size: rows of a batch; the last one of an epoch may have fewer.
        seed: of the shuffling; None keeps the stored order.
        drop_last: leave out a last batch that is not full.
        window: rows among which is shuffled, and which are in memory.
        content: a number that tells the data apart from others.

    """

    def __init__(
        self,
        source: Source,
        assembly: Assembly,
        batch_size: int,
        *,
        seed: int | None,
        drop_last: bool,
        window: int,
        content: int,
    ) -> None:
        self.batch_size = whole_number(batch_size, "the batch size", least=1)
        self.seed = None if seed is None else whole_number(seed, "the seed", least=0, most=LARGEST_SEED)
        self.drop_last = truth(drop_last, "drop_last")
        self.window = whole_number(window, "the window", least=1)
        self._source, self._assembly, self._content = source, assembly, content
        self.examples = sum(source.rows)
        if not len(self):
            raise UserError(f"the data holds {self.examples} examples, fewer than one batch of {batch_size}")

    def describe(self) -> dict[str, int | bool | None]:
        """Return what decides which batch comes at which position of a run."""
        return {**super().describe(), "window": self.window}

    @cached_property
    def content(self) -> int:
        """A number that tells other examples of the same shapes apart."""
        return self._content

    def epoch(self, number: int, *, skip: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Yield the batches of one epoch, without its first `skip`."""
        number = whole_number(number, "the number of an epoch", least=0)
        skip = whole_number(skip, "skip", least=0)
        blocks = shuffled(
            self._source,
            self._assembly.columns,
            self._assembly.encoded,
            seed=self.seed,
            epoch=number,
            window=self.window,
            start=skip * self.batch_size,
        )
        for group in groups_of(blocks, self.batch_size):
            if rows_of(group) == self.batch_size or not self.drop_last:
                yield self._assembly.batch(group)


class RowStream:
    """Batches of the rows of an iterable whose length is unknown, shuffled within windows by a seed.

    Each iteration is one pass over the iterable, from its beginning, with an order of its own.
    """

    def __init__(
        self,
        rows: Iterable[Any],
        inputs: Sequence[InputKind],
        chosen: Sequence[Filling],
        vocabularies: Mapping[str, Vocabulary],
        batch_size: int,
        *,
        seed: int | None,
        drop_last: bool,
        window: int,
    ) -> None:
        self._rows, self._inputs, self._chosen, self._vocabularies = rows, inputs, chosen, vocabularies
        self._size = whole_number(batch_size, "the batch size", least=1)
        self._seed = None if seed is None else whole_number(seed, "the seed", least=0, most=LARGEST_SEED)
        self._drop_last = truth(drop_last, "drop_last")
        self._window = max(whole_number(window, "the window", least=1), self._size)
        self._pass = -1

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        self._pass += 1
        rows = iter(self._rows)
        first = list(itertools.islice(rows, 1))
        if not first:
            return
        names = tuple(values_of_rows(first))
        assembly = Assembly(
            fillings(self._chosen, self._inputs, names, "the rows"),
            self._inputs,
            self._vocabularies,
            "the rows",
        )
        blocks = self._blocks(itertools.chain(first, rows), assembly)
        for group in groups_of(blocks, self._size):
            if rows_of(group) == self._size or not self._drop_last:
                yield assembly.batch(group)

    def _blocks(self, rows: Iterator[Any], assembly: Assembly) -> Iterator[Block]:
        size = self._size if self._seed is None else self._window
        for index in itertools.count(1):
            part = list(itertools.islice(rows, size))
            if not part:
                return
            values = values_of_rows(part)
            for name in assembly.columns:
                if name not in values:
                    raise UserError(f"column '{name}' is in some of the rows only")
            block = assembly.encoded(
                {name: column_of_values(name, values[name], "the rows") for name in assembly.columns}
            )
            if self._seed is not None:
                random = np.random.default_rng([self._seed, self._pass, index])
                block = taken_rows(concatenated([block]), random.permutation(rows_of(block)))
            yield block


def batches_of(
    data: Any,
    inputs: Sequence[BatchInput],
    batch_size: int | None,
    *,
    columns: str | Sequence[Filling] = (),
    vocabularies: Mapping[str, Vocabulary | str | Path] | None = None,
    seed: int | None = None,
    drop_last: bool = False,
    window: int = WINDOW,
) -> Batches | RowStream:
    """Return the batches of data: a file, a folder, a pattern, or a data set in memory; see `TableBatches`.

    `.npz` files without columns or vocabularies are read as `Batches` does, and without a batch size each of
    them is one batch.

    Raises UserError for data that cannot be read, with what to do, and for inputs that they do not fill.
    """
    chosen = parse_columns(columns) if isinstance(columns, str) else tuple(columns)
    words = {
        name: value if isinstance(value, Vocabulary) else read_vocabulary(value)
        for name, value in (vocabularies or {}).items()
    }
    kinds = input_kinds(inputs)
    _require_inputs(words, [kind.name for kind in kinds])
    is_file = isinstance(data, (str, Path))
    files = files_of(data) if is_file else []
    if is_file and not chosen and not words and is_npz(files):
        place = Path(data) if Path(data).exists() else files[0].parent
        return (
            FileBatches(place, seed=seed)
            if batch_size is None
            else Batches(place, batch_size, seed=seed, drop_last=drop_last)
        )
    place = f"'{data}'" if is_file else "the data"
    if is_file:
        # The names are needed before the types, by which texts are read.
        source = open_files(files, {})
        if batch_size is None:
            raise UserError(
                f"'{data}' is a table of rows, and the graph takes batches of any size",
                help="give a size: --batch-size 256",
            )
    else:
        if batch_size is None:
            raise UserError("the graph takes batches of any size, and none is given", help="give batch_size")
        source = source_of(data)
        if source is None:
            _require_iterable(data)
            return RowStream(
                data, kinds, chosen, words, batch_size, seed=seed, drop_last=drop_last, window=window
            )
    filled = fillings(chosen, kinds, source.names, place)
    assembly = Assembly(filled, kinds, words, place)
    if is_file:
        if is_typed(files[0]):
            source = open_files(files, assembly.types())
        content = content_of(files if files[0].is_file() else sorted(files[0].iterdir()))
    else:
        content = 0
    told = [*map(str, filled), *(f"{name} {words[name].content}" for name in sorted(words))]
    digest = hashlib.sha256(repr((content, told)).encode()).digest()
    return TableBatches(
        source,
        assembly,
        batch_size,
        seed=seed,
        drop_last=drop_last,
        window=window,
        content=int.from_bytes(digest[:6], "big"),
    )


def _require_inputs(words: Mapping[str, Vocabulary], names: Sequence[str]) -> None:
    for name in words:
        if name not in names:
            listed = ", ".join(f"'{item}'" for item in names)
            raise UserError(
                f"a vocabulary is given for '{name}', which is no batch input",
                help=f"the graph's batch inputs are {listed}",
            )


def _require_iterable(data: object) -> None:
    if not hasattr(data, "__iter__"):
        raise UserError(
            f"data of type {type(data).__name__} cannot be read: they are neither rows nor columns",
            help="give a file, columns by name, or rows: [{'users': 3, 'items': 5}, ...]",
        )


def require_rows(vocabularies: Mapping[str, Vocabulary], checks: Iterable[IdCheck]) -> None:
    """Raise UserError where a vocabulary has more rows than the table that its input looks up."""
    for check in checks:
        vocabulary = vocabularies.get(check.ids)
        if vocabulary is not None and vocabulary.size > check.vocab_size:
            raise UserError(
                f"the vocabulary of input '{check.ids}' needs {vocabulary.size} rows, and parameter"
                f" '{check.parameter}' has {check.vocab_size}",
                help=f"build it with --rows {check.vocab_size}, or export the graph with a larger table",
            )
