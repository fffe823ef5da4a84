"""Graphs without gradients: `scan` lists their tables as not trainable, `transform` says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from kfac_onnx.api import scan, transform
from kfac_onnx.errors import UserError

FORWARD = Path(__file__).parents[1] / "data" / "graphs_forward"
NPLM = FORWARD / "fwd_dyncore__nplm.onnx"


def test_forward_graph_lists_its_tables() -> None:
    report = scan(NPLM).to_json()
    assert report["trainable"] is False
    (site,) = report["sites"]
    assert (site["parameter"], site["vocab_size"], site["embedding_dim"]) == ("emb.weight", 100, 16)
    assert [use["output_gradient"] for use in site["uses"]] == [None]
    assert report["refused"] == []
    assert report["notes"][-1].startswith("the graph has no gradients of its parameters: append loss and")


def test_forward_graph_is_not_transformed() -> None:
    with pytest.raises(UserError) as caught:
        transform(NPLM)
    assert caught.value.message == "the graph has no gradients of its parameters"
    assert caught.value.help == (
        "append loss and gradients with `kfac-onnx differentiate`, export them as outputs, or name the pairs with --gradients PARAMETER=OUTPUT"
    )
