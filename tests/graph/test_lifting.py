"""Weights in `Constant` nodes are trained as initializers are, in every form that a file may give them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

import kfac_onnx as kx
from kfac_onnx import metadata
from kfac_onnx.metadata import Parameter
from kfac_onnx.runtime.saved.export import filled
from kfac_onnx.runtime.saved.weights import read_weights

if TYPE_CHECKING:
    from pathlib import Path

TABLE = np.arange(44, dtype=np.float32).reshape(11, 4) / 50 - 0.4
MATRIX = np.arange(12, dtype=np.float32).reshape(4, 3) / 10 - 0.5
HEADER = '<ir_version: 10, opset_import: ["" : 20, "local" : 1]>'
READ = "e = Gather(emb, ids) m = ReduceMean<keepdims: int = 0>(e, ax) z = MatMul(m, w)"


def text(array: np.ndarray) -> str:
    return "{" + ", ".join(f"{number:.9g}" for number in array.reshape(-1)) + "}"


def constant(name: str, array: np.ndarray) -> str:
    dims = ", ".join(map(str, array.shape))
    return f"{name} = Constant<value: tensor = float[{dims}] {text(array)}>()"


IN_NODES = f"""{HEADER} g (int64[b, 5] ids) => (float[b, 3] z) <int64[1] ax = {{1}}> {{
    {constant("emb", TABLE)} {constant("w", MATRIX)} {READ}
}}"""
AS_FLOATS = f"""{HEADER} g (int64[b, 5] ids) => (float[b, 3] z) <int64[1] ax = {{1}}, int64[2] s = {{11, 4}}> {{
    flat = Constant<value_floats: floats = {text(TABLE).replace("{", "[").replace("}", "]")}>()
    emb = Reshape(flat, s)
    {constant("w", MATRIX)} {READ}
}}"""
IN_FUNCTION = f"""{HEADER} g (int64[b, 5] ids) => (float[b, 3] z) <int64[1] ax = {{1}}> {{
    z = local.model(ids, ax)
}}
<domain: "local", opset_import: ["" : 20]> model (ids, ax) => (z) {{
    {constant("emb", TABLE)} {constant("w", MATRIX)} {READ}
}}"""
IN_BRANCH = f"""{HEADER} g (int64[b, 5] ids, bool yes) => (float[b, 3] z) <int64[1] ax = {{1}}> {{
    {constant("w", MATRIX)}
    z = If(yes)<
        then_branch: graph = one () => (float[b, 3] z1) {{
            {constant("emb", TABLE)} e = Gather(emb, ids) m = ReduceMean<keepdims: int = 0>(e, ax)
            z1 = MatMul(m, w)
        }},
        else_branch: graph = two () => (float[b, 3] z2) {{
            {constant("emb", TABLE + 1)} f = Gather(emb, ids) n = ReduceMean<keepdims: int = 0>(f, ax)
            z2 = MatMul(n, w)
        }}>
}}"""
INITIALIZERS = f"""{HEADER} g (int64[b, 5] ids) => (float[b, 3] z)
    <int64[1] ax = {{1}}, float[11, 4] emb = {text(TABLE)}, float[4, 3] w = {text(MATRIX)}> {{ {READ} }}"""


def parameters(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    found = metadata.read_list(kx.differentiate(model), "parameters", Parameter)
    return {item.name: item.shape for item in found}


@pytest.mark.parametrize(
    ("written", "shapes"),
    [
        (IN_NODES, [(4, 3), (11, 4)]),
        (AS_FLOATS, [(4, 3), (44,)]),
        (IN_FUNCTION, [(4, 3), (11, 4)]),
        (IN_BRANCH, [(4, 3), (11, 4), (11, 4)]),
    ],
    ids=["nodes", "value_floats", "function", "branches"],
)
def test_constants_that_are_weights_are_trained(written: str, shapes: list[tuple[int, ...]]) -> None:
    assert sorted(parameters(onnx.parser.parse_model(written)).values()) == shapes


def stepped(model: onnx.ModelProto, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    made = kx.transform(kx.differentiate(model), preset="plain-sgd", lr=0.5, rest="sgd", rest_lr=0.5)
    with kx.TrainingSession(made) as session:
        session.step(batch)
        return dict(session.parameters)


def test_a_step_moves_them_as_it_moves_initializers() -> None:
    batch = {
        "ids": np.array([[1, 2, 3, 4, 5], [5, 5, 0, 1, 2]]),
        "labels": np.array([2, 0]),
    }
    plain = stepped(onnx.parser.parse_model(INITIALIZERS), batch)
    lifted = stepped(onnx.parser.parse_model(IN_NODES), batch)
    assert set(lifted) == set(plain) == {"emb", "w"}
    for name, array in plain.items():
        np.testing.assert_array_equal(lifted[name], array)
        assert np.abs(array - {"emb": TABLE, "w": MATRIX}[name]).max() > 1e-3


def test_the_training_graph_of_another_exporter_may_hold_them_too() -> None:
    model = onnx.parser.parse_model(f"""{HEADER} g (int64[n] ids, float[n, 4] y) => (float loss, float[11, 4] emb_grad)
        <int64[2] s = {{11, 4}}, int64[1] last = {{-1}}> {{
        {constant("emb", TABLE)}
        e = Gather(emb, ids) p = Mul(e, y) loss = ReduceSum<keepdims: int = 0>(p)
        zeros = ConstantOfShape(s) places = Unsqueeze(ids, last)
        emb_grad = ScatterND<reduction: string = "add">(zeros, places, y)
    }}""")
    report = kx.scan(model)
    assert [site.parameter for site in report.sites] == ["emb"]
    assert not report.refused


def test_weights_are_read_from_and_put_into_constants(tmp_path: Path) -> None:
    path = tmp_path / "forward.onnx"
    onnx.save(onnx.parser.parse_model(IN_NODES), path)
    found = read_weights(path)
    np.testing.assert_array_equal(found["emb"], TABLE)
    trained = {"emb": TABLE * 2, "w": MATRIX + 1}
    model, places = filled(trained, path)
    assert places == {"emb": "emb", "w": "w"}
    for name, array in trained.items():
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), array)
