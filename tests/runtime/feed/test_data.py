"""Data from files: every example once per epoch, the same order for a seed, resumable anywhere."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.runtime.feed.data import Batches

if TYPE_CHECKING:
    from pathlib import Path


def arrays(count: int, start: int = 0) -> dict[str, np.ndarray]:
    ids = np.arange(start, start + count)
    return {"ids": ids, "x": (ids[:, None] * np.ones(3)).astype(np.float32), "scale": np.array(2.0)}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for index, (start, count) in enumerate([(0, 5), (5, 1), (6, 7)]):
        np.savez(tmp_path / f"part{index}.npz", **arrays(count, start))
    return tmp_path


def seen(batches: Batches, epoch: int = 0) -> list[list[int]]:
    return [batch["ids"].tolist() for batch in batches.epoch(epoch)]


def test_stored_order_without_a_seed(shards: Path) -> None:
    assert seen(Batches(shards, 4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12]]
    assert seen(Batches(shards, 4, drop_last=True)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert seen(Batches(arrays(5), 5)) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("size", [1, 3, 4, 13, 20])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_every_example_once_per_epoch(shards: Path, size: int, seed: int | None) -> None:
    batches = Batches(shards, size, seed=seed)
    epoch = seen(batches, 3)
    assert len(epoch) == len(batches) == -(-13 // size)
    assert sorted(number for batch in epoch for number in batch) == list(range(13))
    assert all(len(batch) == size for batch in epoch[:-1])


def test_arrays_stay_together_and_scalars_go_along(shards: Path) -> None:
    for batch in Batches(shards, 4, seed=7):
        np.testing.assert_array_equal(batch["x"][:, 1], batch["ids"])
        assert batch["scale"] == 2.0


def test_the_order_depends_on_seed_and_epoch_alone(shards: Path) -> None:
    one = Batches(shards, 4, seed=1)
    assert seen(one, 2) == seen(Batches(shards, 4, seed=1), 2)
    assert seen(one, 2) != seen(one, 3)
    assert seen(one, 2) != seen(Batches(shards, 4, seed=2), 2)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("position", range(9))
def test_going_on_anywhere_equals_going_through(shards: Path, position: int, drop_last: bool) -> None:
    batches = Batches(shards, 4, seed=3, drop_last=drop_last)
    whole = [batch["ids"].tolist() for batch in islice(batches.since(0), 12)]
    rest = [batch["ids"].tolist() for batch in islice(batches.since(position), 12 - position)]
    assert rest == whole[position:]


def test_a_number_of_epochs_ends(shards: Path) -> None:
    batches = Batches(shards, 4)
    assert len(list(batches.since(0, epochs=2))) == 8
    assert len(list(batches.since(6, epochs=2))) == 2


def test_a_single_file(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "data.npz", **arrays(6))
    assert seen(Batches(tmp_path / "data.npz", 4)) == [[0, 1, 2, 3], [4, 5]]


def test_errors_are_sentences(tmp_path: Path) -> None:
    def message(source: object, size: int = 2, **options: bool) -> str:
        with pytest.raises(UserError) as error:
            list(Batches(source, size, **options))  # type: ignore[arg-type]
        return str(error.value)

    assert message(tmp_path / "no.npz") == f"there is no file '{tmp_path / 'no.npz'}'"
    assert message(tmp_path) == f"the folder '{tmp_path}' holds no .npz file"
    assert message(arrays(3), 0) == "the batch size must be at least 1, got 0"
    assert message({"a": np.array(1)}) == "the data holds no examples: no array has a dimension"
    assert message({"a": np.zeros(3), "b": np.zeros(4)}) == (
        "the data holds 3 examples of 'a' and 4 of 'b'\n  help: the first dimension of every array is the example"
    )
    assert message(arrays(3), 4, drop_last=True) == "the data holds 3 examples, fewer than one batch of 4"
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 nothing")
    assert message(tmp_path / "bad.npz").startswith(f"'{tmp_path / 'bad.npz'}' is not a readable .npz file: ")
    assert message(tmp_path).startswith(f"'{tmp_path / 'bad.npz'}' is not a readable .npz file: ")


def test_shards_with_different_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    np.savez(tmp_path / "b.npz", x=np.zeros(3), y=np.zeros(3))
    with pytest.raises(UserError) as error:
        list(Batches(tmp_path, 4))
    assert str(error.value) == "the shards do not all hold the same arrays: 'y' is in some only"


@pytest.mark.parametrize("kind", ["file", "folder", "memory"])
def test_examples_without_an_entry(tmp_path: Path, kind: str) -> None:
    """A file of 340 bytes can claim 600 million of them."""
    arrays = {"ids": np.zeros((600_000_000, 0), np.int64), "labels": np.zeros((600_000_000, 0), np.float32)}
    np.savez(tmp_path / "a.npz", **arrays)
    source = {"file": tmp_path / "a.npz", "folder": tmp_path, "memory": arrays}[kind]
    with pytest.raises(UserError) as caught:
        Batches(source, 8)
    place = "the data" if kind == "memory" else f"'{tmp_path / 'a.npz'}'"
    assert (
        str(caught.value)
        == f"{place} holds 600000000 examples without an entry: 'ids' has shape [600000000, 0]"
    )


def test_an_input_without_entries_beside_one_with(tmp_path: Path) -> None:
    arrays = {"ids": np.arange(3), "nothing": np.zeros((3, 0), np.float32)}
    assert [batch["ids"].tolist() for batch in Batches(arrays, 2)] == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "the batch size must be at least 1, got 0"),
        ({"batch_size": 2.0}, "batch_size of Batches must be a whole number, got 2.0"),
        ({"batch_size": True}, "batch_size of Batches must be a whole number, got True"),
        ({"batch_size": "2"}, "batch_size of Batches must be a whole number, got '2'"),
        ({"seed": -1}, "the seed must be at least 0, got -1"),
        ({"seed": 1.5}, "seed of Batches must be a whole number or None, got 1.5"),
        ({"seed": True}, "seed of Batches must be a whole number or None, got True"),
        (
            {"seed": 10**5000},
            "the seed must be at most 340282366920938463463374607431768211455, got a value of type int",
        ),
        ({"drop_last": 1}, "drop_last of Batches must be True or False, got 1"),
        (
            {"source": 5},
            "training data are a file, a folder or arrays by input name, not of type int",
        ),
        (
            {"source": {"ids": [[1], [2, 3]]}},
            "the data of 'ids' are no array: setting an array element with a sequence.",
        ),
        ({"source": {"ids": np.array([{}])}}, "the data of 'ids' are no numbers: their dtype is object"),
    ],
)
def test_arguments_that_are_none(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Batches(**{"source": {"ids": np.arange(6)}, "batch_size": 2, **arguments})  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


def test_numbers_of_numpy_are_made_pythons() -> None:
    batches = Batches({"ids": np.arange(6)}, np.int64(4), seed=np.int32(3), drop_last=np.True_)
    assert [type(value) for value in batches.describe().values()] == [int, int, int, int, bool, int]
    want = {"batches": 1, "examples": 6, "batch_size": 4, "seed": 3, "drop_last": True}
    assert batches.describe() == {**want, "content": batches.content}
