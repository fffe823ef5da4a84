"""Every graph of the corpus against its row of `table.md`: what `scan` says, and that trained weights load.

The steps of the same graphs are in `test_steps.py`, their gradients in `tests/frontends/test_exported_graphs.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
import pytest
from corpus_cases import GRAPHS, Case, marked
from corpus_table import ROWS, names

from kfac_onnx.api import scan, transform
from kfac_onnx.errors import UserError
from kfac_onnx.runtime import TrainingSession

if TYPE_CHECKING:
    from pathlib import Path

LOSS_OUTSIDE = {"ortmodule_leg__nplm"}
"""Graphs whose loss is computed by the host, from the graph's predictions."""


def test_every_graph_has_its_row() -> None:
    assert sorted(ROWS) == sorted(path.stem for path in GRAPHS.glob("*.onnx"))


@pytest.mark.parametrize("name", names("trained", "random", "forward", "nothing left"))
def test_scan_says_what_the_table_says(name: str) -> None:
    row = ROWS[name]
    report = scan(Case(name).path).to_json()
    assert report["trainable"] is (row.verdict != "forward")
    assert {item["parameter"] for item in report["refused"]} == row.refused
    assert all(item["reason"] and item["remedy"] for item in report["refused"])
    found = {item["parameter"]: item for item in report["sites"]}
    assert set(found) == set(row.tables)
    for parameter, want in row.tables.items():
        site = found[parameter]
        assert (site["vocab_size"], site["embedding_dim"]) == (want.vocab_size, want.embedding_dim)
        assert len(site["uses"]) == want.uses
        assert bool(site["dense_uses"]) is want.tied
    if name in LOSS_OUTSIDE:
        assert (report["loss"], report["reduction"]) == (None, "unknown")
    elif row.verdict != "forward":
        assert report["reduction"] == row.reduction


@pytest.mark.parametrize("name", names("invalid"))
def test_invalid_graphs_are_refused_by_name(name: str) -> None:
    with pytest.raises(UserError) as caught:
        transform(Case(name).path)
    assert "cannot run" in str(caught.value)
    assert caught.value.help


@pytest.mark.parametrize("name", [name for name in names("trained") if name not in LOSS_OUTSIDE])
def test_exported_weights_load(name: str, tmp_path: Path) -> None:
    """A forward model exported after a step gives the loss of the exporter's graph at the new weights."""
    case, graph = marked(name)
    feed = case.feed()
    model = transform(case.path, preset="half", lr=0.01, rest="sgd", rest_lr=1e-3)
    with TrainingSession(model, parameters=graph.initial(case), threads=1) as session:
        session.step({item.name: feed[item.name] for item in session.batch_inputs})
        placed = session.export(tmp_path / "trained.onnx")
        weights = {key: np.array(value) for key, value in session.parameters.items()}
    assert placed
    assert set(placed) <= set(weights)
    want = np.asarray(graph.run({**feed, **weights})[graph.loss], np.float64)
    loaded = ort.InferenceSession(tmp_path / "trained.onnx", providers=["CPUExecutionProvider"])
    (got,) = loaded.run(None, {item.name: feed[item.name] for item in loaded.get_inputs()})
    # the same operators on the same weights; half precision rounds sums in another order
    half = graph.half
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2e-3 if half else 2e-6)
    start = np.asarray(graph.run({**feed, **graph.initial(case)})[graph.loss], np.float64)
    assert abs(want - start) > 1e-5 * abs(start)  # the step moved the loss, so stale weights would show
