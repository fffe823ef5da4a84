"""State that the graph itself changes: declared by an exporter, or the statistics of batch normalization."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import parser

import kfac_onnx as kx
from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.readers import read_training_graph

if TYPE_CHECKING:
    from pathlib import Path

HEAD = '<ir_version: 8, opset_import: ["": 18]>'
# Float32 sums over tens of terms: 1e-6 each. A result scaled by 1.01 is off by 1e-2.
TOLERANCE = 1e-5


def plain(scalar: str = "") -> onnx.ModelProto:
    """Return y = x·W + centre, loss = mean y², where `centre` moves towards the mean of x·W."""
    return parser.parse_model(f"""{HEAD}
    g (float[batch, 2] x) => (float loss, float[2, 3] W_grad, float[3] centre_new{scalar})
    <float[2, 3] W = {{1, 2, 3, 4, 5, 6}}, float[3] centre = {{0.5, 0, 0}}, float kept = {{0.9}},
     float fresh = {{0.1}}, int64[1] first = {{0}}, float two = {{2}}>
    {{
        h = MatMul(x, W)
        y = Add(h, centre)
        squares = Mul(y, y)
        loss = ReduceMean<keepdims = 0>(squares)
        average = ReduceMean<keepdims = 0>(h, first)
        old = Mul(centre, kept)
        new = Mul(average, fresh)
        centre_new = Add(old, new)
        count = Size(y)
        number = CastLike(count, y)
        share = Div(two, number)
        dy = Mul(y, share)
        xt = Transpose<perm = [1, 0]>(x)
        W_grad = MatMul(xt, dy)
    }}""")


def declared(model: onnx.ModelProto, *pairs: tuple[str, str]) -> onnx.ModelProto:
    entry = [{"input": source, "output": result} for source, result in pairs]
    onnx.helper.set_model_props(model, {"kfac.carried": json.dumps(entry)})
    return model


def test_a_declared_state_is_carried_from_step_to_step() -> None:
    rng = np.random.default_rng(0)
    model = declared(plain(), ("centre", "centre_new"))
    W, centre = np.arange(1.0, 7.0).reshape(2, 3), np.array([0.5, 0, 0])
    step = kx.transform(model, preset="plain-sgd", rest="sgd", rest_lr=0.01, lr=0.01)
    with kx.TrainingSession(step) as session:
        for size in (4, 1, 7, 4):
            x = rng.standard_normal((size, 2))
            h = x @ W
            y = h + centre
            metrics = session.step({"x": x.astype(np.float32)})
            np.testing.assert_allclose(metrics["loss"], np.mean(y * y), rtol=TOLERANCE)
            centre = 0.9 * centre + 0.1 * h.mean(0)
            W = W - 0.01 * x.T @ (2 * y / y.size)
            np.testing.assert_allclose(session.statistics["centre"], centre, rtol=TOLERANCE, atol=1e-6)
            np.testing.assert_allclose(session.parameters["W"], W, rtol=TOLERANCE)
        assert list(session.parameters) == ["W"]


def test_a_skipped_step_leaves_the_state() -> None:
    model = declared(plain(), ("centre", "centre_new"))
    with kx.TrainingSession(kx.transform(model, preset="plain-sgd", rest="sgd")) as session:
        metrics = session.step({"x": np.array([[np.inf, 0.0]], np.float32)})
        assert metrics["skipped"]
        np.testing.assert_array_equal(session.statistics["centre"], np.array([0.5, 0, 0], np.float32))


def test_the_state_is_in_checkpoints_and_exports(tmp_path: Path) -> None:
    model = declared(plain(), ("centre", "centre_new"))
    x = np.array([[1.0, 2.0], [0.5, -1.0]], np.float32)
    forward = parser.parse_model(f"""{HEAD}
    f (float[batch, 2] x) => (float[batch, 3] y)
    <float[2, 3] W = {{0, 0, 0, 0, 0, 0}}, float[3] centre = {{0, 0, 0}}>
    {{ h = MatMul(x, W)  y = Add(h, centre) }}""")
    onnx.save(forward, tmp_path / "forward.onnx")
    kx.save(kx.transform(model, preset="plain-sgd", rest="sgd"), tmp_path / "step.onnx")
    with kx.TrainingSession(tmp_path / "step.onnx") as session:
        session.step({"x": x})
        session.save(tmp_path / "run.ckpt")
        centre = session.statistics["centre"]
        places = session.export(tmp_path / "trained.onnx", into=tmp_path / "forward.onnx")
        session.step({"x": x})
        later = session.statistics["centre"]
    assert places == {"W": "W", "centre": "centre"}
    values = {
        item.name: onnx.numpy_helper.to_array(item)
        for item in onnx.load(tmp_path / "trained.onnx").graph.initializer
    }
    np.testing.assert_array_equal(values["centre"], centre)
    with kx.TrainingSession.resume(tmp_path / "run.ckpt") as session:
        np.testing.assert_array_equal(session.statistics["centre"], centre)
        session.step({"x": x})
        np.testing.assert_array_equal(session.statistics["centre"], later)


def test_a_scalar_state_is_not_taken_for_the_loss() -> None:
    model = plain(", float total")
    model.graph.node.append(onnx.helper.make_node("Add", ["kept", "loss"], ["total"]))
    assert kx.scan(declared(model, ("centre", "centre_new"), ("kept", "total"))).loss == "loss"


@pytest.mark.parametrize(
    ("pair", "kind", "name", "hint"),
    [
        (("center", "centre_new"), "input", "center", "; did you mean 'centre'?"),
        (("centre", "centre_now"), "output", "centre_now", "; did you mean 'centre_new'?"),
    ],
)
def test_a_declared_pair_must_exist(pair: tuple[str, str], kind: str, name: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        kx.scan(declared(plain(), pair))
    assert str(caught.value) == (
        f"the graph declares the state '{pair[0]}' with {kind} '{name}', which it does not have{hint}\n"
        "  help: kfac.carried in its metadata lists pairs of input and output; export it again"
    )


def normed(calls: int, outputs: int) -> onnx.ModelProto:
    """Return a graph with batch normalization in training mode, `calls` times by the same statistics."""
    nodes, last = [], "x"
    for call in range(calls):
        results = [f"y{call}", f"mean{call}", f"var{call}"][:outputs]
        nodes.append(
            f"{', '.join(results)} = BatchNormalization<training_mode = 1, momentum = 0.8>"
            f"({last}, scale, bias, mean, var)"
        )
        last = f"y{call}"
    body = "\n".join(nodes)
    return parser.parse_model(f"""{HEAD}
    g (float[batch, 3] x) => (float loss, float[3] W_grad)
    <float[3] W = {{1, 2, 3}}, float[3] scale = {{1, 1, 1}}, float[3] bias = {{0, 0, 0}},
     float[3] mean = {{0, 0, 0}}, float[3] var = {{1, 1, 1}}, int64[1] first = {{0}}>
    {{
        {body}
        product = Mul({last}, W)
        loss = ReduceSum<keepdims = 0>(product)
        W_grad = ReduceSum<keepdims = 0>({last}, first)
    }}""")


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("calls", [1, 2])
def test_running_statistics_of_any_exporter_are_seen(calls: int, outputs: int) -> None:
    model = normed(calls, outputs)
    pairs = metadata.read_list(read_training_graph(model), "carried", metadata.Carried)
    assert [pair.input for pair in pairs] == ["mean", "var"]
    mean, var = np.zeros(3), np.ones(3)
    with kx.TrainingSession(kx.transform(model, preset="plain-sgd", rest="sgd")) as session:
        for seed in range(3):
            y = np.random.default_rng(seed).standard_normal((6, 3))
            session.step({"x": y.astype(np.float32)})
            for _ in range(calls):
                mean, var = 0.8 * mean + 0.2 * y.mean(0), 0.8 * var + 0.2 * y.var(0)
                y = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5)
        np.testing.assert_allclose(session.statistics["mean"], mean, rtol=TOLERANCE, atol=1e-6)
        np.testing.assert_allclose(session.statistics["var"], var, rtol=TOLERANCE)


def test_statistics_of_the_batch_are_no_finding() -> None:
    model = parser.parse_model(f"""{HEAD}
    g (float[batch, 3] x) => (float loss, float[3] W_grad)
    <float[3] W = {{1, 2, 3}}, float[3] scale = {{1, 1, 1}}, float[3] bias = {{0, 0, 0}}, int64[1] first = {{0}}>
    {{
        mean = ReduceMean<keepdims = 0>(x, first)
        off = Sub(x, mean)
        square = Mul(off, off)
        var = ReduceMean<keepdims = 0>(square, first)
        y = BatchNormalization(x, scale, bias, mean, var)
        product = Mul(y, W)
        loss = ReduceSum<keepdims = 0>(product)
        W_grad = ReduceSum<keepdims = 0>(y, first)
    }}""")
    assert [finding.id for finding in kx.check(model).findings if "batch-norm" in finding.id] == []


def test_a_counter_is_no_constant() -> None:
    model = plain(", int64 count_new")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(5), "counted"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1), "one"))
    model.graph.node.append(onnx.helper.make_node("Add", ["counted", "one"], ["once"]))
    model.graph.node.append(onnx.helper.make_node("Add", ["once", "one"], ["count_new"]))
    step = kx.transform(
        declared(model, ("centre", "centre_new"), ("counted", "count_new")), preset="plain-sgd", rest="sgd"
    )
    with kx.TrainingSession(step) as session:
        for count in (7, 9, 11):
            session.step({"x": np.ones((2, 2), np.float32)})
            assert session.statistics["counted"] == count
        assert session.batch_inputs[0].name == "x"
