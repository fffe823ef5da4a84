"""The loss on held-out batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.runtime import TrainingSession

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


def losses(session: TrainingSession, batch: dict[str, np.ndarray]) -> np.ndarray:
    weights = session.parameters
    return ((weights["emb.weight"][batch["ids"]] * weights["readout"]).sum(1) - batch["y"]) ** 2


def test_a_mean_loss_counts_batches_by_their_examples(
    toy: ModuleType, open_toy: Callable[..., TrainingSession]
) -> None:
    session = open_toy(model={"dropout": True})  # off while evaluating
    session.step(toy.batches(1)[0])
    batches = [*toy.batches(2, size=5), *toy.batches(1, size=1)]
    expected = np.concatenate([losses(session, batch) for batch in batches]).mean()
    assert session.evaluate(batches) == pytest.approx(expected, rel=1e-6)  # float32 sums of a few terms
    session.step(toy.batches(1)[0])  # at the weights as they are now
    expected = np.concatenate([losses(session, batch) for batch in batches]).mean()
    assert session.evaluate(batches) == pytest.approx(expected, rel=1e-6)


def test_a_summed_loss_is_divided_by_the_examples(toy: ModuleType) -> None:
    model = toy.whole_step(with_values=True)
    metadata.write(model, "loss", metadata.Loss("loss", "sum"))
    session = TrainingSession(model)
    batches = [toy.batches(1, size=4)[0], toy.batches(1, size=2)[0]]
    total = sum(losses(session, batch).mean() for batch in batches)  # the toy's loss, taken as a sum
    assert session.evaluate(batches) == pytest.approx(total / 6, rel=1e-6)


def test_evaluation_changes_nothing(toy: ModuleType, open_toy: Callable[..., TrainingSession]) -> None:
    evaluated, plain = open_toy(), open_toy()
    for batch in toy.batches(3):
        evaluated.evaluate([batch])
        assert evaluated.step(batch) == plain.step(batch)


def test_wrong_batches_are_named(toy: ModuleType, open_toy: Callable[..., TrainingSession]) -> None:
    session = open_toy()
    with pytest.raises(UserError) as error:
        session.evaluate([])
    assert str(error.value) == "there is no batch to evaluate"
    with pytest.raises(UserError) as error:
        session.evaluate([{"ids": np.array([1])}])
    assert str(error.value) == "the batch has no input 'y'\n  help: the graph's batch inputs are 'ids', 'y'"
