"""Roles of parameters: each kind of product, however the matrix is stored, and what decides between the roles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from corpus_cases import GRAPHS

from kfac_onnx import metadata
from kfac_onnx.metadata import Parameter, Role
from kfac_onnx.passes.classify import Classify
from kfac_onnx.passes.find_embeddings import FindEmbeddings
from kfac_onnx.pipeline.log import Log
from kfac_onnx.readers import read_training_graph

if TYPE_CHECKING:
    from collections.abc import Mapping


def classified(model: ir.Model) -> dict[str, Role]:
    FindEmbeddings().run(model, Log())
    Classify().run(model, Log())
    return {role.parameter: role for role in metadata.read_list(model, "roles", Role)}


def roles(
    body: str, weights: Mapping[str, tuple[int, ...]], inputs: str = "float[N, 6] x"
) -> dict[str, Role]:
    """Return the roles in a forward graph that ends in `loss`; the gradients are said to be some constants."""
    zeros = {name: np.zeros(shape, np.float32) for name, shape in weights.items()}
    text = f"""<ir_version: 10, opset_import: ["" : 18]>
    g ({inputs}) => (float loss) {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    for name, array in zeros.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, f"{name}_grad"))
        proto.graph.output.append(
            onnx.helper.make_tensor_value_info(f"{name}_grad", onnx.TensorProto.FLOAT, array.shape)
        )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    parameters = [Parameter(name, shape, "float32", f"{name}_grad") for name, shape in weights.items()]
    metadata.write(model, "parameters", parameters)
    metadata.write(model, "loss", metadata.Loss("loss", "mean"))
    Classify().run(model, Log())
    return {role.parameter: role for role in metadata.read_list(model, "roles", Role)}


TAIL = "t = MatMul(h, last) s = Softmax(t) loss = ReduceMean<keepdims = 0>(s)"


@pytest.mark.parametrize(
    ("body", "shape", "axes"),
    [
        ("h = MatMul(x, w)", (6, 5), ((1,), (0,), ())),
        ("h = Gemm<transB = 1>(x, w)", (5, 6), ((0,), (1,), ())),
        ("h = Gemm(x, w)", (6, 5), ((1,), (0,), ())),
        ("y = Transpose(x) k = MatMul(w, y) h = Transpose(k)", (5, 6), ((0,), (1,), ())),
        ("v = Transpose(w) h = MatMul(x, v)", (5, 6), ((0,), (1,), ())),
        ('h = Einsum<equation = "ni,oi->no">(x, w)', (5, 6), ((0,), (1,), ())),
        ("c = Constant<value = float {2}>() v = Mul(w, c) h = MatMul(x, v)", (6, 5), ((1,), (0,), ())),
        ("n = ReduceL2(w) v = Div(w, n) h = MatMul(x, v)", (6, 5), ((1,), (0,), ())),  # weight norm
        ("z = Constant<value_ints = [6, 5]>() v = Reshape(w, z) h = MatMul(x, v)", (30,), None),
        (
            "z = Constant<value_ints = [6, 5]>() v = Reshape(w, z) h = MatMul(x, v)",
            (6, 5, 1),
            ((1,), (0,), ()),
        ),
    ],
)
def test_a_hidden_matrix_however_it_is_stored(
    body: str, shape: tuple[int, ...], axes: tuple[tuple[int, ...], ...] | None
) -> None:
    found = roles(f"{body} {TAIL}", {"w": shape, "last": (5, 3)})
    if axes is None:  # a vector cut into a matrix has axes that cannot be told
        assert found["w"].kind == "vector"
        return
    role = found["w"]
    assert role.kind == "hidden", role.reason
    large = [
        tuple(axis for axis in part if shape[axis] > 1) for part in (role.rows, role.columns, role.stack)
    ]
    assert tuple(large) == axes
    assert found["last"].kind == "head"


def test_kernels_and_stacks() -> None:
    conv = "c = Conv(x, w) r = Relu(c) d = ConvTranspose(r, v) e = Conv<group = 2>(d, z) "
    tail = "f = Flatten(e) s = MatMul(f, last) loss = ReduceMean<keepdims = 0>(s)"
    weights = {"w": (4, 3, 3, 3), "v": (4, 2, 2, 2), "z": (2, 1, 1, 1), "last": (98, 3)}
    found = roles(conv + tail, weights, "float[N, 3, 8, 8] x")
    assert (found["w"].kind, found["w"].rows, found["w"].columns) == ("hidden", (0,), (1, 2, 3))
    assert (found["v"].kind, found["v"].rows, found["v"].columns) == ("hidden", (1, 2, 3), (0,))
    assert found["z"].kind == "vector"
    stacked = roles(
        "h = MatMul(x, w) m = ReduceMean<keepdims = 0>(h) t = MatMul(h, last) loss = ReduceSum<keepdims = 0>(t)",
        {"w": (2, 6, 5), "last": (5, 3)},
        "float[2, N, 6] x",
    )
    assert (stacked["w"].rows, stacked["w"].columns, stacked["w"].stack) == ((2,), (1,), (0,))


