"""Data sets in memory, of the libraries that people have them in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.runtime.feed.batches import BatchInput, as_inputs, checked_batch
from kfac_onnx.runtime.feed.data import Batches
from kfac_onnx.runtime.feed.table_batches import batches_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

INPUTS = [
    BatchInput("ids", onnx.TensorProto.INT64, ("B",)),
    BatchInput("labels", onnx.TensorProto.FLOAT, ("B",)),
]
ROWS = [{"ids": row, "labels": row / 4} for row in range(10)]


class MapStyle:
    """As `torch.utils.data.Dataset` is, without torch."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        return ROWS[index]


class IterableStyle:
    """As `torch.utils.data.IterableDataset`, and TensorFlow's data sets, are: without a length."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(ROWS)


class Tensor:
    """As a tensor of TensorFlow's is."""

    def __init__(self, value: object) -> None:
        self._value = np.asarray(value)

    def numpy(self) -> np.ndarray:
        return self._value


def table() -> Any:
    return pytest.importorskip("pyarrow").table({name: [row[name] for row in ROWS] for name in ROWS[0]})


def arrow_dataset(tmp_path: Path) -> Any:
    parquet = pytest.importorskip("pyarrow.parquet")
    for part in (0, 5):
        parquet.write_table(table().slice(part, 5), tmp_path / f"{part}.parquet")
    return pytest.importorskip("pyarrow.dataset").dataset(tmp_path)


def hugging_face() -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(ROWS[::-1]).select(range(9, -1, -1))


def frame() -> Any:
    return pytest.importorskip("pandas").DataFrame(ROWS)


KINDS: dict[str, Any] = {
    "rows": lambda path: ROWS,
    "columns": lambda path: {name: [row[name] for row in ROWS] for name in ROWS[0]},
    "map-style": lambda path: MapStyle(),
    "iterable": lambda path: IterableStyle(),
    "tensors": lambda path: [{name: Tensor(value) for name, value in row.items()} for row in ROWS],
    "arrow-table": lambda path: table(),
    "arrow-batch": lambda path: table().to_batches()[0],
    "arrow-dataset": arrow_dataset,
    "hugging-face": lambda path: hugging_face(),
    "pandas": lambda path: frame(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_data_in_memory(tmp_path: Path, kind: str) -> None:
    data = KINDS[kind](tmp_path)
    batches = list(batches_of(data, INPUTS, 4))
    assert [len(batch["ids"]) for batch in batches] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([batch["ids"] for batch in batches]), np.arange(10))
    np.testing.assert_array_equal(np.concatenate([batch["labels"] for batch in batches]), np.arange(10) / 4)
    for batch in batches:
        assert checked_batch(batch, INPUTS).keys() == {"ids", "labels"}
    made = batches_of(data, INPUTS, 4, seed=1, window=5, drop_last=True)
    first = [batch["ids"].tolist() for batch in made]
    assert len(first) == 2
    if isinstance(made, Batches):
        assert [batch["ids"].tolist() for batch in made] == first
        assert [batch["ids"].tolist() for batch in made.epoch(0, skip=1)] == first[1:]


def test_a_stream_is_shuffled_anew_in_each_pass() -> None:
    made = batches_of(IterableStyle(), INPUTS, 5, seed=1)
    one, two = [[batch["ids"].tolist() for batch in made] for _ in range(2)]
    assert one != two
    assert sorted(one[0] + one[1]) == sorted(two[0] + two[1]) == list(range(10))
    again = batches_of(IterableStyle(), INPUTS, 5, seed=1)
    assert [batch["ids"].tolist() for batch in again] == one


def test_tensors_in_batches() -> None:
    ready = as_inputs({"ids": Tensor([1, 2]), "labels": Tensor(np.float32([0, 1]))}, INPUTS)  # type: ignore[dict-item]
    assert [type(array) for array in ready.values()] == [np.ndarray, np.ndarray]
    torch = pytest.importorskip("torch")
    loader = torch.utils.data.DataLoader(ROWS, batch_size=5)
    for batch in loader:
        batch["labels"] = batch["labels"].float().requires_grad_()
        np.testing.assert_array_equal(checked_batch(batch, INPUTS)["ids"], batch["ids"].numpy())


def test_bfloat16_of_torch() -> None:
    torch = pytest.importorskip("torch")
    inputs = [BatchInput("x", onnx.TensorProto.BFLOAT16, ("B",))]
    array = as_inputs({"x": torch.tensor([1.5, -2], dtype=torch.bfloat16)}, inputs)["x"]
    assert (array.dtype.name, array.tolist()) == ("bfloat16", [1.5, -2])


def sentence(data: object) -> str:
    with pytest.raises(UserError) as caught:
        list(batches_of(data, INPUTS, 2))
    return str(caught.value)


def test_what_is_no_data() -> None:
    assert sentence([(1, 2.0)]) == (
        "a row is a mapping from columns to values, not of type tuple\n"
        "  help: name its parts: ({'users': row[0], 'items': row[1]} for row in rows)"
    )
    assert sentence(3) == (
        "data of type int cannot be read: they are neither rows nor columns\n"
        "  help: give a file, columns by name, or rows: [{'users': 3, 'items': 5}, ...]"
    )
    assert sentence([{"ids": 1, "labels": 1.0}, {"ids": 1}]) == "column 'labels' is in some of the rows only"
    assert sentence({"ids": [1, 2], "labels": [1.0]}) == (
        "the columns have different numbers of rows: {'ids': 2, 'labels': 1}"
    )
    with pytest.raises(UserError) as caught:
        batches_of(ROWS, INPUTS, None)
    assert str(caught.value) == (
        "the graph takes batches of any size, and none is given\n  help: give batch_size"
    )
    with pytest.raises(UserError) as caught:
        checked_batch((np.zeros(2), np.zeros(2)), INPUTS)  # type: ignore[arg-type]  the mistake under test
    assert str(caught.value) == (
        "a batch is a dict of arrays by input name, not of type tuple\n"
        "  help: the graph's batch inputs are 'ids', 'labels'; name its parts:"
        " ({'ids': batch[0], 'labels': batch[1]} for batch in batches)"
    )
