"""Vocabularies: rows by how often ids were seen, all others to a row or to buckets."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.data.vocabulary import (
    Counts,
    Vocabulary,
    read_vocabulary,
    vocabularies_beside,
    write_vocabulary,
)
from kfac_onnx.errors import UserError
from kfac_onnx.metadata import IdCheck
from kfac_onnx.runtime.feed.table_batches import require_rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BIG = 1 << 40
INTEGERS = np.array([5, -3, 5, BIG, 5, -3, 7, BIG])
TEXTS = np.array(["b", "ä", "b", "", "b", "ä", "z", ""], object)


def counted(*parts: np.ndarray) -> Counts:
    counts = Counts()
    for part in parts:
        counts.add(part, "column 'x'")
    return counts


@pytest.mark.parametrize(("ids", "order"), [(INTEGERS, [5, -3, BIG, 7]), (TEXTS, ["b", "", "ä", "z"])])
def test_rows_are_in_the_order_of_counts(tmp_path: Path, ids: np.ndarray, order: Sequence[object]) -> None:
    word = counted(ids[:3], ids[3:]).vocabulary(("x",), first=2)
    assert word.keys.tolist() == order
    assert word.counts.tolist() == [3, 2, 2, 1]
    assert (word.unknown_row, word.size) == (6, 7)
    np.testing.assert_array_equal(word.rows(ids), [2 + order.index(key) for key in ids.tolist()])
    write_vocabulary(tmp_path / "v.vocabulary", word)
    read = read_vocabulary(tmp_path / "v.vocabulary")
    assert (read.inputs, read.first, read.buckets, read.unknown) == (("x",), 2, 0, None)
    assert read.content == word.content
    np.testing.assert_array_equal(read.rows(ids), word.rows(ids))


@pytest.mark.parametrize("ids", [INTEGERS, TEXTS])
def test_few_counts_little_room_buckets_and_a_named_row(ids: np.ndarray) -> None:
    counts = counted(ids)
    assert len(counts.vocabulary(("x",), minimum=2).keys) == 3
    assert counts.vocabulary(("x",), rows=3).size == 3
    assert counts.vocabulary(("x",), rows=300).size == 5
    named = counts.vocabulary(("x",), minimum=3, first=1, unknown=0)
    assert (named.size, named.rows(ids).tolist()) == (2, [1, 0, 1, 0, 1, 0, 0, 0])
    buckets = counts.vocabulary(("x",), minimum=3, buckets=4)
    rows = buckets.rows(ids)
    assert buckets.size == 5
    assert set(rows[ids == ids[0]].tolist()) == {0}
    assert set(rows.tolist()) <= set(range(5))
    assert len({int(row) for row in rows[ids == ids[3]]}) == 1


def test_hashes_are_the_same_everywhere() -> None:
    """Golden: SplitMix64's finalizer of 0 and its first outputs are published with the generator."""
    nobody = Vocabulary(("x",), np.zeros(0, np.int64), np.zeros(0, np.int64), buckets=1 << 62)
    # The first output of SplitMix64 with seed 0 is 0xE220A8397B1DCDAF.
    assert nobody.rows(np.array([0])).tolist() == [0xE220A8397B1DCDAF % (1 << 62)]
    texts = Vocabulary(("x",), np.empty(0, object), np.zeros(0, np.int64), buckets=1000)
    spread = Counter(texts.rows(np.array([f"id {n}" for n in range(20000)], object)).tolist())
    assert len(spread) == 1000
    assert max(spread.values()) < 60  # 20 on average, and 5 standard deviations are 22


def test_shapes_and_kinds_of_ids() -> None:
    word = counted(INTEGERS).vocabulary(("x",))
    assert word.rows(INTEGERS.reshape(2, 4)).shape == (2, 4)
    assert word.rows(np.array([5], np.uint64)).tolist() == [0]
    with pytest.raises(UserError) as caught:
        word.rows(TEXTS, "column 'x'")
    assert caught.value.message == "column 'x' holds texts, and the keys of the vocabulary are integers"
    with pytest.raises(UserError) as caught:
        word.rows(np.array([1 << 63], np.uint64), "column 'x'")
    assert caught.value.message == "column 'x' holds uint64, and the keys of the vocabulary are int64"
    with pytest.raises(UserError) as caught:
        counted(INTEGERS, TEXTS)
    assert caught.value.message == "column 'x' holds ids of another kind than before: texts and integers"
    with pytest.raises(UserError) as caught:
        counted(np.array([0.5]))
    assert caught.value.message == "column 'x' holds float64, and ids are texts or integers of 64 bits"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 2, "first": 1}, "2 rows leave none for a key: 2 are those of others"),
        ({"unknown": 0}, "row 0 cannot be that of unknown ids: it is a key's, or behind them"),
        ({"unknown": 3, "first": 2}, "row 3 cannot be that of unknown ids: rows before the first key are 0 to 1"),
        ({"unknown": 0, "first": 1, "buckets": 2}, "ids that are no key go to buckets or to one row, not to both"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError) as caught:
        counted(INTEGERS).vocabulary(("x",), **options)  # type: ignore[arg-type]
    assert caught.value.message == message


def test_a_table_must_have_its_rows() -> None:
    word = counted(INTEGERS).vocabulary(("x",))
    checks = [IdCheck("emb", "x", 4, "wrap"), IdCheck("emb", "other", 3, "wrap")]
    require_rows({"x": counted(INTEGERS).vocabulary(("x",), rows=4)}, checks)
    with pytest.raises(UserError) as caught:
        require_rows({"x": word}, checks)
    assert str(caught.value) == (
        "the vocabulary of input 'x' needs 5 rows, and parameter 'emb' has 4\n"
        "  help: build it with --rows 4, or export the graph with a larger table"
    )


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "v.vocabulary"
    write_vocabulary(path, counted(TEXTS).vocabulary(("x",)))
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole.replace(b'\\"version\\": 1', b'\\"version\\": 2')):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="vocabulary"):
            read_vocabulary(path)


def test_those_beside_a_model(tmp_path: Path) -> None:
    word = counted(INTEGERS).vocabulary(("a", "b"))
    write_vocabulary(tmp_path / "m.a+b.vocabulary", word)
    write_vocabulary(tmp_path / "other.c.vocabulary", word)
    assert set(vocabularies_beside(tmp_path / "m.onnx")) == {"a", "b"}
    write_vocabulary(tmp_path / "m.a.vocabulary", word)
    with pytest.raises(UserError, match="are both vocabularies of input 'a'"):
        vocabularies_beside(tmp_path / "m.onnx")
