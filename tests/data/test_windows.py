"""Rows are streamed: what is in memory does not grow with the data."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from kfac_onnx.data.lists import Lists, rows_of
from kfac_onnx.data.windows import groups_of, shuffled
from kfac_onnx.runtime.feed.batches import BatchInput
from kfac_onnx.runtime.feed.table_batches import batches_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from kfac_onnx.data.lists import Block


def test_memory_is_that_of_a_window(tmp_path: Path) -> None:
    """A row group of 16 MB, read with a window of 4096 rows: 0.1 MB, and blocks of 16384 rows: 0.4 MB."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = 700_000
    rng = np.random.default_rng(0)
    table = {name: rng.integers(0, 1 << 60, rows) for name in ("a", "b", "c")}
    parquet.write_table(pa.table(table), tmp_path / "t.parquet", use_dictionary=False, row_group_size=rows)
    size = (tmp_path / "t.parquet").stat().st_size
    del table
    inputs = [BatchInput(name, onnx.TensorProto.INT64, ("B",)) for name in ("a", "b", "c")]
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        data = batches_of(tmp_path / "t.parquet", inputs, 512, seed=1, window=4096)
        seen = sum(len(batch["a"]) for batch in data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert (seen, size > 16e6) == (rows, True)
    assert peak < 2e6
    assert pool.max_memory() < 6e6


class Counting:
    """Pieces of 10, 1, 0 and 25 rows, which say which of them are read."""

    names = ("x",)
    rows = (10, 1, 0, 25)

    def __init__(self) -> None:
        self.read_pieces: list[int] = []

    def read(self, piece: int, columns: Sequence[str]) -> Iterator[Block]:
        self.read_pieces.append(piece)
        start = sum(self.rows[:piece])
        for place in range(start, start + self.rows[piece], 4):
            yield {"x": np.arange(place, min(place + 4, start + self.rows[piece]))}


def numbers(source: Counting, *, seed: int | None, start: int, epoch: int = 0, window: int = 7) -> list[int]:
    blocks = shuffled(source, ["x"], lambda block: block, seed=seed, epoch=epoch, window=window, start=start)
    return [int(x) for block in blocks for x in block["x"]]  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_every_row_can_be_gone_on_from(seed: int | None) -> None:
    whole = numbers(Counting(), seed=seed, start=0)
    assert sorted(whole) == list(range(36))
    assert (whole == list(range(36))) == (seed is None)
    for start in range(37):
        assert numbers(Counting(), seed=seed, start=start) == whole[start:]
    skipped = Counting()
    numbers(skipped, seed=None, start=11)
    assert skipped.read_pieces == [3]


def test_a_window_of_all_rows_is_a_permutation_and_one_of_one_row_is_none() -> None:
    assert numbers(Counting(), seed=5, start=0, window=1) != sorted(range(36))  # the pieces are permuted
    pairs = [numbers(Counting(), seed=5, start=0, epoch=epoch, window=36) for epoch in range(200)]
    first = np.array([pair[0] for pair in pairs])
    assert (
        len(set(first.tolist())) > 30
    )  # all rows come first at times; of 200 draws from 36, few are missing


def test_groups_of_rows_with_lists() -> None:
    lists = Lists(np.arange(10), np.array([3, 0, 4, 2, 1]))
    blocks = [{"x": lists.rows(slice(0, 2))}, {"x": lists.rows(slice(2, 5))}]
    groups = list(groups_of(iter(blocks), 2))
    assert [rows_of(group) for group in groups] == [2, 2, 1]
    values = [group["x"].values.tolist() for group in groups]  # type: ignore[union-attr]
    assert values == [[0, 1, 2], [3, 4, 5, 6, 7, 8], [9]]
    backwards = lists.rows(np.array([4, 2, 1, 0]))
    assert (backwards.values.tolist(), backwards.lengths.tolist()) == (
        [9, 3, 4, 5, 6, 0, 1, 2],
        [1, 4, 0, 3],
    )
