"""A wrong batch: one clear sentence each, and nothing is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.runtime.feed.batches import BatchInput, checked_batch, examples_in
from kfac_onnx.runtime.step.tensors import element_type

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from kfac_onnx.runtime import TrainingSession

IDS = np.array([1, 2, 3])
Y = np.ones(3, np.float32)
WRONG: list[tuple[dict[str, np.ndarray], str]] = [
    ({"ids": IDS}, "the batch has no input 'y'\n  help: the graph's batch inputs are 'ids', 'y'"),
    (
        {"id": IDS, "y": Y},
        "the batch has an unknown input 'id'; did you mean 'ids'?\n  help: the graph's batch inputs are 'ids', 'y'",
    ),
    (
        {"ids": IDS, "y": np.ones(3)},
        "batch input 'y' must be float32, got float64\n  help: convert it: array.astype('float32')",
    ),
    (
        {"ids": IDS.astype(np.float32), "y": Y},
        "batch input 'ids' must be int64, got float32\n  help: convert it: array.astype('int64')",
    ),
    (
        {"ids": IDS.astype(np.uint64), "y": Y},
        "batch input 'ids' must be int64, got uint64\n  help: convert it: array.astype('int64')",
    ),
    ({"ids": IDS[:, None], "y": Y}, "batch input 'ids' must have shape [batch], got [3, 1]"),
    ({"ids": IDS, "y": Y[:2]}, "batch inputs 'ids' and 'y' disagree about dimension 'batch': 3 and 2"),
]


@pytest.mark.parametrize(("batch", "message"), WRONG, ids=[message.split("\n")[0] for _, message in WRONG])
def test_a_wrong_batch_is_named_and_nothing_is_written(
    open_toy: Callable[..., TrainingSession], batch: dict[str, np.ndarray], message: str
) -> None:
    session = open_toy()
    before = {name: array.tobytes() for name, array in session.states.items()}
    with pytest.raises(UserError) as error:
        session.step(batch)
    assert str(error.value) == message
    assert {name: array.tobytes() for name, array in session.states.items()} == before
    assert session.position == 0


def test_a_fixed_dimension_must_match() -> None:
    inputs = [BatchInput("x", element_type("float32"), (None, 4))]
    with pytest.raises(UserError) as error:
        checked_batch({"x": np.zeros((2, 3), np.float32)}, inputs)
    assert str(error.value) == "batch input 'x' must have shape [?, 4], got [2, 3]"


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint8, np.uint32])
def test_narrower_integers_are_widened(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], dtype: type[np.integer]
) -> None:
    batch = toy.batches(1)[0]
    assert open_toy().step({**batch, "ids": batch["ids"].astype(dtype)}) == open_toy().step(batch)


def test_arrays_that_are_not_contiguous_are_read_right(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    batch = toy.batches(1)[0]
    strided = {name: np.repeat(array, 2)[::2] for name, array in batch.items()}
    assert not strided["ids"].flags["C_CONTIGUOUS"]
    assert open_toy().step(strided) == open_toy().step(batch)


def test_lists_are_arrays_too(open_toy: Callable[..., TrainingSession]) -> None:
    listed = open_toy().step({"ids": [1, 2, 3], "y": Y})  # type: ignore[dict-item]
    assert listed == open_toy().step({"ids": IDS, "y": Y})


def test_bfloat16_comes_as_itself_or_as_bits() -> None:
    inputs = [BatchInput("x", element_type("bfloat16"), (2,))]
    array = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    for given in (array, array.view(np.uint16)):
        value = checked_batch({"x": given}, inputs)["x"]
        assert value.data_type() == "tensor(bfloat16)"  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"^batch input 'x' must be bfloat16, got float32"):
        checked_batch({"x": array.astype(np.float32)}, inputs)


def test_examples_are_counted_by_the_first_array_with_a_dimension() -> None:
    assert examples_in({"step": np.array(3), "ids": np.zeros((5, 2))}) == 5
    assert examples_in({"step": np.array(3)}) == 1
