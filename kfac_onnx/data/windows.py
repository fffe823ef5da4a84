"""The order of rows: pieces in an order of their own, and within windows of them each row.

With W the size of a window, an epoch's pieces are permuted by (seed, epoch), their rows read one after
another, and rows k·W to (k+1)·W - 1 of that stream permuted by (seed, epoch, k + 1). In memory are a window
and a block, and the rows from any position on are reached by reading from their window's first piece on.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.data.lists import concatenated, rows_of, taken_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kfac_onnx.data.lists import Block
    from kfac_onnx.data.source import Source

__all__ = ["groups_of", "rows_from", "shuffled"]


def rows_from(
    source: Source,
    columns: Sequence[str],
    order: Sequence[int],
    start: int,
    encoded: Callable[[Block], Block],
) -> Iterator[Block]:
    """Yield the rows of pieces in an order, without the first `start` of them."""
    for piece in order:
        if start >= source.rows[piece]:
            start -= source.rows[piece]
            continue
        for block in source.read(piece, columns):
            size = rows_of(block)
            if start >= size:
                start -= size
                continue
            yield encoded(taken_rows(block, slice(start, size)) if start else block)
            start = 0


def groups_of(blocks: Iterator[Block], size: int) -> Iterator[Block]:
    """Yield the rows in groups of `size`; the last one may have fewer."""
    parts: list[Block] = []
    count = 0
    for block in blocks:
        rows, start = rows_of(block), 0
        while start < rows:
            end = min(rows, start + size - count)
            parts.append(block if end - start == rows else taken_rows(block, slice(start, end)))
            count, start = count + end - start, end
            if count == size:
                yield concatenated(parts)
                parts, count = [], 0
    if count:
        yield concatenated(parts)


def shuffled(
    source: Source,
    columns: Sequence[str],
    encoded: Callable[[Block], Block],
    *,
    seed: int | None,
    epoch: int,
    window: int,
    start: int,
) -> Iterator[Block]:
    """Yield an epoch's rows from row `start` on, in blocks; without a seed in their stored order."""
    order = np.arange(len(source.rows))
    if seed is None:
        yield from rows_from(source, columns, order.tolist(), start, encoded)
        return
    np.random.default_rng([seed, epoch]).shuffle(order)
    number, skip = divmod(start, window)
    rows = rows_from(source, columns, order.tolist(), number * window, encoded)
    for index, group in zip(itertools.count(number), groups_of(rows, window)):
        permutation = np.random.default_rng([seed, epoch, index + 1]).permutation(rows_of(group))
        yield taken_rows(group, permutation[skip:])
        skip = 0
