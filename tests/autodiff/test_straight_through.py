"""Operators without a derivative are named; quantization passes gradients straight through where asked."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import kfac_onnx as kx
from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.metadata import Frozen, Parameter
from kfac_onnx.readers import read_training_graph
from kfac_onnx.reports.checks import check
from kfac_onnx.runtime.gradcheck.verify import verify_gradients

RNG = np.random.default_rng(9)
TABLE = (0.7 * RNG.standard_normal((11, 4))).astype(np.float32)
MATRIX = RNG.standard_normal((4, 3)).astype(np.float32)
GATE = RNG.standard_normal((4, 11)).astype(np.float32)
IDS = np.array([[1, 2, 2], [10, 0, 5]])
LABELS = np.array([2, 0])
SCALES = RNG.uniform(0.005, 0.02, 11).astype(np.float32)
SCALE, ZERO = np.float32(0.01), 3
"""127·0.01 cuts some entries off."""


def model_of(nodes: str, inputs: str = "int64[b, 3] ids") -> onnx.ModelProto:
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 20]>
        g ({inputs}) => (float[b, 3] z)
        <int64[1] ax = {{1}}, float sc = {{0.01}}, int8 zp = {{{ZERO}}}, int64[1] back = {{-1}}> {{ {nodes} }}""")
    tensors = {"emb": TABLE, "W": MATRIX, "G": GATE, "scs": SCALES, "zps": np.zeros(11, np.int8)}
    for name, array in tensors.items():
        if re.search(rf"\b{name}\b", nodes):
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


TABLE_QUANTIZED = """q = QuantizeLinear(emb, sc, zp) w = DequantizeLinear(q, sc, zp) e = Gather(w, ids)
    m = ReduceMean<keepdims: int = 0>(e, ax) z = MatMul(m, W)"""
ROWS_QUANTIZED = """e = Gather(emb, ids) q = QuantizeLinear(e, sc, zp) w = DequantizeLinear(q, sc, zp)
    m = ReduceMean<keepdims: int = 0>(w, ax) z = MatMul(m, W)"""
BY_ROW = """q = QuantizeLinear<axis: int = 0>(emb, scs, zps) w = DequantizeLinear<axis: int = 0>(q, scs, zps)
    e = Gather(w, ids) m = ReduceMean<keepdims: int = 0>(e, ax) z = MatMul(m, W)"""
ROUTED = """g = MatMul(x, G) k = ArgMax<axis: int = 1, keepdims: int = 0>(g) e = Gather(emb, k) m = Add(e, x)
    z = MatMul(m, W)"""


def frozen(model: ir.Model) -> dict[str, str]:
    return {item.name: item.reason for item in metadata.read_list(model, "frozen", Frozen)}


def trained(model: ir.Model) -> list[str]:
    return [item.name for item in metadata.read_list(model, "parameters", Parameter)]


def findings(model: ir.Model) -> list[tuple[str, str, str]]:
    return [(item.severity, item.id, item.what) for item in check(model).findings]


def test_quantization_is_named_and_check_agrees() -> None:
    made = kx.differentiate(model_of(TABLE_QUANTIZED))
    assert trained(made) == ["W"]
    assert frozen(made) == {
        "emb": "the loss depends on it only through QuantizeLinear 'q', which has no derivative"
    }
    assert findings(made) == [
        (
            "warning",
            "no-derivative",
            "'emb' is not trained: the loss depends on it only through QuantizeLinear 'q', which has no "
            "derivative",
        )
    ]


def test_hard_routing_is_named_and_check_agrees() -> None:
    made = kx.differentiate(model_of(ROUTED, "float[b, 4] x"))
    assert sorted(trained(made)) == ["W", "emb"]
    assert frozen(made) == {"G": "the loss depends on it only through ArgMax 'k', which has no derivative"}
    assert [item[:2] for item in findings(made)] == [("warning", "no-derivative")]
    assert "through ArgMax 'k', which has no derivative" in findings(made)[0][2]


@pytest.mark.parametrize(
    ("nodes", "named"),
    [
        ("r = Round(emb) e = Gather(r, ids) m = ReduceMean<keepdims: int = 0>(e, ax) z = MatMul(m, W)", "Round 'r'"),
        ("r = Sign(emb) e = Gather(r, ids) m = ReduceMean<keepdims: int = 0>(e, ax) z = MatMul(m, W)", "Sign 'r'"),
        ("r = Cast<to: int = 6>(emb) f = Cast<to: int = 1>(r) e = Gather(f, ids) m = ReduceMean<keepdims: int = 0>(e, ax) z = MatMul(m, W)", "Cast 'r'"),
        ("n = Neg(emb) r = Greater(n, emb) f = Cast<to: int = 1>(r) e = Gather(f, ids) m = ReduceMean<keepdims: int = 0>(e, ax) z = MatMul(m, W)", "Greater 'r'"),
    ],
    ids=["round", "sign", "cast", "greater"],
)  # fmt: skip
def test_other_operators_without_a_derivative_are_named(nodes: str, named: str) -> None:
    assert frozen(kx.differentiate(model_of(nodes))) == {
        "emb": f"the loss depends on it only through {named}, which has no derivative"
    }


