"""The training loop: how many steps, held-out losses, metrics, schedules, checkpoints on the way."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.runtime import TrainingSession
from kfac_onnx.runtime.feed.data import Batches

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType


def data(toy: ModuleType, count: int = 20) -> dict[str, np.ndarray]:
    return toy.batches(1, size=count)[0]


def test_fitting_a_list_is_stepping(toy: ModuleType, open_toy: Callable[..., TrainingSession]) -> None:
    fitted, stepped = open_toy(), open_toy()
    batches = toy.batches(5)
    result = fitted.fit(batches)
    losses = [stepped.step(batch)["loss"] for batch in batches]
    assert (result.steps, result.skipped, result.examples, result.loss) == (5, 0, 30, losses[-1])
    assert fitted.parameters["readout"].tobytes() == stepped.parameters["readout"].tobytes()


@pytest.mark.parametrize(
    ("limits", "steps"),
    [({}, 5), ({"epochs": 2}, 10), ({"steps": 3}, 3), ({"steps": 12}, 12), ({"steps": 12, "epochs": 2}, 10)],
)
@pytest.mark.parametrize("kind", ["list", "Batches"])
def test_steps_and_epochs(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], limits: dict[str, int], steps: int, kind: str
) -> None:
    batches = Batches(data(toy), 4) if kind == "Batches" else toy.batches(5)
    assert open_toy().fit(batches, **limits).steps == steps  # type: ignore[arg-type]


def test_an_iterator_has_one_epoch(toy: ModuleType, open_toy: Callable[..., TrainingSession]) -> None:
    assert open_toy().fit(iter(toy.batches(3)), steps=9).steps == 3
    with pytest.raises(UserError) as error:
        open_toy().fit(iter(toy.batches(3)), epochs=2)
    assert str(error.value) == (
        "the batches can be iterated only once, so there is one epoch\n  help: give a list"
    )


def test_numbers_below_one_are_refused(open_toy: Callable[..., TrainingSession]) -> None:
    for name in ("steps", "epochs", "eval_every", "checkpoint_every"):
        with pytest.raises(UserError) as error:
            open_toy().fit([], **{name: 0})  # type: ignore[arg-type]
        assert str(error.value) == f"{name} must be at least 1, got 0"


def test_when_to_save_without_where_is_refused(open_toy: Callable[..., TrainingSession]) -> None:
    for name in ("checkpoint_every", "keep"):
        with pytest.raises(UserError) as error:
            open_toy().fit([], **{name: 2})  # type: ignore[arg-type]
        assert str(error.value) == f"{name} is given, but no checkpoint to save to"


def test_held_out_losses_and_rows(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    rows: list[dict[str, object]] = []
    batches, held_out = toy.batches(5), toy.batches(2, seed=8)
    batches[3] = {**batches[3], "y": batches[3]["y"] * np.float32(np.nan)}
    session, path = open_toy(), tmp_path / "metrics.jsonl"
    result = session.fit(batches, held_out=held_out, eval_every=2, metrics=rows.append)  # type: ignore[arg-type]
    assert list(result.held_out) == [2, 4, 5]
    assert result.held_out[5] == session.evaluate(held_out)
    assert result.skipped == 1
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4]
    assert [row["position"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["loss"] is None for row in rows] == [False, False, False, True, False]
    assert [row["held_out"] is None for row in rows] == [True, False, True, False, False]
    open_toy().fit(batches, held_out=held_out, eval_every=2, metrics=path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows


def test_metrics_that_cannot_be_written(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        open_toy().fit(toy.batches(1), metrics=tmp_path / "no" / "metrics.jsonl")
    path = tmp_path / "no" / "metrics.jsonl"
    assert str(error.value) == f"metrics cannot be written to '{path}': No such file or directory"


def test_a_schedule_learns_its_horizon(toy: ModuleType, open_toy: Callable[..., TrainingSession]) -> None:
    rates: list[float] = []
    session = open_toy(schedule="linear")
    session.fit(Batches(data(toy), 4), epochs=2, metrics=lambda row: rates.append(row["lr"]))
    np.testing.assert_allclose(rates, 0.05 * (1 - np.arange(10) / 10), rtol=1e-12)


def test_a_run_that_is_stopped_and_resumed_sees_the_same_batches(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    batches = Batches(data(toy), 4, seed=5)
    whole, part = open_toy(schedule="cosine:steps=13"), open_toy(schedule="cosine:steps=13")
    whole.fit(batches, steps=13)
    part.fit(batches, steps=7, checkpoint=tmp_path / "run.ckpt")
    resumed = TrainingSession.resume(tmp_path / "run.ckpt", threads=1)
    resumed.fit(batches, steps=6)
    for name, array in whole.states.items():
        assert array.tobytes() == resumed.states[name].tobytes(), name


def test_checkpoints_on_the_way(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    session = open_toy()
    monkeypatch.setattr(session, "save", lambda path: saved.append(session.position))
    session.fit(toy.batches(5), checkpoint=tmp_path / "run.ckpt", checkpoint_every=2)
    assert saved == [2, 4, 5]


def test_the_progress_bar_is_on_stderr(
    toy: ModuleType, open_toy: Callable[..., TrainingSession], capsys: pytest.CaptureFixture[str]
) -> None:
    open_toy().fit(toy.batches(3), progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "3/3" in captured.err
    assert "examples/s" in captured.err
    open_toy().fit(toy.batches(3))
    assert capsys.readouterr().err == ""
