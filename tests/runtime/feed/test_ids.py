"""Ids that are no row of their table: named, with input, value and size, before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from kfac_onnx.runtime import TrainingSession


def refused(session: TrainingSession, ids: list[int]) -> str:
    before = {name: array.tobytes() for name, array in session.states.items()}
    with pytest.raises(UserError) as error:
        session.step({"ids": np.array(ids), "y": np.zeros(len(ids), np.float32)})
    assert {name: array.tobytes() for name, array in session.states.items()} == before
    return str(error.value)


@pytest.mark.parametrize("wrong", [23, 10**12, -24])
def test_an_id_out_of_range(open_toy: Callable[..., TrainingSession], wrong: int) -> None:
    assert refused(open_toy(), [1, wrong, 2]) == (
        f"id {wrong} in input 'ids' is not a row of parameter 'emb.weight', which has 23 rows\n"
        "  help: ids from -23 to 22 are allowed; nothing was written"
    )


def test_a_negative_id_that_the_backward_does_not_wrap(open_toy: Callable[..., TrainingSession]) -> None:
    session = open_toy(model={"negatives": "reject"})
    assert refused(session, [4, -1]) == (
        "id -1 in input 'ids' is not a row of parameter 'emb.weight', which has 23 rows\n"
        "  help: ids from 0 to 22 are allowed; nothing was written"
    )


def test_the_session_goes_on_after_a_wrong_id(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    session, plain = open_toy(), open_toy()
    refused(session, [99])
    for batch in toy.batches(3):
        assert session.step(batch) == plain.step(batch)


def test_negative_ids_wrap_where_the_graph_says_so(open_toy: Callable[..., TrainingSession]) -> None:
    y = np.zeros(2, np.float32)
    wrapped, plain = open_toy(), open_toy()
    assert wrapped.step({"ids": np.array([-1, 3]), "y": y}) == plain.step({"ids": np.array([22, 3]), "y": y})
    for name, array in plain.states.items():
        assert array.tobytes() == wrapped.states[name].tobytes(), name


def test_evaluation_names_a_wrong_id_too(open_toy: Callable[..., TrainingSession]) -> None:
    with pytest.raises(UserError) as error:
        open_toy().evaluate([{"ids": np.array([23]), "y": np.zeros(1, np.float32)}])
    assert error.value.message == (
        "id 23 in input 'ids' is not a row of parameter 'emb.weight', which has 23 rows"
    )
