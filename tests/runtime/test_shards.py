from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.runtime.shards import Shards

if TYPE_CHECKING:
    from pathlib import Path


def write(path: Path, start: int, count: int) -> None:
    index = np.arange(start, start + count)
    np.savez(path, x=np.stack([index, -index], 1), y=index.astype(np.int32), rate=np.float32(0.5))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "a.npz", 0, 5)
    write(tmp_path / "b.npz", 5, 4)
    write(tmp_path / "c.npz", 9, 1)
    return tmp_path


def firsts(batches: list[dict[str, np.ndarray]]) -> list[list[int]]:
    for batch in batches:
        np.testing.assert_array_equal(batch["x"][:, 0], batch["y"])  # rows stay together
        assert batch["rate"] == np.float32(0.5)
    return [batch["y"].tolist() for batch in batches]


def test_in_order_crosses_shards(folder: Path) -> None:
    shards = Shards.open(folder)
    assert shards.examples == 10
    assert shards.names == ("x", "y", "rate")
    assert firsts(list(shards.in_order(4))) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert firsts(list(shards.in_order(4, partial=False))) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert firsts(list(shards.in_order(20))) == [list(range(10))]
    assert firsts(list(shards.in_order(1))) == [[number] for number in range(10)]


def test_without_a_size_each_shard_is_a_batch(folder: Path) -> None:
    shards = Shards.open(folder)
    assert shards.steps(None) == 3
    assert firsts(list(shards.in_order(None))) == [[0, 1, 2, 3, 4], [5, 6, 7, 8], [9]]
    order = firsts(list(shards.shuffled(None, seed=1, epochs=4)))
    assert sorted(order[:3]) == [[0, 1, 2, 3, 4], [5, 6, 7, 8], [9]]
    assert len({tuple(map(tuple, order[at : at + 3])) for at in (0, 3, 6, 9)}) > 1


def test_shuffling_is_complete_and_depends_on_seed_and_pass_alone(folder: Path) -> None:
    shards = Shards.open(folder)
    first = firsts(list(shards.shuffled(5, seed=3, epochs=2)))
    assert sorted(itertools.chain(*first[:2])) == list(range(10))
    assert sorted(itertools.chain(*first[2:])) == list(range(10))
    assert first[:2] != first[2:]
    assert first == firsts(list(shards.shuffled(5, seed=3, epochs=2)))
    assert first != firsts(list(shards.shuffled(5, seed=4, epochs=2)))
    endless = shards.shuffled(5, seed=3)
    assert firsts(list(itertools.islice(endless, 4))) == first


def test_what_fills_no_batch_is_left_out_of_the_pass(folder: Path) -> None:
    shards = Shards.open(folder)
    assert shards.steps(4) == 2
    assert [len(row) for row in firsts(list(shards.shuffled(4, seed=0, epochs=3)))] == [4] * 6


def message(error: pytest.ExceptionInfo[UserError], folder: Path) -> str:
    return str(error.value).replace(str(folder), "DIR")


def test_arrays_of_different_length_cannot_be_cut(tmp_path: Path) -> None:
    np.savez(tmp_path / "bag.npz", ids=np.arange(7), offsets=np.arange(3))
    shards = Shards.open(tmp_path / "bag.npz")
    assert shards.examples is None
    assert len(list(shards.in_order(None))) == 1
    with pytest.raises(UserError) as caught:
        list(shards.in_order(2))
    assert message(caught, tmp_path) == (
        "the arrays of 'DIR/bag.npz' differ in length, so they cannot be cut into batches\n"
        "  help: leave out the batch size and give one .npz file per batch, in a folder"
    )


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (0, "the batch size must be at least 1, not 0"),
        (11, "the data holds 10 examples, fewer than the batch size 11"),
    ],
)
def test_a_size_that_cannot_be(folder: Path, size: int, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        list(Shards.open(folder).shuffled(size, seed=0, epochs=1))
    assert str(caught.value) == sentence
    if size < 1:
        with pytest.raises(UserError) as caught:
            list(Shards.open(folder).in_order(size))
        assert str(caught.value) == sentence


def test_files_that_cannot_be_data(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Shards.open(tmp_path)
    assert message(caught, tmp_path) == "there is no .npz file in the folder 'DIR'"
    with pytest.raises(UserError) as caught:
        Shards.open(tmp_path / "none.npz")
    assert message(caught, tmp_path) == "there is no file 'DIR/none.npz'"
    (tmp_path / "bad.npz").write_bytes(b"hello")
    with pytest.raises(UserError) as caught:
        Shards.open(tmp_path / "bad.npz")
    assert message(caught, tmp_path) == ("'DIR/bad.npz' is not a readable .npz file: File is not a zip file")


def test_shards_must_hold_the_same_arrays(folder: Path) -> None:
    np.savez(folder / "d.npz", x=np.zeros(2), z=np.zeros(2))
    with pytest.raises(UserError) as caught:
        Shards.open(folder)
    assert message(caught, folder) == (
        "'DIR/d.npz' holds the arrays 'x', 'z' but 'DIR/a.npz' holds 'x', 'y', 'rate'\n"
        "  help: all shards need the same arrays"
    )
