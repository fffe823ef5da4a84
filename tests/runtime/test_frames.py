from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import kfac_onnx as kx
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    from kfac_onnx.runtime import TrainingSession
    from kfac_onnx.runtime.fitting import Row

ROW: Row = {
    "step": 1,
    "position": 2,
    "loss": None,
    "skipped": True,
    "lr": 0.5,
    "held_out": None,
    "skip": ["a", "b"],
}


def test_rows_and_their_file_give_the_same_frame(
    open_toy: Callable[..., TrainingSession], toy: ModuleType, tmp_path: Path
) -> None:
    pytest.importorskip("pandas", reason="needs pandas: pip install -e '.[dev]'")
    batches, rows = toy.batches(4), list[Any]()
    open_toy().fit(batches, metrics=rows.append, held_out=batches[:1], eval_every=2)
    open_toy().fit(batches, metrics=tmp_path / "rows.jsonl", held_out=batches[:1], eval_every=2)
    frame = kx.metrics_frame(rows)
    assert frame.equals(kx.metrics_frame(tmp_path / "rows.jsonl"))
    assert list(frame.index) == [1, 2, 3, 4]
    assert list(frame.loss) == [row["loss"] for row in rows]
    assert list(np.isnan(frame.held_out)) == [True, False, True, False]
    assert {name: str(kind) for name, kind in frame.dtypes.items()} == {
        "step": "int64", "loss": "float64", "skipped": "bool", "lr": "float64", "held_out": "float64", "skip": "object",
    }  # fmt: skip
    skipped = kx.metrics_frame([ROW])
    assert skipped.skip.tolist() == ["a; b"]
    assert np.isnan(skipped.loss).all()
    assert len(kx.metrics_frame([])) == 0


def test_what_is_no_row_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason="needs pandas: pip install -e '.[dev]'")
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"step": 1, "posi')
    with pytest.raises(UserError) as error:
        kx.metrics_frame(path)
    assert str(error.value) == (
        f"line 2 of '{path}' is no row of metrics\n  help: a killed run may leave half a line: delete it"
    )
    with pytest.raises(UserError) as error:
        kx.metrics_frame(tmp_path)
    assert str(error.value) == f"metrics cannot be read from '{tmp_path}': Is a directory"


@pytest.mark.parametrize(
    ("rows", "kind"), [(np.zeros((3, 4)), "ndarray"), ([{"step": 1}], "dict"), ("ab", "str")]
)
def test_what_fit_does_not_collect_is_named(rows: Any, kind: str) -> None:
    pytest.importorskip("pandas", reason="needs pandas: pip install -e '.[dev]'")
    with pytest.raises(UserError) as error:
        kx.metrics_frame(list(rows))
    assert str(error.value) == (
        f"rows of metrics are what fit(metrics=rows.append) collects, not {kind}\n"
        "  help: each is a dict with held_out, loss, lr, position, skipped, step"
    )


def test_without_pandas_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError) as error:
        kx.metrics_frame([ROW])
    assert str(error.value) == "metrics_frame needs pandas\n  help: pip install 'kfac-onnx[pandas]'"
