"""JSON lines: whole, and JSON whatever the numbers are."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kfac_onnx.disk.json_lines import json_lines, plain_json
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kfac_onnx.runtime import TrainingSession


def strictly(text: str) -> Any:
    """Read JSON that knows no NaN, as most programs do."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    row = {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": -math.inf, 2: np.float64("nan")}, "e": (1, None)}
    with json_lines(tmp_path / "m.jsonl", "metrics") as write:
        write(row)
    assert strictly((tmp_path / "m.jsonl").read_text()) == {
        "a": None,
        "b": [None, 1.5],
        "c": {"d": None, "2": None},
        "e": [1, None],
    }
    assert plain_json({"x": 1e308}) == {"x": 1e308}


def test_lines_are_added_and_half_a_line_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    with json_lines(path, "metrics") as write:
        write({"a": 2})
    assert path.read_text() == '{"a": 1}\n{"a": \n{"a": 2}\n'


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error, json_lines(tmp_path, "metrics"):
        pass
    assert str(error.value) == f"metrics cannot be written to '{tmp_path}': Is a directory"


def test_metrics_of_a_run_that_diverged_are_json(
    toy: Any, open_toy: Callable[..., TrainingSession], tmp_path: Path
) -> None:
    batches = toy.batches(2)
    far = [{**batch, "y": batch["y"] * np.float32(1e30)} for batch in batches]
    open_toy().fit(batches, held_out=far, eval_every=1, metrics=tmp_path / "m.jsonl")
    rows = [strictly(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [row["held_out"] for row in rows] == [None, None]
    assert all(row["loss"] is not None for row in rows)