def test_what_is_wanted_by_name_and_has_no_derivative_is_refused() -> None:
    with pytest.raises(UserError) as error:
        kx.differentiate(model_of(TABLE_QUANTIZED), train=["emb", "W"])
    reason = "the loss depends on it only through QuantizeLinear 'q', which has no derivative"
    assert error.value.message == f"'emb' cannot be trained: {reason}"
    assert error.value.help == "--straight-through takes quantization for the identity in derivatives"
    with pytest.raises(UserError) as error:
        kx.differentiate(model_of(TABLE_QUANTIZED), train=["emb"])
    assert error.value.message == (
        "no weight is trained: the loss 'loss' has no derivative with respect to any of them"
    )
    assert error.value.tried == (f"emb: {reason}",)


def quantized(table: np.ndarray, scale: np.ndarray, zero: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rounded table and where nothing was cut off, in float64."""
    level = np.round(table.astype(np.float64) / scale.astype(np.float64)) + zero
    return (np.clip(level, -128, 127) - zero) * scale.astype(np.float64), (level >= -128) & (level <= 127)


def expected(table: np.ndarray, inside: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the loss and the gradients of W and of the table, where W sees `table`."""
    means = table[IDS].mean(axis=1)
    scores = means @ MATRIX.astype(np.float64)
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    loss = -np.log(p[np.arange(2), LABELS]).mean()
    dz = (p - np.eye(3)[LABELS]) / 2
    gradient = np.zeros_like(table)
    np.add.at(gradient, IDS, (dz @ MATRIX.T.astype(np.float64))[:, None, :] / 3)
    return loss, means.T @ dz, np.where(inside, gradient, 0)


@pytest.mark.parametrize(
    ("nodes", "uses"),
    [(TABLE_QUANTIZED, 1), (ROWS_QUANTIZED, 1), (BY_ROW, 0)],
    ids=["table", "rows", "by_row"],
)
def test_gradients_pass_straight_through(nodes: str, uses: int) -> None:
    model = model_of(nodes)
    made = kx.differentiate(model, straight_through=True)
    assert sorted(trained(made)) == ["W", "emb"]
    assert {node.domain for node in made.graph} == {""}
    scale, zero = np.full((1, 1), SCALE), ZERO
    for tensor in model.graph.initializer:
        if tensor.name == "scs":
            scale, zero = onnx.numpy_helper.to_array(tensor)[:, None], 0
    loss, matrix, table = expected(*quantized(TABLE, scale, zero))
    session = ort.InferenceSession(ir.to_proto(made).SerializeToString(), providers=["CPUExecutionProvider"])
    results = session.run(["loss", "W_grad", "emb_grad"], {"ids": IDS, "labels": LABELS})
    np.testing.assert_allclose(results[0], loss, rtol=2e-6)  # float32, sums of a few terms
    np.testing.assert_allclose(results[1], matrix, atol=1e-6)
    np.testing.assert_allclose(results[2], table, atol=1e-6)
    assert 0 < np.count_nonzero(table[IDS] == 0) < table[IDS].size  # some are cut off
    sites = kx.scan(made).sites
    assert [len(site.uses) for site in sites if site.parameter == "emb"] == [1] * uses


def test_the_forward_values_stay_to_the_bit() -> None:
    model = model_of(TABLE_QUANTIZED)
    made = kx.differentiate(model, straight_through=True)
    before = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    after = ort.InferenceSession(ir.to_proto(made).SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(
        after.run(["z"], {"ids": IDS, "labels": LABELS})[0], before.run(["z"], {"ids": IDS})[0]
    )


def test_verify_leaves_estimates_out() -> None:
    made = read_training_graph(kx.differentiate(model_of(TABLE_QUANTIZED), straight_through=True))
    verdicts = verify_gradients(made, {"ids": IDS, "labels": LABELS})
    assert {item.parameter: (item.status, item.why) for item in verdicts} == {
        "W": ("ok", ""),
        "emb": (
            "skipped",
            "QuantizeLinear rounds it: the loss is a staircase, and its gradient an estimate",
        ),
    }
