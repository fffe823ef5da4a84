"""When a run is said to diverge, and when not."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kfac_onnx.runtime.divergence import ADVICE, START, WINDOW, LossWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kfac_onnx.runtime import TrainingSession


def first_warning(losses: Iterable[float]) -> tuple[int, str] | None:
    watch = LossWatch()
    said = [(step, text) for step, loss in enumerate(losses) if (text := watch.add(loss)) is not None]
    assert len(said) <= 1
    return said[0] if said else None


def test_a_loss_far_above_its_start() -> None:
    found = first_warning([7.0] * START + [20.0] * 200)
    assert found is not None
    step, text = found
    # The mean of the window passes 14 when x of its 50 losses are 20: the first mean is over 10 of 7 and 40 of 20.
    assert step == WINDOW - 1
    assert text == ("the loss diverges: 17.4 on average over the last 50 steps, 7 at the start and 7 at best")


def test_a_loss_that_falls_and_rises_above_its_start() -> None:
    losses = [8.0] * START + [1.0] * 100 + [9.0] * 100
    found = first_warning(losses)
    assert found is not None
    # Above 8: seven eighths of the window are 9, 43.75 of 50.
    assert found[0] == START + 100 + 43


@pytest.mark.parametrize(
    "losses",
    [
        [7.0] * START + [13.0] * 300,  # risen, by less than twice
        [7.0] * START + [0.01] * 100 + [0.5] * 300,  # fifty times its best, and far below its start
        [7.0] * (START + 100) + [300.0] + [6.0] * 300,  # one outlier
        [-2.0] * START + [5.0] * 300,  # a log-density
        [7.0] * START + [float("nan")] * 300,  # skipped steps have their own words
    ],
)
def test_what_is_no_divergence(losses: list[float]) -> None:
    assert first_warning(losses) is None


def test_fit_says_it_and_keeps_where(
    open_toy: Callable[..., TrainingSession], toy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with open_toy() as session:
        (batch,) = toy.batches(1)
        real = session.step

        def step(batch: Any) -> Any:
            metrics = real(batch)
            return {**metrics, "loss": 1.0 if session.position <= START else 5.0}

        session.step = step  # type: ignore[method-assign]
        with caplog.at_level(logging.WARNING, logger="kfac_onnx"):
            result = session.fit([batch] * 80, epochs=1)
    assert result.diverged_at == WINDOW
    assert [record.getMessage() for record in caplog.records] == [
        f"the loss diverges: 4.2 on average over the last 50 steps, 1 at the start and 1 at best: {ADVICE}"
    ]
    assert np.isfinite(result.loss)
