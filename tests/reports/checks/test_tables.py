"""Findings of accepted tables: precision, width, and equal ids, each on a graph that has what it looks for."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import kfac_onnx as kx
from kfac_onnx.reports.checks import Finding, check


def findings(body: str, columns: int, element: str = "float") -> list[Finding]:
    """Return the findings on the derivative of a loss of rows of W [4, columns]."""
    text = f"""
    <ir_version: 9, opset_import: ["" : 18]>
    forward (int64[N] ids) => ({element} loss) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    table = rng.standard_normal((4, columns)).astype(np.float64 if element == "double" else np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(table, "W"))
    return list(check(kx.differentiate(model, loss_output="loss")).findings)


ONCE = "h = Gather(W, ids) s = Tanh(h) loss = ReduceMean<keepdims: int = 0>(s)"
TWICE = """h = Gather(W, ids) k = Gather(W, ids) s = Tanh(h) c = Sin(k) p = Mul(s, c)
    loss = ReduceMean<keepdims: int = 0>(p)"""


def test_a_plain_table_has_none_of_them() -> None:
    names = {item.id for item in findings(ONCE, 8)}
    assert names.isdisjoint({"double-table", "wide-table", "equal-ids"})


def test_a_double_table() -> None:
    (item,) = (item for item in findings(ONCE, 8, "double") if item.id == "double-table")
    assert item == Finding(
        "double-table",
        "note",
        "'W' is a float64 table, and its update is computed in float32",
        ("W",),
        "the values keep float64, but an update is exact to about 7 digits only",
        "cast the model to float32, or leave the table to the ordinary optimizer: --allow-fallback W",
    )


@pytest.mark.parametrize(("columns", "size"), [(2047, None), (2048, "34 MB")])
def test_wide_rows(columns: int, size: str | None) -> None:
    items = [item for item in findings(ONCE, columns) if item.id == "wide-table"]
    assert items == (
        []
        if size is None
        else [
            Finding(
                "wide-table",
                "warning",
                f"rows of 'W' have {columns} columns",
                ("W",),
                f"G and its root are {columns} x {columns} ({size} together), and each refresh multiplies such "
                "matrices some tens of times",
                "refresh less often (--refresh-every), or leave the table to the ordinary optimizer: "
                "--allow-fallback W",
            )
        ]
    )


def test_two_lookups_by_the_same_ids() -> None:
    (item,) = (item for item in findings(TWICE, 8) if item.id == "equal-ids")
    assert item == Finding(
        "equal-ids",
        "note",
        "'h' and 'k' look the same ids up in 'W'",
        ("W", "h", "k"),
        "both count as lookups; an exporter that merges them leaves one, whose gradient is the sum: "
        "the K-FAC step then differs, though the loss does not",
        "look the rows up once in the model, and both exports train alike",
    )
