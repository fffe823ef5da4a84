"""The gate for model files: each rule refuses what breaks it in one sentence, and sound graphs pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest
from onnx import TensorProto, helper

from kfac_onnx.disk.wellformed import require_wellformed
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

DATA = Path(__file__).parents[1] / "data"

TEXT = """<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>
g (float[4, 2] x, bool c) => (float[4, 2] y) <float[2] w = {1, 2}> {
  a = Add(x, w)
  b = If (c) <
    then_branch = yes () => (float[4, 2] t) { t = Neg(a) },
    else_branch = no () => (float[4, 2] t) { t = Identity(a) }
  >
  y = Concat <axis = 0> (b)
}
"""


def model() -> onnx.ModelProto:
    return onnx.parser.parse_model(TEXT)


def refusal(proto: onnx.ModelProto) -> str:
    with pytest.raises(UserError) as caught:
        require_wellformed(proto, "m.onnx")
    head = "the ONNX model is malformed: "
    assert caught.value.message.startswith(head)
    return caught.value.message.removeprefix(head)


def test_sound_graphs_pass() -> None:
    require_wellformed(model(), None)
    paths = sorted(DATA.rglob("*.onnx"))
    assert len(paths) > 100
    for path in paths:
        require_wellformed(onnx.load(path, load_external_data=False), str(path))


def _function(proto: onnx.ModelProto, name: str, *callees: str) -> None:
    imports = [helper.make_opsetid("own", 1)]
    calls = [helper.make_node(callee, ["x"], [f"v{i}"], domain="own") for i, callee in enumerate(callees)]
    last = helper.make_node("Identity", ["x"], ["y"])
    proto.functions.append(helper.make_function("own", name, ["x"], ["y"], [*calls, last], imports))


def _chain(proto: onnx.ModelProto, depth: int) -> None:
    for level in range(depth):
        _function(proto, f"F{level}", f"F{level + 1}", f"F{level + 1}")
    _function(proto, f"F{depth}")
    proto.graph.node.append(helper.make_node("F0", ["x"], ["z"], domain="own"))


def test_functions_may_call_others_but_not_themselves() -> None:
    proto = model()
    _function(proto, "F", "G", "G")
    _function(proto, "G")
    require_wellformed(proto, None)
    proto = model()
    _function(proto, "F", "F")
    assert refusal(proto) == "function own::F calls itself"
    proto = model()
    for name, callee in ("FG", "GH", "HF"):
        _function(proto, name, callee)
    assert "calls itself" in refusal(proto)
    proto = model()
    _function(proto, "F")
    _function(proto, "F")
    assert refusal(proto) == "it holds two functions of the same name"


def test_functions_may_not_multiply_the_graph() -> None:
    proto = model()
    _chain(proto, 4)
    require_wellformed(proto, None)
    proto = model()
    _chain(proto, 40)
    assert refusal(proto).startswith("its functions multiply 127 nodes to more than")
    proto = model()
    _chain(proto, 13)
    assert refusal(proto) == "its functions multiply 46 nodes to too many of the same name"


def _w(proto: onnx.ModelProto) -> TensorProto:
    return proto.graph.initializer[0]


def _set(name: str, value: object) -> Callable[[onnx.ModelProto], None]:
    return lambda proto: setattr(_w(proto), name, value)


def _dims(*dims: int) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        _w(proto).dims[:] = dims

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_dims(3), "tensor 'w' of shape [3] holds 2 entries instead of 3"),
        (_dims(2**40, 2**20), f"tensor 'w' of shape [{2**40}, {2**20}] holds 2 entries instead of {2**60}"),
        (_dims(-2), "tensor 'w' has a negative dimension: [-2]"),
        (_set("data_type", 0), "tensor 'w' has no known element type (0)"),
        (_set("data_type", 99), "tensor 'w' has no known element type (99)"),
        (_set("data_type", TensorProto.DOUBLE), "tensor 'w' of shape [2] holds 0 entries instead of 2"),
        (_set("data_type", TensorProto.STRING), "tensor 'w' of shape [2] holds 0 entries instead of 2"),
        (_set("raw_data", b"\0" * 7), "tensor 'w' of shape [2] holds 7 bytes instead of 8"),
    ],
)
def test_tensors_hold_what_they_say(change: Callable[[onnx.ModelProto], None], said: str) -> None:
    proto = model()
    change(proto)
    assert refusal(proto) == said


@pytest.mark.parametrize(
    ("dtype", "count", "size"),
    [("INT4", 3, 2), ("UINT4", 4, 2), ("BFLOAT16", 3, 6), ("FLOAT8E4M3FN", 3, 3), ("BOOL", 3, 3)],
)
def test_narrow_types_have_their_sizes(dtype: str, count: int, size: int) -> None:
    proto = model()
    tensor = TensorProto(name="k", data_type=getattr(TensorProto, dtype), dims=[count], raw_data=b"\0" * size)
    proto.graph.initializer.append(tensor)
    require_wellformed(proto, None)
    proto.graph.initializer[-1].raw_data += b"\0"
    assert refusal(proto) == f"tensor 'k' of shape [{count}] holds {size + 1} bytes instead of {size}"


def _rename(old: str, new: str) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        for node in proto.graph.node:
            node.output[:] = [new if name == old else name for name in node.output]

    return change


def _add(field: str, name: str) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        if field == "initializer":
            proto.graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [], [0.0]))
        else:
            info = helper.make_tensor_value_info(name, TensorProto.FLOAT, [])
            getattr(proto.graph, field).append(info)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_rename("b", "a"), "the output 'a' of node If 'a' has the name of another value"),
        (_rename("a", "x"), "the output 'x' of node Add 'x' has the name of another value"),
        (_rename("a", "q"), "node If 'b' reads 'a', which nothing makes"),
        (_rename("y", "q"), "nothing makes its output 'y'"),
        (_add("input", "x"), "two inputs or initializers are named 'x'"),
        (_add("input", ""), "an input or an initializer has no name"),
        (_add("initializer", "w"), "two initializers are named 'w'"),
        (_add("initializer", "a"), "the output 'a' of node Add 'a' has the name of another value"),
        (_add("output", "none"), "nothing makes its output 'none'"),
    ],
)
def test_names_are_there_and_unique(change: Callable[[onnx.ModelProto], None], said: str) -> None:
    proto = model()
    change(proto)
    assert refusal(proto).replace("node Neg 't' reads", "node If 'b' reads") == said


def _node(index: int, change: Callable[[onnx.NodeProto], object]) -> Callable[[onnx.ModelProto], None]:
    return lambda proto: change(proto.graph.node[index]) and None


def _grad(**attributes: object) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        node = helper.make_node("GatherGrad", ["x", "x", "x"], ["z"], domain="com.microsoft", **attributes)
        proto.graph.node.append(node)

    return change


def _aten(operator: str, count: int) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        node = helper.make_node("ATen", ["x"] * count, ["z"], domain="org.pytorch.aten", operator=operator)
        proto.graph.node.append(node)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_node(0, lambda node: node.input.pop()), "node Add 'a' has 1 inputs, not 2"),
        (_node(0, lambda node: node.input.__setitem__(0, "")), "node Add 'a' lacks its input 'A'"),
        (_node(0, lambda node: node.output.append("e")), "node Add 'a' has 2 outputs, not 1"),
        (_node(2, lambda node: node.attribute.pop()), "node Concat 'y' lacks its attribute 'axis'"),
        (
            _node(2, lambda node: node.attribute[0].CopyFrom(helper.make_attribute("axis", "0"))),
            "node Concat 'y' has an attribute 'axis' that is not of type INT",
        ),
        (
            _node(2, lambda node: node.attribute.add().CopyFrom(node.attribute[0])),
            "node Concat 'y' has an attribute twice",
        ),
        (
            _node(1, lambda node: node.attribute[0].g.output.pop()),
            "node If 'b' needs a then_branch without inputs and with 1 outputs",
        ),
        (
            _grad(axis="0"),
            "node com.microsoft::GatherGrad 'z' has an attribute 'axis' that is not of type INT",
        ),
        (
            _grad(output_type=[1.0]),
            "node com.microsoft::GatherGrad 'z' has an attribute 'output_type' that is not of type INT",
        ),
        (_aten("embedding_backward", 4), "node org.pytorch.aten::ATen 'z' lacks inputs: 5 are needed"),
    ],
)
def test_nodes_fit_their_operators(change: Callable[[onnx.ModelProto], None], said: str) -> None:
    proto = model()
    change(proto)
    assert refusal(proto) == said


def test_operators_that_nobody_knows_may_have_anything() -> None:
    proto = model()
    proto.graph.node.append(helper.make_node("Own", ["x"] * 9, ["z"], domain="mine", axis="text"))
    _grad(axis=0)(proto)
    proto.graph.node[-1].output[0] = "zz"
    _aten("embedding_backward", 5)(proto)
    proto.graph.node[-1].output[0] = "zzz"
    require_wellformed(proto, None)


def test_loops_have_bodies_that_fit() -> None:
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (int64 n, bool c, float s) => (float y) {
      y = Loop (n, c, s) <body = b (int64 i, bool k, float u) => (bool k2, float v) { k2 = Identity(k)  v = Neg(u) }>
    }"""
    proto = onnx.parser.parse_model(text)
    require_wellformed(proto, None)
    proto.graph.node[0].attribute[0].g.input.pop()
    proto.graph.node[0].attribute[0].g.node[1].input[0] = "s"
    assert refusal(proto) == "node Loop 'y' has a body that does not fit its inputs and outputs"


def _input_type(change: Callable[[onnx.TypeProto], object]) -> Callable[[onnx.ModelProto], None]:
    return lambda proto: change(proto.graph.input[0].type) and None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_input_type(lambda kind: kind.Clear()), "its input 'x' has no type"),
        (
            _input_type(lambda kind: setattr(kind.tensor_type, "elem_type", 99)),
            "its input 'x' has no known element type (99)",
        ),
        (
            _input_type(lambda kind: setattr(kind.tensor_type, "elem_type", 0)),
            "its input 'x' has no known element type (0)",
        ),
    ],
)
def test_inputs_have_types(change: Callable[[onnx.ModelProto], None], said: str) -> None:
    proto = model()
    change(proto)
    assert refusal(proto) == said


def test_texts_are_utf8() -> None:
    data = model().SerializeToString()
    proto = onnx.ModelProto.FromString(data.replace(b"Concat", b"Conc\xf7t"))
    assert refusal(proto) == r"b'Conc\xf7t' stands where a text should be"


def test_inputs_may_be_sequences() -> None:
    """As those of ONNX Runtime's optimizer models are."""
    proto = model()
    proto.graph.input[0].type.sequence_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT
    require_wellformed(proto, None)
