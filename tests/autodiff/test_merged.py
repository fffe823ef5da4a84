"""Parameters that an exporter merged, and lookups that it folded, are seen by `differentiate` and `check`."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import kfac_onnx as kx
from kfac_onnx.pipeline.log import Log
from kfac_onnx.reports.checks import Finding, check

RNG = np.random.default_rng(3)
ONES, ZEROS = np.ones(4, np.float32), np.zeros(4, np.float32)
REMEDY = (
    "export with torch.onnx.export(..., optimize=False), which keeps parameters apart, or with the "
    "parameters as inputs"
)


def matrix(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def model_of(nodes: str, arrays: dict[str, np.ndarray], positions: bool = False) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 18]>
        g (int64[N, 6] ids) => (float[N, 6, 4] z) {{ h = Gather(table, ids) {nodes} }}""")
    for name, array in {"table": matrix(9, 4), **arrays}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def told(model: onnx.ModelProto) -> tuple[list[str], list[Finding]]:
    """Return the warnings of `differentiate`, and the findings of `check` on what it makes."""
    logger = logging.getLogger("test_merged")
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: (
        texts.append(record.getMessage()) if record.levelno >= logging.WARNING else None
    )
    logger.addHandler(handler)
    try:
        made = kx.differentiate(model, loss="mse", log=Log(logger))
    finally:
        logger.removeHandler(handler)
    assert isinstance(made, ir.Model)
    return texts, list(check(made).findings)


NORMS = "a = LayerNormalization(h, g, b) m = MatMul(a, w1) c = LayerNormalization(m, g, b) z = MatMul(c, w2)"
MERGED = {
    "norms": (NORMS, {"g": ONES, "b": ZEROS, "w1": matrix(4, 4), "w2": matrix(4, 4)}, {"g": (1, 2), "b": (0, 2)}),
    "biases": (
        "m = MatMul(h, w1) a = Add(m, b) n = MatMul(a, w2) z = Add(n, b)",
        {"b": ZEROS, "w1": matrix(4, 4), "w2": matrix(4, 4)},
        {"b": (0, 2)},
    ),
    "slopes": (
        "a = PRelu(h, s) m = MatMul(a, w1) z = PRelu(m, s)",
        {"s": np.full(1, 0.25, np.float32), "w1": matrix(4, 4)},
        {"s": (0.25, 2)},
    ),
    "scales": (
        "a = Mul(h, s) m = MatMul(a, w1) n = Tanh(m) z = Mul(n, s)",
        {"s": np.full(4, 1e-5, np.float32), "w1": matrix(4, 4)},
        {"s": (1e-5, 2)},
    ),
    "behind_views": (
        "t = Identity(b) m = MatMul(h, w1) a = Add(m, t) n = MatMul(a, w2) z = Add(n, b)",
        {"b": ZEROS, "w1": matrix(4, 4), "w2": matrix(4, 4)},
        {"b": (0, 2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "arrays", "merged"), MERGED.values(), ids=MERGED)
def test_merged_parameters_are_seen(
    nodes: str, arrays: dict[str, np.ndarray], merged: dict[str, tuple[float, int]]
) -> None:
    texts, findings = told(model_of(nodes, arrays))
    assert len(texts) == len(merged)
    by_name = {item.where[0]: item for item in findings if item.id == "merged-parameter"}
    assert set(by_name) == set(merged)
    for (name, (number, places)), text in zip(merged.items(), texts, strict=True):
        start = f"'{name}' starts at {number:g} everywhere and is read by {places} nodes ("
        assert text.startswith(start)
        assert text.endswith(
            "): some exporters merge parameters that start equal; if the model has several, " + REMEDY
        )
        assert by_name[name].severity == "warning"
        assert by_name[name].what.startswith(start)
        assert by_name[name].remedy == "if the model has several, " + REMEDY


APART = {
    "two": (
        "m = MatMul(h, w1) a = Add(m, b) n = MatMul(a, w2) z = Add(n, c)",
        {"b": ZEROS, "c": ZEROS, "w1": matrix(4, 4), "w2": matrix(4, 4)},
    ),
    "trained_before": (
        "m = MatMul(h, w1) a = Add(m, b) n = MatMul(a, w2) z = Add(n, b)",
        {"b": matrix(4), "w1": matrix(4, 4), "w2": matrix(4, 4)},
    ),
    "temperature": (
        "a = Mul(h, t) m = MatMul(a, w1) z = Mul(m, t)",
        {"t": np.ones(1, np.float32), "w1": matrix(4, 4)},
    ),
    "square": ("s = Mul(t, t) z = Mul(h, s)", {"t": ONES}),
}


@pytest.mark.parametrize(("nodes", "arrays"), APART.values(), ids=APART)
def test_others_are_not_suspected(nodes: str, arrays: dict[str, np.ndarray]) -> None:
    texts, findings = told(model_of(nodes, arrays))
    assert texts == []
    assert [item for item in findings if item.id == "merged-parameter"] == []


def test_layers_that_the_model_shares_are_a_note() -> None:
    nodes = "m = MatMul(h, w) a = Add(m, b) n = MatMul(a, w) z = Add(n, b)"
    texts, findings = told(model_of(nodes, {"b": ZEROS, "w": matrix(4, 4)}))
    assert texts == []
    assert [(item.id, item.severity) for item in findings if item.id == "merged-parameter"] == [
        ("merged-parameter", "note")
    ]


def test_a_folded_lookup_of_positions_is_seen() -> None:
    model = model_of("z = Add(h, val_3)", {"val_3": matrix(6, 4)})
    texts, findings = told(model)
    what = (
        "'val_3' is added whole to rows of 'table', as a lookup of all positions is that an exporter folded"
    )
    assert texts == [f"{what}; if the model looks positions up in a table, {REMEDY}"]
    (finding,) = [item for item in findings if item.id == "folded-lookup"]
    assert (finding.severity, finding.what) == ("warning", what)
    assert finding.remedy == f"if the model looks positions up in a table, {REMEDY}"


@pytest.mark.parametrize(
    "nodes",
    ["p = Gather(val_3, at) z = Add(h, p)", "s = Slice(val_3, zero, six, zero) z = Add(h, s)"],
    ids=["looked_up", "sliced"],
)
def test_positions_that_are_looked_up_are_not(nodes: str) -> None:
    arrays = {
        "val_3": matrix(8, 4),
        "at": np.arange(6),
        "zero": np.array([0]),
        "six": np.array([6]),
    }
    texts, findings = told(model_of(nodes, {name: array for name, array in arrays.items() if name in nodes}))
    assert texts == []
    assert [item for item in findings if item.id == "folded-lookup"] == []