def test_a_depthwise_convolution_is_no_matrix() -> None:
    body = "c = Conv<group = 3>(x, w) f = Flatten(c) s = MatMul(f, last) loss = ReduceMean<keepdims = 0>(s)"
    found = roles(body, {"w": (3, 1, 3, 3), "last": (108, 3)}, "float[N, 3, 8, 8] x")
    assert found["w"].kind == "other"
    assert found["w"].reason == "Conv 'c' is a convolution of each channel with a kernel of its own"


@pytest.mark.parametrize(("classes", "kind"), [(256, "output"), (255, "head")])
def test_an_output_table_has_many_classes_and_a_softmax(classes: int, kind: str) -> None:
    body = "h = MatMul(x, w) t = MatMul(h, last) s = LogSoftmax(t) loss = ReduceMean<keepdims = 0>(s)"
    assert roles(body, {"w": (6, 5), "last": (5, classes)})["last"].kind == kind
    squares = "h = MatMul(x, w) t = MatMul(h, last) s = Mul(t, t) loss = ReduceMean<keepdims = 0>(s)"
    assert roles(squares, {"w": (6, 5), "last": (5, classes)})["last"].kind == "head"


@pytest.mark.parametrize(
    ("body", "shape", "activations", "features", "bias"),
    [
        ("t = Gemm<transB = 1>(h, last, b)", (300, 5), "h", -1, "b"),
        ("u = MatMul(h, last) t = Add(u, b)", (5, 300), "h", -1, "b"),
        ("y = Transpose(h) u = MatMul(last, y) v = Transpose(u) t = Add(v, b)", (300, 5), "y", -2, None),
        ('u = Einsum<equation = "nj,ij->ni">(h, last) t = Add(u, b)', (300, 5), "h", 1, "b"),
        ("u = MatMul(h, last) c = Mul(b, b) v = Add(u, c) t = Add(v, b)", (5, 300), "h", -1, None),
    ],
)
def test_what_an_output_table_multiplies_and_what_is_added(
    body: str, shape: tuple[int, int], activations: str, features: int, bias: str | None
) -> None:
    text = f"h = MatMul(x, w) {body} s = LogSoftmax(t) loss = ReduceMean<keepdims = 0>(s)"
    role = roles(text, {"w": (6, 5), "last": shape, "b": (300,)})["last"]
    assert (role.kind, role.activations, role.features, role.bias) == ("output", activations, features, bias)


def test_what_multiplies_no_activations() -> None:
    body = "y = Add(x, p) h = MatMul(y, w) q = Mul(u, u) s = ReduceSum<keepdims = 0>(q) t = Add(h, s) " + (
        "loss = ReduceMean<keepdims = 0>(t)"
    )
    found = roles(body, {"p": (4, 6), "w": (6, 5), "u": (7, 3)}, "float[4, 6] x")
    assert {name: role.kind for name, role in found.items()} == {"p": "other", "w": "head", "u": "other"}
    assert found["p"].reason == found["u"].reason == "it multiplies no activations"


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("torchjoint_in__gpt_tied", {"table": 2, "vector": 10, "hidden": 4}),
        ("ortart_dynloss__gpt_untied", {"table": 2, "vector": 10, "hidden": 4, "head": 1}),
        ("torchjoint_in__lstm_lm", {"table": 1, "vector": 3, "hidden": 2, "head": 1}),
        ("torchjoint_in__dlrm_mean", {"table": 3, "vector": 4, "hidden": 2}),
        ("tf2onnx_in__nplm", {"table": 1, "vector": 2, "hidden": 1, "head": 1}),
    ],
)
def test_real_graphs(name: str, kinds: dict[str, int]) -> None:
    found = [role.kind for role in classified(read_training_graph(GRAPHS / f"{name}.onnx")).values()]
    assert {kind: found.count(kind) for kind in dict.fromkeys(found)} == kinds
